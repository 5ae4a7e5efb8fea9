"""A tuned model out of its base and its weight diff, whatever the diff's format: in pieces, or whole in memory."""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alpaca.common.errors import UsageError
from alpaca.weights.exact_diff import ExactDiff, is_exact_diff
from alpaca.weights.float_diff import FloatDiff
from alpaca.weights.reader import Weights, find_folder, open_weights
from alpaca.weights.writer import MemoryWriter, Pipeline, Spec, cast, stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def open_diff(
    base: Weights, path_diff: str | Path, digest: str | None = None, flag: str = "--path_diff"
) -> Iterator[ExactDiff | FloatDiff]:
    """The diff in a folder (or hub id), fitted to `base`.

    Raises:
        UsageError: it is no diff, is damaged, or base and diff do not fit.
    """
    folder = find_folder(path_diff, flag)
    if is_exact_diff(folder):
        diff = ExactDiff(folder, flag, digest)
        diff.fit(base)
        with diff.weights:
            yield diff
        return
    if digest is not None:
        raise UsageError(f"--digest: {path_diff} is in the format of 2023, which has none")
    if base.folder.resolve() == folder.resolve():
        raise UsageError(f"{flag} {path_diff}: is the base itself")
    with open_weights(folder, flag) as weights:
        weights.require_config()
        yield FloatDiff(base, weights, sign=1)


def copy_files(files: Mapping[str, Path], folder: Path, dtype: torch.dtype | None) -> None:
    """Tokenizer and configuration as they are, but for the dtype of the weights."""
    for name, path in files.items():
        shutil.copyfile(path, folder / name)
    if dtype is not None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = {"dtype", "torch_dtype"} & set(config) or {"torch_dtype"}  # a float diff has both
        config |= dict.fromkeys(names, str(dtype).removeprefix("torch."))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def most_common_dtype(diff: ExactDiff | FloatDiff) -> torch.dtype:
    bytes_of = Counter()
    for spec in diff.specs:
        bytes_of[spec.dtype] += spec.nbytes
    return bytes_of.most_common(1)[0][0]


def recover_in_memory(
    diff: ExactDiff | FloatDiff,
    dtype: torch.dtype | None,
    keep: bool = True,
    see: Callable[[Spec, int, torch.Tensor], None] | None = None,
) -> dict[str, torch.Tensor] | None:
    """Return the recovered tensors, cast to `dtype` if given; a tensor with two names is in memory once.

    keep: False to recover only what `see` gets, and return None.
    """
    specs = [spec for spec in diff.specs if spec.name not in diff.aliases]
    writer = MemoryWriter(cast(specs, dtype)) if keep else None
    with Pipeline(sum(spec.nbytes for spec in specs), "recover") as pipe:
        stream(diff, pipe, specs, dtype, writer and writer.write, see)
        pipe.drain()
    return writer and {spec.name: writer.tensors[diff.aliases.get(spec.name, spec.name)] for spec in diff.specs}


def load_recovered(
    diff: ExactDiff | FloatDiff, state: dict[str, torch.Tensor], dtype: torch.dtype, **options: Any
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model of a state that was recovered in memory, and its tokenizer. options: of from_pretrained."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

    from alpaca.data.tokenizer import open_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        copy_files(diff.files, Path(folder), dtype)
        tokenizer, config = open_tokenizer(folder), AutoConfig.from_pretrained(folder)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model = model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype, **options)
        if "generation_config.json" in diff.files:
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, tokenizer
