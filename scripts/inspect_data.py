r"""Look at training data the way train.py will see it: the report it prints, and chosen rows token by token.

    python -m scripts.inspect_data --model_name_or_path <model> --data_path alpaca_data.json
    python -m scripts.inspect_data --model_name_or_path <model> --data_path rows.jsonl --rows 0 17 --problem no_eos

Needs the tokenizer of the model only, and shares the token cache with train.py. In colour on a terminal: dim tokens are
masked (label -100), green ones are learned, control tokens are reversed; elsewhere the two parts have a line each.

Exit code: 0, or 1 where something would spoil training (more rows with a problem than is tolerated), or 2 where
train.py would not even start: data that cannot be read, or no row with anything to learn.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

if __name__ == "__main__":
    from alpaca.common.errors import starting

    starting("scripts.inspect_data")

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from alpaca.common import arguments
from alpaca.common.arguments import flag
from alpaca.common.commands import check_numbers
from alpaca.common.errors import UsageError, names_flags, reported
from alpaca.data.report import PROBLEMS
from alpaca.data.tokenization import IGNORE_INDEX
from alpaca.models.load import load_tokenizer
from alpaca.training.preflight import check_is_model
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

    process_index = 0  # what train.py's functions ask for


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report and the rows of the command line `argv`. Return the exit code."""
    classes = (ModelArguments, DataArguments, InspectArguments)
    argv = sys.argv[1:] if argv is None else argv
    flags, _ = arguments.parse(argv, classes, __doc__, program="scripts.inspect_data")
    return inspect_data(*flags)


@names_flags
def inspect_data(model_args: ModelArguments, data_args: DataArguments, options: InspectArguments) -> int:
    check_numbers(model_max_length=options.model_max_length, limit=options.limit)
    check_is_model(model_args.model_name_or_path)
    tokenizer, _ = load_tokenizer(model_args, options)
    data_module = make_supervised_data_module(tokenizer, data_args, options.cache_dir, options.seed)
    datasets = [data_module[name] for name in ("train_dataset", "eval_dataset") if data_module[name]]
    of_file = datasets if data_args.eval_size else datasets[:1]
    spoiled = []
    for dataset in datasets:
        print(dataset.report)
        if dataset is of_file[-1]:
            show_rows(of_file, tokenizer, options)
        spoiled += dataset.report.spoiled_by()
    for line in spoiled:
        print(f"would spoil training: {line}")
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
