"""Checks before a run: values that would fail only after hours, how many steps it has, where it can be saved."""

import math
import os
import tempfile
import weakref
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
from transformers import Trainer, get_scheduler

from alpaca.common.arguments import check_ranges, enum_value, read_config
from alpaca.common.distributed import all_gather_object, print_rank0
from alpaca.common.errors import InputError, UsageError, first_line, format_bytes
from alpaca.common.files import free_bytes, lock
from alpaca.models import deepspeed
from alpaca.models.load import load_config
from alpaca.models.lora import LoraArguments, check_lora
from alpaca.packing.packing import why_not_packed
from alpaca.packing.sampler import count_steps, rows_per_step, steps_2023
from alpaca.training import memory, resume
from alpaca.training.memory import optimizer_bytes
from alpaca.training.metrics import check_trackers
from alpaca.weights.provenance import read_manifest
from alpaca.weights.reader import ADAPTER, EXACT_DIFF, describe_folder, folder_kind

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase, TrainingArguments


def check_combinations(args: "TrainingArguments") -> None:
    """Raise UsageError for values that the Trainer would meet with a traceback, some of them only after hours."""
    if args.model_max_length < 1:
        raise UsageError(f"--model_max_length {args.model_max_length}: expected a positive number of tokens")
    check_training_numbers(args)
    check_json(args)
    if not args.average_tokens_across_devices:
        raise UsageError("--average_tokens_across_devices False: use --loss_normalization microbatch for 2023's loss")
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise UsageError("--dataloader_persistent_workers: needs --dataloader_num_workers of at least 1")
    if args.use_liger_kernel and find_spec("liger_kernel") is None:
        raise UsageError("--use_liger_kernel: is not installed; pip install liger-kernel")
    if args.linear_cross_entropy and (args.deepspeed or args.label_smoothing_factor):
        raise UsageError("--linear_cross_entropy: not with --deepspeed or --label_smoothing_factor; drop it")
    if args.auto_find_batch_size:
        raise UsageError(
            "--auto_find_batch_size: changes the rows of a step in the middle of a run; the memory estimate says "
            "which --per_device_train_batch_size fits"
        )
    tokens = args.max_tokens_per_pack = str(args.max_tokens_per_pack)
    if tokens != "auto" and not (tokens.isdecimal() and int(tokens) > 0):
        raise UsageError(f"--max_tokens_per_pack {tokens}: expected auto or a positive number of tokens")
    if tokens != "auto" and args.batching == "padded":
        raise UsageError(f"--max_tokens_per_pack {tokens}: padded batches are not packed; drop --batching padded")
    if args.train_sampling_strategy == "batch_rebalance":
        raise UsageError(
            "--train_sampling_strategy batch_rebalance: --batching packed, the default, deals the rows of a step to "
            "the ranks even more evenly, and without padding; drop the flag"
        )
    check_reproduction(args)
    if args.metric_for_best_model not in (None, "loss", "eval_loss"):
        raise UsageError(f"--metric_for_best_model {args.metric_for_best_model}: only eval_loss is computed")


RANGES = {  # of the numbers that a run can have: the brackets as in mathematics, ( and ) without the bound itself
    "[0, inf)": "learning_rate weight_decay adam_epsilon neftune_noise_alpha eval_delay",
    "[0, inf]": "max_grad_norm",
    "[0, 1)": "adam_beta1 adam_beta2 lora_dropout",
    "[0, 1]": "label_smoothing_factor",
    "(0, inf)": "num_train_epochs",
    "[0, 1e9]": "warmup_steps logging_steps eval_steps save_steps",
    "[-1, 1e9]": "max_steps save_total_limit local_rank",
    "[0, 4294967295]": "seed data_seed",
    "[1, 1e9]": "model_max_length per_device_train_batch_size per_device_eval_batch_size",
    "[1, 1e6]": "gradient_accumulation_steps lora_alpha torch_empty_cache_steps ddp_bucket_cap_mb",
    "[1, 1e8]": "ddp_timeout",
    "[1, 65536]": "lora_r",
    "[1, 1024]": "dataloader_prefetch_factor",
    "[0, 1024]": "dataloader_num_workers",
}


