"""Packed rows train as padded ones: the plan, the prefixes, the weights, the gradient, and the check at the start."""

import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import history, largest_difference, train, write_rows
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from alpaca.common.errors import UsageError
from alpaca.data.tokenization import IGNORE_INDEX
from alpaca.packing import attention
from alpaca.packing.check import select_packing
from alpaca.packing.packing import MicroBatch, PackedBatchDataset, find_prefixes, measure_rows, plan_packing
from alpaca.packing.sampler import StepSampler, _longest_first, plan_packs
from train import DataCollatorForSupervisedDataset, SupervisedDataset, TrainingArguments, parse_flags

COLLATE = DataCollatorForSupervisedDataset(SimpleNamespace(pad_token_id=0))


def alpaca_lengths(number: int, seed: int) -> list[int]:
    """Like those of the real rows: mean 129, median 114, 90% at most 206."""
    drawn = np.random.default_rng(seed).lognormal(np.log(114), 0.5, number)
    return np.clip(drawn, 30, 512).astype(int).tolist()


def random_rows(number: int, seed: int, share: bool = True, without: float = 0.1) -> list[dict]:
    """Rows of 2 to 60 tokens that begin with one of two templates or with nothing in common; some `without` targets."""
    draw, rows = np.random.default_rng(seed), []
    for _ in range(number):
        template = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 9, 9, 8, 7, 6, 5, 4, 3], []][draw.integers(3) if share else 2]
        prompt = template + draw.integers(10, 99, draw.integers(1, 25)).tolist()
        answer = draw.integers(10, 99, int(draw.integers(1, 25) * (draw.random() >= without))).tolist()
        labels = [IGNORE_INDEX] * len(prompt) + answer
        rows.append(dict(input_ids=torch.tensor(prompt + answer), labels=torch.tensor(labels)))
    return rows


# ---- the plan ----


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("capacity", [100, 2048, 8192])
def test_every_row_is_in_one_pack_and_packs_are_within_the_budget(world_size, capacity):
    for seed in range(20):
        costs = alpaca_lengths(int(np.random.default_rng(seed).integers(0, 200)), seed)
        packs = plan_packs(costs, capacity, world_size)
        assert sorted(item for pack in packs for item in pack) == list(range(len(costs)))
        assert len(packs) % world_size == 0 and packs
        sizes = [sum(costs[item] for item in pack) for pack in packs]
        assert max(sizes) <= max(capacity, max(costs, default=0))
        assert sizes == sorted(sizes, reverse=True), "packs that run at the same time are of about the same size"
        assert max(sizes) <= max(sum(costs[i] for i in pack) for pack in _longest_first(costs, len(packs)))


@pytest.mark.parametrize("world_size, capacity", [(2, 16384), (4, 16384), (4, 4096), (4, 2048)])
def test_ranks_wait_less_than_a_hundredth_of_a_step(world_size, capacity):
    waiting = []
    for seed in range(50):
        costs = alpaca_lengths(128, seed)
        packs = plan_packs(costs, capacity, world_size)
        sizes = [sum(costs[item] for item in pack) for pack in packs]
        slowest = sum(max(sizes[at : at + world_size]) for at in range(0, len(sizes), world_size))
        waiting.append(slowest * world_size / sum(sizes) - 1)
    assert np.mean(waiting) < 0.01


def test_share_prefix_false_packs_every_row_in_full():
    config = dict(vocab_size=99, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model, rows = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config)), random_rows(40, seed=0)
    for words, shares in (([], True), (["--share_prefix", "False"], False), (["--no_share_prefix"], False)):
        args = parse_flags(["--data_path", "x.json", "--output_dir", "out", "--use_cpu", *words])[-1]
        assert bool(select_packing(model, args, rows, measure_rows(rows)).prefixes) is shares


