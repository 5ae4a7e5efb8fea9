"""A step whose loss or gradient is not finite stops the run before it reaches the weights, and what was in the step is
written to a file."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback

from alpaca.common.distributed import all_gather_object
from alpaca.common.errors import UsageError
from alpaca.common.files import atomic_write
from alpaca.training.metrics import LossTracker
from alpaca.training.stop import StopCallback

DECODED_TOKENS = 128  # of a row, for the file: the template's preamble and the beginning of the instruction


def nonfinite_weights(model: nn.Module) -> list[str]:
    """Return the names of trained weights of which a value is not finite, here or on another rank. Collective."""
    ends = []  # (2,) the smallest and the largest value of each, NaN where one is: no copy of the weights is made
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    with torch.no_grad():
        for _, parameter in trained:
            held = getattr(parameter, "ds_tensor", parameter)  # DeepSpeed's part
            held = held.to_local() if isinstance(held, DTensor) else held
            nothing = torch.zeros(2, device=held.device)
            ends.append(torch.stack(torch.aminmax(held)).float() if held.numel() else nothing)
    finite = torch.stack(ends).isfinite().all(dim=1).tolist() if ends else []
    here = [name for (name, _), whole in zip(trained, finite) if not whole]
    return sorted({name for names in all_gather_object(here) for name in names})


def format_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


class NonFiniteGuard(TrainerCallback):
    """Keep the rows and losses of the micro-batches of the current step. Right before the optimizer steps, check the
    loss of the step over all ranks and the gradient norm: the only time in a step that the host waits for the device.
    What was read goes to `losses`, which are logged.

    The loss scaler of float16 skips steps whose gradients overflow, so there only the loss counts. It waits itself.
    """

    def __init__(
        self,
        dataset: Dataset | None,
        tokenizer: PreTrainedTokenizerBase | None,
        losses: LossTracker,
        stop: StopCallback | None = None,
    ):
        self.stop = stop or StopCallback()
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.tracker = losses
        self.rows: list[list[tuple[int, int]]] = []
        self.target_losses: list[Tensor] = []  # (K,) of each micro-batch
        self.losses: list[Tensor] = []
        self.grad_norm: Tensor | float | None = None
        self.from_the_start: list[str] = []  # weights that are not finite

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.from_the_start = nonfinite_weights(model)
        if self.from_the_start and args.process_index == 0:
            shown = format_names(self.from_the_start)
            print(f"note: weights that are not finite, from the start: {shown}; the model is damaged", flush=True)

    def check_weights(self, model: nn.Module, args: Any, state: Any, final: bool = False) -> None:
        """Raise UsageError for weights that have become not finite, instead of saving them; of the final model also for
        those that have been so from the start. Collective."""
        found = nonfinite_weights(model)
        bad = [name for name in found if final or name not in self.from_the_start]
        if bad:
            dtype = "" if args.save_dtype != "float16" else " --save_dtype float16 holds nothing above 65504."
            raise UsageError(
                f"step {state.global_step}: the model is not saved, as weights of it are not finite: "
                f"{format_names(bad)}.{dtype} Common causes: a learning rate that is too high, a damaged base model"
            )

    def begin_step(self, rows: list[list[tuple[int, int]]]) -> None:
        """Forget the step before. `rows`: of each micro-batch here, row numbers and their numbers of targets."""
        self.rows = rows
        self.target_losses = []
        self.losses = []
        self.grad_norm = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        norm = self.grad_norm.full_tensor() if isinstance(self.grad_norm, DTensor) else self.grad_norm
        loss = torch.stack([loss.float() for loss in self.losses]).sum()
        sums = torch.cat([loss.view(1), self.stop.votes(loss)])
        if args.world_size > 1:  # the micro-batches of all ranks; a loss that is not finite stays so in the sum
            torch.distributed.all_reduce(sums)
        norm_here = loss.new_zeros(()) if norm is None else torch.as_tensor(norm, dtype=loss.dtype, device=loss.device)
        sums[0] /= args.world_size
        loss, *votes, size = torch.cat([sums, norm_here.view(1)]).tolist()
        self.stop.count(votes)
        size = None if norm is None else size
        if not math.isfinite(loss) or not (args.fp16 or size is None or math.isfinite(size)):
            self._stop(args, state, size)
        self.tracker.add(loss, size)

    def _stop(self, args, state, norm: float | None) -> None:
        """Write the file and raise UsageError. Collective: every rank gets here."""
        step = state.global_step + 1
        found = [self._describe(number, args.process_index) for number in range(len(self.losses))]
        of_all_ranks = [batch for batches in all_gather_object(found) for batch in batches]
        bad = [batch for batch in of_all_ranks if not batch["finite"]]
        what, suspects = ("loss", bad) if bad else ("gradient norm", of_all_ranks)
        rows = [row["row"] for batch in suspects for row in batch["rows"] if not (bad and row["finite"])]
        path = Path(args.output_dir) / f"nonfinite_step_{step}.json"
        if args.process_index == 0:
            content = {
                "step": step,
                "epoch": state.epoch,
                "what": what,
                "gradient_norm": str(norm) if norm is not None else None,
                "rows": rows,
                "micro_batches": suspects,
                "last_log_lines": state.log_history[-10:],
            }
            with atomic_write(path) as file:
                json.dump(content, file, indent=1, ensure_ascii=False)
        shown = ", ".join(map(str, rows[:16])) + (", ..." if len(rows) > 16 else "")
        which = "Rows where it is not" if bad else "Rows in that step"
        raise UsageError(
            f"step {step}: the {what} is not finite. {which}: {shown}. "
            f"Their text is in {path}; the weights are as before the step. "
            "Common causes: a learning rate that is too high, float16 where bfloat16 is needed, a damaged base model, "
            "or such a row (look with python -m scripts.inspect_data --rows)"
        )

    def _describe(self, number: int, rank: int) -> dict[str, Any]:
        loss, targets = self.losses[number], [count for _, count in self.rows[number]]
        finite = [bool(torch.isfinite(part).all()) for part in self.target_losses[number].split(targets)]
        ids = [self.dataset[row]["input_ids"].tolist() for row, _ in self.rows[number]]
        return {
            "rank": rank,
            "micro_batch": number,
            "loss": str(loss.item()),
            "finite": bool(torch.isfinite(loss)),
            "rows": [
                {
                    "row": self.dataset.report.numbers[row],
                    "tokens": len(tokens),
                    "finite": whole,
                    "starts": self._text(tokens[:DECODED_TOKENS]),
                }
                for (row, _), tokens, whole in zip(self.rows[number], ids, finite)
            ],
        }

    def _text(self, ids: list[int]) -> str | list[int]:
        return self.tokenizer.decode(ids) if self.tokenizer else ids
