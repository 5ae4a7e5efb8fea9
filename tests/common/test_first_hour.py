"""The first hour of a new user: a command outside of its environment, a file of flags, what is said and when."""

import shutil
import socket
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from conftest import ROOT, run, write_rows

import train as train_module
from alpaca.common.arguments import run_yaml, split_flags, with_config
from alpaca.common.errors import UsageError

COMMANDS = (
    ["train.py"],
    ["weight_diff.py", "recover", "--help"],
    ["generate_instruction.py"],
    *(["-m", f"scripts.{path.stem}"] for path in sorted((ROOT / "scripts").glob("[a-z]*.py"))),
)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The interpreter of an environment in which nothing is installed."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    return folder / "bin" / "python"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_outside_of_the_environment_a_command_says_so_in_one_line(bare, command):
    result = run([bare, *command], check=False, env={"PYTHONPATH": ""})
    lines = [line for line in result.stderr.splitlines() if line]
    program = command[-1].removesuffix(".py") if command[0] == "-m" else command[0].removesuffix(".py")
    assert result.returncode == 2 and not result.stdout
    assert len(lines) == 2 and lines[0].removesuffix(": loading …").removesuffix(".py") == program
    assert f": error: torch is not installed in {bare}: " in lines[1] and "source .venv/bin/activate" in lines[1]


@pytest.mark.parametrize("name", ["gradio", "openai", "peft"])
def test_one_package_that_is_missing_is_named(tmp_path, name):
    """The other packages are there, as metadata."""
    for other in ("torch", "transformers", "accelerate", "datasets", "sentencepiece", "protobuf", "fire", "matplotlib"):
        _install(tmp_path, other, "1")
    for other in {"openai", "rapidfuzz", "peft", "gradio"} - {name}:
        _install(tmp_path, other, "1")
    result = _import(tmp_path, f"import {name}.part")
    assert result.returncode == 2 and f"here: error: {name} is not installed in {sys.executable}: " in result.stderr


def test_a_package_of_another_version_is_said(tmp_path):
    _install(tmp_path, "transformers", "4.28.1")
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("")
    result = _import(tmp_path, "from transformers import Exaone9")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"here: error: transformers 4.28.1 of {sys.executable} is not what is needed (cannot import" in result.stderr
    assert "expected transformers>=5" in result.stderr


def test_another_error_is_a_traceback(tmp_path):
    for code in ("import no_such_module_of_mine", "1 / 0", "from json import nothing_of_that"):
        result = _import(tmp_path, code)
        assert result.returncode == 1 and "Traceback" in result.stderr, code


def _install(folder: Path, name: str, version: str) -> None:
    found = folder / f"{name}-{version}.dist-info"
    found.mkdir()
    (found / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def _import(folder: Path, code: str) -> subprocess.CompletedProcess:
    """Run `code` below `starting` in an interpreter whose only packages lie in `folder`."""
    program = f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(folder)!r}]\n"
    program += f"from alpaca.common.errors import starting\nstarting('here')\n{code}\n"
    return run([sys.executable, "-S", "-c", program], check=False, cwd=folder)


# ---- a file of flags ----

REQUIRED = "data_path: x.json\noutput_dir: out\nreport_to: none\nuse_cpu: true\n"


def parsed(tmp_path, text, *words):
    (tmp_path / "run.yaml").write_text(REQUIRED + text, encoding="utf-8")
    return train_module.parse_flags([f"--config={tmp_path / 'run.yaml'}", *words])


def test_a_file_has_flags_by_name_and_the_command_line_wins(tmp_path):
    model, data, lora, args = parsed(
        tmp_path,
        "learning_rate: 1e-4\nlora_r: 8\nlora-target-modules: [q_proj, v_proj]\nlr_scheduler_kwargs: {num_cycles: 1}\n"
        "lr_scheduler_type: cosine\neval_strategy: no\nsave_strategy: 'no'\nbf16: no\nmax_tokens_per_pack:\n"
        "data_seed: null\npad_token: ~\nnum_train_epochs: 3\nweight_decay: 0.\n",
        "--num_train_epochs",
        "5",
        "--lora_r=4",
    )
    assert (args.learning_rate, lora.lora_r, args.num_train_epochs, args.weight_decay) == (1e-4, 4, 5, 0)
    assert lora.lora_target_modules == ["q_proj", "v_proj"] and args.lr_scheduler_kwargs == {"num_cycles": 1}
    assert (args.eval_strategy, args.save_strategy, args.bf16) == ("no", "no", False)
    assert (args.max_tokens_per_pack, args.data_seed, model.pad_token) == ("auto", None, None)


def test_names_of_2023_are_translated_in_a_file_too(tmp_path):
    args = parsed(tmp_path, "evaluation_strategy: no\nwarmup_ratio: 0.03\ngroup_by_length: true\n")[3]
    assert (args.eval_strategy, args.warmup_steps, args.train_sampling_strategy) == ("no", 0.03, "group_by_length")


