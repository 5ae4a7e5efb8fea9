"""What a model learned and forgot, against loops in plain transformers."""

import functools
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import train
from transformers import AutoModelForCausalLM, AutoTokenizer

from alpaca.common.errors import UsageError
from alpaca.data.prompts import PROMPT_DICT, format_prompt
from alpaca.data.rows import read_data
from alpaca.evaluation import before_after
from alpaca.evaluation.before_after import BEGIN, END, NO_ROOM, PICTURE, put_into_card, read_questions, verbatim
from alpaca.evaluation.row_losses import flags_of_run, held_out_of
from alpaca.weights.provenance import CARD_MARKER
from scripts import evaluate

pytestmark = pytest.mark.slow  # many small cases

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


@functools.cache
def opened(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def plain_losses(folder, text, prompt):
    """Of each token of `text` behind those of `prompt`, by transformers alone."""
    model, tokenizer = opened(folder)
    first = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0]
    return -logits.log_softmax(-1)[range(ids.shape[1] - 1), ids[0, 1:]][first - 1 :]


def plain_choices(folder, questions):
    """The number of the likeliest choice of each question."""
    chosen = []
    for asked in questions:
        prompt = f"Question: {asked['question']}\nAnswer:"
        sums = [plain_losses(folder, f"{prompt} {choice}", prompt).sum().item() for choice in asked["choices"]]
        chosen.append(sums.index(min(sums)))
    return chosen


def last_eval_loss(run):
    """What train.py logged as the last loss on the rows that it held out."""
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry["eval_loss"] for entry in log if "eval_loss" in entry][-1]


@pytest.mark.slow
def test_every_measure_is_that_of_a_plain_loop(run_folder, tiny, tmp_path, monkeypatch, capsys):
    questions = run_folder.parent / "questions.jsonl"
    words = ["--questions_path", questions, "--answers", "4", "--max_new_tokens", "12", "--checkpoints", run_folder]
    found = command(monkeypatch, tiny("llama"), run_folder, tmp_path / "scores", *words)
    assert list(found) == ["base", "checkpoint-30", "checkpoint-60", "tuned"]
    assert found["tuned"]["loss"] < found["checkpoint-30"]["loss"] < found["base"]["loss"]
    for name in ("loss", "text_loss", "end_probability", "answers"):
        assert found["tuned"][name] == found["checkpoint-60"][name], "the same weights"
    _, held_out = read_data(str(run_folder.parent / "rows.json")).hold_out(12, 42)
    held_out = random.Random(0).sample(held_out.rows, 12)
    assert found["tuned"]["loss"] == pytest.approx(last_eval_loss(run_folder), abs=1e-4), "train.py's own, of its rows"
    asked = json.loads((tmp_path / "scores" / "before_after.json").read_text())["asked"]
    assert asked == [row["instruction"] for row in held_out[:4]]
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
    assert tuned["chosen"] == plain_choices(run_folder, QUESTIONS)
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
    assert card.count(BEGIN) == 1 and "questions answered right" in card and "](before_after.png)" in card
    assert (run_folder / "before_after.png").read_bytes() == (tmp_path / "scores" / "before_after.png").read_bytes()
    capsys.readouterr()
    models = []
    monkeypatch.setattr(before_after, "LocalModel", lambda *a, **k: models.append(a))
    assert command(monkeypatch, tiny("llama"), run_folder, tmp_path / "scores", *words) == found
    assert not models, "a rerun measures nothing again"
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


@pytest.fixture
def card(tmp_path):
    (tmp_path / PICTURE).write_bytes(b"drawn")
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "README.md"


def into(card, table):
    put_into_card(card, table, card.parent.parent / PICTURE)


