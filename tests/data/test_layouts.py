"""Files as people have them: each layout trains to the ids of the same rows in Alpaca's, or ends in one message."""

import csv
import json
import random
import re
import sys

import datasets
import pytest
from conftest import GOLDEN, SHARED, run
from support.goldens import golden_tokenizer

from alpaca.common.errors import InputError, UsageError
from alpaca.data.rows import load_rows, read_data
from alpaca.training.resume import changes, describe_run
from train import DataArguments, make_supervised_data_module, parse_flags

pytestmark = pytest.mark.slow  # many small cases

LLAMA = GOLDEN / "labels" / "llama"
PAIRS = [("Add.", "2, 3", "5"), ('Say "hi";\nplease.', "", "007"), ("Translate: 早上好", "", "Good | morning")]
ROWS = [{"instruction": a, "input": b, "output": c} for a, b, c in PAIRS]
WITHOUT_INPUT = [row | {"input": ""} for row in ROWS]


def save(folder, kind, rows):
    """Write rows in one of the formats; what is no text stands in a table as JSON."""
    path = folder / f"rows.{kind.replace(';', '').replace('|', '')}"
    if kind in ("json", "jsonl"):
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            separator = {"csv": ",", "tsv": "\t", "csv;": ";", "csv|": "|"}[kind]
            writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
            writer.writeheader()
            for row in rows:
                writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
    return str(path)


def module(path, **flags):
    seed = flags.pop("seed", 42)
    return make_supervised_data_module(
        golden_tokenizer("llama"), DataArguments(data_path=str(path), **flags), seed=seed
    )


def tokens(dataset):
    return [
        (row["input_ids"].tolist(), row["labels"].tolist()) for row in map(dataset.__getitem__, range(len(dataset)))
    ]


def named(instruction, output, input=None, rows=ROWS, **more):
    return [
        {instruction: row["instruction"], **({input: row["input"]} if input else {}), output: row["output"], **more}
        for row in rows
    ]


def turned(who, what, human, assistant, column, rows=ROWS):
    return [{column: [{who: human, what: row["instruction"]}, {who: assistant, what: row["output"]}]} for row in rows]


