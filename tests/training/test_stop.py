"""A run that is told to stop saves the step it is at, on all ranks, and goes on from there as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, launcher, train, weights, write_rows

from alpaca.training.checkpoint import find_problems

STRESS = partial(pytest.param, marks=pytest.mark.stress)
pytestmark = pytest.mark.slow

STEPS = 120


def flags_for(tiny, folder, **changed):
    flags = dict(model_name_or_path=tiny("llama"), data_path=write_rows(folder / "rows.json", 30), max_steps=STEPS)
    return flags | dict(
        per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1, save_strategy="no", **changed
    )


def start(flags, processes=0):
    """A real run in a process group of its own."""
    return subprocess.Popen(
        [*launcher(processes), "train.py", *(f"--{name}={value}" for name, value in flags.items())],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def read_until(process, text):
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(process.stderr.read()[-3000:])


def end_of(process):
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def ranks_of(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def check_continues(flags, processes, undisturbed):
    """The one checkpoint of the stopped run is whole, and the run that goes on from it is the undisturbed one."""
    out = flags["output_dir"]
    (stopped,) = out.glob("checkpoint-*")
    assert not find_problems(stopped) and not (out / "config.json").exists()
    assert not json.loads((out / "alpaca_run.json").read_text())["finished"]
    train({**flags, "resume_from_checkpoint": True}, processes)
    now, then = weights(out), weights(undisturbed)
    assert now.keys() == then.keys() and all(now[name].equal(then[name]) for name in now), "bit for bit"


def to_torchrun(process, number):
    process.send_signal(number)


def to_last_rank(process, number):
    os.kill(ranks_of(process)[-1], number)


def to_first_rank(process, number):
    os.kill(ranks_of(process)[0], number)


def to_group(process, number):
    os.killpg(process.pid, number)


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    made = {}

    def run(processes, **changed):
        key = (processes, *changed.items())
        if key not in made:
            made[key] = folder = tmp_path_factory.mktemp("undisturbed")
            train(flags_for(tiny, folder, output_dir=folder / "out", **changed), processes)
        return made[key] / "out"

    return run


@pytest.mark.parametrize(
    "send, number, fsdp",
    [
        STRESS(to_torchrun, signal.SIGTERM, ""),
        STRESS(to_torchrun, signal.SIGINT, "full_shard auto_wrap"),
        (to_last_rank, signal.SIGTERM, "full_shard auto_wrap"),
        STRESS(to_first_rank, signal.SIGINT, ""),
        STRESS(to_group, signal.SIGTERM, ""),
        STRESS(to_group, signal.SIGINT, ""),
    ],
)
def test_two_ranks_stop_at_the_same_step(tiny, tmp_path, undisturbed, send, number, fsdp):
    flags = flags_for(tiny, tmp_path, output_dir=tmp_path / "out", fsdp=fsdp)
    process = start(flags, processes=2)
    read_until(process, "step 5/")
    send(process, number)
    code, stdout, stderr = end_of(process)
    assert code != 0 and "saved to" not in stdout
    assert stdout.count(f"{number.name}: stopped at step ") == 1, "rank 0 alone speaks"
    assert f"--resume_from_checkpoint True continues from {tmp_path / 'out' / 'checkpoint-'}" in stdout
    if send in (to_first_rank, to_last_rank):  # else torchrun has ended itself, and writes no summary
        summary = stderr.split("train.py FAILED")[1]
        assert f"exitcode  : {128 + number}" in summary and f"traceback : {number.name}: stopped at step" in summary
    check_continues(flags, 2, undisturbed(2, fsdp=fsdp))


@pytest.mark.parametrize(
    "send, number, changed",
    [
        (to_torchrun, signal.SIGTERM, {}),  # to the process itself
        STRESS(to_group, signal.SIGTERM, {"dataloader_num_workers": 2}),
        STRESS(to_group, signal.SIGINT, {"save_only_model": True}),
        STRESS(to_torchrun, signal.SIGINT, {"gradient_accumulation_steps": 2, "batching": "padded"}),
    ],
)
def test_one_process_ends_with_the_code_of_the_signal(tiny, tmp_path, undisturbed, send, number, changed):
    flags = flags_for(tiny, tmp_path, output_dir=tmp_path / "out", **changed)
    process = start(flags)
    read_until(process, "step 5/")
    send(process, number)
    code, stdout, stderr = end_of(process)
    assert code == 128 + number and "Traceback" not in stderr, stderr
    assert stderr.count("finishing this step and its checkpoint") == 1
    check_continues(flags, 0, undisturbed(0, **changed))


@pytest.mark.parametrize(
    "number, processes", [(signal.SIGTERM, 0), STRESS(signal.SIGINT, 0), STRESS(signal.SIGTERM, 2)]
)
def test_before_the_first_step_a_signal_ends_the_run(tiny, tmp_path, number, processes):
    process = start(flags_for(tiny, tmp_path, output_dir=tmp_path / "out"), processes)
    read_until(process, "flag: ")
    to_group(process, number)
    code, stdout, stderr = end_of(process)
    assert stderr.count(f"train.py: {number.name} before the first step: ended, and nothing was saved") == 1, stderr
    assert "step 1/" not in stdout and not list((tmp_path / "out").glob("checkpoint-*"))
    assert processes or (code == 128 + number and "Traceback" not in stderr)


WAITING = """
import hashlib, sys
from alpaca.training import stop
with stop.watching():
    stop._watch.reach(sys.argv[1])
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # the main thread does not come back to Python
"""


def watched(stage):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, stage],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    read_until(process, "ready")
    return process


@pytest.mark.parametrize("first, second", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
def test_a_second_signal_ends_at_once_and_an_echo_of_the_first_does_not(first, second):
    process = watched("training")
    process.send_signal(first)
    time.sleep(0.2)
    process.send_signal(first)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(second)
    code, _, stderr = end_of(process)
    assert code == 128 + second
    assert stderr.count("a second signal ends at once") == 1 and f"a second signal, {second.name}: ended" in stderr


def test_while_loading_a_busy_main_thread_does_not_delay_the_end():
    process = watched("loading")
    process.send_signal(signal.SIGINT)
    code, _, stderr = end_of(process)
    assert code == 130 and "Traceback" not in stderr


def test_a_signal_in_the_last_step_does_not_lose_the_model(tiny, tmp_path):
    flags = flags_for(tiny, tmp_path, output_dir=tmp_path / "out") | {"max_steps": 3}
    process = start(flags)
    read_until(process, "step 3/")
    process.send_signal(signal.SIGTERM)
    code, stdout, _ = end_of(process)
    assert code in (0, 143) and ("saved to" in stdout) == (code == 0)


def test_signals_are_as_before_behind_a_run():
    from alpaca.training import stop

    before = [signal.getsignal(number) for number in stop.SIGNALS]
    with stop.watching():
        assert signal.getsignal(signal.SIGTERM) is stop._nothing
    assert [signal.getsignal(number) for number in stop.SIGNALS] == before
