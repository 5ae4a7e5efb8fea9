"""The command line: help, unknown flags and what other programs call a flag, for every command; and commands that are
functions, whose parameters are their flags.

    python program.py task --flag value …        run("program.py", {"task": task})
    python -m scripts.program --flag value …     call("scripts.program", function)

Names and values are checked before any work, then fire runs the function. fire alone would run it before it rejects a
flag that it does not know, and would make a tuple of a path with a comma.
"""

import argparse
import dataclasses
import difflib
import functools
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import fire

from alpaca.common.errors import ParameterError, UsageError, names_flags

SYNONYMS = {  # what other trainers call a flag -> ours; a command has the first or a later one
    **dict.fromkeys(("lr", "learn_rate"), ("learning_rate",)),
    **dict.fromkeys(("micro_batch_size", "train_batch_size", "bs"), ("per_device_train_batch_size", "batch_size")),
    "batch_size": ("per_device_train_batch_size",),
    **dict.fromkeys(("grad_accum", "grad_accum_steps", "accumulation_steps"), ("gradient_accumulation_steps",)),
    **dict.fromkeys(("epochs", "num_epochs"), ("num_train_epochs",)),
    **dict.fromkeys(("cutoff_len", "max_seq_length", "max_seq_len", "max_length"), ("model_max_length",)),
    **dict.fromkeys(("base_model", "base_model_name"), ("model_name_or_path", "base", "path_raw", "model")),
    "base": ("path_raw",),
    "model_name_or_path": ("model", "adapter", "path_tuned"),
    **dict.fromkeys(("model_path", "model_name", "model"), ("model_name_or_path", "model", "adapter", "path_tuned")),
    **dict.fromkeys(("dataset", "dataset_name", "train_file", "train_data", "data", "input_file"), ("data_path",)),
    **dict.fromkeys(("val_file", "validation_file", "eval_file"), ("eval_data_path",)),
    **dict.fromkeys(("out", "out_dir", "output"), ("output_dir", "output_path")),
    **dict.fromkeys(("lora_rank", "lora_dim", "rank"), ("lora_r",)),
    **dict.fromkeys(("use_lora", "lora", "use_peft"), ("lora_r 8",)),
    **dict.fromkeys(("qlora", "use_qlora", "load_4bit"), ("load_in_4bit True",)),
    "load_8bit": ("load_in_8bit True",),
    "target_modules": ("lora_target_modules",),
    **dict.fromkeys(("flash_attn", "use_flash_attn"), ("attn_implementation flash_attention_2",)),
    **dict.fromkeys(("max_tokens", "max_new_token", "max_gen_len"), ("max_new_tokens", "max_tokens")),
    **dict.fromkeys(("num_workers", "parallel", "threads"), ("concurrency", "dataloader_num_workers")),
    "api_base": ("base_url",),
    "device": ("use_cpu True",),
}
ADVICE = {  # where no flag of ours does it
    "val_set_size": "--eval_size holds out rows of the data; a file of their own is --eval_data_path",
    "dry_run": "scripts.inspect_data shows the data, and --max_steps 1 tries the rest",
    "wandb_project": "set the environment variable WANDB_PROJECT, with --report_to wandb",
    **dict.fromkeys(("gpus", "num_gpus", "n_gpu", "nproc"), "start with torchrun --nproc_per_node=N"),
}


# ---- unknown flags ----


