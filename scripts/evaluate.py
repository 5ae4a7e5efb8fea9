"""How good a model is, by the measures of the published ones, and what its training did. Five tasks:

    python -m scripts.evaluate harness --model output/alpaca-7b --output_dir output/scores    # ARC, HellaSwag, MMLU …
    python -m scripts.evaluate alpaca_eval --model output/alpaca-7b --data_path alpaca_eval.json --output_path ours.json
    python -m scripts.evaluate win_rate --data_path ours.json --reference_path theirs.json --judge gpt-4o
    python -m scripts.evaluate backward --data_path answers.json        # BLEU, ROUGE of generated instructions
    python -m scripts.evaluate before_after --base my_llama --model output/alpaca-7b --output_dir output/before_after

harness and backward need `pip install -c constraints.txt -r scripts/requirements.txt`.
"""

import functools
import hashlib
import shlex
from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

if __name__ == "__main__":
    from alpaca.common.errors import starting

    starting("scripts.evaluate")

import utils
from alpaca.common import commands
from alpaca.common.errors import InputError, UsageError, format_first, reported
from alpaca.common.files import refuse_overwriting_input, write_json
from alpaca.completions.api import SamplingFlags, was_cut
from alpaca.completions.budget import BudgetFlags, estimate
from alpaca.completions.rows import BatchCompletion, write_rows
from alpaca.data.prompts import instruction_and_input
from alpaca.data.rows import load_rows
from alpaca.evaluation.before_after import BeforeAfter, ProbeFlags
from alpaca.evaluation.bleu_rouge import overlap, summary
from alpaca.evaluation.harness import HarnessRun
from alpaca.evaluation.harness_tasks import STANDARD
from alpaca.evaluation.judge import PROMPT, described, judge_prompt, read_preference, tally
from alpaca.evaluation.judge import questions as judge_questions
from alpaca.inference.backend import BackendFlags, ModelBackend, PromptSet
from scripts.generate import AnswerFlags, GenerateArguments, answer_file, opened

OFFICIAL = "alpaca_eval --model_outputs {} --reference_outputs {} --annotators_config alpaca_eval_gpt4"
GROUPS = Path(__file__).resolve().parent.parent / "configs" / "harness"

OF_CLAUDE2_ALPACA = AnswerFlags(max_new_tokens=2048, temperature=0.7)
NO_BUDGET, ANY_BACKEND, OF_VERDICTS = BudgetFlags(), BackendFlags(), SamplingFlags(0.0, 1.0, 512)
OF_PROBES, OF_SAMPLES = ProbeFlags(), SamplingFlags(0.0, 1.0, 128)

# ---- harness: multiple choice ----


