"""What a run will take, said before the model is loaded, and what the flags leave open decided by it: memory per GPU,
the size of packs, gradient checkpointing.

Memory is the sum of

    weights, gradients   4 bytes a parameter each: float32 master weights. Sharded over the ranks under FSDP. With LoRA
                         that of the matrices only, and the frozen base in its dtype, or quantized in 8 or 4.13 bits.
                         DeepSpeed has both once more, the weights in the dtype of the arithmetic
    optimizer            8 bytes a parameter of AdamW; with torch's foreach kernels (adamw_torch) 4 more while it steps.
                         2 where it keeps 8 bits (adamw_bnb_8bit), but 8 for embeddings
    whole gradients      under FSDP, where they fit: 4 bytes a parameter, so that they are reduced once a step and not
                         after every pack
    gathered             under FSDP: the embeddings and two decoder layers whole, in the dtype of the arithmetic, and
                         the gradients of one on their way to float32; else the bfloat16 copies that autocast keeps,
                         with gradient checkpointing those of a layer; of a quantized base one decoder layer in the
                         dtype of the arithmetic
    activations          what the forward pass of the largest micro-batch keeps for the backward pass, counted on fake
                         tensors (shapes without memory), and its logits with their gradient and the loss's float32

and 1 GB for CUDA itself. 1 GB is 10^9 bytes. It is an estimate: an allocator that fragments takes more, so what is
decided here leaves room for a tenth more of the last two, which come and go with every pack.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from alpaca.common.arguments import enum_value
from alpaca.common.distributed import print_rank0
from alpaca.common.errors import UsageError, first_line, format_bytes
from alpaca.models.deepspeed import Zero3
from alpaca.models.fsdp import empty_model, materialize
from alpaca.models.lora import LoraArguments, add_lora, base_dtype, lora_layers
from alpaca.packing.loss import CHUNK
from alpaca.packing.packing import CPU_PACK_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

GB = 1e9
SPARE = 0.1  # of what is gathered and of the activations, where the size is decided here
PACK_TOKENS = (16384, 12288, 8192, 6144, 4096, 3072, 2048, 1536, 1024)  # of --max_tokens_per_pack auto
OPTIMIZER_BYTES = {"adafactor": 0.1, "sgd": 0, "rmsprop": 4, "adagrad": 4, "lion": 4, "8bit": 2.03}  # else AdamW's 8


@dataclass(frozen=True)
class Model:
    """Counted on fake tensors by `measure`."""

    parameters: int
    trained: int  # of them: all, or those of LoRA
    weight_bytes: float
    largest_layer: int  # parameters of one decoder layer
    layers: int
    activations: float  # bytes that a token keeps for the backward pass
    layer_inputs: float  # bytes of a token in the inputs of all decoder layers
    vocabulary: int  # logits of a token
    recomputes: bool = True  # whether it has gradient checkpointing
    quantized: bool = False
    embeddings: int = 0  # parameters of embeddings that are trained


@dataclass(frozen=True)
class Plan:
    """The flags that decide how much memory a process takes."""

    world_size: int
    sharded: bool
    group: int  # ranks that share one copy of the parameters if sharded: all, or those of a node under hybrid_shard
    offload: bool
    checkpointing: bool | None  # None: `decide` chooses
    half: bool  # bfloat16 or float16 arithmetic
    optimizer_bytes: float
    foreach: bool  # the optimizer steps with torch's foreach kernels
    on_gpu: bool
    packed: bool
    rows: int  # per device and micro-batch, if padded
    accumulation: int  # micro-batches a step, if padded
    tokens: int  # of the largest micro-batch or pack, padding counted; 0: `decide` chooses a pack's
    share: float  # of the tokens that are targets
    whole_gradients: bool = False  # between the packs of a step
    zero: Zero3 | None = None  # sharded by DeepSpeed, not FSDP


@dataclass(frozen=True)
class Rows:
    """What the estimate must know of the data, in tokens."""

    longest: int
    share: float  # of the tokens that are targets
    step: int  # a rank's in an optimizer step: at most so many but for one step in a thousand


@dataclass(frozen=True)
class Decision:
    """What training takes over from the estimate."""

    max_tokens_per_pack: int  # at least the longest row; 0 if padded
    gradient_checkpointing: bool
    hold_gradients: bool  # sharded: reduce gradients once a step, not after every pack


def measure(
    config: "PreTrainedConfig",
    tokens: int,
    half: bool,
    autocast: bool = False,
    lora: LoraArguments | None = None,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Count parameters, and the bytes that the forward pass of a row of `tokens` keeps for the backward pass: two rows
    less one row, so that what is there once (weights cast by autocast) does not count. `half`: bfloat16 arithmetic, of
    weights that are bfloat16 as under FSDP or, with `autocast`, float32. `dtype`: of the frozen base under `lora`.
    Nothing is computed and no memory is taken; a 7B model takes a second."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    if not lora:
        dtype = torch.bfloat16 if half and not autocast else torch.float32

    def forward(model: torch.nn.Module, rows: int) -> tuple[int, int]:
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage
            return tensor

        context = torch.autocast("cpu", torch.bfloat16, enabled=half and autocast)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), context:
            logits = model(input_ids=torch.ones(rows, tokens, dtype=torch.long), use_cache=False).logits
        return sum(storage.nbytes() for storage in kept.values()), logits.shape[-1]

    model = empty_model(config, dtype)
    weights = {id(parameter): parameter.numel() for parameter in model.parameters()}  # tied ones once
    blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or [])]
    layer = max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)
    parameters = trained = sum(weights.values())
    tables = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    embeddings = 0 if lora else sum(table.numel() for table in tables)
    frozen_bytes = 0.0
    if lora:
        frozen_bytes = bytes_of_base(model, parameters, lora, dtype)
        model = add_lora(model, lora, [], seed=0)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        parameters += trained
    with FakeTensorMode(allow_non_fake_inputs=True):
        materialize(model.eval())
        (one, vocabulary), (two, _) = forward(model, 1), forward(model, 2)
    return Model(
        parameters=parameters,
        trained=trained,
        weight_bytes=frozen_bytes + 4 * trained,
        largest_layer=layer,
        layers=max(len(blocks), 1),
        activations=(two - one) / tokens,
        layer_inputs=len(blocks) * config.get_text_config().hidden_size * dtype.itemsize,
        vocabulary=vocabulary,
        recomputes=bool(model.supports_gradient_checkpointing),
        quantized=bool(lora and lora.quantized),
        embeddings=embeddings,
    )


def bytes_of_base(model: "PreTrainedModel", parameters: int, lora: LoraArguments, dtype: torch.dtype) -> float:
    """Return the bytes of the frozen weights. bitsandbytes quantizes linear layers, not the last one of the model: NF4
    has 4 bits and, for 64 of them, a scale of 8 bits."""
    last = model.get_output_embeddings()
    layers = [layer for layer in lora_layers(model).values() if layer is not last] if lora.quantized else []
    quantized = sum(layer.weight.numel() for layer in layers)
    return quantized * (1 if lora.load_in_8bit else 0.516) + (parameters - quantized) * dtype.itemsize


def memory(model: Model, plan: Plan) -> dict[str, float]:
    """Return the bytes per process and part, on the device that does the arithmetic. `host`: on the CPU, under
    offload."""
    shards = plan.group if plan.sharded else 1
    static = {
        "weights": model.weight_bytes,
        "gradients": 4 * model.trained,
        "optimizer": plan.optimizer_bytes * model.trained,
    }
    if plan.optimizer_bytes == OPTIMIZER_BYTES["8bit"]:
        static["optimizer"] += (8 - plan.optimizer_bytes) * model.embeddings
    item = 2 if plan.half else 4
    if plan.zero:
        static["copies of DeepSpeed"] = (item + 4) * model.trained
    static = {name: size / shards for name, size in static.items()}
    root = model.parameters - model.layers * model.largest_layer
    if plan.sharded:
        with_gradient = max(root, model.largest_layer) * model.trained / model.parameters
        live = min(plan.zero.live, model.parameters) if plan.zero else 0
        gathered = item * max(root + 2 * model.largest_layer, live) + (item + 4) * with_gradient
    else:
        cast = min(model.trained, root + model.largest_layer) if plan.checkpointing else model.trained
        gathered = (2 if plan.half else 0) * cast + (4 * model.trained if plan.world_size > 1 else 0)
        gathered += item * model.largest_layer * model.quantized
    kept = model.activations / model.layers + model.layer_inputs if plan.checkpointing else model.activations
    whole = 4.0 * model.trained * plan.whole_gradients
    parts = {**static, "whole gradients": whole, "gathered": gathered}
    parts["activations"] = kept * plan.tokens + _logits(model, plan)
    stepping = 4 * model.trained / shards if plan.foreach and not plan.offload else 0
    training = whole + gathered + parts["activations"]
    parts["activations"] += max(0.0, stepping - training)  # only one of the two at a time
    if plan.zero and not plan.zero.parameters_on_cpu:
        static.pop("copies of DeepSpeed")
    if plan.offload and plan.sharded:
        parts = {**parts, **dict.fromkeys(static, 0.0), "host": sum(static.values()) + stepping}
    return parts


def _logits(model: Model, plan: Plan) -> float:
    """Return the bytes of the targets' logits, their gradient and three float32 temporaries of a chunk; padded batches
    have the logits of all positions and their gradient besides. accelerate makes what leaves a model under autocast
    float32."""
    item, targets = 2 if plan.half and plan.sharded else 4, plan.share * plan.tokens
    positions = targets + (0 if plan.packed else plan.tokens)
    return 2 * item * model.vocabulary * positions + 3 * 4 * min(CHUNK["cuda"], model.vocabulary * targets)


def total(parts: dict[str, float]) -> float:
    return sum(size for name, size in parts.items() if name != "host")


def pack_sizes(plan: Plan, rows: Rows, budget: int | None = None) -> list[int]:
    """Return the tokens of a pack to choose from, the largest first: the user's `budget`, or PACK_TOKENS; never less
    than the longest row, nor more than a step has."""
    sizes = [budget] if budget else [size if plan.on_gpu else min(size, CPU_PACK_TOKENS) for size in PACK_TOKENS]
    return sorted({max(min(size, rows.step), rows.longest) for size in sizes}, reverse=True)


def decide(model: Model, plan: Plan, rows: Rows, available: float, budget: int | None = None) -> Decision:
    """Return the largest packs that fit into `available` bytes. Where nothing fits, and the user has not said
    otherwise, with gradient checkpointing; where nothing fits with it either, the smallest packs without it."""

    def fits(way: Plan) -> bool:
        parts = memory(model, way)
        return total(parts) + SPARE * (parts["gathered"] + parts["activations"]) <= available

    sizes = pack_sizes(plan, rows, budget) if plan.packed else [plan.tokens]
    ways = [False] + [True] * model.recomputes if plan.checkpointing is None else [plan.checkpointing]
    plans = [replace(plan, tokens=size, checkpointing=way) for way in ways for size in sizes]
    smallest = plans[len(sizes) - 1]
    chosen = next(filter(fits, plans), smallest)
    holding = replace(chosen, whole_gradients=True)
    several = plan.packed and rows.step > chosen.tokens
    return Decision(
        max_tokens_per_pack=chosen.tokens if plan.packed else 0,
        gradient_checkpointing=bool(chosen.checkpointing),
        hold_gradients=plan.sharded and not plan.zero and several and fits(holding),
    )


def what_fits(model: Model, plan: Plan, rows: Rows, available: float) -> str | None:
    """Return the first change of flags, from the cheapest in time to the dearest, with which the run fits into
    `available` bytes; None where none does."""
    ways = [("", plan)]
    if not plan.sharded and plan.world_size > 1:
        ways.append(('--fsdp "full_shard auto_wrap"', replace(plan, sharded=True)))
    recompute = " --gradient_checkpointing True" if model.recomputes and not plan.checkpointing else ""
    ways += [(flags + recompute, replace(way, checkpointing=True)) for flags, way in ways if recompute]
    if not plan.sharded and plan.optimizer_bytes == 8:
        small = dict(optimizer_bytes=OPTIMIZER_BYTES["8bit"], foreach=False)
        ways += [
            (f"--optim adamw_bnb_8bit {flags.strip()}".strip(), replace(way, **small))
            for flags, way in ways
            if not way.sharded  # which bitsandbytes does not know
        ]
    if plan.on_gpu and not plan.zero:
        launch = "torchrun --nproc_per_node=1 " if plan.world_size == 1 else ""
        offload = f'{launch}--fsdp "full_shard auto_wrap offload"', replace(plan, sharded=True, offload=True)
        ways.append(offload)
        ways += [(offload[0] + recompute, replace(offload[1], checkpointing=True))] if recompute else []
    for flags, way in ways:
        for smaller, tokens in [("", plan.tokens), *_smaller(plan, rows)]:
            parts = memory(model, replace(way, tokens=tokens))
            if total(parts) <= available and (flags or smaller):
                host = parts.get("host", 0)
                where = format_bytes(total(parts))
                where += f" and {format_bytes(host)} of CPU memory a process" if host else ""
                return f"{flags}{smaller}".strip() + f" (about {where})"
    return None


def _smaller(plan: Plan, rows: Rows) -> list[tuple[str, int]]:
    """Return (flags, tokens of a micro-batch) of the same steps in smaller pieces, the largest first."""
    if plan.packed:
        return [(f" --max_tokens_per_pack {size}", size) for size in pack_sizes(plan, rows) if size < plan.tokens]
    parts = [2**k for k in range(1, plan.rows.bit_length()) if plan.rows % 2**k == 0]
    flags = " --per_device_train_batch_size {} --gradient_accumulation_steps {}"
    return [(flags.format(plan.rows // part, plan.accumulation * part), plan.tokens // part) for part in parts]


def rows_of(lengths: Sequence[int], num_targets: int, rows_per_step: int, world_size: int) -> Rows:
    """Return what the estimate must know of rows of `lengths` tokens. The ranks share the tokens of a step evenly."""
    sizes = torch.tensor(lengths, dtype=torch.float64)
    drawn = min(rows_per_step, len(lengths))
    spread = math.sqrt(drawn * (1 - drawn / len(lengths))) * sizes.std(correction=0).item()
    step = drawn * sizes.mean().item() + 3 * spread
    return Rows(max(lengths), num_targets / sum(lengths), math.ceil(step / world_size))


def plan_of(args: "TrainingArguments", rows: Rows) -> Plan:
    fsdp_config, packed = args.fsdp_config if args.fsdp else {}, args.batching == "packed"
    zero = Zero3.of(args.deepspeed) if args.deepspeed else None
    return Plan(
        world_size=args.world_size,
        sharded=bool(args.fsdp or zero),
        group=args.parallelism_config.dp_shard_size if args.parallelism_config else args.world_size,
        offload=bool(fsdp_config.get("cpu_offload") or (zero and zero.optimizer_on_cpu)),
        checkpointing=True if fsdp_config.get("activation_checkpointing") else args.gradient_checkpointing,
        half=bool(args.bf16 or args.fp16),
        optimizer_bytes=optimizer_bytes(args),
        foreach=optimizer_bytes(args) >= 4 and "fused" not in enum_value(args.optim),
        on_gpu=args.device.type != "cpu",
        packed=packed,
        rows=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        tokens=0 if packed else args.per_device_train_batch_size * rows.longest,
        share=rows.share,
        zero=zero,
    )


def optimizer_bytes(args: "TrainingArguments") -> float:
    """Return the bytes a parameter of the state that --optim keeps."""
    return next((size for key, size in OPTIMIZER_BYTES.items() if key in enum_value(args.optim)), 8)


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def available_memory(device: torch.device) -> tuple[float, float]:
    """Return (bytes for this process on `device`, bytes of CPU memory for it)."""
    import psutil

    host = psutil.virtual_memory().available / local_world_size()
    return (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host), host


def estimate_memory(
    args: "TrainingArguments", config: "PreTrainedConfig", rows: Rows, lora: LoraArguments | None = None
) -> tuple[Model | None, Decision]:
    """Decide what the flags leave open, and print what a process will take, whether that is there, and which flags to
    change if it is not. Where the model cannot be run on fake tensors: None, and a cautious decision."""
    plan = plan_of(args, rows)
    budget = int(args.max_tokens_per_pack) if plan.packed and args.max_tokens_per_pack != "auto" else None
    try:
        frozen = dict(lora=lora, dtype=base_dtype(args, config)) if lora else {}
        model = measure(config, rows.longest, plan.half, autocast=not plan.sharded, **frozen)
    except UsageError:  # such as layers for LoRA that the model does not have
        raise
    except Exception as error:  # of a model's own code, over a configuration that may be anything
        reason = f"{type(error).__name__}: {first_line(error):.100}"
        print_rank0(f"memory and disk: no estimate, this model does not run on fake tensors ({reason})", 0)
        tokens = max(budget or CPU_PACK_TOKENS, rows.longest)
        return None, Decision(tokens if plan.packed else 0, bool(plan.checkpointing), hold_gradients=False)
    available, host = available_memory(args.device)
    available -= GB if plan.on_gpu else 0
    decision = decide(model, plan, rows, available, budget)
    chosen = replace(
        plan,
        tokens=decision.max_tokens_per_pack or plan.tokens,
        whole_gradients=decision.hold_gradients,
        checkpointing=decision.gradient_checkpointing,
    )
    _print_estimate(model, chosen, rows, available, host)
    if chosen.checkpointing and plan.checkpointing is None:
        least = pack_sizes(plan, rows, budget)[-1] if plan.packed else plan.tokens
        size = total(memory(model, replace(plan, tokens=least)))
        print_rank0(
            f"  --gradient_checkpointing True is chosen: without it {least} tokens at a time take {format_bytes(size)}",
            0,
        )
    return model, decision


def _print_estimate(model: Model, plan: Plan, rows: Rows, available: float, host: float) -> None:
    parts = memory(model, plan)
    size = total(parts)
    described = " + ".join(f"{name} {format_bytes(part)}" for name, part in parts.items() if name != "host" and part)
    batch = f"packs of at most {plan.tokens}" if plan.packed else f"{plan.rows} rows of {rows.longest}"
    unit = f"per {'GPU' if plan.on_gpu else 'process'} ({batch} tokens)"
    print_rank0(f"memory {unit}, estimate: {described} = {format_bytes(size)}, available {format_bytes(available)}", 0)
    if size > available:
        fits = what_fits(model, plan, rows, available)
        way = f"this would: {fits}" if fits else "take more GPUs, or a smaller model"
        fewer = "; or train fewer parameters, as with --lora_r 8" if model.trained == model.parameters else ""
        print_rank0(f"  does not fit; {way}{fewer}", 0)
    if parts.get("host", 0) > host:
        print_rank0(
            f"  offloading takes {format_bytes(parts['host'])} of CPU memory a process, available {format_bytes(host)}",
            0,
        )
