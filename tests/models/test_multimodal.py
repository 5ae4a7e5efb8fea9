"""Models that read images too: their language model is trained, wrapped and merged, and nothing else."""

import json

import pytest
import torch
from conftest import train, write_rows
from peft import PeftModel
from support.checkpoints import state_of
from support.multimodal import MULTIMODAL, make_multimodal
from transformers import AutoModelForCausalLM

from alpaca.models.embeddings import freeze_other_parts, of_language_model
from scripts.merge_lora import merge_lora

FLAGS = dict(num_train_epochs=3, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, save_strategy="no")


@pytest.fixture(params=sorted(MULTIMODAL))
def model(request, tiny, tmp_path):
    return make_multimodal(tmp_path / request.param, request.param, tiny("llama"))


def trained(model, tmp_path, processes=0, **flags):
    rows = write_rows(tmp_path / "rows.json", 8)
    train(dict(model_name_or_path=model, data_path=rows, output_dir=tmp_path / "out", **FLAGS, **flags), processes)
    return tmp_path / "out"


def changed(one, other) -> set[str]:
    return {name for name in one if name in other and not torch.equal(one[name], other[name])}


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [pytest.param("", marks=pytest.mark.stress), "full_shard auto_wrap"])
def test_the_language_model_alone_is_trained(model, tmp_path, fsdp):
    before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    out = trained(model, tmp_path, 2, fsdp=fsdp)
    after = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    different = changed(before, after)
    assert different and not [name for name in different if "vision" in name or "projector" in name]
    assert sum("layers" in name for name in different) > 10


@pytest.mark.slow
@pytest.mark.parametrize("targets", [None, pytest.param("q_proj,v_proj", marks=pytest.mark.stress)])
def test_lora_goes_onto_the_language_model_and_is_merged(model, tmp_path, targets):
    flags = dict(lora_r=4) | (dict(lora_target_modules=targets) if targets else {})
    out = trained(model, tmp_path, 2, **flags)
    names = state_of(out)
    assert names and not [name for name in names if "vision" in name]
    merge_lora(str(out), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    different = changed(base.state_dict(), merged.state_dict())
    by_peft = PeftModel.from_pretrained(base, out).merge_and_unload()
    assert different
    for name, tensor in by_peft.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    assert {*state_of(tmp_path / "merged")} == {*state_of(model)}, "the names on disk stay"


def test_what_text_runs_through(tiny, model):
    plain = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    assert freeze_other_parts(plain) == [] and of_language_model(plain) == {name for name, _ in plain.named_modules()}
    opened = AutoModelForCausalLM.from_pretrained(model)
    frozen = freeze_other_parts(opened)
    assert frozen == (["vision_tower", "multi_modal_projector"] if "gemma3" in str(model) else [])
    assert all(p.requires_grad for p in opened.get_decoder().parameters())
    assert json.loads((model / "config.json").read_text())["vision_config"]
