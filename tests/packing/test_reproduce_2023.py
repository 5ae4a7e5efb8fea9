"""--reproduce_2023: the run of the 2023 train.py, step by step. Golden curves are of its own code (golden/curves)."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, free_port, history, largest_difference, run, train, weights
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler
from transformers import AutoModelForCausalLM

from alpaca.common.errors import UsageError
from alpaca.packing.packing import RowSizes, measure_rows, plan_packing
from alpaca.packing.sampler import Steps2023, StepSampler2023, count_steps, sampler_seed
from alpaca.training.preflight import checkpoints_to_come
from alpaca.training.resume import changes
from train import parse_flags

CURVES = GOLDEN / "curves"
CURVE = json.loads((CURVES / "curves.json").read_text())
FLAGS = dict(
    learning_rate=1e-3,
    weight_decay=0.0,
    warmup_ratio=0.03,
    lr_scheduler_type="cosine",
    logging_steps=1,
    evaluation_strategy="no",
    save_strategy="no",
)


def flags_of(name: str, **more) -> dict:
    golden = CURVE[name]
    taken = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs")
    return (
        dict(
            model_name_or_path=CURVES / golden["model"],
            data_path=CURVES / "rows.json",
            reproduce_2023=True,
            **FLAGS,
            **{flag: golden[flag] for flag in taken},
        )
        | more
    )


# ---- the golden curves ----


FSDP = dict(fsdp="full_shard auto_wrap", max_tokens_per_pack=700)  # several packs a step
OTHERS = (("llama_1", "padded"), ("llama_2", "packed"), ("llama_2", "padded"))  # in make stress


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, more",
    [
        *(
            pytest.param(name, dict(batching=batching), marks=pytest.mark.stress if (name, batching) in OTHERS else ())
            for name in CURVE
            for batching in ("packed", "padded")
        ),
        ("llama_2", FSDP),
        # the same rows where they divide evenly, and the micro-batches of 2023
        ("llama_2", dict(reproduce_2023=False, loss_normalization="microbatch")),
    ],
)
def test_golden_curve(tmp_path, name, more):
    golden, out = CURVE[name], tmp_path / "out"
    processes = golden["processes"]
    train(dict(output_dir=out, **flags_of(name, **more)), processes if processes > 1 else 0)
    steps = history(out)
    assert [step["learning_rate"] for step in steps] == golden["learning_rate"]
    assert [step["loss"] for step in steps] == pytest.approx(golden["loss"], abs=1e-5)
    assert [step["grad_norm"] for step in steps] == pytest.approx(golden["grad_norm"], abs=1e-4)
    saved = weights(out)
    missing = golden["weights"].keys() - saved.keys()
    assert missing <= {"lm_head.weight"}, "OPT's output embedding is its input embedding"
    for tensor, (norm, total) in golden["weights"].items():
        if tensor not in missing and not tensor.endswith("k_proj.bias"):
            found = saved[tensor].double()
            assert found.norm().item() == pytest.approx(norm, abs=1e-5 * norm), tensor
            assert found.sum().item() == pytest.approx(total, abs=1e-5 * norm), tensor


@pytest.mark.parametrize("name", CURVE)
def test_golden_rows(name):
    """In the order in which each rank's data set was asked for them."""
    golden = CURVE[name]
    for rank, expected in enumerate(golden["rows_of_rank"]):
        sampler = sampler_2023(
            90, golden["per_device_train_batch_size"], golden["gradient_accumulation_steps"], golden["processes"], rank
        )
        rows = [row for step in run_of(sampler, len(golden["loss"])) for batch in step for row in batch]
        assert rows == expected[: len(rows)]
        assert len(expected) - len(rows) < 4, "2023's loader had at most begun the next micro-batch"


@pytest.mark.slow
def test_lora_has_the_rows_too(tmp_path):
    """Its matrices begin at zero, and so does the warmup: the first two losses are those of full training."""
    train(
        dict(
            output_dir=tmp_path / "out",
            **flags_of("llama_1"),
            lora_r=4,
            lora_target_modules="q_proj",
            add_missing_tokens=True,
        )
    )
    losses = [step["loss"] for step in history(tmp_path / "out")]
    assert len(losses) == 10 and losses[:2] == pytest.approx(CURVE["llama_1"]["loss"][:2], abs=1e-5)


