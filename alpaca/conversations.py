"""Conversations that are one text, as in OpenAssistant-Guanaco, into rows of instruction and output.

### Human: Name a colour.### Assistant: Blue.### Human: And another?### Assistant: Red.### Human: Thanks
"""

import re
from typing import Any

# A turn begins wherever its marker stands: in Guanaco right behind the last character of the turn before, which may be
# "C#". Any other ### is text, and so is a marker that ends a longer row of # at the start of a line (a heading).
MARKER = re.compile(r"(?<!^#)(?<!^##)(?<!^###)### (Human|Assistant):", re.MULTILINE)


def is_conversation(row: Any) -> bool:
    """Whether a row of a file has its turns in `text` (the Alpaca data has a `text` too, beside its fields)."""
    return isinstance(row, dict) and isinstance(row.get("text"), str) and not {"instruction", "output"} & row.keys()


def parse_conversation(text: str, pairs: str = "first") -> tuple[list[dict[str, str]], list[str]]:
    """The rows of one conversation, and the names of its problems as in alpaca/report.py.

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
