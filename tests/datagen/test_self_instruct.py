"""Prompts and answers of self-instruct: 2023's parser answer for answer, the robust one on what chat models write."""

import json
import random
import re

import pytest
from conftest import GOLDEN, ROOT

import generate_instruction
from alpaca.common.errors import UsageError
from alpaca.datagen.self_instruct import _split_as_in_2023, encode_prompt, load_seed_tasks, parse

pytestmark = pytest.mark.slow  # many small cases

COMPLETIONS = json.loads((GOLDEN / "generate" / "completions.json").read_text())
EXAMPLES = [{"instruction": f"Say  {n}:", "input": "" if n % 2 else f"in {n}", "output": f"out {n}"} for n in (1, 2, 3)]


@pytest.mark.parametrize("number", range(len(COMPLETIONS)))
def test_post_processing_is_that_of_2023(number):
    expected = json.loads((GOLDEN / "generate" / "postprocessed.json").read_text())
    assert generate_instruction.post_process_gpt3_response(3, COMPLETIONS[number]) == expected[number]


def test_nothing_gives_nothing():
    assert generate_instruction.post_process_gpt3_response(3, None) == []
    assert parse("", "stop", 3, "original")[0].reason == "malformed"
    assert parse("", "stop", 3, "robust") == []


def test_the_prompt_ends_where_the_answer_begins():
    assert encode_prompt(EXAMPLES, "Head") == (
        "Head\n###\n1. Instruction: Say 1\n1. Input:\n<noinput>\n1. Output:\nout 1\n"
        "###\n2. Instruction: Say 2\n2. Input:\nin 2\n2. Output:\nout 2\n"
        "###\n3. Instruction: Say 3\n3. Input:\n<noinput>\n3. Output:\nout 3\n###\n4. Instruction:"
    )
    own = generate_instruction.encode_prompt(EXAMPLES)
    assert own.startswith((ROOT / "prompt.txt").read_text() + "\n###\n1. Instruction: Say 1\n")


def test_prompt_txt_is_numbered_correctly_and_asks_for_twenty():
    lines = (ROOT / "prompt.txt").read_text().splitlines()
    numbers = [int(line.split(".")[0]) for line in lines if line[:1].isdigit()]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 8
    text = "\n".join(lines)
    assert text.count("20") == 2 and "<noinput>" in text and text.endswith("tasks:")


def test_find_word_in_string():
    assert generate_instruction.find_word_in_string("map", "Draw a MAP of it")
    assert not generate_instruction.find_word_in_string("map", "What is a mapping?")


TASKS = [
    {"instruction": "Name a colour of the sea.", "input": "", "output": "Blue."},
    {"instruction": "Translate this into German.", "input": "Good day", "output": "Guten Tag"},
]
BODY = "{n}. Instruction: {instruction}\n{n}. Input:\n{input}\n{n}. Output:\n{output}\n"


def answer(template=BODY, separator="###\n", begin="", end="", continued=False, noinput="<noinput>"):
    parts = [template.format(n=n, **{**task, "input": task["input"] or noinput}) for n, task in enumerate(TASKS, 4)]
    text = separator.join(parts)
    return begin + (text.removeprefix("4. Instruction:") if continued else text) + end


