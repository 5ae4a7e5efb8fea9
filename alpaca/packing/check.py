"""Whether packed rows train as padded ones would, tried before it is relied upon.

The gradient of a few rows is computed three times: each row alone, padded, packed. The first two differ by rounding
only, which says what rounding amounts to for this model, dtype and device; the third may not differ by much more.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from alpaca.common.distributed import all_gather_object, print_rank0
from alpaca.common.errors import first_line
from alpaca.packing.packing import (
    CPU_PACK_TOKENS,
    MicroBatch,
    Packing,
    RowSizes,
    plan_packing,
    why_not_packed,
    why_not_shared,
)
from alpaca.packing.sampler import StepSampler

if TYPE_CHECKING:
    from torch.utils.data import DataLoader, Dataset
    from transformers import TrainingArguments


ATOL = 1e-5  # relative difference that is never minded: float32 rounding is below it
TOLERANCE = 4  # times the difference between padded rows and the same alone, which is called rounding
MAX_ROUNDING = {True: 0.1, False: 1e-3}  # of what can be rounding, in half precision or tf32 and in float32


def select_packing(model: nn.Module, args: "TrainingArguments", dataset: "Dataset", sizes: RowSizes) -> Packing | None:
    """How to pack, as far as flags and model say; None for padded. Says what is not done and why."""
    if args.batching == "padded":
        return None
    reason = why_not_packed(model.config, args, int(sizes.lengths.max()))
    if getattr(model, "_is_stateful", False):  # of transformers: Mamba, Jamba, RWKV, ...
        reason = "this model carries a state from token to token, also from row to row"
    if reason:
        print_rank0(f"note: padded batches, not packed: {reason}", args.process_index)
        return None
    share = args.share_prefix
    if share and (reason := why_not_shared(model)):
        print_rank0(f"note: what rows begin with is computed for each of them: {reason}", args.process_index)
        share = False
    tokens = args.max_tokens_per_pack
    return plan_packing(dataset, sizes, CPU_PACK_TOKENS if tokens == "auto" else int(tokens), share)


def verify_packing(
    loader: "DataLoader",
    args: "TrainingArguments",
    model: nn.Module,
    gradient_of: Callable[[list[MicroBatch]], list[Tensor]],
) -> None:
    """Compare and, on a mismatch, fall back: to packs without shared prefixes, then to padded batches. Say what came
    out, in a line. Collective: all ranks try the same rows.

    gradient_of: computes, for rows of the loader's dataset, this rank's part of some tensors of the gradient."""
    sampler: StepSampler = loader.batch_sampler
    if sampler.packing is None:
        return
    rank, step = args.process_index, next(sampler.steps())
    rows = rows_to_try(sampler.packing, sampler.sizes, step)
    weights = [1.0 / max(int(sampler.sizes.num_targets[rows].sum()), 1)]
    alone = [MicroBatch([row], weights, False, None) for row in rows]
    padded = MicroBatch(rows, weights * len(rows), False, None)
    with _without_eager(model):
        reference = gradient_of([padded])
        noise = difference(gradient_of(alone), reference)
    rough = args.bf16 or args.fp16 or args.tf32
    rough = rough or any(weight.dtype != torch.float32 for weight in model.parameters())  # LoRA's base
    if noise > MAX_ROUNDING[bool(rough)]:
        sampler.packing = loader.dataset.packing = None
        print_rank0(
            f"note: padded batches: already rows alone differ from padded ones, by {noise:.1e}, and so there is no "
            "telling whether packs are exact",
            rank,
        )
        return
    tries = [sampler.packing]
    if sampler.packing.prefixes:
        tries.append(plan_packing(loader.dataset.dataset, sampler.sizes, sampler.packing.max_tokens, False))
    for packing in tries:
        sampler.packing = loader.dataset.packing = packing
        what = "packs that share what rows begin with" if packing.prefixes else "packs"
        gradient, failure = _attempt(gradient_of, model, replace(padded, packed=True))
        if failure:
            print_rank0(f"note: no {what}: {failure}", rank)
            continue
        found = difference(gradient, reference)
        told = f"the gradient of {len(rows)} rows differs from the padded one by {found:.1e}"
        if found <= max(ATOL, TOLERANCE * noise):
            totals = sampler.plan(step)[0].step
            print_rank0(
                f"{what}: {totals.computed / totals.tokens:.0%} of the rows' tokens are computed, without padding; "
                f"{told} (rounding: {noise:.1e})",
                rank,
            )
            return
        print_rank0(f"note: no {what}: {told}, and rounding explains {noise:.1e}", rank)
    sampler.packing = loader.dataset.packing = None
    print_rank0(
        "note: padded batches, as no way of packing is exact here; the memory that they take is forecast with "
        "--batching padded",
        rank,
    )


@contextmanager
def _without_eager(model: nn.Module) -> Iterator[None]:
    """In bfloat16 eager attention rounds more than the kernels that packs use, which would look like a difference."""
    config, chosen = model.config, model.config._attn_implementation
    if chosen == "eager" and getattr(model, "_supports_sdpa", False):
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = chosen


def _attempt(
    gradient_of: Callable[[list[MicroBatch]], list[Tensor]], model: nn.Module, batch: MicroBatch
) -> tuple[list[Tensor] | None, str | None]:
    """The gradient of a packed batch; or why a model, on some rank, cannot compute it."""
    gradient = failure = None
    try:
        gradient = gradient_of([batch])
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        failure = first_line(error)
        model.zero_grad()
    failures = [one for one in all_gather_object(failure) if one]
    return gradient, failures[0] if failures else None


def rows_to_try(packing: Packing, sizes: RowSizes, step: list[list[int]]) -> list[int]:
    """Of the rows of a step, the two shortest with targets that begin with each prefix, and at least two."""
    rows = [row for batch in step for row in batch]
    usable = [row for row in rows if sizes.num_targets[row]] or rows
    usable.sort(key=lambda row: sizes.lengths[row])
    of_prefix = {
        prefix: [row for row in usable if packing.prefix_of[row] == prefix][:2]
        for prefix in np.unique(packing.prefix_of)
    }
    rows = [row for found in of_prefix.values() for row in found]
    return rows if len(rows) > 1 else usable[:2]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """|found - expected| / |expected| over all tensors, and all ranks where they hold parts."""
    sums = torch.zeros(2, dtype=torch.float32, device=expected[0].device if expected else "cpu")
    for x, y in zip(found, expected, strict=True):
        sums += torch.stack([(x.float() - y.float()).square().sum(), y.float().square().sum()])
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(sums)
    apart, size = sums.sqrt().tolist()
    return apart / max(size, 1e-30)
