"""Self-instruct's two ends (arXiv 2212.10560, as Alpaca changed it): the prompt that asks for tasks, and what an answer
holds.

An answer goes on where the prompt ends, after "4. Instruction:". The original parser is 2023's, answer for answer; the
robust one reads what chat models write: cues repeated, in bold or as headings, "###" and code inside answers.
"""

import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alpaca.common.errors import InputError, ParameterError
from alpaca.common.files import parse_json
from alpaca.completions.api import was_cut, whole_characters
from alpaca.data.prompts import instruction_and_input
from alpaca.data.rows import DATA_SUFFIXES, load_rows

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

BLANKS = r"[ \t]{0,40}"  # with "*" a line of blanks takes the square of its length
BOLD = r"[*_]{0,3}"
CUE = rf"^[ \t>]{{0,40}}(?:(?:\#{{1,6}}|[-*+])[ \t]{{1,40}})?{BOLD}{BLANKS}"  # of a line: a heading, a bullet, bold
NUMBER = rf"(?P<number>\d{{1,9}}){BLANKS}[.):]{BLANKS}"
ITEM = re.compile(
    rf"{CUE}(?:Task[ \t]{{1,40}})?{NUMBER}{BOLD}{BLANKS}Instruction{BLANKS}{BOLD}{BLANKS}:{BOLD}", re.IGNORECASE
)
UNNUMBERED = re.compile(rf"{CUE}Instruction{BLANKS}{BOLD}{BLANKS}:{BOLD}", re.IGNORECASE)
FIELD = re.compile(
    rf"{CUE}(?:{NUMBER})?{BOLD}{BLANKS}(?P<field>Input|Output){BLANKS}{BOLD}{BLANKS}:{BOLD}", re.IGNORECASE
)
FIELD_OF_2023 = re.compile(r"\.\s+(?:Instruction|Input|Output):")
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
    """Return instruction, input and output of every seed task: of JSONL with instances, as in 2023, the first instance;
    of any other file, the rows that train.py reads in it.

    Raises:
        UsageError: the file cannot be read or a line is not a task; the message names the line.
    """
    if not _is_of_2023(path):
        rows = [{"input": "", **row} for row in load_rows(path)]
        return [
            {name: whole_characters(row[name] or "") for name in ("instruction", "input", "output")} for row in rows
        ]
    rows = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})", path) from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                task = parse_json(line)
                instance = task["instances"][0]
                row = {"instruction": task["instruction"], "input": instance["input"], "output": instance["output"]}
                if not all(isinstance(value, str) for value in row.values()):
                    raise TypeError("instruction, input and output must be texts")
                row = {name: whole_characters(value) for name, value in row.items()}
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise InputError(
                    f"{path}, line {number}: is not a task ({error!r}); expected "
                    '{"instruction": "…", "instances": [{"input": "…", "output": "…"}]}, or a file that train.py reads',
                    path,
                ) from error
            rows.append(row)
    return rows


def _is_of_2023(path: str) -> bool:
    """Return whether the file is JSONL of tasks with instances, or none that train.py reads either."""
    if not Path(path).is_file():
        return True
    if Path(path).suffix in DATA_SUFFIXES and Path(path).suffix != ".jsonl":
        return False
    with open(path, encoding="utf-8", errors="replace") as file:
        first = next((line for line in file if line.strip()), "")
    try:
        row = parse_json(first)
    except ValueError:
        return True
    return not isinstance(row, dict) or not row or "instances" in row


def read_excluded(path: str) -> list[str]:
    """Return the texts of an evaluation set, in any layout that train.py reads, answers or not: instructions, and where
    there is an input both together, too."""
    if not path.strip():
        raise ParameterError("{exclude}: needs a file; omit it to exclude nothing", "exclude")
    rows = load_rows(path, answered=False)
    texts = [text for row in rows for text in (row["instruction"], instruction_and_input(row))]
    if not any(text.strip() for text in texts):
        raise InputError(f"{path}: holds no instruction to exclude", path)
    return list(dict.fromkeys(texts))


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
        finish_reason: one that `was_cut` knows means that the last task was cut.
        num_prompt_instructions: examples in the prompt.
        parser: "original" or "robust".
    """
    split = _split_as_in_2023 if parser == "original" else _split_robustly
    tasks = split(text, num_prompt_instructions)
    items = []
    for number, fields in enumerate(tasks):
        if fields == ():
            continue  # nothing between two separators
        if number == len(tasks) - 1 and was_cut(finish_reason):
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
    parts = (f"{num_prompt_instructions + 1}. Instruction:" + text).split("###")
    for number, part in enumerate(parts, num_prompt_instructions + 1):
        found.append(_fields_of_2023(part, str(number)) if part.strip() else ())
    return found


def _fields_of_2023(part: str, number: str) -> Fields | None:
    """Return what stands behind the three cues with `number`; None if they are not three. 2023 made a pattern for each
    number, which takes half a minute for a hundred thousand of them."""
    cues = [cue for cue in FIELD_OF_2023.finditer(part) if part.endswith(number, 0, cue.start())]
    if len(cues) != 3:
        return None
    begins = [cue.start() - len(number) for cue in cues[1:]]
    return tuple(part[cue.end() : begin] for cue, begin in zip(cues, [*begins, len(part)]))


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
    item_follows = _followed_by_item(lines)
    later = sum(bool(FENCE.match(line)) for line in lines)
    for number, line in enumerate(lines):
        if FENCE.match(line):
            later -= 1
            if outside and not wrapped and item_follows[number]:
                wrapped = True
                continue
            if wrapped and line.strip() in ("```", "~~~") and later % 2 == 0:
                wrapped, outside = False, True
                continue
        elif ITEM.match(line):
            outside = False
        kept.append(line)
    return kept


def _followed_by_item(lines: list[str]) -> list[bool]:
    """Return for each line whether the next one with more than "#" and blanks begins a task."""
    found, follows = [], False
    for line in reversed(lines):
        found.append(follows)
        follows = bool(ITEM.match(line)) if line.strip(" \t#") else follows
    return found[::-1]


def _inside_fences(lines: list[str]) -> list[bool]:
    """Return for each line whether it is code. A fence that is not closed before the next task by number opens
    nothing."""
    inside = [False] * len(lines)
    opened = None
    last = None
    rest = sum(bool(FENCE.match(line)) for line in lines)  # fences from this line on
    for number, line in enumerate(lines):
        item = ITEM.match(line)
        if opened is not None and item and last is not None and int(item["number"]) == last + 1:
            if rest % 2 == 0:  # no fence is left over that could close this one
                opened = None
        if FENCE.match(line):
            rest -= 1
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
    while answer and _separates(answer[-1]):
        answer.pop()
    return _balanced("\n".join(instruction)), "\n".join(given), "\n".join(answer)


def _separates(line: str) -> bool:
    """Return whether a line only stands between two tasks: empty, "###", "---" or "***"."""
    core = line.lstrip(" \t>").rstrip(" \t")
    return not core.strip("#") or (len(core) >= 3 and (not core.strip("-") or not core.strip("*")))


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
    reason = "length" if response["finish_reason"] == "length" else "stop"  # 2023 knew no other
    items = parse(response["text"], reason, num_prompt_instructions, "original")
    return [item.row for item in items if item.row is not None]
