"""Which rows a rank trains on in which optimizer step, and in which micro-batches.

The rows of a step are those of the stock sampler: consecutive chunks of the permutation drawn from seed + epoch. Three
things are done with them that the stock sampler does not:

Every row counts once. accelerate fills the last batches of an epoch with rows from its start so that all ranks have
equally many, and those are trained twice; here the last step simply has fewer rows, and a rank that has none left gets
an empty micro-batch, which adds nothing to the gradient.

The loss does not depend on how rows are batched: each row comes with the weight that its targets have in the loss of
the whole step, over all ranks.

`packed`: the rows of the whole step, across ranks, are dealt into packs of nearly equal length, equally many on every
rank, planned from lengths alone, so that every rank knows the plan without asking. `padded`: as in 2023, dealt to the
ranks micro-batch by micro-batch in the order of the permutation.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from alpaca.packing import Packing, RowSizes

EXCHANGES = 50  # between packs of a step at most, to even them out


@dataclass(frozen=True)
class StepTotals:
    """Of an optimizer step, over all ranks."""

    rows: int
    tokens: int  # of the rows, each counted in full
    computed: int  # that go through the model: with padding, and a shared prefix once per pack
    padding: int


@dataclass(frozen=True)
class MicroBatch:
    rows: list[int]  # perhaps none
    weights: list[float]  # of each target of a row, in the loss of the step
    packed: bool
    step: StepTotals


class StepSampler(Sampler[list[MicroBatch]]):
    """Yields this rank's micro-batches in step order, in lists: as many lists a step as the Trainer expects
    micro-batches (`accumulation`), of which in packed mode the last holds all packs of the step, the others nothing.

    Every rank gets the same number of micro-batches: sharded parameters are gathered by all ranks together.
    """

    def __init__(
        self,
        sizes: RowSizes,
        batch_size: int,
        accumulation: int = 1,
        world_size: int = 1,
        rank: int = 0,
        seed: int | None = None,
        drop_last: bool = False,
        normalization: str = "token",
        packing: Packing | None = None,
        group_by_length: bool = False,
    ):
        """`seed=None` keeps the rows in order; `drop_last` leaves out the step that has fewer rows; `normalization`:
        token, microbatch, or sum (every target counts 1); `packing=None` is padded."""
        self.sizes, self.batch_size, self.accumulation, self.seed = sizes, batch_size, accumulation, seed
        self.world_size, self.rank, self.normalization, self.packing = world_size, rank, normalization, packing
        self.rows_per_step = batch_size * accumulation * world_size
        num_rows = len(sizes.lengths)
        self.used_rows = num_rows - num_rows % self.rows_per_step if drop_last else num_rows
        self.group_by_length, self.epoch = group_by_length, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self) -> list[int]:
        """The rows in the order of the current epoch, over all ranks."""
        num_rows = len(self.sizes.lengths)
        if self.seed is None:
            return list(range(num_rows))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.group_by_length:
            from transformers.trainer_pt_utils import get_length_grouped_indices

            batch = self.batch_size * self.world_size
            return get_length_grouped_indices(self.sizes.lengths.tolist(), batch, generator=generator)
        return torch.randperm(num_rows, generator=generator).tolist()

    def steps(self) -> Iterator[list[int]]:
        """The rows of each optimizer step of the current epoch, over all ranks."""
        order = self.order()[: self.used_rows]
        for start in range(0, self.used_rows, self.rows_per_step):
            yield order[start : start + self.rows_per_step]

    def __len__(self) -> int:
        return math.ceil(self.used_rows / (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        for rows in self.steps():
            slots = math.ceil(len(rows) / (self.batch_size * self.world_size))
            mine = self.plan(rows)
            yield from ([] for _ in range(slots - 1)) if self.packing else ([batch] for batch in mine[:-1])
            yield mine if self.packing else mine[-1:]

    def plan(self, rows: list[int], rank: int | None = None) -> list[MicroBatch]:
        """The micro-batches in which this rank (or `rank`) trains its share of the `rows` of a step."""
        weights = dict(zip(rows, self._weights(rows)))
        batches = self._packs(rows) if self.packing else self._chunks(rows)
        totals = self._totals(rows, batches)
        mine = batches[self.rank if rank is None else rank :: self.world_size]
        return [MicroBatch(batch, [weights[row] for row in batch], bool(self.packing), totals) for batch in mine]

    def _chunks(self, rows: list[int]) -> list[list[int]]:
        """2023's micro-batches of all ranks, then empty ones until every rank has equally many."""
        chunks = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        return chunks + [[] for _ in range(-len(chunks) % self.world_size)]

    def _packs(self, rows: list[int]) -> list[list[int]]:
        costs = [int(self.packing.costs[row]) for row in rows]
        packs = plan_packs(costs, self.packing.capacity, self.world_size)
        return [[rows[i] for i in pack] for pack in packs]

    def _weights(self, rows: list[int]) -> list[float]:
        targets = self.sizes.num_targets[rows]
        if self.normalization == "sum":
            return [1.0] * len(rows)
        if self.normalization == "token":
            return [1.0 / max(int(targets.sum()), 1)] * len(rows)
        of_batch = np.add.reduceat(targets, np.arange(0, len(rows), self.batch_size))
        with_targets = max(int((of_batch > 0).sum()), 1)
        weights = 1.0 / (np.maximum(of_batch, 1) * with_targets)
        return np.repeat(weights, self.batch_size)[: len(rows)].tolist()

    def _totals(self, rows: list[int], batches: list[list[int]]) -> StepTotals:
        lengths = self.sizes.lengths
        tokens = int(lengths[rows].sum())
        if self.packing:
            return StepTotals(len(rows), tokens, sum(self.packing.tokens(batch) for batch in batches), 0)
        computed = sum(len(batch) * int(lengths[batch].max()) if batch else 1 for batch in batches)
        return StepTotals(len(rows), tokens, computed, computed - tokens)


