"""The rows of a file answered by a model: every answer journaled, a rerun continues, the output in the file's order."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alpaca.asking import Asker, Budget, Model, answered_before
from alpaca.client import Sampling
from alpaca.data import Row
from alpaca.errors import UsageError
from alpaca.files import atomic_write
from alpaca.journal import Journal
from alpaca.progress import Progress


@dataclass
class RowAnswers:
    """What is answered by whom, into which file.

    Args:
        output_path: of the JSON that is written when all rows are answered; its journal lies beside it.
        settle: as for Asker.
        prompt_of: the prompt of a row, by its number.
        how: everything that an answer depends on, by the words that a message uses; a rerun must have the same.
        at_once: requests on their way at the same time.
        order: numbers of the rows, in the order in which they are asked; those left out are left out of the output.
        seed_of: as for Asker, by the number of a row.
        more: fields that every written row gets.
        drop_failed: leave out rows without an answer; else they are an error at the end.
        limit_flag: what cuts an answer.
    """

    rows: Sequence[Row]
    output_path: str
    model: Model
    settle: Callable[[str], tuple[Sampling, dict[str, Any]]]
    prompt_of: Callable[[int], str]
    how: dict[str, Any]
    at_once: int
    budget: Budget = field(default_factory=Budget)
    order: Sequence[int] | None = None
    seed_of: Callable[[int], int] | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    drop_failed: bool = False
    limit_flag: str = "--max_tokens"

    def run(self) -> None:
        """Ask for what is not in the journal, and write the output.

        Raises:
            UsageError: as Asker.run; the journal has answers to another question; rows have no answer.
        """
        with Journal(f"{self.output_path}.journal.jsonl", "--output_path") as journal:
            check_same_run(journal, self.how)
            before = answered_before(journal, 0, self.budget)
            known = {index: entry for index, entry in before.items() if entry["kind"] == "answer"}
            journal.append({"kind": "run", "how": self.how, "time": time.time()})
            self._finish(self._ask(journal, known))

    def _ask(self, journal: Journal, known: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """Journal entries by the number of their row."""
        order = self.order if self.order is not None else range(len(self.rows))
        answers: dict[int, dict[str, Any]] = {}
        progress = Progress("rows", len(order), len(known), self.budget)

        def take(entries: list[dict[str, Any]]) -> None:
            answers.update({order[entry["index"]]: entry for entry in entries if entry["kind"] == "answer"})
            progress.show(len(answers) + len(asker.known), asker.asked, getattr(self.model, "retries", 0))

        seed_of = self.seed_of and (lambda index: self.seed_of(order[index]))
        asker = Asker(self.model, self.settle, journal, self.budget, lambda index: self.prompt_of(order[index]),
                      lambda on_their_way: asker.delivered + on_their_way < len(order), take, self.at_once,
                      known=known, seed_of=seed_of)  # fmt: skip
        try:
            asker.run()
        finally:
            progress.close()
            print(progress.told())
        asker.refuse_stop_by_cost(len(answers), len(order))
        return answers

    def _finish(self, answers: dict[int, dict[str, Any]]) -> None:
        """Write the answered rows, and say which answers are no good."""
        wanted = sorted(self.order) if self.order is not None else range(len(self.rows))
        failed = [number for number in wanted if number not in answers]
        if failed and not self.drop_failed:
            raise UsageError(
                f"{len(failed)} of {len(wanted)} rows have no answer (rows {failed[:10]}); run again to ask for them, "
                "or pass --drop_failed; the others are in the journal"
            )
        texts = {number: entry["text"].strip() for number, entry in sorted(answers.items())}
        cut = [number for number, entry in sorted(answers.items()) if entry["finish_reason"] == "length"]
        for what, numbers in (
            ("rows have no answer and are left out", failed),
            ("answers are empty", [number for number, text in texts.items() if not text]),
            (f"answers were cut at {self.limit_flag}", cut),
        ):
            if numbers:
                print(f"note: {len(numbers)} {what}, rows {first_of(numbers)}")
        write_rows(self.output_path, [{**self.rows[n], "output": text, **self.more} for n, text in texts.items()])


def check_same_run(journal: Journal, how: dict[str, Any]) -> None:
    """Raise UsageError if the journal has answers to other rows, or of another model: a mixture is nobody's wish."""
    for entry in journal:
        if entry["kind"] == "run" and entry["how"] != how:
            other = ", ".join(
                f"{name} {entry['how'].get(name)!r}" for name in how if entry["how"].get(name) != how[name]
            )
            raise UsageError(f"--output_path: {journal.path} has answers to another question ({other}); choose another "
                             "--output_path, or move the journal away")  # fmt: skip


def first_of(numbers: Sequence[int]) -> str:
    """ "0, 1, 2 …", of at most ten"""
    return ", ".join(map(str, numbers[:10])) + " …" * (len(numbers) > 10)


def write_rows(path: str | Path, rows: list[Row]) -> None:
    """As a JSON list, whole or not at all."""
    try:
        with atomic_write(path) as file:
            json.dump(rows, file, indent=4, default=str)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from error
    print(f"{len(rows)} rows in {path}")
