"""An append-only file of what was paid for: every answer of a model is a line here before anything is done with it.

A kill can tear only the last line; it is cut off when the journal is opened again. While one process has the journal
open, a second one that wants it is refused.
"""

import errno
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alpaca.common.errors import InputError, UsageError
from alpaca.common.files import lock


class Journal:
    """A JSONL file; one object a line. Use it in a with statement: it holds a lock.

    Raises:
        UsageError: another process has it, it cannot be written, or a line of it is damaged.
    """

    def __init__(self, path: str | Path, output: str | Path | None = None):
        """output: the file or folder that the user named, for messages; not given, the journal's folder."""
        self.path = Path(path)
        self.output = output or self.path.parent
        self.writing = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a+b", buffering=0)
        except OSError as error:
            raise InputError(f"{self.output}: cannot be written ({error.strerror})", self.output) from error
        self._lock()
        self._cut_torn_line()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def _lock(self) -> None:
        if not lock(self.file.fileno(), self.path):
            self.file.close()
            raise InputError(
                f"{self.output}: another process is working in this folder; wait for it, stop it, or "
                "choose another one",
                self.output,
            )

    def _cut_torn_line(self) -> None:
        """Cut off a last line without its newline, which is written with the line."""
        end = self.file.seek(0, os.SEEK_END)
        keep = end
        while keep > 0:
            step = min(keep, 1 << 16)
            self.file.seek(keep - step)
            newline = self.file.read(step).rfind(b"\n")
            if newline >= 0:
                keep += newline + 1 - step
                break
            keep -= step
        if keep < end:
            self.file.truncate(keep)
            print(f"note: the last line of {self.path} was cut off by a kill and is dropped", flush=True)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield all entries so far, read line by line."""
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    entry = json.loads(line)
                    if not isinstance(entry, dict) or "kind" not in entry:
                        raise ValueError("no entry of a journal")
                except ValueError as error:
                    raise UsageError(
                        f"{self.path}, line {number}: is damaged ({error}); delete this line to go on without it"
                    ) from error
                yield entry

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line; it is on the disk when this returns. A full disk is a UsageError, and leaves the journal as it
        was."""
        line = json.dumps(entry).encode() + b"\n"
        with self.writing:
            begin = self.file.seek(0, os.SEEK_END)
            try:
                if self.file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(self.file.fileno())
            except OSError as error:
                self._forget(begin)
                raise InputError(f"{self.output}: cannot be written ({error.strerror})", self.output) from error

    def _forget(self, size: int) -> None:
        try:
            os.truncate(self.path, size)
        except OSError:
            pass  # a torn line is cut off next time
