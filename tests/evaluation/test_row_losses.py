"""The loss of single rows against a loop in plain transformers, and rows that hurt: planted ones come up."""

import json
import random
import re
import shutil

import pytest
import torch
from conftest import train
from transformers import AutoModelForCausalLM

from alpaca.completions.journal import Journal
from alpaca.data.prompts import PROMPT_DICT
from alpaca.evaluation.row_losses import batches, measure, score, token_losses
from scripts import inspect_data

pytestmark = pytest.mark.slow  # many small cases

ROWS = [([5, 9, 17, 30, 2], 3), ([7, 8], 1), ([3] * 40, 10), ([4, 6, 8], 3), ([11, 12, 13], 0), ([3, 5, 8, 2], 2)]


def plain(model, ids, first):
    """transformers' own loss of one row, without padding: summed over its targets."""
    labels = torch.tensor([[-100] * first + ids[first:]])
    targets = int((labels[:, 1:] != -100).sum())
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([ids]), labels=labels).loss
    return loss.item() * targets if targets else 0.0, targets


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("batch_tokens", [1, 12, 10_000])
def test_losses_are_those_of_a_plain_loop(tiny, architecture, batch_tokens):
    model = AutoModelForCausalLM.from_pretrained(tiny(architecture)).eval()
    found = dict(token_losses(model, ROWS, batch_tokens))
    assert sorted(found) == list(range(len(ROWS)))
    for place, (ids, first) in enumerate(ROWS):
        loss, targets = plain(model, ids, first)
        assert len(found[place]) == targets
        assert found[place].sum().item() == pytest.approx(loss, abs=1e-4)


def test_batches_hold_what_they_may():
    found = list(batches([5, 2, 40, 3, 3, 4], 12))
    assert found == [[2], [0, 5], [3, 4, 1]]
    assert list(batches([], 12)) == []


def test_what_stayed_high_or_rose_comes_first():
    assert score(8.0, 8.0, 1) > score(8.0, 4.0, 1) > score(8.0, 4.0, 9)
    assert score(4.0, 6.0, 9) > score(6.0, 6.0, 9)


