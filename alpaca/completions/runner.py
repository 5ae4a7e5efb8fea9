"""Many requests at a time: each answer journaled before anything else, then handed out in the order of the requests."""

import asyncio
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from alpaca.common.errors import ParameterError, UsageError, masked
from alpaca.completions.api import (
    Completion,
    ContextOverflow,
    Model,
    Request,
    RequestFailed,
    Sampling,
    split_reasoning,
    whole_characters,
)
from alpaca.completions.budget import Budget
from alpaca.completions.journal import Journal

GIVE_UP = 20  # requests that fail in a row
KNOWN_AT_ONCE = 64  # answers of earlier runs
SLOW = 3.0  # seconds until it is said that a model is waited for
HEARTBEAT = 1.0  # seconds between two looks at who waits

Entry = dict[str, Any]  # of a journal


@dataclass
class RequestRunner:
    """Sends requests as long as they are paid for; used in an async with statement, which opens and checks the model.

    Args:
        known: where the journal has the answers of earlier runs, by the key of their request: they are handed out, and
            not asked for again.
        handed: gets where the journal has each entry that is handed out, for a caller who reads it later.
        most_ahead: answers that may wait on the disk for an earlier one, which bounds the memory of their keys.
        overflows_count: whether prompts that are too long count among the failures in a row that end a run. Not where
            the requests are a given number, each with a prompt of its own.
        on_wait: called now and then while no answer comes: with the requests under way, the seconds since the last
            answer, and the retries so far.
    """

    model: Model
    journal: Journal
    budget: Budget
    concurrency: int
    known: dict[int, int] = field(default_factory=dict)
    overflows_count: bool = True
    handed: dict[int, int] | None = None
    most_ahead: int = 100_000
    on_wait: Callable[[int, float, int], None] | None = None

    def __post_init__(self) -> None:
        self.asked = self.failed_in_a_row = 0
        self.stopped_by_cost = False
        self.stop_with: Exception | None = None
        self.lost_cost: dict[int, float] = {}  # dollars, by request in flight
        self.flying: set[asyncio.Task] = set()
        self.waiting: deque[int] = deque()  # keys of what was sent, or is known, and is not handed out yet
        self.held: Request | None = None  # taken from the requests, not sent yet

    async def __aenter__(self) -> "RequestRunner":
        await self.model.__aenter__()
        words = "waiting for the first answer, which tells what the model is …"
        note = asyncio.get_running_loop().call_later(SLOW, partial(print, words, flush=True))
        try:
            print(f"asking {await self.model.check()}", flush=True)
        except BaseException as error:
            await self.model.__aexit__(type(error), error, None)
            raise
        finally:
            note.cancel()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        """Wait for what was sent, and journal it, unless the process is to end."""
        if self.flying and (kind is None or issubclass(kind, UsageError)):
            await asyncio.wait(self.flying)
        await self.model.__aexit__(kind, *exception)

    async def answers(
        self,
        requests: Iterable[Request],
        sampling: Sampling,
        more: Callable[[int], bool] = lambda in_flight: True,
        **about: Any,
    ) -> AsyncIterator[list[Entry]]:
        """Yield the journal entries of the requests, in their order: those of consecutive requests together.

        Args:
            requests: taken one by one, when there is room for another.
            more: whether another one is wanted, given how many are sent and not handed out.
            about: what the journal is to remember with every answer.

        Raises:
            UsageError: a mistake that every request would meet. What was sent is waited for and handed out before.
        """
        requests = iter(requests)
        async for entries in self._answered_before(requests):
            yield entries
        async for entries in self._answered_now(requests, sampling, more, about):
            yield entries
        if self.stop_with is not None:
            raise self.stop_with
        if self.waiting and not self.stopped_by_cost:
            raise RuntimeError(f"{len(self.waiting)} requests were sent and have no entry")

    async def _answered_now(
        self, requests: Iterator[Request], sampling: Sampling, more: Callable[[int], bool], about: dict[str, Any]
    ) -> AsyncIterator[list[Entry]]:
        """Yield what the model answers, until nothing more is wanted or `stop_with` says why it ends."""
        heard = time.monotonic()
        while self._send(requests, sampling, more, about) or self.flying:
            while ready := self._ready():
                yield ready
            if self.flying:
                ended, self.flying = await asyncio.wait(
                    self.flying, timeout=HEARTBEAT, return_when=asyncio.FIRST_COMPLETED
                )
                heard = time.monotonic() if ended else heard
                if not ended and self.on_wait is not None:
                    self.on_wait(len(self.flying), time.monotonic() - heard, getattr(self.model, "retries", 0))
                self._look_for_errors(ended)
                while ready := self._ready():
                    yield ready

    def _look_for_errors(self, ended: Iterable[asyncio.Task]) -> None:
        """Let what a task has raised end the run. Nobody else would hear of it."""
        for task in ended:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._stop_unforeseen(error)

    def _stop_unforeseen(self, error: BaseException) -> None:
        if self.stop_with is None:
            problem = masked(f"{type(error).__name__}: {error}"[:500])
            print(
                f"error: a request ended in a way that nobody foresaw ({problem}). The run ends; every answer so far "
                "is in the journal, and the same command continues.",
                file=sys.stderr,
                flush=True,
            )
        self.stop_with = self.stop_with or error

    def refuse_stop_by_cost(self, done: int, total: int) -> None:
        """Raise ParameterError if the limit of cost has left less than `total` done."""
        if self.stopped_by_cost and done < total:
            raise ParameterError(
                f"{{max_cost}} {self.budget.max_cost}: stopped with {done} of {total}, ${self.budget.cost:.4f} spent; "
                "another request could exceed the limit. Run again with a higher one to go on",
                "max_cost",
            )

    async def _answered_before(self, requests: Iterable[Request]) -> AsyncIterator[list[Entry]]:
        """Yield what earlier runs were answered, before it is decided how much more is needed."""
        while (self._hold(requests)) and self.held.key in self.known:
            self.waiting.append(self.held.key)
            self.held = None
            if len(self.waiting) == KNOWN_AT_ONCE:
                yield self._ready()
        while ready := self._ready():
            yield ready

    def _hold(self, requests: Iterable[Request]) -> bool:
        """Take the next request, unless one is held. Return whether there is one."""
        if self.held is None and (request := next(requests, None)) is not None:
            self.held = request._replace(prompt=whole_characters(request.prompt))
        return self.held is not None

    def _send(
        self, requests: Iterable[Request], sampling: Sampling, more: Callable[[int], bool], about: dict[str, Any]
    ) -> bool:
        """Start what may be started. Return whether there was anything, be it only an answer of an earlier run."""
        any_sent = False
        while (
            self.stop_with is None
            and len(self.flying) < getattr(self.model, "room", self.concurrency)
            and len(self.waiting) < self.most_ahead
            and more(len(self.waiting))
            and self._hold(requests)
        ):
            request = self.held
            if request.key not in self.known:
                most = self.budget.max_cost_of(request.prompt, sampling.max_tokens)
                if not self.budget.allows(most):
                    self.stopped_by_cost = not self.flying  # those may turn out cheaper than what is set aside
                    break
                self._start(request, sampling, about, most)
            self.waiting.append(request.key)
            self.held = None
            any_sent = True
        return any_sent

    def _start(self, request: Request, sampling: Sampling, about: dict[str, Any], most: float) -> None:
        self.budget.reserved[request.key] = most
        self.lost_cost[request.key] = 0.0
        self.asked += 1
        if most:  # a kill leaves no answer, and perhaps a bill, which a later run's limit counts
            self.journal.append({"kind": "sent", "index": request.key, "most": most})
        self.flying.add(asyncio.ensure_future(self._ask(request, sampling, about)))

    async def _ask(self, request: Request, sampling: Sampling, about: dict[str, Any]) -> None:
        """Send one request and journal its answer. The first fatal error ends the sending; what is in flight is waited
        for."""
        try:
            entry = await self._answer(request, sampling, about)
        except UsageError as error:  # refused, and so not charged
            self.stop_with = self.stop_with or error
            entry = {"index": request.key, "kind": "refused", "unanswered": self.lost_cost[request.key]}
        except Exception as error:
            self._stop_unforeseen(error)
            return
        place = None
        try:
            place = self.journal.append(entry)
        except UsageError as error:
            self.stop_with = self.stop_with or error
        del self.budget.reserved[request.key]
        self.budget.unanswered -= self.lost_cost.pop(request.key)  # the entry has it now
        self.budget.count(entry)
        if entry["kind"] == "refused" or place is None:
            return
        self.known[request.key] = place
        if entry["kind"] == "answer":
            self.failed_in_a_row = 0
        else:
            self._count_failures([entry])

    def _count_failures(self, entries: Sequence[Entry]) -> None:
        """Count requests that failed, and let too many in a row end the run."""
        entries = [entry for entry in entries if self.overflows_count or not entry["too_long"]]
        self.failed_in_a_row += len(entries)
        if entries and self.failed_in_a_row >= GIVE_UP:
            message = f"{self.failed_in_a_row} requests in a row failed: {entries[-1]['error']}"
            self.stop_with = self.stop_with or UsageError(f"{message}\nThe same command, run again, continues.")

    async def _answer(self, request: Request, sampling: Sampling, about: dict[str, Any]) -> Entry:
        begin, most = time.time(), self.budget.reserved[request.key]

        def on_lost_response() -> bool:
            """Count and journal an attempt that may have been charged. Return whether another one, for which the
            reservation stands, is paid for."""
            self.lost_cost[request.key] += most
            self.budget.unanswered += most
            if most:
                self.journal.append({"kind": "lost", "index": request.key, "most": most})
            return self.budget.allows(0.0)

        if request.seed is not None:
            sampling = replace(sampling, seed=request.seed)
        try:
            answer = await self.model.complete(request.prompt, sampling, on_lost_response)
            entry = entry_of(answer, about, begin, most)
        except RequestFailed as error:
            entry = entry_of_failure(error)
        entry["unanswered"] = entry.get("unanswered", 0.0) + self.lost_cost[request.key]
        return {"index": request.key, **entry}

    def _ready(self) -> list[Entry]:
        """Take the entries that are next in the order of the requests, as far as they are there."""
        ready = []
        while self.waiting and self.waiting[0] in self.known and len(ready) < KNOWN_AT_ONCE:
            key = self.waiting.popleft()
            place = self.known.pop(key)
            if self.handed is not None:
                self.handed[key] = place
            ready.append(self.journal.read(place))
            check_answer(ready[-1], self.journal)
        return ready


