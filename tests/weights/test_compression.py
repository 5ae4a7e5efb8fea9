"""Compressed exact diffs: smaller, the same bits, open to the official reader; and strangers' frames, which may lie."""

import hashlib
import json
import random
import resource
import struct
import zlib
from contextlib import suppress

import pytest
import torch
import zstandard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.checkpoints import assert_same, bits, make, recover, state_of, stored_bits

import weight_diff
from alpaca.common.errors import UsageError
from alpaca.weights import compression
from alpaca.weights.writer import PIECE

pytestmark = pytest.mark.slow  # many small cases

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def checkpoint(folder, state, **config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def pair(tmp_path, dtype, numel=2 * PIECE + 77):
    """base, tuned: tensors of several pieces, of one, of none; near the base's, far from them, and no floats at all."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=draw) * scale

    base = {
        "near": normal(numel),
        "far": normal(PIECE + 5),
        "few": normal(3),
        "model.embed_tokens.weight": normal(9),
    }
    base = {name: tensor.to(dtype) for name, tensor in base.items()} | {"empty": torch.empty(0, 4, dtype=dtype)}
    tuned = {name: (tensor.float() + normal(*tensor.shape, scale=1e-4)).to(dtype) for name, tensor in base.items()}
    noise = torch.randint(-(2**31), 2**31, (4 * PIECE,), generator=draw, dtype=torch.int64).to(torch.int32)
    tuned["far"] = noise.view(dtype)[: PIECE + 5].clone()
    tuned["model.embed_tokens.weight"] = torch.cat([tuned["model.embed_tokens.weight"], torch.zeros(4, dtype=dtype)])
    tuned |= {"rotary.inv_freq": torch.ones(5000), "ids": torch.arange(9000), "byte": torch.ones(9) > 0}
    return checkpoint(tmp_path / "base", base), checkpoint(tmp_path / "tuned", tuned), tuned


def manifest_of(diff) -> dict:
    return json.loads((diff / "weight_diff.json").read_text())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", ["5GB", "3MB"])
def test_every_bit_comes_back_of_a_smaller_diff(tmp_path, dtype, size, capsys):
    base, tuned, expected = pair(tmp_path, dtype)
    make(base, tuned, tmp_path / "diff", max_shard_size=size)
    printed = capsys.readouterr().out
    make(base, tuned, tmp_path / "plain", max_shard_size=size, compression="none")
    recover(base, tmp_path / "diff", tmp_path / "result")
    assert_same(tmp_path / "result", expected)
    weight_diff.verify(str(tmp_path / "diff"), str(tmp_path / "result"), path_raw=str(base))
    plain, found = state_of(tmp_path / "plain"), stored_bits(tmp_path / "diff")
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)
    manifests = [manifest_of(tmp_path / name) for name in ("plain", "diff")]
    assert [manifest["version"] for manifest in manifests] == [1, 2] and "compression" not in manifests[0]
    assert [name for name, entry in manifests[1]["tensors"].items() if entry.get("compressed")] == ["near"]
    digests = [{n: (e["sha256"], e["diff_sha256"]) for n, e in m["tensors"].items()} for m in manifests]
    assert digests[0] == digests[1], "of the bits, compressed or not"
    sizes = [sum(path.stat().st_size for path in (tmp_path / n).glob("*.safetensors")) for n in ("plain", "diff")]
    assert sizes[1] < 0.95 * sizes[0]
    share = sizes[1] / sum(tensor.nbytes for tensor in expected.values())
    assert f"{share:.0%} of the tuned model" in printed
    for name, entry in manifests[1]["files"].items():
        assert hashlib.sha256((tmp_path / "diff" / name).read_bytes()).hexdigest() == entry["sha256"]


def test_the_official_reader_opens_it(tmp_path):
    base, tuned, _ = pair(tmp_path, torch.float32)
    make(base, tuned, tmp_path / "diff")
    with safe_open(tmp_path / "diff" / "diff.safetensors", "pt") as file:
        assert file.get_tensor("near").dtype == torch.uint8 and file.get_tensor("near").dim() == 1
        assert file.metadata() == {"format": "pt"} and file.get_tensor("ids").dtype == torch.int64
    content = (tmp_path / "diff" / "diff.safetensors").read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:begin])
    entries.pop("__metadata__")
    widths = {"U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8}
    assert begin % 8 == 0 and all(e["data_offsets"][0] % widths[e["dtype"]] == 0 for e in entries.values())


def test_a_diff_of_the_base_itself_is_next_to_nothing(tmp_path):
    base, _, _ = pair(tmp_path, torch.bfloat16)
    state = {name: tensor for name, tensor in load_file(base / "model.safetensors").items()}
    tuned = checkpoint(tmp_path / "copy", state)
    make(base, tuned, tmp_path / "diff")
    assert (tmp_path / "diff" / "diff.safetensors").stat().st_size < 0.01 * (tuned / "model.safetensors").stat().st_size
    recover(base, tmp_path / "diff", tmp_path / "result")
    assert_same(tmp_path / "result", state)


def test_a_header_with_names_and_sizes_of_any_length_fits_its_room(tmp_path):
    """A thousand tensors, of which every other one is compressed, with names that JSON makes longer."""
    state = {f"é{'x' * (i % 40)}{i}": torch.ones(1 + 40 * (i % 2) * (i % 7), 1 + i % 3) for i in range(1000)}
    base = checkpoint(tmp_path / "base", state)
    expected = {name: tensor * 1.5 for name, tensor in state.items()}
    make(base, checkpoint(tmp_path / "tuned", expected), tmp_path / "diff", max_shard_size="100KB")
    recover(base, tmp_path / "diff", tmp_path / "result")
    assert_same(tmp_path / "result", expected)
    kinds = {tensor.dtype for tensor in state_of(tmp_path / "diff").values()}
    assert kinds == {torch.uint8, torch.int32}


def test_another_base_and_damaged_rows_are_named(tmp_path):
    """The base is hashed only where a result is wrong, and where it is longer than the result."""
    base, tuned, _ = pair(tmp_path, torch.float32)
    make(tuned, base, tmp_path / "diff")
    for name, position in (("near", 3), ("model.embed_tokens.weight", -1)):  # the second: in no result
        state = load_file(tuned / "model.safetensors")
        state[name][position] += 1
        other = checkpoint(tmp_path / f"other {name}", state)
        with pytest.raises(UsageError, match=f"{name} .* is not that of the base of this diff"):
            recover(other, tmp_path / "diff")
    recover(tuned, tmp_path / "diff")


# ---- strangers ----


@pytest.fixture
def published(tmp_path):
    base, tuned, _ = pair(tmp_path, torch.bfloat16)
    make(base, tuned, tmp_path / "diff")
    return tmp_path


def pieces_of(content: bytes, count: int) -> list[bytes]:
    table = [struct.unpack_from("<II", content, len(content) - 8 * (count - number)) for number in range(count)]
    begins = [sum(size for size, _ in table[:number]) for number in range(count)]
    return [content[begin : begin + size] for begin, (size, _) in zip(begins, table)]


def packed(pieces: list[bytes], sizes=None, checksums=None, padding=None) -> bytes:
    sizes = sizes or [len(piece) for piece in pieces]
    checksums = checksums or [zlib.crc32(piece) for piece in pieces]
    padding = bytes(-sum(sizes) % 8) if padding is None else padding
    return b"".join(pieces) + padding + b"".join(struct.pack("<II", *entry) for entry in zip(sizes, checksums))


def publish(diff, contents: dict[str, bytes], change=lambda manifest: None) -> None:
    """Give tensors of a diff other contents, as its publisher could, the digests of files and manifest being right."""
    state = load_file(diff / "diff.safetensors")
    state |= {name: torch.tensor(list(content), dtype=torch.uint8) for name, content in contents.items()}
    save_file(state, diff / "diff.safetensors", {"format": "pt"})
    content, manifest = (diff / "diff.safetensors").read_bytes(), manifest_of(diff)
    header = content[: 8 + int.from_bytes(content[:8], "little")]
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "header_sha256": hashlib.sha256(header).hexdigest()}
    manifest["files"]["diff.safetensors"] = {"bytes": len(content), **entry}
    change(manifest)
    text = json.dumps(manifest)
    (diff / "weight_diff.json").write_text(text)
    (diff / "weight_diff.json.sha256").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  weight_diff.json\n")


def frame(content: bytes, **options) -> bytes:
    return zstandard.ZstdCompressor(level=1, **options).compress(content)


def streamed(content: bytes, **options) -> bytes:
    """A frame that does not say how large its content is."""
    compressor = zstandard.ZstdCompressor(**options).compressobj()
    return compressor.compress(content) + compressor.flush()


def lying(content: bytes) -> bytes:
    """The frame of another size, in whose header stands that of a piece."""
    return content[:5] + struct.pack("<I", WHOLE) + content[9:]


WIDE = zstandard.ZstdCompressionParameters(window_log=30, write_content_size=False)
WHOLE = 2 * PIECE  # bytes of a piece
LIES = {
    "a bomb": lambda p: [frame(bytes(1 << 30)), *p[1:]],
    "a bomb of unknown size": lambda p: [streamed(bytes(1 << 28)), *p[1:]],
    "the right size, unsaid": lambda p: [streamed(bytes(WHOLE)), *p[1:]],
    "a large window": lambda p: [streamed(bytes(WHOLE), compression_params=WIDE), *p[1:]],
    "one byte more": lambda p: [frame(bytes(WHOLE + 1)), *p[1:]],
    "one byte less": lambda p: [frame(bytes(WHOLE - 1)), *p[1:]],
    "nothing": lambda p: [frame(b""), *p[1:]],
    "two frames": lambda p: [frame(bytes(PIECE)) + frame(bytes(PIECE)), *p[1:]],
    "a frame behind the frame": lambda p: [p[0] + frame(bytes(1 << 20)), *p[1:]],
    "bytes behind the frame": lambda p: [p[0] + b"\0", *p[1:]],
    "an empty frame behind the frame": lambda p: [p[0] + frame(b""), *p[1:]],
    "cut short": lambda p: [p[0][:-1], *p[1:]],
    "cut to its header": lambda p: [p[0][:6], *p[1:]],
    "one byte": lambda p: [p[0][:1], *p[1:]],
    "a frame to be skipped": lambda p: [b"\x50\x2a\x4d\x18" + struct.pack("<I", WHOLE), *p[1:]],
    "a frame to be skipped before it": lambda p: [b"\x50\x2a\x4d\x18\x01\0\0\0\0" + p[0], *p[1:]],
    "no frame": lambda p: [random.Random(0).randbytes(999), *p[1:]],
    "a size that lies": lambda p: [lying(frame(bytes(WHOLE - 1))), *p[1:]],
    "the size of a bomb that lies": lambda p: [lying(frame(bytes(1 << 30))), *p[1:]],
    "swapped": lambda p: [p[1], p[0], *p[2:]],
}
TABLES = {
    "sizes of the next": lambda p: packed(p, sizes=[len(p[0]) + 8, len(p[1]) - 8, len(p[2])]),
    "a size of nothing": lambda p: packed(p, sizes=[0, len(p[0]) + len(p[1]), len(p[2])]),
    "sizes beyond the file": lambda p: packed(p, sizes=[len(p[0]), len(p[1]), 1 << 31]),
    "another checksum": lambda p: packed(p, checksums=[1, 2, 3]),
    "no zeros between": lambda p: packed([p[0] + b"x", *p[1:]], padding=b"\1" * (-sum(map(len, p)) % 8 or 8)),
    "too much between": lambda p: packed(p, padding=bytes(-sum(map(len, p)) % 8 + 8)),
    "a piece too many": lambda p: packed([*p, b"x"]),
    "a piece too few": lambda p: packed(p[:2]),
    "no table": lambda p: b"".join(p),
    "nothing": lambda p: b"",
    "less than a table": lambda p: b"\0" * 23,
    "larger than as it is": lambda p: packed([bytes(WHOLE + 8), *p[1:]]),
}


@pytest.mark.parametrize("case", [*LIES, *(f"table: {name}" for name in TABLES)])
def test_frames_and_tables_that_lie(published, case):
    diff, base = published / "diff", published / "base"
    pieces = pieces_of(load_file(diff / "diff.safetensors")["near"].numpy().tobytes(), 3)
    table = TABLES.get(case.removeprefix("table: "))
    publish(diff, {"near": table(pieces) if case.startswith("table") else packed(LIES[case](pieces))})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UsageError, match="near in .* is damaged|near is not that of the base|near .* not recovered"):
        recover(base, diff, published / "result")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"
    assert not (published / "result").exists()


def test_what_a_manifest_says_of_compression(published):
    base, diff = published / "base", published / "diff"
    whole = {path.name: path.read_bytes() for path in diff.iterdir()}
    content = load_file(diff / "diff.safetensors")["near"].numpy().tobytes()
    huge = {"dtype": "bfloat16", "shape": [1 << 40]}

    def changed(*path):
        *path, key, value = path

        def change(manifest):
            for step in path:
                manifest = manifest[step]
            manifest[key] = value

        return change

    for change, message in [
        (changed("version", 3), "is of version '3' of the format, this program reads 1 and 2"),
        (changed("version", 1), "is not of its format"),
        (changed("compression", {**compression.FORMAT, "method": "lzma"}), "is compressed in another way"),
        (changed("compression", {**compression.FORMAT, "piece": 1}), "is compressed in another way"),
        (changed("compression", None), "is compressed in another way"),
        (changed("tensors", "near", "compressed", 1), "is not of its format"),
        (changed("tensors", "near", "compressed", {"a": 1}), "is not of its format"),
        (changed("tensors", "near", "base", None), "is not of its format"),
        (lambda manifest: manifest["tensors"]["near"].pop("compressed"), "1 different: near is"),
        (changed("tensors", "far", "compressed", True), "1 different: far is|far in .* is damaged"),
        (changed("tensors", "near", manifest_of(diff)["tensors"]["near"] | huge), "near in .* is damaged"),
        (changed("tensors", "near", "shape", [PIECE]), "near in .* is damaged"),
        (changed("tensors", "near", "dtype", "float32"), "near in .* is damaged"),
        (changed("tensors", "near", "base", {"shape": [1], "sha256": ""}), "near in .* is damaged"),
    ]:
        publish(diff, {"near": content}, change)
        with pytest.raises(UsageError, match=message):
            recover(base, diff, published / "result")
        for name, text in whole.items():
            (diff / name).write_bytes(text)
    recover(base, diff, published / "result")


def test_a_shape_beyond_the_base_s_brings_its_own_bytes(published):
    """A tensor of the base's name with a billion rows: what lies beyond the base's is not decompressed."""
    base, diff = published / "base", published / "diff"
    pieces = pieces_of(load_file(diff / "diff.safetensors")["near"].numpy().tobytes(), 3)
    rest = [frame(bytes(WHOLE))] * 2000
    publish(
        diff,
        {"near": packed([*pieces[:2], rest[0], *rest])},
        lambda manifest: manifest["tensors"]["near"].update({"shape": [2003 * PIECE]}),
    )
    with pytest.raises(UsageError, match="near in .* is damaged"):
        recover(base, diff, published / "result")


def test_a_flipped_byte_is_found_wherever_it_is(published):
    base, path = published / "base", published / "diff" / "diff.safetensors"
    content, draw = path.read_bytes(), random.Random(0)
    with safe_open(path, "pt") as file:
        stored = file.get_tensor("near").numpy().tobytes()
    begin = content.index(stored)
    size = sum(struct.unpack_from("<II", stored, len(stored) - 24 + 8 * number)[0] for number in range(3))
    places = [*range(10), 15, *(draw.randrange(size) for _ in range(15)), *range(size - 3, len(stored))]
    for place in places:
        changed = bytearray(content)
        changed[begin + place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(UsageError, match="near in .*diff.safetensors is damaged"):
            recover(base, published / "diff")
    path.write_bytes(content)
    recover(base, published / "diff")


def try_frames(published, seeds) -> None:
    """Frames that are almost right, with right checksums: a message or a result."""
    base, diff = published / "base", published / "diff"
    whole = {path.name: path.read_bytes() for path in diff.iterdir()}
    pieces = pieces_of(load_file(diff / "diff.safetensors")["near"].numpy().tobytes(), 3)
    for seed in seeds:
        draw = random.Random(seed)
        changed = [bytearray(piece) for piece in pieces]
        for _ in range(draw.choice([1, 1, 5])):
            piece = draw.choice(changed)
            piece[draw.choice([draw.randrange(20), draw.randrange(len(piece))])] = draw.randrange(256)
        if draw.random() < 0.2:
            del changed[2][draw.randrange(len(changed[2])) :]
        publish(diff, {"near": packed([bytes(piece) or b"x" for piece in changed])})
        with suppress(UsageError):
            recover(base, diff)
        for name, text in whole.items():
            (diff / name).write_bytes(text)


def test_mutated_frames_end_in_a_message_or_a_result(published):
    try_frames(published, range(15))


@pytest.mark.stress
def test_many_mutated_frames_end_in_a_message_or_a_result(published):
    try_frames(published, range(100, 600))


def test_a_full_disk_while_the_header_is_written(published, monkeypatch):
    put, calls = compression.CompressedWriter._put, []

    def full(self, part):
        calls.append(part)
        if part[8:9] == b"{":  # the header, at the end
            raise OSError(28, "No space left on device")
        put(self, part)

    monkeypatch.setattr(compression.CompressedWriter, "_put", full)
    with pytest.raises(UsageError, match="could not be written .*No space left on device"):
        make(published / "base", published / "tuned", published / "new")
    assert len(calls) > 3 and not list(published.glob("new*"))


def test_splitting_and_joining():
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        piece = torch.randint(-100, 100, (77,)).to(dtype) ** 3
        planes = compression.split(memoryview(piece.view(torch.uint8).numpy()), dtype.itemsize, torch.empty(999).byte())
        assert bytes(planes[:77]) == bytes(value & 255 for value in piece.tolist())
        out = torch.empty_like(piece)
        compression.join(bytes(planes), out)
        assert torch.equal(bits(out), piece)
