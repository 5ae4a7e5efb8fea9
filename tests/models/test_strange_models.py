"""Code of strangers: none is run, none is fetched, nothing is asked on stdin. And tokenizers whose ids have a gap."""

import ast
import builtins
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT, train, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alpaca.common.errors import UsageError
from alpaca.data.prompts import format_prompt, load_prompt_template, templates_of
from alpaca.data.tokenizer import open_config, open_tokenizer
from alpaca.inference.load import LoadOptions, load_for_inference
from alpaca.models.embeddings import vocabulary_size
from alpaca.models.fsdp import plain_pickles
from alpaca.models.load import load_config
from scripts.merge_lora import merge_lora

SOURCES = [path for top in ("", "alpaca/*/", "scripts/", "benchmarks/") for path in ROOT.glob(f"{top}*.py")]
CPU = LoadOptions("cpu", torch.float32)
EVIL = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nPath({marker!r}).touch()\n"


# ---- code beside a model ----

LOADERS = ("from_pretrained", "from_config", "HFLM", "VLLM")
WITHOUT_CODE = ("LlamaConfig",)  # classes whose from_pretrained knows no code


def name_of(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def careless(source: str) -> list[int]:
    """Return the lines of a source that load a model or part of it without `trust_remote_code=False`."""
    tree, lines = ast.parse(source), []
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and name_of(node.func) in LOADERS:
            given = {word.arg: word.value for word in node.keywords}.get("trust_remote_code")
            if not (isinstance(given, ast.Constant) and given.value is False):
                lines.append(node.lineno)
        elif isinstance(node, ast.Attribute) and node.attr in LOADERS and id(node) not in called:
            lines.append(node.lineno)  # handed on, to be called elsewhere
    return lines


def test_every_loader_says_that_no_code_is_run():
    assert {path.name for path in SOURCES} >= {"train.py", "utils.py", "weight_diff.py", "load.py", "quickstart.py"}
    assert not {str(path): lines for path in SOURCES if (lines := careless(path.read_text()))}


@pytest.mark.parametrize(
    "line",
    ["AutoModel.from_pretrained(x)", "AutoConfig.from_pretrained(x, trust_remote_code=flag)", "f = A.from_pretrained"],
)
def test_a_careless_loader_is_found(line):
    assert careless(line) == [1] and careless("A.from_pretrained(x, trust_remote_code=False)") == []


@pytest.fixture
def asks_nobody(monkeypatch):
    def ask(*_):
        raise AssertionError("a question on stdin")

    monkeypatch.setattr(builtins, "input", ask)


def with_code(folder: Path, file: str, **changes) -> Path:
    """Make `folder` a model with code of its own, as hub models have it. Return the file that the code would write."""
    (folder / "own.py").write_text(EVIL.format(marker=str(folder / "ran")))
    settings = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps(settings))
    return folder / "ran"


