"""How good a model is, by the measures of the published ones. Four tasks:

    python -m scripts.evaluate harness --model output/alpaca-7b --output_dir output/scores    # ARC, HellaSwag, MMLU …
    python -m scripts.evaluate alpaca_eval --model output/alpaca-7b --data_path alpaca_eval.json --output_path ours.json
    python -m scripts.evaluate win_rate --outputs ours.json --reference theirs.json --judge gpt-4o    # our own judge
    python -m scripts.evaluate backward --pred answers.json                     # BLEU, ROUGE of generated instructions

harness and backward need `pip install -c constraints.txt -r scripts/requirements.txt`.
"""

import hashlib
import shlex
from pathlib import Path
from statistics import fmean
from typing import Any

import utils
from alpaca.common import commands
from alpaca.common.errors import UsageError, format_first, reported
from alpaca.common.files import refuse_overwriting_input, write_json
from alpaca.completions.api import Sampling
from alpaca.completions.budget import budget_of, estimate
from alpaca.completions.rows import BatchCompletion, write_rows
from alpaca.data.prompts import instruction_and_input
from alpaca.data.rows import load_named, load_rows, partners
from alpaca.evaluation.bleu_rouge import ROUGE, overlap, worst
from alpaca.evaluation.harness import HarnessRun
from alpaca.evaluation.judge import PROMPT, judge_prompt, read_preference, tally
from alpaca.evaluation.judge import questions as judge_questions
from alpaca.inference.backend import ModelBackend, PromptSet
from scripts.generate import GenerateArguments, answer_file, opened

OFFICIAL = "alpaca_eval --model_outputs {} --reference_outputs {} --annotators_config alpaca_eval_gpt4"
GROUPS = Path(__file__).resolve().parent.parent / "configs" / "harness"

# ---- harness: multiple choice ----


def harness(
    model: str,
    output_dir: str,
    base: str | None = None,
    group: str = "open_llm_v1_4",
    include_path: str | None = None,
    tasks: str | None = None,
    limit: int | None = None,
    add_bos_token: bool | None = None,
    batch_size: str = "8",
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    device: str | None = None,
) -> None:
    """The table of the claude2-alpaca cards: ARC 25-shot, HellaSwag 10-shot, MMLU 5-shot, TruthfulQA, and their mean.

    Every task that is finished has a file in output_dir; a rerun continues with the others.

    Args:
        model: folder or hub id of a model, an adapter or a diff.
        output_dir: gets <task>.json for each task, results.json and table.md.
        base: the base model of an adapter or a diff.
        group: of tasks; a YAML file of the harness whose metadata.table names columns and metrics.
        include_path: folder with that file and with tasks of one's own; not given, configs/harness.
        tasks: some of the group's, divided by commas.
        limit: the first so many examples of each task, for a try.
        add_bos_token: begin every context with the BOS token, or never; not given, as the tokenizer does.
        batch_size: a number, or auto.
        load_in_8bit: quantize the weights with bitsandbytes.
        load_in_4bit: quantize the weights with bitsandbytes.
        device: cuda or cpu; not given, the GPU if there is one.

    Raises:
        UsageError: as alpaca.evaluation.harness.HarnessRun.run.
    """
    run = HarnessRun(
        model,
        output_dir,
        base,
        group,
        str(include_path or GROUPS),
        tasks,
        limit,
        add_bos_token,
        batch_size,
        load_in_8bit,
        load_in_4bit,
        device,
    )
    print(run.run())


# ---- alpaca_eval: answers for it ----