def test_a_card_keeps_what_its_owner_wrote(card):
    into(card, "table")
    assert not card.exists() and not card.with_name(PICTURE).exists()
    card.write_text(f"{CARD_MARKER}\n# Mine\n\nText.\n")
    into(card, "one")
    into(card, "two")
    section = f"{BEGIN}\n## Before and after\n\ntwo\n\n![The same as a picture]({PICTURE})\n{END}"
    assert card.read_text() == f"{CARD_MARKER}\n# Mine\n\nText.\n\n{section}\n"
    assert card.with_name(PICTURE).read_bytes() == b"drawn"
    card.write_text(card.read_text() + "More.\n")
    into(card, "three")
    assert (
        "three" in card.read_text() and card.read_text().endswith(f"{END}\nMore.\n") and "two" not in card.read_text()
    )


@pytest.mark.parametrize("left", [BEGIN, f"{END}\n{BEGIN}", END, rf"{BEGIN} \1 \g<0>"])
def test_a_marker_that_was_left_alone_takes_no_text_with_it(card, left):
    card.write_text(f"{CARD_MARKER}\n{left}\nThe owner's.\n")
    into(card, r"one \1")
    into(card, r"two \1")
    assert f"{left}\nThe owner's.\n" in card.read_text()
    assert "one" not in card.read_text().partition("owner's")[2] and card.read_text().count(r"two \1") == 1


@pytest.mark.parametrize("content", [b"# Somebody's\n", b"# caf\xe9\n", b"", f"{BEGIN}\nx\n{END}".encode()])
def test_a_card_that_is_not_ours_stays_as_it_is(card, content, capsys):
    """As the line in ours promises to whoever takes it out."""
    card.write_bytes(content)
    into(card, "table")
    assert card.read_bytes() == content and not card.with_name(PICTURE).exists()
    assert "is not one of ours and stays as it is" in capsys.readouterr().out


# ---- the rows of a run ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        pytest.param(dict(backward=True), marks=pytest.mark.stress),
        dict(prompt_boundary="split", model_max_length=40),
    ],
    ids=str,
)
def test_the_rows_of_a_run_are_measured_as_it_evaluates_them(tiny, tmp_path, monkeypatch, more):
    """Its own eval_loss is what comes out, with its prompts, direction, limit and boundary."""
    (tmp_path / "rows.json").write_text(json.dumps(ALL))
    flags = dict(model_name_or_path=tiny("llama"), data_path=tmp_path / "rows.json", output_dir=tmp_path / "run")
    flags |= dict(max_steps=10, learning_rate=1e-2, eval_size=9, eval_strategy="steps", eval_steps=10, seed=7)
    train(flags | more | dict(per_device_train_batch_size=4, save_strategy="no"))
    found = command(monkeypatch, tiny("llama"), tmp_path / "run", tmp_path / "scores", "--answers", "0")
    assert found["tuned"]["loss"] == pytest.approx(last_eval_loss(tmp_path / "run"), abs=1e-4)
    assert (found["tuned"]["end_probability"] is None) == ("model_max_length" in more), "at 40 tokens no end is left"


@pytest.mark.slow
def test_the_rows_of_a_run_are_its_own(run_folder, tiny, tmp_path, monkeypatch):
    run, rows = tmp_path / "run", tmp_path / "rows.json"
    shutil.copytree(run_folder, run)
    rows.write_text(json.dumps(ALL))
    told = flags_of_run(run)
    assert told["eval_size"] == 12 and flags_of_run(run / "checkpoint-30") == told
    (run / "run.yaml").write_text("data_path: nowhere.json\neval_size: 12\n")  # as seen from another folder
    assert len(held_out_of(run, flags_of_run(run), {}).rows) == 12
    rows.write_text(json.dumps([*ALL[:-1], ALL[0]]))
    with pytest.raises(UsageError, match="cannot be had .*has other rows now than when .*; give rows .* --data_path"):
        command(monkeypatch, tiny("llama"), run, tmp_path / "scores")
    rows.unlink()
    with pytest.raises(UsageError, match="cannot be had .*nowhere.json.*; give rows .* --data_path"):
        command(monkeypatch, tiny("llama"), run, tmp_path / "scores")


