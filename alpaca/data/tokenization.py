"""Token ids of many texts at once, as flat arrays: what a tokenizer gives for each text, without its cost per text.

The shortcut is exact: the backend of a fast tokenizer encodes batches without offsets, on all cores.
"""

import copy
import os
import zipfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers.processors import TemplateProcessing
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alpaca.common.distributed import barrier
from alpaca.common.errors import UsageError
from alpaca.common.files import atomic_write

Tokens = dict[str, Any]  # as `make_tokens` returns them
IGNORE_INDEX = -100


class Ragged(NamedTuple):
    """Rows of different lengths one after the other: ids (sum of lengths,) and lengths (rows,), both integer."""

    ids: np.ndarray
    lengths: np.ndarray


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return starts[0], starts[0] + 1, ... `lengths[0]` numbers, then those of starts[1], ..."""
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def ragged(rows: Iterable[Sequence[int]]) -> Ragged:
    ids, lengths = array("i"), array("q")
    for row in rows:
        ids.extend(row)
        lengths.append(len(row))
    return Ragged(np.array(ids, dtype=np.int32), np.array(lengths, dtype=np.int64))


def joined(first: Ragged, second: Ragged) -> Ragged:
    """Return row by row the ids of `first`, then those of `second`."""
    ends = np.repeat(np.cumsum(first.lengths), second.lengths)
    return Ragged(np.insert(first.ids, ends, second.ids), first.lengths + second.lengths)


def cut(rows: Ragged, limit: int) -> Ragged:
    """Return the first `limit` ids of every row."""
    lengths = np.minimum(rows.lengths, limit)
    return Ragged(rows.ids[ranges(np.cumsum(rows.lengths) - rows.lengths, lengths)], lengths)


def starts_with(rows: Ragged, beginnings: Ragged) -> np.ndarray:
    """Return (rows,) bool: whether a row begins with the ids of its beginning."""
    common = np.minimum(rows.lengths, beginnings.lengths)
    row_starts, starts = (np.cumsum(x.lengths) - x.lengths for x in (rows, beginnings))
    differs = rows.ids[ranges(row_starts, common)] != beginnings.ids[ranges(starts, common)]
    equal = np.ones(len(common), dtype=bool)
    equal[np.repeat(np.arange(len(common)), common)[differs]] = False
    return equal & (common == beginnings.lengths)


# ---- what a tokenizer puts around a text ----


def tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer itself puts in front of a text, and behind it (`add_eos_token`, a
    post-processor). Nothing, where it does something else to a text than put ids around it."""
    options = dict(split_special_tokens=True, verbose=False)
    for text in ("a", "1", ".", "é", *tokenizer.get_vocab()):  # one that the vocabulary can spell
        if alone := tokenizer(text, add_special_tokens=False, **options)["input_ids"]:
            break
    whole = tokenizer(text, return_special_tokens_mask=True, **options)
    ids, special = whole["input_ids"], whole["special_tokens_mask"]
    starts = [n for n in range(len(ids) - len(alone) + 1) if ids[n : n + len(alone)] == alone]
    if any(special):  # else it does not say which they are
        starts = [n for n in starts if n == (special.index(0) if 0 in special else 0)]
    return (ids[: starts[0]], ids[starts[0] + len(alone) :]) if starts else ([], [])


def without_end(ids: list[int], behind: list[int]) -> list[int]:
    """Return `ids` without what `tokens_around` says is behind a text. There the answer goes on, or more text."""
    return ids[: len(ids) - len(behind)] if behind and ids[-len(behind) :] == behind else ids


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a prompt as in training: text such as "</s>" stays text, and nothing is behind it."""
    return without_end(tokenizer(text, split_special_tokens=True)["input_ids"], tokens_around(tokenizer)[1])


def nothing_behind(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer, or a copy that puts nothing behind a text: for programs that tokenize by themselves."""
    front, behind = tokens_around(tokenizer)
    if not behind:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        tokenizer.build_inputs_with_special_tokens = lambda ids, other=None: [*front, *ids, *(other or [])]
        return tokenizer
    tokenizer._add_eos_token = False  # transformers builds the post-processor anew where a token is set
    names = [tokenizer.convert_ids_to_tokens(token) for token in front]
    backend.post_processor = TemplateProcessing(single=[*names, "$A"], special_tokens=list(zip(names, front)))
    return tokenizer


# ---- ids of many texts ----


