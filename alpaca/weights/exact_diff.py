"""The exact weight diff: xor of the stored bits of base and tuned tensors, with a manifest of SHA-256 digests.

    diff.safetensors (or shards)     per tensor: bits of tuned xor bits of the base cast to the tuned dtype, as integers
                                     of its width; rows that the base lacks are stored as they are. Compressed, unless
                                     that was not wanted (alpaca/weights/compression.py); digests are of the bits
    weight_diff.json                 the manifest: digests of every base, diff and result tensor and of every file here
    weight_diff.json.sha256          the manifest's own digest, as sha256sum prints it
    config.json                      says that this is no model; the tuned model's own is tuned_config.json
    tokenizer.json, …                the tuned model's other files, as they are

A base tensor is hashed whole, after the cast, so that copies of one base in float16 and float32 are equal bases; what
the cast drops of a wider base is not looked at, as no result depends on it. In recover the digests of the results prove
base and diff, which are hashed only to name what is damaged, and where the base has rows on which no result depends.
"""

import hashlib
import json
import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from alpaca.common.errors import InputError, UsageError, format_bytes
from alpaca.common.files import sha256_of_file
from alpaca.weights.compression import FORMAT, CompressedWriter, DiffWeights, bases_of_compressed
from alpaca.weights.mismatch import (
    CONFIG_FIELDS,
    check_same_tensors,
    counterparts,
    describe_diff,
    explain_other_base,
    raise_mismatch,
)
from alpaca.weights.provenance import (
    CHANGES_A_MODEL,
    TUNED_CONFIG,
    VERSIONS,
    aux_files,
    check_files,
    names_code,
    read_diff_manifest,
    sidecar,
    why_not_published,
)
from alpaca.weights.reader import (
    DTYPES,
    MANIFEST,
    NOT_A_MODEL,
    SIDECAR,
    Tensor,
    Weights,
    as_bytes,
    dtype_name,
    readable,
)
from alpaca.weights.writer import PIECE, Pipeline, ShardDigests, ShardWriter, Slot, Spec, plan_shards, write_index

AHEAD = 2  # pieces of a diff that are decompressed before they are needed
DIFF_INDEX = "diff.safetensors.index.json"
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# ---- xor ----


def xor_pieces(
    pipe: Pipeline,
    spec: Spec,
    base: Weights,
    base_tensor: Tensor | None,
    other: Weights,
    other_tensor: Tensor,
    base_hash: Any = None,
) -> Iterator[tuple[Slot, int, torch.Tensor, torch.Tensor]]:
    """Yield (slot, first element, other, other xor base) in pieces, as integers. With a hash the base is hashed, to its
    end. Buffer 4 of the slot is free again. Where `other` is a diff, it is overwritten by what is recovered."""
    is_diff = isinstance(other, DiffWeights)
    numel, base_numel = other_tensor.numel, base_tensor.numel if base_tensor else 0
    ahead: deque[tuple[Slot, int, torch.Tensor, torch.Tensor, list[Future]]] = deque()
    for slot, start, count in pipe.pieces(max(numel, base_numel) if base_hash else numel):
        scratch = slot.take(3, torch.uint8, count * 8)
        base_piece = slot.take(0, spec.dtype, max(0, min(count, base_numel - start)))
        piece = slot.take(1, other_tensor.dtype, max(0, min(count, numel - start)))
        reading = []  # both files are read at the same time
        if base_piece.numel():
            reading.append(pipe.after("read", partial(base.read, base_tensor, start, base_piece, scratch)))
        if piece.numel() and is_diff:
            reading += other.read_ahead(pipe, other_tensor, start, piece, slot.take(4, torch.uint8, piece.nbytes))
        elif piece.numel():
            other.read(other_tensor, start, piece, scratch[:0])
        ahead.append((slot, start, base_piece, piece, reading))
        if len(ahead) > (AHEAD if is_diff else 0):
            yield from _xor(pipe, *ahead.popleft(), base_hash, is_diff)
    while ahead:
        yield from _xor(pipe, *ahead.popleft(), base_hash, is_diff)


def _xor(
    pipe: Pipeline,
    slot: Slot,
    start: int,
    base_piece: torch.Tensor,
    piece: torch.Tensor,
    reading: list[Future],
    base_hash: Any,
    in_place: bool,
) -> Iterator[tuple[Slot, int, torch.Tensor, torch.Tensor]]:
    """Yield one piece, unless it is of the base alone."""
    for future in reading:
        future.result()
    if base_hash and base_piece.numel():
        pipe.send(slot, "base", base_hash.update, base_piece)
    if piece.numel():
        integer = INTEGERS[piece.dtype.itemsize]
        piece = piece.view(integer)
        out = piece if in_place else slot.take(2, integer, piece.numel())
        both = min(base_piece.numel(), piece.numel())
        torch.bitwise_xor(piece[:both], base_piece.view(integer)[:both], out=out[:both])
        if not in_place:
            out[both:] = piece[both:]
        yield slot, start, piece, out


