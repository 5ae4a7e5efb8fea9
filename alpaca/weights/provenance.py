"""What a folder says of its own making: the records that training leaves in it, which of its files are the model's,
fingerprints of those that answers depend on, and which tensors of it are one."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from alpaca.common.errors import InputError, loading
from alpaca.common.files import (
    AUX_SUFFIXES,
    atomic_write,
    file_in,
    fingerprint_of_files,
    parse_json,
    read_json,
    sha256_of_file,
)
from alpaca.data.prompts import TEMPLATE_FILE
from alpaca.weights import reader
from alpaca.weights.compression import FORMAT
from alpaca.weights.reader import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DTYPES,
    SIDECAR,
    Tensor,
    dtype_name,
    find_folder,
    safetensors_header,
    shape_of,
)

# The fingerprint of a run (alpaca/training/resume.py) stands in both under the key "contract", its name at first.
MANIFEST = "alpaca_checkpoint.json"  # in every checkpoint: its files, and the fingerprint of the run
RECORD = "alpaca_run.json"  # in --output_dir: the fingerprint of the run; once it is finished, its model's digests
CHAIN = "alpaca_chain.json"  # beside a recovered model: where the diff lies (alpaca/weights/recovery.py)
OF_THE_RUN = (
    "trainer_state.json",
    "alpaca_*.json",
    "*_results.json",
    "nonfinite_*.json",
    "*.index.json",
    f"{reader.MANIFEST}*",
)
CARD = "README.md"
CARD_MARKER = (  # in a card that train.py writes
    "<!-- Written by train.py, and anew by its next run here. Delete this line to keep the file as it is. -->"
)
TUNED_CONFIG = "tuned_config.json"  # in an exact diff: the tuned model's config.json
VERSIONS = (1, 2)  # of the format of exact diffs; in the second, tensors may be compressed
CHANGES_A_MODEL = (ADAPTER_CONFIG, *ADAPTER_WEIGHTS)  # beside whole weights
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
# What answers depend on beside the weights.
SETTINGS = ("config.json", "generation_config.json", ADAPTER_CONFIG)
TOKENIZER = (*TOKENIZER_FILES, "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja")
BASE = "the base model (--model_name_or_path)"


def holds_a_model(folder: Path) -> bool:
    """Return whether `from_pretrained` may read something here."""
    config = any((folder / name).exists() for name in ("config.json", ADAPTER_CONFIG))
    return config and any(path for ending in ("safetensors", "bin") for path in folder.glob(f"*model*.{ending}"))


def aux_files(folder: Path) -> list[Path]:
    """Return the files that make a checkpoint of weights: configuration, tokenizer, and nothing of a training run."""
    files = sorted(path for path in folder.iterdir() if path.suffix in AUX_SUFFIXES and path.is_file())
    files = [path for path in files if path.name[0] != "." and not any(map(path.match, OF_THE_RUN))]
    return [file_in(folder, path.name) for path in files]


def why_not_published(name: str) -> str | None:
    """Return why a file of this name is none that may come with the weights of a stranger's diff, or None. Case does
    not count: on some disks it does not."""
    name = name.lower()
    if name.endswith(".py"):
        return "is code"
    if name.startswith(".") or Path(name).suffix not in AUX_SUFFIXES:
        return "is no configuration and no tokenizer's file"
    if name in CHANGES_A_MODEL or any(fnmatch(name, pattern) for pattern in OF_THE_RUN):
        return "would make the folder another thing than a model with these weights"
    return "is a file of a diff" if name == TUNED_CONFIG else None


def names_code(path: Path) -> str | None:
    """Return what speaks against a configuration that names code of its own, or None."""
    if not (path.suffix == ".json" and "config" in path.name) or "auto_map" not in read_json(path):
        return None
    return "names code of its own (auto_map), which would have to be run"


def check_published(paths: Iterable[Path]) -> None:
    """Raise InputError about the first file that may not come with a stranger's weights."""
    for path in paths:
        if problem := why_not_published(path.name) or names_code(path):
            raise InputError(f"{path}: {problem}; it is not copied, and so this diff is not recovered", path)


