r"""Instruction backtranslation (arXiv 2308.06259): texts become answers, a model writes their instructions, another
chooses the good pairs, and the next one is trained on these and the seed data.

    python -m scripts.backtranslate train_backward --data_path seed.json --model_name_or_path <base> --output_dir Myx
    python -m scripts.backtranslate augment --data_path texts.jsonl --model_name Myx --output_path candidates.jsonl
    python -m scripts.backtranslate curate --data_path candidates.jsonl --model_name M0 --output_path a5.json
    python -m scripts.backtranslate mix --seed_path seed.json --augmented_path a5.json --output_path m1.json

M0 is the base trained on seed.json, M1 on m1.json, both by train.py. Every answer of a model is journaled beside the
file that it goes into: after a kill the same command continues and asks nothing twice. <step> --help lists its flags.
"""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import utils
from alpaca.common import commands
from alpaca.common.commands import check_numbers
from alpaca.common.errors import UsageError, format_first, reported
from alpaca.common.files import refuse_overwriting_input
from alpaca.completions.api import Model, Sampling
from alpaca.completions.budget import Budget, budget_of, estimate
from alpaca.completions.rows import BatchCompletion, write_rows
from alpaca.data.prompts import BACKWARD_PROMPT_DICT, PROMPT_DICT, backward_prompt, load_prompt_template
from alpaca.data.rows import Row, load_named, load_rows, raw_rows
from alpaca.datagen.backtranslation import Curation, inference_templates, mixed, pairs_of, rated_row, rating_prompt
from alpaca.datagen.texts import Filters, load_texts
from alpaca.inference.backend import ModelBackend, PromptSet, fitting

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
# Those of recipes/backtranslation_llama2_7b_lora.sh, which says what of them is published. A test compares the two.
BACKWARD_FLAGS = {
    "backward": "True",
    "lora_r": "8",
    "lora_alpha": "32",
    "lora_dropout": "0.05",
    "lora_target_modules": "q_proj,k_proj,v_proj,o_proj",
    "bf16": "True",
    "model_max_length": "2048",
    "num_train_epochs": "3",
    "per_device_train_batch_size": "4",
    "per_device_eval_batch_size": "4",
    "evaluation_strategy": "no",
    "save_strategy": "steps",
    "save_steps": "200",
    "save_total_limit": "1",
    "learning_rate": "2e-4",
    "weight_decay": "0.",
    "warmup_ratio": "0.03",
    "lr_scheduler_type": "cosine",
    "logging_steps": "1",
    "tf32": "True",
}
BACKWARD_BATCH = 32


# ---- train_backward ----


def train_backward(
    data_path: str,
    model_name_or_path: str,
    output_dir: str,
    nproc_per_node: int = 1,
    dry_run: bool = False,
    **train_flags: str,
) -> None:
    """Train the backward model, from an output to its instruction: prints a command of train.py, and becomes it.

    It is LoRA with the settings of recipes/backtranslation_llama2_7b_lora.sh. Every other flag of train.py can be given
    too, and wins: --lora_target_modules all-linear, --num_train_epochs 1, --resume_from_checkpoint True.

    Args:
        data_path: the seed data, anything that train.py takes.
        model_name_or_path: the base model.
        output_dir: gets the adapter.
        nproc_per_node: processes, through torchrun if more than one; the batch stays 32.
        dry_run: print the command and do nothing.
    """
    check_numbers(nproc_per_node=nproc_per_node)
    given = {"model_name_or_path": model_name_or_path, "data_path": data_path, "output_dir": output_dir}
    flags = given | BACKWARD_FLAGS | train_flags
    if "gradient_accumulation_steps" not in flags:
        flags["gradient_accumulation_steps"] = _accumulation(flags["per_device_train_batch_size"], nproc_per_node)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc_per_node}"]
    command = [sys.executable, *torchrun * (nproc_per_node > 1), str(TRAIN)]
    command += [f"--{name}={value}" for name, value in flags.items()]
    print(shlex.join(command), flush=True)
    if not dry_run:
        os.execv(command[0], command)  # signals and the exit status are train.py's


