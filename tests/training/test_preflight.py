"""What is said before training: counts of the rows that lose something, memory, disk; and what is refused for it."""

import json
import math
import sys
import weakref
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import GOLDEN, SHARED, run, train, write_rows
from support.goldens import golden_tokenizer, texts_of
from support.seven_b import ON_FOUR, SEVEN, flags_of, llama_7b
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from alpaca.common.errors import UsageError
from alpaca.data.prompts import PROMPT_DICT
from alpaca.data.report import PROBLEMS, text_problems
from alpaca.packing.packing import CPU_PACK_TOKENS
from alpaca.training import memory, preflight
from alpaca.training.preflight import check_optimizer
from alpaca.training.trainer import AlpacaTrainer
from train import SupervisedDataset, TrainingArguments

pytestmark = pytest.mark.slow  # many small cases

ROW = {"instruction": "Name a colour.", "input": "", "output": "Blue."}


# ---- the report ----


def test_text_problems_are_found_and_numbered():
    rows = [
        ROW,
        {**ROW, "input": "of the sky"},
        {**ROW, "output": "Red."},
        {**ROW, "input": None},  # the first once more
        {**ROW, "instruction": "Say </s>.", "output": " "},
        {**ROW, "instruction": "Go on.", "output": "Yes.\n\n### Instruction:\nAnother one"},
        {**ROW, "input": "### Response", "output": "a heading without its colon is fine"},
    ]
    assert text_problems(rows, PROMPT_DICT, ["<s>", "</s>"]) == {
        "empty_answer": [4],
        "control_text": [4],
        "template_text": [5],
        "duplicate": [3],
        "repeated_prompt": [2],
    }


def test_headings_are_those_of_the_template_in_use():
    own = {
        "prompt_input": "Frage: {instruction}\n{input}\nAntwort: ",
        "prompt_no_input": "Frage: {instruction}\nAntwort: ",
    }
    rows = [{**ROW, "output": "Antwort: Blau"}, {**ROW, "output": "### Response:"}]
    assert text_problems(rows, own, [])["template_text"] == [0]
    own["prompt_input"] += "</s>"
    assert text_problems(rows, own, ["</s>"])["control_text"] == [0, 1], (
        "the template's own control text is in all rows"
    )


def test_an_ordinary_token_to_pad_with_is_no_control_text(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{**ROW, "output": "Blue!"}, {**ROW, "output": "</s>"}]))
    tokenizer = golden_tokenizer("opt")
    tokenizer.pad_token = "!"
    dataset = SupervisedDataset(str(tmp_path / "rows.json"), tokenizer, cache_dir=str(tmp_path))
    assert dataset.report.problems["control_text"] == [1]


