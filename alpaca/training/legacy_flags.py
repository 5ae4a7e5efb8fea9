"""2023's command line on today's stack: its spellings translated, and what this machine cannot do replaced by what it
can. Every change is one line for the log, old -> new."""

import json
import os
from argparse import Namespace

from alpaca.common.arguments import FlagParser, join_flags, read_config, split_flags
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
    "enable_jit_checkpoint": "SIGTERM and Ctrl-C always leave a checkpoint",
    **dict.fromkeys(
        ("remove_unused_columns", "label_names", "length_column_name"), "rows are tokens and labels, of known lengths"
    ),
}
LORA_RATE = "2e-4"
HIDDEN = {*DROPPED, *WITHOUT_EFFECT}  # from --help
FSDP_WORDS = ("full_shard", "shard_grad_op", "hybrid_shard", "no_shard", "auto_wrap", "offload")


def adapt(flags: Namespace, parser: FlagParser) -> list[str]:
    """Fit parsed flags, in place, to what has an effect here and to this machine. Return a note for each change."""
    if "," in (flags.report_to or ""):
        flags.report_to = flags.report_to.split(",")
    return _reset_without_effect(flags, parser) + adapt_to_hardware(flags)


def _reset_without_effect(flags: Namespace, parser: FlagParser) -> list[str]:
    """Set flags without effect to their defaults, in place: --bf16_full_eval, for one, would tell DeepSpeed to train in
    bfloat16."""
    notes = []
    for name, reason in WITHOUT_EFFECT.items():
        value, default = getattr(flags, name, None), parser.get_default(name)
        if value != default:
            setattr(flags, name, default)
            text = " ".join(value) if isinstance(value, list) else value
            notes.append(f"--{name} {text} -> without effect: {reason}")
    return notes


def translate_legacy_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return today's command line for 2023's, and one note per translation.

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
        elif name == "report_to" and values:  # its parser takes one word
            kept.append((name, [",".join(text.replace(",", " ").split())]))
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
    names = {name for name, _ in kept}
    if "lora_r" in names and "learning_rate" not in names:
        kept.append(("learning_rate", [LORA_RATE]))
        notes.append(f"--lora_r without --learning_rate -> --learning_rate {LORA_RATE}; 5e-5 is for all weights")
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
            raise UsageError(
                f"--{name} and --fsdp: quantized weights cannot be sharded here. Without --fsdp every GPU "
                f"holds them whole; without --{name} the base is sharded"
            )
    if flags.fsdp and (not launched or (flags.use_cpu and world_size == 1)):
        flags.fsdp = None
        notes.append("--fsdp -> off: FSDP needs at least two processes; start with torchrun --nproc_per_node=N")
    return notes


def _disable(flags: Namespace, name: str, reason: str) -> list[str]:
    wanted = getattr(flags, name)
    if wanted:
        setattr(flags, name, None if name == "tf32" else False)
    return [f"--{name} -> off: {reason}"] if wanted else []
