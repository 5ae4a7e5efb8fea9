"""The tensors of a checkpoint folder, read in pieces: safetensors or 2023's .bin shards, of any size, in little memory.

Headers are read at once and say everything that can be wrong before work begins; the data is read with plain reads, not
mapped, because pages of a mapped file count as memory of the process.
"""

import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch

from alpaca.common.errors import UsageError, first_line, format_bytes
from alpaca.common.files import AUX_SUFFIXES

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
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
MANIFEST = "weight_diff.json"  # an exact diff's folder has it (alpaca/weights/exact_diff.py)
OF_THE_RUN = (
    "trainer_state.json",
    "alpaca_*.json",
    "*_results.json",
    "nonfinite_*.json",
    "*.index.json",
    f"{MANIFEST}*",
)
INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
OUTPUT_EMBEDDINGS = ("lm_head.weight", "embed_out.weight")
UNTIED_IN_2023 = (  # tie_word_embeddings is False by default; read off the configuration classes of transformers 4.28.1
    "codegen",
    "git",
    "gpt_neox",
    "gptj",
    "llama",
    "reformer",
    "rembert",
)


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

    def __init__(self, folder: Path, flag: str, tensors: dict[str, Tensor]):
        self.folder, self.flag, self.tensors = folder, flag, tensors
        self.config = read_config(folder, flag)
        self._files: dict[Path, IO[bytes]] = {}

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.close()

    def require_config(self) -> None:
        """Raise UsageError if this would be no checkpoint for from_pretrained."""
        if not self.config:
            raise UsageError(f"{self.flag} {self.folder}: has no config.json; give the folder of a whole checkpoint")

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def find(self, name: str) -> Tensor | None:
        """The tensor that a model would load as `name`: GPT-2 and OPT checkpoints exist with and without the prefix
        `transformer.` or `model.`, and a tied output embedding may be stored or not."""
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
        with readable(self.flag):
            if tensor.path not in self._files:
                self._files[tensor.path] = open(tensor.path, "rb", buffering=0)
            file = self._files[tensor.path]
            file.seek(tensor.offset + start * tensor.dtype.itemsize)
            self._fill(file, as_bytes(out), tensor)

    def _fill(self, file: IO[bytes], buffer: memoryview, tensor: Tensor) -> None:
        while buffer:
            count = file.readinto(buffer)
            if not count:
                raise UsageError(
                    f"{self.flag} {self.folder}: {tensor.path.name} ends inside {tensor.name}; "
                    "it was changed while it was read"
                )
            buffer = buffer[count:]


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, for files and hashes."""
    return memoryview(tensor.view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")


# ---- tied embeddings ----


def ties_embeddings(config: dict[str, Any]) -> bool:
    """Return whether a model of this configuration has one tensor for its input and its output embeddings.

    Where the configuration does not say so, the default of its class in transformers 4.28.1 holds. Today's classes
    agree with the other ones of then; the classes that came later have only today's default.
    """
    config = config | (config.get("text_config") or {})
    if config.get("tie_word_embeddings") is not None:
        return bool(config["tie_word_embeddings"])
    kind = config.get("model_type")
    if kind is None or kind in UNTIED_IN_2023:
        return False
    from transformers import CONFIG_MAPPING

    return kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind]().get_text_config().tie_word_embeddings


def tied_names(config: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Return {name of the output embedding: name of the input embedding} where they are one tensor, else {}.

    The file of a tied model may hold both names or only the first.
    """
    names = list(names)
    first = next((name for name in names if name.endswith(INPUT_EMBEDDINGS)), None)
    if first is None or not ties_embeddings(config):
        return {}
    of_class = "embed_out.weight" if config.get("model_type", "").startswith("gpt_neox") else "lm_head.weight"
    return {next((name for name in names if name in OUTPUT_EMBEDDINGS), of_class): first}


