"""Rows answered through a journal, and who answers: what a rerun may take over, and what it must refuse."""

import json
import shutil

import pytest
from completion_server import OVERFLOW, CompletionServer
from conftest import write_rows

import generate_instruction
from alpaca.client import Client, Sampling
from alpaca.errors import UsageError
from alpaca.files import keep_input
from alpaca.respondent import Questions, Respondent, open_respondent
from alpaca.row_answers import RowAnswers
from scripts import backtranslate, evaluate, generate

SAMPLING = Sampling(max_tokens=9)


def asked(tmp_path, server, order=None, rows=4, **more):
    texts = [f"Row {number}." for number in range(rows)]
    return RowAnswers(
        [{"instruction": text} for text in texts], str(tmp_path / "out.json"),
        Client("tiny", server.url, "completions"), lambda endpoint: (SAMPLING, {}), texts.__getitem__,
        {"model": "tiny"}, 2, order=order, **more,
    )  # fmt: skip


def own_text(prompt, body):
    return f"answer to {prompt}"


def test_an_answer_stays_with_its_row_when_the_order_changes(tmp_path):
    """Orders come from lengths in tokens, which another version of a tokenizer counts otherwise."""
    with CompletionServer(own_text) as server:
        asked(tmp_path, server, order=[3, 0, 2]).run()
        asked(tmp_path, server, order=[0, 1, 2, 3]).run()
        assert len(server.requests) == 4
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["output"] for row in rows] == [f"answer to Row {number}." for number in range(4)]


def test_prompts_that_are_too_long_do_not_hold_up_the_others(tmp_path):
    """However many come in a row, and they come first: the longest are asked first."""
    with CompletionServer(
        own_text, faults=lambda request: OVERFLOW if int(request.prompt[4:-1]) < 30 else None
    ) as server:
        with pytest.raises(
            UsageError, match=r"30 of 50 rows have no answer \(rows 0, 1.*…\).*leave them out: --drop_fa"
        ):
            asked(tmp_path, server, rows=50).run()
        asked(tmp_path, server, rows=50, drop_failed=True).run()
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["instruction"] for row in rows] == [f"Row {number}." for number in range(30, 50)]


def test_answers_of_an_unknown_run_are_refused(tmp_path):
    with CompletionServer(own_text) as server:
        asked(tmp_path, server).run()
        path = tmp_path / "out.json.journal.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
        with pytest.raises(UsageError, match="begins with answers to nobody knows what"):
            asked(tmp_path, server).run()


def test_what_a_journal_knows_of_the_one_who_answers(tiny, tmp_path):
    """A folder by its files, however it is spelt; a server by its model, wherever it listens."""
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    how = Respondent(str(folder), SAMPLING, seed=1).how(questions=["a", "b"])
    assert how == Respondent(f"{folder}/", SAMPLING, seed=1).how(questions=["a", "b"])
    assert how != Respondent(str(folder), SAMPLING, seed=1).how(questions=["ab"])
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    changed = Respondent(str(folder), SAMPLING, seed=1).how(questions=["a", "b"])
    assert {name for name in how if how[name] != changed[name]} == {"weights of model_name"}
    server = Respondent("tiny", SAMPLING, base_url="http://a/v1").how()
    assert server == Respondent("tiny", SAMPLING, base_url="http://b/v1").how()
    assert server != Respondent("other", SAMPLING, base_url="http://a/v1").how()


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_question_stands_in_a_prompt_unless_it_is_chat(api):
    with CompletionServer() as server:
        model = Client("tiny", server.url, api)
        questions = Questions(["How?"], model, SAMPLING)
        questions.settle(api)
        assert questions.prompt_of(0) == questions.prompt_of(1)
        assert (questions.prompt_of(0) == "How?") == (api == "chat")
        assert api == "chat" or "### Instruction:\nHow?\n\n### Response:" in questions.prompt_of(0)


def test_a_base_url_of_the_environment_wins_over_a_folder_and_is_named(tiny, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    assert isinstance(open_respondent(tiny("llama")), Client)
    with pytest.raises(UsageError, match=r"--base is for .*; --judge .* is a server's \(OPENAI_BASE_URL"):
        open_respondent(tiny("llama"), base=tiny("llama"), flag="--judge")


@pytest.mark.parametrize(
    "command, flag",
    [
        (lambda path: generate.main(["--model=x", f"--data_path={path}", f"--output_path={path}"]), "--data_path"),
        (lambda path: evaluate.alpaca_eval("x", path, path), "--data_path"),
        (lambda path: evaluate.win_rate("other.json", path, "judge", output_path=path), "--reference"),
        (lambda path: evaluate.backward(path, output_path=path), "--pred"),
        (lambda path: backtranslate.augment(path, path, "x"), "--data_path"),
        (lambda path: backtranslate.curate(path, path, "x"), "--data_path"),
        (lambda path: backtranslate.curate("a5.json", path, "x", ratings_path=path), "--data_path"),
        (lambda path: backtranslate.mix(path, path), "--seed_path"),
        (lambda path: generate_instruction.generate_responses(path, path, "x"), "--data_path"),
        (lambda path: generate_instruction.export(path, path), "--regen_path"),
    ],
)
def test_no_command_writes_over_what_it_reads(tmp_path, command, flag):
    path = write_rows(tmp_path / "rows.json", 3)
    before = (tmp_path / "rows.json").read_bytes()
    with pytest.raises(UsageError, match=f"is the file of {flag}, which would be lost"):
        command(path)
    assert (tmp_path / "rows.json").read_bytes() == before
    keep_input(tmp_path / "new.json", "--output_path", data_path=path, reference=None)
