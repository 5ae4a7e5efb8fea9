"""The processes of a run: waiting for the other ranks, longer than --ddp_timeout, hearing what they have found,
speaking once for all of them, and ending with the launcher. Importing this loads no torch.

Waiting and hearing go through the store of torch.distributed, where ranks leave each other notes. A process group with
another timeout would do as well, but takes sockets that a long run with many checkpoints uses up.
"""

import ctypes
import itertools
import os
import pickle
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import Store


A_DAY = 24 * 60 * 60.0
_turn = itertools.count()  # every rank waits and gathers in the same order, so this names the occasion
REAPERS = ("init", "systemd", "slurmstepd", "tini", "dumb-init", "docker-init", "conmon", "containerd-shim")


def barrier() -> None:
    """Wait for all ranks with a day's patience: while one tokenizes a large data set, reads a large model or writes a
    checkpoint, the others must not run into --ddp_timeout."""
    if not _several():
        return
    import torch.distributed as dist
    from torch.distributed.elastic.utils import store as store_utils

    store_utils.barrier(_store(), dist.get_world_size(), f"alpaca/{next(_turn)}", barrier_timeout=A_DAY)


def all_gather_object(value: Any) -> list[Any]:
    """Return `value` of every rank, in their order; [value] in a single process. Any object that pickle knows."""
    if not _several():
        return [value]
    import torch.distributed as dist
    from torch.distributed.elastic.utils import store as store_utils

    data, rank, world_size = pickle.dumps(value), dist.get_rank(), dist.get_world_size()
    values = store_utils.synchronize(_store(), data, rank, world_size, f"alpaca/{next(_turn)}/", timeout=A_DAY)
    return [pickle.loads(value) for value in values]


def shutdown() -> None:
    """End the run. No rank goes before all are done: torchrun ends them all when one goes wrong, even at its exit,
    and rank 0 may still be writing the model."""
    barrier()
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _several() -> bool:
    import torch.distributed as dist

    return dist.is_initialized() and dist.get_world_size() > 1


def _store() -> "Store":
    import torch.distributed as dist

    return dist.distributed_c10d._get_default_store()


def hide_progress_bars(args: Any) -> None:
    """Switch off the bars of libraries where nobody watches: in log files, on other ranks, under --disable_tqdm; and
    everywhere those of weights that are read and written, which a line announces."""
    _without_bar()
    if args.disable_tqdm or args.process_index != 0 or not sys.stderr.isatty():
        import datasets
        import transformers

        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()


def _without_bar() -> Any:
    """Let transformers make no bars of its own; those of downloads stay. Return what made them before."""
    from transformers.utils import logging

    return logging.set_tqdm_hook(lambda factory, values, options: logging.EmptyTqdm(*values, **options))


@contextmanager
def without_weight_bars() -> Iterator[None]:
    """Read and write models inside without transformers' bars."""
    from transformers.utils import logging

    before = _without_bar()
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


@contextmanager
def loading_line(name: Any) -> Iterator[None]:
    """Print on stderr that a model is loaded inside, in place of transformers' bars."""
    print(f"loading {name} …", file=sys.stderr, flush=True)
    with without_weight_bars():
        yield


def print_rank0(message: str, rank: int) -> None:
    """Print one line on stdout, from rank 0 only."""
    if rank == 0:
        print(message, flush=True)


def die_with_launcher() -> None:
    """End with the launcher (Linux). A torchrun that is killed with SIGKILL leaves its processes behind, which would go
    on training, holding GPUs and writing checkpoints, beside the run that is started to replace them."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if _launcher_is_gone():  # while this process was still importing: no signal will come any more
            os._exit(1)


def leave_signals_to_the_run(worker: int) -> None:
    """Make a data loader's process ignore SIGTERM and Ctrl-C, which also reach its process group: the run, which may
    finish a step first, still needs it, and ends it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _launcher_is_gone() -> bool:
    """Return whether the parent is one that takes over orphans. torchrun, a Python program, may be process 1 itself."""
    parent = os.getppid()
    try:
        if parent != 1:
            return Path(f"/proc/{parent}/comm").read_text().strip() in REAPERS
        return not os.path.basename(os.readlink("/proc/1/exe")).startswith("python")
    except OSError:  # it ended just now; or process 1 is another user's
        return True