def check_training_numbers(args: "TrainingArguments") -> None:
    """Raise UsageError for numbers that no run can have, and for events every 0 steps."""
    check_ranges(args, RANGES, unused=("num_train_epochs",) if args.max_steps > 0 else ())
    for name in ("logging", "save", "eval"):
        value = getattr(args, f"{name}_steps")
        if enum_value(getattr(args, f"{name}_strategy")) == "steps" and value == 0:
            raise UsageError(f"--{name}_steps 0: expected more than 0; --{name}_strategy no for never")


def check_schedule(args: "TrainingArguments") -> None:
    """Raise UsageError where the schedule lacks an argument, or gets one that it does not take."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    steps = max(args.max_steps, 100)
    try:
        scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            args.get_warmup_steps(steps),
            steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        for rate in getattr(scheduler, "lr_lambdas", ()):
            rate(steps // 2)
    except Exception as error:  # of a schedule's own arithmetic, with values of any type
        given = f", --lr_scheduler_kwargs {args.lr_scheduler_kwargs}" if args.lr_scheduler_kwargs else ""
        raise UsageError(f"--lr_scheduler_type {args.lr_scheduler_type.value}{given}: {first_line(error)}") from error


JSON_OR_FILE = ("accelerator_config", "fsdp_config", "deepspeed")


def check_json(args: "TrainingArguments") -> None:
    """Raise UsageError for a flag of JSON that is no JSON object, or has keys or types that nobody would look at before
    the first step."""
    for name in args._VALID_DICT_FIELDS:
        value = getattr(args, name, None)
        if isinstance(value, str) and value:
            if not value.lstrip().startswith("{") and name not in JSON_OR_FILE:
                raise UsageError(f"--{name} {value}: expected a JSON object, such as '{{\"name\": 1}}'")
            read_config(value, f"--{name}")
    options = args.gradient_checkpointing_kwargs
    options = read_config(options, "--gradient_checkpointing_kwargs") if isinstance(options, str) else options or {}
    known = ("use_reentrant", "preserve_rng_state", "debug", "early_stop")
    for name, value in options.items():
        if name not in known:
            raise UsageError(f"--gradient_checkpointing_kwargs: unknown key {name!r}; known are {', '.join(known)}")
        if not isinstance(value, bool):
            raise UsageError(f"--gradient_checkpointing_kwargs {name} {value!r}: expected true or false")


PIP = {"galore": "galore-torch", "apollo": "apollo-torch"}  # what transformers would have from git


def check_optimizer(args: "TrainingArguments") -> None:
    """Raise UsageError for an optimizer that is not installed, or does not take --optim_args."""
    name = enum_value(args.optim)
    given = f"--optim {name}" + (f" --optim_args {args.optim_args}" if args.optim_args else "")
    if name.startswith(("galore", "apollo")) and not args.optim_target_modules:
        raise UsageError(f"{given}: needs --optim_target_modules, such as all-linear")
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.Linear(2, 2))
        if kind.__module__.startswith("torch."):
            kind([torch.zeros(2, requires_grad=True)], **options)
    except Exception as error:  # of somebody's optimizer
        package = next((PIP[key] for key in PIP if name.startswith(key)), None)
        hint = f"is not installed; pip install {package}" if package else " ".join(str(error).split())
        raise UsageError(f"{given}: {hint}") from error
    if args.fsdp and kind.__module__.startswith("bitsandbytes"):
        raise UsageError(
            f"{given}: bitsandbytes does not know sharded parameters; drop --fsdp, or take another --optim"
        )


def check_installed(args: "TrainingArguments") -> None:
    """Raise UsageError for what is not installed, or not logged in to."""
    if args.torch_compile and args.torch_compile_backend not in (known := torch._dynamo.list_backends(None)):
        raise UsageError(f"--torch_compile_backend {args.torch_compile_backend}: expected one of {', '.join(known)}")
    if args.push_to_hub and not (args.hub_token or huggingface_hub.get_token()):
        raise UsageError("--push_to_hub: needs a login to the hub; run hf auth login, or set HF_TOKEN")


def check_command_line(given: Mapping[str, Any], lora: LoraArguments, args: "TrainingArguments") -> None:
    """Raise UsageError for what a command line lacks, whose flags are `given`, and for LoRA's numbers."""
    if not any(given.get("output_dir", ())):
        raise UsageError("--output_dir is missing: the folder that gets the trained model, such as output/my_model")
    check_ranges(lora, RANGES)
    check_lora(lora, args)


