"""A step that is not finite stops the run, before it reaches the weights, and its rows are named in a file."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import train, write_rows
from support.poison import poisoned
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow

FLAGS = dict(
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=1e-3,
    num_train_epochs=1,
    logging_steps=1,
    save_strategy="steps",
    save_steps=1,
    save_total_limit=1,
    pad_token="<unk>",
    train_sampling_strategy="sequential",
)


@pytest.mark.parametrize("processes, fsdp", [(0, ""), (2, "full_shard auto_wrap")])
def test_rows_of_a_loss_that_is_not_finite_are_named(tiny, tmp_path, processes, fsdp):
    """Row 13 holds the letter. In order, with 4 rows a step on one process, it is in step 4; on two ranks with 8 a step
    in step 2. The rows it is packed with are not blamed."""
    rows = json.loads(open(write_rows(tmp_path / "rows.json", 20)).read())
    rows[13]["output"] += " Ω"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    model = poisoned(tmp_path / "model", tiny("llama"), float("nan"))
    out = tmp_path / "out"
    flags = dict(model_name_or_path=model, data_path=tmp_path / "rows.json", output_dir=out, fsdp=fsdp, **FLAGS)
    stopped = train(flags, processes, check=False)
    step = 2 if processes else 4
    assert stopped.returncode != 0 and stopped.stderr.count(f"step {step}: the loss is not finite") == 1
    assert "Rows where it is not: 13." in stopped.stderr
    assert f"step {step - 1}/" in stopped.stdout and f"step {step}/" not in stopped.stdout
    content = json.loads((out / f"nonfinite_step_{step}.json").read_text())
    assert (content["step"], content["what"], content["rows"]) == (step, "loss", [13])
    (batch,) = content["micro_batches"]
    assert (batch["micro_batch"], batch["loss"]) == (0, "nan")
    (bad,) = [row for row in batch["rows"] if not row["finite"]]
    assert rows[13]["instruction"] in bad["starts"] and bad["row"] == 13 and len(batch["rows"]) == 4
    assert content["last_log_lines"][-1]["step"] == step - 1
    saved = AutoModelForCausalLM.from_pretrained(out / f"checkpoint-{step - 1}").get_input_embeddings().weight
    assert int(torch.isnan(saved).any(1).sum()) == 1, "only the row that was poisoned from the start"


def test_a_gradient_that_is_not_finite_stops_too(tiny, tmp_path):
    """With losses that are finite."""
    from alpaca.common.errors import UsageError
    from alpaca.training.metrics import LossTracker
    from alpaca.training.nonfinite import NonFiniteGuard

    class Args:
        fp16, world_size, process_index, output_dir = False, 1, 0, str(tmp_path)

    class State:
        global_step, epoch, log_history = 6, 0.5, []

    class Rows(list):
        report = SimpleNamespace(numbers=[0, 2, 2, 5])  # of the file

    dataset = Rows(dict(input_ids=torch.tensor([5, 6, 7])) for _ in range(4))
    box = NonFiniteGuard(dataset, AutoTokenizer.from_pretrained(tiny("llama")), LossTracker())
    box.begin_step([[(3, 2), (1, 1)]])
    box.losses, box.target_losses = [torch.tensor(1.0)], [torch.ones(3)]
    box.grad_norm = torch.tensor(2.0)
    box.on_pre_optimizer_step(Args, State, None)
    box.grad_norm = torch.tensor(float("inf"))
    with pytest.raises(UsageError, match="step 7: the gradient norm is not finite. Rows in that step: 5, 2"):
        box.on_pre_optimizer_step(Args, State, None)
    Args.fp16 = True  # there the loss scaler skips such a step
    box.on_pre_optimizer_step(Args, State, None)


def test_one_synchronisation_a_step(tiny, tmp_path, monkeypatch):
    """Reads of a tensor's value between the loader and the next step, with a log line for each: a host that trains on a
    GPU waits for it at each."""
    from alpaca.packing.sampler import OneStepAhead
    from alpaca.training.trainer import AlpacaTrainer
    from train import DataCollatorForSupervisedDataset, SupervisedDataset, TrainingArguments

    reads, at_step = [], []

    class Counting(AlpacaTrainer):
        def get_batch_samples(self, *args):
            at_step.append(len(reads))
            samples = super().get_batch_samples(*args)
            del reads[at_step[-1] :]  # the loader's tensors are the host's own
            return samples

    class OwnTensors(OneStepAhead):
        def fetch(self):
            before = len(reads)
            super().fetch()
            del reads[before:]

    monkeypatch.setattr("alpaca.training.trainer.OneStepAhead", OwnTensors)
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, original=original, name=name):
            reads.append(name)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"), model_max_length=512, pad_token="<unk>")
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        max_steps=4,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
    )
    Counting(
        model=AutoModelForCausalLM.from_pretrained(tiny("llama")),
        args=args,
        processing_class=tokenizer,
        train_dataset=SupervisedDataset(write_rows(tmp_path / "rows.json", 32), tokenizer),
        data_collator=DataCollatorForSupervisedDataset(tokenizer),
    ).train()
    assert [after - before for before, after in zip(at_step, at_step[1:])] == [1, 1, 1], reads


@pytest.mark.parametrize(
    "processes, changed",
    [
        (0, {}),
        (2, {"fsdp": "full_shard auto_wrap"}),
        (0, {"lora_r": 2, "save_strategy": "no"}),
    ],
)
def test_a_model_that_has_become_not_finite_is_not_saved(tiny, tmp_path, processes, changed):
    """The last step makes it so, which no loss shows any more."""
    write_rows(tmp_path / "rows.json", 20)
    flags = {**FLAGS, "max_steps": 1, "learning_rate": 1e300, **changed}
    out = tmp_path / "out"
    flags |= dict(model_name_or_path=tiny("llama"), data_path=tmp_path / "rows.json", output_dir=out)
    stopped = train(flags, processes, check=False)
    assert stopped.returncode == 2, stopped.stderr[-2000:]
    assert stopped.stderr.count("step 1: the model is not saved, as weights of it are not finite: ") == 1
    assert not list(out.rglob("*.safetensors")) and "saved to" not in stopped.stdout


def test_a_cast_that_overflows_is_not_saved(tiny, tmp_path):
    model = poisoned(tmp_path / "model", tiny("llama"), 1e6)
    flags = {**FLAGS, "max_steps": 1, "save_strategy": "no", "save_dtype": "float16", "model_name_or_path": model}
    flags |= dict(data_path=write_rows(tmp_path / "rows.json", 8), output_dir=tmp_path / "out")
    stopped = train(flags, check=False)
    assert stopped.returncode == 2 and "--save_dtype float16 holds nothing above 65504" in stopped.stderr


def test_a_start_model_that_is_not_finite_is_named(tiny, tmp_path):
    model = poisoned(tmp_path / "model", tiny("llama"), float("inf"))
    flags = {**FLAGS, "max_steps": 1, "save_strategy": "no", "model_name_or_path": model}
    flags |= dict(data_path=write_rows(tmp_path / "rows.json", 8), output_dir=tmp_path / "out")
    stopped = train(flags, check=False)
    assert "note: weights that are not finite, from the start: " in stopped.stdout and stopped.returncode == 2
