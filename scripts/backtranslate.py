r"""Instruction backtranslation (arXiv 2308.06259): texts become answers, a model writes their instructions, another
chooses the good pairs, and the next one is trained on these and the seed data.

    python -m scripts.backtranslate train_backward --data_path seed.json --model_name_or_path <base> --output_dir Myx
    python -m scripts.backtranslate augment --data_path texts.jsonl --model Myx --output_path candidates.jsonl
    python -m scripts.backtranslate curate --data_path candidates.jsonl --model M0 --output_path a5.json
    python -m scripts.backtranslate mix --seed_path seed.json --augmented_path a5.json --output_path m1.json

M0 is the base trained on seed.json, M1 on m1.json, both by train.py. Every answer of a model is journaled beside the
file that it goes into: after a kill the same command continues and asks nothing twice. <step> --help lists its flags.
"""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    from alpaca.common.errors import starting

    starting("scripts.backtranslate")

import utils
from alpaca.common import commands
from alpaca.common.commands import check_numbers
from alpaca.common.errors import InputError, UsageError, format_first, reported
from alpaca.common.files import refuse_overwriting_input
from alpaca.completions.api import Model, SamplingFlags, was_cut
from alpaca.completions.budget import Budget, BudgetFlags, estimate
from alpaca.completions.rows import BatchCompletion, write_rows
from alpaca.data.prompts import BACKWARD_PROMPT_DICT, PROMPT_DICT, backward_prompt, load_prompt_template
from alpaca.data.rows import Row, load_rows, raw_rows
from alpaca.datagen.backtranslation import (
    Curation,
    inference_templates,
    mixed,
    pairs_of,
    parse_score,
    rated_row,
    rating_prompt,
)
from alpaca.datagen.texts import Filters, load_texts
from alpaca.inference.backend import BackendFlags, ModelBackend, PromptSet, fitting

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
RENAMED = {"model_name": "model", "max_tokens": "max_new_tokens"}
NO_BUDGET, ANY_BACKEND, SERVED_AS_TRAINED = BudgetFlags(), BackendFlags(), BackendFlags(api="completions")
OF_INSTRUCTIONS, OF_RATINGS = SamplingFlags(0.7, 0.9, 256), SamplingFlags(0.7, 0.9, 512)  # the paper's


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
    command = [sys.executable]
    if nproc_per_node > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc_per_node}"]
    command += [str(TRAIN)]
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


@commands.task(**RENAMED)
def augment(
    data_path: str,
    output_path: str,
    model: str,
    backend: BackendFlags = SERVED_AS_TRAINED,
    text_field: str | None = None,
    data_split: str = "train",
    min_chars: int = 200,
    max_chars: int = 4000,
    max_capitals: float = 0.3,
    min_english: float = 0.0,
    prompt_template: str | None = None,
    sampling: SamplingFlags = OF_INSTRUCTIONS,
    seed: int = 42,
    keep_cut: bool = False,
    drop_failed: bool = False,
    budget: BudgetFlags = NO_BUDGET,
) -> None:
    """Write an instruction for every text that the filters keep: rows of instruction, output (the text) and source.

    source is the number of the text's row. What is left out is printed, and with all row numbers in
    <output_path>.report.json. A backward model that is served is asked at the completions endpoint; --api chat is for
    a general model, which gets the same prompt. Temperature and top-p are the paper's.

    Args:
        data_path: Texts: JSON, JSONL, CSV, parquet with a field `text`, an Alpaca file (its outputs), or .txt with
            segments between empty lines.
        output_path: JSONL (or .json) of the pairs; its journal lies beside it.
        model: The folder of a backward model or its adapter, or a model of the server.
        text_field: The field of a row that is the text; not given, output if there is one, else text.
        data_split: Split of a hub dataset.
        min_chars: Shorter texts are left out.
        max_chars: Longer texts are left out.
        max_capitals: Texts with a larger share of capital letters are left out.
        min_english: Texts with a smaller share of common English words are left out. A heuristic, which drops lists,
            tables and code too; 0 takes every language, 0.1 hardly any but English.
        prompt_template: JSON file with another prompt than that of the model's folder, or of train.py --backward.
        seed: Of sampling; every text has its own, drawn from this one.
        keep_cut: Keep instructions that were cut at max_new_tokens; else they are left out, and counted.
        drop_failed: Leave out texts that the model does not answer; else they are an error at the end.
    """
    spent, answerer = budget.budget(backend.rate), ModelBackend(model, sampling.sampling(), backend, seed)
    if backend.api == "auto":
        raise UsageError("--api auto: expected completions, or chat")
    refuse_overwriting_input(output_path, data_path)
    filters = Filters(min_chars, max_chars, max_capitals, min_english)
    templates = load_prompt_template(prompt_template, backward=True)
    texts = load_texts(data_path, data_split, text_field)
    kept, left_out = filters.choose(texts)
    print(f"{len(texts):,} texts in {data_path}, {len(kept):,} kept{_counts(left_out)}", flush=True)
    if not kept:
        raise InputError(f"{data_path}: the filters leave none of its {len(texts):,} texts", data_path)
    if budget.dry_run:
        prompts = [backward_prompt(texts[number], templates) for number in kept[:1000]]
        print(estimate(prompts, len(kept), sampling.max_new_tokens, spent))
        return

    opened = answerer.open()
    templates = templates if prompt_template else _backward_templates(opened, model)
    prompts = {number: backward_prompt(texts[number], templates) for number in kept}
    prompts = fitting(opened, prompts, answerer.sampling)
    how = answerer.how(texts=prompts.values())
    prompts = dict(sorted(prompts.items(), key=lambda item: -len(texts[item[0]])))
    completion = BatchCompletion(opened, answerer.sampling, output_path, how, backend.at_once, spent, drop_failed)
    answers = completion.answers(answerer.requests(prompts))
    rows, spoiled = pairs_of(texts, answers, keep_cut)
    spoiled |= {
        "no_answer": sorted(set(prompts) - set(answers)),
        "too_long_for_model": sorted(set(kept) - set(prompts)),
    }
    left_out |= {name: numbers for name, numbers in spoiled.items() if numbers}
    print(f"{len(prompts):,} texts asked, {len(rows):,} instructions{_counts(spoiled)}")
    counts = {"texts": len(texts), "asked": len(prompts), "written": len(rows), "left_out": left_out}
    utils.jdump({"model": model} | counts, f"{output_path}.report.json")
    write_rows(output_path, rows)


