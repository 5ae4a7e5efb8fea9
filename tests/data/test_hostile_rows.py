"""Files of strangers: what would be lost is named, what is no list of rows is said, what is too large is refused, and
whatever else is wrong ends in a message."""

import csv
import io
import json
import os
import random
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import run
from support.goldens import golden_tokenizer

from alpaca.common.errors import InputError, UsageError
from alpaca.data import rows as rooms
from alpaca.data.rows import load_rows, read_data
from train import SupervisedDataset

pytestmark = pytest.mark.slow  # many small cases

ROW = {"instruction": "Name colours.", "input": "", "output": "red"}


def save(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def parquet(path, columns, **options):
    table = pyarrow.Table.from_arrays([values for _, values in columns], names=[name for name, _ in columns])
    pyarrow.parquet.write_table(table, path, **options)
    return str(path)


HEADER = "instruction,input,output\n"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", HEADER + "Name colours.,,red, green, blue\n", "line 2: the row has 5 fields, the header 3"),
        ("a.csv", HEADER + 'Hi,,"two\nlines"\nShort,x\n', "line 4: the row has 2 fields, the header 3"),
        ("a.tsv", HEADER.replace(",", "\t") + "a\t\tb\tc\n", "line 2: the row has 4 fields"),
        ("a.csv", HEADER + 'a,,b\nc,,"d\ne,,f\n', "malformed csv in the row that begins at line 3: unexpected end"),
        ("a.csv", HEADER + 'a,,"b" and c\n', "begins at line 2: ',' expected after '\"'"),
        ("a.csv", HEADER + "a,,b\nc\0d,,e\n", r"NUL byte \(line 3\)"),
        ("a.jsonl", json.dumps(ROW).encode("utf-16-le"), r"NUL byte \(line 1\): it is damaged, or UTF-16"),
        ("a.json", json.dumps([ROW]).encode("utf-16"), "is UTF-16, not UTF-8"),
        ("a.json.gz", b"\x1f\x8b\x08\0", "is compressed .gzip.; unpack it first"),
        ("a.json", b"PK\x03\x04", "is compressed .zip."),
        ("a.json", b"PAR1", "name it .parquet"),
        ("a.json", '{"instances": [1]}', "is one object with the keys 'instances'; expected a list of rows$"),
        ("a.json", json.dumps({"version": 1, "data": [ROW]}, indent=1), "keys 'version', 'data'; .*'data' holds one"),
        ("a.json", json.dumps({"train": [ROW], "test": [ROW]}), "expected a list of rows$"),
        ("a.json", '{"a": 1}', "is one object with the keys 'a'"),
        ("a.json", '[{"instruction": "x", "instances": [1]}]', "row 0: expected an object .* got int"),
        ("a.json", "[1, 2]", "row 0: expected an object .* got int"),
        ("a.json", "[null]", "row 0: expected an object .* got NoneType"),
        ("a.json", "[[]]", "row 0: expected an object .* got list"),
        ("a.json", "5", "row 0: expected an object .* got int"),
        ("a.json", "[" * 100_000, r"row 0\): the value is nested too deeply"),
        ("a.jsonl", json.dumps(ROW) + '\n{"a":' + '{"a":' * 100_000, "line 2, .* nested too deeply"),
        ("a.json", json.dumps([ROW | {"x": json.loads("[" * 200 + "]" * 200)}]), "row 0: .* more than 100 deep"),
        ("a.json", '[{"instruction": ' + "9" * 5000 + "}]", "line 1, .* Exceeds the limit"),
        ("a.json", json.dumps([ROW]) + "]", "line 1, .* Extra data"),
        ("a.json", json.dumps([ROW])[:-1] + ",]", "Expecting value"),
        ("a.json", "[" + json.dumps(ROW) + json.dumps(ROW) + "]", "Expecting ',' delimiter"),
        ("a.jsonl", json.dumps(ROW) + "\n\ufeff" + json.dumps(ROW), "malformed JSON at line 2"),
        ("a.jsonl", json.dumps(ROW) + "\n" + json.dumps(ROW) * 2, "malformed JSON at line 2, .* Extra data"),
        ("a.parquet", b"", "cannot be read as parquet"),
        ("a.parquet", b"PAR1" + b"\xff" * 50 + b"PAR1", "cannot be read as parquet"),
        ("a.parquet", b"PARE" + b"\0" * 50 + b"PARE", "cannot be read as parquet"),
    ],
)
def test_a_bad_file_is_one_message_that_names_the_place(tmp_path, name, content, message):
    path = save(tmp_path, name, content)
    with pytest.raises(InputError, match=message) as caught:
        load_rows(path)
    assert path in str(caught.value)


TEXT = ("output", pyarrow.array(["b"]))