CHAT = {
    "goes on as 2023's models did": answer(continued=True),
    "the cue repeated": answer(),
    "a leading ###": answer(begin="###\n"),
    "a leading ### and empty lines": answer(begin="\n\n### \n\n"),
    "CRLF": answer().replace("\n", "\r\n"),
    "bold field names": answer(
        "**{n}. Instruction:** {instruction}\n**{n}. Input:**\n{input}\n**{n}. Output:**\n{output}\n"
    ),
    "bold words": answer("{n}. **Instruction**: {instruction}\n{n}. **Input**: {input}\n{n}. **Output**: {output}\n"),
    "headings": answer(
        "### {n}. Instruction: {instruction}\n### {n}. Input:\n{input}\n### {n}. Output:\n{output}\n", "\n"
    ),
    "fields without numbers": answer("{n}. Instruction: {instruction}\nInput: {input}\nOutput: {output}\n"),
    "bold fields without numbers": answer(
        "**{n}. Instruction**: {instruction}\n**Input:** {input}\n**Output:**\n{output}\n"
    ),
    "no separator": answer(separator="\n"),
    "rules as separators": answer(separator="\n---\n\n"),
    "a word before the list": answer(begin="Here are the tasks:\n\n"),
    "a fence around all": answer(begin="```\n", end="```\n"),
    "a named fence around all": answer(begin="```text\n###\n", end="```"),
    "N/A for no input": answer(noinput="N/A"),
    "(none)": answer(noinput="(None)"),
    "parentheses": answer("{n}) Instruction: {instruction}\n{n}) Input: {input}\n{n}) Output: {output}\n"),
    "a separator at the end": answer(end="###\n"),
    "indented": answer("  {n}. Instruction: {instruction}\n  {n}. Input: {input}\n  {n}. Output: {output}\n"),
    "a comment, then a fence around all": answer(begin="Here are the tasks:\n\n```\n", end="```\n"),
    "a fence around each": answer("```\n" + BODY + "```\n", ""),
    "bullets": answer("{n}. Instruction: {instruction}\n- **Input:** {input}\n- **Output:** {output}\n"),
    "quotes": answer("> {n}. Instruction: {instruction}\n> {n}. Input: {input}\n> {n}. Output: {output}\n>\n"),
    "no numbers at all": answer("Instruction: {instruction}\nInput: {input}\nOutput: {output}\n"),
    "bold, no numbers": answer("**Instruction:** {instruction}\n**Input:** {input}\n**Output:** {output}\n"),
    "some numbers": answer("{n}. Instruction: {instruction}\nInput: {input}\n{n}. Output: {output}\n"),
    "a bold instruction": answer("**{n}. Instruction: {instruction}**\nInput: {input}\nOutput: {output}\n"),
    "a thought before": answer(begin="<think>4. Instruction: I should\n4. Output: think</think>\n"),
    "escaped": answer(noinput="\\<noinput>"),
    "in words": answer(noinput="No input required."),
    "lower case": answer("{n}. instruction: {instruction}\n{n}. input: {input}\n{n}. output: {output}\n"),
}


@pytest.mark.parametrize("case", CHAT)
def test_the_robust_parser_reads(case):
    assert [item.row for item in parse(CHAT[case], "stop", 3, "robust")] == TASKS


OUTPUTS = {
    "a markdown heading": "### Title\n\nText under it.\n\n### Another\n\nMore.",
    "a code fence": "```python\ndef f(x):\n    ### comment\n    return x\n```\nThat is all.",
    "cues in a code fence": "```\n5. Instruction: not a task\n5. Input:\nno\n5. Output:\nno\n```",
    "cues of other numbers": "1. Input: water\n2. Output: steam",
    "cues without number": "Input: 5\nOutput: 120",
    "a fence that is not closed": "```python\nprint(1)",
    "a fence that is not closed, but for one in the next answer": "```python\nprint(1)",
    "a numbered list": "1. One\n2. Two\n20. Twenty, in 2020.",
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_answers_keep_what_looks_like_structure(case):
    text = BODY.format(n=4, instruction="Show me something of use.", input="<noinput>", output=OUTPUTS[case])
    text += "###\n" + BODY.format(n=5, **{**TASKS[1], "output": "Guten Tag"})
    rows = [item.row for item in parse(text, "stop", 3, "robust") if item.row]
    assert [row["output"] for row in rows] == [OUTPUTS[case], "Guten Tag"]


@pytest.mark.parametrize("parser", ["original", "robust"])
def test_every_reason_is_counted(parser):
    instructions = {
        "Say it now": "too short",
        "word " * 151: "too long",
        "Describe the picture on the wall.": "not for a text model",
        "Write a program that adds numbers.": "write a program",
        '"Quote" this sentence for me please.': "begins with punctuation",
        "Übersetze diesen Satz ins Englische.": "begins with a non-ASCII character",
        "Name three birds of the sea.": "",
    }
    text = "###\n".join(
        BODY.format(n=n, instruction=text, input="<NOINPUT>", output="An answer")
        for n, text in enumerate(instructions, 4)
    ).removeprefix("4. Instruction:")
    assert [item.reason for item in parse(text, "stop", 3, parser)] == list(instructions.values())
    assert [item.reason for item in parse(text, "length", 3, parser)][-1] == "cut off"
    assert parse(text, "stop", 3, parser)[-1].row["input"] == ""


def test_an_empty_output_is_no_task_for_the_robust_parser():
    text = BODY.format(n=4, instruction="Name a colour of the sea.", input="<noinput>", output="")
    assert [item.reason for item in parse(text, "stop", 3, "robust")] == ["empty output"]
    assert parse(text.removeprefix("4. Instruction:"), "stop", 3, "original")[0].row["output"] == ""


def test_no_text_breaks_the_parsers():
    """Whatever a model says: pieces of the format in any order, hundreds of times."""
    pieces = [
        "4. Instruction:",
        "5. Instruction:",
        "4. Input:",
        "4. Output:",
        "###",
        "\n",
        "```",
        "<noinput>",
        " ",
        "**",
        "Name a colour of the sea.",
        "é",
        "\r\n",
        "4.",
        "Input:",
        "Output:",
        "# ",
        "20.",
    ]
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choices(pieces, k=draw.randrange(1, 25)))
        for parser in ("original", "robust"):
            for item in parse(text, draw.choice(["stop", "length"]), 3, parser):
                assert (item.row is None) == bool(item.reason)


