"""How a user's mistake is reported: one message that says what was got, what was expected and how to fix it."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class UsageError(ValueError):
    """A mistake of the user's: shown as one message, without a traceback."""


@contextmanager
def reported(program: str) -> Iterator[None]:
    """For a command's main block: a UsageError ends it with one message, and so does the loss of another process, which
    has said, or will say, why it ended. Under torchrun the process ends with its launcher."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _die_with_parent()
    try:
        yield
    except UsageError as error:
        fail(str(error), program)
    except RuntimeError as error:
        if "closed by peer" not in str(error) and "reset by peer" not in str(error):
            raise
        fail("the connection to another process is lost; what that one says is the cause", program)


def _die_with_parent() -> None:
    """Linux: a torchrun that is killed with SIGKILL leaves its processes behind, which would go on training, holding
    GPUs and writing checkpoints, beside the run that is started to replace them."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def fail(message: str, program: str) -> NoReturn:
    """End the process with `message` on stderr, once per torchrun launch where all ranks make the same mistake.

    The other ranks wait before they speak: torchrun kills all of them when the first exits, and if that was rank 0 it
    has said the same.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank != 0:
        time.sleep(15)
        program = f"[rank {rank}] {program}"
    print(f"\n{program}: error: {message}\n", file=sys.stderr, flush=True)
    sys.exit(2)
