"""Rows answered through a journal, and who answers: what a rerun may take over, and what it must refuse."""

import json
import re
import shutil
import sys

import pytest
from conftest import write_rows
from datasets import Dataset, DatasetDict
from support.completion_server import OVERFLOW, CompletionServer

import generate_instruction
from alpaca.common.errors import UsageError
from alpaca.common.files import refuse_overwriting_input
from alpaca.completions import budget, runner
from alpaca.completions.api import Request, Sampling
from alpaca.completions.budget import Budget, Progress
from alpaca.completions.rows import BatchCompletion, write_answered
from alpaca.inference.backend import BackendFlags, ModelBackend, PromptSet, open_backend
from alpaca.inference.client import Client
from scripts import backtranslate, evaluate, generate, plot_diversity

SAMPLING = Sampling(max_tokens=9)


def ask(tmp_path, server, order=None, rows=4, **more):
    texts = [f"Row {number}." for number in range(rows)]
    path, model = str(tmp_path / "out.json"), Client("tiny", server.url, "completions")
    requests = [Request(texts[row], row) for row in order or range(rows)]
    answers = BatchCompletion(model, SAMPLING, path, {"model": "tiny"}, 2, **more).answers(requests)
    write_answered(path, [{"instruction": text} for text in texts], answers)


def own_text(prompt, body):
    return f"answer to {prompt}"


def test_an_answer_stays_with_its_row_when_the_order_changes(tmp_path):
    """Orders come from lengths in tokens, which another version of a tokenizer counts otherwise."""
    with CompletionServer(own_text) as server:
        ask(tmp_path, server, order=[3, 0, 2])
        ask(tmp_path, server, order=[0, 1, 2, 3])
        assert len(server.requests) == 4
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["output"] for row in rows] == [f"answer to Row {number}." for number in range(4)]


def test_prompts_that_are_too_long_do_not_hold_up_the_others(tmp_path):
    """However many come in a row, and they come first: the longest are asked first."""
    with CompletionServer(
        own_text, faults=lambda request: OVERFLOW if int(request.prompt[4:-1]) < 30 else None
    ) as server:
        with pytest.raises(UsageError, match=r"30 of 50 rows have no answer \(rows 0, 1.*…\).*leave them out: drop_fa"):
            ask(tmp_path, server, rows=50)
        ask(tmp_path, server, rows=50, drop_failed=True)
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["instruction"] for row in rows] == [f"Row {number}." for number in range(30, 50)]


def test_a_bar_that_ends_beyond_what_was_asked_for_is_full():
    progress = Progress("tasks", 8, 0, Budget())
    progress.show(10, 2, 0)
    assert "10/10" in str(progress.bar)
    progress.close()
    later = Progress("tasks", 8, 10, Budget())
    assert "10/10" in str(later.bar) and "10/?" not in str(later.bar)
    later.close()


def test_a_log_hears_of_a_slow_server_now_and_then(capsys):
    progress = Progress("rows", 10, 0, Budget())
    for seconds in range(1, 601):
        progress.wait(5, seconds, 2)
    progress.show(1, 5, 0)
    progress.wait(1, 29, 0)
    progress.wait(1, 43, 0)
    progress.close()
    told = re.findall(r"(\d requests? under way, \d+ s), .*", capsys.readouterr().err)
    assert told == [*(f"5 requests under way, {s} s" for s in (30, 60, 120, 240, 480)), "1 request under way, 43 s"]


