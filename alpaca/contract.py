"""The contract of a run: what must be the same for a resumed run to end where an undisturbed one would have."""

import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from alpaca.checkpoints import read_manifest, read_record, write_record
from alpaca.console import say
from alpaca.data import fingerprint
from alpaca.errors import UsageError
from alpaca.waiting import gather_from_all_ranks, wait_for_all_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

Contract = dict[str, Any]

# Flags of TrainingArguments. A change of the first is refused: the rows would differ, or the checkpoint's own value
# would silently win. A change of the second is allowed and said.
FIXED = (
    "model_max_length seed data_seed loss_normalization train_sampling_strategy dataloader_drop_last optim "
    "learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon lr_scheduler_type warmup_steps"
).split()
EXACTNESS = ("--fsdp", "--tf32", "--gradient_checkpointing")  # of FREE: they change no more than rounding
FREE = (
    "num_train_epochs max_steps bf16 fp16 tf32 max_grad_norm label_smoothing_factor gradient_checkpointing fsdp"
).split()


def describe_run(
    args: "TrainingArguments", model_args: Any, data_args: Any, dataset: Any, tokenizer: "PreTrainedTokenizerBase"
) -> Contract:
    """{"fixed", "free", "tokens"}: values by the names that messages use, the same after a round trip through JSON."""
    vocabulary = fingerprint(sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map)
    fixed = {
        "the data (--data_path)": f"{len(dataset):,} rows {dataset.data_fingerprint[:12]}",
        "--prompt_template": dataset.template_fingerprint[:12],
        "--prompt_boundary": data_args.prompt_boundary,
        **{f"--{name}": getattr(args, name) for name in FIXED},
        "the tokenizer (of --model_name_or_path)": vocabulary[:12],
        "the global batch (per device x accumulation x processes)": rows_per_step(args),
    }
    tokens = hashlib.sha256(torch.cat(dataset.input_ids).numpy().tobytes()).hexdigest()[:12]
    free = {
        "the number of processes": args.world_size,
        "--model_name_or_path": model_args.model_name_or_path,
        **{f"--{name}": getattr(args, name) for name in FREE},
        "the device": args.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return json.loads(json.dumps({"fixed": fixed, "free": free, "tokens": tokens}, default=str))


def rows_per_step(args: "TrainingArguments") -> int:
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def changes(old: Contract, new: Contract, kind: str) -> list[str]:
    """`--seed: 42 then, 43 now`, for every entry of `kind` that both have and that differs."""
    lines = [
        f"{name}: {old[kind][name]} then, {value} now"
        for name, value in new[kind].items()
        if name in old[kind] and old[kind][name] != value
    ]
    if kind == "fixed" and not lines and old["tokens"] != new["tokens"]:  # the rest being equal
        lines.append("the tokenizer: it gives other ids for the same rows (another version of it, or of transformers)")
    return lines


def already_finished(args: "TrainingArguments", contract: Contract, checkpoint: str | None) -> bool:
    """Whether --output_dir holds this very run, finished; says so. Collective.

    Raises:
        UsageError: it holds another finished run, which would be overwritten; or not all processes have the same rows,
            or see the same folder.
    """
    record = read_record(Path(args.output_dir))
    _check_that_all_agree(args, contract, {"checkpoint": checkpoint, "finished": record and record["finished"]})
    if record is None or not record["finished"] or args.overwrite_output_dir:
        return False
    fixed, free = (changes(record["contract"], contract, kind) for kind in ("fixed", "free"))
    other = [change for change in free if change.startswith("--") and not change.startswith(EXACTNESS)]
    if not fixed and not other:
        say(f"this run is finished: its model is in {args.output_dir}, and nothing is left to do", args.process_index)
        return True
    if checkpoint and not fixed:
        return False  # a longer run, say, that goes on from there
    listed = "\n  ".join(fixed + other)
    raise UsageError(
        f"--output_dir {args.output_dir} already holds a finished run, and this one is another:\n  {listed}\n"
        "Choose another folder, or pass --overwrite_output_dir True"
    )


def _check_that_all_agree(args: "TrainingArguments", contract: Contract, seen: dict[str, Any]) -> None:
    for rank, (other_seen, other) in enumerate(gather_from_all_ranks((seen, contract))):
        if other_seen != seen:
            raise UsageError(
                f"--output_dir {args.output_dir}: rank {rank} sees {other_seen} there, this one {seen}; it must be one "
                "folder that all nodes share"
            )
        if different := changes(other, contract, "fixed"):
            there_and_here = different[0].replace(" then,", f" on rank {rank},").replace(" now", " on this one")
            raise UsageError(f"not all processes have the same: {there_and_here}")


def check_contract(args: "TrainingArguments", contract: Contract, checkpoint: str | None) -> None:
    """Raise UsageError where a resumed run would not be the one that was saved, naming what changed; say what may
    change and did."""
    if checkpoint is None:
        return
    saved = read_manifest(checkpoint)["contract"]
    if changed := changes(saved, contract, "fixed"):
        listed = "\n  ".join(changed)
        raise UsageError(
            f"--resume_from_checkpoint: changed since {checkpoint} was saved:\n  {listed}\nRestore it to continue that "
            "run. For a new run from these weights: --model_name_or_path <that checkpoint> and another --output_dir, "
            "without --resume_from_checkpoint"
        )
    if changed := changes(saved, contract, "free"):
        note = f"note: changed since {Path(checkpoint).name}, so the end is not bit for bit that of an undisturbed run"
        say(f"{note}: {'; '.join(changed)}", args.process_index)


def begin(args: "TrainingArguments", contract: Contract) -> None:
    """Note in --output_dir what runs there. Collective.

    Raises:
        UsageError: another rank does not see that folder; checkpoints would lack its part.
    """
    output = Path(args.output_dir)
    if args.process_index == 0:
        write_record(output, contract, finished=False)
    wait_for_all_ranks()
    deadline = time.time() + 60  # a network file system may take a while to show a new file
    while (record := read_record(output)) is None or record["finished"]:
        if time.time() > deadline:
            raise UsageError(f"--output_dir {output}: rank {args.process_index} does not see what rank 0 wrote there; "
                             "it must be one folder that all nodes share")  # fmt: skip
        time.sleep(1)


def finish(args: "TrainingArguments", contract: Contract) -> None:
    """Note that the final model is whole: the last thing a run writes."""
    if args.process_index == 0:
        write_record(Path(args.output_dir), contract, finished=True)
