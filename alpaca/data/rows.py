"""Rows in, whatever file they come from: Alpaca JSON, JSONL, CSV, parquet, seed_tasks.jsonl, conversations such as
OpenAssistant-Guanaco's, or a dataset of the hub.

A row is a dict with `instruction`, `output` and an optional `input`, all str. Row numbers count from 0, as an index
into the file's list does, also where a row of the file gives several rows or none.
"""

import csv
import json
import re
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpaca.common.errors import InputError
from alpaca.common.files import fingerprint
from alpaca.data.prompts import backward_row

Row = dict[str, Any]

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
ALPACA_DATA_HINT = (
    "Stanford's 52k rows are on the hub: pass tatsu-lab/alpaca, or download alpaca_data.json from the stanford_alpaca "
    "repository and pass its path"
)
# A turn begins wherever its marker stands: in Guanaco right behind the last character of the turn before, which may be
# "C#". Any other ### is text, and so is a marker that ends a longer row of # at the start of a line (a heading).
MARKER = re.compile(r"(?<!^#)(?<!^##)(?<!^###)### (Human|Assistant):", re.MULTILINE)


@dataclass(frozen=True)
class Data:
    """`numbers`: for each of `rows` the number of the file's row that it comes from. `problems`: what reading noticed,
    numbers of the file's rows per name of alpaca/data/report.py."""

    rows: list[Row]
    numbers: list[int]
    problems: dict[str, list[int]]

    def fingerprint(self) -> str:
        return fingerprint([(row["instruction"], row.get("input") or "", row["output"]) for row in self.rows])


def load_rows(data_path: str, split: str = "train", answered: bool = True) -> list[Row]:
    """Return the rows of `read_data`. Print a line if rows of the file are left out."""
    data = read_data(data_path, split, answered=answered)
    if left_out := data.problems.get("no_pair"):
        first = ", ".join(map(str, left_out[:5])) + (", ..." if len(left_out) > 5 else "")
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
        guanaco_turns: which pairs of a conversation become rows, see `parse_conversation`.
        backward: what a row is to learn is its instruction, from its output: see `alpaca.data.prompts.backward_row`.
        answered: a row without an output is an error.

    Raises:
        InputError: nothing is there, the file is malformed (line and column), empty, or a row has a missing field or a
            wrong type (row number).
    """
    read = raw_rows(data_path, split, cache_dir)
    rows: list[Row] = []
    numbers: list[int] = []
    problems: dict[str, list[int]] = {}
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
        raise InputError(f"{data_path}: {why}", data_path)
    return Data(rows, numbers, problems)


def raw_rows(data_path: str, split: str = "train", cache_dir: str | None = None) -> list[Any]:
    """Return what stands in the file, folder or hub dataset, unchecked.

    Raises:
        InputError: nothing is there, or the file is malformed (line and column).
    """
    path = Path(data_path)
    if path.is_file():
        return list(_read_file(path))
    if path.is_dir() or (
        path.suffix not in DATA_SUFFIXES and data_path.count("/") <= 1 and not data_path.startswith((".", "/"))
    ):
        return _read_dataset(data_path, split, cache_dir)
    hint = f"\n{ALPACA_DATA_HINT}" if "alpaca" in path.name else ""
    raise InputError(f"{data_path}: no such file (looked in {path.parent.resolve()}){hint}", data_path)


def _read_file(path: Path) -> Iterator[Row]:
    """Yield the rows of a file. JSON and JSONL are told apart by content, so a JSON list under any name works."""
    if path.suffix.lower() in (".csv", ".tsv", ".parquet"):
        return iter(_read_table(path))
    text = read_text(path)
    return iter(_parse_json(text, path) if text.lstrip()[:1] == "[" else _parse_jsonl(text, path))


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file. Raise InputError for another encoding, or the pointer of git-lfs."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 (byte {error.start}); convert it first", path) from error
    if text.startswith("version https://git-lfs"):
        raise InputError(f"{path}: is a git-lfs pointer, not the data; run `git lfs pull`", path)
    return text


def _parse_json(text: str, path: Path) -> list[Row]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: malformed JSON at line {error.lineno}, column {error.colno}: {error.msg}", path
        ) from error


def _parse_jsonl(text: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand inside a string
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{path}: malformed JSON at line {number}, column {error.colno}: {error.msg}; expected a JSON list "
                    "of rows, or one JSON object per line",
                    path,
                ) from error


def _read_table(path: Path) -> list[Row]:
    """Return the rows of a table. CSV goes through the standard library: "007", "NA" and "" stay the text they are."""
    try:
        if path.suffix.lower() == ".parquet":
            import datasets

            return datasets.Dataset.from_parquet(str(path), keep_in_memory=True).to_list()
        csv.field_size_limit(2**31 - 1)
        with open(path, newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    except (OSError, ValueError, RuntimeError, csv.Error) as error:  # datasets' own errors are RuntimeErrors
        raise InputError(f"{path}: cannot be read as {path.suffix[1:]} ({error.__cause__ or error})", path) from error


def _read_dataset(name: str, split: str, cache_dir: str | None) -> list[Row]:
    import datasets

    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(name)
            return (saved[split] if isinstance(saved, datasets.DatasetDict) else saved).to_list()
        return datasets.load_dataset(name, split=split, cache_dir=cache_dir).to_list()
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        hint = f"\n{ALPACA_DATA_HINT}" if "alpaca" in name else ""
        raise InputError(
            f"{name}: no such file, and loading it as a dataset (split {split!r}) failed: {error}{hint}", name
        ) from error


def _instances(row: Any) -> list[Row]:
    """Return the rows that a row of the file holds: a self-instruct seed task has a list of instances, every other row
    is one itself."""
    if isinstance(row, dict) and isinstance(row.get("instances"), list):
        return [{"instruction": row.get("instruction"), **instance} for instance in row["instances"]]
    return [row]


def _check_row(row: Any, number: int, data_path: str) -> None:
    where = f"{data_path}: row {number}"
    if not isinstance(row, Mapping):
        got = type(row).__name__
        raise InputError(f"{where}: expected an object with instruction, input and output, got {got}", data_path)
    for field in ("instruction", "output"):
        if field not in row:
            raise InputError(f"{where}: no field {field!r}; the row has {sorted(map(str, row))}", data_path)
    for field in ("instruction", "input", "output"):
        value = row.get(field)
        if not isinstance(value, str) and not (field == "input" and value is None):
            got = f"{type(value).__name__} {value!r:.60}"
            raise InputError(f"{where}: {field!r} must be text, got {got}", data_path)
        check_text(value or "", f"{where}: {field!r}", data_path)


def check_text(text: str, where: str, about: str) -> None:
    """Raise InputError for half of a surrogate pair: JSON can say it ("\\ud83d"), no tokenizer or server reads it."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise InputError(
                f"{where} holds {half!r} at character {error.start}, one half of a character such as an emoji that was "
                "cut in two; mend or remove it",
                about,
            ) from error


