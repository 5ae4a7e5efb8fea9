"""Evaluation: overlap with true texts, answers for AlpacaEval, a judge over HTTP, the harness on tasks of our own."""

import json
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.completion_server import BAD_KEY, CompletionServer
from transformers import AutoModelForCausalLM, AutoTokenizer

from alpaca.common.errors import UsageError, names_flags
from alpaca.evaluation import judge as judging
from alpaca.weights.provenance import weights_of
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
        with pytest.raises(UsageError, match="made with other arguments .*max_tokens 512"):
            evaluate.win_rate(**files, base_url=server.url, max_tokens=9)


def test_verdicts_that_cannot_be_read_are_asked_for_again(files, monkeypatch):
    """They alone, with another seed, and paid for; the command fails as long as there are some."""
    words = [
        "scripts.evaluate",
        "win_rate",
        f"--data_path={files['outputs']}",
        f"--reference_path={files['reference']}",
    ]
    result = Path(files["outputs"]).with_suffix(".win_rate.json")

    def command(server, *flags):
        asked = len(server.requests)
        monkeypatch.setattr(sys, "argv", [*words, "--judge=tiny", "--api=chat", f"--base_url={server.url}", *flags])
        try:
            evaluate.main()
        except UsageError as error:
            return len(server.requests) - asked, str(error)
        return len(server.requests) - asked, ""

    with CompletionServer(judge) as server:
        asked, error = command(server)
        assert asked == 12 and "2 of 12 answers of the judge end without a verdict" in error and "--ask_again" in error
        assert command(server)[0] == 0, "only where it is asked for"
        asked, error = command(server, "--ask_again", "unread")
        assert asked == 2 and "2 of 12" in error and all("<answer_1>\nodd" in r.prompt for r in server.requests[-2:])
        server.answer = lambda prompt, body: "Verdict: tie"
        assert command(server, "--ask_again", "unread") == (2, "")
        assert read(result)["verdicts_unread"] == 0 and read(result)["rows_counted"] == 6
        assert command(server, "--ask_again", "unread") == command(server) == (0, "")
        assert "--ask_again read: expected one of unread" in command(server, "--ask_again", "read")[1]


def test_a_row_counts_only_with_all_its_verdicts():
    """With one of two orders unread, or left out by --drop_failed, the place would decide."""
    verdicts = [
        (0, "outputs", 2.0),
        (0, "reference", 2.0),
        (1, "outputs", 2.0),
        (1, "reference", None),
        (2, "outputs", None),
        (2, "reference", 2.0),
        (3, "outputs", 2.0),
        (4, "outputs", 1.0),
        (4, "reference", 1.5),
    ]
    result = judging.tally([dict(zip(("row", "first", "preference"), verdict)) for verdict in verdicts], 6, 2)
    assert [result[name] for name in ("rows", "rows_counted", "wins", "losses")] == [6, 2, 1, 1]
    assert (result["win_rate"], result["orders_agree"]) == pytest.approx((62.5, 50))
    assert result["standard_error"] == pytest.approx(37.5)
    assert judging.tally([], 6, 2)["win_rate"] is None
    one = [{"row": row, "first": "outputs", "preference": 2.0} for row in range(6)]  # the other order was left out
    both = judging.tally(one, 6, 2)
    assert (both["rows_counted"], both["win_rate"], both["orders_agree"]) == (0, None, None)
    assert judging.tally(one, 6, per_row=1)["win_rate"] == 100


def test_one_order_is_drawn_for_each_row():
    drawn = judging.questions(200, "one", seed=1)
    assert drawn == judging.questions(200, "one", seed=1) != judging.questions(200, "one", seed=2)
    assert [question["row"] for question in drawn] == list(range(200))
    assert 70 < sum(question["first"] == judging.OURS for question in drawn) < 130


