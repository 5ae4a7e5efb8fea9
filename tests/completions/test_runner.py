"""What a rerun counts as spent: attempts whose answer was lost, each once; nothing of requests that were refused."""

import asyncio
import json
import signal

import pytest
from support.fake_model import FakeModel

from alpaca.common.errors import InputError, UsageError
from alpaca.completions.api import Completion, Request, RequestFailed, Sampling
from alpaca.completions.budget import Budget
from alpaca.completions.journal import Journal
from alpaca.completions.rows import BatchCompletion
from alpaca.completions.runner import answered_before

SAMPLING = Sampling(max_tokens=100)
PROMPT = "A prompt."
MOST = Budget(1.0, 2.0).max_cost_of(PROMPT, SAMPLING.max_tokens)
ANSWER = Completion("Yes.", "stop", prompt_tokens=10, completion_tokens=5)
REFUSED = UsageError("/completions answered 401: no such key")


class LosingModel(FakeModel):
    """Loses answers of the first request, then returns `end`, or raises it; all others get ANSWER."""

    def __init__(self, lost, end):
        self.lost, self.end, self.asked = lost, end, 0

    async def complete(self, prompt, sampling, on_lost_response):
        self.asked += 1
        if self.asked > 1:
            return ANSWER
        for _ in range(self.lost):
            if not on_lost_response():
                raise RequestFailed("the limit of cost")
        if isinstance(self.end, KeyboardInterrupt):  # while an attempt is in flight
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(60)
        if isinstance(self.end, BaseException):
            raise self.end
        return self.end


def ask(folder, lost=0, end=ANSWER, max_cost=1.0, requests=1):
    """Run until the end, or until `end` is raised. Return the model and what this run counts as spent."""
    model, budget = LosingModel(lost, end), Budget(1.0, 2.0, max_cost)
    batch = BatchCompletion(model, SAMPLING, str(folder / "out.json"), {}, 1, budget)
    wanted = [Request(PROMPT, key) for key in range(requests)]
    if isinstance(end, BaseException):
        with pytest.raises(type(end)):
            batch.answers(wanted)
    else:
        batch.answers(wanted)
    return model, budget


def spent_before(folder):
    """Return what the next run into this folder begins with."""
    budget = Budget(1.0, 2.0, 1.0)
    with Journal(folder / "out.json.journal.jsonl") as journal:
        answered_before(journal, 0, budget)
    return budget.cost


def kinds(folder):
    lines = (folder / "out.json.journal.jsonl").read_text().splitlines()
    return [json.loads(line)["kind"] for line in lines]


COST = (10 + 2 * 5) / 1e6  # of ANSWER


def test_lost_answers_count_after_an_interrupt(tmp_path):
    """Those that were lost, and the attempt that was in flight, which may be charged as well."""
    ask(tmp_path, lost=2, end=KeyboardInterrupt())
    assert kinds(tmp_path) == ["run", "sent", "lost", "lost"]
    assert spent_before(tmp_path) == pytest.approx(3 * MOST)


def test_lost_answers_count_once_after_the_answer(tmp_path):
    _, budget = ask(tmp_path, lost=2)
    assert budget.cost == pytest.approx(2 * MOST + COST) == spent_before(tmp_path)


def test_what_an_interrupted_run_lost_still_counts_after_the_answer(tmp_path):
    """The answer of another run does not have it, also where that run has no limit."""
    ask(tmp_path, lost=2, end=KeyboardInterrupt())
    _, budget = ask(tmp_path, lost=1, max_cost=None)
    assert budget.cost == pytest.approx(4 * MOST + COST) == spent_before(tmp_path)


def test_lost_answers_hold_up_a_rerun(tmp_path):
    """Three attempts are what the limit leaves room for: another run may not send a fourth."""
    limit = 3.5 * MOST
    ask(tmp_path, lost=2, end=KeyboardInterrupt(), max_cost=limit)
    model = LosingModel(0, ANSWER)
    batch = BatchCompletion(model, SAMPLING, str(tmp_path / "out.json"), {}, 1, Budget(1.0, 2.0, limit))
    with pytest.raises(UsageError, match="stopped with 0 of 1"):
        batch.answers([Request(PROMPT, 0)])
    assert model.asked == 0


@pytest.mark.parametrize("lost", [0, 3])
def test_a_refused_request_costs_what_was_lost_of_it(tmp_path, lost):
    for run in (1, 2, 3):
        _, budget = ask(tmp_path, lost=lost, end=REFUSED)
        assert not budget.reserved
        assert budget.cost == pytest.approx(run * lost * MOST) == spent_before(tmp_path)
    assert kinds(tmp_path) == ["run", "sent", *["lost"] * lost, "refused"] * 3


def test_a_refused_request_is_asked_again(tmp_path):
    """Any number of runs that bought nothing leave the whole limit to the one that is answered."""
    for _ in range(5):
        ask(tmp_path, end=REFUSED, max_cost=1.5 * MOST)
    model, budget = ask(tmp_path, max_cost=1.5 * MOST)
    assert model.asked == 1 and budget.cost == pytest.approx(COST)


def test_an_error_that_says_nothing_of_the_bill_counts_as_paid(tmp_path):
    ask(tmp_path, lost=1, end=KeyError("choices"))
    assert spent_before(tmp_path) == pytest.approx(2 * MOST)


