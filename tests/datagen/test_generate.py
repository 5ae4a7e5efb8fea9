"""Data generation against a real HTTP server: as 2023, the same at any concurrency, nothing lost or paid twice."""

import asyncio
import csv
import hashlib
import inspect
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import GOLDEN, ROOT, run
from support.completion_server import BAD_KEY, DROP, EMPTY, HANG, NO_MODEL, QUOTA, TRUNCATED, CompletionServer, Fault
from support.imports import loaded_by

import generate_instruction
from alpaca.common.errors import UsageError
from alpaca.completions import runner
from alpaca.completions.budget import Budget
from alpaca.completions.journal import Journal
from alpaca.datagen import state
from alpaca.inference import client
from generate_instruction import export, generate_instruction_following_data, generate_responses

pytestmark = pytest.mark.slow  # many small cases

SEEDS = ROOT / "seed_tasks.jsonl"
VERBS, NOUNS = "Name List Find Describe Compare Explain Choose Rank Sort Invent".split(), 3000


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    """Backoff in milliseconds; no key or address of the machine that runs the tests."""
    monkeypatch.setattr(client.Client.__init__, "__defaults__", (None, "auto", 8, 600.0, 0.01))
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_ORG"):
        monkeypatch.delenv(name, raising=False)


def tasks(prompt: str, body=None) -> str:
    """Seventeen tasks, of which a stop string leaves sixteen; some repeat others, one is malformed."""
    draw = random.Random(hashlib.sha256(prompt.encode()).hexdigest())
    parts = []
    for n in range(4, 21):
        words = " ".join(f"w{draw.randrange(NOUNS)}" for _ in range(draw.randrange(4, 12)))
        instruction = f"{draw.choice(VERBS)} {words}." if n % 5 else "Name the largest of the oceans on Earth."
        field = "Output" if n != 7 else "Outptu"
        parts.append(f"{n}. Instruction: {instruction}\n{n}. Input:\n<noinput>\n{n}. {field}:\nAnswer {n}.\n")
    return "###\n".join(parts).removeprefix("4. Instruction:")


def generate(folder, server, number=100, **flags):
    flags = {"model_name": "tiny", "base_url": server.url, "api": "completions", "seed": 1, "num_cpus": 1} | flags
    generate_instruction_following_data(str(folder), str(SEEDS), number, **flags)
    return json.loads((Path(folder) / "regen.json").read_text())