MESSAGES = turned("role", "content", "user", "assistant", "messages")
LAYOUTS = {  # rows, what the first line of the report says, and whether they have the inputs
    "prompt/completion": (
        named("prompt", "completion"),
        "prompt/completion: instruction=prompt, output=completion",
        False,
    ),
    "prompt/response": (named("prompt", "response"), "prompt/response: instruction=prompt, output=response", False),
    "question/answer": (named("question", "answer"), "question/answer: instruction=question, output=answer", False),
    "query/response": (named("query", "response"), "query/response: instruction=query, output=response", False),
    "SQuAD-like": (
        named("question", "answer", "context"),
        "question/answer: instruction=question, input=context, output=answer",
        True,
    ),
    "Dolly": (
        named("instruction", "response", "context", category="qa"),
        "Dolly: instruction=instruction, input=context, output=response",
        True,
    ),
    "instruction/completion": (
        named("instruction", "completion", "input"),
        "instruction/completion: instruction=instruction, input=input, output=completion",
        True,
    ),
    "capitalised": (
        named("Instruction", "OUTPUT", " Input"),
        "Alpaca: instruction=Instruction, input=' Input', output=OUTPUT",
        True,
    ),
    "padded": (
        named(" prompt", "Response ", "CONTEXT"),
        "prompt/response: instruction=' prompt', input=CONTEXT, output='Response '",
        True,
    ),
    "two columns": (named("input", "output"), "input/output: instruction=input, output=output", False),
    "FLAN": (named("inputs", "targets"), "inputs/targets: instruction=inputs, output=targets", False),
    "ShareGPT": (
        turned("from", "value", "human", "gpt", "conversations"),
        "ShareGPT: turns=conversations; the first pair of each",
        False,
    ),
    "ShareGPT with bing": (
        turned("from", "value", "user", "bing", "conversations"),
        "ShareGPT: turns=conversations; the first pair of each",
        False,
    ),
    "ShareGPT with chatgpt": (
        turned("from", "value", "human", "chatgpt", "Conversations"),
        "ShareGPT: turns=Conversations; the first pair of each",
        False,
    ),
    "OpenAI": (MESSAGES, "OpenAI messages: turns=messages; the first pair of each", False),
    "UltraChat": (
        [{"prompt": "unused", **row} for row in MESSAGES],
        "OpenAI messages: turns=messages; the first pair of each",
        False,
    ),
    "TRL": (
        [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in MESSAGES],
        "prompt/completion of messages: prompt=prompt, completion=completion; the first pair of each",
        False,
    ),
    "Capybara": (
        [{"conversation": [{"input": row["instruction"], "output": row["output"]}]} for row in ROWS],
        "pairs of input and output: turns=conversation; the first pair of each",
        False,
    ),
    "LIMA": (
        [{"conversations": [row["instruction"], row["output"]], "source": "x"} for row in ROWS],
        "texts of a human and an assistant in turn: turns=conversations; the first pair of each",
        False,
    ),
    "Firefly": (named("input", "target", kind="x"), "input/target: instruction=input, output=target", False),
    "Guanaco": (
        [{"text": f"### Human: {row['instruction']}### Assistant: {row['output']}"} for row in ROWS],
        "Guanaco: turns=text; the first pair of each",
        False,
    ),
}


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "csv;", "csv|", "parquet"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_to_the_ids_of_the_same_rows(tmp_path, capsys, name, kind):
    rows, read_as, with_input = LAYOUTS[name]
    path = save(tmp_path, kind, rows)
    (tmp_path / "alpaca.json").write_text(json.dumps(ROWS if with_input else WITHOUT_INPUT))
    dataset, plain = (module(file)["train_dataset"] for file in (path, tmp_path / "alpaca.json"))
    assert tokens(dataset) == tokens(plain)
    assert str(dataset.report).splitlines()[0] == f"{path}: 3 rows, read as {read_as}"
    assert dataset.data_fingerprint == plain.data_fingerprint
    load_rows(path)
    assert capsys.readouterr().out.startswith(f"{path}: read as {read_as}\n")


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        [row | {"system": "x", "prompt": "p", "response": "r", "text": "### Human: a", "messages": []} for row in ROWS],
        [row | {"conversations": MESSAGES[0]["messages"], "Output": "no"} for row in ROWS],
    ],
)
def test_what_fits_alpaca_stays_alpaca(tmp_path, capsys, rows):
    path = save(tmp_path, "json", rows)
    assert load_rows(path) == rows and "read as" not in capsys.readouterr().out
    assert "read as" not in str(module(path)["train_dataset"].report)


# ---- which column is what ----


def test_columns_that_are_told(tmp_path):
    rows = named("Frage, kurz = gut", "b c", "a=b")
    for told in (
        "instruction=Frage, kurz = gut,input=a=b,output=b c",
        " output = b c , instruction = frage, KURZ = gut , input=A=b",
    ):
        data = read_data(save(tmp_path, "csv", rows), columns=told)
        assert data.rows == ROWS
        assert data.read_as == "read as told: instruction='Frage, kurz = gut', input=a=b, output=b c"
    path = save(tmp_path, "json", [row | {"answer": "other", "system": "Be brief."} for row in ROWS])
    data = read_data(path, columns="output=answer,input=,system=system")
    assert [row["output"] for row in data.rows] == ["other"] * 3 and "input" not in data.rows[0]
    assert data.rows[0]["instruction"] == "Be brief.\n\nAdd." and data.unread == {"input": 1, "output": 3}
    path = save(tmp_path, "json", [{"chat": row["messages"], "output": "x"} for row in MESSAGES])
    data = read_data(path, columns="turns=chat")
    assert data.rows == WITHOUT_INPUT and data.read_as.startswith("read as OpenAI messages: turns=chat; ")