def _backward_templates(opened: Model, model: str) -> Mapping[str, str]:
    """Return the templates in the model's folder; a model that has none is asked as train.py --backward trains."""
    templates = getattr(opened, "templates", PROMPT_DICT)
    if templates is PROMPT_DICT:
        return BACKWARD_PROMPT_DICT
    if opened.api == "chat":
        raise UsageError(f"--api chat: {model} was trained with a prompt of its own; omit --api")
    if templates == PROMPT_DICT:
        raise UsageError(
            f"--model {model}: was trained to answer instructions, not to write them; give a model of "
            "train_backward, or as --prompt_template the prompt to ask this one with"
        )
    return templates


def _counts(numbers: Mapping[str, Sequence[int]]) -> str:
    """Return what was left out: a line for each reason."""
    return "".join(
        f"\n  {name}: {len(found):,} (rows {format_first(found)})" for name, found in numbers.items() if found
    )


# ---- curate ----


@commands.task(**RENAMED)
def curate(
    output_path: str,
    data_path: str | None = None,
    model: str | None = None,
    ratings_path: str | None = None,
    threshold: float = 4.5,
    ratings: int = 1,
    backend: BackendFlags = ANY_BACKEND,
    prompt_template: str | None = None,
    sampling: SamplingFlags = OF_RATINGS,
    seed: int = 42,
    drop_failed: bool = False,
    columns: str | None = None,
    ask_again: Literal["unread"] | None = None,
    budget: BudgetFlags = NO_BUDGET,
) -> None:
    """Rate every pair from 1 to 5, and write those that reach the threshold.

    A pair without a readable rating is never chosen; it stays in the ratings with the score null, and its row number is
    reported. Another threshold needs no model: --ratings_path and --threshold, without --data_path and --model.
    <output_path>.report.json has counts, histogram and row numbers. Temperature and top-p are the paper's.

    Args:
        output_path: JSON of the chosen pairs, for mix and train.py.
        data_path: Pairs to rate, as augment wrote them, or any file that train.py takes.
        model: The rater: the folder of a model or its adapter, or a model of the server.
        ratings_path: JSONL of all pairs with their score, ratings and the rater's words; not given,
            <output_path>.ratings.jsonl. Its journal lies beside it.
        threshold: Lowest score to choose: 4.5 gives the paper's A5, 4 its A4.
        ratings: Ratings of each pair, with different seeds; the score is the mean of those that can be read. A higher
            number later asks only for the ratings that are missing.
        prompt_template: JSON file with the prompt of a completion model; not given, that of its folder, or Alpaca's.
            A chat model gets the question as it is.
        seed: Of sampling; every rating has its own, drawn from this one.
        drop_failed: Leave pairs that the model does not answer without a score; else they are an error at the end.
        columns: Which column is what: instruction=prompt,output=response.
        ask_again: unread: ask once more, with another seed, for the ratings that could not be read.
    """
    if not 1 <= threshold <= 5:
        raise UsageError(f"--threshold {threshold}: expected 1 to 5, as scores are")
    check_numbers(ratings=ratings)
    if (data_path is None) != (model is None) or (data_path is None and ratings_path is None):
        raise UsageError("expected --data_path and --model to rate pairs, or --ratings_path to choose from ratings")
    ratings_path = ratings_path or f"{output_path}.ratings.jsonl"
    refuse_overwriting_input(output_path, data_path, ratings_path)
    refuse_overwriting_input(ratings_path, data_path)
    if Path(ratings_path).absolute() == Path(output_path).absolute():
        raise UsageError(f"--ratings_path {ratings_path}: is the file of --output_path, too; choose another file")
    if data_path is None:
        curation = Curation(raw_rows(ratings_path), ratings_path)
    else:
        spent, rater = budget.budget(backend.rate), ModelBackend(model, sampling.sampling(), backend, seed)
        if ratings > 1 and sampling.temperature == 0:
            raise UsageError(f"--ratings {ratings}: at --temperature 0 they are all the same")
        templates = load_prompt_template(prompt_template) if prompt_template else None
        rows = load_rows(data_path, columns=columns)
        if budget.dry_run:
            prompts = [rating_prompt(row) for row in rows]
            print(estimate(prompts, ratings * len(rows), sampling.max_new_tokens, spent))
            return
        rated = _rate(rows, rater, ratings, templates, ratings_path, spent, drop_failed, ask_again is not None)
        write_rows(ratings_path, rated)
        curation = Curation(rated, ratings_path)
    print(curation.summary(threshold))
    if data_path is not None and curation.unread:
        print("note: the same command with --ask_again unread asks again for what could not be read")
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
    ask_again: bool,
) -> list[Row]:
    """Return the rows with what the rater says of them. Rating k of row n is request k * len(rows) + n, so that more
    ratings come behind those that there are."""
    model, pairs = rater.open(chat=templates is None), len(rows)
    rated = PromptSet([rating_prompt(row) for row in rows], model, templates)
    asked = fitting(model, {number: rated.prompt_of(number) for number in range(pairs)}, rater.sampling)
    if len(asked) < pairs:
        print(f"note: {pairs - len(asked):,} pairs are too long for the rater; they get no answer")
    by_length = sorted(asked, key=lambda number: -len(rated.questions[number]))
    keys = [turn * pairs + number for turn in range(ratings) for number in by_length]
    how = rater.how(pairs=rated.questions, prompt=sorted(rated.around.values()))
    completion = BatchCompletion(
        model, rater.sampling, ratings_path, how, rater.flags.at_once, budget, drop_failed, "ratings"
    )
    if ask_again:
        completion.again = lambda key, entry: parse_score(entry["text"], was_cut(entry["finish_reason"]))[0] is None
    answers = completion.answers(rated.requests(keys, range(pairs), rater.seed))
    of_row = [[answers.get(turn * pairs + number) for turn in range(ratings)] for number in range(pairs)]
    return [
        rated_row(
            row,
            [entry and entry["text"].strip() for entry in entries],
            [entry is not None and was_cut(entry["finish_reason"]) for entry in entries],
        )
        for row, entries in zip(rows, of_row)
    ]


# ---- mix ----


@commands.task()
def mix(
    seed_path: str,
    output_path: str,
    augmented_path: str | None = None,
    tags: bool = True,
    seed: int = 42,
    columns: str | None = None,
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
        columns: of the seed data, which column is what: instruction=prompt,output=response.
    """
    refuse_overwriting_input(output_path, seed_path, augmented_path)
    augmented = load_rows(augmented_path) if augmented_path else []
    if any("ratings" in row for row in augmented):
        raise UsageError(f"--augmented_path {augmented_path}: has all rated pairs; give curate's --output_path")
    rows, summary = mixed(load_rows(seed_path, columns=columns), augmented, tags, seed)
    print(summary)
    write_rows(output_path, rows)
    if tags:
        utils.jdump(inference_templates(), f"{output_path}.prompt_template.json")


def main(argv: Sequence[str] | None = None) -> None:
    tasks = (train_backward, augment, curate, mix)
    commands.run("scripts.backtranslate", {task.__name__: task for task in tasks}, argv)


if __name__ == "__main__":
    with reported("scripts.backtranslate"):
        main()
