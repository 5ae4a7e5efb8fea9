"""The tensors of a checkpoint folder, read in pieces: safetensors or 2023's .bin shards, of any size, in little memory.

Headers are read at once and say everything that can be wrong before work begins; the data is read with plain reads, not
mapped, because pages of a mapped file count as memory of the process.
"""

import inspect
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch

from alpaca.common.errors import InputError, first_line, format_bytes, reach_hub
from alpaca.common.files import AUX_SUFFIXES, file_in, parse_json, read_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}  # safetensors' names
ADAPTER_CONFIG = "adapter_config.json"  # of peft; a LoRA adapter's folder has it
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
MANIFEST = "weight_diff.json"  # of an exact diff (alpaca/weights/exact_diff.py)
SIDECAR = f"{MANIFEST}.sha256"
NOT_A_MODEL = "weight_diff__recover_the_model_with_weight_diff.py"  # its model_type: what from_pretrained will name
INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
OUTPUT_EMBEDDINGS = ("lm_head.weight", "embed_out.weight")
LAST_NORMS = ("model.norm.weight", "model.decoder.final_layer_norm.weight", "transformer.ln_f.weight")
LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
ZERO, ONE = 0.1, 0.5  # largest weight of a last norm: below ZERO in a diff, above ONE in a model


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: its elements are contiguous in the file, in row-major order."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int = 0  # bytes from the beginning of the file
    data: torch.Tensor | None = None  # the tensor itself, where its file cannot be read in pieces

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name} is {list(self.shape)} {dtype_name(self.dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Weights:
    """The tensors of one folder by name, in the order of its files. Use it in a with statement: it keeps files open."""

    def __init__(self, folder: Path, tensors: dict[str, Tensor]):
        self.folder, self.tensors = folder, tensors
        config = file_in(folder, "config.json")
        self.config = read_json(config) if config.is_file() else {}
        self._files: dict[Path, IO[bytes]] = {}

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.close()

    def require_config(self) -> None:
        """Raise InputError if this would be no checkpoint for from_pretrained."""
        if not self.config:
            raise InputError(f"{self.folder}: has no config.json; give the folder of a whole checkpoint", self.folder)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def find(self, name: str) -> Tensor | None:
        """Return the tensor that a model would load as `name`: GPT-2 and OPT checkpoints exist with and without the
        prefix `transformer.` or `model.`, and a tied output embedding may be stored or not."""
        for known in (name, name.partition(".")[2], f"model.{name}", f"transformer.{name}"):
            if known in self.tensors:
                return self.tensors[known]
        if name in OUTPUT_EMBEDDINGS and self.config.get("tie_word_embeddings") is not False:
            return next((tensor for other, tensor in self.tensors.items() if other.endswith(INPUT_EMBEDDINGS)), None)
        return None

    def read(self, tensor: Tensor, start: int, out: torch.Tensor, scratch: torch.Tensor) -> None:
        """Fill `out` [n] with the elements start … start + n of `tensor`, cast to the dtype of `out`.

        scratch: bytes [m], used while casting; m at least n elements of the tensor's dtype.
        """
        if tensor.dtype == out.dtype:
            self._read(tensor, start, out)
            return
        source = scratch[: out.numel() * tensor.dtype.itemsize].view(tensor.dtype)
        self._read(tensor, start, source)
        out.copy_(source)
        if out.is_floating_point() and (nan := out.isnan()).any():
            out.masked_fill_(nan, float("nan"))  # what becomes of a NaN's payload depends on the CPU

    def _read(self, tensor: Tensor, start: int, out: torch.Tensor) -> None:
        if tensor.data is not None:
            out.copy_(tensor.data.reshape(-1)[start : start + out.numel()])
            return
        with readable(self.folder):
            if tensor.path not in self._files:
                self._files[tensor.path] = open(tensor.path, "rb", buffering=0)
            file = self._files[tensor.path]
            file.seek(tensor.offset + start * tensor.dtype.itemsize)
            self._fill(file, as_bytes(out), tensor)

    def _fill(self, file: IO[bytes], buffer: memoryview, tensor: Tensor) -> None:
        while buffer:
            count = file.readinto(buffer)
            if not count:
                raise InputError(
                    f"{self.folder}: {tensor.path.name} ends inside {tensor.name}; it was changed while it was read",
                    self.folder,
                )
            buffer = buffer[count:]


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor, for files and hashes."""
    return memoryview(tensor.view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")


# ---- opening a folder ----


def open_weights(folder: str | Path) -> Weights:
    """Read the headers of a folder, or of a hub id, which is downloaded first.

    Raises:
        InputError: there is no checkpoint, part of it is missing or damaged, or it is something else.
    """
    with readable(folder):
        folder = find_folder(folder)
        tensors: dict[str, Tensor] = {}
        for shard in find_shards(folder):
            tensors |= shard_tensors(shard)
        return Weights(folder, tensors)


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Raise InputError about `path` where a file of it cannot be read, so that nobody looks for the fault elsewhere."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})", path) from error


def find_folder(folder: str | Path) -> Path:
    """Return a folder as it is, or that of a hub id (2023's from_pretrained took those too), which is downloaded."""
    path = Path(os.path.expanduser(folder))
    if path.is_dir():
        return path
    if path.is_file():
        raise InputError(f"{folder}: is a file; expected the folder that holds config.json and the weights", folder)
    parts = str(folder).split("/")
    if len(parts) > 2 or not all(parts) or parts[0] in (".", "..", "~"):  # one part: gpt2
        raise InputError(f"{folder}: no such folder", folder)
    reach_hub(folder)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    small = [*(f"*{ending}" for ending in AUX_SUFFIXES), "*.sha256", "README.md"]
    try:
        for weights in ("*.safetensors", "*.bin"):
            path = Path(snapshot_download(str(folder), allow_patterns=[*small, weights]))
            if any(path.glob(weights)):
                return path
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        problem = "no such folder, and it cannot be downloaded as a hub id"
        raise InputError(f"{folder}: {problem} ({error})", folder) from error
    return path


def find_shards(folder: Path) -> list[Path]:
    """Return the files with the weights, as from_pretrained chooses: safetensors first, a file before an index."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (file := file_in(folder, name)).is_file():
            return [file]
        if (index := file_in(folder, f"{name}.index.json")).is_file():
            return _indexed(folder, index)
    raise InputError(f"{folder}: {describe_folder(folder)}", folder)


def _indexed(folder: Path, index: Path) -> list[Path]:
    listed = read_json(index).get("weight_map", {})
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise InputError(f"{index}: its weight_map is no table of files by tensor; copy or download it again", index)
    names = sorted(set(listed.values()))
    missing = [name for name in names if not file_in(folder, name).is_file()]
    if not names or missing:
        raise InputError(
            f"{folder}: {index.name} names {len(names)} shards, of which {len(missing)} are "
            f"missing: {', '.join(missing[:5])}; copy or download them again",
            folder,
        )
    return [folder / name for name in names]


def shard_tensors(shard: Path) -> dict[str, Tensor]:
    with open(shard, "rb") as file:
        begin = file.read(64)
    if begin.startswith(b"version https://git-lfs"):
        raise InputError(f"{shard} is a git-lfs pointer, not the file itself; run git lfs pull in its folder", shard)
    return safetensors_header(shard)[0] if shard.suffix == ".safetensors" else _bin_header(shard)


def safetensors_header(shard: Path) -> tuple[dict[str, Tensor], bytes]:
    """Return the tensors of a safetensors file, and its header: everything that comes before their data."""
    size = shard.stat().st_size
    with open(shard, "rb") as file:
        length = file.read(8)
        count = int.from_bytes(length, "little")
        if len(length) < 8 or count > min(size - 8, LONGEST_HEADER):
            raise InputError(f"{shard} is truncated or not a safetensors file ({format_bytes(size)})", shard)
        header = length + file.read(count)
    try:
        entries = parse_json(header[8:])
        entries.pop("__metadata__", None)
        if strange := {str(entry["dtype"]) for entry in entries.values()} - set(DTYPES):
            raise InputError(f"{shard} has tensors of the dtype {strange.pop()}, which cannot be differenced", shard)
        tensors = {
            name: Tensor(name, DTYPES[entry["dtype"]], shape_of(entry["shape"]), shard, 8 + count + begin)
            for name, entry in entries.items()
            for begin, _ in [shape_of(entry["data_offsets"])]
        }
        ends = [8 + count + entry["data_offsets"][1] for entry in entries.values()]
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the header of {shard} is damaged ({first_line(error)})", shard) from error
    places = sorted((tensor.offset, end) for tensor, end in zip(tensors.values(), ends))
    whole = all(t.offset + t.nbytes == end for t, end in zip(tensors.values(), ends))
    begins, ends = [begin for begin, _ in places], [8 + count, *(end for _, end in places)]
    if ends[-1] != size or not whole or begins != ends[:-1]:  # each byte is in one tensor, as safetensors wants it
        raise InputError(
            f"{shard} has {size:,} bytes, its header promises {ends[-1]:,}: it is truncated or damaged; "
            "copy or download it again",
            shard,
        )
    return dict(sorted(tensors.items(), key=lambda item: item[1].offset)), header


def shape_of(value: Any) -> tuple[int, ...]:
    """Return a JSON list of sizes as a tuple. Raise ValueError if it is none."""
    if not isinstance(value, list) or not all(type(size) is int and 0 <= size < 1 << 60 for size in value):
        raise ValueError(f"{str(value)[:80]} is no list of sizes")
    return tuple(value)


def _bin_header(shard: Path) -> dict[str, Tensor]:
    """Return the tensors of a torch.save file, which keeps them uncompressed in a zip archive."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # torch.load then gives offsets instead of data

    with open(shard, "rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip and not zipfile.is_zipfile(shard):
        raise InputError(
            f"{shard} is truncated ({format_bytes(shard.stat().st_size)}); copy or download it again", shard
        )
    try:
        if is_zip:
            with FakeTensorMode():
                state = torch.load(shard, weights_only=True)
        else:
            state = torch.load(shard, weights_only=True, map_location="cpu")  # before torch 1.6: whole, in memory
        if isinstance(state, Mapping) and all(isinstance(value, torch.Tensor) for value in state.values()):
            return {str(name): _bin_tensor(name, value, shard) for name, value in state.items()}
    except Exception as error:  # pickle raises what it likes
        raise InputError(f"{shard} is damaged, or holds more than tensors ({first_line(error)})", shard) from error
    raise InputError(f"{shard} is not a checkpoint: expected only tensors by name, got {_kinds(state)}", shard)


def _kinds(state: Any) -> str:
    if not isinstance(state, Mapping):
        return type(state).__name__
    return ", ".join(f"{name}: {type(value).__name__}" for name, value in list(state.items())[:3])


def _bin_tensor(name: str, value: torch.Tensor, shard: Path) -> Tensor:
    if value.layout != torch.strided or value.is_quantized:
        raise ValueError(f"{name} is sparse or quantized")
    offset = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    shape = tuple(value.shape)
    if offset is None:
        return Tensor(name, value.dtype, shape, shard, data=value.detach().contiguous())
    if not value.is_contiguous():  # a transposed view: read whole
        flat = torch.load(shard, weights_only=True, mmap=True, map_location="cpu")[name]
        return Tensor(name, value.dtype, shape, shard, data=flat.detach().contiguous())
    return Tensor(name, value.dtype, shape, shard, offset + value.storage_offset() * value.dtype.itemsize)


# ---- what a folder holds ----

MODEL, ADAPTER, EXACT_DIFF, FLOAT_DIFF, RUN, OTHER = "model", "adapter", "exact diff", "float diff", "run", "other"


def folder_kind(folder: Path, weights: Weights | None = None) -> str:
    """Return what a folder holds: MODEL, ADAPTER, EXACT_DIFF, FLOAT_DIFF, RUN (only checkpoints), or OTHER.

    weights: of the folder, if they are open. Only they tell a FLOAT_DIFF from a MODEL: its last norm is nearly zero.
    """
    config = folder / "config.json"
    if (folder / ADAPTER_CONFIG).is_file():
        return ADAPTER
    if any((folder / name).exists() for name in (MANIFEST, SIDECAR)):
        return EXACT_DIFF
    with readable(config):
        if config.is_file() and NOT_A_MODEL in config.read_text(errors="replace"):
            return EXACT_DIFF
    if any(path for ending in ("safetensors", "bin") for path in folder.glob(f"*model*.{ending}*")):
        return FLOAT_DIFF if weights is not None and last_norm(weights)[1] < ZERO else MODEL
    return RUN if any(folder.glob("checkpoint-*")) else OTHER


def describe_folder(folder: Path) -> str:
    """Return what a folder without weights is instead, and what to do."""
    kind = folder_kind(folder)
    if kind == EXACT_DIFF and (folder / MANIFEST).exists():
        return (
            "is a weight diff, not a model; recover the model first: python weight_diff.py recover "
            f"--path_raw <base> --path_diff {folder} --path_tuned <folder>"
        )
    if kind == ADAPTER:
        return (
            "is a LoRA adapter, not a checkpoint; merge it into its base model first: python -m scripts.merge_lora "
            f"--adapter {folder} --output_dir <folder>"
        )
    if any(folder.glob("consolidated.*.pth")):
        return "is in Meta's format; convert it first: transformers/models/llama/convert_llama_weights_to_hf.py"
    if kind == RUN:
        return f"holds no weights itself, but {max(folder.glob('checkpoint-*')).name}; give the path of that folder"
    if kind == EXACT_DIFF or any(folder.glob("diff*.safetensors")):
        return f"is a weight diff without its manifest; copy or download {MANIFEST} again"
    found = sorted(path.name for path in [*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    if found:
        return f"has weights ({found[0]} …) but no index: model.safetensors.index.json or pytorch_model.bin.index.json"
    return "has no weights: expected model.safetensors or pytorch_model.bin, or their shards with an index"


def last_norm(weights: Weights) -> tuple[str | None, float]:
    """Return the name of a checkpoint's last norm and its largest weight, below ZERO for a diff and above ONE for a
    model. None, and nothing to tell them by, if it is not among LAST_NORMS."""
    name = next((name for name in LAST_NORMS if name in weights.tensors), None)
    largest = _largest(weights, name) if name else (ZERO + ONE) / 2
    if largest < ZERO and _norms_add_one(weights.config):
        return None, (ZERO + ONE) / 2
    return name, largest


def _norms_add_one(config: dict[str, Any]) -> bool:
    """Return whether norms of such a model multiply by 1 + weight, as Gemma's and Qwen3-Next's do: these weights are
    near zero in a model too."""
    from transformers import CONFIG_MAPPING, MODEL_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_MAPPING:
        return False
    module = inspect.getmodule(MODEL_MAPPING[CONFIG_MAPPING[kind]])
    return re.search(r"\b1(\.0)? \+ self\.weight", inspect.getsource(module)) is not None


def _largest(weights: Weights, name: str) -> float:
    tensor = weights.tensors[name]
    values = torch.empty(tensor.numel)
    weights.read(tensor, 0, values, torch.empty(tensor.nbytes, dtype=torch.uint8))
    return float(values.abs().max())
