"""2023's command line: what becomes of each flag, on this machine and on hardware simulated here."""

import json
from argparse import Namespace

import pytest
import torch

from alpaca.common import arguments
from alpaca.common.errors import UsageError
from alpaca.training.legacy_flags import HIDDEN, WITHOUT_EFFECT, adapt_to_hardware, translate_legacy_flags
from train import parse_flags


def translated(*words):
    argv, notes = translate_legacy_flags(list(words))
    return dict(arguments.split_flags(argv)), notes


@pytest.mark.parametrize(
    "old, new",
    [
        (["--evaluation_strategy", "no"], {"eval_strategy": ["no"]}),
        (["--evaluation-strategy=epoch"], {"eval_strategy": ["epoch"]}),
        (["--warmup_ratio", "0.03"], {"warmup_steps": ["0.03"]}),
        (["--group_by_length", "True"], {"train_sampling_strategy": ["group_by_length"]}),
        (["--group_by_length", "False"], {}),
        (["--no_cuda"], {"use_cpu": []}),
        (["--adafactor"], {"optim": ["adafactor"]}),
        (["--save_safetensors", "False"], {}),
        (["--per_gpu_train_batch_size", "2"], {"per_device_train_batch_size": ["2"]}),
        (["--fsdp", ""], {"fsdp": [""]}),
        (["--fsdp", "", "--fsdp_transformer_layer_cls_to_wrap", "X"], {"fsdp": [""]}),
        (["--learning_rate", "-1e-5", "--bf16"], {"learning_rate": ["-1e-5"], "bf16": []}),
    ],
)
def test_translations(old, new):
    assert translated(*old)[0] == new


def test_every_translation_is_noted_once():
    _, notes = translated("--evaluation_strategy", "no", "--warmup_ratio", "0.03", "--save_safetensors", "False")
    assert [note.split(" -> ")[0] for note in notes] == [
        "--evaluation_strategy no",
        "--warmup_ratio 0.03",
        "--save_safetensors False",
    ]
    assert translated("--eval_strategy", "no", "--bf16", "True", "--fsdp_config", "x.json", "--fsdp")[1] == []


@pytest.mark.parametrize(
    "text, expected",
    [
        ("full_shard auto_wrap", dict(reshard_after_forward=True, cpu_offload=False)),
        ("full_shard auto_wrap offload", dict(reshard_after_forward=True, cpu_offload=True)),
        ("shard_grad_op", dict(reshard_after_forward=False, cpu_offload=False, auto_wrap_policy="NO_WRAP")),
    ],
)
def test_fsdp_strings(text, expected):
    got, notes = translated("--fsdp", text, "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer")
    config = json.loads(got["fsdp_config"][0])
    assert got["fsdp"] == ["True"] and config.items() >= expected.items()
    assert config["transformer_layer_cls_to_wrap"] == "LlamaDecoderLayer"
    assert len(notes) == 1 and text in notes[0]


def test_fsdp_config_file_is_merged(tmp_path):
    path = tmp_path / "fsdp.json"
    path.write_text('{"fsdp_activation_checkpointing": true, "fsdp_transformer_layer_cls_to_wrap": ["A"]}')
    got, _ = translated("--fsdp", "full_shard auto_wrap", "--fsdp_config", str(path))
    config = json.loads(got["fsdp_config"][0])
    assert config["activation_checkpointing"] is True and config["transformer_layer_cls_to_wrap"] == ["A"]


