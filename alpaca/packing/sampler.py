"""Which rows a rank trains on in which optimizer step, and in which micro-batches.

The rows of a step are those of the stock sampler: consecutive chunks of the permutation drawn from seed + epoch. Three
things are done with them that the stock sampler does not:

Every row counts once. accelerate fills the last batches of an epoch with rows from its start so that all ranks have
equally many, and those are trained twice; here the last step simply has fewer rows, and a rank that has none left gets
an empty micro-batch, which adds nothing to the gradient.

The loss does not depend on how rows are batched: each row comes with the weight that its targets have in the loss of
the whole step, over all ranks.

`packed`: the rows of the whole step, across ranks, are dealt into packs of nearly equal length, equally many on every
rank, planned from lengths alone, so that every rank knows the plan without asking. `padded`: in 2023's micro-batches,
for which rank r of W took every W-th row of the permutation, beginning at its r-th.

StepSampler2023 yields the run of 2023 itself, repeated rows and steps across the end of an epoch included.
"""

import atexit
import heapq
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from alpaca.common.distributed import leave_signals_to_the_run
from alpaca.packing.packing import Batch, MicroBatch, PackedBatchDataset, Packing, RowSizes, StepTotals

if TYPE_CHECKING:
    from transformers import TrainingArguments

EXCHANGES = 50  # between packs of a step at most, to even them out