def test_the_bar_of_a_terminal_says_what_is_waited_for_and_one_rate(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress("rows", 10, 0, Budget(price_in=1.0))
    progress.wait(5, 43.2, 7)
    assert re.search(
        r"0/10 \[.*5 requests under way, 43 s, 0.00 rows/s, 7 retries, \$0.0000\]", capsys.readouterr().err
    )
    progress.show(10, 12, 7)
    progress.close()
    last = capsys.readouterr().err.split("\r")[-1]
    assert "10/10" in last and last.count("/s") == 1 and "under way" not in last
    assert "12 requests in this run" in progress.summary() and "requests/s" in progress.summary()


def test_a_slow_server_is_waited_for_aloud(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner, "HEARTBEAT", 0.01)
    monkeypatch.setattr(runner, "SLOW", 0.0)
    monkeypatch.setattr(budget, "FIRST_LINE", 0.0)
    with CompletionServer(own_text) as server:
        server.delay = 0.2
        ask(tmp_path, server)
        told = capsys.readouterr()
        assert "2 requests under way, 0 s" in told.err and "continuing" not in told.out
        ask(tmp_path, server, rows=4)
        assert "continuing: 4 answers from the journal" in capsys.readouterr().out


def test_answers_of_an_unknown_run_are_refused(tmp_path):
    with CompletionServer(own_text) as server:
        ask(tmp_path, server)
        path = tmp_path / "out.json.journal.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
        with pytest.raises(UsageError, match="has answers from an unknown run; move it away"):
            ask(tmp_path, server)


def test_what_a_journal_knows_of_the_one_who_answers(tiny, tmp_path):
    """A folder by its files, however it is spelt; a server by its model, wherever it listens."""
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    how = ModelBackend(str(folder), SAMPLING, seed=1).how(questions=["a", "b"])
    assert how == ModelBackend(f"{folder}/", SAMPLING, seed=1).how(questions=["a", "b"])
    assert how != ModelBackend(str(folder), SAMPLING, seed=1).how(questions=["ab"])
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    changed = ModelBackend(str(folder), SAMPLING, seed=1).how(questions=["a", "b"])
    assert {name for name in how if how[name] != changed[name]} == {"weights of model_name"}
    server = ModelBackend("tiny", SAMPLING, BackendFlags(base_url="http://a/v1")).how()
    assert server == ModelBackend("tiny", SAMPLING, BackendFlags(base_url="http://b/v1")).how()
    assert server != ModelBackend("other", SAMPLING, BackendFlags(base_url="http://a/v1")).how()


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_question_stands_in_a_prompt_unless_it_is_chat(api):
    with CompletionServer() as server:
        model = Client("tiny", server.url, api)
        first, second = PromptSet(["How?"], model).requests((0, 1), [7])
        assert first.prompt == second.prompt and first.key != second.key and first.row == second.row == 7
        assert (first.prompt == "How?") == (api == "chat")
        assert api == "chat" or "### Instruction:\nHow?\n\n### Response:" in first.prompt


def test_a_base_url_of_the_environment_wins_over_a_folder_and_is_named(tiny, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    assert isinstance(open_backend(tiny("llama"), BackendFlags()), Client)
    with pytest.raises(UsageError, match=r"base is for .*; .*llama.* is a server's \(OPENAI_BASE_URL"):
        open_backend(tiny("llama"), BackendFlags(base=tiny("llama")))


@pytest.mark.parametrize(
    "command",
    [
        lambda path: generate.main(["--model=x", f"--data_path={path}", f"--output_path={path}"]),
        lambda path: evaluate.alpaca_eval("x", path, path),
        lambda path: evaluate.win_rate("other.json", path, "judge", output_path=path),
        lambda path: evaluate.backward(path, output_path=path),
        lambda path: backtranslate.augment(path, path, "x"),
        lambda path: backtranslate.curate(path, path, "x"),
        lambda path: backtranslate.curate("a5.json", path, "x", ratings_path=path),
        lambda path: backtranslate.mix(path, path),
        lambda path: generate_instruction.generate_responses(path, path, "x"),
        lambda path: generate_instruction.export(path, path),
        lambda path: generate_instruction.export(path, "new.json", eval_size=1, eval_path=path),
        lambda path: plot_diversity.main(["--data_path", path, "--output_path", path.removesuffix(".json")]),
    ],
)
def test_no_command_writes_over_what_it_reads(tmp_path, command):
    path = write_rows(tmp_path / "rows.json", 3)
    before = (tmp_path / "rows.json").read_bytes()
    with pytest.raises(UsageError, match="is also read from and would be lost"):
        command(path)
    assert (tmp_path / "rows.json").read_bytes() == before
    refuse_overwriting_input(tmp_path / "new.json", path, None)


def test_no_command_writes_one_file_twice(tmp_path):
    path, new = write_rows(tmp_path / "rows.json", 3), str(tmp_path / "new.json")
    with pytest.raises(UsageError, match="--eval_path .* is the file of --output_path, too"):
        generate_instruction.export(path, new, eval_size=1, eval_path=new)
    with pytest.raises(UsageError, match="--ratings_path .* is the file of --output_path, too"):
        backtranslate.curate(new, path, "x", ratings_path=new)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]


def test_a_folder_is_no_file_to_write(tmp_path):
    with pytest.raises(UsageError, match="cannot be written .is a folder"):
        generate_instruction.export(write_rows(tmp_path / "rows.json", 3), str(tmp_path))


def test_a_judges_answer_that_was_cut_is_no_verdict(tmp_path):
    """Nor is one of another judge taken over."""
    rows = [{"instruction": f"Task {n}", "output": text} for n, text in enumerate(("ours", "theirs, longer"))]
    for name, kept in (("ours.json", rows), ("theirs.json", [row | {"output": row["output"] * 2} for row in rows])):
        (tmp_path / name).write_text(json.dumps(kept))
    flags = dict(outputs=str(tmp_path / "ours.json"), reference=str(tmp_path / "theirs.json"), api="completions")
    with CompletionServer(lambda *_: ("Verdict: 1\nand yet the", "length"), models=("one", "two")) as server:
        evaluate.win_rate(**flags, judge="one", base_url=server.url, orders="one", seed=3)
        result = json.loads((tmp_path / "ours.win_rate.json").read_text())
        assert (result["verdicts"], result["verdicts_unread"], result["win_rate"]) == (2, 2, None)
        assert (result["average_length"], result["reference_average_length"]) == (9, 18)
        verdicts = json.loads((tmp_path / "ours.win_rate.verdicts.json").read_text())
        assert [verdict["preference"] for verdict in verdicts] == [None, None]
        assert all("### Instruction:\nTwo assistants" in request.prompt for request in server.requests[-2:])
        for change in (dict(judge="two"), dict(api="chat"), dict(orders="both"), dict(temperature=0.5)):
            with pytest.raises(UsageError, match="made with other arguments"):
                evaluate.win_rate(**flags | dict(judge="one", base_url=server.url, orders="one", seed=3) | change)


# ---- what every command that asks a server has ----


@pytest.fixture
def commands(tmp_path):
    """name: (command, its flags, the requests it sends); their texts are long enough for the filters."""
    rows = [{"instruction": f"Task {n}?", "output": f"It is {n}. " * 30} for n in range(6)]
    for name, kept in (("rows.json", rows), ("theirs.json", rows[::-1])):
        (tmp_path / name).write_text(json.dumps(kept))
    path, out = str(tmp_path / "rows.json"), str(tmp_path / "out.json")
    asked = dict(data_path=path, output_path=out, model_name="tiny")
    judged = dict(outputs=path, reference=str(tmp_path / "theirs.json"), judge="tiny", output_path=out)
    return {
        "generate_responses": (generate_instruction.generate_responses, asked, 6),
        "augment": (backtranslate.augment, asked, 6),
        "curate": (backtranslate.curate, asked | {"ratings": 2}, 12),
        "win_rate": (evaluate.win_rate, judged, 12),
    }


COMMANDS = ("generate_responses", "augment", "curate", "win_rate")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_dry_run_asks_nothing_and_names_the_cost(commands, name, tmp_path, capsys):
    command, flags, requests = commands[name]
    before = sorted(tmp_path.iterdir())
    with CompletionServer() as server:
        command(**flags, base_url=server.url, price_in=1.0, price_out=900.0, max_tokens=1000, dry_run=True)
        assert not server.requests
    told = capsys.readouterr().out
    assert f"about {requests} requests" in told and "It is 0." in told or "Task 0?" in told
    most = float(told.rsplit("at most $")[-1])
    assert requests * 0.9 <= most < requests * 0.91
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_flags_are_accepted_by_their_names_of_today_and_before(commands, name, capsys):
    command, flags, _ = commands[name]
    today = {
        "model_name": "model",
        "outputs": "data_path",
        "reference": "reference_path",
        "max_tokens": "max_new_tokens",
    }
    before = flags | {"max_tokens": 77, "price_out": 1.0, "dry_run": True}
    command(**before)
    printed = capsys.readouterr().out
    command(**{today.get(flag, flag): value for flag, value in before.items()})
    assert capsys.readouterr().out == printed and "(at most 77)" in printed


@pytest.mark.parametrize("name", COMMANDS)
def test_the_limit_of_cost_holds(commands, name):
    command, flags, requests = commands[name]
    with CompletionServer() as server:
        asking = dict(base_url=server.url, api="completions", price_in=1.0, price_out=1000.0, max_tokens=100)
        with pytest.raises(UsageError, match="--max_cost 0.12: stopped"):
            command(**flags, **asking, max_cost=0.12)
        assert 1 <= len(server.requests) < requests


@pytest.mark.parametrize("name", COMMANDS)
def test_failed_rows_are_an_error_or_left_out(commands, name, tmp_path):
    command, flags, _ = commands[name]
    with CompletionServer(lambda *_: "It is.\nVerdict: 1\nScore: 5") as server:
        server.faults = lambda request: (
            OVERFLOW if "It is 3." in request.prompt or "Task 3?" in request.prompt else None
        )
        asking = dict(base_url=server.url, api="completions")
        with pytest.raises(UsageError, match="have no answer .rows 3.*leave them out: --drop_failed"):
            command(**flags, **asking)
        assert not (tmp_path / "out.json").exists()
        command(**flags, **asking, drop_failed=True)
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["rows_counted"] if name == "win_rate" else len(written)) == 5


