"""--torch_compile: how often something is compiled, and that its gradient is the same. Sharded: test_sharding.py."""

import pytest
import torch
from conftest import write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from alpaca.common.errors import UsageError
from alpaca.training.trainer import AlpacaTrainer
from train import DataCollatorForSupervisedDataset, SupervisedDataset, TrainingArguments

pytestmark = pytest.mark.slow


class Counting:
    """A backend that counts what it compiles and how often that is called."""

    def __init__(self):
        self.compiled = self.called = 0

    def __call__(self, graph, inputs):
        self.compiled += 1

        def counted(*values):
            self.called += 1
            return graph(*values)

        return counted


class Watch(TrainerCallback):
    """The gradient of the first step, and a backend's counts after each."""

    def __init__(self, backend):
        self.backend, self.gradient, self.compiled, self.called = backend, {}, [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            self.gradient.setdefault(name, parameter.grad.clone())
        if self.backend is not None:
            self.compiled.append(self.backend.compiled)
            self.called.append(self.backend.called)


@pytest.fixture
def watched(tiny, tmp_path):
    """watched(backend, **flags) -> the Watch of a run of 5 steps, compiled unless `backend` is None."""
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"), model_max_length=512, pad_token="</s>")
    dataset = SupervisedDataset(write_rows(tmp_path / "rows.json", 40), tokenizer, cache_dir=str(tmp_path))

    def run(backend, **flags) -> Watch:
        torch._dynamo.reset()
        args = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            use_cpu=True,
            max_steps=5,
            report_to="none",
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            save_strategy="no",
            torch_compile=backend is not None,
            **flags,
        )
        args.torch_compile_backend = backend
        model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
        names, watch = model.state_dict().keys(), Watch(backend)
        trainer = AlpacaTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            callbacks=[watch],
            data_collator=DataCollatorForSupervisedDataset(tokenizer),
        )
        trainer.train()
        assert model.state_dict().keys() == names
        return watch

    return run


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({}, marks=pytest.mark.stress),
        {"gradient_checkpointing": True},
        pytest.param({"batching": "padded"}, marks=pytest.mark.stress),
    ],
)
def test_layers_compile_once_and_compute_the_same_gradient(watched, capsys, flags):
    plain = watched(None, **flags)
    compiled = watched(Counting(), **flags)
    said = capsys.readouterr().out
    assert said.count("packs that share what rows begin with: ") == (0 if "batching" in flags else 2)
    assert 0 < compiled.compiled[0] == compiled.compiled[-1] <= 8
    assert len(set(compiled.called)) == 5, "every step runs what was compiled"
    for name, expected in plain.gradient.items():
        assert (compiled.gradient[name] - expected).norm() <= 1e-5 * expected.norm(), name


def test_a_backend_that_is_unknown_or_fails_is_one_message(watched):
    def broken(graph, inputs):
        raise OSError("no compiler")

    with pytest.raises(UsageError, match="--torch_compile_backend, --torch_compile_mode: .*'inducter'"):
        watched("inducter")
    with pytest.raises(UsageError, match="(?s)--torch_compile: .* does not work here.*OSError: no compiler$"):
        watched(broken)