def aliases_of(weights: Weights) -> dict[str, str]:
    """Return {second name: name} of the tensors that have two names in the model that 2023 loaded.

    The embeddings are one tensor if the configuration ties them. Names that share memory in a .bin file do so in the
    model too, unless they were cast to float32 when they were loaded; that made two tensors of them.
    """
    found = tied_names(weights.config, weights.tensors)
    first: dict[tuple, str] = {}
    for name, tensor in weights.tensors.items():
        if tensor.path.suffix == ".bin" and tensor.dtype == torch.float32 and tensor.numel:
            place = tensor.data.data_ptr() if tensor.data is not None else tensor.offset
            known = first.setdefault((tensor.path, place, tensor.shape), name)
            if known != name and name not in found.values():
                found.setdefault(name, found.get(known, known))
    return found


# ---- opening a folder ----


def open_weights(folder: str | Path, flag: str) -> Weights:
    """Read the headers of a folder, or of a hub id, which is downloaded first.

    Raises:
        UsageError: there is no checkpoint, part of it is missing or damaged, or it is something else; in words.
    """
    with readable(flag):
        folder = find_folder(folder, flag)
        tensors: dict[str, Tensor] = {}
        for shard in find_shards(folder, flag):
            tensors |= shard_tensors(shard, flag)
        return Weights(folder, flag, tensors)


