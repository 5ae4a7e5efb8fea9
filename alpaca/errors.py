"""How a user's mistake is reported: one message that says what was got, what was expected and how to fix it."""

import os
import sys
import time
from typing import NoReturn


class UsageError(ValueError):
    """A mistake of the user's: shown as one message, without a traceback."""


def fail(message: str, program: str) -> NoReturn:
    """End the process with `message` on stderr, once per torchrun launch.

    The other ranks leave quietly and late: torchrun kills all of them when one exits, and must not kill the one that
    is speaking.
    """
    if int(os.environ.get("RANK", 0)) != 0:
        time.sleep(15)
    else:
        print(f"\n{program}: error: {message}\n", file=sys.stderr, flush=True)
    sys.exit(2)
