"""The completion client against a real HTTP server that misbehaves on demand, and against `transformers serve`."""

import asyncio
import email.utils
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from support.completion_server import (
    BAD_KEY,
    DROP,
    EMPTY,
    HANG,
    MAX_TOKENS_REFUSED,
    NO_MODEL,
    OVERFLOW,
    QUOTA,
    SHORT,
    TRUNCATED,
    CompletionServer,
    Fault,
    echo,
    openai_error,
)

from alpaca.common.errors import UsageError
from alpaca.completions.api import RequestFailed, Sampling
from alpaca.data.prompts import PROMPT_DICT, format_prompt
from alpaca.inference.client import Client, is_openai, server_url
from alpaca.inference.server_errors import NoResponse, seconds_to_wait
from scripts.quickstart import free_port

FEW = Sampling(max_tokens=100)


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ORG", "OPENAI_ORG_ID"):
        monkeypatch.delenv(name, raising=False)


def ask(server, prompt="Say it.", sampling=FEW, model="tiny", api="completions", **options):
    """One completion, without check()."""

    async def run():
        async with Client(model, server.url, api, **{"backoff": 0.01, "timeout": 5, **options}) as client:
            return await client.complete(prompt, sampling)

    return asyncio.run(run())


def check(server, model="tiny", api="auto", **options):
    """check() and a completion -> what check() said, the client."""

    async def run():
        async with Client(model, server.url, api, **{"backoff": 0.01, "timeout": 5, **options}) as client:
            said = await client.check()
            await client.complete("Say it.", FEW)
            return said, client

    return asyncio.run(run())


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_sends_what_was_asked_and_reads_the_answer(api):
    with CompletionServer() as server:
        got = ask(server, "one two three", api=api)
    assert (got.text, got.finish_reason) == (echo("one two three", {}), "stop")
    assert (got.prompt_tokens, got.completion_tokens) == (3, 5)
    (request,) = server.requests
    prompt = {"prompt": "one two three"}
    if api == "chat":
        prompt = {"messages": [{"role": "user", "content": "one two three"}]}
    expected = {"model": "tiny", "max_tokens": 100, "temperature": 0.2, "top_p": 1.0} | prompt
    assert request.body == expected, "stop, seed, logit_bias, n only on request"
    assert request.headers["authorization"] == "Bearer none"


def test_every_option_reaches_the_server():
    sampling = Sampling(
        9, 0.0, 0.5, stop=("\n20", "20."), seed=0, logit_bias={50256: -100}, extra={"presence_penalty": 0.5}
    )
    with CompletionServer(lambda prompt, body: "a b 20. c") as server:
        got = ask(server, sampling=sampling)
    body = server.requests[0].body
    assert got.text == "a b " and body.pop("prompt")
    assert body == {
        "model": "tiny",
        "max_tokens": 9,
        "temperature": 0.0,
        "top_p": 0.5,
        "stop": ["\n20", "20."],
        "seed": 0,
        "logit_bias": {"50256": -100.0},
        "presence_penalty": 0.5,
    }
    assert isinstance(body["logit_bias"]["50256"], float), "transformers serve answers 500 to an int"


def test_none_is_not_sent():
    with CompletionServer() as server:
        ask(server, sampling=Sampling(9, None, None))
    assert set(server.requests[0].body) == {"model", "prompt", "max_tokens"}


def test_text_ends_at_a_stop_string_that_the_server_left_in():
    """`transformers serve` does. Where a server says that it stopped, its text is taken as it is, as in 2023."""
    for text, reason, expected in (
        ("one STOP two END", "length", ("one ", "stop")),
        ("one END", "stop", ("one ", "stop")),
        ("one STOP two", "stop", ("one STOP two", "stop")),
        ("one", "length", ("one", "length")),
    ):
        with CompletionServer(lambda prompt, body, answer=(text, reason): answer) as server:
            got = ask(server, sampling=Sampling(stop=("END", "STOP")))
        assert (got.text, got.finish_reason) == expected


