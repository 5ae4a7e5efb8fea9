"""Checkpoints that are whole or not there: where a run continues, how one is written, what makes one unfit.

A checkpoint is written as saving-checkpoint-N, every rank its part. When all are done, rank 0 lists the files and their
sizes in a manifest, flushes them to the disk and renames the folder to checkpoint-N; only then do older ones go. A kill
at any moment, or a full disk, leaves the previous checkpoint as it was.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainerState

from alpaca.common.distributed import barrier, print_rank0
from alpaca.common.errors import UsageError, format_bytes
from alpaca.common.files import atomic_write, free_bytes
from alpaca.weights.provenance import MANIFEST, _read_json, holds_a_model, read_record

if TYPE_CHECKING:
    from transformers import TrainingArguments
MANIFEST_TYPES = {"step": int, "contract": dict, "files": dict}
OPTIMIZERS = ("optimizer.pt", "optimizer_0/.metadata", "latest")  # one process or DDP; FSDP; DeepSpeed


# ---- finding one ----


def find_checkpoint(args: "TrainingArguments") -> str | None:
    """Return the checkpoint that --resume_from_checkpoint names (True: the last complete one in --output_dir), or None
    to start from the beginning: not asked for, or the run was stopped before its first checkpoint.

    Raises:
        UsageError: the named checkpoint is not complete, or what stands in --output_dir would be overwritten.
    """
    asked, output = str(args.resume_from_checkpoint or "False"), Path(args.output_dir)
    if asked.lower() in ("false", "0", "no"):
        _check_that_nothing_is_overwritten(args, output)
        return None
    if args.overwrite_output_dir:
        raise UsageError("--overwrite_output_dir and --resume_from_checkpoint: one starts anew, the other continues")
    if asked.lower() in ("true", "1", "yes"):
        return _last_complete(output, args.process_index)
    if wrong := find_problems(Path(asked)):
        raise UsageError(f"--resume_from_checkpoint {asked}: is not a complete checkpoint ({', '.join(wrong)})")
    if Path(asked).resolve().parent != output.resolve():
        _check_that_nothing_is_overwritten(args, output)
    return asked


def _check_that_nothing_is_overwritten(args: "TrainingArguments", output: Path) -> None:
    """Raise UsageError where a run that does not continue the one in `output` would overwrite it. A finished one is
    compared later, by resume.py."""
    found, record = _numbered(output), read_record(output)
    if found and args.overwrite_output_dir:
        raise UsageError(
            f"--overwrite_output_dir: {output} holds {found[0].name}, which a later --resume_from_checkpoint True "
            "would take for one of the new run; move it away first"
        )
    unfinished = found and not (record and record["finished"])
    if (unfinished or (record is None and holds_a_model(output))) and not args.overwrite_output_dir:
        move = "move its checkpoints away and " if found else ""
        raise UsageError(
            f"--output_dir {output} already holds a run; continue it with --resume_from_checkpoint True, choose "
            f"another folder, or {move}pass --overwrite_output_dir True"
        )


def _last_complete(output: Path, rank: int) -> str | None:
    """Return the last complete checkpoint. A kill leaves no checkpoint-N that is not whole: where there are only such,
    they are somebody's, or damaged."""
    wrong = {folder: find_problems(folder) for folder in _numbered(output)}
    skipped = [f"{folder.name} is incomplete ({', '.join(why)})" for folder, why in wrong.items() if why]
    complete = [folder for folder, why in wrong.items() if not why]
    if skipped and not complete:
        raise UsageError(
            f"--resume_from_checkpoint True: no complete checkpoint in --output_dir {output}: {'; '.join(skipped)}. "
            "To start from the beginning, move them away"
        )
    if not complete and read_record(output) is None and holds_a_model(output):
        raise UsageError(
            f"--resume_from_checkpoint True: --output_dir {output} holds a model but no checkpoint to continue from; "
            "choose another folder, or train from the start with --overwrite_output_dir True alone"
        )
    if not complete:
        print_rank0(f"note: --resume_from_checkpoint True: no checkpoint in {output} yet -> from the beginning", rank)
        return None
    for line in skipped[: list(wrong).index(complete[0])]:
        print_rank0(f"note: {line} and skipped", rank)
    return str(complete[0])


