"""How a user's mistake is reported: one message that says what was got, what was expected and how to fix it."""

import atexit
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn


class UsageError(ValueError):
    """A mistake of the user's: shown as one message, without a traceback."""


class MalformedJSON(UsageError, json.JSONDecodeError):
    """What utils.jload raised in 2023, with `msg`, `doc`, `pos`, `lineno` and `colno`; its message names the file."""


def first_line(error: Exception) -> str:
    """Of its message, or of what it is called where it has none."""
    return (str(error).strip() or repr(error)).splitlines()[0]


REAPERS = ("init", "systemd", "slurmstepd", "tini", "dumb-init", "docker-init", "conmon", "containerd-shim")
LOST_CONNECTION = ("closed by peer", "reset by peer", "Broken pipe", "Connection was likely closed", "failed to recv")


@contextmanager
def reported(program: str) -> Iterator[None]:
    """For a command's main block: a UsageError ends it with one message, and so does the loss of another process, which
    has said, or will say, why it ended.

    Under torchrun the process ends with its launcher. It also ends without the interpreter's shutdown, in which native
    threads of torch 2.13 now and then abort it (once in some 50 runs on CPU ranks): for torchrun the run has failed.
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    if launched:
        _die_with_parent()
    try:
        yield
        if launched:
            atexit._run_exitfuncs()  # loggers and trackers that have something left to write
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    except UsageError as error:
        fail(str(error), program)
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except RuntimeError as error:
        if not any(text in str(error) for text in LOST_CONNECTION):
            raise
        fail("the connection to another process is lost; what that one says is the cause", program)


def _die_with_parent() -> None:
    """Linux: a torchrun that is killed with SIGKILL leaves its processes behind, which would go on training, holding
    GPUs and writing checkpoints, beside the run that is started to replace them."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if _launcher_is_gone():  # while this process was still importing: no signal will come any more
            os._exit(1)


def _launcher_is_gone() -> bool:
    """Whether the parent is one that takes over orphans. torchrun, a Python program, may be process 1 itself."""
    parent = os.getppid()
    try:
        if parent != 1:
            return Path(f"/proc/{parent}/comm").read_text().strip() in REAPERS
        return not os.path.basename(os.readlink("/proc/1/exe")).startswith("python")
    except OSError:  # it ended just now; or process 1 is another user's
        return True


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
