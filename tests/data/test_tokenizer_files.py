"""What a folder leaves unstated is read as in 2023, and the slow tokenizer's files go with what is saved."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import tokenizers
from conftest import GOLDEN, ROOT, train, write_rows
from support.adapters import LLAMA, make_adapter
from support.arguments import arguments

from alpaca.data.tokenizer import copy_slow_files, open_tokenizer, save_slow_files, slow_files, to_save
from alpaca.models.load import base_slow_files, load_tokenizer
from scripts.make_tiny_model import own_text
from scripts.merge_lora import merge_lora
from weight_diff import make_diff, recover, verify

ENDOFTEXT, PADDING = "<|endoftext|>", "<|padding|>"
TEXTS = ["", "a b", "é早🙂\t1 23\n", "Hi [PAD]", "end.</s>", *own_text()[:20]]


def byte_level(folder: Path, special: list[str], model_type: str, whole: bool = True, **files: dict) -> Path:
    """A byte-level tokenizer's folder with config.json and the JSON `files`: a tokenizer.json that transformers 4.28.1
    reads too (`whole`), or vocab.json and merges.txt."""
    folder.mkdir()
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(own_text()[:50], vocab_size=400, special_tokens=special, show_progress=False)
    if whole:
        state = json.loads(tokenizer.to_str())
        state["model"].pop("ignore_merges")
        state["model"]["merges"] = [" ".join(merge) for merge in state["model"]["merges"]]
        (folder / "tokenizer.json").write_text(json.dumps(state))
    else:
        tokenizer.save_model(str(folder))
    for name, content in {"config": dict(model_type=model_type), **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def sentencepiece(folder: Path, model_type: str, **files: dict) -> Path:
    folder.mkdir()
    shutil.copy(GOLDEN / "labels" / "llama" / "tokenizer.model", folder)
    for name, content in {"config": dict(model_type=model_type), **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


NEOX, BLOOM = [ENDOFTEXT, PADDING], ["<unk>", "<s>", "</s>", "<pad>"]
FAST = {"tokenizer_class": "GPTNeoXTokenizerFast"}
UNSTATED = {  # how to make it, and bos, eos, unk, pad as transformers 4.28.1 opens it
    "gpt_neox": (lambda to: byte_level(to, NEOX, "gpt_neox"), [ENDOFTEXT] * 3 + [None]),
    "gpt_neox class": (lambda to: byte_level(to, NEOX, "gpt_neox", tokenizer_config=FAST), [ENDOFTEXT] * 3 + [None]),
    "gpt_neox that states one": (
        lambda to: byte_level(to, NEOX, "gpt_neox", tokenizer_config={**FAST, "pad_token": PADDING}),
        [ENDOFTEXT] * 3 + [PADDING],
    ),
    "gpt_neox, special_tokens_map.json": (
        lambda to: byte_level(
            to, NEOX, "gpt_neox", tokenizer_config=FAST, special_tokens_map={"pad_token": {"content": PADDING}}
        ),
        [ENDOFTEXT] * 3 + [PADDING],
    ),
    "no class of its own": (
        lambda to: byte_level(to, NEOX, "gpt_neox", tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"}),
        [None] * 4,
    ),
    "bloom": (lambda to: byte_level(to, BLOOM, "bloom"), ["<s>", "</s>", "<unk>", "<pad>"]),
    "bloom class": (
        lambda to: byte_level(to, BLOOM, "bloom", tokenizer_config={"tokenizer_class": "BloomTokenizerFast"}),
        ["<s>", "</s>", "<unk>", "<pad>"],
    ),
    "gpt_bigcode": (
        lambda to: byte_level(to, NEOX, "gpt_bigcode", tokenizer_config={"tokenizer_class": "GPT2TokenizerFast"}),
        [ENDOFTEXT] * 3 + [None],
    ),
    "gpt2, slow": (lambda to: byte_level(to, NEOX, "gpt2", False), [ENDOFTEXT] * 3 + [None]),
    "llama": (lambda to: sentencepiece(to, "llama"), ["<s>", "</s>", "<unk>", None]),
    "llama, empty": (lambda to: sentencepiece(to, "llama", tokenizer_config={}), ["<s>", "</s>", "<unk>", None]),
    "llama class": (
        lambda to: sentencepiece(to, "llama", tokenizer_config={"tokenizer_class": "LlamaTokenizer"}),
        ["<s>", "</s>", "<unk>", None],
    ),
    "mistral": (
        lambda to: sentencepiece(to, "mistral", tokenizer_config={"tokenizer_class": "LlamaTokenizer"}),
        ["<s>", "</s>", "<unk>", None],
    ),
    "llama, special_tokens_map.json": (
        lambda to: sentencepiece(to, "llama", special_tokens_map={"pad_token": "<unk>"}),
        ["<s>", "</s>", "<unk>", "<unk>"],
    ),
}


def special_tokens(tokenizer) -> list:
    return [getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "unk", "pad")]


@pytest.mark.parametrize("name", UNSTATED)
def test_what_a_folder_leaves_unstated_is_read_as_in_2023(tmp_path, name):
    make, expected = UNSTATED[name]
    tokenizer = open_tokenizer(str(make(tmp_path / "base")))
    assert special_tokens(tokenizer) == expected
    if name.startswith(("llama", "mistral")):
        golden = open_tokenizer(str(GOLDEN / "labels" / "llama"))
        assert [tokenizer(text)["input_ids"] for text in TEXTS] == [golden(text)["input_ids"] for text in TEXTS]
    tokenizer.save_pretrained(tmp_path / "saved")
    assert special_tokens(open_tokenizer(str(tmp_path / "saved"))) == expected


def test_one_line_says_which_token_transformers_would_take(tmp_path, capsys):
    base = byte_level(tmp_path / "base", NEOX, "gpt_neox", tokenizer_config=FAST)
    tokenizer, added = load_tokenizer(*arguments(tmp_path, base))
    assert (tokenizer.pad_token, added) == ("[PAD]", 1)
    line = (
        f"note: {base} states no pad_token -> [PAD]; as in 2023, the default of transformers 5 ({PADDING}) is not taken"
    )
    assert line in capsys.readouterr().out
    tokenizer, added = load_tokenizer(*arguments(tmp_path, base, pad_token=PADDING))
    assert (tokenizer.pad_token, added) == (PADDING, 0) and "states no" not in capsys.readouterr().out
    load_tokenizer(*arguments(tmp_path, GOLDEN / "labels" / "llama"))
    assert "states no" not in capsys.readouterr().out


@pytest.mark.parametrize("add_bos", [True, False])
def test_the_tokens_around_a_text_survive_saving(tmp_path, add_bos):
    stated = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": add_bos, "add_eos_token": not add_bos}
    tokenizer = open_tokenizer(str(sentencepiece(tmp_path / "base", "llama", tokenizer_config=stated)))
    tokenizer.save_pretrained(tmp_path / "saved")
    assert open_tokenizer(str(tmp_path / "saved"))("a")["input_ids"] == tokenizer("a")["input_ids"]
    save_slow_files(tokenizer, slow_of(tokenizer, tmp_path / "base"), tmp_path / "saved")
    assert (
        json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text()).items()
        >= {
            **stated,
            "add_bos_token": add_bos,
        }.items()
    )
    for _ in range(2):  # with tokenizer.json, and from tokenizer.model alone
        assert open_tokenizer(str(tmp_path / "saved"))("a")["input_ids"] == tokenizer("a")["input_ids"]
        (tmp_path / "saved" / "tokenizer.json").unlink(missing_ok=True)


def slow_of(tokenizer, base) -> dict[str, bytes]:
    return slow_files(str(base), json.loads(tokenizer.backend_tokenizer.to_str()))


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_slow_files_say_what_tokenizer_json_says(tiny, tmp_path, architecture):
    base, out = tiny(architecture), tmp_path / "out"
    model_args, training_args = arguments(tmp_path, base)
    tokenizer, added = load_tokenizer(model_args, training_args)
    files = base_slow_files(tokenizer, training_args)
    to_save(tokenizer).save_pretrained(out)
    save_slow_files(tokenizer, files, out)
    names = ["tokenizer.model"] if architecture == "llama" else ["vocab.json", "merges.txt"]
    assert sorted(files) == sorted(names + ["added_tokens.json"] * added)
    assert all((out / name).read_bytes() == (Path(base) / name).read_bytes() for name in names)
    if added:
        assert json.loads((out / "added_tokens.json").read_text()) == {"[PAD]": len(tokenizer) - 1}
    expected = [tokenizer(text)["input_ids"] for text in TEXTS]
    for _ in range(2):  # with tokenizer.json, and from the slow files alone
        again = open_tokenizer(str(out))
        assert [again(text)["input_ids"] for text in TEXTS] == expected and len(again) == len(tokenizer)
        assert special_tokens(again) == special_tokens(tokenizer)
        (out / "tokenizer.json").unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"lora_r": 2, "lora_target_modules": "q_proj"}], ids=["full", "lora"])
def test_a_run_saves_them_with_every_model(tiny, tmp_path, flags):
    out = tmp_path / "out"
    run = dict(
        model_name_or_path=tiny("llama"),
        data_path=write_rows(tmp_path / "rows.json", 8),
        output_dir=out,
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
    )
    train({**run, **flags})
    for folder in (out, out / "checkpoint-1"):
        assert (folder / "tokenizer.model").read_bytes() == (Path(tiny("llama")) / "tokenizer.model").read_bytes()
        assert (folder / "added_tokens.json").is_file() == (not flags)
        assert json.loads((folder / "tokenizer_config.json").read_text())["add_bos_token"] is True
    if flags:
        merge_lora(str(out), str(tmp_path / "merged"))
        assert (tmp_path / "merged" / "tokenizer.model").is_file()


def test_merge_lora_and_recover_add_them(tiny, tmp_path):
    """To an adapter and a tuned model that others have saved, with a tokenizer.json alone."""
    base = tiny("llama")
    tokenizer = open_tokenizer(base)
    rows = [len(tokenizer)]
    adapter = make_adapter(base, tmp_path / "adapter", 1, **LLAMA, trainable_token_indices=rows)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(adapter)
    merge_lora(str(adapter), str(tmp_path / "merged"))
    assert json.loads((tmp_path / "merged" / "added_tokens.json").read_text()) == {"[PAD]": rows[0]}
    tuned = shutil.copytree(tmp_path / "merged", tmp_path / "tuned")
    for name in ("tokenizer.model", "added_tokens.json"):
        (tuned / name).unlink()
    make_diff(base, str(tuned), str(tmp_path / "diff"))
    recover(base, str(tmp_path / "diff"), str(tmp_path / "recovered"))
    verify(str(tmp_path / "diff"), str(tmp_path / "recovered"))
    for folder in ("merged", "recovered"):
        assert (tmp_path / folder / "tokenizer.model").read_bytes() == (Path(base) / "tokenizer.model").read_bytes()
        assert (tmp_path / folder / "added_tokens.json").is_file()
        again = open_tokenizer(str(tmp_path / folder))
        assert [again(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]


def other_pieces(base: Path, out: Path) -> str:
    vocab = json.loads((base / "vocab.json").read_text())
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (base / "vocab.json").write_text(json.dumps(vocab))
    return "which has the id"


def other_merges(base: Path, out: Path) -> str:
    lines = (base / "merges.txt").read_text().splitlines()
    (base / "merges.txt").write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]))
    return "merges.txt has other merges than the tokenizer"


def a_gap(base: Path, out: Path) -> str:
    state = json.loads((out / "tokenizer.json").read_text())
    state["added_tokens"].append({**state["added_tokens"][0], "id": 5000, "content": "[X]"})
    (out / "tokenizer.json").write_text(json.dumps(state))
    return "the ids of added tokens do not follow those of vocab.json"


def not_sentencepiece(base: Path, out: Path) -> str:
    (base / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    return "tokenizer.model is not a sentencepiece model"


def stale_added_tokens(base: Path, out: Path) -> str:
    (out / "added_tokens.json").write_text('{"[OTHER]": 7}')
    return "added_tokens.json has other tokens than tokenizer.json"


@pytest.mark.parametrize("spoil", [other_pieces, other_merges, a_gap, not_sentencepiece, stale_added_tokens])
def test_files_that_contradict_the_tokenizer_are_left_out(tiny, tmp_path, capsys, spoil):
    base, out = shutil.copytree(tiny("gpt2"), tmp_path / "base"), tmp_path / "out"
    open_tokenizer(str(base)).save_pretrained(out)
    reason = spoil(base, out)
    before = sorted(path.name for path in out.iterdir())
    copy_slow_files(base, out)
    line = capsys.readouterr().out
    assert line.startswith(f"note: the slow tokenizer's files of {base} are left out: ") and reason in line
    assert sorted(path.name for path in out.iterdir()) == before


PYTHON_2023, CODE_2023 = os.environ.get("ALPACA_2023_PYTHON"), os.environ.get("ALPACA_2023_CODE")
READ_IN_2023 = """
import json, sys, types
import torch, transformers, train
job, found = json.load(open(sys.argv[1])), {}
for folder in job["folders"]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, use_fast=False)
    special = [getattr(tokenizer, name + "_token") for name in ("bos", "eos", "unk", "pad")]
    found[folder] = [special, [tokenizer(text).input_ids for text in job["texts"]]]
