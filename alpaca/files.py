"""Files that are there whole or not at all, the room for them, and what is in them."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from alpaca.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Open a temporary file beside `path` and rename it to `path` when the block ends without an error.

    Text is UTF-8; missing parent folders are made; the mode bits are those a plain `open` would have given.
    """
    path = Path(os.path.realpath(path))  # through a symlink: the file is replaced, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(fd, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~umask)  # mkstemp gives 0600
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def keep_input(output: str | Path, flag: str, **inputs: str | Path | None) -> None:
    """Raise UsageError if the file to be written is one of those that are read, which are named by their flags."""
    for name, path in inputs.items():
        if path is not None and os.path.exists(path) and os.path.exists(output) and os.path.samefile(path, output):
            raise UsageError(f"{flag} {output}: is the file of --{name}, which would be lost; give another one")


def write_text(path: str | Path, text: str, flag: str) -> None:
    """Whole or not at all.

    Raises:
        UsageError: it cannot be written; `flag` is what named it, or its folder.
    """
    try:
        with atomic_write(path) as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"{flag}: {path} cannot be written ({error.strerror})") from error


def write_json(path: str | Path, value: Any, flag: str) -> None:
    """As `write_text`; what JSON does not know is written as its text."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n", flag)


def check_writable(folder: str | Path, flag: str) -> None:
    """Make the folder, and a file in it that is gone again: what is measured for hours has to have a place.

    Raises:
        UsageError: that is not possible.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"{flag} {folder}: cannot be written ({error.strerror})") from error


def fingerprint_of_files(files: Iterable[Path]) -> str:
    """Of their names and all that is in them."""
    digest = hashlib.sha256()
    for file in files:
        data = file.read_bytes()
        digest.update(f"{file.name} {len(data)} ".encode() + data)
    return digest.hexdigest()[:12]


def lock(handle: int, path: str | Path) -> bool:
    """Take the lock of an open file or folder; it ends with the handle, or the process. False: another process has it.
    A file system without locks is said, once per call; a system without them (Windows) is not."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        print(f"note: the file system of {path} has no locks: do not start two runs in it", flush=True)
    return True


def free_bytes(folder: Path) -> int:
    """Free space on the disk of `folder`, or of its first parent that exists."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def human(size: float) -> str:
    """Bytes as "1.3 GB" (10^9) or, where smaller, "0.9 MB"."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