@pytest.mark.parametrize(
    "told, message",
    [
        (
            "instruction=Fragen,output=b",
            "columns instruction=Fragen,output=b: .* has no column 'Fragen'; it has 'a', 'b'$",
        ),
        ("a=instruction", "columns a=instruction: expected instruction=<column>"),
        ("instruction=a,instruction=b", "each at most once"),
        ("", "columns : expected instruction=<column>"),
        ("output=b", "row 0: no field 'instruction'; the row has .'a', 'b'.; needed are instruction, output"),
    ],
)
def test_columns_that_do_not_fit(tmp_path, told, message):
    with pytest.raises(UsageError, match=message):
        read_data(save(tmp_path, "json", [{"a": "x", "b": "y"}]), columns=told)


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"question": "a", "answer": "b", "response": "c"},
            "fits several layouts .question/response, question/answer.; ",
        ),
        (
            {"prompt": "a", "query": "b", "completion": "c"},
            "fits several layouts .prompt/completion, query/completion.",
        ),
        ({"Output": "a", "OUTPUT": "b", "Instruction": "c"}, "several columns could be 'output': 'Output', 'OUTPUT'"),
        ({"messages": MESSAGES[0]["messages"], "conversations": MESSAGES[0]["messages"]}, "several columns hold conv"),
        ({"Frage": "a", "Antwort": "b"}, "no field 'instruction'; the row has .'Antwort', 'Frage'.; needed are instr"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "no field 'instruction'; the row has .'chosen', 'prompt'"),
    ],
)
def test_what_fits_twice_or_not_at_all_names_the_columns_and_the_flag(tmp_path, row, message):
    path = save(tmp_path, "json", [row])
    with pytest.raises(InputError, match=message) as caught:
        load_rows(path)
    assert path in str(caught.value) and "--columns" not in str(caught.value), "the library names no flag"
    from scripts import backtranslate, evaluate, generate, inspect_data

    answers = save(tmp_path, "jsonl", ROWS)
    for command in (
        lambda: inspect_data.main(["--model_name_or_path", str(LLAMA), "--data_path", path]),
        lambda: backtranslate.main(["mix", "--seed_path", path, "--output_path", str(tmp_path / "o.json")]),
        lambda: evaluate.backward(data_path=answers, reference_path=path, output_path=str(tmp_path / "o.json")),
    ):
        with pytest.raises(InputError, match=message) as caught:
            command()
        advice = "; --columns instruction=<column>,input=<column>,output=<column> says which is which"
        assert str(caught.value).endswith(advice) and str(caught.value).count("--columns") == 1
    if "prompt" not in row:
        words = ["--model", "m", "--data_path", path, "--output_path", str(tmp_path / "o.json")]
        with pytest.raises(InputError, match="--data_path .* --columns instruction=<column>"):
            generate.main(words)


def test_a_command_names_the_flag_of_a_column_that_there_is_not(tmp_path):
    from scripts import backtranslate

    path = save(tmp_path, "json", [{"a": "x", "b": "y"}])
    words = ["mix", "--seed_path", path, "--output_path", str(tmp_path / "o.json"), "--tags", "False"]
    with pytest.raises(UsageError, match="^--columns instruction=A,output=c: .*no column 'c'; it has 'a', 'b'$"):
        backtranslate.main([*words, "--columns", "instruction=A,output=c"])
    backtranslate.main([*words, "--columns=instruction=a,output=b"])
    assert [(row["instruction"], row["output"]) for row in json.loads((tmp_path / "o.json").read_text())] == [
        ("x", "y")
    ]


def test_questions_alone_can_be_answered(tmp_path):
    for name in ("prompt", "question", "Instruction", "input"):
        path = save(tmp_path, "jsonl", [{name: "a"}])
        assert load_rows(path, answered=False) == [{"instruction": "a"}]
        with pytest.raises(InputError, match="no field"):
            load_rows(path)


