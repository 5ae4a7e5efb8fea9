"""Files that are there whole or not at all, the room for them, and what is in them."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from alpaca.common.errors import InputError, UsageError, format_bytes

MARKER = ".incomplete"  # in a folder that is being written
ROOM = 10**8  # bytes on the disk for what stands beside the tensors: tokenizer, configuration, manifest
AUX_SUFFIXES = (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt")
OF_A_CHECKPOINT = (".safetensors", ".bin", ".sha256", ".png", ".md", ".gitattributes", "LICENSE", *AUX_SUFFIXES)


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


def refuse_overwriting_input(output: str | Path, flag: str, **inputs: str | Path | None) -> None:
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


def refuse_other_arguments(path: Path, before: Mapping[str, Any], now: Mapping[str, Any], output: str | Path) -> None:
    """Raise InputError, about `output`, if the arguments that `path` was made with `before` are not those of `now`."""
    now = json.loads(json.dumps(now))
    if before != now:
        names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
        other = ", ".join(f"{name} {before.get(name)!r}" for name in names)
        raise InputError(
            f"{output}: {path.name} was made with other arguments ({other}); choose another output, or move it away",
            output,
        )


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


def fingerprint(*parts: Any) -> str:
    """SHA-256 (32 hex digits) of the JSON of `parts`: equal inputs, and only those, give the same cache file."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def digest(parts: Iterable[str]) -> str:
    """Of texts, in their order."""
    found = hashlib.sha256()
    for part in parts:
        found.update(json.dumps(part).encode())
    return found.hexdigest()[:12]


# ---- a folder that appears when it is complete ----


@contextmanager
def new_folder(path: str | Path, flag: str, nbytes: int, overwrite: bool, inputs: Iterable[Path]) -> Iterator[Path]:
    """A folder beside `path` to write tensors of `nbytes` into, renamed to `path` when the block ends without an error.

    Raises:
        UsageError: `path` is taken, is one of the `inputs`, cannot be written, or its disk is too small.
    """
    target = Path(os.path.realpath(os.path.expanduser(path)))
    if not target.name:
        raise UsageError(f"{flag} {path}: expected a new folder, which is named")
    partial, replaced = (target.with_name(f"{target.name}.{ending}") for ending in ("incomplete", "replaced"))
    try:
        _check_target(target, replaced, flag, overwrite, inputs)
        needed, free = nbytes + ROOM, free_bytes(target)
        if free < needed:
            raise UsageError(f"{flag} {path}: needs {format_bytes(needed)}, its disk has {format_bytes(free)} free")
        handle, ours = _lock(partial, flag), False
        try:
            _clear(partial, flag)
            ours = True
            yield partial
            _sync(partial)
            _put_in_place(partial, target, replaced)
        except BaseException:
            if ours:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            if handle is not None:
                os.close(handle)
    except OSError as error:
        raise UsageError(f"{flag} {path}: could not be written ({error})") from error


def _check_target(target: Path, replaced: Path, flag: str, overwrite: bool, inputs: Iterable[Path]) -> None:
    if any(target == Path(os.path.realpath(folder)) for folder in inputs):
        raise UsageError(f"{flag} {target}: is also read from; choose another folder")
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise UsageError(f"{flag} {target}: already exists; choose another folder or pass --overwrite")
    if os.path.lexists(replaced):
        raise UsageError(
            f"{flag} {target}: {replaced} is in the way of --overwrite, which would put the old folder "
            "there while it is replaced; move it away"
        )
    names = [child.name for child in target.iterdir()]
    strange = [name for name in names if not name.endswith(OF_A_CHECKPOINT) or (target / name).is_dir()]
    if strange or "config.json" not in names or not any(name.endswith((".safetensors", ".bin")) for name in names):
        raise UsageError(
            f"{flag} {target}: --overwrite replaces only the folder of a checkpoint or a diff, and this "
            f"one {f'holds {strange[0]}' if strange else 'is none'}; delete it yourself"
        )


def _put_in_place(partial: Path, target: Path, replaced: Path) -> None:
    """Rename. What stood there is deleted only when the new folder stands in its place."""
    old = os.path.lexists(target) and any(target.iterdir())
    if old:
        os.rename(target, replaced)
    try:
        os.rename(partial, target)
    except BaseException:
        if old:
            os.rename(replaced, target)
        raise
    (target / MARKER).unlink()
    _sync(target.parent)
    if old:
        shutil.rmtree(replaced, ignore_errors=True)


def _lock(partial: Path, flag: str) -> int | None:
    """Make the folder that is written, or find it; while it is locked its process is alive."""
    partial.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":
        return None
    handle = os.open(partial, os.O_RDONLY)
    if not lock(handle, partial):
        os.close(handle)
        raise UsageError(f"{flag}: another process is writing {partial}")
    return handle


def _clear(partial: Path, flag: str) -> None:
    """Delete what a killed process has left, and nothing else."""
    left = list(partial.iterdir())
    if left and not (partial / MARKER).exists():
        raise UsageError(f"{flag}: {partial} is needed for writing and holds files of yours; move it away")
    (partial / MARKER).touch()
    for path in left:
        if path.name != MARKER:
            path.unlink()


def _sync(folder: Path) -> None:
    """The files in `folder`, and their names, are on the disk when this returns."""
    for path in [*(path for path in folder.iterdir() if path.is_file()), *[folder] * (os.name == "posix")]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
