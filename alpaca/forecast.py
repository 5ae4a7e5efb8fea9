"""What a run will take, said before the model is loaded: memory per GPU, disk for its checkpoints.

Memory is the sum of

    weights, gradients   4 bytes a parameter each: float32 master weights. Sharded over the ranks under FSDP
    optimizer            8 bytes a parameter for AdamW, and 4 more while it steps (torch's foreach kernels)
    gathered             under FSDP: the embeddings and two decoder layers whole, in the dtype of the arithmetic, and
                         the gradients of one on their way to float32; else the bfloat16 copies that autocast keeps
    activations          what the forward pass of the largest micro-batch keeps for the backward pass, counted on fake
                         tensors (shapes without memory), and the logits with their float32 softmax and its gradient

and 1 GB for CUDA itself. 1 GB is 10^9 bytes. It is a forecast: an allocator that fragments takes more.
"""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from alpaca.console import say
from alpaca.errors import UsageError
from alpaca.files import free_bytes, human

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, TrainingArguments

GB = 1e9
OPTIMIZER_BYTES = {"adafactor": 0.1, "sgd": 0, "rmsprop": 4, "adagrad": 4, "lion": 4, "8bit": 2}  # else AdamW's 8


@dataclass(frozen=True)
class Model:
    """Counted on fake tensors by `measure`. Bytes are those of the micro-batch it was measured with."""

    parameters: int
    largest_layer: int  # parameters of one decoder layer
    layers: int
    activations: float  # bytes kept for the backward pass
    layer_inputs: float  # bytes of the inputs of all decoder layers
    logits: float  # bytes of the logits and their loss, forward and backward


@dataclass(frozen=True)
class Plan:
    """The flags that decide how much memory a process takes."""

    world_size: int
    sharded: bool
    group: int  # ranks that share one copy of the parameters if sharded: all, or those of a node under hybrid_shard
    offload: bool
    checkpointing: bool
    half: bool  # bfloat16 or float16 arithmetic
    optimizer_bytes: float
    rows: int  # per device and micro-batch
    accumulation: int  # micro-batches a step
    on_gpu: bool


