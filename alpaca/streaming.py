"""Tensors flow through in pieces: the next is read while the ones before are hashed and written, in a few buffers."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from tqdm import tqdm

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
