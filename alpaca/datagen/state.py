"""The state of a self-instruct run: kept tasks, the novelty filter, the counts, and how a rerun finds them again.

The journal has every answer. regen.json, in 2023's format, has the tasks that were kept; a line of the journal says
for each regen.json, by its SHA-256, up to which request it goes. A rerun takes the tasks from regen.json, and only the
answers after it from the journal. A regen.json that no line knows (of 2023, or edited since) is taken as it is.
"""

import hashlib
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alpaca.common.errors import InputError, ParameterError
from alpaca.common.files import atomic_write, parse_json
from alpaca.completions.api import NO_REASON, Request, was_cut, whole_characters
from alpaca.completions.journal import Journal
from alpaca.datagen.novelty import NoveltyFilter
from alpaca.datagen.self_instruct import Item, encode_prompt, parse

REGEN = "regen.json"
JOURNAL = "generation_journal.jsonl"
REPORT = "generation_report.json"
LAG = 64  # requests whose answers a prompt with generated tasks does not wait for
TASKS_OF_A_LIST = 20  # in the prompt's words: its examples, and what an answer adds
USELESS = 50  # answers without a new task, in a row
SAVE_EVERY = 30.0  # seconds, or longer where saving takes long


class Generation:
    """Tasks kept so far, and what is done with the next answers.

    Args:
        seeds: rows with instruction, input and output.
        head: the text above the examples of a prompt.
        num_examples, num_generated: examples in a prompt, and how many of them are tasks kept before.
        seed: of the choice of examples; None: an earlier run's, or a random one.
        workers, stable_ties: of the novelty filter.
    """

    def __init__(
        self,
        output_dir: Path,
        journal: Journal,
        seeds: Sequence[dict[str, str]],
        head: str,
        num_examples: int,
        num_generated: int = 0,
        seed: int | None = None,
        workers: int = 1,
        stable_ties: bool = False,
    ):
        self.output_dir = output_dir
        self.journal = journal
        self.seeds = seeds
        self.head = head
        self.num_examples, self.num_generated = num_examples, num_generated
        self.counts: Counter[str] = Counter()  # requests, answers, proposed, kept; "rejected: …" by reason
        self.next = 0  # request that is delivered next
        rows, digest = _read_regen(output_dir / REGEN)
        self.rows = [_as_text(row) for row in rows]  # their part of regen.json: a fifth of the memory that dicts take
        self.kept_at = {0: len(self.rows)}  # tasks kept of the requests before a request
        self.seed = self._continue(digest, seed)
        known = [row["instruction"] for row in (*seeds, *rows)]
        self.filter = NoveltyFilter(known, workers=workers, stable_ties=stable_ties)
        self.saved_at = time.monotonic()
        self.saving_took = 0.0
        self.useless = 0

    def _continue(self, digest: str | None, seed: int | None) -> int:
        """Go to where an earlier run in this folder was stopped. Return the seed."""
        saved = None
        for entry in self.journal:
            if entry["kind"] == "run" and seed is None:
                seed = entry.get("seed")
            elif entry["kind"] == "saved" and (saved is None or saved["sha256"] != digest or entry["sha256"] == digest):
                saved = entry
        if saved is not None and digest is not None:
            self.next, self.counts = saved["next"], Counter(saved["counts"])
            self.kept_at = {int(request): rows for request, rows in saved["kept_at"].items()}
            if not set(range(max(self.next - LAG, 0), self.next + 1)) <= self.kept_at.keys():
                raise InputError(f"{self.journal.path}: is damaged (a saved state without its counts)", self.output_dir)
        return random.SystemRandom().randrange(2**32) if seed is None else seed

    # ---- requests ----

    def requests(self) -> Iterator[Request]:
        """Yield all requests from the next one on, without an end. One is made when it is taken."""
        for index in itertools.count(self.next):
            yield Request(self._prompt_of(index), index)

    def _prompt_of(self, index: int) -> str:
        """Return the prompt of request `index`: of the seed and, with generated tasks, of those kept of the requests up
        to `index` - LAG, however many requests are in flight."""
        draw = random.Random(f"{self.seed} {index}")
        available = min(self.kept_at[max(index - LAG, 0)], len(self.rows)) if self.num_generated else 0
        generated = [
            json.loads(self.rows[at]) for at in draw.sample(range(available), min(self.num_generated, available))
        ]
        examples = draw.sample(self.seeds, self.num_examples - len(generated)) + generated
        draw.shuffle(examples)
        return encode_prompt(examples, self.head)

    def wants(self, target: int, in_flight: int) -> bool:
        """Return whether another request is needed for `target` tasks, as far as the answers so far tell."""
        if self.num_generated and in_flight >= LAG:
            return False
        most = TASKS_OF_A_LIST - self.num_examples  # of an answer; fewer would ask for more than is wanted
        yields = self.counts["kept"] / self.counts["answers"] if self.counts["answers"] else max(most, 1)
        missing = target - len(self.rows)
        return missing > 0 and missing > in_flight * yields

    # ---- answers ----

    def take(self, entries: Sequence[dict[str, Any]]) -> None:
        """Filter the answers of the next requests, in their order, and keep what is new.

        Raises:
            UsageError: nothing of many answers is of use.
        """
        items = [self._parse(entry) for entry in entries]
        candidates = [item.row for of_one in items for item in of_one if item.row is not None]
        similarities = iter(self.filter.filter([row["instruction"] for row in candidates]))
        for entry, of_one in zip(entries, items):
            before = len(self.rows)
            for item in of_one:
                similarity = next(similarities) if item.row is not None else None
                if similarity is not None:
                    self.rows.append(_as_text({**item.row, **similarity._asdict()}))
                else:
                    self.counts[f"rejected: {item.reason or 'too similar'}"] += 1
            kept = len(self.rows) - before
            self.counts.update(requests=1, answers=entry["kind"] == "answer", proposed=len(of_one), kept=kept)
            self.useless = 0 if kept else self.useless + (entry["kind"] == "answer")
            self.next = entry["index"] + 1
            self.kept_at[self.next] = len(self.rows)
            self.kept_at.pop(self.next - LAG - 1, None)
        if time.monotonic() - self.saved_at > max(SAVE_EVERY, 20 * self.saving_took):
            self.save()
        if self.useless >= USELESS:
            raise ParameterError(
                f"the last {self.useless} answers gave no new task ({self.summary()}); look at them in "
                f"{self.journal.path}: does the model follow the prompt, does {{parser}} fit it?",
                "parser",
            )

    def _parse(self, entry: dict[str, Any]) -> list[Item]:
        if entry["kind"] == "failed":
            return []
        if not {"examples", "parser"} <= entry.keys():
            raise InputError(f"{self.journal.path}: has answers of another command; move it away", self.output_dir)
        reason = entry["finish_reason"]
        self.counts["answers_without_a_finish_reason"] += reason == NO_REASON
        self.counts["answers_cut_otherwise_than_by_length"] += was_cut(reason) and reason != "length"
        self.counts["answers_with_thoughts"] += bool(entry.get("reasoning"))
        return parse(entry["text"], reason, entry["examples"], entry["parser"])

    def summary(self) -> str:
        """Return "1,234 tasks proposed, 1,000 kept; rejected: 200 too similar, 34 malformed"."""
        rejected = [(reason.removeprefix("rejected: "), n) for reason, n in self.counts.most_common() if ": " in reason]
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in rejected) or "none"
        told = f"{self.counts['proposed']:,} tasks proposed, {self.counts['kept']:,} kept; rejected: {reasons}"
        odd = [
            f"{n:,} {name.replace('_', ' ')}" for name, n in self.counts.items() if name.startswith("answers_") and n
        ]
        return "; ".join([told, *odd])

    def _regen(self) -> Iterator[str]:
        """Yield the text of regen.json in pieces."""
        for number, row in enumerate(self.rows):
            yield ("[\n" if number == 0 else ",\n") + row
        yield "\n]" if self.rows else "[]"

    def save(self) -> None:
        """Write regen.json, after its line in the journal: a kill between leaves one that an older line knows."""
        begin = time.monotonic()
        digest = hashlib.sha256()
        for piece in self._regen():
            digest.update(piece.encode())
        digest = digest.hexdigest()
        self.journal.append(
            {
                "kind": "saved",
                "next": self.next,
                "rows": len(self.rows),
                "sha256": digest,
                "counts": self.counts,
                "kept_at": self.kept_at,
            }
        )
        try:
            with atomic_write(self.output_dir / REGEN) as file:
                file.writelines(self._regen())
        except OSError as error:
            raise InputError(
                f"{self.output_dir}: {REGEN} cannot be written ({error.strerror}); nothing is lost, every answer is in "
                "the journal",
                self.output_dir,
            ) from error
        self.saved_at = time.monotonic()
        self.saving_took = self.saved_at - begin


def _as_text(row: dict[str, Any]) -> str:
    """Return a task as 2023's jdump writes it inside the list."""
    return json.dumps([row], indent=4, default=str)[2:-2]


def _read_regen(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Return the tasks of a regen.json, and its digest; ([], None) if there is none."""
    if not path.exists():
        return [], None
    try:
        content = path.read_bytes()
        rows = parse_json(content)
        if not isinstance(rows, list):
            raise ValueError(f"it is of type {type(rows).__name__}")
        for number, row in enumerate(rows):
            if not all(isinstance(row[name], str) for name in ("instruction", "input", "output")):
                raise ValueError(f"row {number}: instruction, input and output must be texts")
            row |= {name: whole_characters(row[name]) for name in ("instruction", "input", "output")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is not a list of tasks ({error!r}); move it away to start over", path) from error
    return rows, hashlib.sha256(content).hexdigest()
