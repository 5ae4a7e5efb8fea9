"""The weight diff of 2023: tuned minus base in float32, as an ordinary checkpoint; and the sum that was its check.

It recovers almost exactly (float32 rounds; a mean is not the same on every CPU) and proves nothing: new diffs are exact
(alpaca/exact_diff.py). This is for diffs made by the code of 2023, and for people who still recover with it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from alpaca.diagnosis import check_same_tensors, config_differences, refuse_misfit, rows_may_differ
from alpaca.errors import UsageError, first_line
from alpaca.shards import Spec
from alpaca.streaming import Pipeline, Slot
from alpaca.weights import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS, Tensor, Weights, companions, memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUM_OF_ALPACA_7B = 50637.1836  # of the released model, in float32, rotary frequencies included
INV_FREQ = "rotary_emb.inv_freq"
LAST_NORMS = ("model.norm.weight", "model.decoder.final_layer_norm.weight", "transformer.ln_f.weight")
ZERO, ONE = 0.1, 0.5
LAYER_OF_2023 = (
    "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
    f"self_attn.{INV_FREQ}", "mlp.gate_proj.weight", "mlp.down_proj.weight", "mlp.up_proj.weight",
    "input_layernorm.weight", "post_attention_layernorm.weight",
)  # fmt: skip


class FloatDiff:
    """Both directions of 2023's arithmetic: the other weights are the tuned ones (sign -1) or the diff (sign +1)."""

    def __init__(self, base: Weights, other: Weights, sign: int):
        self.base, self.weights, self.sign = base, other, sign
        tokenizer = _base_tokenizer(base)
        self.specs: list[Spec] = []
        self.left_out: list[str] = []
        self.pairs: dict[str, tuple[Tensor | None, int]] = {}  # name -> base tensor, how many of its rows are used
        missing, misfits = [], []
        for name, tensor in other.tensors.items():
            if not tensor.dtype.is_floating_point:
                self.left_out.append(name)  # causal masks of old checkpoints, which today's models make themselves
                continue
            self.specs.append(Spec(name, torch.float32, tensor.shape))
            found, rows = base.find(name), None
            if found is not None:
                rows = _rows_of_base(name, found, tensor, tokenizer)
            elif name.endswith(INV_FREQ):
                rows = 0
            self.pairs[name] = (found, rows)
            if found is None and rows is None:
                missing.append(name)
            elif rows is None:
                misfits.append((found, tensor))
        if missing or misfits:
            refuse_misfit(base, other, missing, misfits, notes=self.notes())
        if not self.specs:
            raise UsageError(f"{other.flag} {other.folder}: has no floating-point tensors")
        if sign < 0:
            self._add_inv_freq()

    def _add_inv_freq(self) -> None:
        """The code of 2023 computes a LLaMA's rotary frequencies itself where a file lacks them, in the diff too, and
        would add them twice: a zero in the diff is what its own make_diff wrote."""
        config, names = self.weights.config, {spec.name for spec in self.specs}
        if config.get("model_type") == "llama" and not any(name.endswith(INV_FREQ) for name in names):
            shape = inv_freq(config).shape
            for layer in range(config["num_hidden_layers"]):
                self.specs.append(Spec(f"model.layers.{layer}.self_attn.{INV_FREQ}", torch.float32, tuple(shape)))

    def pieces(self, pipe: Pipeline, order: list[Spec]) -> Iterator[tuple[Slot, Spec, int, torch.Tensor]]:
        """(slot, tensor, first element, float32 elements of the result) in pieces."""
        for spec in order:
            tensor = self.weights.tensors.get(spec.name)
            base, rows = self.pairs.get(spec.name, (None, 0))
            kept = base.numel // max(base.shape[0], 1) * rows if base and base.shape else (base.numel if base else 0)
            rest = self._rest(base, spec, rows)  # what follows the base's own elements
            for slot, start, count in pipe.pieces(spec.nbytes // 4):
                out, addend = slot.take(0, torch.float32, count), slot.take(1, torch.float32, count)
                scratch = slot.take(3, torch.uint8, count * 8)
                if tensor is None:
                    out.zero_()
                else:
                    self.weights.read(tensor, start, out, scratch)
                    own = max(0, min(count, kept - start))
                    if own:
                        self.base.read(base, start, addend[:own], scratch)
                    if own < count:
                        addend[own:] = rest[start + own - kept : start + count - kept]
                    out.add_(addend, alpha=self.sign)
                pipe.bar.update(out.nbytes)
                yield slot, spec, start, out

    def _rest(self, base: Tensor | None, spec: Spec, rows: int) -> torch.Tensor:
        """Where the base ends before the tensor does: the mean of its embeddings, or the frequencies of its config."""
        if base is None:
            return inv_freq(self.base.config or self.weights.config) if spec.name in self.pairs else torch.empty(0)
        if not base.shape or rows == spec.shape[0]:
            return torch.empty(0)
        whole, scratch = torch.empty(base.shape), torch.empty(base.nbytes, dtype=torch.uint8)
        self.base.read(base, 0, whole.view(-1), scratch)
        return whole[:rows].mean(dim=0, keepdim=True).expand(spec.shape[0] - rows, *spec.shape[1:]).reshape(-1)

    verdict = "recovered, but not proved"

    @property
    def folder(self) -> Path:
        return self.weights.folder

    @property
    def files(self) -> dict[str, Path]:
        return {path.name: path for path in companions(self.folder)}

    @property
    def told(self) -> str:
        return f"the sum of base and diff in float32 ({len(self.specs)} tensors); the format of 2023 has no digests"

    def verify(self, pipe: Pipeline, tuned: Weights) -> None:
        """Raise UsageError unless `tuned` is what `pieces` yields, in the dtype of `tuned`."""
        check_same_tensors(tuned, [spec._replace(dtype=None) for spec in self.specs], f"{self.folder}")
        for slot, spec, start, piece in self.pieces(pipe, self.specs):
            tensor = tuned.tensors[spec.name]
            found, wanted = (slot.take(number, tensor.dtype, piece.numel()) for number in (4, 5))
            tuned.read(tensor, start, found, slot.take(3, torch.uint8, 0))
            if memory(found) != memory(wanted.copy_(piece)):
                raise UsageError(f"{tuned.flag} {tuned.folder}: {spec.name} is not the sum of base and diff")

    def notes(self) -> list[str]:
        """What speaks against this base. Nothing in the format proves that it is the right one."""
        told = []
        if self.left_out:
            told.append(f"note: {len(self.left_out)} tensors that are not of floats are left out: {self.left_out[0]} …")
        if differences := config_differences(self.base.config, self.weights.config):
            told.append(
                f"note: in the base's config.json {differences}; is it the base that the diff was made against?"
            )
        if (largest := last_norm(self.base)) is not None and largest < ZERO:
            told.append(f"note: the last norm of {self.base.folder} is nearly zero; is that a diff given as the base?")
        if self.sign > 0 and (largest := last_norm(self.weights)) is not None and largest > ONE:
            told.append(f"note: the last norm of {self.folder} is far from zero; is that a model given as the diff?")
        return told


def last_norm(weights: Weights) -> float | None:
    """The largest weight of a checkpoint's last norm, below ZERO for a diff and above ONE for a model; None: it is not
    among LAST_NORMS."""
    return next((_largest(weights, name) for name in LAST_NORMS if name in weights.tensors), None)


def _largest(weights: Weights, name: str) -> float:
    tensor = weights.tensors[name]
    values = torch.empty(tensor.numel)
    weights.read(tensor, 0, values, torch.empty(tensor.nbytes, dtype=torch.uint8))
    return float(values.abs().max())


def _base_tokenizer(base: Weights) -> "PreTrainedTokenizerBase | None":
    """None: the folder has only weights, or a tokenizer that does not open today."""
    from alpaca.tokenizer import open_tokenizer  # imports transformers

    try:
        return open_tokenizer(str(base.folder))
    except Exception as error:  # tokenizers raises what it likes
        print(f"note: the base's tokenizer cannot be read ({first_line(error)}); whether it had a pad token "
              "is taken from the number of rows", flush=True)  # fmt: skip
        return None


def _rows_of_base(name: str, base: Tensor, tensor: Tensor, tokenizer: "PreTrainedTokenizerBase | None") -> int | None:
    """How many rows of a base tensor are used as they are; what remains of `tensor` is their mean. None: no fit.

    2023 gave a base without a pad token the token [PAD], embeddings as long as its tokenizer was then (one row more, or
    fewer where they were padded), and the mean of the other rows as its row.
    """
    if not base.shape or not tensor.shape:
        return 0 if base.shape == tensor.shape else None
    wanted = tensor.shape[0]
    if base.shape != tensor.shape and not rows_may_differ(name, base, tensor):
        return None
    if tokenizer is not None and tokenizer.pad_token is None and "[PAD]" not in tokenizer.get_vocab():
        if name.endswith((*INPUT_EMBEDDINGS, *OUTPUT_EMBEDDINGS)) and wanted == len(tokenizer) + 1 <= base.shape[0] + 1:
            return wanted - 1
    if wanted - base.shape[0] in (0, 1):
        return base.shape[0]
    return None


def inv_freq(config: dict) -> torch.Tensor:
    """The rotary frequencies [head_dim / 2] of a LLaMA, as transformers 4.28 computed and stored them (RoFormer,
    arXiv 2104.09864)."""
    try:
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    except KeyError as error:
        raise UsageError(
            f"rotary frequencies are missing, and cannot be computed: config.json has no {error}"
        ) from error
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta") or 10000.0
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))


