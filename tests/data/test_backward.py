"""Conversations become rows, none of them unnoticed; a backward model learns the instruction and nothing else."""

import csv
import json

import datasets
import pytest
from conftest import GOLDEN
from support.goldens import golden_tokenizer

from alpaca.common.errors import UsageError
from alpaca.data.formats import parse_conversation
from alpaca.data.prompts import BACKWARD_PROMPT_DICT, PROMPT_DICT, backward_prompt, format_prompt, load_prompt_template
from alpaca.data.rows import load_rows, read_data
from alpaca.training.resume import changes, describe_run
from train import DataArguments, make_supervised_data_module, parse_flags

CHAT = "### Human: Name a colour.### Assistant: Blue.### Human: And another?### Assistant: Red.### Human: Thanks"
TEXTS = [
    "### Human: Hi### Assistant: Hello",
    CHAT,
    "### Human: ¿Qué es esto?\n\n- 蓝色### Assistant: 一种颜色。\n\n### Colours\n\nكلمات",
    "### Human: Nobody answers",
    "### Assistant: Welcome.### Human: Hi again### Assistant: Hello again",
]
LLAMA = GOLDEN / "labels" / "llama"


def pair(instruction, output, input=""):
    return {"instruction": instruction, "input": input, "output": output}


@pytest.mark.parametrize(
    "text, first, problems",
    [
        (TEXTS[0], ("Hi", "Hello"), []),
        (CHAT, ("Name a colour.", "Blue."), ["ends_on_human", "later_pairs"]),
        (TEXTS[2], ("¿Qué es esto?\n\n- 蓝色", "一种颜色。\n\n### Colours\n\nكلمات"), []),
        (TEXTS[3], None, ["no_pair", "ends_on_human"]),
        (TEXTS[4], ("Hi again", "Hello again"), ["unpaired_turns"]),
        ("### Human: What is C#### Assistant: A language", ("What is C#", "A language"), []),
        (
            "### Human: a\n#### Human: b\n#### Assistant: c### Assistant: d",
            ("a\n#### Human: b\n#### Assistant: c", "d"),
            [],
        ),
        ("### Human: a ### Assistant : b### Assistant: c\n\n", ("a ### Assistant : b", "c"), []),
        ("###Human: a\n### Human:a\n### Assistant:    c", ("a", "c"), ["unpaired_turns"]),
        ("### Human: ### Assistant: a### Human: b### Assistant: ", None, ["no_pair", "unpaired_turns"]),
        ("### Human: a### Human: b### Assistant: c### Assistant: d", ("b", "c"), ["unpaired_turns"]),
        ("plain text", None, ["no_pair", "unpaired_turns"]),
        ("", None, ["no_pair"]),
    ],
)
def test_the_first_pair_of_a_conversation(text, first, problems):
    assert parse_conversation(text) == ([pair(*first)] if first else [], problems)


def test_all_pairs_with_what_was_said_before():
    rows, problems = parse_conversation(CHAT, "all")
    said = "Human: Name a colour.\n\nAssistant: Blue."
    assert rows == [pair("Name a colour.", "Blue."), pair("And another?", "Red.", said)]
    assert problems == ["ends_on_human"]
    assert parse_conversation(TEXTS[4], "all")[0] == [pair("Hi again", "Hello again", "Assistant: Welcome.")]


def save(folder, kind):
    path = folder / f"chats.{kind}"
    rows = [{"text": text} for text in TEXTS]
    if kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    elif kind == "csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["text"], *([text] for text in TEXTS)])
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif kind == "folder":
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return str(path)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "folder"])
def test_conversations_in_every_format(tmp_path, kind, capsys):
    path = save(tmp_path, kind)
    data = read_data(path)
    assert data.rows == [row for text in TEXTS for row in parse_conversation(text)[0]]
    assert data.numbers == [0, 1, 2, 4]
    assert data.problems == {"ends_on_human": [1, 3], "later_pairs": [1], "no_pair": [3], "unpaired_turns": [4]}
    assert read_data(path, turns="all").numbers == [0, 1, 1, 2, 4]
    assert load_rows(path) == data.rows
    assert f"{path}: rows left out, without a human turn and its answer: 1 (3)\n" in capsys.readouterr().out


def test_other_files_keep_their_rows_and_numbers(tmp_path):
    rows = [pair("a", "b") | {"text": CHAT}, {"instruction": "c", "instances": [pair("c", "d"), pair("c", "e")]}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([*rows, {"instruction": "x"}]))
    with pytest.raises(UsageError, match="row 2: no field 'output'"):
        load_rows(str(path))
    path.write_text(json.dumps(rows))
    data = read_data(str(path), turns="all")
    assert data.rows[0] == rows[0] and data.numbers == [0, 1, 1] and not data.problems
    path.write_text(json.dumps([{"text": "a"}, {"text": "### Human: b"}]))
    with pytest.raises(UsageError, match="none of its 2 rows has a turn `### Human: ...` with an answer"):
        load_rows(str(path))


def dataset_of(path, tokenizer, **flags):
    return make_supervised_data_module(tokenizer, DataArguments(data_path=str(path), **flags))["train_dataset"]


