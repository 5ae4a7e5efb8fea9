"""Files and folders that are there whole or not at all, the space they need, and hashes of what is in them."""

import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import IO, Any

from alpaca.common.errors import InputError, format_bytes, loading

MARKER = ".incomplete"  # in a folder that is being written
ROOM = 10**8  # bytes on the disk for what stands beside the tensors: tokenizer, configuration, manifest
AUX_SUFFIXES = (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt")
_decoder = functools.cache(lambda pairs: json.JSONDecoder(object_pairs_hook=pairs))
_SPACE = re.compile(r"[ \t\n\r]*")  # as JSON has it
OF_A_CHECKPOINT = (*".safetensors .bin .sha256 .png .md .yaml .gitattributes LICENSE".split(), *AUX_SUFFIXES)

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
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else _plain_mode())  # mkstemp gives 0600
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _plain_mode() -> int:
    """Return the mode bits that a plain `open` gives a new file."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def share_weights(folder: str | Path) -> None:
    """Give the safetensors in `folder` the mode bits of other files: their library makes them for their owner only."""
    for path in Path(folder).glob("*.safetensors"):
        os.chmod(path, _plain_mode())


def refuse_overwriting_input(output: str | Path, *inputs: str | Path | None) -> None:
    """Raise InputError if the file to be written is one of those that are read, or would lie below a file."""
    existing = next(folder for folder in Path(output).absolute().parents if folder.exists())
    if not existing.is_dir() or Path(output).is_dir():
        problem = "is a folder" if Path(output).is_dir() else f"{existing} is a file"
        raise InputError(f"{output}: cannot be written ({problem})", output, written=True)
    for path in inputs:
        if path is not None and os.path.exists(path) and os.path.exists(output) and os.path.samefile(path, output):
            raise InputError(
                f"{output}: is also read from and would be lost; choose another file", output, written=True
            )


def write_text(path: str | Path, text: str) -> None:
    """Write the file whole or not at all. Raise InputError if it cannot be written."""
    try:
        with atomic_write(path) as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror})", path, written=True) from error


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON as `write_text` does. A value that JSON does not know is written as its text."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def json_text(value: Any) -> str:
    """Return JSON as transformers writes it, with letters of all languages as they are."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text, the one way in for JSON that somebody else wrote.

    Raises:
        ValueError: it is not JSON, is not UTF-8, is nested too deeply, or holds a number too long to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def decode_json(text: str, at: int = 0, pairs: Callable | None = None) -> tuple[Any, int]:
    """Return the JSON value that begins at `at`, and where the text goes on behind it, with `pairs` as json's
    object_pairs_hook. Raise JSONDecodeError for whatever is wrong with it."""
    at = _SPACE.match(text, at).end()
    try:
        value, end = _decoder(pairs).raw_decode(text, at)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError) as error:  # ValueError: an integer of more than 4,300 digits
        problem = str(error).partition(";")[0] if isinstance(error, ValueError) else "the value is nested too deeply"
        raise json.JSONDecodeError(problem, text, at) from None
    return value, _SPACE.match(text, end).end()


def json_items(text: str, pairs: Callable | None = None) -> Iterator[Any]:
    """Yield the items of a JSON list. Raise JSONDecodeError as `decode_json`, also for what follows the list."""
    at, first = text.index("[") + 1, True
    while (found := next_json_item(text, at, first, pairs)) is not None:
        (value, at), first = found, False
        yield value
    if (end := _SPACE.match(text, text.index("]", at) + 1).end()) < len(text):
        raise json.JSONDecodeError("Extra data", text, end)


