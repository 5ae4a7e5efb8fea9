"""A rerun reads its journal once, and what it reads stays on the disk, however much there is."""

import json
import os
import tracemalloc

import pytest
from conftest import ROOT
from support.completion_server import CompletionServer, tasks
from support.fake_model import FakeModel

from alpaca.common.errors import InputError, UsageError
from alpaca.completions.api import Request, Sampling
from alpaca.completions.budget import Budget
from alpaca.completions.journal import AnswersOfJournal, Journal
from alpaca.completions.rows import BatchCompletion, write_answered, write_rows
from alpaca.completions.runner import answered_before
from alpaca.datagen.state import KeptTasks, tasks_of
from generate_instruction import generate_instruction_following_data, generate_responses

pytestmark = pytest.mark.slow  # many small cases

ROWS = 20_000
TEXT = 'A long answer with "quotes" and a line.\n' * 50  # 2 kB, as answers are


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_ORG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def scans(monkeypatch):
    """How often a journal is read."""
    seen = []
    scan = Journal.scan
    monkeypatch.setattr(Journal, "scan", lambda journal: seen.append(journal.path) or scan(journal))
    return seen


def write_journal(path, number, first=0, **more):
    with open(path, "a") as file:
        for index in range(first, number):
            entry = {"index": index, "kind": "answer", "text": f"{index} {TEXT}", "finish_reason": "stop"}
            file.write(
                json.dumps(entry | {"prompt_tokens": 10, "completion_tokens": 5, "unanswered": 0.0} | more) + "\n"
            )


def peak_of(function):
    """Return what a call returns, and the most bytes that it had at a time."""
    tracemalloc.start()
    try:
        result = function()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_rerun_of_rows_reads_its_journal_once(tmp_path, scans):
    rows = [{"instruction": f"Say {n}.", "input": "", "output": ""} for n in range(30)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    run = (str(tmp_path / "rows.json"), str(tmp_path / "out.json"), "tiny")
    with CompletionServer() as server:
        flags = {"base_url": server.url, "api": "chat"}
        generate_responses(*run, **flags)
        first, asked = (tmp_path / "out.json").read_bytes(), len(server.requests)
        scans.clear()
        generate_responses(*run, **flags)
        assert len(scans) == 1 and len(server.requests) == asked
    assert (tmp_path / "out.json").read_bytes() == first


def test_a_rerun_of_self_instruct_reads_its_journal_once(tmp_path, scans):
    with CompletionServer(answer=tasks) as server:
        flags = {"base_url": server.url, "api": "completions", "seed": 1, "model_name": "tiny"}
        generate_instruction_following_data(str(tmp_path), str(ROOT / "seed_tasks.jsonl"), 30, **flags)
        scans.clear()
        generate_instruction_following_data(str(tmp_path), str(ROOT / "seed_tasks.jsonl"), 30, **flags)
    assert len(scans) == 1


def test_the_memory_does_not_follow_the_journal(tmp_path):
    """40 MB of answers; a dict of them would take more."""
    path = tmp_path / "out.json.journal.jsonl"
    path.write_text(json.dumps({"kind": "run", "how": {}}) + "\n")
    write_journal(path, ROWS)
    assert path.stat().st_size > 40e6
    batch = BatchCompletion(
        model=FakeModel(), sampling=Sampling(), output_path=str(tmp_path / "out.json"), how={}, concurrency=1
    )
    requests = [Request("", key) for key in range(ROWS)]
    rows = [{"instruction": "", "input": ""}] * ROWS

    def answer():
        answers = batch.answers(requests)
        write_answered(str(tmp_path / "out.json"), rows, answers)
        return answers

    answers, peak = peak_of(answer)
    assert isinstance(answers, AnswersOfJournal) and len(answers) == ROWS and answers[7]["text"].startswith("7 A long")
    assert peak < 15e6
    written = json.loads((tmp_path / "out.json").read_text())
    assert [row["output"] for row in written] == [f"{n} {TEXT}".strip() for n in range(ROWS)]


def test_the_last_answer_of_a_key_counts(tmp_path):
    with Journal(tmp_path / "journal") as journal:
        for text, kind in (("first", "answer"), ("", "failed"), ("last", "answer")):
            journal.append(
                {"kind": kind, "index": 3, "text": text, "finish_reason": "stop", "error": "", "too_long": False}
            )
        places = answered_before(journal, 0, Budget())
        assert list(places) == [3] and journal.read(places[3])["text"] == "last"
        assert AnswersOfJournal(journal, places)[3]["text"] == "last"


@pytest.mark.parametrize("half", ["\\uD800", "\\ud800", "\ud800"], ids=["escaped", "lower case", "as bytes"])
def test_halves_of_characters_are_replaced_wherever_a_line_is_read(tmp_path, half):
    line = f'{{"kind": "answer", "index": 0, "text": "a{half}b", "finish_reason": "stop"}}\n'
    (tmp_path / "journal").write_text(line, encoding="utf-8", errors="surrogatepass")
    with Journal(tmp_path / "journal") as journal:
        places = answered_before(journal, 0, Budget())
        texts = [
            next(iter(journal))["text"],
            journal.read(places[0])["text"],
            AnswersOfJournal(journal, places)[0]["text"],
        ]
    assert texts == ["a\ufffdb"] * 3


def test_rows_one_by_one_are_what_json_writes(tmp_path):
    for rows in ([], [{"a": "é\n", "b": {"c": 1.5, "d": [None, True]}}], [{"a": 1}, {}, {"b": []}]):
        write_rows(tmp_path / "rows.json", iter(rows))
        assert (tmp_path / "rows.json").read_text() == json.dumps(rows, indent=4)
        write_rows(tmp_path / "rows.jsonl", iter(rows))
        assert (tmp_path / "rows.jsonl").read_text() == "".join(json.dumps(row) + "\n" for row in rows)


# ---- regen.json piece by piece ----


TASK = {
    "instruction": "Name it.",
    "input": "",
    "output": "x",
    "most_similar_instructions": {"a": 0.5},
    "avg_similarity_score": 0.1,
}


@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 4])
def test_pieces_give_the_tasks_of_the_whole(tmp_path, monkeypatch, piece, indent):
    monkeypatch.setattr("alpaca.datagen.state.PIECE", piece)
    tasks = [TASK | {"instruction": f"Name {n} “{'x' * n * 9}” \\ ] , [ {{."} for n in range(12)]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        for text in (json.dumps(tasks, indent=indent), f" \n{json.dumps(tasks, indent=indent, ensure_ascii=False)}\n "):
            (tmp_path / "regen.json").write_bytes(text.encode(encoding))
            assert [row for row, _ in tasks_of(tmp_path / "regen.json")] == tasks
    (tmp_path / "regen.json").write_bytes(json.dumps([TASK]).replace("it", "\ud800").encode(errors="surrogatepass"))
    assert [row["instruction"] for row, _ in tasks_of(tmp_path / "regen.json")] == ["Name \ufffd."]
    (tmp_path / "regen.json").write_text("[]")
    assert list(tasks_of(tmp_path / "regen.json")) == []


