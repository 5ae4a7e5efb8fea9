"""Rows in, whatever file they come from: JSON, JSONL, CSV, parquet or a dataset of the hub, in any layout of
alpaca/data/formats.py.

A row is a dict with `instruction`, `output` and an optional `input`, all str. Row numbers count from 0, as an index
into the file's list does, also where a row of the file gives several rows or none.
"""

import csv
import io
import json
import random
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alpaca.common.errors import InputError, ParameterError, UsageError, format_bytes, loading, why_no_hub
from alpaca.common.files import decode_json, decode_text, fingerprint, json_items
from alpaca.data import formats
from alpaca.data.formats import ALPACA, EMPTY, FIELDS, Row, rows_of
from alpaca.data.prompts import backward_row, check_eval_size, check_fits, check_row

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON = "; expected a JSON list of rows, or one JSON object per line"
DATA_SUFFIXES = (".json", ".jsonl", *DELIMITERS, ".parquet")
MOST_BYTES = 2 * 10**9  # of a file, and of what a table unpacks to, where rows and values count these more
ROW_BYTES, VALUE_BYTES = 100, 50
NO_DICTIONARY = {"DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"}  # encodings that pyarrow does not read as one
MOST_LEVELS = 100  # of lists and objects in a row
OF_A_ROW = {*FIELDS, "instances"}
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
    stands in a column that nothing is read from. `read_as`: what was read as what, unless it is Alpaca's own."""

    rows: list[Row]
    numbers: list[int]
    problems: dict[str, list[int]]
    unread: dict[str, int] = field(default_factory=dict)
    read_as: str | None = None

    def fingerprint(self) -> str:
        return fingerprint([(row["instruction"], row.get("input") or "", row["output"]) for row in self.rows])

    def hold_out(self, eval_size: float, seed: int) -> tuple["Data", "Data"]:
        """Return the rows to train on, and those to evaluate on, which `seed` draws. Rows that come from one row of the
        file, such as a conversation, stay together, so that there may be a few more than `eval_size`.

        Args:
            eval_size: a number of rows or, below 1, their share.
        """
        check_eval_size(eval_size)
        wanted = max(1, round(eval_size * len(self.rows))) if eval_size < 1 else int(eval_size)
        of_row = Counter(self.numbers)
        order, held, count = sorted(of_row), set(), 0
        random.Random(seed).shuffle(order)
        while count < wanted and order:
            held.add(number := order.pop())
            count += of_row[number]
        if not order:
            problem = f"no row would be left to train on; the data has {len(self.rows):,} in all"
            raise ParameterError(f"{{eval_size}} {eval_size:g}: {problem}", "eval_size")
        return self._part(held, False), self._part(held, True)

    def _part(self, held: set[int], inside: bool) -> "Data":
        kept = [i for i, number in enumerate(self.numbers) if (number in held) == inside]
        problems = {name: [row for row in rows if (row in held) == inside] for name, rows in self.problems.items()}
        return Data(
            [self.rows[i] for i in kept],
            [self.numbers[i] for i in kept],
            {name: rows for name, rows in problems.items() if rows},
            {} if inside else self.unread,
            self.read_as,
        )


def load_rows(
    data_path: str, split: str = "train", answered: bool = True, also: Collection[str] = (), columns: str | None = None
) -> list[Row]:
    """Return the rows of `read_data`. Print a line each if they are not in Alpaca's layout, rows of the file are left
    out, fields are given twice, or columns other than `also` are not read."""
    data = read_data(data_path, split, answered=answered, columns=columns)
    if data.read_as:
        print(f"{data_path}: {data.read_as}")
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
        meant = next((known for known in FIELDS if known == formats.plain_name(name)), None)
        count = "1 row" if rows == 1 else f"{rows:,} rows"
        parts.append(f"{formats.shown_name(name):.80} ({count}{f', is not {meant}' if meant else ''})")
    return "columns never read: " + ", ".join(parts[:20]) + (f", and {len(parts) - 20} more" if parts[20:] else "")


