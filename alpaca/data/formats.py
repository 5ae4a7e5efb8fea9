"""What a file may look like beside Alpaca's fields, and which of its columns is what: pairs under other names,
self-instruct's tasks with their instances, conversations.

One layout is chosen for the whole file, from its columns alone:

1. instruction with output or instances is Alpaca's, whatever else is there.
2. A list of turns is a conversation: messages, conversations or conversation; prompt and completion where both are.
3. One of QUESTIONS and one of ANSWERS are a pair, whose input is `input` or else `context`; else one of OTHER_PAIRS.
4. text is a conversation of Guanaco's.

Names may have capital letters and space around them, unless another column has the very name. What fits twice is an
error, and so is what does not fit.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from alpaca.common.errors import InputError, ParameterError
from alpaca.common.files import parse_json

Row = dict[str, Any]

FIELDS = ("instruction", "input", "output")
QUESTIONS, ANSWERS = ("instruction", "prompt", "question", "query"), ("output", "response", "completion", "answer")
OTHERS = "inputs/targets input/target problem/solution user/assistant human/assistant"
OTHER_PAIRS = (*product(("input",), ANSWERS), *(tuple(pair.split("/")) for pair in OTHERS.split()))
INPUTS, SYSTEMS = ("input", "context"), ("system", "system_prompt")
CONVERSATIONS = ("messages", "conversations", "conversation")
TEXTS = "texts of a human and an assistant in turn"
EMPTY = (None, "", [], {})
NEEDED = "needed are instruction, output and, where a row has one, input; or turns, for conversations"
ADVICE = {"columns": "; {columns} instruction=<column>,input=<column>,output=<column> says which is which"}

# A turn begins wherever its marker stands: in Guanaco right behind the last character of the turn before, which may be
# "C#". Any other ### is text, and so is a marker that ends a longer row of # at the start of a line (a heading).
MARKER = re.compile(r"(?<!^#)(?<!^##)(?<!^###)### (Human|Assistant):", re.MULTILINE)
SPEAKERS = {
    **dict.fromkeys(("human", "user", "prompter"), "Human"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "claude", "model", "bot", "ai"), "Assistant"),
    **dict.fromkeys(("system", "developer"), "System"),
}
TOOLS = ("tool", "function", "function_call", "function_response", "tool_call", "tool_response", "observation")


# ---- layouts ----


@dataclass(frozen=True)
class Layout:
    """`columns`: what is read, and from which column. Of a conversation that is `turns`, or those of `prompt` and
    `completion`; of rows it is instruction, input and output; of both, system."""

    name: str
    columns: Mapping[str, str]

    @property
    def is_conversation(self) -> bool:
        return "instruction" not in self.columns

    @property
    def is_plain(self) -> bool:
        """Return whether the fields of a row are Alpaca's already, or those of a task of self-instruct."""
        return self.name == "Alpaca" and all(field == column in FIELDS for field, column in self.columns.items())

    def description(self, pairs: str) -> str | None:
        """Return what the report says first; nothing of Alpaca's own rows."""
        if self.is_plain:
            return None
        shown = ", ".join(f"{field}={shown_name(column)}" for field, column in self.columns.items())
        which = {"first": "the first pair", "last": "the last pair", "all": "every pair"}[pairs]
        return f"read as {self.name}: {shown}" + (f"; {which} of each" if self.is_conversation else "")

    def without_pairs(self, rows: int, problems: Collection[str]) -> str:
        """Return why no row has anything to learn."""
        turn = "turn of a human with an answer behind it"
        if self.name == "Guanaco":
            turn = f"turn `### Human: ...` with an answer `### Assistant: ...` in {self.columns['turns']!r}; {NEEDED}"
        more = "; turns that call a tool or hold an image are not taken" if "not_text_turns" in problems else ""
        return f"none of its {rows:,} rows has a {turn}{more}"


ALPACA = Layout("Alpaca", {name: name for name in FIELDS})


def shown_name(name: str) -> str:
    """Return the name of a column as a message has it."""
    return repr(name) if name != name.strip() or not name.isprintable() or not name or "," in name else name


def plain_name(name: str) -> str:
    """Return the name of a column as it is known, without capital letters and space around it."""
    return name.strip(" \t\r\n\ufeff\xa0").lower()


