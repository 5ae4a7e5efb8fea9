"""Servers that lie, leak, drip and inflate, over real HTTP: each answer ends in a message or in a counted entry of the
journal."""

import asyncio
import base64
import gzip
import json
import random
import sys
import zlib

import pytest
from support.completion_server import BAD_KEY, CompletionServer, Fault, Raw, openai_error

from alpaca.common.errors import UsageError, masked, reported
from alpaca.completions.api import Request, RequestFailed, Sampling, split_reasoning, was_cut, whole_characters
from alpaca.completions.budget import Budget
from alpaca.completions.rows import BatchCompletion
from alpaca.datagen.backtranslation import parse_score
from alpaca.evaluation.judge import read_preference
from alpaca.inference import server_errors
from alpaca.inference.backend import BackendFlags, ModelBackend, open_backend
from alpaca.inference.client import Client, server_url
from generate_instruction import generate_instruction_following_data, generate_responses

pytestmark = pytest.mark.slow  # many small cases

FEW = Sampling(max_tokens=100)
KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ORG", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.delenv(name, raising=False)


def ask(url, prompt="Say it.", sampling=FEW, api="chat", check=False, **options):
    async def run():
        async with Client("tiny", url, api, **{"backoff": 0.001, "timeout": 5, "max_retries": 1, **options}) as client:
            told = await client.check() if check else ""
            return told, await client.complete(prompt, sampling)

    return asyncio.run(run())


def body(text="Yes.", reason="stop", usage=None, **more):
    return {"choices": [{"message": {"content": text, **more}, "finish_reason": reason}], "usage": usage}


def answer_of(content, **options):
    """The Completion that a server's body becomes."""
    with CompletionServer(faults=lambda request: Fault(200, body=content)) as server:
        return ask(server.url, **options)[1]


def rows_answered(tmp_path, content, number=6, limit=None, **more):
    """Ask for rows with `content` as every answer. Return the journal, the budget and the error."""
    budget = Budget(1.0, 100.0, limit)
    path = str(tmp_path / "out.json")
    with CompletionServer(faults=content if callable(content) else lambda request: Fault(200, body=content)) as server:
        model = Client("tiny", server.url, "completions", 1, 5, 0.001)
        batch = BatchCompletion(model, FEW, path, {}, 4, budget, **more)
        error = None
        try:
            batch.answers([Request(f"Row {key}.", key) for key in range(number)])
        except UsageError as raised:
            error = raised
    entries = [json.loads(line) for line in (tmp_path / "out.json.journal.jsonl").read_text().splitlines()]
    return entries, budget, error


# ---- secrets ----


@pytest.mark.parametrize("key", [f"{KEY}\n", f"  {KEY} ", f"{KEY}\r\n", f"\t{KEY}"])
def test_blanks_around_a_key_are_stripped(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with CompletionServer() as server:
        ask(server.url)
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "OPENAI_ORG", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"])
@pytest.mark.parametrize(
    "value", ["sk-sécret-0123456789", "sk-sec\nret-0123456789", "sk-\x1bsecret", "sk-secret\ud800", "密钥"]
)
def test_a_key_that_is_no_header_is_refused_and_not_shown(monkeypatch, name, value):
    monkeypatch.setitem(sys.modules["os"].environ, "OPENAI_API_KEY", "sk-1")
    real = sys.modules["os"].environ.get
    monkeypatch.setattr(
        "alpaca.inference.client.os.environ",
        {name: value} if name == "OPENAI_API_KEY" else {"OPENAI_API_KEY": "sk-1", name: value},
    )
    assert real("OPENAI_API_KEY") == "sk-1"
    with pytest.raises(UsageError, match=f"{name}: character .* cannot be sent in a header") as raised:
        Client("tiny", "http://localhost:1/v1")
    assert value[:5] not in str(raised.value) and "ret" not in str(raised.value)


def leaks(request):
    """Everything that was sent, in words of the server's own."""
    return f"bad request: {request.headers} {request.headers.get('authorization')} {request.path}"


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500])
@pytest.mark.parametrize("kind", ["key", "password", "query"])
def test_what_a_server_echoes_is_masked(monkeypatch, tmp_path, status, kind, capsys):
    secret = {"key": KEY, "password": "pa55word!x", "query": "q-secret-77"}[kind]
    with CompletionServer() as server:
        server.faults = lambda request: Fault(status, {"message": leaks(request)})
        server.other_faults = server.faults
        url = server.url
        if kind == "key":
            monkeypatch.setenv("OPENAI_API_KEY", KEY)
        elif kind == "password":
            url = url.replace("://", "://me:pa55word%21x@")
        else:
            url += "?api-key=q-secret-77&api-version=1"
        with pytest.raises((UsageError, RequestFailed)) as raised:
            ask(url)
        with pytest.raises((UsageError, RequestFailed)) as of_check:
            ask(url, check=True, api="auto")
        (tmp_path / "rows.json").write_text('[{"instruction": "a", "output": "b"}]')
        with pytest.raises(UsageError):
            generate_responses(str(tmp_path / "rows.json"), str(tmp_path / "o.json"), "tiny", base_url=url, api="chat")
    login = base64.b64encode(b"me:pa55word!x").decode()
    printed = capsys.readouterr()
    told = [str(raised.value), str(of_check.value), printed.out, printed.err, repr(raised.value.__cause__)]
    told += [path.read_text() for path in tmp_path.iterdir()]
    for text in told:
        assert secret not in text and login not in text and "pa55word" not in text
    assert "***" in told[0]


