"""The run fingerprint: what must be the same for a resumed run to end where an undisturbed one would have.

On the disk it stands under the key "contract", its name when the first checkpoints were written."""

import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from alpaca.common.arguments import WRITTEN_BY_US
from alpaca.common.distributed import all_gather_object, barrier, print_rank0
from alpaca.common.errors import UsageError
from alpaca.common.files import fingerprint, sha256_of_file, write_text
from alpaca.models import deepspeed
from alpaca.packing.sampler import count_steps, rows_per_step
from alpaca.training.checkpoint import is_run_fingerprint, retry_while_disk_full
from alpaca.weights.provenance import (
    BASE,
    RECORD,
    fingerprint_of_weights,
    holds_a_model,
    read_manifest,
    read_record,
    relative_path,
    write_record,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

RunFingerprint = dict[str, Any]

# Flags of TrainingArguments. A change of the first is refused: the rows would differ, or the checkpoint's own value
# would silently win. A change of the second is allowed and said; those of ROUNDING change no more than that.
FIXED = (
    "model_max_length seed data_seed reproduce_2023 loss_normalization train_sampling_strategy dataloader_drop_last "
    "optim optim_args learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon lr_scheduler_type "
    "lr_scheduler_kwargs warmup_steps"
).split()
FREE = "bf16 fp16 max_grad_norm label_smoothing_factor neftune_noise_alpha save_dtype".split()
ROUNDING = (
    "tf32 gradient_checkpointing fsdp per_device_train_batch_size gradient_accumulation_steps batching "
    "max_tokens_per_pack share_prefix hold_gradients torch_compile use_liger_kernel linear_cross_entropy"
).split()
# Of these, what the memory estimate decides where the flags leave it open, and what they are then.
DECIDED = {"max_tokens_per_pack": "auto", "gradient_checkpointing": None, "hold_gradients": None}
# What an older run fingerprint, which lacks it, stands for.
FORMERLY = {
    "--reproduce_2023": False,
    "--eval_size": None,
    "--use_liger_kernel": False,
    "--linear_cross_entropy": False,
}
RENAMED = {"--guanaco_turns": "--turns"}
PROCESSES = "the number of processes"
STEPS = "the steps of the run (--num_train_epochs, --max_steps)"


def describe_run(
    args: "TrainingArguments",
    model_args: Any,
    data_args: Any,
    lora_args: Any,
    dataset: Any,
    tokenizer: "PreTrainedTokenizerBase",
) -> RunFingerprint:
    """Return {"fixed", "free", "rounding", "tokens"}: values by the names that messages use, as JSON has them."""
    vocabulary = fingerprint(sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map)
    fixed = {
        "the data (--data_path)": f"{len(dataset):,} rows {dataset.data_fingerprint[:12]}",
        "--prompt_template": dataset.template_fingerprint[:12],
        **{f"--{name}": getattr(data_args, name) for name in ("prompt_boundary", "turns", "backward", "eval_size")},
        **{f"--{name}": getattr(args, name) for name in FIXED},
        **{f"--{name}": value for name, value in vars(lora_args).items()},
        "the tokenizer (of --model_name_or_path)": vocabulary[:12],
        BASE: fingerprint_of_weights(model_args.model_name_or_path),
        "the global batch (per device x accumulation x processes)": rows_per_step(args),
        **deepspeed.described(args),
    }
    if args.loss_normalization == "microbatch":  # there the micro-batches are part of the loss
        fixed["--per_device_train_batch_size"] = args.per_device_train_batch_size
        fixed[PROCESSES] = args.world_size
    free = {STEPS: count_steps(args, len(dataset))[0], **{f"--{name}": getattr(args, name) for name in FREE}}
    rounding = {
        PROCESSES: args.world_size,
        **{f"--{name}": getattr(args, name) for name in ROUNDING},
        "--attn_implementation": model_args.attn_implementation,
        "the device": args.device.type,
        "CPU threads": torch.get_num_threads() if args.device.type == "cpu" else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    data = describe_data(getattr(data_args, "data_path", None), args.output_dir)
    run = {"fixed": fixed, "free": free, "rounding": rounding, "tokens": tokens_of(dataset), "data": data}
    return json.loads(json.dumps(run, default=str))


def tokens_of(dataset: Any) -> str:
    """Return a hash of the token ids of all rows."""
    return hashlib.sha256(torch.cat(dataset.input_ids).numpy().tobytes()).hexdigest()[:12]


def describe_data(path: str | None, output: str) -> dict[str, str]:
    """Return where rows lie, seen from the folder `output`, and the SHA-256 of their file; of a data set its name."""
    if path is None or not Path(path).is_file():
        return {"file": str(path)}
    return {"file": relative_path(Path(path), Path(output)), "sha256": sha256_of_file(Path(path))}


def keep_decisions(args: "TrainingArguments", checkpoint: str | None) -> None:
    """Set in `args` what was decided for the run that `checkpoint` is of, where the flags leave it open: another amount
    of free memory must not change how it goes on."""
    saved = read_manifest(checkpoint)["contract"]["rounding"] if checkpoint else {}
    for name, open_value in DECIDED.items():
        if getattr(args, name) == open_value and saved.get(f"--{name}") is not None:
            setattr(args, name, saved[f"--{name}"])


def note_decisions(args: "TrainingArguments", run: RunFingerprint) -> None:
    """Put into the run fingerprint what has been decided since it was described."""
    run["rounding"].update({f"--{name}": getattr(args, name) for name in DECIDED})


def changes(old: RunFingerprint, new: RunFingerprint, kind: str) -> list[str]:
    """Return a line such as `--seed: 42 then, 43 now` for every entry of `kind` that both have and that differs."""
    then = FORMERLY | {RENAMED.get(name, name): value for name, value in old[kind].items()}
    lines = [
        f"{name}: {then[name]} then, {value} now"
        for name, value in new[kind].items()
        if name in then and then[name] != value
    ]
    if kind == "fixed" and not lines and old["tokens"] != new["tokens"]:  # the rest being equal
        lines.append("the tokenizer: it gives other ids for the same rows (another version of it, or of transformers)")
    return lines


def check_not_finished(args: "TrainingArguments", run: RunFingerprint, checkpoint: str | None) -> bool:
    """Return, and print, whether --output_dir holds this very run, finished. Collective.

    Raises:
        UsageError: it holds another finished run, which would be overwritten; or not all processes have the same rows,
            or see the same folder.
    """
    output = Path(args.output_dir)
    record = read_record(output)
    _check_that_all_agree(args, run, {"checkpoint": checkpoint, "finished": record and record["finished"]})
    if record is None or args.overwrite_output_dir:
        return False
    if not record["finished"]:
        known = is_run_fingerprint(record["contract"])
        if (
            known
            and not checkpoint
            and holds_a_model(output)
            and (changed := changes(record["contract"], run, "fixed"))
        ):
            raise UsageError(
                f"--output_dir {output} holds the model of another run ({changed[0]}); choose another "
                "folder, or pass --overwrite_output_dir True"
            )
        return False
    if not is_run_fingerprint(record["contract"]) or STEPS not in record["contract"]["free"]:
        raise UsageError(
            f"--output_dir {output}: {RECORD} does not say which run it is of; choose another folder, or pass "
            "--overwrite_output_dir True"
        )
    changed = changes(record["contract"], run, "fixed") + changes(record["contract"], run, "free")
    if not changed:
        print_rank0(
            f"this run is finished: its model is in {args.output_dir}, and nothing is left to do", args.process_index
        )
        return True
    before = record["contract"]["free"][STEPS]
    longer = isinstance(before, int) and before < run["free"][STEPS]
    if checkpoint and longer and len(changed) == 1:
        return False  # it goes on from there
    listed = "\n  ".join(changed)
    raise UsageError(
        f"--output_dir {args.output_dir} already holds a finished run, and this one is another:\n  {listed}\n"
        "Choose another folder, or pass --overwrite_output_dir True"
    )


def _check_that_all_agree(args: "TrainingArguments", run: RunFingerprint, seen: dict[str, Any]) -> None:
    for rank, (other_seen, other) in enumerate(all_gather_object((seen, run))):
        if other_seen != seen:
            raise UsageError(
                f"--output_dir {args.output_dir}: rank {rank} sees {other_seen} there, this one {seen}; it must be one "
                "folder that all nodes share"
            )
        if different := changes(other, run, "fixed"):
            there_and_here = different[0].replace(" then,", f" on rank {rank},").replace(" now", " on this one")
            raise UsageError(f"not all processes have the same: {there_and_here}")


def check_run_fingerprint(args: "TrainingArguments", run: RunFingerprint, checkpoint: str | None) -> None:
    """Raise UsageError where a resumed run would not be the one that was saved, naming what changed; say what may
    change and did."""
    if checkpoint is None:
        return
    saved = read_manifest(checkpoint)["contract"]
    if changed := changes(saved, run, "fixed"):
        listed = "\n  ".join(changed)
        raise UsageError(
            f"--resume_from_checkpoint: changed since {checkpoint} was saved:\n  {listed}\nRestore it to continue that "
            "run. For a new run from these weights: --model_name_or_path <that checkpoint> and another --output_dir, "
            "without --resume_from_checkpoint"
        )
    if changed := changes(saved, run, "free") + changes(saved, run, "rounding"):
        note = f"note: changed since {Path(checkpoint).name}, so the end is not bit for bit that of an undisturbed run"
        print_rank0(f"{note}: {'; '.join(changed)}", args.process_index)


def follow_schedule(scheduler: Any) -> None:
    """Give the optimizer the rate of this run's schedule: what was loaded with it is that of the run that was saved,
    which may have been shorter."""
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        scheduler._last_lr = [
            base * rate(scheduler.last_epoch) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas)
        ]
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr):
            group["lr"] = rate


