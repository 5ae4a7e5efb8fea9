"""jload and jdump: 2023's behaviour, and a file that is whole or absent. openai_completion against a real server."""

import asyncio
import io
import json
import os
import pickle
from types import SimpleNamespace

import pytest
from support.completion_server import BAD_KEY, MAX_TOKENS_REFUSED, CompletionServer, Fault, echo

import utils
from alpaca.common.errors import UsageError


def test_round_trip_by_path_and_by_file_object(tmp_path):
    rows, path = [{"a": "é早🙂", "b": [1, None]}], tmp_path / "new" / "folder" / "x.json"
    utils.jdump(rows, path)
    assert utils.jload(path) == utils.jload(str(path)) == rows
    with open(path, encoding="utf-8") as file:
        assert utils.jload(file) == rows
        assert file.closed
    buffer = open(tmp_path / "y.json", "w", encoding="utf-8")
    utils.jdump(rows, buffer)
    assert buffer.closed and utils.jload(tmp_path / "y.json") == rows
    assert path.read_text().startswith('[\n    {\n        "a"'), "indented by 4, as in 2023"


def test_the_openers_of_2023(tmp_path):
    with utils._make_w_io_base(str(tmp_path / "new" / "x.txt"), "w") as file:
        file.write("é")
        assert utils._make_w_io_base(file, "w") is file
    with utils._make_r_io_base(tmp_path / "new" / "x.txt", "r") as file:
        assert file.read() == "é"


def test_text_is_written_as_it_is_and_other_types_are_refused(tmp_path):
    utils.jdump("plain", tmp_path / "t.txt")
    assert (tmp_path / "t.txt").read_text() == "plain"
    with pytest.raises(ValueError, match="got int"):
        utils.jdump(3, tmp_path / "t.txt")
    assert (tmp_path / "t.txt").read_text() == "plain"


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "x.json"
    utils.jdump([1], path)

    def explode(_):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        utils.jdump([object()], path, default=explode)
    from alpaca.common.files import atomic_write

    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write("half")
        raise KeyboardInterrupt
    assert utils.jload(path) == [1]
    assert os.listdir(tmp_path) == ["x.json"]


def test_modes_links_and_appending(tmp_path):
    path, link = tmp_path / "x.json", tmp_path / "link.json"
    utils.jdump([1], path)
    link.symlink_to(path)
    os.chmod(path, 0o640)
    utils.jdump([2], link)
    assert link.is_symlink() and utils.jload(path) == [2] and path.stat().st_mode & 0o777 == 0o640
    utils.jdump("tail", path, mode="a")
    assert path.read_text().endswith("]tail")


