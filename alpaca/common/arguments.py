"""The command line of commands that are made of dataclasses of flags: unknown flags are refused with the closest known
name. What 2023 called otherwise is translated by the command that asks for it (alpaca/training/legacy_flags.py)."""

import dataclasses
import math
from argparse import SUPPRESS, Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

from alpaca.common.commands import HELP, HelpFormatter, names_a_path, unknown_flag
from alpaca.common.commands import flag as flag
from alpaca.common.errors import ParameterError, UsageError, names_flags
from alpaca.common.files import parse_json


def enum_value(option: Any) -> str:
    """Return the value of a flag that may be one of transformers' enums or a plain text."""
    return str(getattr(option, "value", option))


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
                elif action.dest == "help":
                    action.help = HELP

    def error(self, message: str):
        raise UsageError(message)

    def known(self) -> list[str]:
        return [
            option[2:] for option in self._option_string_actions if option.startswith("--") and "-" not in option[2:]
        ]


def parse(
    argv: Sequence[str],
    dataclass_types: Sequence[type],
    description: str | None,
    program: str,
    translate: Callable[[list[str]], tuple[list[str], list[str]]] | None = None,
    adapt: Callable[[Namespace, FlagParser], list[str]] | None = None,
    hidden: Collection[str] = (),
    aliases: Mapping[str, str] | None = None,
) -> tuple[tuple[Any, ...], list[str]]:
    """Return one instance per dataclass and the notes to print. Unknown flags are refused before anything loads.

    Args:
        translate: makes today's command line of an older one, with a note for each change.
        adapt: changes parsed flags in place before the dataclasses see them, with a note for each change.
        hidden: flags that --help does not show.
        aliases: former name of a flag -> its name, with a note for each that is used. A dataclass may have them as
            `_renamed`.

    Raises:
        UsageError: the message names the flag, what was got and what is expected.
    """
    parser = FlagParser(dataclass_types, description, program, hidden)
    words, notes = translate(list(argv)) if translate else (list(argv), [])
    former = [*(getattr(group, "_renamed", {}) for group in dataclass_types), aliases or {}]
    words, renamed = rename_flags(words, {old: new for names in former for old, new in names.items()})
    notes += renamed
    for name, values in split_flags(words):
        if name not in parser.known():
            raise unknown_flag(name, parser.known(), program)
        if values == [""] and names_a_path(name):
            raise UsageError(f"--{name}: needs a value")
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
        named = isinstance(error, ParameterError) and error.naming({name: f"--{name}" for name in error.parameters})
        raise UsageError(named or str(error)) from error
    except Exception as error:  # transformers and accelerate meet values of types that they do not expect
        raise UsageError(f"a flag has a value that is not understood: {type(error).__name__}: {error}") from error


def rename_flags(argv: list[str], aliases: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return the command line with --x-y as --x_y and former names replaced, and a note for each of those."""
    flags = split_flags(argv)
    notes = [f"--{name} -> --{aliases[name]}" for name, _ in flags if name in aliases]
    return join_flags([(aliases.get(name, name), values) for name, values in flags]), notes


def split_flags(argv: list[str]) -> list[tuple[str, list[str]]]:
    """Return, of ["--a-b=1", "--c", "x", "y"], [("a_b", ["1"]), ("c", ["x", "y"])]. -1 and -1e-4 are values."""
    flags: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags.append((name.replace("-", "_"), [value] if equals else []))
        elif word == "-h":
            flags.append(("help", []))
        elif not flags:
            raise UsageError(f"expected a flag, which begins with --, got {word!r}")
        else:
            flags[-1][1].append(word)
    return flags


def join_flags(flags: list[tuple[str, list[str]]]) -> list[str]:
    """Undo `split_flags`. One value is joined by "=", so that a value may begin with a dash."""
    words = []
    for name, values in flags:
        words += [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *values]
    return words


def check_ranges(args: Any, ranges: Mapping[str, str], unused: Collection[str] = ()) -> None:
    """Raise UsageError for a number, in a dataclass of flags, that is outside of its range, or is none.

    `ranges`: names by their range, such as "[0, 1)", which a bracket bounds with the bound itself.
    """
    ranges = {name: text for text, names in ranges.items() for name in names.split()}
    for name, value in vars(args).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if math.isnan(value):
            raise UsageError(f"--{name} {value}: expected a number")
        text = "[-inf, inf]" if name in unused else ranges.get(name, "[-inf, inf]")
        low, high = (float(bound) for bound in text[1:-1].split(","))
        least = f"{low:,.0f} or more" if low == 0 else f"at least {low:,.0f}"
        least = f"more than {low:,.0f}" if text[0] == "(" else least
        if value < low or (value == low and text[0] == "("):
            raise UsageError(f"--{name} {value}: expected {least}")
        if value > high or (value == high and text[-1] == ")"):
            most = f"at most {high:,.0f}" if text[-1] == "]" else f"less than {high:,.0f}"
            raise UsageError(f"--{name} {value}: expected {f'{least}, and finite' if high == math.inf else most}")


def read_config(text: str, flag: str) -> dict[str, Any]:
    """Return a JSON object given on the command line, itself or the path of its file."""
    try:
        config = parse_json(text if text.lstrip().startswith("{") else Path(text).read_bytes())
    except (OSError, ValueError) as error:
        text = text if len(text) < 200 else f"{text[:200]} …"
        raise UsageError(f"{flag} {text}: cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise UsageError(f"{flag} {text}: expected a JSON object, got {type(config).__name__}")
    return config