def test_a_row_that_lacks_a_column_of_the_layout_is_named(tmp_path):
    path = save(tmp_path, "json", [{"prompt": "a", "response": "b"}, {"prompt": "a", "respons": "b"}])
    with pytest.raises(InputError, match="row 1: no field 'response'; the row has .'prompt', 'respons'"):
        load_rows(path)
    path = save(tmp_path, "json", [{"question": "a", "answer": ["b"]}])
    with pytest.raises(InputError, match="row 0: 'answer' must be text, got list"):
        load_rows(path)


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
MISFITS = {  # what a file holds whose shape says more than "no field 'instruction'"
    "whole columns": (
        {"prompt": ["a", "c"], "completion": ["b", "d"]},
        "is one object; expected a list of rows, as pan",
    ),
    "pandas": ({"instruction": {"0": "a"}, "output": {"0": "b"}}, "is one object; expected a list of rows, as pandas'"),
    "rows by number": (
        {"0": {"prompt": "a"}, "1": {"prompt": "b"}},
        "is one object; expected a list of rows, as pandas'",
    ),
    "one row of no layout": (
        [{"question": "a", "answers": {"text": ["b"]}}],
        "row 0: no field 'instruction'; .*<column>",
    ),
    "another name": (
        [{"dialog": TURNS}] * 2,
        "'dialog' seems to hold conversations .*; --columns turns=dialog reads them$",
    ),
    "and one of them": ([{"my chat": TURNS}], "(OpenAI messages); --columns 'turns=my chat' reads them$"),
    "preferences": ([{"prompt": "a", "chosen": TURNS, "rejected": TURNS}], "'chosen' .*; --columns turns=chosen reads"),
    "lists of turns": ([TURNS, TURNS], 'row 0 is a list of turns; expected .*: {"messages": [...]}$'),
    "other turns": (
        [{"conversations": [{"human": "a", "gpt": "b"}]}],
        "holds objects with ['gpt', 'human']; a turn has",
    ),
    "speakers": (
        [{"conversation": [{"speaker": "a", "text": "b"}]}],
        "holds objects with ['speaker', 'text']; a turn has",
    ),
    "texts": (
        [{"text": "<s>[INST] a [/INST] b"}],
        "a turn `### Human: .* in 'text'; needed are .*; --columns instruction=",
    ),
    "texts and labels": (
        [{"text": "a", "label": "b"}],
        "no.* in 'text'; needed are .*; --columns instruction=<column>",
    ),
    "numbers": ([{"question": "a", "answer": 4}], "'answer' must be text, got int 4; write it as text: \"4\"$"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_shape_that_is_not_read_is_named_with_the_way_out(tmp_path, name):
    from scripts import backtranslate

    held, message = MISFITS[name]
    words = ["mix", "--seed_path", save(tmp_path, "json", held), "--output_path", str(tmp_path / "o.json")]
    pattern = ".*".join(map(re.escape, message.removesuffix("$").split(".*"))) + "$" * message.endswith("$")
    with pytest.raises(InputError, match=pattern):
        backtranslate.main(words)


def test_turns_under_another_name_are_read_when_told(tmp_path):
    for column, turns in (("dialog", TURNS), ("my chat", TURNS), ("data", ["a", "b"])):
        path = save(tmp_path, "json", [{column: turns}] * 2)
        assert read_data(path, columns=f"turns={column}").rows == [{"instruction": "a", "input": "", "output": "b"}] * 2


# ---- tables and encodings ----


@pytest.mark.parametrize(
    "name, content, outputs",
    [
        ("a.csv", "instruction;input;output\na;;b,c\n", ["b,c"]),
        ("a.csv", "instruction|output\na|b;c\n", ["b;c"]),
        ("a.csv", "instruction\toutput\na\tb,c\n", ["b,c"]),
        ("a.tsv", "instruction,output\na,b\n", ["b"]),
        ("a.csv", "sep=;\r\ninstruction;output\r\na;b\r\n", ["b"]),
        ("a.csv", '\ufeff"Prompt";"Completion"\n"a;1";"b, c, d"\n', ["b, c, d"]),
        ("a.csv", "prompt,completion;note\na,b\n", None),
        ("a.csv", "instruction,output\na;x,b;y\n", ["b;y"]),
        ("a.csv", "instruction,output; notes,x\n", None),
        ("a.csv", "text\n### Human: a; b### Assistant: c; d\n", ["c; d"]),
        ("a.csv", "prompt;completion;;\r\na;b;;\r\n", ["b"]),
    ],
)
def test_separators(tmp_path, name, content, outputs):
    (tmp_path / name).write_bytes(content.encode())
    if outputs is None:
        with pytest.raises(InputError):
            load_rows(str(tmp_path / name))
    else:
        assert [row["output"] for row in load_rows(str(tmp_path / name))] == outputs


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.csv",
            "What is it?;It is.\nAnd this?;That.\n",
            "has .'It is.', 'What is it.'.; the first line of a table names",
        ),
        ("a.tsv", "Who?\tI.\nWhat?\tThis.\n", "the first line of a table names its columns; needed are"),
        (
            "a.csv",
            "prompt^completion\na^b, c\n",
            "fields, the header 1 .*; they are separated by ',', and a text with that",
        ),
        ("a.txt", "prompt;completion\na;b\n", "or one JSON object per line; name a table .csv or .tsv$"),
        ("rows", "prompt,completion\na,b\n", "name a table .csv or .tsv$"),
        (
            "a.jsonl",
            '["a", "b"]\n["c", "d"]\n',
            "Extra data; expected a JSON list of rows, or one JSON object per line$",
        ),
    ],
)
def test_a_table_that_is_not_read_names_the_way_out(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        load_rows(str(tmp_path / name))


def test_empty_columns_without_a_name_are_no_columns(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion,,\na,b,,\nc,d,,e\n")
    data = read_data(str(tmp_path / "a.csv"))
    assert [row["output"] for row in data.rows] == ["b", "d"] and data.unread == {"": 1} and not data.problems


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "instruction,output\nGrüße,b\n".encode("cp1252"), "0xFC .*(line 2) makes 'Grüße' in cp1252"),
        ("a b.json", '[{"instruction": "“é”"}]'.encode("cp1252"), "byte 0x93 at position 18 (line 1) makes"),
        ("a.jsonl", b'{"instruction": "\x81\xe9"}', "in latin-1"),
        (
            "a.csv",
            "instruction,output\nä,b\n".encode("utf-16"),
            "is UTF-16, not UTF-8; convert it first: iconv -f UTF-16 ",
        ),
        ("a.csv", "instruction,output\na,b\n".encode("utf-16-le"), "UTF-16; convert it first: iconv -f UTF-16LE "),
        ("a.xlsx", b"PK\x03\x04 xl/workbook.xml", "is a spreadsheet; save it as CSV UTF-8"),
        ("a.csv", b"PK\x03\x04 xl/workbook.xml", "is a spreadsheet; save it as CSV UTF-8"),
        ("a.ods", b"PK\x03\x04 mimetype", "is a spreadsheet; save it as CSV UTF-8"),
        ("a.xls", b"\xd0\xcf\x11\xe0", "is a spreadsheet; save it as CSV UTF-8"),
        ("a.csv", b"\xd0\xcf\x11\xe0", "is a spreadsheet or document of Office; save it as CSV UTF-8"),
        ("a.jsonl.gz", b"\x1f\x8b\x08", "is compressed (gzip); unpack it first"),
    ],
)
def test_other_encodings_and_spreadsheets_come_with_the_way_out(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(InputError, match=pattern) as caught:
        load_rows(str(path))
    assert "\n" not in str(caught.value)


def test_the_command_that_converts_a_file_works(tmp_path):
    path = tmp_path / "a b.csv"
    path.write_bytes("instruction,output\nGrüße,“b”\n".encode("cp1252"))
    with pytest.raises(InputError) as caught:
        load_rows(str(path))
    command = str(caught.value).partition("convert it: ")[2].partition(", or save")[0]
    run(["sh", "-c", command])
    assert load_rows(str(tmp_path / "a b.utf8.csv")) == [{"instruction": "Grüße", "output": "“b”"}]


# ---- conversations ----

CHAT = [
    ("system", "Be brief."),
    ("user", "A colour?"),
    ("assistant", "Blue."),
    ("user", "Another?"),
    ("assistant", "Red."),
]
FIRST = {"instruction": "Be brief.\n\nA colour?", "input": "", "output": "Blue."}
SECOND = {
    "instruction": "Another?",
    "input": "Human: Be brief.\n\nA colour?\n\nAssistant: Blue.",
    "output": "Red.",
}


def messages(*turns):
    return [{"role": who, "content": said} for who, said in turns]


def shared(*turns):
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(who, who), "value": said} for who, said in turns]