def mark_started(args: "TrainingArguments", run: RunFingerprint) -> None:
    """Note in --output_dir what runs there. Collective.

    Raises:
        UsageError: another rank does not see that folder; checkpoints would lack its part.
    """
    output = Path(args.output_dir)
    if args.process_index == 0:
        write_record(output, run, finished=False)
        _write_run_yaml(args, output / "run.yaml")
    barrier()
    deadline = time.time() + 60  # a network file system may take a while to show a new file
    while (record := read_record(output)) is None or record["finished"]:
        if time.time() > deadline:
            raise UsageError(
                f"--output_dir {output}: rank {args.process_index} does not see what rank 0 wrote there; "
                "it must be one folder that all nodes share"
            )
        time.sleep(1)


def _write_run_yaml(args: "TrainingArguments", path: Path) -> None:
    """Write the flags of a command line, but not over a file of the user's own."""
    text = getattr(args, "run_yaml", None)
    if text is None:
        return
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(WRITTEN_BY_US):
        print_rank0(f"note: {path} is not one of ours and stays as it is", 0)
    else:
        write_text(path, text)


def mark_finished(args: "TrainingArguments", run: RunFingerprint) -> None:
    """Note that the final model is whole: the last thing a run writes."""
    if args.process_index == 0:
        retry_while_disk_full(lambda: write_record(Path(args.output_dir), run, finished=True), args.output_dir)