def test_a_loss_that_cannot_be_journaled_ends_the_run_and_counts(tmp_path, monkeypatch):
    """The disk may have room again for the entry that ends the request."""
    append = Journal.append

    def full(journal, entry):
        if entry["kind"] == "lost":
            raise InputError("out.json: cannot be written (No space left on device)", "out.json")
        append(journal, entry)

    monkeypatch.setattr(Journal, "append", full)
    with pytest.raises(UsageError, match="No space left"):
        ask(tmp_path, lost=1)
    assert kinds(tmp_path) == ["run", "sent", "refused"]
    assert spent_before(tmp_path) == pytest.approx(MOST)


def test_journals_without_entries_of_losses_are_read_as_before(tmp_path):
    with Journal(tmp_path / "out.json.journal.jsonl") as journal:
        journal.append({"kind": "run", "how": {}})
        for key in (0, 1):
            journal.append({"kind": "sent", "index": key, "most": MOST})
        journal.append({"kind": "failed", "index": 0, "error": "", "too_long": False, "unanswered": 3 * MOST})
    assert spent_before(tmp_path) == pytest.approx(4 * MOST)


# ---- journals that somebody else has written ----

GOOD = {"kind": "answer", "index": 0, "text": "Yes.", "finish_reason": "stop", "prompt_tokens": 1}


@pytest.mark.parametrize(
    "line, told",
    [
        (b"{damaged", "line 2: is damaged"),
        (b"\xff\xfe\x00", "line 2: is damaged"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "no entry of a journal"),
        (b"null", "no entry of a journal"),
        (b'{"kind": ["answer"]}', "no entry of a journal"),
        (b'{"kind": "run"}', "run without how"),
        (b'{"kind": "run", "how": "x"}', "how is 'x'"),
        (b'{"kind": "sent", "index": 0}', "sent without most"),
        (b'{"kind": "sent", "index": 0, "most": NaN}', "most is 'nan'"),
        (b'{"kind": "lost", "index": 0, "most": "1"}', "most is '1'"),
        (b'{"kind": "lost", "index": 0, "most": -1}', "most is '-1'"),
        (b'{"kind": "answer", "text": "x"}', "answer without index"),
        (b'{"kind": "answer", "index": "0"}', "index is '0'"),
        (b'{"kind": "answer", "index": true}', "index is 'True'"),
        (b'{"kind": "answer", "index": 0, "text": null}', "text is 'None'"),
        (b'{"kind": "answer", "index": 0, "text": ["x"]}', "text is"),
        (b'{"kind": "answer", "index": 0, "finish_reason": 5}', "finish_reason is '5'"),
        (b'{"kind": "answer", "index": 0, "prompt_tokens": "5"}', "prompt_tokens is '5'"),
        (b'{"kind": "answer", "index": 0, "completion_tokens": -5}', "completion_tokens is '-5'"),
        (b'{"kind": "answer", "index": 0, "unanswered": 1e999}', "unanswered is 'inf'"),
        (b'{"kind": "answer", "index": 0}', "the answer to request 0 has no text"),
        (b'{"kind": "answer", "index": 0, "text": "x"}', "the answer to request 0 has no finish_reason"),
        (b'{"kind": "saved", "next": 1}', "saved without rows"),
        (b'{"kind": "saved", "next": 1, "rows": 1, "sha256": "", "counts": [], "kept_at": {}}', "counts is"),
        (b'{"kind": "saved", "next": 1, "rows": 1, "sha256": "", "counts": {}, "kept_at": {"x": 1}}', "kept_at is"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, told):
    path = tmp_path / "out.json.journal.jsonl"
    path.write_bytes(b'{"kind": "run", "how": {}}\n' + line + b"\n")
    batch = BatchCompletion(LosingModel(0, ANSWER), SAMPLING, str(tmp_path / "out.json"), {}, 1)
    with pytest.raises(UsageError, match="is damaged") as raised:
        batch.answers([Request(PROMPT, 0)])
    assert told in str(raised.value)


def test_a_journal_of_an_unknown_kind_of_entry_is_read(tmp_path):
    """Of a newer version; and one that cannot be read is a message."""
    path = tmp_path / "out.json.journal.jsonl"
    lines = [{"kind": "run", "how": {}}, {"kind": "of tomorrow", "text": "x"}, GOOD]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    batch = BatchCompletion(LosingModel(0, ANSWER), SAMPLING, str(tmp_path / "out.json"), {}, 1)
    assert batch.answers([Request(PROMPT, 0)])[0]["text"] == "Yes."
    path.unlink()
    path.mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        batch.answers([Request(PROMPT, 0)])


def test_what_was_sent_counts_for_a_later_limit(tmp_path):
    """A run without a limit journals it too, where it has prices."""
    ask(tmp_path, end=KeyboardInterrupt(), max_cost=None)
    assert kinds(tmp_path) == ["run", "sent"] and spent_before(tmp_path) == pytest.approx(MOST)


@pytest.mark.parametrize("prompt", ["half \ud83d", "\ude00", "\ud83d\ude00 and \ud800"])
def test_half_a_character_of_a_prompt_is_replaced(tmp_path, prompt):
    model, asked = LosingModel(0, ANSWER), []
    complete = model.complete
    model.complete = lambda prompt, *more: asked.append(prompt) or complete(prompt, *more)
    BatchCompletion(model, SAMPLING, str(tmp_path / "out.json"), {}, 1, Budget(1.0)).answers([Request(prompt, 0)])
    assert "\ufffd" in asked[0] and asked[0].encode()
