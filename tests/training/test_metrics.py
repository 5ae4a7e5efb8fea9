"""Operations that a step computes, counted by us from its plan and by torch as they are dispatched."""

import json

import pytest
import torch
from conftest import train, write_rows
from support.multimodal import MULTIMODAL, SIZES
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from alpaca.models.lora import LoraArguments, add_lora
from alpaca.packing.packing import StepTotals
from alpaca.training.metrics import Cost, SpeedMeter, matmul_rate
from alpaca.training.trainer import AlpacaTrainer
from train import SupervisedDataset, TrainingArguments

pytestmark = pytest.mark.slow  # many small cases

KINDS = {
    "llama": ("llama", {}),
    "grouped": ("llama", dict(num_attention_heads=4, num_key_value_heads=2)),
    "tied": ("llama", dict(tie_word_embeddings=True)),
    "opt": ("opt", dict(dropout=0.0)),
    "gpt2": ("gpt2", dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)),
}
WAYS = {
    "shared prefixes": {},
    "packed": dict(share_prefix=False),
    "padded": dict(batching="padded"),
}


def trainer_of(tiny, tmp_path, kind, lora=False, **flags):
    architecture, changes = KINDS[kind]
    config = AutoConfig.from_pretrained(tiny(architecture), **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if lora:
        model = add_lora(model, LoraArguments(lora_r=4), [], seed=0)
    rows = SupervisedDataset(
        write_rows(tmp_path / "rows.json", 40), AutoTokenizer.from_pretrained(tiny(architecture), model_max_length=512)
    )
    args = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none", **flags)
    from train import DataCollatorForSupervisedDataset

    tokenizer = AutoTokenizer.from_pretrained(tiny(architecture))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    collate = DataCollatorForSupervisedDataset(tokenizer)
    return AlpacaTrainer(model=model, args=args, train_dataset=rows, data_collator=collate, processing_class=tokenizer)


def counted(trainer):
    """(our totals of a step, torch's count of matrix products but attention's)."""
    loader = trainer.get_train_dataloader()
    plan = loader.batch_sampler.plan(next(loader.batch_sampler.steps()))
    trainer.model_wrapped = trainer.model
    with FlopCounterMode(display=False) as counter:
        trainer.gradient_of(loader.dataset, plan)
    by_operation = counter.get_flop_counts()["Global"]
    linear = {str(op): n for op, n in by_operation.items() if "attention" not in str(op) and "bmm" not in str(op)}
    return plan[0].step, sum(linear.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_linear_operations_are_those_that_torch_counts(tiny, tmp_path, kind, way):
    trainer = trainer_of(tiny, tmp_path, kind, per_device_train_batch_size=8, **WAYS[way])
    cost = Cost.of(trainer.model)
    step, found = counted(trainer)
    assert cost.body * step.computed + cost.head * step.logits == pytest.approx(found, rel=0.001)
    assert (step.computed < step.tokens) == (way == "shared prefixes")
    assert (cost.computed(step) < cost.useful(step)) == (way != "padded")


def test_frozen_weights_have_no_gradient_of_their_own(tiny, tmp_path):
    """But for the first layer's, whose input needs none."""
    trainer = trainer_of(tiny, tmp_path, "llama", lora=True, per_device_train_batch_size=8)
    cost = Cost.of(trainer.model)
    step, found = counted(trainer)
    ours = cost.body * step.computed + cost.head * step.logits
    full = Cost.of(trainer_of(tiny, tmp_path, "llama").model)
    assert found <= ours < 1.2 * found and ours < 0.8 * (full.body * step.computed + full.head * step.logits)


@pytest.mark.parametrize("kind", ["llama", "grouped", "gpt2"])
def test_attention_is_what_torch_counts_of_a_full_square(tiny, kind):
    """torch counts every pair, causal or not: L x L in place of L x (L + 1) / 2; and rotary positions: little."""
    architecture, changes = KINDS[kind]
    config = AutoConfig.from_pretrained(tiny(architecture), **changes, attn_implementation="eager")
    model, length = AutoModelForCausalLM.from_config(config), 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(1, length, dtype=torch.long), use_cache=False)
    of_attention = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "bmm" in str(op))
    assert of_attention == pytest.approx(Cost.of(model).attention / 3 * length * length, rel=0.01)