def next_json_item(text: str, at: int, first: bool, pairs: Callable | None = None) -> tuple[Any, int] | None:
    """Return what `decode_json` does of the list's item behind `at`; None where the list ends. Raise as it does."""
    at = _SPACE.match(text, at).end()
    if text[at : at + 1] == "]":
        return None
    if not first and text[at : at + 1] != ",":
        raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
    return decode_json(text, at + (not first), pairs)


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raise InputError if there is none."""
    try:
        content = parse_json(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); copy or download it again", path) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}", path)
    return content


def file_in(folder: Path, name: Any) -> Path:
    """Return the path of a file of a folder that somebody else may have made, by the name that he gave it.

    Raises:
        InputError: it is not in the folder itself: a path, a device, or a link out of it (other than a hub cache has).
    """
    plain = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")
    if not plain:
        shown = str(name)[:80] if str(name).isprintable() else repr(name)[:80]
        raise InputError(f"{folder}: names a file outside its folder, {shown}", folder)
    path, own = folder / name, folder.resolve()
    if path.is_symlink():
        target = path.resolve()
        cached = own.parent.name == "snapshots" and target.parent == own.parent.parent / "blobs"
        if not (cached or target.is_relative_to(own)):
            raise InputError(f"{path}: is a link to a file outside its folder; copy the file itself there", path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path}: expected a file, this is a pipe or a device", path)
    return path


def check_writable(folder: str | Path) -> None:
    """Make the folder, and a file in it that is deleted again, before hours of work depend on it. Raise InputError if
    that is not possible."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})", folder, written=True) from error


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
    """Return the free space on the disk of `folder`, or of its first parent that exists."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


# ---- hashes ----


def fingerprint(*parts: Any) -> str:
    """Return the SHA-256 (32 hex digits) of the JSON of `parts`: only equal inputs give the same cache file."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def digest(parts: Iterable[str]) -> str:
    """Return a hash (12 hex digits) of texts in their order."""
    found = hashlib.sha256()
    for part in parts:
        found.update(json.dumps(part).encode())
    return found.hexdigest()[:12]


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file, as sha256sum prints it."""
    digest = hashlib.sha256()
    with loading(path, "cannot be read"), open(path, "rb", buffering=0) as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def fingerprint_of_files(files: Iterable[Path]) -> str:
    """Return a hash (12 hex digits) of the files' names and contents."""
    found = hashlib.sha256()
    for file in files:
        with loading(file, "cannot be read"):
            data = file.read_bytes()
        found.update(f"{file.name} {len(data)} ".encode() + data)
    return found.hexdigest()[:12]


# ---- a folder that appears when it is complete ----


@contextmanager
def new_folder(path: str | Path, nbytes: int, overwrite: bool, inputs: Iterable[Path]) -> Iterator[Path]:
    """Yield a folder to write tensors of `nbytes` into. It is renamed to `path` when the block ends without an error.
    Raise InputError if `path` is taken, is one of the `inputs`, cannot be written, or its disk is too small."""
    target = Path(os.path.realpath(os.path.expanduser(path)))
    if not target.name:
        raise InputError(f"{path}: expected a new folder, which is named", path, written=True)
    partial, replaced = (target.with_name(f"{target.name}.{ending}") for ending in ("incomplete", "replaced"))
    try:
        if problem := _why_not(target, replaced, nbytes, overwrite, inputs):
            raise InputError(f"{path}: {problem}", path, written=True)
        handle = _lock_new(partial, path)
        ours = False
        try:
            _clear(partial, path)
            ours = True
            yield partial
            sync_folder(partial)
            put_in_place(partial, target, replaced)
        except BaseException:
            if ours:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            if handle is not None:
                os.close(handle)
    except OSError as error:
        read = [folder for folder in inputs if error.filename and Path(error.filename).is_relative_to(folder)]
        if read:
            raise InputError(f"{error.filename}: cannot be read ({error.strerror})", read[0]) from error
        raise InputError(f"{path}: could not be written ({error})", path, written=True) from error


def _why_not(target: Path, replaced: Path, nbytes: int, overwrite: bool, inputs: Iterable[Path]) -> str | None:
    """Return why `target` cannot be written, or None."""
    if any(target == Path(os.path.realpath(folder)) for folder in inputs):
        return "is also read from; choose another folder"
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        if not overwrite:
            return "already exists; choose another folder, or have it replaced (overwrite)"
        if os.path.lexists(replaced):
            return f"{replaced} is in the way: the old folder would stand there while it is replaced; move it away"
        names = [child.name for child in target.iterdir()]
        strange = [name for name in names if not name.endswith(OF_A_CHECKPOINT) or (target / name).is_dir()]
        if strange or "config.json" not in names or not any(name.endswith((".safetensors", ".bin")) for name in names):
            found = f"holds {strange[0]}" if strange else "is none"
            return f"only the folder of a checkpoint or a diff is replaced, and this one {found}; delete it yourself"
    free = free_bytes(target)
    if free < nbytes + ROOM:
        return f"needs {format_bytes(nbytes + ROOM)}, its disk has {format_bytes(free)} free"
    return None


