"""An append-only file of what was paid for: every answer of a model is a line here before anything is done with it.

A kill can tear only the last line; it is cut off when the journal is opened again. While one process has the journal
open, a second one that wants it is refused.
"""

import errno
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from alpaca.common.errors import InputError, UsageError
from alpaca.common.files import lock, parse_json
from alpaca.completions.api import whole_characters

NEEDED = {  # fields of an entry, by its kind
    **dict.fromkeys(("sent", "lost"), ("index", "most")),
    **dict.fromkeys(("answer", "failed", "refused"), ("index",)),
    "batch": ("number", "token", "state"),
    "saved": ("next", "rows", "sha256", "counts", "kept_at"),
}
TEXTS = ("kind", "text", "finish_reason", "reasoning", "error", "parser", "sha256", "model", "token", "state", "by")
TEXTS += ("file", "file_id", "id")  # of a batch
COUNTS = ("index", "next", "rows", "examples", "prompt_tokens", "completion_tokens")
COUNTS += ("number", "batch", "requests", "first", "last")  # of a batch
DOLLARS = ("most", "unanswered", "rate")
OF_A_BATCH = ("by", "file", "sha256", "about", "time")  # in its first line
CLOSED = ("collected", "failed")  # states of a batch that nothing more is expected of


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
        self.reader: IO[bytes] | None = None
        self.batches: dict[int, dict[str, Any]] = {}  # what was noted of each, by its number; filled by reading
        made = [folder for folder in (self.path.parent, *self.path.parent.parents) if not folder.exists()]
        self.made = [] if self.path.exists() else [self.path, *made]  # deepest first
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a+b", buffering=0)
        except OSError as error:
            raise InputError(f"{self.output}: cannot be written ({error.strerror})", self.output) from error
        self._lock()
        self._cut_torn_line()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Close it. An error before the first entry leaves neither a file nor a folder that was not there before."""
        if kind is not None and self.made and not os.fstat(self.file.fileno()).st_size:
            try:
                self.path.unlink()
                for folder in self.made[1:]:
                    folder.rmdir()
            except OSError:
                pass  # somebody has put something there, or taken it away
        self.file.close()
        if self.reader is not None:
            self.reader.close()

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
        """Yield all entries so far, read line by line and checked."""
        return (entry for _, entry in self.scan())

    def scan(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the byte at which each entry begins, and the entry."""
        with self.open() as file:
            at = 0
            for number, line in enumerate(file, 1):
                try:
                    entry = parse_json(line)
                    if problem := why_no_entry(entry):
                        raise ValueError(problem)
                except ValueError as error:
                    raise UsageError(
                        f"{self.path}, line {number}: is damaged ({error}); delete this line to go on without it"
                    ) from error
                self._note(entry)
                yield at, _whole(entry, line)
                at += len(line)

    def open(self) -> IO[bytes]:
        """Open the file to read in it. Raise InputError if that cannot be."""
        try:
            return open(self.path, "rb")
        except OSError as error:
            raise InputError(f"{self.output}: {self.path} cannot be read ({error.strerror})", self.output) from error

    def read(self, at: int) -> dict[str, Any]:
        """Return the entry that begins at byte `at`, as `scan` and `append` give it."""
        if self.reader is None:
            self.reader = self.open()
        return read_entry(self.reader, at)

    def append(self, entry: dict[str, Any]) -> int:
        """Add a line, and return the byte at which it begins; it is on the disk when this returns. A full disk is a
        UsageError, and leaves the journal as it was."""
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
        self._note(entry)
        return begin

    def _note(self, entry: dict[str, Any]) -> None:
        """Remember what became of a batch, and while it is open which of its requests have an entry, of which kind."""
        if entry["kind"] == "batch":
            known = {} if entry["state"] in CLOSED else self.batches.get(entry["number"], {})
            self.batches[entry["number"]] = known | entry
        elif (batch := self.batches.get(entry.get("batch", -1))) is not None and batch["state"] not in CLOSED:
            batch.setdefault("done", {})[entry["index"]] = entry["kind"]

    def _forget(self, size: int) -> None:
        try:
            os.truncate(self.path, size)
        except OSError:
            pass  # a torn line is cut off next time


class AnswersOfJournal(Mapping[int, dict[str, Any]]):
    """Answers by the key of their request, each read from the disk when it is asked for: a million take the memory of
    their keys."""

    def __init__(self, journal: Journal, places: Mapping[int, int]):
        """places: the byte at which each answer begins, by its key; their order is that of the answers."""
        self.file, self.places = journal.open(), places

    def __getitem__(self, key: int) -> dict[str, Any]:
        return read_entry(self.file, self.places[key])

    def __iter__(self) -> Iterator[int]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __del__(self) -> None:
        if hasattr(self, "file"):  # not where it could not be opened
            self.file.close()


def read_entry(file: IO[bytes], at: int) -> dict[str, Any]:
    """Return the entry that begins at byte `at` of a journal, one that was checked before."""
    file.seek(at)
    line = file.readline()
    return _whole(parse_json(line), line)


def _whole(entry: dict[str, Any], line: bytes) -> dict[str, Any]:
    """Return an entry without halves of surrogate pairs, which an escape can have made, or bytes that nobody here
    writes."""
    if line.isascii() and b"\\ud" not in line.lower():
        return entry
    return {name: whole_characters(value) if name in TEXTS else value for name, value in entry.items()}


def why_no_entry(entry: Any) -> str | None:
    """Return why a value is no entry of a journal: a field is missing, or of a type that nobody writes."""
    if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
        return "no entry of a journal"
    written = entry["kind"] == "batch" and entry.get("state") == "written"
    needed = (*NEEDED.get(entry["kind"], ()), *(OF_A_BATCH if written else ()))
    missing = [name for name in needed if name not in entry]
    if entry["kind"] == "run" and "how" not in entry and "seed" not in entry:
        missing = ["how"]
    if missing:
        return f"{entry['kind']} without {missing[0]}"
    for name, value in entry.items():
        if not _is_written_as(name, value):
            return f"{name} is {str(value)[:60]!r}"
    return None


def _is_written_as(name: str, value: Any) -> bool:
    if name in TEXTS:
        return isinstance(value, str)
    if name in COUNTS:
        return (value is None and name.endswith("_tokens")) or (type(value) is int and 0 <= value < 2**53)
    if name in DOLLARS:
        return type(value) in (int, float) and 0 <= value < math.inf
    if name in ("how", "about"):
        return isinstance(value, dict)
    if name == "seed":
        return type(value) is int
    if name == "counts":
        return isinstance(value, dict) and all(type(count) is int for count in value.values())
    if name == "kept_at":
        ours = isinstance(value, dict) and all(key.isdecimal() and type(kept) is int for key, kept in value.items())
        return ours and all(len(key) < 16 and kept >= 0 for key, kept in value.items())
    return True
