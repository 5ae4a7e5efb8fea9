"""What a model learned and forgot, against loops in plain transformers."""

import json
import math

import pytest
import torch
from conftest import train
from transformers import AutoModelForCausalLM, AutoTokenizer

from alpaca.common.errors import UsageError
from alpaca.data.prompts import PROMPT_DICT, format_prompt
from alpaca.evaluation import before_after
from alpaca.evaluation.before_after import BEGIN, END, put_into_card, read_questions
from scripts import evaluate

QUESTIONS = [
    dict(question="What is frozen water called?", choices=["steam", "ice", "a mist"], answer=1),
    dict(question="How many?", choices=["one", "two"], answer=0),
]
ALL = [dict(instruction=f"Say {n % 10} again.", input="", output=f"{n % 10} {n % 10}") for n in range(60)]


@pytest.fixture(scope="module")
def run_folder(tiny, tmp_path_factory):
    """A run with checkpoints, which has held out rows."""
    folder = tmp_path_factory.mktemp("before_after")
    (folder / "rows.json").write_text(json.dumps(ALL))
    (folder / "questions.jsonl").write_text("".join(json.dumps(asked) + "\n" for asked in QUESTIONS))
    flags = dict(model_name_or_path=tiny("llama"), data_path=folder / "rows.json", output_dir=folder / "run")
    flags |= dict(
        max_steps=60, learning_rate=1e-2, eval_size=12, eval_strategy="epoch", save_strategy="steps", save_steps=30
    )
    train(flags | dict(per_device_train_batch_size=4, save_only_model=True, logging_steps=50))
    return folder / "run"


def command(monkeypatch, base, model, output, *words):
    words = ["--base", base, "--model", model, "--output_dir", output, *words]
    monkeypatch.setattr("sys.argv", ["evaluate", "before_after", *map(str, words)])
    evaluate.main()
    return json.loads((output / "before_after.json").read_text())["models"]