@pytest.mark.parametrize(
    "text, preference",
    [
        ("Verdict: 1", 2.0),
        ("reasons\n- verdict: **2** ", 1.0),
        ("Verdict: Tie.", 1.5),
        ("Verdict: 1 or 2", None),
        ("", None),
        ("Verdict: 1\nbut on reflection\nVerdict: 2", 1.0),
        ("The verdict: 1 wins", None),
        ("Final verdict: 1", 2.0),
        ("My **verdict**: 2", 1.0),
        ("Verdict: Answer 1", 2.0),
        ("Verdict: answer_2.", 1.0),
        ("Verdict: -1", None),
        ("Verdict: −1", None),
        ("- Verdict - 1", 2.0),
        ("**Verdict:**\n\n1", 2.0),
        ("Verdict: 1\nSo the first is better.", 2.0),
        ("Verdict: 1\nVerdict: 1\n---", 2.0),
        ("Verdict: 1\nor rather\nVerdict: 2\nwould be fair.", None),
        ("It is one of these:\nVerdict: 1\nVerdict: 2\n\nVerdict: tie", None),
        ("It is one of these:\nVerdict: 1\nVerdict: 2\nVerdict: tie\nNow, the first answer is", None),
        ("One of these:\nVerdict: 1\nVerdict: 2\nVerdict: tie\nThe first is better.\nVerdict: 1", 2.0),
    ],
)
def test_verdicts(text, preference):
    assert judging.read_preference(text, judging.OURS) == preference
    mirrored = None if preference is None else 3 - preference
    assert judging.read_preference(text, judging.OTHERS) == mirrored


@pytest.mark.parametrize(
    "text, preference",
    [
        ("It is true.\nVerdict: 1", 2.0),
        ("Verdict: 1\nSo the first is", None),
        ("I could say\nVerdict: tie\nbut", None),
        ("Verdict: 1\nbut on reflection\nVerdict: 2", None),
    ],
)
def test_a_verdict_of_an_answer_that_was_cut(text, preference):
    assert judging.read_preference(text, judging.OURS, cut=True) == preference


# ---- alpaca_eval ----


@pytest.mark.slow
def test_answers_in_the_format_of_alpaca_eval(tiny, tmp_path, capsys):
    rows = [
        {"instruction": "Name three oceans.", "output": "of another model", "dataset": "koala"},
        {"instruction": "Add.", "input": "1 + 1", "output": ""},
    ]
    flags = dict(
        model=tiny("llama"),
        data_path=save(tmp_path / "rows.json", rows),
        max_new_tokens=12,
        output_path=str(tmp_path / "ours.json"),
        generator="mine",
    )
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
    if BESIDE.is_dir():
        monkeypatch.syspath_prepend(BESIDE)
    elif find_spec("sacrebleu") is None or find_spec("lm_eval") is None:
        pytest.skip(f"lm-eval and sacrebleu are not installed, nor in {BESIDE}")


PRED = [
    ("a", "Name oceans", "Name oceans"),  # shorter than BLEU's four words
    ("b", "List a rainbow's colours", "Listing the colour of rainbows"),
    ("c", "", "Write down the colours of a rainbow."),
    ("d", "What is this?", "你好"),
]


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
    assert scores["generated_words"] == pytest.approx(9 / 4) and "2.2 words generated" in told
    assert "row 2: ROUGE-L 0.0, BLEU 0.0  '' for 'Write down the colours" in told and "row 0:" not in told