def read_data(
    data_path: str,
    split: str = "train",
    cache_dir: str | None = None,
    turns: str = "first",
    backward: bool = False,
    answered: bool = True,
    columns: str | None = None,
) -> Data:
    """Read and check all rows of `data_path`.

    Args:
        split: of a hub dataset or a saved dataset folder (`train`, `train[:1000]`); a file has one split.
        turns: which pairs of a conversation become rows, see `alpaca.data.formats.pairs_of`.
        backward: what a row is to learn is its instruction, from its output: see `alpaca.data.prompts.backward_row`.
        answered: a row without an output is an error.
        columns: which column is what, see `alpaca.data.formats.choose_layout`.

    Raises:
        InputError: nothing is there, the file is malformed (line and column), empty, or of no known layout, or a row
            has a missing field or a wrong type (row number).
    """
    read = raw_rows(data_path, split, cache_dir)
    layout = formats.choose_layout(read, data_path, columns, answered)
    check_fits(read, data_path, layout)
    data = Data([], [], {}, unread := Counter(), layout.description(turns))
    names = ALPACA if layout.is_conversation else layout
    taken = OF_A_ROW if layout.is_plain else set(layout.columns.values())
    for number, row in enumerate(read):
        parts, found = rows_of(row, layout, turns, f"{data_path}: row {number}", data_path)
        for part in parts:
            unanswered = not answered and isinstance(part, Mapping)
            check_row({"output": "", **part} if unanswered else part, row, number, data_path, names)
            data.rows.append(backward_row(part) if backward else part)
            data.numbers.append(number)
        instances = row["instances"] if layout.is_plain and isinstance(row.get("instances"), list) else ()
        if any(isinstance(one, RowWithRepeats) for one in (row, *instances)):
            found.append("repeated_field")
        for name in found:
            data.problems.setdefault(name, []).append(number)
        unread.update({name for one in (row, *instances) for name in one.keys() - taken if one[name] not in EMPTY})
    if not data.rows:
        why = layout.without_pairs(len(read), data.problems) if read else "holds no rows"
        raise InputError(f"{data_path}: {why}", data_path, advice=formats.ADVICE if layout.name == "Guanaco" else None)
    return data


def raw_rows(data_path: str, split: str = "train", cache_dir: str | None = None) -> list[Any]:
    """Return what stands in the file, folder or hub dataset, unchecked. Raise InputError if nothing is there, or the
    file is malformed (line and column)."""
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
    text = decode_text(data, path)
    return text.replace("\r\n", "\n").replace("\r", "\n") if line_ends else text


def _check_size(size: int, about: str | Path, unpacked: bool = False) -> None:
    """Raise InputError for more than MOST_BYTES."""
    if size > MOST_BYTES:
        has = "unpacks to" if unpacked else "has"
        raise InputError(
            f"{about}: {has} {format_bytes(size)} or more, and at most {format_bytes(MOST_BYTES)} are read at once: "
            "split it, or put it into a folder as parquet files and take a part of that, such as train[:1000000]",
            about,
        )


class RowWithRepeats(dict):
    """A row that gives a field more than once, which JSON and the header of a table can; the last one stands."""


def _row(pairs: Iterable[tuple[str, Any]]) -> Row:
    row = dict(pairs := list(pairs))
    return row if len(row) == len(pairs) else RowWithRepeats(row)


def _parse_json(text: str, path: Path) -> Iterator[Any]:
    number = 0
    try:
        for number, row in enumerate(json_items(text, _row), start=1):
            _check_depth(row, f"{path}: row {number - 1}", path)
            yield row
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: malformed JSON at line {error.lineno}, column {error.colno} (row {number}): {error.msg}{JSON}",
            path,
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
                f"{path}: malformed JSON at line {number}, column {error.colno}: {error.msg}{JSON}"
                + ("" if path.suffix.lower() in DATA_SUFFIXES else "; name a table .csv or .tsv"),
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
    separator = _find_separator(text, delimiter)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
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
        if (len(fields) <= 1 and not "".join(fields).strip()) or (line == 1 and fields == ["sep=", ""]):
            continue
        if header is None:
            header = fields
        elif len(fields) != len(header):
            raise InputError(
                f"{path}: line {line}: the row has {len(fields)} fields, the header {len(header)} ({', '.join(header)})"
                f"; they are separated by {separator!r}, and a text with that or a line break in it stands in quotes",
                path,
            )
        else:
            yield _row((name, field) for name, field in zip(header, fields) if name.strip() or field.strip())