@commands.task()
def harness(
    model: str,
    output_dir: str,
    base: str | None = None,
    group: str = STANDARD,
    include_path: str | None = None,
    tasks: str | None = None,
    limit: int | None = None,
    add_bos_token: bool | None = None,
    batch_size: str = "8",
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    device: str | None = None,
    backend: Literal["hf", "vllm"] = "hf",
) -> None:
    """Measure the table of the claude2-alpaca cards: ARC 25-shot, HellaSwag 10-shot, MMLU 5-shot, TruthfulQA, and their
    mean.

    Every task that is finished has a file in output_dir; a rerun continues with the others.

    Args:
        model: folder or hub id of a model, an adapter or a diff.
        output_dir: gets <task>.json for each task, results.json and table.md.
        base: the base model of an adapter or a diff.
        group: of tasks; a YAML file of the harness whose metadata.table names columns and metrics.
        include_path: folder with that file or with tasks of one's own; not given, configs/harness.
        tasks: some of the group's, divided by commas; without --group any others too, those of include_path or of the
            harness, with their own settings and the first of their metrics.
        limit: the first so many examples of each task, for a try.
        add_bos_token: begin every context with the BOS token, or never; not given, as the tokenizer does.
        batch_size: a number, or auto.
        load_in_8bit: quantize the weights with bitsandbytes.
        load_in_4bit: quantize the weights with bitsandbytes.
        device: cuda or cpu; not given, the GPU if there is one.
        backend: hf, or vllm for a whole checkpoint: the harness's own, faster, of the numbers up to rounding.

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
        backend,
    )
    print(run.run())


# ---- alpaca_eval: answers for it ----


@commands.task()
def alpaca_eval(model: str, data_path: str, output_path: str, options: AnswerFlags = OF_CLAUDE2_ALPACA) -> None:
    """Answer the instructions of a file, in AlpacaEval's format; a rerun continues. The settings are claude2-alpaca's.

    Args:
        model: Folder or hub id of a model, an adapter or a diff.
        data_path: Rows with an instruction, such as AlpacaEval's 805; an input is written below its instruction.
        output_path: JSON of instruction, output and generator; the journal lies beside it.

    Raises:
        UsageError: as scripts.generate.
    """
    asked = GenerateArguments(**vars(options), model=model, data_path=data_path, output_path=output_path)
    asked.check()
    rows = load_rows(data_path, asked.data_split, answered=False, columns=asked.columns)
    answer_file([{"instruction": instruction_and_input(row)} for row in rows], *opened(asked), asked)
    print(f"average length: {_average_length(utils.jload(output_path))} characters")


def _average_length(rows: list[dict[str, Any]]) -> int:
    """Return what alpaca_eval computes as avg_length."""
    return int(fmean(len(row["output"]) for row in rows))


# ---- win_rate: our own judge ----


@commands.task(outputs="data_path", reference="reference_path", max_tokens="max_new_tokens")
def win_rate(
    data_path: str,
    reference_path: str,
    judge: str,
    output_path: str | None = None,
    backend: BackendFlags = ANY_BACKEND,
    orders: str = "both",
    seed: int = 0,
    sampling: SamplingFlags = OF_VERDICTS,
    drop_failed: bool = False,
    columns: str | None = None,
    ask_again: Literal["unread"] | None = None,
    budget: BudgetFlags = NO_BUDGET,
) -> dict[str, Any] | None:
    """Measure how often a judge prefers the answers of one file to those of another; a rerun continues and asks nothing
    twice.

    The judge's prompt is ours (alpaca/evaluation/judge.py): the result is no AlpacaEval number, for which the official
    command is printed.

    Args:
        data_path: Rows with instruction and output, as alpaca_eval writes them.
        reference_path: The same instructions with the answers to compare with.
        judge: A model of the server, or the folder of a model.
        output_path: JSON of the result; not given, <data_path without .json>.win_rate.json. Beside it are the verdicts
            and their journal.
        orders: both, or one, drawn for each row: half the requests, and the place counts.
        seed: Of the orders, if one.
        drop_failed: Leave out rows that the judge does not answer; else they are an error at the end.
        columns: Of the reference file, which column is what: instruction=prompt,output=response.
        ask_again: unread: ask once more where an earlier answer ended without a verdict. The command ends with exit
            code 2 as long as there are such answers.

    Raises:
        UsageError: a bad flag, file, key, address or model, the limit of cost, or pairs without a verdict.
    """
    spent, judging = budget.budget(backend.rate), ModelBackend(judge, sampling.sampling(), backend, known_as="judge")
    if orders not in ("both", "one"):
        raise UsageError(f"--orders {orders}: expected both or one")
    result_path = output_path or f"{data_path.removesuffix('.json')}.win_rate.json"
    refuse_overwriting_input(result_path, data_path, reference_path)
    ours, others = _pairs(data_path, reference_path, columns)
    asked = judge_questions(len(ours), orders, seed)
    pairs = [(ours[question["row"]], others[question["row"]], question["first"]) for question in asked]
    questions = [judge_prompt(instruction_and_input(a), a["output"], b["output"], first) for a, b, first in pairs]
    if budget.dry_run:
        print(estimate(questions, len(questions), sampling.max_new_tokens, spent))
        return None

    model = judging.open()
    judged = PromptSet(questions, model)
    how = judging.how(questions=questions, prompts=sorted(judged.around.values()))
    completion = BatchCompletion(
        model, judging.sampling, result_path, how, backend.at_once, spent, drop_failed, "questions"
    )
    if ask_again:
        completion.again = lambda key, entry: _verdict(entry, asked[key]["first"])["preference"] is None
    answers = completion.answers(judged.requests(range(len(asked)), [question["row"] for question in asked]))
    verdicts = [asked[number] | _verdict(entry, asked[number]["first"]) for number, entry in answers.items()]
    write_rows(f"{result_path.removesuffix('.json')}.verdicts.json", verdicts)
    official = OFFICIAL.format(shlex.quote(data_path), shlex.quote(reference_path))
    result = {
        "what": "win rate by the judge of scripts.evaluate, in percent; not an AlpacaEval number",
        **tally(verdicts, len(ours), 2 if orders == "both" else 1),
        "judge": judge,
        "orders": orders,
        "temperature": sampling.temperature,
        "prompt_sha256": hashlib.sha256(PROMPT.encode()).hexdigest(),
        "average_length": _average_length(ours),
        "reference_average_length": _average_length(others),
        "cost_dollars": round(spent.cost, 6),
        "official_command": official,
    }
    print(described(result, verdicts), f"AlpacaEval's own, after pip install alpaca_eval:\n    {official}", sep="\n")
    write_json(result_path, result)
    print(f"wrote {result_path}")
    return result


@functools.wraps(win_rate)
def _win_rate_command(**flags: Any) -> None:
    """Do what win_rate does. Raise UsageError at its end if verdicts are missing: a script must not take them for no
    difference."""
    result = win_rate(**flags)
    if result and result["verdicts_unread"]:
        raise UsageError(
            f"{result['verdicts_unread']} of {result['verdicts']} answers of the judge end without a verdict; the same "
            "command with --ask_again unread asks for these again"
        )


def _verdict(entry: dict[str, Any], first: str) -> dict[str, Any]:
    text = entry["text"].strip()
    cut = was_cut(entry["finish_reason"])
    return {"output": text, "preference": read_preference(text, first, cut)}


def _pairs(outputs: str, reference: str, columns: str | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of `outputs`, and for each the one of `reference` with the same instruction."""
    ours, others = load_rows(outputs), load_rows(reference, columns=columns)
    places = partners(
        list(map(instruction_and_input, ours)),
        list(map(instruction_and_input, others)),
        f"{reference}: has no answer",
        reference,
    )
    if len(others) > len(ours):
        print(f"note: {len(others) - len(ours)} rows of {reference} have no answer in {outputs}", flush=True)
    return ours, [others[place] for place in places]