class StepSampler(Sampler[list[MicroBatch]]):
    """Yield this rank's micro-batches in step order, in lists: as many lists a step as the Trainer expects
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
        self.sizes = sizes
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.world_size, self.rank = world_size, rank
        self.seed = seed
        self.normalization = normalization
        self.packing = packing
        self.rows_per_step = batch_size * accumulation * world_size
        num_rows = len(sizes.lengths)
        self.used_rows = num_rows - num_rows % self.rows_per_step if drop_last else num_rows
        self.group_by_length, self.epoch = group_by_length, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self) -> list[int]:
        """Return the rows in the order of the current epoch, over all ranks."""
        num_rows = len(self.sizes.lengths)
        if self.seed is None:
            return list(range(num_rows))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.group_by_length:
            from transformers.trainer_pt_utils import get_length_grouped_indices

            batch = self.batch_size * self.world_size
            return get_length_grouped_indices(self.sizes.lengths.tolist(), batch, generator=generator)
        return torch.randperm(num_rows, generator=generator).tolist()

    def steps(self) -> Iterator[list[list[int]]]:
        """Yield the rows of each optimizer step of the current epoch, in 2023's micro-batches: number i is rank
        i % world_size's, and perhaps has no rows."""
        order = self.order()[: self.used_rows]
        for start in range(0, self.used_rows, self.rows_per_step):
            yield deal(order[start : start + self.rows_per_step], self.batch_size, self.world_size)

    def __len__(self) -> int:
        return math.ceil(self.used_rows / (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        for step in self.steps():
            mine = self.plan(step)
            filled = [mine] if self.packing else [[batch] for batch in mine]
            yield from ([] for _ in range(self._slots(step) - len(filled)))
            yield from filled

    def _slots(self, step: list[list[int]]) -> int:
        """Return how many micro-batches the Trainer expects in `step`."""
        return len(step) // self.world_size

    def plan(self, step: list[list[int]], rank: int | None = None) -> list[MicroBatch]:
        """Return the micro-batches in which this rank (or `rank`) trains its share of a step of `steps()`. A row that
        comes twice is trained twice."""
        weighted = [[(row, weight) for row in batch] for batch, weight in zip(step, self._weights(step))]
        if self.packing:
            weighted = self._packs([item for batch in weighted for item in batch])
        totals = self._totals([[row for row, _ in batch] for batch in weighted])
        mine = weighted[self.rank if rank is None else rank :: self.world_size]
        return [
            MicroBatch([row for row, _ in batch], [weight for _, weight in batch], bool(self.packing), totals)
            for batch in mine
        ]

    def _packs(self, items: list[tuple[int, float]]) -> list[list[tuple[int, float]]]:
        costs = [int(self.packing.costs[row]) for row, _ in items]
        packs = plan_packs(costs, self.packing.capacity, self.world_size)
        return [[items[i] for i in pack] for pack in packs]

    def _weights(self, step: list[list[int]]) -> list[float]:
        """Return the weights of the targets of each micro-batch."""
        targets = [int(self.sizes.num_targets[batch].sum()) for batch in step]
        if self.normalization == "sum":
            return [1.0] * len(step)
        if self.normalization == "token":
            return [1.0 / max(sum(targets), 1)] * len(step)
        return [1.0 / (max(number, 1) * self._divisor(targets)) for number in targets]

    def _divisor(self, targets: list[int]) -> int:
        """Return the divisor of the sum of the means of micro-batches with so many `targets`."""
        return max(sum(number > 0 for number in targets), 1)

    def _totals(self, batches: list[list[int]]) -> StepTotals:
        lengths, rows = self.sizes.lengths, [row for batch in batches for row in batch]
        tokens, pairs = int(lengths[rows].sum()), int(_pairs(lengths[rows]).sum())
        if self.packing:
            computed, targets = sum(map(self.packing.tokens, batches)), int(self.sizes.num_targets[rows].sum())
            return StepTotals(len(rows), tokens, computed, 0, targets, pairs, pairs)
        widths = [(len(batch), int(lengths[batch].max())) if batch else (1, 1) for batch in batches]
        computed = sum(number * width for number, width in widths)
        padded = sum(number * _pairs(width) for number, width in widths)
        return StepTotals(len(rows), tokens, computed, computed - tokens, computed, padded, pairs)


def _pairs(length: Any) -> Any:
    """Return how many pairs of tokens causal attention computes in `length` tokens."""
    return length * (length + 1) // 2


def deal(rows: Sequence[int], batch_size: int, world_size: int) -> list[list[int]]:
    """Return 2023's micro-batches of `rows`, those of all ranks by turns: of each `batch_size * world_size` rows, rank
    r has every `world_size`-th from the r-th on."""
    together = batch_size * world_size
    blocks = (rows[start : start + together] for start in range(0, len(rows), together))
    return [block[rank::world_size] for block in blocks for rank in range(world_size)]


# ---- the run of 2023 ----


@dataclass(frozen=True)
class Steps2023:
    """When the Trainer of 2023 (transformers 4.28.1, `_inner_training_loop`) takes an optimizer step: after every
    `accumulation` micro-batches, counted through the whole run, so that a step may hold the last ones of an epoch and
    the first of the next. Where an epoch has at most `accumulation`, at its end as well."""

    micro_batches: int  # of an epoch, on every rank
    accumulation: int

    @classmethod
    def of(cls, num_rows: int, batch_size: int, accumulation: int, world_size: int, drop_last: bool) -> "Steps2023":
        whole, rest = divmod(math.ceil(num_rows / world_size), batch_size)
        return cls(whole + (rest > 0 and not drop_last), accumulation)

    @property
    def per_epoch(self) -> int:
        """Return the optimizer steps of an epoch, as the length of the run is counted."""
        return max(self.micro_batches // self.accumulation, 1)

    def taken(self, micro_batches: int) -> int:
        """Return the optimizer steps in the first `micro_batches` of the run."""
        steps = micro_batches // self.accumulation
        if 0 < self.micro_batches <= self.accumulation:
            both = math.lcm(self.micro_batches, self.accumulation)
            steps += micro_batches // self.micro_batches - micro_batches // both
        return steps

    def end(self, steps: int) -> int:
        """Return the micro-batches in the first `steps` of the run; the inverse of `taken`."""
        return bisect_left(range(steps * self.accumulation), steps, key=self.taken)

    def of_epoch(self, epoch: int) -> range:
        """Return the steps, numbered from 0 through the run, that are taken in an epoch."""
        return range(self.taken(epoch * self.micro_batches), self.taken((epoch + 1) * self.micro_batches))

    def position(self, steps: int) -> tuple[int, int]:
        """Return the epoch of the step that follows the first `steps`, and how many steps of it are done."""
        epoch = (self.end(steps + 1) - 1) // self.micro_batches
        return epoch, steps - self.of_epoch(epoch).start


class StepSampler2023(StepSampler):
    """The rows, micro-batches and steps of the 2023 run. An epoch has the steps that are taken in it, each of
    `accumulation` lists, with the micro-batches that the epoch before has left over for the first."""

    def __init__(self, sizes: RowSizes, batch_size: int, *, seed: int, drop_last: bool = False, **options: Any):
        """`seed`: see `sampler_seed`. `drop_last` leaves out an epoch's short micro-batch."""
        super().__init__(sizes, batch_size, seed=seed, drop_last=drop_last, **options, normalization="microbatch")
        self.run = Steps2023.of(len(sizes.lengths), batch_size, self.accumulation, self.world_size, drop_last)

    def order(self, epoch: int | None = None) -> list[int]:
        """Return the rows in the order of `epoch` (by default the current one), over all ranks; of several ranks as
        torch's DistributedSampler has it, which gives each of them equally many."""
        epoch, num_rows = self.epoch if epoch is None else epoch, len(self.sizes.lengths)
        if self.world_size > 1:
            rows = torch.randperm(num_rows, generator=torch.Generator().manual_seed(self.seed + epoch)).numpy()
            return np.resize(rows, math.ceil(num_rows / self.world_size) * self.world_size).tolist()
        generator = torch.Generator().manual_seed(self.seed)  # one for the run, of RandomSampler
        for _ in range(2 * epoch):  # which draws a permutation for an epoch, and at its end another
            torch.randperm(num_rows, generator=generator)
        return torch.randperm(num_rows, generator=generator).tolist()

    def steps(self) -> Iterator[list[list[int]]]:
        run, world_size = self.run, self.world_size
        dealt: dict[int, list[list[int]]] = {}  # of each epoch, the micro-batches of all ranks
        for number in run.of_epoch(self.epoch):
            step: list[list[int]] = []
            for epoch, at in (divmod(n, run.micro_batches) for n in range(run.end(number), run.end(number + 1))):
                if epoch not in dealt:
                    dealt[epoch] = deal(self.order(epoch), self.batch_size, world_size)
                step += dealt[epoch][at * world_size : (at + 1) * world_size]
            yield step

    def __len__(self) -> int:
        return len(self.run.of_epoch(self.epoch)) * self.accumulation

    def _slots(self, step: list[list[int]]) -> int:
        return self.accumulation

    def _divisor(self, targets: list[int]) -> int:
        return self.accumulation * self.world_size


def sampler_seed(seed: int, data_seed: int | None, world_size: int) -> int:
    """Return the seed of 2023's order of rows. One process without --data_seed: the first number that torch draws after
    seeding."""
    if world_size > 1 or data_seed is not None:
        return seed if data_seed is None else data_seed
    return int(torch.empty((), dtype=torch.int64).random_(generator=torch.Generator().manual_seed(seed)))


# ---- packs ----


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
    difference best. Return the sizes."""
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
    """A DataLoader over StepSampler that passes the epoch on, as the Trainer expects. Its workers ignore SIGTERM. Where
    a run ends within an epoch they are killed: Python would send them SIGTERM at its exit, and wait forever."""

    def __iter__(self) -> Iterator[list[Batch]]:
        iterator = super().__iter__()
        for worker in getattr(iterator, "_workers", ()):
            atexit.register(worker.kill)
        return iterator

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


class OneStepAhead:
    """Fetch the micro-batches of the next step while the device computes this one. It needs no process, from which
    tensors would take longer to come than they take to collate: a GPU works through a queue, and the host is free."""

    def __init__(self):
        self._source: Iterator[list[Batch]] = iter(())
        self._number = 0
        self._fetched: list[list[Batch]] = []

    def take(self, source: Iterator[list[Batch]], number: int) -> list[list[Batch]]:
        """Return the next `number` lists of `source`, or those that it has left."""
        if source is not self._source:  # another epoch
            self._source, self._fetched = source, []
        self._number = number
        self.fetch()
        taken, self._fetched = self._fetched[:number], self._fetched[number:]
        return taken

    def fetch(self) -> None:
        """Have as many lists as were taken last time."""
        self._fetched += islice(self._source, max(self._number - len(self._fetched), 0))


def make_loader(
    args: "TrainingArguments", dataset: Dataset, collate: Callable[[list[Any]], Batch], sampler: StepSampler
) -> StepLoader:
    """Return a loader whose items are lists of batches, as `sampler` plans them."""
    return StepLoader(
        PackedBatchDataset(dataset, collate, sampler.packing),
        batch_sampler=sampler,
        collate_fn=list,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        in_order=args.dataloader_in_order if args.dataloader_num_workers else True,
        worker_init_fn=leave_signals_to_the_run,
        multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
    )


def rows_per_step(args: "TrainingArguments") -> int:
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def count_steps(args: "TrainingArguments", num_rows: int) -> tuple[int, float]:
    """Return (optimizer steps of the run, of an epoch), as the Trainer will count them. Under --reproduce_2023 epochs
    differ, and it is their mean."""
    per_step, accumulation = rows_per_step(args), args.gradient_accumulation_steps
    if args.reproduce_2023:
        run = steps_2023(args, num_rows)
        counted, per_epoch = run.per_epoch, run.taken(run.micro_batches * accumulation) / accumulation
    else:
        counted = per_epoch = num_rows // per_step if args.dataloader_drop_last else -(-num_rows // per_step)
    return args.max_steps if args.max_steps > 0 else math.ceil(counted * args.num_train_epochs), per_epoch


def steps_2023(args: "TrainingArguments", num_rows: int) -> Steps2023:
    drop_last = args.dataloader_drop_last
    return Steps2023.of(num_rows, args.train_batch_size, args.gradient_accumulation_steps, args.world_size, drop_last)
