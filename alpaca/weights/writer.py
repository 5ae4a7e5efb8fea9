"""Writing safetensors, or .bin files that transformers 4.28.1 opens, in pieces of little memory."""

import hashlib
import io
import json
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import torch
from tqdm import tqdm

from alpaca.common.errors import InputError
from alpaca.common.files import json_text
from alpaca.weights.reader import DTYPE_NAMES, as_bytes

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}  # for --dtype
PIECE = 1 << 19  # elements
DEPTH = 6  # pieces on their way at once


class Spec(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """A safetensors file: its header, then the tensors one behind the other."""

    name: str
    tensors: list[Spec]

    @property
    def names(self) -> list[str]:
        return [spec.name for spec in self.tensors]

    @property
    def header(self) -> bytes:
        entries, end = {"__metadata__": {"format": "pt"}}, 0
        for spec in self.tensors:
            begin, end = end, end + spec.nbytes
            entries[spec.name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(spec.nbytes for spec in self.tensors)


def plan_shards(specs: Iterable[Spec], stem: str, max_shard_size: str | int) -> list[Shard]:
    """Return `stem`.safetensors, or `stem`-00001-of-00003.safetensors and so on where it would exceed `max_shard_size`.

    Raises:
        InputError: `max_shard_size` is not a size such as "5GB".
    """
    files = split(specs, f"{stem}{{suffix}}.safetensors", max_shard_size)
    # the widest first, so that each begins at a multiple of its own width
    return [Shard(name, sorted(specs, key=lambda spec: -spec.dtype.itemsize)) for name, specs in files.items()]


def split(specs: Iterable[Spec], pattern: str, max_shard_size: str | int) -> dict[str, list[Spec]]:
    """Return {name of a file: its tensors}, in their order."""
    from huggingface_hub import split_torch_state_dict_into_shards

    specs = {spec.name: spec for spec in specs}
    shapes = {spec.name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in specs.values()}
    try:
        size = int(max_shard_size) if str(max_shard_size).isdigit() else max_shard_size
        if size == 0:
            raise ValueError("0 is none")
        plan = split_torch_state_dict_into_shards(shapes, filename_pattern=pattern, max_shard_size=size)
    except ValueError as error:
        raise InputError(f"{max_shard_size}: expected a size such as 5GB ({error})", max_shard_size) from error
    return {filename: [specs[name] for name in names] for filename, names in plan.filename_to_tensors.items()}


def write_index(folder: Path, stem: str, shards: list[Shard]) -> None:
    """Write what from_pretrained reads to find a tensor, where there are several shards."""
    if len(shards) > 1:
        total = sum(spec.nbytes for shard in shards for spec in shard.tensors)
        index = {
            "metadata": {"total_size": total},
            "weight_map": {n: shard.name for shard in shards for n in shard.names},
        }
        (folder / f"{stem}.index.json").write_text(json_text(index), encoding="utf-8")


class _Cutter:
    """Takes the pieces of all tensors in order and cuts them where a file, or a tensor in it, ends."""

    room = 0  # bytes that are missing in the open part

    def write(self, piece: memoryview) -> None:
        while piece:
            while self.room == 0:
                self._next()
            part = piece[: self.room]
            self._put(part)
            self.room -= len(part)
            piece = piece[len(part) :]


class ShardWriter(_Cutter):
    """Writes the pieces of all tensors, given in the order of `shards`, to their files."""

    def __init__(self, folder: Path, shards: list[Shard]):
        self.folder, self.shards = folder, shards
        self.left = list(shards)
        self.file: IO[bytes] | None = None

    def close(self) -> None:
        """Finish after the last piece: tensors without elements still need their file."""
        while self.left:
            self._next()
        if self.file is not None:
            self.file.close()
        for shard in self.shards:
            size = (self.folder / shard.name).stat().st_size
            if size != shard.nbytes:
                raise OSError(f"{shard.name} has {size:,} bytes of {shard.nbytes:,}")

    def _next(self) -> None:
        if self.file is not None:
            self.file.close()
        shard = self.left.pop(0)
        self.file = open(self.folder / shard.name, "wb", buffering=0)
        self._put(memoryview(shard.header))
        self.room = shard.nbytes - len(shard.header)

    def _put(self, part: memoryview) -> None:
        while part:
            part = part[self.file.write(part) :]


class ShardDigests(_Cutter):
    """SHA-256 of the files that a ShardWriter writes, from the same pieces."""

    def __init__(self, shards: list[Shard]):
        self.left, self.digests = list(shards), {}
        self.current = hashlib.sha256()

    def close(self) -> dict[str, str]:
        while self.left:
            self._next()
        return {name: digest.hexdigest() for name, digest in self.digests.items()}

    def _next(self) -> None:
        shard = self.left.pop(0)
        self.current = self.digests[shard.name] = hashlib.sha256(shard.header)
        self.room = shard.nbytes - len(shard.header)

    def _put(self, part: memoryview) -> None:
        self.current.update(part)


class Slot:
    """The buffers of one piece. They are filled again only when every lane has done with them."""

    def __init__(self):
        self.buffers: list[torch.Tensor] = []
        self.futures: list[Future] = []

    def take(self, number: int, dtype: torch.dtype, count: int) -> torch.Tensor:
        """Return buffer `number` as a tensor [count]."""
        while len(self.buffers) <= number:
            self.buffers.append(torch.empty(PIECE * 8, dtype=torch.uint8))
        return self.buffers[number][: count * dtype.itemsize].view(dtype)

    def wait(self) -> None:
        for future in self.futures:
            future.result()
        self.futures.clear()


class Pipeline:
    """Lanes are threads, each working through its pieces in order: a hash, a file. What a lane raises is raised here.

    A lane that is behind holds the reader back, so that memory stays that of DEPTH slots.
    """

    def __init__(self, nbytes: int, label: str):
        self.slots, self.turn = [Slot() for _ in range(DEPTH)], 0
        self.lanes: dict[str, ThreadPoolExecutor] = {}
        calm = {} if sys.stderr.isatty() else {"mininterval": 10.0, "miniters": 1}  # a line now and then in a log file
        self.bar = tqdm(total=nbytes, desc=label, unit="B", unit_scale=True, unit_divisor=1000, **calm)

    def __enter__(self) -> "Pipeline":
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the lanes use the cores; torch's idle threads would spin beside them
        return self

    def __exit__(self, *exception: object) -> None:
        for lane in self.lanes.values():
            lane.shutdown(cancel_futures=True)
        torch.set_num_threads(self.threads)
        self.bar.close()

    def pieces(self, numel: int) -> Iterator[tuple[Slot, int, int]]:
        """Yield (a free slot, first element, number of elements) for every piece of a tensor of `numel` elements."""
        for start in range(0, numel, PIECE):
            slot = self.slots[self.turn]
            self.turn = (self.turn + 1) % DEPTH
            slot.wait()
            yield slot, start, min(PIECE, numel - start)

    def send(self, slot: Slot, lane: str, function: Callable[[memoryview], Any], piece: torch.Tensor) -> None:
        """Let `lane` call `function` with the bytes of `piece`, after what it was sent before."""
        slot.futures.append(self._submit(lane, function, as_bytes(piece)))

    def after(self, lane: str, function: Callable[[], Any]) -> Future:
        """Return the future of `function`, called after all that `lane` was sent. Pieces that failed: see `drain`."""
        return self._submit(lane, function)

    def _submit(self, lane: str, function: Callable, *args: Any) -> Future:
        if lane not in self.lanes:
            self.lanes[lane] = ThreadPoolExecutor(1, thread_name_prefix=lane)
        return self.lanes[lane].submit(function, *args)

    def drain(self) -> None:
        """Wait for all lanes."""
        for slot in self.slots:
            slot.wait()


# ---- a model, from whatever yields its tensors in pieces ----


class Source(Protocol):
    """A recovered or a merged model, of which no more than a few pieces are in memory."""

    specs: list[Spec]

    def pieces(self, pipe: Pipeline, order: list[Spec]) -> Iterator[tuple[Slot, Spec, int, torch.Tensor]]:
        """Yield (slot, tensor, first element, elements) in pieces; buffers 4 and 5 of the slot are the caller's."""
        ...


def cast(specs: list[Spec], dtype: torch.dtype | None) -> list[Spec]:
    return [spec._replace(dtype=dtype) if dtype and spec.dtype.is_floating_point else spec for spec in specs]


def write_model(
    source: Source,
    pipe: Pipeline,
    folder: Path,
    max_shard_size: str,
    dtype: torch.dtype | None = None,
    see: Callable[[Spec, int, torch.Tensor], None] | None = None,
) -> None:
    """Write what `source` yields as the safetensors of a model, cast to `dtype` if given."""
    by_name = {spec.name: spec for spec in source.specs}
    shards = plan_shards(cast(source.specs, dtype), "model", max_shard_size)
    writer = ShardWriter(folder, shards)
    stream(source, pipe, [by_name[spec.name] for shard in shards for spec in shard.tensors], dtype, writer.write, see)
    pipe.drain()
    pipe.after("write", writer.close).result()
    write_index(folder, "model.safetensors", shards)


def stream(
    source: Source,
    pipe: Pipeline,
    order: list[Spec],
    dtype: torch.dtype | None,
    write: Callable[[memoryview], Any] | None,
    see: Callable[[Spec, int, torch.Tensor], None] | None,
) -> None:
    """Send every piece, cast, to the lane "write"; `see` gets it before the cast."""
    for slot, spec, start, piece in source.pieces(pipe, order):
        if see is not None:
            see(spec, start, piece)
        if dtype not in (None, piece.dtype) and piece.is_floating_point():
            piece = slot.take(4, dtype, piece.numel()).copy_(piece)
        if write is not None:
            pipe.send(slot, "write", write, piece)


# ---- .bin files, as torch.save writes them: a zip archive of a pickle of names and an entry for every tensor ----


@dataclass(frozen=True)
class BinShard(Shard):
    """A .bin file of float32 tensors; `aliases` are {second name: name} of tensors that have two."""

    aliases: dict[str, str]

    @property
    def names(self) -> list[str]:
        return [*super().names, *self.aliases]

    @property
    def pickled(self) -> bytes:
        """Return the pickle of {name: tensor} whose storages are the entries "0", "1" … of the archive."""
        keys = {spec.name: _Storage(str(number), prod(spec.shape)) for number, spec in enumerate(self.tensors)}
        state = {spec.name: _Stored(keys[spec.name], spec.shape) for spec in self.tensors}
        state |= {alias: state[name] for alias, name in self.aliases.items()}
        file = io.BytesIO()
        _Pickler(file, protocol=2).dump(state)
        return file.getvalue()


class _Storage(NamedTuple):
    key: str
    numel: int


class _Stored:
    """Pickles as a contiguous float32 tensor that lies in `storage`."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]):
        self.storage, self.shape = storage, shape

    def __reduce__(self) -> tuple:
        strides = tuple(prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, tuple(self.shape), strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> tuple | None:
        if isinstance(value, _Storage):
            return "storage", torch.FloatStorage, value.key, "cpu", value.numel
        return None


def plan_bin_shards(
    specs: Iterable[Spec], aliases: Mapping[str, str], stem: str, max_size: str | int
) -> list[BinShard]:
    """Return the files of float32 tensors; a second name stands in the file of its tensor."""
    return [
        BinShard(file, tensors, {a: name for a, name in aliases.items() if name in {spec.name for spec in tensors}})
        for file, tensors in split(specs, f"{stem}{{suffix}}.bin", max_size).items()
    ]


class BinWriter(_Cutter):
    """A ShardWriter's counterpart for .bin files. The archive's checksums are right."""

    def __init__(self, folder: Path, shards: list[BinShard]):
        self.folder, self.left = folder, list(shards)
        self.tensors: list[tuple[str, Spec]] = []  # of the open archive, still to come, with their entries' names
        self.archive: zipfile.ZipFile | None = None
        self.entry: IO[bytes] | None = None

    def _put(self, part: memoryview) -> None:
        self.entry.write(part)

    def close(self) -> None:
        """Finish after the last piece: tensors without elements still need their entry."""
        while self.left or self.tensors:
            self._next()
        self._finish()

    def _next(self) -> None:
        """Open the entry of the next tensor."""
        self._close_entry()
        if not self.tensors:
            self._finish()
            shard = self.left.pop(0)
            self.archive = zipfile.ZipFile(self.folder / shard.name, "w")
            top = Path(shard.name).stem
            for name, content in (("data.pkl", shard.pickled), ("byteorder", b"little"), ("version", b"3\n")):
                self.archive.writestr(zipfile.ZipInfo(f"{top}/{name}"), content)
            self.tensors = [(f"{top}/data/{number}", spec) for number, spec in enumerate(shard.tensors)]
        if self.tensors:
            name, spec = self.tensors.pop(0)
            info = zipfile.ZipInfo(name)
            before = self.archive.fp.tell() + 30 + len(name) + 20 + 4  # headers: of a file, of zip64, of the padding
            padding = -before % 64  # torch.save begins a tensor at such bytes
            info.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
            self.entry, self.room = self.archive.open(info, "w", force_zip64=True), spec.nbytes

    def _close_entry(self) -> None:
        if self.room:
            raise OSError(f"{self.archive.filename} lacks {self.room:,} bytes of a tensor")
        if self.entry is not None:
            self.entry.close()

    def _finish(self) -> None:
        self._close_entry()
        if self.archive is not None:
            self.archive.close()