@pytest.mark.parametrize("name", COMMANDS)
def test_sampling_is_checked_and_sent(commands, name):
    command, flags, _ = commands[name]
    for wrong, message in (
        (dict(temperature=-1.0), "--temperature -1.0"),
        (dict(temperature=float("nan")), "--temperature nan"),
        (dict(top_p=1.5), "--top_p 1.5"),
        (dict(max_tokens=0), "--max_new_tokens 0"),
    ):
        with pytest.raises(UsageError, match=message):
            command(**flags, **wrong)
    with CompletionServer(lambda *_: "It is.\nVerdict: 1\nScore: 5") as server:
        command(**flags, base_url=server.url, api="completions", temperature=0.3, top_p=0.8, max_tokens=77)
        sent = [request.body for request in server.requests if "ping" not in request.body]
    assert {(body["temperature"], body["top_p"], body["max_tokens"]) for body in sent} == {(0.3, 0.8, 77)}


# ---- flags that choose rows ----


@pytest.mark.parametrize(
    "command",
    [
        lambda path: generate.main(["--model=x", f"--data_path={path}", "--output_path=o", "--data_split=eval[:1]"]),
        lambda path: evaluate.alpaca_eval("x", path, "o.json", data_split="eval[:1]"),
        lambda path: backtranslate.augment(path, "o.json", "x", data_split="eval[:1]"),
    ],
)
def test_the_split_is_that_of_the_flag(tmp_path, command):
    DatasetDict(train=Dataset.from_list([{"instruction": "a", "output": "b"}])).save_to_disk(tmp_path / "rows")
    with pytest.raises(UsageError, match=r"split 'eval\[:1\]'"):
        command(str(tmp_path / "rows"))


def test_texts_of_capitals_are_left_out_as_the_flag_says(commands):
    command, flags, _ = commands["augment"]
    with pytest.raises(UsageError, match="the filters leave none of its 6 texts"):
        command(**flags, max_capitals=0.0)
