"""What a folder says of its own making: the records that training leaves in it, and fingerprints of the files that
answers depend on."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from alpaca.common.files import atomic_write, fingerprint_of_files
from alpaca.weights.reader import ADAPTER_CONFIG, TOKENIZER_FILES, read_json

MANIFEST = (
    "alpaca_checkpoint.json"  # in every checkpoint: its files, and the contract of the run (alpaca/training/resume.py)
)
RECORD = "alpaca_run.json"  # in --output_dir: the contract of the run, and whether it is finished
# What answers depend on beside the weights.
SETTINGS = ("config.json", "generation_config.json", ADAPTER_CONFIG)
TOKENIZER = (*TOKENIZER_FILES, "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja")
BASE = "the base model (--model_name_or_path)"


def holds_a_model(folder: Path) -> bool:
    """Something that `from_pretrained` may read."""
    config = any((folder / name).exists() for name in ("config.json", ADAPTER_CONFIG))
    return config and any(path for ending in ("safetensors", "bin") for path in folder.glob(f"*model*.{ending}"))


def read_manifest(checkpoint: str) -> dict[str, Any]:
    manifest = _read_json(Path(checkpoint) / MANIFEST)
    assert manifest is not None, checkpoint  # find_checkpoint has looked
    return manifest


def read_record(output: Path) -> dict[str, Any] | None:
    """What is known of the run in `output`. It is finished only as long as its model is there."""
    record = _read_json(output / RECORD)
    if record is None or not record.keys() >= {"finished", "contract"}:
        return None
    return {**record, "finished": record["finished"] and holds_a_model(output)}


def write_record(output: Path, contract: dict[str, Any], finished: bool) -> None:
    with atomic_write(output / RECORD) as file:
        json.dump({"finished": finished, "contract": contract}, file, indent=1)


def _read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no file, or a torn one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def fingerprint_of_weights(name: str) -> str:
    """Of a folder: name, size, first and last 64 KiB of every file of weights, which tells models of the same shape
    apart and does not change when the folder moves. Of a hub id: the id."""
    if not Path(name).is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted(file for file in Path(name).iterdir() if file.suffix in (".safetensors", ".bin")):
        with open(path, "rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(65536))
            file.seek(-min(65536, path.stat().st_size), os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()[:12]


def weights_of(base: str | None = None, **models: str | None) -> dict[str, Any]:
    """What the answers of models depend on, by words for messages: `weights_of(model="out/", base=None)` gives `model`,
    the folder's whole path or the hub id, and of a folder `weights of model`, `settings of model` and `tokenizer of
    model`, fingerprints of its files. A None, or what a folder has no files of, is left out.

    base: of an adapter or a diff; not given, the fingerprints are those of the base that an adapter names.

    Raises:
        UsageError: the settings of an adapter cannot be read.
    """
    described = {}
    for name, given in {**models, "base": base}.items():
        folder = Path(given).expanduser() if given else None
        if folder is None or not folder.is_dir():
            described |= {name: given} if given else {}
            continue
        described |= {name: str(folder.resolve()), **_fingerprints(name, folder)}
        if base is None and (folder / ADAPTER_CONFIG).is_file():
            its_base = Path(read_json(folder / ADAPTER_CONFIG, f"--{name}").get("base_model_name_or_path") or "")
            described |= _fingerprints(f"{name}'s base", its_base) if its_base.name and its_base.is_dir() else {}
    return described


def _fingerprints(name: str, folder: Path) -> dict[str, str]:
    found = {f"weights of {name}": fingerprint_of_weights(str(folder))}
    for what, names in {"settings": SETTINGS, "tokenizer": TOKENIZER}.items():
        if files := [folder / file for file in names if (folder / file).is_file()]:
            found[f"{what} of {name}"] = fingerprint_of_files(files)
    return found


def other_base(adapter: Path, base: Path) -> str | None:
    """A warning where the run that made the folder `adapter` knew another base than the folder `base`. Shapes tell a
    LLaMA from a Llama 2 as little as peft does. A copy saved anew has other files too, so it is no error."""
    manifest = Path(adapter) / MANIFEST
    record = read_record(adapter) or (read_manifest(str(adapter)) if manifest.is_file() else None)
    known = record and record["contract"]["fixed"].get(BASE)
    if not known or not re.fullmatch("[0-9a-f]{12}", known) or known == fingerprint_of_weights(str(base)):
        return None
    return (
        f"WARNING: {adapter} was trained on a base with other files than {base}. If that is another model, and not "
        "the same one saved anew, the answers are wrong"
    )
