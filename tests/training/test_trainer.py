"""What AlpacaTrainer takes for granted of transformers' Trainer."""

import inspect

import pytest
from transformers import Trainer

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
