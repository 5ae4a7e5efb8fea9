"""Tensors flow through in pieces: the next is read while the ones before are hashed and written, in a few buffers."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from alpaca.shards import ShardWriter, Spec, plan_shards, write_index
from alpaca.weights import memory

PIECE = 1 << 19  # elements
DEPTH = 6  # pieces on their way at once


class Slot:
    """The buffers of one piece. They are filled again only when every lane has done with them."""

    def __init__(self):
        self.buffers: list[torch.Tensor] = []
        self.futures: list[Future] = []

    def take(self, number: int, dtype: torch.dtype, count: int) -> torch.Tensor:
        """Buffer `number` as a tensor [count]."""
        while len(self.buffers) <= number:
            self.buffers.append(torch.empty(PIECE * 8, dtype=torch.uint8))
        return self.buffers[number][: count * dtype.itemsize].view(dtype)


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
        """(a free slot, first element, number of elements) for every piece of a tensor of `numel` elements."""
        for start in range(0, numel, PIECE):
            slot = self.slots[self.turn]
            self.turn = (self.turn + 1) % DEPTH
            for future in slot.futures:
                future.result()
            slot.futures.clear()
            yield slot, start, min(PIECE, numel - start)

    def send(self, slot: Slot, lane: str, function: Callable[[memoryview], Any], piece: torch.Tensor) -> None:
        """`lane` calls `function` with the bytes of `piece`, after what it was sent before."""
        slot.futures.append(self._submit(lane, function, memory(piece)))

    def after(self, lane: str, function: Callable[[], Any]) -> Future:
        """What `function` returns when `lane` has done all that it was sent. It does not tell of pieces that failed;
        `drain` does."""
        return self._submit(lane, function)

    def _submit(self, lane: str, function: Callable, *args: Any) -> Future:
        if lane not in self.lanes:
            self.lanes[lane] = ThreadPoolExecutor(1, thread_name_prefix=lane)
        return self.lanes[lane].submit(function, *args)

    def drain(self) -> None:
        """Wait for all lanes."""
        for slot in self.slots:
            for future in slot.futures:
                future.result()
            slot.futures.clear()


# ---- a model, from whatever yields its tensors in pieces ----


class Source(Protocol):
    """A recovered or a merged model, of which no more than a few pieces are in memory."""

    specs: list[Spec]

    def pieces(self, pipe: Pipeline, order: list[Spec]) -> Iterator[tuple[Slot, Spec, int, torch.Tensor]]:
        """(slot, tensor, first element, elements) in pieces; buffers 4 and 5 of the slot are the caller's."""
        ...


def cast(specs: list[Spec], dtype: torch.dtype | None) -> list[Spec]:
    return [spec._replace(dtype=dtype) if dtype and spec.dtype.is_floating_point else spec for spec in specs]


def write_model(
    source: Source, pipe: Pipeline, folder: Path, max_shard_size: str, dtype: torch.dtype | None = None,
    see: Callable[[Spec, int, torch.Tensor], None] | None = None,
) -> None:  # fmt: skip
    """Write what `source` yields as the safetensors of a model, cast to `dtype` if given."""
    by_name = {spec.name: spec for spec in source.specs}
    shards = plan_shards(cast(source.specs, dtype), "model", max_shard_size)
    writer = ShardWriter(folder, shards)
    stream(source, pipe, [by_name[spec.name] for shard in shards for spec in shard.tensors], dtype, writer.write, see)
    pipe.drain()
    pipe.after("write", writer.close).result()
    write_index(folder, "model", shards)


def stream(
    source: Source, pipe: Pipeline, order: list[Spec], dtype: torch.dtype | None,
    write: Callable[[memoryview], Any] | None, see: Callable[[Spec, int, torch.Tensor], None] | None,
) -> None:  # fmt: skip
    """Send every piece, cast, to the lane "write"; `see` gets it before the cast."""
    for slot, spec, start, piece in source.pieces(pipe, order):
        if see is not None:
            see(spec, start, piece)
        if dtype not in (None, piece.dtype) and piece.is_floating_point():
            piece = slot.take(4, dtype, piece.numel()).copy_(piece)
        if write is not None:
            pipe.send(slot, "write", write, piece)
