"""Whether packed rows train as padded ones would: a check of a few rows before every run, and the comparison of a whole
step that scripts.check_packing prints.

Both compute the same gradient three times: each row alone, padded, packed. The first two differ by rounding only, which
says what rounding amounts to for this model, dtype and device; the third may not differ by much more.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from alpaca.common.distributed import all_gather_object, print_rank0
from alpaca.common.errors import first_line
from alpaca.packing.attention import PackLayout, named_kernel, packed_attention_enabled
from alpaca.packing.loss import batch_loss
from alpaca.packing.packing import (
    CPU_PACK_TOKENS,
    MicroBatch,
    PackedBatchDataset,
    Packing,
    RowSizes,
    measure_rows,
    plan_packing,
    why_not_packed,
    why_not_shared,
)
from alpaca.packing.sampler import StepSampler

if TYPE_CHECKING:
    from torch.utils.data import DataLoader, Dataset
    from transformers import PreTrainedModel, TrainingArguments

T = TypeVar("T")
Gradient = dict[str, Tensor]

ATOL = 1e-5  # relative difference that is never minded: float32 rounding is below it
TOLERANCE = 4  # times the difference between padded rows and the same alone, which is called rounding
MAX_ROUNDING = {True: 0.1, False: 1e-3}  # of what can be rounding, in half precision or tf32 and in float32


# ---- before a run ----


def select_packing(model: nn.Module, args: "TrainingArguments", dataset: "Dataset", sizes: RowSizes) -> Packing | None:
    """Return how to pack, as far as flags and model say, or None for padded batches. Print what is not done and why."""
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
    """Compare a few rows packed and padded. Where gradients differ, fall back to packs without shared prefixes, then to
    padded batches. Print what was found. Collective: all ranks try the same rows.

    gradient_of: returns, for rows of the loader's dataset, this rank's part of some tensors of the gradient."""
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
        rounding = difference(gradient_of(alone), reference)
    arithmetic = _arithmetic(args, model)
    tries = [sampler.packing]
    if sampler.packing.prefixes:
        tries.append(plan_packing(loader.dataset.dataset, sampler.sizes, sampler.packing.max_tokens, False))
    if rounding > MAX_ROUNDING[arithmetic != "float32"]:
        print_rank0(
            f"note: padded batches: rows alone already differ from padded ones by {rounding:.1e}, so there is no "
            "telling whether packs are exact",
            rank,
        )
        tries = []
    for packing in tries:
        sampler.packing = loader.dataset.packing = packing
        what = "packs that share what rows begin with" if packing.prefixes else "packs"
        gradient, failure = attempt(partial(gradient_of, [replace(padded, packed=True)]), model)
        if failure:
            print_rank0(f"note: no {what}: {failure}", rank)
            continue
        found = difference(gradient, reference)
        if found <= tolerance(rounding):
            totals = sampler.plan(step)[0].step
            print_rank0(
                f"{what}: {totals.computed / totals.tokens:.0%} of the rows' tokens are computed, without padding\n"
                "checked: a packed step has the gradient of a padded one up to rounding "
                f"({found:.1e}; {arithmetic} rounding alone {rounding:.1e})",
                rank,
            )
            return
        print_rank0(
            f"note: no {what}: the gradient of {len(rows)} rows differs from the padded one by {found:.1e}, and "
            f"rounding explains {rounding:.1e}",
            rank,
        )
    sampler.packing = loader.dataset.packing = None
    if tries:
        print_rank0(
            "note: padded batches, as no way of packing is exact here; --batching padded estimates their memory", rank
        )


def tolerance(rounding: float) -> float:
    """Return the difference up to which two gradients count as equal, where `rounding` alone makes that much."""
    return max(ATOL, TOLERANCE * rounding)


def _arithmetic(args: "TrainingArguments", model: nn.Module) -> str:
    """Return what rounds, by its short name. LoRA's frozen base may be in half precision without a flag."""
    for name in ("bf16", "fp16", "tf32"):
        if getattr(args, name):
            return name
    dtypes = {weight.dtype for weight in model.parameters()} - {torch.float32}
    if quantized := [dtype for dtype in dtypes if not dtype.is_floating_point]:
        return "8-bit" if torch.int8 in quantized else "4-bit"  # bitsandbytes' two kinds
    return str(min(dtypes, key=str)).removeprefix("torch.") if dtypes else "float32"


@contextmanager
def _without_eager(model: nn.Module) -> Iterator[None]:
    """Use sdpa in place of eager attention, which in bfloat16 rounds more than the kernels that packs use: that would
    look like a difference."""
    config, chosen = model.config, model.config._attn_implementation
    if chosen == "eager" and getattr(model, "_supports_sdpa", False):
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = chosen


