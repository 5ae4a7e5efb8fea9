"""What AlpacaTrainer takes for granted of transformers' Trainer."""

import inspect
import shutil
from itertools import islice

import pytest
from conftest import history, largest_difference, train, write_rows
from transformers import Trainer

from alpaca.packing.sampler import OneStepAhead
from alpaca.training.trainer import PRIVATE_HOOKS, AlpacaTrainer
from train import train as train_here

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


RUN = dict(
    num_train_epochs=2,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=1e-3,
    save_strategy="steps",
    save_steps=5,
)
AHEAD = {"ahead": {}, "worker": dict(dataloader_num_workers=1)}


@pytest.fixture(scope="module")
def not_ahead(tiny, tmp_path_factory):
    """A run whose steps are fetched when they are due: its flags, its folder and what was logged."""
    folder = tmp_path_factory.mktemp("not_ahead")
    flags = RUN | dict(model_name_or_path=tiny("llama"), data_path=write_rows(folder / "rows.json", 30))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OneStepAhead, "fetch", lambda self: None)
        patch.setattr(OneStepAhead, "take", lambda self, source, number: list(islice(source, number)))
        words = [
            f"--{name}={value}" for name, value in {**flags, "output_dir": folder / "run", "use_cpu": True}.items()
        ]
        train_here(words)
    return flags, folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("way", [pytest.param("ahead", marks=pytest.mark.stress), "worker"])
def test_steps_that_are_fetched_ahead_change_no_bit(not_ahead, tmp_path, way):
    """By the process itself, as always, or by a worker. Also across a resume."""
    flags, alone = not_ahead
    train({**flags, **AHEAD[way], "output_dir": tmp_path / "run"})
    assert largest_difference(alone, tmp_path / "run") == 0
    assert [entry["loss"] for entry in history(tmp_path / "run")] == [entry["loss"] for entry in history(alone)]
    shutil.copytree(alone / "checkpoint-5", tmp_path / "resumed" / "checkpoint-5")
    train({**flags, **AHEAD[way], "output_dir": tmp_path / "resumed", "resume_from_checkpoint": True})
    assert largest_difference(alone, tmp_path / "resumed") == 0


def test_lists_come_in_order_whatever_is_fetched_when():
    ahead, got, source = OneStepAhead(), [], iter([[number] for number in range(11)])
    for step, number in enumerate((4, 4, 4)):
        got += ahead.take(source, number)
        for _ in range(step):
            ahead.fetch()
    assert got == [[number] for number in range(11)] and ahead.take(source, 4) == []
    assert ahead.take(iter([[1], [2]]), 1) == [[1]]
    ahead.fetch()
    assert ahead.take(iter([[7], [8]]), 2) == [[7], [8]], "another epoch: nothing of the one before"


def test_a_step_is_fetched_before_it_is_due():
    seen, ahead = [], OneStepAhead()
    source = (seen.append(number) or [number] for number in range(6))
    assert ahead.take(source, 2) == [[0], [1]] and seen == [0, 1]
    ahead.fetch()
    ahead.fetch()
    assert seen == [0, 1, 2, 3] and ahead.take(source, 2) == [[2], [3]] and seen == [0, 1, 2, 3]
    assert ahead.take(source, 1) == [[4]] and ahead.take(source, 4) == [[5]]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.stress), 1])
def test_a_step_that_fails_ends_the_run_with_its_message(tiny, tmp_path, workers):
    """At once: neither the worker, which leaves signals to the run, nor its copy of the signals' pipe keeps it."""
    flags = dict(model_name_or_path=tiny("llama"), data_path=write_rows(tmp_path / "rows.json", 60), learning_rate=1e30)
    flags |= dict(output_dir=tmp_path / "run", warmup_steps=0, max_steps=20, save_strategy="no", use_cpu=True)
    flags |= dict(per_device_train_batch_size=2, report_to="none", dataloader_num_workers=workers)
    result = train(flags, real=True, check=False, timeout=240)
    assert result.returncode == 2 and "is not finite" in result.stderr and "Traceback" not in result.stderr