@pytest.mark.parametrize(
    "column, made", [("messages", messages), ("conversations", shared), ("conversations", messages)]
)
def test_turns(tmp_path, column, made):
    path = save(tmp_path, "json", [{column: made(*CHAT)}])
    assert [read_data(path, turns=turns).rows for turns in ("first", "all", "last")] == [
        [FIRST],
        [FIRST, SECOND],
        [SECOND],
    ]
    assert read_data(path).problems == {"later_pairs": [0]} and not read_data(path, turns="all").problems
    assert read_data(path, turns="last").problems == {"earlier_pairs": [0]}


def test_guanaco_has_the_same_turns(tmp_path):
    text = "".join(f"### {'Human' if who == 'user' else 'Assistant'}: {said}" for who, said in CHAT[1:])
    guanaco, other = (
        save(tmp_path, "json", [{"text": text}]),
        save(tmp_path, "jsonl", [{"messages": messages(*CHAT[1:])}]),
    )
    for turns in ("first", "all", "last"):
        assert read_data(guanaco, turns=turns).rows == read_data(other, turns=turns).rows


def test_a_system_message_stands_where_the_chat_template_puts_it(tmp_path):
    from alpaca.data.chat_template import chat_template
    from alpaca.data.prompts import PROMPT_DICT

    tokenizer = golden_tokenizer("llama")
    template = chat_template(tokenizer, PROMPT_DICT)
    turns = [("system", "Be brief."), ("developer", "Be kind."), ("user", "Hi"), ("assistant", "Hello")]
    asked = tokenizer.apply_chat_template(messages(*turns[:3]), chat_template=template)["input_ids"]
    for rows in (
        [{"messages": messages(*turns)}],
        [{"conversations": shared(*turns)}],
        [{"messages": messages(*turns[2:]), "system": "Be brief.\n\nBe kind."}],
        [{"prompt": "Hi", "response": "Hello", "system_prompt": "Be brief.\n\nBe kind."}],
    ):
        ids, labels = tokens(module(save(tmp_path, "json", rows))["train_dataset"])[0]
        assert ids[: labels.count(-100)] == asked