def check_flags(args: "TrainingArguments") -> None:
    """Check what a complete TrainingArguments says of schedule, optimizer, trackers and the hub."""
    for check in (check_schedule, check_optimizer, check_trackers, check_installed, hide_token):
        check(args)


def hide_token(args: "TrainingArguments") -> None:
    """Move --hub_token to where huggingface_hub looks for one: `args` are saved with every model."""
    if args.hub_token:
        os.environ["HF_TOKEN"] = args.hub_token
        args.hub_token = None


def check_reproduction(args: "TrainingArguments") -> None:
    """Choose the loss where the flags leave it open. Raise UsageError for what --reproduce_2023 cannot go with."""
    if args.reproduce_2023 and args.loss_normalization == "token":
        raise UsageError("--loss_normalization token: --reproduce_2023 has 2023's, microbatch; drop one of them")
    if args.reproduce_2023 and args.train_sampling_strategy != "random":
        name = args.train_sampling_strategy
        given = "--group_by_length" if name == "group_by_length" else f"--train_sampling_strategy {name}"
        raise UsageError(f"{given}: --reproduce_2023 has the shuffled rows of 2023; drop one of them")
    args.loss_normalization = args.loss_normalization or ("microbatch" if args.reproduce_2023 else "token")


def check_output_dir(args: "TrainingArguments") -> None:
    """Raise UsageError where nothing could be saved, or another run saves, before anything expensive happens. The lock
    is rank 0's, and ends with it."""
    try:
        os.makedirs(args.output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.output_dir) as file:
            file.write(b"x")
    except OSError as error:
        raise UsageError(f"--output_dir {args.output_dir}: cannot be written ({error.strerror})") from error
    if args.process_index == 0 and os.name == "posix":
        folder = os.open(args.output_dir, os.O_RDONLY)
        weakref.finalize(args, os.close, folder)
        if not lock(folder, args.output_dir):
            raise UsageError(f"--output_dir {args.output_dir}: another process is training in this folder")


def check_evaluation(args: "TrainingArguments", eval_data_path: str | None, eval_size: float | None = None) -> None:
    """Raise UsageError where --eval_strategy is given without --eval_data_path or --eval_size, or one of them alone."""
    wanted = args.eval_strategy != "no"
    given = f"--eval_data_path {eval_data_path}" if eval_data_path else eval_size and f"--eval_size {eval_size:g}"
    if wanted and not given:
        needed = "needs rows to evaluate on, --eval_data_path or --eval_size"
        raise UsageError(f"--eval_strategy {args.eval_strategy.value}: {needed}")
    if given and not wanted:
        raise UsageError(f"{given}: is never used; add --eval_strategy steps or epoch")