def test_length_and_missing_usage():
    with CompletionServer(lambda prompt, body: "w " * 50) as server:
        assert ask(server, sampling=Sampling(max_tokens=7)).finish_reason == "length"
        answer = {"choices": [{"message": {"content": None}, "finish_reason": None}]}
        server.script = [Fault(200, body=answer)]
        got = ask(server)
    assert (got.text, got.finish_reason, got.prompt_tokens, got.completion_tokens) == ("", "unknown", None, None)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(500),
        Fault(503, body=b"<html>busy</html>"),
        Fault(408),
        Fault(409),
        Fault(429),
        DROP,
        TRUNCATED,
        SHORT,
        EMPTY,
        Fault(200, body=b"[]"),
        Fault(200, body={"error": {"message": "overloaded"}}),
        Fault(200, body=b""),
    ],
    ids=str,
)
def test_passing_faults_are_asked_again(fault):
    with CompletionServer(script=[fault, fault]) as server:
        assert ask(server).text == echo("Say it.", {})
        assert len(server.requests) == 3
        server.script = [fault] * 9
        with pytest.raises(RequestFailed, match="Gave up after 3 attempts") as raised:
            ask(server, max_retries=2)
        assert isinstance(raised.value, NoResponse) == (fault in (DROP, SHORT)), "only then may the server be gone"
    assert server.url in str(raised.value) and len(server.requests) == 6


def test_a_hanging_server_times_out_and_is_asked_again():
    with CompletionServer(script=[HANG]) as server:
        assert ask(server, timeout=0.2).text == echo("Say it.", {})