@pytest.mark.parametrize(
    "turns, rows, problems",
    [
        ([("user", "a"), ("user", "b"), ("assistant", "c")], [("b", "c")], {"unpaired_turns"}),
        ([("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c")], [("b", "c")], {"unpaired_turns"}),
        ([("user", "a"), ("assistant", "b"), ("user", "c")], [("a", "b")], {"ends_on_human"}),
        ([("user", "a"), ("assistant", "b"), ("system", "c")], [("a", "b")], {"unpaired_turns"}),
        ([("user", "a"), ("assistant", "b"), ("tool", "c")], [("a", "b")], {"not_text_turns"}),
        ([("user", "a"), ("narrator", "x"), ("assistant", "b")], [], {"no_pair", "unpaired_turns"}),
        ([], [], {"no_pair"}),
    ],
)
def test_turns_that_are_no_pairs_are_counted(tmp_path, turns, rows, problems):
    good = ("user", "x"), ("assistant", "y")
    data = read_data(save(tmp_path, "json", [{"messages": messages(*good)}, {"messages": messages(*turns)}]))
    assert [(row["instruction"], row["output"]) for row in data.rows[1:]] == rows
    assert set(data.problems) == problems and all(numbers == [1] for numbers in data.problems.values())


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
IMAGE = {
    "role": "user",
    "content": [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": "x"}}],
}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [*messages(("user", "a")), CALL, *messages(("tool", "1"), ("assistant", "b"))]},
        {"messages": [IMAGE, *messages(("assistant", "b"))]},
        {"conversations": shared(("user", "<image>\na"), ("assistant", "b")), "image": "a.png"},
        {"conversations": shared(("user", "a"), ("function_call", "b"), ("observation", "c"), ("assistant", "d"))},
    ],
)
def test_tool_calls_and_images_are_not_taken(tmp_path, row):
    with pytest.raises(InputError, match="turns that call a tool or hold an image are not taken$"):
        load_rows(save(tmp_path, "json", [row]))
    column = next(iter(row))
    good = {column: (shared if column == "conversations" else messages)(*CHAT)}
    report = str(module(save(tmp_path, "json", [good, row]))["train_dataset"].report)
    assert "  not_text_turns: 1 row (1): turns that call a tool, or hold an image; those are not taken" in report


def test_content_in_parts_and_answers_of_no_weight(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "c"}]}]
    later = [{"role": "user", "content": "d"}, {"role": "assistant", "content": "e", "weight": 1}]
    path = save(tmp_path, "json", [{"messages": [turns[0], turns[1] | {"weight": 0}, *later]}])
    assert [row["output"] for row in read_data(path, turns="all").rows] == ["e"]
    assert read_data(path, turns="all").rows[0]["input"] == "Human: a\nb\n\nAssistant: c"


@pytest.mark.parametrize(
    "turns, message",
    [
        ("no", "row 1: the turns are no JSON"),
        ({"a": 1}, "row 1: expected a list of turns, got dict"),
        (["a"], "row 1: turn 0: expected from and value, or role and content, got str 'a'"),
        ([{"role": "user"}], "row 1: turn 0: expected .*, got an object with .'role'."),
        ([{"role": "user", "content": 5}], "row 1: turn 0: .* must be text, got int"),
        (messages(("user", "a"), ("assistant", "\ud83d")), "row 1: 'output' holds '.ud83d'"),
    ],
)
def test_turns_of_another_shape_are_one_message(tmp_path, turns, message):
    with pytest.raises(InputError, match=message):
        load_rows(save(tmp_path, "json", [{"messages": messages(*CHAT)}, {"messages": turns}]))


