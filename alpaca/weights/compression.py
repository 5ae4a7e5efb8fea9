"""Compressed tensors of an exact diff: a one-dimensional U8 tensor under the tensor's own name, in the same files.

    pieces of PIECE elements     one zstd frame each: every element's first byte, then every second byte, and so on; or
                                 the elements as they are where that is not smaller, and beyond the end of the base's
    zeros                        to a multiple of 8 bytes, so that what follows in the file begins where its dtype wants
    a table                      of each piece: its bytes here and their CRC-32, both as 32-bit little-endian numbers

A tensor of which no piece is smaller, or that has no counterpart in the base, is stored as it is. So what is read never
grows beyond the size that the base has, whatever a stranger's frames say.
"""

import struct
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from alpaca.common.errors import InputError
from alpaca.weights.mismatch import check_same_tensors
from alpaca.weights.reader import Tensor, Weights, as_bytes
from alpaca.weights.writer import PIECE, Pipeline, Shard, ShardWriter, Slot, Spec

try:
    from compression import zstd  # Python 3.14

    zstandard = None
except ImportError:
    import zstandard

LEVEL = 3
LANES = 2  # pieces that are compressed, or decompressed, at a time
WINDOW = PIECE * 8  # bytes; the most memory that a frame may ask for
ENTRY = struct.Struct("<II")  # of the table
# In the manifest, and compared as a whole: a change is another format. Which tensors are compressed stands in their
# entries.
FORMAT = {
    "method": "zstd",
    "level": LEVEL,
    "piece": PIECE,
    "layout": "byte planes of each piece, one frame a piece, then the table of their sizes and CRC-32",
}


# ---- one piece ----


def split(piece: memoryview, width: int, planes: torch.Tensor) -> memoryview:
    """Return the bytes of elements of `width` bytes, the first of each, then the second … They lie in `planes`."""
    out = planes[: len(piece)].numpy().reshape(width, -1)
    np.copyto(out, np.frombuffer(piece, np.uint8).reshape(-1, width).T)
    return memoryview(out.reshape(-1))


def join(planes: bytes, out: torch.Tensor) -> None:
    """Undo `split`, into the elements `out`."""
    width = out.dtype.itemsize
    elements = out.view(torch.uint8).numpy().view(f"<u{width}")
    *lower, highest = np.frombuffer(planes, np.uint8).reshape(width, -1)
    np.copyto(elements, highest)
    for plane in reversed(lower):
        np.left_shift(elements, 8, out=elements)
        np.bitwise_or(elements, plane, out=elements)


def compressed(content: memoryview) -> bytes:
    if zstandard is None:
        return zstd.compress(content, LEVEL)
    return zstandard.ZstdCompressor(level=LEVEL).compress(content)


def decompressed(frame: memoryview, size: int) -> bytes:
    """Return the content of one frame. Raise ValueError unless it is whole, has `size` bytes, and nothing follows."""
    if zstandard is None:
        limit = {zstd.DecompressionParameter.window_log_max: WINDOW.bit_length() - 1}
        reader = zstd.ZstdDecompressor(options=limit)
        try:
            content = reader.decompress(frame, size + 1)
        except zstd.ZstdError as error:
            raise ValueError(str(error)) from error
        if len(content) != size or not reader.eof or reader.unused_data:
            raise ValueError(f"expected one frame of {size} bytes")
        return content
    try:
        if zstandard.get_frame_parameters(frame).content_size != size:  # as much memory would be taken
            raise ValueError(f"expected one frame of {size} bytes")
        content = zstandard.ZstdDecompressor(max_window_size=WINDOW).decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    if len(content) != size:
        raise ValueError(f"expected one frame of {size} bytes, got {len(content)}")
    return content


class Stored(NamedTuple):
    """A piece as it is written."""

    content: bytes | memoryview
    checksum: int
    compressed: bool


def _store(piece: memoryview, width: int, planes: torch.Tensor, saving: int) -> Stored:
    """Compress a piece, if that makes it smaller by more than `saving` bytes."""
    frame = compressed(split(piece, width, planes))
    if len(frame) + saving < len(piece):
        return Stored(frame, zlib.crc32(frame), True)
    return Stored(piece, zlib.crc32(piece), False)


# ---- writing ----


