"""A tuned model out of its base and its weight diff, whatever the diff's format: in pieces, or whole in memory. And the
sum of all weights that was 2023's check."""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from alpaca.common.errors import InputError, UsageError, loading
from alpaca.common.files import file_in, json_text, read_json, sha256_of_file
from alpaca.weights.exact_diff import ExactDiff
from alpaca.weights.float_diff import FloatDiff, computed_in_2023, position_in_llama
from alpaca.weights.mismatch import OF_OURS, tied_names
from alpaca.weights.provenance import CHAIN, RECORD, files_of_model, read_record, relative_path
from alpaca.weights.reader import (
    EXACT_DIFF,
    MANIFEST,
    Weights,
    as_bytes,
    find_folder,
    folder_kind,
    open_weights,
    readable,
)
from alpaca.weights.writer import Pipeline, Spec, cast, stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LINKS = ("data file", "run record", "model", "diff manifest", "recovered folder")
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


# ---- from the data to the recovered model ----


def note_origin(folder: Path, final: str, diff: Path) -> None:
    """Note beside a recovered model where its diff lies, seen from its `final` place."""
    (folder / CHAIN).write_text(json_text({"diff": relative_path(diff, Path(final))}), encoding="utf-8")


class Chain(NamedTuple):
    """What a recovered model came from, as far as is known: a link is compared with the one before it."""

    data: Path | None
    run: Path | None
    diff: Path | None
    recovered: Path | None

    @classmethod
    def of(cls, folder: str, data: str | None, diff: str | None, recovered: str | None) -> "Chain":
        """Find the links from one of them: a recovered folder, a diff, or the folder of a run."""
        start, run = find_folder(folder), None
        diff = find_folder(diff) if diff else None
        recovered = find_folder(recovered) if recovered else None
        if (start / RECORD).is_file():
            run = start
        elif folder_kind(start) == EXACT_DIFF:
            diff = start
        else:
            recovered = start
        diff = diff or (recovered and _link(5, lambda: _diff_of(recovered)))
        run = run or (diff and _link(4, lambda: _run_of(diff)))
        return cls(Path(data) if data else None, run, diff, recovered)

    def verify(self, digest: str | None) -> None:
        """Print each link that holds. Raise UsageError about the first that is missing or broken."""
        if self.run is None:  # the diff names it
            _link(4, lambda: self._known("diff", self.diff, "give it as --path_diff"))
        record = _link(2, self._read_record)
        manifest = partial(self._manifest, digest)
        checks = (self._data, self._check_record, self._model, manifest, self._recovered)
        for number, check in enumerate(checks, 1):
            line = _link(number, partial(check, record) if number < 4 else check)
            print(f"{number}. {LINKS[number - 1]}: {line}", flush=True)
        print(f"proved: {self.recovered} comes of this data file, link by link", flush=True)

    def _known(self, what: str, path: Path | None, give: str) -> Path:
        if path is None or not path.exists():
            where = f"{path} is missing" if path else f"nothing says where the {what} is"
            raise UsageError(f"{where}; {give}")
        return path

    def _read_record(self) -> dict[str, Any]:
        folder = self._known("run", self.run, "give its folder as --chain, with --path_diff and --path_tuned")
        record = read_record(folder)
        if record is None:
            raise UsageError(f"{folder / RECORD} is missing or damaged; only a run of train.py writes it")
        return record

    def _data(self, record: dict[str, Any]) -> str:
        folder, data = self.run, record["contract"].get("data")
        if not isinstance(data, dict) or not isinstance(data.get("file"), str) or "sha256" not in data:
            raise UsageError(f"{folder / RECORD} has no digest of a data file")
        path = self._known("data file", self.data or folder / data["file"], "give it as --data_path")
        with readable(path):
            actual = sha256_of_file(path)
        if actual != data["sha256"]:
            raise UsageError(f"{path} has the SHA-256 {actual}, the run read {data['sha256']}: it was changed")
        return f"{path.resolve()} has the SHA-256 {actual}, as in the run record"

    def _check_record(self, record: dict[str, Any]) -> str:
        folder = self.run
        if not record["finished"]:
            raise UsageError(f"{folder / RECORD} says that the run is not finished")
        if not isinstance(record.get("model"), dict) or not record["model"]:
            raise UsageError(f"{folder / RECORD} has no digests of the model's files")
        rows = record["contract"].get("fixed", {}).get("the data (--data_path)", "rows unknown")
        return f"{folder / RECORD} is of a finished run, {rows}, and has digests of {len(record['model'])} files"

    def _model(self, record: dict[str, Any]) -> str:
        folder = self.run
        here = {path.name for path in files_of_model(folder)}
        if other := sorted(here.symmetric_difference(record["model"])):
            raise UsageError(f"{folder}: {other[0]} is {'new' if other[0] in here else 'missing'} since the run's end")
        for name, expected in record["model"].items():
            if sha256_of_file(file_in(folder, name)) != expected:
                raise UsageError(f"{folder / name} is not what the run wrote: it was changed")
        return f"all files of {folder} have the digests of the run record"

    def _manifest(self, digest: str | None) -> str:
        folder = self._known("diff", self.diff, "give it as --path_diff")
        diff = ExactDiff(folder, digest)
        with open_weights(self.run) as model, Pipeline(model.nbytes, "verify") as pipe:
            diff.verify(pipe, model)
        return f"that of {folder} has the digest {diff.digest} and those of the model's {len(diff.specs)} tensors"

    def _recovered(self) -> str:
        folder = self._known("recovered folder", self.recovered, "give it as --path_tuned")
        diff = ExactDiff(self.diff)
        with open_weights(folder) as tuned, Pipeline(tuned.nbytes, "verify") as pipe:
            diff.verify(pipe, tuned)
        return f"{folder} is {diff.summary}"


def _link(number: int, check: Callable[[], Any]) -> Any:
    """Return what `check` returns; an error of it names the link."""
    try:
        return check()
    except UsageError as error:
        raise UsageError(f"link {number} of {len(LINKS)}, {LINKS[number - 1]}: {error}") from error


def _diff_of(recovered: Path) -> Path | None:
    """Return the folder of the diff that a model was recovered from, as it says itself."""
    path = file_in(recovered, CHAIN)
    place = read_json(path).get("diff") if path.is_file() else None
    return (recovered / place).resolve() if isinstance(place, str) and "\0" not in place else None


def _run_of(diff: Path) -> Path | None:
    """Return the folder of the tuned model: a manifest, which is published, has its name; it is looked for nearby."""
    path = file_in(diff, MANIFEST)
    name = read_json(path).get("tuned") if path.is_file() else None
    if not isinstance(name, str) or Path(name).name != name or name in ("", "..") or "\0" in name:
        return None
    return next((top / name for top in diff.resolve().parents[:2] if (top / name).is_dir()), None)


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