def test_malformed_json_is_located(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('[{"a": 1},\n {"a": }]')
    with pytest.raises(
        json.JSONDecodeError, match=r"bad\.json: malformed JSON: Expecting value: line 2 column 8"
    ) as info:
        utils.jload(path)
    assert isinstance(info.value, UsageError)
    assert (info.value.lineno, info.value.colno, info.value.pos, info.value.doc) == (2, 8, 18, path.read_text())
    assert str(pickle.loads(pickle.dumps(info.value))) == str(info.value)
    with pytest.raises(json.JSONDecodeError, match="line 1"):
        utils.jload(io.StringIO("{"))


def test_other_errors_and_modes_are_those_of_2023(tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    assert utils.jload(tmp_path / "x.json", "rb") == utils.jload(open(tmp_path / "x.json", "rb")) == [1]
    with pytest.raises(FileNotFoundError):
        utils.jload(tmp_path / "missing.json")
    with pytest.raises(IsADirectoryError):
        utils.jload(tmp_path)
    with pytest.raises(FileExistsError):
        utils.jdump([1], tmp_path / "x.json", mode="x")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(utils, "_settled", {})
    for name in ("OPENAI_API_KEY", "OPENAI_ORG", "OPENAI_ORG_ID"):
        monkeypatch.delenv(name, raising=False)
    with CompletionServer(models=("text-davinci-003",)) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        server.faults = lambda request: Fault(404, body={"detail": "Not Found"}) if "chat" in request.path else None
        yield server


def test_openai_completion_as_in_2023(server, monkeypatch):
    monkeypatch.setenv("OPENAI_ORG", "org-1")
    arguments = utils.OpenAIDecodingArguments(temperature=1.0, max_tokens=3072, stop=["\n20", "20.", "20."])
    prompts, server.delay = [f"prompt {n}" for n in range(5)], 0.02
    got = utils.openai_completion(prompts, arguments, batch_size=2, logit_bias={"50256": -100})
    assert [choice.text for choice in got] == [choice["text"] for choice in got] == [echo(p, {}) for p in prompts]
    assert [choice.index for choice in got] == [0, 1, 0, 1, 0]
    assert (got[0]["finish_reason"], got[0].get("no")) == ("stop", None)
    each = 2 + 5  # words of prompt and answer
    assert [choice.total_tokens for choice in got] == [2 * each] * 4 + [each], "of the whole batch, as in 2023"
    assert json.loads(json.dumps(got)) == got
    with pytest.raises(AttributeError):
        _ = got[0].no
    sent = {
        "model": "text-davinci-003",
        "max_tokens": 3072,
        "temperature": 1.0,
        "top_p": 1.0,
        "stop": ["\n20", "20.", "20."],
        "logit_bias": {"50256": -100.0},
    }
    ours = [request for request in server.requests if request.body.get("prompt") in prompts]
    assert [{**request.body, "prompt": 0} for request in ours] == [{**sent, "prompt": 0}] * 5
    assert server.busiest == 2 and ours[0].headers["openai-organization"] == "org-1"


def test_openai_completion_returns_one_for_one_and_n_for_n(server):
    one = utils.OpenAIDecodingArguments()
    assert utils.openai_completion("a b", one)["text"] == echo("a b", {})
    asked = len(server.requests)
    assert utils.openai_completion("a b", one, return_text=True) == echo("a b", {})
    assert len(server.requests) == asked + 1, "what the first call found out about the server is kept"
    assert utils.openai_completion(["a"], one, return_text=True) == [echo("a", {})]
    two = utils.OpenAIDecodingArguments(n=2)
    assert utils.openai_completion(["a", "b"], two, return_text=True) == [[echo("a", {})] * 2, [echo("b", {})] * 2]
    assert utils.openai_completion("a", two, return_text=True, seed=7) == [echo("a", {})] * 2
    choices = utils.openai_completion(["a", "b", "c"], two, batch_size=2)
    assert [[choice.index for choice in pair] for pair in choices] == [[0, 1], [2, 3], [0, 1]]
    assert [pair[1].total_tokens for pair in choices] == [2 * (1 + 2 * 5)] * 2 + [1 + 2 * 5], "a prompt counts once"
    choices[0][0].text = "other"
    assert choices[0][0]["text"] == "other"
    other_class = SimpleNamespace(**vars(one))
    assert utils.openai_completion("a", other_class, return_text=True) == echo("a", {})
    utils.openai_completion("a", two, seed=7)
    assert sorted(request.body["seed"] for request in server.requests[-2:]) == [7, 8]
    assert "n" not in server.requests[-1].body


def test_openai_completion_trims(server, caplog):
    one, prompts = utils.OpenAIDecodingArguments(), ["a", "b", "c", "d", "e"]
    assert len(utils.openai_completion(prompts, one, max_instances=3)) == 3
    assert len(utils.openai_completion(prompts, one, batch_size=2, max_batches=2)) == 4
    assert "max_batches" in caplog.text
    assert utils.openai_completion([], one) == []


def test_openai_completion_takes_chat_messages_and_sends_other_fields(server):
    server.faults = lambda request: MAX_TOKENS_REFUSED if "max_tokens" in request.body else None
    arguments = utils.OpenAIDecodingArguments(presence_penalty=0.5, max_tokens=9)
    message = {"role": "system", "content": "Be brief."}
    assert utils.openai_completion(message, arguments, return_text=True) == echo("Be brief.", {})
    utils.openai_completion([message, message], arguments)
    assert server.requests[-1].body["messages"] == [message]
    assert server.requests[-1].body["presence_penalty"] == 0.5 and "frequency_penalty" not in server.requests[-1].body
    assert sum("max_tokens" in request.body for request in server.requests) == 1, "not sent again by the next call"


def test_openai_completion_works_inside_an_event_loop(server):
    async def notebook():
        return utils.openai_completion("a", utils.OpenAIDecodingArguments(), return_text=True)

    assert asyncio.run(notebook()) == echo("a", {})


def test_openai_completion_names_mistakes(server):
    with pytest.raises(UsageError, match="stream: expected False"):
        utils.openai_completion("a", utils.OpenAIDecodingArguments(stream=True))
    server.faults = lambda request: Fault(401, BAD_KEY.error) if "b" in request.prompt else None
    with pytest.raises(UsageError, match="OPENAI_API_KEY"):
        utils.openai_completion(["a", "b", "c"], utils.OpenAIDecodingArguments(), sleep_time=0.01)