class CompressedWriter(ShardWriter):
    """A ShardWriter whose sizes are known when all is written: a file's header comes last, into room left for it.

    A header has spaces at its end, as the format allows. `shards` are, when it is closed, what the files hold.
    """

    def __init__(self, folder: Path, shards: list[Shard]):
        super().__init__(folder, shards)
        self.order = [(shard, spec) for shard in shards for spec in shard.tensors]
        self.current: Spec | None = None
        self.pieces: list[Stored] = []  # without their content
        self.sizes: list[int] = []
        self.stored: list[Spec] = []  # of the open file
        self.open: Shard | None = None
        self.headers: dict[str, bytes] = {}
        self.compressed: set[str] = set()

    def send(self, pipe: Pipeline, slot: Slot, spec: Spec, base_numel: int, start: int, piece: torch.Tensor) -> None:
        """Compress a piece in a lane of its own, and write it after the pieces before. Buffer 4 of the slot is used."""
        content = as_bytes(piece)
        if start < base_numel:  # beyond it, nothing says how large a tensor may become
            saving = ENTRY.size * _count(spec) + 8
            work = partial(_store, content, piece.dtype.itemsize, slot.take(4, torch.uint8, len(content)), saving)
        else:
            work = partial(lambda content: Stored(content, zlib.crc32(content), False), content)
        stored = pipe.after(f"compress {start // PIECE % LANES}", work)
        slot.futures.append(pipe.after("write", lambda: self.write_piece(spec, stored.result())))

    def write_piece(self, spec: Spec, piece: Stored) -> None:
        """Take a piece. They come tensor by tensor, in the order of the shards."""
        while self.current is None or self.current.name != spec.name:
            self._next_tensor()
        self._put(memoryview(piece.content))
        self.sizes.append(len(piece.content))
        self.pieces.append(piece._replace(content=b""))

    def close(self) -> None:
        while self.order:
            self._next_tensor()
        self._end_tensor()
        self._end_file()
        for shard in self.shards:
            expected = len(self.headers[shard.name]) + sum(spec.nbytes for spec in shard.tensors)
            size = (self.folder / shard.name).stat().st_size
            if size != expected:
                raise OSError(f"{shard.name} has {size:,} bytes of {expected:,}")

    def _next_tensor(self) -> None:
        self._end_tensor()
        shard, self.current = self.order.pop(0)
        if self.open is not shard:
            self._end_file()
            self.open, self.file = shard, open(self.folder / shard.name, "wb", buffering=0)
            self._put(memoryview(bytes(_room(shard))))

    def _end_tensor(self) -> None:
        if self.current is None:
            return
        spec, size = self.current, sum(self.sizes)
        if any(piece.compressed for piece in self.pieces):
            table = b"".join(ENTRY.pack(size, piece.checksum) for size, piece in zip(self.sizes, self.pieces))
            end = bytes(-size % 8) + table
            self._put(memoryview(end))
            self.compressed.add(spec.name)
            spec = Spec(spec.name, torch.uint8, (size + len(end),))
        self.stored.append(spec)
        self.current, self.pieces, self.sizes = None, [], []

    def _end_file(self) -> None:
        if self.open is None:
            return
        number = self.shards.index(self.open)
        self.shards[number] = Shard(self.open.name, self.stored)
        room, text = _room(self.open), self.shards[number].header[8:]
        self.headers[self.open.name] = (room - 8).to_bytes(8, "little") + text.ljust(room - 8)
        self.file.seek(0)
        self._put(memoryview(self.headers[self.open.name]))
        self.file.close()
        self.open, self.stored = None, []


def _room(shard: Shard) -> int:
    """Return a size that the header of the compressed tensors does not exceed: their offsets are no longer than those
    of the tensors as they are, and [123456] is no longer than [] and 24 characters."""
    return len(shard.header) + 24 * len(shard.tensors)


