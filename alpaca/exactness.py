"""Whether packed rows train as padded ones would, tried before it is relied upon.

The gradient of a few rows is computed three times: each row alone, padded, packed. The first two differ by rounding
only, which says what rounding amounts to for this model, dtype and device; the third may not differ by much more.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from alpaca.batching import MicroBatch, StepSampler
from alpaca.console import say
from alpaca.packing import Packing, RowSizes, plan_packing, why_not_packed, why_not_shared

if TYPE_CHECKING:
    from torch.utils.data import DataLoader, Dataset
    from transformers import TrainingArguments

    from alpaca.trainer import AlpacaTrainer

DEFAULT_PACK_TOKENS = 4096
FLOOR = 1e-4  # relative difference that is never minded: float32 rounding is below 1e-5, a leak above 1e-2
FP16_SCALE = 1024  # of the loss: the scaler's own first guess makes gradients infinite
MARGIN = 4  # times the difference between padded rows and the same alone


def choose_packing(model: nn.Module, args: "TrainingArguments", dataset: "Dataset", sizes: RowSizes) -> Packing | None:
    """How to pack, as far as flags and model say; None for padded. Says what is not done and why."""
    if args.batching == "padded":
        return None
    if reason := why_not_packed(model, args, int(sizes.lengths.max())):
        say(f"note: padded batches, not packed: {reason}", args.process_index)
        return None
    share = args.share_prefix
    if share and (reason := why_not_shared(model, args)):
        say(f"note: what rows begin with is computed for each of them: {reason}", args.process_index)
        share = False
    tokens = args.max_tokens_per_pack
    return plan_packing(dataset, sizes, DEFAULT_PACK_TOKENS if tokens == "auto" else int(tokens), share)


def check_packing(trainer: "AlpacaTrainer", loader: "DataLoader") -> None:
    """Compare and, on a mismatch, fall back: to packs without shared prefixes, then to padded batches. Says what came
    out, in a line. Collective: all ranks try the same rows."""
    sampler: StepSampler = loader.batch_sampler
    if sampler.packing is None:
        return
    rank, step = trainer.args.process_index, next(sampler.steps())
    rows = rows_to_try(sampler.packing, sampler.sizes, step)
    weights = [1.0 / max(int(sampler.sizes.num_targets[rows].sum()), 1)]
    alone = [MicroBatch([row], weights, False, None) for row in rows]
    padded = MicroBatch(rows, weights * len(rows), False, None)
    reference = _gradient(trainer, loader, [padded])
    noise = difference(_gradient(trainer, loader, alone), reference)
    tries = [sampler.packing]
    if sampler.packing.prefixes:
        tries.append(plan_packing(trainer.train_dataset, sampler.sizes, sampler.packing.max_tokens, False))
    for packing in tries:
        sampler.packing = loader.dataset.packing = packing
        what = "packs that share what rows begin with" if packing.prefixes else "packs"
        try:
            found = difference(_gradient(trainer, loader, [replace(padded, packed=True)]), reference)
        except (torch.OutOfMemoryError, torch.distributed.DistError):
            raise
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            trainer.model.zero_grad()
            say(f"note: no {what}: {str(error).splitlines()[0]}", rank)
            continue
        told = f"the gradient of {len(rows)} rows differs from the padded one by {found:.1e}"
        if found <= max(FLOOR, MARGIN * noise):
            totals = sampler.plan(step)[0].step
            say(f"{what}: {totals.computed / totals.tokens:.0%} of the rows' tokens are computed, without padding; "
                f"{told} (rounding: {noise:.1e})", rank)  # fmt: skip
            return
        say(f"note: no {what}: {told}, and rounding explains {noise:.1e}", rank)
    sampler.packing = loader.dataset.packing = None
    say("note: padded batches, as no way of packing is exact here", rank)


def rows_to_try(packing: Packing, sizes: RowSizes, step: list[int]) -> list[int]:
    """Of the rows of a step, the two shortest with targets that begin with each prefix, and at least two."""
    usable = [row for row in step if sizes.num_targets[row]] or step
    usable.sort(key=lambda row: sizes.lengths[row])
    of_prefix = {prefix: [row for row in usable if packing.prefix_of[row] == prefix][:2]
                 for prefix in np.unique(packing.prefix_of)}  # fmt: skip
    rows = [row for found in of_prefix.values() for row in found]
    return rows if len(rows) > 1 else usable[:2]


def _gradient(trainer: "AlpacaTrainer", loader: "DataLoader", batches: list[MicroBatch]) -> list[Tensor]:
    """Of the first decoder layer, which the gradient reaches through all others: this rank's part of each tensor."""
    model = trainer.model_wrapped
    model.train(not why_not_shared(trainer.model, trainer.args))  # without dropout if there is any
    for planned in batches:
        batch = trainer._prepare_inputs(
            {name: value for name, value in loader.dataset[planned].items() if name not in ("rows", "step")}
        )
        with trainer.attention_for(batch), trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, batch)
            (loss * FP16_SCALE if trainer.args.fp16 else loss).backward()
    layers = next((module for module in trainer.model.modules() if isinstance(module, nn.ModuleList)), trainer.model)
    layer = layers[0] if isinstance(layers, nn.ModuleList) else layers
    gradients = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
    gradients = [(g.to_local() if isinstance(g, DTensor) else g).detach().clone() for g in gradients]
    model.zero_grad()
    return gradients


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """|found - expected| / |expected| over all tensors, and all ranks where they hold parts."""
    sums = torch.zeros(2, dtype=torch.float32, device=expected[0].device)
    for x, y in zip(found, expected, strict=True):
        sums += torch.stack([(x.float() - y.float()).square().sum(), y.float().square().sum()])
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(sums)
    apart, size = sums.sqrt().tolist()
    return apart / max(size, 1e-30)
