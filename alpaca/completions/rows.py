"""The rows of a file answered by a model: every answer journaled, a rerun continues, the output in the file's order."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alpaca.common.errors import InputError, ParameterError, UsageError, format_first
from alpaca.common.files import atomic_write, refuse_other_arguments
from alpaca.completions.api import NO_REASON, Model, Request, Sampling, seed_of, was_cut
from alpaca.completions.batch_endpoint import runner_for
from alpaca.completions.budget import Budget, Progress
from alpaca.completions.journal import Journal
from alpaca.completions.runner import Entry, answered_before
from alpaca.data.rows import Row

MOST_WORDS = 6  # of finish_reason that are named one by one


@dataclass
class BatchCompletion:
    """A given number of requests, each to be answered once; the journal lies beside the file that is made of them.

    Args:
        output_path: of that file.
        how: everything that an answer depends on, by the words that a message uses; a rerun must have the same.
        concurrency: requests in flight at the same time.
        drop_failed: whether requests may stay without an answer; else they are an error at the end. None: an error,
            and the command has no such flag.
        unit: what is counted.
        again: whether an answer of an earlier run, by its key, is asked for once more, with another seed if it had one.
    """

    model: Model
    sampling: Sampling
    output_path: str
    how: dict[str, Any]
    concurrency: int
    budget: Budget = field(default_factory=Budget)
    drop_failed: bool | None = False
    unit: str = "rows"
    again: Callable[[int, Entry], bool] | None = None

    def answers(self, requests: Iterable[Request]) -> dict[int, Entry]:
        """Ask for what is not in the journal. Return the journal's entries by the key of their request, in its order.

        Args:
            requests: taken when the model's endpoint is known.

        Raises:
            UsageError: as RequestRunner; the journal has answers to other requests; requests have no answer.
        """
        with Journal(f"{self.output_path}.journal.jsonl", self.output_path) as journal:
            check_same_run(journal, self.how, self.output_path)
            before = answered_before(journal, 0, self.budget)
            return asyncio.run(self._ask(journal, before, requests))

    async def _ask(self, journal: Journal, before: dict[int, Entry], requests: Iterable[Request]) -> dict[int, Entry]:
        async with runner_for(self.model, journal, self.budget, self.concurrency, overflows_count=False) as runner:
            journal.append({"kind": "run", "how": self.how, "time": time.time()})
            rows = {request.key: request for request in requests}
            runner.known = {key: entry for key, entry in before.items() if key in rows and entry["kind"] == "answer"}
            self._forget_unwanted(journal, runner.known, rows)
            answers: dict[int, Entry] = {}
            failed: list[Entry] = []
            if runner.known:
                print(f"continuing: {len(runner.known):,} answers from the journal", flush=True)
            progress = Progress(self.unit, len(rows), len(runner.known), self.budget)
            runner.on_wait = progress.wait
            try:
                async for ready in runner.answers(rows.values(), self.sampling):
                    answers |= {entry["index"]: entry for entry in ready if entry["kind"] == "answer"}
                    failed += [entry for entry in ready if entry["kind"] == "failed"]
                    done = len(answers) + len(runner.known)
                    progress.show(done, runner.asked, getattr(self.model, "retries", 0))
            finally:
                progress.close()
                print(progress.summary())
        runner.refuse_stop_by_cost(len(answers), len(rows))
        return self._checked(answers, failed, rows)

    def _forget_unwanted(self, journal: Journal, known: dict[int, Entry], rows: dict[int, Request]) -> None:
        """Drop the known answers that are to be asked for again. The seed of such a request is drawn from its own and
        from how often it was answered."""
        if self.again is None:
            return
        answered = Counter(entry["index"] for entry in journal if entry["kind"] == "answer")
        for key in [key for key, entry in known.items() if self.again(key, entry)]:
            del known[key]
            rows[key] = rows[key]._replace(seed=seed_of(rows[key].seed, answered[key]))

    def _checked(
        self, answers: dict[int, Entry], failed: list[Entry], requests: dict[int, Request]
    ) -> dict[int, Entry]:
        """Return the answers in the order of the rows. Print which rows have none, or one that was cut."""
        unanswered = _rows(sorted(entry["index"] for entry in failed), requests)
        if failed and not self.drop_failed:
            leave_out = ", or leave them out: {drop_failed}" if self.drop_failed is False else ""
            raise ParameterError(
                f"{len(failed)} of {len(requests)} {self.unit} have no answer (rows {format_first(unanswered)}); the "
                f"others are in the journal. Run again to ask for these{leave_out}. The first: {failed[0]['error']}",
                "drop_failed",
            )
        _note(f"{self.unit} have no answer and are left out", unanswered)
        answers = dict(sorted(answers.items()))
        if missing := sorted(set(requests) - set(answers) - {entry["index"] for entry in failed}):
            raise UsageError(f"{len(missing)} of {len(requests)} {self.unit} were not asked; run again to go on")
        for reason, keys in _by_reason(answers).items():
            how = (
                f"were cut at {self.sampling.max_tokens:,} tokens" if reason == "length" else f"ended by {reason!r:.60}"
            )
            how = "came without a finish_reason and count as whole" if reason == NO_REASON else how
            _note(f"answers {how}", _rows(keys, requests))
        thoughtful = [key for key, entry in answers.items() if entry.get("reasoning")]
        _note("answers had thoughts in front, which only the journal has (reasoning)", _rows(thoughtful, requests))
        if self.budget.max_cost is not None:
            dear = [
                key
                for key, entry in answers.items()
                if None in (entry.get("prompt_tokens"), entry.get("completion_tokens"))
            ]
            _note("answers came without token counts that can be true, and count in full", _rows(dear, requests))
        return answers


def _by_reason(answers: dict[int, Entry]) -> dict[str, list[int]]:
    """Return the keys of the answers that did not come to their end, or may not have, by their finish_reason."""
    found: dict[str, list[int]] = {}
    for key, entry in answers.items():
        if was_cut(entry["finish_reason"]) or entry["finish_reason"] == NO_REASON:
            reason = entry["finish_reason"]
            found.setdefault(reason if reason in found or len(found) < MOST_WORDS else "other words", []).append(key)
    return found


def _rows(keys: Sequence[int], requests: dict[int, Request]) -> list[int]:
    return [key if requests[key].row is None else requests[key].row for key in keys]


def _note(what: str, rows: Sequence[int]) -> None:
    if rows:
        print(f"note: {len(rows)} {what}, rows {format_first(rows)}")


def write_answered(path: str, rows: Sequence[Row], answers: dict[int, Entry], **more: Any) -> None:
    """Write the rows that have an answer, by their number, with it as `output` and `more` fields."""
    texts = {number: entry["text"].strip() for number, entry in answers.items()}
    _note("answers are empty", [number for number, text in texts.items() if not text])
    write_rows(path, [{**rows[number], "output": text, **more} for number, text in texts.items()])


def check_same_run(journal: Journal, how: dict[str, Any], output_path: str) -> None:
    """Raise InputError if the journal has answers to other requests, or of another model: nobody wants a mixture."""
    begun = False
    for entry in journal:
        begun = begun or entry["kind"] == "run"
        if not begun:
            raise InputError(
                f"{output_path}: {journal.path} has answers from an unknown run; move it away", output_path
            )
        if entry["kind"] == "run" and "how" not in entry:
            raise InputError(f"{output_path}: {journal.path} is that of another command; move it away", output_path)
        if entry["kind"] == "run":
            refuse_other_arguments(journal.path, entry["how"], how, output_path)


def write_rows(path: str | Path, rows: list[Row]) -> None:
    """Write a JSON list, or for a name that ends in .jsonl one object a line; whole or not at all."""
    try:
        with atomic_write(path) as file:
            if Path(path).suffix == ".jsonl":
                file.writelines(json.dumps(row, default=str) + "\n" for row in rows)
            else:
                json.dump(rows, file, indent=4, default=str)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})", path) from error
    print(f"{len(rows)} rows in {path}")
