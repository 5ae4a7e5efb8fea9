"""Self-instruct's two ends (arXiv 2212.10560, as Alpaca changed it): the prompt that asks for tasks, and what an answer
holds.

An answer goes on where the prompt ends, after "4. Instruction:". The original parser is 2023's, answer for answer; the
robust one reads what chat models write: cues repeated, in bold or as headings, "###" and code inside answers.
"""

import json
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alpaca.errors import UsageError

# Tasks that a model of text alone cannot do, and words that led to too many of one kind.
BLACKLIST = (
    "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot",
    "go to", "video", "audio", "music", "flowchart", "diagram",
)  # fmt: skip
PARSERS = ("original", "robust")

BOLD = r"[*_]{0,3}"
CUE = rf"^[ \t]*(?:\#{{1,6}}[ \t]+)?{BOLD}[ \t]*"  # of a line: a heading, bold
NUMBER = r"(?P<number>\d+)[ \t]*[.):][ \t]*"
ITEM = re.compile(rf"{CUE}{NUMBER}{BOLD}[ \t]*Instruction[ \t]*{BOLD}[ \t]*:{BOLD}", re.IGNORECASE)
FIELD = re.compile(rf"{CUE}(?:{NUMBER})?{BOLD}[ \t]*(?P<field>Input|Output){BOLD}[ \t]*:{BOLD}", re.IGNORECASE)
FENCE = re.compile(r"^[ \t]*(```|~~~)")


class Item(NamedTuple):
    """A task that was proposed: its row, or why it was rejected."""

    row: dict[str, str] | None
    reason: str = ""