WRONG = {
    "lr: 1e-4": "unknown flag --lr; here it is --learning_rate",
    "lerning_rate: 1e-4": "unknown flag --lerning_rate; did you mean --learning_rate?",
    "training: {epochs: 3}": "unknown flag --training",
    "- a": "expected flags by name",
    "just text": "expected flags by name",
    "bf16: [": "cannot be read as YAML",
    "seed: 1\nseed: 2": "seed: stands there twice",
    "seed: 1\n--seed: 2": "expected the name of a flag, without --",
    "seed: [[1]]": "expected a value, or a list of values",
    "report_to: []": "expected a value, or a list of values",
    "seed: &a 1\ndata_seed: *a": "has an alias (*name)",
    "config: other.yaml": "config: expected the name of a flag",
    "learning_rate: fast": "invalid float value: 'fast'",
    "\t- x": "cannot be read as YAML",
    "resume_from_checkpoint: [a, b": "cannot be read as YAML",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_file_is_one_message(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UsageError) as caught:
        train_module.parse_flags([f"--config={tmp_path / 'run.yaml'}", "--output_dir=x", "--data_path=y"])
    assert WRONG[text] in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path, problem in (("none.yaml", "No such file"), (".", "Is a directory"), ("binary", "cannot be read")):
        with pytest.raises(UsageError, match=f"--config .*{problem}"):
            with_config(["--config", str(tmp_path / path)])
    for words in (["--config"], ["--config="], ["--config", "a", "b"], ["--config=a", "--config=b"]):
        with pytest.raises(UsageError, match="expected one file"):
            with_config(words)


@pytest.mark.parametrize(
    "words",
    [
        ["--lora_r=8", "--learning_rate=2e-5", "--weight_decay=0.", "--bf16", '--fsdp_config={"a": "1"}'],
        ["--report_to", "wandb", "tensorboard", "--eval_strategy=no", "--data_path=ünï: #1.json", "--run_name=null"],
        ["--seed=-1", "--warmup_steps=0.03", "--run_name= a", "--hub_model_id=1e3", "--logging_steps=0012"],
        ["--run_name=True", "--pad_token=!", "--data_split=train[:10]", "--x=line\nline", "--y={}", "--z=---"],
    ],
)
def test_what_is_written_is_read_as_it_was(tmp_path, words):
    given = dict(split_flags(words))
    (tmp_path / "run.yaml").write_text(run_yaml(given, 2), encoding="utf-8")
    again = dict(split_flags(with_config([f"--config={tmp_path / 'run.yaml'}"])))
    assert again == {name: values or ["True"] for name, values in given.items()}


def test_no_secret_is_written(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "correct-horse-battery")
    given = {
        "hub_token": ["hf_abcdefgh"],
        "run_name": ["my correct-horse-battery run"],
        "data_path": ["https://me:pass@example.org/x.json"],
        "resume_from_checkpoint": ["True"],
        "seed": ["1"],
    }
    text = run_yaml(given, 1)
    assert [line for line in text.splitlines() if not line.startswith("#")] == ["seed: 1"]
    assert not [word for word in ("abcdefgh", "horse", "pass@") if word in text] and "hub_token: is secret" in text


# ---- a hub that cannot be reached ----


@pytest.fixture(params=["refuses", pytest.param("hangs", marks=pytest.mark.stress)])
def no_hub(request):
    """The environment of a process whose hub refuses, or takes the connection and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "hangs":
            server.listen(50)
        yield {
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}",
            "NO_PROXY": "127.0.0.1",
        }


ASKING = {
    "--model_name_or_path some/model": ["train.py", "--data_path={rows}", "--output_dir={out}", "--use_cpu"],
    "--model some/model": ["-m", "scripts.generate", "--interactive"],
    "--path_raw some/model": ["weight_diff.py", "recover", "--path_diff", "some/other"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag", [pytest.param(flag, marks=() if "raw" in flag else pytest.mark.stress) for flag in ASKING]
)
def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path, no_hub, flag):
    paths = {"rows": write_rows(tmp_path / "rows.json", 4), "out": tmp_path / "out"}
    words = [word.format(**paths) for word in ASKING[flag]]
    result = run([sys.executable, *words, *flag.split()], check=False, env=no_hub, timeout=60)
    message = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and "Retrying" not in result.stderr
    assert f"error: {flag}: no such folder, and as a hub id it is not in the cache; {no_hub['HF_ENDPOINT']}" in message
    assert "could not be reached (tried once: " in message and "HF_HUB_OFFLINE" not in message


@pytest.mark.slow
def test_rows_of_a_hub_that_cannot_be_reached(tmp_path, no_hub, tiny):
    words = [f"--model_name_or_path={tiny('llama')}", "--data_path=some/rows", f"--output_dir={tmp_path / 'out'}"]
    result = run([sys.executable, "train.py", *words], check=False, env=no_hub, timeout=60)
    message = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and "error: --data_path some/rows: no such file" in message
    assert "could not be reached (tried once: " in message and "Retrying" not in result.stderr


@pytest.mark.slow
def test_a_model_of_the_cache_needs_no_hub(tmp_path, no_hub, tiny):
    cached = tmp_path / "hub" / "models--some--model"
    shutil.copytree(tiny("llama"), cached / "snapshots" / "0123456789")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123456789")
    words = ["-m", "scripts.generate", "--model", "some/model", "--interactive", "--max_new_tokens", "3"]
    env = {**no_hub, "HF_HUB_CACHE": str(tmp_path / "hub")}
    result = run([sys.executable, *words], env=env, timeout=120)
    assert "tried once: " in result.stderr and "some/model is read from the cache" in result.stderr
