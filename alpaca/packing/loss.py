"""The loss: cross entropies of target tokens, each with its own weight."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Logits whose probabilities stand in float32 at a time: on a CPU what its cache holds, else few launches of kernels.
CHUNK = {"cpu": 2**20, "cuda": 2**24}


class _WeightedCrossEntropy(torch.autograd.Function):
    """Keeps the logits in their own dtype and one float32 number a position for the backward pass, which makes the
    gradient of the logits chunk by chunk. Autograd would keep a float32 copy of the logits, its softmax and the
    gradients of both."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        losses, normalizers = torch.empty_like(weights), torch.empty_like(weights)
        for part, target, loss, normalizer in _chunks(logits, targets, losses, normalizers):
            part = part.float()
            normalizer.copy_(part.logsumexp(dim=-1))
            loss.copy_(normalizer - part.gather(1, target.unsqueeze(1)).squeeze(1))
            if smoothing:
                loss.mul_(1 - smoothing).add_(normalizer - part.mean(dim=-1), alpha=smoothing)
        ctx.save_for_backward(logits, targets, weights, normalizers)
        ctx.smoothing = smoothing
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses  # a dot product would be cast by autocast

    @staticmethod
    def backward(ctx, grad: Tensor, _: None) -> tuple[Tensor, None, None, None]:
        logits, targets, weights, normalizers = ctx.saved_tensors
        result, smoothing = torch.empty_like(logits), ctx.smoothing
        for part, target, weight, normalizer, out in _chunks(logits, targets, weights, normalizers, result):
            gradient = out if out.dtype == torch.float32 else torch.empty_like(part, dtype=torch.float32)
            torch.sub(part, normalizer.unsqueeze(1), out=gradient).exp_()  # the softmax
            if smoothing:
                gradient -= smoothing / logits.shape[-1]
            gradient.scatter_add_(1, target.unsqueeze(1), gradient.new_full((len(target), 1), smoothing - 1))
            gradient.mul_((weight * grad).unsqueeze(1))
            if gradient is not out:
                out.copy_(gradient)
        return result, None, None, None


def _chunks(logits: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    positions = max(CHUNK.get(logits.device.type, CHUNK["cuda"]) // logits.shape[-1], 1)
    return zip(*(tensor.split(positions) for tensor in (logits, *tensors)))


def weighted_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the sum over k of weights[k] * cross entropy(logits[k], targets[k]), and the (K,) cross entropies, which
    have no gradient; in float32 whatever the dtype of the logits.

    Args:
        logits: (K, V). targets: (K,) int64. weights: (K,) float32. K may be 0.
        label_smoothing: as in torch.nn.functional.cross_entropy.
    """
    if len(targets) == 0:  # a micro-batch without a target: 0, and a backward pass that all ranks share
        return logits.float().sum(), weights
    return _WeightedCrossEntropy.apply(logits, targets, weights, label_smoothing)


def batch_loss(
    model: nn.Module, batch: dict[str, Any], label_smoothing: float = 0.0, pack_kernel: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return the `weighted_cross_entropy` of a batch of a PackedBatchDataset. A packed one, which is computed inside
    packing.attention.packed_attention_enabled, has logits only at its targets."""
    batch = dict(batch)
    target_positions, targets, weights = (batch.pop(name) for name in ("target_positions", "targets", "weights"))
    if "pack" in batch:
        logits = model(**batch, logits_to_keep=target_positions, pack_kernel=pack_kernel).logits[0]  # (K, V)
    else:
        logits = model(**batch).logits.flatten(0, 1)[target_positions]
    return weighted_cross_entropy(logits, targets, weights, label_smoothing)


def sum_of_losses(
    model: nn.Module, batches: Iterable[dict[str, Any]], prepare: Callable[[dict[str, Any]], dict[str, Any]]
) -> Tensor:
    """Return (summed loss, number of targets) of the `batches` of this rank, (2,) float64 on the CPU, without gradient.
    `prepare` puts a batch on the model's device."""
    total = torch.zeros(2, dtype=torch.float64, device="cpu")
    model.eval()
    with torch.no_grad():
        for batch in batches:
            batch = {name: batch[name] for name in batch.keys() - {"rows", "step"}}
            loss, _ = batch_loss(model, prepare(batch))
            total += torch.stack([loss, batch["weights"].sum().to(loss.device)]).cpu()
    return total