def unknown_flag(name: str, known: Iterable[str], program: str) -> UsageError:
    """Return the error for a flag that is not `known`: with what it is called here, else with the closest name."""
    names = list(known)
    for other in SYNONYMS.get(name, ()):
        if other.split()[0] in names:
            return UsageError(f"unknown flag --{name}; here it is --{other}")
    if name in ADVICE:
        return UsageError(f"unknown flag --{name}; {ADVICE[name]}")
    if close := closest(name, names):
        return UsageError(f"unknown flag --{name}; did you mean --{close}?")
    return UsageError(f"unknown flag --{name}; {program} has no flag like it")


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the name that begins with `name`, or else one that is spelt nearly like it."""
    names = list(known)
    found = [other for other in names if other.startswith(name)] or difflib.get_close_matches(name, names, n=1)
    return found[0] if found else None


# ---- commands that are functions ----


def flag(default: Any, text: str, **metadata: Any) -> Any:
    """Return a field of a dataclass of flags; `metadata` as HfArgumentParser takes it."""
    return dataclasses.field(default=default, metadata={"help": text, **metadata})


def run(program: str, tasks: Mapping[str, Callable[..., None]], argv: Sequence[str] | None = None) -> None:
    """Call one of `tasks` with the flags of the command line. A parameter of a task is a flag; one without a default is
    required. A task with **parameters gets all other flags in them, as text.

    Raises:
        UsageError: before the task is called; the message names the word of the command line.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if asks_for_help(words) or not words:
        if words and words[0] in tasks:
            print(help_of(f"{program} {words[0]}", tasks[words[0]]))
        else:
            print(help_of_tasks(program, tasks))
        return
    if words[0] not in tasks:
        close = closest(words[0], tasks)
        hint = f"; did you mean {close}?" if close else ""
        raise UsageError(f"unknown task {words[0]!r}{hint}; expected one of: {', '.join(tasks)}")
    _run(f"{program} {words[0]}", tasks[words[0]], words[1:])


def call(
    program: str,
    function: Callable[..., None],
    argv: Sequence[str] | None = None,
    description: str | None = None,
) -> None:
    """Do what `run` does, for a command that is one function. `description`: what --help says before the flags."""
    words = list(sys.argv[1:] if argv is None else argv)
    if asks_for_help(words):
        print(help_of(program, function, description))
        return
    _run(program, function, words)


def _run(program: str, function: Callable[..., None], words: Sequence[str]) -> None:
    values, command = read(program, function, words), names_flags(function)
    fire.Fire(lambda: command(**values), command=[], name=program, serialize=lambda result: None)


def read(program: str, function: Callable[..., None], words: Sequence[str]) -> dict[str, Any]:
    """Return the values of the flags in `words` by the names of the parameters of `function`."""
    signature = inspect.signature(function).parameters
    parameters = {name: p for name, p in signature.items() if p.kind is not p.VAR_KEYWORD}
    given, unnamed = _split(words, list(parameters))
    renamed = getattr(function, "_renamed", {})
    for old in renamed.keys() & given.keys():
        print(f"flag: --{old} -> --{renamed[old]}", flush=True)
    given = _today(given, renamed)
    others = {name: text if text is not None else "True" for name, text in given.items() if name not in parameters}
    if others and len(parameters) == len(signature):
        raise unknown_flag(next(iter(others)), parameters, program)
    free = [name for name, p in parameters.items() if name not in given and p.kind is not p.KEYWORD_ONLY]
    if len(unnamed) > len(free) or {"-", "--"} & set(unnamed):
        raise UsageError(f"expected a flag such as --{next(iter(parameters))}, got {unnamed[-1]!r}")
    given |= dict(zip(free, unnamed))
    if missing := [f"--{p.name}" for p in parameters.values() if p.default is p.empty and p.name not in given]:
        raise UsageError(f"{program} needs {', '.join(missing)}")
    return others | {n: _value(n, text, parameters[n].annotation) for n, text in given.items() if n in parameters}


def task(**renamed: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator of a task. A parameter whose default is an instance of a dataclass becomes its fields: flags
    for `run`, and keywords for Python.

    Args:
        renamed: older names of flags, and what each is called today; they stay accepted.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function)
        groups = {p.name: p.default for p in signature.parameters.values() if dataclasses.is_dataclass(p.default)}
        signature = signature.replace(parameters=[p for own in signature.parameters.values() for p in _spread(own)])

        @functools.wraps(function)
        def call(*args: Any, **named: Any) -> None:
            values = signature.bind(*args, **_today(named, renamed)).arguments
            for name, default in groups.items():
                given = {field.name for field in dataclasses.fields(default)} & values.keys()
                values[name] = dataclasses.replace(default, **{field: values.pop(field) for field in given})
            return names_flags(function)(**values)

        call.__signature__ = signature
        call._renamed = function._renamed = renamed
        call.__doc__ = functools.reduce(_explain, groups.values(), inspect.getdoc(function) or "")
        return call

    return decorate