def _count(spec: Spec) -> int:
    """Return the number of pieces of a tensor."""
    return -(-spec.nbytes // (spec.dtype.itemsize * PIECE))


# ---- reading ----


class DiffWeights(Weights):
    """The tensors of an exact diff, as if none of them were compressed. They are read in pieces of PIECE elements.

    Args:
        tensors: as they are stored.
        specs: what they are, in their own dtypes and shapes.
        bases: {name of a compressed tensor: number of elements of its base's tensor}.

    Raises:
        InputError: they are others, or a table says what cannot be.
    """

    def __init__(
        self, folder: Path, tensors: dict[str, Tensor], specs: Iterable[Spec], bases: Mapping[str, int], source: str
    ):
        specs, stored = {spec.name: spec for spec in specs}, dict(tensors)
        found = {name: tensors[name] for name in bases if name in tensors and len(tensors[name].shape) == 1}
        check_same_tensors(
            Weights(folder, tensors),
            [s._replace(dtype=torch.uint8, shape=found[n].shape) if n in found else s for n, s in specs.items()],
            source,
        )
        for name, tensor in found.items():
            stored[name] = Tensor(name, specs[name].dtype, specs[name].shape, tensor.path)
        super().__init__(folder, stored)
        with self:
            self.places = {name: self._places(tensor, specs[name], bases[name]) for name, tensor in found.items()}
        self._files.clear()

    def _places(self, tensor: Tensor, spec: Spec, base_numel: int) -> list[tuple[Tensor, int]]:
        """Return where the pieces of a tensor lie, and their checksums."""
        count, width = _count(spec), spec.dtype.itemsize
        if tensor.numel < ENTRY.size * count:
            raise _damaged(tensor)
        table = torch.empty(ENTRY.size * count, dtype=torch.uint8)
        begin = tensor.numel - len(table)
        self._read(tensor, begin, table)
        places, offset, rest = [], 0, spec.nbytes
        for number, (size, checksum) in enumerate(ENTRY.iter_unpack(as_bytes(table))):
            whole = min(PIECE * width, rest)
            if not 0 < size <= whole or (size < whole and number * PIECE >= base_numel):
                raise _damaged(tensor)
            piece = Tensor(tensor.name, torch.uint8, (size,), tensor.path, tensor.offset + offset)
            places.append((piece, checksum))
            offset, rest = offset + size, rest - whole
        padding = torch.zeros(-offset % 8, dtype=torch.uint8)
        if offset + len(padding) != begin:
            raise _damaged(tensor)
        self._read(tensor, offset, padding)
        if padding.any():
            raise _damaged(tensor)
        return places

    def read(self, tensor: Tensor, start: int, out: torch.Tensor, scratch: torch.Tensor) -> None:
        """Fill `out` with the elements from `start`, where a piece begins. scratch: as many bytes as those of `out`."""
        if tensor.name not in self.places:
            return super().read(tensor, start, out, scratch)
        self._unpack(tensor, *self._read_stored(tensor, start, out, scratch), out)

    def read_ahead(
        self, pipe: Pipeline, tensor: Tensor, start: int, out: torch.Tensor, scratch: torch.Tensor
    ) -> list[Future]:
        """Do as `read`, but decompress in a lane of its own. Return what is to be waited for."""
        if tensor.name not in self.places:
            self.read(tensor, start, out, scratch)
            return []
        stored, checksum = self._read_stored(tensor, start, out, scratch)
        lane = f"decompress {start // PIECE % LANES}"
        return [pipe.after(lane, partial(self._unpack, tensor, stored, checksum, out))]

    def _read_stored(
        self, tensor: Tensor, start: int, out: torch.Tensor, scratch: torch.Tensor
    ) -> tuple[torch.Tensor, int]:
        piece, checksum = self.places[tensor.name][start // PIECE]
        stored = out.view(torch.uint8) if piece.numel == out.nbytes else scratch[: piece.numel]
        self._read(piece, 0, stored)
        return stored, checksum

    @staticmethod
    def _unpack(tensor: Tensor, stored: torch.Tensor, checksum: int, out: torch.Tensor) -> None:
        if zlib.crc32(as_bytes(stored)) != checksum:
            raise _damaged(tensor)
        if stored.nbytes < out.nbytes:
            try:
                join(decompressed(as_bytes(stored), out.nbytes), out)
            except ValueError as error:
                raise _damaged(tensor, f" ({error})") from error


def _damaged(tensor: Tensor, why: str = "") -> InputError:
    return InputError(f"{tensor.name} in {tensor.path} is damaged{why}; copy or download it again", tensor.path)


def bases_of_compressed(entries: Mapping[str, dict[str, Any]]) -> dict[str, int]:
    """Return {name: number of elements of its base's tensor} of the compressed tensors of a manifest."""
    return {name: prod(entry["base"]["shape"]) for name, entry in entries.items() if entry.get("compressed")}