class NaiveSum:
    """2023's integrity check: the sum of all weights, each tensor's in float32, added up in the order of the model."""

    def __init__(self, specs: list[Spec], config: dict):
        self.config, self.order = config, [spec.name for spec in specs]
        self.sums: dict[str, torch.Tensor] = {}
        largest = max((spec.nbytes // spec.dtype.itemsize for spec in specs), default=0)
        self.whole = torch.empty(largest)  # one tensor at a time: the sum of pieces would be rounded otherwise

    def add(self, spec: Spec, start: int, piece: torch.Tensor) -> None:
        end, numel = start + piece.numel(), spec.nbytes // spec.dtype.itemsize
        self.whole[start:end].copy_(piece)
        if end == numel:
            self.sums[spec.name] = self.whole[:numel].view(spec.shape).sum()

    def total(self) -> float:
        if self.config.get("model_type") == "llama":
            computed = inv_freq(self.config).sum()
            for layer in range(self.config["num_hidden_layers"]):
                self.sums.setdefault(f"model.layers.{layer}.self_attn.{INV_FREQ}", computed)
            order = sorted(self.sums, key=_position_in_llama)
        else:
            order = self.order
        if self.config.get("tie_word_embeddings") and "lm_head.weight" not in self.sums:
            self.sums["lm_head.weight"] = next(self.sums[n] for n in self.sums if n.endswith(INPUT_EMBEDDINGS))
            order = [*order, "lm_head.weight"]
        return float(sum(self.sums[name] for name in order if name in self.sums))

    def check(self, required: bool) -> str:
        """The line to print. Raises UsageError if it is `required` that the sum is that of the released model."""
        total = self.total()
        if abs(total - SUM_OF_ALPACA_7B) <= 1e-2:
            return f"naive integrity check: the weights sum to {total:.4f}, as those of the released Alpaca-7B do"
        if required:
            raise UsageError(
                f"--check_integrity_naively: the weights sum to {total:.4f}, those of the released Alpaca-7B to "
                f"{SUM_OF_ALPACA_7B}: base or diff is damaged or another; for another model leave this flag away"
            )
        return f"naive integrity check: the weights sum to {total:.4f} (the released Alpaca-7B: {SUM_OF_ALPACA_7B})"


def _position_in_llama(name: str) -> tuple[int, int, int]:
    parts = name.split(".", 3)
    if parts[:2] != ["model", "layers"]:
        return ({"model.embed_tokens.weight": 0, "model.norm.weight": 2}.get(name, 3), 0, 0)
    rank = LAYER_OF_2023.index(parts[3]) if parts[3] in LAYER_OF_2023 else len(LAYER_OF_2023)
    return (1, int(parts[2]), rank)
