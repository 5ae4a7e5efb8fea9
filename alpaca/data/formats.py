"""What a row may look like beside Alpaca's fields: a task of self-instruct with its instances, a conversation in one
text."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from alpaca.common.errors import InputError

Row = dict[str, Any]

# A turn begins wherever its marker stands: in Guanaco right behind the last character of the turn before, which may be
# "C#". Any other ### is text, and so is a marker that ends a longer row of # at the start of a line (a heading).
MARKER = re.compile(r"(?<!^#)(?<!^##)(?<!^###)### (Human|Assistant):", re.MULTILINE)


def check_is_list(read: Sequence[Any], data_path: str) -> None:
    """Raise InputError for a file that is one object which holds the rows, or something else, under a key."""
    row = read[0] if len(read) == 1 else None
    if not isinstance(row, dict) or row.keys() & {"instruction", "output"} or isinstance(row.get("text"), str):
        return
    if row and all(isinstance(value, str) for value in row.values()):
        return  # a row, of other fields
    holding = [
        name for name, value in row.items() if isinstance(value, list) and value and isinstance(value[0], Mapping)
    ]
    advice = f"; {holding[0]!r} holds one: save that list as a file" if len(holding) == 1 else ""
    keys = ", ".join(map(repr, row))
    raise InputError(
        f"{data_path}: is one object with the keys {keys:.200}; expected a list of rows{advice}", data_path
    )


def instances_of(row: Any) -> list[Row]:
    """Return the rows that a row of the file holds: a self-instruct seed task has a list of instances, every other row
    is one itself."""
    if isinstance(row, dict) and isinstance(row.get("instances"), list):
        return [
            {"instruction": row.get("instruction"), **one} if isinstance(one, dict) else one for one in row["instances"]
        ]
    return [row]


def is_conversation(row: Any) -> bool:
    """Return whether a row of a file has its turns in `text` (the Alpaca data has a `text` too, beside its fields)."""
    return isinstance(row, dict) and isinstance(row.get("text"), str) and not {"instruction", "output"} & row.keys()


def parse_conversation(text: str, pairs: str = "first") -> tuple[list[dict[str, str]], list[str]]:
    """Return the rows of one conversation, and the names of its problems as in alpaca/data/report.py.

    A pair is a human turn and the assistant turn right behind it, both with text; space around a turn is dropped.

    Args:
        pairs: "first" gives a row of the first pair, by itself. "all" gives a row of every pair: `instruction` is the
            human turn, `input` all turns before it ("Human: ...\n\nAssistant: ..."), without which a question such as
            "And another?" could not be answered, `output` the assistant turn.
    """
    before, *parts = MARKER.split(text)
    turns = [(speaker, said.strip()) for speaker, said in zip(parts[::2], parts[1::2])]
    starts = [
        i
        for i, (human, assistant) in enumerate(zip(turns, turns[1:]))
        if (human[0], assistant[0]) == ("Human", "Assistant") and human[1] and assistant[1]
    ]
    unanswered = bool(turns) and turns[-1][0] == "Human"
    found = {
        "no_pair": not starts,
        "ends_on_human": unanswered,
        "unpaired_turns": bool(before.strip()) or len(turns) > 2 * len(starts) + unanswered,
        "later_pairs": pairs == "first" and len(starts) > 1,
    }
    rows = []
    for i in starts if pairs == "all" else starts[:1]:
        earlier = [f"{speaker}: {said}" for speaker, said in turns[:i] if said] if pairs == "all" else []
        rows.append({"instruction": turns[i][1], "input": "\n\n".join(earlier), "output": turns[i + 1][1]})
    return rows, [name for name, is_so in found.items() if is_so]