OWN = {name: f"own.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")}
CODE = {
    "configuration": ("config.json", dict(model_type="own", auto_map=OWN)),
    "configuration of another repository": (
        "config.json",
        dict(model_type="own", auto_map={name: f"x/y--{of}" for name, of in OWN.items()}),
    ),
    "a model class for a configuration that is known": ("config.json", dict(model_type="vit", auto_map=OWN)),
    "tokenizer": (
        "tokenizer_config.json",
        dict(tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": ["own.T", "own.T"]}),
    ),
}


@pytest.mark.parametrize("case", CODE)
def test_a_model_with_code_of_its_own_is_not_taken(tiny, tmp_path, asks_nobody, case):
    file, changes = CODE[case]
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    if case == "tokenizer":
        changes = changes | {}
        model = json.loads((folder / "config.json").read_text()) | {"model_type": "timm_wrapper"}
        (folder / "config.json").write_text(json.dumps(model))
        (folder / "tokenizer.json").write_text("{}")
    ran = with_code(folder, file, **changes)
    args = SimpleNamespace(cache_dir=None)
    for act in (
        lambda: load_for_inference(folder, None, CPU),
        lambda: (open_tokenizer(str(folder)), load_config(model_of(folder), args)),
    ):
        try:
            act()
        except UsageError as error:
            expected = ("code of its own", "could not be loaded", "no tokenizer could be loaded", "cannot")
            assert any(text in str(error) for text in expected)
        assert not ran.exists()
    if case.startswith("configuration"):
        for load in (open_config, lambda name: load_for_inference(name, None, CPU)):
            with pytest.raises(UsageError, match="brings code of its own, which would have to be run; such models are"):
                load(folder)


def model_of(folder) -> SimpleNamespace:
    return SimpleNamespace(model_name_or_path=str(folder), attn_implementation=None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "train.py",
        *(
            pytest.param(command, marks=pytest.mark.stress)
            for command in ("-m scripts.generate", "-m scripts.merge_lora", "weight_diff.py")
        ),
    ],
)
def test_nothing_is_asked(tiny, tmp_path, command):
    """An answer is waiting on stdin, as from `yes |`: whoever asks gets it, and runs the code."""
    from support.adapters import LLAMA, make_adapter

    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    adapter = make_adapter(folder, tmp_path / "adapter", **LLAMA)
    ran = with_code(folder, "config.json", model_type="own", auto_map=OWN)
    rows, out = write_rows(tmp_path / "rows.json", 4), tmp_path / "out"
    words = {
        "train.py": f"--model_name_or_path {folder} --data_path {rows} --output_dir {out} --use_cpu True",
        "-m scripts.generate": f"--model {folder} --data_path {rows} --output_path {out}",
        "-m scripts.merge_lora": f"--adapter {adapter} --base {folder} --output_dir {out}",
        "weight_diff.py": f"make_diff --path_raw {tiny('llama')} --path_tuned {folder} --path_diff {out}",
    }
    called = [sys.executable, *command.split(), *words[command].split()]
    result = subprocess.run(called, cwd=ROOT, input="y\n" * 1000, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and not ran.exists()
    assert "code of its own" in result.stderr and "Traceback" not in result.stderr
    assert "[y/N]" not in result.stdout + result.stderr


# ---- configurations that no model can be made of ----

BROKEN = {
    "rope": (dict(rope_scaling={"rope_type": "evil"}), "could not be loaded"),
    "no layers": (dict(num_hidden_layers=0), "says 0 layers; expected 1 to 1000"),
    "layers for hours": (dict(num_hidden_layers=5000), "says 5000 layers"),
    "heads": (dict(num_attention_heads=0), "could not be loaded"),
    "activation": (dict(hidden_act="evil"), "could not be loaded (KeyError('evil'))"),
    "dropout": (dict(attention_dropout=5.0), "attention_dropout 5.0; expected at least 0 and below 1"),
    "text_config": (dict(text_config={"model_type": "x"}), "its text_config is"),
    "quantized": (
        dict(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "is quantized, and such weights cannot be trained|pip install",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, dict(attn_implementation="eager")], ids=str)
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_configuration_is_a_message(tiny, tmp_path, case, flags):
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    changes, expected = BROKEN[case]
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))
    rows = write_rows(tmp_path / "rows.json", 4)
    result = train(
        dict(model_name_or_path=folder, data_path=rows, output_dir=tmp_path / "out", use_cpu=True, **flags), check=False
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert any(part in result.stderr for part in expected.split("|")), result.stderr[-500:]
    assert "--attn_implementation" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["../base/model.safetensors", "/tmp/model.safetensors", "..", 5, None])
def test_an_index_names_files_of_its_folder_only(tiny, tmp_path, name):
    shutil.copytree(tiny("llama"), tmp_path / "base")
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    names = dict.fromkeys(load_file(folder / "model.safetensors"), name)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    rows = write_rows(tmp_path / "rows.json", 4)
    flags = dict(model_name_or_path=folder, data_path=rows, output_dir=tmp_path / "out", use_cpu=True)
    result = train(flags, check=False)
    assert result.returncode == 2 and "names a file outside its folder" in result.stderr