# ---- rows, micro-batches and steps, against torch's own samplers ----


def sizes(num_rows: int) -> RowSizes:
    """Every fifth row has no target."""
    targets = np.where(np.arange(num_rows) % 5, 3 + np.arange(num_rows) % 7, 0)
    return RowSizes(np.full(num_rows, 20), targets, 20 - targets)


def sampler_2023(num_rows, batch_size, accumulation, world_size=1, rank=0, seed=42, data_seed=None, **options):
    seed = sampler_seed(seed, data_seed, world_size)
    return StepSampler2023(
        sizes(num_rows), batch_size, accumulation=accumulation, world_size=world_size, rank=rank, seed=seed, **options
    )


def run_of(sampler: StepSampler2023, steps: int) -> list[list[list[int]]]:
    """The rows of this rank's micro-batches in the first `steps` of a run."""
    found, epoch = [], 0
    while len(found) < steps:
        sampler.set_epoch(epoch)
        slots = list(sampler)
        assert len(slots) == len(sampler)
        for at in range(0, len(slots), sampler.accumulation):
            found.append([batch.rows for slot in slots[at : at + sampler.accumulation] for batch in slot])
        epoch += 1
    return found[:steps]


def run_of_2023(num_rows, batch_size, accumulation, world_size, rank, steps, seed=42, data_seed=None, drop_last=False):
    """The same by the samplers that transformers 4.28.1 made (_get_train_sampler), counted as its loop counts."""
    if world_size > 1:
        sampler = DistributedSampler(range(num_rows), world_size, rank, seed=seed if data_seed is None else data_seed)
    else:
        torch.manual_seed(seed)
        drawn = int(torch.empty((), dtype=torch.int64).random_().item())
        generator = torch.Generator().manual_seed(drawn if data_seed is None else data_seed)
        sampler = RandomSampler(range(num_rows), generator=generator)
    batches, found, step, counted, epoch = BatchSampler(sampler, batch_size, drop_last), [], [], 0, 0
    in_epoch = len(batches)
    while len(found) < steps:
        if world_size > 1:
            sampler.set_epoch(epoch)
        for number, batch in enumerate(batches, 1):
            counted += 1
            step.append(batch)
            if counted % accumulation == 0 or (in_epoch <= accumulation and number == in_epoch):
                found.append(step)
                step = []
        epoch += 1
    return found[:steps]


@pytest.mark.parametrize(
    "num_rows, batch_size, accumulation, world_size, options",
    [
        (91, 4, 4, 3, {}),  # 2 rows are repeated; 8 micro-batches an epoch, the last of 3 rows
        (91, 3, 4, 3, {}),  # 11 micro-batches: every rank carries some over
        (91, 3, 4, 3, dict(drop_last=True)),
        (91, 4, 4, 3, dict(data_seed=7, seed=1)),
        (2, 2, 1, 5, {}),  # more ranks than rows
        (90, 4, 4, 1, {}),
        (91, 4, 3, 1, dict(drop_last=True)),
        (92, 4, 5, 1, dict(data_seed=7)),
        (93, 2, 7, 1, dict(seed=2**31)),
        (11, 4, 8, 1, {}),  # an epoch of 3 micro-batches steps at its end as well
        (16, 4, 4, 1, {}),
        (1, 4, 4, 1, {}),
    ],
)
def test_rows_and_micro_batches_are_those_of_the_samplers_of_2023(
    num_rows, batch_size, accumulation, world_size, options
):
    steps = 40
    for rank in range(world_size):
        sampler = sampler_2023(num_rows, batch_size, accumulation, world_size, rank, **options)
        expected = run_of_2023(num_rows, batch_size, accumulation, world_size, rank, steps, **options)
        assert run_of(sampler, steps) == expected


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_rows, accumulation, world_size", [(91, 4, 3), (91, 3, 1), (7, 4, 1)])
def test_the_loss_is_the_sum_of_the_means_divided_by_the_accumulation(num_rows, accumulation, world_size, packed):
    """A row that comes twice counts twice, a micro-batch without targets 0."""
    packing = None
    if packed:
        of_rows = sizes(num_rows)
        rows = [
            dict(input_ids=torch.arange(20), labels=torch.tensor([-100] * int(20 - n) + [1] * int(n)))
            for n in of_rows.num_targets
        ]
        packing = plan_packing(rows, measure_rows(rows), 64, share_prefix=True)
    samplers = [
        sampler_2023(num_rows, 3, accumulation, world_size, rank, packing=packing) for rank in range(world_size)
    ]
    targets, repeated = samplers[0].sizes.num_targets, 0
    for epoch in range(4):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        for step in samplers[0].steps():
            expected = []
            for batch in step:
                mean = 1 / max(sum(int(targets[row]) for row in batch), 1) / accumulation / world_size
                expected += [(row, mean) for row in batch]
            planned = [batch for sampler in samplers for batch in sampler.plan(step)]
            found = [pair for batch in planned for pair in zip(batch.rows, batch.weights)]
            np.testing.assert_allclose(sorted(found), sorted(expected))
            assert planned[0].step.rows == len(expected)
            repeated += len(expected) - len({row for row, _ in expected})
    assert repeated or world_size == 1, "the second half of a repeated pair may be in another step"