@pytest.mark.parametrize("normalization", ["token", "microbatch"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_step_has_the_rows_and_weights_of_the_padded_one(world_size, normalization):
    """Three epochs of 45 rows, 16 a step: the last step has 13, and at 4 ranks two of them have no rows left. So many
    rows have no target that some micro-batches have none either."""
    rows = random_rows(45, seed=world_size, without=0.6)
    sizes = measure_rows(rows)

    def epochs(packing):
        samplers = [
            StepSampler(
                sizes, 2, 8 // world_size, world_size, rank, seed=5, normalization=normalization, packing=packing
            )
            for rank in range(world_size)
        ]
        for epoch in range(3):
            for sampler in samplers:
                sampler.set_epoch(epoch)
            ranks = [list(sampler) for sampler in samplers]
            assert {len(rank) for rank in ranks} == {len(samplers[0])}
            per_step = samplers[0].accumulation
            for start in range(0, len(ranks[0]), per_step):
                of_ranks = [[batch for slot in rank[start : start + per_step] for batch in slot] for rank in ranks]
                assert len({len(batches) for batches in of_ranks}) == 1, "all ranks gather parameters together"
                yield {
                    row: weight for rank in of_ranks for batch in rank for row, weight in zip(batch.rows, batch.weights)
                }

    padded, packed = list(epochs(None)), list(epochs(plan_packing(rows, sizes, 120, True)))
    assert packed == padded and [len(step) for step in padded] == [16, 16, 13] * 3
    for step in padded:
        total = sum(weight * sizes.num_targets[row] for row, weight in step.items())
        assert total == pytest.approx(1.0), "a mean: over targets, or over the means of micro-batches"


def test_totals_are_those_of_the_batches():
    rows = random_rows(30, seed=3)
    sizes = measure_rows(rows)
    for packing in (None, plan_packing(rows, sizes, 150, True)):
        samplers = [StepSampler(sizes, 4, 2, 2, rank, seed=1, packing=packing) for rank in range(2)]
        batches = [PackedBatchDataset(rows, COLLATE, packing)[b] for s in samplers for slot in s for b in slot]
        steps = {id(batch["step"]): batch["step"] for batch in batches}
        assert sum(step.computed for step in steps.values()) // 2 == sum(b["input_ids"].numel() for b in batches)
        assert sum(step.tokens for step in steps.values()) // 2 == sum(len(row["labels"]) for row in rows)


# ---- prefixes and packs ----


def test_sizes_are_counted_from_the_labels():
    rows = random_rows(200, seed=0)
    sizes = measure_rows(rows)
    for number, row in enumerate(rows):
        targets = [at for at, label in enumerate(row["labels"].tolist()) if label != IGNORE_INDEX and at > 0]
        expected = (len(row["labels"]), len(targets), targets[0] if targets else len(row["labels"]))
        assert (sizes.lengths[number], sizes.num_targets[number], sizes.first_target[number]) == expected


def test_prefixes_are_the_templates_and_end_before_what_predicts_the_first_target():
    rows = random_rows(300, seed=1)
    prefixes, prefix_of = find_prefixes(rows, measure_rows(rows))
    assert sorted(map(len, prefixes)) == [7, 10]
    for row, prefix in zip(rows, prefix_of):
        begins = [i for i, ids in enumerate(prefixes) if row["input_ids"][: len(ids)].tolist() == ids.tolist()]
        assert begins == ([prefix] if prefix >= 0 else [])
    same = [
        dict(input_ids=torch.arange(1, 9), labels=torch.tensor([IGNORE_INDEX] * first + [*range(first + 1, 9)]))
        for first in (3, 5, 5, 5)
    ]
    (prefix,), prefix_of = find_prefixes(same, measure_rows(same))
    assert len(prefix) == 4 and prefix_of.tolist() == [-1, 0, 0, 0], "the row of 3 predicts from its position 2"
    assert find_prefixes(random_rows(50, 1, share=False), measure_rows(random_rows(50, 1, share=False)))[0] == []


def test_a_pack_holds_each_row_behind_its_prefix():
    rows = random_rows(40, seed=2)
    sizes = measure_rows(rows)
    packing = plan_packing(rows, sizes, 4096, True)
    chosen = [row for row in range(40) if sizes.num_targets[row]][:12]
    batch = PackedBatchDataset(rows, COLLATE, packing)[MicroBatch(chosen, [row + 1.0 for row in chosen], True, None)]
    layout, ids = batch["pack"], batch["input_ids"][0]
    assert ids.shape == batch["position_ids"][0].shape and layout.tokens == len(ids) == packing.tokens(chosen)
    starts = np.cumsum([0, *layout.prefix_lengths, *layout.row_lengths])
    predicted = Counter()
    for number, row in enumerate(chosen):
        start, end = starts[len(layout.prefix_lengths) + number :][:2]
        shared = packing.prefixes[packing.prefix_of[row]] if packing.prefix_of[row] >= 0 else ids[:0]
        assert torch.equal(torch.cat([shared, ids[start:end]]), rows[row]["input_ids"])
        assert batch["position_ids"][0, start:end].tolist() == list(range(len(shared), len(rows[row]["labels"])))
        for keep, target, weight in zip(batch["target_positions"], batch["targets"], batch["weights"]):
            if start <= keep < end:
                position = int(keep - start) + len(shared) + 1
                assert rows[row]["labels"][position] == target and weight == row + 1
                predicted[row] += 1
    assert predicted == Counter({row: int(sizes.num_targets[row]) for row in chosen})
    assert batch["rows"] == [(row, int(sizes.num_targets[row])) for row in chosen]


def test_a_rank_without_rows_gets_one_token_without_a_target():
    for packing in (None, plan_packing(random_rows(9, 1), measure_rows(random_rows(9, 1)), 99, True)):
        batch = PackedBatchDataset(random_rows(9, 1), COLLATE, packing)[MicroBatch([], [], packing is not None, None)]
        assert batch["input_ids"].shape == (1, 1) and len(batch["target_positions"]) == len(batch["weights"]) == 0


# ---- gradients ----


def tiny_model(tiny, kind: str):
    architecture, changes = {
        "llama": ("llama", {}),
        "grouped": ("llama", dict(num_attention_heads=4, num_key_value_heads=2)),
        "tied": ("llama", dict(tie_word_embeddings=True)),
        "opt": ("opt", {}),
        "gpt2": ("gpt2", {}),
    }[kind]
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(tiny(architecture), **changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32), architecture


def sampler_of(rows, world_size, normalization, packing):
    return StepSampler(
        measure_rows(rows), 3, 8 // world_size, world_size, seed=1, normalization=normalization, packing=packing
    )


@pytest.fixture(scope="session")
def real_rows(tiny, tmp_path_factory):
    path = write_rows(tmp_path_factory.mktemp("rows") / "rows.json", 22)

    def rows(architecture: str) -> SupervisedDataset:
        tokenizer = AutoTokenizer.from_pretrained(tiny(architecture), model_max_length=512)
        return SupervisedDataset(path, tokenizer)

    return rows


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "grouped", "tied", "opt", "gpt2"])
def test_the_gradient_is_that_of_padded_rows(tiny, real_rows, kind):
    """Of every parameter, both normalizations, 1 rank and 4, with shared prefixes and without; under bfloat16 autocast
    no further from float32 than padded rows are. The last of four ranks has fewer rows than it has packs."""
    from alpaca.packing.check import largest_difference, step_gradient

    model, architecture = tiny_model(tiny, kind)
    dataset = real_rows(architecture)
    rows, sizes = PackedBatchDataset(dataset, COLLATE), measure_rows(dataset)

    def gradient(world_size, normalization, packing, bf16=False):
        rows.packing = packing
        return step_gradient(model, rows, sampler_of(dataset, world_size, normalization, packing), bf16)

    shared, whole = plan_packing(dataset, sizes, 400, True), plan_packing(dataset, sizes, 10**6, False)
    assert len(shared.prefixes) == 2
    for normalization, world_size, packings in (
        ("token", 1, (shared, whole)),
        ("microbatch", 1, (shared, whole)),
        ("microbatch", 4, (shared,)),  # whose micro-batches are others
        ("token", 4, (shared, None)),
    ):
        loss, reference = gradient(1 if normalization == "token" else world_size, normalization, None)
        assert len(reference) == len(list(model.parameters()))
        for packing in packings:
            found, gradients = gradient(world_size, normalization, packing)
            worst, name = largest_difference(gradients, reference)
            assert worst < 1e-5, (normalization, world_size, name)
            assert found == pytest.approx(loss, rel=1e-6)
    _, reference = gradient(1, "token", None)
    padded = largest_difference(gradient(1, "token", None, bf16=True)[1], reference)[0]
    packed = largest_difference(gradient(1, "token", shared, bf16=True)[1], reference)[0]
    assert packed < 1.3 * padded