def test_waits_as_long_as_it_is_told():
    date = email.utils.formatdate(time.time() + 2, usegmt=True)
    assert 0.5 < seconds_to_wait({"retry-after": date}) <= 2
    assert seconds_to_wait({"retry-after": "7", "retry-after-ms": "250"}) == 0.25
    for nothing in (
        {},
        {"retry-after": "0"},
        {"retry-after": "soon"},
        {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"},
    ):
        assert seconds_to_wait(nothing) is None
    with CompletionServer(script=[Fault(429, headers={"Retry-After": "0.3"}), Fault(429)]) as server:
        ask(server, backoff=0.001)
        first, second, third = (request.time for request in server.requests)
        assert second - first >= 0.3 and third - second < 0.25
        server.script = [Fault(429, headers={"Retry-After": "3600"})]
        with pytest.raises(RequestFailed, match="asks to wait 3600 s"):
            ask(server)


def test_pauses_double_and_differ(monkeypatch):
    pauses, real_sleep = [], asyncio.sleep
    monkeypatch.setattr("alpaca.inference.client.asyncio.sleep", lambda s: pauses.append(s) or real_sleep(0))
    with CompletionServer(script=[Fault(500)] * 9) as server, pytest.raises(RequestFailed):
        ask(server, max_retries=8, backoff=0.5)
    assert len(pauses) == 8
    for n, pause in enumerate(pauses):
        top = min(0.5 * 2**n, 30)
        assert top / 2 <= pause <= top
    assert pauses[0] / 0.5 != pauses[1] / 1.0


@pytest.mark.parametrize(
    "fault, words",
    [
        (QUOTA, "no credit left"),
        (Fault(402, {"message": "Insufficient Balance"}), "no credit left"),
        (BAD_KEY, "OPENAI_API_KEY"),
        (Fault(403, {"message": "no access"}), "OPENAI_API_KEY"),
        (NO_MODEL, "offers: tiny, small"),
        (Fault(404, {"message": 'model "x" not found, try pulling it', "type": "not_found_error"}), "offers: tiny"),
        (Fault(404, body={"detail": "Not Found"}), "base_url .* /v1"),
        (openai_error(404, None, "This is a chat model, not supported in the v1/completions endpoint."), "api chat"),
        (
            openai_error(
                400, "unsupported_value", "Unsupported value: 'temperature' does not support 0.2", "temperature"
            ),
            "temperature 0.2",
        ),
        (
            openai_error(400, "unsupported_parameter", "Unsupported parameter: 'stop' is not supported", "stop"),
            r"stop \['END'\]",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_concerns_all_requests_ends_the_run_at_once(fault, words):
    with CompletionServer(script=[fault], models=("tiny", "small")) as server:
        with pytest.raises(UsageError, match=words):
            ask(server, sampling=Sampling(stop=("END",)))
    assert len(server.requests) == 1, "not asked again"


def test_what_concerns_one_prompt_fails_it_alone():
    refused = openai_error(400, "content_policy_violation", "Your prompt is not allowed.")
    with CompletionServer(faults=lambda request: refused if "bad" in request.prompt else None) as server:

        async def run():
            async with Client("tiny", server.url, "chat", backoff=0.01) as client:
                asked = [client.complete(prompt, FEW) for prompt in ("good", "bad", "fine")]
                return await asyncio.gather(*asked, return_exceptions=True)

        good, bad, fine = asyncio.run(run())
    assert (good.text, fine.text) == (echo("good", {}), echo("fine", {}))
    assert isinstance(bad, RequestFailed) and "not allowed" in str(bad) and not isinstance(bad, UsageError)
    assert len(server.requests) == 3


def test_x_should_retry_is_heeded():
    with CompletionServer(script=[Fault(500, headers={"x-should-retry": "false"})]) as server:
        with pytest.raises(RequestFailed):
            ask(server)
    assert len(server.requests) == 1


VLLM = {
    "message": "This model's maximum context length is 2048 tokens. However, you requested 3000 output tokens and your "
    "prompt contains at least 9 input tokens.",
    "type": "BadRequestError",
    "param": "input_tokens",
    "code": 400,
}
LLAMA_CPP = {
    "code": 400,
    "message": "in other words than today's",  # as it has a type for this
    "type": "exceed_context_size_error",
}


@pytest.mark.parametrize(
    "error",
    [OVERFLOW, Fault(400, VLLM), Fault(400, body={"object": "error"} | VLLM), Fault(500, LLAMA_CPP)],
    ids=["openai", "vllm", "older vllm", "llama.cpp"],
)
def test_a_context_too_small_costs_a_fifth_of_max_tokens_each_time(error, caplog):
    with CompletionServer(faults=lambda request: error if request.body["max_tokens"] > 1960 else None) as server:
        assert ask(server, sampling=Sampling(max_tokens=3072)).text
    assert [request.body["max_tokens"] for request in server.requests] == [3072, 2457, 1965, 1572]
    assert "max_tokens 3072 -> 2457" in caplog.text


def test_a_prompt_too_long_by_itself_fails_after_a_few_cuts():
    with CompletionServer(faults=lambda request: OVERFLOW) as server:
        with pytest.raises(RequestFailed, match="prompt alone is too long"):
            ask(server, sampling=Sampling(max_tokens=1000))
        assert len(server.requests) == 13
        with pytest.raises(RequestFailed, match="prompt alone is too long"):
            ask(server, sampling=Sampling(max_tokens=1))


def test_newer_chat_models_take_max_completion_tokens():
    with CompletionServer(
        faults=lambda request: MAX_TOKENS_REFUSED if "max_tokens" in request.body else None
    ) as server:

        async def run():
            async with Client("tiny", server.url, "chat") as client:
                await asyncio.gather(*(client.complete(f"{n}", FEW) for n in range(3)))
                await client.complete("later", FEW)

        asyncio.run(run())
    sent = ["max_tokens" if "max_tokens" in request.body else "max_completion_tokens" for request in server.requests]
    assert sent == ["max_tokens"] * 3 + ["max_completion_tokens"] * 4
    assert server.requests[-1].body["max_completion_tokens"] == 100


def test_many_at_once_keep_their_order_and_their_connections():
    with CompletionServer(delay=0.02) as server:

        async def run():
            async with Client("tiny", server.url, "chat") as client:
                return await asyncio.gather(*(client.complete(f"prompt {n}", FEW) for n in range(64)))

        got = asyncio.run(run())
    assert [completion.text for completion in got] == [echo(f"prompt {n}", {}) for n in range(64)]
    assert server.busiest > 8


# check(), before any work


def test_auto_takes_chat_where_it_is_answered_and_else_completions():
    with CompletionServer() as server:
        said, client = check(server)
        assert client.api == "chat" and "chat endpoint (the server answers chat requests)" in said
        no_template = Fault(400, {"message": "default chat template is no longer allowed, so you must provide one"})
        for fault in (no_template, Fault(404, body={"detail": "Not Found"}), Fault(500, body=b"Internal Server Error")):
            server.faults = lambda request, fault=fault: fault if "chat" in request.path else None
            said, client = check(server)
            assert client.api == "completions" and "completions endpoint" in said
            assert server.requests[-1].path == "/v1/completions"
        server.faults = lambda request: no_template
        with pytest.raises(UsageError, match="Neither the chat nor the completion endpoint"):
            check(server)


def test_auto_on_openai_goes_by_the_name(monkeypatch):
    monkeypatch.setattr("alpaca.inference.client.is_openai", lambda url: True)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    models = {"gpt-3.5-turbo-instruct": "completions", "davinci-002": "completions", "gpt-4o": "chat", "o3": "chat"}
    with CompletionServer(models=tuple(models)) as server:
        for model, api in models.items():
            assert check(server, model)[1].api == api
    assert len(server.requests) == len(models), "a model that is listed is not tried first"
    assert is_openai("https://api.openai.com/v1") and is_openai("https://eu.api.openai.com/v1")
    assert not is_openai("http://localhost:8000/v1") and not is_openai("https://api.openai.com.example.org/v1")


def test_an_unknown_model_is_told_before_any_work():
    with CompletionServer(models=("gpt-4o", "gpt-3.5-turbo-instruct"), faults=lambda request: NO_MODEL) as server:
        for api in ("auto", "completions"):
            with pytest.raises(UsageError, match="January 2024(.|\n)*offers: gpt-4o, gpt-3.5-turbo-instruct"):
                check(server, "text-davinci-003", api)


def test_a_model_that_is_served_though_not_listed_is_fine():
    with CompletionServer(models=("another",)) as server:
        assert check(server, api="completions")[1].api == "completions"
    with CompletionServer(models=()) as server:  # no list at all: 404
        assert check(server, api="completions")[1].api == "completions"


def test_no_server_no_key_no_address(monkeypatch):
    with socket.socket() as taken:  # bound, not listening: refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"

        class Nobody:
            pass

        Nobody.url = url
        with pytest.raises(UsageError, match=f"{url}(.|\n)*base_url(.|\n)*OPENAI_BASE_URL"):
            check(Nobody)
    with pytest.raises(UsageError, match="OPENAI_API_KEY is not set"):
        Client("gpt-4o")
    with pytest.raises(UsageError, match="api: .* got 'responses'"):
        Client("gpt-4o", "http://localhost:1/v1", "responses")
    with pytest.raises(UsageError, match="base_url: expected .* got 'localhost:8000'"):
        server_url("localhost:8000")
    monkeypatch.setenv("OPENAI_BASE_URL", "http:/x")
    with pytest.raises(UsageError, match="OPENAI_BASE_URL: expected"):
        server_url(None)


def test_key_organization_and_address_come_from_the_environment(monkeypatch):
    with CompletionServer() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")
        monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
        monkeypatch.setenv("OPENAI_ORG", "org-1")

        async def run():
            async with Client("tiny", api="chat") as client:
                await client.check()
                await client.complete("x", FEW)

        asyncio.run(run())
    for request in (server.requests[0], server.other_requests[0]):
        assert request.headers["authorization"] == "Bearer sk-1"
        assert request.headers["openai-organization"] == "org-1"


def test_a_server_whose_list_of_models_is_broken_is_asked_all_the_same():
    with CompletionServer() as server:
        server.other_faults = lambda request: Fault(500, body=b"Internal Server Error")  # `transformers serve` does so
        said, client = check(server)
        assert client.api == "chat" and len(server.requests) == 2
        server.faults = lambda request: NO_MODEL
        with pytest.raises(UsageError, match="Give a model that the server has, got 'tiny'"):
            check(server, api="completions")


def test_a_wrong_key_is_told_before_any_work():
    with CompletionServer() as server:
        server.other_faults = lambda request: BAD_KEY
        with pytest.raises(UsageError, match="OPENAI_API_KEY"):
            check(server)
    assert not server.requests


def test_importing_the_client_costs_nothing():
    code = "import alpaca.inference.client, sys; assert not {'torch', 'openai', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.fixture
def transformers_serve(tiny, tmp_path):
    """serve(chat_template) -> the base URL and model name of a `transformers serve` process."""
    processes = []

    def serve(chat_template=None):
        folder, port = shutil.copytree(tiny("llama"), tmp_path / f"model_{len(processes)}"), free_port()
        if chat_template:
            (folder / "chat_template.jinja").write_text(chat_template)
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--device", "cpu"]
        command += ["--host", "127.0.0.1", "--port", port]
        log = open(tmp_path / "serve.log", "wb")
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen([str(word) for word in command], stdout=log, stderr=log, env=env, start_new_session=True)
        )
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return f"http://127.0.0.1:{port}/v1", str(folder)
            assert processes[-1].poll() is None, (tmp_path / "serve.log").read_text()[-3000:]
            time.sleep(0.2)
        pytest.fail((tmp_path / "serve.log").read_text()[-3000:])

    yield serve
    for process in processes:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
def test_transformers_serve(transformers_serve, tiny):
    from alpaca.data.chat_template import chat_template
    from alpaca.data.tokenizer import open_tokenizer
    from alpaca.inference.local_model import LocalModel

    async def run(url, model, api, prompts, sampling):
        async with Client(model, url, api, backoff=0.05) as client:
            await client.check()
            return client.api, await asyncio.gather(*(client.complete(prompt, sampling) for prompt in prompts))

    prompts = ["What is it?", "Give three tips for it."]
    greedy = Sampling(max_tokens=8, temperature=0.0, seed=1)
    url, model = transformers_serve(chat_template(open_tokenizer(tiny("llama")), PROMPT_DICT))
    for asked, api, chat in (("auto", "chat", True), ("completions", "completions", False)):
        found, got = asyncio.run(run(url, model, asked, prompts, greedy))
        expected = LocalModel(model, chat=chat).generate(prompts, greedy)
        assert found == api
        assert [(one.finish_reason, one.prompt_tokens, one.completion_tokens) for one in got] == [
            ("length", one.prompt_tokens, 8) for one in expected
        ]
        # the server decodes the new tokens alone, and so loses a space at the start
        assert [one.text.strip() for one in got] == [one.text.strip() for one in expected]
        texts = (LocalModel(model, chat=chat).generate(prompts, Sampling(n, 0.0))[1].text for n in range(1, 9))
        stop = next(text[-2:] for text in texts if re.search("[a-z]{2}$", text))  # the server stops behind a token
        _, (_, got) = asyncio.run(run(url, model, asked, prompts, Sampling(8, 0.0, stop=(stop,), logit_bias={3: -9})))
        assert (got.text.strip(), got.finish_reason) == (expected[1].text.strip().split(stop)[0], "stop")
    # chat with the saved chat template is the prompt of the training, however it is spelt
    rows = [{"instruction": "Be brief.\n\nTranslate it.", "input": "Guten Tag!"}, {"instruction": prompts[1]}]
    system, text = {"role": "system", "content": "Be brief."}, "Translate it.\n\n### Input:\nGuten Tag!"
    spelt = [[system, {"role": "user", "content": content}] for content in (text, [{"type": "text", "text": text}])]
    _, got = asyncio.run(run(url, model, "chat", [*spelt, prompts[1]], greedy))
    one, two = LocalModel(model).generate([format_prompt(row) for row in rows], greedy)
    expected = [(one.prompt_tokens, one.text.strip())] * 2 + [(two.prompt_tokens, two.text.strip())]
    assert [(answer.prompt_tokens, answer.text.strip()) for answer in got] == expected and one.text != two.text
    with pytest.raises(UsageError, match="pinned to .*(.|\n)*that the server has, got 'another'"):
        asyncio.run(run(url, "another", "auto", prompts, greedy))
    url, model = transformers_serve()  # a base model: chat is answered with 500
    assert asyncio.run(run(url, model, "auto", prompts, greedy))[0] == "completions"