LONG = 100_000
BOMBS = {
    "separators": "###" * LONG,
    "separated numbers": "###4.###5." * LONG,
    "numbers in their order": "".join(f"###{n}. Input: " for n in range(4, LONG)),
    "tasks without an end": "4. Instruction: a\n" * LONG,
    "fences": "```\n" * LONG,
    "fences before tasks": "".join(f"```\n{n}. Instruction: x\n" for n in range(LONG)),
    "a line of blanks": " " * LONG + "x",
    "blanks behind a number": "4." + " " * LONG + "x",
    "blanks at the end": "4. Instruction: a\n4. Output:\n" + " " * LONG + "x",
    "a number of many digits": "9" * LONG + ". Instruction: a\n",
    "thoughts": "<think>" * LONG,
}


@pytest.mark.parametrize("parser", ["original", "robust"])
@pytest.mark.parametrize("case", BOMBS)
def test_long_answers_take_no_square_of_their_length(case, parser):
    """The quadratic parsers took minutes for these, and the suite would not end."""
    assert all(item.row is None for item in parse(BOMBS[case], "stop", 3, parser))


def split_of_2023(text, number):
    """2023's rule in its own words: a pattern for each number."""
    parts = [part for part in f"{number + 1}. Instruction:{text}".split("###")]
    fields = [re.split(rf"{n}\.\s+(Instruction|Input|Output):", part) for n, part in enumerate(parts, number + 1)]
    return [
        () if not part.strip() else (of[2], of[4], of[6]) if len(of) == 7 else None for part, of in zip(parts, fields)
    ]


def test_the_linear_parser_splits_as_2023_did():
    pieces = ["4. Instruction:", "5. Instruction:", "14. Input:", "4. Input:", "4. Output:", "5.\tOutput:", "5. Input:"]
    pieces += [
        "###",
        "###",
        "\n",
        " ",
        "####",
        "Name a bird.",
        "é",
        "4.",
        "٤4. Input:",
        "\r\n",
        "44. Output:",
        "x" * 99,
    ]
    draw = random.Random(3)
    for _ in range(3000):
        text = "".join(draw.choices(pieces, k=draw.randrange(1, 30)))
        assert _split_as_in_2023(text, 3) == split_of_2023(text, 3), text


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"instances": [1]}', "[]", "7", '{"instruction": "a", "instances": []}', "{}"]
)
def test_a_line_that_is_no_task_is_named(tmp_path, line):
    (tmp_path / "seeds.jsonl").write_text(line + "\n")
    with pytest.raises(UsageError, match="line 1: is not a task"):
        load_seed_tasks(str(tmp_path / "seeds.jsonl"))