@pytest.mark.parametrize(
    "columns, message",
    [
        ([("instruction", pyarrow.array([5])), TEXT], "'instruction' must be text, got int 5"),
        ([("instruction", pyarrow.array([b"a"])), TEXT], "'instruction' must be text, got bytes"),
        ([("instruction", pyarrow.array([["a"]])), TEXT], "'instruction' must be text, got list"),
        ([("instruction", pyarrow.array([{"a": "b"}])), TEXT], "'instruction' must be text, got dict"),
        ([("instruction", pyarrow.nulls(1)), TEXT], "'instruction' must be text, got NoneType"),
        ([("instruction", pyarrow.array([], pyarrow.string()))], "holds no rows"),
        ([], "holds no rows"),
    ],
)
def test_parquet_of_other_types(tmp_path, columns, message):
    with pytest.raises(InputError, match=message):
        load_rows(parquet(tmp_path / "a.parquet", columns))


def test_a_truncated_parquet(tmp_path):
    path = parquet(tmp_path / "a.parquet", [("instruction", pyarrow.array(["a"])), TEXT])
    Path(path).write_bytes(Path(path).read_bytes()[:-20])
    with pytest.raises(InputError, match="cannot be read as parquet"):
        load_rows(path)


def test_line_ends_and_a_byte_order_mark_change_nothing(tmp_path):
    lines = [json.dumps(ROW), json.dumps(ROW | {"output": "a\r\nb"}), json.dumps(ROW)]
    for ends in ("\n", "\r\n", "\r"):
        path = save(tmp_path, "a.jsonl", ("\ufeff" + ends.join(lines)).encode())
        assert [row["output"] for row in load_rows(path)] == ["red", "a\r\nb", "red"]
    path = save(tmp_path, "a.csv", '\ufeffinstruction,output\r\na,"b\r\nc"\nd,e\r\n\r\n'.encode())
    assert [row["output"] for row in load_rows(path)] == ["b\r\nc", "e"]


# ---- text that nobody reads ----


@pytest.mark.parametrize(
    "content, repeated, unread",
    [
        (
            json.dumps([ROW | {"system": "Be brief.", "history": [["a", "b"]]}, ROW]),
            [],
            ["system (1", "history (1"],
        ),
        (
            json.dumps([ROW | {" input": "1, 2", "Output": "x"}]),
            [],
            ["' input' (1 row, is not input)", "Output (1"],
        ),
        ('[{"instruction": "a", "output": "lost", "output": "b"}]', [0], []),
        ('{"instruction": "a", "instances": [{"output": "lost", "output": "b"}]}', [0], []),
        (json.dumps([ROW | {"history": [], "system": ""}]), [], []),
        ("instruction,output,output\na,lost,b\nc,lost,d\n", [0, 1], []),
        ("instruction,,output\na,lost,b\n", [], ["'' (1 row)"]),
    ],
)
def test_what_is_never_read_is_in_the_report(tmp_path, capsys, content, repeated, unread):
    path = save(tmp_path, "a.csv" if content.startswith("instruction") else "a.json", content)
    data = read_data(path)
    assert data.problems.get("repeated_field", []) == repeated
    report = str(SupervisedDataset(path, golden_tokenizer("llama"), cache_dir=str(tmp_path)).report)
    assert ("repeated_field: " in report) == bool(repeated)
    assert ("columns never read: " in report) == bool(unread)
    load_rows(path)
    printed = capsys.readouterr().out
    for text in unread:
        assert text in report and text in printed
    assert ("rows give a field twice" in printed) == bool(repeated)


def test_equal_columns_of_a_parquet_file(tmp_path):
    columns = [("instruction", pyarrow.array(["a"])), ("output", pyarrow.array(["lost"])), TEXT, (" input", TEXT[1])]
    data = read_data(parquet(tmp_path / "a.parquet", columns))
    assert data.rows == [{"instruction": "a", "output": "b", " input": "b"}]
    assert data.problems == {"repeated_field": [0]} and data.unread == {" input": 1}


# ---- files that cannot be had ----


def test_files_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    path = save(tmp_path, "a.json", json.dumps([ROW]))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", refuse)
        with pytest.raises(InputError, match="a.json: cannot be read .Permission denied"):
            load_rows(path)
    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(InputError, match="cannot be read .Permission denied"):
        load_rows(path)


@pytest.mark.parametrize(
    "name", ["x" * 5000, "a\0b", "https://example.org/rows.json", "s3://bucket/rows", "a b/c?", "~"]
)
def test_what_is_no_file_and_no_name_of_a_dataset(name):
    with pytest.raises(InputError):
        load_rows(name)


