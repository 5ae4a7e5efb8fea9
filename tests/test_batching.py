"""Every row once per epoch, the same steps as the stock sampler, equally many micro-batches on every rank."""

import pytest
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from torch.utils.data import BatchSampler

from alpaca.batching import StepSampler


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("num_rows", [1, 7, 34, 64, 65, 127])
def test_every_row_once_and_ranks_in_step(num_rows, world_size):
    ranks = [StepSampler(num_rows, 2, 4, world_size, rank, seed=3) for rank in range(world_size)]
    batches = [list(sampler) for sampler in ranks]
    assert {len(b) for b in batches} == {len(ranks[0])}
    assert sorted(row for rank in batches for batch in rank for row in batch) == list(range(num_rows))
    dealt = [row for step in zip(*batches) for batch in step for row in batch]
    assert dealt == ranks[0].order(), "micro-batches are dealt to the ranks in the order of the permutation"


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_same_rows_as_the_stock_sampler_where_nothing_is_left_over(epoch):
    world_size, batch_size, num_rows = 2, 4, 64
    for rank in range(world_size):
        stock = SeedableRandomSampler(range(num_rows), data_seed=42)
        stock.set_epoch(epoch)
        expected = list(BatchSamplerShard(BatchSampler(stock, batch_size, False), world_size, rank))
        ours = StepSampler(num_rows, batch_size, 8, world_size, rank, seed=42)
        ours.set_epoch(epoch)
        assert list(ours) == expected


def test_without_seed_rows_stay_in_order_and_drop_last_drops_the_short_step():
    assert list(StepSampler(5, 2)) == [[0, 1], [2, 3], [4]]
    assert list(StepSampler(13, 2, accumulation=3, drop_last=True)) == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
        [8, 9],
        [10, 11],
    ]
    assert len(StepSampler(5, 2, accumulation=3, drop_last=True)) == 0
