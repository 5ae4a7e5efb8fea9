"""DeepSpeed ZeRO-3 with offload on two CPU ranks: the results of one process, float32 weights in every file."""

import json
import os
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import ROOT, history, largest_difference, weights, write_rows
from conftest import train as launch

import train
from alpaca.common.errors import UsageError
from alpaca.models.deepspeed import Zero3, complete_config

CONFIG = ROOT / "configs" / "default_offload_opt_param.json"
BESIDE = Path(sys.prefix) / "deepspeed"  # where make installs it
FLAGS = dict(
    per_device_train_batch_size=2,
    learning_rate=1e-3,
    num_train_epochs=1,
    logging_steps=1,
    max_grad_norm=0.5,
    weight_decay=0.01,
    save_strategy="steps",
    save_steps=2,
    save_total_limit=9,
)

installed = pytest.mark.skipif(
    find_spec("deepspeed") is None and not BESIDE.is_dir(), reason=f"DeepSpeed is not installed, nor in {BESIDE}"
)


def with_deepspeed(processes=2, **flags):
    path = os.pathsep.join(filter(None, (str(BESIDE), os.environ.get("PYTHONPATH"))))
    check = flags.pop("check", True)
    return launch(dict(deepspeed=CONFIG, **FLAGS) | flags, processes, real=True, check=check, env={"PYTHONPATH": path})


def here(**flags):
    """train.py in this process, without DeepSpeed unless told so."""
    train.train([f"--{name}={value}" for name, value in (dict(use_cpu=True, **FLAGS) | flags).items()])


# ---- the configuration ----


def test_the_flags_decide_what_our_file_leaves_open():
    """AdamW and the schedule are the flags' too, so that the file says nothing about them."""
    config = complete_config(str(CONFIG))
    assert not {"optimizer", "scheduler"} & config.keys()
    for name in ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping"):
        assert config[name] == "auto"
    assert config["communication_data_type"] == config["data_types"]["grad_accum_dtype"] == "fp32"
    assert Zero3.of(config) == Zero3(live=10**9, optimizer_on_cpu=True, parameters_on_cpu=True)
    assert not Zero3.of({"zero_optimization": {"stage": 3}}).optimizer_on_cpu
    assert complete_config('{"zero_optimization": {"stage": 3}}')["gradient_clipping"] == "auto", "else it never clips"


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(deepspeed="configs/no.json"), "--deepspeed configs/no.json: cannot be read"),
        (dict(deepspeed='{"zero_optimization": {"stage": 2}}'), "zero_optimization.stage is 2 .* expected 3"),
        (dict(deepspeed="{}"), "zero_optimization.stage is None"),
        (dict(deepspeed=CONFIG, fsdp=True), "--deepspeed and --fsdp: both shard"),
        (dict(deepspeed=CONFIG, optim="adafactor"), "--optim adafactor: with --deepspeed expected adamw_torch"),
        (dict(deepspeed=CONFIG, torch_compile=True), "--torch_compile: not with --deepspeed"),
        (dict(deepspeed=CONFIG, load_best_model_at_end=True), "--load_best_model_at_end: not with --deepspeed"),
        (dict(deepspeed=CONFIG), r'is not installed; DS_BUILD_OPS=0 pip install "deepspeed>='),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr("alpaca.models.deepspeed.find_spec", lambda name: None)
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UsageError, match=message):
        here(model_name_or_path="none", data_path="none", output_dir=tmp_path, **flags)


def test_memory_of_a_7b_model_on_four_gpus():
    """Offloaded, the host takes 2 + 4 bytes a parameter more than under FSDP: DeepSpeed's copies in bfloat16."""
    from support.seven_b import ON_FOUR, SEVEN

    from alpaca.training.memory import memory

    zero, plan = Zero3.of(complete_config(str(CONFIG))), replace(ON_FOUR, offload=True, checkpointing=True)
    fsdp, deepspeed = memory(SEVEN, plan), memory(SEVEN, replace(plan, zero=zero))
    assert deepspeed["host"] - fsdp["host"] == pytest.approx(6 * 7e9 / 4)
    assert deepspeed["weights"] == deepspeed["copies of DeepSpeed"] == 0
    on_gpu = memory(SEVEN, replace(plan, zero=replace(zero, parameters_on_cpu=False)))
    assert on_gpu["copies of DeepSpeed"] == pytest.approx(6 * 7e9 / 4) and on_gpu["host"] == pytest.approx(fsdp["host"])


# ---- runs ----


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """27 rows in global batches of 8, so that the last step of an epoch has 3: the folder of a run on two ranks, its
    flags, and what it printed."""
    folder = tmp_path_factory.mktemp("deepspeed")
    flags = dict(model_name_or_path=tiny("llama"), data_path=write_rows(folder / "rows.json", 27))
    output = with_deepspeed(output_dir=folder / "out", gradient_accumulation_steps=2, **flags).stdout
    return folder / "out", flags, output


