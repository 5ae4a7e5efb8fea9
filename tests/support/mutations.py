"""Mutations of what a stranger wrote: JSON files and headers of safetensors, drawn from a seed."""

import json
import random
from pathlib import Path
from typing import Any

STRANGE = [
    None,
    [],
    {},
    "",
    "x",
    "../x",
    "/etc/passwd",
    0,
    -1,
    1.5,
    10**18,
    10**400,
    True,
    [[]],
    {"a": None},
    "\0",
    "é",
]


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Return the paths of all values inside."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(*path, key) for key, _ in inside] + [p for key, item in inside for p in places(item, (*path, key))]


def mutated(value: Any, draw: random.Random) -> Any:
    """Return a copy with one value replaced, removed, doubled or renamed."""
    value = json.loads(json.dumps(value))
    *path, key = draw.choice(places(value))
    parent = value
    for step in path:
        parent = parent[step]
    way = draw.choice(["replace", "replace", "replace", "remove", "rename"])
    if way == "remove":
        del parent[key]
    elif way == "rename" and isinstance(parent, dict):
        parent[draw.choice(["../x", "", "model.safetensors", "x.py", "adapter_config.json"])] = parent.pop(key)
    else:
        parent[key] = draw.choice(STRANGE)
    return value


def mutate_json(path: Path, draw: random.Random) -> None:
    """Change a JSON file: a value in it, all of it, or its bytes."""
    way = draw.randrange(10)
    if way == 0:
        path.write_text(
            draw.choice(["", "null", "[]", "1", '"x"', "{", "[" * 100_000, "[" * 10**5 + "]" * 10**5, "NaN"])
        )
    elif way == 1:
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content)
    elif way == 2:
        path.write_text('{"a": ' * 3000 + "1" + "}" * 3000)
    else:
        path.write_text(json.dumps(mutated(json.loads(path.read_text()), draw)))


def mutate_header(path: Path, draw: random.Random) -> None:
    """Change the header of a safetensors file: a value in it, its length, a second entry of one name, or its bytes."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, rest = content[8 : 8 + length], content[8 + length :]
    way = draw.randrange(8)
    if way == 0:
        path.write_bytes(draw.choice([0, 1, 2**31, 2**63, 2**64 - 1]).to_bytes(8, "little") + header + rest)
        return
    if way == 1:
        header = bytearray(header)
        header[draw.randrange(length)] = draw.randrange(256)
    elif way == 2:
        entries = list(json.loads(header).items())
        header = (
            "{" + ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in [*entries, entries[-1]]) + "}"
        ).encode()
    elif way == 3:
        header = draw.choice([b"null", b"[]", b"[" * 50_000, b"{}", b"\xff"])
    else:
        header = json.dumps(mutated(json.loads(header), draw)).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + bytes(header) + rest)