def plain_losses(folder, text, prompt):
    """Of each token of `text` behind those of `prompt`, by transformers alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    first = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0]
    return -logits.log_softmax(-1)[range(ids.shape[1] - 1), ids[0, 1:]][first - 1 :]


@pytest.mark.slow
def test_every_measure_is_that_of_a_plain_loop(run_folder, tiny, tmp_path, monkeypatch, capsys):
    questions = run_folder.parent / "questions.jsonl"
    words = ["--questions_path", questions, "--answers", "4", "--max_new_tokens", "12", "--checkpoints", run_folder]
    found = command(monkeypatch, tiny("llama"), run_folder, tmp_path / "scores", *words)
    assert list(found) == ["base", "checkpoint-30", "checkpoint-60", "tuned"]
    assert found["tuned"]["loss"] < found["checkpoint-30"]["loss"] < found["base"]["loss"]
    for name in ("loss", "text_loss", "end_probability", "answers"):
        assert found["tuned"][name] == found["checkpoint-60"][name], "the same weights"
    held_out = evaluate.BeforeAfter(
        tiny("llama"), str(run_folder), "", None, None, None, evaluate.OF_PROBES, evaluate.OF_SAMPLES.sampling(), None
    )._held_out(before_after.flags_of_run(run_folder))
    assert len(held_out) == 12
    tokenizer = AutoTokenizer.from_pretrained(run_folder)
    losses, ends, lengths = [], [], []
    model = AutoModelForCausalLM.from_pretrained(run_folder)
    for place, row in enumerate(held_out):
        prompt = format_prompt(row, PROMPT_DICT)
        of_row = plain_losses(run_folder, f"{prompt}{row['output']}{tokenizer.eos_token}", prompt)
        losses.append(of_row)
        ends.append(math.exp(-of_row[-1]))
        if place < 4:
            inputs = tokenizer(prompt, return_tensors="pt")
            size = inputs["input_ids"].shape[1]
            new = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, size:].tolist()
            end = new.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in new else None
            lengths.append((len(new[:end]), end is not None))
            assert tokenizer.decode(new[:end]).strip() == found["tuned"]["answers"][place].strip()
    tuned = found["tuned"]
    assert tuned["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-4)
    assert tuned["end_probability"] == pytest.approx(sum(ends) / 12, abs=1e-4)
    assert tuned["length"] == sum(length for length, _ in lengths) / 4
    assert tuned["stops"] == sum(stopped for _, stopped in lengths) / 4
    right = []
    for asked in QUESTIONS:
        prompt = f"Question: {asked['question']}\nAnswer:"
        sums = [plain_losses(run_folder, f"{prompt} {choice}", prompt).sum().item() for choice in asked["choices"]]
        right.append(sums.index(min(sums)) == asked["answer"])
    assert tuned["right"] == sum(right) / 2
    text = before_after.ProbeFlags().text.read_text()
    ids = tokenizer(text)["input_ids"]
    pieces = [ids[n : n + 1024] for n in range(0, len(ids), 1024)]
    with torch.no_grad():
        sums = [
            model(input_ids=torch.tensor([piece]), labels=torch.tensor([piece])).loss.item() * (len(piece) - 1)
            for piece in pieces
        ]
    assert tuned["text_loss"] == pytest.approx(sum(sums) / (len(ids) - len(pieces)), abs=1e-3)
    bits = sum(sums) / math.log(2) / len(text.encode()) * len(ids) / (len(ids) - len(pieces))
    assert tuned["text_bits_per_byte"] == pytest.approx(bits, abs=1e-3)
    written = (tmp_path / "scores" / "before_after.md").read_text()
    assert "| | base | checkpoint-30 | checkpoint-60 | tuned |" in written and held_out[0]["instruction"] in written
    assert (tmp_path / "scores" / "before_after.png").stat().st_size > 10_000
    card = (run_folder / "README.md").read_text()
    assert card.count(BEGIN) == 1 and "questions answered right" in card
    capsys.readouterr()
    opened = []
    monkeypatch.setattr(before_after, "LocalModel", lambda *a, **k: opened.append(a))
    assert command(monkeypatch, tiny("llama"), run_folder, tmp_path / "scores", *words) == found
    assert not opened, "a rerun measures nothing again"
    with pytest.raises(UsageError, match="base.json was made with other arguments .answers 4"):
        command(monkeypatch, tiny("llama"), run_folder, tmp_path / "scores", *words[:2], "--answers", "5")
    (run_folder / "README.md").write_text(card.replace("# ", "# My ", 1))


@pytest.mark.slow
def test_an_adapter_and_rows_of_ones_own(tiny, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    (tmp_path / "rows.json").write_text(json.dumps(ALL))
    flags = dict(model_name_or_path=tiny("llama"), data_path=tmp_path / "rows.json", output_dir=tmp_path / "run")
    train(flags | dict(max_steps=30, learning_rate=1e-2, lora_r=8, per_device_train_batch_size=4))
    words = ["--data_path", tmp_path / "rows.json", "--rows", "10", "--answers", "0"]
    found = command(monkeypatch, tiny("llama"), tmp_path / "run", tmp_path / "scores", *words)
    assert found["tuned"]["loss"] < found["base"]["loss"] and found["tuned"]["stops"] is None
    assert "| answers that stop by themselves | - | - |" in (tmp_path / "scores" / "before_after.md").read_text()


def test_rows_must_come_from_somewhere(tiny, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="its run held out no rows to measure on; give some with --data_path"):
        command(monkeypatch, tiny("llama"), tiny("llama"), tmp_path)
    with pytest.raises(UsageError, match="has no checkpoint-N; give the folder of a run"):
        rows = tmp_path / "rows.json"
        rows.write_text(json.dumps(ALL))
        command(monkeypatch, tiny("llama"), tiny("llama"), tmp_path, "--data_path", rows, "--checkpoints", tmp_path)
    for words in (["--rows", "0"], ["--answers", "-1"], ["--batch_tokens", "0"]):
        with pytest.raises(UsageError, match=words[0]):
            command(monkeypatch, tiny("llama"), tiny("llama"), tmp_path, *words)


@pytest.mark.parametrize(
    "line, problem",
    [
        ("{}", "question 1: got {}"),
        ('{"question": "x", "choices": ["a", "b"], "answer": 2}', "question 1"),
        ('{"question": "x", "choices": ["a"], "answer": 0}', "question 1"),
        ('{"question": "x", "choices": ["a", ""], "answer": 0}', "question 1"),
        ('{"question": "x", "choices": ["a", "b"], "answer": true}', "question 1"),
        ("[", "cannot be read"),
        ("", "has no questions"),
    ],
)
def test_questions_that_are_none(tmp_path, line, problem):
    path = tmp_path / "q.jsonl"
    path.write_text(line)
    with pytest.raises(UsageError, match=problem):
        read_questions(path)


def test_our_questions_and_text_are_whole():
    flags = before_after.ProbeFlags()
    questions = read_questions(flags.questions)
    answers = [asked["answer"] for asked in questions]
    assert len(questions) == 40 and [answers.count(n) for n in range(4)] == [10] * 4, "no place is right more often"
    assert all(len(set(asked["choices"])) == 4 for asked in questions)
    assert len(flags.text.read_text().split()) > 900


def test_a_card_keeps_what_its_owner_wrote(tmp_path):
    card = tmp_path / "README.md"
    put_into_card(card, "table")
    assert not card.exists()
    card.write_text("# Mine\n\nText.\n")
    put_into_card(card, "one")
    put_into_card(card, "two")
    assert card.read_text() == f"# Mine\n\nText.\n\n{BEGIN}\n## Before and after\n\ntwo\n{END}\n"
    card.write_text(card.read_text() + "More.\n")
    put_into_card(card, "three")
    assert card.read_text().endswith(f"three\n{END}\nMore.\n") and "two" not in card.read_text()