def test_a_folder_that_holds_no_rows(tmp_path):
    (tmp_path / "rows.json").mkdir()
    with pytest.raises(InputError, match="loading it as a dataset"):
        load_rows(str(tmp_path / "rows.json"))


# ---- bombs ----


def test_a_small_file_that_unpacks_to_gigabytes(tmp_path):
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 5000, pyarrow.int32()), pyarrow.array(["A" * 10**6]))
    path = parquet(tmp_path / "a.parquet", [("instruction", text), ("output", text)], compression="zstd")
    assert os.path.getsize(path) < 10_000
    with pytest.raises(InputError, match=r"unpacks to 2\.\d GB or more, and at most 2.0 GB .*split it"):
        load_rows(path)


@pytest.mark.parametrize("compression, dictionary", [("zstd", False), ("gzip", False), ("none", True)])
def test_the_limits(tmp_path, monkeypatch, compression, dictionary):
    monkeypatch.setattr(rooms, "MOST_BYTES", 50_000)
    column = pyarrow.array(["A" * 1000] * 40)
    options = dict(compression=compression, use_dictionary=dictionary)
    path = parquet(tmp_path / "a.parquet", [("instruction", column), ("output", column)], **options)
    with pytest.raises(InputError, match="unpacks to"):
        load_rows(path)
    nothing = [("instruction", pyarrow.nulls(600, pyarrow.string()))]
    with pytest.raises(InputError, match="unpacks to"):
        load_rows(parquet(tmp_path / "b.parquet", nothing))
    for name in ("a.json", "a.csv", "a.jsonl"):
        with pytest.raises(InputError, match="has 0.1 MB or more"):
            load_rows(save(tmp_path, name, " " * 50_001))
    half = [("instruction", column[:10]), ("output", column[:10])]
    assert len(load_rows(parquet(tmp_path / "c.parquet", half, **options))) == 10


LONG = "A" * 100_000
REPEATED = {
    "large_string": pyarrow.array([LONG] * 1000, pyarrow.large_string()),
    "string_view": pyarrow.array([LONG] * 1000, pyarrow.string_view()),
    "large_binary": pyarrow.array([LONG.encode()] * 1000, pyarrow.large_binary()),
    "list of string": pyarrow.array([[LONG]] * 1000),
    "struct of string": pyarrow.array([{"a": LONG}] * 1000),
    "binary of a fixed size": pyarrow.array([LONG.encode()] * 1000, pyarrow.binary(100_000)),
}


@pytest.mark.parametrize("kind", REPEATED)
def test_a_text_that_is_repeated_is_not_unpacked_whole(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(rooms, "MOST_BYTES", 10**7)
    path = parquet(tmp_path / "a.parquet", [("instruction", pyarrow.array(["a"] * 1000)), ("output", REPEATED[kind])])
    assert os.path.getsize(path) < 10**6
    held, measure = [], rooms._unpacked_size
    monkeypatch.setattr(rooms, "_unpacked_size", lambda column: held.append(column.nbytes) or measure(column))
    with pytest.raises(InputError, match="unpacks to"):
        load_rows(path)
    assert sum(held) < 25 * 10**6  # of 100; a part of a list or struct counts with it and by itself


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.nulls(1, pyarrow.list_(pyarrow.null())),
        pyarrow.array([[None] * 3_000_000], pyarrow.list_(pyarrow.null())),
        pyarrow.array([[1] * 3_000_000], pyarrow.list_(pyarrow.int8())),
        pyarrow.array([[{"a": None}] * 3_000_000]),
        pyarrow.array([[True] * 3_000_000]),
    ],
    ids=str,
)
def test_values_that_take_no_room_in_a_file(tmp_path, monkeypatch, column):
    monkeypatch.setattr(rooms, "MOST_BYTES", 10**8)
    path = parquet(tmp_path / "a.parquet", [("instruction", pyarrow.array(["a"])), TEXT, ("x", column)])
    if column.null_count:
        assert len(load_rows(path)) == 1
    else:
        assert os.path.getsize(path) < 10**5
        with pytest.raises(InputError, match="unpacks to"):
            load_rows(path)


def test_columns_that_take_no_room_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(rooms, "MOST_BYTES", 10**6)
    nothing = [(f"c{n}", pyarrow.nulls(1000)) for n in range(100)]
    text = pyarrow.array(["a"] * 1000)
    with pytest.raises(InputError, match="unpacks to"):
        load_rows(parquet(tmp_path / "a.parquet", [("instruction", text), ("output", text), *nothing]))


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", "PLAIN"])
def test_encodings_of_other_writers(tmp_path, encoding):
    options = dict(use_dictionary=False, column_encoding=dict.fromkeys(("instruction", "output"), encoding))
    texts = pyarrow.array([f"text {n}" for n in range(100)])
    rows = load_rows(parquet(tmp_path / "a.parquet", [("instruction", texts), ("output", texts)], **options))
    assert [row["output"] for row in rows] == texts.to_pylist()


