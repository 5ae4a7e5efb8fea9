"""What AlpacaTrainer takes for granted of transformers' Trainer."""

import inspect
import shutil
from argparse import Namespace

import pytest
import torch
from conftest import largest_difference, train, write_rows
from transformers import Trainer

from alpaca.models.lora import LoraArguments
from alpaca.training import preflight
from alpaca.training.trainer import PRIVATE_HOOKS, AlpacaTrainer

SIGNATURES = {
    "_get_grad_norm": "model, grad_norm",
    "_init_training_state": "max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial",
    "_load_from_checkpoint": "resume_from_checkpoint, model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_maybe_log_save_evaluate": "tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, "
    "learning_rate",
    "_prepare_input": "data",
    "_run_epoch": "model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
    "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch",
    "_save": "output_dir, state_dict",
    "_save_checkpoint": "model, trial",
    "_save_optimizer_and_scheduler": "output_dir",
    "_track_num_input_tokens": "inputs",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_private_hook_has_the_signature_that_is_overridden(name):
    parameters = list(inspect.signature(getattr(Trainer, name)).parameters)
    assert ", ".join(parameters[1:]) == SIGNATURES[name]


def test_every_private_hook_is_listed():
    overridden = {name for name in vars(AlpacaTrainer) if name.startswith("_") and not name.startswith("__")}
    assert dict(PRIVATE_HOOKS).keys() == SIGNATURES.keys() == overridden & set(dir(Trainer))


@pytest.mark.slow
def test_a_worker_that_plans_ahead_changes_no_bit(tiny, tmp_path):
    """What a GPU has by default: the next step is planned and collated in a process beside it. Also across a resume."""
    flags = dict(
        model_name_or_path=tiny("llama"),
        data_path=write_rows(tmp_path / "rows.json", 30),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=5,
    )
    train({**flags, "output_dir": tmp_path / "alone"})
    train({**flags, "output_dir": tmp_path / "ahead", "dataloader_num_workers": 1})
    assert largest_difference(tmp_path / "alone", tmp_path / "ahead") == 0
    shutil.copytree(tmp_path / "alone" / "checkpoint-5", tmp_path / "resumed" / "checkpoint-5")
    resumed = {**flags, "output_dir": tmp_path / "resumed", "dataloader_num_workers": 1, "resume_from_checkpoint": True}
    train(resumed)
    assert largest_difference(tmp_path / "alone", tmp_path / "resumed") == 0


def test_a_gpu_has_a_worker_unless_told_otherwise():
    args = Namespace(device=torch.device("cuda"), dataloader_num_workers=0, fsdp=None, deepspeed=None)
    for given, expected in (({}, 1), ({"dataloader_num_workers": ["0"]}, 0)):
        args.dataloader_num_workers = 0
        preflight.check_command_line({"output_dir": ["x"], **given}, LoraArguments(), args)
        assert args.dataloader_num_workers == expected
    args.device, args.dataloader_num_workers = torch.device("cpu"), 0
    preflight.check_command_line({"output_dir": ["x"]}, LoraArguments(), args)
    assert args.dataloader_num_workers == 0