def test_steps_are_counted_as_the_loop_of_2023_does():
    for micro_batches in range(1, 30):
        for accumulation in range(1, 12):
            steps, taken = Steps2023(micro_batches, accumulation), [0]
            for count in range(1, 6 * micro_batches + 1):
                at_the_end = micro_batches <= accumulation and count % micro_batches == 0
                taken.append(taken[-1] + (count % accumulation == 0 or at_the_end))
            assert [steps.taken(count) for count in range(len(taken))] == taken
            for number in range(taken[-1] + 1):
                assert steps.end(number) == taken.index(number)
            if micro_batches > accumulation:
                events = [math.floor(epoch * micro_batches / accumulation) for epoch in range(6)]
                assert [steps.of_epoch(epoch).start for epoch in range(6)] == events


def counted(num_rows, processes=1, **flags):
    words = dict(data_path="x.json", output_dir="out", reproduce_2023=True, report_to="none", use_cpu=True) | flags
    args = parse_flags([f"--{name}={value}" for name, value in words.items()])[-1]
    args.__class__ = type("OnSeveral", (type(args),), {"world_size": processes})
    return args, *count_steps(args, num_rows)


def test_the_length_of_a_run():
    """The numbers of 2023: Alpaca on 4 GPUs, and 75 micro-batches by 4, twice."""
    alpaca = dict(per_device_train_batch_size=4, gradient_accumulation_steps=8, num_train_epochs=3)
    assert counted(52_002, 4, **alpaca)[1] == 1218
    assert counted(52_002, 4, **alpaca, reproduce_2023=False)[1] == 1221
    small = dict(per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert counted(300, num_train_epochs=2, **small)[1:] == (36, 18.75)
    assert counted(300, num_train_epochs=1.5, **small)[1] == 27
    assert counted(300, max_steps=40, **small)[1] == 40
    assert counted(303, num_train_epochs=2, dataloader_drop_last=True, **small)[1:] == (36, 18.75)
    assert counted(11, num_train_epochs=3, **small)[1:] == (3, 1.5)


def test_disk_for_the_checkpoints_of_epochs_that_have_no_equal_number_of_steps():
    args, steps, per_epoch = counted(
        26, per_device_train_batch_size=2, gradient_accumulation_steps=4, num_train_epochs=8, save_strategy="epoch"
    )
    assert checkpoints_to_come(args, steps, per_epoch, done=0) == len(EPOCH_EVENTS)


# ---- whole runs ----

SMALL = dict(FLAGS, per_device_train_batch_size=2, gradient_accumulation_steps=4, reproduce_2023=True)
EPOCH_EVENTS = [3, 6, 9, 13, 16, 19, 22, 24]  # of 26 rows: 13 micro-batches an epoch, 8 epochs of 3 steps


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(json.dumps(json.loads((CURVES / "rows.json").read_text())[:26]))
    return path


def checkpoints(folder) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


@pytest.mark.slow
def test_epoch_events_fall_where_an_epoch_of_rows_ends(few_rows, tmp_path):
    flags = dict(
        SMALL,
        model_name_or_path=CURVES / "opt",
        data_path=few_rows,
        eval_data_path=few_rows,
        num_train_epochs=8,
        evaluation_strategy="epoch",
        save_strategy="epoch",
    )
    train(dict(output_dir=tmp_path, **flags))
    assert checkpoints(tmp_path) == EPOCH_EVENTS
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == EPOCH_EVENTS
    epochs = [entry["epoch"] for entry in log if "loss" in entry]
    assert epochs == pytest.approx([step * 4 / 13 for step in range(1, 25)])
    card = (tmp_path / "README.md").read_text()
    assert "| Rows and steps | as in 2023's train.py" in card and "| Epochs | 7.385 |" in card


@pytest.mark.slow
@pytest.mark.parametrize("processes, accumulation", [pytest.param(0, 4, marks=pytest.mark.stress), (2, 3)])
def test_resuming_continues_the_undisturbed_run(few_rows, tmp_path, processes, accumulation):
    """From the middle of an epoch, and from its end, whose last micro-batches the next step needs (2023 lost them)."""
    flags = dict(
        SMALL,
        model_name_or_path=CURVES / "opt",
        data_path=few_rows,
        max_steps=8,
        save_strategy="steps",
        save_steps=1,
        gradient_accumulation_steps=accumulation,
    )
    train(dict(output_dir=tmp_path / "whole", **flags), processes)
    assert checkpoints(tmp_path / "whole") == list(range(1, 9))
    micro_batches = 13 if processes == 0 else 7
    carried = next(step for step in range(1, 8) if step * accumulation < micro_batches < (step + 1) * accumulation)
    for left in (carried, carried + 1, 7):
        out = tmp_path / f"from-{left}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{left}", out / f"checkpoint-{left}")
        train(dict(output_dir=out, resume_from_checkpoint=True, **flags), processes)
        assert largest_difference(out, tmp_path / "whole") == 0
        kept = ("step", "epoch", "loss", "learning_rate")
        found, expected = (
            [{key: entry[key] for key in kept} for entry in history(folder)] for folder in (out, tmp_path / "whole")
        )
        assert found == expected