def journal(folder, kind="answer"):
    lines = (Path(folder) / "generation_journal.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def report(folder):
    return json.loads((Path(folder) / "generation_report.json").read_text())


# ---- the same as 2023, the same at any concurrency ----


def test_regen_json_is_that_of_2023(tmp_path):
    completions = json.loads((GOLDEN / "generate" / "completions.json").read_text())
    answers = iter([(completion["text"], completion["finish_reason"]) for completion in completions])
    expected = json.loads((GOLDEN / "generate" / "regen.json").read_text())
    with CompletionServer(answer=lambda prompt, body: next(answers)) as server:
        seeds = GOLDEN / "generate" / "seed_tasks.jsonl"
        generate_instruction_following_data(
            str(tmp_path),
            str(seeds),
            len(expected),
            "tiny",
            request_batch_size=1,
            num_cpus=1,
            base_url=server.url,
            api="completions",
        )
    rows = json.loads((tmp_path / "regen.json").read_text())
    assert [list(row) for row in rows] == [list(row) for row in expected], "keys and their order"
    for row, wanted in zip(rows, expected):
        assert {**row, "most_similar_instructions": 0} == {**wanted, "most_similar_instructions": 0}
        similar, of_2023 = (list(x["most_similar_instructions"].items()) for x in (row, wanted))
        assert [score for _, score in similar] == [score for _, score in of_2023]
        lowest = similar[-1][1]  # of equal scores, np.argsort's order differs between CPUs
        assert {item for item in similar if item[1] > lowest} == {item for item in of_2023 if item[1] > lowest}
    body = server.requests[-1].body
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (1.0, 1.0, 3072)
    assert body["stop"] == ["\n20", "20.", "20."] and "logit_bias" not in body


def test_same_requests_and_rows_at_any_concurrency(tmp_path):
    found = []
    for concurrency, generated in ((1, 0), (16, 0), (1, 2), (16, 2)):
        folder = tmp_path / f"{concurrency} {generated}"
        with CompletionServer(answer=tasks) as server:
            server.delay = 0.002 * concurrency
            rows = generate(folder, server, 150, concurrency=concurrency, num_generated_in_prompt=generated)
        found.append((rows[:150], [entry["index"] for entry in journal(folder)]))
        assert server.busiest <= concurrency
        prompts = [request.prompt for request in server.requests]
        assert len(set(prompts)) == len(prompts)
    assert found[0][0] == found[1][0] and found[2][0] == found[3][0]
    assert sorted(found[1][1]) == list(range(len(found[1][1])))


def test_generated_tasks_join_the_examples(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "LAG", 2)
    with CompletionServer(answer=tasks) as server:
        rows = generate(tmp_path, server, 150, num_generated_in_prompt=2)
    kept = {row["instruction"] for row in rows}
    counts = [sum(instruction in request.prompt for instruction in kept) for request in server.requests]
    assert counts[0] == 0 and set(counts[4:]) == {2}


def test_chat_models_get_the_robust_parser(tmp_path):
    def answer(prompt, body):
        return "Sure:\n\n" + ("4. Instruction:" + tasks(prompt)).replace("\n", "\r\n")

    with CompletionServer(answer=answer) as server:
        rows = generate(tmp_path, server, 20, api="chat")
    assert len(rows) >= 20 and "stop" not in server.requests[-1].body
    assert server.requests[-1].body["messages"][0]["content"].endswith("4. Instruction:")
    assert journal(tmp_path)[0]["parser"] == "robust"


def test_the_report_adds_up(tmp_path, capsys):
    with CompletionServer(answer=tasks) as server:
        rows = generate(tmp_path, server, 60, price_in=1.0, price_out=2.0)
    told = report(tmp_path)
    rejected = sum(number for name, number in told.items() if name.startswith("rejected: "))
    assert told["proposed"] == told["kept"] + rejected == 16 * told["answers"] and told["kept"] == len(rows)
    assert told["rejected: malformed"] == told["answers"] and told["rejected: too similar"] > 0
    entries = journal(tmp_path)
    assert told["prompt_tokens"] == sum(entry["prompt_tokens"] for entry in entries)
    cost = sum(entry["prompt_tokens"] + 2 * entry["completion_tokens"] for entry in entries) / 1e6
    assert told["cost_dollars"] == pytest.approx(cost, abs=1e-6)
    printed = capsys.readouterr()
    assert "tasks proposed" in printed.out and "requests/s" in printed.out and "tasks/s" in printed.err


# ---- money ----


def test_max_cost_is_never_exceeded(tmp_path):
    """Prices under which about five requests fit; a rerun counts what the first run spent."""
    limit = 0.5
    with CompletionServer(answer=tasks) as server:
        flags = {"price_in": 1.0, "price_out": 20.0, "max_cost": limit, "max_tokens": 3072, "concurrency": 8}
        with pytest.raises(UsageError, match=r"--max_cost 0.5: stopped with \d+ of 5000, \$0\.\d+ spent"):
            generate(tmp_path, server, 5000, **flags)
        spent = report(tmp_path)["cost_dollars"]
        asked = len(server.requests)
        assert limit - 0.065 < spent <= limit and asked > 5
        assert [entry["index"] for entry in journal(tmp_path, "sent")] == list(range(asked))
        with pytest.raises(UsageError, match="--max_cost"):
            generate(tmp_path, server, 5000, **flags)
        assert len(server.requests) == asked


@pytest.mark.slow
def test_the_servers_bill_stays_below_the_limit(tmp_path):
    """Counted by the server: every answer that it wrote, those that were torn on the way included, and over kills."""
    draw, bill = random.Random(5), []

    def answer(prompt, body):
        text = tasks(prompt)
        bill.append(len(prompt.split()) + 20 * len(text.split(" ")))
        return text

    with CompletionServer(answer=answer, delay=0.05) as server:
        server.faults = lambda request: TRUNCATED if draw.random() < 0.3 else None
        command = [
            sys.executable,
            "-m",
            "generate_instruction",
            "generate_instruction_following_data",
            "--output_dir",
            str(tmp_path),
            "--num_instructions_to_generate",
            "5000",
            "--model_name",
            "tiny",
            "--num_cpus",
            "1",
            "--base_url",
            server.url,
            "--price_in",
            "1",
            "--price_out",
            "20",
            "--max_cost",
            "1",
        ]
        for kind in (signal.SIGKILL, signal.SIGINT):
            asked = len(server.requests)
            process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while len(server.requests) < asked + 4 and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(kind)
            process.wait()
        result = run(command, check=False)
    assert result.returncode == 2 and "--max_cost 1.0: stopped" in result.stderr
    assert 0.02 < sum(bill) / 1e6 <= report(tmp_path)["cost_dollars"] <= 1.0


def test_requests_without_an_answer_in_the_journal_count_as_paid(tmp_path):
    """Sent before a kill; sent, killed, sent again and answered; answered at once."""
    entries = [("sent", 0), ("sent", 1), ("sent", 2), ("answer", 2), ("sent", 1), ("answer", 1)]
    with Journal(tmp_path / "journal.jsonl") as file:
        for kind, index in entries:
            file.append({"kind": kind, "index": index, "most": 0.25, "prompt_tokens": 1000, "completion_tokens": 0})
        budget = Budget(price_in=1.0, max_cost=1.0)
        assert sorted(runner.answered_before(file, 2, budget)) == [2]
    assert budget.unanswered == 0.5 and budget.cost == pytest.approx(0.502)
    assert budget.allows(0.49) and not budget.allows(0.5)


def test_a_server_that_counts_no_tokens_is_not_for_free(tmp_path):
    def no_usage(request):
        body = {"choices": [{"text": tasks(request.prompt), "finish_reason": "stop"}]}
        return Fault(200, body=body)

    with CompletionServer() as server:
        server.faults = no_usage
        with pytest.raises(UsageError, match="--max_cost"):
            generate(tmp_path, server, 5000, price_in=1.0, price_out=20.0, max_cost=0.5)
        assert 5 <= len(server.requests) <= 8


@pytest.mark.parametrize(
    "usage", [{"prompt_tokens": "9", "completion_tokens": "9"}, "9", [9], {"prompt_tokens": -9}, None]
)
def test_usage_of_any_type_costs_no_task(tmp_path, usage):
    """It was 20 answers paid, none journaled, and exit 0 with 0 of 200 tasks."""
    with CompletionServer() as server:
        server.faults = lambda request: Fault(
            200, body={"choices": [{"text": tasks(request.prompt), "finish_reason": "stop"}], "usage": usage}
        )
        assert len(generate(tmp_path, server, 30, price_in=1.0, price_out=1.0)) >= 30
    entries = journal(tmp_path)
    assert {entry["completion_tokens"] for entry in entries} == {None} and all(e["unanswered"] > 0 for e in entries)


def test_fewer_tasks_than_asked_for_are_said(tmp_path, monkeypatch):
    """Whatever has ended the run early."""
    monkeypatch.setattr(state.Generation, "wants", lambda self, target, in_flight: not self.rows)
    with (
        CompletionServer(answer=tasks) as server,
        pytest.raises(UsageError, match=r"\d+ of 500 tasks are in .*run again"),
    ):
        generate(tmp_path, server, 500)
    assert 0 < len(json.loads((tmp_path / "regen.json").read_text())) < 500


def test_dry_run_asks_nothing(tmp_path, capsys):
    flags = {"model_name": "gpt-x", "price_in": 1.0, "price_out": 2.0, "dry_run": True}
    generate_instruction_following_data(str(tmp_path / "new"), str(SEEDS), 1000, **flags)
    printed = capsys.readouterr().out
    assert (ROOT / "prompt.txt").read_text() in printed and "4. Instruction:" in printed
    assert "at most $" in printed and not (tmp_path / "new").exists()


# ---- nothing lost ----


def test_a_rerun_continues_and_repeats_nothing(tmp_path):
    with CompletionServer(answer=tasks) as server:
        whole = generate(tmp_path / "whole", server, 200)
        server.requests.clear()
        for number in (40, 41, 120, 200):
            rows = generate(tmp_path / "parts", server, number)
    prompts = [request.prompt for request in server.requests]
    assert len(set(prompts)) == len(prompts)
    assert rows[:200] == whole[:200]
    told, of_whole = report(tmp_path / "parts"), report(tmp_path / "whole")
    assert told["proposed"] / told["answers"] == of_whole["proposed"] / of_whole["answers"] == 16


def test_a_regen_json_of_2023_is_continued(tmp_path):
    shutil.copy(GOLDEN / "generate" / "regen.json", tmp_path / "regen.json")
    before = json.loads((tmp_path / "regen.json").read_text())
    with CompletionServer(answer=tasks) as server:
        rows = generate(tmp_path, server, len(before) + 30)
    assert rows[: len(before)] == before and len(rows) >= len(before) + 30
    similar = {text for row in rows[len(before) :] for text in row["most_similar_instructions"]}
    assert similar & {row["instruction"] for row in before}, "the filter knows the old tasks"


def test_a_torn_journal_and_a_lost_regen_json(tmp_path, capsys):
    with CompletionServer(answer=tasks) as server:
        rows = generate(tmp_path, server, 100)
        asked = len(server.requests)
        with open(tmp_path / "generation_journal.jsonl", "a") as file:
            file.write('{"kind": "answer", "index": 99, "te')
        (tmp_path / "regen.json").unlink()
        assert generate(tmp_path, server, 100) == rows
    assert len(server.requests) == asked and "was cut off by a kill and is dropped" in capsys.readouterr().out
    lines = (tmp_path / "generation_journal.jsonl").read_text().splitlines()
    (tmp_path / "generation_journal.jsonl").write_text("\n".join([lines[0], "{damaged", *lines[1:]]) + "\n")
    with pytest.raises(UsageError, match="line 2: is damaged"):
        generate(tmp_path, server, 100)


def test_a_kill_between_journal_and_regen_json(tmp_path):
    """The journal may know a regen.json that never came: the one before counts."""
    with CompletionServer(answer=tasks) as server:
        generate(tmp_path, server, 60)
        old = (tmp_path / "regen.json").read_bytes()
        rows = generate(tmp_path, server, 120)
        (tmp_path / "regen.json").write_bytes(old)
        asked = len(server.requests)
        assert generate(tmp_path, server, 120)[:120] == rows[:120]
        assert len(server.requests) == asked


def test_an_edited_regen_json_is_taken_as_it_is(tmp_path):
    with CompletionServer(answer=tasks) as server:
        rows = generate(tmp_path, server, 60)[5:]
        (tmp_path / "regen.json").write_text(json.dumps(rows))
        asked = len(server.requests)
        again = generate(tmp_path, server, len(rows))
        assert again == rows and len(server.requests) == asked
        assert generate(tmp_path, server, 90)[: len(rows)] == rows


def test_a_second_process_is_refused(tmp_path):
    code = "import sys; from alpaca.completions.journal import Journal\n"
    code += "j = Journal(sys.argv[1]); print('ok', flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "generation_journal.jsonl"],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == "ok\n"
    with CompletionServer(answer=tasks) as server:
        with pytest.raises(UsageError, match="--output_dir .*another process is working in this folder"):
            generate(tmp_path, server)
        holder.kill()
        holder.wait()
        assert generate(tmp_path, server, 10)


def kill_and_rerun(folder, server, draw, kills):
    """SIGKILL at random moments, then to the end. Every prompt that reached the journal is asked once."""
    command = [
        sys.executable,
        "-m",
        "generate_instruction",
        "generate_instruction_following_data",
        "--output_dir",
        folder,
        "--num_instructions_to_generate",
        "400",
        "--model_name",
        "tiny",
        "--api",
        "completions",
        "--base_url",
        server.url,
        "--seed",
        "1",
        "--num_cpus",
        "1",
        "--concurrency",
        "6",
    ]
    killed = 0
    for _ in range(kills):
        process = subprocess.Popen(
            [str(word) for word in command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        before = len(server.requests)
        deadline = time.time() + 30
        while len(server.requests) == before and process.poll() is None and time.time() < deadline:
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.4))
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (folder / "regen.json").exists():
            json.loads((folder / "regen.json").read_text())
    run(command)
    return killed


@pytest.mark.slow
def test_kills_lose_nothing_and_repeat_only_what_was_in_flight(tmp_path, kills=3):
    with CompletionServer(answer=tasks, delay=0.05) as server:
        whole = generate(tmp_path / "whole", server, 400)
        server.requests.clear()
        killed = kill_and_rerun(tmp_path / "killed", server, random.Random(kills), kills)
    rows = json.loads((tmp_path / "killed" / "regen.json").read_text())
    assert rows[:400] == whole[:400] and killed
    indices = [entry["index"] for entry in journal(tmp_path / "killed")]
    assert sorted(indices) == list(range(len(indices))), "each answer journaled once"
    assert len(server.requests) <= len(indices) + 6 * killed, "only requests in flight are repeated"


@pytest.mark.stress
def test_dozens_of_kills(tmp_path):
    test_kills_lose_nothing_and_repeat_only_what_was_in_flight(tmp_path, kills=36)


def test_ctrl_c_keeps_what_was_answered(tmp_path):
    with CompletionServer(answer=tasks, delay=0.05) as server:
        command = [
            sys.executable,
            "-m",
            "generate_instruction",
            "generate_instruction_following_data",
            "--output_dir",
            str(tmp_path),
            "--num_instructions_to_generate",
            "5000",
            "--model_name",
            "tiny",
            "--base_url",
            server.url,
        ]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while len(server.requests) < 12 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    rows = json.loads((tmp_path / "regen.json").read_text())
    assert rows and report(tmp_path)["rows"] == len(rows) and "Traceback" not in err, err[-2000:]
    assert process.returncode not in (0, None)


def test_an_interrupt_waits_for_what_is_being_filtered():
    """What is written then has the same tasks as the report: one thread would else add to what another one writes."""
    done = []

    def slow(word):
        time.sleep(0.3)
        done.append(word)

    async def interrupted():
        call = asyncio.create_task(generate_instruction._in_thread(slow, "filtered"))
        await asyncio.sleep(0.05)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert done == ["filtered"]

    asyncio.run(interrupted())


# ---- evaluation sets, details, seeds ----


def test_tasks_of_an_evaluation_set_are_dropped_and_counted(tmp_path):
    """One is in it nearly word by word, one has thirteen words in a row of a longer one, with an input."""
    with CompletionServer(answer=tasks) as server:
        rows = generate(tmp_path / "all", server)
        one = rows[7]
        words = [f"v{n}" for n in range(20)]
        excluded = [
            {"instruction": f"{one['instruction']} Please."},
            {"instruction": "Do it.", "input": " ".join(words)},
        ]
        (tmp_path / "evaluation.json").write_text(json.dumps(excluded))
        run = " ".join(["so", *words[2:15], "so"])
        more = f"###\n19. Instruction: Read this: {run}.\n19. Input:\n<noinput>\n19. Output:\nYes.\n"
        server.answer = lambda prompt, body: tasks(prompt).partition("###\n19. ")[0] + more
        kept = generate(tmp_path / "kept", server, exclude=str(tmp_path / "evaluation.json"))
    assert one["instruction"] in {row["instruction"] for row in rows} - {row["instruction"] for row in kept}
    assert not any("v5 v6" in row["instruction"] for row in kept)
    counted = report(tmp_path / "kept")["rejected: in an evaluation set"]
    assert counted == 1 + len(journal(tmp_path / "kept"))


@pytest.mark.parametrize("text", ["", "[]", '[{"instruction": " "}]'])
def test_an_evaluation_set_of_nothing_is_an_error(tmp_path, text):
    path = tmp_path / "evaluation.json"
    path.write_text(text)
    with CompletionServer(answer=tasks) as server:
        with pytest.raises(UsageError):
            generate(tmp_path / "out", server, exclude=str(path))
        with pytest.raises(UsageError, match="--exclude: needs a file"):
            generate(tmp_path / "out", server, exclude="")
    assert not server.requests


def test_tasks_kept_before_that_are_excluded_now_are_told(tmp_path, capsys):
    with CompletionServer(answer=tasks) as server:
        rows = generate(tmp_path, server, 50)
        (tmp_path / "evaluation.json").write_text(json.dumps(rows[:3]))
        capsys.readouterr()
        assert generate(tmp_path, server, 50, exclude=str(tmp_path / "evaluation.json")) == rows
        assert f"note: 3 of the {len(rows)} tasks kept before resemble an evaluation set" in capsys.readouterr().out


def test_without_details_the_same_tasks_are_kept(tmp_path):
    with CompletionServer(answer=tasks) as server:
        rows = generate(tmp_path / "with", server, 200)
        bare = generate(tmp_path / "without", server, 200, similarity_details=False)
        more = generate(tmp_path / "without", server, 230, similarity_details=False)
    fields = ("instruction", "input", "output")
    assert [list(row) for row in bare] == [list(fields)] * len(bare)
    assert bare == [{name: row[name] for name in fields} for row in rows][: len(bare)]
    assert more[: len(bare)] == bare, "a rerun goes on from them"


def test_an_order_of_scores_needs_scores(tmp_path):
    with CompletionServer(answer=tasks) as server:
        with pytest.raises(UsageError, match="--stable_ties: orders the scores"):
            generate(tmp_path / "out", server, stable_ties=True, similarity_details=False)
    assert not server.requests


@pytest.mark.parametrize("name", ["seeds.json", "seeds.jsonl", "seeds.csv", "turns.json"])
def test_seed_tasks_of_any_layout(tmp_path, name):
    rows = [json.loads(line) for line in SEEDS.read_text().splitlines()]
    rows = [{"instruction": row["instruction"], **row["instances"][0]} for row in rows]
    path = tmp_path / name
    if name == "turns.json":
        path.write_text(json.dumps([{"question": row["instruction"], "answer": row["output"]} for row in rows]))
    elif name.endswith(".csv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ("instruction", "input", "output"))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows)))
    flags = dict(model_name="tiny", api="completions", seed=1, num_cpus=1)
    with CompletionServer(answer=tasks) as server:
        generate_instruction_following_data(str(tmp_path), str(path), 50, base_url=server.url, **flags)
        asked = server.requests[0].prompt
        server.requests.clear()
        generate(tmp_path / "2023", server, 50)
        of_2023 = server.requests[0].prompt
    assert (asked == of_2023) == (name != "turns.json") and asked.count("Output:") == of_2023.count("Output:")


# ---- what goes wrong ----


def test_faults_of_a_server_cost_no_row(tmp_path, monkeypatch):
    with CompletionServer(answer=tasks) as server:
        whole = generate(tmp_path / "whole", server, 150)
    monkeypatch.setattr(client.Client.__init__, "__defaults__", (None, "auto", 8, 0.5, 0.01))  # a hang is 0.5 s
    bad = [Fault(429, headers={"Retry-After": "0.05"}), Fault(500), DROP, TRUNCATED, EMPTY, HANG, Fault(503)]
    draw = random.Random(2)
    with CompletionServer(answer=tasks) as server:
        server.faults = lambda request: draw.choice(bad) if draw.random() < 0.3 else None
        rows = generate(tmp_path / "faulty", server, 150)
    assert rows[:150] == whole[:150]


def test_a_request_that_fails_for_good_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(client.Client.__init__, "__defaults__", (None, "auto", 1, 600.0, 0.001))
    with CompletionServer(answer=tasks) as server:
        server.faults = lambda request: Fault(500) if len(request.prompt) % 4 == 0 else None
        rows = generate(tmp_path, server, 100, price_in=1.0, price_out=1.0)
    failed = journal(tmp_path, "failed")
    assert len(rows) >= 100 and failed and not any(entry["unanswered"] for entry in failed), "a 500 is not charged"
    assert report(tmp_path)["requests"] == len(failed) + len(journal(tmp_path))
    with CompletionServer(answer=tasks) as server:
        server.faults = lambda request: Fault(500)
        monkeypatch.setattr(runner, "GIVE_UP", 3)
        with pytest.raises(UsageError, match="(?s)3 requests in a row failed: .* 500.*run again, continues"):
            generate(tmp_path / "never", server, 100)


def test_answers_that_never_arrived_count_as_paid(tmp_path, monkeypatch):
    """A dropped or torn answer may be on the bill: the limit holds with the most it can have cost."""
    flags = {"price_in": 1.0, "price_out": 20.0, "max_cost": 1.0, "concurrency": 4}
    draw = random.Random(0)
    with CompletionServer(answer=tasks) as server:
        server.faults = lambda request: draw.choice([DROP, TRUNCATED, Fault(500)]) if draw.random() < 0.3 else None
        with pytest.raises(UsageError, match="--max_cost 1.0: stopped"):
            generate(tmp_path, server, 5000, **flags)
        most = (max(len(request.prompt.encode()) for request in server.requests) + 256 + 3072 * 20) / 1e6
        lost = sum(entry["unanswered"] for entry in journal(tmp_path) + journal(tmp_path, "failed"))
        assert lost > 0 and 1.0 - 2 * most < report(tmp_path)["cost_dollars"] <= 1.0
        answered = sum(20 * entry["completion_tokens"] + entry["prompt_tokens"] for entry in journal(tmp_path)) / 1e6
        assert report(tmp_path)["cost_dollars"] == pytest.approx(lost + answered, abs=1e-6)


@pytest.mark.parametrize(
    "fault,message",
    [
        (BAD_KEY, "OPENAI_API_KEY"),
        (QUOTA, "quota"),
        (NO_MODEL, "tiny"),
    ],
)
def test_what_no_retry_mends_ends_the_run_at_once(tmp_path, fault, message):
    with CompletionServer(answer=tasks) as server:
        generate(tmp_path, server, 20)
        server.script = [fault] * 100
        asked = len(server.requests)
        with pytest.raises(UsageError, match=message):
            generate(tmp_path, server, 200)
        assert len(server.requests) - asked <= 5
        server.script = []
        assert len(generate(tmp_path, server, 60)) >= 60


def test_a_model_that_gives_nothing_new_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "USELESS", 8)
    with CompletionServer(answer=lambda prompt, body: "I cannot help with that.") as server:
        with pytest.raises(UsageError, match="answers gave no new task .*malformed.*journal.jsonl.*--parser"):
            generate(tmp_path, server)


BAD = {
    "seed line": ({"seed_tasks_path": "seeds"}, "--seed_tasks_path seeds, line 2: is not a task"),
    "no seeds": ({"seed_tasks_path": "nowhere.jsonl"}, "--seed_tasks_path nowhere.jsonl: cannot be read"),
    "prompt": ({"prompt_path": "nowhere.txt"}, "--prompt_path nowhere.txt: cannot be read"),
    "examples": ({"num_prompt_instructions": 1000}, "--num_prompt_instructions 1000"),
    "generated": ({"num_generated_in_prompt": 4}, "--num_generated_in_prompt 4"),
    "parser": ({"parser": "best"}, "--parser best: expected auto, original or robust"),
    "bias": ({"logit_bias": "[1]"}, "--logit_bias"),
    "cost without prices": ({"max_cost": 1.0}, "--max_cost 1.0: expected dollars above 0, with --price_in"),
    "temperature": ({"temperature": -1.0}, "--temperature -1.0: expected 0 (greedy) or more"),
    "no temperature": ({"temperature": float("nan")}, "--temperature nan: expected 0 (greedy) or more"),
    "share": ({"top_p": 3.0}, "--top_p 3.0: expected more than 0, 1 at most"),
    "number": ({"num_instructions_to_generate": 0}, "--num_instructions_to_generate 0: expected at least 1"),
    "folder": (
        {"output_dir": "seeds/below", "base_url": "http://127.0.0.1:9/v1"},
        "--output_dir seeds/below: cannot be written",
    ),
    "address": ({"base_url": "localhost:8000"}, "--base_url: expected an address"),
    "no server": ({"base_url": "http://127.0.0.1:9/v1"}, "--base_url"),
    "no key": ({}, "OPENAI_API_KEY is not set"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_clear_message(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seeds").write_text(SEEDS.read_text().split("\n")[0] + '\n{"instruction": "x"}\n')
    flags, message = BAD[case]
    with pytest.raises(UsageError) as error:
        generate_instruction_following_data(**({"output_dir": "out", "seed_tasks_path": str(SEEDS)} | flags))
    assert message in str(error.value)


@pytest.mark.parametrize("fault", [None, BAD_KEY, NO_MODEL], ids=["no server", "key", "model"])
def test_a_model_that_cannot_be_asked_leaves_nothing_behind(fault, tmp_path, capsys, monkeypatch):
    """Neither a folder nor a bar; a folder that was there stays as it was."""
    monkeypatch.setattr(client.Client.__init__, "__defaults__", (None, "auto", 1, 600.0, 0.001))
    rows_file(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with CompletionServer(answer=tasks) as server:
        server.faults = server.other_faults = lambda request: fault
        address = server.url if fault else "http://127.0.0.1:9/v1"
        for folder in (tmp_path / "a" / "new", tmp_path):
            with pytest.raises(UsageError):
                generate_instruction_following_data(str(folder), str(SEEDS), 20, "tiny", base_url=address)
            with pytest.raises(UsageError):
                paths = str(tmp_path / "rows.json"), str(folder / "out.json")
                generate_responses(*paths, "tiny", base_url=address)
        assert sorted(tmp_path.rglob("*")) == before and "%|" not in capsys.readouterr().err
        server.faults = server.other_faults = None
        assert len(generate(tmp_path / "a" / "new", server, 20)) >= 20


def test_small_numbers_are_hardly_exceeded_and_it_is_said(tmp_path, capsys):
    for number in (1, 20, 40):
        with CompletionServer(answer=tasks) as server:
            rows = generate(tmp_path / str(number), server, number, request_batch_size=5)
            assert number <= len(rows) < number + 16 and len(server.requests) == -(-number // 13)
        more = len(rows) - number
        assert f"{len(rows)} tasks in " in (told := capsys.readouterr().out)
        assert (f", {more} more than asked for" in told) == (more > 0)
    with CompletionServer(answer=tasks) as server:
        generate(tmp_path / "40", server, len(rows))
        assert server.requests == []
    told = capsys.readouterr().out
    assert "continuing: 4 answers from the journal" in told and "more than" not in told


def test_the_default_model_is_one_that_openai_has():
    model = inspect.signature(generate_instruction_following_data).parameters["model_name"].default
    assert model == "gpt-3.5-turbo-instruct" and model.endswith(client.COMPLETION_MODELS)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    with CompletionServer(answer=tasks) as server:
        generate(tmp_path, server, 20)
        real = os.fsync

        def full(handle):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UsageError, match="--output_dir .*No space left on device"):
            generate(tmp_path, server, 100)
        monkeypatch.setattr(os, "fsync", real)
        assert len(generate(tmp_path, server, 100)) >= 100


# ---- answers of another model, data files ----


def rows_file(tmp_path, number=30):
    rows = [{"instruction": f"Say {n}.", "input": "aloud" if n % 3 else "", "output": "old"} for n in range(number)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return rows


def test_generate_responses_keeps_rows_and_order(tmp_path):
    rows = rows_file(tmp_path)
    draw = random.Random(0)
    with CompletionServer(answer=lambda prompt, body: f" to {prompt} \n") as server:
        server.faults = lambda request: Fault(500) if draw.random() < 0.2 else None
        flags = {"base_url": server.url, "concurrency": 7}
        generate_responses(str(tmp_path / "rows.json"), str(tmp_path / "new.json"), "tiny", api="chat", **flags)
        asked = len(server.requests)
        generate_responses(str(tmp_path / "rows.json"), str(tmp_path / "new.json"), "tiny", api="chat", **flags)
        assert len(server.requests) == asked, "a rerun asks nothing"
        new = json.loads((tmp_path / "new.json").read_text())
        for row, old in zip(new, rows):
            prompt = f"{old['instruction']}\n\n{old['input']}" if old["input"] else old["instruction"]
            assert row == {**old, "output": f"to {prompt}"}
        generate_responses(str(tmp_path / "rows.json"), str(tmp_path / "b.json"), "tiny", api="completions", **flags)
        assert "### Instruction:\nSay 0.\n\n### Response:" in json.loads((tmp_path / "b.json").read_text())[0]["output"]
        rows_file(tmp_path, 31)
        for model in ("tiny", "other"):
            with pytest.raises(UsageError, match=r"made with other arguments \(.*; choose another output"):
                generate_responses(str(tmp_path / "rows.json"), str(tmp_path / "new.json"), model, api="chat", **flags)


def test_rows_without_an_answer_are_said_and_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(client.Client.__init__, "__defaults__", (None, "auto", 1, 600.0, 0.001))
    rows_file(tmp_path)
    paths = str(tmp_path / "rows.json"), str(tmp_path / "new.json")
    with CompletionServer() as server:
        server.faults = lambda request: Fault(500) if "Say 7." in request.prompt else None
        with pytest.raises(UsageError, match=r"1 of 30 rows have no answer \(rows 7\).*The first: .*answered 500"):
            generate_responses(*paths, "tiny", server.url, "chat")
        generate_responses(
            str(tmp_path / "rows.json"), str(tmp_path / "b.json"), "tiny", server.url, "chat", drop_failed=True
        )
        assert [row["instruction"] for row in json.loads((tmp_path / "b.json").read_text())].count("Say 7.") == 0
        server.faults = None
        asked = len(server.requests)
        generate_responses(*paths, "tiny", server.url, "chat")
        assert len(server.requests) == asked + 1 and len(json.loads((tmp_path / "new.json").read_text())) == 30


def test_export(tmp_path):
    rows = json.loads((GOLDEN / "generate" / "regen.json").read_text())
    export(str(GOLDEN / "generate" / "regen.json"), str(tmp_path / "data.json"))
    plain = [{name: row[name] for name in ("instruction", "input", "output")} for row in rows]
    assert json.loads((tmp_path / "data.json").read_text()) == plain
    for size, held_out in ((0.1, round(0.1 * len(rows))), (7, 7)):
        export(str(GOLDEN / "generate" / "regen.json"), str(tmp_path / "data.json"), size, seed=3)
        train, test = (json.loads((tmp_path / name).read_text()) for name in ("data.json", "data_eval.json"))
        assert len(test) == held_out and [row for row in plain if row not in test] == train
    export(str(GOLDEN / "generate" / "regen.json"), str(tmp_path / "data.json"), 5, str(tmp_path / "held_out.json"))
    assert len(json.loads((tmp_path / "held_out.json").read_text())) == 5
    assert json.loads((tmp_path / "data_eval.json").read_text()) == test, "not written again"
    with pytest.raises(UsageError, match="--eval_size 1000000"):
        export(str(GOLDEN / "generate" / "regen.json"), str(tmp_path / "data.json"), 10**6)


def test_export_names_what_is_wrong(tmp_path):
    for content in (None, "{", '[{"instruction": "x"}]', "{}x"):
        if content is not None:
            (tmp_path / "regen.json").write_text(content)
        with pytest.raises(UsageError, match="--regen_path .*regen.json: is not a list of tasks"):
            export(str(tmp_path / "regen.json"), str(tmp_path / "data.json"))


@pytest.mark.slow
def test_a_folder_answers_without_a_server(tiny, tmp_path):
    """The command line, a real model in the process; a rerun asks it nothing."""
    rows_file(tmp_path, 5)
    paths = ["--data_path", tmp_path / "rows.json", "--output_path", tmp_path / "new.json"]
    command = [sys.executable, "-m", "generate_instruction", "generate_responses", *paths, "--max_tokens", "8"]
    command += ["--model_name", tiny("llama")]
    first = run(command)
    rows = json.loads((tmp_path / "new.json").read_text())
    assert len(rows) == 5 and "5 rows in" in first.stdout and "5 requests in this run" in first.stdout
    assert "0 requests in this run" in run(command).stdout and json.loads((tmp_path / "new.json").read_text()) == rows
    wrong = run([*command, "--api", "chat"], check=False)
    assert wrong.returncode == 2 and "has no chat template" in wrong.stderr and "Traceback" not in wrong.stderr


def test_importing_generate_instruction_is_light():
    assert not {"train", "torch", "openai", "transformers"} & loaded_by("import generate_instruction")


def test_a_misspelt_flag_fails_before_work(monkeypatch):
    words = ["generate_instruction", "generate_instruction_following_data", "--outputdir", "x"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(UsageError, match="unknown flag --outputdir; did you mean --output_dir?"):
        generate_instruction.main()
