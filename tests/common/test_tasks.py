"""A task of a command: a dataclass of flags in its signature, and older names of flags."""

import dataclasses

import pytest

from alpaca.common import commands
from alpaca.common.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Drawing:
    temperature: float | None = commands.flag(0.7, "How wildly.")
    top_p: float = commands.flag(1.0, "How widely.")


NARROW = Drawing(top_p=0.9)


@commands.task(temp="temperature")
def draw(path: str, drawing: Drawing = NARROW, count: int = 3) -> None:
    """Draw.

    Args:
        path: what to draw.
        count: how often.

    Raises:
        UsageError: never.
    """
    drawn.append((path, drawing, count))


drawn = []


@pytest.mark.parametrize(
    "words, expected",
    [
        (["a"], ("a", NARROW, 3)),
        (["--path=a", "--temp", "1", "--count=4"], ("a", Drawing(1.0, 0.9), 4)),
        (["a", "--temperature", "None", "--top_p=0.5"], ("a", Drawing(None, 0.5), 3)),
    ],
)
def test_a_dataclass_is_its_fields_as_flags(words, expected):
    commands.run("program", {"draw": draw}, ["draw", *words])
    assert drawn.pop() == expected


def test_its_fields_are_keywords_for_python_too():
    draw("a", temp=1.0, top_p=0.5)
    assert drawn.pop() == ("a", Drawing(1.0, 0.5), 3)


@pytest.mark.parametrize(
    "words, message",
    [
        (["a", "--temperature", "hot"], "--temperature hot: expected a number"),
        (["a", "--top", "1"], "unknown flag --top; did you mean --top_p"),
        (["a", "--temp=1", "--temperature=1"], "--temp is another name of --temperature"),
    ],
)
def test_they_are_checked_before_the_task_is_called(words, message):
    with pytest.raises(UsageError, match=message):
        commands.run("program", {"draw": draw}, ["draw", *words])


def test_the_help_explains_them():
    entries = draw.__doc__.partition("Args:\n")[2].partition("\n\nRaises:")[0].split("\n")
    explained = ["path: what to draw.", "count: how often.", "temperature: How wildly.", "top_p: How widely."]
    assert [entry.strip() for entry in entries] == explained