class _Columns:
    """The columns of a file: `examples` has for each the first value that is not empty."""

    def __init__(self, read: Sequence[Any], data_path: str):
        self.path = data_path
        self.examples: dict[str, Any] = {}
        for row in read:
            for name, value in row.items() if isinstance(row, Mapping) else ():
                if self.examples.get(name) in EMPTY:
                    self.examples[name] = value

    def __contains__(self, name: str) -> bool:
        return name in self.examples or any(plain_name(column) == name for column in self.examples)

    def __getitem__(self, name: str) -> str:
        """Return the column of that name, by its own spelling."""
        found = [name] if name in self.examples else [column for column in self.examples if plain_name(column) == name]
        if len(found) > 1:
            raise self.error(f"several columns could be {name!r}: {', '.join(map(repr, found))}")
        return found[0]

    def example(self, name: str) -> Any:
        return self.examples[self[name]] if name in self else None

    def of(self, **names: str | Collection[str]) -> dict[str, str]:
        """Return the columns that there are of `names`; of several, the first."""
        listed = {field: [name] if isinstance(name, str) else name for field, name in names.items()}
        found = {field: next((name for name in options if name in self), None) for field, options in listed.items()}
        return {field: self[name] for field, name in found.items() if name}

    def error(self, problem: str) -> InputError:
        return InputError(
            f"{self.path}: {problem}; the file has the columns {_listed(self.examples)}; {NEEDED}",
            self.path,
            advice=ADVICE,
        )


def _listed(names: Collection[str]) -> str:
    return f"{', '.join(map(repr, names)):.500}"


def choose_layout(read: Sequence[Any], data_path: str, columns: str | None = None, answered: bool = True) -> Layout:
    """Return the layout of a file of these rows; ALPACA where the rows are to say what they lack.

    Args:
        columns: which column is what, as `instruction=prompt,output=text`; the others are those of their own names.
        answered: a file of questions alone is an error.

    Raises:
        InputError: several layouts fit.
        ParameterError: `columns` is malformed, or names a column that the file does not have.
    """
    known = _Columns(read, data_path)
    if columns is not None:
        return _given_layout(known, columns)
    if "instruction" in known.examples and {"output", "instances"} & known.examples.keys():
        return ALPACA
    layout = _conversation(known) or _pairs(known, QUESTIONS, ANSWERS, OTHER_PAIRS)
    if layout is None and not answered:
        layout = _pairs(known, QUESTIONS, (), ()) or _pairs(known, ("input", "inputs", "problem"), (), ())
    if layout is None and isinstance(known.example("text"), str):
        layout = Layout("Guanaco", known.of(turns="text"))
    return layout or ALPACA


def _pairs(
    known: _Columns, questions: Sequence[str], answers: Sequence[str], others: Sequence[tuple[str, str]]
) -> Layout | None:
    """Return the one layout of a question with its answer, or of a question alone."""
    found = [pair for pair in product(questions, answers or ("",)) if all(name in known for name in pair if name)]
    found = found or [pair for pair in others if all(name in known for name in pair)]
    if plain := [pair for pair in found if pair in (("instruction", "output"), ("instruction", ""))]:
        found = plain
    if len(found) > 1:
        raise known.error(f"fits several layouts ({', '.join('/'.join(filter(None, pair)) for pair in found)})")
    if not found:
        return None
    question, answer = found[0]
    inputs = [name for name in INPUTS if name != question]
    columns = known.of(instruction=question, input=inputs, output=answer or (), system=SYSTEMS)
    name = f"{question}/{answer}" if answer else f"{question} alone"
    if columns.get("input") and plain_name(columns["input"]) == "context" and name == "instruction/response":
        name = "Dolly"
    return Layout("Alpaca" if found[0] in (("instruction", "output"), ("instruction", "")) else name, columns)


def _conversation(known: _Columns) -> Layout | None:
    found = [name for name in CONVERSATIONS if kind_of_turns(known.example(name))]
    if len(found) > 1:
        raise known.error(f"several columns hold conversations ({', '.join(found)})")
    if found:
        return Layout(kind_of_turns(known.example(found[0])), known.of(turns=found[0], system=SYSTEMS))
    if all(kind_of_turns(known.example(name)) not in (None, TEXTS) for name in ("prompt", "completion")):
        return Layout("prompt/completion of messages", known.of(prompt="prompt", completion="completion"))
    return None


