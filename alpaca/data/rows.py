"""Rows in, whatever file they come from: Alpaca JSON, JSONL, CSV, parquet, seed_tasks.jsonl, conversations such as
OpenAssistant-Guanaco's, or a dataset of the hub.

A row is a dict with `instruction`, `output` and an optional `input`, all str. Row numbers count from 0, as an index
into the file's list does, also where a row of the file gives several rows or none.
"""

import csv
import io
import json
import reprlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alpaca.common.errors import InputError, UsageError, format_bytes, loading, why_no_hub
from alpaca.common.files import decode_json, fingerprint, json_items
from alpaca.data.formats import Row, check_is_list, instances_of, is_conversation, parse_conversation
from alpaca.data.prompts import backward_row

FIELDS = ("instruction", "input", "output")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
DATA_SUFFIXES = (".json", ".jsonl", *DELIMITERS, ".parquet")
MOST_BYTES = 2 * 10**9  # of a file, and of what a table unpacks to, where a row counts ROW_BYTES more
ROW_BYTES = 100
MOST_LEVELS = 100  # of lists and objects in a row
NO_TEXT = {  # how a file begins, and what is wrong with it
    b"version https://git-lfs": "is a git-lfs pointer, not the data; run `git lfs pull`",
    b"\x1f\x8b": "is compressed (gzip); unpack it first",
    b"PK\x03\x04": "is compressed (zip); unpack it first",
    b"BZh": "is compressed (bzip2); unpack it first",
    b"\xfd7zXZ": "is compressed (xz); unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed (zstd); unpack it first",
    b"PAR1": "is a parquet file; name it .parquet",
    b"\xff\xfe": "is UTF-16, not UTF-8; convert it first",
    b"\xfe\xff": "is UTF-16, not UTF-8; convert it first",
}
OF_A_ROW, OF_A_CONVERSATION = {*FIELDS, "instances"}, {"text"}
EMPTY = (None, "", [], {})
OURS = (  # what our own programs write beside a row's fields, and the data of self-instruct and AlpacaEval has
    *("id", "name", "is_classification", "generator", "dataset", "datasplit", "text"),
    *("most_similar_instructions", "avg_similarity_score", "score", "source"),
)
ALPACA_DATA_HINT = (
    "Stanford's 52k rows are on the hub: pass tatsu-lab/alpaca, or download alpaca_data.json from the stanford_alpaca "
    "repository and pass its path"
)


@dataclass(frozen=True)
class Data:
    """`numbers`: for each of `rows` the number of the file's row that it comes from. `problems`: what reading noticed,
    numbers of the file's rows per name of alpaca/data/report.py. `unread`: in how many rows of the file something
    stands in a column that nothing is read from."""

    rows: list[Row]
    numbers: list[int]
    problems: dict[str, list[int]]
    unread: dict[str, int] = field(default_factory=dict)

    def fingerprint(self) -> str:
        return fingerprint([(row["instruction"], row.get("input") or "", row["output"]) for row in self.rows])


def load_rows(data_path: str, split: str = "train", answered: bool = True, also: Collection[str] = ()) -> list[Row]:
    """Return the rows of `read_data`. Print a line each if rows of the file are left out, fields are given twice, or
    columns other than `also` are not read."""
    data = read_data(data_path, split, answered=answered)
    for name, what in (
        ("no_pair", "rows left out, without a human turn and its answer"),
        ("repeated_field", "rows give a field twice, and only the last of both is read"),
    ):
        if rows := data.problems.get(name):
            first = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
            print(f"{data_path}: {what}: {len(rows):,} ({first})")
    if unread := {name: rows for name, rows in data.unread.items() if name not in (*also, *OURS)}:
        print(f"{data_path}: {describe_unread(unread)}")
    return data.rows