@pytest.mark.parametrize("piece", [1, 1 << 20])
@pytest.mark.parametrize(
    "text",
    ["", "{}", "7", "[1]", "[{}]", "[" + json.dumps(TASK), json.dumps([TASK])[:-1] + ",]", json.dumps([TASK]) + "x"]
    + [json.dumps([TASK | {"input": None}]), "[" + json.dumps(TASK) * 2 + "]", "[" * 100_000, "\udcff", "[,]", "]"],
)
def test_what_is_no_list_of_tasks(tmp_path, monkeypatch, piece, text):
    monkeypatch.setattr("alpaca.datagen.state.PIECE", piece)
    (tmp_path / "regen.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match="regen.json is not a list of tasks"):
        list(tasks_of(tmp_path / "regen.json"))


def test_a_rerun_leaves_the_bytes_as_they_were(tmp_path):
    with CompletionServer(answer=tasks) as server:
        flags = {"base_url": server.url, "api": "completions", "seed": 1, "model_name": "tiny"}
        words = (str(tmp_path), str(ROOT / "seed_tasks.jsonl"))
        generate_instruction_following_data(*words, 30, **flags)
        first = (tmp_path / "regen.json").read_bytes()
        assert first.decode() == json.dumps(json.loads(first), indent=4)
        generate_instruction_following_data(*words, 30, **flags)
        assert (tmp_path / "regen.json").read_bytes() == first
        generate_instruction_following_data(*words, 60, **flags)
        more = (tmp_path / "regen.json").read_bytes()
    assert more.startswith(first[:-2]) and more.decode() == json.dumps(json.loads(more), indent=4)


def test_a_task_that_did_not_fit_leaves_no_part_of_it(tmp_path, monkeypatch):
    kept, pwrite = KeptTasks(tmp_path), os.pwrite
    kept.append(json.dumps([TASK], indent=4)[2:-2])
    monkeypatch.setattr(os, "pwrite", lambda handle, content, at: pwrite(handle, content[:50], at))
    with pytest.raises(InputError, match="cannot be written .No space left"):
        kept.append(json.dumps([TASK | {"output": "y" * 9000}], indent=4)[2:-2])
    monkeypatch.setattr(os, "pwrite", pwrite)
    for expected in ([TASK], [TASK, TASK]):
        with open(tmp_path / "regen.json", "wb") as file:
            kept.copy_to(file)
        assert json.loads((tmp_path / "regen.json").read_text()) == expected
        kept.append(json.dumps([TASK], indent=4)[2:-2])


def test_kept_tasks_are_a_file_as_json_writes_it(tmp_path):
    kept = KeptTasks(tmp_path)
    for number in range(4):
        tasks = [TASK | {"output": f"é{n}"} for n in range(number)]
        with open(tmp_path / "regen.json", "wb") as file:
            kept.copy_to(file)
        assert (tmp_path / "regen.json").read_text() == json.dumps(tasks, indent=4)
        assert [kept[n] for n in range(len(kept))] == tasks
        kept.append(json.dumps([TASK | {"output": f"é{number}"}], indent=4)[2:-2])
    assert [path.name for path in tmp_path.iterdir()] == ["regen.json"], "the temporary file has no name"