@pytest.mark.slow
def test_two_epochs_end_with_the_same_weights(tiny, tmp_path):
    flags = dict(
        model_name_or_path=tiny("llama"),
        data_path=write_rows(tmp_path / "rows.json", 21),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
    )
    for name, more in {"padded": dict(batching="padded"), "packed": dict(max_tokens_per_pack=150)}.items():
        train({**flags, **more, "output_dir": tmp_path / name})
    assert largest_difference(tmp_path / "padded", tmp_path / "packed") < 1e-5
    padded, packed = history(tmp_path / "padded"), history(tmp_path / "packed")
    assert len(padded) == len(packed) == 6
    for then, now in zip(padded, packed):
        assert now["loss"] == pytest.approx(then["loss"], abs=1e-5)
        assert now["padding_share"] == 0 < then["padding_share"] < 1
        assert now.keys() >= {"tokens_per_second", "examples_per_second", "mfu", "peak_memory_gb"}


# ---- the check at the start ----


def trainer_for(tiny, real_rows, tmp_path, kind="llama", **flags):
    from alpaca.training.trainer import AlpacaTrainer

    model, architecture = tiny_model(tiny, kind)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=1,
        report_to="none",
        save_strategy="no",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        **flags,
    )
    return AlpacaTrainer(model=model, args=args, train_dataset=real_rows(architecture), data_collator=COLLATE)


