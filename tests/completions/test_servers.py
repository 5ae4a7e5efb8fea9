"""Several servers: the same requests and rows as of one, whatever they do; each gets as much as it answers."""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from support.completion_server import BAD_KEY, DROP, EMPTY, NO_MODEL, TRUNCATED, CompletionServer, Fault, echo, tasks
from support.fake_model import FakeModel
from support.llama_cpp import INSTALLED, running
from support.slurm import stand_ins

from alpaca.common.errors import ParameterError, UsageError
from alpaca.completions import servers as room
from alpaca.completions.api import Completion, NoResponse, NoServer, NotNow, Request, RequestFailed, Sampling
from alpaca.completions.budget import Budget
from alpaca.completions.rows import BatchCompletion
from alpaca.completions.servers import Server, Servers
from alpaca.inference.backend import BackendFlags, addresses_of, is_folder, open_backend
from alpaca.inference.client import Client
from generate_instruction import generate_instruction_following_data, generate_responses
from scripts.export import export

pytestmark = pytest.mark.slow  # many small cases


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(room, "REST", 0.02)
    monkeypatch.setattr(room, "LONGEST_REST", 0.1)
    monkeypatch.setattr(room, "CHECK", 2.0)
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_ORG"):
        monkeypatch.delenv(name, raising=False)


def addresses(servers):
    return ",".join(server.url for server in servers)


def generate(folder, base_url, number, **flags):
    flags = {"model_name": "tiny", "api": "completions", "seed": 1, "num_cpus": 1} | flags
    generate_instruction_following_data(str(folder), str(ROOT / "seed_tasks.jsonl"), number, base_url=base_url, **flags)
    return json.loads((folder / "regen.json").read_text())


def answered(folder):
    lines = (folder / "generation_journal.jsonl").read_text().splitlines()
    return [entry["index"] for entry in map(json.loads, lines) if entry["kind"] == "answer"]


class FiveServers:
    """One is quick, one slow, one sends what is no answer or breaks connections, one has four places, and one dies and
    comes back."""

    def __enter__(self):
        self.all = [CompletionServer(answer=tasks) for _ in range(5)]
        self.quick, self.slow, self.liar, self.small, self.mortal = self.all
        for server in self.all:
            server.__enter__()
        self.quick.delay, self.slow.delay, self.small.delay, self.mortal.delay = 0.01, 0.3, 0.01, 0.01
        draw = random.Random(3)
        self.liar.faults = lambda request: draw.choice([EMPTY, TRUNCATED, DROP, Fault(500), None])
        self.small.faults = lambda request: Fault(429) if self.small.busy >= 4 else None
        self.mortal.faults = self._dies
        self.reborn = None
        return self

    def _dies(self, request):
        if len(self.mortal.requests) == 20:
            threading.Thread(target=self._die_and_return).start()
        return None

    def _die_and_return(self):
        self.mortal.__exit__()
        time.sleep(0.1)
        self.reborn = CompletionServer(answer=tasks, port=self.mortal.port)
        self.reborn.__enter__()

    def __exit__(self, *_):
        for server in self.all[:4] + [self.reborn or self.mortal]:
            server.__exit__()

    def prompts(self):
        every = self.all + ([self.reborn] if self.reborn else [])
        return [request.prompt for server in every for request in server.requests]


def test_five_servers_give_the_rows_of_one(tmp_path, capsys):
    with CompletionServer(answer=tasks) as server:
        alone = generate(tmp_path / "one", server.url, 1500)
    with FiveServers() as five:
        rows = generate(tmp_path / "five", addresses(five.all), 1500)
        asked, reborn = [len(server.requests) for server in five.all], len(five.reborn.requests)
    assert rows[:1500] == alone[:1500], "the same requests, filtered in the same order"
    indices = answered(tmp_path / "five")
    assert sorted(indices) == list(range(len(indices))), "each is answered once"
    assert all(asked) and reborn > 0 and asked[0] > asked[1], "all are asked, the quick one more than the slow one"
    of_servers = json.loads((tmp_path / "five" / "generation_report.json").read_text())["servers"]
    assert sum(of_one["answers"] for of_one in of_servers) == len(indices)
    assert [of_one["failures"] > 0 for of_one in of_servers] == [False, False, True, True, True]
    told = capsys.readouterr().out
    assert "at 5 of 5 servers" in told and "rests, its requests go to the others" in told


