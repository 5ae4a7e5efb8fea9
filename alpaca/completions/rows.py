"""The rows of a file answered by a model: every answer journaled, a rerun continues, the output in the file's order."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alpaca.common.errors import UsageError, format_first
from alpaca.common.files import atomic_write
from alpaca.completions.api import Model, Sampling
from alpaca.completions.budget import Budget, Progress
from alpaca.completions.journal import Journal
from alpaca.completions.runner import RequestRunner, answered_before
from alpaca.data.rows import Row

Entry = dict[str, Any]  # of a journal


@dataclass
class BatchCompletion:
    """What is answered by whom, into which file.

    Args:
        output_path: of the JSON that is written when all rows are answered; its journal lies beside it.
        prepare: as for RequestRunner.
        prompt_of: the prompt of a row, by its number.
        how: everything that an answer depends on, by the words that a message uses; a rerun must have the same.
        at_once: requests on their way at the same time.
        order: numbers of the rows, in the order in which they are asked; those left out are left out of the output.
        seed_of: as for RequestRunner, by the number of a row.
        more: fields that every written row gets.
        drop_failed: leave out rows without an answer; else they are an error at the end, which names drop_flag, where
            the command has one.
        limit_flag: what cuts an answer.
        number_of: what messages call a row, by its number.
        unit: what is counted; path_flag: that of output_path.
    """

    rows: Sequence[Row]
    output_path: str
    model: Model
    prepare: Callable[[str], tuple[Sampling, dict[str, Any]]]
    prompt_of: Callable[[int], str]
    how: dict[str, Any]
    concurrency: int
    budget: Budget = field(default_factory=Budget)
    order: Sequence[int] | None = None
    seed_of: Callable[[int], int] | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    drop_failed: bool = False
    drop_flag: str | None = "--drop_failed"
    limit_flag: str = "--max_tokens"
    number_of: Callable[[int], int] = int
    unit: str = "rows"
    path_flag: str = "--output_path"

    def run(self) -> None:
        """Ask for what is not in the journal, and write the output.

        Raises:
            UsageError: as `answers`; the output cannot be written.
        """
        texts = {number: entry["text"].strip() for number, entry in self.answers().items()}
        self._note("answers are empty", [number for number, text in texts.items() if not text])
        write_rows(self.output_path, [{**self.rows[n], "output": text, **self.more} for n, text in texts.items()])

    def answers(self) -> dict[int, Entry]:
        """Ask for what is not in the journal. Returns the journal's entries by the number of their row, in its order.

        Raises:
            UsageError: as RequestRunner.run; the journal has answers to another question; rows have no answer.
        """
        with Journal(f"{self.output_path}.journal.jsonl", self.path_flag) as journal:
            check_same_run(journal, self.how, self.path_flag)
            before = answered_before(journal, 0, self.budget)
            journal.append({"kind": "run", "how": self.how, "time": time.time()})
            return self._checked(*self._ask(journal, before))

    @property
    def _order(self) -> Sequence[int]:
        return self.order if self.order is not None else range(len(self.rows))

    def _ask(self, journal: Journal, before: dict[int, Entry]) -> tuple[dict[int, Entry], list[Entry]]:
        """Answers by the number of their row, those of `before` too; and what failed."""
        order = self._order
        known = {place: before[row] for place, row in enumerate(order) if before.get(row, {}).get("kind") == "answer"}
        answers: dict[int, Entry] = {}
        failed: list[Entry] = []
        progress = Progress(self.unit, len(order), len(known), self.budget)

        def take(entries: list[Entry]) -> None:
            answers.update({entry["index"]: entry for entry in entries if entry["kind"] == "answer"})
            failed.extend(entry for entry in entries if entry["kind"] == "failed")
            progress.show(len(answers) + len(asker.known), asker.asked, getattr(self.model, "retries", 0))

        seed_of = self.seed_of and (lambda index: self.seed_of(order[index]))
        asker = RequestRunner(
            self.model,
            self.prepare,
            journal,
            self.budget,
            lambda index: self.prompt_of(order[index]),
            lambda in_flight: asker.delivered + in_flight < len(order),
            take,
            self.concurrency,
            known=known,
            seed_of=seed_of,
            journaled_as=order.__getitem__,
            overflows_count=False,
        )
        try:
            asker.run()
        finally:
            progress.close()
            print(progress.told())
        asker.refuse_stop_by_cost(len(answers), len(order))
        return answers, failed

    def _checked(self, answers: dict[int, Entry], failed: list[Entry]) -> dict[int, Entry]:
        """In the order of the rows; says which have no answer, or one that was cut."""
        if failed and not self.drop_failed:
            rows = format_first(self._named(sorted(entry["index"] for entry in failed)))
            leave_out = f", or leave them out: {self.drop_flag}" if self.drop_flag else ""
            raise UsageError(
                f"{len(failed)} of {len(self._order)} {self.unit} have no answer (rows {rows}); the others are in the "
                f"journal. Run again to ask for these{leave_out}. The first: {failed[0]['error']}"
            )
        self._note(f"{self.unit} have no answer and are left out", sorted(entry["index"] for entry in failed))
        answers = dict(sorted(answers.items()))
        cut = [number for number, entry in answers.items() if entry["finish_reason"] == "length"]
        self._note(f"answers were cut at {self.limit_flag}", cut)
        return answers

    def _note(self, what: str, numbers: Sequence[int]) -> None:
        if numbers:
            print(f"note: {len(numbers)} {what}, rows {format_first(self._named(numbers))}")

    def _named(self, numbers: Sequence[int]) -> list[int]:
        return [self.number_of(number) for number in numbers]


def check_same_run(journal: Journal, how: dict[str, Any], flag: str = "--output_path") -> None:
    """Raise UsageError if the journal has answers to other rows, or of another model: a mixture is nobody's wish."""
    how, begun = json.loads(json.dumps(how)), False
    for entry in journal:
        begun = begun or entry["kind"] == "run"
        if not begun:
            raise UsageError(f"{flag}: {journal.path} begins with answers to nobody knows what; move it away")
        if entry["kind"] == "run" and entry["how"] != how:
            names = [name for name in {**entry["how"], **how} if entry["how"].get(name) != how.get(name)]
            other = ", ".join(f"{name} {entry['how'].get(name)!r}" for name in names)
            raise UsageError(
                f"{flag}: {journal.path} has answers to another question ({other}); choose another "
                f"{flag}, or move the journal away"
            )


def write_rows(path: str | Path, rows: list[Row]) -> None:
    """As a JSON list, or for a name that ends in .jsonl one object a line; whole or not at all."""
    try:
        with atomic_write(path) as file:
            if Path(path).suffix == ".jsonl":
                file.writelines(json.dumps(row, default=str) + "\n" for row in rows)
            else:
                json.dump(rows, file, indent=4, default=str)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from error
    print(f"{len(rows)} rows in {path}")