def test_a_part_of_a_folder_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(rooms, "MOST_BYTES", 50_000)
    column = pyarrow.array(["A" * 1000] * 40)
    (tmp_path / "rows").mkdir()
    parquet(tmp_path / "rows" / "train.parquet", [("instruction", column), ("output", column)])
    with pytest.raises(InputError, match="unpacks to .* a folder as parquet files"):
        load_rows(str(tmp_path / "rows"))
    assert len(load_rows(str(tmp_path / "rows"), split="train[:10]")) == 10


# ---- a terminal that cannot have all letters ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONIOENCODING": "ascii"},
        pytest.param({"PYTHONIOENCODING": "ascii:strict"}, marks=pytest.mark.stress),
        pytest.param({"LC_ALL": "C", "PYTHONUTF8": "0"}, marks=pytest.mark.stress),
    ],
)
def test_rows_are_printed_everywhere(tiny, tmp_path, env):
    path = save(tmp_path, "a.json", json.dumps([{"instruction": "Grüße 早 🙂", "output": "é早", "\ud83d 早": "x"}]))
    words = ["--model_name_or_path", tiny("llama"), "--data_path", path, "--rows", "0"]
    result = run([sys.executable, "-m", "scripts.inspect_data", *words], env=env | {"PYTHONCOERCECLOCALE": "0"})
    assert "row 0: " in result.stdout and "columns never read" in result.stdout and "Traceback" not in result.stderr


@pytest.mark.slow
def test_the_flags_of_inspect_data(tmp_path):
    from scripts.inspect_data import main

    shown = run([sys.executable, "-m", "scripts.inspect_data", "--help"]).stdout
    assert "None" not in shown.partition("--problem")[2].partition("--limit")[0]
    words = ["--model_name_or_path", "m", "--data_path", save(tmp_path, "a.json", json.dumps([ROW]))]
    with pytest.raises(UsageError, match="--limit -1: expected at least 1"):
        main([*words, "--limit", "-1"])
    with pytest.raises(UsageError, match="--problem"):
        main([*words, "--problem", "None"])


# ---- mutations ----


def examples() -> dict[str, bytes]:
    rows = [ROW | {"output": "é " * i, "history": [["a", "b"]]} for i in range(8)]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    found = {
        "a.json": json.dumps(rows, indent=1, ensure_ascii=False),
        "a.jsonl": "\n".join(map(json.dumps, rows)),
        "tasks.jsonl": json.dumps({"instruction": "x", "instances": [{"input": "", "output": "y"}]}),
        "chats.jsonl": json.dumps({"text": "### Human: a### Assistant: b"}),
        "a.csv": text.getvalue(),
        "a.tsv": text.getvalue().replace(",", "\t"),
    }
    binary = {}
    for name, options in (("a", {}), ("b", dict(compression="gzip", use_dictionary=False))):
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, **options)
        binary[f"{name}.parquet"] = buffer.getvalue()
    return {name: text.encode() for name, text in found.items()} | binary


PIECES = [b"[", b"{", b'"', b",", b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"null", b"1e999", b"NaN", b"\\ud83d"]
PIECES += [b"9" * 5000, b"[" * 5000, b'{"a":' * 3000]


def mutated(data: bytes, draw: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 5, 20])):
        at = draw.randrange(len(found) + 1)
        kind = draw.randrange(5)
        if kind == 0:
            found[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            del found[at : at + draw.choice([1, 3, 50, 10**6])]
        elif kind == 2:
            found[at:at] = draw.choice(PIECES)
        elif kind == 3:
            found[at:at] = found[at : at + 60]
        else:
            old = draw.choice([b'"instruction"', b'"output"', b"input", b":", b","])
            found = found.replace(old, draw.choice([b'"Output"', b"", b'":', b"5", b'"instances"']), 1)
    return bytes(found)


def check_mutations(folder: Path, name: str, count: int) -> None:
    for number in range(count):
        path = save(folder, name, mutated(examples()[name], random.Random(f"{name} {number}")))
        try:
            data = read_data(path)
        except UsageError as error:
            assert name in str(error)
        else:
            assert all(isinstance(row["output"], str) for row in data.rows) and json.dumps(data.rows)


@pytest.mark.parametrize("name", examples())
def test_a_dozen_damaged_files(tmp_path, name):
    check_mutations(tmp_path, name, 12)


@pytest.mark.stress
@pytest.mark.parametrize("name", examples())
def test_hundreds_of_damaged_files(tmp_path, name):
    check_mutations(tmp_path, name, 300)
