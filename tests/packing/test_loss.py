"""One SGD step without clipping moves the weights by minus the gradient: compared with plain torch."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import train, weights, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from alpaca.common.errors import UsageError
from alpaca.packing.loss import LinearHead, _LinearCrossEntropy, weighted_cross_entropy
from alpaca.packing.packing import measure_rows
from alpaca.packing.sampler import StepSampler
from train import DataCollatorForSupervisedDataset, SupervisedDataset

ONE_STEP = dict(
    optim="sgd",
    learning_rate=0.5,
    lr_scheduler_type="constant",
    max_grad_norm=0,
    max_steps=1,
    save_strategy="no",
    logging_steps=1,
)


def plain_torch_step(
    model_path, data_path, normalization, num_rows, batch_size, smoothing=0.0, boundary="stanford", world_size=1
):
    """Weights after one step of size 0.5 down the gradient of the whole step's loss, computed without the Trainer, in
    the micro-batches of 2023: a rank's rows are every `world_size`-th."""
    tokenizer = AutoTokenizer.from_pretrained(model_path, model_max_length=512)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            weight[-1] = weight[:-1].mean(dim=0)
    dataset = SupervisedDataset(data_path, tokenizer, prompt_boundary=boundary)
    order = StepSampler(measure_rows(dataset), batch_size, seed=42).order()[:num_rows]
    collate = DataCollatorForSupervisedDataset(tokenizer)
    sums, counts = [], []
    of_ranks = [order[rank::world_size] for rank in range(world_size)]
    for rows in (rank[at : at + batch_size] for rank in of_ranks for at in range(0, len(rank), batch_size)):
        batch = collate([dataset[i] for i in rows])
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
    """17 rows in micro-batches of 4: one has 1 row, and of 2 ranks the second has no third one."""
    data, output = write_rows(tmp_path / "rows.json", 17), tmp_path / "out"
    flags = dict(
        model_name_or_path=tiny("llama"),
        data_path=data,
        output_dir=output,
        loss_normalization=normalization,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=8,
        **ONE_STEP,
    )
    if processes:  # several packs on each rank, whose gradients are held: there is memory enough for a tiny model
        flags |= dict(fsdp="full_shard auto_wrap", max_tokens_per_pack=150)
    train(flags, processes)
    expected, loss = plain_torch_step(tiny("llama"), data, normalization, 17, 4, world_size=max(processes, 1))
    assert_close(output, expected)
    from conftest import history

    assert history(output)[0]["loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_torchs_in_value_and_gradient(smoothing):
    """2,500 targets are three chunks. A scale in between, as float16's loss scaler puts there, reaches the gradient."""
    torch.manual_seed(0)
    logits = torch.randn(2500, 97, dtype=torch.float64) * 5
    targets, weights = torch.randint(0, 97, (2500,)), torch.rand(2500)
    ours, plain = logits.float().requires_grad_(), logits.requires_grad_()
    loss, of_targets = weighted_cross_entropy(ours, targets, weights, smoothing)
    expected = F.cross_entropy(plain, targets, reduction="none", label_smoothing=smoothing)
    (loss * 3).backward()
    ((expected * weights).sum() * 3).backward()
    assert loss.item() == pytest.approx((expected * weights).sum().item(), rel=1e-6)
    torch.testing.assert_close(of_targets.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), plain.grad, rtol=1e-5, atol=1e-6)


def test_the_loss_of_half_precision_logits_is_computed_in_float32():
    """Also the gradient: weights as small as those of a step of 8,000 targets vanish in float16 without its scaler."""
    torch.manual_seed(0)
    logits, targets = torch.randn(100, 997).bfloat16() * 5, torch.randint(0, 997, (100,))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = weighted_cross_entropy(logits, targets, torch.ones(100))
    exact = F.cross_entropy(logits.double(), targets, reduction="sum")
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-6)
    half = torch.randn(8, 997).half().requires_grad_()
    loss, _ = weighted_cross_entropy(half, targets[:8], torch.full((8,), 1 / 8000))
    (loss * 65536).backward()
    assert half.grad.float().abs().min() > 0


@pytest.mark.slow
@pytest.mark.parametrize("option", [dict(prompt_boundary="split"), dict(label_smoothing_factor=0.1)])
def test_gradient_with_options(tiny, tmp_path, option):
    data, output = write_rows(tmp_path / "rows.json", 8), tmp_path / "out"
    train(
        dict(
            model_name_or_path=tiny("llama"),
            data_path=data,
            output_dir=output,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            **ONE_STEP,
            **option,
        )
    )
    expected, _ = plain_torch_step(
        tiny("llama"),
        data,
        "token",
        8,
        4,
        option.get("label_smoothing_factor", 0.0),
        option.get("prompt_boundary", "stanford"),
    )
    assert_close(output, expected)


