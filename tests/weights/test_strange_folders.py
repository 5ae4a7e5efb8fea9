"""Folders of strangers: whatever their JSON and headers say, there is a message or a result, and never a traceback;
a proof is of what lies in the folder at the end; no name leads out of a folder."""

import hashlib
import json
import os
import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import LLAMA, make_adapter
from support.checkpoints import make, recover, state_of, tune, write
from support.mutations import mutate_header, mutate_json

import weight_diff
from alpaca.common.errors import InputError, UsageError
from alpaca.common.files import fingerprint_of_files, new_folder, sha256_of_file
from alpaca.data.tokenizer import open_tokenizer
from alpaca.inference.load import LoadOptions, load_for_inference
from alpaca.weights.provenance import fingerprint_of_weights
from alpaca.weights.reader import FLOAT_DIFF, MODEL, folder_kind, last_norm, open_weights
from scripts.merge_lora import merge_lora


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """base, tuned (in shards), diff, plain (not compressed), float, adapter: one of each kind."""
    top, state = tmp_path_factory.mktemp("strangers"), state_of(tiny("llama"))
    write(top / "base", tiny("llama"), state)
    write(top / "tuned", tiny("llama"), tune(state, torch.float32), "shards")
    make(top / "base", top / "tuned", top / "diff", max_shard_size="60KB")
    make(top / "base", top / "tuned", top / "plain", compression="none")
    make(top / "base", top / "tuned", top / "float", method="float")
    make_adapter(top / "base", top / "adapter", **LLAMA)
    return top


@pytest.fixture
def here(folders, tmp_path):
    """The folders, to be changed."""
    shutil.copytree(folders, tmp_path / "top")
    return tmp_path / "top"


def publish(diff, change) -> None:
    """Change the manifest of a diff as its publisher could."""
    manifest = json.loads((diff / "weight_diff.json").read_text())
    change(manifest)
    text = json.dumps(manifest)
    (diff / "weight_diff.json").write_text(text)
    (diff / "weight_diff.json.sha256").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  weight_diff.json\n")