@pytest.mark.parametrize("file", ["alpaca_data_1k.json", "alpaca_en_demo.json"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_counts_on_real_rows(file, name, tmp_path):
    """Against the plainest possible recount: one row at a time, through the tokenizer's own truncation."""
    if not (SHARED / file).exists():
        pytest.skip("the real Alpaca rows are not here")
    rows, tokenizer, limit = json.loads((SHARED / file).read_text()), golden_tokenizer(name, 512), 512
    report = SupervisedDataset(str(SHARED / file), tokenizer, cache_dir=str(tmp_path)).report
    expected = {problem: [] for problem in PROBLEMS}
    total = targets = 0
    for i, (row, source, target) in enumerate(zip(rows, *texts_of(rows, tokenizer))):
        whole, prompt = tokenizer(source + target)["input_ids"], tokenizer(source)["input_ids"]
        total, targets = total + min(len(whole), limit), targets + max(min(len(whole), limit) - len(prompt), 0)
        earlier = rows[:i]
        same_prompt = [e for e in earlier if (e["instruction"], e["input"]) == (row["instruction"], row["input"])]
        conditions = {
            "truncated": len(whole) > limit,
            "no_eos": whole[:limit][-1] != tokenizer.eos_token_id,
            "nothing_to_learn": len(prompt) >= limit,
            "merged_boundary": whole[: len(prompt)] != prompt,
            "empty_answer": row["output"].strip() == "",
            "control_text": any(token in text for token in tokenizer.all_special_tokens for text in row.values()),
            "template_text": any(
                h in text for h in ("### Instruction:", "### Input:", "### Response:") for text in row.values()
            ),
            "duplicate": row in earlier,
            "repeated_prompt": bool(same_prompt) and row not in earlier,
        }
        for problem, found in conditions.items():
            expected[problem] += [i] * found
    assert report.problems == expected
    assert (sum(report.lengths), report.num_targets) == (total, targets)
    if file == "alpaca_en_demo.json":
        assert len(expected["duplicate"]) == 14 and expected["no_eos"]


def test_the_report_reads_well(tmp_path):
    rows = [ROW, {**ROW, "output": "word " * 600}, {**ROW, "instruction": "word " * 600}] + [ROW] * 6
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    dataset = SupervisedDataset(str(tmp_path / "rows.json"), golden_tokenizer("llama"), cache_dir=str(tmp_path))
    lines = str(dataset.report).splitlines()
    assert lines[0].startswith(f"{tmp_path / 'rows.json'}: 9 rows, ") and " of prompts (" in lines[0]
    assert lines[1] == "  truncated: 2 rows (1, 2): cut at --model_max_length; raise it if their ends matter"
    assert lines[3] == "  nothing_to_learn: 1 row (2): no target is left; the prompt alone fills --model_max_length"
    assert "  duplicate: 6 rows (3, 4, 5, 6, 7, ...): " in lines[4]
    assert [line.split(":")[0] for line in dataset.report.spoiled_by()] == ["no_eos", "nothing_to_learn", "duplicate"]


# ---- scripts.inspect_data ----


def inspect(tmp_path, capsys, *words, rows=None):
    from scripts.inspect_data import main

    if rows is not None:
        (tmp_path / "rows.json").write_text(json.dumps(rows))
    model = GOLDEN / "labels" / "llama"
    code = main(["--model_name_or_path", str(model), "--data_path", str(tmp_path / "rows.json"), *words])
    return code, capsys.readouterr().out


def test_inspecting_rows(tmp_path, capsys):
    write_rows(tmp_path / "rows.json", 20)
    code, output = inspect(tmp_path, capsys, "--rows", "0", "3")
    assert code == 0 and "20 rows" in output and "row 0: " in output and "row 3: " in output
    masked, learned = output.split("row 3: ")[1].splitlines()[1:3]
    assert masked.startswith("  masked: <s> ▁Below") and masked.endswith("▁Response :")
    assert learned.startswith("  learned: ") and learned.endswith("</s>")
    code, output = inspect(tmp_path, capsys, "--rows=3", "--color=always")
    assert "\033[2m▁Below\033[0m" in output and "\033[32m\033[7m</s>\033[0m" in output
    with pytest.raises(UsageError, match="--rows 20: the data has rows 0 to 19"):
        inspect(tmp_path, capsys, "--rows", "20")
    with pytest.raises(UsageError, match="unknown flag --row; did you mean --rows"):
        inspect(tmp_path, capsys, "--row", "1")


@pytest.mark.parametrize("length", ["0", "-5"])
def test_inspection_of_rows_without_tokens_is_refused(tmp_path, capsys, length):
    with pytest.raises(UsageError, match=f"--model_max_length {length}: expected at least 1"):
        inspect(tmp_path, capsys, f"--model_max_length={length}", rows=[ROW])


def test_inspection_shows_rows_of_a_problem_and_fails_where_training_would_be_spoiled(tmp_path, capsys):
    rows = [{**ROW, "output": f"Blue {i}."} for i in range(9)] + [{**ROW, "output": "word " * 600}]
    code, output = inspect(tmp_path, capsys, "--problem", "no_eos", rows=rows)
    assert code == 1 and "\nrow 9: 512 tokens, " in output and "| truncated, no_eos" in output
    assert "would spoil training: no_eos: 1 row of 10 (10.0%), tolerated are 1%" in output
    code, output = inspect(tmp_path, capsys, "--model_max_length", "2000")
    assert code == 0 and "would spoil" not in output


def test_inspection_as_lora_sees_the_rows(tmp_path, capsys):
    """train.py's functions find all that they ask for, also where no token is added."""
    code, output = inspect(tmp_path, capsys, "--add_missing_tokens", "False", rows=[ROW])
    assert code == 0 and "note: no pad token -> rows are padded with <unk>" in output and " 41 tokens" in output


@pytest.mark.stress
@pytest.mark.slow
def test_inspection_from_the_command_line(tmp_path):
    write_rows(tmp_path / "rows.json", 3)
    words = ["--model_name_or_path", GOLDEN / "labels" / "llama", "--data_path", tmp_path / "rows.json"]
    command = [sys.executable, "-m", "scripts.inspect_data", *words]
    assert "3 rows" in run(command).stdout
    (tmp_path / "rows.json").write_text('[{"instruction": "a"}]')
    broken = run(command, check=False)
    assert broken.returncode == 2 and "row 0: no field 'output'" in broken.stderr and "Traceback" not in broken.stderr


ALONE = replace(ON_FOUR, world_size=1, group=1, sharded=False)
PADDED = replace(ON_FOUR, packed=False, tokens=4 * 512)
ROWS = memory.Rows(longest=512, share=0.5, step=4600)
LONG_STEPS = replace(ROWS, step=20_000)


def test_memory_by_hand():
    """The embeddings are 7.0 - 32 x 0.2 = 0.6 billion parameters. 10^9 bytes:"""
    packed = memory.memory(SEVEN, replace(ON_FOUR, tokens=4096))
    chunk = 12 * 2**24
    assert packed == {
        "weights": 7e9,
        "gradients": 7e9,
        "optimizer": 14e9,
        "whole gradients": 0,
        "gathered": 2 * (0.6e9 + 0.4e9) + (2 + 4) * 0.6e9,
        "activations": 4096 * 6e6 + 2048 * 32_000 * (2 + 2) + chunk,
    }
    padded = memory.memory(SEVEN, replace(PADDED, tokens=4096))
    assert padded["activations"] == packed["activations"] + 4096 * 32_000 * (2 + 2)
    recomputed = memory.memory(SEVEN, replace(ON_FOUR, tokens=4096, checkpointing=True))
    assert packed["activations"] - recomputed["activations"] == 4096 * (6e6 - 6e6 / 32 - 0.25e6)
    assert memory.memory(SEVEN, replace(ON_FOUR, whole_gradients=True))["whole gradients"] == 28e9
    one_row = replace(ALONE, half=False, tokens=512)
    assert memory.memory(SEVEN, one_row)["activations"] < 4e9
    stepping = memory.memory(SEVEN, replace(one_row, foreach=True))
    assert stepping["activations"] == 28e9, "foreach kernels take 4 bytes a parameter while they step"
    offloaded = memory.memory(SEVEN, replace(ON_FOUR, offload=True, tokens=512))
    assert offloaded["host"] == 28e9 and offloaded["weights"] == 0


@pytest.mark.parametrize(
    "gib, plan, rows, expected",
    [
        # 4 GPUs hold 28 + 5.6 GB each, a token takes 6.06 MB and recomputed 0.5 MB, a tenth stays spare
        (24, ON_FOUR, ROWS, (1024, False, False)),  # nothing fits
        (36, ON_FOUR, ROWS, (4600, True, False)),
        (36, ON_FOUR, LONG_STEPS, (4096, True, False)),
        (36, replace(ON_FOUR, checkpointing=False), ROWS, (1024, False, False)),  # will not fit, and that is said
        (40, ON_FOUR, ROWS, (1024, False, False)),
        (40, replace(ON_FOUR, checkpointing=True), LONG_STEPS, (12288, True, False)),
        (80, ON_FOUR, ROWS, (4600, False, False)),
        (80, ON_FOUR, LONG_STEPS, (6144, False, False)),
        (80, replace(ON_FOUR, checkpointing=True), LONG_STEPS, (16384, True, True)),
        (139, ON_FOUR, LONG_STEPS, (16384, False, False)),
        (139, ON_FOUR, replace(ROWS, longest=5000), (5000, False, False)),  # never less than a row
        # 8 GPUs hold 14 + 5.6 GB each
        (24, replace(ON_FOUR, world_size=8, group=8), ROWS, (4600, True, False)),
        (40, replace(ON_FOUR, world_size=8, group=8), ROWS, (3072, False, False)),
        # one holds 112 + 14 GB of autocast's copies, or recomputed 1.6; of several each has 28 GB of buckets besides
        (80, ALONE, ROWS, (1024, False, False)),
        (139, ALONE, ROWS, (2048, False, False)),
        (139, replace(ALONE, world_size=4), ROWS, (4600, True, False)),
        (80, replace(ALONE, optimizer_bytes=2.03), ROWS, (4600, True, False)),  # 70 GB
        (300, ALONE, LONG_STEPS, (16384, False, False)),  # nobody to reduce gradients with
        # padded micro-batches are as large as the flags say
        (80, PADDED, ROWS, (0, False, False)),
        (40, PADDED, ROWS, (0, True, False)),
        (40, replace(PADDED, checkpointing=False), ROWS, (0, False, False)),
        (40, replace(PADDED, tokens=300), ROWS, (0, False, False)),
        # a CPU gains nothing from larger packs
        (139, replace(ON_FOUR, on_gpu=False), LONG_STEPS, (CPU_PACK_TOKENS, False, True)),
    ],
)
def test_what_is_decided_for_7b(gib, plan, rows, expected):
    decision = memory.decide(SEVEN, plan, rows, gib * 2**30 - 1e9)
    assert decision == memory.Decision(*expected)


def test_what_the_user_gave_stays():
    def decide(budget, gib, model=SEVEN):
        return memory.decide(model, ON_FOUR, LONG_STEPS, gib * 2**30 - 1e9, budget)

    assert decide(3000, 80) == memory.Decision(3000, False, True)
    assert decide(10_000, 80) == memory.Decision(10_000, True, True), "recomputed as it would not fit"
    assert decide(10_000, 80, replace(SEVEN, recomputes=False)) == memory.Decision(10_000, False, False)
    assert decide(100, 80).max_tokens_per_pack == 512 and decide(10**6, 139).max_tokens_per_pack == 20_000


def test_which_flags_would_fit():
    packed = replace(ON_FOUR, checkpointing=False, tokens=4096)
    assert memory.what_fits(SEVEN, packed, ROWS, 55e9).startswith("--max_tokens_per_pack 3072 (about 52.")
    assert memory.what_fits(SEVEN, packed, ROWS, 41e9).startswith("--max_tokens_per_pack 1024")
    assert memory.what_fits(SEVEN, packed, ROWS, 37.5e9).startswith("--gradient_checkpointing True (")
    offload = '--fsdp "full_shard auto_wrap offload" --max_tokens_per_pack 1536 ('
    assert memory.what_fits(SEVEN, packed, ROWS, 17e9).startswith(offload)
    padded = replace(PADDED, checkpointing=False)
    half = "--per_device_train_batch_size 2 --gradient_accumulation_steps 16 (about "
    assert memory.what_fits(SEVEN, padded, ROWS, 42e9).startswith(half)
    alone = memory.what_fits(SEVEN, replace(ALONE, tokens=1024), ROWS, 23e9)
    assert alone.startswith("torchrun --nproc_per_node=1 --fsdp") and "112.0 GB of CPU memory" in alone
    assert memory.what_fits(SEVEN, replace(ALONE, tokens=1024, on_gpu=False), ROWS, 23e9) is None
    copies = replace(ON_FOUR, sharded=False, tokens=1024)
    assert memory.what_fits(SEVEN, copies, ROWS, 79e9).startswith('--fsdp "full_shard auto_wrap" (')


def test_tokens_of_a_step():
    even = memory.rows_of([100] * 1000, 50_000, rows_per_step=128, world_size=4)
    assert even == memory.Rows(longest=100, share=0.5, step=3200)
    uneven = memory.rows_of([50, 150] * 500, 50_000, rows_per_step=100, world_size=1)
    assert uneven.step == math.ceil(100 * 100 + 3 * 50 * math.sqrt(100 * (1 - 0.1)))
    assert memory.rows_of([100, 100], 100, rows_per_step=128, world_size=1).step == 200


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_activations_are_counted_as_a_real_forward_pass_keeps_them(tiny, architecture):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny(architecture))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    shapes = {tuple(parameter.shape) for parameter in model.parameters()}
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        if tuple(tensor.shape) not in shapes and tuple(tensor.shape)[::-1] not in shapes:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    for half in (False, True):  # autocast keeps copies of the weights, which are no activations
        counted = memory.measure(config, tokens=40, half=half, autocast=True)
        kept.clear()
        context = torch.autocast("cpu", torch.bfloat16, enabled=half)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), context:
            model(input_ids=torch.ones(3, 40, dtype=torch.long), use_cache=False)
        real = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in weights)
        assert counted.activations * 120 == pytest.approx(real, rel=0.1)
    assert counted.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert counted.vocabulary == config.vocab_size and counted.recomputes