def describe_unread(unread: Mapping[str, int]) -> str:
    """Return the line of the report about `Data.unread`."""
    parts = []
    for name, rows in unread.items():
        meant = next((known for known in FIELDS if known == name.strip(" \t\ufeff").lower()), None)
        shown = repr(name) if name != name.strip() or not name.isprintable() or not name else name
        count = "1 row" if rows == 1 else f"{rows:,} rows"
        parts.append(f"{shown:.80} ({count}{f', is not {meant}' if meant else ''})")
    return "columns never read: " + ", ".join(parts[:20]) + (f", and {len(parts) - 20} more" if parts[20:] else "")


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
    check_is_list(read, data_path)
    rows: list[Row] = []
    numbers: list[int] = []
    problems: dict[str, list[int]] = {}
    unread: Counter[str] = Counter()
    for number, row in enumerate(read):
        conversation = is_conversation(row)
        parts, found = parse_conversation(row["text"], guanaco_turns) if conversation else (instances_of(row), [])
        for part in parts:
            unanswered = not answered and isinstance(part, Mapping)
            _check_row({"output": "", **part} if unanswered else part, number, data_path)
            rows.append(backward_row(part) if backward else part)
            numbers.append(number)
        instances = row["instances"] if isinstance(row.get("instances"), list) else ()
        if any(isinstance(one, RowWithRepeats) for one in (row, *instances)):
            found.append("repeated_field")
        for name in found:
            problems.setdefault(name, []).append(number)
        read_here = OF_A_CONVERSATION if conversation else OF_A_ROW
        unread.update({name for one in (row, *instances) for name in one.keys() - read_here if one[name] not in EMPTY})
    if not rows:
        why = "holds no rows"
        if read and problems:
            why = f"none of its {len(read):,} rows has a turn `### Human: ...` with an answer `### Assistant: ...`"
        raise InputError(f"{data_path}: {why}", data_path)
    return Data(rows, numbers, problems, dict(unread))


def raw_rows(data_path: str, split: str = "train", cache_dir: str | None = None) -> list[Any]:
    """Return what stands in the file, folder or hub dataset, unchecked.

    Raises:
        InputError: nothing is there, or the file is malformed (line and column).
    """
    path = Path(data_path)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError) as error:  # a name too long; in a folder that may not be entered
        raise InputError(f"{data_path}: cannot be read ({error.strerror or error})", data_path) from error
    if is_file:
        return _read_file(path)
    if "://" in data_path:
        problem = "is an address; download it, or give the name of a dataset of the hub, such as tatsu-lab/alpaca"
        raise InputError(f"{data_path}: {problem}", data_path)
    if is_folder or (
        path.suffix not in DATA_SUFFIXES and data_path.count("/") <= 1 and not data_path.startswith((".", "/"))
    ):
        return _read_dataset(data_path, split, cache_dir)
    hint = f"\n{ALPACA_DATA_HINT}" if "alpaca" in path.name else ""
    raise InputError(f"{data_path}: no such file (looked in {path.parent.resolve()}){hint}", data_path)


def _read_file(path: Path) -> list[Any]:
    """Return the rows of a file. JSON and JSONL are told apart by content, so a JSON list under any name works."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _read_parquet(path)
    text = read_text(path, line_ends=kind not in DELIMITERS)
    if kind in DELIMITERS:
        return list(_read_csv(text, path, DELIMITERS[kind]))
    return list(_parse_json(text, path) if text.lstrip()[:1] == "[" else _parse_jsonl(text, path))


def read_text(path: Path, line_ends: bool = True) -> str:
    """Return the text of a UTF-8 file, with line ends as "\n" unless they are to stay. Raise InputError for one that is
    too large, cannot be read, has another encoding, is compressed, or is the pointer of git-lfs."""
    try:
        _check_size(path.stat().st_size, path)
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})", path) from error
    if found := next((advice for magic, advice in NO_TEXT.items() if data.startswith(magic)), None):
        raise InputError(f"{path}: {found}", path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 (byte {error.start}); convert it first", path) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(f"{path}: holds a NUL byte (line {line}): it is damaged, or UTF-16; convert it first", path)
    return text.replace("\r\n", "\n").replace("\r", "\n") if line_ends else text


def _check_size(size: int, about: str | Path, unpacked: bool = False) -> None:
    """Raise InputError for more than MOST_BYTES."""
    if size > MOST_BYTES:
        what = "unpacks to" if unpacked else "has"
        raise InputError(
            f"{about}: {what} {format_bytes(size)} or more, and at most {format_bytes(MOST_BYTES)} are read at once. "
            "If it really is that large: split it, or put it into a folder as parquet files and take a part of that, "
            "as with the split train[:1000000]",
            about,
        )


class RowWithRepeats(dict):
    """A row that gives a field more than once, which JSON and the header of a table can; the last one stands."""


def _row(pairs: Iterable[tuple[str, Any]]) -> Row:
    pairs = list(pairs)
    row = dict(pairs)
    return row if len(row) == len(pairs) else RowWithRepeats(row)


def _parse_json(text: str, path: Path) -> Iterator[Any]:
    number = 0
    try:
        for number, row in enumerate(json_items(text, _row), start=1):
            _check_depth(row, f"{path}: row {number - 1}", path)
            yield row
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: malformed JSON at line {error.lineno}, column {error.colno} (row {number}): {error.msg}", path
        ) from error


def _parse_jsonl(text: str, path: Path) -> Iterator[Any]:
    """Yield the object of each line, or the one object that the whole text is."""
    if text.lstrip()[:1] == "{":
        try:
            row, end = decode_json(text, 0, _row)
        except json.JSONDecodeError:
            end = -1
        if end == len(text):
            _check_depth(row, f"{path}: row 0", path)
            yield row
            return
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand inside a string
        if not line.strip():
            continue
        try:
            row, end = decode_json(line, 0, _row)
            if end < len(line):
                raise json.JSONDecodeError("Extra data", line, end)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}: malformed JSON at line {number}, column {error.colno}: {error.msg}; expected a JSON list "
                "of rows, or one JSON object per line",
                path,
            ) from error
        _check_depth(row, f"{path}: line {number}", path)
        yield row


def _check_depth(row: Any, where: str, about: Path) -> None:
    """Raise InputError for a row that could be read, but not be shown or written again."""
    level, depth = [row], 0
    while level := [
        part
        for value in level
        if isinstance(value, list | dict)
        for part in (value.values() if isinstance(value, dict) else value)
        if isinstance(part, list | dict)
    ]:
        depth += 1
        if depth > MOST_LEVELS:
            raise InputError(f"{where}: lists and objects are nested more than {MOST_LEVELS} deep", about)


def _read_csv(text: str, path: Path, delimiter: str) -> Iterator[Row]:
    """Yield the rows of CSV through the standard library: "007", "NA" and "" stay the text they are."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise InputError(
                f"{path}: malformed {path.suffix[1:]} in the row that begins at line {line}: {error}; a field with "
                "quotes in it stands in quotes, and those in it are written twice",
                path,
            ) from error
        if fields is None:
            return
        if not fields or (len(fields) == 1 and not fields[0].strip()):
            continue
        if header is None:
            header = fields
        elif len(fields) != len(header):
            raise InputError(
                f"{path}: line {line}: the row has {len(fields)} fields, the header {len(header)} ({', '.join(header)})"
                "; a text with a separator or a line break in it stands in quotes",
                path,
            )
        else:
            yield _row(zip(header, fields))