def _find_separator(text: str, usual: str) -> str:
    """Return what separates the fields of a table: with it the header has most names that are known, the next line as
    many fields, and the header most of them. `usual` is meant where others are as good."""
    if named := re.match(r"sep=([,;|\t])\r?\n", text):  # as Excel writes and reads it
        return named[1]

    def fit(separator: str) -> tuple[int, bool, int]:
        lines, first = csv.reader(io.StringIO(text[: 2**20], newline=""), delimiter=separator, strict=True), []
        try:
            for line in lines:
                first += [line] if "".join(line).strip() else []
                if len(first) == 2:
                    break
        except csv.Error:
            pass  # said when it is read
        header, after = [*first, [], []][:2]
        known = sum(formats.plain_name(name) in formats.KNOWN for name in header)
        return known, len(header) == len(after) > 1, len(header)

    return max((usual, ",", ";", "\t", "|"), key=fit)


def _read_parquet(path: Path) -> list[Row]:
    """Return the rows of a parquet file. What it says of its size may be false; a repeated text stands in it once."""
    import pyarrow.parquet

    rows, batches, size = [], [], 0
    with loading(path, "cannot be read as parquet"):
        with pyarrow.parquet.ParquetFile(path) as file:
            schema, groups = file.schema, [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            parts = [(schema.column(i), group.column(i)) for group in groups for i in range(len(schema))]
            values = sum(part.num_values * (VALUE_BYTES + max(column.length, 0)) for column, part in parts)
            least = ROW_BYTES * file.metadata.num_rows + values
            _check_size(max(least, sum(group.total_byte_size for group in groups)), path, True)
            texts = {column.path for column, _ in parts if column.physical_type == "BYTE_ARRAY"}
            known = {field.name for field in file.schema_arrow if not pyarrow.types.is_nested(field.type)} & texts
            known -= {column.path for column, part in parts if {*part.encodings} & NO_DICTIONARY}
        with pyarrow.parquet.ParquetFile(path, read_dictionary=sorted(known)) as file:
            for batch in file.iter_batches(batch_size=1024 if known == texts else 16):  # a text may be repeated
                size += ROW_BYTES * batch.num_rows + sum(map(_unpacked_size, batch.columns))
                _check_size(size, path, True)
                batches.append(batch)
        for batch in batches:
            columns = (column.dictionary_decode() if hasattr(column, "indices") else column for column in batch.columns)
            rows += [_row(zip(batch.schema.names, row)) for row in zip(*(column.to_pylist() for column in columns))]
    return rows


def _unpacked_size(column: Any) -> int:
    """Return the bytes of a pyarrow array with every text written out, and VALUE_BYTES a value."""
    from pyarrow import compute, types

    size = VALUE_BYTES * len(column)
    if types.is_nested(column.type):
        parts = column.flatten()
        return size + sum(map(_unpacked_size, parts if isinstance(parts, list) else [parts]))
    if not hasattr(column, "indices"):
        return size + column.nbytes
    lengths = compute.binary_length(column.dictionary)
    return size + (compute.sum(lengths.take(column.indices)).as_py() or 0)


def _read_dataset(name: str, split: str, cache_dir: str | None) -> list[Row]:
    import datasets

    offline = why_no_hub(name)
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(name)
            found = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            found = datasets.load_dataset(name, split=split, cache_dir=cache_dir)
        _check_size(found.data.nbytes + len(found) * (ROW_BYTES + VALUE_BYTES * len(found.column_names)), name, True)
        return found.to_list()
    except UsageError:
        raise
    except Exception as error:  # of the hub, of a reader of any file type, of a dataset's own description
        hint = f"\n{ALPACA_DATA_HINT}" if "alpaca" in name else ""
        failed = f"no such file, and loading it as a dataset (split {split!r}) failed"
        raise InputError(f"{name}: {failed}: {offline or error}{hint}", name) from error