@pytest.mark.parametrize(
    "text, problem",
    [
        ("model_max_length: many\n", "invalid literal"),
        ("eval_size: [0.1\n", "cannot be read as YAML"),
        ("seed: 1.5\n", "invalid literal"),
        ("- data_path\n", "expected flags by name"),
    ],
)
def test_a_run_yaml_that_is_none(tiny, tmp_path, monkeypatch, text, problem):
    run = copy_of(tiny("llama"), tmp_path / "run")
    (run / "run.yaml").write_text(text)
    with pytest.raises(UsageError, match=f"--model: .*run.yaml: is not as train.py writes it .*{problem}"):
        command(monkeypatch, tiny("llama"), run, tmp_path / "scores")


# ---- what is said before anything is measured, and what is never shown as a number ----


def copy_of(folder, target):
    shutil.copytree(folder, target)
    return target


@pytest.fixture
def own_rows(tmp_path):
    """The flags of a short measurement."""
    (tmp_path / "rows.json").write_text(json.dumps(ALL))
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(asked) + "\n" for asked in QUESTIONS))
    words = ["--data_path", tmp_path / "rows.json", "--questions_path", tmp_path / "questions.jsonl"]
    return [*words, "--answers", "2", "--max_new_tokens", "3"]


def test_what_cannot_be_done_is_said_before_anything_is_measured(tiny, tmp_path, monkeypatch, own_rows):
    monkeypatch.setattr(before_after, "LocalModel", lambda *a, **k: pytest.fail("a model was opened"))
    base, scores = tiny("llama"), tmp_path / "scores"
    with pytest.raises(UsageError, match="--model .*nowhere: no such folder"):
        command(monkeypatch, base, tmp_path / "nowhere", scores, *own_rows)
    run = copy_of(base, tmp_path / "run")
    for output in (run, Path(base)):
        with pytest.raises(UsageError, match="--output_dir .*: holds a model"):
            command(monkeypatch, base, run, output, *own_rows)
        assert not list(output.glob("before_after*"))
    scores.mkdir()
    for content in ("{}", '{"loss": "x"}', "[]", "{", '{"loss": 1, "how": {}}'):
        (scores / "tuned.json").write_text(content)
        with pytest.raises(UsageError, match="tuned.json: is no result of|tuned.json: expected a JSON|cannot be read"):
            command(monkeypatch, base, run, scores, *own_rows)


def test_our_questions_are_answered_as_by_a_plain_loop(tiny, tmp_path, monkeypatch, own_rows):
    words = [*own_rows, "--questions_path", before_after.ProbeFlags().questions, "--answers", "0"]
    found = command(monkeypatch, tiny("llama"), tiny("gpt2"), tmp_path / "scores", *words)
    questions = read_questions(before_after.ProbeFlags().questions)
    for name, folder in (("base", tiny("llama")), ("tuned", tiny("gpt2"))):
        chosen = plain_choices(folder, questions)
        share = sum(choice == asked["answer"] for choice, asked in zip(chosen, questions)) / 40
        assert found[name]["chosen"] == chosen and len(set(chosen)) > 1 and found[name]["right"] == share
        assert found[name]["right_stderr"] == pytest.approx((share * (1 - share) / 40) ** 0.5)


