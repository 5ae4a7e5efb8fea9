"""Checks around a run: where it continues, whether it would overwrite another, how many steps it has."""

import os
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alpaca.console import say
from alpaca.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments


def find_checkpoint(args: "TrainingArguments") -> str | None:
    """The checkpoint --resume_from_checkpoint names (True: the last complete one in --output_dir), or None.

    Raises:
        UsageError: there is no such checkpoint, it lacks a file, or a fresh run would overwrite an old one.
    """
    asked, output = str(args.resume_from_checkpoint or "False"), Path(args.output_dir)
    found = sorted(output.glob("checkpoint-*"), key=lambda path: int("0" + path.name.rpartition("-")[2]), reverse=True)
    if asked.lower() in ("true", "1", "yes"):
        for folder in found:
            if not (missing := missing_from_checkpoint(folder, bool(args.fsdp))):
                return str(folder)
            say(f"note: {folder.name} is incomplete (no {', no '.join(missing)}) and skipped", args.process_index)
        raise UsageError(f"--resume_from_checkpoint {asked}: no complete checkpoint-N folder in --output_dir {output}")
    if asked.lower() not in ("false", "0", "no"):
        if missing := missing_from_checkpoint(Path(asked), bool(args.fsdp)):
            raise UsageError(
                f"--resume_from_checkpoint {asked}: is not a complete checkpoint (no {', no '.join(missing)})"
            )
        return asked
    if found and args.overwrite_output_dir:
        raise UsageError(
            f"--overwrite_output_dir: {output} holds {found[0].name}, which a later --resume_from_checkpoint True "
            "would take for one of the new run; move it away first"
        )
    if (found or (output / "trainer_state.json").exists()) and not args.overwrite_output_dir:
        raise UsageError(
            f"--output_dir {output} already holds a run; continue it with --resume_from_checkpoint True, "
            "choose another folder, or pass --overwrite_output_dir True"
        )
    return None


def missing_from_checkpoint(folder: Path, fsdp: bool) -> list[str]:
    """What a run needs to continue and `folder` lacks. trainer_state.json is written last."""
    optimizer = "optimizer_0/.metadata" if fsdp else "optimizer.pt"
    missing = [name for name in (optimizer, "scheduler.pt", "trainer_state.json") if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        missing.insert(0, "model.safetensors")
    return missing


def check_combinations(args: "TrainingArguments") -> None:
    """Raise UsageError for values that the Trainer would meet with a traceback, some of them only after hours."""
    if args.gradient_accumulation_steps < 1:
        raise UsageError(f"--gradient_accumulation_steps {args.gradient_accumulation_steps}: expected at least 1")
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise UsageError("--dataloader_persistent_workers: needs --dataloader_num_workers of at least 1")
    if args.use_liger_kernel and find_spec("liger_kernel") is None:
        raise UsageError("--use_liger_kernel: is not installed; pip install liger-kernel")
    if args.metric_for_best_model not in (None, "loss", "eval_loss"):
        raise UsageError(f"--metric_for_best_model {args.metric_for_best_model}: only eval_loss is computed")


def check_output_dir(args: "TrainingArguments") -> None:
    """Raise UsageError where nothing could be saved, before anything expensive happens."""
    try:
        os.makedirs(args.output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output_dir) as file:
            file.write(b"x")
    except OSError as error:
        raise UsageError(f"--output_dir {args.output_dir}: cannot be written ({error.strerror})") from error


def check_evaluation(args: "TrainingArguments", eval_data_path: str | None) -> None:
    """Raise UsageError where --eval_data_path and --eval_strategy are not given together."""
    wanted = args.eval_strategy != "no"
    if wanted and not eval_data_path:
        raise UsageError(f"--eval_strategy {args.eval_strategy.value}: needs rows to evaluate on, --eval_data_path")
    if eval_data_path and not wanted:
        raise UsageError(f"--eval_data_path {eval_data_path}: is never used; add --eval_strategy steps or epoch")


def warn_about_steps(args: "TrainingArguments", num_rows: int) -> None:
    """One line where the run is shorter than --save_steps, so that only its end is saved."""
    rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    per_epoch = num_rows // rows_per_step if args.dataloader_drop_last else -(-num_rows // rows_per_step)
    steps = args.max_steps if args.max_steps > 0 else int(-(-per_epoch * args.num_train_epochs // 1))
    say(f"{num_rows:,} rows, {rows_per_step} a step: {steps:,} optimizer steps", args.process_index)
    if args.save_strategy == "steps" and args.save_steps > steps:
        say(f"note: --save_steps {args.save_steps} exceeds the {steps} steps of this run; only its end is saved",
            args.process_index)  # fmt: skip


def repair_generation_config(model: "PreTrainedModel", rank: int) -> None:
    """Early Llama-2 folders set a temperature without do_sample. transformers 5 refuses to save such a model, and would
    say so only after the training."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True
        model.generation_config.validate(strict=True)
        say("note: generation_config.json has sampling values without do_sample -> saved with do_sample: true", rank)


def check_lengths(model: "PreTrainedModel", data_module: Mapping[str, Any]) -> None:
    """Raise UsageError where a row has more tokens than the model has positions."""
    limit = getattr(model.config, "max_position_embeddings", None)
    for dataset in (data_module["train_dataset"], data_module["eval_dataset"]):
        longest = max(map(len, dataset.input_ids)) if dataset else 0
        if limit and longest > limit:
            raise UsageError(
                f"a row has {longest} tokens, but the model has {limit} positions; pass --model_max_length {limit}"
            )