def kind_of_turns(value: Any) -> str | None:
    """Return what a list of turns, or the JSON of one, is called; None for anything else."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = parse_json(value)
        except ValueError:
            return None
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, str) and len(value) > 1:
        return TEXTS
    if not isinstance(first, Mapping):
        return None
    kinds = {"from": "ShareGPT", "role": "OpenAI messages", "input": "pairs of input and output"}
    return next((kind for key, kind in kinds.items() if key in first and ("output" in first or key != "input")), None)


def _given_layout(known: _Columns, columns: str) -> Layout:
    """Return the layout that `columns` says. The name of a column may hold spaces, commas and equals signs."""
    parts = re.split(r"(?:^|,)\s*(instruction|input|output|system|turns)\s*=", columns)
    if parts[0].strip() or len(parts) < 3 or len(set(parts[1::2])) < len(parts[1::2]):
        raise ParameterError(
            f"{{columns}} {columns}: expected instruction=<column>,input=<column>,output=<column>, each at most once, "
            "also system=<column>, or turns=<column> for conversations",
            "columns",
        )
    given = dict(zip(parts[1::2], parts[2::2]))
    for field, name in given.items():
        name = next((option for option in (name, name.strip(), plain_name(name)) if option in known), name)
        if name.strip() and name not in known:
            found = _listed(known.examples) or "none"
            raise ParameterError(
                f"{{columns}} {columns}: {known.path} has no column {name!r}; it has {found}", "columns"
            )
        given[field] = known[name] if name.strip() else ""
    if "turns" in given:
        kind = kind_of_turns(known.examples[given["turns"]]) if given["turns"] else None
        return Layout(kind or "Guanaco", {name: given[name] for name in ("turns", "system") if given.get(name)})
    own = {name: name for name in FIELDS if name in known.examples and name not in given.values()}
    given = {"instruction": "instruction", "output": "output"} | own | given
    return Layout("told", {name: given[name] for name in (*FIELDS, "system") if given.get(name)})


# ---- rows ----


def rows_of(row: Any, layout: Layout, pairs: str, where: str, about: str) -> tuple[list[Any], list[str]]:
    """Return the rows that a row of the file holds, by the names of Alpaca's fields where it is an object, and the
    names of its problems as in alpaca/data/report.py."""
    if layout.is_conversation:
        if not isinstance(row, Mapping):
            return [row], []
        if layout.name == "Guanaco":
            text = row.get(layout.columns["turns"])
            if not isinstance(text, str):
                raise InputError(f"{where}: {layout.columns['turns']!r} must be text, got {text!r:.60}", about)
            return parse_conversation(text, pairs)
        return pairs_of(list(_turns(row, layout, where, about)), pairs)
    if not isinstance(row, Mapping) or layout.is_plain:
        return _instances_of(row), []
    named = {field: row[column] for field, column in layout.columns.items() if column in row}
    system = named.pop("system", None)
    if isinstance(system, str) and system.strip() and isinstance(named.get("instruction"), str):
        named["instruction"] = f"{system}\n\n{named['instruction']}"
    taken = {*layout.columns.values(), *FIELDS}
    return [{**named, **{name: value for name, value in row.items() if name not in taken}}], []


def _instances_of(row: Any) -> list[Any]:
    """Return the rows of a self-instruct seed task, which has a list of instances; every other row is one itself."""
    if isinstance(row, dict) and isinstance(row.get("instances"), list):
        return [
            {"instruction": row.get("instruction"), **one} if isinstance(one, dict) else one for one in row["instances"]
        ]
    return [row]


# ---- conversations ----


class Turn(NamedTuple):
    speaker: str  # Human, Assistant, System, Tool, or anybody else
    said: str
    learned: bool = True  # an answer that may be one


def _turns(row: Mapping[str, Any], layout: Layout, where: str, about: str) -> Iterator[Turn]:
    """Yield the turns of a ShareGPT or OpenAI conversation."""
    system = row.get(layout.columns.get("system", ""))
    lists = [row.get(column) for field, column in layout.columns.items() if field != "system"]
    has_image = any(row.get(name) not in EMPTY for name in ("image", "images"))
    turns: list[Any] = []
    for value in lists:
        try:
            value = parse_json(value) if isinstance(value, str) and value.strip() else value or []
        except ValueError as error:
            raise InputError(f"{where}: the turns are no JSON ({error})", about) from error
        if not isinstance(value, list):
            raise InputError(f"{where}: expected a list of turns, got {type(value).__name__} {value!r:.60}", about)
        if layout.name == TEXTS:
            value = [{"role": ("user", "assistant")[i % 2], "content": said} for i, said in enumerate(value)]
        turns += value
    parsed = [turn for number, part in enumerate(turns) for turn in _parse(part, f"{where}: turn {number}", about)]
    if isinstance(system, str) and system.strip() and Turn("System", system.strip()) not in parsed[:1]:
        yield Turn("System", system.strip())
    for turn in parsed:
        yield turn._replace(speaker="Tool") if has_image and "<image>" in turn.said else turn


def _parse(turn: Any, where: str, about: str) -> list[Turn]:
    """Return the turn of one object; two where it has `input` and `output`."""
    keys = turn.keys() if isinstance(turn, Mapping) else set()
    if {"input", "output"} <= keys:
        turns = [{"role": "user", "content": turn["input"]}, {"role": "assistant", "content": turn["output"]}]
        return [part for one in turns for part in _parse(one, where, about)]
    who = next((turn[key] for key in ("from", "role") if key in keys), None)
    what = next((key for key in ("value", "content", "text") if key in keys), None)
    if not isinstance(who, str) or (what is None and not keys & {"tool_calls", "function_call"}):
        got = f"an object with {sorted(map(str, keys))}" if keys else f"{type(turn).__name__} {turn!r:.60}"
        raise InputError(f"{where}: expected from and value, or role and content, got {got:.200}", about)
    speaker = SPEAKERS.get(who.strip().lower(), "Tool" if who.strip().lower() in TOOLS else who)
    content = turn[what] if what else None
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        others = any(isinstance(part, Mapping) and part.get("type", "text") != "text" for part in content)
        content = None if others or not all(isinstance(text, str) for text in texts) else "\n".join(texts)
        speaker = "Tool" if content is None else speaker
    if any(turn.get(key) not in EMPTY for key in ("tool_calls", "function_call")):
        speaker = "Tool"
    if not isinstance(content, str | None):
        raise InputError(f"{where}: the text of a turn must be text, got {type(content).__name__}", about)
    return [Turn(speaker, (content or "").strip(), turn.get("weight") != 0)]


def parse_conversation(text: str, pairs: str = "first") -> tuple[list[dict[str, str]], list[str]]:
    """Return the rows of a conversation of Guanaco's, and the names of its problems."""
    before, *parts = MARKER.split(text)
    turns = [Turn(speaker, said.strip()) for speaker, said in zip(parts[::2], parts[1::2])]
    return pairs_of(turns, pairs, bool(before.strip()))