def _spread(parameter: inspect.Parameter) -> list[inspect.Parameter]:
    """Return the fields of a dataclass as parameters; any other parameter as it is."""
    default = parameter.default
    if not dataclasses.is_dataclass(default):
        return [parameter]
    fields = dataclasses.fields(default)
    return [parameter.replace(name=f.name, default=getattr(default, f.name), annotation=f.type) for f in fields]


def _explain(text: str, flags: Any) -> str:
    """Return `text`, whose "Args:" go on with the fields of a dataclass."""
    own = text.partition("Args:\n")[2].partition("\n\n")[0]
    fields = [f"    {field.name}: {field.metadata['help']}" for field in dataclasses.fields(flags)]
    return text.replace(own, "\n".join([own, *fields]), 1)


def _today(given: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Return flags by the names that they have today.

    Raises:
        UsageError: a flag is given by both of its names.
    """
    for old in renamed.keys() & given.keys():
        if renamed[old] in given:
            raise UsageError(f"--{old} is another name of --{renamed[old]}; give only one of them")
    return {renamed.get(name, name): value for name, value in given.items()}


def asks_for_help(words: Sequence[str]) -> bool:
    return bool({"-h", "--help"} & set(words))


def _split(words: Sequence[str], known: list[str]) -> tuple[dict[str, str | None], list[str]]:
    """Return, of ["R", "--path-diff", "D", "--overwrite"], {"path_diff": "D", "overwrite": None} and ["R"]."""
    given: dict[str, str | None] = {}
    unnamed: list[str] = []
    name = None  # of a flag that may get the next word as its value
    for word in words:
        if match := re.fullmatch(r"--?([A-Za-z][\w-]*)(?:(=)(.*))?", word, re.DOTALL):
            name = match[1].replace("-", "_")
            initials = [flag for flag in known if flag[0] == name] if len(name) == 1 else []
            name = initials[0] if len(initials) == 1 else name  # -o, as fire's help showed it
            positive = name.removeprefix("no").removeprefix("_")
            if name not in known and positive in known and not match[2]:  # --nooverwrite, --no_overwrite
                given[positive], name = "False", None
            else:
                given[name] = match[3] if match[2] else None
                name = None if match[2] else name
        elif word.startswith("--") and len(word) > 2:
            raise UsageError(f"{word}: is no flag; expected --name value or --name=value")
        elif name is not None:
            given[name], name = word, None
        else:
            unnamed.append(word)
    return given, unnamed


def _value(name: str, text: str | None, annotation: Any) -> Any:
    """Return the text of a flag as its parameter's type; None: the flag stands alone."""
    kinds = kinds_of(annotation)
    if bool in kinds:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if str(text if text is not None else True).lower() not in words:
            raise UsageError(f"--{name} {text}: expected True or False")
        return words[str(text if text is not None else True).lower()]
    if text is None or (text == "" and names_a_path(name)):
        raise UsageError(f"--{name}: needs a value")
    if type(None) in kinds and text == "None":
        return None
    if (choices := choices_of(annotation)) and text not in choices:
        raise UsageError(f"--{name} {text}: expected one of {', '.join(choices)}")
    for kind, expected in ((int, "whole number"), (float, "number")):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError as error:
                raise UsageError(f"--{name} {text}: expected a {expected}") from error
    return Path(text) if Path in kinds else text


def names_a_path(name: str) -> bool:
    """Return whether a flag of this name takes a path or a hub id, which is never an empty text."""
    return re.search(r"(_path|_dir|^path_\w+|^adapter|^base|^model(_name(_or_path)?)?)$", name) is not None


def kinds_of(annotation: Any) -> tuple[Any, ...]:
    """Return, of int | None, (int, NoneType)."""
    return (annotation,) if get_origin(annotation) is Literal else get_args(annotation) or (annotation,)


def choices_of(annotation: Any) -> tuple[str, ...]:
    """Return, of Literal["a", "b"] | None, ("a", "b"); without a Literal nothing."""
    return next((get_args(kind) for kind in kinds_of(annotation) if get_origin(kind) is Literal), ())


def check_numbers(**parameters: int) -> None:
    """Raise ParameterError for the first that is below 1."""
    for name, value in parameters.items():
        if value < 1:
            raise ParameterError(f"{{{name}}} {value}: expected at least 1", name)


def ways_on(folder: str | Path, adapter: bool = False) -> str:
    """Return what can be done next with the model in `folder`, as three commands."""
    path = shlex.quote(str(folder))
    third = ("merge: ", f"scripts.merge_lora --adapter {path} --output_dir {shlex.quote(f'{folder}-merged')}")
    if not adapter:
        third = ("export:", f"scripts.export --model {path} --to gguf --output_dir {shlex.quote(f'{folder}-gguf')}")
    ways = (("chat:  ", f"scripts.generate --model {path} --interactive"), ("demo:  ", f"scripts.demo --model {path}"))
    return "\n".join(["next:", *(f"  {name} python -m {command}" for name, command in (*ways, third))])


# ---- help ----


HELP = "Show this page and end."


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description keeps its line breaks; a flag is shown in one spelling, its default only where it has one, and
    --no_x as "not --x"."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.dest == "help":
            return "-h, --help"
        optional = isinstance(action.const, bool) and action.nargs == "?"
        values = "" if action.nargs == 0 or optional else " " + self._format_args(action, "VALUE")
        return action.option_strings[0] + values

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.nargs == 0 and action.default is False:
            return f"Not --{action.dest}."
        if action.default is None or action.default is False or action.dest == "help":
            return action.help
        return super()._get_help_string(action)


def help_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser that only formats help."""
    parser = argparse.ArgumentParser(
        program, usage=f"{program} [flags]", description=description, formatter_class=HelpFormatter, add_help=False
    )
    parser.add_argument("-h", "--help", action="help", help=HELP)
    return parser


def help_of(program: str, function: Callable[..., None], description: str | None = None) -> str:
    """Return the help of a command: the function's docstring, and its parameters as flags."""
    doc = inspect.getdoc(function) or ""
    sections = re.split(r"^(?=Args:|Raises:|Returns:)", doc, flags=re.MULTILINE)
    texts = _argument_texts(next((section for section in sections if section.startswith("Args:")), ""))
    parser = help_parser(program, description or sections[0].strip())
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            parser.epilog = texts.get(f"**{name}") or texts.get(name)
            continue
        default, text = parameter.default, texts.get(name, "")
        if default is parameter.empty:
            default, text = None, f"{text} Required.".strip()
        options: dict[str, Any] = {"help": text.replace("%", "%%"), "default": default}
        if bool in kinds_of(parameter.annotation):
            options |= dict(nargs="?", const=True)
        elif choices := choices_of(parameter.annotation):
            options["metavar"] = "{" + ",".join(choices) + "}"
        parser.add_argument(f"--{name}", **options)
    return parser.format_help().rstrip()


def help_of_tasks(program: str, tasks: Mapping[str, Callable[..., None]]) -> str:
    """Return the help of a program of several tasks: the first sentence of each."""
    lines = [f"usage: {program} task [flags]", "", "tasks:"]
    for name, task in tasks.items():
        first = " ".join((inspect.getdoc(task) or "").partition("\n\n")[0].split())
        lines += [f"  {name}", f"      {first.partition('. ')[0].rstrip('.')}."]
    return "\n".join([*lines, "", f"{program} task --help shows the flags of a task."])


def _argument_texts(section: str) -> dict[str, str]:
    """Return {parameter: sentence} of an "Args:" section of a docstring."""
    texts = {}
    for match in re.finditer(r"^    (\*{0,2}\w+): (.*(?:\n {8,}.*)*)", section, re.MULTILINE):
        text = " ".join(match[2].split())
        begin = text[:1] if re.match(r"\w+(,| or) ", text) else text[:1].upper()  # "cuda or cpu" are values
        texts[match[1]] = begin + text[1:] + ("" if text.endswith((".", "?", ")")) else ".")
    return texts