def test_the_tokenizer_of_bleu(tmp_path, installed, monkeypatch):
    """Those of sacrebleu; some need libraries or the network, which are said to be missing."""
    from urllib.error import URLError

    import sacrebleu.metrics.bleu

    rows = [{"instruction": text, "output": output, "reference": true} for text, output, true in PRED]
    pred = save(tmp_path / "pred.json", rows)
    evaluate.backward(pred, bleu_tokenizer="char")
    scores = read(tmp_path / "pred.scores.json")
    expected = sacrebleu.corpus_bleu([row[1] for row in PRED], [[row[2] for row in PRED]], tokenize="char")
    assert scores["bleu"] == pytest.approx(expected.score) and "tok:char" in scores["bleu_signature"]
    with pytest.raises(UsageError, match="--bleu_tokenizer chars: expected one of none, zh, 13a"):
        evaluate.backward(pred, bleu_tokenizer="chars")
    for error in (RuntimeError("\nit needs\n\n  pip install x\n"), URLError("it needs pip install x")):
        monkeypatch.setattr(sacrebleu.metrics.bleu, "_get_tokenizer", lambda name, error=error: _raise(error))
        with pytest.raises(UsageError, match="--bleu_tokenizer flores200: cannot be had .*it needs pip install x"):
            evaluate.backward(pred, bleu_tokenizer="flores200")


def _raise(error):
    raise error


def test_true_instructions_from_a_training_file(tmp_path, installed):
    pred = save(tmp_path / "pred.json", [{"instruction": text, "output": true} for text, _, true in PRED[::-1]])
    with pytest.raises(UsageError, match="4 of 4 rows have no `reference`.*--reference_path"):
        evaluate.backward(pred)
    rows = [{"instruction": true[:4], "input": true[4:], "output": text} for text, _, true in PRED]
    evaluate.backward(pred, save(tmp_path / "rows.json", rows))
    assert [row["true"] for row in read(tmp_path / "pred.scores.json")["rows"]] == [
        f"{true[:4]}\n\n{true[4:]}" if true[4:] else true for _, _, true in PRED[::-1]
    ]
    with pytest.raises(UsageError, match=r"--reference_path .*rows.json: has no row .* 1 of 4 rows \(rows \[0\]\)"):
        evaluate.backward(pred, save(tmp_path / "rows.json", rows[:3]))


def test_a_missing_library_is_said_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    pred = save(tmp_path / "pred.json", [{"instruction": "a", "output": "b", "reference": "c"}])
    with pytest.raises(UsageError, match="pip install -c constraints.txt -r scripts/requirements.txt"):
        evaluate.backward(pred)


@pytest.mark.slow
def test_generate_asks_a_backward_model_with_outputs(tiny, tmp_path):
    rows = [{"instruction": "Add.", "input": "1 + 1", "output": "2"}]
    generate.main(
        [
            "--model",
            tiny("llama"),
            "--data_path",
            save(tmp_path / "rows.json", rows),
            "--backward",
            "True",
            "--max_new_tokens",
            "3",
            "--output_path",
            str(tmp_path / "pred.json"),
        ]
    )
    (row,) = read(tmp_path / "pred.json")
    assert (row["instruction"], row["reference"]) == ("2", "Add.\n\n1 + 1") and row["output"] != "2"


# ---- harness ----

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/train.json, test: {folder}/{data}.json}}}}
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: {target}
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}{more}]
metadata: {{version: 1.0}}
"""
GROUP = """
group: small
task:
  - {task: small_arc, num_fewshot: 3}
  - {task: small_mmlu, num_fewshot: 2}
  - {task: small_mc2, num_fewshot: 0}
metadata:
  version: 1.0
  table:
    small_arc: {column: ARC, metric: acc_norm}
    small_mmlu: {column: MMLU, metric: acc}
    small_mc2: {column: TruthfulQA, metric: acc}
"""
MC2 = """
import numpy as np

def mass(doc, results):
    shares = np.exp([result[0] for result in results])
    return {"acc": float(shares[np.array(doc["labels"]) == 1].sum() / shares.sum())}