def files_of_merged(base: Path, adapter: Path) -> dict[str, Path]:
    """Return the small files of a model that an adapter was merged into: configuration and code of the base, and the
    tokenizer of the adapter where it has one."""

    def matches(path: Path, *patterns: str) -> bool:
        return any(fnmatch(path.name, pattern) for pattern in patterns)

    of_base, of_both = ("config.json", "*.py"), ("generation_config.json", TEMPLATE_FILE)
    ours = [path for path in aux_files(adapter) if not matches(path, ADAPTER_CONFIG, *of_base)]
    own = any(path.name in TOKENIZER_FILES for path in ours)
    taken = [path for path in aux_files(base) if not own or matches(path, *of_base, *of_both)]
    taken += [path for path in ours if own or path.name in of_both]
    check_published(path for path in ours if path in taken)
    return {path.name: path for path in taken}


def front_matter(folder: Path) -> dict[str, Any] | None:
    """Return what the model card of a folder, its README.md, has in its front matter; None: there is no card.

    Raises:
        InputError: it cannot be read.
    """
    from huggingface_hub import metadata_load

    card = folder / CARD
    if not card.is_file():
        return None
    with loading(card, "cannot be read"):
        facts = metadata_load(card) or {}
    if not isinstance(facts, dict):
        raise InputError(f"{card}: its front matter is no list of names and values", card)
    return facts


def hub_id_of(folder: Path) -> tuple[str, str] | None:
    """Return the hub id and the revision of a folder in the hub's cache; None for any other folder."""
    found = re.search(r"/models--([^/]+)--([^/]+)/snapshots/(\w+)$", folder.absolute().as_posix())
    return (f"{found[1]}/{found[2]}", found[3]) if found else None


def note_of_quantized_base(adapter: Path) -> list[str]:
    """Return a line where the adapter's own card says that its base was loaded in 8 or 4 bits."""
    card = adapter / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return [
        f"note: trained on the base in {bits} bits, merged into its plain weights: answers may differ a little from "
        "those of adapter and quantized base"
        for bits in re.findall(r"load_in_([84])bit[^\w\n]*True", text)[:1]
    ]


def read_manifest(checkpoint: str) -> dict[str, Any]:
    manifest = _read_json(Path(checkpoint) / MANIFEST)
    assert manifest is not None, checkpoint  # find_checkpoint has looked
    return manifest


def read_record(output: Path) -> dict[str, Any] | None:
    """Return what is known of the run in `output`. It is finished only as long as its model is there."""
    record = _read_json(output / RECORD)
    if record is None or not isinstance(record.get("finished"), bool) or not isinstance(record.get("contract"), dict):
        return None
    return {**record, "finished": record["finished"] and holds_a_model(output)}


def write_record(output: Path, run_fingerprint: dict[str, Any], finished: bool) -> None:
    record = {"finished": finished, "contract": run_fingerprint}
    if finished:
        record["model"] = {path.name: sha256_of_file(path) for path in files_of_model(output)}
    with atomic_write(output / RECORD) as file:
        json.dump(record, file, indent=1)


def files_of_model(folder: Path) -> list[Path]:
    """Return the files of the model in a folder: weights, configuration, tokenizer."""
    weights = (path for ending in ("safetensors", "bin") for path in folder.glob(f"*model*.{ending}"))
    return sorted([*weights, *aux_files(folder)])