def prepare_run(
    model_args: Any,
    data_args: Any,
    lora_args: LoraArguments,
    args: "TrainingArguments",
    tokenizer: "PreTrainedTokenizerBase",
    data_module: Mapping[str, Any],
    checkpoint: str | None,
) -> resume.RunFingerprint | None:
    """Print what is known of the rows, check that the run can start or continue, and decide what the flags leave to the
    memory. Collective.

    Returns:
        The run fingerprint; None where --output_dir holds this very run, finished.
    """
    for dataset in filter(None, (data_module["train_dataset"], data_module["eval_dataset"])):
        print_rank0(str(dataset.report), args.process_index)
    resume.keep_decisions(args, checkpoint)
    run = resume.describe_run(args, model_args, data_args, lora_args, data_module["train_dataset"], tokenizer)
    if resume.check_not_finished(args, run, checkpoint):
        return None
    resume.check_run_fingerprint(args, run, checkpoint)
    config = load_config(model_args, args, None if lora_args else checkpoint)
    check_before_loading(args, config, data_module, checkpoint, lora_args)
    resume.note_decisions(args, run)
    return run


def check_before_loading(
    args: "TrainingArguments",
    config: "PreTrainedConfig",
    data_module: Mapping[str, Any],
    checkpoint: str | None,
    lora: LoraArguments,
) -> memory.Decision:
    """Check what can be known before the model is read: steps, room on the disk, memory. Collective: rank 0
    decides for all what the flags leave to the memory, and `args` are set to it.

    Raises:
        UsageError: rows are longer than the model's positions, nothing can be saved, or the disk is too small.
    """
    check_lengths(config, data_module)
    dataset = data_module["train_dataset"]
    steps, per_epoch = plan_steps(args, len(dataset))
    if args.batching == "packed" and (reason := why_not_packed(config, args, int(dataset.lengths.max()))):
        print_rank0(f"note: padded batches, not packed: {reason}", args.process_index)
        args.batching = "padded"
    done = read_manifest(checkpoint)["step"] if checkpoint else 0
    if done > steps:
        raise UsageError(f"--resume_from_checkpoint: {checkpoint} is of step {done}, beyond the {steps} of this run")
    check_output_dir(args)
    if checkpoint:
        print_rank0(f"continuing from {Path(checkpoint).name}, step {done} of {steps}", args.process_index)
    decision = None
    if args.process_index == 0:
        report = dataset.report
        rows = memory.rows_of(report.lengths, report.num_targets, rows_per_step(args), args.world_size)
        with deepspeed.unpartitioned():
            model, decision = memory.estimate_memory(args, config, rows, lora)
        if model is not None:
            check_room(args, model.trained, checkpoints_to_come(args, steps, per_epoch, done))
    decision = all_gather_object(decision)[0]
    if args.hold_gradients and not args.fsdp:
        print_rank0("note: --hold_gradients: has no effect without --fsdp", args.process_index)
    if args.hold_gradients is None:
        args.hold_gradients = decision.hold_gradients
    by_fsdp = args.fsdp and args.fsdp_config.get("activation_checkpointing")  # the Trainer refuses both
    args.max_tokens_per_pack = str(decision.max_tokens_per_pack or "auto")
    args.gradient_checkpointing = args.activation_checkpointing = decision.gradient_checkpointing and not by_fsdp
    return decision


def plan_steps(args: "TrainingArguments", num_rows: int) -> tuple[int, float]:
    """Return, and print, (optimizer steps of the run, of an epoch), as the Trainer will count them. Print a note where
    the run is shorter than --save_steps, so that only its end is saved."""
    each, (steps, per_epoch) = rows_per_step(args), count_steps(args, num_rows)
    if per_epoch == 0:
        least = f"step of {each}"
        if args.reproduce_2023:
            least = f"micro-batch of {args.train_batch_size} on each of {args.world_size} processes"
        raise UsageError(f"--dataloader_drop_last: {num_rows} rows are fewer than one {least}")
    run = steps_2023(args, num_rows)
    if args.reproduce_2023 and args.world_size > 1 and run.micro_batches < run.accumulation:
        raise UsageError(
            f"--gradient_accumulation_steps {run.accumulation}: --reproduce_2023 takes at most the {run.micro_batches} "
            "micro-batches of an epoch. With more, 2023's processes stepped without sharing gradients at its end"
        )
    as_then = ", rows and steps as in 2023" if args.reproduce_2023 else ""
    print_rank0(f"{num_rows:,} rows, {each} a step: {steps:,} optimizer steps{as_then}", args.process_index)
    if args.save_strategy == "steps" and args.save_steps > steps:
        print_rank0(
            f"note: --save_steps {args.save_steps} exceeds the {steps} steps of this run; only its end is saved",
            args.process_index,
        )
    return steps, per_epoch


