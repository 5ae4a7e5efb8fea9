"""Rows as packs: concatenated without padding, what many rows begin with once per pack.

    row 0    Below is an instruction ... ### Instruction: | Name a colour. ### Response: Red. </s>
    row 1    Below is an instruction ... ### Instruction: | Count to two. ### Response: 1, 2. </s>
    pack     Below is an instruction ... ### Instruction: | Name a colour. ... </s> | Count to two. ... </s>
    position 0 1 2 ...                          p-1         p p+1 ...                 p p+1 ...

Under causal attention the states of the shared tokens are the same in every row, so they are computed once, and every
row attends to them and to itself (alpaca/packing/attention.py). Their gradient is the sum over the rows, as it is when
every row has its own copy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from alpaca.data.tokenization import IGNORE_INDEX
from alpaca.packing.attention import PackLayout

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, TrainingArguments


MAX_PREFIXES = 4
MAX_PREFIX_TOKENS = 1024
Batch = dict[str, Any]
CPU_PACK_TOKENS = 4096  # its most on a CPU


@dataclass(frozen=True)
class RowSizes:
    """Of every row, (num_rows,) int64 each."""

    lengths: np.ndarray  # tokens
    num_targets: np.ndarray  # tokens that are predicted
    first_target: np.ndarray  # the position of the first; the length where there is none


def measure_rows(dataset: Dataset) -> RowSizes:
    """Count tokens and targets of every row. The token at position 0 is never predicted."""
    labels = [torch.as_tensor(dataset[i]["labels"]) for i in range(len(dataset))]
    lengths = np.array([len(row) for row in labels], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    is_target = (torch.cat(labels) != IGNORE_INDEX).numpy()
    is_target[starts] = False
    within = np.arange(len(is_target)) - np.repeat(starts, lengths)
    position = np.where(is_target, within, np.repeat(lengths, lengths))
    return RowSizes(lengths, np.add.reduceat(is_target.astype(np.int64), starts), np.minimum.reduceat(position, starts))


@dataclass(frozen=True)
class Packing:
    """How the rows of a dataset are packed."""

    prefixes: list[Tensor]  # token ids that rows begin with, (length,) int64 each
    prefix_of: np.ndarray  # (num_rows,) index into `prefixes`, -1 for none
    costs: np.ndarray  # (num_rows,) tokens of a row without its prefix
    max_tokens: int  # of a pack

    @property
    def capacity(self) -> int:
        """Return the tokens of a pack without its prefixes."""
        return max(self.max_tokens - sum(map(len, self.prefixes)), 1)

    def tokens(self, rows: Sequence[int]) -> int:
        """Return the tokens of the pack of `rows`; a pack of no rows has one, without a target."""
        used = {int(self.prefix_of[row]) for row in rows} - {-1}
        return sum(len(self.prefixes[prefix]) for prefix in used) + int(self.costs[list(rows)].sum()) if rows else 1


def plan_packing(dataset: Dataset, sizes: RowSizes, max_tokens: int, share_prefix: bool) -> Packing:
    """Return how to pack the rows; with `share_prefix=False` every row in full."""
    prefixes, prefix_of = [], np.full(len(sizes.lengths), -1)
    if share_prefix:
        prefixes, prefix_of = find_prefixes(dataset, sizes)
    shared = np.array([len(prefix) for prefix in prefixes] + [0])  # -1 is the last: nothing shared
    return Packing(prefixes, prefix_of, sizes.lengths - shared[prefix_of], max_tokens)


def find_prefixes(dataset: Dataset, sizes: RowSizes) -> tuple[list[Tensor], np.ndarray]:
    """Find what the rows begin with: token for token the most common continuation, cut where tokens x rows is largest;
    then again among the other rows. Alpaca's two templates give two, of 29 and 39 Llama tokens.

    The position that predicts a row's first target is the row's own, so no prefix reaches it.

    Returns:
        The prefixes, and for each row which one it begins with (-1: none).
    """
    limits = np.minimum(sizes.first_target, sizes.lengths) - 1  # shareable tokens of a row
    ids = torch.cat([torch.as_tensor(dataset[i]["input_ids"]) for i in range(len(dataset))]).numpy()
    starts = np.cumsum(sizes.lengths) - sizes.lengths
    prefixes: list[Tensor] = []
    prefix_of = np.full(len(starts), -1)
    while len(prefixes) < MAX_PREFIXES:
        rows, length = _best_prefix(ids, starts, limits, np.flatnonzero(prefix_of == -1))
        if length * (len(rows) - 1) < 0.01 * len(ids):  # not worth a prefix in every pack
            break
        prefix_of[rows] = len(prefixes)
        prefixes.append(torch.from_numpy(ids[starts[rows[0]] :][:length].copy()))
    return prefixes, prefix_of


def _best_prefix(ids: np.ndarray, starts: np.ndarray, limits: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, int]:
    best: tuple[np.ndarray, int] = rows[:0], 0
    for position in range(MAX_PREFIX_TOKENS):
        rows = rows[limits[rows] > position]
        if not len(rows):
            break
        values, inverse, counts = np.unique(ids[starts[rows] + position], return_inverse=True, return_counts=True)
        rows = rows[inverse == counts.argmax()]
        if len(rows) * (position + 1) > len(best[0]) * best[1]:
            best = rows, position + 1
    return best


# ---- batches ----


class PackedBatchDataset(Dataset):
    """Rows collated as a MicroBatch says: `self[micro_batch]` -> a batch with

    input_ids, and attention_mask (padded: (B, T)) or position_ids and pack (packed: (1, T))
    target_positions (K,) where the targets are predicted, in the flattened B x T positions
    targets  (K,) token ids; weights (K,) float32, of each in the loss of the step
    rows     (row number, its targets) each; step: StepTotals
    """

    def __init__(self, dataset: Dataset, collate: Callable[[list[Any]], Batch], packing: Packing | None = None):
        """`collate` pads; it gets no rows at all where a rank has none left."""
        self.dataset = dataset
        self.collate = collate
        self.packing = packing

    def __len__(self) -> int:
        return len(self.dataset)

    def inputs(self, batch: "MicroBatch") -> Batch:
        """Return what a model computes of a micro-batch, without the numbers of its rows and the totals of its step."""
        return {name: value for name, value in self[batch].items() if name not in ("rows", "step")}

    def __getitem__(self, batch: "MicroBatch") -> Batch:
        rows = [self.dataset[row] for row in batch.rows]
        padded = self.collate(rows) if not (batch.packed and rows) else {}
        if batch.packed:
            prefix_of = [int(self.packing.prefix_of[row]) for row in batch.rows]
            if not rows:  # the one token that stands for no rows
                rows, prefix_of = [dict(input_ids=padded["input_ids"][0], labels=padded["labels"][0])], [-1]
            result, following, counts = pack_rows(rows, prefix_of, self.packing.prefixes)
        else:
            following = F.pad(padded.pop("labels")[:, 1:], (0, 1), value=IGNORE_INDEX)  # (B, T)
            result, counts = padded, (following != IGNORE_INDEX).sum(dim=1)
        target_positions = (following.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
        weights = torch.tensor(batch.weights or [0.0], dtype=torch.float32).repeat_interleave(counts)
        targets = following.flatten()[target_positions]
        numbered = list(zip(batch.rows, counts.tolist()))
        return dict(
            result, target_positions=target_positions, targets=targets, weights=weights, rows=numbered, step=batch.step
        )


def pack_rows(
    rows: Sequence[dict[str, Tensor]], prefix_of: Sequence[int], prefixes: Sequence[Tensor]
) -> tuple[Batch, Tensor, Tensor]:
    """Put `rows` behind one another, the prefixes they share in front.

    Returns:
        input_ids (1, T), position_ids (1, T) and the PackLayout; (1, T) the label of the token that follows in the same
        row, IGNORE_INDEX where there is none; (rows,) the number of targets of each row.
    """
    used = sorted(set(prefix_of) - {-1})
    shared = [len(prefixes[prefix]) if prefix >= 0 else 0 for prefix in prefix_of]
    ids = [torch.as_tensor(row["input_ids"])[length:] for row, length in zip(rows, shared)]
    labels = [torch.as_tensor(row["labels"])[length:] for row, length in zip(rows, shared)]
    layout = PackLayout.of(
        tuple(len(prefixes[prefix]) for prefix in used),
        tuple(map(len, ids)),
        tuple(used.index(prefix) if prefix >= 0 else -1 for prefix in prefix_of),
    )
    none = torch.full((sum(len(prefixes[prefix]) for prefix in used),), IGNORE_INDEX)
    ends = torch.full((1,), IGNORE_INDEX)
    following = [part for row in labels for part in (row[1:], ends)]
    counts = torch.tensor([int((row[1:] != IGNORE_INDEX).sum()) for row in labels])
    input_ids = torch.cat([*(prefixes[prefix] for prefix in used), *ids])
    batch = dict(input_ids=input_ids[None], position_ids=layout.position_ids[None], pack=layout)
    return batch, torch.cat([none, *following])[None], counts


# ---- where it would not be exact ----


def why_not_packed(config: "PreTrainedConfig", args: "TrainingArguments", longest: int) -> str | None:
    """Return what keeps rows from being packed with the result of padded ones, as far as flags and config tell."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if args.deepspeed and args.fp16:
        return "DeepSpeed's scale of float16 losses begins where gradients overflow, so packs cannot be checked"
    if config.is_encoder_decoder or not getattr(config, "is_causal", True):
        return "this model is not causal"
    if window and window < longest and getattr(config, "use_sliding_window", True):
        return f"this model attends to the last {window} tokens only, and the longest row has {longest}"
    if args.neftune_noise_alpha:
        return "--neftune_noise_alpha scales its noise by the length of a sequence, which a pack is not"
    if getattr(config, "layerdrop", 0):
        return f"layerdrop={config.layerdrop} leaves out layers for a micro-batch at a time"
    return None


