"""Requests in files, through a batch endpoint or vLLM's run-batch: the same as online, never paid twice."""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from openai.types import Batch
from openai.types.batch_create_params import BatchCreateParams
from pydantic import TypeAdapter
from support.batch_server import DONE_THEN_DROP, BatchServer, expired, ok, refused, run_batch
from support.completion_server import DROP, CompletionServer, Fault, completion, echo, tasks

from alpaca.common.errors import ParameterError, UsageError
from alpaca.completions import batch_endpoint, batch_runner
from alpaca.completions.budget import Budget
from alpaca.completions.journal import Journal
from alpaca.completions.runner import answered_before
from alpaca.inference import client
from alpaca.inference.backend import BackendFlags, open_backend
from generate_instruction import generate_instruction_following_data, generate_responses
from scripts import backtranslate, evaluate

pytestmark = pytest.mark.slow  # many small cases

ROWS = 40
CREATE, UPLOAD, LOOK, FETCH = "POST /batches", "POST /files", "GET /batches/ID", "GET /files/ID/content"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(batch_runner, "FIRST_POLL", 0.01)
    monkeypatch.setattr(client.Client.__init__, "__defaults__", (None, "auto", 8, 600.0, 0.01))
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_ORG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def rows(tmp_path):
    rows = [{"instruction": f"Say {n}.", "input": "", "output": ""} for n in range(ROWS)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return str(tmp_path / "rows.json")


def respond(rows, server, name="out.json", **flags):
    """Answer the rows. Return the outputs."""
    output = Path(rows).with_name(name)
    asked = {"base_url": server.url, "batch": True} if server else {}
    generate_responses(rows, str(output), "tiny", **{"api": "chat"} | asked | flags)
    return [row["output"] for row in json.loads(output.read_text())]


def leave_open(rows, server, **flags):
    """Send a batch, and end since the server cannot be asked how far it is."""
    server.scripts[LOOK] = [DROP] * 9
    with pytest.raises(UsageError, match="same command, run again, goes on"):
        respond(rows, server, **flags)


def expected(numbers=range(ROWS)):
    return [echo(f"Say {n}.", {}) for n in numbers]


def journal(rows, name="out.json"):
    return [json.loads(line) for line in Path(rows).with_name(f"{name}.journal.jsonl").read_text().splitlines()]


def spent_before(rows, price_in=1.0, price_out=2.0):
    budget = Budget(price_in, price_out, 1.0)
    with Journal(Path(rows).with_name("out.json.journal.jsonl")) as file:
        answered_before(file, 0, budget)
    return budget.cost


def generate(folder, number=300, **flags):
    flags = {"model_name": "tiny", "api": "completions", "seed": 1, "num_cpus": 1} | flags
    generate_instruction_following_data(str(folder), str(ROOT / "seed_tasks.jsonl"), number, **flags)
    return json.loads((folder / "regen.json").read_text())


# ---- the same as online ----


def test_rows_in_any_order_of_the_answers(rows, capsys):
    with BatchServer() as server:
        server.order = lambda lines: random.Random(1).sample(lines, len(lines))
        assert respond(rows, server) == expected()
        assert set(server.paid.values()) == {1} and not server.requests, "nothing is asked one by one"
        for made in server.batches.values():
            Batch.model_validate({**made, "output_file_id": made["output_file_id"]})  # what openai takes for one
        calls = list(server.calls)
        assert respond(rows, server) == expected() and server.calls == calls, "a rerun asks nothing"
    assert not list(Path(rows).parent.glob("*.batch-*")), "its files are removed"
    assert "batch batch_1: 40 answered" in capsys.readouterr().out


def test_what_is_sent_is_what_openai_documents(rows):
    created = []
    with BatchServer() as server:
        create = server._create
        server._create = lambda request: created.append(request.body) or create(request)
        respond(rows, server)
        [content] = [content for name, content in server.files.values() if name.startswith("alpaca-")]
    TypeAdapter(BatchCreateParams).validate_python(created[0], strict=True)
    assert server.headers[0]["idempotency-key"] == created[0]["metadata"]["alpaca_token"]
    lines = [json.loads(line) for line in content.splitlines()]
    assert [set(line) for line in lines] == [{"custom_id", "method", "url", "body"}] * ROWS
    assert lines[3]["body"]["messages"] == [{"role": "user", "content": "Say 3."}]
    assert len({line["custom_id"] for line in lines}) == ROWS


def test_self_instruct_by_rounds(tmp_path):
    with CompletionServer(answer=tasks) as server:
        online = generate(tmp_path / "online", base_url=server.url, concurrency=1)
        prompts = [request.prompt for request in server.requests]
    with BatchServer(answer=tasks) as server:
        server.order = lambda lines: lines[::-1]
        batched = generate(tmp_path / "batched", base_url=server.url, batch=True)
        assert len(server.batches) > 1 and set(server.paid.values()) == {1}
    assert batched[:300] == online[:300]
    both = min(len(server.paid), len(prompts))
    assert list(server.paid)[:both] == prompts[:both], "the same requests in the same order"


def test_self_instruct_with_generated_tasks(tmp_path):
    """A prompt waits for the answers of 64 before it: so many are in a batch."""
    with CompletionServer(answer=tasks) as server:
        online = generate(tmp_path / "online", 700, base_url=server.url, num_generated_in_prompt=2)
    with BatchServer(answer=tasks) as server:
        batched = generate(tmp_path / "batched", 700, base_url=server.url, num_generated_in_prompt=2, batch=True)
        assert max(batch["request_counts"]["total"] for batch in server.batches.values()) <= 64
    assert batched[:700] == online[:700]


PROSE = "The tide rises and falls because the moon pulls at the water that is nearest to it, and this has been known "


def test_every_command(tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": PROSE * 2 + f"since year {n}."}) + "\n" for n in range(6)))
    pairs = [{"instruction": f"Task {n}", "output": f"text {n}"} for n in range(5)]
    for name in ("ours.json", "theirs.json"):
        (tmp_path / name).write_text(json.dumps(pairs))
    found = {}
    for kind, make in (("online", CompletionServer), ("batch", BatchServer)):
        folder = tmp_path / kind
        folder.mkdir()
        flags = [] if kind == "online" else ["--batch"]
        with make(answer=judge) as server:
            flags += [f"--base_url={server.url}", "--api=chat"]
            words = ["augment", f"--data_path={texts}", f"--output_path={folder / 'pairs.jsonl'}", "--model=tiny"]
            backtranslate.main([*words, *flags])
            words = ["curate", f"--data_path={folder / 'pairs.jsonl'}", f"--output_path={folder / 'best.jsonl'}"]
            backtranslate.main([*words, "--model=tiny", "--temperature=0", *flags])
            evaluate.win_rate(
                data_path=str(tmp_path / "ours.json"),
                reference_path=str(tmp_path / "theirs.json"),
                judge="tiny",
                output_path=str(folder / "win.json"),
                base_url=server.url,
                api="chat",
                batch=kind == "batch",
            )
            assert bool(server.requests) == (kind == "online")
        names = ("pairs.jsonl", "best.jsonl", "win.json")
        found[kind] = [(folder / name).read_text().replace(server.url, "") for name in names]
    assert found["online"] == found["batch"]


def judge(prompt, body):
    return f"It is fine.\nScore: 5\nVerdict: {len(prompt) % 3}"


# ---- answers that fail ----


def test_lines_that_fail_are_asked_again(rows, capsys):
    """Refused, missing, expired, no completion, torn, of somebody else, twice."""

    def line(request, line, number):
        if len(server.batches) == 1 and number < 7:
            good = ok(line, completion(request, echo(request.prompt, {})))
            return [
                refused(line, 500, "Internal error"),
                None,
                expired(line),
                ok(line, {"choices": []}),
                json.dumps(good).encode()[:80],
                good | {"custom_id": "somebody-1-4"},
                json.dumps(good).encode() + b"\n" + json.dumps(good).encode(),
            ][number]
        return server.answered(request, line, number)

    with BatchServer() as server:
        server.line = line
        assert respond(rows, server) == expected()
        assert [batch["request_counts"]["total"] for batch in server.batches.values()] == [ROWS, 6]
    told = capsys.readouterr().out
    assert "batch batch_1: 34 answered, 3 missing, 3 refused, 3 lines ignored" in told


def test_a_batch_that_expires_keeps_what_was_answered(rows):
    with BatchServer() as server:
        server.ends = "expired"
        server.line = lambda request, line, number: (
            server.answered(request, line, number) if number % 3 else expired(line)
        )
        with pytest.raises(ParameterError, match="have no answer"):
            respond(rows, server)
        assert len(server.batches) == 3, "three rounds"
        kept = sum(entry["kind"] == "answer" for entry in journal(rows))
        assert 30 < kept < ROWS
        server.ends, server.line = "completed", server.answered
        assert respond(rows, server) == expected()
    assert set(server.paid.values()) == {1}


def test_prompts_that_are_too_long_are_not_asked_again(rows):
    message = "This model's maximum context length is 8 tokens."
    with BatchServer() as server:
        good = server.answered
        server.line = lambda request, line, number: (
            refused(line, 400, message, "context_length_exceeded") if number == 3 else good(request, line, number)
        )
        assert respond(rows, server, drop_failed=True) == expected(n for n in range(ROWS) if n != 3)
        assert len(server.batches) == 1


def test_a_key_that_is_refused_ends_the_run_and_keeps_the_answers(rows):
    with BatchServer() as server:
        server.line = lambda request, line, number: (
            refused(line, 401, "Incorrect API key provided.", "invalid_api_key")
            if number == 3
            else server.answered(request, line, number)
        )
        with pytest.raises(UsageError, match="does not accept the key"):
            respond(rows, server)
        assert sum(entry["kind"] == "answer" for entry in journal(rows)) == ROWS - 1
        server.line = server.answered
        assert respond(rows, server) == expected() and set(server.paid.values()) == {1}


def test_a_batch_that_is_refused_as_a_whole(rows):
    with BatchServer() as server:
        server.refuse = lambda lines: [{"code": "x", "message": "Enqueued token limit reached.", "line": None}]
        with pytest.raises(UsageError, match="refused as a whole: Enqueued token limit reached"):
            respond(rows, server, price_in=1.0, price_out=2.0)
        assert spent_before(rows) == 0.0, "it cost nothing"
        server.refuse = lambda lines: None
        assert respond(rows, server, price_in=1.0, price_out=2.0) == expected()


def test_batches_have_at_most_what_openai_takes(rows, monkeypatch):
    monkeypatch.setattr(batch_endpoint, "MOST_REQUESTS", 15)
    with BatchServer() as server:
        assert respond(rows, server) == expected()
        assert [batch["request_counts"]["total"] for batch in server.batches.values()] == [15, 15, 10]
    monkeypatch.setattr(batch_endpoint, "MOST_REQUESTS", 50_000)
    monkeypatch.setattr(batch_endpoint, "MOST_BYTES", 2_000)
    with BatchServer() as server:
        assert respond(rows, server, "second.json") == expected()
        sizes = [len(content) for name, content in server.files.values() if name.startswith("alpaca-")]
        assert len(sizes) > 2 and max(sizes) <= 2_000


# ---- a way to the server that fails ----


@pytest.mark.parametrize("call", [UPLOAD, CREATE, LOOK, FETCH])
@pytest.mark.parametrize("fault", [DROP, DONE_THEN_DROP, Fault(429), Fault(500), Fault(503, body=b"no json")], ids=str)
def test_faults_of_the_endpoints_cost_nothing(rows, call, fault):
    with BatchServer() as server:
        server.scripts[call] = [fault, fault]
        assert respond(rows, server) == expected()
        live = [batch for batch in server.batches.values() if batch["status"] != "cancelled"]
        assert len(live) == 1 and set(server.paid.values()) == {1}


def test_a_server_without_the_endpoint(rows):
    with BatchServer() as server:
        server.scripts[UPLOAD] = [Fault(404, {"message": "Not Found"})]
        with pytest.raises(ParameterError, match="no batch endpoint, omit --batch"):
            respond(rows, server)


def test_a_server_that_is_down_in_the_middle(rows):
    with BatchServer() as server:
        leave_open(rows, server)
        assert respond(rows, server) == expected()
        assert len(server.batches) == 1 and set(server.paid.values()) == {1}


# ---- money ----


def test_the_price_is_half_and_the_limit_holds(rows, capsys):
    prices = {"price_in": 1000.0, "price_out": 2000.0, "max_new_tokens": 50}
    with BatchServer() as server:
        respond(rows, server, **prices)
    told = capsys.readouterr().out
    entries = [entry for entry in journal(rows) if entry["kind"] == "answer"]
    cost = sum(entry["prompt_tokens"] * 1000 + entry["completion_tokens"] * 2000 for entry in entries) / 1e6 / 2
    assert f"${cost:.4f}" in told and "prices are halved" in told
    assert spent_before(rows, 1000.0, 2000.0) == pytest.approx(cost)


def test_a_limit_lets_as_many_go_as_it_pays_for(rows):
    prices = {"price_in": 1.0, "price_out": 2.0, "max_new_tokens": 100}
    most = 0.5 * Budget(1.0, 2.0).max_cost_of("Say 0.", 100)
    with BatchServer(answer=lambda prompt, body: "word " * 40) as server:
        with pytest.raises(UsageError, match=r"max_cost .*stopped with 2\d of 40"):
            respond(rows, server, max_cost=5.5 * most, **prices)
        totals = [batch["request_counts"]["total"] for batch in server.batches.values()]
        assert totals[0] == 5 and len(totals) > 1, "what was cheaper than set aside pays for more"
        assert 4.5 * most <= spent_before(rows) <= 5.5 * most
        respond(rows, server, max_cost=100 * most, **prices)
    assert set(server.paid.values()) == {1}


def test_an_open_batch_counts_in_the_limit_of_the_next_run(rows):
    prices = {"price_in": 1.0, "price_out": 2.0, "max_new_tokens": 100}
    with BatchServer() as server:
        leave_open(rows, server, **prices)
        flags = {"base_url": server.url, "api": "chat", "batch": True, **prices}
        model = open_backend("tiny", BackendFlags(server.url, "chat", batch=True))
        with Journal(Path(rows).with_name("out.json.journal.jsonl")) as file:
            budget = Budget(1.0, 2.0, 1.0, rate=0.5)
            answered_before(file, 0, budget)
            runner = batch_runner.runner_for(model, file, budget, 1)
            runner._resume()
        assert sum(budget.reserved.values()) == pytest.approx(
            sum(0.5 * Budget(1.0, 2.0).max_cost_of(f"Say {n}.", 100) for n in range(ROWS))
        )
        assert respond(rows, server, **flags) == expected()


def test_answers_that_cannot_be_read_count_once_at_the_highest_price(rows):
    prices = {"price_in": 1.0, "price_out": 2.0, "max_new_tokens": 100}
    with BatchServer() as server:
        server.line = lambda request, line, number: (
            ok(line, {"choices": []})
            if len(server.batches) == 1 and number == 0
            else server.answered(request, line, number)
        )
        assert respond(rows, server, **prices) == expected()
    entries = [entry for entry in journal(rows) if entry["kind"] == "answer"]
    paid = sum(entry["prompt_tokens"] + 2 * entry["completion_tokens"] for entry in entries) / 1e6 / 2
    assert spent_before(rows) == pytest.approx(paid + 0.5 * Budget(1.0, 2.0).max_cost_of("Say 0.", 100))


def test_an_answer_that_cannot_be_read_is_lost_once_however_often_it_is_downloaded(rows):
    prices = {"price_in": 1.0, "price_out": 2.0, "max_new_tokens": 100}
    with BatchServer() as server:
        good = server.answered
        server.line = lambda request, line, number: (
            ok(line, {"choices": []}) if len(server.batches) == 1 and number == 0 else good(request, line, number)
        )
        flags = [word for name, value in prices.items() for word in (f"--{name}", str(value))]
        kill_while_collecting(rows, server, 17, *flags)
        assert [entry["kind"] for entry in journal(rows)].count("lost") == 1
        assert respond(rows, server, **prices) == expected()
    entries = [entry for entry in journal(rows) if entry["kind"] == "answer"]
    paid = sum(entry["prompt_tokens"] + 2 * entry["completion_tokens"] for entry in entries) / 1e6 / 2
    assert spent_before(rows) == pytest.approx(paid + 0.5 * Budget(1.0, 2.0).max_cost_of("Say 0.", 100))


# ---- what another run has left ----


def test_a_batch_that_somebody_cancels_is_not_made_again_at_once(rows):
    with BatchServer() as server:
        good, server.ends = server.answered, "cancelled"
        server.line = lambda request, line, number: good(request, line, number) if number < 9 else None
        with pytest.raises(UsageError, match="batch_1 was cancelled; run again"):
            respond(rows, server)
        assert len(server.batches) == 1 and sum(entry["kind"] == "answer" for entry in journal(rows)) == 9
        server.ends, server.line = "completed", good
        assert respond(rows, server) == expected() and set(server.paid.values()) == {1}


def test_a_batch_that_the_server_does_not_know(rows):
    with BatchServer() as server:
        leave_open(rows, server)
        server.batches.clear()
        with pytest.raises(UsageError, match="made with another key, at another server, or is gone"):
            respond(rows, server)


def test_a_journal_without_the_first_line_of_a_batch(rows):
    with BatchServer() as server:
        leave_open(rows, server)
        path = Path(rows).with_name("out.json.journal.jsonl")
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if '"written"' not in line))
        with pytest.raises(UsageError, match="is damaged .batch 1 without its first line"):
            respond(rows, server)
        path.write_text("".join(line.replace('"about": {}, ', "") for line in lines))
        with pytest.raises(UsageError, match="is damaged .batch without about"):
            respond(rows, server)


