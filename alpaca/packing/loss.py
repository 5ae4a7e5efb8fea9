"""The loss: cross entropies of target tokens, each with its own weight."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alpaca.common.errors import UsageError

# Logits whose probabilities stand in float32 at a time: on a CPU what its cache holds, else few launches of kernels.
SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")  # of logits, in configs
CHUNK = {"cpu": 2**20, "cuda": 2**24}


class _WeightedCrossEntropy(torch.autograd.Function):
    """Keeps the logits in their own dtype and one float32 number a position for the backward pass, which makes the
    gradient of the logits chunk by chunk. Autograd would keep a float32 copy of the logits, its softmax and the
    gradients of both."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        losses, normalizers = torch.empty_like(weights), torch.empty_like(weights)
        for part, target, loss, normalizer in _chunks(logits.shape[-1], logits, targets, losses, normalizers):
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
        for part, target, weight, normalizer, out in _chunks(
            logits.shape[-1], logits, targets, weights, normalizers, result
        ):
            gradient = out if out.dtype == torch.float32 else torch.empty_like(part, dtype=torch.float32)
            torch.sub(part, normalizer.unsqueeze(1), out=gradient).exp_()  # the softmax
            if smoothing:
                gradient -= smoothing / logits.shape[-1]
            gradient.scatter_add_(1, target.unsqueeze(1), gradient.new_full((len(target), 1), smoothing - 1))
            gradient.mul_((weight * grad).unsqueeze(1))
            if gradient is not out:
                out.copy_(gradient)
        return result, None, None, None


def _chunks(vocabulary: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Return the same few positions of each tensor at a time, so many that their logits are one CHUNK."""
    positions = max(CHUNK.get(tensors[0].device.type, CHUNK["cuda"]) // vocabulary, 1)
    return zip(*(tensor.split(positions) for tensor in tensors))


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


# ---- without all logits at once ----


@dataclass(frozen=True)
class LinearHead:
    """--linear_cross_entropy: the output embedding and the cross entropy as one, over a few targets at a time. torch
    2.13 has that; for older ones it is here. Nothing holds all logits; the backward pass computes them again."""

    layer: nn.Linear
    dtype: torch.dtype  # of the arithmetic

    @classmethod
    def of(cls, model: nn.Module, dtype: torch.dtype) -> "LinearHead":
        """Return the head of `model`. Raise UsageError where its logits are more than a linear layer's output."""
        layer, config = model.get_output_embeddings(), model.config.get_text_config().to_dict()
        scaled = [name for name in SCALES if config.get(name) not in (None, 1)]
        if type(layer) is not nn.Linear or scaled:
            what = f"its logits are scaled ({', '.join(scaled)})" if scaled else "its output embedding is not linear"
            raise UsageError(f"--linear_cross_entropy: this model cannot have it: {what}; drop the flag")
        return cls(layer, dtype)

    @contextmanager
    def returns_losses(self, targets: Tensor, positions: Tensor | None) -> Iterator[None]:
        """Let the model return the `losses` of `targets` in place of logits: inside its forward pass, where weights are
        gathered that are sharded. positions: of the targets among all; None where the model keeps no others."""

        def forward(hidden: Tensor) -> Tensor:
            hidden = hidden.flatten(0, 1)
            return self.losses(hidden if positions is None else hidden[positions], targets)

        self.layer.forward = forward
        try:
            yield
        finally:
            del self.layer.forward

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the (K,) float32 cross entropies of `targets` (K,) after `hidden` (K, H)."""
        bias = None if self.layer.bias is None else self.layer.bias.to(self.dtype)
        hidden, weight = hidden.to(self.dtype), self.layer.weight.to(self.dtype)
        if len(targets) == 0:  # none, but the backward pass is that of all ranks
            return nn.functional.linear(hidden, weight, bias).sum(dim=-1).float()
        if bias is None and hasattr(nn, "LinearCrossEntropyOptions"):  # torch sums the bias' gradient in bfloat16
            together, options = nn.functional.linear_cross_entropy, nn.LinearCrossEntropyOptions()
            return together(hidden, weight, targets, reduction="none", options=options).float()
        return _LinearCrossEntropy.apply(hidden, weight, bias, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps the hidden states and one float32 number a target."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        losses, normalizers = (hidden.new_empty(len(targets), dtype=torch.float32) for _ in range(2))
        for part, target, loss, normalizer in _chunks(len(weight), hidden, targets, losses, normalizers):
            logits = nn.functional.linear(part, weight, bias).float()
            normalizer.copy_(logits.logsumexp(dim=-1))
            loss.copy_(normalizer - logits.gather(1, target.unsqueeze(1)).squeeze(1))
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers)
        return losses

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        hidden, weight, bias, targets, normalizers = ctx.saved_tensors
        of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        of_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for part, target, normalizer, share, out in _chunks(len(weight), hidden, targets, normalizers, grad, of_hidden):
            gradient = (nn.functional.linear(part, weight, bias).float() - normalizer.unsqueeze(1)).exp_()
            gradient.scatter_add_(1, target.unsqueeze(1), gradient.new_full((len(target), 1), -1.0))
            gradient = gradient.mul_(share.unsqueeze(1)).to(weight.dtype)
            torch.matmul(gradient, weight, out=out)
            of_weight += gradient.t() @ part
            if of_bias is not None:
                of_bias += gradient.sum(dim=0, dtype=torch.float32)
        return of_hidden, of_weight.to(weight.dtype), None if of_bias is None else of_bias.to(bias.dtype), None


# ---- of a batch ----


def batch_loss(
    model: nn.Module,
    batch: dict[str, Any],
    label_smoothing: float = 0.0,
    pack_kernel: str | None = None,
    head: LinearHead | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the `weighted_cross_entropy` of a batch of a PackedBatchDataset. A packed one, which is computed inside
    packing.attention.packed_attention_enabled, has logits only at its targets. With `head`, logits are never whole."""
    batch = dict(batch)
    target_positions, targets, weights = (batch.pop(name) for name in ("target_positions", "targets", "weights"))
    packed = "pack" in batch
    options = dict(logits_to_keep=target_positions, pack_kernel=pack_kernel) if packed else {}
    if head:
        with head.returns_losses(targets, None if packed else target_positions):
            losses = model(**batch, **options).logits
        return (losses * weights).sum(), losses.detach()
    logits = model(**batch, **options).logits  # packed (1, K, V), padded (B, T, V)
    logits = logits[0] if packed else logits.flatten(0, 1)[target_positions]
    return weighted_cross_entropy(logits, targets, weights, label_smoothing)


def sum_of_losses(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    prepare: Callable[[dict[str, Any]], dict[str, Any]],
    head: LinearHead | None = None,
) -> Tensor:
    """Return (summed loss, number of targets) of the `batches` of this rank, (2,) float64 on the CPU, without gradient.
    `prepare` puts a batch on the model's device. `head`: as `batch_loss` has it."""
    total = torch.zeros(2, dtype=torch.float64, device="cpu")
    model.eval()
    with torch.no_grad():
        for batch in batches:
            batch = {name: batch[name] for name in batch.keys() - {"rows", "step"}}
            loss, _ = batch_loss(model, prepare(batch), head=head)
            total += torch.stack([loss, batch["weights"].sum().to(loss.device)]).cpu()
    return total