def test_a_model_too_large_for_this_machine_is_said_with_a_way_out(capsys, monkeypatch):
    """The README's command: 7B in bfloat16 on four cards of 40 GB."""
    measured = memory.measure(llama_7b(), 512, half=True)
    assert measured.parameters == 6_738_423_808 and measured.layers == 32
    monkeypatch.setattr(memory, "measure", lambda config, tokens, half, autocast: measured)
    monkeypatch.setattr(memory, "available_memory", lambda device: (40e9, 500e9))

    def estimate_with(**changed):
        model, decision = memory.estimate_memory(flags_of(**changed), None, ROWS)
        assert model is measured
        return decision, capsys.readouterr().out

    padded = dict(batching="padded", gradient_checkpointing=False)
    decision, output = estimate_with(**padded)
    parts = "weights 6.7 GB + gradients 6.7 GB + optimizer 13.5 GB + gathered "
    assert f"memory per GPU (4 rows of 512 tokens), estimate: {parts}" in output
    assert "does not fit; this would: --per_device_train_batch_size 2 --gradient_accumulation_steps 16" in output
    assert decision == memory.Decision(0, False, False)

    _, output = estimate_with(gradient_checkpointing=False, max_tokens_per_pack="4096")
    assert "packs of at most 4096 tokens" in output and "this would: --max_tokens_per_pack 1024 (about" in output
    monkeypatch.setattr(memory, "available_memory", lambda device: (37e9, 500e9))
    decision, output = estimate_with()
    assert f"memory per GPU (packs of at most 4600 tokens), estimate: {parts}" in output
    assert "--gradient_checkpointing True is chosen: without it 1024 tokens at a time take 3" in output
    assert decision == memory.Decision(4600, True, False) and "does not fit" not in output

    monkeypatch.setattr(memory, "available_memory", lambda device: (40e9, 20e9))
    _, output = estimate_with(**padded, fsdp_config={"cpu_offload": True})
    assert "does not fit" not in output and "offloading takes 27.0 GB of CPU memory a process, available 20.0" in output