def test_batches_under_way_are_not_asked_for_online(rows):
    with BatchServer() as server:
        leave_open(rows, server)
        with pytest.raises(ParameterError, match="batch 1 is under way.*Run again with --batch"):
            respond(rows, server, batch=False)
        assert not server.requests


def test_a_file_of_requests_that_was_changed(rows):
    with BatchServer() as server:
        leave_open(rows, server)
        [path] = Path(rows).parent.glob("*.batch-0001")
        content = path.read_bytes()
        path.write_bytes(content.replace(b"Say 3", b"Say 4"))
        with pytest.raises(UsageError, match="is missing, or was changed"):
            respond(rows, server)
        path.write_bytes(content)
        assert respond(rows, server) == expected() and set(server.paid.values()) == {1}


def test_flags_that_do_not_go_together(rows, tmp_path):
    for flags, problem in (
        ({"batch": True, "batch_dir": "x"}, "give one of them"),
        ({"batch_dir": "x", "base_url": "http://a/v1"}, "asks no server"),
        ({"batch_dir": rows}, "expected a folder"),
        ({"batch": True, "base_url": "http://a/v1,http://b/v1"}, "asks one server"),
        ({"batch": True, "concurrency": 4}, "a batch has all requests at once"),
        ({"batch_dir": "x", "concurrency": 4}, "a batch has all requests at once"),
        ({"batch_dir": "x", "load_in_4bit": True}, "is for the model of a folder; tiny is asked by files"),
        ({"batch_dir": "x", "base": "y"}, "is for the model of a folder; tiny is asked by files"),
    ):
        with pytest.raises(ParameterError, match=problem):
            open_backend("tiny", BackendFlags(**flags))
    with pytest.raises(ParameterError, match="is for a server"):
        open_backend(str(tmp_path), BackendFlags(batch=True))