"""


@pytest.fixture
def tasks(tmp_path, installed, monkeypatch):
    """A folder of tasks of our own: ARC's kind, a group of two as MMLU is one, TruthfulQA's second kind."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip and others, two seconds
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {
            "question": f"{n} and one?",
            "choices": [f"it is {n + 1}", f"it is {n}", "it is none"],
            "answer": n % 3,
            "labels": [1, 0, 1],
        }
        for n in range(12)
    ]
    for name, count in (("train", 12), ("large", 9), ("small", 2)):
        save(folder / f"{name}.json", rows[:count])
    norm = ", {metric: acc_norm, aggregation: mean, higher_is_better: true}"
    for name, data, target, more in (
        ("small_arc", "large", "answer", norm),
        ("small_one", "large", "answer", ""),
        ("small_two", "small", "answer", ""),
        ("small_mc2", "small", 0, ""),
    ):
        text = TASK.format(name=name, folder=folder, data=data, target=target, more=more)
        text += "process_results: !function mc2.mass\n" if name == "small_mc2" else ""
        (folder / f"{name}.yaml").write_text(text)
    (folder / "small_mmlu.yaml").write_text("group: small_mmlu\ntask: [small_one, small_two]\n")
    (folder / "small.yaml").write_text(GROUP)
    (folder / "mc2.py").write_text(MC2)
    return folder


def mass_of_true_choices(model, tokenizer, rows):
    """mc2 by hand: the share of the labelled choices, whose probability is that of their tokens after the context."""
    shares = []
    for row in rows:
        context, masses = tokenizer(f"Q: {row['question']}\nA:")["input_ids"], []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(f"Q: {row['question']}\nA: {choice}")["input_ids"]])
            with torch.no_grad():
                logs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            masses.append(logs[len(context) - 1 :].sum().exp().item())
        shares.append(sum(m for m, label in zip(masses, row["labels"]) if label) / sum(masses))
    return 100 * sum(shares) / len(shares)