def test_rows_of_many_lengths_have_the_losses_of_a_plain_loop(tiny, tmp_path, monkeypatch, own_rows):
    """In one batch, with prompts of different lengths."""
    rows = [dict(instruction="Say it. " * n, input="now" if n % 2 else "", output="so " * (7 - n)) for n in range(1, 7)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = [*own_rows, "--answers", "6", "--batch_size", "4"]
    found = command(monkeypatch, tiny("llama"), tiny("gpt2"), tmp_path / "scores", *words)
    asked = random.Random(0).sample(rows, 6)
    for name, folder in (("base", tiny("llama")), ("tuned", tiny("gpt2"))):
        model, tokenizer = opened(folder)
        for row, answer in zip(asked, found[name]["answers"]):
            inputs = tokenizer(format_prompt(row, PROMPT_DICT), return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0]
            before = tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
            assert tokenizer.decode(ids, skip_special_tokens=True) == before + answer, "beside its own question"
        assert len(set(found[name]["answers"])) > 1, "which can be told apart"
        end = tokenizer.eos_token
        prompts = [format_prompt(row, PROMPT_DICT) for row in rows]
        losses = [plain_losses(folder, f"{p}{row['output']}{end}", p) for p, row in zip(prompts, rows)]
        assert found[name]["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-4)
        ends = [math.exp(-of_row[-1]) for of_row in losses]
        assert found[name]["end_probability"] == pytest.approx(sum(ends) / 6, rel=1e-3)


def test_numbers_of_other_prompts_are_not_taken_for_these(tiny, tmp_path, monkeypatch, own_rows):
    run, scores = copy_of(tiny("llama"), tmp_path / "run"), tmp_path / "scores"
    before = command(monkeypatch, tiny("llama"), run, scores, *own_rows)
    prompts = {"prompt_input": "{instruction} {input} Then:", "prompt_no_input": "{instruction} Then:"}
    (run / "prompt_template.json").write_text(json.dumps(prompts))
    with pytest.raises(UsageError, match="base.json was made with other arguments .templates"):
        command(monkeypatch, tiny("llama"), run, scores, *own_rows)
    after = command(monkeypatch, tiny("llama"), run, tmp_path / "other", *own_rows)
    assert after["base"]["loss"] == after["tuned"]["loss"] != before["base"]["loss"], "the base is asked as the run is"


def test_a_model_that_computes_no_numbers_has_no_score(tiny, tmp_path, monkeypatch, own_rows):
    """Among NaN the first choice is the smallest, and the score looks like any other."""
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    model.save_pretrained(copy_of(tiny("llama"), tmp_path / "run"))
    with pytest.raises(UsageError, match="--model .*a loss of its rows is not a number in torch.float32"):
        command(monkeypatch, tiny("llama"), tmp_path / "run", tmp_path / "scores", *own_rows)
    assert (tmp_path / "scores" / "base.json").exists() and not (tmp_path / "scores" / "tuned.json").exists()


def test_what_is_longer_than_the_context(tiny, tmp_path, monkeypatch, own_rows):
    base, scores = tiny("opt"), tmp_path / "scores"
    (tmp_path / "rows.json").write_text(json.dumps([dict(instruction="word " * 3000, input="", output="x")] * 2))
    with pytest.raises(UsageError, match="--data_path .*none of 2 rows has a token to predict within the 512 tokens"):
        command(monkeypatch, base, base, scores, *own_rows)
    (tmp_path / "rows.json").write_text(json.dumps([dict(instruction="word " * 3000, input="", output="x"), ALL[0]]))
    found = command(monkeypatch, base, base, scores, *own_rows)
    assert sorted(answer is None for answer in found["tuned"]["answers"]) == [False, True]
    assert found["tuned"]["length"] <= 3 and NO_ROOM in (scores / "before_after.md").read_text()
    (tmp_path / "questions.jsonl").write_text(json.dumps(QUESTIONS[0] | {"question": "word " * 3000}))
    with pytest.raises(UsageError, match="--questions_path .*question 1: has .* and .* reads at most 2048"):
        command(monkeypatch, base, base, tmp_path / "other", *own_rows)


def test_a_base_without_an_end_token(tiny, tmp_path, monkeypatch, own_rows):
    base = copy_of(tiny("opt"), tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text()) | {"eos_token": None}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "special_tokens_map.json").unlink(missing_ok=True)
    assert AutoTokenizer.from_pretrained(base).eos_token is None
    found = command(monkeypatch, base, tiny("opt"), tmp_path / "scores", *own_rows)
    assert found["base"]["end_probability"] is None and 0 < found["tuned"]["end_probability"] < 1
    assert found["base"]["loss"] > 0 and found["base"]["text_loss"] == found["tuned"]["text_loss"]


def test_a_question_may_have_any_letter(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(QUESTIONS[0] | {"question": "a\u2028b\x85c"}, ensure_ascii=False) + "\r\n\n")
    assert [asked["question"] for asked in read_questions(path)] == ["a\u2028b\x85c"]


def test_answers_are_shown_letter_for_letter():
    assert verbatim("# a\u2028b\n```\n<i>") == "````text\n# a\u2028b\n```\n<i>\n````"
