"""A step that is not finite stops the run, before it reaches the weights, and its rows are named in a file."""

import json

import pytest
import torch
from conftest import train, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow

FLAGS = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3, num_train_epochs=1,
             logging_steps=1, save_strategy="steps", save_steps=1, save_total_limit=1, pad_token="<unk>",
             train_sampling_strategy="sequential")  # fmt: skip


def poisoned(folder, source, value) -> str:
    """A copy of a model whose embedding of the byte 0xCE, which begins a Greek letter, is `value`."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("<0xCE>")] = value
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("processes, fsdp", [(0, ""), (2, "full_shard auto_wrap")])
def test_rows_of_a_loss_that_is_not_finite_are_named(tiny, tmp_path, processes, fsdp):
    """Row 13 holds the letter. In order, with 4 rows a step on one process, it is in step 4, micro-batch 1 with row 12;
    on two ranks with 8 a step in step 2, on rank 0, micro-batch 1."""
    rows = json.loads(open(write_rows(tmp_path / "rows.json", 20)).read())
    rows[13]["output"] += " Ω"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    model = poisoned(tmp_path / "model", tiny("llama"), float("nan"))
    out = tmp_path / "out"
    flags = dict(model_name_or_path=model, data_path=tmp_path / "rows.json", output_dir=out, fsdp=fsdp, **FLAGS)
    stopped = train(flags, processes, check=False)
    step = 2 if processes else 4
    assert stopped.returncode != 0 and stopped.stderr.count(f"step {step}: the loss is not finite") == 1
    assert "Rows in that micro-batch: 12, 13." in stopped.stderr
    assert f"step {step - 1}/" in stopped.stdout and f"step {step}/" not in stopped.stdout
    content = json.loads((out / f"nonfinite_step_{step}.json").read_text())
    assert (content["step"], content["what"], content["rows"]) == (step, "loss", [12, 13])
    (batch,) = content["micro_batches"]
    assert (batch["rank"], batch["micro_batch"], batch["loss"]) == (0, 1 if processes else 0, "nan")
    assert rows[13]["instruction"] in batch["rows"][1]["starts"] and batch["rows"][1]["row"] == 13
    assert content["last_log_lines"][-1]["step"] == step - 1
    saved = AutoModelForCausalLM.from_pretrained(out / f"checkpoint-{step - 1}").get_input_embeddings().weight
    assert int(torch.isnan(saved).any(1).sum()) == 1, "only the row that was poisoned from the start"


def test_a_gradient_that_is_not_finite_stops_too(tiny, tmp_path):
    """With losses that are finite."""
    from alpaca.blackbox import BlackBox
    from alpaca.errors import UsageError

    class Args:
        fp16, world_size, process_index, output_dir = False, 1, 0, str(tmp_path)

    class State:
        global_step, epoch, log_history = 6, 0.5, []

    box = BlackBox(AutoTokenizer.from_pretrained(tiny("llama")))
    ids = torch.tensor([[5, 6, 0], [7, 8, 9]])
    batch = {"rows": [3, 1], "input_ids": ids, "attention_mask": (ids > 0).long()}
    box.begin_step([batch])
    assert "rows" not in batch, "the model would be given it"
    box.losses = [torch.tensor(1.0)]
    box.grad_norm = torch.tensor(2.0)
    box.on_pre_optimizer_step(Args, State, None)
    box.grad_norm = torch.tensor(float("inf"))
    with pytest.raises(UsageError, match="step 7: the gradient norm is not finite. Rows in that step: 3, 1"):
        box.on_pre_optimizer_step(Args, State, None)
    Args.fp16 = True  # there the loss scaler skips such a step
    box.on_pre_optimizer_step(Args, State, None)


def test_one_synchronisation_a_step(tiny, tmp_path, monkeypatch):
    """Counted as reads of a tensor's value while BlackBox looks at a step of four micro-batches."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from alpaca.blackbox import BlackBox

    reads = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default:
                reads.append(function)
            return function(*args, **(kwargs or {}))

    class Args:
        fp16, world_size = False, 1

    box = BlackBox(None)
    box.losses, box.grad_norm = [torch.tensor(float(i)) for i in range(4)], torch.tensor(1.0)
    with Count():
        box.on_pre_optimizer_step(Args, None, None)
    assert len(reads) == 1