def _numbered(output: Path) -> list[Path]:
    """Return the folders checkpoint-N, the highest N first."""
    found = [folder for folder in output.glob("checkpoint-*") if folder.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True)


def find_problems(folder: Path) -> list[str]:
    """Return why a run cannot continue from `folder`; [] for a complete checkpoint."""
    manifest = _read_json(folder / MANIFEST)
    if manifest is None or not all(isinstance(manifest.get(name), kind) for name, kind in MANIFEST_TYPES.items()):
        return [f"no readable {MANIFEST}, which is written last"]
    if not is_run_fingerprint(manifest["contract"]):
        return [f"{MANIFEST} does not say which run it is of"]
    wrong = []
    for name, size in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            wrong.append(f"no {name}")
        elif file.stat().st_size != size:
            expected = f"{size:,}" if isinstance(size, int) else size
            wrong.append(f"{name} has {file.stat().st_size:,} of {expected} bytes")
        elif not os.access(file, os.R_OK):
            wrong.append(f"{name} cannot be read")
    if not wrong and not _is_state(_read_json(folder / "trainer_state.json"), manifest["step"]):
        wrong.append("trainer_state.json cannot be read")
    if not wrong and not any(name in manifest["files"] for name in OPTIMIZERS):
        wrong.append("no optimizer: it was saved with --save_only_model")
    return wrong


def is_run_fingerprint(value: Any) -> bool:
    """Return whether `value`, of somebody's JSON, has the parts that resume.py compares."""
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(kind), dict) for kind in ("fixed", "free", "rounding"))
        and isinstance(value.get("tokens"), str)
    )


def _is_state(state: dict[str, Any] | None, step: int) -> bool:
    """Return whether the Trainer can go on from `state`, which is of `step`."""
    if state is None or state.get("global_step") != step:
        return False
    try:
        TrainerState(**state)
    except Exception:  # keys and values of any type
        return False
    numbers = all(isinstance(state.get(name, 0), int | float) for name in ("epoch", "max_steps", "total_flos"))
    logs = state.get("log_history") or []
    return numbers and isinstance(logs, list) and all(isinstance(entry, dict) and "step" in entry for entry in logs)


# ---- writing one ----


@contextmanager
def atomic_checkpoint_dir(output: Path, step: int, run_fingerprint: dict[str, Any], rank: int) -> Iterator[str]:
    """Give the folder to write a checkpoint into. It becomes checkpoint-`step` when all ranks have left the block.

    Raises:
        UsageError: it could not be written (a full disk, a quota); what was written of it is removed.
    """
    folder = output / f"saving-checkpoint-{step}"
    try:
        if rank == 0:
            _clear_leftovers(output)
            folder.mkdir(parents=True)
        barrier()
        yield str(folder)
        barrier()
        if rank == 0:
            _write_manifest(folder, step, run_fingerprint)
            _rename(folder, output / f"checkpoint-{step}")
    except BaseException as error:  # safetensors, torch, and CheckpointException, which is no Exception
        if not is_about_space(error):
            raise
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        kept = [found.name for found in _numbered(output) if not find_problems(found)]
        hint = f"{kept[0]} is untouched" if kept else "there is no earlier checkpoint"
        room = format_bytes(free_bytes(output))
        raise UsageError(
            f"checkpoint-{step} could not be saved in {output}: {_reason(error)} ({room} are free); "
            f"{hint}. Make room, then run the same command with --resume_from_checkpoint True"
        ) from error
    barrier()