def test_without_an_estimate_the_decision_is_cautious(capsys, monkeypatch):
    autocast = []

    def fails(*args, **kwargs):
        autocast.append(kwargs["autocast"])
        raise RuntimeError("data-dependent shape")

    monkeypatch.setattr(memory, "measure", fails)
    assert memory.estimate_memory(flags_of(), None, ROWS) == (None, memory.Decision(4096, False, False))
    assert "no estimate, this model does not run on fake tensors (RuntimeError: data-dep" in capsys.readouterr().out
    changed = flags_of(max_tokens_per_pack="100", gradient_checkpointing=True)
    assert memory.estimate_memory(changed, None, ROWS)[1] == memory.Decision(512, True, False)
    assert memory.estimate_memory(flags_of(batching="padded"), None, ROWS)[1].max_tokens_per_pack == 0
    memory.estimate_memory(flags_of(fsdp=None), None, ROWS)
    assert autocast == [False, False, False, True], "FSDP's weights are bfloat16 themselves"


def test_flags_become_a_plan():
    by_fsdp = flags_of(fsdp_config={"activation_checkpointing": True, "cpu_offload": True}, optim="adamw_torch")
    assert memory.plan_of(by_fsdp, ROWS) == replace(ON_FOUR, checkpointing=True, offload=True, foreach=True)
    assert memory.plan_of(flags_of(batching="padded"), ROWS) == PADDED
    assert not memory.plan_of(flags_of(optim="adafactor"), ROWS).foreach