def entry_of(path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


# ---- fuzz ----

CPU = LoadOptions("cpu", torch.float32)
ACTS = {
    "recover": lambda top: recover(top / "base", top / "diff", top / "result"),
    "recover a plain one": lambda top: recover(top / "base", top / "plain", top / "result"),
    "recover of 2023": lambda top: recover(top / "base", top / "float", top / "result"),
    "verify": lambda top: weight_diff.verify(str(top / "diff"), str(top / "tuned")),
    "make_diff": lambda top: make(top / "base", top / "tuned", top / "result"),
    "merge_lora": lambda top: merge_lora(str(top / "adapter"), str(top / "result"), base=str(top / "base")),
    "open a model": lambda top: load_for_inference(top / "tuned", None, CPU),
    "open an adapter": lambda top: load_for_inference(top / "adapter", top / "base", CPU),
    "open a diff": lambda top: load_for_inference(top / "diff", top / "base", CPU),
}
FILES = {
    "recover": ["diff/weight_diff.json", "diff/tuned_config.json", "base/config.json", "diff/*.safetensors"],
    "recover a plain one": ["plain/weight_diff.json", "plain/tuned_config.json", "plain/*.safetensors"],
    "recover of 2023": [
        "float/config.json",
        "float/tokenizer_config.json",
        "base/*.safetensors",
        "base/tokenizer.json",
    ],
    "verify": ["diff/weight_diff.json", "tuned/*.index.json", "tuned/*.safetensors"],
    "make_diff": ["tuned/*.index.json", "tuned/config.json", "base/*.safetensors", "tuned/tokenizer_config.json"],
    "merge_lora": ["adapter/adapter_config.json", "base/config.json", "adapter/*.safetensors", "base/tokenizer.json"],
    "open a model": [
        "tuned/config.json",
        "tuned/*.index.json",
        "tuned/tokenizer*.json",
        "tuned/generation_config.json",
    ],
    "open an adapter": ["adapter/adapter_config.json", "base/config.json", "adapter/*.safetensors"],
    "open a diff": ["diff/weight_diff.json", "diff/tuned_config.json", "diff/tokenizer*.json"],
}


def try_mutations(here, folders, seeds) -> None:
    for seed in seeds:
        for act, patterns in FILES.items():
            draw = random.Random(f"{act} {seed}")
            path = draw.choice(sorted(here.glob(draw.choice(patterns))) or [here / "base" / "config.json"])
            (mutate_header if path.suffix == ".safetensors" else mutate_json)(path, draw)
            for diff in (here / "diff", here / "plain"):
                publish_again(diff)
            try:
                with suppress(UsageError):
                    ACTS[act](here)
            except Exception as error:
                raise AssertionError(f"{act}, seed {seed}, {path.name}: {error!r}") from error
            shutil.rmtree(here)
            shutil.copytree(folders, here)


def publish_again(diff) -> None:
    """Make the manifest's own digest right, as its publisher would."""
    digest = hashlib.sha256((diff / "weight_diff.json").read_bytes()).hexdigest()
    (diff / "weight_diff.json.sha256").write_text(f"{digest}  weight_diff.json\n")


@pytest.mark.slow
def test_mutations_end_in_a_message_or_a_result(here, folders):
    try_mutations(here, folders, range(2))


@pytest.mark.stress
@pytest.mark.parametrize("part", range(5))
def test_many_mutations_end_in_a_message_or_a_result(here, folders, part):
    try_mutations(here, folders, range(10 + 10 * part, 20 + 10 * part))


# ---- a proof ----


@pytest.mark.parametrize(
    "name, content",
    [
        ("model.safetensors", b"other weights"),
        ("Model-00001-of-00002.safetensors", b"other weights"),
        ("model.safetensors.index.json", b'{"weight_map": {}}'),
        ("pytorch_model.bin", b"PK"),
        ("adapter_config.json", b"{}"),
        ("ADAPTER_CONFIG.json", b"{}"),
        ("modeling_x.py", b"print('evil')"),
        ("tokenizer.pkl", b"\x80\x04."),
        ("training_args.bin", b"PK"),
        ("extra_config.json", b'{"auto_map": {"AutoConfig": "x.X"}}'),
        ("alpaca_run.json", b"{}"),
        (".hidden.json", b"{}"),
    ],
)
def test_a_manifest_lists_nothing_that_would_change_what_it_proves(here, name, content):
    diff = here / "diff"
    (diff / name).write_bytes(content)
    publish(diff, lambda manifest: manifest["files"].update({name: entry_of(diff / name)}))
    with pytest.raises(UsageError, match="is not copied|is not recovered|of a diff's weights|is a LoRA adapter"):
        recover(here / "base", diff, here / "result")
    assert not (here / "result").exists()


def test_weights_that_are_listed_as_a_file_of_the_diff_s_weights(here):
    diff = here / "diff"
    shutil.copy(here / "base" / "model.safetensors", diff / "model.safetensors")
    header = (diff / "model.safetensors").read_bytes()
    header = header[: 8 + int.from_bytes(header[:8], "little")]
    entry = entry_of(diff / "model.safetensors") | {"header_sha256": hashlib.sha256(header).hexdigest()}
    publish(diff, lambda manifest: manifest["files"].update({"model.safetensors": entry}))
    with pytest.raises(UsageError, match="is no file of a diff's weights"):
        recover(here / "base", diff, here / "result")


def test_code_named_by_the_tuned_configuration(here):
    config = json.loads((here / "diff" / "tuned_config.json").read_text()) | {"auto_map": {"AutoConfig": "a/b--c.C"}}
    (here / "diff" / "tuned_config.json").write_text(json.dumps(config))
    entry = entry_of(here / "diff" / "tuned_config.json")
    publish(here / "diff", lambda manifest: manifest["files"].update({"tuned_config.json": entry}))
    with pytest.raises(UsageError, match="names code of its own"):
        recover(here / "base", here / "diff", here / "result")


def test_what_is_proved_is_what_lies_in_the_folder(here, monkeypatch):
    """A copy that goes wrong after the weights were proved, and a file that a stranger changes meanwhile."""

    def copy(base, folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")

    monkeypatch.setattr(weight_diff, "copy_slow_files", copy)
    with pytest.raises(UsageError, match="1 of .* tensors are not those of the manifest"):
        recover(here / "base", here / "diff", here / "result")
    changing = lambda base, folder: (folder / "tokenizer_config.json").write_text("{}")  # noqa: E731
    monkeypatch.setattr(weight_diff, "copy_slow_files", changing)
    with pytest.raises(UsageError, match="tokenizer_config.json is missing or changed"):
        recover(here / "base", here / "diff", here / "result")
    assert not (here / "result").exists()


def test_verify_refuses_an_adapter_beside_the_weights(here):
    recover(here / "base", here / "diff", here / "result")
    (here / "result" / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="adapter_config.json makes another model of them"):
        weight_diff.verify(str(here / "diff"), str(here / "result"))


@pytest.mark.parametrize("name", ["modeling_x.py", "adapter_config.json"])
def test_a_diff_of_2023_brings_no_code_and_no_adapter(here, name):
    (here / "float" / name).write_text("{}")
    with pytest.raises(UsageError, match="is not copied"):
        recover(here / "base", here / "float", here / "result")


# ---- names that lead out of a folder ----


@pytest.mark.parametrize("name", ["../base/model.safetensors", "/etc/hostname", "sub/x.safetensors", "..", "", 7, None])
def test_an_index_names_files_of_its_folder(here, name):
    index = here / "tuned" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"] = dict.fromkeys(listed["weight_map"], name)
    index.write_text(json.dumps(listed))
    with pytest.raises(UsageError, match="outside its folder|no table of files"):
        open_weights(here / "tuned")
    with pytest.raises(UsageError, match="outside its folder|no table of files"):
        load_for_inference(here / "tuned", None, CPU)


@pytest.mark.parametrize(
    "folder, name", [("diff", "tokenizer_config.json"), ("float", "config.json"), ("tuned", "generation_config.json")]
)
def test_a_link_out_of_the_folder(here, folder, name):
    secret = here / "secret.json"
    (here / folder / name).rename(secret)
    os.symlink(secret, here / folder / name)
    act = {"diff": "recover", "float": "recover of 2023", "tuned": "make_diff"}[folder]
    with pytest.raises(UsageError, match="is a link to a file outside its folder"):
        ACTS[act](here)
    assert not (here / "result").exists()


def test_an_adapter_whose_weights_are_a_link(here):
    path = here / "adapter" / "adapter_model.safetensors"
    path.rename(here / "elsewhere.safetensors")
    os.symlink(here / "elsewhere.safetensors", path)
    for act in ("merge_lora", "open an adapter"):
        with pytest.raises(UsageError, match="is a link to a file outside its folder"):
            ACTS[act](here)


def test_links_of_the_hub_s_cache_are_files(here):
    cache = here / "cache"
    (cache / "blobs").mkdir(parents=True)
    shutil.move(here / "tuned", cache / "snapshots" / "abc")
    for number, path in enumerate((cache / "snapshots" / "abc").iterdir()):
        path.rename(cache / "blobs" / str(number))
        os.symlink(f"../../blobs/{number}", path)
    make(here / "base", cache / "snapshots" / "abc", here / "result")


# ---- headers that lie ----


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [-16, 0]},
        {"dtype": ["F32"], "shape": [2, 2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 16, 32]},
        "F32",
    ],
    ids=str,
)
def test_a_header_that_lies(tmp_path, entry):
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(UsageError, match="is damaged|truncated or damaged|cannot be differenced"):
        open_weights(tmp_path)