def test_the_report_and_the_inspection_name_rows_of_the_file(tmp_path, capsys):
    from scripts.inspect_data import main

    path = save(tmp_path, "jsonl")
    dataset = dataset_of(path, golden_tokenizer("llama"), turns="all")
    assert len(dataset) == 5 and dataset.report.problems["ends_on_human"] == [1, 3]
    lines = str(dataset.report).splitlines()
    assert lines[0].startswith(f"{path}: 5 rows, ")
    assert "  no_pair: 1 row (3): no human turn with an answer; they are left out" in lines
    assert "  unpaired_turns: 1 row (4): " in str(dataset.report) and "later_pairs" not in str(dataset.report)

    command = ["--model_name_or_path", str(LLAMA), "--data_path", path, "--guanaco_turns", "all"]
    assert main([*command, "--rows", "1", "3", "4"]) == 1, "one row of five is left out: more than is tolerated"
    output = capsys.readouterr().out
    assert output.count("\nrow 1: ") == 2 and output.count("\nrow 4: ") == 1
    assert "\nrow 3: left out | no_pair, ends_on_human\n" in output and "\nwould spoil training: no_pair" in output
    main([*command, "--problem", "ends_on_human"])
    assert capsys.readouterr().out.count("\nrow ") == 3
    with pytest.raises(UsageError, match="--rows 5: the data has rows 0 to 4"):
        main([*command, "--rows", "5"])

    (tmp_path / "again.json").write_text(json.dumps([{"text": TEXTS[number]} for number in (3, 0, 0)]))
    report = dataset_of(tmp_path / "again.json", golden_tokenizer("llama")).report
    assert report.problems["duplicate"] == [2] and "  duplicate: 1 row (2): " in str(report)


ROWS = [pair("Name a colour.", "Blue."), pair("Translate.", "Bonjour\n", "Good morning"), pair("", "x"), pair("y", "")]


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_backward_row_learns_only_the_instruction(tmp_path, name):
    """Instruction, or instruction and input behind an empty line, and the end-of-text token."""
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    tokenizer = golden_tokenizer(name)
    dataset = dataset_of(tmp_path / "rows.json", tokenizer, backward=True)
    for row, target, ids, labels in zip(
        ROWS, ["Name a colour.", "Translate.\n\nGood morning", "", "y"], dataset.input_ids, dataset.labels
    ):
        learned = int((labels == -100).sum())
        assert labels[:learned].eq(-100).all() and labels[learned:].equal(ids[learned:])
        assert ids[:learned].tolist() == tokenizer(backward_prompt(row["output"]))["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(ids[learned:-1]) == target
    assert dataset.report.problems["empty_answer"] == [2], "there is no instruction"


def test_the_prompt_of_a_backward_model(tmp_path):
    assert backward_prompt("Blue {sky}.") == (
        "Below is a response to an instruction. Write the instruction that it responds to.\n\n"
        "### Response:\nBlue {sky}.\n\n### Instruction:"
    )
    (tmp_path / "t.json").write_text(json.dumps(BACKWARD_PROMPT_DICT))
    assert load_prompt_template(tmp_path / "t.json") == load_prompt_template(None, backward=True)
    own = {"prompt_input": "{instruction} {input} <-", "prompt_no_input": "{instruction} <-"}
    (tmp_path / "t.json").write_text(json.dumps(own))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    assert backward_prompt("Blue.", load_prompt_template(tmp_path / "t.json", backward=True)) == "Blue. <-"
    tokenizer = golden_tokenizer("llama")
    dataset = dataset_of(tmp_path / "rows.json", tokenizer, backward=True, prompt_template=str(tmp_path / "t.json"))
    assert tokenizer.decode(dataset.input_ids[0], skip_special_tokens=True) == "Blue. <-Name a colour."
    assert format_prompt({"instruction": "a", "input": "b"}, BACKWARD_PROMPT_DICT) == backward_prompt("a\n\nb")
    assert PROMPT_DICT.keys() == BACKWARD_PROMPT_DICT.keys(), "what reads templates reads both"


def test_a_resumed_run_must_have_the_same_flags(tmp_path):
    """The contract: whichever of the two flags changes, it is named, and the rows or the prompt are others."""
    path, tokenizer = save(tmp_path, "jsonl"), golden_tokenizer("llama")

    def contract(*words):
        flags = ["--model_name_or_path", str(LLAMA), "--data_path", path, "--output_dir", str(tmp_path / "out")]
        *others, args = parse_flags([*flags, "--use_cpu", "True", *words])
        dataset = make_supervised_data_module(tokenizer, others[1])["train_dataset"]
        return describe_run(args, *others, dataset, tokenizer)

    usual, everything, backward = contract(), contract("--guanaco_turns", "all"), contract("--backward", "True")
    assert [line.split(":")[0] for line in changes(usual, everything, "fixed")] == [
        "the data (--data_path)",
        "--turns",
    ]
    assert [line.split(":")[0] for line in changes(usual, backward, "fixed")] == [
        "the data (--data_path)",
        "--prompt_template",
        "--backward",
    ]
    assert not changes(usual, contract(), "fixed")