def hash_tensor(pipe: Pipeline, lane: str, weights: Weights, tensor: Tensor, dtype: torch.dtype) -> Future:
    """Return the SHA-256 to come of a whole tensor, cast to `dtype`."""
    digest = hashlib.sha256()
    for slot, start, count in pipe.pieces(tensor.numel):
        piece = slot.take(0, dtype, count)
        weights.read(tensor, start, piece, slot.take(3, torch.uint8, count * 8))
        pipe.send(slot, lane, digest.update, piece)
    return pipe.after(lane, digest.hexdigest)


# ---- make_diff ----


def make(
    pipe: Pipeline, base: Weights, tuned: Weights, folder: Path, max_shard_size: str, compression: str = "zstd"
) -> list[str]:
    """Write the exact diff of two checkpoints into `folder`; returns what its publisher should know, in lines.

    compression: zstd, or none for a diff that programs of version 1 can read.
    """
    pairs = counterparts(base, tuned)
    specs = [Spec(name, INTEGERS[t.dtype.itemsize], t.shape) for name, t in tuned.tensors.items()]
    shards = plan_shards(specs, "diff", max_shard_size)
    writer = CompressedWriter(folder, shards) if compression == "zstd" else ShardWriter(folder, shards)
    files = ShardDigests(shards)
    entries = {}
    for spec in (spec for shard in shards for spec in shard.tensors):
        entries[spec.name] = _diff_tensor(pipe, base, pairs[spec.name], tuned, tuned.tensors[spec.name], writer, files)
    used = {tensor.name for tensor in pairs.values() if tensor}
    unused = {
        name: {**_header(tensor), "sha256": hash_tensor(pipe, "base", base, tensor, tensor.dtype)}
        for name, tensor in base.tensors.items()
        if name not in used
    }
    pipe.drain()
    pipe.after("write", writer.close).result()
    if isinstance(writer, CompressedWriter):
        shards, digests, headers = writer.shards, {}, writer.headers
        for name in writer.compressed:
            entries[name]["compressed"] = True
    else:
        digests = pipe.after("files", files.close).result()
        headers = {shard.name: shard.header for shard in shards}
    write_index(folder, "diff.safetensors", shards)
    for path in (path for path in aux_files(tuned.folder) if path.suffix != ".py"):
        if problem := why_not_published(path.name) or names_code(path):
            raise InputError(f"{path}: {problem}; remove it from the tuned model's folder", path)
        shutil.copyfile(path, folder / (TUNED_CONFIG if path.name == "config.json" else path.name))
    (folder / "config.json").write_text(json.dumps({"model_type": NOT_A_MODEL}, indent=2) + "\n", encoding="utf-8")
    manifest = {
        "format": "exact weight diff",
        "version": VERSIONS[compression == "zstd"],
        "operation": "xor",
        **({"compression": FORMAT} if compression == "zstd" else {}),
        "tuned": tuned.folder.resolve().name,
        "base_config": {name: base.config[name] for name in CONFIG_FIELDS if name in base.config},
        "tensors": entries,
        "other_base_tensors": unused,
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": digests.get(path.name) or sha256_of_file(path)}
            for path in sorted(folder.iterdir())
            if not path.name.startswith(".")
        },
    }
    for name, header in headers.items():
        manifest["files"][name]["header_sha256"] = hashlib.sha256(header).hexdigest()
    text = json.dumps(manifest, indent=1, default=Future.result) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    (folder / SIDECAR).write_text(sidecar(text.encode()), encoding="utf-8")
    files = ", ".join(path.name for path in aux_files(tuned.folder))
    return [*describe_diff(json.loads(text)["tensors"], hashlib.sha256(text.encode()).hexdigest()), f"with {files}"]