def test_the_decision_reaches_the_flags_of_the_trainer(tiny, tmp_path, monkeypatch):
    """None stays None through transformers' own checks, and becomes what was decided."""
    from alpaca.models.load import load_config
    from alpaca.training.preflight import check_before_loading
    from train import make_supervised_data_module, parse_flags

    words = [
        f"--model_name_or_path={tiny('llama')}",
        f"--data_path={write_rows(tmp_path / 'rows.json', 8)}",
        f"--output_dir={tmp_path / 'out'}",
        f"--cache_dir={tmp_path}",
        "--use_cpu",
    ]
    decided = {}
    for flag in ("", "--gradient_checkpointing", "--gradient_checkpointing=False"):
        model_args, data_args, lora_args, args = parse_flags(words + [flag] * bool(flag))
        assert args.gradient_checkpointing is {"": None}.get(flag, flag == "--gradient_checkpointing")
        data = make_supervised_data_module(golden_tokenizer("llama"), data_args, str(tmp_path))
        decided[flag] = check_before_loading(args, load_config(model_args, args), data, None, lora_args)
        assert args.gradient_checkpointing is args.activation_checkpointing is decided[flag].gradient_checkpointing
    assert [each.gradient_checkpointing for each in decided.values()] == [False, True, False]
    total = sum(map(len, data["train_dataset"].input_ids))
    assert decided[""].max_tokens_per_pack == total and not decided[""].hold_gradients, "8 rows are one step"

    chosen = memory.Decision(512, True, False)
    monkeypatch.setattr(memory, "estimate_memory", lambda args, config, rows, lora: (None, chosen))
    for fsdp_config, expected in (({}, True), ({"activation_checkpointing": True}, False)):  # which does it itself
        model_args, data_args, lora_args, args = parse_flags(words)
        args.fsdp, args.fsdp_config = True, fsdp_config
        assert check_before_loading(args, load_config(model_args, args), data, None, lora_args) == chosen
        assert args.gradient_checkpointing is args.activation_checkpointing is expected