def test_merging_into_a_base_with_code(tiny, tmp_path, asks_nobody):
    from support.adapters import LLAMA, make_adapter

    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    adapter = make_adapter(folder, tmp_path / "adapter", **LLAMA)
    ran = with_code(folder, "config.json", model_type="own", auto_map=OWN)
    with pytest.raises(UsageError, match="brings code of its own"):
        merge_lora(str(adapter), str(tmp_path / "merged"), base=str(folder))
    assert not ran.exists()


def test_a_known_model_runs_transformers_own_code(tiny, tmp_path, asks_nobody):
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    ran = with_code(folder, "config.json", auto_map=OWN)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(EVIL.format(marker=str(ran)))
    model = load_for_inference(folder, None, CPU).model
    assert type(model).__module__.startswith("transformers.")
    model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2)
    assert not ran.exists()


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize(
    "kernel", ["evil/kernel", "kernels-community/flash-attn", "evil/kernel@main:attend", "flash_attention_3"]
)
def test_attention_kernels_are_not_fetched(tiny, tmp_path, capsys, key, kernel):
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text()) | {key: kernel}
    (folder / "config.json").write_text(json.dumps(settings))
    model = load_for_inference(folder, None, CPU).model
    assert model.config._attn_implementation == "sdpa"
    assert f"names the attention kernel {kernel}, which is not fetched" in capsys.readouterr().out


# ---- templates ----


@pytest.mark.parametrize(
    "field",
    [
        "{instruction:>300000000}",
        "{instruction.__class__}",
        "{instruction[0]}",
        "{instruction!r}",
        "{instruction:{input}}",
        "{0}",
        "{}",
        "{instruction.__init__.__globals__}",
        "{instruction",
    ],
)
def test_templates_have_plain_placeholders_only(tmp_path, field):
    templates = {"prompt_input": f"{{input}} {field}", "prompt_no_input": f"{{instruction}} {field}"}
    (tmp_path / "prompt_template.json").write_text(json.dumps(templates))
    for read in (lambda: templates_of(tmp_path), lambda: load_prompt_template(tmp_path / "prompt_template.json")):
        with pytest.raises(UsageError, match="plain placeholders|brace is written twice"):
            read()
    with pytest.raises(UsageError, match="plain placeholders|brace is written twice"):
        format_prompt({"instruction": "a", "input": "b"}, templates)


def test_braces_in_a_row_stay(tmp_path):
    assert format_prompt({"instruction": "{x:>9} {0}", "input": ""}).count("{x:>9} {0}") == 1
    long = {"prompt_input": "{instruction}{input}" * 10_000, "prompt_no_input": "{instruction}"}
    (tmp_path / "t.json").write_text(json.dumps(long))
    with pytest.raises(UsageError, match="200,000 characters; expected at most 100,000"):
        load_prompt_template(tmp_path / "t.json")


# ---- pickles of a checkpoint ----


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def sharded(folder: Path) -> dict:
    state = {"a": torch.arange(6.0).bfloat16(), "step": torch.tensor(3.0), "lr": 1e-3, "betas": (0.9, 0.99), "n": None}
    dcp.save({"optimizer": state}, checkpoint_id=folder)
    return state


def read_shards(folder: Path) -> dict:
    found = {"optimizer": {"a": torch.zeros(6).bfloat16(), "step": torch.tensor(0.0), "lr": 0, "betas": 0, "n": 1}}
    with plain_pickles():
        dcp.load(found, storage_reader=dcp.FileSystemReader(folder))
    return found["optimizer"]


