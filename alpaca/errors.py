"""How a user's mistake is reported: one message that says what was got, what was expected and how to fix it."""

import os
import sys
import time
from typing import NoReturn


class UsageError(ValueError):
    """A mistake of the user's: shown as one message, without a traceback."""


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