def test_prompts_with_generated_tasks_are_those_of_one_server(tmp_path):
    with CompletionServer(answer=tasks) as server:
        alone = generate(tmp_path / "one", server.url, 600, num_generated_in_prompt=2)
    with FiveServers() as five:
        rows = generate(tmp_path / "five", addresses(five.all), 600, num_generated_in_prompt=2)
    assert rows[:600] == alone[:600]


def start_after(late, server):
    while len(server.requests) < 20:
        time.sleep(0.01)
    late.__enter__()


def test_a_server_that_is_not_there_yet_is_asked_when_it_is(tmp_path, capsys):
    with CompletionServer() as gone:
        pass
    late = CompletionServer(answer=tasks, port=gone.port)
    with CompletionServer(answer=tasks, delay=0.02) as server:
        threading.Thread(target=start_after, args=(late, server)).start()
        (tmp_path / "servers.txt").write_text(f"# node a\n{server.url}\n\n{gone.url}/  # node b\n")
        generate(tmp_path / "out", str(tmp_path / "servers.txt"), 1500, concurrency=4)
    late.__exit__()
    assert late.requests and "is not there yet" in capsys.readouterr().out


def test_a_server_that_refuses_in_the_middle_is_asked_no_more(tmp_path, capsys):
    with CompletionServer(answer=tasks) as a, CompletionServer(answer=tasks) as b:
        b.faults = lambda request: NO_MODEL if len(b.requests) > 5 else None
        rows = generate(tmp_path, addresses([a, b]), 400)
    assert len(rows) >= 400 and len(b.requests) < 30
    assert capsys.readouterr().out.count(f"{b.url}: is asked no more") == 1


def test_no_server_is_left(tmp_path):
    with CompletionServer(answer=tasks) as a, CompletionServer(answer=tasks) as b:
        a.faults = b.faults = lambda request: BAD_KEY if len(a.requests) > 5 else None
        with pytest.raises(UsageError, match="does not accept the key"):
            generate(tmp_path, addresses([a, b]), 4000)
        a.faults = b.faults = None
        kept = set(answered(tmp_path))
        before = len(a.requests) + len(b.requests)
        generate(tmp_path, addresses([a, b]), 400)
        assert len(answered(tmp_path)) - len(kept) == len(a.requests) + len(b.requests) - before
    assert len(answered(tmp_path)) == len(set(answered(tmp_path)))


def test_all_servers_die(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "ATTEMPTS", 3)
    with CompletionServer(answer=tasks) as a, CompletionServer(answer=tasks) as b:
        a.faults = b.faults = lambda request: DROP if len(a.requests) > 10 else None
        with pytest.raises(UsageError, match="20 requests in a row failed(.|\n)*at all servers"):
            generate(tmp_path, addresses([a, b]), 4000)


def test_all_servers_are_gone_for_good(tmp_path, monkeypatch):
    """However many requests wait: none is tried at each server for hours."""
    monkeypatch.setattr(room, "PATIENCE", 0.5)
    with CompletionServer(answer=tasks) as a, CompletionServer(answer=tasks) as b:
        a.faults = b.faults = lambda request: DROP if len(a.requests) > 200 else None
        begin = time.monotonic()
        with pytest.raises(UsageError, match="20 requests in a row failed"):
            generate(tmp_path, addresses([a, b]), 40_000)
    assert time.monotonic() - begin < 60, "at nine attempts each it would take many minutes"


@pytest.mark.parametrize("wait", ["3600", "inf"])
def test_all_servers_ask_to_wait_for_long(tmp_path, wait):
    with CompletionServer(answer=tasks, delay=0.01) as a, CompletionServer(answer=tasks, delay=0.01) as b:
        full = Fault(429, headers={"Retry-After": wait})
        a.faults = b.faults = lambda request: full if len(a.requests) > 200 else None
        with pytest.raises(UsageError, match="20 requests in a row failed"):
            generate(tmp_path, addresses([a, b]), 40_000)