def _diff_tensor(
    pipe: Pipeline,
    base: Weights,
    base_tensor: Tensor | None,
    tuned: Weights,
    tensor: Tensor,
    writer: ShardWriter,
    files: ShardDigests,
) -> dict[str, Any]:
    """Write the diff of one tensor. Return its entry in the manifest, with digests to come."""
    base_hash = hashlib.sha256()
    result_hash = hashlib.sha256()
    diff_hash = hashlib.sha256()
    spec = Spec(tensor.name, tensor.dtype, tensor.shape)
    for slot, start, piece, out in xor_pieces(pipe, spec, base, base_tensor, tuned, tensor, base_hash):
        pipe.send(slot, "result", result_hash.update, piece)
        pipe.send(slot, "diff", diff_hash.update, out)
        if isinstance(writer, CompressedWriter):
            writer.send(pipe, slot, spec, base_tensor.numel if base_tensor else 0, start, out)
        else:
            pipe.send(slot, "files", files.write, out)
            pipe.send(slot, "write", writer.write, out)
        pipe.bar.update(out.nbytes)
    entry = {**_header(tensor), "sha256": pipe.after("result", result_hash.hexdigest)}
    entry["diff_sha256"] = pipe.after("diff", diff_hash.hexdigest)
    entry["base"] = base_tensor and {"shape": base_tensor.shape, "sha256": pipe.after("base", base_hash.hexdigest)}
    return entry