@pytest.mark.slow
def test_the_check_finds_a_leak_between_rows_and_falls_back(tiny, real_rows, tmp_path, capsys, monkeypatch):
    trainer = trainer_for(tiny, real_rows, tmp_path)
    trainer.train()
    assert "packs that share what rows begin with: " in (said := capsys.readouterr().out) and "note: no" not in said
    assert re.search(
        r"^checked: a packed step has the gradient of a padded one up to rounding "
        r"\([\d.]+e-0\d; float32 rounding alone [\d.]+e-0\d\)$",
        said,
        re.MULTILINE,
    )

    def leaking(query, key, value, pack, scaling, dropout):
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return sdpa(query, key, value, is_causal=True, scale=scaling).transpose(1, 2)

    monkeypatch.setattr(attention, "_row_by_row", leaking)
    trainer = trainer_for(tiny, real_rows, tmp_path)
    trainer.train()
    said = capsys.readouterr().out
    assert (
        "note: no packs that share what rows begin with: the gradient of 4 rows differs from the padded one by" in said
    )
    assert "note: no packs: the gradient" in said and "note: padded batches" in said
    assert trainer.state.log_history[-1]["train_loss"] > 0


@pytest.mark.slow
def test_prefixes_are_not_shared_with_dropout_and_packs_not_made_where_told_so(tiny, real_rows, tmp_path, capsys):
    trainer_for(tiny, real_rows, tmp_path, "opt").train()
    said = capsys.readouterr().out
    assert "note: what rows begin with is computed for each of them: with dropout (dropout=0.1)" in said
    assert "\npacks: 100% of the rows' tokens are computed" in said
    trainer_for(tiny, real_rows, tmp_path, batching="padded").train()
    assert "pack" not in capsys.readouterr().out