def test_a_key_in_an_answer_reaches_no_file(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    entries, _, error = rows_answered(tmp_path, body(f"It is {KEY}, {KEY}.", f"stop {KEY}", reasoning_content=KEY))
    assert error is None and KEY not in json.dumps(entries)
    assert [entry["text"] for entry in entries if entry["kind"] == "answer"] == ["It is ***, ***."] * 6


def test_placeholders_of_servers_without_keys_stay_words(monkeypatch):
    for word in ("none", "EMPTY", "ollama", "abc"):
        monkeypatch.setenv("OPENAI_API_KEY", word)
        assert answer_of(body(f"It is {word}.")).text == f"It is {word}."


@pytest.mark.parametrize(
    "text",
    [
        "cannot reach https://user:hunter2@host/v1",
        "cannot reach https://user:hunter2/x@host/v1",
        "https://host/v1?api-version=1&api_key=hunter2&x=1",
        "header Authorization: Bearer hunter2hunter2",
        "{'api_key': 'hunter2'}",
        "Incorrect key sk-proj-hunter2hunter2",
    ],
)
def test_what_looks_like_a_secret_is_masked_in_messages(text, capsys, monkeypatch):
    assert "hunter2" not in masked(text) and "***" in masked(text)
    with pytest.raises(SystemExit) as ended, reported("program"):
        raise UsageError(text)
    assert ended.value.code == 2
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    with pytest.raises(RuntimeError), reported("program"):
        raise RuntimeError(text)
    try:
        raise RuntimeError(text)
    except RuntimeError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    printed = capsys.readouterr()
    assert "hunter2" not in printed.err.partition("reported")[0].replace(f"raise RuntimeError({text!r})", "")


# ---- addresses ----


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "http://localhost:port/v1",
        "http://localhost:99999/v1",
        "http://localhost:-1/v1",
        "http://local host/v1",
        "http://[::1/v1",
        "http://",
        "http://:80/v1",
        "ftp://localhost/v1",
        "http://localhost/v1#part",
        "http://local\x00host/v1",
        "http://" + "a" * 300 + "/v1",
        "http://xn--\ud800/v1",
        "http://me:hunter2@host:port/v1",
    ],
)
def test_what_is_no_address_is_one_message(url):
    with pytest.raises(UsageError, match="base_url: expected an address") as raised:
        Client("tiny", url)
    assert "hunter2" not in str(raised.value)


