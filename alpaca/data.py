"""Rows in, whatever file they come from: Alpaca JSON, JSONL, CSV, parquet, seed_tasks.jsonl, conversations such as
OpenAssistant-Guanaco's, or a dataset of the hub.

A row is a dict with `instruction`, `output` and an optional `input`, all str. Row numbers count from 0, as an index
into the file's list does, also where a row of the file gives several rows or none.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpaca.common.errors import UsageError
from alpaca.common.files import fingerprint
from alpaca.conversations import is_conversation, parse_conversation
from alpaca.prompts import backward_row

Row = dict[str, Any]

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
ALPACA_DATA_HINT = (
    "Stanford's 52k rows are on the hub: pass --data_path tatsu-lab/alpaca, or download alpaca_data.json from the "
    "stanford_alpaca repository and pass its path"
)


@dataclass(frozen=True)
class Data:
    """`numbers`: for each of `rows` the number of the file's row that it comes from. `problems`: what reading noticed,
    numbers of the file's rows per name of alpaca/report.py."""

    rows: list[Row]
    numbers: list[int]
    problems: dict[str, list[int]]

    def fingerprint(self) -> str:
        return fingerprint([(row["instruction"], row.get("input") or "", row["output"]) for row in self.rows])


def load_rows(data_path: str, split: str = "train", answered: bool = True) -> list[Row]:
    """The rows of `read_data`; a line says if rows of the file are left out."""
    data = read_data(data_path, split, answered=answered)
    if left_out := data.problems.get("no_pair"):
        first = ", ".join(map(str, left_out[:5])) + ", ..." * (len(left_out) > 5)
        print(f"{data_path}: rows left out, without a human turn and its answer: {len(left_out):,} ({first})")
    return data.rows


def read_data(
    data_path: str,
    split: str = "train",
    cache_dir: str | None = None,
    guanaco_turns: str = "first",
    backward: bool = False,
    answered: bool = True,
) -> Data:
    """Read and check all rows of `data_path`.

    Args:
        split: of a hub dataset or a saved dataset folder (`train`, `train[:1000]`); a file has one split.
        guanaco_turns: which pairs of a conversation become rows, see `alpaca.conversations.parse_conversation`.
        backward: what a row is to learn is its instruction, from its output: see `alpaca.prompts.backward_row`.
        answered: a row without an output is an error.

    Raises:
        UsageError: nothing is there, the file is malformed (line and column), empty, or a row has a missing field or a
            wrong type (row number).
    """
    read = raw_rows(data_path, split, cache_dir)
    rows, numbers, problems = [], [], {}
    for number, row in enumerate(read):
        parts, found = parse_conversation(row["text"], guanaco_turns) if is_conversation(row) else (_instances(row), [])
        for part in parts:
            unanswered = not answered and isinstance(part, Mapping)
            _check_row({"output": "", **part} if unanswered else part, number, data_path)
            rows.append(backward_row(part) if backward else part)
            numbers.append(number)
        for name in found:
            problems.setdefault(name, []).append(number)
    if not rows:
        why = "holds no rows"
        if read and problems:
            why = f"none of its {len(read):,} rows has a turn `### Human: ...` with an answer `### Assistant: ...`"
        raise UsageError(f"--data_path {data_path}: {why}")
    return Data(rows, numbers, problems)


def raw_rows(data_path: str, split: str = "train", cache_dir: str | None = None) -> list[Any]:
    """What stands in the file, folder or hub dataset, unchecked.

    Raises:
        UsageError: nothing is there, or the file is malformed (line and column).
    """
    path = Path(data_path)
    if path.is_file():
        return list(_read_file(path))
    if path.is_dir() or (
        path.suffix not in DATA_SUFFIXES and data_path.count("/") <= 1 and not data_path.startswith((".", "/"))
    ):
        return _read_dataset(data_path, split, cache_dir)
    hint = f"\n{ALPACA_DATA_HINT}" if "alpaca" in path.name else ""
    raise UsageError(f"--data_path {data_path}: no such file (looked in {path.parent.resolve()}){hint}")


def _read_file(path: Path) -> Iterator[Row]:
    """JSON and JSONL are told apart by content, so a JSON list under any name works."""
    if path.suffix.lower() in (".csv", ".tsv", ".parquet"):
        return iter(_read_table(path))
    text = read_text(path)
    return iter(_parse_json(text, path) if text.lstrip()[:1] == "[" else _parse_jsonl(text, path))


def read_text(path: Path) -> str:
    """A UTF-8 file, which is no git-lfs pointer."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"--data_path {path}: is not UTF-8 (byte {error.start}); convert it first") from error
    if text.startswith("version https://git-lfs"):
        raise UsageError(f"--data_path {path}: is a git-lfs pointer, not the data; run `git lfs pull`")
    return text


def _parse_json(text: str, path: Path) -> list[Row]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"--data_path {path}: malformed JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error


def _parse_jsonl(text: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand inside a string
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(
                    f"--data_path {path}: malformed JSON at line {number}, column {error.colno}: {error.msg}; expected "
                    "a JSON list of rows, or one JSON object per line"
                ) from error


def _read_table(path: Path) -> list[Row]:
    """CSV through the standard library: "007", "NA" and "" stay the text they are."""
    try:
        if path.suffix.lower() == ".parquet":
            import datasets

            return datasets.Dataset.from_parquet(str(path), keep_in_memory=True).to_list()
        csv.field_size_limit(2**31 - 1)
        with open(path, newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    except (OSError, ValueError, RuntimeError, csv.Error) as error:  # datasets' own errors are RuntimeErrors
        raise UsageError(
            f"--data_path {path}: cannot be read as {path.suffix[1:]} ({error.__cause__ or error})"
        ) from error


def _read_dataset(name: str, split: str, cache_dir: str | None) -> list[Row]:
    import datasets

    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(name)
            return (saved[split] if isinstance(saved, datasets.DatasetDict) else saved).to_list()
        return datasets.load_dataset(name, split=split, cache_dir=cache_dir).to_list()
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        hint = f"\n{ALPACA_DATA_HINT}" if "alpaca" in name else ""
        raise UsageError(
            f"--data_path {name}: no such file, and loading it as a dataset (split {split!r}) failed: {error}{hint}"
        ) from error


def _instances(row: Any) -> list[Row]:
    """A self-instruct seed task holds a list of instances; every other row is one instance itself."""
    if isinstance(row, dict) and isinstance(row.get("instances"), list):
        return [{"instruction": row.get("instruction"), **instance} for instance in row["instances"]]
    return [row]


def _check_row(row: Any, number: int, data_path: str) -> None:
    where = f"--data_path {data_path}, row {number}"
    if not isinstance(row, Mapping):
        raise UsageError(f"{where}: expected an object with instruction, input and output, got {type(row).__name__}")
    for field in ("instruction", "output"):
        if field not in row:
            raise UsageError(f"{where}: no field {field!r}; the row has {sorted(map(str, row))}")
    for field in ("instruction", "input", "output"):
        value = row.get(field)
        if not isinstance(value, str) and not (field == "input" and value is None):
            raise UsageError(f"{where}: {field!r} must be text, got {type(value).__name__} {value!r:.60}")
        check_text(value or "", f"{where}: {field!r}")


def check_text(text: str, where: str) -> None:
    """Raise UsageError for half of a surrogate pair: JSON can say it ("\\ud83d"), no tokenizer or server reads it."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise UsageError(
                f"{where} holds {half!r} at character {error.start}, one half of a character such as an emoji that was "
                "cut in two; mend or remove it"
            ) from error