def test_a_run_goes_on_with_what_was_decided_for_it(tmp_path):
    """Whatever memory is free now; flags that say otherwise are obeyed."""
    from alpaca.training.resume import keep_decisions, note_decisions
    from alpaca.weights.provenance import MANIFEST

    contract = {"rounding": {}}
    note_decisions(Namespace(max_tokens_per_pack="3072", gradient_checkpointing=False, hold_gradients=True), contract)
    (tmp_path / MANIFEST).write_text(json.dumps({"contract": contract}))
    for given, kept in {("auto", None): ("3072", False), ("512", True): ("512", True)}.items():
        args = Namespace(max_tokens_per_pack=given[0], gradient_checkpointing=given[1], hold_gradients=None)
        keep_decisions(args, str(tmp_path))
        assert args.hold_gradients is True
        assert (args.max_tokens_per_pack, args.gradient_checkpointing) == kept
    keep_decisions(
        args := Namespace(max_tokens_per_pack="auto", gradient_checkpointing=None, hold_gradients=None), None
    )
    assert args.max_tokens_per_pack == "auto" and args.gradient_checkpointing is None


# ---- disk ----


@pytest.mark.parametrize(
    "strategy, save_steps, limit, done, expected",
    [
        ("no", 10, None, 0, 0),
        ("steps", 2000, 1, 0, 0),  # longer than the run
        ("steps", 10, None, 0, 10),
        ("steps", 10, 1, 0, 2),  # the old one goes when the new one is whole
        ("steps", 10, 3, 0, 4),
        ("steps", 10, 1, 50, 1),
        ("steps", 10, 1, 100, 0),
        ("steps", 60, 1, 0, 1),
        ("steps", 0.25, None, 0, 4),  # a share of all steps
        ("epoch", 10, None, 0, 4),
        ("best", 10, None, 0, 5),
        ("best", 10, 1, 0, 3),  # the best one stays as well
    ],
)
def test_how_many_checkpoints_stand_at_once(strategy, save_steps, limit, done, expected):
    args = Namespace(
        save_strategy=strategy,
        save_steps=save_steps,
        save_total_limit=limit,
        eval_steps=20,
        load_best_model_at_end=False,
    )
    assert preflight.checkpoints_to_come(args, steps=100, per_epoch=25, done=done) == expected