def encode(
    prompts: Sequence[str], answers: Sequence[str], tokenizer: PreTrainedTokenizerBase, apart: bool = False
) -> tuple[Ragged, Ragged]:
    """Return the ids of each prompt, and of each prompt + answer: tokenized as one text or, `apart`, as two.

    As long as they come. Text such as "</s>" stays text: it never becomes the token. Special tokens that the tokenizer
    puts in front of a text (<s>) are there once. What it puts behind one is left out: there the answer goes on, and
    behind that `train.preprocess` puts the end.
    """
    prompt_ids = _encode(prompts, tokenizer)
    if not apart:
        return prompt_ids, _encode([prompt + answer for prompt, answer in zip(prompts, answers)], tokenizer)
    return prompt_ids, joined(prompt_ids, _encode(answers, tokenizer, add_special_tokens=False))


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool = True) -> Ragged:
    backend = _backend(tokenizer)
    behind = tokens_around(tokenizer)[1] if add_special_tokens else []

    def batches() -> Iterator[Sequence[int]]:
        starts = range(0, len(texts), 1000)
        for start in tqdm(starts, "tokenizing", unit="k rows", disable=True if len(texts) < 5000 else None):
            batch = list(texts[start : start + 1000])
            if backend is not None:
                encoded = backend.encode_batch_fast(batch, add_special_tokens=add_special_tokens)
                yield from (encoding.ids for encoding in encoded)
            else:
                options = dict(return_attention_mask=False, verbose=False, add_special_tokens=add_special_tokens)
                yield from tokenizer(batch, split_special_tokens=True, **options)["input_ids"]

    return ragged(without_end(ids, behind) for ids in batches())


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any | None:
    """Return the `tokenizers.Tokenizer` that gives what `tokenizer` gives; None where there is more to it than that."""
    kind = type(tokenizer)
    ours = isinstance(tokenizer, PreTrainedTokenizerFast)
    if not ours or any(
        getattr(kind, name) is not getattr(PreTrainedTokenizerFast, name) for name in ("__call__", "_encode_plus")
    ):
        return None
    tokenizer("a", split_special_tokens=True)  # sets the backend: no truncation, no padding, special tokens are text
    return tokenizer.backend_tokenizer


def make_tokens(rows: Ragged, masked: np.ndarray, problems: dict[str, list[int]]) -> Tokens:
    """Return rows of ids whose first `masked` labels, one number per row, are IGNORE_INDEX; the other labels are the
    ids.

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
    """Return `build()`, which runs once per machine and key; later runs, and the other local ranks, read its file.

    The other ranks wait, however long it takes.
    """
    path = _cache_folder(cache_dir) / f"{key}.npz"
    tokens = None
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and (tokens := _read(path)) is None:
        tokens = build()
        _write(path, tokens)
    barrier()
    if tokens is None and (tokens := _read(path)) is None:
        raise UsageError(f"the token cache {path}, written by the first process of this machine, cannot be read")
    return tokens


def _cache_folder(cache_dir: str | None) -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(cache_dir or HF_HOME) / "alpaca_tokens"


def _write(path: Path, tokens: Tokens) -> None:
    """Write tokens to a file. Labels equal the ids after a masked prefix, so its length is enough. An id takes two
    bytes where they suffice."""
    ids = torch.cat(tokens["input_ids"]).numpy()
    ids = ids.astype(np.uint16 if ids.max() < 2**16 else np.int32)
    problems = {f"problem_{name}": np.array(rows, dtype=np.int64) for name, rows in tokens["problems"].items()}
    try:
        with atomic_write(path, "wb") as file:
            np.savez(file, ids=ids, lengths=tokens["lengths"], masked=tokens["masked"], **problems)
    except OSError as error:
        raise UsageError(f"cannot write the token cache {path} ({error}); choose a folder with --cache_dir") from error


def _read(path: Path) -> Tokens | None:
    """Return the tokens in a file, or None where there is no file, or one that cannot be read."""
    try:
        with np.load(path) as arrays:
            problems = {
                name.removeprefix("problem_"): arrays[name].tolist() for name in arrays if name.startswith("problem_")
            }
            return make_tokens(Ragged(arrays["ids"], arrays["lengths"]), arrays["masked"], problems)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def tokenize_each(strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """Tokenize each text alone, cut at `model_max_length`; it is 2023's `train._tokenize_fn`. A length counts what is
    not the pad token; in a text such as "</s>" the control token is parsed, unlike in `train.preprocess`."""
    cut_at = dict(truncation=True, max_length=tokenizer.model_max_length)
    ids = [torch.tensor(tokenizer(text, **cut_at)["input_ids"], dtype=torch.long) for text in strings]
    lengths = [sum(token != tokenizer.pad_token_id for token in row.tolist()) for row in ids]
    return dict(input_ids=ids, labels=ids, input_ids_lens=lengths, labels_lens=lengths)


@dataclass
class DataCollatorForSupervisedDataset:
    """Pad rows on the right to the longest:

        input_ids       [[5, 6, 7], [8]]  ->  [[5, 6, 7], [8, pad, pad]]
        labels          [[-, 6, 7], [8]]  ->  [[-, 6, 7], [8, -, -]]         - is IGNORE_INDEX
        attention_mask                        [[T, T, T], [T, F, F]]         booleans, as in 2023

    The mask comes from lengths, not from `input_ids != pad`: with pad == eos that would hide the end of every answer.
    No rows at all (a rank that has none left in the last step) give one token without a target.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, instances: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        pad, pad_id = torch.nn.utils.rnn.pad_sequence, self.tokenizer.pad_token_id
        if not instances:
            instances = [dict(input_ids=torch.tensor([pad_id]), labels=torch.tensor([IGNORE_INDEX]))]
        input_ids = [torch.as_tensor(instance["input_ids"]) for instance in instances]
        labels = [torch.as_tensor(instance["labels"]) for instance in instances]
        return dict(
            input_ids=pad(input_ids, batch_first=True, padding_value=pad_id),
            labels=pad(labels, batch_first=True, padding_value=IGNORE_INDEX),
            attention_mask=pad([torch.ones_like(ids, dtype=torch.bool) for ids in input_ids], batch_first=True),
        )
