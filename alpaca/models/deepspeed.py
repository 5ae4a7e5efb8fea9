"""DeepSpeed ZeRO-3: its configuration checked before anything loads, float32 weights exactly into it and out of it.

Parameters, gradients and optimizer are partitioned over the ranks by DeepSpeed; transformers partitions the model while
it is read (deepspeed.zero.Init). What is here keeps that exact: under --bf16 DeepSpeed would read the weights in
bfloat16, and save them so.
"""

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from alpaca.common.arguments import enum_value, read_config
from alpaca.common.distributed import print_rank0
from alpaca.common.errors import UsageError
from alpaca.common.files import fingerprint
from alpaca.models import fsdp
from alpaca.models.embeddings import gathered

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainingArguments

INSTALL = 'DS_BUILD_OPS=0 pip install "deepspeed>=0.19,<0.20"'
FROM_FLAGS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
OFFLOAD = ("offload_optimizer", "offload_param")
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")  # they work element by element, so also on partitions


# ---- flags ----


def configure(args: "TrainingArguments") -> None:
    """Check --deepspeed, complete it in `args` (a dict from now on), and open the process group of CPU ranks.

    Raises:
        UsageError: of what DeepSpeed would refuse late, or do otherwise than the flags say.
    """
    if args.fsdp:
        raise UsageError("--deepspeed and --fsdp: both shard the parameters; give one of them")
    args.deepspeed = complete_config(args.deepspeed)
    if args.load_best_model_at_end:
        raise UsageError(
            "--load_best_model_at_end: not with --deepspeed; every checkpoint is a plain model, take the best one"
        )
    if args.torch_compile:
        raise UsageError("--torch_compile: not with --deepspeed, which gathers parameters inside layers; use --fsdp")
    optimizer = enum_value(args.optim)
    if optimizer not in OPTIMIZERS and "optimizer" not in args.deepspeed:
        raise UsageError(f"--optim {optimizer}: with --deepspeed expected {' or '.join(OPTIMIZERS)}")
    if find_spec("deepspeed") is None:
        raise UsageError(f"--deepspeed: DeepSpeed is not installed; {INSTALL}")
    if "LOCAL_RANK" not in os.environ:
        raise UsageError("--deepspeed: start it with torchrun, also a single process: torchrun --nproc_per_node=1 ...")
    warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+` is deprecated", category=FutureWarning)
    if args.use_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo does, without a compiler
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False, timeout=args.ddp_timeout_delta)


def complete_config(given: str | dict[str, Any]) -> dict[str, Any]:
    """Return the configuration, with "auto" for what is left out and the flags decide: DeepSpeed alone would not clip
    gradients, say.

    Raises:
        UsageError: it cannot be read, or is not of ZeRO-3.
    """
    config = copy.deepcopy(given) if isinstance(given, dict) else read_config(given, "--deepspeed")
    zero = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage != 3:
        name = given if isinstance(given, str) and not given.lstrip().startswith("{") else "its configuration"
        raise UsageError(
            f"--deepspeed: zero_optimization.stage is {stage} in {name}, expected 3; --fsdp shards in other ways too: "
            '"shard_grad_op auto_wrap" (as stage 2), "hybrid_shard auto_wrap"'
        )
    for name in FROM_FLAGS:
        config.setdefault(name, "auto")
    for name in ("bf16", "fp16"):
        config.setdefault(name, {}).setdefault("enabled", "auto")
    return config


def check_agreement(args: "TrainingArguments") -> None:
    """Check the configuration after TrainingArguments have put the flags where the configuration says "auto".

    Raises:
        UsageError: it has another value than a flag.
    """
    if wrong := args.hf_deepspeed_config.mismatches:
        listed = "; ".join(line.removeprefix("- ds ").replace(" vs hf ", ", but the flags say ") for line in wrong)
        raise UsageError(f'--deepspeed: {listed}. Write "auto" there, which takes the value of the flag')
    for section, flag in (("optimizer", "optim"), ("scheduler", "lr_scheduler_type")):
        if own := args.deepspeed.get(section):
            value = getattr(args, flag)
            print_rank0(
                f"note: --{flag} {getattr(value, 'value', value)} -> {own.get('type')}, the {section} of --deepspeed",
                args.process_index,
            )


@dataclass(frozen=True)
class Zero3:
    """What a memory estimate must know of the configuration."""

    live: int  # parameters that a rank may keep whole
    optimizer_on_cpu: bool
    parameters_on_cpu: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Zero3":
        zero = config["zero_optimization"]
        offloaded = [(zero.get(name) or {}).get("device") in ("cpu", "nvme") for name in OFFLOAD]
        return cls(int(zero.get("stage3_max_live_parameters", 1e9)), *offloaded)


def described(args: "TrainingArguments") -> dict[str, Any]:
    """Return its part of the run fingerprint. DeepSpeed continues only what it has saved itself, with as many ranks."""
    if not args.deepspeed:
        return {"--deepspeed": None}
    return {
        "--deepspeed": f"ZeRO-3 {fingerprint(args.deepspeed)[:12]}",
        "the number of processes (DeepSpeed saves a part of each)": args.world_size,
    }


# ---- weights ----


@contextmanager
def _told_to_transformers(config: dict[str, Any] | None) -> Iterator[None]:
    """Let transformers make models by `config` inside, in place of the run's own configuration."""
    from transformers.integrations import deepspeed as integration

    reference = integration._hf_deepspeed_config_weak_ref
    own = reference and reference()
    integration.unset_hf_deepspeed_config()
    instead = integration.HfDeepSpeedConfig(config) if config else None  # sets itself, and must stay alive
    try:
        yield
    finally:
        del instead
        integration.unset_hf_deepspeed_config()
        if own is not None:
            integration.set_hf_deepspeed_config(own)


@contextmanager
def unpartitioned() -> Iterator[None]:
    """Make plain models inside."""
    with _told_to_transformers(None):
        yield


@contextmanager
def partitioned_in_float32(args: "TrainingArguments") -> Iterator[None]:
    """Partition models that are read inside in float32, whatever the dtype of the arithmetic."""
    if not args.deepspeed:
        yield
        return
    config = copy.deepcopy(args.hf_deepspeed_config.config)
    config["bf16"] = config["fp16"] = {"enabled": False}
    with _told_to_transformers(config):
        yield


def to_arithmetic_dtype(model: "PreTrainedModel", args: "TrainingArguments") -> None:
    """Partition what is not yet (embeddings after resizing), then cast the partitions to the dtype that DeepSpeed
    computes in. Their float32 values stay beside them, as `parameter.exact`, until `attach` puts them in place."""
    whole = [parameter for parameter in model.parameters() if not hasattr(parameter, "ds_id")]
    one = next(parameter for parameter in model.parameters() if hasattr(parameter, "ds_id"))
    if whole:
        one.convert_to_zero_parameters(param_list=whole)
    dtype = args.hf_deepspeed_config.dtype()
    for parameter in model.parameters() if dtype != torch.float32 else ():
        parameter.exact = parameter.ds_tensor.data
        parameter.ds_tensor.data = parameter.exact.to(dtype)
        parameter.data = parameter.data.to(dtype)


def attach(trainer: "Trainer") -> None:
    """Give DeepSpeed's float32 master weights their exact values, when it has made them from the partitions."""
    accelerator = trainer.accelerator
    accelerator.gradient_accumulation_steps = trainer.args.gradient_accumulation_steps  # else it warns
    prepare = accelerator.prepare

    def prepare_exactly(*objects, **kwargs):
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils import safe_set_local_fp32_param

        prepared = prepare(*objects, **kwargs)
        own = fsdp.plain_pickles(LossScaler, DynamicLossScaler, ZeroStageEnum)
        for engine in prepared if isinstance(prepared, tuple) else (prepared,):
            if hasattr(engine, "load_checkpoint"):
                engine.load_checkpoint = own(engine.load_checkpoint)
        for parameter in (p for x in objects if isinstance(x, nn.Module) for p in x.parameters()):
            if hasattr(parameter, "exact"):
                safe_set_local_fp32_param(parameter, parameter.exact)
                del parameter.exact
        return prepared

    accelerator.prepare = prepare_exactly


def backward(engine: nn.Module, loss: Tensor, last: bool) -> None:
    """Run the backward pass. After the `last` one gradients are whole, to be read by `gradient`, and forgotten by
    engine.optimizer.zero_grad()."""
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss, scale_wrt_gas=False)


def gradient(parameter: nn.Parameter) -> Tensor | None:
    """Return the gradient, or this rank's part of it if the parameter is partitioned."""
    if not hasattr(parameter, "ds_id"):
        return parameter.grad
    from deepspeed.utils import safe_get_local_grad

    return safe_get_local_grad(parameter)


def full_state_dict(model: nn.Module, keep: bool, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return what alpaca.models.fsdp.full_state_dict does, of the float32 master weights cast to `dtype`."""
    from deepspeed.utils import safe_get_full_fp32_param

    def whole(value: Tensor) -> Tensor:
        master = safe_get_full_fp32_param(value) if isinstance(value, nn.Parameter) else None
        if master is None:  # a buffer, or a frozen parameter, which has no master
            with gathered([value]):
                master = value.detach().clone()
        return master.to(dtype) if master.is_floating_point() else master

    return fsdp.full_state_dict(model, keep, whole)