def test_what_the_answers_of_a_model_depend_on(tmp_path, monkeypatch):
    """Where it lies however that is spelt, and its files that count: of an adapter its base's too."""
    settings = json.dumps({"base_model_name_or_path": str(tmp_path / "base")})
    files = {
        "base": {"model.safetensors": "1", "config.json": "{}", "tokenizer.json": "{}"},
        "lora": {"adapter_model.safetensors": "2", "adapter_config.json": settings},
    }
    for folder, texts in files.items():
        (tmp_path / folder).mkdir()
        for name, text in texts.items():
            (tmp_path / folder / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    known = weights_of(model="lora/")
    assert known == weights_of(model="lora", base=None) == weights_of(model="~/lora") and "base" not in known
    assert set(known) == {
        "model",
        "weights of model",
        "settings of model",
        "weights of model's base",
        "settings of model's base",
        "tokenizer of model's base",
    }
    assert weights_of(judge="gpt2", base="~/base/")["base"] == str(tmp_path / "base")
    assert weights_of(judge="gpt2") == {"judge": "gpt2"}
    changes = [
        ("base", "model.safetensors", "weights of model's base"),
        ("base", "tokenizer.json", "tokenizer of model's base"),
        ("lora", "adapter_config.json", "settings of model"),
        ("lora", "notes.json", None),
    ]
    for folder, name, what in changes:
        before = weights_of(model="lora")
        (tmp_path / folder / name).write_text(files[folder].get(name, "") + " ")
        assert [key for key, value in weights_of(model="lora").items() if value != before[key]] == [what] * bool(what)
    (tmp_path / "lora" / "adapter_config.json").write_text("{")
    with pytest.raises(UsageError, match="lora/adapter_config.json cannot be read"):
        weights_of(model="lora")


@pytest.mark.slow
def test_harness(tiny, tasks, tmp_path, capsys):
    """An adapter on its base, all three kinds of tasks, and what a rerun does."""
    torch.manual_seed(1)
    base, out = tiny("llama"), tmp_path / "scores"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    flags = dict(model=str(tmp_path / "adapter"), base=base, group="small", include_path=str(tasks))

    evaluate.harness(**flags, output_dir=str(out))
    arc, mmlu, mc2 = (read(out / f"small_{name}.json") for name in ("arc", "mmlu", "mc2"))
    assert [result["num_fewshot"] for result in (arc, mmlu, mc2)] == [[3], [2], [0]]
    assert mc2["value"] == pytest.approx(mass_of_true_choices(adapted, tokenizer, read(tasks / "small.json")), rel=1e-4)
    one, two = (mmlu["tasks"][name] for name in ("small_one", "small_two"))
    assert (one["samples"], two["samples"]) == (9, 2) and one["value"] != two["value"]
    assert mmlu["value"] == pytest.approx((one["value"] + two["value"]) / 2), "every subject counts alike"
    assert mmlu["weighted_by_size"] == pytest.approx((9 * one["value"] + 2 * two["value"]) / 11)
    assert mmlu["stderr"] == pytest.approx((one["stderr"] ** 2 + two["stderr"] ** 2) ** 0.5 / 2)
    average = (arc["value"] + mmlu["value"] + mc2["value"]) / 3
    told = capsys.readouterr().out
    assert f"| adapter | {average:.2f} | {arc['value']:.2f} | {mmlu['value']:.2f} | {mc2['value']:.2f} |" in told
    assert "ARC: small_arc, 3-shot, acc_norm" in told and "contexts begin with the BOS token" in told
    assert read(out / "results.json")["average"] == pytest.approx(average)
    assert (out / "table.md").read_text().strip() in told

    (out / "small_mc2.json").unlink()
    times = [(out / f"small_{name}.json").stat().st_mtime_ns for name in ("arc", "mmlu")]
    evaluate.harness(**flags, output_dir=str(out))
    assert "ARC: " not in capsys.readouterr().out.split("| |")[0], "what is finished is not evaluated again"
    assert read(out / "small_mc2.json")["value"] == mc2["value"]
    assert times == [(out / f"small_{name}.json").stat().st_mtime_ns for name in ("arc", "mmlu")]
    with pytest.raises(UsageError, match="small_arc.json was made with other arguments .limit None"):
        evaluate.harness(**flags, output_dir=str(out), limit=1)

    evaluate.harness(
        **flags, output_dir=str(tmp_path / "try"), limit=1, tasks="small_mc2,small_mc2, ", add_bos_token=False
    )
    told, tried = capsys.readouterr().out, read(tmp_path / "try" / "small_mc2.json")
    assert "Of the first 1 examples" in told and "begin without the BOS token" in told and "| – | – | – |" in told
    assert tried["samples"] == 1 and tried["value"] != pytest.approx(mc2["value"])
    assert told.count("TruthfulQA: ") == 2, "its value as it is there, and its line below the table"

    arc["versions"]["torch"] = "1.0"  # measured with another one
    save(out / "small_arc.json", arc)
    evaluate.harness(**flags | {"base": f"{base}/"}, output_dir=str(out))
    assert read(out / "results.json")["measured_with"]["torch"] == ["1.0", arc_torch := mc2["versions"]["torch"]]
    told = capsys.readouterr().out
    assert f"torch 1.0 or {arc_torch}" in told and "not all of them were measured alike; torch differ" in told

    for name, old, new, of in (
        ("small_arc.yaml", "Q: ", "Question: ", "arc"),
        ("mc2.py", "== 1", "== 0", "arc"),
        ("small_two.yaml", "Q: ", "Question: ", "mmlu"),
        ("large.json", "one?", "1?", "arc"),
        ("small.yaml", "_arc, num_fewshot: 3", "_arc, num_fewshot: 2", "arc"),
    ):
        text = (tasks / name).read_text()
        assert old in text
        (tasks / name).write_text(text.replace(old, new))
        with pytest.raises(UsageError, match=f"small_{of}.json was made with other arguments"):
            evaluate.harness(**flags, output_dir=str(out))
        (tasks / name).write_text(text)
    (tasks / "other.yaml").write_text(GROUP.replace("group: small", "group: other"))
    with pytest.raises(UsageError, match="other arguments .group 'small'"):
        evaluate.harness(**flags | {"group": "other"}, output_dir=str(out))

    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    model.save_pretrained(tmp_path / "nan")
    tokenizer.save_pretrained(tmp_path / "nan")
    with pytest.raises(
        UsageError, match="/nan: in torch.float32 on cpu the log-likelihood of a choice is nan.*weights"
    ):
        evaluate.harness(str(tmp_path / "nan"), str(tmp_path / "none"), None, "small", str(tasks))


@pytest.mark.slow
def test_the_harness_asks_vllm(tiny, tasks, tmp_path, monkeypatch):
    """With a stand-in for vllm, which is not installed here; what the harness gives its backend is recorded."""
    from lm_eval.models.huggingface import HFLM

    given, flags = {}, dict(group="small", include_path=str(tasks), tasks="small_arc", limit=2)
    model, out = tiny("llama"), str(tmp_path / "scores")
    with pytest.raises(UsageError, match="--backend vllm: vllm is not installed"):
        evaluate.harness(model, out, **flags, backend="vllm")

    def stand_in(pretrained, **options):
        given.update(options)
        return HFLM(pretrained=pretrained, device="cpu", batch_size=options["batch_size"], dtype=options["dtype"])

    vllm = types.SimpleNamespace(VLLM=stand_in)
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", vllm)
    evaluate.harness(model, out, **flags, backend="vllm", add_bos_token=True)
    assert given["add_bos_token"] is True and given["batch_size"] == "8"
    result = read(tmp_path / "scores" / "small_arc.json")
    assert result["device"] == "vllm" and result["how"]["backend"] == "vllm" and result["samples"] == 2
    with pytest.raises(UsageError, match="made with other arguments .*backend 'vllm'"):
        evaluate.harness(model, out, **flags, add_bos_token=True)
    with pytest.raises(UsageError, match="--model .*vllm opens a whole checkpoint"):
        evaluate.harness(model, str(tmp_path / "other"), base=tiny("gpt2"), **flags, backend="vllm")
    with pytest.raises(UsageError, match="--backend vllm: takes no weights quantized"):
        evaluate.harness(model, out, **flags, backend="vllm", load_in_8bit=True)


@pytest.mark.slow
@pytest.mark.stress
def test_tasks_need_no_group(tiny, tasks, tmp_path, capsys):
    """Those of a folder without one: by name, or all of them. A group is not taken for what it does not list."""
    capitals = TASK.format(name="capitals", folder=tasks, data="small", target="answer", more="")
    rivers = TASK.format(name="rivers", folder=tasks, data="large", target="answer", more="").replace(
        "metric: acc,", "metric: acc_norm,"
    )
    own = tmp_path / "mytasks"
    own.mkdir()
    (own / "capitals.yaml").write_text(capitals)
    (own / "rivers.yaml").write_text(rivers)
    flags = dict(model=tiny("llama"), include_path=str(own))
    evaluate.harness(**flags, output_dir=str(tmp_path / "one"), tasks="capitals")
    told, result = capsys.readouterr().out, read(tmp_path / "one" / "capitals.json")
    assert (result["metric"], result["samples"], result["num_fewshot"]) == ("acc", 2, [0])
    assert "| Average | capitals |" in told and f"| {result['value']:.2f} | {result['value']:.2f} |" in told
    assert read(tmp_path / "one" / "results.json")["group"] is None
    evaluate.harness(**flags, output_dir=str(tmp_path / "one"))  # all; the one that is there is not measured again
    told = capsys.readouterr().out
    assert "| Average | capitals | rivers |" in told and "rivers, 0-shot, acc_norm" in told
    assert read(tmp_path / "one" / "capitals.json") == result
    evaluate.harness(flags["model"], str(tmp_path / "two"), include_path=str(tasks), tasks="small_mmlu,small_arc")
    assert set(read(tmp_path / "two" / "results.json")["results"]) == {"small_mmlu", "small_arc"}
    with pytest.raises(UsageError, match="--tasks capitols: the harness knows no such task.*like it: capitals"):
        evaluate.harness(**flags, output_dir=str(tmp_path / "three"), tasks="capitols")
    with pytest.raises(UsageError, match="--tasks capitals: 'capitals' is not in small"):
        evaluate.harness(
            flags["model"], str(tmp_path / "three"), include_path=str(tasks), group="small", tasks="capitals"
        )


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(batch_size="many"), "--batch_size many: expected a number, or auto"),
        (dict(limit=0), "--limit 0"),
        (dict(group="smal"), "--group smal: no such group .* groups there: norm, small, small_mmlu"),
        (dict(tasks="small_arc,mmlu"), "--tasks small_arc,mmlu: 'mmlu' is not in small; it has small_arc, small_mmlu"),
        (dict(group="small_mmlu"), "metadata.table says no column and metric for small_one"),
        (dict(include_path="/nowhere"), "--include_path /nowhere: expected a folder"),
        (dict(tasks=" ,"), "--tasks ' ,': names no task; small has small_arc"),
        (dict(group="norm"), "--group norm: small_mc2 has no metric acc_norm; it has acc"),
        (dict(output_dir="/dev/null/out"), "--output_dir /dev/null/out: cannot be written .Not a directory"),
    ],
)
def test_harness_flags(tasks, tmp_path, flags, message):
    """All of it before a model is looked for."""
    (tasks / "norm.yaml").write_text(
        GROUP.replace("group: small", "group: norm").replace("QA, metric: acc", "QA, metric: acc_norm")
    )
    flags = dict(model="tiny", output_dir=str(tmp_path / "out"), group="small", include_path=str(tasks)) | flags
    with pytest.raises(UsageError, match=message):
        names_flags(evaluate.harness)(**flags)