def test_no_shard_is_ddp():
    got, notes = translated("--fsdp", "no_shard")
    assert got == {} and "DDP" in notes[0]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--fsdp", "half_shard"], "half_shard"),
        (["--fsdp", "auto_wrap"], "exactly one of full_shard"),
        (["--warmup_ratio", "3"], "warmup_steps"),
        (["--warmup_ratio", "many"], "warmup_ratio many"),
        (["data.json"], "expected a flag"),
        (["--fsdp", "full_shard", "--fsdp_config", "/nowhere.json"], "/nowhere.json"),
        (["--fsdp", "full_shard auto_wrap", "--fsdp_min_num_params", "many"], "--fsdp_min_num_params many"),
    ],
)
def test_values_without_meaning_are_refused(words, message):
    with pytest.raises(UsageError, match=message):
        translate_legacy_flags(words)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"offload_params": True}, "unknown key 'offload_params'.*cpu_offload"),
        ({"version": 1}, "only FSDP2"),
        ({}, "--load_best_model_at_end: not with --fsdp"),
    ],
)
def test_fsdp_configurations_that_are_refused(config, message):
    from alpaca.models.fsdp import configure_fsdp

    args = Namespace(fsdp="True", fsdp_config=config, load_best_model_at_end=not config, save_only_model=False)
    with pytest.raises(UsageError, match=message):
        configure_fsdp(args)


def test_a_configuration_from_python_may_have_the_prefix_of_2023(monkeypatch):
    from alpaca.models.fsdp import configure_fsdp

    for name in ("ACCELERATE_USE_FSDP", "FSDP_OFFLOAD_PARAMS"):
        monkeypatch.setenv(name, "")
    args = Namespace(
        fsdp=True,
        fsdp_config={"fsdp_transformer_layer_cls_to_wrap": "A"},
        load_best_model_at_end=False,
        save_only_model=False,
    )
    configure_fsdp(args)
    assert args.fsdp_config["transformer_layer_cls_to_wrap"] == "A"


def test_offload_reaches_the_process_group(monkeypatch):
    from alpaca.models.fsdp import configure_fsdp

    for name in ("ACCELERATE_USE_FSDP", "FSDP_OFFLOAD_PARAMS"):
        monkeypatch.setenv(name, "")
    args = Namespace(
        fsdp="True", fsdp_config='{"cpu_offload": true}', load_best_model_at_end=False, save_only_model=False
    )
    configure_fsdp(args)
    import os

    assert os.environ["FSDP_OFFLOAD_PARAMS"] == "true", "accelerate opens a gloo group beside NCCL"


@pytest.mark.parametrize(
    "flag, guess",
    [
        ("--learning_rat", "--learning_rate"),
        ("--model_name", "--model_name_or_path"),
        ("--fdsp", "--fsdp"),
        ("--num-train-epoch", "--num_train_epochs"),
        ("--data", "--data_path"),
        ("--qqqq", "train.py has no flag like it"),
    ],
)
def test_an_unknown_flag_is_refused_with_the_closest_known_one(flag, guess):
    with pytest.raises(UsageError, match=f"unknown flag --{flag[2:].replace('-', '_')}.*{guess}"):
        parse_flags([flag, "1", "--data_path", "x.json"])


def simulated_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")


def adapted(**given):
    namespace = Namespace(
        **{**dict(use_cpu=False, bf16=False, fp16=False, tf32=None, fsdp=None, fsdp_config=None), **given}
    )
    notes = adapt_to_hardware(namespace)
    return namespace, "\n".join(notes)


def test_a_command_without_data_is_refused_before_anything_loads():
    with pytest.raises(UsageError, match="--data_path is missing: a file of rows"):
        parse_flags(["--use_cpu"])


def test_before_ampere_bf16_becomes_fp16_and_tf32_is_off(monkeypatch):
    simulated_gpu(monkeypatch, (7, 0))
    got, notes = adapted(bf16=True, tf32=True)
    assert (got.bf16, got.fp16, got.tf32) == (False, True, None)
    assert "no bfloat16" in notes and "no tf32" in notes and notes.count("\n") == 1


def test_on_ampere_nothing_changes(monkeypatch):
    simulated_gpu(monkeypatch, (8, 0))
    monkeypatch.setenv("LOCAL_RANK", "0")
    got, notes = adapted(bf16=True, tf32=True, fsdp="True")
    assert (got.bf16, got.tf32, got.fsdp, notes) == (True, True, "True", "")


def test_fsdp_without_anybody_to_shard_with(monkeypatch):
    simulated_gpu(monkeypatch, (9, 0))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    got, notes = adapted(fsdp="True")
    assert got.fsdp is None and "torchrun" in notes


