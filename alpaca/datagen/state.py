"""The state of a self-instruct run: kept tasks, the novelty filter, the counts, and how a rerun finds them again.

The journal has every answer. regen.json, in 2023's format, has the tasks that were kept; a line of the journal says
for each regen.json, by its SHA-256, up to which request it goes. A rerun takes the tasks from regen.json, and only the
answers after it from the journal. A regen.json that no line knows (of 2023, or edited since) is taken as it is.
"""

import errno
import hashlib
import itertools
import json
import os
import random
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TextIO

from alpaca.common.errors import InputError, ParameterError
from alpaca.common.files import atomic_write, next_json_item, parse_json, sha256_of_file
from alpaca.completions.api import NO_REASON, Request, was_cut, whole_characters
from alpaca.completions.budget import Budget
from alpaca.completions.journal import Journal
from alpaca.completions.rows import item_of_list
from alpaca.completions.runner import answered_before
from alpaca.datagen.novelty import Exclusion, NoveltyFilter
from alpaca.datagen.self_instruct import Item, encode_prompt, parse

REGEN = "regen.json"
JOURNAL = "generation_journal.jsonl"
REPORT = "generation_report.json"
LAG = 64  # requests whose answers a prompt with generated tasks does not wait for
TASKS_OF_A_LIST = 20  # in the prompt's words: its examples, and what an answer adds
USELESS = 50  # answers without a new task, in a row
SAVE_EVERY = 30.0  # seconds, or longer where saving takes long
PIECE = 1 << 20  # characters of regen.json that are read at a time
AT_ONCE = 10_000  # instructions that the filter is told at a time


class Generation:
    """Tasks kept so far, and what is done with the next answers.

    Args:
        seeds: rows with instruction, input and output.
        head: the text above the examples of a prompt.
        num_examples, num_generated: examples in a prompt, and how many of them are tasks kept before.
        budget: counts what earlier runs have cost.
        seed: of the choice of examples; None: an earlier run's, or a random one.
        workers, stable_ties, details: of the novelty filter.
        excluded: texts of evaluation sets, which nothing kept may resemble.
    """

    def __init__(
        self,
        output_dir: Path,
        journal: Journal,
        seeds: Sequence[dict[str, str]],
        head: str,
        num_examples: int,
        num_generated: int = 0,
        budget: Budget | None = None,
        seed: int | None = None,
        workers: int = 1,
        stable_ties: bool = False,
        details: bool = True,
        excluded: Sequence[str] = (),
    ):
        self.output_dir = output_dir
        self.journal = journal
        self.seeds = seeds
        self.head = head
        self.num_examples, self.num_generated = num_examples, num_generated
        self.counts: Counter[str] = Counter()  # requests, answers, proposed, kept; "rejected: …" by reason
        self.next = 0  # request that is delivered next
        self.kept_at: dict[int, int] = {0: 0}  # tasks kept of the requests before a request
        self.seed, self.known, in_journal = self._read_journal(budget or Budget(), seed)
        self.filter = NoveltyFilter(
            (seed["instruction"] for seed in seeds), workers=workers, stable_ties=stable_ties, details=details
        )
        self.exclusion = Exclusion(excluded) if excluded else None
        self.rows, self.kept_excluded = KeptTasks(output_dir), 0
        self._read_regen(as_it_is=in_journal)
        self.saved_at = time.monotonic()
        self.saving_took = 0.0
        self.useless = 0

    def _read_journal(self, budget: Budget, seed: int | None) -> tuple[int, dict[int, int], bool]:
        """Go to where an earlier run in this folder was stopped. Return the seed, where the journal has the answers
        from there on, and whether regen.json is one of the journal's."""
        path = self.output_dir / REGEN
        digest = sha256_of_file(path) if path.exists() else None
        saved, first_seed = None, None

        def look(entry: dict[str, Any]) -> None:
            nonlocal saved, first_seed
            if entry["kind"] == "run" and first_seed is None:
                first_seed = entry.get("seed")
            elif entry["kind"] == "saved" and (saved is None or saved["sha256"] != digest or entry["sha256"] == digest):
                saved = entry
            self.answers += entry["kind"] == "answer"

        self.answers = 0  # in the journal
        known = answered_before(self.journal, 0, budget, look)
        if saved is not None and digest is not None:
            self.next, self.counts = saved["next"], Counter(saved["counts"])
            self.kept_at = {int(request): rows for request, rows in saved["kept_at"].items()}
            if not set(range(max(self.next - LAG, 0), self.next + 1)) <= self.kept_at.keys():
                raise InputError(f"{self.journal.path}: is damaged (a saved state without its counts)", self.output_dir)
        seed = first_seed if seed is None else seed
        seed = random.SystemRandom().randrange(2**32) if seed is None else seed
        known = {key: place for key, place in known.items() if key >= self.next}
        return seed, known, saved is not None and saved["sha256"] == digest

    def _read_regen(self, as_it_is: bool) -> None:
        """Take the tasks of an earlier regen.json. `as_it_is`: their text is what this class has written."""
        path, instructions = self.output_dir / REGEN, []
        for row, text in tasks_of(path) if path.exists() else ():
            self.rows.append(f"    {text}" if as_it_is else item_of_list(row))
            instructions.append(row["instruction"])
            if len(instructions) == AT_ONCE:
                self._know(instructions)
                instructions.clear()
        self._know(instructions)
        if self.kept_excluded:
            print(
                f"note: {self.kept_excluded:,} of the {len(self.rows):,} tasks kept before resemble an evaluation set; "
                f"they stay. Delete {path} to filter all answers again: nothing is paid for twice",
                flush=True,
            )
        if not self.next:
            self.kept_at = {0: len(self.rows)}

    def _know(self, instructions: list[str]) -> None:
        """Tell the filter of tasks that were kept before."""
        self.filter.add(instructions)
        self.kept_excluded += sum(self.exclusion.matches(instructions)) if self.exclusion else 0

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
        generated = [self.rows[at] for at in draw.sample(range(available), min(self.num_generated, available))]
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
        items = self._without_excluded([self._parse(entry) for entry in entries])
        candidates = [item.row for of_one in items for item in of_one if item.row is not None]
        similarities = iter(self.filter.filter([row["instruction"] for row in candidates]))
        for entry, of_one in zip(entries, items):
            before = len(self.rows)
            for item in of_one:
                similarity = next(similarities) if item.row is not None else None
                if similarity is not None:
                    self.rows.append(item_of_list({**item.row, **similarity._asdict()}))
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

    def _without_excluded(self, items: list[list[Item]]) -> list[list[Item]]:
        """Reject tasks that resemble a text of an evaluation set."""
        if self.exclusion is None:
            return items
        instructions = [item.row["instruction"] for of_one in items for item in of_one if item.row is not None]
        matches = iter(self.exclusion.matches(instructions))
        return [
            [Item(None, "in an evaluation set") if item.row is not None and next(matches) else item for item in of_one]
            for of_one in items
        ]

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

    def save(self) -> None:
        """Write regen.json, after its line in the journal: a kill between leaves one that an older line knows."""
        begin = time.monotonic()
        self.journal.append(
            {
                "kind": "saved",
                "next": self.next,
                "rows": len(self.rows),
                "sha256": self.rows.sha256(),
                "counts": self.counts,
                "kept_at": self.kept_at,
            }
        )
        try:
            with atomic_write(self.output_dir / REGEN, "wb") as file:
                self.rows.copy_to(file)
        except OSError as error:
            raise InputError(
                f"{self.output_dir}: {REGEN} cannot be written ({error.strerror}); nothing is lost, every answer is in "
                "the journal",
                self.output_dir,
            ) from error
        self.saved_at = time.monotonic()
        self.saving_took = self.saved_at - begin


