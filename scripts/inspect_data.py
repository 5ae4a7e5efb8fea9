r"""Look at training data the way train.py will see it: the report it prints, and chosen rows token by token.

    python -m scripts.inspect_data --model_name_or_path <model> --data_path alpaca_data.json
    python -m scripts.inspect_data --model_name_or_path <model> --data_path rows.jsonl --rows 0 17 --problem no_eos
    python -m scripts.inspect_data --losses output/alpaca-7b --sample 2000

Needs the tokenizer of the model only, and shares the token cache with train.py. In colour on a terminal: dim tokens are
masked (label -100), green ones are learned, control tokens are reversed; elsewhere the two parts have a line each.

--losses shows the rows that hurt: those whose loss stayed high in a finished run, or rose. Model, data and how they are
read are those of the run's run.yaml. Row by row the losses before and after training are kept, so that a run that was
killed goes on; at the end all are written, the worst row first.

Exit code: 0, or 1 where something would spoil training (more rows with a problem than is tolerated), or 2 where
train.py would not even start: data that cannot be read, or no row with anything to learn.
"""

import json
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from alpaca.common.errors import starting

    starting("scripts.inspect_data")

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alpaca.common import arguments
from alpaca.common.arguments import flag, flags_of_file, join_flags, split_flags
from alpaca.common.commands import check_numbers
from alpaca.common.errors import InputError, ParameterError, UsageError, names_flags, reported
from alpaca.common.files import check_writable, fingerprint, write_text
from alpaca.completions.journal import Journal
from alpaca.data.prompts import template_parts
from alpaca.data.report import PROBLEMS
from alpaca.data.tokenization import IGNORE_INDEX
from alpaca.evaluation.row_losses import RowLoss, measure
from alpaca.inference.load import LoadOptions, load_for_inference
from alpaca.models.device import best_dtype
from alpaca.models.embeddings import resize_embeddings, vocabulary_size
from alpaca.models.load import load_tokenizer
from alpaca.training.checkpoint import is_run_fingerprint
from alpaca.training.preflight import check_is_model
from alpaca.training.resume import changes, tokens_of
from alpaca.weights.provenance import BASE, fingerprint_of_weights, holds_a_model, read_record, weights_of
from alpaca.weights.reader import ADAPTER, find_folder, folder_kind
from train import DataArguments, ModelArguments, SupervisedDataset, make_supervised_data_module

DIM = "\033[2m"
GREEN = "\033[32m"
REVERSED = "\033[7m"
RESET = "\033[0m"


