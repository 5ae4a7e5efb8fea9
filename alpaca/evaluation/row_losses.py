"""The loss of single rows, and which of them training did not help; what a run says of its own rows.

for place, losses in token_losses(model, [([1, 835, 450, 1234, 2], 2)]): ...      # of each target token, in nats
score(before=9.1, after=10.2, targets=1)                                          # of a row, the higher the worse
"""

import inspect
import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.hf_argparser import string_to_bool

from alpaca.common.arguments import flags_of_file
from alpaca.common.errors import InputError, ParameterError, UsageError
from alpaca.common.files import refuse_other_arguments
from alpaca.data.rows import Data, read_data
from alpaca.weights.provenance import read_record

TokenizedRow = tuple[Sequence[int], int]  # its ids, and the place of the first target
OF_A_RUN = {  # flags: what they are made with, and their defaults
    "model_max_length": (int, 512),
    "seed": (int, 42),
    "eval_size": (float, None),
    "backward": (string_to_bool, False),
}


# ---- forward passes ----


@torch.inference_mode()
def token_losses(
    model: PreTrainedModel, rows: Sequence[TokenizedRow], batch_tokens: int = 4096
) -> Iterator[tuple[int, Tensor]]:
    """Yield (place in `rows`, (targets,) float32 cross entropies of its target tokens in nats, on the CPU), the longest
    rows first. The first token of a row is predicted by nothing, and never a target.

    batch_tokens: most tokens of a batch, padding included; a longer row is a batch of its own.

    Raises:
        ParameterError: memory does not suffice for a batch.
    """
    model.eval()
    for batch in batches([len(ids) for ids, _ in rows], batch_tokens):
        try:
            yield from zip(batch, _losses_of_batch(model, [rows[place] for place in batch]))
        except torch.OutOfMemoryError as error:
            width = len(rows[batch[0]][0])
            message = f"{{batch_tokens}} {batch_tokens}: out of memory with {len(batch)} rows of up to {width} tokens"
            raise ParameterError(f"{message}; give a smaller number", "batch_tokens") from error


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield the places of rows that are padded together, of similar lengths, the longest first."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _losses_of_batch(model: PreTrainedModel, rows: Sequence[TokenizedRow]) -> list[Tensor]:
    width, device = max(len(ids) for ids, _ in rows), model.device
    padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids, _ in rows], device=device)  # (B, T)
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows], device=device)
    firsts = [max(first, 1) for _, first in rows]
    start = min(min(firsts), width) - 1  # no row has a target that is predicted before
    options: dict[str, Any] = {"use_cache": False}
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        options["logits_to_keep"] = width - start
    logits = model(input_ids=padded, attention_mask=mask, **options).logits[:, start - width :]  # (B, T - start, V)
    losses = []
    for (ids, _), first, row in zip(rows, firsts, logits):
        targets = torch.tensor(ids[first:], dtype=torch.long, device=device)
        predicted = row[first - 1 - start :][: len(targets)].float()
        losses.append(cross_entropy(predicted, targets, reduction="none").cpu())
    return losses


# ---- before and after training ----


@dataclass(frozen=True)
class RowLoss:
    """Of a row: its number of target tokens, and their summed loss in nats before and after training."""

    targets: int
    before: float
    after: float

    @property
    def score(self) -> float:
        return score(self.before, self.after, self.targets)


def score(before: float, after: float, targets: int) -> float:
    """Return how much a row speaks against its model: the loss that training left, plus what it added, by its target
    tokens and one more, so that short answers are not first by chance.

    before, after: the summed loss of its `targets` target tokens.
    """
    return (after + max(after - before, 0.0)) / (targets + 1)


class Kept(Protocol):
    """What is measured, line by line, as completions.journal.Journal keeps it."""

    path: Path

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def append(self, entry: dict[str, Any]) -> None: ...


