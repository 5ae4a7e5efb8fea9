"""Tokenized rows, kept on disk between runs together with what was noticed about them while tokenizing."""

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