def check_lengths(config: "PreTrainedConfig", data_module: Mapping[str, Any]) -> None:
    """Raise UsageError where a row has more tokens than the model has positions."""
    limit = getattr(config, "max_position_embeddings", None)
    for dataset in (data_module["train_dataset"], data_module["eval_dataset"]):
        longest = int(dataset.lengths.max()) if dataset else 0
        if limit and longest > limit:
            raise UsageError(
                f"a row has {longest} tokens, but the model has {limit} positions; pass --model_max_length {limit}"
            )


def checkpoint_sizes(args: "TrainingArguments", trained: int) -> tuple[float, float]:
    """Return (bytes of a checkpoint, of what is saved at the end) for `trained` parameters: float32 weights and, unless
    --save_only_model, the optimizer."""
    masters = 4 if args.deepspeed else 0  # it saves them with the optimizer
    optimizer = 0 if args.save_only_model else optimizer_bytes(args) + masters
    return trained * (4 + optimizer), trained * (4 if args.save_dtype == "float32" else 2)


def checkpoints_to_come(args: "TrainingArguments", steps: int, per_epoch: float, done: int) -> int:
    """Return how many more checkpoints than now will stand on the disk at the worst moment of a run that continues
    after `done` steps: the old one goes when the new one is whole, and the best one stays."""
    every = {"steps": args.save_steps, "epoch": per_epoch, "best": args.eval_steps}.get(args.save_strategy)
    if not every:
        return 0
    if args.save_strategy == "epoch":  # also where the last one is not whole
        saves = math.ceil(steps / every) - int(done // every)
    else:
        every = math.ceil(steps * every) if every < 1 else int(every)
        saves = steps // every - done // every
    saves, limit = max(saves, 0), args.save_total_limit
    if not limit or limit < 0:
        return saves
    at_once = limit + 1 + (args.load_best_model_at_end or args.save_strategy == "best")
    return min(saves, max(at_once - (done > 0), 1))


def check_room(args: "TrainingArguments", trained: int, checkpoints: int) -> None:
    """Print how much disk the run will take.

    Raises:
        UsageError: less is free.
    """
    each, final = checkpoint_sizes(args, trained)
    needed, free = checkpoints * each + final, free_bytes(Path(args.output_dir))
    written = f"{checkpoints} x {format_bytes(each)} for checkpoints" if checkpoints else "no checkpoints"
    content = f"{written} + {format_bytes(final)} for the final model"
    print_rank0(f"disk, estimate: {content} = {format_bytes(needed)}, free {format_bytes(free)}", 0)
    if needed > free:
        raise UsageError(
            f"--output_dir {args.output_dir}: the run would take {format_bytes(needed)} ({content}), but "
            f"{format_bytes(free)} are free. Choose another disk, or write less: --save_total_limit 1, a larger "
            "--save_steps, --save_strategy no, --save_dtype bfloat16"
        )


def check_is_model(name: str) -> None:
    """Raise InputError where a model is expected and `name` is a path that is no folder, or the folder of an adapter or
    a weight diff."""
    folder = Path(name)
    if (folder.is_absolute() or name.startswith(("./", "../", "~"))) and not folder.is_dir():
        whole = Path(os.path.expanduser(name))
        hint = f"; did you mean {whole}?" if whole != folder and whole.is_dir() else ""
        raise InputError(f"{name}: no such folder{hint}", name)
    kind = folder_kind(folder)
    if kind == EXACT_DIFF or (kind == ADAPTER and not (folder / "config.json").is_file()):
        raise InputError(f"{name}: {describe_folder(folder)}", name)
