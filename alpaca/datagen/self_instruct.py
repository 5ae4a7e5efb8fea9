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

from alpaca.common.errors import InputError

# Tasks that a model of text alone cannot do, and words that led to too many of one kind.
BLACKLIST = (
    "image",
    "images",
    "graph",
    "graphs",
    "picture",
    "pictures",
    "file",
    "files",
    "map",
    "maps",
    "draw",
    "plot",
    "go to",
    "video",
    "audio",
    "music",
    "flowchart",
    "diagram",
)
PARSERS = ("original", "robust")

BOLD = r"[*_]{0,3}"
CUE = rf"^[ \t>]*(?:(?:\#{{1,6}}|[-*+])[ \t]+)?{BOLD}[ \t]*"  # of a line: a heading, a bullet, bold
NUMBER = r"(?P<number>\d+)[ \t]*[.):][ \t]*"
ITEM = re.compile(rf"{CUE}(?:Task[ \t]+)?{NUMBER}{BOLD}[ \t]*Instruction[ \t]*{BOLD}[ \t]*:{BOLD}", re.IGNORECASE)
UNNUMBERED = re.compile(rf"{CUE}Instruction[ \t]*{BOLD}[ \t]*:{BOLD}", re.IGNORECASE)
FIELD = re.compile(rf"{CUE}(?:{NUMBER})?{BOLD}[ \t]*(?P<field>Input|Output)[ \t]*{BOLD}[ \t]*:{BOLD}", re.IGNORECASE)
FENCE = re.compile(r"^[ \t]*(```|~~~)")


class Item(NamedTuple):
    """A task that was proposed: its row, or why it was rejected."""

    row: dict[str, str] | None
    reason: str = ""


def load_prompt(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})", path) from error


def load_seed_tasks(path: str) -> list[dict[str, str]]:
    """Return instruction, input and output of every seed task.

    Raises:
        UsageError: the file cannot be read or a line is not a task; the message names the line.
    """
    rows = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})", path) from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                task = json.loads(line)
                instance = task["instances"][0]
                row = {"instruction": task["instruction"], "input": instance["input"], "output": instance["output"]}
                if not all(isinstance(value, str) for value in row.values()):
                    raise TypeError("instruction, input and output must be texts")
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise InputError(
                    f"{path}, line {number}: is not a task ({error!r}); expected "
                    '{"instruction": "…", "instances": [{"input": "…", "output": "…"}]}',
                    path,
                ) from error
            rows.append(row)
    return rows


def encode_prompt(prompt_instructions: Sequence[Mapping[str, str]], head: str) -> str:
    """Return `head`, the numbered examples, and the number that the answer goes on with; as in 2023."""
    prompt = head + "\n"
    for number, task in enumerate(prompt_instructions, 1):
        instruction = re.sub(r"\s+", " ", task["instruction"]).strip().rstrip(":")
        input = "<noinput>" if task["input"].lower() == "" else task["input"]
        prompt += f"###\n{number}. Instruction: {instruction}\n{number}. Input:\n{input}\n"
        prompt += f"{number}. Output:\n{task['output']}\n"
    return prompt + f"###\n{len(prompt_instructions) + 1}. Instruction:"


def find_word_in_string(w: str, s: str) -> re.Match[str] | None:
    """Return the first occurrence of `w` as a word of its own, in any case."""
    return re.search(rf"\b({w})\b", s, flags=re.IGNORECASE)


def parse(text: str, finish_reason: str, num_prompt_instructions: int, parser: str) -> list[Item]:
    """Return all tasks that an answer proposes, in order.

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
    """Return why 2023's filters, in their order, reject an instruction; "" if it passes."""
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
    """Split at "###", which separates tasks, wherever it stands; each must have its number at all three fields."""
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
    """Split where a task begins: at a line with a number and "Instruction:" (or at every "Instruction:" if none is
    numbered), its fields at lines with its number or without one. Lines inside a code fence are not looked at."""
    text = re.sub(r"(?s)^\s*<think>.*?</think>", "", text).replace("\r\n", "\n").replace("\r", "\n")
    lines = _without_outer_fences(text.split("\n"))
    begin = next((number for number, line in enumerate(lines) if line.strip(" \t#*")), None)
    if begin is None:
        return []
    numbered = [number for number, line in enumerate(lines) if ITEM.match(line)]
    bare = [] if numbered else [number for number, line in enumerate(lines) if UNNUMBERED.match(line)]
    preface = lines[begin].rstrip(" *_").endswith(":") or begin + 1 in numbered + bare
    if not bare and begin not in numbered and not preface:  # it goes on where the prompt ended
        lines[begin] = f"{num_prompt_instructions + 1}. Instruction: {lines[begin]}"
    for number in bare:
        lines[number] = UNNUMBERED.sub("0. Instruction:", lines[number], count=1)
    fenced = _inside_fences(lines)
    starts = [number for number, line in enumerate(lines) if not fenced[number] and ITEM.match(line)]
    ends = [*starts[1:], len(lines)]
    found = [_fields(lines[start:end], fenced[start:end]) for start, end in zip(starts, ends)]
    return found or [None]