def _accumulation(rows: str, processes: int) -> str:
    concurrency = int(rows) * processes if rows.isdecimal() else 0
    if not concurrency or BACKWARD_BATCH % concurrency:
        raise UsageError(
            f"--per_device_train_batch_size {rows} in {processes} processes does not divide the batch of "
            f"{BACKWARD_BATCH}; give --gradient_accumulation_steps for another one"
        )
    return str(BACKWARD_BATCH // concurrency)


# ---- augment ----


def augment(
    data_path: str,
    output_path: str,
    model_name: str,
    base: str | None = None,
    base_url: str | None = None,
    api: str = "completions",
    batch_size: int = 8,
    text_field: str | None = None,
    data_split: str = "train",
    min_chars: int = 200,
    max_chars: int = 4000,
    max_capitals: float = 0.3,
    min_english: float = 0.0,
    prompt_template: str | None = None,
    temperature: float = 0.7,
    top_p: float = 0.9,
    max_tokens: int = 256,
    seed: int = 42,
    keep_cut: bool = False,
    drop_failed: bool = False,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    price_in: float = 0.0,
    price_out: float = 0.0,
    max_cost: float | None = None,
    dry_run: bool = False,
) -> None:
    """Write an instruction for every text that the filters keep: rows of instruction, output (the text) and source.

    source is the number of the text's row. What is left out is printed, and with all row numbers in
    <output_path>.report.json.

    Args:
        data_path: texts: JSON, JSONL, CSV, parquet with a field `text`, an Alpaca file (its outputs), or .txt with
            segments between empty lines.
        output_path: JSONL (or .json) of the pairs; its journal lies beside it.
        model_name: the folder of a backward model or its adapter, or a model of the server.
        base: the base model of an adapter, where it is not where it was in training.
        base_url: of a server; not given, OPENAI_BASE_URL; without both model_name may be a folder.
        api: completions, for a backward model that is served; chat, for a general model, which gets the same prompt.
        batch_size: prompts in a batch, or requests on their way at once.
        text_field: the field of a row that is the text; not given, output if there is one, else text.
        data_split: of a hub dataset.
        min_chars: shorter texts are left out.
        max_chars: longer texts are left out.
        max_capitals: texts with a larger share of capital letters are left out.
        min_english: texts with a smaller share of common English words are left out. A heuristic, which drops lists,
            tables and code too; 0 takes every language, 0.1 hardly any but English.
        prompt_template: JSON file with another prompt than that of the model's folder, or of train.py --backward.
        temperature: of sampling; 0.7 in the paper.
        top_p: of sampling; 0.9 in the paper.
        max_tokens: of an instruction. Those that are cut there are left out, and counted.
        seed: of sampling; every text has its own, drawn from this one.
        keep_cut: keep instructions that were cut at max_tokens.
        drop_failed: leave out texts that the model does not answer; else they are an error at the end.
        load_in_8bit: quantize a folder's weights with bitsandbytes.
        load_in_4bit: quantize a folder's weights with bitsandbytes.
        price_in: dollars per million prompt tokens.
        price_out: dollars per million generated tokens.
        max_cost: dollars that are never exceeded, earlier runs with this output_path included.
        dry_run: filter, print one prompt and an estimate of tokens and cost, ask nothing.
    """
    sampling, budget = Sampling(max_tokens, temperature, top_p), budget_of(price_in, price_out, max_cost)
    respondent = ModelBackend(model_name, sampling, base, base_url, api, batch_size, load_in_8bit, load_in_4bit, seed)
    if api not in ("completions", "chat"):
        raise UsageError(f"--api {api}: expected completions, or chat")
    refuse_overwriting_input(output_path, data_path)
    filters = Filters(min_chars, max_chars, max_capitals, min_english)
    templates = load_prompt_template(prompt_template, backward=True)
    texts = load_texts(data_path, data_split, text_field)
    kept, left_out = filters.choose(texts)
    print(f"{len(texts):,} texts in {data_path}, {len(kept):,} kept{_counts(left_out)}", flush=True)
    if not kept:
        raise UsageError(f"--data_path {data_path}: the filters leave none of its {len(texts):,} texts")
    if dry_run:
        print(estimate([backward_prompt(texts[n], templates) for n in kept[:1000]], len(kept), max_tokens, budget))
        return

    model = respondent.open()
    templates = templates if prompt_template else _backward_templates(model, model_name)
    prompt_of = lambda number: backward_prompt(texts[number], templates)  # noqa: E731
    asked = fitting(model, kept, prompt_of, sampling)
    answers = BatchCompletion(
        texts,
        output_path,
        model,
        lambda endpoint: (sampling, {}),
        prompt_of,
        respondent.how(texts=map(prompt_of, asked)),
        batch_size,
        budget,
        order=sorted(asked, key=lambda number: -len(texts[number])),
        seed_of=respondent.seed_of,
        drop_failed=drop_failed,
    ).answers()
    rows, spoiled = pairs_of(texts, answers, keep_cut)
    spoiled |= {"no_answer": sorted(set(asked) - set(answers)), "too_long_for_model": sorted(set(kept) - set(asked))}
    left_out |= {name: numbers for name, numbers in spoiled.items() if numbers}
    print(f"{len(asked):,} texts asked, {len(rows):,} instructions{_counts(spoiled)}")
    counts = {"texts": len(texts), "asked": len(asked), "written": len(rows), "left_out": left_out}
    utils.jdump({"model": model_name} | counts, f"{output_path}.report.json")
    write_rows(output_path, rows)


def _backward_templates(model: Model, model_name: str) -> Mapping[str, str]:
    """Those in the model's folder; a model that has none is asked as train.py --backward trains."""
    templates = getattr(model, "templates", PROMPT_DICT)
    if templates is PROMPT_DICT:
        return BACKWARD_PROMPT_DICT
    if model.api == "chat":
        raise UsageError(f"--api chat: {model_name} was trained with a prompt of its own; leave --api away")
    if templates == PROMPT_DICT:
        raise UsageError(
            f"--model_name {model_name}: was trained to answer instructions, not to write them; give a model of "
            "train_backward, or as --prompt_template the prompt to ask this one with"
        )
    return templates


def _counts(numbers: Mapping[str, Sequence[int]]) -> str:
    """What was left out: a line for each reason."""
    return "".join(
        f"\n  {name}: {len(found):,} (rows {format_first(found)})" for name, found in numbers.items() if found
    )


# ---- curate ----


def curate(
    output_path: str,
    data_path: str | None = None,
    model_name: str | None = None,
    ratings_path: str | None = None,
    threshold: float = 4.5,
    ratings: int = 1,
    base: str | None = None,
    base_url: str | None = None,
    api: str = "auto",
    batch_size: int = 8,
    prompt_template: str | None = None,
    temperature: float = 0.7,
    top_p: float = 0.9,
    max_tokens: int = 512,
    seed: int = 42,
    drop_failed: bool = False,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    price_in: float = 0.0,
    price_out: float = 0.0,
    max_cost: float | None = None,
    dry_run: bool = False,
) -> None:
    """Rate every pair from 1 to 5, and write those that reach the threshold.

    A pair without a readable rating is never chosen; it stays in the ratings with the score null, and its row number is
    reported. Another threshold needs no model: --ratings_path and --threshold, without --data_path and --model_name.
    <output_path>.report.json has counts, histogram and row numbers.

    Args:
        output_path: JSON of the chosen pairs, for mix and train.py.
        data_path: pairs to rate, as augment wrote them, or any file that train.py takes.
        model_name: the rater: the folder of a model or its adapter, or a model of the server.
        ratings_path: JSONL of all pairs with their score, ratings and the rater's words; not given,
            <output_path>.ratings.jsonl. Its journal lies beside it.
        threshold: lowest score to choose: 4.5 gives the paper's A5, 4 its A4.
        ratings: of each pair, with different seeds; the score is the mean of those that can be read. A higher number
            later asks only for the ratings that are missing.
        base: the base model of an adapter, where it is not where it was in training.
        base_url: of a server; not given, OPENAI_BASE_URL; without both model_name may be a folder.
        api: completions, chat or auto. A chat model gets the question as it is, a completion model inside a prompt.
        batch_size: prompts in a batch, or requests on their way at once.
        prompt_template: JSON file with that prompt; not given, the one in the model's folder, or Alpaca's.
        temperature: of sampling.
        top_p: of sampling.
        max_tokens: of a rating.
        seed: of sampling; every rating has its own, drawn from this one.
        drop_failed: leave pairs that the model does not answer without a score; else they are an error at the end.
        load_in_8bit: quantize a folder's weights with bitsandbytes.
        load_in_4bit: quantize a folder's weights with bitsandbytes.
        price_in: dollars per million prompt tokens.
        price_out: dollars per million generated tokens.
        max_cost: dollars that are never exceeded, earlier runs with this ratings_path included.
        dry_run: print one prompt and an estimate of tokens and cost, ask nothing.
    """
    if not 1 <= threshold <= 5:
        raise UsageError(f"--threshold {threshold}: expected 1 to 5, as scores are")
    check_numbers(ratings=ratings)
    if (data_path is None) != (model_name is None) or (data_path is None and ratings_path is None):
        raise UsageError(
            "expected --data_path and --model_name to rate pairs, or --ratings_path to choose from ratings"
        )
    ratings_path = ratings_path or f"{output_path}.ratings.jsonl"
    refuse_overwriting_input(output_path, data_path, ratings_path)
    refuse_overwriting_input(ratings_path, data_path)
    if data_path is None:
        curation = Curation(load_named(ratings_path, "--ratings_path", raw_rows), ratings_path)
    else:
        sampling, budget = Sampling(max_tokens, temperature, top_p), budget_of(price_in, price_out, max_cost)
        rater = ModelBackend(model_name, sampling, base, base_url, api, batch_size, load_in_8bit, load_in_4bit, seed)
        if ratings > 1 and temperature == 0:
            raise UsageError(f"--ratings {ratings}: at --temperature 0 they are all the same")
        templates = load_prompt_template(prompt_template) if prompt_template else None
        rows = load_rows(data_path)
        if dry_run:
            print(estimate([rating_prompt(row) for row in rows], ratings * len(rows), max_tokens, budget))
            return
        rated = _rate(rows, rater, ratings, templates, ratings_path, budget, drop_failed)
        write_rows(ratings_path, rated)
        curation = Curation(rated, ratings_path)
    print(curation.told(threshold))
    utils.jdump(curation.report(threshold), f"{output_path}.report.json")
    write_rows(output_path, curation.chosen(threshold))


def _rate(
    rows: Sequence[Row],
    rater: ModelBackend,
    ratings: int,
    templates: Mapping[str, str] | None,
    ratings_path: str,
    budget: Budget,
    drop_failed: bool,
) -> list[Row]:
    """The rows with what the rater says of them. Rating k of row n is request k * len(rows) + n, so that more ratings
    come behind those that there are."""
    model, pairs = rater.open(chat=templates is None), len(rows)
    rated = PromptSet([rating_prompt(row) for row in rows], model, rater.sampling, templates)
    asked = fitting(model, range(pairs), rated.prompt_of, rater.sampling)
    if len(asked) < pairs:
        print(f"note: {pairs - len(asked):,} pairs are too long for the rater; they get no answer")
    by_length = sorted(asked, key=lambda number: -len(rated.questions[number]))
    answers = BatchCompletion(
        rows,
        ratings_path,
        model,
        rated.prepare,
        rated.prompt_of,
        rater.how(pairs=rated.questions, prompt=sorted(rated.around.values())),
        rater.batch_size,
        budget,
        order=[turn * pairs + number for turn in range(ratings) for number in by_length],
        seed_of=rater.seed_of,
        drop_failed=drop_failed,
        number_of=lambda number: number % pairs,
        unit="ratings",
        path_flag="--ratings_path",
    ).answers()
    of_row = [[answers.get(turn * pairs + number) for turn in range(ratings)] for number in range(pairs)]
    return [
        rated_row(
            row,
            [entry and entry["text"].strip() for entry in entries],
            [entry is not None and entry["finish_reason"] == "length" for entry in entries],
        )
        for row, entries in zip(rows, of_row)
    ]


# ---- mix ----


def mix(
    seed_path: str,
    output_path: str,
    augmented_path: str | None = None,
    tags: bool = True,
    seed: int = 42,
) -> None:
    """Write seed and augmented data as one shuffled file for train.py, each instruction with its tag.

    The paper's sentence that says where an answer comes from follows its instruction after an empty line: "Answer in
    the style of an AI Assistant." (seed), "Answer with knowledge from web search." (augmented). Ask the model with
    both, as the paper does: <output_path>.prompt_template.json is a --prompt_template for scripts.generate and curate.

    Args:
        seed_path: the seed data, anything that train.py takes.
        output_path: JSON of the rows; their field source is seed or augmented.
        augmented_path: what curate chose.
        tags: add the sentences.
        seed: of the shuffle.
    """
    refuse_overwriting_input(output_path, seed_path, augmented_path)
    augmented = load_named(augmented_path, "--augmented_path") if augmented_path else []
    if any("ratings" in row for row in augmented):
        raise UsageError(f"--augmented_path {augmented_path}: has all rated pairs; give curate's --output_path")
    rows, told = mixed(load_named(seed_path, "--seed_path"), augmented, tags, seed)
    print(told)
    write_rows(output_path, rows)
    if tags:
        utils.jdump(inference_templates(), f"{output_path}.prompt_template.json")


def main(argv: Sequence[str] | None = None) -> None:
    tasks = (train_backward, augment, curate, mix)
    commands.run("scripts.backtranslate", {task.__name__: task for task in tasks}, argv)


if __name__ == "__main__":
    with reported("scripts.backtranslate"):
        main()
