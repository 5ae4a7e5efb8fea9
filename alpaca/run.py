"""Checks around a run: where it continues, whether it would overwrite another, how many steps it has."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import get_last_checkpoint

from alpaca.console import say
from alpaca.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments


def find_checkpoint(args: "TrainingArguments") -> str | None:
    """The checkpoint --resume_from_checkpoint names (True: the last one in --output_dir), None for a fresh run.

    Raises:
        UsageError: there is no such checkpoint, or a fresh run would overwrite an old one.
    """
    asked = str(args.resume_from_checkpoint or "False")
    last = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
    if asked.lower() in ("true", "1", "yes"):
        if last is None:
            raise UsageError(
                f"--resume_from_checkpoint {asked}: no checkpoint-N folder in --output_dir {args.output_dir}"
            )
        return last
    if asked.lower() not in ("false", "0", "no"):
        if not (Path(asked) / "trainer_state.json").is_file():
            raise UsageError(f"--resume_from_checkpoint {asked}: no checkpoint there (trainer_state.json is missing)")
        return asked
    used = last or (Path(args.output_dir) / "trainer_state.json").exists()
    if used and not args.overwrite_output_dir:
        raise UsageError(
            f"--output_dir {args.output_dir} already holds a run; continue it with --resume_from_checkpoint True, "
            "choose another folder, or pass --overwrite_output_dir True"
        )
    return None


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
    per_epoch = -(-num_rows // rows_per_step)
    steps = args.max_steps if args.max_steps > 0 else int(-(-per_epoch * args.num_train_epochs // 1))
    say(f"{num_rows:,} rows, {rows_per_step} a step: {steps:,} optimizer steps", args.process_index)
    if args.save_strategy == "steps" and args.save_steps > steps:
        say(f"note: --save_steps {args.save_steps} exceeds the {steps} steps of this run; only its end is saved",
            args.process_index)  # fmt: skip


def check_lengths(model: "PreTrainedModel", data_module: Mapping[str, Any]) -> None:
    """Raise UsageError where a row has more tokens than the model has positions."""
    limit = getattr(model.config, "max_position_embeddings", None)
    for dataset in (data_module["train_dataset"], data_module["eval_dataset"]):
        longest = max(map(len, dataset.input_ids)) if dataset else 0
        if limit and longest > limit:
            raise UsageError(
                f"a row has {longest} tokens, but the model has {limit} positions; pass --model_max_length {limit}"
            )