def _without_outer_fences(lines: list[str]) -> list[str]:
    """Drop the code fence that some models wrap the whole list, or each task, in: one that opens right before a
    task."""
    kept = []
    wrapped = False
    outside = True  # outside: of any task
    for number, line in enumerate(lines):
        if FENCE.match(line):
            after = next((other for other in lines[number + 1 :] if other.strip(" \t#")), "")
            if outside and not wrapped and ITEM.match(after):
                wrapped = True
                continue
            later = sum(bool(FENCE.match(other)) for other in lines[number + 1 :])
            if wrapped and line.strip() in ("```", "~~~") and later % 2 == 0:
                wrapped, outside = False, True
                continue
        elif ITEM.match(line):
            outside = False
        kept.append(line)
    return kept


def _inside_fences(lines: list[str]) -> list[bool]:
    """Return for each line whether it is code. A fence that is not closed before the next task by number opens
    nothing."""
    inside = [False] * len(lines)
    opened = None
    last = None
    for number, line in enumerate(lines):
        item = ITEM.match(line)
        if opened is not None and item and last is not None and int(item["number"]) == last + 1:
            rest = [other for other in lines[number:] if FENCE.match(other)]
            if len(rest) % 2 == 0:  # no fence is left over that could close this one
                opened = None
        if FENCE.match(line):
            if opened is not None:
                inside[opened : number + 1] = [True] * (number + 1 - opened)
            opened = number if opened is None else None
        elif item and opened is None:
            last = int(item["number"])
    return inside


def _fields(lines: list[str], fenced: list[bool]) -> Fields | None:
    number = ITEM.match(lines[0])["number"]
    cues = [(at, match) for at, line in enumerate(lines[1:], 1) if not fenced[at] and (match := FIELD.match(line))]
    found = {}
    for field in ("input", "output"):
        of_field = [cue for cue in cues if cue[1]["field"].lower() == field and cue[0] >= found.get("input", (0,))[0]]
        own = [cue for cue in of_field if cue[1]["number"] == number] or [
            cue for cue in of_field if not cue[1]["number"]
        ]
        if own:
            found[field] = own[0]
    if "output" not in found:
        return None
    output_at, output = found["output"]
    input_at, input = found.get("input", found["output"])
    instruction = [ITEM.sub("", lines[0], count=1), *lines[1:input_at]]
    given = [lines[input_at][input.end() :], *lines[input_at + 1 : output_at]] if "input" in found else []
    answer = [lines[output_at][output.end() :], *lines[output_at + 1 :]]
    while answer and re.fullmatch(r"[ \t>]*(#+|-{3,}|\*{3,})?[ \t]*", answer[-1]):  # what separates it from the next
        answer.pop()
    return _balanced("\n".join(instruction)), "\n".join(given), "\n".join(answer)


def _balanced(text: str) -> str:
    """Return the text without the end of a bold whose begin was before the cue."""
    text = text.strip()
    return text[:-2].rstrip() if text.endswith("**") and text.count("**") % 2 else text


def _is_no_input(text: str) -> bool:
    plain = text.replace("&lt;", "").replace("&gt;", "").strip(" \t\n*_`().<>[]\\-").lower()
    return plain in ("noinput", "no input", "no input needed", "no input required", "none", "n/a", "not applicable", "")


def rows_of_response(num_prompt_instructions: int, response: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """Return what 2023's `post_process_gpt3_response` did."""
    if response is None:
        return []
    items = parse(response["text"], response["finish_reason"], num_prompt_instructions, "original")
    return [item.row for item in items if item.row is not None]