def test_openais_chat_models_get_the_newer_name(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    model = open_backend("gpt-4o-mini", BackendFlags(api="chat", batch=True))
    assert model.request_of("Hi", batch_runner.Sampling(max_tokens=7))[1]["max_completion_tokens"] == 7


# ---- files of run-batch ----


def to_be_run(run, answers=tasks, fail=lambda number: False):
    """Run until nothing waits for an answer, and answer the files in between. Return how often."""
    for times in range(20):
        try:
            run()
            return times
        except UsageError as error:
            for line in str(error).splitlines():
                if "vllm run-batch" in line:
                    words = line.split()
                    run_batch(words[words.index("-i") + 1], words[words.index("-o") + 1], answers, fail)
            if "vllm run-batch" not in str(error):
                raise
    raise AssertionError("it does not come to an end")


def test_self_instruct_through_files(tmp_path):
    with CompletionServer(answer=tasks) as server:
        online = generate(tmp_path / "online", base_url=server.url)
    times = to_be_run(lambda: generate(tmp_path / "files", batch_dir=str(tmp_path / "batches")))
    assert times > 1
    assert json.loads((tmp_path / "files" / "regen.json").read_text())[:300] == online[:300]


def test_rows_through_files_some_of_which_fail(rows, tmp_path):
    """And a line that is torn, since vllm was killed."""
    folder = tmp_path / "batches"
    run = lambda: respond(rows, None, batch_dir=str(folder))  # noqa: E731
    with pytest.raises(UsageError, match="40 requests wait for answers"):
        run()
    with pytest.raises(UsageError, match="40 requests wait for answers"):
        run()
    run_batch(folder / "requests-0001.jsonl", folder / "answers-0001.jsonl", echo, lambda number: number == 5)
    content = (folder / "answers-0001.jsonl").read_bytes()
    (folder / "answers-0001.jsonl").write_bytes(content[:-40])
    with pytest.raises(UsageError, match="2 requests wait for answers"):
        run()
    run_batch(folder / "requests-0002.jsonl", folder / "answers-0002.jsonl", echo)
    assert run() == expected()


def test_two_commands_at_a_time_may_use_a_folder(rows, tmp_path):
    (tmp_path / "b").mkdir()
    runners = []
    for name in ("one", "two"):
        model = open_backend("tiny", BackendFlags(api="chat", batch_dir=str(tmp_path / "b")))
        with Journal(tmp_path / name) as file:
            runners.append(batch_runner.runner_for(model, file, Budget(), 1))
            assert runners[-1]._next_number() == len(runners), "it is taken at once"


# ---- kills ----


def command(rows, server):
    return [
        *(sys.executable, "-c", "import sys; from alpaca.completions import batch_runner as b; b.FIRST_POLL = 0.01; "),
        *("generate_responses", "--data_path", rows, "--output_path", str(Path(rows).with_name("out.json"))),
        *("--model_name", "tiny", "--base_url", server.url, "--api", "chat", "--batch"),
    ]


def run_and_kill_at(rows, server, at):
    """Run the command, and kill it when the server has got its call number `at`, which is done all the same. Return
    whether there was such a call."""
    words = command(rows, server)
    words[2] += "import generate_instruction; generate_instruction.main()"
    process, seen = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), Counter()

    def on_call(call):
        seen["calls"] += 1
        if seen["calls"] == at:
            os.kill(process.pid, signal.SIGKILL)

    server.on_call = on_call
    process.wait(60)
    server.on_call = lambda call: None
    return process.returncode == -signal.SIGKILL