@installed
@pytest.mark.slow
@pytest.mark.stress
def test_two_ranks_with_offload_end_as_one_process(trained, tmp_path):
    """In packs, whose gradient has been compared. The tokenizer has no pad token, so a row is added to partitioned
    embeddings. Every saved model is the plain float32 model."""
    out, flags, output = trained
    here(output_dir=tmp_path / "one", gradient_accumulation_steps=4, **flags)
    assert (
        "checked: a packed step has the gradient of a padded one up to rounding (" in output
        and "padded batches" not in output
    )
    for ours, expected in zip(history(out), history(tmp_path / "one"), strict=True):
        for name in ("loss", "grad_norm", "learning_rate"):
            assert ours[name] == pytest.approx(expected[name], rel=1e-4), name
    flops = [json.loads((run / "trainer_state.json").read_text())["total_flos"] for run in (out, tmp_path / "one")]
    assert flops[0] == pytest.approx(flops[1]), "partitioned parameters are counted"
    for name in ("", "checkpoint-2", "checkpoint-4"):
        assert largest_difference(out / name, tmp_path / "one" / name) < 2e-6
        assert {value.dtype for value in weights(out / name).values()} == {torch.float32}
        assert json.loads((out / name / "config.json").read_text())["dtype"] == "float32"
    shutil.copytree(out / "checkpoint-2", tmp_path / "other" / "checkpoint-2")
    with pytest.raises(UsageError, match=r"--deepspeed: ZeRO-3 \w+ then, None now"):  # only it continues what it left
        here(output_dir=tmp_path / "other", gradient_accumulation_steps=4, resume_from_checkpoint=True, **flags)


@installed
@pytest.mark.slow
@pytest.mark.stress
def test_a_checkpoint_is_continued_bit_for_bit(trained, tmp_path):
    """And not by another number of ranks, which has no part for each."""
    out, flags = trained[:2]
    shutil.copytree(out / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
    flags = dict(output_dir=tmp_path / "out", resume_from_checkpoint=True, gradient_accumulation_steps=2, **flags)
    refused = with_deepspeed(1, check=False, **{**flags, "gradient_accumulation_steps": 4})
    assert "the number of processes (DeepSpeed saves a part of each): 2 then, 1 now" in refused.stderr
    output = with_deepspeed(**flags).stdout
    assert "step 3/4" in output and "step 2/4" not in output
    assert largest_difference(tmp_path / "out", out) == 0


@installed
@pytest.mark.slow
@pytest.mark.stress
def test_bfloat16_rounds_neither_what_is_read_nor_what_is_saved(tiny, tmp_path):
    """A float16 model with 7 rows more than tokens, at learning rate 0: it loses these, and not one bit. Nor does it
    round the weights of the loss: 1/120 would be 0.3% more in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny("opt"))
    model = AutoModelForCausalLM.from_pretrained(tiny("opt"), dropout=0.0)
    model.resize_token_embeddings(len(tokenizer) + 7, mean_resizing=False)
    for part in (model.half(), tokenizer):
        part.save_pretrained(tmp_path / "base")
    flags = dict(
        model_name_or_path=tmp_path / "base",
        data_path=write_rows(tmp_path / "rows.json", 11),
        max_steps=1,
        learning_rate=0,
    )
    with_deepspeed(output_dir=tmp_path / "out", gradient_accumulation_steps=3, bf16=True, **flags)
    here(output_dir=tmp_path / "float32", gradient_accumulation_steps=6, **flags)
    loss, exact = (history(tmp_path / run)[0]["loss"] for run in ("out", "float32"))
    assert loss == pytest.approx(exact, rel=1e-3)
    base, saved = weights(tmp_path / "base"), weights(tmp_path / "out")
    assert base.keys() == saved.keys()
    for name, value in saved.items():
        assert value.dtype == torch.float32 and torch.equal(value, base[name][: len(value)].float()), name
    assert len(saved["model.decoder.embed_tokens.weight"]) == len(tokenizer)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


@installed
@pytest.mark.slow
@pytest.mark.stress
def test_a_loss_that_is_not_finite_stops_before_the_weights(tiny, tmp_path):
    """With an optimizer and a schedule of DeepSpeed's own, as in 2023's file."""
    from support.poison import poisoned

    data = json.loads(Path(write_rows(tmp_path / "rows.json", 16)).read_text())
    data[13]["output"] += " Ω"
    (tmp_path / "rows.json").write_text(json.dumps(data))
    adam, decay = ("lr", "betas", "eps", "weight_decay"), ("total_num_steps", "warmup_num_steps")
    own = {
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(adam, "auto")},
        "scheduler": {"type": "WarmupDecayLR", "params": dict.fromkeys(decay, "auto")},
    }
    (tmp_path / "own.json").write_text(json.dumps(json.loads(CONFIG.read_text()) | own))
    out = tmp_path / "out"
    stopped = with_deepspeed(
        model_name_or_path=poisoned(tmp_path / "model", tiny("llama"), float("nan")),
        check=False,
        data_path=tmp_path / "rows.json",
        output_dir=out,
        deepspeed=tmp_path / "own.json",
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        pad_token="<unk>",
        save_steps=1,
    )
    assert "note: --lr_scheduler_type linear -> WarmupDecayLR, the scheduler of --deepspeed" in stopped.stdout
    assert stopped.stderr.count("step 2: the loss is not finite. Rows where it is not: 13.") == 1
    saved = weights(out / "checkpoint-1")["model.embed_tokens.weight"]
    assert int(torch.isnan(saved).any(1).sum()) == 1, "only the row that was poisoned from the start"
    wrong = {**json.loads(CONFIG.read_text()), "train_batch_size": 64}
    refused = with_deepspeed(
        1,
        check=False,
        deepspeed=json.dumps(wrong),
        model_name_or_path="none",
        data_path="none",
        output_dir=tmp_path / "none",
    )
    assert "train_batch_size=64, but the flags say train_batch_size (calculated)=2" in refused.stderr
