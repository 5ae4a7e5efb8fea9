"""The command line: 2023's spellings translated, unknown flags refused with the closest known name, and what this
machine cannot do replaced by what it can. Every change is one line for the log, old -> new."""

import dataclasses
import difflib
import json
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from alpaca.common.errors import UsageError
from alpaca.training.legacy_flags import (
    DROPPED,
    WITHOUT_EFFECT,
    _reset_without_effect,
    adapt_to_hardware,
    translate_legacy_flags,
)


def flag(default: Any, text: str, **metadata: Any) -> Any:
    """A field of a dataclass of flags; `metadata` as HfArgumentParser takes it."""
    return dataclasses.field(default=default, metadata={"help": text, **metadata})


def spelled(option: Any) -> str:
    """The value of a flag that may be one of transformers' enums or a plain text."""
    return str(getattr(option, "value", option))


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """The description keeps its line breaks; a flag is shown in one spelling, its default only where it has one, and
    --no_x as "not --x"."""

    def _format_action_invocation(self, action: Action) -> str:
        values = "" if action.nargs == 0 else " " + self._format_args(action, "VALUE")
        return (action.option_strings[-1] if action.dest == "help" else action.option_strings[0]) + values

    def _get_help_string(self, action: Action) -> str | None:
        if action.nargs == 0 and action.default is False:
            return f"not --{action.dest}"
        return action.help if action.default is None else super()._get_help_string(action)


class FlagParser(transformers.HfArgumentParser):
    """Errors are raised, not printed under pages of usage; abbreviated flags are not guessed."""

    def __init__(self, dataclass_types: Sequence[type], description: str | None, program: str):
        super().__init__(dataclass_types, prog=program, usage=f"{program} [flags]", description=description,
                         formatter_class=HelpFormatter, allow_abbrev=False)  # fmt: skip
        inherited = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
        for group in self._action_groups:  # for --help: our own flags before the hundred of transformers
            group._group_actions.sort(key=lambda action: action.dest in inherited)
            for action in group._group_actions:
                if action.dest in inherited & {*DROPPED, *WITHOUT_EFFECT}:
                    action.help = SUPPRESS

    def error(self, message: str):
        raise UsageError(message)

    def known(self) -> list[str]:
        names = [field.name for flags in self.dataclass_types for field in dataclasses.fields(flags) if field.init]
        return ["help", *names, *(f"no_{name}" for name in names)]


def parse(
    argv: Sequence[str], dataclass_types: Sequence[type], description: str | None = None, program: str = "train.py"
) -> tuple[tuple[Any, ...], list[str]]:
    """One instance per dataclass, and the notes to print: 2023's flags translated, unknown ones refused before anything
    loads, the rest fitted to this machine.

    Raises:
        UsageError: the message names the flag, what was got and what is expected.
    """
    parser = FlagParser(dataclass_types, description, program)
    words, notes = translate_legacy_flags(list(argv))
    refuse_unknown_flags(words, parser.known())
    namespace = parser.parse_args(words)
    if issubclass(dataclass_types[-1], transformers.TrainingArguments):
        notes += _reset_without_effect(namespace, parser) + adapt_to_hardware(namespace)
    try:
        parsed = parser.parse_dict(vars(namespace))
        for group in parsed:
            if hasattr(group, "check"):  # of what a command needs, and a dataclass made in Python may get later
                group.check()
        return parsed, notes
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(str(error)) from error


def split_flags(argv: list[str]) -> list[tuple[str, list[str]]]:
    """["--a-b=1", "--c", "x", "y"] -> [("a_b", ["1"]), ("c", ["x", "y"])]. A value such as -1 or -1e-4 is a value."""
    flags: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags.append((name.replace("-", "_"), [value] if equals else []))
        elif word == "-h":
            flags.append(("help", []))
        elif not flags:
            raise UsageError(f"expected a flag such as --data_path, got {word!r}")
        else:
            flags[-1][1].append(word)
    return flags


def join_flags(flags: list[tuple[str, list[str]]]) -> list[str]:
    """The inverse of `split_flags`. One value is joined by "=", so that a value may begin with a dash."""
    words = []
    for name, values in flags:
        words += [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *values]
    return words


def read_config(text: str, flag: str) -> dict[str, Any]:
    """A JSON object given on the command line, itself or the path of its file."""
    try:
        config = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"{flag} {text}: cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise UsageError(f"{flag} {text}: expected a JSON object, got {type(config).__name__}")
    return config


def refuse_unknown_flags(argv: list[str], known: list[str]) -> None:
    """Raise UsageError for the first flag whose name is not in `known`, with the closest name that is."""
    for name, _ in split_flags(argv):
        if name not in known:
            close = [flag for flag in known if flag.startswith(name)] or difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean --{close[0]}?" if close else "; --help lists all"
            raise UsageError(f"unknown flag --{name}{hint}")