def test_too_small_a_disk_is_refused_before_training(tmp_path, capsys):
    args = Namespace(
        output_dir=str(tmp_path / "new" / "out"),
        save_only_model=False,
        save_dtype="bfloat16",
        fsdp=None,
        optim="adamw_torch_fused",
        deepspeed=None,
    )
    preflight.check_room(args, trained=1_000_000, checkpoints=2)
    assert (
        "disk, estimate: 2 x 12.0 MB for checkpoints + 2.0 MB for the final model = 26.0 MB" in capsys.readouterr().out
    )
    preflight.check_room(args, trained=1_000_000, checkpoints=0)
    assert "disk, estimate: no checkpoints + 2.0 MB for the final model = 2.0 MB" in capsys.readouterr().out
    with pytest.raises(UsageError, match="would take 26,000.0 GB .* free. Choose another disk"):
        preflight.check_room(args, trained=10**12, checkpoints=2)
    assert preflight.checkpoint_sizes(args, 10)[0] == 120
    args.save_only_model, args.optim = True, "adamw_8bit"
    assert preflight.checkpoint_sizes(args, 10) == (40, 20)


@pytest.mark.slow
@pytest.mark.stress
def test_a_disk_that_fills_in_the_middle_of_a_save_loses_nothing(tiny, tmp_path):
    """`ulimit -f` stands in for the full disk: the system refuses to write on. The optimizer is twice the weights."""
    flags = dict(
        model_name_or_path=tiny("llama"),
        data_path=write_rows(tmp_path / "rows.json", 24),
        save_steps=4,
        output_dir=tmp_path / "out",
        max_steps=12,
        save_total_limit=1,
        per_device_train_batch_size=2,
    )
    words = [f"--{name}={value}" for name, value in flags.items()]
    train({**flags, "max_steps": 4})
    (tmp_path / "out" / "alpaca_run.json").unlink()
    optimizer = (tmp_path / "out" / "checkpoint-4" / "optimizer.pt").stat().st_size
    command = (
        f'ulimit -f {optimizer * 3 // 4 // 1024}; exec {sys.executable} train.py --resume_from_checkpoint=True "$@"'
    )
    full = run(["bash", "-c", command, "train", *words], check=False)
    assert full.returncode == 2 and "Traceback" not in full.stderr
    assert "checkpoint-8 could not be saved" in full.stderr and "checkpoint-4 is untouched" in full.stderr
    assert sorted(path.name for path in (tmp_path / "out").glob("*checkpoint-*")) == ["checkpoint-4"]
    went_on = train({**flags, "resume_from_checkpoint": True}).stdout
    assert "step 12/12" in went_on and "not bit for bit" in went_on, "--max_steps was 4 for the first part"