def test_a_server_that_loads_its_model_is_tried_again(tmp_path, monkeypatch):
    """As llama.cpp answers 503 then: at the start, and when it comes back."""
    monkeypatch.setattr("alpaca.inference.client.LONGEST_BACKOFF", 0.01)
    with CompletionServer(answer=tasks, delay=0.02) as a, CompletionServer(answer=tasks, models=()) as b:
        loading = Fault(503, {"message": "Loading model"})
        b.faults = lambda request: loading if len(a.requests) < 30 else None
        rows = generate(tmp_path, addresses([a, b]), 1500, concurrency=4)
        assert len(rows) >= 1500 and len(b.requests) > 10


def test_after_a_blip_of_all_servers_they_are_filled_again():
    """Two servers of two thousand waiting requests: each gets more than one at a time again."""
    down = [False]
    models = [ScriptedModel(name, lambda n: NotNow("busy") if down[0] else None, 0.01) for name in "ab"]
    pool, most = Servers(models, 16), []

    async def run():
        for server in pool.servers:
            server.checked, server.limit = True, 128.0
        requests = [asyncio.create_task(pool.complete("x", Sampling())) for _ in range(2000)]
        await asyncio.sleep(0.03)
        down[0] = True
        await asyncio.sleep(0.05)
        down[0] = False
        while not all(request.done() for request in requests):
            most.append(sum(server.busy for server in pool.servers))
            await asyncio.sleep(0.01)
        assert all(request.result().text for request in requests)

    asyncio.run(run())
    assert max(most[len(most) // 2 :]) > 8


def test_what_is_wrong_before_anything_is_asked(tmp_path):
    with CompletionServer(answer=tasks) as a, CompletionServer(answer=tasks, models=("other",)) as b:
        b.faults = lambda request: NO_MODEL
        with pytest.raises(UsageError, match="The server offers: other"):
            generate(tmp_path / "x", addresses([a, b]), 10)
        b.faults = lambda request: Fault(404) if "chat" in request.path else None
        with pytest.raises(ParameterError, match="asked in different ways"):
            generate(tmp_path / "x", addresses([a, b]), 10, api="auto")
        assert not (tmp_path / "x").exists()
    with pytest.raises(NoServer, match="Is the server running"):
        generate(tmp_path / "x", addresses([a, b]), 10)


def test_a_server_that_says_nothing_is_waited_for_no_longer_than_a_minute(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "CHECK", 0.2)
    with CompletionServer(answer=tasks) as a, CompletionServer(answer=tasks) as silent:
        hangs = threading.Event()
        silent.other_faults = lambda request: hangs.wait(3) and None
        rows = generate(tmp_path, addresses([a, silent]), 100)
        hangs.set()
    assert len(rows) >= 100 and not silent.requests


def test_addresses(tmp_path):
    (tmp_path / "none.txt").write_text("# nothing\n\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert addresses_of("http://a/v1, http://b/v1/ ,") == ["http://a/v1", "http://b/v1"]
    assert addresses_of(None) == addresses_of("") == []
    (tmp_path / "some.txt").write_bytes(b"\xef\xbb\xbfhttp://a/v1, http://b/v1  # two\r\n\r\nhttp://c/v1\r\n")
    assert addresses_of(str(tmp_path / "some.txt")) == ["http://a/v1", "http://b/v1", "http://c/v1"]
    many = ",".join(f"node{n:03}.cluster.example:8000" for n in range(12))
    with pytest.raises(ParameterError, match="expected an address such as"):
        open_backend("tiny", BackendFlags(many))
    for text, problem in (
        (str(tmp_path / "none.txt"), "holds no address"),
        (str(tmp_path / "bytes"), "cannot be read"),
        ("http://a/v1,http://a/v1/", "is there twice"),
    ):
        with pytest.raises(ParameterError, match=problem):
            addresses_of(text)
    with pytest.raises(ParameterError, match="expected an address such as"):
        open_backend("tiny", BackendFlags("http://a/v1,b:8000"))


def test_one_address_of_a_file_is_a_plain_client(tmp_path):
    (tmp_path / "one.txt").write_text("http://127.0.0.1:9/v1\n")
    assert isinstance(open_backend("tiny", BackendFlags(str(tmp_path / "one.txt"))), Client)
    assert isinstance(open_backend("a" * 300, BackendFlags("http://127.0.0.1:9/v1")), Client)
    assert not is_folder("a" * 300, None), "a name that is too long for a path"


def test_rows_of_a_file_by_several_servers(tmp_path, monkeypatch):
    """Of the environment, too; --max_cost counts what liars may have charged."""
    rows = [{"instruction": f"Say {n}.", "input": "", "output": ""} for n in range(60)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with CompletionServer() as a, CompletionServer() as b:
        draw = random.Random(1)
        b.faults = lambda request: draw.choice([EMPTY, None])
        monkeypatch.setenv("OPENAI_BASE_URL", addresses([a, b]))
        generate_responses(str(tmp_path / "rows.json"), str(tmp_path / "out.json"), "tiny", api="chat")
        paid = json.loads((tmp_path / "out.json").read_text())
    assert [row["output"] for row in paid] == [echo(row["instruction"], {}) for row in rows]


# ---- the cost, by a model whose answers are lost ----


class ScriptedModel(FakeModel):
    """Answers, loses or fails, as `outcomes` says of its number."""

    def __init__(self, name, outcomes, seconds=0.0):
        self.address, self.outcomes, self.asked, self.seconds = name, outcomes, 0, seconds

    async def complete(self, prompt, sampling, on_lost_response):
        self.asked += 1
        outcome = self.outcomes(self.asked)
        await asyncio.sleep(self.seconds)
        if outcome == "lost":
            if not on_lost_response():
                raise RequestFailed("the limit of cost")
            raise NoResponse("broken")
        if isinstance(outcome, Exception):
            raise outcome
        return Completion("Yes.", "stop", 10, 5)


def ask(folder, models, requests, budget):
    batch = BatchCompletion(Servers(models, 4), Sampling(max_tokens=100), str(folder / "out.json"), {}, 4, budget)
    return batch.answers([Request("A prompt.", key) for key in range(requests)])


def test_lost_answers_of_all_servers_count_once(tmp_path):
    most, answer = Budget(1.0, 2.0).max_cost_of("A prompt.", 100), (10 + 2 * 5) / 1e6
    models = [ScriptedModel("a", lambda n: None), ScriptedModel("b", lambda n: "lost" if n % 2 else None)]
    budget = Budget(1.0, 2.0, 1.0)
    ask(tmp_path, models, 40, budget)
    lost = (models[1].asked + 1) // 2
    assert lost and budget.cost == pytest.approx(lost * most + 40 * answer) and not budget.reserved


def test_the_limit_of_cost_is_that_of_all_servers(tmp_path):
    most = Budget(1.0, 2.0).max_cost_of("A prompt.", 100)
    budget = Budget(1.0, 2.0, 6.5 * most)
    with pytest.raises(UsageError, match="stopped with 0 of 40|no answer"):
        ask(tmp_path, [ScriptedModel("a", lambda n: "lost"), ScriptedModel("b", lambda n: "lost")], 40, budget)
    assert budget.cost <= 6.5 * most


def test_a_journal_that_cannot_be_written_sets_no_server_aside(tmp_path, monkeypatch):
    """It is the disk that refuses, and all servers would be asked for nothing."""
    from alpaca.common.errors import InputError
    from alpaca.completions.journal import Journal

    append = Journal.append

    def full(journal, entry):
        if entry["kind"] == "lost":
            raise InputError("out.json: cannot be written (No space left on device)", "out.json")
        return append(journal, entry)

    monkeypatch.setattr(Journal, "append", full)
    models = [ScriptedModel("a", lambda n: "lost"), ScriptedModel("b", lambda n: "lost")]
    with pytest.raises(UsageError, match="No space left"):
        ask(tmp_path, models, 1, Budget(1.0, 2.0, 1.0))
    assert sum(model.asked for model in models) == 1


# ---- how much a server is asked ----


def simulate(seconds_at, answers=20_000, refuses_above=None, most=512):
    """Return the limits of a server that is always full, in the order of its answers. `seconds_at`: of an answer of ten
    tokens, by the number of requests that it has."""
    server, now, limits = Server(ScriptedModel("a", None), 8, most), 1000.0, []
    server._begin_round(now)
    flying = []  # (ends, begins, refused)
    for _ in range(answers):
        while server.limit_now(now) > server.busy:
            server.take()
            refused = refuses_above is not None and server.busy > refuses_above
            flying.append((now + (0.001 if refused else seconds_at(server.busy)), now, refused))
        if not flying:
            now = server.rests_until
            continue
        flying.sort()
        now, began, refused = flying.pop(0)
        server.busy -= 1
        if refused:
            server.failed(began, now, NotNow("429"))
        else:
            server.succeeded(began, now, 10)
        limits.append(server.limit)
    return limits


def test_a_server_with_room_gets_more_until_its_rate_stops_growing():
    """64 places, beyond which requests wait for one: more would only make each answer later."""
    limits = simulate(lambda busy: 1.0 if busy <= 64 else busy / 64)
    assert 48 <= min(limits[10_000:]) and max(limits[10_000:]) <= 2.6 * 64
    assert limits.index(64) < 600, "it gets there by doubling"


def test_a_server_that_slows_down_in_proportion_stays_where_it_is():
    """One place, as llama.cpp has by default."""
    assert max(simulate(lambda busy: 0.1 * busy, 5000)) <= 20


def test_a_server_that_batches_is_filled():
    """Each request slows the others down a little, as in vLLM: 256 of them do 60 times the work of one."""
    limits = simulate(lambda busy: 1 + busy / 80)
    assert max(limits) > 100


def test_refusals_halve_the_limit():
    limits = simulate(lambda busy: 0.1, 20_000, refuses_above=40)
    late = limits[5000:]
    assert 10 <= min(late) and max(late) <= 45 and sum(late) / len(late) > 20


def test_the_limit_is_never_above_the_users():
    assert max(simulate(lambda busy: 0.1, 5000, most=12)) == 12


def test_a_failure_is_counted_once_for_all_that_were_under_way():
    server = Server(ScriptedModel("a", None), 8, 512)
    assert server.failed(1.0, 2.0, NoResponse("x")) and not server.failed(1.5, 2.1, NoResponse("x"))
    assert server.failures == 1 and server.limit == 1 and server.limit_now(2.0) == 0
    server.failed(3.0, 3.1, NotNow("x", wait=7.0))
    assert server.rests_until == pytest.approx(10.1)


# ---- the recipe ----

VLLM = """#!{python}
# stands in for `vllm serve MODEL --host H --port P …`; the second of the first node dies once
import os, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from support.completion_server import CompletionServer, tasks
words = dict(zip(sys.argv[3::2], sys.argv[4::2]))
node, died = int(os.environ["SLURM_NODEID"]), {died!r}
print(sys.argv[1:], os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
with CompletionServer(
    tasks, (sys.argv[2],), delay=0.01, port=int(words["--port"]), host=f"127.0.0.{{node + 1}}"
) as server:
    while os.getppid() > 1:
        if node == 0 and os.environ["CUDA_VISIBLE_DEVICES"] == "2,3" and len(server.requests) > 9:
            if not os.path.exists(died):
                open(died, "w").close()
                os._exit(1)
        time.sleep(0.05)
"""


def test_the_slurm_script_asks_a_server_on_every_gpu(tmp_path):
    """recipes/generate_vllm.slurm on two nodes of two servers of two GPUs; vllm and Slurm are stood in for."""
    folder = stand_ins(tmp_path / "bin")
    names = {"python": sys.executable, "root": str(ROOT), "tests": str(ROOT / "tests"), "died": str(tmp_path / "died")}
    (folder / "vllm").write_text(VLLM.format(**names))
    (folder / "vllm").chmod(0o755)
    port = free_port_of_four()
    env = dict(
        os.environ,
        PATH=f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        MODEL="org/model",
        NUMBER="800",
        OUTPUT=str(tmp_path / "out"),
        GPUS_PER_SERVER="2",
        SLURM_GPUS_ON_NODE="4",
        SLURM_JOB_ID=str(port - 20000),
        SLURM_JOB_NODELIST="n[0-1]",
        SLURM_SUBMIT_DIR=str(ROOT),
    )
    done = subprocess.run(
        ["bash", "recipes/generate_vllm.slurm", "--seed", "1", "--similarity_details", "False"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "out" / "generation_report.json").read_text())
    urls = [f"http://127.0.0.{node}:{port + n}/v1" for node in (1, 2) for n in (0, 1)]
    assert [server["address"] for server in report["servers"]] == urls
    assert all(server["answers"] for server in report["servers"]) and (tmp_path / "died").exists()
    assert len(json.loads((tmp_path / "out" / "regen.json").read_text())) >= 800
    log = (tmp_path / "out" / "vllm-0-1.log").read_text().splitlines()
    words = ["serve", "org/model", "--host", "0.0.0.0", "--port", str(port + 1), "--tensor-parallel-size", "2"]
    assert log[0] == f"{words} 2,3"


def free_port_of_four():
    """Return a port above 20,000 that is free with its neighbour."""
    for port in range(21_000, 39_000, 7):
        try:
            for at in (port, port + 1):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", at))
            return port
        except OSError:
            continue
    raise AssertionError("no port is free")


# ---- kills ----


def killed_run(folder, servers, number, seconds):
    command = [sys.executable, "-m", "generate_instruction", "generate_instruction_following_data"]
    command += ["--output_dir", str(folder), "--num_instructions_to_generate", str(number), "--model_name", "tiny"]
    command += ["--base_url", addresses(servers), "--api", "completions", "--seed", "1", "--num_cpus", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begin = sum(len(server.requests) for server in servers)
    while sum(len(server.requests) for server in servers) == begin and process.poll() is None:
        time.sleep(0.005)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.stress)])
def test_killed_runs_with_five_servers_lose_and_repeat_nothing(tmp_path, kills):
    with CompletionServer(answer=tasks) as server:
        alone = generate(tmp_path / "one", server.url, 3000)
    draw = random.Random(5)
    folder = tmp_path / "five"
    with FiveServers() as five:
        for _ in range(kills):
            journal = folder / "generation_journal.jsonl"
            known = set(answered(folder)) if journal.exists() and b"\n" in journal.read_bytes() else set()
            killed_run(folder, [*five.all[:4], five.reborn or five.mortal], 3000, draw.uniform(0.0, 0.4))
            indices = answered_of_torn(folder)
            assert known <= set(indices)
            assert max(Counter(indices).values(), default=1) == 1, "what is journaled is not asked again"
        rows = generate(folder, addresses([*five.all[:4], five.reborn or five.mortal]), 3000)
    assert rows[:3000] == alone[:3000]
    assert max(Counter(answered(folder)).values()) == 1


def answered_of_torn(folder):
    path = folder / "generation_journal.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [entry["index"] for entry in map(json.loads, lines) if entry["kind"] == "answer"]


@pytest.mark.stress
@pytest.mark.skipif(not INSTALLED, reason="xllamacpp is not installed")
def test_two_servers_of_llama_cpp_answer_as_one(tiny, tmp_path):
    """Real ones, each with one place; one is killed in the middle."""
    export(tiny("llama"), str(tmp_path / "gguf"), dtype="F32")
    rows = [{"instruction": f"Say {n}.", "input": "", "output": ""} for n in range(60)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = {"api": "completions", "temperature": 0.0, "max_new_tokens": 24, "batch_size": 1}
    with running(tmp_path / "gguf" / "model.gguf") as a, running(tmp_path / "gguf" / "model.gguf") as b:
        words = (str(tmp_path / "rows.json"), str(tmp_path / "one.json"), "model")
        generate_responses(*words, base_url=f"{a.address}/v1", **flags)
        words = (str(tmp_path / "rows.json"), str(tmp_path / "two.json"), "model")
        threading.Thread(target=kill_after, args=(b, tmp_path / "two.json.journal.jsonl", 10)).start()
        generate_responses(*words, base_url=f"{a.address}/v1,{b.address}/v1", **flags)
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()


def kill_after(server, journal, answers):
    """Kill the process of a server when the journal has so many lines."""
    while not journal.exists() or len(journal.read_bytes().splitlines()) < answers:
        time.sleep(0.01)
    server.process.kill()
