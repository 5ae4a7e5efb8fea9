"""What a run leaves for others: trackers, the hub, files that they may read, a file of flags, and what it says."""

import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
import yaml
from conftest import fork, history, train, write_rows

import train as train_module
from alpaca.common.errors import UsageError

pytestmark = pytest.mark.slow
SMALL = dict(use_cpu=True, per_device_train_batch_size=2, logging_steps=1, num_train_epochs=1, report_to="none")


@pytest.fixture
def flags(tiny, tmp_path):
    """The flags of a run of two steps."""
    data = write_rows(tmp_path / "rows.json", 4)
    return SMALL | {"model_name_or_path": tiny("llama"), "data_path": data, "output_dir": tmp_path / "out"}


def words(flags):
    return [f"--{name}={value}" for name, value in flags.items()]


def test_several_trackers_at_once(flags, tmp_path):
    del flags["report_to"]
    env = {"TENSORBOARD_LOGGING_DIR": str(tmp_path / "tb"), "WANDB_DIR": str(tmp_path), "WANDB_MODE": "offline"}
    fork("train.py", [*words(flags), "--report_to", "wandb", "tensorboard"], env=env)
    assert any(path.stat().st_size > 500 for path in (tmp_path / "tb").rglob("events.out.tfevents.*"))
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["report_to"] == "wandb,tensorboard"


@pytest.mark.parametrize("given", [["wandb", "tensorboard"], ["wandb,tensorboard"], ["wandb, tensorboard"]])
def test_trackers_are_divided_by_spaces_or_commas(flags, tmp_path, given):
    del flags["report_to"]
    assert train_module.parse_flags([*words(flags), "--report_to", *given])[-1].report_to == ["wandb", "tensorboard"]
    (tmp_path / "run.yaml").write_text(f"report_to: {given if len(given) > 1 else given[0]}")
    file = f"--config={tmp_path / 'run.yaml'}"
    assert train_module.parse_flags([*words(flags), file])[-1].report_to == ["wandb", "tensorboard"]


@pytest.mark.skipif(importlib.util.find_spec("trackio") is not None, reason="trackio is installed")
@pytest.mark.parametrize("together", [["trackio"], ["tensorboard", "trackio"]])
def test_trackio_where_it_is_not_installed(flags, together):
    del flags["report_to"]
    with pytest.raises(UsageError, match="--report_to trackio: is not installed; pip install trackio"):
        train_module.parse_flags([*words(flags), "--report_to", *together])


def test_the_hub_gets_the_model_with_its_card(flags, tmp_path, monkeypatch):
    """The hub's interface is replaced: no test reaches it."""
    uploads = []

    def upload_folder(folder_path, repo_id, ignore_patterns=(), **options):
        folder = Path(folder_path)
        uploads.append({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} | {"id": repo_id})

    made = []
    hub = SimpleNamespace(
        create_repo=lambda name, **options: made.append((name, options)) or SimpleNamespace(repo_id=name),
        upload_folder=upload_folder,
    )
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda *_: hub)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    train_module.train(words(flags | {"push_to_hub": True, "hub_model_id": "me/mine", "hub_private_repo": True}))
    assert made[0][0] == "me/mine" and made[0][1]["private"] is True
    assert uploads[-1]["id"] == "me/mine" and "model.safetensors" in uploads[-1]
    card = uploads[-1]["README.md"].decode()
    assert "by the Stanford Alpaca recipe" in card and "vllm serve ." in card
    assert not any(b"hf_of_the_test" in content for content in uploads[-1].values() if isinstance(content, bytes))


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_weights_are_as_readable_as_other_files(flags, tmp_path, kind):
    if kind == "adapter":
        flags["lora_r"] = 2
    result = train(flags | {"save_strategy": "steps", "save_steps": 1})
    found = [*(tmp_path / "out").rglob("*.safetensors")]
    assert len(found) == 3
    for path in found:
        config = path.with_name("config.json" if kind == "model" else "adapter_config.json")
        assert path.stat().st_mode == config.stat().st_mode
    assert f"saved to {tmp_path / 'out'}: the {kind} and its tokenizer, README.md (the model card)" in result.stdout
    ways = result.stdout.partition("next:\n")[2].splitlines()
    assert [way.split(":")[0].strip() for way in ways] == ["chat", "demo", "export" if kind == "model" else "merge"]
    assert all(str(tmp_path / "out") in way for way in ways)


@pytest.mark.stress
def test_a_resumed_run_says_where_it_goes_on(flags, tmp_path):
    saving = flags | {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    train(saving)
    (tmp_path / "out" / "alpaca_run.json").unlink()
    result = train(saving | {"max_steps": 3, "resume_from_checkpoint": True})
    assert "continuing from checkpoint-2, step 2 of 3" in result.stdout
    assert "continuing" not in train(saving | {"output_dir": tmp_path / "other"}).stdout


def test_a_run_is_repeated_from_its_own_file(flags, tmp_path):
    first = train(flags | {"lora_r": 2, "warmup_ratio": 0.5, "evaluation_strategy": "no"})
    assert "flag: --lora_r without --learning_rate -> --learning_rate 2e-4" in first.stdout
    path = tmp_path / "out" / "run.yaml"
    again = train({"config": path, "output_dir": tmp_path / "again"})
    assert "without --learning_rate" not in again.stdout
    key = ("loss", "learning_rate", "grad_norm")
    logs = [[[entry[name] for name in key] for entry in history(tmp_path / name)] for name in ("out", "again")]
    assert logs[0] == logs[1] and len(logs[0]) == 2
    before, after = (yaml.safe_load((tmp_path / name / "run.yaml").read_text()) for name in ("out", "again"))
    assert before | {"output_dir": str(tmp_path / "again")} == after


def test_a_run_yaml_of_the_users_own_stays(flags, tmp_path):
    (tmp_path / "out").mkdir()
    own = "# mine\n" + "".join(f"{name}: {json.dumps(str(value))}\n" for name, value in flags.items())
    (tmp_path / "out" / "run.yaml").write_text(own)
    result = train({"config": tmp_path / "out" / "run.yaml"})
    assert "run.yaml is not one of ours and stays as it is" in result.stdout
    assert (tmp_path / "out" / "run.yaml").read_text() == own


@pytest.mark.parametrize("given", [[], ["--output_dir="], ["--output_dir", ""]])
def test_output_dir_is_required(flags, given):
    del flags["output_dir"]
    with pytest.raises(UsageError, match="--output_dir( is missing: the folder|: needs a value)"):
        train_module.parse_flags([*words(flags), *given])
    assert not os.path.exists("trainer_output")


@pytest.mark.parametrize(
    "given, rate",
    [({"lora_r": 8}, 2e-4), ({"lora-r": 8}, 2e-4), ({"lora_r": 8, "learning-rate": 3e-4}, 3e-4), ({}, 5e-5)],
)
def test_the_learning_rate_of_lora(flags, given, rate, capsys):
    assert train_module.parse_flags(words(flags | given))[-1].learning_rate == rate
    assert ("--lora_r without --learning_rate" in capsys.readouterr().out) == (rate == 2e-4)