def entry_of(answer: Completion, about: dict[str, Any], begin: float, most: float) -> Entry:
    """Return what a journal holds of an answer to a request that was sent at `begin` and costs `most`, at most."""
    text, thought = split_reasoning(answer.text)
    entry = {
        "kind": "answer",
        **about,
        "text": whole_characters(text),
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "seconds": round(time.time() - begin, 3),
    }
    if reasoning := "\n\n".join(filter(None, (answer.reasoning, thought))):
        entry["reasoning"] = reasoning
    if answer.prompt_tokens is None or answer.completion_tokens is None:
        entry["unanswered"] = most
    return entry


def entry_of_failure(error: RequestFailed) -> Entry:
    """Return what a journal holds of a request that got no answer."""
    return {"kind": "failed", "error": masked(str(error)), "too_long": isinstance(error, ContextOverflow)}


def answered_before(
    journal: Journal, first: int, budget: Budget, look: Callable[[Entry], None] = lambda entry: None
) -> dict[int, int]:
    """Return where the journal has what earlier runs were answered, by the key of the request, from key `first` on; the
    cost of all is counted. The journal is read once, line by line.

    Args:
        look: called with every entry, in their order.
    """
    known: dict[int, int] = {}
    pending: dict[int, float] = {}  # dollars that the attempts of a request cost at most, until an entry closes it
    for place, entry in journal.scan():
        look(entry)
        if entry["kind"] == "run":  # whatever is pending was killed
            budget.unanswered += sum(pending.values())
            pending.clear()
        elif entry["kind"] == "sent":
            budget.unanswered += pending.pop(entry["index"], 0.0)  # a kill, and the request was sent again
            pending[entry["index"]] = entry["most"]
        elif entry["kind"] == "lost":  # another attempt may follow, so what was sent stays pending as well
            pending[entry["index"]] = pending.get(entry["index"], 0.0) + entry["most"]
        elif entry["kind"] in ("answer", "failed", "refused"):
            pending.pop(entry["index"], None)  # the entry has what was lost
            budget.count(entry)
            if entry["kind"] != "refused" and entry["index"] >= first:
                known[entry["index"]] = place
    budget.unanswered += sum(pending.values())
    return known


def check_answer(entry: Entry, journal: Journal) -> None:
    """Raise UsageError for an answer without a field that it needs."""
    missing = [name for name in ("text", "finish_reason") if name not in entry and entry["kind"] == "answer"]
    if missing:
        raise UsageError(
            f"{journal.path}: is damaged (the answer to request {entry['index']} has no {missing[0]}); delete its line "
            "to ask again"
        )