@contextmanager
def readable(flag: str) -> Iterator[None]:
    """A file that cannot be read is a mistake in what `flag` names, not in the output."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{flag}: cannot be read ({error})") from error


def find_folder(folder: str | Path, flag: str) -> Path:
    """A folder as it is; a hub id (2023's from_pretrained took those too) downloaded."""
    path = Path(os.path.expanduser(folder))
    if path.is_dir():
        return path
    if path.is_file():
        raise UsageError(f"{flag} {folder}: is a file; expected the folder that holds config.json and the weights")
    parts = str(folder).split("/")
    if len(parts) > 2 or not all(parts) or parts[0] in (".", "..", "~"):  # one part: gpt2
        raise UsageError(f"{flag} {folder}: no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    small = [*(f"*{ending}" for ending in AUX_SUFFIXES), "*.sha256"]
    try:
        for weights in ("*.safetensors", "*.bin"):
            path = Path(snapshot_download(str(folder), allow_patterns=[*small, weights]))
            if any(path.glob(weights)):
                return path
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UsageError(
            f"{flag} {folder}: no such folder, and it cannot be downloaded as a hub id ({error})"
        ) from error
    return path


def find_shards(folder: Path, flag: str) -> list[Path]:
    """The files with the weights: safetensors before .bin, one file before an index, as from_pretrained chooses."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            return _indexed(folder, folder / f"{name}.index.json", flag)
    raise UsageError(f"{flag} {folder}: {describe_folder(folder)}")


def _indexed(folder: Path, index: Path, flag: str) -> list[Path]:
    names = sorted(set(read_json(index, flag).get("weight_map", {}).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if not names or missing:
        raise UsageError(
            f"{flag} {folder}: {index.name} names {len(names)} shards, of which {len(missing)} are "
            f"missing: {', '.join(missing[:5])}; copy or download them again"
        )
    return [folder / name for name in names]


def describe_folder(folder: Path) -> str:
    """Why a folder without weights was given, in words."""
    if (folder / MANIFEST).exists():
        return (
            "is a weight diff, not a model; recover the model first: python weight_diff.py recover "
            f"--path_raw <base> --path_diff {folder} --path_tuned <folder>"
        )
    if (folder / ADAPTER_CONFIG).exists():
        return (
            "is a LoRA adapter, not a checkpoint; merge it into its base model first: python -m scripts.merge_lora "
            f"--adapter {folder} --output_dir <folder>"
        )
    if any(folder.glob("consolidated.*.pth")):
        return "is in Meta's format; convert it first: transformers/models/llama/convert_llama_weights_to_hf.py"
    if found := sorted(folder.glob("checkpoint-*")):
        return f"holds no weights itself, but {found[-1].name}; give the path of that folder"
    if any(folder.glob("diff*.safetensors")):
        return f"is a weight diff without its manifest; copy or download {MANIFEST} again"
    found = sorted(path.name for path in [*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    if found:
        return f"has weights ({found[0]} …) but no index: model.safetensors.index.json or pytorch_model.bin.index.json"
    return "has no weights: expected model.safetensors or pytorch_model.bin, or their shards with an index"


def shard_tensors(shard: Path, flag: str) -> dict[str, Tensor]:
    with open(shard, "rb") as file:
        begin = file.read(64)
    if begin.startswith(b"version https://git-lfs"):
        raise UsageError(f"{flag}: {shard} is a git-lfs pointer, not the file itself; run git lfs pull in its folder")
    return safetensors_header(shard, flag)[0] if shard.suffix == ".safetensors" else _bin_header(shard, flag)


def safetensors_header(shard: Path, flag: str) -> tuple[dict[str, Tensor], bytes]:
    """The tensors of a safetensors file, and its header: everything that comes before their data."""
    size = shard.stat().st_size
    with open(shard, "rb") as file:
        length = file.read(8)
        count = int.from_bytes(length, "little")
        if len(length) < 8 or count > size - 8:
            raise UsageError(f"{flag}: {shard} is truncated or not a safetensors file ({format_bytes(size)})")
        header = length + file.read(count)
    try:
        entries = json.loads(header[8:])
        entries.pop("__metadata__", None)
        if strange := {entry["dtype"] for entry in entries.values()} - set(DTYPES):
            raise UsageError(f"{flag}: {shard} has tensors of the dtype {strange.pop()}, which cannot be differenced")
        tensors = {
            name: Tensor(name, DTYPES[entry["dtype"]], tuple(entry["shape"]), shard, 8 + count + begin)
            for name, entry in entries.items()
            for begin, _ in [entry["data_offsets"]]
        }
        ends = [8 + count + entry["data_offsets"][1] for entry in entries.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{flag}: the header of {shard} is damaged ({error!r})") from error
    whole = all(t.offset >= 8 + count and t.offset + t.nbytes == end for t, end in zip(tensors.values(), ends))
    if max(ends, default=8 + count) != size or not whole:
        raise UsageError(
            f"{flag}: {shard} has {size:,} bytes, its header promises {max(ends, default=0):,}: it is "
            "truncated or damaged; copy or download it again"
        )
    return dict(sorted(tensors.items(), key=lambda item: item[1].offset)), header


def _bin_header(shard: Path, flag: str) -> dict[str, Tensor]:
    """The tensors of a torch.save file, which keeps them uncompressed in a zip archive."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # torch.load then gives offsets instead of data

    with open(shard, "rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip and not zipfile.is_zipfile(shard):
        raise UsageError(
            f"{flag}: {shard} is truncated ({format_bytes(shard.stat().st_size)}); copy or download it again"
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
        raise UsageError(f"{flag}: {shard} is damaged, or holds more than tensors ({first_line(error)})") from error
    raise UsageError(f"{flag}: {shard} is not a checkpoint: expected only tensors by name, got {_kinds(state)}")


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


def aux_files(folder: Path) -> list[Path]:
    """The files that make a checkpoint of weights: configuration and tokenizer, not what a training run left there."""
    files = sorted(path for path in folder.iterdir() if path.suffix in AUX_SUFFIXES and path.is_file())
    return [path for path in files if path.name[0] != "." and not any(map(path.match, OF_THE_RUN))]


def read_config(folder: Path, flag: str) -> dict[str, Any]:
    return read_json(folder / "config.json", flag) if (folder / "config.json").is_file() else {}


def read_json(path: Path, flag: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{flag}: {path} cannot be read as JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise UsageError(f"{flag}: {path}: expected a JSON object, got {type(content).__name__}")
    return content
