"""Exact weight diffs: every bit comes back, every damaged byte is found, nothing half-written appears."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run, train, write_rows
from safetensors.torch import save_file
from support.adapters import LLAMA, make_adapter
from support.checkpoints import INTEGER, STRANGE, assert_same, bits, make, recover, state_of, stored_bits, tune, write
from support.imports import loaded_by
from transformers import AutoConfig, AutoModelForCausalLM

import weight_diff
from alpaca.common import files
from alpaca.common.errors import UsageError
from alpaca.common.files import MARKER, new_folder
from alpaca.weights import writer
from alpaca.weights.reader import ADAPTER, EXACT_DIFF, FLOAT_DIFF, MODEL, OTHER, RUN, folder_kind, open_weights


@pytest.fixture
def llama(tiny, tmp_path):
    """(base, tuned, diff): float32 base, bfloat16 tuned one row longer, their exact diff."""
    state = state_of(tiny("llama"))
    base = write(tmp_path / "base", tiny("llama"), {name: tensor.bfloat16() for name, tensor in state.items()})
    rows = state["lm_head.weight"].shape[0] + 1
    tuned = write(tmp_path / "tuned", tiny("llama"), tune(state, torch.bfloat16, rows=1), vocab_size=rows)
    make(base, tuned, tmp_path / "diff")
    return base, tuned, tmp_path / "diff"


# ---- exact ----


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])  # untied, tied, tied
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout,rows", [("one", 0), ("shards", 1), ("bin", -7)])
def test_every_bit_comes_back(tiny, tmp_path, architecture, dtype, layout, rows):
    base_state = state_of(tiny(architecture))
    for tensor in base_state.values():
        tensor.view(-1)[10:19] = torch.tensor(STRANGE)
    base = write(tmp_path / "base", tiny(architecture), base_state, layout)
    expected = tune(base_state, dtype, rows)
    tuned = write(tmp_path / "tuned", tiny(architecture), expected, layout)
    make(base, tuned, tmp_path / "diff", max_shard_size="30KB" if layout != "one" else "5GB")
    recover(base, tmp_path / "diff", tmp_path / "result", max_shard_size="50KB" if layout == "bin" else "5GB")
    assert_same(tmp_path / "result", expected)
    stored = stored_bits(tmp_path / "diff")
    assert {tensor.dtype for tensor in stored.values()} == {INTEGER[dtype.itemsize]}, "the width of the tuned dtype"
    for file in ("config.json", "tokenizer_config.json"):
        assert (tmp_path / "result" / file).read_bytes() == (tuned / file).read_bytes()
    weight_diff.verify(str(tmp_path / "diff"), str(tmp_path / "result"))
    weight_diff.verify(str(tmp_path / "diff"), str(tuned))


@pytest.mark.parametrize("names", ["shared", "apart"])
def test_a_tensor_by_two_names_comes_back_by_both(tiny, tmp_path, names):
    """xor undoes itself, however often a name is visited: each name is a tensor of its own."""
    folders, alias, name = [], "lm_head.weight", "model.decoder.embed_tokens.weight"
    for number in range(2):
        state = tune(state_of(tiny("opt")), torch.float32, seed=number)
        state[alias] = state[name] if names == "shared" else state[name] + 1
        folder = write(tmp_path / str(number), tiny("opt"), {})
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
        folders.append(folder)
    make(*folders, tmp_path / "diff")
    recover(folders[0], tmp_path / "diff", tmp_path / "result")
    assert_same(tmp_path / "result", state_of(folders[1]))
    expected = bits(state_of(folders[1])[alias]) ^ bits(state_of(folders[0])[alias])
    assert torch.equal(stored_bits(tmp_path / "diff")[alias], expected), "once"
    weight_diff.verify(str(tmp_path / "diff"), str(tmp_path / "result"), path_raw=str(folders[0]))


def test_the_manifest_and_its_digest(llama, capsys):
    base, tuned, diff = llama
    make(base, tuned, diff, overwrite=True)
    printed = capsys.readouterr().out
    text = (diff / "weight_diff.json").read_bytes()
    assert hashlib.sha256(text).hexdigest() in printed
    manifest = json.loads(text)
    own = {"weight_diff.json", "weight_diff.json.sha256", "README.md"}  # the card has the manifest's digest
    assert set(manifest["files"]) == {path.name for path in diff.iterdir()} - own
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((diff / name).read_bytes()).hexdigest() == entry["sha256"]
        assert (diff / name).stat().st_size == entry["bytes"]
    states = [state_of(base), stored_bits(diff), state_of(tuned)]
    for name, entry in manifest["tensors"].items():
        of_base, stored, of_tuned = (bits(state[name]) for state in states)
        rows = len(of_base)
        assert torch.equal(stored[:rows], of_tuned[:rows] ^ of_base), "the base's licence: no weights in the clear"
        assert torch.equal(stored[rows:], of_tuned[rows:])
        digests = [hashlib.sha256(bits(state[name]).numpy().tobytes()).hexdigest() for state in states]
        assert digests == [entry["base"]["sha256"], entry["diff_sha256"], entry["sha256"]]
    subprocess.run(["sha256sum", "-c", "weight_diff.json.sha256"], cwd=diff, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_copies_of_one_base_in_other_dtypes_are_equal_bases(tiny, tmp_path, dtype):
    """A float16 checkpoint and its float32 copy, special values included."""
    state = {name: tensor.half() for name, tensor in state_of(tiny("llama")).items()}
    for tensor in state.values():
        tensor.view(-1)[:5] = torch.tensor([float("nan"), 6e-8, -0.0, float("-inf"), 65504.0]).half()
    if dtype == torch.bfloat16:  # both are cast: what a cast makes of other NaNs depends on the CPU and the position
        bits(state["lm_head.weight"]).view(-1)[5:60:3] = torch.tensor([0x7DAB], dtype=torch.int16)
    expected = tune(state, dtype)
    tuned = write(tmp_path / "tuned", tiny("llama"), expected)
    half = write(tmp_path / "half", tiny("llama"), state)
    full = write(tmp_path / "full", tiny("llama"), {name: tensor.float() for name, tensor in state.items()})
    for number, (one, other) in enumerate([(half, full), (full, half)]):
        make(one, tuned, tmp_path / f"diff{number}")
        recover(other, tmp_path / f"diff{number}", tmp_path / f"result{number}")
        assert_same(tmp_path / f"result{number}", expected)


def test_a_base_with_other_prefixes_and_a_stored_tied_head(tiny, tmp_path):
    """GPT-2 on the hub has no `transformer.`, and .bin files of 2023 hold the tied embedding twice, and masks."""
    expected = tune(state_of(tiny("gpt2")), torch.float16)
    base_state = state_of(tiny("gpt2"))
    base = write(tmp_path / "base", tiny("gpt2"), base_state)
    old = {name.removeprefix("transformer."): tensor for name, tensor in base_state.items()}
    old |= {"lm_head.weight": old["wte.weight"], "h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)}
    hub = write(tmp_path / "hub", tiny("gpt2"), old, "bin")
    tuned = write(tmp_path / "tuned", tiny("gpt2"), expected)
    for one, other in ((base, hub), (hub, base)):
        make(one, tuned, tmp_path / "diff", overwrite=True)
        recover(other, tmp_path / "diff", tmp_path / "result", overwrite=True)
        assert_same(tmp_path / "result", expected)
    masked = old | {"h.0.attn.bias": torch.zeros(1, 1, 4, 4, dtype=torch.bool)}
    make(hub, tuned, tmp_path / "diff", overwrite=True)
    with pytest.raises(UsageError, match="h.0.attn.bias .* is not what it was, though the result does not depend"):
        recover(write(tmp_path / "masked", tiny("gpt2"), masked), tmp_path / "diff")


def test_old_and_odd_bin_files(tiny, tmp_path):
    """Before torch 1.6 a .bin was no zip; a tensor may be a transposed view, a Parameter, or part of another."""
    state = state_of(tiny("llama"))
    expected = tune(state, torch.float16)
    tuned = write(tmp_path / "tuned", tiny("llama"), expected)
    odd = {name: torch.nn.Parameter(tensor) for name, tensor in state.items()}
    up, table = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
    odd[up] = state[up].t().contiguous().t()
    odd[table] = torch.cat([state[table], state[table]])[len(state[table]) :]
    assert not odd[up].is_contiguous()
    base = write(tmp_path / "base", tiny("llama"), state)
    for number, new in enumerate((True, False)):
        folder = write(tmp_path / f"odd{number}", tiny("llama"), {})
        (folder / "model.safetensors").unlink()
        torch.save(odd, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
        make(base, tuned, tmp_path / f"diff{number}")
        recover(folder, tmp_path / f"diff{number}", tmp_path / f"result{number}")
        assert_same(tmp_path / f"result{number}", expected)


def test_dtype_shards_and_loading(llama, tmp_path):
    base, tuned, diff = llama
    recover(base, diff, tmp_path / "result", dtype="float32", max_shard_size="100KB")
    assert_same(tmp_path / "result", {name: tensor.float() for name, tensor in state_of(tuned).items()})
    assert len(list((tmp_path / "result").glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "result", dtype="auto")
    assert model.dtype == torch.float32 == AutoConfig.from_pretrained(tmp_path / "result").dtype


def test_python_gets_model_and_tokenizer_as_in_2023(llama, tmp_path, capsys):
    base, tuned, diff = llama
    for path_tuned in (None, str(tmp_path / "result")):
        model, tokenizer = weight_diff.recover(str(base), str(diff), path_tuned, test_inference=path_tuned is None)
        state = model.state_dict()
        assert all(torch.equal(bits(state[name]), bits(tensor)) for name, tensor in state_of(tuned).items())
        assert tokenizer("a")["input_ids"] and not model.training
    printed = capsys.readouterr().out
    assert "### Instruction:\nList three technologies that make life easier.\n\n### Response:\nCompletion: " in printed


def test_an_exact_diff_is_not_a_model(llama):
    with pytest.raises(ValueError, match="weight_diff__recover_the_model_with_weight_diff.py"):
        AutoModelForCausalLM.from_pretrained(llama[2])


# ---- damage ----


def flip(path: Path, position: int):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << (position % 8)
    path.write_bytes(content)


def data_start(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def assert_found(base, diff, path, position):
    """A flipped byte is an error of recover that names the file or a tensor."""
    flip(path, position)
    with pytest.raises(UsageError) as error:
        recover(base, diff)
    assert path.name in str(error.value) or "damaged" in str(error.value), str(error.value)
    flip(path, position)


def test_a_flipped_byte_is_found(llama):
    base, _, diff = llama
    draw = random.Random(0)
    for path in sorted(set(diff.iterdir()) - {diff / "README.md"}):  # a publisher's to write on
        for position in (0, draw.randrange(path.stat().st_size), path.stat().st_size - 1):
            assert_found(base, diff, path, position)
    weights = base / "model.safetensors"
    for position in (data_start(weights), draw.randrange(data_start(weights), weights.stat().st_size)):
        assert_found(base, diff, weights, position)
    recover(base, diff)


@pytest.mark.stress
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_hundreds_of_flipped_bytes_are_found(tiny, tmp_path, architecture):
    state = {name: tensor.half() for name, tensor in state_of(tiny(architecture)).items()}
    base = write(tmp_path / "base", tiny(architecture), state)
    tuned = write(tmp_path / "tuned", tiny(architecture), tune(state, torch.float16, rows=-7))
    make(base, tuned, tmp_path / "diff", max_shard_size="60KB")
    draw, weights = random.Random(1), base / "model.safetensors"
    for path in sorted(set((tmp_path / "diff").iterdir()) - {tmp_path / "diff" / "README.md"}):
        for _ in range(30):
            assert_found(base, tmp_path / "diff", path, draw.randrange(path.stat().st_size))
    for _ in range(150):
        assert_found(base, tmp_path / "diff", weights, draw.randrange(data_start(weights), weights.stat().st_size))
    recover(base, tmp_path / "diff")


def test_damage_is_told_from_another_base(llama, tiny, tmp_path):
    base, _, diff = llama
    flip(base / "model.safetensors", data_start(base / "model.safetensors") + 5)
    with pytest.raises(
        UsageError, match=r"is not that of the base .* though 4 of 4 other tensors are: this file is dam"
    ):
        recover(base, diff)
    state = {name: tensor + 0.01 for name, tensor in state_of(base).items()}
    other = write(tmp_path / "other", base, state, max_position_embeddings=4096)
    with pytest.raises(
        UsageError, match="none of 4 others is: it is another base model .*Llama-2 .*is 4096, expected 2048"
    ):
        recover(other, diff, tmp_path / "result")
    assert not (tmp_path / "result").exists() and not list(tmp_path.glob("*.incomplete"))


def test_a_manifest_changed_together_with_its_digest_needs_the_published_one(llama):
    base, _, diff = llama
    text = (diff / "weight_diff.json").read_bytes()
    published = hashlib.sha256(text).hexdigest()
    recover(base, diff, digest=f" {published.upper()}\n")
    with pytest.raises(UsageError, match="its manifest has the digest .*, not ''"):
        recover(base, diff, digest="")  # an empty shell variable
    changed = text.replace(b'"operation": "xor"', b'"operation": "XOR"')
    (diff / "weight_diff.json").write_bytes(changed)
    (diff / "weight_diff.json.sha256").write_text(f"{hashlib.sha256(changed).hexdigest()}  weight_diff.json\n")
    recover(base, diff)
    with pytest.raises(UsageError, match="--path_diff .*: its manifest has the digest .* this is another diff"):
        recover(base, diff, digest=published)


def test_a_manifest_cannot_name_files_outside_its_folder(llama, tmp_path):
    base, _, diff = llama
    manifest = json.loads((diff / "weight_diff.json").read_text())
    manifest["files"]["../evil.json"] = manifest["files"]["config.json"]
    shutil.copy(diff / "config.json", diff.parent / "evil.json")
    text = json.dumps(manifest)
    (diff / "weight_diff.json").write_text(text)
    (diff / "weight_diff.json.sha256").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  weight_diff.json\n")
    with pytest.raises(UsageError, match="names a file outside its folder, ../evil.json"):
        recover(base, diff, tmp_path / "a" / "result")


def test_verify_names_what_differs(llama, tmp_path, capsys):
    base, tuned, diff = llama
    recover(base, diff, tmp_path / "result")
    weight_diff.verify(str(diff), str(tmp_path / "result"), path_raw=str(base))
    assert capsys.readouterr().out.count("proved: ") == 3
    weights = tmp_path / "result" / "model.safetensors"
    flip(weights, data_start(weights))
    with pytest.raises(UsageError, match="1 of 21 tensors are not those of the manifest: lm_head.weight"):
        weight_diff.verify(str(diff), str(tmp_path / "result"))
    flip(weights, data_start(weights))
    flip(tmp_path / "result" / "tokenizer_config.json", 3)
    with pytest.raises(UsageError, match="weights are those of the manifest, but tokenizer_config.json is missing or"):
        weight_diff.verify(str(diff), str(tmp_path / "result"))


# ---- what does not fit, in words ----


def edited(folder, target, edit) -> Path:
    state = state_of(folder)
    edit(state)
    return write(target, folder, state)


MISFITS = {
    "longer vocabulary": (
        lambda s: s.update({n: torch.cat([s[n], s[n][:1]]) for n in ("model.embed_tokens.weight", "lm_head.weight")}),
        r"vocabulary is 1 row longer than expected.*\n    lm_head.weight is \[\d+, 32\] bfloat16, expected",
    ),
    "missing tensor": (
        lambda s: s.pop("model.layers.1.mlp.up_proj.weight"),
        r"tensors are missing.*\n    1 missing in the base: model.layers.1.mlp.up_proj.weight",
    ),
    "another size": (
        lambda s: s.update({n: t[..., :16].clone() for n, t in s.items()}),
        r"another size or architecture\n    lm_head.weight is \[\d+, 16\] bfloat16, expected \[\d+, 32\]",
    ),
    "another architecture": (
        lambda s: [s.update({f"gpt_neox.{i}": s.pop(name)}) for i, name in enumerate(list(s))],
        r"(?s)another size or architecture\n    21 missing in the base: .*    21 in the base only: gpt_neox.0, ",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_base_that_does_not_fit(llama, tmp_path, case):
    base, tuned, diff = llama
    edit, message = MISFITS[case]
    other = edited(base, tmp_path / "other", edit)
    with pytest.raises(UsageError, match=message):
        recover(other, diff)
    if case != "longer vocabulary":  # for a new diff, that base is as good as any
        with pytest.raises(UsageError, match=message):
            make(other, tuned, tmp_path / "new")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def to_bin(folder):
    torch.save(state_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


DAMAGES = {
    "truncated safetensors": (lambda f: truncate(f / "model.safetensors"), "is truncated or damaged"),
    "truncated bin": (lambda f: (to_bin(f), truncate(f / "pytorch_model.bin")), "pytorch_model.bin is truncated"),
    "code in a bin": (
        lambda f: (to_bin(f), torch.save({"a": Path("x")}, f / "pytorch_model.bin")),
        "is damaged, or holds more than tensors",
    ),
    "git-lfs pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "is a git-lfs pointer.*git lfs pull",
    ),
    "missing shard": (
        lambda f: [
            (f / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
            ),
            (f / "model.safetensors").rename(f / "model-1.safetensors"),
        ],
        "names 2 shards, of which 1 are missing: model-2.safetensors",
    ),
    "adapter": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "adapter_config.json").write_text("{}")),
        "is a LoRA adapter.*merge",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights: expected model.safetensors or"),
    "nothing": (shutil.rmtree, "no such folder"),
    "json": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read as JSON"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder(llama, tmp_path, case):
    base, tuned, diff = llama
    damage, message = DAMAGES[case]
    damage(base)
    for call in (lambda: make(base, tuned, tmp_path / "new"), lambda: recover(base, diff, tmp_path / "result")):
        with pytest.raises(UsageError, match=message) as error:
            call()
        assert "--path_raw" in str(error.value)
    assert not (tmp_path / "new").exists() and not (tmp_path / "result").exists()


def test_swapped_arguments(llama, tmp_path):
    base, tuned, diff = llama
    with pytest.raises(UsageError, match="--path_raw .*diff: is a weight diff, not a model; recover the model first"):
        recover(diff, base)
    with pytest.raises(UsageError, match="--path_tuned .*diff: is a weight diff, not a model"):
        make(base, diff, tmp_path / "new")
    with pytest.raises(UsageError, match="--path_tuned .*is the base itself"):
        make(base, base, tmp_path / "new")
    with pytest.raises(UsageError, match="--path_diff .*is the base itself"):
        recover(base, base)
    with pytest.raises(UsageError, match="weight_diff.json is missing"):
        (diff / "weight_diff.json").unlink()
        recover(base, diff)


def test_what_a_folder_holds(llama, tiny, tmp_path):
    base, tuned, diff = llama
    make(base, tuned, tmp_path / "float", method="float")
    adapter = make_adapter(tiny("llama"), tmp_path / "adapter", **LLAMA)
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    assert [folder_kind(folder) for folder in (base, diff, adapter, tmp_path / "run")] == [
        MODEL,
        EXACT_DIFF,
        ADAPTER,
        RUN,
    ]
    assert folder_kind(tmp_path) == OTHER
    for folder, kind in ((base, MODEL), (tmp_path / "float", FLOAT_DIFF)):
        with open_weights(folder) as weights:
            assert folder_kind(folder, weights) == kind
    (diff / "weight_diff.json").unlink()
    assert folder_kind(diff) == EXACT_DIFF


CARDS = {
    "---\nlicense: llama2\ndatasets: [tatsu-lab/alpaca]\ntags: [x]\n---\n# My model\n": ("llama2", "tatsu-lab/alpaca"),
    "---\nlicense: other\nlicense_name: research-only\n---\n": ("research-only", "license: other"),
    "# no front matter": ("not stated by the model's own card",),
    "---\nlicense: [\n---\n": ("not stated by the model's own card",),
    None: ("not stated by the model's own card",),
}


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("method", ["exact", "float"])
def test_the_card_of_a_diff(tiny, tmp_path, capsys, card, method):
    """It is the diff's alone: the tuned model's own card is neither published nor overwritten."""
    base = write(tmp_path / "my_base", tiny("llama"), state_of(tiny("llama")))
    tuned = write(tmp_path / "mine", tiny("llama"), tune(state_of(base), torch.float32))
    if card is not None:
        (tuned / "README.md").write_text(card)
    make(base, tuned, tmp_path / "diff", method=method)
    told, text = capsys.readouterr().out, (tmp_path / "diff" / "README.md").read_text()
    assert "# mine as a weight diff" in text and "**my_base**" in text and str(tmp_path) not in text
    assert all(words in text for words in CARDS[card]) and "My model" not in text
    command = re.search("^python weight_diff.py recover .*", text, re.MULTILINE)[0]
    if method == "exact":
        digest = re.search("digest of the manifest.*: (\\w{64})", told)[1]
        assert command.endswith(f" --digest {digest}") and text.count(digest) == 2
    recover(base, tmp_path / "diff", tmp_path / "result", check_integrity_naively=False)
    assert not (tmp_path / "result" / "README.md").exists()
    make(base, tuned, tmp_path / "diff", method=method, overwrite=True)


def test_a_diff_that_is_not_all_there(llama):
    base, _, diff = llama
    for name, message in (("diff.safetensors", "is missing"), ("tokenizer_config.json", "is missing")):
        (diff / name).rename(diff / "away")
        with pytest.raises(UsageError, match=f"{name} {message}"):
            recover(base, diff)
        (diff / "away").rename(diff / name)
    whole = (diff / "diff.safetensors").read_bytes()
    truncate(diff / "diff.safetensors")
    with pytest.raises(UsageError, match="diff.safetensors has .* bytes of .*truncated"):
        recover(base, diff)
    (diff / "diff.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UsageError, match="git-lfs pointer"):
        recover(base, diff)
    (diff / "diff.safetensors").write_bytes(whole)
    (diff / "README.md").write_text("A card, as the hub has one.")
    recover(base, diff)


def test_what_is_not_float_or_is_strange(tiny, tmp_path):
    """Scalars, empty tensors, integers, float8; unsupported ones are named."""
    odd = {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "ids": torch.arange(5), "mask": torch.ones(3) > 0}
    odd |= {"f8": torch.ones(9).to(torch.float8_e4m3fn), "wide": torch.ones(4, dtype=torch.float64)}
    base = write(tmp_path / "base", tiny("llama"), {name: tensor.clone() for name, tensor in odd.items()})
    odd["wide"] += 1
    tuned = write(tmp_path / "tuned", tiny("llama"), odd)
    make(base, tuned, tmp_path / "diff")
    recover(base, tmp_path / "diff", tmp_path / "result", check_integrity_naively=False)
    found = state_of(tmp_path / "result")
    assert all(
        torch.equal(found[name].view(torch.uint8), odd[name].view(torch.uint8)) for name in odd if name != "scalar"
    )
    assert found["scalar"] == 3.5
    numbers = write(tmp_path / "numbers", tiny("llama"), {"ids": torch.arange(5)})
    make(numbers, shutil.copytree(numbers, tmp_path / "copy"), tmp_path / "diff2")
    recover(numbers, tmp_path / "diff2")
    with pytest.raises(UsageError, match="no floating-point tensors"):
        make(numbers, tmp_path / "copy", tmp_path / "diff3", method="float")
    for state, message in (({"a": torch.eye(3).to_sparse()}, "a is sparse or quantized"), ({1: torch.ones(2)}, None)):
        (base / "model.safetensors").unlink(missing_ok=True)
        torch.save(state, base / "pytorch_model.bin")
        with pytest.raises(UsageError, match=message):
            make(base, tuned, tmp_path / "new")


def test_the_base_given_as_the_tuned_model_is_said(llama, tmp_path, capsys):
    base, _, _ = llama
    make(base, shutil.copytree(base, tmp_path / "copy"), tmp_path / "new")
    assert "every tensor is that of the base; is this the fine-tuned model?" in capsys.readouterr().out


# ---- what is written, and when ----


def test_nothing_is_overwritten_unasked(llama, tmp_path):
    base, tuned, diff = llama
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(
        UsageError, match="--path_diff .*already exists; choose another folder, or have it replaced .overwrite."
    ):
        make(base, tuned, diff)
    for flags in ({}, {"overwrite": True}):
        with pytest.raises(UsageError, match="--path_tuned .*is also read from"):
            recover(base, diff, base, **flags)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    make(base, tuned, diff, overwrite=True)
    home = tmp_path / "home"
    (home / "folder").mkdir(parents=True)
    (home / "config.json").touch()
    with pytest.raises(UsageError, match="only the folder of a .* is replaced, and this one holds folder"):
        recover(base, diff, home, overwrite=True)
    assert (home / "folder").exists()
    (tmp_path / "empty").mkdir()
    recover(base, diff, tmp_path / "empty")
    assert not list(tmp_path.glob("*.incomplete")) and not list(tmp_path.glob("*.replaced"))
    assert not (tmp_path / "empty" / MARKER).exists()


def test_too_small_a_disk_is_said_before_work(llama, tmp_path, monkeypatch):
    base, _, diff = llama
    monkeypatch.setattr(files, "free_bytes", lambda folder: 10**6)
    with pytest.raises(UsageError, match="--path_tuned .*: needs .*, its disk has 1.0 MB free"):
        recover(base, diff, tmp_path / "result")


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
@pytest.mark.parametrize("task", ["make_diff", "recover"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, task, failing):
    """Whichever piece meets it, the first, the last or the file's header."""
    for name, change in (("base", 0.0), ("tuned", 1.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}" if name == "base" else '{"model_type": "llama"}')
        save_file({f"{i}.w": torch.ones(50, 10) + change for i in range(3)}, tmp_path / name / "model.safetensors")
    if task == "recover":
        make(tmp_path / "base", tmp_path / "tuned", tmp_path / "diff")
    put, calls = writer.ShardWriter._put, []

    def full(self, part):
        calls.append(part)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")
        put(self, part)

    monkeypatch.setattr(writer.ShardWriter, "_put", full)
    with pytest.raises(UsageError, match="could not be written .*No space left on device"):
        if task == "recover":
            recover(tmp_path / "base", tmp_path / "diff", tmp_path / "result")
        else:
            make(tmp_path / "base", tmp_path / "tuned", tmp_path / "result")
    assert not list(tmp_path.glob("result*"))


def test_a_file_that_is_not_all_there_is_no_success(llama, tmp_path, monkeypatch):
    base, _, diff = llama
    monkeypatch.setattr(writer.ShardWriter, "_put", lambda self, part: self.file.write(part[: len(part) // 2]))
    with pytest.raises(UsageError, match="model.safetensors has .* bytes of"):
        recover(base, diff, tmp_path / "result")


def test_no_folder_but_its_own_is_deleted(llama, tmp_path, monkeypatch):
    """`X.replaced` is where --overwrite puts the old X for a moment; it may also be somebody's."""
    base, _, diff = llama
    theirs = tmp_path / "result.replaced"
    theirs.mkdir()
    (theirs / "thesis.txt").touch()
    recover(base, diff, tmp_path / "result")
    with pytest.raises(UsageError, match="result.replaced is in the way: the old folder would"):
        recover(base, diff, tmp_path / "result", overwrite=True)
    assert (theirs / "thesis.txt").exists()
    shutil.rmtree(theirs)
    (tmp_path / "result" / "main.c").touch()
    with pytest.raises(UsageError, match="holds main.c; delete it yourself"):
        recover(base, diff, tmp_path / "result", overwrite=True)
    (tmp_path / "result" / "main.c").unlink()
    rename, before = os.rename, (tmp_path / "result" / "model.safetensors").stat().st_ino

    def fails(source, target):
        if str(source).endswith(".incomplete"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(UsageError, match="Input/output error"):
        recover(base, diff, tmp_path / "result", overwrite=True)
    assert (tmp_path / "result" / "model.safetensors").stat().st_ino == before, "the old one is back"
    with pytest.raises(UsageError, match="expected a new folder"):
        recover(base, diff, "/")


def test_what_a_killed_process_left_is_cleared_but_nothing_else(llama, tmp_path):
    base, _, diff = llama
    left = tmp_path / "result.incomplete"
    left.mkdir()
    (left / "thesis.txt").touch()
    with pytest.raises(UsageError, match="holds files of yours; move it away"):
        recover(base, diff, tmp_path / "result")
    assert (left / "thesis.txt").exists()
    (left / MARKER).touch()
    recover(base, diff, tmp_path / "result")
    assert not left.exists()


def test_two_processes_do_not_write_one_folder(llama, tmp_path):
    base, _, diff = llama
    with new_folder(tmp_path / "result", 0, False, ()) as first:
        (first / "half").touch()
        with pytest.raises(UsageError, match="another process is writing .*result.incomplete"):
            recover(base, diff, tmp_path / "result")
        assert (first / "half").exists()
    assert (tmp_path / "result" / "half").exists()


def kill_at_random(command, target, draw) -> bool:
    """Start, kill at a random moment, and say whether `target` was there, which must then be whole."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(draw.uniform(0.0, 6.0))
    process.send_signal(signal.SIGKILL)
    process.wait()
    return target.exists()


@pytest.mark.stress
def test_a_kill_leaves_all_or_nothing(tmp_path):
    """Twenty kills while 200 MB are recovered, the next run always clearing up after the last."""
    generator = torch.Generator().manual_seed(0)
    state = {f"model.layers.{i}.w": torch.randn(1000, 5000, generator=generator) for i in range(10)}
    for name, change in (("base", 0.0), ("tuned", 1e-3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}" if name == "base" else '{"model_type": "llama"}')
        save_file({n: t + change for n, t in state.items()}, tmp_path / name / "model.safetensors")
    make(tmp_path / "base", tmp_path / "tuned", tmp_path / "diff")
    command = [
        sys.executable,
        "weight_diff.py",
        "recover",
        "--path_raw",
        tmp_path / "base",
        "--path_diff",
        tmp_path / "diff",
        "--path_tuned",
        tmp_path / "result",
    ]
    draw, finished, interrupted = random.Random(3), 0, 0
    for _ in range(20):
        interrupted += (tmp_path / "result.incomplete").exists()
        if kill_at_random([str(word) for word in command], tmp_path / "result", draw):
            finished += 1
            weight_diff.verify(str(tmp_path / "diff"), str(tmp_path / "result"))
            shutil.rmtree(tmp_path / "result")
    assert finished and interrupted, (finished, interrupted)
    run(command)
    assert not (tmp_path / "result.incomplete").exists()


# ---- the commands ----


def test_importing_weight_diff_loads_neither_train_nor_openai():
    assert not {"train", "openai", "transformers"} & loaded_by("import weight_diff")


@pytest.mark.parametrize(
    "words,message",
    [
        (["recovr"], "unknown task 'recovr'; did you mean recover?; expected one of: make_diff, recover, verify"),
        (["recover", "--path_rwa", "a"], "unknown flag --path_rwa; did you mean --path_raw?"),
        (["recover", "--path_raw", "a"], "recover needs --path_diff"),
        (["recover", "--path_raw", "a", "--path_diff", "b", "--test_inference", "perhaps"], "expected True or False"),
        (["recover", "--path_raw=a", "--path_diff=b", "--dtype", "int4"], "--dtype int4: expected one of float32, "),
        (["recover", "a", "b", "-c", "perhaps"], "--check_integrity_naively perhaps: expected True or False"),
        (["recover", "a", "b", "--path_tuned"], "--path_tuned: needs a value"),
        (["recover", "a", "b", "--max_shard_size", "5 potatoes"], "--max_shard_size 5 potatoes: expected a size"),
        (["make_diff", "a", "b", "c", "--method", "zip"], "--method zip: expected one of exact, float"),
        (["make_diff", "a", "b", "c", "d", "e", "f", "g", "h"], "expected a flag such as --path_raw, got 'h'"),
    ],
)
def test_a_misspelt_word_fails_before_work(monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["weight_diff.py", *words])
    with pytest.raises(UsageError) as error:
        weight_diff.main()
    assert message in str(error.value)


def test_flags_as_fire_reads_them(llama, tmp_path, monkeypatch, capsys):
    """Positional words, dashes, =, bare and negated flags; a path that looks like a number or a tuple is a path."""
    base, _, diff = llama
    monkeypatch.chdir(tmp_path)
    for words in (
        [str(base), str(diff), "--path-tuned", "2023"],
        [f"--path_raw={base}", "--path_diff", str(diff), "--path_tuned=a,b", "--nooverwrite"],
        ["--path_raw", str(base), "--path_diff", str(diff), "--path_tuned", "2023", "-o"],
    ):
        monkeypatch.setattr(sys, "argv", ["weight_diff.py", "recover", *words])
        weight_diff.main()
    assert (tmp_path / "2023" / "config.json").exists() and (tmp_path / "a,b" / "config.json").exists()


@pytest.mark.stress
def test_a_model_of_train_py_from_opt(tiny, tmp_path):
    """The story of the README: train, publish, recover, verify, ask."""
    train(
        {
            "model_name_or_path": tiny("opt"),
            "data_path": write_rows(tmp_path / "rows.json", 8),
            "output_dir": tmp_path / "tuned",
            "num_train_epochs": 1,
            "report_to": "none",
        }
    )
    command = [sys.executable, "weight_diff.py"]
    raw, tuned, diff, result = (f"--path_{name}" for name in ("raw", "tuned", "diff", "tuned"))
    made = run([*command, "make_diff", raw, tiny("opt"), tuned, tmp_path / "tuned", diff, tmp_path / "diff"])
    digest = made.stdout.split("digest of the manifest, to be published beside it: ")[1].split()[0]
    assert not {"alpaca_run.json", "trainer_state.json"} & {path.name for path in (tmp_path / "diff").iterdir()}
    told = run(
        [
            *command,
            "recover",
            raw,
            tiny("opt"),
            diff,
            tmp_path / "diff",
            result,
            tmp_path / "result",
            "--digest",
            digest,
            "--test_inference",
        ]
    )
    assert "Completion: " in told.stdout and "proved: " in told.stdout
    assert_same(tmp_path / "result", state_of(tmp_path / "tuned"))
    wrong = run([*command, "recover", raw, tmp_path / "tuned", diff, tmp_path / "diff"], check=False)
    assert wrong.returncode == 2 and "error: --path_raw" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.stress
def test_memory_does_not_grow_with_the_model(tmp_path):
    """A model of 400 MB takes no more than one of 4 MB, give or take a few buffers; mapped pages count."""
    peaks = []
    for number, columns in enumerate((100, 10000)):
        folder = tmp_path / str(number)
        state = {f"model.layers.{i}.w": torch.full((1000, columns), 0.5) for i in range(10)}
        for name, change in (("base", 0.0), ("tuned", 1e-3)):
            (folder / name).mkdir(parents=True)
            (folder / name / "config.json").write_text('{"model_type": "llama"}')
            save_file({n: t + change for n, t in state.items()}, folder / name / "model.safetensors")
        code = (
            "import sys, weight_diff; weight_diff.make_diff(*sys.argv[1:4]); "
            "weight_diff._recover(sys.argv[1], sys.argv[3], sys.argv[4]); "
            "print('PEAK', next(line for line in open('/proc/self/status') if 'VmHWM' in line).split()[1])"
        )
        paths = [folder / name for name in ("base", "tuned", "diff", "result")]
        told = run([sys.executable, "-c", code, *paths], env={"PYTHONPATH": str(ROOT)})
        peaks.append(int(told.stdout.split("PEAK ")[1]) / 1000)
    assert peaks[1] - peaks[0] < 120, peaks