def alpaca_eval(
    model: str,
    data_path: str,
    output_path: str,
    data_split: str = "train",
    base: str | None = None,
    generator: str | None = None,
    prompt_template: str | None = None,
    max_new_tokens: int = 2048,
    temperature: float = 0.7,
    top_p: float = 1.0,
    seed: int = 42,
    batch_size: int = 8,
    drop_too_long: bool = False,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    device: str | None = None,
) -> None:
    """Answer the instructions of a file, in AlpacaEval's format; a rerun continues. The settings are claude2-alpaca's.

    Args:
        model: folder or hub id of a model, an adapter or a diff.
        data_path: rows with an instruction, such as AlpacaEval's 805; an input is written below its instruction.
        output_path: JSON of instruction, output and generator; the journal lies beside it.
        data_split: of a hub dataset, or of a folder of the datasets library.
        base: the base model of an adapter or a diff.
        generator: name of the model; not given, that of its folder.
        prompt_template: JSON file with other prompts than those that the model was trained with.
        max_new_tokens: tokens of an answer, at most.
        temperature: of sampling; 0 is greedy.
        top_p: of sampling.
        seed: of sampling, for each row apart.
        batch_size: prompts in a batch.
        drop_too_long: leave out rows whose prompt is too long for the model; else an error.
        load_in_8bit: quantize the weights with bitsandbytes.
        load_in_4bit: quantize the weights with bitsandbytes.
        device: cuda or cpu; not given, the GPU if there is one.

    Raises:
        UsageError: as scripts.generate.
    """
    options = GenerateArguments(
        model=model,
        base=base,
        data_path=data_path,
        output_path=output_path,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        generator=generator,
        drop_too_long=drop_too_long,
        load_in_8bit=load_in_8bit,
        load_in_4bit=load_in_4bit,
        device=device,
        prompt_template=prompt_template,
    )
    rows = [{"instruction": instruction_and_input(row)} for row in load_rows(data_path, data_split, answered=False)]
    answer_file(rows, *opened(options), options)
    print(f"average length: {_average_length(utils.jload(output_path))} characters")


def _average_length(rows: list[dict[str, Any]]) -> int:
    """As alpaca_eval computes avg_length."""
    return int(fmean(len(row["output"]) for row in rows))


# ---- win_rate: our own judge ----


def win_rate(
    outputs: str,
    reference: str,
    judge: str,
    output_path: str | None = None,
    base_url: str | None = None,
    api: str = "auto",
    orders: str = "both",
    seed: int = 0,
    concurrency: int = 8,
    temperature: float | None = 0.0,
    top_p: float | None = 1.0,
    max_tokens: int = 512,
    price_in: float = 0.0,
    price_out: float = 0.0,
    max_cost: float | None = None,
    drop_failed: bool = False,
    dry_run: bool = False,
) -> None:
    """How often a judge prefers the answers of one file to those of another; a rerun continues and asks nothing twice.

    The judge's prompt is ours (alpaca/evaluation/judge.py): the result is no AlpacaEval number, for which the official
    command is printed.

    Args:
        outputs: rows with instruction and output, as alpaca_eval writes them.
        reference: the same instructions with the answers to compare with.
        judge: a model of the server, or the folder of a model.
        output_path: JSON of the result; not given, <outputs without .json>.win_rate.json. Beside it are the verdicts
            and their journal.
        base_url: of the server; not given, OPENAI_BASE_URL or OpenAI.
        api: chat, completions or auto.
        orders: both, or one, drawn for each row: half the requests, and the place counts.
        seed: of the orders, if one.
        concurrency: requests on their way at once; for a folder, prompts in a batch.
        temperature: of the judge; None leaves it to the server.
        top_p: of the judge; None leaves it to the server.
        max_tokens: of a verdict and its reasons.
        price_in: dollars per million prompt tokens.
        price_out: dollars per million generated tokens.
        max_cost: dollars that are never exceeded, earlier runs with this output_path included.
        drop_failed: leave out rows that the judge does not answer; else they are an error at the end.
        dry_run: print one prompt and an estimate of tokens and cost, ask nothing.

    Raises:
        UsageError: a bad flag, file, key, address or model, the limit of cost, or pairs without a verdict.
    """
    sampling, budget = Sampling(max_tokens, temperature, top_p), budget_of(price_in, price_out, max_cost)
    respondent = ModelBackend(
        judge,
        sampling,
        base_url=base_url,
        api=api,
        batch_size=concurrency,
        flag="--judge",
        batch_size_flag="--concurrency",
        base_flag=None,
    )
    if orders not in ("both", "one"):
        raise UsageError(f"--orders {orders}: expected both or one")
    result_path = output_path or f"{outputs.removesuffix('.json')}.win_rate.json"
    refuse_overwriting_input(result_path, outputs, reference)
    ours, others = _pairs(outputs, reference)
    asked = judge_questions(len(ours), orders, seed)
    questions = [_judge_prompt(ours[q["row"]], others[q["row"]], q["first"]) for q in asked]
    if dry_run:
        print(estimate(questions, len(questions), max_tokens, budget))
        return

    model = respondent.open()
    judged = PromptSet(questions, model, sampling)
    answers = BatchCompletion(
        asked,
        result_path,
        model,
        judged.prepare,
        judged.prompt_of,
        respondent.how(questions=questions, prompts=sorted(judged.around.values())),
        concurrency,
        budget,
        drop_failed=drop_failed,
        number_of=lambda number: asked[number]["row"],
        unit="questions",
    ).answers()
    verdicts = [asked[number] | _verdict(entry, asked[number]["first"]) for number, entry in answers.items()]
    write_rows(f"{result_path.removesuffix('.json')}.verdicts.json", verdicts)
    official = OFFICIAL.format(shlex.quote(outputs), shlex.quote(reference))
    result = {
        "what": "win rate by the judge of scripts.evaluate, in percent; not an AlpacaEval number",
        **tally(verdicts, len(ours), 2 if orders == "both" else 1),
        "judge": judge,
        "orders": orders,
        "temperature": temperature,
        "prompt_sha256": hashlib.sha256(PROMPT.encode()).hexdigest(),
        "average_length": _average_length(ours),
        "reference_average_length": _average_length(others),
        "cost_dollars": round(budget.cost, 6),
        "official_command": official,
    }
    print(_told(result, verdicts), f"AlpacaEval's own, after pip install alpaca_eval:\n    {official}", sep="\n")
    write_json(result_path, result)
    print(f"wrote {result_path}")