def _read_parquet(path: Path) -> list[Row]:
    """Return the rows of a parquet file, a few at a time: its statement of how large it is unpacked may be false, and a
    text that is repeated stands in it once."""
    import pyarrow.parquet

    rows: list[Row] = []
    with loading(path, "cannot be read as parquet"):
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            size = max(ROW_BYTES * file.metadata.num_rows, sum(group.total_byte_size for group in groups))
            _check_size(size, path, True)
            texts = [field.name for field in file.schema_arrow if field.type in (pyarrow.string(), pyarrow.binary())]
        batches, size = [], 0
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
            for batch in file.iter_batches(batch_size=1024):
                size += ROW_BYTES * batch.num_rows + sum(map(_unpacked_size, batch.columns))
                _check_size(size, path, True)
                batches.append(batch)
        for batch in batches:
            columns = [column.dictionary_decode() if hasattr(column, "indices") else column for column in batch.columns]
            values = zip(*(column.to_pylist() for column in columns))
            rows += [_row(zip(batch.schema.names, row)) for row in values]
    return rows


def _unpacked_size(column: Any) -> int:
    """Return the bytes of a pyarrow array with every text written out."""
    import pyarrow.compute

    if not hasattr(column, "indices"):
        return column.nbytes
    lengths = pyarrow.compute.binary_length(column.dictionary)
    return pyarrow.compute.sum(lengths.take(column.indices)).as_py() or 0


def _read_dataset(name: str, split: str, cache_dir: str | None) -> list[Row]:
    import datasets

    offline = why_no_hub(name)
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(name)
            found = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            found = datasets.load_dataset(name, split=split, cache_dir=cache_dir)
        _check_size(found.data.nbytes, name, True)
        return found.to_list()
    except UsageError:
        raise
    except Exception as error:  # of the hub, of a reader of any file type, of a dataset's own description
        hint = f"\n{ALPACA_DATA_HINT}" if "alpaca" in name else ""
        raise InputError(
            f"{name}: no such file, and loading it as a dataset (split {split!r}) failed: {offline or error}{hint}",
            name,
        ) from error


def _check_row(row: Any, number: int, data_path: str) -> None:
    where = f"{data_path}: row {number}"
    if not isinstance(row, Mapping):
        got = type(row).__name__
        raise InputError(f"{where}: expected an object with instruction, input and output, got {got}", data_path)
    for name in ("instruction", "output"):
        if name not in row:
            raise InputError(f"{where}: no field {name!r}; the row has {sorted(map(str, row))}", data_path)
    for name in ("instruction", "input", "output"):
        value = row.get(name)
        if not isinstance(value, str) and not (name == "input" and value is None):
            got = f"{type(value).__name__} {reprlib.repr(value):.60}"
            raise InputError(f"{where}: {name!r} must be text, got {got}", data_path)
        check_text(value or "", f"{where}: {name!r}", data_path)


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
