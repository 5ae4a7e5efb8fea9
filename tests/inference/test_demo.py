"""The demo's page: many people at a time, stop, limits, errors in words; over HTTP and in a real browser.

DEMO_PICTURE=assets/demo.png python -m pytest tests/inference/test_demo.py -m stress -k picture   # the picture anew
"""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import aclosing, contextmanager
from itertools import count
from pathlib import Path

import pytest
from conftest import ROOT, run

from alpaca.common.errors import UsageError
from alpaca.completions.api import Sampling
from alpaca.data.prompts import PROMPT_DICT, format_prompt
from alpaca.inference import demo as inference_demo
from alpaca.inference.demo import DemoEngine, DemoGuard, DemoModel
from alpaca.inference.local_model import LocalModel
from scripts import demo, quickstart
from scripts.generate import AnswerFlags
from scripts.make_tiny_model import make_tiny_model

pytestmark = pytest.mark.slow  # many small cases

PICTURED = "Countries without a coast"  # an example that the quickstart's model knows by heart
GREEDY = Sampling(max_tokens=40, temperature=0.0)


class Scripted:
    """In place of a LocalModel: says what the test wants, a piece for each time that `go` is released."""

    device, context = "cpu", 60

    def __init__(self, *pieces: str | Exception):
        self.pieces, self.go, self.running = pieces, threading.Semaphore(0), 0
        self.model = self

    def num_parameters(self) -> int:
        return 7_000_000_000

    dtype = "torch.bfloat16"

    def prompt_tokens(self, prompt: str) -> int:
        return len(prompt.split())

    def stream(self, prompt, sampling, stopped):
        self.running += 1
        try:
            for piece in self.pieces or (f"{number} " for number in count()):
                while not self.go.acquire(timeout=0.01):
                    if stopped.is_set():
                        return "length"
                if isinstance(piece, Exception):
                    raise piece
                yield piece
            return "stop"
        finally:
            self.running -= 1


def answering(*models, concurrency=8, max_characters=100) -> DemoEngine:
    voices = [DemoModel(f"model {number}", model, PROMPT_DICT) for number, model in enumerate(models)]
    return DemoEngine(voices, concurrency, max_characters)


async def until(answers, right) -> list:
    """Of an answering's iterator: the first state for which `right` holds."""
    async for state in answers:
        if right(state):
            return state
    raise AssertionError("the answer ended before")


async def last(answers) -> list:
    return [state async for state in answers][-1]


async def wait_until(right) -> None:
    for _ in range(2000):
        if right():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("waited for 20 s")


def test_a_slow_answer_holds_up_nobody_else_and_ends_with_its_page():
    async def people():
        model = Scripted()
        page = answering(model)
        async with aclosing(page.answer("slow", "Count.", "", GREEDY)) as slow:
            await until(slow, lambda state: "Reading" in state[0].status)
            async with aclosing(page.answer("other", "Count.", "", GREEDY)) as other:
                for one in (other, slow):
                    while not (state := await anext(one))[0].text:
                        model.go.release()
                    assert "Writing" in state[0].status
                page.stop("other")
                assert (await last(other))[0].status.startswith("Stopped")
            assert model.running == 1, "only that one has been stopped"
        await wait_until(lambda: model.running == 0)  # closed, as gradio does when the page is gone
        assert page._running == {} and not page.places.locked()

    asyncio.run(asyncio.wait_for(people(), 60))


def test_who_waits_is_told_so_and_can_stop_or_leave():
    async def people():
        model = Scripted("one", " two")
        page = answering(model, concurrency=1)
        first, second, third = (page.answer(name, "Count.", "", GREEDY) for name in "abc")
        await until(first, lambda state: "Reading" in state[0].status)
        for waiting in (second, third):
            await until(waiting, lambda state: "Waiting" in state[0].status)
        page.stop("b")
        assert (await last(second))[0].status == "Stopped" and model.running == 1
        await third.aclose()
        model.go.release(2)
        assert (await last(first))[0].text == "one two"
        fourth = page.answer("d", "Count.", "", GREEDY)
        model.go.release(2)
        assert (await last(fourth))[0].status.startswith("Ended after")

    asyncio.run(asyncio.wait_for(people(), 60))