def plan_packs(costs: Sequence[int], capacity: int, world_size: int) -> list[list[int]]:
    """Deal items of `costs` tokens into packs of at most `capacity` tokens (an item beyond that has a pack of its own
    size), a multiple of `world_size` of them, as few as that allows and as equal as can be.

    Longest first, each into the emptiest pack (Graham's LPT), then exchanges between the fullest pack and the emptiest
    while that makes the fullest smaller. The packs come in falling order, so that the ranks, which take every
    `world_size`-th, do packs of about the same size at the same time.

    Returns:
        Lists of indices into `costs`, perhaps empty.
    """
    capacity = max(capacity, max(costs, default=0))
    number = max(math.ceil(sum(costs) / (capacity * world_size)), 1) * world_size
    while True:
        packs = _longest_first(costs, number)
        sizes = _even_out(packs, costs)
        if max(sizes) <= capacity:
            break
        number += world_size
    order = sorted(range(number), key=lambda pack: -sizes[pack])
    return [packs[pack] for pack in order]


def _longest_first(costs: Sequence[int], number: int) -> list[list[int]]:
    packs: list[list[int]] = [[] for _ in range(number)]
    heap = [(0, pack) for pack in range(number)]
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        size, pack = heap[0]
        packs[pack].append(item)
        heapq.heapreplace(heap, (size + costs[item], pack))
    return packs


def _even_out(packs: list[list[int]], costs: Sequence[int]) -> list[int]:
    """Exchange items between the fullest and the emptiest pack, in place, each time the exchange that halves their
    difference best. Returns the sizes."""
    sizes = [sum(costs[item] for item in pack) for pack in packs]
    for _ in range(EXCHANGES):
        full, empty = sizes.index(max(sizes)), sizes.index(min(sizes))
        gap = sizes[full] - sizes[empty]
        if gap < 2:
            break
        given = np.array([costs[item] for item in packs[full]])
        taken = np.array([0, *(costs[item] for item in packs[empty])])  # 0: nothing comes back
        gains = given[:, None] - taken
        give, take = divmod(int(np.abs(gap - 2 * gains).argmin()), len(taken))
        gain = int(gains[give, take])
        if not 0 < gain < gap:
            break
        moved = packs[full].pop(give)
        if take:
            packs[full].append(packs[empty].pop(take - 1))
        packs[empty].append(moved)
        sizes[full], sizes[empty] = sizes[full] - gain, sizes[empty] + gain
    return sizes


class StepLoader(DataLoader):
    """A DataLoader over StepSampler that passes the epoch on, as the Trainer expects."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)