def partners(wanted: Sequence[str], offered: Sequence[str], problem: str, about: str) -> list[int]:
    """Return for each text of `wanted` the place of the same text in `offered`; for its second time there, the second
    place.

    Raises:
        InputError: texts without a partner, of which `problem` begins the message: a mistake in `about`.
    """
    places: dict[str, deque[int]] = defaultdict(deque)
    for place, text in enumerate(offered):
        places[text].append(place)
    found = [places[text].popleft() if places[text] else None for text in wanted]
    if missing := [row for row, place in enumerate(found) if place is None]:
        raise InputError(f"{problem} for {len(missing)} of {len(wanted)} rows (rows {missing[:10]})", about)
    return found


# ---- backward: generated instructions against the true ones ----


@commands.task(pred="data_path", reference="reference_path")
def backward(
    data_path: str,
    reference_path: str | None = None,
    output_path: str | None = None,
    show_worst: int = 10,
    bleu_tokenizer: str = "13a",
    columns: str | None = None,
) -> None:
    """Measure BLEU and ROUGE-1, -2, -L of the instructions that a backward model has written, against the true ones.

    Args:
        data_path: What scripts.generate --backward wrote: `output` is the instruction generated for the text
            `instruction`, `reference` the true one.
        reference_path: A file that train.py takes, with outputs and their true instructions, where data_path has no
            `reference`.
        output_path: JSON for the scores, those of each row too; not given, <data_path without .json>.scores.json.
        show_worst: Rows to print, those with the lowest ROUGE-L.
        bleu_tokenizer: Tokenizer of sacrebleu: 13a, intl, zh, char ...
        columns: Of the reference file, which column is what: instruction=prompt,output=response.

    Raises:
        UsageError: a file is malformed, a text has no true instruction, or sacrebleu or rouge_score is missing.
    """
    output_path = output_path or f"{data_path.removesuffix('.json')}.scores.json"
    refuse_overwriting_input(output_path, data_path, reference_path)
    if show_worst < 0:
        raise UsageError(f"--show_worst {show_worst}: expected a number of rows, 0 or more")
    rows = load_rows(data_path, also=("reference",))
    true = _true_instructions(rows, data_path, reference_path, columns)
    scores = overlap([row["output"] for row in rows], true, bleu_tokenizer)
    print("\n".join(summary(scores, [row["output"] for row in rows], true, show_worst)))
    for row, text, truth in zip(scores["rows"], rows, true):
        row |= {"generated": text["output"], "true": truth}
    write_json(output_path, scores)
    print(f"wrote {output_path}")


