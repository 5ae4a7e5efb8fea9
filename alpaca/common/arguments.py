"""The command line: 2023's spellings translated, unknown flags refused with the closest known name, and what this
machine cannot do replaced by what it can. Every change is one line for the log, old -> new."""

import dataclasses
import difflib
import json
import os
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from alpaca.common.errors import UsageError
from alpaca.models.fsdp import without_prefix

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "no_cuda": "use_cpu",
}
DROPPED = {
    "save_safetensors": "checkpoints are always written as safetensors",
    "fp16_backend": "torch's own mixed precision is used",
    "half_precision_backend": "torch's own mixed precision is used",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR instead",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
}
WITHOUT_EFFECT = {  # flags of transformers for what is done otherwise here; accepted, noted, left at their defaults
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "train.py trains, and evaluates by --eval_strategy"),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), "evaluation computes as training does"),
    **dict.fromkeys(
        "prediction_loss_only eval_accumulation_steps batch_eval_metrics include_for_metrics eval_do_concat_batches "
        "eval_use_gather_object".split(),
        "evaluation computes a loss, and keeps no predictions",
    ),
    **dict.fromkeys(
        ("remove_unused_columns", "label_names", "length_column_name"), "rows are tokens and labels, of known lengths"
    ),
}
FSDP_WORDS = ("full_shard", "shard_grad_op", "hybrid_shard", "no_shard", "auto_wrap", "offload")


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


def _reset_without_effect(flags: Namespace, parser: FlagParser) -> list[str]:
    """To their defaults, in place: --bf16_full_eval, for one, would tell DeepSpeed to train in bfloat16."""
    notes = []
    for name, reason in WITHOUT_EFFECT.items():
        value, default = getattr(flags, name, None), parser.get_default(name)
        if value != default:
            setattr(flags, name, default)
            text = " ".join(value) if isinstance(value, list) else value
            notes.append(f"--{name} {text} -> without effect: {reason}")
    return notes


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


def translate_legacy_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """2023's command line -> (today's command line, one note per translation).

    Raises:
        UsageError: a legacy value that has no meaning, such as --fsdp "half_shard".
    """
    kept: list[tuple[str, list[str]]] = []
    notes: list[str] = []
    fsdp_words: list[str] | None = None
    fsdp_extra: dict[str, object] = {}
    for name, values in split_flags(argv):
        text = " ".join(values)
        if name in RENAMED:
            kept.append((RENAMED[name], values))
            notes.append(f"--{name} {text} -> --{RENAMED[name]} {text}".replace("  ", " "))
        elif name in DROPPED:
            notes.append(f"--{name} {text} -> dropped: {DROPPED[name]}".replace("  ", " "))
        elif name == "warmup_ratio":
            kept.append(("warmup_steps", [_ratio(name, text)]))
            notes.append(f"--warmup_ratio {text} -> --warmup_steps {kept[-1][1][0]} (a share of all steps)")
        elif name in ("group_by_length", "adafactor"):
            if text.lower() not in ("false", "0", "no"):
                new = ("train_sampling_strategy", "group_by_length") if name == "group_by_length" else ("optim", name)
                kept.append((new[0], [new[1]]))
                notes.append(f"--{name} -> --{new[0]} {new[1]}")
        elif name == "fsdp" and text.lower() not in ("", "true", "false"):
            fsdp_words = _fsdp_words(text)
        elif name in ("fsdp_transformer_layer_cls_to_wrap", "fsdp_min_num_params"):
            if name == "fsdp_min_num_params" and not text.isdigit():
                raise UsageError(f"--{name} {text}: expected a number of parameters")
            fsdp_extra[name.removeprefix("fsdp_")] = text if name.endswith("wrap") else int(text)
        elif name == "fsdp" and text.lower() == "false":
            kept = [flag for flag in kept if flag[0] != "fsdp"]
        else:
            kept.append((name, values))
    if fsdp_words is not None or fsdp_extra:
        kept, note = _translate_fsdp(kept, fsdp_words, fsdp_extra)
        notes.append(note)
    return join_flags(kept), notes


def _ratio(name: str, text: str) -> str:
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio < 1:
        raise UsageError(f"--{name} {text}: expected a share, 0 <= ratio < 1; for a number use --warmup_steps")
    return text


def _fsdp_words(text: str) -> list[str]:
    words = text.lower().replace(",", " ").split()
    if unknown := [word for word in words if word not in FSDP_WORDS]:
        raise UsageError(f'--fsdp "{text}": unknown word {unknown[0]!r}; expected some of: {" ".join(FSDP_WORDS)}')
    if sum(word in words for word in FSDP_WORDS[:4]) != 1:
        raise UsageError(f'--fsdp "{text}": expected exactly one of {", ".join(FSDP_WORDS[:4])}')
    return words


