"""Small checkpoints to be differenced, and comparing them bit for bit."""

import json
import shutil
import struct
import zlib
from pathlib import Path

import torch
import zstandard
from safetensors.torch import load_file, save_file

import weight_diff

STRANGE = [float("nan"), float("-nan"), -0.0, 0.0, float("inf"), float("-inf"), 1e-40, -6e-8, 65504.0]
INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def state_of(folder) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder, by the libraries that wrote the formats."""
    files = sorted(Path(folder).glob("*.safetensors"))
    state = {}
    for file in files or sorted(Path(folder).glob("*.bin")):
        state |= load_file(file) if files else torch.load(file, weights_only=True)
    return state


def stored_bits(diff) -> dict[str, torch.Tensor]:
    """Return the tensors of an exact diff, decompressed where its manifest says so, as integers of the tuned width."""
    state, manifest = state_of(diff), json.loads((Path(diff) / "weight_diff.json").read_text())
    for name, entry in manifest["tensors"].items():
        if entry.get("compressed"):
            assert manifest["version"] == 2 and state[name].dtype == torch.uint8 and state[name].dim() == 1
            dtype = INTEGER[getattr(torch, entry["dtype"]).itemsize]
            state[name] = _decompressed(state[name].numpy().tobytes(), entry["shape"], dtype)
    return state


def _decompressed(content: bytes, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    numel, width, piece = torch.Size(shape).numel(), dtype.itemsize, 1 << 19
    count = -(-numel // piece)
    found, begin = b"", 0
    for number in range(count):
        size, checksum = struct.unpack_from("<II", content, len(content) - 8 * (count - number))
        part, elements = content[begin : begin + size], min(piece, numel - number * piece)
        assert zlib.crc32(part) == checksum
        if size < elements * width:
            planes = zstandard.ZstdDecompressor().decompress(part)
            part = b"".join(bytes(column) for column in zip(*(planes[i * elements :][:elements] for i in range(width))))
        found, begin = found + part, begin + size
    assert len(content) < len(found) and not any(content[begin : len(content) - 8 * count])
    return torch.frombuffer(bytearray(found), dtype=dtype).view(shape)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(INTEGER[tensor.dtype.itemsize])


def assert_same(folder, expected: dict[str, torch.Tensor]):
    found = state_of(folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def write(folder, template, state, layout="one", **config) -> Path:
    """Write a checkpoint: the files of `template`, these tensors, in one file, in shards or as 2023's .bin shards."""
    folder = Path(folder)
    shutil.copytree(template, folder, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*"))
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))
    state = {name: tensor.clone().contiguous() for name, tensor in state.items()}
    if layout == "one":
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder
    ending, save = ("safetensors", save_file) if layout == "shards" else ("bin", torch.save)
    stem, names, weight_map = "model" if layout == "shards" else "pytorch_model", list(state), {}
    for number in range(3):
        file = f"{stem}-{number + 1:05}-of-00003.{ending}"
        part = {name: state[name] for name in names[number::3]}
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def tune(state, dtype, rows=0, seed=0, strange=True) -> dict[str, torch.Tensor]:
    """Return weights near those of `state`, with `rows` more or fewer in the embeddings, and the strangest values."""
    generator, tuned = torch.Generator().manual_seed(seed), {}
    for name, tensor in state.items():
        if rows and name.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight")):
            more = torch.randn(max(rows, 0), *tensor.shape[1:], generator=generator)
            tensor = torch.cat([tensor[: len(tensor) + min(rows, 0)].float(), more])
        noise = torch.randn(tensor.shape, generator=generator) * 1e-3
        tuned[name] = (tensor.float() + noise).to(dtype)
        if strange and tensor.numel() > 100:
            tuned[name].view(-1)[20 : 20 + len(STRANGE)] = torch.tensor(STRANGE).to(dtype)
    return tuned


def make(base, tuned, diff, **flags):
    weight_diff.make_diff(str(base), str(tuned), str(diff), **flags)


def recover(base, diff, tuned=None, **flags):
    """Recover as the command line does: without loading the model."""
    weight_diff._recover(str(base), str(diff), tuned and str(tuned), **flags)
