"""Fully sharded training (FSDP2): loading without a full copy per rank, sharding on CPU ranks, saving whole tensors."""

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from alpaca.common.arguments import read_config
from alpaca.common.distributed import print_rank0
from alpaca.common.errors import UsageError, first_line
from alpaca.models.compile import repeated_layers
from alpaca.models.embeddings import of_language_model

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.parallelism_config import ParallelismConfig
    from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments


FSDP_KEYS = {
    "version",
    "hybrid_shard",
    "reshard_after_forward",
    "cpu_offload",
    "auto_wrap_policy",
    "transformer_layer_cls_to_wrap",
    "min_num_params",
    "activation_checkpointing",
}


def configure_fsdp(args: "TrainingArguments") -> None:
    """Complete `args.fsdp_config` before TrainingArguments turns it into accelerate's plugin arguments.

    Weights are broadcast from rank 0, and the optimizer is saved in shards (weights whole, see `full_state_dict`).
    """
    given = args.fsdp_config or {}
    given = read_config(given, "--fsdp_config") if isinstance(given, str) else given
    config = args.fsdp_config = without_prefix(given)
    args.fsdp = True
    if unknown := sorted(config.keys() - FSDP_KEYS):
        raise UsageError(f"--fsdp_config: unknown key {unknown[0]!r}; known are {', '.join(sorted(FSDP_KEYS))}")
    if int(config.get("version", 2)) != 2:
        raise UsageError("--fsdp_config version 1: only FSDP2 (version 2, the default) is supported")
    if args.load_best_model_at_end:
        raise UsageError(
            "--load_best_model_at_end: not with --fsdp; every checkpoint is a plain model, take the best one"
        )
    if config.pop("hybrid_shard", False):
        args.parallelism_config = hybrid_mesh()
    config["cpu_ram_efficient_loading"] = True
    config["state_dict_type"] = "FULL_STATE_DICT" if args.save_only_model else "SHARDED_STATE_DICT"
    # accelerate reads these two when it opens the process group: clipping offloaded gradients reduces on the CPU,
    # which NCCL alone cannot do.
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ["FSDP_OFFLOAD_PARAMS"] = str(bool(config.get("cpu_offload"))).lower()


def hybrid_mesh() -> "ParallelismConfig | None":
    """Return the mesh of parameters that are sharded over the processes of a node and replicated over the nodes, so
    that only gradients travel between nodes. None on a single node, where that is full_shard.

    Raises:
        UsageError: the nodes have one process each, so that there is nothing to shard over.
    """
    from accelerate.parallelism_config import ParallelismConfig

    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if world == local:
        print_rank0('flag: --fsdp "hybrid_shard" -> full_shard: there is one node', int(os.environ["RANK"]))
        return None
    if local == 1:
        raise UsageError('--fsdp "hybrid_shard": shards inside a node, but a node has one process here; use full_shard')
    return ParallelismConfig(dp_replicate_size=world // local, dp_shard_size=local)


def mixed_precision_policy(mixed_precision: str) -> dict[str, torch.dtype] | None:
    """Return the policy of arithmetic in `mixed_precision` with gradients reduced in float32 (accelerate's default
    would reduce in bf16)."""
    if mixed_precision == "no":
        return None
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]
    return {"param_dtype": dtype, "reduce_dtype": torch.float32, "output_dtype": dtype}


def shard_on_cpu(trainer: "Trainer", mesh: "ParallelismConfig | None" = None) -> None:
    """Make `--fsdp` shard on CPU ranks too: accelerate 1.15 would train them with DDP, a full copy each. FSDP2 itself
    runs on gloo; only accelerate's state has to say so, before the Trainer reads it. Not for GPUs."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

    accelerator, state = trainer.accelerator, trainer.accelerator.state
    assert accelerator.device.type == "cpu", accelerator.device
    plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    offload = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy()
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
    trainer.is_fsdp_enabled = True
    if mesh:
        state.parallelism_config, state.device_mesh = mesh, mesh.get_device_mesh("cpu")
    prepare = accelerator.prepare

    def prepare_and_check(*objects, **kwargs):
        prepared = prepare(*objects, **kwargs)
        for module in (x for x in objects if isinstance(x, nn.Module)):  # FSDP2 shards a module in place
            assert all(isinstance(weight, DTensor) for weight in module.parameters()), "a parameter is not sharded"
        return prepared

    accelerator.prepare = prepare_and_check


def empty_model(config: "PreTrainedConfig", dtype: torch.dtype = torch.float32, **kwargs) -> "PreTrainedModel":
    """Return the model of `config` with parameters on the meta device, for ranks that receive their shards from
    rank 0. Buffers that no checkpoint holds (rotary frequencies) are real, since nobody sends them."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **kwargs)
    model.tie_weights()
    return model