@pytest.mark.stress
@pytest.mark.slow
def test_models_whose_rows_cannot_be_packed_are_padded(tiny, real_rows, tmp_path, capsys):
    """By what is known of them, or because they fail: with the loss of padded rows."""
    from transformers import BloomConfig, MambaConfig, MistralConfig

    from alpaca.training.trainer import AlpacaTrainer

    dataset = real_rows("llama")
    small = dict(vocab_size=int(max(ids.max() for ids in dataset.input_ids)) + 1, hidden_size=32, num_hidden_layers=2)
    window = MistralConfig(
        **small, intermediate_size=40, num_attention_heads=2, num_key_value_heads=1, sliding_window=9
    )
    for config, reason in (
        (window, "attends to the last 9 tokens only"),
        (MambaConfig(**small), "carries a state from token to token"),
        (BloomConfig(**small, n_head=2), "no way of packing is exact here"),
    ):
        losses = []
        for batching in ("packed", "padded"):
            args = TrainingArguments(
                output_dir=str(tmp_path),
                use_cpu=True,
                max_steps=1,
                report_to="none",
                seed=1,
                save_strategy="no",
                per_device_train_batch_size=4,
                batching=batching,
            )
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            trainer = AlpacaTrainer(model=model, args=args, train_dataset=dataset, data_collator=COLLATE)
            losses.append(trainer.train().training_loss)
            assert (reason in capsys.readouterr().out) == (batching == "packed"), config.model_type
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
def test_the_check_looks_at_a_layer_that_is_trained(tiny, real_rows, tmp_path, capsys):
    trainer = trainer_for(tiny, real_rows, tmp_path)
    trainer.model.model.layers[0].requires_grad_(False)
    trainer.train()
    assert "packs that share what rows begin with: " in capsys.readouterr().out


def test_measuring_the_matrix_rate_draws_nothing_from_the_run():
    from alpaca.training.metrics import matmul_rate

    state = torch.get_rng_state()
    assert matmul_rate(torch.device("cpu"), torch.float32) > 1e6 and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["num_rows", "per_device_train_batch_size", "max_tokens_per_pack", "model_max_length"])
def test_verify_refuses_to_compare_nothing(tmp_path, name):
    from scripts.check_packing import main

    with pytest.raises(UsageError, match=f"--{name} 0: expected at least 1"):
        main([f"--model_name_or_path={tmp_path}", f"--data_path={tmp_path}", f"--{name}=0"])


@pytest.mark.parametrize("num_rows, compared", [("2", 4), ("6", 4)])
def test_verify_says_how_many_rows_it_compares(tiny, tmp_path, capsys, num_rows, compared):
    from scripts.check_packing import main

    words = [f"--model_name_or_path={tiny('llama')}", f"--data_path={write_rows(tmp_path / 'rows.json', 8)}"]
    main([*words, f"--num_rows={num_rows}", f"--cache_dir={tmp_path}"])
    said = capsys.readouterr().out
    assert f"note: --num_rows {num_rows} -> {compared}, whole micro-batches of 4" in said
    assert f"--loss_normalization token: {compared} rows" in said


@pytest.mark.slow
def test_verify_tells_exact_from_wrong(tiny, tmp_path, capsys, monkeypatch):
    from scripts.check_packing import main

    words = [
        "--model_name_or_path",
        tiny("llama"),
        "--data_path",
        write_rows(tmp_path / "rows.json", 12),
        "--num_rows",
        "8",
        "--cache_dir",
        str(tmp_path),
    ]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.count("equal up to rounding") == 4 and "verdict: packed rows train as padded ones" in said
    of = attention.PackLayout.of
    monkeypatch.setattr(attention.PackLayout, "of", lambda prefixes, rows, chosen: of(prefixes, rows, [-1] * len(rows)))
    assert main(words) == 1, "rows that do not see their prefix, at positions that begin at 0"
    assert "DIFFERENT" in capsys.readouterr().out
