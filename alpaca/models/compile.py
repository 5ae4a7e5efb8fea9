"""--torch_compile: the decoder layers compiled one by one, for any number of tokens; and what a step raises, explained.

Layers are alike, so that what is compiled for the first serves all of them, and attention within packs, which is not
compiled, divides a layer and not the model. The embedding and the logits of the targets are left as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from alpaca.common.errors import UsageError, first_line

if TYPE_CHECKING:
    from transformers import TrainingArguments


def repeated_layers(module: nn.Module) -> list[nn.Module]:
    """Return what stands in the outermost nn.ModuleLists."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [layer for child in module.children() for layer in repeated_layers(child)]


def compile_layers(model: nn.Module, args: "TrainingArguments") -> None:
    """Compile the layers of `model` in place, so that parameters keep their names and hooks that FSDP sets later still
    run. Nothing is compiled before the first forward pass, see `explained`.

    Raises:
        UsageError: there is no such --torch_compile_backend or --torch_compile_mode.
    """
    torch._dynamo.config.optimize_ddp = False  # it would divide layers by DDP's buckets, which they are within
    recomputed = args.gradient_checkpointing or (args.fsdp and args.fsdp_config.get("activation_checkpointing"))
    parts = repeated_layers(model) or [model]
    if recomputed:  # torch leaves a layer uncompiled that is checkpointed and, because of packs, not one graph
        parts = [part for layer in parts for part in layer.children()]
    try:
        for part in parts:
            part.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode, dynamic=True)
    except RuntimeError as error:
        raise UsageError(f"--torch_compile_backend, --torch_compile_mode: {error}") from error


@contextmanager
def explained(args: "TrainingArguments") -> Iterator[None]:
    """Raise UsageError in place of the traceback of a step that runs out of memory, or of a compiler that is missing or
    fails."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UsageError(f"out of memory in a training step: {less_memory(args)}\n{first_line(error)}") from error
    except Exception as error:
        if not (args.torch_compile and _of_a_compiler(error)):
            raise
        reason = str(error).split("\n\nSet TORCHDYNAMO_VERBOSE")[0].strip()
        raise UsageError(
            f"--torch_compile: the backend {args.torch_compile_backend} does not work here (inductor needs a C++ "
            f"compiler, such as g++, and on a GPU Triton). Without --torch_compile nothing is needed.\n{reason}"
        ) from error


def _of_a_compiler(error: Exception) -> bool:
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import InductorError

    return isinstance(error, (BackendCompilerFailed, InductorError))


def less_memory(args: "TrainingArguments") -> str:
    """Return the flags that take less memory than those of a run, the cheapest in time first."""
    ways = []
    if args.batching == "packed" and args.max_tokens_per_pack != "auto":
        ways.append(f"--max_tokens_per_pack {max(int(args.max_tokens_per_pack) // 2, 1)}")
    elif args.batching == "padded" and args.per_device_train_batch_size > 1:
        rows, micro_batches = args.per_device_train_batch_size // 2, args.gradient_accumulation_steps * 2
        ways.append(f"--per_device_train_batch_size {rows} --gradient_accumulation_steps {micro_batches}")
    if not args.gradient_checkpointing:
        ways.append("--gradient_checkpointing True")
    return "try " + ", then ".join([*ways, '--fsdp "full_shard auto_wrap offload"', "--lora_r 8"])