@pytest.mark.slow
def test_a_run_of_2023_is_not_continued_as_another(few_rows, tmp_path):
    flags = dict(
        SMALL,
        model_name_or_path=CURVES / "llama",
        data_path=few_rows,
        output_dir=tmp_path / "out",
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
    )
    assert "2 optimizer steps, rows and steps as in 2023" in train(flags).stdout
    flags |= dict(max_steps=3, resume_from_checkpoint=True)
    other = train(flags | dict(reproduce_2023=False, loss_normalization="microbatch"), check=False)
    assert other.returncode != 0 and "--reproduce_2023: True then, False now" in other.stderr
    ranks = train(flags | dict(gradient_accumulation_steps=2), 2, check=False)
    assert ranks.returncode != 0 and "the number of processes: 1 then, 2 now" in ranks.stderr


def test_weight_decay_of_norms(tmp_path):
    """4.28.1 left out biases and torch's LayerNorm, which LLaMA's norms are not."""
    from alpaca.training.trainer import AlpacaTrainer

    model = AutoModelForCausalLM.from_pretrained(CURVES / "llama")
    rows = [dict(input_ids=torch.tensor([1, 2]), labels=torch.tensor([1, 2]))]
    for reproduce in (True, False):
        args, _, _ = counted(1, output_dir=tmp_path, reproduce_2023=reproduce)
        trainer = AlpacaTrainer(model=model, args=args, train_dataset=rows)
        decayed = trainer.get_decay_parameter_names(model)
        assert ("model.norm.weight" in decayed) is reproduce and "lm_head.weight" in decayed


@pytest.mark.slow
def test_dropout_is_said_once(tiny, few_rows, tmp_path):
    flags = dict(SMALL, model_name_or_path=tiny("opt"), data_path=few_rows, output_dir=tmp_path, max_steps=1)
    output = train(flags, 2).stdout
    assert output.count("the run cannot equal that of 2023, as dropout (dropout=0.1) is drawn anew") == 1


def test_an_older_contract_is_of_another_run():
    told = changes(dict(fixed={}), dict(fixed={"--reproduce_2023": True}), "fixed")
    assert told == ["--reproduce_2023: False then, True now"]


@pytest.mark.parametrize(
    "flags, expected",
    [
        (dict(loss_normalization="token"), "--loss_normalization token: --reproduce_2023 has 2023's, microbatch"),
        (dict(group_by_length=True), "--group_by_length: --reproduce_2023 has the shuffled rows of 2023"),
        (dict(train_sampling_strategy="sequential"), "--train_sampling_strategy sequential: --reproduce_2023"),
    ],
)
def test_what_it_cannot_go_with(flags, expected):
    with pytest.raises(UsageError, match=expected):
        counted(90, **flags)