def test_shards_of_our_own_are_read(tmp_path):
    state = sharded(tmp_path / "s")
    found = read_shards(tmp_path / "s")
    assert torch.equal(found["a"], state["a"]) and {**found, "a": 0, "step": 0} == {**state, "a": 0, "step": 0}


@pytest.mark.parametrize("where", ["metadata", "inside metadata", "bytes of a shard", "torn"])
def test_shards_of_a_stranger_run_nothing(tmp_path, where):
    sharded(tmp_path / "s")
    path, ran = tmp_path / "s" / ".metadata", tmp_path / "ran"
    metadata = pickle.loads(path.read_bytes())
    if where == "metadata":
        path.write_bytes(pickle.dumps(Evil(ran)))
    elif where == "inside metadata":
        metadata.planner_data = Evil(ran)
        path.write_bytes(pickle.dumps(metadata))
    elif where == "torn":
        path.write_bytes(path.read_bytes()[:20])
    else:
        dcp.save({"optimizer": sharded(tmp_path / "t") | {"lr": Evil(ran)}}, checkpoint_id=tmp_path / "s")
    with pytest.raises(UsageError, match="holds more than tensors, numbers and texts"):
        read_shards(tmp_path / "s")
    assert not ran.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "mp_rank_00_model_states.pt"])
def test_a_file_of_torch_runs_nothing(tmp_path, name):
    """Also where its reader asks for all, as DeepSpeed's does."""
    torch.save({"a": Evil(tmp_path / "ran")}, tmp_path / name)
    with pytest.raises(UsageError, match="holds more than tensors, numbers and texts"), plain_pickles():
        torch.load(tmp_path / name, weights_only=False)
    assert not (tmp_path / "ran").exists()


# ---- ids with a gap ----


@pytest.fixture
def gap(tiny, tmp_path):
    """A model whose tokenizer has an added token far behind the others, and no row for it."""
    folder = Path(shutil.copytree(tiny("gpt2"), tmp_path / "gap"))
    open_tokenizer(str(folder)).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"]["vocab"]["<far>"] = 4000
    state["added_tokens"].append({**state["added_tokens"][0], "id": 4000, "content": "<far>"})
    (folder / "tokenizer.json").write_text(json.dumps(state))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {
        "tokenizer_class": "PreTrainedTokenizerFast"
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("flags", [dict(add_missing_tokens=False), dict(lora_r=2)], ids=str)
def test_embeddings_hold_the_largest_id(gap, tmp_path, flags):
    tokenizer = open_tokenizer(str(gap))
    assert (len(tokenizer), vocabulary_size(tokenizer)) == (1001, 4001)
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"<far> {n}"} for n in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = dict(model_name_or_path=gap, data_path=tmp_path / "rows.json", output_dir=tmp_path / "out", **flags)
    train(dict(per_device_train_batch_size=4, num_train_epochs=1, use_cpu=True, save_strategy="no", **flags))
    if "lora_r" not in flags:
        held = AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_input_embeddings().num_embeddings
        assert held == vocabulary_size(open_tokenizer(str(tmp_path / "out"))) == 4001
    else:
        load_for_inference(tmp_path / "out", gap, CPU).model(torch.tensor([[4000]]))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, dict(lora_r=2, add_missing_tokens=True)], ids=str)
def test_no_token_is_added_behind_a_gap(gap, tmp_path, flags):
    """tokenizers would give it the first free id when the saved tokenizer is opened."""
    data = write_rows(tmp_path / "rows.json", 4)
    flags = dict(model_name_or_path=gap, data_path=data, output_dir=tmp_path / "out", use_cpu=True, **flags)
    result = train(flags, check=False)
    assert "--add_missing_tokens True: the token ids of" in result.stderr and "Traceback" not in result.stderr


def test_weights_that_are_not_of_the_bits_that_the_configuration_says(tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"load_in_4bit": True, "quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="config.json says that its weights have 4 bits, and they have not"):
        load_for_inference(folder, None, CPU)
