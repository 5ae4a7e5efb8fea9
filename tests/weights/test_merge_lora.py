"""A merged adapter is peft's own merge, rounded once; what cannot be merged is named; nothing else changes a bit."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from support.adapters import LLAMA, make_adapter
from support.checkpoints import assert_same, bits, state_of, write
from transformers import AutoModelForCausalLM, AutoTokenizer

import weight_diff
from alpaca.common.errors import UsageError
from alpaca.weights import merge_lora as merging
from alpaca.weights import writer
from alpaca.weights.merge_lora import Merged
from scripts.merge_lora import main, merge_lora

pytestmark = pytest.mark.slow
GPT2 = dict(target_modules=["c_attn", "c_proj"])  # Conv1D; attn.c_proj is square


def merged_by_peft(base, adapter, dtype, rows=0) -> torch.nn.Module:
    """peft's own merge, computed in `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(model.config.vocab_size + rows, mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter).to(dtype).merge_and_unload()


def last(base) -> list[int]:
    return [json.loads((Path(base) / "config.json").read_text())["vocab_size"] + n for n in (0, 1)]


CASES = {  # name: (architecture, rows added, settings of peft)
    "patterns": ("llama", 0, dict(**LLAMA, rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"k_proj": 5})),
    "rslora": ("llama", 0, dict(target_modules="all-linear", use_rslora=True)),
    "embeddings": ("llama", 0, dict(target_modules=["embed_tokens", "lm_head", "v_proj"])),
    "saved head": ("llama", 0, dict(**LLAMA, modules_to_save=["lm_head"])),
    "added tokens": ("llama", 2, dict(**LLAMA, trainable_token_indices=last)),
    "added rows": ("llama", 2, dict(**LLAMA, modules_to_save=["embed_tokens", "lm_head"])),
    "conv1d": ("gpt2", 0, dict(**GPT2, bias="lora_only")),
    "tied tokens": ("gpt2", 2, dict(**GPT2, trainable_token_indices=last)),
    "biases": ("opt", 0, dict(target_modules=["q_proj", "fc1"], bias="all")),
    "dora": ("llama", 0, dict(**LLAMA, use_dora=True, rank_pattern={"layers.1.self_attn.q_proj": 2})),
    "dora of embeddings": ("llama", 0, dict(target_modules=["embed_tokens", "lm_head", "v_proj"], use_dora=True)),
    "dora conv1d": ("gpt2", 0, dict(**GPT2, use_dora=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_as_peft_merges(tiny, tmp_path, case, monkeypatch):
    monkeypatch.setattr(writer, "PIECE", 999)  # elements: tensors of many pieces that begin inside a row
    monkeypatch.setattr(merging, "BLOCK", 300)  # elements that peft merges at once
    architecture, rows, settings = CASES[case]
    base = tiny(architecture)
    settings = {name: value(base) if callable(value) else value for name, value in settings.items()}
    adapter = make_adapter(base, tmp_path / "adapter", rows, **settings)
    merge_lora(str(adapter), str(tmp_path / "merged"))
    ours, exact = state_of(tmp_path / "merged"), merged_by_peft(base, adapter, torch.float64, rows).state_dict()
    for name, tensor in ours.items():
        assert torch.equal(bits(tensor), bits(exact[name].float())), name
    touched = {name for name in ours if rows or not torch.equal(ours[name], state_of(base)[name])}
    assert touched and (rows or touched != set(ours))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    by_peft = merged_by_peft(base, adapter, torch.float32, rows)
    torch.testing.assert_close(model.state_dict(), by_peft.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "trained",
    [dict(target_modules=["c_attn", "lm_head"]), dict(target_modules=["wte"]), dict(**GPT2, modules_to_save=["wte"])],
    ids=str,
)
def test_tied_embeddings_trained_apart_become_two(tiny, tmp_path, trained):
    """peft's merge would change both, or leave the trained one out of the saved model."""
    adapter = make_adapter(tiny("gpt2"), tmp_path / "adapter", **trained)
    merge_lora(str(adapter), str(tmp_path / "merged"))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tiny("gpt2"))
        wanted = PeftModel.from_pretrained(base, adapter)(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_base_keeps_its_dtype_and_every_bit_that_is_not_touched(tiny, tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in state_of(tiny("llama")).items()}
    base = write(tmp_path / "base", tiny("llama"), state, layout="shards", dtype=merging.dtype_name(dtype))
    adapter = make_adapter(tiny("llama"), tmp_path / "adapter", **LLAMA)
    merge_lora(str(adapter), str(tmp_path / "merged"), base=str(base), max_shard_size="50KB")
    exact, touched = merged_by_peft(base, adapter, torch.float64).state_dict(), ("q_proj", "k_proj", "down_proj")
    assert_same(
        tmp_path / "merged",
        {name: exact[name].to(dtype) if name.split(".")[-2] in touched else tensor for name, tensor in state.items()},
    )
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    merge_lora(str(adapter), str(tmp_path / "wide"), base=str(base), dtype="float32")
    assert_same(tmp_path / "wide", {name: exact[name].float() for name in state})
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float32"


@pytest.mark.parametrize("layout", ["safetensors", "one tensor in .bin"])
def test_tied_embeddings_that_are_stored_twice_stay_equal(tiny, tmp_path, layout):
    state = state_of(tiny("gpt2"))
    both = {**state, "lm_head.weight": state["transformer.wte.weight"]}
    base = write(tmp_path / "base", tiny("gpt2"), both)
    if layout == "one tensor in .bin":
        (base / "model.safetensors").unlink()
        torch.save(both, base / "pytorch_model.bin")
    adapter = make_adapter(base, tmp_path / "adapter", **GPT2, trainable_token_indices=[3, 5])
    merge_lora(str(adapter), str(tmp_path / "merged"))
    merged = state_of(tmp_path / "merged")
    changed = (merged["transformer.wte.weight"] != state["transformer.wte.weight"]).any(1).nonzero().flatten()
    assert changed.tolist() == [3, 5] and torch.equal(merged["lm_head.weight"], merged["transformer.wte.weight"])


def test_a_weight_diff_of_it_gives_every_bit_back(tiny, tmp_path):
    base = tiny("llama")
    adapter = make_adapter(base, tmp_path / "adapter", 2, **LLAMA, trainable_token_indices=last(base))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["[PAD]", "[X]"])
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(adapter)
    (adapter / "prompt_template.json").write_text('{"prompt_input": "a", "prompt_no_input": "b"}')
    with pytest.raises(UsageError, match="is a LoRA adapter.*scripts.merge_lora --adapter"):
        weight_diff.make_diff(base, str(adapter), str(tmp_path / "diff"))
    merge_lora(str(adapter), str(tmp_path / "merged"))
    weight_diff.make_diff(base, str(tmp_path / "merged"), str(tmp_path / "diff"))
    model, tokenizer = weight_diff.recover(base, str(tmp_path / "diff"), str(tmp_path / "recovered"))
    assert_same(tmp_path / "recovered", state_of(tmp_path / "merged"))
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0] == last(base)[1] + 1
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    assert (tmp_path / "recovered" / "prompt_template.json").is_file()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def set_config(adapter, **values):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