for folder in job["trained"]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, use_fast=False)
    module = train.make_supervised_data_module(tokenizer, types.SimpleNamespace(data_path=job["rows"]))
    batch = module["data_collator"]([module["train_dataset"][i] for i in range(4)])
    found[folder].append({name: [str(value.dtype), value.tolist()] for name, value in batch.items()})
print(json.dumps(found))
"""


@pytest.mark.stress
@pytest.mark.skipif(not (PYTHON_2023 and CODE_2023), reason="ALPACA_2023_PYTHON and ALPACA_2023_CODE are not set")
def test_the_2023_code_reads_what_we_write_and_opens_folders_as_we_do(tiny, tmp_path):
    """ALPACA_2023_PYTHON: an interpreter with transformers 4.28.1; ALPACA_2023_CODE: the original repository."""
    from train import DataArguments, make_supervised_data_module

    rows, trained = write_rows(tmp_path / "rows.json", 8), []
    for name, flags in dict(llama={}, opt={}, gpt2={}, lora=dict(lora_r=2, lora_target_modules="q_proj")).items():
        base = tiny("llama" if name == "lora" else name)
        run = dict(
            model_name_or_path=base,
            data_path=rows,
            output_dir=tmp_path / name,
            max_steps=1,
            use_cpu=True,
            per_device_train_batch_size=2,
            save_strategy="no",
            report_to="none",
        )
        train({**run, **flags})
        trained.append(str(tmp_path / name))
    merge_lora(trained[-1], str(tmp_path / "merged"))
    trained.append(str(tmp_path / "merged"))
    unstated = [make(tmp_path / f"unstated {name}") for name, (make, _) in UNSTATED.items()]
    job = dict(folders=[*trained, *map(str, unstated)], trained=trained, rows=rows, texts=TEXTS)
    (tmp_path / "job.json").write_text(json.dumps(job))
    environment = {**os.environ, "PYTHONPATH": CODE_2023, "OPENAI_API_KEY": "none", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [PYTHON_2023, "-c", READ_IN_2023, str(tmp_path / "job.json")],
        cwd=ROOT.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for folder, (special, ids, *batch) in json.loads(result.stdout.splitlines()[-1]).items():
        tokenizer = open_tokenizer(folder)
        assert special == special_tokens(tokenizer), folder
        assert ids == [tokenizer(text)["input_ids"] for text in TEXTS], folder
        if batch:
            module = make_supervised_data_module(tokenizer, DataArguments(rows))
            found = module["data_collator"]([module["train_dataset"][i] for i in range(4)])
            assert {name: [str(value.dtype), value.tolist()] for name, value in found.items()} == batch[0], folder