def attempt(compute: Callable[[], T], model: nn.Module) -> tuple[T | None, str | None]:
    """Return (what `compute` returns, None), or (None, the reason) where the model, on some rank, cannot compute it."""
    result = failure = None
    try:
        result = compute()
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        failure = first_line(error)
        model.zero_grad()
    failures = [one for one in all_gather_object(failure) if one]
    return (None, failures[0]) if failures else (result, None)


def rows_to_try(packing: Packing, sizes: RowSizes, step: list[list[int]]) -> list[int]:
    """Return, of the rows of a step, the two shortest with targets that begin with each prefix, and at least two."""
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
    """Return |found - expected| / |expected| over all tensors, and over all ranks where they hold parts."""
    sums = torch.zeros(2, dtype=torch.float32, device=expected[0].device if expected else "cpu")
    for x, y in zip(found, expected, strict=True):
        sums += torch.stack([(x.float() - y.float()).square().sum(), y.float().square().sum()])
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(sums)
    apart, size = sums.sqrt().tolist()
    return apart / max(size, 1e-30)


# ---- a whole step ----


@dataclass(frozen=True)
class Compared:
    """A way of batching the rows of a step, beside the same rows padded in float32."""

    name: str
    packing: Packing | None = None
    loss: float = float("nan")
    difference: float = 0.0  # the largest of a parameter's gradient
    parameter: str = ""  # which it is
    limit: float = float("inf")  # up to here a packed gradient is exact
    failure: str | None = None  # why the model cannot compute it

    @property
    def exact(self) -> bool:
        return self.failure is None and self.difference <= self.limit


def compare_step(
    model: "PreTrainedModel",
    rows: PackedBatchDataset,
    normalization: str,
    batch_size: int,
    accumulation: int,
    max_tokens: int,
    seed: int,
    bf16: bool,
) -> Iterator[Compared]:
    """Yield the first optimizer step of `seed` in every way of batching: padded in float32, then what shows rounding
    (each row alone; or padded in bfloat16), then packed without and with shared prefixes."""
    sizes = measure_rows(rows.dataset)

    def gradient(size: int, packing: Packing | None, bf16: bool) -> tuple[float, Gradient]:
        number = batch_size * accumulation // size
        sampler = StepSampler(sizes, size, number, seed=seed, normalization=normalization, packing=packing)
        rows.packing = packing
        return step_gradient(model, rows, sampler, bf16)

    loss, reference = gradient(batch_size, None, False)
    yield Compared("padded in float32", loss=loss)
    way = ("every row alone", 1)
    if normalization == "microbatch" or bf16:  # rows alone would be other micro-batches
        way = ("padded", batch_size)
    ways: list[tuple[str, int, Packing | None]] = [(*way, None)]
    for name, share in (("packed", False), ("packed, prefixes shared", True)):
        ways.append((name, batch_size, plan_packing(rows.dataset, sizes, max_tokens, share)))
    limit = ATOL
    for name, size, packing in ways:
        found, failure = attempt(partial(gradient, size, packing, bf16), model)
        if failure:
            yield Compared(name, packing, failure=failure)
            continue
        loss, gradients = found
        worst, parameter = largest_difference(gradients, reference)
        if packing is None:
            limit = max(ATOL, 1.1 * worst) if bf16 else tolerance(worst)
        yield Compared(name, packing, loss, worst, parameter, limit)


def step_gradient(
    model: "PreTrainedModel", rows: PackedBatchDataset, sampler: StepSampler, bf16: bool = False
) -> tuple[float, Gradient]:
    """Return loss and gradient of the first optimizer step of `sampler`, of all its ranks, without dropout."""
    device, kernel = model.device, named_kernel(model.config)
    total = 0.0
    model.eval()
    model.zero_grad()
    step = next(sampler.steps())
    for planned in (batch for rank in range(sampler.world_size) for batch in sampler.plan(step, rank)):
        batch = {
            name: value.to(device) if isinstance(value, (Tensor, PackLayout)) else value
            for name, value in rows.inputs(planned).items()
        }
        with packed_attention_enabled(model.config, batch):
            with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
                loss, _ = batch_loss(model, batch, pack_kernel=kernel)
            loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(found: Gradient, expected: Gradient) -> tuple[float, str]:
    """Return the largest |found - expected| / max(|expected|, |all of expected| / 1000) of a parameter, and which it
    is."""
    if found.keys() != expected.keys():
        return float("inf"), sorted(found.keys() ^ expected.keys())[0]
    everything = nn.utils.get_total_norm(expected.values()).item()
    apart = {
        name: (found[name] - g).norm().item() / max(g.norm().item(), everything / 1000) for name, g in expected.items()
    }
    return max((size, name) for name, size in apart.items())
