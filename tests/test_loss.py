"""One SGD step without clipping moves the weights by minus the gradient: compared with plain torch."""

import pytest
import torch
import torch.nn.functional as F
from conftest import train, weights, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from alpaca.batching import StepSampler
from train import DataCollatorForSupervisedDataset, SupervisedDataset

ONE_STEP = dict(optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0, max_steps=1,
                save_strategy="no", logging_steps=1)  # fmt: skip


def plain_torch_step(model_path, data_path, normalization, num_rows, batch_size, smoothing=0.0, boundary="stanford"):
    """Weights after one step of size 0.5 down the gradient of the whole step's loss, computed without the Trainer."""
    tokenizer = AutoTokenizer.from_pretrained(model_path, model_max_length=512)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            weight[-1] = weight[:-1].mean(dim=0)
    dataset = SupervisedDataset(data_path, tokenizer, prompt_boundary=boundary)
    order = StepSampler(len(dataset), batch_size, seed=42).order()[:num_rows]
    collate = DataCollatorForSupervisedDataset(tokenizer)
    sums, counts = [], []
    for start in range(0, num_rows, batch_size):
        batch = collate([dataset[i] for i in order[start : start + batch_size]])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        sums.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=smoothing))
        counts.append((labels != -100).sum())
    if normalization == "token":
        loss = sum(sums) / sum(counts)
    else:
        loss = sum(total / count for total, count in zip(sums, counts)) / len(sums)
    loss.backward()
    return {name: p.detach() - 0.5 * p.grad for name, p in model.named_parameters()}, loss.item()


def assert_close(output_dir, expected):
    saved = weights(output_dir)
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("normalization", ["token", "microbatch"])
@pytest.mark.parametrize("processes", [0, 2])
def test_gradient_of_a_step(tiny, tmp_path, normalization, processes):
    """17 rows in micro-batches of 4: the fifth has 1 row, and of 2 ranks the second has no third one."""
    data, output = write_rows(tmp_path / "rows.json", 17), tmp_path / "out"
    flags = dict(model_name_or_path=tiny("llama"), data_path=data, output_dir=output, loss_normalization=normalization,
                 per_device_train_batch_size=4, gradient_accumulation_steps=8, **ONE_STEP)  # fmt: skip
    if processes:
        flags["fsdp"] = "full_shard auto_wrap"
    train(flags, processes)
    expected, loss = plain_torch_step(tiny("llama"), data, normalization, 17, 4)
    assert_close(output, expected)
    from conftest import history

    assert history(output)[0]["loss"] == pytest.approx(loss, abs=1e-5)


def test_the_loss_of_bf16_logits_is_computed_in_float32():
    from argparse import Namespace

    from alpaca.trainer import AlpacaTrainer

    torch.manual_seed(0)
    logits, labels = torch.randn(2, 50, 997).bfloat16() * 5, torch.randint(0, 997, (2, 50))
    trainer = Namespace(args=Namespace(label_smoothing_factor=0.0))
    ours = AlpacaTrainer._summed_loss(trainer, logits, labels)
    exact = F.cross_entropy(logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    assert ours.dtype == torch.float32 and ours.item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("option", [dict(prompt_boundary="split"), dict(label_smoothing_factor=0.1)])
def test_gradient_with_options(tiny, tmp_path, option):
    data, output = write_rows(tmp_path / "rows.json", 8), tmp_path / "out"
    train(dict(model_name_or_path=tiny("llama"), data_path=data, output_dir=output, per_device_train_batch_size=4,
               gradient_accumulation_steps=2, **ONE_STEP, **option))  # fmt: skip
    expected, _ = plain_torch_step(
        tiny("llama"), data, "token", 8, 4, option.get("label_smoothing_factor", 0.0),
        option.get("prompt_boundary", "stanford"),
    )  # fmt: skip
    assert_close(output, expected)