def load_prompt(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompt_path {path}: cannot be read ({error})") from error


def load_seed_tasks(path: str) -> list[dict[str, str]]:
    """instruction, input and output of every seed task.

    Raises:
        UsageError: the file cannot be read or a line is not a task; the message names the line.
    """
    rows = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--seed_tasks_path {path}: cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                task = json.loads(line)
                instance = task["instances"][0]
                row = {"instruction": task["instruction"], "input": instance["input"], "output": instance["output"]}
                if not all(isinstance(value, str) for value in row.values()):
                    raise TypeError("instruction, input and output must be texts")
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise UsageError(
                    f"--seed_tasks_path {path}, line {number}: is not a task ({error!r}); expected "
                    '{"instruction": "…", "instances": [{"input": "…", "output": "…"}]}'
                ) from error
            rows.append(row)
    return rows


def encode_prompt(prompt_instructions: Sequence[Mapping[str, str]], head: str) -> str:
    """`head`, the numbered examples, and the number that the answer goes on with; as in 2023."""
    prompt = head + "\n"
    for number, task in enumerate(prompt_instructions, 1):
        instruction = re.sub(r"\s+", " ", task["instruction"]).strip().rstrip(":")
        input = "<noinput>" if task["input"].lower() == "" else task["input"]
        prompt += f"###\n{number}. Instruction: {instruction}\n{number}. Input:\n{input}\n"
        prompt += f"{number}. Output:\n{task['output']}\n"
    return prompt + f"###\n{len(prompt_instructions) + 1}. Instruction:"


def find_word_in_string(w: str, s: str) -> re.Match[str] | None:
    """The first occurrence of `w` as a word of its own, in any case."""
    return re.search(rf"\b({w})\b", s, flags=re.IGNORECASE)


def parse(text: str, finish_reason: str, num_prompt_instructions: int, parser: str) -> list[Item]:
    """All tasks that an answer proposes, in order.

    Args:
        text: what a model answered to `encode_prompt`.
        finish_reason: "length" means that the last task was cut.
        num_prompt_instructions: examples in the prompt.
        parser: "original" or "robust".
    """
    split = _split_as_in_2023 if parser == "original" else _split_robustly
    tasks = split(text, num_prompt_instructions)
    items = []
    for number, fields in enumerate(tasks):
        if fields == ():
            continue  # nothing between two separators
        if number == len(tasks) - 1 and finish_reason == "length":
            items.append(Item(None, "cut off"))
        elif fields is None:
            items.append(Item(None, "malformed"))
        else:
            row = dict(zip(("instruction", "input", "output"), (field.strip() for field in fields)))
            if row["input"].lower() == "<noinput>" or (parser == "robust" and _is_no_input(row["input"])):
                row["input"] = ""
            reason = why_unfit(row["instruction"])
            if not reason and parser == "robust" and not row["output"]:
                reason = "empty output"
            items.append(Item(None, reason) if reason else Item(row))
    return items


def why_unfit(instruction: str) -> str:
    """2023's filters, in their order; "" for an instruction that passes."""
    words = len(instruction.split())
    if words <= 3:
        return "too short"
    if words > 150:
        return "too long"
    if any(find_word_in_string(word, instruction) for word in BLACKLIST):
        return "not for a text model"
    if instruction.startswith("Write a program"):
        return "write a program"
    if instruction[0] in string.punctuation:
        return "begins with punctuation"
    if not instruction[0].isascii():
        return "begins with a non-ASCII character"
    return ""


Fields = tuple[str, ...]  # instruction, input, output; or nothing at all


def _split_as_in_2023(text: str, num_prompt_instructions: int) -> list[Fields | None]:
    """ "###" separates tasks, wherever it stands; each must have its number at all three fields."""
    found: list[Fields | None] = []
    parts = re.split("###", f"{num_prompt_instructions + 1}. Instruction:" + text)
    for number, part in enumerate(parts, num_prompt_instructions + 1):
        fields = re.split(rf"{number}\.\s+(Instruction|Input|Output):", part)
        if part.strip():
            found.append((fields[2], fields[4], fields[6]) if len(fields) == 7 else None)
        else:
            found.append(())
    return found


def _split_robustly(text: str, num_prompt_instructions: int) -> list[Fields | None]:
    """A task begins at a line with a number and "Instruction:"; its fields at lines with that number, or with none if
    it numbers none. Lines inside a code fence are not looked at."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    lines = _without_outer_fence(lines)
    begin = next((line for line in lines if line.strip(" \t#*")), "")
    if not ITEM.match(begin):
        first = lines.index(begin) if begin else 0
        lines = [f"{num_prompt_instructions + 1}. Instruction: {begin}", *lines[first + 1 :]]
    fenced = _inside_fences(lines)
    starts = [number for number, line in enumerate(lines) if not fenced[number] and ITEM.match(line)]
    ends = [*starts[1:], len(lines)]
    return [_fields(lines[start:end], fenced[start:end]) for start, end in zip(starts, ends)]


def _without_outer_fence(lines: list[str]) -> list[str]:
    """Some models wrap the whole list in a code fence."""
    filled = [number for number, line in enumerate(lines) if line.strip(" \t#")]
    if len(filled) > 2 and FENCE.match(lines[filled[0]]) and ITEM.match(lines[filled[1]]):
        lines, last = lines[filled[0] + 1 :], filled[-1] - filled[0] - 1
        return lines[:last] if FENCE.match(lines[last]) else lines
    return lines


def _inside_fences(lines: list[str]) -> list[bool]:
    """Per line, whether it is code. A fence that is never closed opens nothing."""
    marks = [number for number, line in enumerate(lines) if FENCE.match(line)]
    inside = [False] * len(lines)
    for start, end in zip(marks[::2], marks[1::2]):
        inside[start : end + 1] = [True] * (end + 1 - start)
    return inside


def _fields(lines: list[str], fenced: list[bool]) -> Fields | None:
    number = ITEM.match(lines[0])["number"]
    cues = [(at, match) for at, line in enumerate(lines[1:], 1) if not fenced[at] and (match := FIELD.match(line))]
    numbered = [(at, match) for at, match in cues if match["number"] == number]
    cues = numbered or [(at, match) for at, match in cues if match["number"] is None]
    inputs = [cue for cue in cues if cue[1]["field"].lower() == "input"][:1]
    outputs = [cue for cue in cues if cue[1]["field"].lower() == "output" and (not inputs or cue[0] > inputs[0][0])][:1]
    if not outputs:
        return None
    (output_at, output), (input_at, input) = outputs[0], (inputs or outputs)[0]
    instruction = [ITEM.sub("", lines[0], count=1), *lines[1:input_at]]
    given = [lines[input_at][input.end() :], *lines[input_at + 1 : output_at]] if inputs else []
    answer = [lines[output_at][output.end() :], *lines[output_at + 1 :]]
    while answer and re.fullmatch(r"[ \t]*(#+|-{3,}|\*{3,})?[ \t]*", answer[-1]):  # what separates it from the next
        answer.pop()
    return "\n".join(instruction), "\n".join(given), "\n".join(answer)


def _is_no_input(text: str) -> bool:
    return text.strip(" \t\n*_`().<>").lower() in ("noinput", "no input", "none", "n/a", "")


def rows_of_response(num_prompt_instructions: int, response: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """2023's `post_process_gpt3_response`."""
    if response is None:
        return []
    items = parse(response["text"], response["finish_reason"], num_prompt_instructions, "original")
    return [item.row for item in items if item.row is not None]
