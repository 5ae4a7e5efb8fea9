"""`python program.py task --flag value …`, by fire as in 2023. Names are checked first: fire runs a task and only then
rejects a flag that it does not know."""

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import fire
from fire.decorators import SetParseFns

from alpaca.errors import UsageError


def run(program: str, tasks: Mapping[str, Callable[..., None]], argv: Sequence[str] | None = None) -> None:
    """Call one of `tasks` with the flags of the command line. A parameter of a task is a flag; one without a default is
    required.

    Raises:
        UsageError: before the task is called; the message names the word of the command line.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words) or not words:
        words = [*(word for word in words[:1] if word in tasks), "--help"]
    else:
        check(tasks, words)
    parsed = {name: SetParseFns(**_parsers(task))(task) for name, task in tasks.items()}
    fire.Fire(parsed, command=words, name=program)


def check(tasks: Mapping[str, Callable[..., None]], words: Sequence[str]) -> None:
    """Raise UsageError unless `words` are a task and flags that it has, with values of their types."""
    if words[0] not in tasks:
        raise UsageError(f"unknown task {words[0]!r}{_closest(words[0], tasks)}; expected one of: {', '.join(tasks)}")
    task = tasks[words[0]]
    parameters = inspect.signature(task).parameters
    given, unnamed = _split(words[1:])
    for name in list(given):
        if name.startswith("no") and name[2:] in parameters and given[name] == "True":
            given[name[2:]] = str(given.pop(name) == "False")  # fire's --noverbose
    for name in given:
        if name not in parameters:
            raise UsageError(f"unknown flag --{name}{_closest(name, parameters, '--')}; {words[0]} --help lists all")
    free = [name for name in parameters if name not in given]
    if len(unnamed) > len(free) or {"-", "--"} & set(unnamed):
        raise UsageError(f"expected a flag such as --{next(iter(parameters))}, got {unnamed[-1]!r}")
    given |= dict(zip(free, unnamed))
    for name, text in given.items():
        _parsers(task)[name](text)
    if missing := [f"--{p.name}" for p in parameters.values() if p.default is p.empty and p.name not in given]:
        raise UsageError(f"{words[0]} needs {', '.join(missing)}; {words[0]} --help tells more")


def _split(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """["R", "--path-diff", "D", "--test_inference"] -> {"path_diff": "D", "test_inference": "True"}, ["R"]; as fire
    does."""
    given: dict[str, str] = {}
    unnamed: list[str] = []
    name = None  # of a flag that may get the next word as its value
    for word in words:
        if match := re.match(r"--?([A-Za-z][\w-]*)(=?)(.*)", word, re.DOTALL):
            name = match[1].replace("-", "_")
            given[name] = match[3] if match[2] else "True"
            name = None if match[2] else name
        elif name is not None:
            given[name], name = word, None
        else:
            unnamed.append(word)
    return given, unnamed


def _closest(name: str, known: Mapping[str, Any], prefix: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {prefix}{close[0]}?" if close else ""


def _parsers(task: Callable) -> dict[str, Callable[[str], Any]]:
    parameters = inspect.signature(task).parameters.values()
    return {parameter.name: _parser(parameter.name, parameter.annotation) for parameter in parameters}


def _parser(name: str, hint: Any) -> Callable[[str], Any]:
    """A flag's text -> its value. fire alone makes a tuple of a path with a comma and a number of the folder 2023."""
    kinds = get_args(hint) or (hint,)

    def parse(text: str) -> Any:
        if type(None) in kinds and text == "None":
            return None
        if bool in kinds:
            if text.lower() in ("true", "1", "yes", "false", "0", "no"):
                return text.lower() in ("true", "1", "yes")
            raise UsageError(f"--{name} {text}: expected True or False")
        for kind in (int, float):
            if kind in kinds:
                try:
                    return kind(text)
                except ValueError as error:
                    if kind is float or float not in kinds:
                        raise UsageError(f"--{name} {text}: expected a number") from error
        return text

    return parse
