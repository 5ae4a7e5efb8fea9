"""A tuned model out of its base and its weight diff, whatever the diff's format: in pieces, or whole in memory. And the
sum of all weights that was 2023's check."""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alpaca.common.errors import InputError, loading
from alpaca.common.files import read_json
from alpaca.weights.exact_diff import ExactDiff
from alpaca.weights.float_diff import OF_OURS, FloatDiff, computed_in_2023, position_in_llama
from alpaca.weights.provenance import tied_names
from alpaca.weights.reader import EXACT_DIFF, Weights, as_bytes, find_folder, folder_kind, open_weights
from alpaca.weights.writer import Pipeline, Spec, cast, stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SUM_OF_ALPACA_7B = 50637.1836  # of the released model, in float32, rotary frequencies included


@contextmanager
def open_diff(base: Weights, path_diff: str | Path, digest: str | None = None) -> Iterator[ExactDiff | FloatDiff]:
    """Open the diff in a folder (or hub id), fitted to `base`.

    Raises:
        InputError: it is no diff, is damaged, or base and diff do not fit.
    """
    folder = find_folder(path_diff)
    if folder_kind(folder) == EXACT_DIFF:
        diff = ExactDiff(folder, digest)
        diff.fit(base)
        with diff.weights:
            yield diff
        return
    if digest is not None:
        raise InputError(f"{path_diff}: is in the format of 2023, which has no digest", path_diff)
    if base.folder.resolve() == folder.resolve():
        raise InputError(f"{path_diff}: is the base itself", path_diff, written=True)
    with open_weights(folder) as weights:
        weights.require_config()
        with loading(path_diff, "its configuration, or the base's, is not of its format"):
            diff = FloatDiff(base, weights, sign=1)
        yield diff


def copy_files(files: Mapping[str, Path], folder: Path, dtype: torch.dtype | None) -> None:
    """Copy tokenizer and configuration as they are, but for the dtype of the weights."""
    for name, path in files.items():
        shutil.copyfile(path, folder / name)
    if dtype is not None:
        config = read_json(folder / "config.json")
        names = {"dtype", "torch_dtype"} & set(config) or {"torch_dtype"}  # a float diff has both
        config |= dict.fromkeys(names, str(dtype).removeprefix("torch."))
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def most_common_dtype(diff: ExactDiff | FloatDiff) -> torch.dtype:
    bytes_of = Counter()
    for spec in diff.specs:
        bytes_of[spec.dtype] += spec.nbytes
    return bytes_of.most_common(1)[0][0]


class MemoryWriter:
    """A ShardWriter's counterpart that keeps the tensors."""

    def __init__(self, specs: Iterable[Spec]):
        self.tensors = {spec.name: torch.empty(spec.shape, dtype=spec.dtype) for spec in specs}
        self.left = [as_bytes(tensor.view(-1)) for tensor in self.tensors.values() if tensor.numel()]

    def write(self, piece: memoryview) -> None:
        """Take a piece. They come tensor by tensor, in the order of the specs."""
        self.left[0][: len(piece)] = piece
        self.left[0] = self.left[0][len(piece) :]
        if not self.left[0]:
            del self.left[0]


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
    """Return the model of a state that was recovered in memory, and its tokenizer. options: of from_pretrained."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    from alpaca.data.tokenizer import open_config, open_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        copy_files(diff.files, Path(folder), dtype)
        tokenizer, config = open_tokenizer(folder), open_config(folder)
        with loading(diff.folder, "the recovered model could not be loaded"):
            with torch.device("meta"):
                shape = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            options |= dict(config=shape.config, state_dict=state, dtype=dtype)
            model = type(shape).from_pretrained(None, trust_remote_code=False, **options)
            if "generation_config.json" in diff.files:
                stated = read_json(Path(folder) / "generation_config.json")
                model.generation_config = GenerationConfig.from_dict(stated)
    return model, tokenizer


class NaiveSum:
    """2023's integrity check: the sum of all weights, each tensor's in float32, added up in the order of the model."""

    def __init__(self, specs: list[Spec], config: dict, aliases: Mapping[str, str] | None = None):
        """aliases: {second name: name} of tensors that have two; not given, those that `config` ties."""
        self.order = [spec.name for spec in specs]
        self.computed = computed_in_2023(config) if config.get("model_type") == "llama" else None
        self.aliases = aliases or tied_names(config, self.order)
        self.sums: dict[str, torch.Tensor] = {}
        largest = max((spec.nbytes // spec.dtype.itemsize for spec in specs), default=0)
        self.whole = torch.empty(largest)  # one tensor at a time: the sum of pieces would be rounded otherwise

    def add(self, spec: Spec, start: int, piece: torch.Tensor) -> None:
        end, numel = start + piece.numel(), spec.nbytes // spec.dtype.itemsize
        self.whole[start:end].copy_(piece)
        if end == numel:
            self.sums[spec.name] = self.whole[:numel].view(spec.shape).sum()

    def total(self) -> float:
        if self.computed is not None:
            for name, tensor in self.computed.items():
                self.sums.setdefault(name, tensor.sum())
            order = sorted(self.sums | self.aliases, key=position_in_llama)
        else:
            order = self.order
        for alias, name in self.aliases.items():  # counted by both names
            order = order if alias in order else [*order, alias]
            self.sums[alias] = self.sums[name]
        return float(sum(self.sums[name] for name in order if name in self.sums))

    def check(self) -> tuple[bool, str]:
        """Return whether the sum is that of the released Alpaca-7B, and the line to print."""
        total = self.total()
        if abs(total - SUM_OF_ALPACA_7B) <= 1e-2:
            return True, f"the weights sum to {total:.4f}, as those of the released Alpaca-7B do"
        tied = f". The embeddings are one tensor: if the diff {OF_OURS}" if self.aliases else ""
        return False, f"the weights sum to {total:.4f} (the released Alpaca-7B: {SUM_OF_ALPACA_7B}){tied}"