def _clear_leftovers(output: Path) -> None:
    """Delete what is left of a run that was killed while it wrote or deleted a checkpoint."""
    for pattern in ("saving-checkpoint-*", "deleting-checkpoint-*"):
        for leftover in output.glob(pattern):
            shutil.rmtree(leftover)


def _write_manifest(folder: Path, step: int, run_fingerprint: dict[str, Any]) -> None:
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        files[str(file.relative_to(folder))] = file.stat().st_size
    with atomic_write(folder / MANIFEST) as file:
        json.dump({"step": step, "contract": run_fingerprint, "files": files}, file, indent=1)


def _rename(folder: Path, target: Path) -> None:
    """Rename `folder`, over an earlier checkpoint of the same step too, which stays whole until then."""
    replaced = _set_aside(target) if target.exists() else None
    os.rename(folder, target)
    if replaced:
        shutil.rmtree(replaced, ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    """Give what is to be deleted another name, so that a kill in between leaves no half of a checkpoint-N."""
    aside = folder.with_name(f"deleting-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    return aside


def delete_old_checkpoints(output: Path, limit: int | None, keep: set[str]) -> None:
    """Leave `limit` checkpoints (None, 0: all), those named in `keep` (the newest, the best) among them. Folders that
    are not complete checkpoints of ours neither count nor go."""
    found = [folder for folder in _numbered(output)[::-1] if (folder / MANIFEST).is_file()]
    surplus = len(found) - limit if limit and limit > 0 else 0
    for folder in [folder for folder in found if folder.name not in keep][: max(surplus, 0)]:
        shutil.rmtree(_set_aside(folder), ignore_errors=True)


def retry_while_disk_full(write: Callable[[], None], output_dir: str, tries: int = 60, pause: float = 60.0) -> None:
    """Call `write()`, and again after `pause` seconds while the disk is full: time to make room.

    Raises:
        UsageError: it was full for all of `tries`.
    """
    for number in range(1, tries + 1):
        try:
            return write()
        except Exception as error:  # safetensors raises its own
            if not is_about_space(error):
                raise
            problem = f"the model cannot be written to {output_dir}: {_reason(error)}"
            if number == tries:
                raise UsageError(
                    f"{problem}; --resume_from_checkpoint True continues from the last checkpoint"
                ) from error
            print(f"{problem}; make room, it is tried again every {pause:.0f} s ({number}/{tries})", flush=True)
            time.sleep(pause)


SPACE_ERRORS = (
    "no space left",
    "disk quota",
    "file too large",
    "failed writing file",
    "enforce fail at inline_container",
)


def is_about_space(error: BaseException) -> bool:
    return any(text in str(part).lower() for part in _causes(error) for text in SPACE_ERRORS)


def _reason(error: BaseException) -> str:
    """Return the system's own words, where the libraries have passed them on."""
    lines = [line.strip() for part in _causes(error) for line in str(part).splitlines()]
    about_space = [line for text in SPACE_ERRORS[:3] for line in lines if text in line.lower()]
    return about_space[0] if about_space else "a file could not be written to its end"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error, what it was raised from, and what other ranks reported through it."""
    while error is not None:
        yield error
        for inner in getattr(error, "failures", {}).values():
            yield inner[0] if isinstance(inner, tuple) else inner
        error = error.__cause__ or error.__context__


class SaveOnlyWhenAsked(TrainerCallback):
    """No checkpoint for ending between two multiples of --save_steps, as in 2023: the final model is written anyway,
    and for a 7B model the optimizer beside it would take another 54 GB."""

    def on_step_end(self, args, state, control, **kwargs):
        between = not state.save_steps or state.global_step % state.save_steps
        if args.save_strategy == "steps" and between and not args.load_best_model_at_end:
            control.should_save = False


@contextmanager
def _caching_config(model: nn.Module) -> Iterator[None]:
    """Save models that generate with a cache: the Trainer has switched it off for training."""
    training_value, model.config.use_cache = model.config.use_cache, True
    try:
        yield
    finally:
        model.config.use_cache = training_value