@dataclass
class InspectArguments:
    _argument_group_name = "inspection"
    rows: list[int] = field(default_factory=list, metadata={"help": "Numbers of rows to show, from 0."})
    problem: str | None = flag(None, "Show the first rows with this problem.", choices=list(PROBLEMS))
    limit: int = flag(5, "How many rows --problem shows.")
    model_max_length: int = flag(512, "Maximum sequence length in tokens, as in train.py.")
    seed: int = flag(42, "Seed of --eval_size, as in train.py.")
    cache_dir: str | None = flag(None, "Folder for downloads and tokenized data, as in train.py.")
    color: str = flag("auto", "When to use colour.", choices=["auto", "always", "never"])
    losses: str | None = flag(None, "Folder of a finished run: show the rows whose loss stayed high in it, or rose.")
    sample: int | None = flag(None, "With --losses: so many rows, drawn by --seed, and those of --rows; else all.")
    top: int = flag(20, "With --losses: how many rows to show.")
    batch_tokens: int = flag(4096, "With --losses: tokens of a batch.")
    output_path: str | None = flag(None, "With --losses: JSON lines, by default row_losses.jsonl in the run's folder.")

    process_index = 0  # what train.py's functions ask for


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report and the rows of the command line `argv`. Return the exit code."""
    classes = (ModelArguments, DataArguments, InspectArguments)
    argv = with_flags_of_run(list(sys.argv[1:] if argv is None else argv), classes)
    flags, _ = arguments.parse(argv, classes, __doc__, program="scripts.inspect_data")
    return inspect_data(*flags)


def with_flags_of_run(argv: list[str], classes: Sequence[type]) -> list[str]:
    """Return the command line with the flags that its --losses run was started with, where it has none of its own."""
    given = dict(split_flags(argv))
    run = (given.get("losses") or [None])[0]
    if run is None:
        return argv
    if not (file := Path(run) / "run.yaml").is_file():
        problem = "there is no run.yaml in it; expected a folder that train.py has written"
        if not Path(run).exists():
            problem = "no such folder"
        elif (Path(run).parent / "run.yaml").is_file():  # of a checkpoint
            problem = f"is a part of a run; give the run's folder, {Path(run).parent}"
        raise UsageError(f"--losses {run}: {problem}")
    known = {f.name for kind in classes for f in fields(kind)} | {name for kind in classes for name in renamed(kind)}
    taken = join_flags([flag for flag in flags_of_file(str(file)) if flag[0] in known and flag[0] not in given])
    print(f"{file}: {' '.join(taken)}", flush=True)
    return taken + argv


def renamed(kind: type) -> Mapping[str, str]:
    return getattr(kind, "_renamed", {})


@names_flags
def inspect_data(model_args: ModelArguments, data_args: DataArguments, options: InspectArguments) -> int:
    check_numbers(
        model_max_length=options.model_max_length,
        limit=options.limit,
        top=options.top,
        batch_tokens=options.batch_tokens,
        sample=1 if options.sample is None else options.sample,
    )
    if options.losses is None and (unused := options.output_path or options.sample):
        name = "output_path" if options.output_path else "sample"
        raise ParameterError(f"{{{name}}} {unused}: is for {{losses}} and the folder of a run", name, "losses")
    if options.losses:
        check_run(model_args, Path(options.losses))
    check_is_model(model_args.model_name_or_path)
    tokenizer, new_tokens = load_tokenizer(model_args, options)
    data_module = make_supervised_data_module(tokenizer, data_args, options.cache_dir, options.seed)
    datasets = [data_module[name] for name in ("train_dataset", "eval_dataset") if data_module[name]]
    of_file = datasets if data_args.eval_size else datasets[:1]
    spoiled = []
    for dataset in datasets:
        print(dataset.report)
        if dataset is of_file[-1] and not options.losses:
            show_rows(of_file, tokenizer, options)
        spoiled += dataset.report.spoiled_by()
    for line in spoiled:
        print(f"would spoil training: {line}")
    if options.losses:
        print_changes(Path(options.losses), model_args, data_args, datasets[0], options)
        show_losses(model_args, datasets[0], tokenizer, new_tokens, options)
    return 1 if spoiled else 0


def show_rows(
    datasets: Sequence[SupervisedDataset], tokenizer: PreTrainedTokenizerBase, options: InspectArguments
) -> None:
    """Print the rows asked for, by their number in the file that `datasets` are parts of, every token with its
    label."""
    numbers, reports = list(options.rows), [dataset.report for dataset in datasets]
    problems = {name: [row for report in reports for row in report.problems[name]] for name in PROBLEMS}
    places = [(place, dataset[i]) for dataset in datasets for i, place in enumerate(dataset.report.numbers)]
    last = max([place for place, _ in places] + problems["no_pair"])
    if wrong := [number for number in numbers if not 0 <= number <= last]:
        raise UsageError(f"--rows {wrong[0]}: the data has {f'rows 0 to {last}' if last else 'row 0 only'}")
    if options.problem:
        numbers += list(dict.fromkeys(problems[options.problem]))[: options.limit]
    colored = options.color == "always" or (
        options.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    )
    for number in numbers:
        names = ", ".join(name for name, rows in problems.items() if number in rows)
        found = [row for place, row in places if place == number]  # a conversation gives several, or none
        if not found:
            print(f"\nrow {number}: left out | {names}")
        for row in found:
            show_row(f"row {number}", names, row, tokenizer, colored)


# ---- rows that hurt ----


def check_run(model_args: ModelArguments, folder: Path) -> None:
    """Raise InputError for a run without a model. Set in `model_args` what train.py decides for LoRA."""
    if not holds_a_model(folder):
        problem = "holds no model; the run is not finished (train.py --resume_from_checkpoint True goes on with it)"
        raise InputError(f"{folder}: {problem}", folder)
    if model_args.add_missing_tokens is None:
        model_args.add_missing_tokens = folder_kind(folder) != ADAPTER


def print_changes(
    folder: Path,
    model_args: ModelArguments,
    data_args: DataArguments,
    dataset: SupervisedDataset,
    options: InspectArguments,
) -> None:
    """Print what is not as it was when the run in `folder` began: its rows, how they are read, or the base."""
    record = read_record(folder)
    if record is None or not is_run_fingerprint(record["contract"]):
        print(f"note: {folder} has no record of its run; whether rows and base are those of then is not known")
        return
    fixed = {
        "the data (--data_path)": f"{len(dataset):,} rows {dataset.data_fingerprint[:12]}",
        "--prompt_template": dataset.template_fingerprint[:12],
        "--prompt_boundary": data_args.prompt_boundary,
        "--model_max_length": options.model_max_length,
        BASE: fingerprint_of_weights(model_args.model_name_or_path),
    }
    for line in changes(record["contract"], {"fixed": fixed, "tokens": tokens_of(dataset)}, "fixed"):
        print(f"WARNING: not as in the run of {folder}: {line}", flush=True)


def show_losses(
    model_args: ModelArguments,
    dataset: SupervisedDataset,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: int,
    options: InspectArguments,
) -> None:
    """Measure rows before and after the run, write them, and print the worst."""
    output = Path(options.output_path or Path(options.losses) / "row_losses.jsonl")
    check_writable(output.parent)
    chosen = chosen_rows(dataset, options)
    rows = {i: (dataset.input_ids[i].tolist(), int((dataset.labels[i] == IGNORE_INDEX).sum())) for i in chosen}
    base, adapter = model_args.model_name_or_path, folder_kind(find_folder(options.losses)) == ADAPTER
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = LoadOptions(device, best_dtype(device))

    def before() -> PreTrainedModel:
        model = load_for_inference(base, None, where).model
        resize_embeddings(model, new_tokens, vocabulary_size(tokenizer))  # as train.py begins
        return model

    models = {
        "before": before,
        "after": lambda: load_for_inference(options.losses, base if adapter else None, where).model,
    }
    how = {**weights_of(base=base, model=options.losses), "data": dataset.data_fingerprint}
    how |= {"template": dataset.template_fingerprint, "model_max_length": options.model_max_length}
    how |= {
        "labels": fingerprint(tokens_of(dataset), dataset.lengths.tolist(), dataset.num_targets.tolist())[:12],
        "dtype": str(where.dtype),
    }
    with Journal(output.with_name(f"{output.name}.journal"), output) as journal:
        found = measure(models, rows, options.batch_tokens, journal, how)
    ranked = sorted(found, key=lambda i: (-found[i].score, i))
    problems = {name: set(numbers) for name, numbers in dataset.report.problems.items()}
    entries = [entry_of(dataset.report.numbers[i], found[i], problems) for i in ranked]
    write_text(output, "".join(f"{json.dumps(entry)}\n" for entry in entries))
    print("\nscore = (loss after + what it rose by) / (answer tokens + 1), in nats; before and after are per token")
    print(f"{'row':>8} {'score':>6} {'before':>7} {'after':>7} {'tokens':>7}")
    for i, entry in zip(ranked[: options.top], entries):
        numbers = f"{entry['row']:>8} {entry['score']:6.2f} {entry['before']:7.2f} {entry['after']:7.2f}"
        texts = " -> ".join(f"{text!r:.40}" for text in texts_of(*rows[i], tokenizer, dataset.templates))
        print(f"{numbers} {entry['tokens']:>7}  {', '.join([*entry['problems'], texts])}")
    print(f"wrote {output}: {len(ranked):,} rows, the worst first")


def texts_of(
    ids: Sequence[int], first: int, tokenizer: PreTrainedTokenizerBase, templates: Mapping[str, str]
) -> Iterator[str]:
    """Yield prompt and answer of a row on one line each, the prompt without the fixed text of its template."""
    prompt, answer = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:first], ids[first:]))
    fixed = {text for template in templates.values() for text, _ in template_parts(template) if text.strip()}
    for text in sorted(fixed, key=len, reverse=True):
        prompt = prompt.replace(text, " ")
    yield from (" ".join(text.split()) for text in (prompt, answer))


def chosen_rows(dataset: SupervisedDataset, options: InspectArguments) -> list[int]:
    """Return the places in `dataset` of the rows to measure: all, or a sample and those of --rows."""
    every = [i for i, targets in enumerate(dataset.num_targets) if targets]
    if options.sample is None and not options.rows:
        return every
    drawn = random.Random(options.seed).sample(every, min(options.sample or 0, len(every)))
    named = set(options.rows)
    if unknown := named - set(dataset.report.numbers):
        raise UsageError(f"--rows {min(unknown)}: is not among the rows to train on")
    return sorted({*drawn, *(i for i in every if dataset.report.numbers[i] in named)})


def entry_of(number: int, loss: RowLoss, problems: Mapping[str, set[int]]) -> dict[str, Any]:
    """Return what is written of a row: no text, so that the file may be shown around."""
    return {
        "row": number,
        "score": round(loss.score, 4),
        "before": round(loss.before / max(loss.targets, 1), 4),
        "after": round(loss.after / max(loss.targets, 1), 4),
        "tokens": loss.targets,
        "problems": [name for name, rows in problems.items() if number in rows],
    }


# ---- rows token by token ----


def show_row(
    name: str, problems: str, row: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, colored: bool
) -> None:
    ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
    learned = sum(label != IGNORE_INDEX for label in labels)
    print(f"\n{name}: {len(ids)} tokens, {learned} to learn" + (f" | {problems}" if problems else ""))
    print(colored_row(ids, labels, tokenizer) if colored else plain_row(ids, labels, tokenizer))


def pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens in the vocabulary's own spelling, which shows spaces and bytes: "▁The", "<0x0A>"."""
    return tokenizer.convert_ids_to_tokens(list(ids))


def colored_row(ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    control = set(tokenizer.all_special_ids)
    parts = []
    for id, label, piece in zip(ids, labels, pieces(ids, tokenizer)):
        color = (DIM if label == IGNORE_INDEX else GREEN) + (REVERSED if id in control else "")
        parts.append(f"{color}{piece}{RESET}")
    return " ".join(parts)


def plain_row(ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    masked = sum(label == IGNORE_INDEX for label in labels)  # always the beginning of the row
    return (
        f"  masked: {' '.join(pieces(ids[:masked], tokenizer))}\n  learned: {' '.join(pieces(ids[masked:], tokenizer))}"
    )


if __name__ == "__main__":
    with reported("scripts.inspect_data"):
        sys.exit(main())
