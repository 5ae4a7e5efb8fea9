"""Helpers under their 2023 names. Importing this file loads neither torch nor openai.

rows = utils.jload("alpaca_data.json")
utils.jdump(rows, "out.json")
"""

import io
import json
from pathlib import Path
from typing import IO, Any


def jload(f: str | Path | IO[str], mode: str = "r") -> Any:
    """Read JSON (UTF-8) from a path or an open text file, which is then closed, as in 2023.

    Raises:
        ValueError: malformed JSON; the message names the file, line and column.
    """
    with _open(f, mode) as file:
        try:
            return json.load(file)
        except json.JSONDecodeError as error:
            name = getattr(file, "name", "JSON")
            raise ValueError(
                f"{name}: malformed JSON at line {error.lineno}, column {error.colno}: {error.msg}"
            ) from error


def jdump(obj: Any, f: str | Path | IO[str], mode: str = "w", indent: int | None = 4, default=str) -> None:
    """Write dicts and lists as JSON, a str as it is, to a path or an open text file, which is then closed.

    A path is written to a temporary file beside it and renamed last: a reader, or a run that is killed, finds either
    the old file or the whole new one. Missing parent folders are made.

    Raises:
        ValueError: `obj` is none of dict, list and str.
    """
    if isinstance(obj, (dict, list)):
        text = json.dumps(obj, indent=indent, default=default)
    elif isinstance(obj, str):
        text = obj
    else:
        raise ValueError(f"jdump writes dict, list or str, got {type(obj).__name__}")
    if isinstance(f, io.IOBase) or mode != "w":  # an appending or exclusive mode cannot go through a rename
        with _open(f, mode) as file:
            file.write(text)
        return
    from alpaca.files import atomic_write

    with atomic_write(f) as file:
        file.write(text)


def _open(f: str | Path | IO[str], mode: str) -> IO[str]:
    if isinstance(f, io.IOBase):
        return f
    if any(letter in mode for letter in "wax"):
        Path(f).parent.mkdir(parents=True, exist_ok=True)
    return open(f, mode, encoding="utf-8")