@pytest.mark.slow
def test_the_shipped_group_is_that_of_the_cards(installed, monkeypatch):
    """Its tasks as the harness has them, data aside: shots and where they are taken from, metrics, all 57 subjects. One
    example of each goes through."""
    import datasets
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    from alpaca.evaluation.harness_tasks import definition_of, dry_run_metrics, find_group, load_tasks

    own = Path(lm_eval.tasks.__file__).parent
    folders = [own / name for name in ("arc", "hellaswag", "mmlu/default", "truthfulqa")]  # of 14,000 files

    def manager(include_path, include_defaults=True):
        return TaskManager(include_path=[include_path, *folders * include_defaults], include_defaults=False)

    row = {
        "question": "q",
        "subject": "s",
        "activity_label": "a",
        "ctx_a": "a",
        "ctx_b": "b",
        "endings": ["x", "y"],
        "label": "1",
        "answer": 1,
        "answerKey": "A",
        "mc1_targets": {"choices": ["a"], "labels": [1]},
        "mc2_targets": {"choices": ["a", "b"], "labels": [1, 0]},
    }

    def load_dataset(path, **_):
        choices = ["a", "b", "c", "d"] if path == "cais/mmlu" else {"text": ["x", "y"], "label": ["A", "B"]}
        split = datasets.Dataset.from_list(
            [row | {"choices": choices, "question": f"q{n}", "ctx_a": f"a{n}"} for n in range(26)]
        )
        return datasets.DatasetDict(dict.fromkeys(("train", "dev", "validation", "test"), split))

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    manager, members = find_group(str(evaluate.GROUPS), "open_llm_v1_4")
    found = {}
    for member in members:
        loaded = load_tasks(manager, member)
        dry_run_metrics("open_llm_v1_4", member, loaded)
        assert definition_of(manager, member, evaluate.GROUPS) is None, "the harness's own, of its version"
        for task in loaded.values():
            settings = (len(loaded), task.config.num_fewshot, task.config.fewshot_split, member.metric)
            assert found.setdefault(member.column, settings) == settings
    assert found == {
        "ARC": (1, 25, "train", "acc_norm"),
        "HellaSwag": (1, 10, "train", "acc_norm"),
        "MMLU": (57, 5, "dev", "acc"),
        "TruthfulQA": (1, 0, None, "acc"),
    }