@pytest.fixture(scope="module")
def run_folder(tiny, tmp_path_factory):
    """(folder of a run, its rows): answers that follow from the instruction, but for three planted ones."""
    folder = tmp_path_factory.mktemp("hurt")
    rows = [
        dict(instruction=f"Say {n % 10} again.", input="", output=f"{n % 10} {n % 10} {n % 10}") for n in range(120)
    ]
    for place, wrong in ((17, "Of course not, ask somebody else."), (60, "zebra"), (99, "")):
        rows[place]["output"] = wrong
    (folder / "rows.json").write_text(json.dumps(rows))
    flags = dict(model_name_or_path=tiny("llama"), data_path=folder / "rows.json", output_dir=folder / "run")
    train(flags | dict(num_train_epochs=6, learning_rate=1e-2, per_device_train_batch_size=4, logging_steps=50))
    return folder / "run", rows


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_planted_rows_come_up(run_folder, tiny, tmp_path, capsys):
    folder, _ = run_folder
    code = inspect_data.main(["--losses", str(folder), "--output_path", str(tmp_path / "losses.jsonl")])
    assert code == 1, "most rows stand there several times"
    ranked = entries(tmp_path / "losses.jsonl")
    assert {entry["row"] for entry in ranked[:3]} == {17, 60, 99} and len(ranked) == 120
    assert "empty_answer" in next(entry for entry in ranked if entry["row"] == 99)["problems"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    shown = capsys.readouterr().out
    assert "'Say 7 again.' -> 'Of course not, ask somebody else." in shown and "the worst first" in shown
    assert f"run.yaml: --model_name_or_path={tiny('llama')} " in shown and "WARNING" not in shown
    dataset_ids = {entry["row"]: entry for entry in ranked}
    ids = inspect_data.load_tokenizer(inspect_data.ModelArguments(str(folder)), inspect_data.InspectArguments())[0](
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay 0 again.\n\n### Response:0 0 0</s>"
    )["input_ids"]
    loss, _ = plain(model.eval(), ids, len(ids) - dataset_ids[0]["tokens"])
    assert dataset_ids[0]["after"] == pytest.approx(loss / dataset_ids[0]["tokens"], abs=1e-3)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_the_same_file(run_folder, tmp_path, monkeypatch):
    folder, _ = run_folder
    words = ["--losses", str(folder), "--sample", "30", "--rows", "17", "--output_path"]
    inspect_data.main([*words, str(tmp_path / "whole.jsonl")])
    assert len(entries(tmp_path / "whole.jsonl")) in (30, 31)
    whole = (tmp_path / "whole.jsonl.journal").read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl.journal").write_text("".join(whole[:20]) + whole[20][:9])  # torn in the middle of a line
    inspect_data.main([*words, str(tmp_path / "cut.jsonl")])
    assert (tmp_path / "cut.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    opened = []
    monkeypatch.setattr(inspect_data, "load_for_inference", lambda *a: opened.append(a))
    inspect_data.main([*words, str(tmp_path / "cut.jsonl")])
    assert not opened, "nothing is left to measure"


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, change",
    [
        ("--data_path {other}/rows.json", "the data (--data_path): 120 rows # then, 117 rows # now"),
        ("--model_name_or_path {other}/base", "the base model (--model_name_or_path): # then, # now"),
        ("--prompt_boundary split", "--prompt_boundary: stanford then, split now"),
        ("--model_max_length 60", "--model_max_length: 512 then, 60 now"),
        ("--prompt_template {other}/template.json", "--prompt_template: # then, # now"),
    ],
)
def test_what_is_not_as_in_the_run_is_said_and_never_mixed(run_folder, tiny, tmp_path, capsys, words, change):
    folder, rows = run_folder
    shutil.copytree(tiny("llama"), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.json").write_text(json.dumps(rows[3:]))
    (tmp_path / "template.json").write_text(json.dumps({name: f"Now: {text}" for name, text in PROMPT_DICT.items()}))
    told = ["--losses", str(folder), "--sample", "4", "--output_path", str(tmp_path / "losses.jsonl")]
    inspect_data.main(told)
    assert "WARNING" not in capsys.readouterr().out
    with pytest.raises(inspect_data.UsageError, match=r"losses.jsonl.journal was made with other arguments"):
        inspect_data.main([*told, *words.format(other=tmp_path).split()])
    shown = re.sub("[0-9a-f]{12}", "#", capsys.readouterr().out)
    assert f"WARNING: not as in the run of {folder}: {change}\n" in shown


@pytest.mark.slow
def test_a_run_without_a_model_or_a_record(run_folder, tmp_path, capsys, monkeypatch):
    folder, _ = run_folder
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "alpaca_run.json").write_text("{")  # torn
    inspect_data.main(["--losses", str(tmp_path / "run"), "--sample", "2"])
    assert "has no record of its run; whether rows and base are those of then is not known" in capsys.readouterr().out
    (tmp_path / "run" / "model.safetensors").unlink()
    monkeypatch.setattr(inspect_data, "load_for_inference", None)  # it ends before hours of forward passes
    with pytest.raises(inspect_data.UsageError, match=f"--losses {tmp_path}/run: holds no model; the run is not fin"):
        inspect_data.main(["--losses", str(tmp_path / "run"), "--sample", "3"])
    (tmp_path / "run" / "checkpoint-5").mkdir()
    with pytest.raises(
        inspect_data.UsageError, match=f"checkpoint-5: is a part of a run; give the run's folder, {tmp_path}/run"
    ):
        inspect_data.main(["--losses", str(tmp_path / "run" / "checkpoint-5")])


@pytest.mark.slow
def test_an_adapter_is_measured_on_its_base(run_folder, tiny, tmp_path, capsys):
    pytest.importorskip("peft")
    _, rows = run_folder
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = dict(model_name_or_path=tiny("llama"), data_path=tmp_path / "rows.json", output_dir=tmp_path / "run")
    train(flags | dict(max_steps=20, learning_rate=1e-2, lora_r=8))
    inspect_data.main(["--losses", str(tmp_path / "run"), "--sample", "12"])
    ranked = entries(tmp_path / "run" / "row_losses.jsonl")
    assert len(ranked) == 12 and all(entry["after"] < entry["before"] for entry in ranked[6:])
    assert "WARNING" not in capsys.readouterr().out
    # train.py adds no token for an adapter: not even [PAD], which this base lacks, is among what it chooses from
    model, options = tiny("llama"), inspect_data.InspectArguments()
    tokenizer, _ = inspect_data.load_tokenizer(inspect_data.ModelArguments(model, add_missing_tokens=False), options)
    dataset = inspect_data.SupervisedDataset(str(tmp_path / "rows.json"), tokenizer)
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    for entry in ranked:
        ids, labels = (getattr(dataset, name)[entry["row"]].tolist() for name in ("input_ids", "labels"))
        loss, targets = plain(base, ids, labels.count(-100))
        assert targets == entry["tokens"] and entry["before"] == pytest.approx(loss / targets, abs=1e-4)


def test_what_is_measured_of_other_weights_is_refused(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    models = {"before": lambda: model, "after": lambda: model}
    rows = dict(enumerate(ROWS))
    with Journal(tmp_path / "journal") as journal:
        found = measure(models, rows, 100, journal, {"weights": "a"})
        assert found[1].before == found[1].after and found[1].targets == 1
        with pytest.raises(inspect_data.UsageError, match="made with other arguments"):
            measure(models, rows, 100, journal, {"weights": "b"})
        journal.append({"kind": "answer", "index": 3})
        with pytest.raises(inspect_data.UsageError, match="a line that is none of ours"):
            measure(models, rows, 100, journal, {"weights": "a"})


def test_weights_that_are_not_finite_are_said(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with Journal(tmp_path / "journal") as journal:
        with pytest.raises(inspect_data.UsageError, match="row 2: its loss before training is nan; the weights"):
            measure({"before": lambda: model}, {2: ROWS[2]}, 100, journal, {})


def test_a_folder_that_is_no_run(tmp_path, tiny):
    with pytest.raises(inspect_data.UsageError, match="there is no run.yaml in it; expected a folder that train.py"):
        inspect_data.main(["--losses", str(tmp_path)])
    (tmp_path / "run.yaml").write_text(f"model_name_or_path: {tiny('llama')}\ndata_path: {tmp_path / 'gone.json'}\n")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(inspect_data.UsageError, match="--data_path .*gone.json: no such file"):
        inspect_data.main(["--losses", str(tmp_path)])
    (tmp_path / "run.yaml").write_text(f"model_name_or_path: {tmp_path / 'moved'}\ndata_path: rows.json\n")
    with pytest.raises(inspect_data.UsageError, match="--model_name_or_path .*moved: no such folder"):
        inspect_data.main(["--losses", str(tmp_path)])
    with pytest.raises(inspect_data.UsageError, match="--losses .*nowhere: no such folder"):
        inspect_data.main(["--losses", str(tmp_path / "nowhere")])


def test_the_command_line_wins_over_the_run(tmp_path):
    (tmp_path / "run.yaml").write_text("data_path: a.json\nguanaco_turns: all\nlearning_rate: 1\nseed: 7\n")
    classes = (inspect_data.ModelArguments, inspect_data.DataArguments, inspect_data.InspectArguments)
    words = inspect_data.with_flags_of_run(["--losses", str(tmp_path), "--seed", "8"], classes)
    assert words == ["--data_path=a.json", "--guanaco_turns=all", "--losses", str(tmp_path), "--seed", "8"]


def test_many_rows_of_random_shapes(tiny):
    """More shapes: the order of rows, one-token rows, targets that begin anywhere."""
    draw, model = random.Random(0), AutoModelForCausalLM.from_pretrained(tiny("llama")).eval()
    rows = []
    for _ in range(60):
        ids = [draw.randrange(3, 200) for _ in range(draw.randrange(1, 30))]
        rows.append((ids, draw.randrange(0, len(ids) + 1)))
    for place, losses in token_losses(model, rows, 64):
        loss, targets = plain(model, *rows[place])
        assert len(losses) == targets and losses.sum().item() == pytest.approx(loss, abs=2e-4)