@pytest.mark.parametrize(
    "instruction, error, told",
    [
        (" \n", None, "Write an instruction first."),
        ("x" * 101, None, "have 101 characters, of at most 100."),
        ("a " * 45, None, "tokens with their prompt, and this model reads 60, answer included."),
        ("Hi.", UsageError("out of memory on cuda. Give a smaller --request_batch_size"), "Out of memory. Ask for few"),
        ("Hi.", RuntimeError("CUDA error: device-side assert"), "The model failed: RuntimeError: CUDA error: device"),
    ],
    ids=["empty", "characters", "tokens", "memory", "anything"],
)
def test_what_goes_wrong_is_said_on_the_page(instruction, error, told):
    model = Scripted("half an", error or " answer")
    model.go.release(2)
    (answer,) = asyncio.run(last(answering(model).answer("page", instruction, "", GREEDY)))
    assert told in answer.status and answer.wrong and answer.ended
    assert answer.text == ("half an" if error else "")


def test_new_tokens_are_those_that_the_context_has_left():
    voice = DemoModel("name", Scripted(), PROMPT_DICT)
    assert voice.fitting("word " * 50, GREEDY).max_tokens == 10
    assert voice.fitting("word " * 10, GREEDY).max_tokens == 40


def mistake(*flags) -> str:
    with pytest.raises(UsageError) as caught:
        demo.main([str(flag) for flag in flags])
    return str(caught.value)