def measure(config: "PreTrainedConfig", rows: int, tokens: int, half: bool) -> Model:
    """Count parameters, and the bytes that a forward pass of (`rows`, `tokens`) keeps for the backward pass. Nothing is
    computed and no memory is taken; a 7B model takes half a second."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if half else torch.float32
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        weights = {parameter.untyped_storage()._cdata: parameter.numel() for parameter in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(input_ids=torch.ones(rows, tokens, dtype=torch.long), use_cache=False).logits
        blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or [])]
        return Model(
            parameters=sum(weights.values()),
            largest_layer=max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0),
            layers=max(len(blocks), 1),
            activations=sum(storage.nbytes() for key, storage in kept.items() if key not in weights),
            layer_inputs=len(blocks) * rows * tokens * config.get_text_config().hidden_size * dtype.itemsize,
            logits=logits.numel() * (10 if half else 8),
        )


def memory(model: Model, plan: Plan) -> dict[str, float]:
    """Bytes per process and part, on the device that does the arithmetic. `host`: on the CPU, under offload."""
    shards = plan.group if plan.sharded else 1
    static = {"weights": 4.0, "gradients": 4.0, "optimizer": plan.optimizer_bytes}
    static = {name: size * model.parameters / shards for name, size in static.items()}
    item = 2 if plan.half else 4
    if plan.sharded:
        root = model.parameters - model.layers * model.largest_layer
        gathered = item * (root + 2 * model.largest_layer) + (item + 4) * max(root, model.largest_layer)
    else:
        gathered = (2 if plan.half else 0) * model.parameters + (4 * model.parameters if plan.world_size > 1 else 0)
    kept = model.activations / model.layers + model.layer_inputs if plan.checkpointing else model.activations
    stepping = 4 * model.parameters / shards if plan.optimizer_bytes >= 4 and not plan.offload else 0
    parts = {**static, "gathered": gathered, "activations": kept + model.logits}
    parts["activations"] += max(0.0, stepping - gathered - parts["activations"])  # only one of the two at a time
    if plan.offload and plan.sharded:
        parts = {**parts, **dict.fromkeys(static, 0.0), "host": sum(static.values()) + stepping}
    return parts


def total(parts: dict[str, float]) -> float:
    return sum(size for name, size in parts.items() if name != "host")


def what_fits(model: Model, plan: Plan, available: float) -> str | None:
    """The first change of flags, from the cheapest in time to the dearest, with which the run fits into `available`
    bytes; None where none does."""
    smaller = [2**k for k in range(plan.rows.bit_length()) if 2**k < plan.rows and plan.rows % 2**k == 0][::-1]
    ways = [("", plan)]
    if not plan.sharded and plan.world_size > 1:
        ways.append(('--fsdp "full_shard auto_wrap"', replace(plan, sharded=True)))
    ways += [(f"{flags} --gradient_checkpointing True", replace(way, checkpointing=True)) for flags, way in ways]
    if plan.on_gpu:
        launch = "torchrun --nproc_per_node=1 " if plan.world_size == 1 else ""
        offload = f'{launch}--fsdp "full_shard auto_wrap offload"'
        ways += [
            (f"{offload}{' --gradient_checkpointing True' * checkpointing}",
             replace(plan, sharded=True, offload=True, checkpointing=plan.checkpointing or checkpointing))
            for checkpointing in (False, True)
        ]  # fmt: skip
    for flags, way in ways:
        for rows in (plan.rows, *smaller):
            size = total(memory(_with_rows(model, rows / plan.rows), way))
            if size <= available and (flags or rows < plan.rows):
                accumulation = plan.accumulation * plan.rows // rows  # the same rows a step
                batch = f" --per_device_train_batch_size {rows} --gradient_accumulation_steps {accumulation}"
                host = memory(model, way).get("host", 0)
                where = human(size) + f" and {human(host)} of CPU memory a process" * (host > 0)
                return f"{flags}{batch if rows < plan.rows else ''}".strip() + f" (about {where})"
    return None


def _with_rows(model: Model, share: float) -> Model:
    return replace(model, activations=model.activations * share, layer_inputs=model.layer_inputs * share,
                   logits=model.logits * share)  # fmt: skip


def plan_of(args: "TrainingArguments") -> Plan:
    name = str(getattr(args.optim, "value", args.optim))
    optimizer = next((size for key, size in OPTIMIZER_BYTES.items() if key in name), 8)
    fsdp_config = args.fsdp_config if args.fsdp else {}
    return Plan(
        world_size=args.world_size,
        sharded=bool(args.fsdp),
        group=args.parallelism_config.dp_shard_size if args.parallelism_config else args.world_size,
        offload=bool(fsdp_config.get("cpu_offload")),
        checkpointing=bool(args.gradient_checkpointing or fsdp_config.get("activation_checkpointing")),
        half=bool(args.bf16 or args.fp16),
        optimizer_bytes=optimizer,
        rows=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        on_gpu=args.device.type != "cpu",
    )


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def available_memory(device: torch.device) -> tuple[float, float]:
    """(bytes for this process on `device`, bytes of CPU memory for it)."""
    import psutil

    host = psutil.virtual_memory().available / local_world_size()
    return (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host), host


def forecast_memory(args: "TrainingArguments", config: "PreTrainedConfig", longest: int) -> Model | None:
    """Print what a process will take for micro-batches of rows of `longest` tokens, whether that is there, and which
    flags to change if it is not. None where the model cannot be run on fake tensors."""
    plan = plan_of(args)
    try:
        model = measure(config, plan.rows, longest, plan.half)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]:.100}"
        say(f"memory and disk: no forecast, this model does not run on fake tensors ({reason})", 0)
        return None
    parts, (available, host) = memory(model, plan), available_memory(args.device)
    available -= GB if plan.on_gpu else 0
    size = total(parts)
    described = " + ".join(f"{name} {human(part)}" for name, part in parts.items() if name != "host" and part)
    unit = f"per {'GPU' if plan.on_gpu else 'process'} ({plan.rows} rows of {longest} tokens)"
    say(f"memory {unit}, forecast: {described} = {human(size)}, available {human(available)}", 0)
    if size > available:
        fits = what_fits(model, plan, available)
        say(f"  does not fit; {'this would: ' + fits if fits else 'take more GPUs, or a smaller model'}", 0)
    if parts.get("host", 0) > host:
        say(f"  offloading takes {human(parts['host'])} of CPU memory a process, available {human(host)}", 0)
    return model


# ---- disk ----


def checkpoint_sizes(args: "TrainingArguments", parameters: int) -> tuple[float, float]:
    """(bytes of a checkpoint, of the final model): float32 weights and, unless --save_only_model, the optimizer."""
    optimizer = 0 if args.save_only_model else plan_of(args).optimizer_bytes
    return parameters * (4 + optimizer), parameters * (4 if args.save_dtype == "float32" else 2)


def checkpoints_to_come(args: "TrainingArguments", steps: int, per_epoch: int, done: int) -> int:
    """How many more checkpoints than now will stand on the disk at the worst moment of a run that continues after
    `done` steps: the old one goes when the new one is whole, and the best one stays."""
    every = {"steps": args.save_steps, "epoch": per_epoch, "best": args.eval_steps}.get(args.save_strategy)
    if not every:
        return 0
    every = math.ceil(steps * every) if every < 1 else int(every)
    saves, limit = max(steps // every - done // every, 0), args.save_total_limit
    if not limit or limit < 0:
        return saves
    at_once = limit + 1 + (args.load_best_model_at_end or args.save_strategy == "best")
    return min(saves, max(at_once - (done > 0), 1))


def check_room(args: "TrainingArguments", parameters: int, checkpoints: int) -> None:
    """Say how much disk the run will take.

    Raises:
        UsageError: less is free.
    """
    each, final = checkpoint_sizes(args, parameters)
    needed, free = checkpoints * each + final, free_bytes(Path(args.output_dir))
    content = f"{checkpoints} x {human(each)} for checkpoints + {human(final)} for the final model"
    say(f"disk, forecast: {content} = {human(needed)}, free {human(free)}", 0)
    if needed > free:
        raise UsageError(
            f"--output_dir {args.output_dir}: the run would take {human(needed)} ({content}), but {human(free)} are "
            "free. Choose another disk, or write less: --save_total_limit 1, a larger --save_steps, "
            "--save_strategy no, --save_dtype bfloat16"
        )
