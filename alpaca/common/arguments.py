"""The command line of commands that are made of dataclasses of flags: unknown flags are refused with the closest known
name. What 2023 called otherwise is translated by the command that asks for it (alpaca/training/legacy_flags.py)."""

import dataclasses
import difflib
import json
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import transformers

from alpaca.common.errors import UsageError, names_flags


def flag(default: Any, text: str, **metadata: Any) -> Any:
    """A field of a dataclass of flags; `metadata` as HfArgumentParser takes it."""
    return dataclasses.field(default=default, metadata={"help": text, **metadata})


def enum_value(option: Any) -> str:
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

    def __init__(self, dataclass_types: Sequence[type], description: str | None, program: str, hidden: Collection[str]):
        super().__init__(
            dataclass_types,
            prog=program,
            usage=f"{program} [flags]",
            description=description,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        inherited = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
        for group in self._action_groups:  # for --help: our own flags before the hundred of transformers
            group._group_actions.sort(key=lambda action: action.dest in inherited)
            for action in group._group_actions:
                if action.dest in hidden:
                    action.help = SUPPRESS

    def error(self, message: str):
        raise UsageError(message)

    def known(self) -> list[str]:
        names = [field.name for flags in self.dataclass_types for field in dataclasses.fields(flags) if field.init]
        return ["help", *names, *(f"no_{name}" for name in names)]


def parse(
    argv: Sequence[str],
    dataclass_types: Sequence[type],
    description: str | None,
    program: str,
    translate: Callable[[list[str]], tuple[list[str], list[str]]] | None = None,
    adapt: Callable[[Namespace, FlagParser], list[str]] | None = None,
    hidden: Collection[str] = (),
) -> tuple[tuple[Any, ...], list[str]]:
    """Return one instance per dataclass and the notes to print. Unknown flags are refused before anything loads.

    Args:
        translate: makes today's command line of an older one, with a note for each change.
        adapt: changes parsed flags in place before the dataclasses see them, with a note for each change.
        hidden: flags that --help does not show.

    Raises:
        UsageError: the message names the flag, what was got and what is expected.
    """
    parser = FlagParser(dataclass_types, description, program, hidden)
    words, notes = (translate or _as_it_is)(list(argv))
    refuse_unknown_flags(words, parser.known())
    namespace = parser.parse_args(words)
    if adapt:
        notes += adapt(namespace, parser)
    try:
        parsed = parser.parse_dict(vars(namespace))
        for group in parsed:
            if hasattr(group, "check"):  # of what a command needs, and a dataclass made in Python may get later
                names_flags(type(group).check)(group)
        return parsed, notes
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(str(error)) from error


def _as_it_is(argv: list[str]) -> tuple[list[str], list[str]]:
    return join_flags(split_flags(argv)), []


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
