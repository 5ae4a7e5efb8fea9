"""The rows of a file answered by a model: every answer journaled, a rerun continues, the output in the file's order."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from alpaca.common.errors import InputError, ParameterError, UsageError, format_first
from alpaca.common.files import atomic_write, refuse_other_arguments
from alpaca.completions.api import NO_REASON, Model, Request, Sampling, seed_of, was_cut
from alpaca.completions.batch_runner import runner_for
from alpaca.completions.budget import Budget, Progress
from alpaca.completions.journal import AnswersOfJournal, Journal
from alpaca.completions.runner import Entry, answered_before, check_answer
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

    def answers(self, requests: Iterable[Request]) -> Mapping[int, Entry]:
        """Ask for what is not in the journal. Return the journal's entries by the key of their request, in the order of
        the keys; each is read from the disk when it is asked for.

        Args:
            requests: taken when the model's endpoint is known.

        Raises:
            UsageError: as RequestRunner; the journal has answers to other requests; requests have no answer.
        """
        with Journal(f"{self.output_path}.journal.jsonl", self.output_path) as journal:
            seen = _Seen(counts=self.again is not None)
            known = answered_before(journal, 0, self.budget, partial(self._look, journal, seen))
            places = asyncio.run(self._ask(journal, known, requests, seen))
            return AnswersOfJournal(journal, dict(sorted(places.items())))

    def _look(self, journal: Journal, seen: "_Seen", entry: Entry) -> None:
        check_same_run(journal, entry, not seen.entries, self.how, self.output_path)
        check_answer(entry, journal)
        seen.take(entry)

    async def _ask(
        self, journal: Journal, known: dict[int, int], requests: Iterable[Request], seen: "_Seen"
    ) -> dict[int, int]:
        """Return where the journal has the answers, by key."""
        async with runner_for(self.model, journal, self.budget, self.concurrency, overflows_count=False) as runner:
            journal.append({"kind": "run", "how": self.how, "time": time.time()})
            rows = {request.key: request for request in requests}
            places = {key: place for key, place in known.items() if key in rows and key not in seen.failed}
            self._forget_unwanted(journal, places, rows, seen)
            failed: list[Entry] = []
            if places:
                print(f"continuing: {len(places):,} answers from the journal", flush=True)
            progress = Progress(self.unit, len(rows), len(places), self.budget)
            runner.on_wait, runner.handed = progress.wait, {}
            try:
                missing = [request for key, request in rows.items() if key not in places]
                async for ready in runner.answers(missing, self.sampling):
                    for entry in ready:
                        seen.take(entry)
                        place = runner.handed.pop(entry["index"])
                        if entry["kind"] == "answer":
                            places[entry["index"]] = place
                        else:
                            failed.append(entry)
                    progress.show(len(places), runner.asked, getattr(self.model, "retries", 0))
            finally:
                progress.close()
                print(progress.summary())
        runner.refuse_stop_by_cost(len(places), len(rows))
        self._check(sorted(places), failed, rows, seen)
        return places

    def _forget_unwanted(
        self, journal: Journal, places: dict[int, int], rows: dict[int, Request], seen: "_Seen"
    ) -> None:
        """Drop the known answers that are to be asked for again. The seed of such a request is drawn from its own and
        from how often it was answered."""
        if self.again is None:
            return
        for key in [key for key, place in places.items() if self.again(key, journal.read(place))]:
            del places[key]
            rows[key] = rows[key]._replace(seed=seed_of(rows[key].seed, seen.answered[key]))

    def _check(self, keys: list[int], failed: list[Entry], requests: dict[int, Request], seen: "_Seen") -> None:
        """Print which rows have no answer, or one that was cut. `keys`: those of the answers, in their order."""
        unanswered = _rows(sorted(entry["index"] for entry in failed), requests)
        if failed and not self.drop_failed:
            leave_out = ", or leave them out: {drop_failed}" if self.drop_failed is False else ""
            raise ParameterError(
                f"{len(failed)} of {len(requests)} {self.unit} have no answer (rows {format_first(unanswered)}); the "
                f"others are in the journal. Run again to ask for these{leave_out}. The first: {failed[0]['error']}",
                "drop_failed",
            )
        _note(f"{self.unit} have no answer and are left out", unanswered)
        if missing := sorted(set(requests) - set(keys) - {entry["index"] for entry in failed}):
            raise UsageError(f"{len(missing)} of {len(requests)} {self.unit} were not asked; run again to go on")
        odd = {key: seen.odd[key] for key in keys if key in seen.odd}
        for reason, of_reason in _by_reason(odd).items():
            how = (
                f"were cut at {self.sampling.max_tokens:,} tokens" if reason == "length" else f"ended by {reason!r:.60}"
            )
            how = "came without a finish_reason and count as whole" if reason == NO_REASON else how
            _note(f"answers {how}", _rows(of_reason, requests))
        thoughtful = [key for key, oddity in odd.items() if oddity.thoughts]
        _note("answers had thoughts in front, which only the journal has (reasoning)", _rows(thoughtful, requests))
        if self.budget.max_cost is not None:
            dear = [key for key, oddity in odd.items() if oddity.without_counts]
            _note("answers came without token counts that can be true, and count in full", _rows(dear, requests))


class _Oddity(NamedTuple):
    """What is odd about an answer. `reason`: its finish_reason, if it did not come to its end or may not have."""

    reason: str | None
    thoughts: bool
    without_counts: bool


class _Seen:
    """What the entries of a journal say, without their texts. `counts`: also how often each request was answered."""

    def __init__(self, counts: bool) -> None:
        self.counts = counts
        self.entries = 0
        self.odd: dict[int, _Oddity] = {}
        self.failed: set[int] = set()  # their last attempt failed
        self.answered: Counter[int] = Counter()

    def take(self, entry: Entry) -> None:
        self.entries += 1
        if entry["kind"] not in ("answer", "failed"):
            return
        key, reason = entry["index"], entry.get("finish_reason", NO_REASON)
        self.odd.pop(key, None)
        if entry["kind"] == "failed":
            self.failed.add(key)
            return
        self.failed.discard(key)
        if self.counts:
            self.answered[key] += 1
        oddity = _Oddity(
            reason if was_cut(reason) or reason == NO_REASON else None,
            bool(entry.get("reasoning")),
            None in (entry.get("prompt_tokens"), entry.get("completion_tokens")),
        )
        if any(oddity):
            self.odd[key] = oddity


def _by_reason(odd: dict[int, _Oddity]) -> dict[str, list[int]]:
    """Return the keys of the answers that did not come to their end, or may not have, by their finish_reason."""
    found: dict[str, list[int]] = {}
    for key, (reason, *_) in odd.items():
        if reason is not None:
            found.setdefault(reason if reason in found or len(found) < MOST_WORDS else "other words", []).append(key)
    return found


def _rows(keys: Sequence[int], requests: dict[int, Request]) -> list[int]:
    return [key if requests[key].row is None else requests[key].row for key in keys]


def _note(what: str, rows: Sequence[int]) -> None:
    if rows:
        print(f"note: {len(rows)} {what}, rows {format_first(rows)}")


def write_answered(path: str, rows: Sequence[Row], answers: Mapping[int, Entry], **more: Any) -> None:
    """Write the rows that have an answer, by their number, with it as `output` and `more` fields."""
    empty: list[int] = []

    def answered() -> Iterator[Row]:
        for number, entry in answers.items():
            text = entry["text"].strip()
            if not text:
                empty.append(number)
            yield {**rows[number], "output": text, **more}

    number = _write(path, answered())
    _note("answers are empty", empty)
    print(f"{number} rows in {path}")


def check_same_run(journal: Journal, entry: Entry, first: bool, how: dict[str, Any], output_path: str) -> None:
    """Raise InputError if an entry is of answers to other requests, or of another model: nobody wants a mixture.

    Args:
        first: whether it is the journal's first entry.
    """
    if first and entry["kind"] != "run":
        raise InputError(f"{output_path}: {journal.path} has answers from an unknown run; move it away", output_path)
    if entry["kind"] == "run" and "how" not in entry:
        raise InputError(f"{output_path}: {journal.path} is that of another command; move it away", output_path)
    if entry["kind"] == "run":
        refuse_other_arguments(journal.path, entry["how"], how, output_path)


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Write a JSON list, or for a name that ends in .jsonl one object a line; whole or not at all."""
    print(f"{_write(path, rows)} rows in {path}")


def _write(path: str | Path, rows: Iterable[Row]) -> int:
    """Write rows one by one, as json.dump would write their list. Return their number."""
    number, in_lines = 0, Path(path).suffix == ".jsonl"
    try:
        with atomic_write(path) as file:
            for number, row in enumerate(rows, 1):
                begin = "[\n" if number == 1 else ",\n"
                file.write(json.dumps(row, default=str) + "\n" if in_lines else begin + item_of_list(row))
            if not in_lines:
                file.write("\n]" if number else "[]")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})", path) from error
    return number


def item_of_list(row: Row) -> str:
    """Return a row as json.dump writes it, indented by 4, inside of a list."""
    return json.dumps([row], indent=4, default=str)[2:-2]