def test_operations_of_a_step_by_hand():
    cost, step = Cost(body=60, head=12, attention=6), StepTotals(2, 10, 8, 0, logits=3, pairs=30, useful_pairs=30)
    assert cost.computed(step) == 60 * 8 + 12 * 3 + 6 * 30
    assert cost.useful(step) == 72 * 10 + 6 * 30


def test_two_figures(monkeypatch, tiny):
    """A step of known operations in a known time on a device of known speed."""
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    meter = SpeedMeter(model, torch.device("cpu"), torch.float32, world_size=2)
    step = StepTotals(2, 100, 80, 0, logits=30, pairs=900, useful_pairs=900)
    clock = iter([100.0, 104.0, 104.0])
    monkeypatch.setattr("alpaca.training.metrics.matmul_rate", lambda *_: meter.cost.computed(step))
    monkeypatch.setattr("alpaca.training.metrics.time.time", lambda: next(clock))
    meter.begin_step(step)
    read = meter.read()
    assert read["mfu"] == pytest.approx(1 / 8, abs=1e-4) and read["tokens_per_second"] == 25
    assert read["useful_mfu"] == pytest.approx(meter.cost.useful(step) / meter.cost.computed(step) / 8, abs=1e-4)


def test_the_rate_is_that_of_a_product_that_takes_a_while():
    assert 1e9 < matmul_rate(torch.device("cpu"), torch.float32) < 1e14


@pytest.mark.slow
def test_mfu_of_a_real_run_is_below_one(tiny, tmp_path):
    flags = dict(model_name_or_path=tiny("llama"), data_path=write_rows(tmp_path / "rows.json", 60))
    train(flags | dict(output_dir=tmp_path / "run", max_steps=6, logging_steps=1, per_device_train_batch_size=16))
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in log if "mfu" in entry]
    assert len(steps) == 6 and all(0 < entry["mfu"] < 1 for entry in steps)
    assert all(entry["mfu"] < entry["useful_mfu"] for entry in steps)


SMALL = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_experts_per_tok=2,
)


@pytest.mark.parametrize(
    "kind, names, more",
    [
        ("mixtral", dict(num_local_experts=8), 0),
        ("olmoe", dict(num_experts=8), 0),
        (
            "qwen2_moe",
            dict(num_experts=8, moe_intermediate_size=64, shared_expert_intermediate_size=48),
            3 * 32 * 48 + 32,
        ),
    ],
)
def test_a_token_is_multiplied_with_the_experts_that_are_chosen_for_it(kind, names, more):
    """Whatever the configuration calls their number. By hand: attention, two experts, the router; 4640 are a
    shared expert (3 x 32 x 48) and its gate."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **names))
    layer = 4 * 32 * 32 + 2 * 3 * 32 * 64 + 8 * 32 + more
    assert Cost.of(model).body == 6 * 2 * layer and Cost.of(model).head == 6 * 50 * 32


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_what_reads_images_is_not_counted_for_text(kind):
    model = MULTIMODAL[kind](SIZES | dict(vocab_size=64, max_position_embeddings=64))
    whole = Cost.of(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("visual" not in name and "vision" not in name)
    assert Cost.of(model) == whole
    weights = [p.numel() for p in model.get_decoder().parameters() if p.dim() > 1]
    assert whole.body == 6 * (sum(weights) - 64 * SIZES["hidden_size"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_rate_is_measured_in_bounded_work_where_half_precision_is_slow(dtype, monkeypatch):
    """A product that takes long is the last size; the best of all sizes counts."""
    sizes, seconds = [], {256: 0.01, 512: 0.2, 1024: 1.6, 2048: 12.8}
    now = [0.0]

    def product(left, right, out):
        assert left.dtype == right.dtype == out.dtype == dtype
        sizes.append(len(left))
        now[0] += seconds[len(left)]

    monkeypatch.setattr("alpaca.training.metrics.torch.matmul", product)
    monkeypatch.setattr("alpaca.training.metrics.time.perf_counter", lambda: now[0])
    assert matmul_rate(torch.device("cpu"), dtype) == pytest.approx(2 * 256**3 / 0.01)
    assert set(sizes) == {256, 512} and now[0] < 2


def test_a_model_without_attention_has_a_cost():
    from transformers import MambaConfig

    config = MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1)
    assert Cost.of(AutoModelForCausalLM.from_config(config)).attention == 0
