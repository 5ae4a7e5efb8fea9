"""Which rows a rank trains on in which optimizer step.

The rows of a step are those of the stock sampler: consecutive chunks of the permutation drawn from seed + epoch, dealt
to the ranks micro-batch by micro-batch. The difference is the end of an epoch. accelerate fills the last batches with
rows from the start of the epoch so that all ranks have equally many, and those rows are trained twice; here the last
step simply has fewer rows, and a rank that has none left gets an empty micro-batch, which adds nothing to the gradient.
"""

import math
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Sampler


class StepSampler(Sampler[list[int]]):
    """Yields this rank's micro-batches (lists of at most `batch_size` row numbers, perhaps empty) in step order.

    Every rank yields the same number of micro-batches: sharded parameters are gathered by all ranks together.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        accumulation: int = 1,
        world_size: int = 1,
        rank: int = 0,
        seed: int | None = None,
        drop_last: bool = False,
    ):
        """`seed=None` keeps the rows in order; `drop_last` leaves out the step that has fewer rows."""
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.world_size, self.rank = world_size, rank
        self.rows_per_step = batch_size * accumulation * world_size
        self.used_rows = num_rows - num_rows % self.rows_per_step if drop_last else num_rows
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self) -> list[int]:
        """The rows in the order of the current epoch, over all ranks."""
        if self.seed is None:
            return list(range(self.num_rows))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(self.num_rows, generator=generator).tolist()

    def __len__(self) -> int:
        return math.ceil(self.used_rows / (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order()[: self.used_rows]
        for start in range(self.rank * self.batch_size, len(self) * self.batch_size * self.world_size,
                           self.batch_size * self.world_size):  # fmt: skip
            yield order[start : start + self.batch_size]


class StepLoader(DataLoader):
    """A DataLoader over StepSampler that passes the epoch on, as the Trainer expects."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)
