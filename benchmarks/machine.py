"""What a result was measured on and with."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe_machine() -> dict[str, Any]:
    """Processor, cores and, where there is one, the GPU that torch would use."""
    import torch

    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine |= {"gpu": properties.name, "gpu_GB": round(properties.total_memory / 1e9, 1)}
    return machine


def write_result(result: dict[str, Any], packages: Iterable[str], output: Path | None) -> None:
    """Print a result as JSON, with machine, commit and versions of `packages`, and write it to `output` if given."""
    result = {**result, "machine": describe_machine(), "versions": versions(packages), "commit": commit()}
    text = json.dumps(result, indent=1)
    print(text)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")


def versions(names: Iterable[str]) -> dict[str, str | None]:
    """Of installed packages; None where one is missing."""

    def one(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {name: one(name) for name in names}


def commit() -> str | None:
    """The commit of this checkout, `-dirty` where files of it were changed since; None outside of git."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