def _header(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": dtype_name(tensor.dtype), "shape": tensor.shape}


# ---- recover and verify ----


class ExactDiff:
    """A folder that `make` wrote. Opening it checks every byte of it but the tensors', which `pieces` proves.

    Raises:
        UsageError: a file is missing or is not as published, or `digest` is not that of the manifest.
    """

    def __init__(self, folder: Path, digest: str | None = None):
        self.folder = folder
        with readable(folder):
            self.manifest, self.digest = read_diff_manifest(folder, digest)
            tensors = check_files(folder, self.manifest["files"])
            self.entries: dict[str, dict[str, Any]] = self.manifest["tensors"]
            dtypes = {dtype_name(dtype): dtype for dtype in DTYPES.values()}
            self.specs = [Spec(name, dtypes[e["dtype"]], tuple(e["shape"])) for name, e in self.entries.items()]
            stored = [Spec(spec.name, INTEGERS[spec.dtype.itemsize], spec.shape) for spec in self.specs]
            bases = bases_of_compressed(self.entries)
            self.weights = DiffWeights(folder, tensors, stored, bases, f"the manifest of {folder}")

    @property
    def files(self) -> dict[str, Path]:
        """Return the tuned model's files beside its weights, by the names that they had."""
        names = [name for name, entry in self.manifest["files"].items() if "header_sha256" not in entry]
        return {
            "config.json" if name == TUNED_CONFIG else name: self.folder / name
            for name in names
            if name not in ("config.json", DIFF_INDEX)
        }

    def notes(self) -> list[str]:
        return []

    verdict = "proved"
    aliases: Mapping[str, str] = MappingProxyType({})  # a second name is stored, and proved, as a tensor of its own

    @property
    def summary(self) -> str:
        size = sum(spec.nbytes for spec in self.specs)
        return (
            f"bit for bit what manifest {self.digest} promises: {len(self.specs)} tensors, {format_bytes(size)}, and "
            f"{len(self.files)} files"
        )

    def fit(self, base: Weights) -> None:
        """Take this base to recover from. Raise InputError unless its keys and shapes fit."""
        found: dict[str, Tensor | None] = {}
        missing, misfits = [], []
        for spec in self.specs:
            entry = self.entries[spec.name]["base"]
            other = found[spec.name] = base.find(spec.name) if entry else None
            if entry and other is None:
                missing.append(spec.name)
            elif entry and not (other.shape == tuple(entry["shape"]) and other.dtype.is_floating_point):
                misfits.append((other, Tensor(spec.name, spec.dtype, tuple(entry["shape"]), self.folder)))
        if missing or misfits:
            raise_mismatch(base, self.weights, missing, misfits, self.manifest["base_config"])
        self.base, self.pairs = base, found

    def pieces(self, pipe: Pipeline, order: list[Spec]) -> Iterator[tuple[Slot, Spec, int, torch.Tensor]]:
        """Yield (slot, tensor, first element, recovered elements). It ends without an error only if all is proved."""
        base, pairs = self.base, self.pairs
        to_check = []
        for spec in order:
            stored, base_tensor = self.weights.tensors[spec.name], pairs[spec.name]
            longer = base_tensor is not None and base_tensor.numel > stored.numel
            base_hash, result_hash = hashlib.sha256() if longer else None, hashlib.sha256()
            for slot, start, _, out in xor_pieces(pipe, spec, base, base_tensor, self.weights, stored, base_hash):
                pipe.send(slot, "result", result_hash.update, out)
                pipe.bar.update(out.nbytes)
                yield slot, spec, start, out.view(spec.dtype)
            of_base = pipe.after("base", base_hash.hexdigest) if longer else None
            to_check.append((spec, of_base, pipe.after("result", result_hash.hexdigest)))
            if len(to_check) > 1:  # of the tensor before, while this one is hashed
                self._check(*to_check.pop(0))
        for item in to_check:
            self._check(*item)
        self._check_other_tensors(pipe)

    def _check(self, spec: Spec, base_hash: Future | None, result_hash: Future) -> None:
        entry, tensor = self.entries[spec.name], self.pairs[spec.name]
        wrong = result_hash.result() != entry["sha256"]
        if tensor and (wrong or base_hash):
            of_base = base_hash.result() if base_hash else _digest(self.base, tensor, spec.dtype)
            if of_base != entry["base"]["sha256"]:
                raise InputError(self._explain(spec.name), self.base.folder)
        if wrong:
            stored = self.weights.tensors[spec.name]
            if _digest(self.weights, stored, stored.dtype) != entry["diff_sha256"]:
                raise InputError(f"{spec.name} in {stored.path} is damaged; copy or download it again", stored.path)
            raise UsageError(
                f"{spec.name} was not recovered, though base and diff are as published: is the memory of "
                "this machine faulty?"
            )

    def _explain(self, name: str) -> str:
        """Say whether one base tensor is damaged or the base is another model: a few others are looked at."""
        base, pairs = self.base, self.pairs
        others = [spec for spec in self.specs if pairs[spec.name] and len(spec.shape) > 1 and spec.name != name][-4:]
        same = [
            spec.name
            for spec in others
            if _digest(base, pairs[spec.name], spec.dtype) == self.entries[spec.name]["base"]["sha256"]
        ]
        return explain_other_base(base, pairs[name], len(same), len(others), self.manifest["base_config"])

    def _check_other_tensors(self, pipe: Pipeline) -> None:
        """Check base tensors on which no result depends: another copy of the base may lack them, not alter them."""
        base, used = self.base, {tensor.name for tensor in self.pairs.values() if tensor}
        for name, entry in self.manifest["other_base_tensors"].items():
            tensor = base.tensors.get(name)
            if tensor is None or name in used or dtype_name(tensor.dtype) != entry["dtype"]:
                continue
            if hash_tensor(pipe, "base", base, tensor, tensor.dtype).result() != entry["sha256"]:
                message = f"{name} in {tensor.path} is not what it was, though the result does not depend on it"
                if not name.endswith("inv_freq"):
                    raise InputError(f"{message}; copy or download it again", base.folder)
                print(f"note: {message}: another conversion may compute it otherwise", flush=True)

    def verify(self, pipe: Pipeline, tuned: Weights) -> None:
        """Raise UsageError unless `tuned` is, bit for bit, the result that the manifest promises."""
        check_same_tensors(tuned, self.specs, f"the manifest of {self.folder}")
        digests = {}
        for number, spec in enumerate(self.specs):
            tensor = tuned.tensors[spec.name]
            digests[spec.name] = hash_tensor(pipe, f"lane {number % 4}", tuned, tensor, spec.dtype)
            pipe.bar.update(tensor.nbytes)
        wrong = [name for name, digest in digests.items() if digest.result() != self.entries[name]["sha256"]]
        if wrong:
            raise InputError(
                f"{tuned.folder}: {len(wrong)} of {len(digests)} tensors are not those of the manifest: "
                f"{', '.join(wrong[:5])}",
                tuned.folder,
            )
        if found := [name for name in CHANGES_A_MODEL if (tuned.folder / name).exists()]:
            why = f"its weights are those of the manifest, but {found[0]} makes another model of them; remove it"
            raise InputError(f"{tuned.folder}: {why}", tuned.folder)
        for name, path in self.files.items():
            own, published = tuned.folder / name, self.manifest["files"][path.name]["sha256"]
            if not own.is_file() or sha256_of_file(own) != published:
                raise InputError(
                    f"{tuned.folder}: the weights are those of the manifest, but {name} is missing or changed; it is "
                    f"in {path}",
                    tuned.folder,
                )


def _digest(weights: Weights, tensor: Tensor, dtype: torch.dtype) -> str:
    """Return the SHA-256 of a tensor, for a diagnosis."""
    digest, step = hashlib.sha256(), PIECE
    scratch = torch.empty(8 * step, dtype=torch.uint8)
    for start in range(0, tensor.numel, step):
        piece = torch.empty(min(step, tensor.numel - start), dtype=dtype)
        weights.read(tensor, start, piece, scratch)
        digest.update(as_bytes(piece))
    return digest.hexdigest()