def test_two_tensors_of_the_same_bytes(tmp_path):
    """And two of the same name: readers would not agree about which it is."""
    one = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    for header in (json.dumps({"a": one, "b": one}), f'{{"a": {json.dumps(one)}, "a": {json.dumps(one)}}}'):
        data = header.encode()
        (tmp_path / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data + bytes(32))
        with pytest.raises(UsageError, match="truncated or damaged"):
            open_weights(tmp_path)


# ---- norms near zero ----


@pytest.mark.parametrize(
    "kind, expected",
    [("gemma", MODEL), ("gemma2", MODEL), ("gemma3_text", MODEL), ("qwen3_next", MODEL), ("llama", FLOAT_DIFF)],
)
def test_norms_of_one_plus_weight_are_no_sign_of_a_diff(tmp_path, kind, expected):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    save_file({"model.norm.weight": torch.full((8,), 0.01)}, tmp_path / "model.safetensors")
    with open_weights(tmp_path) as weights:
        assert folder_kind(tmp_path, weights) == expected
    save_file({"model.norm.weight": torch.full((8,), 7.0)}, tmp_path / "model.safetensors")
    with open_weights(tmp_path) as weights:
        assert folder_kind(tmp_path, weights) == MODEL and last_norm(weights)[1] == 7.0
    assert load_file(tmp_path / "model.safetensors")


# ---- files that may not be read ----


@pytest.mark.parametrize("file", ["tokenizer.model", "special_tokens_map.json", "README.md"])
def test_a_file_of_an_input_that_cannot_be_read_is_not_the_outputs_fault(tmp_path, file):
    denied = PermissionError(13, "Permission denied", str(tmp_path / "model" / file))
    with pytest.raises(InputError, match=rf"model/{file}: cannot be read \(Permission denied\)") as caught:
        with new_folder(tmp_path / "out", 0, False, (tmp_path / "base", tmp_path / "model")):
            raise denied
    assert caught.value.about == str(tmp_path / "model") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizer_that_cannot_be_read(tiny, tmp_path, monkeypatch, file):
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    (folder / file).touch()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != file)  # root may read all
    with pytest.raises(InputError, match=rf"{file}: cannot be read \(Permission denied\)"):
        open_tokenizer(str(folder))


@pytest.mark.parametrize("setting", [dict(r=0), dict(lora_alpha="nan"), dict(bias="evil"), dict(rank_pattern=[1])])
def test_an_adapter_config_that_cannot_be_used_is_not_the_bases_fault(tiny, tmp_path, setting):
    folder = make_adapter(tiny("llama"), tmp_path / "adapter", **LLAMA)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(InputError, match="adapter_config.json cannot be (used|read)"):
        load_for_inference(folder, tiny("llama"), LoadOptions("cpu", torch.float32))


@pytest.mark.parametrize("hashed", [sha256_of_file, lambda path: fingerprint_of_files([path]), fingerprint_of_weights])
def test_a_file_that_cannot_be_hashed(tmp_path, hashed):
    path = tmp_path / "model.safetensors"
    path.mkdir()  # root may read every file
    with pytest.raises(InputError, match="cannot be read .*Is a directory"):
        hashed(tmp_path if hashed is fingerprint_of_weights else path)
