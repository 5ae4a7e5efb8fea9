"""Evaluation: overlap with true texts, answers for AlpacaEval, a judge over HTTP, the harness on tasks of our own."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from completion_server import BAD_KEY, CompletionServer

from alpaca import judging
from alpaca.errors import UsageError
from scripts import evaluate, generate

BESIDE = Path(sys.prefix) / "evaluation"  # where make installs what tests alone need


def read(path):
    return json.loads(Path(path).read_text())


def save(path, rows):
    path.write_text(json.dumps(rows))
    return str(path)


# ---- win_rate ----


@pytest.fixture
def files(tmp_path):
    """Six pairs; the other file has them in another order, and one more."""
    ours = enumerate(["good", "good", "bad", "same", "place", "odd"])
    theirs = [(5, "odd"), (9, "-"), (4, "place"), (3, "same"), (2, "good"), (1, "bad"), (0, "bad")]
    paths = [
        save(tmp_path / name, [{"instruction": f"Task {n}", "output": text} for n, text in pairs])
        for name, pairs in (("ours.json", ours), ("theirs.json", theirs))
    ]
    return dict(zip(("outputs", "reference"), paths), judge="tiny", api="chat")


def judge(prompt, body):
    """Prefers "good", wherever it stands; says a tie for "same", the first for "place", nothing clear for "odd"."""
    first, second = (prompt.split(f"<answer_{n}>\n")[1].split("\n")[0] for n in (1, 2))
    if first == "odd":
        return "Verdict: 1 would be unfair, and so would\nVerdict: 2 be."
    verdict = "tie" if first == "same" else "1" if first in ("good", "place") else "2"
    return f"The line\nVerdict: 2\nstands in the reasons.\n**Verdict: {verdict}**"


def test_win_rate_in_both_orders(tmp_path, files, capsys):
    with CompletionServer(judge) as server:
        evaluate.win_rate(**files, base_url=server.url)
    result, told = read(tmp_path / "ours.win_rate.json"), capsys.readouterr().out
    wins = [1, 1, 0, 0.5, 0.5]  # "place" wins once, "odd" does not count
    mean = sum(wins) / 5
    assert result["win_rate"] == pytest.approx(100 * mean)
    deviation = (sum((win - mean) ** 2 for win in wins) / 4) ** 0.5
    assert result["standard_error"] == pytest.approx(100 * deviation / 5**0.5)
    assert [result[name] for name in ("rows", "rows_counted", "wins", "losses", "ties")] == [6, 5, 2, 1, 2]
    assert (result["verdicts"], result["verdicts_unread"]) == (12, 2)
    assert result["orders_agree"] == pytest.approx(80)
    assert (result["win_rate_when_first"], result["win_rate_when_second"]) == pytest.approx((70, 50))
    assert (result["average_length"], result["reference_average_length"]) == (3, 3)  # 23 / 6, 23 / 6
    assert "not an AlpacaEval number" in told and f"--model_outputs {files['outputs']}" in told
    assert "1 rows of" in told and "2 of 12 answers of the judge end without a verdict" in told


def test_a_judge_is_asked_nothing_twice(files):
    with CompletionServer(judge, script=[None] * 6 + [BAD_KEY] * 9) as server:
        with pytest.raises(UsageError, match="Incorrect API key"):
            evaluate.win_rate(**files, base_url=server.url, concurrency=1)
        server.script = []
        done = [request.prompt for request in server.requests[:6]]
        server.requests.clear()
        evaluate.win_rate(**files, base_url=server.url)
        asked = [request.prompt for request in server.requests]
        assert len(done) == len(asked) == 6 and not set(done) & set(asked)
        evaluate.win_rate(**files, base_url=server.url)
        assert len(server.requests) == 6
        with pytest.raises(UsageError, match="another question .*max_tokens 512"):
            evaluate.win_rate(**files, base_url=server.url, max_tokens=9)


def test_one_order_is_drawn_for_each_row():
    drawn = judging.questions(200, "one", seed=1)
    assert drawn == judging.questions(200, "one", seed=1) != judging.questions(200, "one", seed=2)
    assert [question["row"] for question in drawn] == list(range(200))
    assert 70 < sum(question["first"] == judging.OURS for question in drawn) < 130


@pytest.mark.parametrize(
    "text, preference",
    [
        ("Verdict: 1", 2.0), ("reasons\n- verdict: **2** ", 1.0), ("Verdict: Tie.", 1.5), ("Verdict: 1 or 2", None),
        ("", None), ("Verdict: 1\nbut on reflection\nVerdict: 2", 1.0), ("The verdict: 1 wins", None),
    ],
)  # fmt: skip
def test_verdicts(text, preference):
    assert judging.read_preference(text, judging.OURS) == preference
    mirrored = None if preference is None else 3 - preference
    assert judging.read_preference(text, judging.OTHERS) == mirrored


# ---- alpaca_eval ----


@pytest.mark.slow
def test_answers_in_the_format_of_alpaca_eval(tiny, tmp_path, capsys):
    rows = [{"instruction": "Name three oceans.", "output": "of another model", "dataset": "koala"},
            {"instruction": "Add.", "input": "1 + 1", "output": ""}]  # fmt: skip
    flags = dict(model=tiny("llama"), data_path=save(tmp_path / "rows.json", rows), max_new_tokens=12,
                 output_path=str(tmp_path / "ours.json"), generator="mine")  # fmt: skip
    evaluate.alpaca_eval(**flags)
    first = read(flags["output_path"])
    assert [list(row) for row in first] == [["instruction", "output", "generator"]] * 2
    assert [row["instruction"] for row in first] == ["Name three oceans.", "Add.\n\n1 + 1"]
    length = int(sum(len(row["output"]) for row in first) / 2)
    assert length > 0 and f"average length: {length} characters" in capsys.readouterr().out
    journal = (tmp_path / "ours.json.journal.jsonl").read_text()
    assert '"temperature": 0.7, "top_p": 1.0' in journal, "claude2-alpaca's settings"
    evaluate.alpaca_eval(**flags)
    assert read(flags["output_path"]) == first and "0 requests in this run" in capsys.readouterr().out


# ---- backward ----


@pytest.fixture
def installed(monkeypatch):
    if find_spec("sacrebleu") is None or find_spec("lm_eval") is None:
        if not BESIDE.is_dir():
            pytest.skip(f"lm-eval and sacrebleu are not installed, nor in {BESIDE}")
        monkeypatch.syspath_prepend(BESIDE)


PRED = [("a", "Name three oceans.", "Name three oceans."), ("b", "List a rainbow's colours", "Tell me a joke."),
        ("c", "", "Write down the colours of a rainbow."), ("d", "What is this?", "你好")]  # fmt: skip


def test_overlap_is_that_of_sacrebleu_and_rouge_score(tmp_path, installed, capsys):
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu, sentence_bleu

    rows = [{"instruction": text, "output": output, "reference": true} for text, output, true in PRED]
    evaluate.backward(save(tmp_path / "pred.json", rows), show_worst=2)
    scores, told = read(tmp_path / "pred.scores.json"), capsys.readouterr().out
    generated, true = [row[1] for row in PRED], [row[2] for row in PRED]
    assert scores["bleu"] == pytest.approx(corpus_bleu(generated, [true]).score)
    assert [row["bleu"] for row in scores["rows"]] == [
        pytest.approx(sentence_bleu(*pair).score) for pair in zip(generated, ([text] for text in true))
    ]
    rouge = [RougeScorer(["rouge1", "rougeL"], use_stemmer=True).score(t, g) for g, t in zip(generated, true)]
    for name in ("rouge1", "rougeL"):
        assert scores[name] == pytest.approx(25 * sum(row[name].fmeasure for row in rouge))
    assert scores["rows"][0]["rouge2"] == pytest.approx(100) and "tok:13a" in scores["bleu_signature"]
    assert (scores["empty"], scores["not_latin"]) == ([2], [3])
    assert scores["generated_words"] == pytest.approx(10 / 4) and "2.5 words generated" in told
    assert "row 2: ROUGE-L 0.0, BLEU 0.0  '' for 'Write down the colours" in told and "row 0:" not in told


def test_true_instructions_from_a_training_file(tmp_path, installed):
    pred = save(tmp_path / "pred.json", [{"instruction": text, "output": true} for text, _, true in PRED[::-1]])
    with pytest.raises(UsageError, match="4 of 4 rows have no `reference`.*--reference"):
        evaluate.backward(pred)
    rows = [{"instruction": true[:4], "input": true[4:], "output": text} for text, _, true in PRED]
    evaluate.backward(pred, save(tmp_path / "rows.json", rows))
    assert [row["true"] for row in read(tmp_path / "pred.scores.json")["rows"]] == [
        f"{true[:4]}\n\n{true[4:]}" if true[4:] else true for _, _, true in PRED[::-1]
    ]
    with pytest.raises(UsageError, match=r"--reference .*rows.json: has no row .* 1 of 4 rows \(rows \[0\]\)"):
        evaluate.backward(pred, save(tmp_path / "rows.json", rows[:3]))


def test_a_missing_library_is_said_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    pred = save(tmp_path / "pred.json", [{"instruction": "a", "output": "b", "reference": "c"}])
    with pytest.raises(UsageError, match="pip install -c constraints.txt -r scripts/requirements.txt"):
        evaluate.backward(pred)


@pytest.mark.slow
def test_generate_asks_a_backward_model_with_outputs(tiny, tmp_path):
    rows = [{"instruction": "Add.", "input": "1 + 1", "output": "2"}]
    generate.main(["--model", tiny("llama"), "--data_path", save(tmp_path / "rows.json", rows), "--backward", "True",
                   "--max_new_tokens", "3", "--output_path", str(tmp_path / "pred.json")])  # fmt: skip
    (row,) = read(tmp_path / "pred.json")
    assert (row["instruction"], row["reference"]) == ("2", "Add.\n\n1 + 1") and row["output"] != "2"