def put_in_place(new: Path, target: Path, aside: Path) -> None:
    """Rename the folder `new` to `target`. What stood there is called `aside` meanwhile and is deleted after that."""
    old = os.path.lexists(target) and any(target.iterdir())
    if old:
        os.rename(target, aside)
    try:
        os.rename(new, target)
    except BaseException:
        if old:
            os.rename(aside, target)
        raise
    (target / MARKER).unlink(missing_ok=True)
    sync_folder(target.parent, files=False)
    if old:
        shutil.rmtree(aside, ignore_errors=True)


def _lock_new(partial: Path, path: str | Path) -> int | None:
    """Make the folder that is written, or find it. While it is locked its process is alive."""
    partial.mkdir(parents=True, exist_ok=True)
    if os.name != "posix":
        return None
    handle = os.open(partial, os.O_RDONLY)
    if not lock(handle, partial):
        os.close(handle)
        raise InputError(f"another process is writing {partial}", path)
    return handle


def _clear(partial: Path, path: str | Path) -> None:
    """Delete what a killed process has left, and nothing else."""
    left = list(partial.iterdir())
    if left and not (partial / MARKER).exists():
        raise InputError(f"{partial} is needed for writing and holds files of yours; move it away", path)
    (partial / MARKER).touch()
    for file in left:
        if file.name != MARKER:
            file.unlink()


def sync_folder(folder: Path, files: bool = True) -> None:
    """Return when the names in `folder`, and its `files`, are on the disk."""
    paths = [path for path in folder.iterdir() if files and path.is_file()]
    for path in [*paths, folder] if os.name == "posix" else paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


COMPRESSED = dict(gzip=b"\x1f\x8b", zip=b"PK\x03\x04", bzip2=b"BZh", xz=b"\xfd7zXZ", zstd=b"\x28\xb5\x2f\xfd")
NO_TEXT = {  # how a file begins, and what is wrong with it
    b"version https://git-lfs": "is a git-lfs pointer, not the data; run `git lfs pull`",
    **{magic: f"is compressed ({kind}); unpack it first" for kind, magic in COMPRESSED.items()},
    b"PAR1": "is a parquet file; name it .parquet",
    **dict.fromkeys((b"\xff\xfe", b"\xfe\xff"), "is UTF-16, not UTF-8; convert it first"),
    b"\xd0\xcf\x11\xe0": "is a spreadsheet or document of Office; save it as CSV UTF-8",
}


def decode_text(data: bytes, path: Path) -> str:
    """Return the text of a file. Raise InputError, with the way out, for one that is not UTF-8, or no text at all."""
    found = next((advice for magic, advice in NO_TEXT.items() if data.startswith(magic)), "")
    is_workbook = data.startswith(COMPRESSED["zip"]) and re.search(rb"xl/workbook|opendocument\.spreadsheet", data)
    if path.suffix.lower() in (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods", ".numbers") or is_workbook:
        found = "is a spreadsheet; save it as CSV UTF-8 and give that file"
    if found:
        raise InputError(f"{path}: {found}{_iconv('UTF-16', path) if 'UTF-16' in found else ''}", path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8: {_other_encoding(data, error.start, path)}", path) from error
    if "\0" in text:
        line, advice = text.count("\n", 0, text.index("\0")) + 1, f"convert it first{_iconv('UTF-16LE', path)}"
        raise InputError(f"{path}: holds a NUL byte (line {line}): it is damaged, or UTF-16; {advice}", path)
    return text


def _other_encoding(data: bytes, at: int, path: Path) -> str:
    encoding = "latin-1" if any(byte in data for byte in b"\x81\x8d\x8f\x90\x9d") else "cp1252"  # which lacks those
    word = re.search(rb"[^\s,;|]*\Z", data[max(at - 20, 0) : at])[0] + re.match(rb"[^\s,;|]{0,20}", data[at:])[0]
    where = f"byte 0x{data[at]:02X} at position {at} (line {data.count(10, 0, at) + 1})"
    guess = f"makes {word.decode(encoding)!r} in {encoding}, which Windows and Excel write; if so, convert it"
    return f"{where} {guess}{_iconv(encoding.upper(), path)}, or save it as {'CSV ' * (path.suffix == '.csv')}UTF-8"


def _iconv(code: str, path: Path) -> str:
    return f": iconv -f {code} -t UTF-8 {quote(str(path))} > {quote(str(path.with_stem(path.stem + '.utf8')))}"