def pairs_of(turns: Sequence[Turn], pairs: str = "first", text_before: bool = False) -> tuple[list[Row], list[str]]:
    """Return the rows of one conversation, and the names of its problems as in alpaca/data/report.py.

    A pair is a human turn and the assistant turn right behind it, both with text; space around a turn is dropped. What
    the system says stands in front of the next human turn, with an empty line between, as in our chat template.

    Args:
        pairs: "first" gives a row of the first pair, by itself. "all" gives a row of every pair: `instruction` is the
            human turn, `input` all turns before it ("Human: ...\n\nAssistant: ..."), without which a question such as
            "And another?" could not be answered, `output` the assistant turn. "last" gives the last of these.
    """
    said_first, talk = "", []
    for turn in turns:
        if turn.speaker == "System":
            said_first += f"{turn.said}\n\n" if turn.said else ""
        elif turn.speaker == "Human" and turn.said:
            talk.append(turn._replace(said=said_first + turn.said))
            said_first = ""
        else:
            talk.append(turn)
    found = [i for i, (human, answer) in enumerate(zip(talk, talk[1:])) if _is_pair(human, answer)]
    starts = [i for i in found if talk[i + 1].learned]
    tools = sum(turn.speaker == "Tool" for turn in talk)
    unanswered = bool(talk) and talk[-1].speaker == "Human"
    problems = {
        "no_pair": not starts,
        "ends_on_human": unanswered,
        "unpaired_turns": text_before or bool(said_first) or len(talk) - tools > 2 * len(found) + unanswered,
        "not_text_turns": tools > 0,
        "later_pairs": pairs == "first" and len(starts) > 1,
        "earlier_pairs": pairs == "last" and len(starts) > 1,
    }
    rows = []
    for i in {"first": starts[:1], "last": starts[-1:], "all": starts}[pairs]:
        earlier = [f"{speaker}: {said}" for speaker, said, _ in talk[:i] if said and speaker != "Tool"]
        context = "" if pairs == "first" else "\n\n".join(earlier)
        rows.append({"instruction": talk[i].said, "input": context, "output": talk[i + 1].said})
    return rows, [name for name, is_so in problems.items() if is_so]


def _is_pair(human: Turn, answer: Turn) -> bool:
    return (human.speaker, answer.speaker) == ("Human", "Assistant") and bool(human.said and answer.said)


# Names that the header of a table may have
KNOWN = {*FIELDS, *QUESTIONS, *ANSWERS, *sum(OTHER_PAIRS, ()), *INPUTS, *SYSTEMS, *CONVERSATIONS, "text"}
