"""Every row once per epoch, the same steps as the stock sampler, equally many micro-batches on every rank."""

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from torch.utils.data import BatchSampler, DistributedSampler

from alpaca.packing.packing import RowSizes
from alpaca.packing.sampler import StepSampler


def sizes(num_rows: int) -> RowSizes:
    return RowSizes(np.full(num_rows, 9), np.full(num_rows, 4), np.full(num_rows, 5))


def rows_of(sampler: StepSampler) -> list[list[int]]:
    return [batch.rows for slot in sampler for batch in slot]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("num_rows", [1, 7, 34, 64, 65, 127])
def test_every_row_once_and_ranks_in_step(num_rows, world_size):
    ranks = [StepSampler(sizes(num_rows), 2, 4, world_size, rank, seed=3) for rank in range(world_size)]
    batches = [rows_of(sampler) for sampler in ranks]
    assert {len(b) for b in batches} == {len(ranks[0])}
    assert sorted(row for rank in batches for batch in rank for row in batch) == list(range(num_rows))
    for rank, mine in enumerate(batches):
        dealt = [row for batch in mine for row in batch]
        assert dealt == ranks[0].order()[rank::world_size], "2023's: every world_size-th row of the permutation"


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_same_rows_as_the_stock_sampler_where_nothing_is_left_over(epoch):
    """Today's Trainer has them in each step, that of 2023 in each micro-batch too."""
    world_size, batch_size, accumulation, num_rows = 2, 4, 4, 64
    steps = [[], []]
    for rank in range(world_size):
        ours = StepSampler(sizes(num_rows), batch_size, accumulation, world_size, rank, seed=42)
        ours.set_epoch(epoch)
        then = DistributedSampler(range(num_rows), world_size, rank, seed=42)
        then.set_epoch(epoch)
        assert rows_of(ours) == list(BatchSampler(then, batch_size, False))
        stock = SeedableRandomSampler(range(num_rows), data_seed=42)
        stock.set_epoch(epoch)
        today = list(BatchSamplerShard(BatchSampler(stock, batch_size, False), world_size, rank))
        for rows, batches in zip(steps, (rows_of(ours), today)):
            rows.append([sum(batches[at : at + accumulation], []) for at in range(0, len(batches), accumulation)])
    ours, today = ([sorted(sum(ranks, [])) for ranks in zip(*rows)] for rows in steps)
    assert ours == today and len(ours) == 2


def test_without_seed_rows_stay_in_order_and_drop_last_drops_the_short_step():
    assert rows_of(StepSampler(sizes(5), 2)) == [[0, 1], [2, 3], [4]]
    assert rows_of(StepSampler(sizes(13), 2, accumulation=3, drop_last=True)) == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
        [8, 9],
        [10, 11],
    ]
    assert len(StepSampler(sizes(5), 2, accumulation=3, drop_last=True)) == 0


class RecordingCollator:
    """Remembers which rows it was asked for: every row has one token of its own."""

    def __init__(self):
        self.seen = []

    def __call__(self, rows):
        ids = torch.stack([row["input_ids"] for row in rows])
        self.seen += ids[:, 0].tolist()
        return dict(input_ids=ids, labels=ids.clone(), attention_mask=torch.ones_like(ids))


class OneTokenRows(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, i):
        return dict(input_ids=torch.tensor([i, 1, 2]), labels=torch.tensor([i, 1, 2]))


def test_the_trainer_reshuffles_each_epoch_and_resumes_in_the_middle(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    from alpaca.training.trainer import AlpacaTrainer
    from train import TrainingArguments

    def rows_of_a_run(output_dir, **kwargs):
        args = TrainingArguments(
            output_dir=str(output_dir),
            use_cpu=True,
            num_train_epochs=3,
            save_steps=4,
            seed=7,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=1,
            report_to="none",
            logging_steps=100,
            batching="padded",
        )
        collator = RecordingCollator()
        model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
        AlpacaTrainer(model=model, args=args, train_dataset=OneTokenRows(), data_collator=collator).train(**kwargs)
        return collator.seen

    order = []
    for epoch in range(3):
        sampler = StepSampler(sizes(10), 2, seed=7)
        sampler.set_epoch(epoch)
        order += sampler.order()
    assert order[:10] != order[10:20]
    assert rows_of_a_run(tmp_path) == order
    resumed = rows_of_a_run(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert resumed == order[16:], "step 8 is the third of the second epoch"