REFUSED = {
    "expected a LoRA adapter, got peft_type IA3": dict(peft_type="IA3"),
    "lacks lora_magnitude_vector of model.layers.0.mlp.down_proj.weight": dict(use_dora=True),
    "layer_replication = [[0, 2]]": dict(layer_replication=[[0, 2]]),
    'target_parameters = ["experts"]': dict(target_parameters=["experts"]),
    "lora_bias = true": dict(lora_bias=True),
    "alora_invocation_tokens = [1]": dict(alora_invocation_tokens=[1]),
    'init_lora_weights = "pissa", which has changed the base too': dict(init_lora_weights="pissa"),
    "of_tomorrow = 3": dict(of_tomorrow=3),
    "expected a matrix of rank 8, as adapter_config.json says": dict(r=8),
    "lacks lm_head, which its adapter_config.json promises": dict(modules_to_save=["lm_head"]),
    "lacks trainable_tokens_delta": dict(trainable_token_indices=[3]),
    "is a LoRA adapter of revision v2 of ": dict(revision="v2"),
    "/nowhere: no such folder": dict(base_model_name_or_path="/nowhere"),
}


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    return make_adapter(tiny("llama"), tmp_path_factory.mktemp("lora") / "adapter", **LLAMA)


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_merged_is_named(adapter, tmp_path, message):
    shutil.copytree(adapter, tmp_path / "adapter")
    set_config(tmp_path / "adapter", **REFUSED[message])
    with pytest.raises(UsageError) as error:
        merge_lora(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert message in str(error.value)
    assert not (tmp_path / "merged").exists()


def test_every_setting_of_peft_is_decided():
    """What a new peft can say is refused when it is used; here somebody should look whether it has an effect."""
    computed_by_peft = {
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
    }
    read_here = {
        "peft_type",
        "bias",
        "modules_to_save",
        "trainable_token_indices",
        "ensure_weight_tying",
        "init_lora_weights",
        "base_model_name_or_path",
        "revision",
    }
    without_effect = {  # on what training has ended with; whether weights are transposed is seen at the model's layers
        "task_type",
        "peft_version",
        "auto_mapping",
        "inference_mode",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "fan_in_fan_out",
        "megatron_core",
        "qalora_group_size",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
    }
    known = computed_by_peft | read_here | without_effect
    assert {setting.name for setting in dataclasses.fields(LoraConfig)} <= known | set(merging.REFUSED)
    assert not known & set(merging.REFUSED)


def test_another_base_is_named_with_both_shapes(adapter, tiny, tmp_path):
    from scripts.make_tiny_model import make_tiny_model

    wide = make_tiny_model(tmp_path / "wide", "llama", hidden_size=64)
    for base, told in (
        (wide, "is [64, 192] float32 there, and the adapter was trained on [32, 96]"),
        (tiny("gpt2"), "is not in the base, and [32, 96] in the adapter"),
    ):
        with pytest.raises(UsageError) as error:
            merge_lora(str(adapter), str(tmp_path / "merged"), base=str(base))
        first = "model.layers.0.mlp.down_proj.weight"
        assert f"--base {base} is not the base of {adapter}: {first} {told}" in str(error.value)


def test_no_more_than_a_block_of_rows_is_merged_at_once(adapter, tmp_path, monkeypatch):
    """What a merge takes of memory does not depend on the size of a matrix, nor on their number."""
    sizes, merge = [], merging._MergedWeight._merge

    def record(self, row):
        merge(self, row)
        sizes.append(self.block.numel())

    monkeypatch.setattr(merging._MergedWeight, "_merge", record)
    monkeypatch.setattr(merging, "BLOCK", 300)
    merge_lora(str(adapter), str(tmp_path / "merged"))
    assert max(sizes) <= 300 and len(sizes) > 30


@pytest.mark.parametrize("where", ["adapter", "lora_alpha", "base, merged", "base, copied"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_saved(tiny, tmp_path, where, number):
    base = shutil.copytree(tiny("llama"), tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", **LLAMA)
    if where == "lora_alpha":
        settings = json.loads((adapter / "adapter_config.json").read_text()) | {"lora_alpha": number}
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
    else:
        file = adapter / "adapter_model.safetensors" if where == "adapter" else base / "model.safetensors"
        held = load_file(file)
        name = {"base, merged": "model.layers.0.self_attn.q_proj.weight", "base, copied": "model.norm.weight"}.get(
            where
        )
        held[name or next(iter(held))].view(-1)[0] = number
        save_file(held, file, {"format": "pt"})
    with pytest.raises(UsageError, match="numbers that are not finite; it or its base is damaged"):
        merge_lora(str(adapter), str(tmp_path / "out"), base=str(base))
    assert not (tmp_path / "out").exists()


def test_a_layer_that_the_model_lacks_is_named(adapter, tiny, tmp_path):
    """The base has a tensor of that name, but its model has no such layer."""
    state = state_of(tiny("llama"))
    extra = {"model.layers.7.mlp.down_proj.weight": state["model.layers.1.mlp.down_proj.weight"]}
    base = write(tmp_path / "base", tiny("llama"), state | extra)
    shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors = {name.replace("layers.1.mlp", "layers.7.mlp"): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="model.layers.7.mlp.down_proj is no layer of a LlamaForCausalLM"):
        merge_lora(str(tmp_path / "adapter"), str(tmp_path / "merged"), base=str(base))


def test_rows_that_nobody_trained_are_not_invented(tiny, tmp_path):
    base = tiny("llama")
    adapter = make_adapter(base, tmp_path / "adapter", 2, **LLAMA, trainable_token_indices=last(base))
    state, first = load_file(adapter / "adapter_model.safetensors"), last(base)[0]
    lean = {name: tensor for name, tensor in state.items() if "base_layer" not in name}  # save_embedding_layers=False
    for kept, told in (
        ({name for name in lean if "lm_head" not in name}, f"{first} rows of lm_head.weight"),
        (set(lean), None),
    ):
        save_file({name: lean[name] for name in kept}, adapter / "adapter_model.safetensors", {"format": "pt"})
        if told:
            with pytest.raises(UsageError, match=told):
                merge_lora(str(adapter), str(tmp_path / "merged"))
    merge_lora(str(adapter), str(tmp_path / "merged"))
    rows = load_file(tmp_path / "merged" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(rows[first:], lean["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"])
    set_config(adapter, trainable_token_indices=[first])
    with pytest.raises(UsageError, match="lacks a row for each of 1 trainable_token_indices"):
        merge_lora(str(adapter), str(tmp_path / "again"))
    set_config(adapter, trainable_token_indices=[first + 1, 5])
    with pytest.raises(UsageError, match=f"has trained token {first + 1} but not {first}"):
        merge_lora(str(adapter), str(tmp_path / "again"))


def test_a_quantized_base(adapter, tiny, tmp_path, capsys):
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("- load_in_8bit: True\n")
    merge_lora(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert "note: trained on the base in 8 bits" in capsys.readouterr().out
    base = write(tmp_path / "base", tiny("llama"), state_of(tiny("llama")), quantization_config={"load_in_8bit": True})
    with pytest.raises(UsageError, match="stored quantized"):
        merge_lora(str(adapter), str(tmp_path / "again"), base=str(base))


def test_the_command_writes_all_or_nothing_and_never_over_something(adapter, tmp_path, monkeypatch, capsys):
    words = ["merge_lora", "--adapter", str(adapter), "--output_dir", str(tmp_path / "merged")]
    monkeypatch.setattr("sys.argv", [*words, "--bas", "x"])
    with pytest.raises(UsageError, match="unknown flag --bas; did you mean --base?"):
        main()
    assert not (tmp_path / "merged").exists()
    monkeypatch.setattr("sys.argv", words)
    main()
    assert "matrices merged" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--output_dir .* already exists"):
        main()
    assert not capsys.readouterr().out, "what was done is not said before it is refused"
    monkeypatch.setattr("sys.argv", [*words, "--overwrite", "--dtype", "bfloat16"])
    monkeypatch.setattr(Merged, "_load", lambda *_: 1 / 0)
    before = state_of(tmp_path / "merged")
    with pytest.raises(ZeroDivisionError):
        main()
    assert_same(tmp_path / "merged", before)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