def test_mutated_conversations_end_in_a_message(tmp_path):
    values = [None, 5, "x", [], {}, [None], [[]], {"role": 1}, [{"role": None, "content": "a"}], "[{", "[1]", {"a": []}]
    for seed in range(300):
        draw = random.Random(seed)
        row = json.loads(json.dumps({"messages": messages(*CHAT), "system": "s", "images": []}))
        for _ in range(draw.choice([1, 2, 3])):
            place = draw.choice([row, *(turn for turn in row["messages"] if isinstance(turn, dict))])
            place[draw.choice(["role", "content", "messages", "system", "images", "weight", "tool_calls"])] = (
                draw.choice(values)
            )
            if not isinstance(row["messages"], list):
                break
        try:
            read_data(save(tmp_path, "json", [{"messages": messages(*CHAT)}, row]), turns="all")
        except UsageError as error:
            assert "rows.json" in str(error)


def test_the_former_name_of_turns(tmp_path, capsys):
    for words in (["--guanaco_turns", "all"], ["--turns", "all"]):
        _, data_args, _, _ = parse_flags(["--data_path", "x.json", "--output_dir", "out", "--use_cpu", "True", *words])
        assert data_args.turns == "all"
    assert "flag: --guanaco_turns -> --turns" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--turns"):
        parse_flags(["--data_path", "x.json", "--output_dir", "out", "--turns", "some"])


# ---- rows held out ----

MANY = [{"instruction": f"Say {i}.", "input": "", "output": str(i)} for i in range(40)]


@pytest.mark.parametrize("size, held", [(0.05, 2), (0.5, 20), (0.001, 1), (7, 7), (1, 1), (39, 39)])
def test_rows_are_held_out_by_seed(tmp_path, size, held):
    path = save(tmp_path, "jsonl", MANY)
    made, again, other = (module(path, eval_size=size, seed=seed) for seed in (1, 1, 2))
    train, test = made["train_dataset"], made["eval_dataset"]
    assert (len(train), len(test)) == (40 - held, held)
    assert sorted(tokens(train) + tokens(test)) == sorted(tokens(module(path)["train_dataset"]))
    assert sorted(train.report.numbers + test.report.numbers) == list(range(40))
    assert train.report.numbers == sorted(train.report.numbers), "in the order of the file"
    assert test.report.numbers == again["eval_dataset"].report.numbers
    assert held == 39 or test.report.numbers != other["eval_dataset"].report.numbers
    assert str(train.report).startswith(f"{path} (to train on): {40 - held} row")
    assert str(test.report).startswith(f"{path} (held out by seed 1): {held} row")


@pytest.mark.parametrize("size", [0, -1, 1.5, float("nan"), float("inf"), 40, 1000])
def test_a_size_that_cannot_be_held_out(tmp_path, size):
    with pytest.raises(UsageError, match=f"^eval_size {size:g}: (expected a share|no row would be left)"):
        module(save(tmp_path, "jsonl", MANY), eval_size=size)
    with pytest.raises(UsageError, match="--eval_size .*--eval_data_path has the rows already"):
        module("x.json", eval_size=0.5, eval_data_path="y.json")


def test_the_rows_of_a_conversation_stay_on_one_side(tmp_path):
    path = save(tmp_path, "jsonl", [{"messages": messages(*CHAT[1:], ("user", str(i)))} for i in range(10)])
    made = module(path, eval_size=3, turns="all")
    train, test = (made[name].report for name in ("train_dataset", "eval_dataset"))
    assert len(test.numbers) == 4 and not set(train.numbers) & set(test.numbers)
    assert sorted(train.problems["ends_on_human"] + test.problems["ends_on_human"]) == list(range(10))


def test_the_run_fingerprint_knows_what_is_held_out_and_the_former_name_of_turns(tmp_path):
    path, tokenizer = save(tmp_path, "jsonl", MANY), golden_tokenizer("llama")

    def described(*words):
        flags = ["--model_name_or_path", str(LLAMA), "--data_path", path, "--output_dir", str(tmp_path / "out")]
        *others, args = parse_flags([*flags, "--use_cpu", "True", *words])
        dataset = make_supervised_data_module(tokenizer, others[1], seed=args.seed)["train_dataset"]
        return describe_run(args, *others, dataset, tokenizer)

    usual, held_out = described(), described("--eval_size", "0.1")
    assert [line.split(":")[0] for line in changes(usual, held_out, "fixed")] == [
        "the data (--data_path)",
        "--eval_size",
    ]
    assert not changes(held_out, described("--eval_size", "0.1"), "fixed")
    old = json.loads(json.dumps(usual))
    old["fixed"]["--guanaco_turns"] = old["fixed"].pop("--turns")
    del old["fixed"]["--eval_size"]
    assert not changes(old, usual, "fixed"), "a checkpoint of before goes on"
    assert changes(old, described("--turns", "all"), "fixed") == ["--turns: first then, all now"]
    assert changes(old, held_out, "fixed")[-1] == "--eval_size: None then, 0.1 now"


