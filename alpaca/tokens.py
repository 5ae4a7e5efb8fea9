"""Tokenized rows: kept on disk between runs, and what was noticed about them while tokenizing."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alpaca.errors import UsageError
from alpaca.files import atomic_write
from alpaca.waiting import wait_for_all_ranks

Tokens = dict[str, Any]  # input_ids and labels: lists of (length,) int64 tensors; problems: {name: row numbers}
IGNORE_INDEX = -100

PROBLEMS = {  # name in `problems`: (what it means, what to do)
    "truncated": ("cut at --model_max_length", "raise it if the answers matter to their end"),
    "no_eos": ("cut so that the end-of-text token is lost", "the model does not learn to stop from them"),
    "nothing_to_learn": ("have no target left", "their prompt fills --model_max_length"),
    "merged_boundary": (
        "begin with a character that merges with the prompt's last token and is masked with it, as in 2023",
        "--prompt_boundary split tokenizes prompt and answer apart",
    ),
    "control_text": ("hold the text of a control token such as </s>", "it is taken as plain text, never as the token"),
}


def cached_tokens(key: str, build: Callable[[], Tokens], cache_dir: str | None = None) -> Tokens:
    """`build()` once per machine and key; later runs, and the other local ranks, read the file.

    The other ranks wait, however long it takes.
    """
    path = _cache_folder(cache_dir) / f"{key}.npz"
    tokens = None
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and (tokens := _read(path)) is None:
        tokens = build()
        _write(path, tokens)
    wait_for_all_ranks()
    if tokens is None and (tokens := _read(path)) is None:
        raise UsageError(f"the token cache {path}, written by the first process of this machine, cannot be read")
    return tokens


def _cache_folder(cache_dir: str | None) -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(cache_dir or HF_HOME) / "alpaca_tokens"


def _write(path: Path, tokens: Tokens) -> None:
    """Labels equal the ids after a masked prefix, so its length is enough."""
    lengths = np.array([len(ids) for ids in tokens["input_ids"]], dtype=np.int64)
    masked = np.array([int((labels == IGNORE_INDEX).sum()) for labels in tokens["labels"]], dtype=np.int64)
    ids = torch.cat(tokens["input_ids"]).to(torch.int32).numpy()
    problems = {f"problem_{name}": np.array(rows, dtype=np.int64) for name, rows in tokens["problems"].items()}
    try:
        with atomic_write(path, "wb") as file:
            np.savez(file, ids=ids, lengths=lengths, masked=masked, **problems)
    except OSError as error:
        raise UsageError(f"cannot write the token cache {path} ({error}); choose a folder with --cache_dir") from error


def _read(path: Path) -> Tokens | None:
    """None where there is no file, or one that cannot be read."""
    try:
        with np.load(path) as arrays:
            ids = torch.from_numpy(arrays["ids"].astype(np.int64))
            lengths, masked = arrays["lengths"].tolist(), arrays["masked"].tolist()
            problems = {
                name.removeprefix("problem_"): arrays[name].tolist() for name in arrays if name.startswith("problem_")
            }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    input_ids = list(ids.split(lengths))
    return {"input_ids": input_ids, "labels": [mask(x, n) for x, n in zip(input_ids, masked)], "problems": problems}


def mask(input_ids: Tensor, num_masked: int) -> Tensor:
    """The labels of a row: its ids with the first `num_masked` replaced by IGNORE_INDEX."""
    labels = input_ids.clone()
    labels[:num_masked] = IGNORE_INDEX
    return labels


def describe(tokens: Tokens, name: str) -> str:
    """The lines printed before training: sizes, and every problem with its count and first row numbers (from 0)."""
    total = sum(map(len, tokens["input_ids"]))
    targets = sum(int((labels != IGNORE_INDEX).sum()) for labels in tokens["labels"])
    longest = max(map(len, tokens["input_ids"]))
    lines = [
        f"{name}: {len(tokens['labels']):,} rows, {total:,} tokens ({targets / total:.0%} to learn), longest {longest}"
    ]
    for problem, rows in tokens["problems"].items():
        if rows:
            meaning, advice = PROBLEMS[problem]
            first = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
            lines.append(f"  {len(rows):,} rows {meaning} (rows {first}): {advice}")
    return "\n".join(lines)