@pytest.mark.parametrize(
    "given, ranks, message",
    [
        (dict(), "8", "--nproc_per_node=8: this machine has 4 GPUs"),
        (dict(use_cpu=True, fsdp="True"), "2", "CUDA_VISIBLE_DEVICES="),
        (dict(fsdp_config="{}"), "1", "--fsdp_config: has no effect without --fsdp"),
    ],
)
def test_combinations_that_cannot_work_here(monkeypatch, given, ranks, message):
    simulated_gpu(monkeypatch, (9, 0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    with pytest.raises(UsageError, match=message):
        adapted(**given)


def test_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    got, notes = adapted(bf16=True, tf32=True)
    assert got.use_cpu and got.bf16 and got.tf32 is None
    assert "no GPU" in notes and "CPU" in notes


def test_readme_command_parses_here(tmp_path):
    model, data, _, training = parse_flags(
        [
            "--model_name_or_path",
            "x",
            "--data_path",
            "./alpaca_data.json",
            "--bf16",
            "True",
            "--output_dir",
            str(tmp_path),
            "--num_train_epochs",
            "3",
            "--per_device_train_batch_size",
            "4",
            "--per_device_eval_batch_size",
            "4",
            "--gradient_accumulation_steps",
            "8",
            "--evaluation_strategy",
            "no",
            "--save_strategy",
            "steps",
            "--save_steps",
            "2000",
            "--save_total_limit",
            "1",
            "--learning_rate",
            "2e-5",
            "--weight_decay",
            "0.",
            "--warmup_ratio",
            "0.03",
            "--lr_scheduler_type",
            "cosine",
            "--logging_steps",
            "1",
            "--fsdp",
            "full_shard auto_wrap",
            "--fsdp_transformer_layer_cls_to_wrap",
            "LlamaDecoderLayer",
            "--tf32",
            "True",
        ]
    )
    assert training.get_warmup_steps(1000) == 30 and training.save_total_limit == 1 and training.bf16
    assert (training.optim, training.model_max_length, model.model_name_or_path) == ("adamw_torch_fused", 512, "x")
    assert data.data_path == "./alpaca_data.json"


def test_flags_without_effect_are_accepted_noted_and_left_at_their_defaults(capsys):
    words = [
        "--do_train",
        "--do_eval=False",
        "--bf16_full_eval=True",
        "--no_remove_unused_columns",
        "--label_names",
        "labels",
        "more",
        "--include_for_metrics=loss",
        "--logging_nan_inf_filter",
        "True",
    ]
    training = parse_flags(["--data_path", "x.json", "--output_dir", "out", "--use_cpu", *words])[-1]
    noted = [line.split(": ", 1)[1].split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert noted == [
        "--logging_nan_inf_filter True -> dropped",
        "--do_train True -> without effect",
        "--bf16_full_eval True -> without effect",
        "--include_for_metrics loss -> without effect",
        "--remove_unused_columns False -> without effect",
        "--label_names labels more -> without effect",
    ]
    assert not (training.do_train or training.bf16_full_eval or training.label_names or training.include_for_metrics)
    assert training.remove_unused_columns and not training.logging_nan_inf_filter


def test_help_has_what_can_be_turned():
    from alpaca.models.lora import LoraArguments
    from train import DataArguments, ModelArguments, TrainingArguments

    classes = (ModelArguments, DataArguments, LoraArguments, TrainingArguments)
    parser = arguments.FlagParser(classes, None, "train.py", HIDDEN)
    text = parser.format_help()
    assert "--no_share_prefix     Not --share_prefix.\n" in text and "--overwrite_output_dir" in text
    assert not [name for name in [*WITHOUT_EFFECT, "logging_nan_inf_filter"] if f"--{name}" in text]
    assert not set(WITHOUT_EFFECT) - set(parser.known()), "transformers has them all"


def test_gradients_are_reduced_in_float32():
    from alpaca.models.fsdp import mixed_precision_policy

    assert mixed_precision_policy("bf16")["reduce_dtype"] is torch.float32
    assert mixed_precision_policy("no") is None
