"""`python program.py task --flag value …` with the words that fire took in 2023; fire still writes the help.

fire itself would run a task before it rejects a flag that it does not know, and make a tuple of a path with a comma.
A command with a few flags and no task has a Parser.
"""

import argparse
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

import fire

from alpaca.common.errors import UsageError, names_flags


def run(program: str, tasks: Mapping[str, Callable[..., None]], argv: Sequence[str] | None = None) -> None:
    """Call one of `tasks` with the flags of the command line. A parameter of a task is a flag; one without a default is
    required. A task with **parameters gets all other flags in them, as text.

    Raises:
        UsageError: before the task is called; the message names the word of the command line.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words) or not words:
        help = [*(word for word in words[:1] if word in tasks), "--help"]
        fire.Fire(dict(tasks), command=help, name=program)
    elif words[0] not in tasks:
        raise UsageError(f"unknown task {words[0]!r}{_closest(words[0], tasks)}; expected one of: {', '.join(tasks)}")
    else:
        names_flags(tasks[words[0]])(**read(tasks[words[0]], words))


def read(task: Callable[..., None], words: Sequence[str]) -> dict[str, Any]:
    """The values of the flags in `words`, the first of which names the task."""
    signature = inspect.signature(task).parameters
    parameters = {name: p for name, p in signature.items() if p.kind is not p.VAR_KEYWORD}
    given, unnamed = _split(words[1:], list(parameters))
    others = {name: text if text is not None else "True" for name, text in given.items() if name not in parameters}
    for name in others:
        if len(parameters) == len(signature):
            raise UsageError(f"unknown flag --{name}{_closest(name, parameters, '--')}; {words[0]} --help lists all")
    free = [name for name in parameters if name not in given]
    if len(unnamed) > len(free) or {"-", "--"} & set(unnamed):
        raise UsageError(f"expected a flag such as --{next(iter(parameters))}, got {unnamed[-1]!r}")
    given |= dict(zip(free, unnamed))
    if missing := [f"--{p.name}" for p in parameters.values() if p.default is p.empty and p.name not in given]:
        raise UsageError(f"{words[0]} needs {', '.join(missing)}; {words[0]} --help tells more")
    return others | {n: _value(n, text, parameters[n].annotation) for n, text in given.items() if n in parameters}


def _split(words: Sequence[str], known: list[str]) -> tuple[dict[str, str | None], list[str]]:
    """["R", "--path-diff", "D", "--overwrite"] -> {"path_diff": "D", "overwrite": None}, ["R"]"""
    given: dict[str, str | None] = {}
    unnamed: list[str] = []
    name = None  # of a flag that may get the next word as its value
    for word in words:
        if match := re.match(r"--?([A-Za-z][\w-]*)(=?)(.*)", word, re.DOTALL):
            name = match[1].replace("-", "_")
            initials = [flag for flag in known if flag[0] == name] if len(name) == 1 else []
            name = initials[0] if len(initials) == 1 else name  # -o, as the help shows it
            if name not in known and name.removeprefix("no") in known and not match[2]:  # --nooverwrite
                given[name[2:]], name = "False", None
            else:
                given[name] = match[3] if match[2] else None
                name = None if match[2] else name
        elif name is not None:
            given[name], name = word, None
        else:
            unnamed.append(word)
    return given, unnamed


def _closest(name: str, known: Iterable[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {prefix}{close[0]}?" if close else ""


def _value(name: str, text: str | None, annotation: Any) -> Any:
    """The text of a flag as its parameter's type; None: the flag stands alone."""
    kinds = get_args(annotation) or (annotation,)
    if bool in kinds:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if str(text if text is not None else True).lower() not in words:
            raise UsageError(f"--{name} {text}: expected True or False")
        return words[str(text if text is not None else True).lower()]
    if text is None:
        raise UsageError(f"--{name}: needs a value")
    if type(None) in kinds and text == "None":
        return None
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError as error:
                raise UsageError(f"--{name} {text}: expected a {'whole ' * (kind is int)}number") from error
    return text


class Parser(argparse.ArgumentParser):
    """argparse, which guesses no abbreviated flag, and names one that it does not know before one that is missing."""

    def __init__(self, description: str | None, program: str | None = None):
        super().__init__(
            program, description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        known = self._option_string_actions
        for name in (word.partition("=")[0] for word in (sys.argv[1:] if args is None else args)):
            if name.startswith("--") and name not in known:
                self.error(f"unknown flag {name}{_closest(name, known)}")
        return super().parse_args(args, namespace)


def check_numbers(**flags: int) -> None:
    """Raise UsageError for the first that is below 1."""
    for name, value in flags.items():
        if value < 1:
            raise UsageError(f"--{name} {value}: expected at least 1")
