"""The command line of commands that are made of dataclasses of flags: unknown flags are refused with the closest known
name. What 2023 called otherwise is translated by the command that asks for it (alpaca/training/legacy_flags.py)."""

import dataclasses
import json
import math
import re
from argparse import SUPPRESS, Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

import transformers

from alpaca.common.commands import HELP, HelpFormatter, names_a_path, unknown_flag
from alpaca.common.commands import flag as flag
from alpaca.common.errors import ParameterError, UsageError, masked, names_flags
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
        self.objects: list[str] = []  # flags whose value is a JSON object
        inherited = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
        for group in self._action_groups:  # for --help: our own flags before the hundred of transformers
            group._group_actions.sort(key=lambda action: action.dest in inherited)
            for action in group._group_actions:
                if action.dest in hidden:
                    action.help = SUPPRESS
                elif action.dest == "help":
                    action.help = HELP
                if get_origin(action.type) is dict:  # argparse would call dict(text)
                    action.type = str
                    self.objects.append(action.dest)

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
    given: dict[str, list[str]] | None = None,
) -> tuple[tuple[Any, ...], list[str]]:
    """Return one instance per dataclass and the notes to print. Unknown flags are refused before anything loads.

    Args:
        translate: makes today's command line of an older one, with a note for each change.
        adapt: changes parsed flags in place before the dataclasses see them, with a note for each change.
        hidden: flags that --help does not show.
        aliases: former name of a flag -> its name, with a note for each that is used. A dataclass may have them as
            `_renamed`.
        given: gets the values of all flags of the command line, as translated, by name. With it there is --config, the
            file that has them (`run_yaml`).

    Raises:
        UsageError: the message names the flag, what was got and what is expected.
    """
    parser = FlagParser(dataclass_types, description, program, hidden)
    words = list(argv)
    if given is not None:
        parser.add_argument("--config", metavar="VALUE", help="YAML file of flags by name; the command line wins.")
        words = with_config(words)
    words, notes = translate(words) if translate else (words, [])
    former = [*(getattr(group, "_renamed", {}) for group in dataclass_types), aliases or {}]
    words, renamed = rename_flags(words, {old: new for names in former for old, new in names.items()})
    notes += renamed
    known = parser.known()
    for name, values in split_flags(words):
        if name not in known:
            raise unknown_flag(name, known, program)
        if values == [""] and names_a_path(name):
            raise UsageError(f"--{name}: needs a value")
    namespace = parser.parse_args(words)
    for name in parser.objects:
        if text := getattr(namespace, name):
            setattr(namespace, name, read_config(text, f"--{name}"))
    if given is not None:
        given.update(split_flags(words))
        del namespace.config
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


# ---- flags in a file ----

SECRET_FLAGS = {"hub_token", "push_to_hub_token"}
OF_ONE_START = {"config", "resume_from_checkpoint", "overwrite_output_dir", "local_rank"}
WRITTEN_BY_US = "# Written by train.py."
NULL = ("", "~", "null", "Null", "NULL", "None")


def with_config(argv: list[str]) -> list[str]:
    """Return the command line with the flags of its --config before those that stand there, which win."""
    flags = split_flags(argv)
    files = [values for name, values in flags if name == "config"]
    if not files:
        return argv
    if len(files) > 1 or len(files[0]) != 1 or not files[0][0]:
        raise UsageError(f"--config {' '.join(word for values in files for word in values)}: expected one file")
    own = [(name, values) for name, values in flags if name != "config"]
    names = {name for name, _ in own}
    return join_flags([flag for flag in flags_of_file(files[0][0]) if flag[0] not in names] + own)


def flags_of_file(path: str) -> list[tuple[str, list[str]]]:
    """Return the flags of a YAML file as `split_flags` does. Values are the texts that stand there: YAML itself would
    read `no` as False, and 1e-4 as a text in other places than 1.0e-4."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise UsageError(f"--config {path}: has an alias (*name), which is not taken; write the value itself")
        root = yaml.compose(text)
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"--config {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise UsageError(f"--config {path}: expected flags by name, such as learning_rate: 2e-5")
    flags: dict[str, list[str]] = {}
    for key, value in root.value if root is not None else ():
        name, where = str(key.value).replace("-", "_"), f"--config {path}: {str(key.value):.50}"
        if not isinstance(key, yaml.ScalarNode) or name in ("", "config", "help") or name[0] == "_":
            raise UsageError(f"{where}: expected the name of a flag, without --")
        if name in flags:
            raise UsageError(f"{where}: stands there twice")
        parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if not parts or (len(parts) > 1 and not all(isinstance(part, yaml.ScalarNode) for part in parts)):
            raise UsageError(f"{where}: expected a value, or a list of values")
        values = [_value_of_node(part, where) for part in parts]
        if values != [None]:
            flags[name] = ["None" if text is None else text for text in values]
    return list(flags.items())


def _value_of_node(node: Any, where: str) -> str | None:
    """Return the text of a value, JSON of a mapping, None of a null."""
    import yaml

    if isinstance(node, yaml.ScalarNode):
        return None if node.style is None and node.value in NULL else node.value
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{where}: expected a value, or a list of values")
    return json.dumps(_typed(node))


def _typed(node: Any) -> Any:
    """Return the value of a node as JSON has it: in a mapping, types are all that tells 1 from "1"."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _typed(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_typed(part) for part in node.value]
    if node.style is not None:
        return node.value
    return None if node.value in NULL else _plain(node.value)


def _plain(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?", text):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def run_yaml(given: Mapping[str, list[str]], processes: int) -> str:
    """Return a file for --config that repeats the run of the flags `given`. It holds no secrets."""
    started = "python" if processes == 1 else f"torchrun --nproc_per_node={processes}"
    lines = [
        f"{WRITTEN_BY_US} Once more: {started} train.py --config <this file> --output_dir <another folder>"
        + (f" ({processes} processes in all)" if processes > 1 else "")
    ]
    for name, values in given.items():
        if name in OF_ONE_START:
            continue
        if name in SECRET_FLAGS or any(masked(value) != value for value in values):
            lines.append(f"# {name}: is secret, and not written")
            continue
        texts = [_scalar(value) for value in values or ["True"]]
        lines.append(f"{name}: " + (texts[0] if len(texts) == 1 else "[" + ", ".join(texts) + "]"))
    return "\n".join([*lines, ""])


def _scalar(text: str) -> str:
    """Return `text` as a scalar of YAML, without quotes where it needs none."""
    import yaml

    if re.fullmatch(r"True|False|[-+]?[\d.]+([eE][-+]?\d+)?", text):
        return text
    written = yaml.safe_dump([text], allow_unicode=True, width=10**9, default_flow_style=True)
    return written.strip()[1:-1]