def test_two_runs_in_one_folder_are_refused(tiny, tmp_path):
    import fcntl
    import os

    import train as train_module

    (tmp_path / "out").mkdir()
    other = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    words = [f"--model_name_or_path={tiny('llama')}", f"--data_path={write_rows(tmp_path / 'r.json', 4)}", "--use_cpu"]
    with pytest.raises(UsageError, match="another process is training in this folder"):
        train_module.train([*words, f"--output_dir={tmp_path / 'out'}", "--max_steps=1"])
    os.close(other)


def test_the_final_model_waits_for_room(capsys):
    from alpaca.training.checkpoint import retry_while_disk_full

    tries = []

    def write():
        tries.append(1)
        if len(tries) < 3:
            raise OSError(28, "No space left on device")

    retry_while_disk_full(write, "out", pause=0)
    assert len(tries) == 3 and capsys.readouterr().out.count("make room, it is tried again") == 2
    with pytest.raises(UsageError, match="cannot be written to out: .*No space left on device"):
        retry_while_disk_full(lambda: exec("raise OSError(28, 'No space left on device')"), "out", tries=2, pause=0)
    with pytest.raises(ValueError, match="another"):
        retry_while_disk_full(lambda: exec("raise ValueError('another')"), "out", pause=0)


def test_8_bits_are_a_way_out_only_where_nothing_is_sharded():
    """7B on cards of 80 GB: one process fits with AdamW of 8 bits and recomputation; of several, shards come first."""
    large = dict(optimizer_bytes=8, checkpointing=None)
    way = memory.what_fits(SEVEN, replace(ALONE, **large, tokens=4600), ROWS, 79e9)
    assert way.startswith("--optim adamw_bnb_8bit --gradient_checkpointing True (about 7"), way
    one = replace(ALONE, **large, world_size=4, tokens=4600)
    for available in range(10, 120, 5):
        assert "8bit --fsdp" not in (memory.what_fits(SEVEN, one, ROWS, available * 1e9) or "")


def test_8_bits_and_shards(tmp_path):
    pytest.importorskip("bitsandbytes")
    args = transformers.TrainingArguments(str(tmp_path), optim="adamw_bnb_8bit", use_cpu=True)
    check_optimizer(args)
    args.fsdp = True
    with pytest.raises(UsageError, match="--optim adamw_bnb_8bit: bitsandbytes does not know sharded parameters; drop"):
        check_optimizer(args)


class Copies(TorchDispatchMode):
    """Count the bfloat16 copies of weights of some shapes: all that are made, and most at a time."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.made, self.most = shapes, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if "_to_copy" in str(function) and made.dtype == torch.bfloat16 and tuple(made.shape) in self.shapes:
            self.made.append(weakref.ref(made.untyped_storage()))
            self.most = max(self.most, sum(copy() is not None for copy in self.made))
        return made


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputed_layers_keep_no_copies_of_their_weights(tiny, tmp_path, recompute):
    """Of autocast's: two layers have 14 matrices, of which those of one layer at most are there at a time."""
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    flags = dict(use_cpu=True, bf16=True, gradient_checkpointing=recompute, report_to="none")
    trainer = AlpacaTrainer(model=model, args=TrainingArguments(str(tmp_path), **flags))
    prepared = trainer.accelerator.prepare_model(model.train())
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    shapes = {tuple(p.shape) for layer in model.model.layers for p in layer.parameters() if p.ndim == 2}
    with Copies(shapes) as copies, trainer.compute_loss_context_manager():
        logits = prepared(input_ids=torch.ones(2, 16, dtype=torch.long), use_cache=False).logits
        logits.float().mean().backward()
    assert copies.most <= 7 if recompute else copies.most == 14
    assert len(copies.made) == (28 if recompute else 14)