def _translate_fsdp(
    flags: list[tuple[str, list[str]]], words: list[str] | None, extra: dict[str, object]
) -> tuple[list[tuple[str, list[str]]], str]:
    """Fold --fsdp "full_shard auto_wrap" and its companion flags into --fsdp True --fsdp_config '{...}'."""
    old = f'--fsdp "{" ".join(words)}"' if words is not None else ""
    old = " ".join([old, *(f"--fsdp_{name} {value}" for name, value in extra.items())]).strip()
    if words is None and not any(name == "fsdp" and values != [""] for name, values in flags):
        return flags, f"{old} -> dropped: there is no --fsdp"
    if words is not None and "no_shard" in words:
        return [flag for flag in flags if flag[0] != "fsdp_config"], f"{old} -> every rank holds the whole model (DDP)"
    given = [values[0] for name, values in flags if name == "fsdp_config" and values]
    config = without_prefix(read_config(given[-1], "--fsdp_config")) if given else {}
    if words is not None:
        config["reshard_after_forward"] = "shard_grad_op" not in words
        if "hybrid_shard" in words:
            config["hybrid_shard"] = True
        config["auto_wrap_policy"] = "TRANSFORMER_BASED_WRAP" if "auto_wrap" in words else "NO_WRAP"
        config["cpu_offload"] = "offload" in words
        flags = [flag for flag in flags if flag[0] != "fsdp"] + [("fsdp", ["True"])]
    if "min_num_params" in extra and "transformer_layer_cls_to_wrap" not in extra:
        config["auto_wrap_policy"] = "SIZE_BASED_WRAP"
    config.update(extra)
    flags = [flag for flag in flags if flag[0] != "fsdp_config"] + [("fsdp_config", [json.dumps(config)])]
    return flags, f"{old} -> --fsdp True --fsdp_config '{json.dumps(config)}'"


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


def adapt_to_hardware(flags: Namespace) -> list[str]:
    """Replace in place what this machine cannot do, before TrainingArguments would refuse it; one note per change.

    No GPU: CPU with tf32 off, bf16 as CPU autocast. Before Ampere: tf32 off, bf16 -> fp16. One process where sharding
    needs several: no FSDP.
    """
    import torch

    notes = []
    if not flags.use_cpu and not torch.accelerator.is_available():
        flags.use_cpu = True
        notes.append("no GPU found -> training on the CPU")
    if flags.use_cpu:
        notes += _disable(flags, "tf32", "there is no tf32 on a CPU; matrix products stay float32")
        notes += _disable(flags, "fp16", "the CPU trains in float32; --bf16 gives CPU autocast")
        if flags.bf16:
            notes.append("--bf16 -> bfloat16 arithmetic on the CPU, float32 weights")
    elif torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        name = torch.cuda.get_device_name()
        if capability < (8, 0):
            notes += _disable(flags, "tf32", f"{name} is older than Ampere and has no tf32")
            if flags.bf16:
                flags.bf16, flags.fp16 = False, True
                notes.append(f"--bf16 -> --fp16: {name} is older than Ampere and has no bfloat16")
    launched = "LOCAL_RANK" in os.environ
    world_size, local = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if not flags.use_cpu and torch.cuda.is_available() and local > torch.cuda.device_count():
        raise UsageError(
            f"--nproc_per_node={local}: this machine has {torch.cuda.device_count()} GPUs, one process each"
        )
    if flags.use_cpu and flags.fsdp and torch.cuda.is_available():
        raise UsageError("--use_cpu with --fsdp: hide the GPUs from torch too, with CUDA_VISIBLE_DEVICES= (empty)")
    if flags.fsdp_config and not flags.fsdp:
        raise UsageError("--fsdp_config: has no effect without --fsdp")
    for name in ("load_in_8bit", "load_in_4bit"):
        if flags.fsdp and getattr(flags, name, False):
            raise UsageError(f"--{name} and --fsdp: quantized weights cannot be sharded here. Without --fsdp every GPU "
                             f"holds them whole; without --{name} the base is sharded")  # fmt: skip
    if flags.fsdp and (not launched or (flags.use_cpu and world_size == 1)):
        flags.fsdp = None
        notes.append("--fsdp -> off: one process has nobody to shard with; start with torchrun --nproc_per_node=N")
    return notes


def _disable(flags: Namespace, name: str, reason: str) -> list[str]:
    wanted = getattr(flags, name)
    if wanted:
        setattr(flags, name, None if name == "tf32" else False)
    return [f"--{name} -> off: {reason}"] if wanted else []
