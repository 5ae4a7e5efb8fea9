"""Tokenized rows, kept on disk between runs together with what was noticed about them while tokenizing."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alpaca.common.distributed import wait_for_all_ranks
from alpaca.common.errors import UsageError
from alpaca.common.files import atomic_write
from alpaca.encoding import Ragged

Tokens = dict[str, Any]  # as `make_tokens` returns them
IGNORE_INDEX = -100


def make_tokens(rows: Ragged, masked: np.ndarray, problems: dict[str, list[int]]) -> Tokens:
    """Rows of ids whose first `masked` labels, one number per row, are IGNORE_INDEX; the other labels are the ids.

    Returns:
        input_ids, labels: lists of (length,) int64 tensors, views of one tensor each. lengths, masked, num_targets
        (targets are labels[1:] that are not IGNORE_INDEX): (rows,) int64 arrays. problems: row numbers per name.
    """
    ids, lengths = torch.from_numpy(rows.ids.astype(np.int64)), rows.lengths
    sizes = lengths.tolist()
    prefixes = np.repeat(np.tile([True, False], len(lengths)), np.stack([masked, lengths - masked], axis=1).ravel())
    return {
        "input_ids": list(ids.split(sizes)),
        "labels": list(ids.masked_fill(torch.from_numpy(prefixes), IGNORE_INDEX).split(sizes)),
        "lengths": lengths,
        "masked": masked,
        "num_targets": np.maximum(lengths - np.maximum(masked, 1), 0),
        "problems": problems,
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
    """Labels equal the ids after a masked prefix, so its length is enough. Two bytes an id where they suffice."""
    ids = torch.cat(tokens["input_ids"]).numpy()
    ids = ids.astype(np.uint16 if ids.max() < 2**16 else np.int32)
    problems = {f"problem_{name}": np.array(rows, dtype=np.int64) for name, rows in tokens["problems"].items()}
    try:
        with atomic_write(path, "wb") as file:
            np.savez(file, ids=ids, lengths=tokens["lengths"], masked=tokens["masked"], **problems)
    except OSError as error:
        raise UsageError(f"cannot write the token cache {path} ({error}); choose a folder with --cache_dir") from error


def _read(path: Path) -> Tokens | None:
    """None where there is no file, or one that cannot be read."""
    try:
        with np.load(path) as arrays:
            problems = {
                name.removeprefix("problem_"): arrays[name].tolist() for name in arrays if name.startswith("problem_")
            }
            return make_tokens(Ragged(arrays["ids"], arrays["lengths"]), arrays["masked"], problems)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