def materialize(model: "PreTrainedModel") -> None:
    """Give meta parameters (and buffers that peft adds) addresses, in place. accelerate tells parameters apart by
    address when it rebuilds the optimizer. The pages are never written, so they take no memory; accelerate drops them
    and sends the shards."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                storage = torch.empty_like(parameter, device="cpu")
                setattr(module, name, nn.Parameter(storage, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    model.tie_weights()


def resolve_wrap_classes(args: "TrainingArguments", config: "PreTrainedConfig") -> None:
    """Correct the spelling of transformer_layer_cls_to_wrap (`LLaMADecoderLayer` of early 2023), in place.

    Raises:
        UsageError: the model has no such layer; the message lists those it has.
    """
    names = args.fsdp_config.get("transformer_layer_cls_to_wrap") or []
    names = names.split(",") if isinstance(names, str) else list(names)
    if not names and config.get_text_config(decoder=True) is config:
        return  # accelerate takes the model's own _no_split_modules
    model = empty_model(config)
    names = names or _layers_of_language_model(model)
    layers = {type(module).__name__ for module in model.modules() if not isinstance(module, nn.ModuleList)}
    by_lower = {name.lower(): name for name in layers}
    for i, name in enumerate(names):
        if name.lower() not in by_lower:
            own = ", ".join(sorted(model._no_split_modules or []))
            raise UsageError(
                f"--fsdp_transformer_layer_cls_to_wrap {name}: {type(model).__name__} has no such module; its decoder "
                f"layer is {own}. All its modules: {', '.join(sorted(layers))}"
            )
        names[i] = by_lower[name.lower()]
    args.fsdp_plugin_args["transformer_cls_names_to_wrap"] = ",".join(names)


def _layers_of_language_model(model: "PreTrainedModel") -> list[str]:
    """Return the classes of its decoder layers: a model that reads images too names those of its vision tower as well,
    and some that it does not hold."""
    inside = of_language_model(model)
    own = {type(module).__name__ for name, module in model.named_modules() if name in inside}
    names = sorted(own & set(model._no_split_modules or []))
    return names or sorted({type(layer).__name__ for layer in repeated_layers(model.get_decoder())})


def check_dropout(args: "TrainingArguments", model: nn.Module) -> None:
    """Raise UsageError where recomputed layers would draw other dropout masks than the forward pass did: accelerate's
    checkpointing under FSDP does not restore the random state, and the gradients would be wrong."""
    rates = {name: rate for name, rate in model.config.to_dict().items() if "drop" in name and isinstance(rate, float)}
    active = [f"{name}={rate}" for name, rate in rates.items() if rate > 0]
    if args.fsdp_config.get("activation_checkpointing") and active:
        raise UsageError(
            f"--fsdp_config activation_checkpointing: gives wrong gradients with dropout ({', '.join(active)}); use "
            "--gradient_checkpointing True, which restores the random state"
        )


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.detach().full_tensor() if isinstance(value, DTensor) else value.detach()


def full_state_dict(
    model: nn.Module, keep: bool, whole: Callable[[torch.Tensor], torch.Tensor] = _whole
) -> dict[str, torch.Tensor]:
    """Gather every sharded tensor (by `whole`) on the CPU, one at a time. Collective: all ranks call it; those with
    `keep=False` hold no more than one whole tensor and return {}. Tied weights stay one tensor. Under LoRA the frozen
    base is left out."""
    state: dict[str, torch.Tensor] = {}
    gathered: dict[int, torch.Tensor] = {}
    frozen_base = hasattr(model, "peft_config")
    for name, value in model.state_dict(keep_vars=True).items():
        if frozen_base and isinstance(value, nn.Parameter) and not value.requires_grad:
            continue
        if id(value) not in gathered:
            tensor = whole(value)
            gathered[id(value)] = tensor.cpu() if keep else torch.empty(0)
        if keep:
            state[name] = gathered[id(value)]
    return state


# ---- an optimizer saved by FSDP, continued without, and the other way round ----


def save_sharded_optimizer(
    accelerator: "Accelerator", model: nn.Module, optimizer: "torch.optim.Optimizer", folder: str
) -> None:
    """Save the optimizer in shards, every rank its own. Collective."""
    from accelerate.utils import save_fsdp_optimizer

    save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, model, folder)


def load_resharded_optimizer(model: "PreTrainedModel", optimizer: "torch.optim.Optimizer", folder: str) -> None:
    """Fill `optimizer` from a checkpoint that was saved in shards and is now needed whole, or saved whole and now
    needed in shards. Parameters are matched by name. Collective under torch.distributed."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    shards = Path(folder) / "optimizer_0"
    if shards.is_dir():
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, storage_reader=dcp.FileSystemReader(shards))
        return set_optimizer_state_dict(model, optimizer, state["optimizer"])
    whole = torch.load(Path(folder) / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    groups = [{**group, "params": [order[i] for i in group["params"]]} for group in whole["param_groups"]]
    named = {"state": {order[i]: values for i, values in whole["state"].items()}, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, named, options=StateDictOptions(full_state_dict=True))


IN_METADATA = {  # by module: all that torch writes into the .metadata of a checkpoint in shards, but for dtypes
    "torch.distributed.checkpoint.metadata": (
        "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties "
        "StorageMeta _MEM_FORMAT_ENCODING"
    ).split(),
    "torch.distributed.checkpoint.filesystem": ["_StorageInfo"],
    "torch.serialization": ["_get_layout"],
    "torch": ["Size"],
    "collections": ["OrderedDict"],
    "pathlib": ["Path", "PosixPath", "WindowsPath"],
    "pathlib._local": ["Path", "PosixPath", "WindowsPath"],
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        if name not in IN_METADATA.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


@contextmanager
def plain_pickles(*classes: type) -> Iterator[None]:
    """Let torch read tensors, numbers, texts and `classes` from pickles inside, and nothing else: torch's reader of
    shards and DeepSpeed would run what a file of a stranger's checkpoint tells them to.

    Raises:
        UsageError: a file holds more.
    """
    from torch.distributed.checkpoint import filesystem
    from torch.distributed.checkpoint.api import CheckpointException

    refused: list[Exception] = []  # torch drops them and reports their texts

    def noted(read: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return read(*arguments, **options)
        except Exception as error:
            refused.append(error)
            raise

    def load(*arguments: Any, weights_only: bool | None = True, **options: Any) -> Any:
        with torch.serialization.safe_globals(list(classes)):
            return noted(torch_load, *arguments, weights_only=True, **options)

    torch_load = torch.load
    reader = SimpleNamespace(**vars(pickle) | {"load": lambda file: noted(_MetadataUnpickler(file).load)})
    try:
        with mock.patch.object(filesystem, "pickle", reader), mock.patch.object(torch, "load", load):
            yield
    except (Exception, CheckpointException) as error:
        if not refused and not isinstance(error, CheckpointException):
            raise
        why = first_line(refused[0]) if refused else str(error).strip().splitlines()[-1]
        raise UsageError(
            "a file of the checkpoint to continue from is damaged, or holds more than tensors, numbers and texts, "
            f"which would be run as code ({why}); continue from a checkpoint of your own"
        ) from error


def without_prefix(fsdp_config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy whose keys lack the `fsdp_` that they began with in 2023."""
    return {name.removeprefix("fsdp_"): value for name, value in fsdp_config.items()}