CALLS = 5  # upload, create, two looks, download: of a run without a fault


@pytest.mark.parametrize("at", range(1, CALLS + 1))
def test_a_kill_at_any_call_is_paid_once(rows, at):
    with BatchServer() as server:
        assert run_and_kill_at(rows, server, at)
        assert respond(rows, server) == expected()
        assert len(server.batches) == 1 and set(server.paid.values()) == {1}
    assert not list(Path(rows).parent.glob("*.batch-*"))


@pytest.mark.stress
@pytest.mark.parametrize("keeps_metadata", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_kills_upon_kills(rows, seed, keeps_metadata, monkeypatch):
    """At calls and while answers are journaled, with lines that fail; a run after each."""
    draw = random.Random(seed)
    with BatchServer() as server:
        server.keeps_metadata = keeps_metadata
        failing = set(draw.sample(range(ROWS), 5))
        server.line = lambda request, line, number: (
            refused(line, 500, "no")
            if len(server.batches) == 1 and number in failing
            else server.answered(request, line, number)
        )
        for _ in range(4):
            if draw.random() < 0.5:
                run_and_kill_at(rows, server, draw.randrange(1, 7))
            else:
                kill_while_collecting(rows, server, draw.randrange(1, ROWS))
        assert respond(rows, server) == expected() and max(server.paid.values()) == 1
    indices = [entry["index"] for entry in journal(rows) if entry["kind"] == "answer"]
    assert max(Counter(indices).values()) == 1


def test_a_kill_while_answers_are_journaled(rows):
    with BatchServer() as server:
        kill_while_collecting(rows, server, 17)
        assert sum(entry["kind"] == "answer" for entry in journal(rows)) in range(1, ROWS)
        assert respond(rows, server) == expected()
        assert len(server.batches) == 1 and set(server.paid.values()) == {1}
    indices = [entry["index"] for entry in journal(rows) if entry["kind"] == "answer"]
    assert sorted(indices) == list(range(ROWS)), "each is journaled once"


def kill_while_collecting(rows, server, after, *flags):
    """Run the command, which kills itself once it has journaled so many answers."""
    words = [*command(rows, server), *flags]
    words[2] += (
        "import os, generate_instruction\nfrom alpaca.completions.journal import Journal\n"
        "append, n = Journal.append, [0]\n"
        "def dies(journal, entry):\n"
        "    n[0] += entry['kind'] == 'answer'\n"
        f"    if n[0] > {after}: os.kill(os.getpid(), 9)\n"
        "    return append(journal, entry)\n"
        "Journal.append = dies\ngenerate_instruction.main()"
    )
    subprocess.run(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60)