# ---- without all logits at once ----


@pytest.mark.slow
@pytest.mark.parametrize("ours", [False, True], ids=["torch", "older torch"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("positions", [0, 1, 700])
def test_a_linear_head_has_loss_and_gradient_of_plain_logits(monkeypatch, ours, bias, dtype, tolerance, positions):
    """Against torch's own cross entropy over all logits, in float32; more than one chunk of targets."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 5000, bias=bias)
    hidden = torch.randn(positions, 24)
    targets, shares = torch.randint(0, 5000, (positions,)), torch.rand(positions)
    if ours:
        monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    elif not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch does not have it")
    found, expected = [], []
    for results in (found, expected):
        inputs = hidden.clone().requires_grad_()
        layer.zero_grad()
        if results is found:
            losses = LinearHead(layer, dtype).losses(inputs, targets)
        else:
            losses = F.cross_entropy(layer(inputs), targets, reduction="none")
        (losses * shares).sum().backward()
        grads = [parameter.grad.clone() for parameter in (inputs, *layer.parameters())]
        results += [losses.detach(), *grads]
    assert len(found) == len(expected) == 3 + bias
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_the_older_way_is_exact_to_finite_differences():
    torch.manual_seed(0)
    hidden, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 4), (9, 4)))
    bias, targets = torch.randn(9, dtype=torch.float64, requires_grad=True), torch.randint(0, 9, (6,))
    losses = _LinearCrossEntropy.apply(hidden, weight, bias, targets)
    reference = F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")
    torch.testing.assert_close(losses.double(), reference, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, more",
    [
        pytest.param(1, {}, marks=pytest.mark.stress),
        pytest.param(2, {}, marks=pytest.mark.stress),
        (2, dict(fsdp="full_shard")),
        pytest.param(1, dict(batching="padded"), marks=pytest.mark.stress),
        pytest.param(1, dict(lora_r=4), marks=pytest.mark.stress),
    ],
)
def test_runs_with_a_linear_head_are_the_same(tiny, tmp_path, ranks, more):
    """Packed, padded, with LoRA, on two ranks, sharded over two."""
    flags = dict(
        model_name_or_path=tiny("llama"),
        data_path=write_rows(tmp_path / "rows.json", 24),
        **ONE_STEP | dict(max_steps=4, learning_rate=0.1),
        per_device_train_batch_size=2,
        eval_size=4,
        eval_strategy="steps",
        eval_steps=4,
        **more,
    )
    for name, with_it in (("plain", False), ("linear", True)):
        train({**flags, "output_dir": tmp_path / name, "linear_cross_entropy": with_it}, ranks)
    logs = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("plain", "linear")]
    plain, linear = (next(e["eval_loss"] for e in log["log_history"] if "eval_loss" in e) for log in logs)
    assert linear == pytest.approx(plain, abs=1e-5)
    files = [next((tmp_path / name).glob("*model.safetensors")) for name in ("plain", "linear")]
    plain, linear = map(load_file, files)
    assert max((plain[name] - linear[name]).abs().max().item() for name in plain) < 2e-6


def test_evaluation_has_the_linear_head_too(tiny, tmp_path, monkeypatch):
    from alpaca.training.trainer import AlpacaTrainer
    from train import TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"), model_max_length=512, pad_token="<unk>")
    rows = SupervisedDataset(write_rows(tmp_path / "rows.json", 10), tokenizer)
    flags = dict(use_cpu=True, report_to="none", linear_cross_entropy=True)
    trainer = AlpacaTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny("llama")),
        args=TrainingArguments(str(tmp_path / "out"), **flags),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorForSupervisedDataset(tokenizer),
        processing_class=tokenizer,
    )
    targets, losses = [], LinearHead.losses

    def counted(self, hidden, of_hidden):
        targets.append(len(of_hidden))
        return losses(self, hidden, of_hidden)

    monkeypatch.setattr(LinearHead, "losses", counted)
    trainer.evaluate()
    assert sum(targets) == sum(int((labels[1:] != -100).sum()) for labels in rows.labels)


def test_models_with_other_logits_cannot_have_it(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    LinearHead.of(model, torch.float32)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(UsageError, match="its logits are scaled .final_logit_softcapping.; drop the flag"):
        LinearHead.of(model, torch.float32)