def test_the_query_of_an_address_goes_with_every_request(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with CompletionServer() as server:
        seen = []
        server.other_faults = lambda request: (
            seen.append(request)
            or Fault(200, body={"data": [{"id": "tiny"}], **(body() if request.path.startswith("/v1/chat") else {})})
        )
        told, got = ask(f"{server.url}/?api-version=2024-10-21&x=a%20b", check=True, api="chat")
    assert [request.path for request in seen] == [
        "/v1/models?api-version=2024-10-21&x=a+b",
        "/v1/chat/completions?api-version=2024-10-21&x=a+b",
    ]
    assert got.text == "Yes." and seen[1].headers["api-key"] == KEY and "api-version" not in told
    assert server_url(" http://bücher.example/v1/ \n") == "http://bücher.example/v1"


# ---- numbers ----

USAGES = ["10", 1.5, -3, 0, float("nan"), float("inf"), 10**400, 10**9, None, [], {}, True, "ten", [10], {"x": 1}]


@pytest.mark.parametrize("value", USAGES, ids=str)
def test_counts_that_cannot_be_true_are_set_aside_in_full(tmp_path, value):
    """Each such answer counts like one without counts, and the limit holds."""
    usage = {"prompt_tokens": value, "completion_tokens": value}
    content = json.dumps(body(usage=usage)).replace("Infinity", "1e999").encode()
    (tmp_path / "all").mkdir()
    entries, budget, error = rows_answered(tmp_path / "all", content)
    answers = [entry for entry in entries if entry["kind"] == "answer"]
    assert error is None and len(answers) == 6
    most = Budget(1.0, 100.0).max_cost_of("Row 0.", 100)
    for entry in answers:
        assert (entry["prompt_tokens"], entry["completion_tokens"]) == (None, None)
        assert entry["unanswered"] == most
    assert budget.cost == pytest.approx(6 * most)
    entries, budget, error = rows_answered(tmp_path, content, limit=3.5 * most)
    assert "stopped with 3 of 6" in str(error) and budget.cost <= 3.5 * most


@pytest.mark.parametrize("usage", ["10", 10, [], [1], True, None, {"prompt_tokens": 5}, "x" * 1000], ids=str)
def test_a_usage_of_another_type_loses_no_answer(usage):
    got = answer_of(body(usage=usage))
    assert got.text == "Yes." and None in (got.prompt_tokens, got.completion_tokens)


def test_counts_that_can_be_true_are_taken():
    for usage in ({"prompt_tokens": 5, "completion_tokens": 100}, {"prompt_tokens": 263, "completion_tokens": 1}):
        got = answer_of(body(usage=usage))
        assert {"prompt_tokens": got.prompt_tokens, "completion_tokens": got.completion_tokens} == usage
    got = answer_of(body("", usage={"prompt_tokens": 264, "completion_tokens": 0}))
    assert (got.prompt_tokens, got.completion_tokens) == (None, 0)


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"null",
        b'"choices"',
        b"7",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe",
        {},
        {"choices": None},
        {"choices": {}},
        {"choices": "abc"},
        {"choices": 3},
        {"choices": [None]},
        {"choices": ["text"]},
        {"choices": [{}]},
        {"choices": [{"message": "hello"}]},
        {"choices": [{"message": {}}]},
        {"choices": [{"message": {"content": 5}}]},
        {"choices": [{"message": {"content": {"text": "x"}}}]},
        {"choices": [{"message": {"content": [5]}}]},
        {"choices": [{"message": {"content": [{"text": {}}]}}]},
        {"choices": [{"text": True}]},
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_completion_is_asked_again_and_counted(tmp_path, content):
    entries, budget, error = rows_answered(tmp_path, content, number=2)
    assert "2 of 2 rows have no answer" in str(error)
    failed = [entry for entry in entries if entry["kind"] == "failed"]
    most = Budget(1.0, 100.0).max_cost_of("Row 0.", 100)
    assert [entry["unanswered"] for entry in failed] == [2 * most] * 2 and budget.cost == pytest.approx(4 * most)


def test_contents_in_parts_and_too_many_choices():
    parts = [{"type": "thinking", "text": None}, {"type": "text", "text": "one "}, "two", {"type": "image"}]
    assert answer_of(body(parts)).text == "one two"
    assert answer_of(body(None)).text == ""
    content = body()
    content["choices"] *= 50
    assert answer_of(content).text == "Yes."


def test_an_error_that_nobody_foresaw_ends_the_run(tmp_path, monkeypatch, capsys):
    """In the task of a request, where nobody would hear of it."""
    for name in ("count", "allows"):
        with monkeypatch.context() as patch:
            patch.setattr(Budget, name, lambda self, entry: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                rows_answered(tmp_path, body())
    assert "a request ended in a way that nobody foresaw (ZeroDivisionError" in capsys.readouterr().err
    assert [json.loads(line)["kind"] for line in open(tmp_path / "out.json.journal.jsonl")].count("answer") >= 1


# ---- the first request ----

ONLY_ONE = openai_error(
    400,
    "unsupported_value",
    "Unsupported value: 'temperature' does not support 0.2. Only the default (1).",
    "temperature",
)
NO_MAX = Fault(400, {"message": "litellm.BadRequestError: 'max_tokens' is not supported. Use 'max_completion_tokens'."})


def reasoning_model(request):
    """Behind any gateway: takes max_completion_tokens alone, and no temperature but 1."""
    if "max_tokens" in request.body:
        return NO_MAX
    return ONLY_ONE if request.body.get("temperature", 1) != 1 or request.body.get("top_p", 1) != 1 else None


def test_a_reasoning_model_behind_a_gateway_can_be_asked():
    with CompletionServer(faults=reasoning_model) as server:
        told, got = ask(server.url, sampling=Sampling(50, None, None), check=True, api="auto")
        assert "chat endpoint" in told and got.text
        with pytest.raises(
            UsageError, match="refuses temperature 0.7, which is sent unless temperature says otherwise"
        ):
            ask(server.url, sampling=Sampling(50, 0.7), check=True, api="auto")
    first = server.requests[0].body
    assert set(first) == {"model", "messages", "max_tokens"}, "no parameter that nobody chose"


def test_the_first_request_sends_the_users_extra_fields(tmp_path):
    wants = {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"}
    refusal = Fault(400, {"message": "reasoning_effort is required"})
    with CompletionServer(faults=lambda request: None if "reasoning_effort" in request.body else refusal) as server:
        (tmp_path / "rows.json").write_text('[{"instruction": "a", "output": "b"}]')
        flags = dict(data_path=str(tmp_path / "rows.json"), output_path=str(tmp_path / "o.json"), model="tiny")
        generate_responses(**flags, base_url=server.url, extra_body=json.dumps(wants))
        assert all(request.body.items() >= wants.items() for request in server.requests) and len(server.requests) == 2
        generate_responses(**flags, base_url=server.url, extra_body=json.dumps(wants))
        with pytest.raises(UsageError, match="made with other arguments .extra_body"):
            generate_responses(**flags, base_url=server.url)
        assert len(server.requests) == 3, "a first request, and no other"


def test_a_thought_that_takes_all_of_the_first_answer_is_an_answer():
    limit = Fault(
        400, {"message": "Could not finish the message because max_tokens or model output limit was reached."}
    )
    with CompletionServer(faults=lambda request: limit if request.body["max_tokens"] == 16 else None) as server:
        assert ask(server.url, check=True, api="auto")[1].text


@pytest.mark.parametrize(
    "text, told",
    [
        ("{", "is not JSON"),
        ("[1]", "expected a JSON object .*got list"),
        ("NaN", "is not JSON"),
        ('{"x": Infinity}', "is not JSON"),
        ('{"x": "\\ud83d"}', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"model": "x"}', "'model' cannot be set there; the command itself"),
        ('{"messages": []}', "'messages' cannot be set"),
        ('{"stream": true}', "'stream' cannot be set there; answers are not streamed"),
        ('{"n": 5}', "'n' cannot be set there; one answer"),
        ('{"max_completion_tokens": 99999}', "cannot be set there; --max_new_tokens sets it"),
        ('{"temperature": 1}', "cannot be set there; --temperature sets it"),
    ],
)
def test_extra_fields_are_checked_before_anything_is_asked(tmp_path, text, told):
    (tmp_path / "rows.json").write_text('[{"instruction": "a", "output": "b"}]')
    with pytest.raises(UsageError, match=f"--extra_body: .*{told}"):
        generate_responses(str(tmp_path / "rows.json"), str(tmp_path / "o.json"), "tiny", extra_body=text, dry_run=True)
    assert not (tmp_path / "o.json.journal.jsonl").exists()


def test_extra_fields_are_for_servers(tiny):
    with pytest.raises(UsageError, match="extra_body is for a server"):
        open_backend(tiny("llama"), BackendFlags(extra_body="{}"))
    assert ModelBackend("x", FEW, BackendFlags(base_url="http://a/v1")).how().keys() & {"extra_body"} == set()


# ---- what ends an answer ----


@pytest.mark.parametrize(
    "reason, cut",
    [
        *((word, False) for word in ("stop", "eos", "eos_token", "stop_sequence", "end_turn", "STOP", None, "")),
        *(
            (word, True)
            for word in ("length", "content_filter", "max_tokens", "tool_calls", "unknown", "error", "abort")
        ),
        *((word, True) for word in (5, ["stop"], {"type": "stop"}, True)),
    ],
    ids=str,
)
def test_every_word_but_five_is_a_cut(reason, cut):
    assert was_cut(answer_of(body(reason=reason)).finish_reason) == cut


def test_answers_that_were_cut_and_reasons_that_are_missing_are_noted(tmp_path, capsys):
    reasons = ["stop", "content_filter", None, "length", "content_filter", "end_turn"]
    rows_answered(tmp_path, lambda request: Fault(200, body=body(reason=reasons[int(request.prompt[4])])))
    told = capsys.readouterr().out
    assert "2 answers ended by 'content_filter', rows 1, 4" in told
    assert "1 answers came without a finish_reason and count as whole, rows 2" in told
    assert "1 answers were cut at 100 tokens, rows 3" in told


@pytest.mark.parametrize("reason", ["content_filter", "tool_calls", "length"])
def test_the_last_task_of_an_answer_that_was_cut_is_dropped(tmp_path, reason):
    text = "".join(
        f"{n}. Instruction: Name {n} birds of the sea.\n{n}. Input:\n<noinput>\n{n}. Output:\nGull {n}\n###\n"
        for n in (4, 5)
    )
    with CompletionServer(lambda prompt, body: (text.removesuffix("###\n"), reason)) as server:
        flags = dict(model_name="tiny", base_url=server.url, api="chat", num_cpus=1)
        generate_instruction_following_data(str(tmp_path), "seed_tasks.jsonl", 1, **flags)
    report = json.loads((tmp_path / "generation_report.json").read_text())
    assert report["rejected: cut off"] >= 1
    assert (report["answers_cut_otherwise_than_by_length"] >= 1) == (reason != "length")


@pytest.mark.parametrize(
    "text, left, thought",
    [
        ("<think>hm</think>\n\nYes.", "Yes.", "hm"),
        ("\n<think>hm</think><think>so</think>Yes.", "Yes.", "hm\n\nso"),
        ("hm, so</think>Yes.", "Yes.", "hm, so"),
        ("<think>never ends", "", "never ends"),
        ("One <think>hm</think>two.", "One two.", "hm"),
        ("The tag <think> opens.", "The tag <think> opens.", ""),
        ("<think></think>Yes.", "Yes.", ""),
        ("Yes.", "Yes.", ""),
    ],
)
def test_thoughts_are_no_answer(tmp_path, text, left, thought):
    assert split_reasoning(text) == (left, thought)
    entries, _, _ = rows_answered(tmp_path, body(text), number=1)
    (entry,) = [entry for entry in entries if entry["kind"] == "answer"]
    assert (entry["text"], entry.get("reasoning", "")) == (left, thought)


def test_thoughts_in_fields_of_their_own(tmp_path, capsys):
    for field in ("reasoning_content", "reasoning"):
        assert answer_of(body(**{field: "hm"})).reasoning == "hm"
        assert answer_of(body(**{field: ["no", "text"]})).reasoning == ""
    rows_answered(tmp_path, body("<think>a</think>Yes.", reasoning_content="b"), number=2)
    assert (
        "2 answers had thoughts in front, which only the journal has (reasoning), rows 0, 1" in capsys.readouterr().out
    )


@pytest.mark.parametrize("half", ["\\ud83d", "\\ude00", "a\\ud83d b", "\\ude00\\ud83d"])
def test_half_a_character_ends_no_rerun(tmp_path, half):
    content = json.dumps(body("TEXT", "WORD")).replace("TEXT", half).replace("WORD", f"stop{half}").encode()
    for _ in range(2):
        entries, _, error = rows_answered(tmp_path, content, number=2)
        assert error is None
    text = next(entry["text"] for entry in entries if entry["kind"] == "answer")
    assert "\ufffd" in text and text.encode()
    path = tmp_path / "out.json.journal.jsonl"  # of an older version
    path.write_text(path.read_text().replace("\\ufffd", "\\ud83d"))
    answers = BatchCompletion(Client("tiny", "http://127.0.0.1:1/v1", "chat"), FEW, str(tmp_path / "x.json"), {}, 1)
    path.rename(tmp_path / "x.json.journal.jsonl")
    from alpaca.completions.journal import Journal

    with Journal(tmp_path / "x.json.journal.jsonl") as journal:
        for entry in journal:
            "".join(value for value in entry.values() if isinstance(value, str)).encode()
    assert answers.output_path and whole_characters("\ud83d\ude00") == "\U0001f600"


# ---- bombs and waiting ----

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def packed(content: bytes, how: str) -> bytes:
    if how == "gzip":
        return gzip.compress(content)
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 15 if how == "deflate" else -15)
    return squeeze.compress(content) + squeeze.flush()


@pytest.mark.parametrize("how", ["gzip", "deflate", "bare deflate"])
def test_packed_answers_are_read_up_to_a_limit(how, monkeypatch):
    name = how.removeprefix("bare ")
    good = Fault(200, body=packed(json.dumps(body("Packed.")).encode(), how), headers={"Content-Encoding": name})
    bomb = Fault(200, body=packed(b" " * 40_000_000, how), headers={"Content-Encoding": name})
    with CompletionServer(script=[good, bomb]) as server:
        assert ask(server.url)[1].text == "Packed."
        with pytest.raises(RequestFailed, match="larger than 16.8 MB, the most that is read"):
            ask(server.url)
        assert len(server.requests) == 2, "not asked again"
        assert server.requests[0].headers["accept-encoding"] == "identity"
        server.script = [Fault(200, body=b"rubbish", headers={"Content-Encoding": name})] * 2
        with pytest.raises(RequestFailed, match="cannot be unpacked|not JSON"):
            ask(server.url)


@pytest.mark.parametrize("how", ["br", "zstd", "gzip, gzip", "compress", "\x01" * 9])
def test_what_was_not_asked_for_is_not_unpacked(how):
    with CompletionServer(script=[Fault(200, headers={"Content-Encoding": how}, body=b"x")]) as server:
        with pytest.raises(RequestFailed, match="packed as|no answer from"):
            ask(server.url, max_retries=0)


@pytest.mark.parametrize(
    "fault, told",
    [
        (Raw(HEAD + b"\r\n", b"x" * 2**20, 40), "larger than"),
        (Raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"100000\r\n" + b"x" * 2**20 + b"\r\n", 40), "larger than"),
        (Raw(HEAD + b"Content-Length: 99999999\r\n\r\n", b" " * 2**20, 40), "larger than"),
        (Raw(HEAD + b"Content-Length: 100000\r\n\r\n", b"x", 1000, 0.05), "no whole answer from .* in 0.5 s"),
        (Raw(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n", 1000, 0.05), "no whole answer from .* in 0.5 s"),
        (Raw(b"HTTP/1.1 200 OK\r\nX: ", b"x" * 2**20, 4), "no answer from"),
        (Raw(b"HTTP/1.1 200 OK\r\n", b"X-A: " + b"b" * 1000 + b"\r\n", 2000), "no answer from"),
        (Raw(b"nonsense\r\n\r\n"), "no answer from"),
        (Raw(HEAD + b"Content-Length: x\r\n\r\n"), "no answer from"),
        (Raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"), "no answer from"),
        (Raw(b"HTTP/1.1 307 X\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n"), "no answer from"),
        (Raw(b"HTTP/1.1 307 X\r\nLocation: http://[\r\nContent-Length: 0\r\n\r\n"), "no answer from"),
        (Raw(b"HTTP/1.1 307 X\r\nLocation: /v1/chat/completions\r\nContent-Length: 0\r\n\r\n"), "no answer from"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else str(value.head[-24:]),
)
def test_endless_slow_and_broken_answers_end(fault, told):
    lost = []
    with CompletionServer(faults=lambda request: fault) as server:

        async def run():
            async with Client("tiny", server.url, "chat", 0, 0.5, 0.001) as client:
                await client.complete("Say it.", FEW, lambda: lost.append(1) or True)

        with pytest.raises(RequestFailed, match=told):
            asyncio.run(run())
    assert lost, "it may be charged"


def test_error_pages_are_short_plain_and_one_line():
    page = Fault(400, {"message": "\x1b[2Jno\x07 " + "long " * 10**6})
    with CompletionServer(script=[page]) as server, pytest.raises(RequestFailed) as raised:
        ask(server.url)
    assert len(str(raised.value)) < 700 and str(raised.value).isprintable()


def test_a_list_of_models_is_not_taken_at_its_word():
    for models in (5, "abc", {"a": 1}, [1, None, {"id": {"x": "y" * 10**6}}], [[]], True):
        with CompletionServer() as server:
            server.other_faults = lambda request, models=models: Fault(200, body={"data": models})
            assert ask(server.url, check=True)[1].text
            server.faults = lambda request: Fault(404, {"message": "model not found"})
            with pytest.raises(UsageError, match="Give a model that the server has") as raised:
                ask(server.url, check=True)
            assert len(str(raised.value)) < 500
    assert server_errors.LARGEST_ANSWER == 16 * 2**20


LONG = 100_000


@pytest.mark.parametrize(
    "text",
    ["\n" * LONG, "verdict: 1\n" * LONG, "\n-" * LONG, "verdict answer" + "_" * LONG, "a-" * LONG, "- " * LONG],
    ids=lambda text: repr(text[:8]),
)
def test_a_judges_long_words_take_no_square_of_their_length(text):
    assert read_preference(text, "outputs") in (None, 2.0)
    assert read_preference(f"{text}\nVerdict: 2", "reference") in (None, 2.0)


@pytest.mark.parametrize(
    "text", ["*" * LONG, "score" + "*" * LONG, "score " + " " * LONG + "x", "score: " + "9" * LONG]
)
def test_a_raters_long_words_take_no_square_of_their_length(text):
    assert parse_score(text) == (None, "no_score") and parse_score(f"{text}\nScore: 4") == (4.0, None)


# ---- any of it, at random ----

ODD = [None, True, 0, -1, 1.5, 10**30, "", "x", "stop", "\ud83d", [], [1], {}, {"text": "y"}, "<think>", "###" * 50]


def odd_fault(draw: random.Random):
    """An answer with something wrong in it, or nothing."""
    kind = draw.randrange(8)
    if kind == 0:
        return None
    if kind == 1:
        return Fault(draw.choice([200, 400, 404, 418, 429, 500, 503]), body=draw.choice([*ODD, BAD_KEY.error]))
    if kind == 2:
        content = json.dumps(body()).encode()
        at = draw.randrange(len(content))
        return Fault(200, body=content[:at] + bytes([draw.randrange(256)]) * draw.randrange(3) + content[at + 1 :])
    if kind == 3:
        head = draw.choice(
            [b"", HEAD, HEAD + b"Content-Encoding: gzip\r\n\r\n", b"HTTP/1.1 999 \r\n\r\n", HEAD + b"\r\n"]
        )
        return Raw(head, bytes(draw.randrange(256) for _ in range(20)), draw.randrange(4))
    if kind == 4:
        headers = {
            draw.choice(["Retry-After", "Content-Encoding", "Location", "x-should-retry"]): draw.choice(
                ["0", "x", "-1", "nan"]
            )
        }
        return Fault(draw.choice([200, 301, 307, 429, 500]), headers=headers, body=body())
    if kind == 5:
        return Fault(
            draw.choice([400, 401, 403, 429, 500]),
            {name: draw.choice(ODD) for name in ("message", "code", "type", "param")},
        )
    content = body(
        draw.choice(ODD), draw.choice(ODD), {"prompt_tokens": draw.choice(ODD), "completion_tokens": draw.choice(ODD)}
    )
    where = draw.choice([content, content["choices"][0], content["choices"][0]["message"], content["usage"]])
    if draw.random() < 0.5:
        where[draw.choice(list(where))] = draw.choice(ODD)
    return Fault(200, body=content)


def fuzz(tmp_path, cases, capsys):
    most = Budget(1.0, 100.0).max_cost_of("Row 0.", 100)
    for case in range(cases):
        folder = tmp_path / str(case)
        folder.mkdir()
        draw = random.Random(case)
        entries, budget, error = rows_answered(folder, lambda request, draw=draw: odd_fault(draw), 8, limit=12.5 * most)
        answered = {entry["index"] for entry in entries if entry["kind"] == "answer"}
        assert (len(answered) == 8) == (error is None), case
        assert budget.cost <= 12.5 * most and not budget.reserved, case
        for entry in entries:
            assert entry["kind"] != "answer" or isinstance(entry["text"], str) and entry["text"].encode() is not None
        assert "Traceback" not in capsys.readouterr().err and (error is None or str(error).strip())


def test_odd_servers_end_in_a_message_or_a_counted_entry(tmp_path, capsys):
    fuzz(tmp_path, 12, capsys)


@pytest.mark.stress
def test_hundreds_of_odd_servers(tmp_path, capsys):
    fuzz(tmp_path, 400, capsys)