def _read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a file, or None where there is no file or a torn one."""
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def weights_of(base: str | None = None, **models: str | None) -> dict[str, Any]:
    """Return what the answers of models depend on, by words for messages: `weights_of(model="out/", base=None)` gives
    `model`, the folder's whole path or the hub id, and of a folder `weights of model`, `settings of model` and
    `tokenizer of model`, fingerprints of its files. A None, or what a folder has no files of, is left out.

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
            its_base = Path(read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
            described |= _fingerprints(f"{name}'s base", its_base) if its_base.name and its_base.is_dir() else {}
    return described


def _fingerprints(name: str, folder: Path) -> dict[str, str]:
    found = {f"weights of {name}": fingerprint_of_weights(str(folder))}
    for what, names in {"settings": SETTINGS, "tokenizer": TOKENIZER}.items():
        if files := [folder / file for file in names if (folder / file).is_file()]:
            found[f"{what} of {name}"] = fingerprint_of_files(files)
    return found


def fingerprint_of_weights(name: str) -> str:
    """Return a hash (12 hex digits) of a folder's weights: name, size, first and last 64 KiB of every file. It tells
    models of the same shape apart and does not change when the folder moves. A hub id is returned as it is."""
    if not Path(name).is_dir():
        return name
    found = hashlib.sha256()
    for path in sorted(file for file in Path(name).iterdir() if file.suffix in (".safetensors", ".bin")):
        with loading(name, "cannot be read"), open(path, "rb") as file:
            found.update(f"{path.name} {path.stat().st_size}".encode() + file.read(65536))
            file.seek(-min(65536, path.stat().st_size), os.SEEK_END)
            found.update(file.read())
    return found.hexdigest()[:12]


def sha256_of_tensors(name: str) -> str:
    """Return the SHA-256 of a folder's weights: name, dtype, shape and bits of every tensor, in the order of the names.
    It is the same however they are spread over files, and for safetensors and .bin."""
    found = hashlib.sha256()
    with reader.open_weights(name) as weights:
        for key, tensor in sorted(weights.tensors.items()):
            bits = torch.empty(tensor.numel, dtype=tensor.dtype)
            weights.read(tensor, 0, bits, bits)
            found.update(f"{key} {tensor.dtype} {list(tensor.shape)} ".encode())
            found.update(reader.as_bytes(bits))
    return found.hexdigest()


def relative_path(path: Path, folder: Path) -> str:
    """Return how to come from `folder` to `path`, which holds where both are moved together."""
    return os.path.relpath(path.resolve(), folder.resolve())


def base_of_adapter(folder: Path) -> Path:
    """Return the folder of the base that an adapter names. Raise InputError about the adapter if there is none."""
    settings = read_json(folder / ADAPTER_CONFIG)
    name, revision = (settings.get(key) for key in ("base_model_name_or_path", "revision"))
    if not name or revision:
        what = f"of revision {revision} of {name}" if name else "that names no base model"
        raise InputError(f"{folder}: is a LoRA adapter {what}; give its base", folder)
    try:
        return find_folder(name)
    except InputError as error:
        message = f"is a LoRA adapter of {name!r}, which is not here; give its base ({error})"
        raise InputError(f"{folder}: {message}", folder) from error


def other_base(adapter: Path, base: Path) -> str | None:
    """Return a warning where the run that made the folder `adapter` knew another base than the folder `base`. Shapes
    tell a LLaMA from a Llama 2 as little as peft does. A copy saved anew has other files too, so it is no error."""
    manifest = Path(adapter) / MANIFEST
    record = read_record(adapter) or (read_manifest(str(adapter)) if manifest.is_file() else None)
    known = record and record["contract"]["fixed"].get(BASE)
    if not known or not re.fullmatch("[0-9a-f]{12}", known) or known == fingerprint_of_weights(str(base)):
        return None
    return (
        f"WARNING: {adapter} was trained on a base with other files than {base}. If that is another model, and not "
        "the same one saved anew, the answers are wrong"
    )


# ---- the manifest of an exact diff ----


def sidecar(manifest: bytes) -> str:
    return f"{hashlib.sha256(manifest).hexdigest()}  {reader.MANIFEST}\n"


def read_diff_manifest(folder: Path, digest: str | None) -> tuple[dict[str, Any], str]:
    """Return the manifest of an exact diff, and its digest.

    Raises:
        InputError: it is missing, damaged, not of this version, or has not the given `digest`.
    """
    for name in (reader.MANIFEST, SIDECAR):
        if not file_in(folder, name).is_file():
            raise InputError(f"{folder}: {name} is missing; copy or download it again", folder)
    content = (folder / reader.MANIFEST).read_bytes()
    actual = hashlib.sha256(content).hexdigest()
    if (folder / SIDECAR).read_bytes() != sidecar(content).encode():
        raise InputError(
            f"{folder}: {reader.MANIFEST} has the SHA-256 {actual}, {SIDECAR} promises another: one of them is "
            "damaged or was changed; download both again",
            folder,
        )
    if digest is not None and str(digest).strip().lower() != actual:
        raise InputError(
            f"{folder}: its manifest has the digest {actual}, not {digest!r}; this is another diff", folder
        )
    manifest = read_json(folder / reader.MANIFEST)
    if manifest.get("version") not in VERSIONS:
        raise InputError(
            f"{folder}: is of version {str(manifest.get('version'))[:40]!r} of the format, this program reads "
            f"{' and '.join(map(str, VERSIONS))}; use the program that it was made with",
            folder,
        )
    if manifest["version"] == 2 and manifest.get("compression") != FORMAT:
        message = f"{folder}: is compressed in another way than this program knows; use the one that it was made with"
        raise InputError(message, folder)
    try:
        _check_manifest(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"{folder}: {reader.MANIFEST} is not of its format ({error!r}); download it again"
        raise InputError(message, folder) from error
    return manifest, actual


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raise ValueError, or what else comes of looking into it, unless everything in it is of its type."""
    floats_and_more = {dtype_name(dtype) for dtype in DTYPES.values()}
    others = [*manifest["other_base_tensors"].values()]
    for entry in [*manifest["tensors"].values(), *others]:
        shape_of(entry["shape"])
        if entry["dtype"] not in floats_and_more:
            raise ValueError(f"dtype {str(entry['dtype'])[:40]}")
    bases = [entry["base"] for entry in manifest["tensors"].values() if entry["base"] is not None]
    for base in bases:
        shape_of(base["shape"])
    for entry in manifest["tensors"].values():
        if "compressed" in entry and (entry["compressed"] is not True or not entry["base"] or manifest["version"] == 1):
            raise ValueError("compressed")
    files = manifest["files"].values()
    digests = [entry["sha256"] for entry in [*manifest["tensors"].values(), *others, *bases, *files]]
    digests += [entry["diff_sha256"] for entry in manifest["tensors"].values()]
    digests += [entry["header_sha256"] for entry in files if "header_sha256" in entry]
    if wrong := [digest for digest in digests if not isinstance(digest, str)]:
        raise ValueError(f"digest {str(wrong[0])[:40]}")
    if not all(type(entry["bytes"]) is int for entry in files) or TUNED_CONFIG not in manifest["files"]:
        raise ValueError(f"a number of bytes, or {TUNED_CONFIG}, is missing")
    manifest["base_config"].items()


def check_files(folder: Path, entries: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """Check every byte of an exact diff's files but the tensors'. Return the tensors.

    Raises:
        InputError: a file is missing, is not as published, or is none that belongs into a diff.
    """
    tensors: dict[str, Tensor] = {}
    for name, entry in entries.items():
        path = file_in(folder, name)
        if not path.is_file():
            raise InputError(f"{folder}: {name} is missing; copy or download it again", folder)
        if "header_sha256" in entry:
            actual, expected = _header_digest(path, entry, tensors), entry["header_sha256"]
        else:
            if name not in (TUNED_CONFIG, "config.json", "diff.safetensors.index.json"):
                check_published([path])
            actual, expected = sha256_of_file(path), entry["sha256"]
        if actual != expected:
            raise InputError(
                f"{path} is damaged or was changed (SHA-256 {actual}, published {expected}); copy or download it again",
                path,
            )
    if problem := names_code(folder / TUNED_CONFIG):
        raise InputError(f"{folder / TUNED_CONFIG}: {problem}; this diff is not recovered", folder)
    return tensors


def _header_digest(path: Path, entry: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Return the digest of a shard's header, and put its tensors to the others."""
    if not fnmatch(path.name, "diff*.safetensors"):
        raise InputError(f"{path}: is no file of a diff's weights, as the manifest says", path)
    if path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a git-lfs pointer; run git lfs pull in its folder", path)
    if path.stat().st_size != entry["bytes"]:
        raise InputError(
            f"{path} has {path.stat().st_size:,} bytes of {entry['bytes']:,}; it is truncated or damaged; "
            "copy or download it again",
            path,
        )
    found, header = safetensors_header(path)
    tensors |= found
    return hashlib.sha256(header).hexdigest()