def _verdict(entry: dict[str, Any], first: str) -> dict[str, Any]:
    text = entry["text"].strip()
    cut = entry["finish_reason"] == "length"
    return {"output": text, "preference": read_preference(text, first, cut)}


def _pairs(outputs: str, reference: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of `outputs`, and for each the one of `reference` with the same instruction."""
    ours, others = load_named(outputs, "--outputs"), load_named(reference, "--reference")
    places = partners(
        list(map(instruction_and_input, ours)),
        list(map(instruction_and_input, others)),
        f"--reference {reference}: has no answer",
    )
    if len(others) > len(ours):
        print(f"note: {len(others) - len(ours)} rows of {reference} have no answer in {outputs}", flush=True)
    return ours, [others[place] for place in places]


def _judge_prompt(ours: dict[str, Any], others: dict[str, Any], first: str) -> str:
    return judge_prompt(instruction_and_input(ours), ours["output"], others["output"], first)


def _told(result: dict[str, Any], verdicts: list[dict[str, Any]]) -> str:
    number = {
        name: "-" if value is None else f"{value:.2f}" if isinstance(value, float) else value
        for name, value in result.items()
    }
    lines = [
        "{what}: {win_rate} ± {standard_error} (standard error)",
        "{rows_counted} of {rows} rows: {wins} wins, {losses} losses, {ties} ties; average length {average_length} "
        "characters, of the reference {reference_average_length}",
        "{win_rate_when_first} where shown first, {win_rate_when_second} where second; the answer shown first wins "
        "{first_place_wins}% of the decided verdicts",
    ]
    if result["orders"] == "both":
        lines.append("both orders agree on {orders_agree}% of the rows")
    if result["verdicts_unread"]:
        unread = format_first([verdict["row"] for verdict in verdicts if verdict["preference"] is None])
        lines.append(
            "note: {verdicts_unread} of {verdicts} answers of the judge end without a verdict; their rows do "
            f"not count (rows {unread})"
        )
    return "\n".join(line.format_map(number) for line in lines)


# ---- backward: generated instructions against the true ones ----


def backward(
    pred: str,
    reference: str | None = None,
    output_path: str | None = None,
    show_worst: int = 10,
    bleu_tokenizer: str = "13a",
) -> None:
    """BLEU and ROUGE-1, -2, -L of the instructions that a backward model has written, against the true ones.

    Args:
        pred: what scripts.generate --backward wrote: `output` is the instruction generated for the text `instruction`,
            `reference` the true one.
        reference: a file that train.py takes, with outputs and their true instructions, where pred has no `reference`.
        output_path: JSON for the scores, those of each row too; not given, <pred without .json>.scores.json.
        show_worst: rows to print, those with the lowest ROUGE-L.
        bleu_tokenizer: of sacrebleu: 13a, intl, zh, char ...

    Raises:
        UsageError: a file is malformed, a text has no true instruction, or sacrebleu or rouge_score is missing.
    """
    output_path = output_path or f"{pred.removesuffix('.json')}.scores.json"
    refuse_overwriting_input(output_path, pred, reference)
    if show_worst < 0:
        raise UsageError(f"--show_worst {show_worst}: expected a number of rows, 0 or more")
    rows = load_named(pred, "--pred")
    true = _true_instructions(rows, pred, reference)
    scores = overlap([row["output"] for row in rows], true, bleu_tokenizer)
    lines = [
        f"{len(rows)} rows    BLEU {scores['bleu']:.2f}    "
        + "    ".join(f"{told} {scores[name]:.2f}" for name, told in ROUGE.items())
    ]
    lines += [scores["bleu_signature"], scores["rouge_settings"]]
    lines.append(
        "mean length: "
        + ", ".join(
            f"{scores[f'generated_{unit}']:.1f} {unit} generated, {scores[f'true_{unit}']:.1f} true"
            for unit in ("words", "characters")
        )
    )
    for told, name in (
        ("generated instructions are empty", "empty"),
        ("true instructions have no a-z or 0-9: their ROUGE is 0, whatever is generated", "not_latin"),
    ):
        if scores[name]:
            lines.append(f"note: {len(scores[name])} {told} (rows {format_first(scores[name])})")
    lines += [
        _bad_row(number, scores["rows"][number], rows[number]["output"], true[number])
        for number in worst(scores["rows"], show_worst)
    ]
    print("\n".join(lines))
    for row, text, truth in zip(scores["rows"], rows, true):
        row |= {"generated": text["output"], "true": truth}
    write_json(output_path, scores)
    print(f"wrote {output_path}")


def _true_instructions(rows: list[dict[str, Any]], pred: str, reference: str | None) -> list[str]:
    if reference is not None:
        known = load_named(reference, "--reference")
        places = partners(
            [row["instruction"] for row in rows],
            [row["output"] for row in known],
            f"--reference {reference}: has no row whose output is the text asked with",
        )
        return [instruction_and_input(known[place]) for place in places]
    without = [number for number, row in enumerate(rows) if not isinstance(row.get("reference"), str)]
    if without:
        raise UsageError(
            f"--pred {pred}: {len(without)} of {len(rows)} rows have no `reference` (rows {format_first(without)}); "
            "expected what scripts.generate --backward writes, or give the file with the true instructions: --reference"
        )
    return [row["reference"] for row in rows]


def _bad_row(number: int, scores: dict[str, Any], text: str, truth: str) -> str:
    return f"row {number}: ROUGE-L {scores['rougeL']:.1f}, BLEU {scores['bleu']:.1f}  {text!r:.70} for {truth!r:.70}"


def main() -> None:
    tasks = (harness, alpaca_eval, win_rate, backward)
    commands.run("scripts.evaluate", {task.__name__: task for task in tasks})


if __name__ == "__main__":
    with reported("scripts.evaluate"):
        main()
