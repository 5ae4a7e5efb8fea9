"""Rows in, whatever file they come from: Alpaca JSON, JSONL, CSV, parquet, seed_tasks.jsonl or a dataset of the hub.

A row is a dict with `instruction`, `output` and an optional `input`, all str. Row numbers count from 0, as an index
into the file's list does.
"""

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alpaca.errors import UsageError

Row = dict[str, Any]

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
ALPACA_DATA_HINT = (
    "Stanford's 52k rows are on the hub: pass --data_path tatsu-lab/alpaca, or download alpaca_data.json from the "
    "stanford_alpaca repository and pass its path"
)


def load_rows(data_path: str, split: str = "train", cache_dir: str | None = None, answered: bool = True) -> list[Row]:
    """Read and check all rows of `data_path`.

    `split` names the split of a hub dataset or a saved dataset folder (`train`, `train[:1000]`); a file has one split.
    Rows that are not `answered` may lack their output.

    Raises:
        UsageError: nothing is there, the file is malformed (line and column), empty, or a row has a missing field or a
            wrong type (row number).
    """
    path = Path(data_path)
    if path.is_file():
        rows = list(_read_file(path))
    elif path.is_dir() or (
        path.suffix not in DATA_SUFFIXES and data_path.count("/") <= 1 and not data_path.startswith((".", "/"))
    ):
        rows = _read_dataset(data_path, split, cache_dir)
    else:
        hint = f"\n{ALPACA_DATA_HINT}" if "alpaca" in path.name else ""
        raise UsageError(f"--data_path {data_path}: no such file (looked in {path.parent.resolve()}){hint}")
    rows = [part for row in rows for part in _instances(row)]
    if not rows:
        raise UsageError(f"--data_path {data_path}: holds no rows")
    for number, row in enumerate(rows):
        _check_row({"output": "", **row} if not answered and isinstance(row, dict) else row, number, data_path)
    return rows


def _read_file(path: Path) -> Iterator[Row]:
    """JSON and JSONL are told apart by content, so a JSON list under any name works."""
    if path.suffix.lower() in (".csv", ".tsv", ".parquet"):
        return iter(_read_table(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"--data_path {path}: is not UTF-8 (byte {error.start}); convert it first") from error
    if text.startswith("version https://git-lfs"):
        raise UsageError(f"--data_path {path}: is a git-lfs pointer, not the data; run `git lfs pull`")
    return iter(_parse_json(text, path) if text.lstrip()[:1] == "[" else _parse_jsonl(text, path))


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


def fingerprint(*parts: Any) -> str:
    """SHA-256 (32 hex digits) of the JSON of `parts`: equal inputs, and only those, give the same cache file."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
