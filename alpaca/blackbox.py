"""The black box: a step whose loss or gradient is not finite stops the run before it reaches the weights, and what was
in it is written to a file."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

from alpaca.errors import UsageError
from alpaca.files import atomic_write
from alpaca.waiting import gather_from_all_ranks

DECODED_TOKENS = 128  # of a row, for the file: the template's preamble and the beginning of the instruction


class NumberedRows(Dataset):
    """Pairs (row number, row), so that a batch knows which rows it holds."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[int, Any]:
        return i, self.dataset[i]


def numbered(collate: Any) -> Any:
    """`collate` for pairs of NumberedRows: the batch has its row numbers under "rows"."""
    return partial(_collate, collate)


def _collate(collate: Any, pairs: list[tuple[int, Any]]) -> dict[str, Any]:
    return {**collate([row for _, row in pairs]), "rows": [number for number, _ in pairs]}


class BlackBox(TrainerCallback):
    """Keeps the micro-batches of the optimizer step under way and their losses, and looks at all losses and the
    gradient norm at once, right before the optimizer does: one host-device synchronisation a step.

    float16: its loss scaler skips steps whose gradients overflow, so there only the loss counts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None):
        self.tokenizer = tokenizer
        self.batches: list[dict[str, Any]] = []
        self.losses: list[Tensor] = []
        self.grad_norm: Tensor | float | None = None

    def begin_step(self, batches: list[dict[str, Any]]) -> None:
        """Takes the row numbers out of the batches, which the model would not know what to do with."""
        self.losses, self.grad_norm = [], None
        self.batches = [
            {"rows": batch.pop("rows", None), "ids": batch["input_ids"], "lengths": batch["attention_mask"].sum(1)}
            for batch in batches
        ]

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        norm = self.grad_norm.full_tensor() if isinstance(self.grad_norm, DTensor) else self.grad_norm
        watched = [loss.float() for loss in self.losses]
        if norm is not None and not args.fp16:
            watched.append(torch.as_tensor(norm, dtype=torch.float32, device=watched[0].device))
        finite = torch.isfinite(torch.stack(watched)).all().int()
        if args.world_size > 1:
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        if not finite.item():
            self._stop(args, state, norm)

    def _stop(self, args, state, norm: Tensor | float | None) -> None:
        """Collective: every rank gets here."""
        step = state.global_step + 1
        found = [self._describe(number, args.process_index) for number in range(len(self.losses))]
        of_all_ranks = [batch for batches in gather_from_all_ranks(found) for batch in batches]
        bad = [batch for batch in of_all_ranks if not batch["finite"]]
        what, suspects = ("loss", bad) if bad else ("gradient norm", of_all_ranks)
        rows = [row["row"] for batch in suspects for row in batch["rows"]]
        path = Path(args.output_dir) / f"nonfinite_step_{step}.json"
        if args.process_index == 0:
            content = {
                "step": step,
                "epoch": state.epoch,
                "what": what,
                "gradient_norm": str(float(norm)) if norm is not None else None,
                "rows": rows,
                "micro_batches": suspects,
                "last_log_lines": state.log_history[-10:],
            }
            with atomic_write(path) as file:
                json.dump(content, file, indent=1, ensure_ascii=False)
        shown = ", ".join(map(str, rows[:16])) + ", ..." * (len(rows) > 16)
        raise UsageError(
            f"step {step}: the {what} is not finite. Rows in that {'micro-batch' if bad else 'step'}: "
            f"{'not known' if None in rows else shown}. Their text is in {path}; the weights are as before the step. "
            "Common causes: a learning rate that is too high, float16 where bfloat16 is needed, a damaged base model, "
            "or such a row (look with python -m scripts.inspect_data --rows)"
        )

    def _describe(self, number: int, rank: int) -> dict[str, Any]:
        batch, loss = self.batches[number], self.losses[number]
        lengths = batch["lengths"].tolist()
        rows = batch["rows"] if batch["rows"] is not None else [None] * len(lengths)
        starts = [ids[: min(length, DECODED_TOKENS)].tolist() for ids, length in zip(batch["ids"], lengths)]
        return {
            "rank": rank,
            "micro_batch": number,
            "loss": str(loss.item()),
            "finite": bool(torch.isfinite(loss)),
            "rows": [
                {"row": row, "tokens": length, "starts": self.tokenizer.decode(ids) if self.tokenizer else ids}
                for row, length, ids in zip(rows, lengths, starts)
            ],
        }