def test_what_the_rows_do_not_allow():
    from alpaca.training.preflight import plan_steps

    args, _, _ = counted(11, 2, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    with pytest.raises(UsageError, match="--gradient_accumulation_steps 4: --reproduce_2023 takes at most the 3 micro"):
        plan_steps(args, 11)
    args, _, _ = counted(3, per_device_train_batch_size=4, dataloader_drop_last=True)
    with pytest.raises(UsageError, match="--dataloader_drop_last: 3 rows are fewer than one micro-batch of 4"):
        plan_steps(args, 3)


def test_the_loss_of_the_flags():
    for flags, expected in (
        (dict(), "microbatch"),
        (dict(loss_normalization="microbatch"), "microbatch"),
        (dict(reproduce_2023=False), "token"),
        (dict(reproduce_2023=False, loss_normalization="microbatch"), "microbatch"),
    ):
        assert counted(90, **flags)[0].loss_normalization == expected


# ---- the real code of 2023 ----

PYTHON_2023, CODE_2023 = os.environ.get("ALPACA_2023_PYTHON"), os.environ.get("ALPACA_2023_CODE")


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.skipif(
    not (PYTHON_2023 and CODE_2023),
    reason="ALPACA_2023_PYTHON (an interpreter with "
    "transformers 4.28.1) and ALPACA_2023_CODE (a checkout of tatsu-lab/stanford_alpaca) are not set",
)
@pytest.mark.parametrize(
    "model, num_rows, processes, flags",
    [
        ("llama", 91, 3, dict(per_device_train_batch_size=3, num_train_epochs=3)),
        ("opt", 91, 2, dict(per_device_train_batch_size=3, num_train_epochs=2.5, data_seed=7)),
        ("opt", 91, 1, dict(per_device_train_batch_size=4, max_steps=17, data_seed=7, save_strategy="epoch")),
        (
            "llama",
            91,
            1,
            dict(
                per_device_train_batch_size=4, num_train_epochs=3, dataloader_drop_last=True, seed=1, weight_decay=0.1
            ),
        ),
        ("llama", 11, 1, dict(per_device_train_batch_size=4, num_train_epochs=4)),  # an epoch of 3 micro-batches
    ],
)
def test_beside_the_code_of_2023(tmp_path, model, num_rows, processes, flags):
    """Losses to the 4 digits that it logged, the learning rates of the next step that it logged beside them, final
    weights, and where it saved."""
    flags = dict(
        FLAGS,
        gradient_accumulation_steps=4,
        model_name_or_path=CURVES / model,
        data_path=tmp_path / "rows.json",
        report_to="none",
        **flags,
    )
    rows = json.loads((CURVES / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps((rows + rows)[:num_rows]))
    words = [f"--{name}={value}" for name, value in flags.items()]
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    run(
        [
            PYTHON_2023,
            *launch * (processes > 1),
            Path(CODE_2023) / "train.py",
            *words,
            f"--output_dir={theirs}",
            "--no_cuda=True",
            "--xpu_backend=gloo",
        ],
        cwd=CODE_2023,
    )
    train(dict(output_dir=ours, reproduce_2023=True, **flags), processes if processes > 1 else 0)
    expected, found = history(theirs), history(ours)
    losses = [np.array([step["loss"] for step in steps]) for steps in (expected, found)]
    assert len(expected) == len(found)
    saved, final = torch.load(theirs / "pytorch_model.bin", weights_only=True), weights(ours)
    apart = {
        name: ((tensor - saved[name]).norm() / saved[name].norm()).item()
        for name, tensor in final.items()
        if "k_proj.bias" not in name
    }
    loss_apart = np.abs(losses[0] - losses[1]).max()
    print(f"{len(found)} steps: losses {loss_apart:.1e} apart, weights {max(apart.values()):.1e} of their norm")
    assert loss_apart < 5.2e-5
    assert [s["learning_rate"] for s in expected[:-1]] == [s["learning_rate"] for s in found[1:]]
    assert [s["epoch"] for s in expected] == [round(s["epoch"], 2) for s in found]
    assert max(apart.values()) < 1e-4
    assert checkpoints(theirs) == checkpoints(ours)