def test_evaluation_needs_its_two_flags():
    from alpaca.training.preflight import check_evaluation

    def args(*words):
        return parse_flags(["--data_path", "x.json", "--output_dir", "out", "--use_cpu", "True", *words])[-1]

    with pytest.raises(UsageError, match="^--eval_size 0.05: is never used; add --eval_strategy steps or epoch"):
        check_evaluation(args(), None, 0.05)
    with pytest.raises(UsageError, match="needs rows to evaluate on, --eval_data_path or --eval_size"):
        check_evaluation(args("--eval_strategy", "epoch"), None, None)
    check_evaluation(args("--eval_strategy", "epoch"), None, 0.05)


def test_inspection_shows_rows_of_both_parts(tmp_path, capsys):
    from scripts.inspect_data import main

    path = save(tmp_path, "jsonl", MANY)
    words = ["--model_name_or_path", str(LLAMA), "--data_path", path, "--eval_size", "0.5", "--seed", "3"]
    assert main([*words, "--rows", *map(str, range(40))]) == 0
    output = capsys.readouterr().out
    assert output.count("\nrow ") == 40 and "left out" not in output
    assert "(to train on): 20 rows" in output and "(held out by seed 3): 20 rows" in output


@pytest.mark.slow
def test_the_help_of_train_names_them():
    shown = run([sys.executable, "train.py", "--help"]).stdout
    for flag in ("--columns", "--turns", "--eval_size"):
        assert f"\n  {flag} " in shown
    assert "guanaco_turns" not in shown


@pytest.mark.slow
def test_a_run_on_a_csv_of_ones_own(tiny, tmp_path):
    from conftest import train

    rows = [{"Frage": row["instruction"], "Antwort": row["output"]} for row in MANY]
    flags = dict(
        model_name_or_path=tiny("llama"),
        data_path=save(tmp_path, "csv;", rows),
        columns="instruction=Frage,output=Antwort",
        eval_size=0.25,
        eval_strategy="epoch",
        output_dir=tmp_path / "out",
        num_train_epochs=1,
        per_device_train_batch_size=5,
        use_cpu=True,
        report_to="none",
    )
    result = train(flags)
    assert "rows.csv (to train on): 30 rows, read as told: instruction=Frage, output=Antwort" in result.stdout
    assert "rows.csv (held out by seed 42): 10 rows" in result.stdout
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in entry for entry in log)


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.skipif(not (SHARED / "alpaca_data.json").exists(), reason="the 52,002 rows are not there")
def test_the_original_rows_pass_the_inspection(tmp_path, monkeypatch):
    from scripts import make_tiny_model
    from scripts.inspect_data import main

    rows = json.loads((SHARED / "alpaca_data.json").read_text())
    texts = ["\n".join(row.values()) for row in rows[::8]]
    monkeypatch.setattr(make_tiny_model, "own_text", lambda: texts)
    model = make_tiny_model.make_tiny_model(tmp_path / "model", "llama", hidden_size=16, vocab_size=8000)
    words = ["--model_name_or_path", str(model), "--cache_dir", str(tmp_path)]
    assert len(rows) == 52_002 and main([*words, "--data_path", str(SHARED / "alpaca_data.json")]) == 0


def test_a_share_of_rows_without_anything_to_learn_is_tolerated(tmp_path):
    long = {"instruction": "word " * 600, "output": "x"}
    for good, bad, spoils in ((2000, 1, False), (100, 1, True)):
        rows = [{"instruction": f"Say {i}.", "output": str(i)} for i in range(good)] + [long] * bad
        report = module(save(tmp_path, "json", rows))["train_dataset"].report
        assert report.problems["nothing_to_learn"] == [good] and bool(report.spoiled_by()) == spoils
    assert report.spoiled_by()[-1].startswith("nothing_to_learn: 1 row of 101 (1.0%), tolerated are 0.1%: ")