def is_conversation(row: Any) -> bool:
    """Return whether a row of a file has its turns in `text` (the Alpaca data has a `text` too, beside its fields)."""
    return isinstance(row, dict) and isinstance(row.get("text"), str) and not {"instruction", "output"} & row.keys()


def parse_conversation(text: str, pairs: str = "first") -> tuple[list[dict[str, str]], list[str]]:
    """Return the rows of one conversation, and the names of its problems as in alpaca/data/report.py.

    A pair is a human turn and the assistant turn right behind it, both with text; space around a turn is dropped.

    Args:
        pairs: "first" gives a row of the first pair, by itself. "all" gives a row of every pair: `instruction` is the
            human turn, `input` all turns before it ("Human: ...\n\nAssistant: ..."), without which a question such as
            "And another?" could not be answered, `output` the assistant turn.
    """
    before, *parts = MARKER.split(text)
    turns = [(speaker, said.strip()) for speaker, said in zip(parts[::2], parts[1::2])]
    starts = [
        i
        for i, (human, assistant) in enumerate(zip(turns, turns[1:]))
        if (human[0], assistant[0]) == ("Human", "Assistant") and human[1] and assistant[1]
    ]
    unanswered = bool(turns) and turns[-1][0] == "Human"
    found = {
        "no_pair": not starts,
        "ends_on_human": unanswered,
        "unpaired_turns": bool(before.strip()) or len(turns) > 2 * len(starts) + unanswered,
        "later_pairs": pairs == "first" and len(starts) > 1,
    }
    rows = []
    for i in starts if pairs == "all" else starts[:1]:
        earlier = [f"{speaker}: {said}" for speaker, said in turns[:i] if said] if pairs == "all" else []
        rows.append({"instruction": turns[i][1], "input": "\n\n".join(earlier), "output": turns[i + 1][1]})
    return rows, [name for name, is_so in found.items() if is_so]


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