class KeptTasks:
    """The text of regen.json without its end, in a temporary file that goes with the process. The memory has only where
    each task begins."""

    def __init__(self, folder: Path):
        self.folder, self.begins, self.size = folder, array("Q"), 0
        self.digest = hashlib.sha256()
        try:
            self.file = tempfile.TemporaryFile(dir=folder, prefix=f".{REGEN}.", buffering=0)
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror})", folder) from error

    def __len__(self) -> int:
        return len(self.begins)

    def append(self, text: str) -> None:
        """Add a task, as the text that it has inside of the list."""
        begin = b",\n" if self.begins else b"[\n"
        content = begin + text.encode()
        try:  # always at the end of what is whole: a part of a task that did not fit is written over
            if os.pwrite(self.file.fileno(), content, self.size) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written ({error.strerror})", self.folder) from error
        self.digest.update(content)
        self.begins.append(self.size + len(begin))
        self.size += len(content)

    def __getitem__(self, number: int) -> dict[str, Any]:
        begin, end = self.begins[number], self.size
        if number + 1 < len(self.begins):
            end = self.begins[number + 1] - len(b",\n")
        return json.loads(os.pread(self.file.fileno(), end - begin, begin))

    def end(self) -> bytes:
        """Return what regen.json has behind its tasks."""
        return b"\n]" if self.begins else b"[]"

    def sha256(self) -> str:
        """Return that of regen.json."""
        digest = self.digest.copy()
        digest.update(self.end())
        return digest.hexdigest()

    def copy_to(self, file: IO[bytes]) -> None:
        """Write what is regen.json."""
        for begin in range(0, self.size, PIECE):
            file.write(os.pread(self.file.fileno(), min(PIECE, self.size - begin), begin))
        file.write(self.end())


def tasks_of(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the tasks of a regen.json, and the text of each; the file is read piece by piece.

    Raises:
        InputError: it is not a list of tasks.
    """
    try:
        with open(path, "rb") as file:
            encoding = json.detect_encoding(file.read(4))
        with open(path, encoding=encoding, errors="surrogatepass") as file:
            for number, (row, text) in enumerate(_items(file)):
                if not all(isinstance(row[name], str) for name in ("instruction", "input", "output")):
                    raise ValueError(f"row {number}: instruction, input and output must be texts")
                row |= {name: whole_characters(row[name]) for name in ("instruction", "input", "output")}
                yield row, text
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is not a list of tasks ({error!r}); move it away to start over", path) from error


def _items(file: TextIO) -> Iterator[tuple[Any, str]]:
    """Yield the items of a JSON list, and the text of each. Raise ValueError if it is none."""
    text, at, size = file.read(PIECE).lstrip(), 1, PIECE
    while not text and (more := file.read(PIECE)):
        text = more.lstrip()
    if not text.startswith("["):
        raise ValueError(f"it is of type {type(parse_json(text + file.read())).__name__}")
    first = True
    while True:
        try:
            found = next_json_item(text, at, first)
        except json.JSONDecodeError:  # also where the piece ends in the middle of an item
            if not (more := file.read(size)):
                raise
            text, at, size = text[at:] + more, 0, 2 * size
            continue
        if found is None:
            break
        (value, end), begin = found, at
        yield value, text[begin:end].strip(", \t\n\r")
        first, at, size = False, end, PIECE
    if behind := (text[at:] + file.read()).strip()[1:]:
        raise ValueError(f"behind the list stands {behind[:40]!r}")