def _true_instructions(
    rows: list[dict[str, Any]], data_path: str, reference: str | None, columns: str | None
) -> list[str]:
    if reference is not None:
        known = load_rows(reference, columns=columns)
        places = partners(
            [row["instruction"] for row in rows],
            [row["output"] for row in known],
            f"{reference}: has no row whose output is the text asked with",
            reference,
        )
        return [instruction_and_input(known[place]) for place in places]
    if columns:
        raise UsageError(f"--columns {columns}: is for the file of --reference_path, which is not given")
    without = [number for number, row in enumerate(rows) if not isinstance(row.get("reference"), str)]
    if without:
        raise UsageError(
            f"--data_path {data_path}: {len(without)} of {len(rows)} rows have no `reference` (rows "
            f"{format_first(without)}); expected what scripts.generate --backward writes, or give the file with the "
            "true instructions: --reference_path"
        )
    return [row["reference"] for row in rows]


# ---- before_after: what training did ----


@commands.task()
def before_after(
    base: str,
    model: str,
    output_dir: str,
    checkpoints: str | None = None,
    data_path: str | None = None,
    columns: str | None = None,
    options: ProbeFlags = OF_PROBES,
    sampling: SamplingFlags = OF_SAMPLES,
) -> None:
    """Measure what a model learned and what it forgot: loss on held-out rows and on plain text, questions with choices,
    the probability of the end where an answer ends, answers that stop. A rerun continues with the next model.

    Args:
        base: Folder or hub id of the model that training began with.
        model: Folder of the tuned model or adapter. Its model card gets the table.
        output_dir: Gets before_after.md (table and answers side by side), .json, .png and a file for each model.
        checkpoints: Folder of a run; its checkpoint-N are measured too.
        data_path: Rows that were not trained on; not given, those that the run held out.
        columns: Of data_path, which column is what: instruction=prompt,output=response.

    Raises:
        UsageError: as alpaca.evaluation.before_after.BeforeAfter.run.
    """
    from train import preprocess

    options.check()
    probes = BeforeAfter(
        base, model, output_dir, checkpoints, data_path, columns, options, sampling.sampling(), preprocess
    )
    print(probes.run())


def main() -> None:
    tasks = (harness, alpaca_eval, _win_rate_command, backward, before_after)
    commands.run("scripts.evaluate", {task.__name__: task for task in tasks})


if __name__ == "__main__":
    with reported("scripts.evaluate"):
        main()
