"""A run that is told to stop: SIGTERM, as Slurm sends it before it takes a node back, or Ctrl-C. The step under way is
finished, its checkpoint is written, and the run ends with the exit code of the signal, 143 or 130. A second signal ends
it at once, and so does the first while nothing is trained yet.

One signal may come twice: to a process group, and once more from torchrun, which passes its own on. So a second one
counts only when it comes later than that. A thread takes the signals: Python's handlers would wait until the main
thread is back from tokenizing, or from waiting for another rank.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from alpaca.common.distributed import print_rank0, shutdown
from alpaca.common.errors import write_torchrun_error
from alpaca.weights.provenance import MANIFEST

SIGNALS = (signal.SIGTERM, signal.SIGINT)  # of several ranks' the first here counts
NO_MORE = b"\0"  # no signal has this number
SAME = 1.0  # seconds within which a signal is the first one once more
LOADING, TRAINING, LAST, ENDED = "loading", "training", "last", "ended"


class _Watch:
    """What this process was told, and how far it is."""

    def __init__(self):
        self.told: signal.Signals | None = None
        self.stage = LOADING
        self.since = 0.0
        self.pipe = -1  # where Python writes the signals

    def take(self, number: int) -> None:
        """Note a signal, or end the process."""
        told, now = signal.Signals(number), time.monotonic()
        if self.stage == LOADING:
            self._end(f"{told.name} before the first step: ended, and nothing was saved", told)
        elif self.told is None and self.stage != ENDED:
            self.told, self.since = told, now
            doing = "finishing this step and its checkpoint" if self.stage == TRAINING else "saving the trained model"
            _write(f"{told.name}: {doing}; a second signal ends at once")
        elif now - self.since > SAME:
            self._end(f"a second signal, {told.name}: ended at once; the last whole checkpoint is untouched", told)

    def reach(self, stage: str) -> None:
        if stage == ENDED:  # torchrun passes a signal to the ranks that end after the first
            self.since = time.monotonic()
        self.stage = stage

    def _end(self, message: str, told: signal.Signals) -> None:
        _write(message)
        write_torchrun_error(message)
        os._exit(128 + told)


_watch = _Watch()


def _write(message: str) -> None:
    """Print a line on rank 0, past Python's buffers, which the main thread may hold."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"\ntrain.py: {message}\n".encode())


@contextmanager
def watching() -> Iterator[None]:
    """Take SIGTERM and SIGINT meanwhile. Another thread than the main one leaves them as they are."""
    global _watch
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _watch = _Watch()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_listen, args=(reader, _watch), daemon=True)
    thread.start()
    _watch.pipe = writer
    before = {number: signal.signal(number, _nothing) for number in SIGNALS}
    before_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        _watch.pipe = -1
        os.write(writer, NO_MORE)  # closing it is not enough: a forked process may hold it too
        thread.join()
        os.close(writer)
        os.close(reader)


def _nothing(*_: Any) -> None:
    """Python writes the number of a signal to the pipe only where it has a handler."""


def _forget() -> None:
    """In a forked process: its signals are not the run's."""
    if _watch.pipe >= 0:
        signal.set_wakeup_fd(-1)


def _listen(reader: int, watch: _Watch) -> None:
    while (number := os.read(reader, 1)) != NO_MORE:
        if number[0] in SIGNALS:  # torch has a handler of its own for another
            watch.take(number[0])


class StopCallback(TrainerCallback):
    """End the training, with a checkpoint, after a step in which any rank was told to stop. That the ranks agree on the
    step costs no message of its own: `votes` travel with the loss of the step, which all ranks add up anyway."""

    def __init__(self):
        self.agreed: signal.Signals | None = None

    def votes(self, like: Tensor) -> Tensor:
        """Return one number for each of SIGNALS: whether this rank was sent it."""
        return like.new_tensor([float(_watch.told == number) for number in SIGNALS])

    def count(self, votes: list[float]) -> None:
        """Take the votes of all ranks."""
        self.agreed = next((number for number, sent in zip(SIGNALS, votes) if sent > 0), None)

    def on_step_begin(self, args, state, control, **kwargs):
        if _watch.stage == LOADING:
            _watch.reach(TRAINING)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:  # the final model is as soon written as a checkpoint
            self.agreed = None
            _watch.reach(LAST)
        elif self.agreed:
            args.save_only_model = False  # it could not be continued
            control.should_save = control.should_training_stop = True

    def end(self, args: Any, state: Any) -> None:
        """Print which checkpoint goes on, and how, and end this process. Collective."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        assert (checkpoint / MANIFEST).is_file(), checkpoint
        at = f"{self.agreed.name}: stopped at step {state.global_step} of {state.max_steps}"
        message = f"{at}; --resume_from_checkpoint True continues from {checkpoint} (the same command, with that flag)"
        print_rank0(message, args.process_index)
        write_torchrun_error(message)
        shutdown()
        _watch.reach(ENDED)
        sys.exit(128 + self.agreed)
