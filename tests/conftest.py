"""Real parts for tests: tiny models with tokenizers built on the spot, and torchrun on CPU ranks."""

import atexit
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "offline"}
if "alpaca-tests-" not in os.environ.get("HF_HOME", ""):  # xdist's workers inherit the folder
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="alpaca-tests-")  # huggingface_hub reads it once, at its import
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
if not os.environ.get("TEST_ON_GPU"):  # make test-gpu
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks on CPU, whatever the machine has

import pytest

from scripts.quickstart import free_port

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore Ctrl-C

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"
SHARED = ROOT.parent / "shared" / "data"  # real Alpaca rows, not part of the repository


def pytest_collection_modifyitems(items):
    """The longest test first, so that no other process waits for it at the end."""
    items.sort(key=lambda item: "test_tour" not in item.name)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny("llama" | "opt" | "gpt2") -> the folder of a model with random weights, made once per session."""
    from scripts.make_tiny_model import make_tiny_model

    made = {}

    def make(architecture: str) -> str:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(f"tiny_{architecture}")
            made[architecture] = str(make_tiny_model(folder, architecture, hidden_size=32, num_hidden_layers=2))
        return made[architecture]

    return make


def run(command, check=True, cwd=ROOT, env=None, timeout=300):
    """Run and return the CompletedProcess with text output; on failure show it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    try:
        result = subprocess.run(
            [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired as error:
        told = [(stream or b"").decode(errors="replace")[-6000:] for stream in (error.stdout, error.stderr)]
        pytest.fail(f"{command} took more than {timeout} s\n{told[0]}\n{told[1]}")
    if check and result.returncode != 0:
        pytest.fail(f"{command} -> {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}")
    return result


def launcher(processes: int) -> list[str]:
    if processes == 0:
        return [sys.executable]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={processes}",
        f"--master_port={free_port()}",
    ]


def train(flags: dict, processes: int = 0, real: bool = False, script="train.py", **kwargs):
    """Run train.py with `flags` as one process or as that many ranks, forked from a process that has its imports behind
    it (forked.py); `real`: by python or torchrun."""
    words = [f"--{name}={value}" for name, value in flags.items()]
    return run([*launcher(processes), script, *words], **kwargs) if real else fork(script, words, processes, **kwargs)


def fork(script: str, words: list[str], processes: int = 0, check=True, env=None, timeout=300):
    """`run`, for a script that imports what train.py does; the output is that of all ranks, one behind the other."""
    with tempfile.TemporaryDirectory() as folder:
        logs = [[f"{folder}/out-{rank}", f"{folder}/err-{rank}"] for rank in range(max(processes, 1))]
        env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        job = dict(script=script, words=words, env=env, ranks=processes, logs=logs, timeout=timeout)
        server = _server()
        server.stdin.write(json.dumps(job, default=str) + "\n")
        server.stdin.flush()
        answer = json.loads(server.stdout.readline())
        stdout, stderr = ("".join(Path(log[number]).read_text(errors="replace") for log in logs) for number in (0, 1))
    code = next((code for code in answer["codes"] if code), 0)
    if answer["timed_out"] or (check and code != 0):
        pytest.fail(f"{script} {words} -> {answer}\n{stdout[-3000:]}\n{stderr[-6000:]}")
    return subprocess.CompletedProcess([script, *words], code, stdout, stderr)


def recipe(name: str, more: list[str], env: dict, real: bool):
    """Run a script of recipes/, whose torchrun is `real` or notes what it is called with, for forked ranks."""
    if real:
        return run(["bash", ROOT / "recipes" / name, *more], env=env)
    processes, port, script, *words = recipe_words(name, more, env)
    assert (processes, port) == (f"--nproc_per_node={env['NPROC']}", f"--master_port={env['PORT']}")
    return fork(script, words, int(env["NPROC"]))


def recipe_words(name: str, more: list[str], env: dict) -> list[str]:
    """What a script of recipes/ calls torchrun with."""
    with tempfile.TemporaryDirectory() as folder:
        torchrun = Path(folder) / "torchrun"
        torchrun.write_text('#!/bin/sh\nprintf "%s\\0" "$@" > "$0.words"\n')
        torchrun.chmod(0o755)
        run(["bash", ROOT / "recipes" / name, *more], env={**env, "PATH": f"{folder}:{os.environ['PATH']}"})
        return Path(f"{torchrun}.words").read_text().split("\0")[:-1]


@functools.cache
def _server() -> subprocess.Popen:
    """One per test worker, started when the first test needs it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, "tests/support/forked.py"],
        cwd=ROOT,
        env=env,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    atexit.register(server.kill)
    return server


def history(output_dir) -> list[dict]:
    """The logged training steps of a run."""
    entries = json.loads((Path(output_dir) / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in entries if "loss" in entry]


def weights(folder) -> dict:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


def run_card(folder) -> dict:
    """The Python of the model card in `folder`, run there: its variables."""
    code = re.search("```python\n(.*?)```", (Path(folder) / "README.md").read_text(), re.DOTALL)[1]
    before, names = os.getcwd(), {}
    os.chdir(folder)
    try:
        exec(code, names)
    finally:
        os.chdir(before)
    return names


def largest_difference(a, b) -> float:
    """Largest absolute difference between the weights of two checkpoints, which must have the same tensors."""
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


def write_rows(path, number: int, **extra) -> str:
    """A small data file of `number` distinct Alpaca rows of different lengths."""
    rows = [
        {
            "instruction": f"Count to {i % 7 + 1}.",
            "input": "aloud" if i % 3 == 0 else "",
            "output": f"Row {i}: " + ", ".join(str(n + 1) for n in range(i % 7 + 1)),
            **extra,
        }
        for i in range(number)
    ]
    Path(path).write_text(json.dumps(rows))
    return str(path)