def why_not_shared(model: nn.Module) -> str | None:
    """Return what would make the states of a shared prefix differ from those it has in every row."""
    if dropout := active_dropout(model):
        return f"with dropout ({', '.join(dropout[:3])}) every row has states of its own"
    config = model.config.get_text_config().to_dict()
    if experts := [name for name in config if "num_experts" in name or "num_local_experts" in name]:
        return f"a mixture of experts ({experts[0]}) counts the tokens it routes"
    return None


def active_dropout(model: nn.Module) -> list[str]:
    """Return every dropout (or jitter of a router) above 0, of modules and those that models keep as a number in their
    config: ["dropout=0.1"]."""
    named = [(name.removesuffix(".default"), module) for name, module in model.named_modules()]  # peft's adapter
    rates = {name.rpartition(".")[2]: module.p for name, module in named if isinstance(module, nn.Dropout) and module.p}
    unused = ("layerdrop", "summary", "classifier")  # not for single tokens, or not in language models
    for name, rate in model.config.get_text_config().to_dict().items():
        if isinstance(rate, float) and ("drop" in name or "jitter" in name) and not name.startswith(unused):
            rates.setdefault(name, rate)
    return [f"{name}={rate}" for name, rate in rates.items() if rate > 0]


@dataclass(frozen=True)
class StepTotals:
    """Of an optimizer step, over all ranks."""

    rows: int
    tokens: int  # of the rows, each counted in full
    computed: int  # that go through the model: with padding, and a shared prefix once per pack
    padding: int
    logits: int = 0  # positions that logits are computed at: packed, those of the targets; padded, all
    pairs: int = 0  # of a token and one that it attends to, padding included
    useful_pairs: int = 0  # those of the rows


@dataclass(frozen=True)
class MicroBatch:
    rows: list[int]  # perhaps none
    weights: list[float]  # of each target of a row, in the loss of the step
    packed: bool
    step: StepTotals