def test_mistakes_are_told_before_a_model_is_loaded(monkeypatch):
    assert "--model is missing" in mistake()
    assert "--hots; did you mean --host" in mistake("--model", "nowhere", "--hots", "0.0.0.0")
    assert "--max_characters 0" in mistake("--model", "nowhere", "--max_characters", 0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert f"--port {port}: another program listens" in mistake("--model", "nowhere", "--port", port)
    assert "--host 203.0.113.1" in mistake("--model", "nowhere", "--host", "203.0.113.1")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "needs gradio, which is not installed: pip" in mistake("--model", "x", "--port", quickstart.free_port())


def test_the_page_and_the_terminal_answer_alike():
    terminal, page = AnswerFlags(), {slider.elem_id: slider.value for slider in demo.sampling_sliders(2048)}
    assert page == {"temperature": terminal.temperature, "top_p": terminal.top_p, "max_tokens": terminal.max_new_tokens}
    assert {slider.elem_id: slider.value for slider in demo.sampling_sliders(100)}["max_tokens"] == 100


@pytest.mark.parametrize(
    "card, told",
    [
        (None, "It has no card (README.md)"),
        (
            "---\nlicense: apache-2.0\n---\n",
            "the licence of the model is apache-2.0, and that of its data is not named.",
        ),
        (
            "---\nlicense: [mit, cc0-1.0]\ndatasets: own/rows\n---",
            "mit, cc0-1.0, and that of its data (own/rows) is not",
        ),
        ("---\nlicense: other\nlicense_name: llama2\n---\n# x\n", "the licence of the model is llama2, and"),
        (
            "---\ndatasets:\n- tatsu-lab/alpaca\n---\n# x\n- Licence: CC BY-NC 4.0\n",
            "is not named, and that of its data (tatsu-lab/alpaca) is CC BY-NC 4.0.",
        ),
        (
            "---\ndatasets: [a/b]\n---\n- Licence: not stated\n",
            "neither of the model nor of its data (a/b).",
        ),
        ("no front matter", "Its card names no licence, neither of the model nor of its data."),
        ("---\nlicense: {a: 1}\n---\n", "names no licence"),
        ("---\nlicense: [\n---\n", "Its card (README.md) cannot be read"),
        ("---\n- a list\n---\n", "Its card (README.md) cannot be read"),
        (b"---\nlicense: \xff\n---\n", "Its card (README.md) cannot be read"),
    ],
)
def test_the_footer_says_what_the_card_says(card, told, tmp_path):
    if card is not None:
        (tmp_path / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    assert told in inference_demo.licence_of(tmp_path)
    shown = demo.footer([DemoModel("<a>", None, {}, "licence <b>"), DemoModel("c", None, {}, "none")])
    assert "<p>&lt;a&gt;: licence &lt;b&gt;</p><p>c: none</p>" in shown and "check what matters" in shown


def test_examples_are_seed_tasks_each_found_by_its_words():
    rows = demo.load_rows(str(demo.SEED_TASKS))
    for words, example in zip(demo.EXAMPLES.values(), demo.examples()):
        assert [row for row in rows if words in row["instruction"]] == [example]


# ---- with models, and over HTTP ----


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """The folder of a LoRA adapter for tiny("llama") that changes its answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny("llama")), config)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return str(folder)


def voices(**flags) -> list[DemoModel]:
    return demo.load_models(demo.DemoArguments(**flags))


@pytest.mark.slow
def test_an_adapter_answers_beside_its_base_out_of_the_same_memory(tiny, adapter):
    tuned, base = voices(model=adapter, base=tiny("llama"))
    alone = [LocalModel(adapter, base=tiny("llama")), LocalModel(tiny("llama"))]
    prompts = [format_prompt({"instruction": "Name two oceans."}), "1."]
    expected = [model.generate(prompts, GREEDY) for model in alone]
    assert expected[0] != expected[1]
    assert [voice.model.generate(prompts, GREEDY) for voice in (tuned, base)] == expected
    places = [{weight.data_ptr() for weight in voice.model.model.parameters()} for voice in (tuned, base)]
    assert places[1] < places[0]


@pytest.mark.slow
def test_which_models_answer_with_which_prompts(tiny, adapter, tmp_path):
    base, own = tiny("llama"), {name: f"{{instruction}}{'{input}' * (name == 'prompt_input')}" for name in PROMPT_DICT}
    shutil.copytree(base, tmp_path / "tuned")
    (tmp_path / "tuned" / "prompt_template.json").write_text(json.dumps(own))
    tuned = str(tmp_path / "tuned")
    (tmp_path / "tuned" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    assert ["cc-by-nc-4.0" in voice.licence for voice in voices(model=tuned, base=base)] == [True, False]
    assert [voice.name for voice in voices(model=tuned)] == ["tuned"]
    first, second = voices(model=tuned, base=base)  # a whole model and its base
    assert first.templates == second.templates == own, "the base is asked the same"
    first, second = voices(model=adapter, base=base, compare=tuned)
    assert first.templates == PROMPT_DICT and second.templates == own and second.name == "tuned"
    (tmp_path / "given.json").write_text(json.dumps(PROMPT_DICT))
    assert voices(model=tuned, prompt_template=str(tmp_path / "given.json"))[0].templates == PROMPT_DICT
    assert [voice.name for voice in voices(model=tuned, compare=tuned)] == [tuned, tuned]
    with pytest.raises(UsageError, match="--model .*nowhere"):
        voices(model=str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="omit --base or --compare"):
        voices(model=tuned, base=base, compare=base)


@contextmanager
def served(page: DemoEngine):
    """Its address, in this process."""
    blocks, port = demo.build_page(page), quickstart.free_port()
    demo.launch(blocks, "127.0.0.1", port)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        blocks.close(verbose=False)


def events(client, session: str, *inputs):
    """What the server sends to a page that asks: instruction, input, temperature, top-p, max new tokens."""
    listeners = client.get("/config").json()["dependencies"]
    (number,) = [one["id"] for one in listeners if len(one["inputs"]) == len(inputs)]
    request = {"data": inputs, "fn_index": number, "session_hash": session}
    client.post("/gradio_api/queue/join", json=request).raise_for_status()
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as response:
        for line in response.iter_lines():
            if line.startswith("data:"):
                yield json.loads(line.removeprefix("data:"))


@pytest.mark.slow
def test_the_server_streams_and_stops_when_nobody_reads(tiny):
    import httpx
    from gradio_client.utils import apply_diff

    model, endless = LocalModel(tiny("llama")), Scripted()
    with served(answering(model)) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        states = []
        for event in events(client, "a", "Name two oceans.", "", 0, 1, 300):
            if event["msg"] == "process_generating":
                new = event["output"]["data"]
                states.append([apply_diff(*pair) for pair in zip(states[-1], new)] if states else new)
        prompt = format_prompt({"instruction": "Name two oceans."})
        (expected,) = model.generate([prompt], Sampling(300, 0.0))
        assert states[-1][0] == expected.text and len({state[0] for state in states}) > 3
        assert "Ended at its limit of 300 tokens after" in states[-1][1] and " s: 300 tokens, " in states[-1][1]
        assert client.get("/config").json()["analytics_enabled"] is False
        assert client.post("/gradio_api/upload", files={"files": ("x.txt", b"1234")}).status_code == 413
        assert re.findall(r'(?:src|href)="(https?:[^"]*)"', client.get("/").text) == []
    with served(answering(endless)) as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        reading = events(client, "b", "Count.", "", 0, 1, 40)
        while next(reading)["msg"] != "process_generating":
            pass
        assert endless.running == 1
        endless.go.release(3)
        reading.close()
        asyncio.run(wait_until(lambda: endless.running == 0))


# ---- what reaches the server ----


def sent(url: str, text: bytes, body=(), read: int = 4096) -> str:
    """The status line and more that the server answers to bare bytes; `body`: parts, until it no longer takes them."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(text)
        try:
            for part in body:
                connection.sendall(part)
        except ConnectionError:
            pass  # it has answered already
        return connection.recv(read).decode()


POST = "POST /gradio_api/queue/join HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"


@pytest.mark.slow
def test_strangers_pages_names_and_bodies_are_refused():
    with served(answering(Scripted("x"))) as url:
        own = url.removeprefix("http://")
        port = own.partition(":")[2]
        for host, status in (
            (own, "200"),
            (f"LOCALHOST:{port}", "200"),
            (f"[::1]:{port}", "200"),
            ("evil.example", "403"),
            (f"evil.example:{port}", "403"),
            (f"127.0.0.1.evil.example:{port}", "403"),
            ("localhost@evil.example", "403"),
            ("[::1", "403"),
            ("192.168.1.7", "403"),
            ("", "403"),
            ("a" * 2000, "403"),
        ):
            got = sent(url, f"GET /config HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            assert got.split()[1] == status, (host, got)
        for origin, status in (
            (f"http://{own}", "422"),  # let in, and no request of a page
            ("http://evil.example", "403"),
            (f"http://127.0.0.1:{int(port) + 1}", "403"),
            (f"http://localhost:{port}", "403"),
            ("null", "403"),
            ("http://[", "403"),
        ):
            head = POST.format(host=own) + f"Origin: {origin}\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{{}}"
            assert sent(url, head.encode()).split()[1] == status, origin
        for head, body, status in (
            ("Content-Length: 300000000", (), "413"),  # of which nothing is sent
            ("Content-Length: 300000000", [b"x" * 2**20] * 50, "413"),
            ("Transfer-Encoding: chunked", [b"100000\r\n" + b"x" * 2**20 + b"\r\n"] * 50, "413"),
            ("Content-Length: 400000", [b"[" * 400_000], "400"),
            ("Content-Length: 4", [b"\xff\xfe{}"], "400"),
        ):
            got = sent(url, f"{POST.format(host=own)}{head}\r\n\r\n".encode(), body)
            assert got.split()[1] == status, (head, got)
        for path in ("/gradio_api/upload", "/upload", "/gradio_api/component_server"):
            head = f"POST {path} HTTP/1.1\r\nHost: {own}\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            part = '--b\r\nContent-Disposition: form-data; name="files"; filename="x"\r\n\r\n1\r\n--b--\r\n'
            got = sent(url, f"{head}Content-Length: {len(part)}\r\n\r\n{part}".encode())
            assert got.split()[1] == "413", path


@pytest.mark.parametrize(
    "host, name, allowed, served",
    [
        ("127.0.0.1", "demo.example.org", (), False),
        ("127.0.0.1", "demo.example.org", ("demo.example.org",), True),
        ("127.0.0.1", "other.example.org", ("demo.example.org",), False),
        ("127.0.0.1", "any.example.org", ("*",), True),
        ("0.0.0.0", "192.168.1.7:7860", (), True),
        ("0.0.0.0", "[fe80::1]:7860", (), True),
        ("0.0.0.0", f"{socket.gethostname()}:7860", (), True),
        ("0.0.0.0", "evil.example", (), False),
        ("10.0.0.5", "localhost:7860", (), True),
    ],
)
def test_names_that_the_page_is_served_by(host, name, allowed, served):
    """A page of a proxy with a name of its own, too: its Origin is that name, and Host may be another one."""
    guard = DemoGuard(None, answering(Scripted()), host, allowed)
    assert (guard._of_strangers([("host", name)]) is None) == served
    if allowed == ("demo.example.org",):
        proxied = [("host", "127.0.0.1:7860"), ("origin", "https://demo.example.org")]
        assert guard._of_strangers(proxied) is None
    assert guard._of_strangers([("host", "127.0.0.1"), ("origin", "https://evil.example")]) is not None
    assert guard._of_strangers([]) is not None and guard._of_strangers([("host", "localhost")] * 2) is not None


@pytest.mark.slow
def test_posts_that_nobody_listens_to_hold_up_no_person(monkeypatch):
    import httpx

    monkeypatch.setattr(inference_demo, "ALONE", 5.0)
    model = Scripted("an answer")
    model.go.release(1)
    with (
        served(answering(model, concurrency=1)) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
    ):
        listeners = client.get("/config").json()["dependencies"]
        (number,) = [one["id"] for one in listeners if len(one["inputs"]) == 5]
        for session in range(60):
            data = ["Wait for ever.", "", 0, 1, 40]
            request = {"data": data, "fn_index": number, "session_hash": f"nobody {session}"}
            client.post("/gradio_api/queue/join", json=request).raise_for_status()
        told = list(events(client, "person", "Say it.", "", 0, 1, 40))
    assert told[-1]["msg"] in ("process_completed", "close_stream") and model.running == 0 and not model.go._value
    assert any("an answer" in json.dumps(event) for event in told), "the one place was free for who listens"


def test_a_request_that_is_left_alone_ends(monkeypatch):
    """Whether it has begun or waits."""
    monkeypatch.setattr(inference_demo, "ALONE", 0.2)
    model = Scripted()
    here = [True]

    async def run():
        engine = answering(model, concurrency=1)
        begun = engine.answer("a", "Count.", "", GREEDY, lambda: here[0])
        await anext(begun)
        never = engine.answer("b", "Count.", "", GREEDY, lambda: False)
        (last,) = [answers async for answers in never][-1:]
        assert last[0].status == "Stopped" and model.running <= 1
        here[0] = False
        (last,) = [answers async for answers in begun][-1:]
        assert last[0].ended and "Stopped after" in last[0].status

    asyncio.run(run())
    assert model.running == 0


# ---- in a real browser ----

CHROMIUM = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"  # noqa: E501


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("no Chromium to read the page with: apt install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM.split())
        yield browser
        browser.close()


class Page:
    """A tab that looks at a demo, and what it asked the network for."""

    def __init__(self, browser, url: str, width=1280, height=800, color_scheme="light"):
        self.tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=color_scheme)
        self.url, self.requests, self.complaints = url, [], []
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("console", lambda m: m.type in ("error", "warning") and self.complaints.append(m.text))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("response", lambda r: r.status >= 400 and self.complaints.append(f"{r.status} {r.url}"))
        self.tab.goto(url)
        self.tab.wait_for_selector("#ask")

    def sampling(self, **values: float) -> None:
        self.tab.get_by_role("button", name="Sampling").click()
        for name, value in values.items():

            def is_set(name=name, value=value) -> bool:  # faster than a person: the page may not be listening yet
                self.tab.fill(f"#{name} input[type=number]", str(value))
                self.tab.keyboard.press("Tab")
                return float(self.tab.input_value(f"#{name} input[type=range]")) == value

            self.wait(is_set)

    def ask(self, instruction: str, input: str = "") -> None:
        self.tab.fill("#instruction textarea", instruction)
        self.tab.fill("#input textarea", input)
        self.tab.click("#ask")

    def answer(self, number: int = 0) -> str:
        return self.tab.input_value(f"#answer_{number} textarea")

    def status(self, number: int = 0) -> str:
        return self.tab.inner_text(f"#status_{number}")

    def wait(self, right) -> None:
        for _ in range(600):
            if right():
                return
            self.tab.wait_for_timeout(50)
        pytest.fail(f"waited for 30 s; status {self.status()!r}, answer {self.answer()[-200:]!r}")

    def ended(self, words: str = "ed", number: int = 0) -> bool:
        return words in self.status(number) and self.tab.is_enabled("#ask") and not self.tab.is_enabled("#stop")

    def reload(self) -> None:
        assert self.complaints == []
        self.tab.reload()
        self.tab.wait_for_selector("#ask")
        self.complaints.clear()  # gradio's script aborts the stream that it leaves

    def close(self) -> None:
        """And nothing went wrong, or elsewhere."""
        self.tab.close()
        assert self.complaints == []
        assert [url for url in self.requests if not url.startswith((self.url, "data:", "blob:"))] == []
        assert len(self.requests) > 20


@contextmanager
def recorder():
    """A proxy that leads nowhere: its address, and the first line of each request that somebody sent out by it."""
    lines = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def record():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    lines.append(connection.recv(1000).split(b"\r\n")[0])

        threading.Thread(target=record, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", lines
        server.shutdown(socket.SHUT_RDWR)


@contextmanager
def command(folder, *flags):
    """python -m scripts.demo in a process of its own: its address, its log, and a function for its seconds of CPU time.
    It must not ask anybody for anything, and end with Ctrl-C."""
    port, log = quickstart.free_port(), folder / "demo.log"
    words = [sys.executable, "-u", "-m", "scripts.demo", "--port", str(port), *map(str, flags)]
    with recorder() as (proxy, went_out), open(log, "w") as file:
        names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        env = {**os.environ, "OMP_NUM_THREADS": "1", **dict.fromkeys((*names, *map(str.lower, names)), proxy)}
        for name in ("HF_HUB_OFFLINE", "NO_PROXY", "no_proxy", "GRADIO_ANALYTICS_ENABLED"):
            env.pop(name, None)
        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)
        try:
            for _ in range(1200):
                if "Ctrl-C ends it" in log.read_text() or process.poll() is not None:
                    break
                time.sleep(0.1)
            assert process.poll() is None, log.read_text()
            yield (
                f"http://127.0.0.1:{port}",
                log.read_text,
                lambda: sum(
                    int(ticks) / os.sysconf("SC_CLK_TCK")
                    for ticks in Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
                ),
            )
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()
        assert went_out == []


def until_idle(cpu_seconds) -> None:
    for _ in range(30):
        before = cpu_seconds()
        time.sleep(1)
        if cpu_seconds() - before < 0.1:
            return
    pytest.fail("the server has been busy for 30 s")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A model that talks for a while: greedy, it does not come to an end of its own."""
    return make_tiny_model(tmp_path_factory.mktemp("chatty"), hidden_size=256, num_hidden_layers=6)


@pytest.mark.stress
def test_type_submit_stream_stop_reload_close(browser, chatty, tmp_path):
    with command(tmp_path, "--model", chatty) as (url, log, cpu_seconds):
        page = Page(browser, url)
        assert chatty.name in page.tab.title() and chatty.name in page.tab.inner_text("h1")
        page.sampling(temperature=0, max_tokens=1900)
        page.ask("Write about the sea.")
        seen = set()
        page.wait(lambda: seen.add(page.answer()) or len(seen) > 4)
        lengths = sorted(map(len, seen))
        assert lengths[0] < lengths[-1] and not page.tab.is_enabled("#ask")
        page.tab.click("#stop")
        page.wait(lambda: page.ended("Stopped after"))
        text = page.answer()
        until_idle(cpu_seconds)
        assert page.answer() == text and "Stopped after" in log()

        page.ask("Write about the sea.", "As a poem.")  # another one after it, and away in the middle of it
        page.wait(lambda: len(page.answer()) > 20 and page.answer() != text)
        page.reload()
        until_idle(cpu_seconds)
        assert log().count("Stopped after") == 2 and page.answer() == ""

        page.sampling(temperature=0, max_tokens=20)
        page.tab.get_by_text("A slogan").click()
        page.wait(lambda: "slogan for a small bicycle" in page.tab.input_value("#instruction textarea"))
        page.wait(lambda: page.ended("Ended at its limit of 20 tokens"))
        short = page.answer()
        expected = LocalModel(chatty).generate([format_prompt(demo.examples()[0])], Sampling(20, 0.0))
        assert short == expected[0].text

        page.sampling()  # closes the panel, and what it is set to remains
        page.tab.fill("#instruction textarea", "Go on,")
        page.tab.keyboard.press("Shift+Enter")
        page.tab.keyboard.type("please.")
        page.tab.keyboard.press("Enter")
        page.wait(lambda: page.ended("Ended at its limit of 20 tokens") and page.answer() != short)
        assert page.tab.input_value("#instruction textarea") == "Go on,\nplease."
        expected = LocalModel(chatty).generate([format_prompt({"instruction": "Go on,\nplease."})], Sampling(20, 0.0))
        assert page.answer() == expected[0].text
        tokens = expected[0].completion_tokens
        assert re.search(rf"after [\d.]+ s: {tokens} tokens, [\d.]+ tokens/s$", page.status())
        page.close()

        gone = Page(browser, url)
        gone.sampling(temperature=0, max_tokens=1900)
        gone.ask("Write about the sea.")
        gone.wait(lambda: len(gone.answer()) > 20)
        gone.close()
        until_idle(cpu_seconds)
        assert log().count("Stopped after") == 3 and "Traceback" not in log()


@pytest.mark.stress
def test_two_pages_are_answered_at_once_and_stop_apart(browser, chatty, tmp_path):
    with command(tmp_path, "--model", chatty) as (url, log, cpu_seconds):
        pages = [Page(browser, url) for _ in range(2)]
        for page in pages:
            page.sampling(temperature=0, max_tokens=1900)
        for page, about in zip(pages, ("sea", "hills")):
            page.ask(f"Write about the {about}.")
        for page in pages:
            page.wait(lambda page=page: len(page.answer()) > 20)
        assert not any(page.ended() for page in pages), "the second begins before the first has ended"
        pages[0].tab.click("#stop")
        pages[0].wait(lambda: pages[0].ended("Stopped"))
        length = len(pages[1].answer())
        pages[1].wait(lambda: len(pages[1].answer()) > length)
        assert "Writing" in pages[1].status() and pages[0].answer() != pages[1].answer()
        for page in pages:
            page.close()
        until_idle(cpu_seconds)


@pytest.mark.stress
def test_side_by_side(browser, tiny, adapter, tmp_path):
    with command(tmp_path, "--model", adapter, "--base", tiny("llama")) as (url, log, _):
        page = Page(browser, url)
        page.sampling(temperature=0, max_tokens=30)
        page.ask("Name two oceans.")
        page.wait(lambda: page.ended("Ended") and page.ended("Ended", 1))
        prompt = format_prompt({"instruction": "Name two oceans."})
        expected = [
            voice.model.generate([prompt], Sampling(30, 0.0))[0].text
            for voice in voices(model=adapter, base=tiny("llama"))
        ]
        assert [page.answer(0), page.answer(1)] == expected and expected[0] != expected[1]
        assert "adapter" in page.tab.inner_text("#answer_0") and "llama" in page.tab.inner_text("#answer_1")
        page.close()


@pytest.mark.stress
def test_text_stays_text_limits_and_errors(browser):
    evil = "<script>document.title = 'gone'</script><img src=x onerror=\"document.title = 'gone'\"> **bold** & so on"
    model, broken = Scripted(evil), Scripted("some", RuntimeError("<b>CUDA</b> error: device-side assert"))
    with served(answering(model, broken, concurrency=1)) as url:
        page, other = Page(browser, url), Page(browser, url)
        page.ask("Say it.")
        page.wait(lambda: "Reading" in page.status())
        other.ask("Me too.")
        other.wait(lambda: "Waiting" in other.status())
        other.tab.click("#stop")
        other.wait(lambda: other.ended("Stopped"))
        for one in (model, broken):
            one.go.release(3)
        page.wait(lambda: page.ended("Ended"))
        assert page.answer() == evil and "Alpaca" in page.tab.title()
        assert page.status(1) == "The model failed: RuntimeError: <b>CUDA</b> error: device-side assert"
        assert page.answer(1) == "some"
        page.ask("x" * 90, "y" * 20)
        page.wait(lambda: page.ended("Too long: instruction and input have 110 characters, of at most 100."))
        assert page.tab.input_value("#instruction textarea") == "x" * 90, "not cut"
        page.ask("")
        page.wait(lambda: page.ended("Write an instruction first."))
        page.close()
        other.close()


@pytest.mark.stress
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_at_a_phones_width(browser, scheme):
    with served(answering(Scripted("word " * 200), Scripted("longword" * 200))) as url:
        page = Page(browser, url, 360, 740, scheme)
        assert page.tab.is_visible("#answer_0") and page.tab.is_visible("#answer_1")
        page.sampling()
        wide = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
        assert page.tab.evaluate(f"{wide}.map(e => e.outerHTML.slice(0, 100))") == []
        background = page.tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
        page.close()


@pytest.mark.stress
@pytest.mark.parametrize("width, height", [(390, 844), (360, 640), (1280, 800)])
def test_a_click_on_an_example_asks_and_shows_the_answer(browser, width, height):
    """Also in the middle of another answer, which it ends; and so do the button and Enter."""
    model, other = Scripted(), Scripted()
    model.go.release(3)
    with served(answering(model, other, max_characters=1000)) as url:
        page = Page(browser, url, width, height)
        assert demo.KEYS in page.tab.inner_text("body")
        shown = "(box => box.top >= 0 && box.top + 160 <= innerHeight)"
        in_sight = f"{shown}(document.querySelector('#answer_0').getBoundingClientRect())"
        for label in ("A slogan", "Is the egg fresh?"):
            page.tab.get_by_text(label).click()
            example = demo.examples()[list(demo.EXAMPLES).index(label)]
            page.wait(lambda example=example: page.tab.input_value("#instruction textarea") == example["instruction"])
            page.wait(lambda: model.running == 1 and page.tab.is_enabled("#stop") and page.tab.evaluate(in_sight))
            model.go.release(3)
            page.wait(lambda: page.answer() == "0 1 2 ")
        page.tab.click("#stop")
        page.wait(lambda: page.ended("Stopped"))
        for ask in (lambda: page.tab.click("#ask"), lambda: page.tab.press("#input textarea", "Enter")):
            page.tab.evaluate("scrollTo(0, 0)")
            page.tab.fill("#instruction textarea", "Count.")
            ask()
            page.wait(lambda: model.running == 1 and page.tab.is_enabled("#stop") and page.tab.evaluate(in_sight))
            page.tab.click("#stop")
            page.wait(lambda: page.ended("Stopped"))
        page.close()


def photograph(browser, url: str, full: Path, picture: Path) -> None:
    """The page with the answer that the quickstart's model knows by heart."""
    from PIL import Image

    page = Page(browser, url, 1180, 760)
    page.sampling(temperature=0)
    page.tab.get_by_role("button", name="Sampling").click()
    page.tab.get_by_text(PICTURED).click()
    page.wait(lambda: page.ended("Ended after"))
    task = demo.examples()[list(demo.EXAMPLES).index(PICTURED)]
    assert page.answer() == task["output"]
    page.tab.screenshot(path=full)
    page.close()
    Image.open(full).convert("RGB").quantize(64).save(picture, optimize=True)
    assert picture.stat().st_size < 200_000


@pytest.mark.stress
def test_the_readmes_picture(browser, tmp_path):
    """The quickstart's model, trained here, answers on the page as the seed task does."""
    make_tiny_model(tmp_path / "base", hidden_size=256, num_hidden_layers=2)
    flags = {**quickstart.README_FLAGS, **quickstart.differences(tmp_path, 2, 10)}
    run(quickstart.torchrun_command({**flags, "--output_dir": str(tmp_path / "tiny-alpaca")}), timeout=900)
    with command(tmp_path, "--model", tmp_path / "tiny-alpaca") as (url, _, _):
        photograph(browser, url, tmp_path / "full.png", Path(os.environ.get("DEMO_PICTURE", tmp_path / "demo.png")))