def measure(
    models: Mapping[str, Callable[[], PreTrainedModel]],
    rows: Mapping[int, TokenizedRow],
    batch_tokens: int,
    journal: Kept,
    how: Mapping[str, Any],
) -> dict[int, RowLoss]:
    """Return the loss of each row by its key, before and after training. What is measured lies in `journal`, from which
    a run that was killed goes on.

    models: "before" and "after", each opened by a call, one after the other, and only if rows are left for it.
    how: all that the numbers depend on.

    Raises:
        InputError: the journal was made with another `how`.
    """
    found: dict[tuple[str, int], tuple[int, float]] = {}
    begun = False
    for entry in journal:
        if entry["kind"] == "run":
            refuse_other_arguments(journal.path, entry["how"], how, journal.path)
            begun = True
        elif entry.get("model") in models and type(entry.get("targets")) is int and "loss" in entry:
            found[entry["model"], entry["index"]] = entry["targets"], float(entry["loss"])
        else:
            raise UsageError(f"{journal.path}: has a line that is none of ours: {entry!r:.80}; move it away")
    if not begun:
        journal.append({"kind": "run", "how": how})
    for name, open_model in models.items():
        left = [key for key in rows if (name, key) not in found]
        if not left:
            continue
        losses = token_losses(open_model(), [rows[key] for key in left], batch_tokens)
        for place, of_row in _shown(losses, name, len(left), len(rows)):
            key, loss = left[place], of_row.sum().item()
            if not math.isfinite(loss):
                raise UsageError(f"row {key}: its loss {name} training is {loss}; the weights are damaged")
            journal.append({"kind": "answer", "model": name, "index": key, "targets": len(of_row), "loss": loss})
            found[name, key] = len(of_row), loss
    return {key: RowLoss(*found["before", key], found["after", key][1]) for key in rows}


def _shown(losses: Iterable, name: str, left: int, rows: int) -> Iterable:
    return tqdm(losses, desc=f"loss {name} training", total=rows, initial=rows - left, unit="row")


# ---- the rows of a run ----


def flags_of_run(folder: Path) -> dict[str, Any]:
    """Return the flags of the run that wrote `folder`, or whose checkpoint it is, as far as it says; those of OF_A_RUN
    always."""
    in_run = folder.parent if re.fullmatch(r"checkpoint-\d+", folder.name) else folder
    file = next((place / "run.yaml" for place in (folder, in_run) if (place / "run.yaml").is_file()), None)
    try:
        flags: dict[str, Any] = {name: values[0] for name, values in flags_of_file(str(file)) if values} if file else {}
        if "guanaco_turns" in flags:
            flags["turns"] = flags["guanaco_turns"]
        return flags | {
            name: kind(flags[name]) if flags.get(name, "None") != "None" else default
            for name, (kind, default) in OF_A_RUN.items()
        }
    except (UsageError, ValueError, ArgumentTypeError) as error:
        problem = str(error).removeprefix(f"--config {file}: ")
        raise InputError(f"{file}: is not as train.py writes it ({problem})", file) from error


def held_out_of(folder: Path, run_flags: Mapping[str, Any], reading: Mapping[str, Any]) -> Data:
    """Return the rows that the run in `folder` held out of its data by --eval_size.

    Raises:
        InputError: the data is not there, or has other rows than the run was trained on.
    """
    record, path = (read_record(folder) or {}).get("contract", {}), Path(run_flags["data_path"])
    if not path.is_file() and (file := record.get("data", {}).get("file")) and (folder / file).is_file():
        path = folder / file  # seen from another folder than the run was started in
    data = read_data(str(path), run_flags.get("data_split", "train"), **reading)
    trained, held = data.hold_out(run_flags["eval_size"], run_flags["seed"])
    known = record.get("fixed", {}).get("the data (--data_path)", "").rpartition(" ")[2]
    if known and not trained.fingerprint().startswith(known):
        raise InputError(f"{path}: has other rows now than when the run was trained on it", path)
    return held
