"""Many requests at a time: each answer journaled before anything else, then delivered in the order of the requests."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from alpaca.common.errors import UsageError
from alpaca.completions.api import ContextOverflow, Model, RequestFailed, Sampling
from alpaca.completions.budget import Budget
from alpaca.completions.journal import Journal

GIVE_UP = 20  # requests that fail in a row


@dataclass
class RequestRunner:
    """Sends the requests `first`, `first` + 1, … as long as they are wanted and paid for.

    Args:
        prompt_of: the prompt of a request, by its number.
        wanted: whether one more request is, given how many are sent and not yet delivered.
        deliver: takes the journal entries of consecutive requests, in their order.
        known: entries of an earlier run that were not delivered, by request: they are not asked again.
        prepare: how to ask, and what the journal is to remember of every answer; given the model's endpoint,
            "completions" or "chat".
        seed_of: the seed of a request, by its number; None: that of what `prepare` gave.
        journaled_as: what the journal calls a request, by its number: `index` of its entries.
        overflows_count: whether prompts that are too long count among the failures in a row that end a run. Not where
            the requests are a given number, each with a prompt of its own.
    """

    model: Model
    prepare: Callable[[str], tuple[Sampling, dict[str, Any]]]
    journal: Journal
    budget: Budget
    prompt_of: Callable[[int], str]
    wanted: Callable[[int], bool]
    deliver: Callable[[list[dict[str, Any]]], None]
    concurrency: int
    first: int = 0
    known: dict[int, dict[str, Any]] = field(default_factory=dict)
    seed_of: Callable[[int], int] | None = None
    journaled_as: Callable[[int], int] = int
    overflows_count: bool = True
    stopped_by_cost: bool = False
    broken: bool = False  # deliver cannot go on

    def run(self) -> None:
        """Ask until nothing more is wanted, or paid for.

        Raises:
            UsageError: a mistake that every request would meet. What was sent is waited for, journaled and delivered.
        """
        asyncio.run(self._run())

    def refuse_stop_by_cost(self, done: int, total: int) -> None:
        """Raise UsageError if the limit of cost has left less than `total` done."""
        if self.stopped_by_cost and done < total:
            raise UsageError(
                f"--max_cost {self.budget.max_cost}: stopped with {done} of {total}, ${self.budget.cost:.4f} spent; "
                "another request could exceed the limit. Run again with a higher one to go on"
            )

    async def _run(self) -> None:
        self.sent = self.delivered = self.first
        self.asked = self.failed_in_a_row = 0
        self.stop_with: Exception | None = None
        self.lost_cost: dict[int, float] = {}  # dollars, by request in flight
        self.flying: set[asyncio.Task] = set()
        async with self.model:
            print(f"asking {await self.model.check()}", flush=True)
            self.sampling, self.about = self.prepare(self.model.api)
            await self._deliver_known()
            while self._send() or self.flying:
                await self._deliver()
                if self.flying:
                    _, self.flying = await asyncio.wait(self.flying, return_when=asyncio.FIRST_COMPLETED)
                    await self._deliver()
        if self.stop_with is not None:
            raise self.stop_with

    def _send(self) -> bool:
        """Start what may be started. Whether there was anything, be it only an answer of an earlier run."""
        before = self.sent
        while (
            self.stop_with is None and len(self.flying) < self.concurrency and self.wanted(self.sent - self.delivered)
        ):
            if self.sent not in self.known:
                prompt = self.prompt_of(self.sent)
                most = self.budget.max_cost_of(prompt, self.sampling.max_tokens)
                if not self.budget.allows(most):
                    self.stopped_by_cost = not self.flying  # those may turn out cheaper than what is set aside
                    break
                self._start(self.sent, prompt, most)
            self.sent += 1
        return self.sent > before

    def _start(self, index: int, prompt: str, most: float) -> None:
        self.budget.reserved[index], self.lost_cost[index] = most, 0.0
        self.asked += 1
        if self.budget.max_cost is not None:  # a kill leaves no answer, and perhaps a bill
            self.journal.append({"kind": "sent", "index": self.journaled_as(index), "most": most})
        self.flying.add(asyncio.ensure_future(self._ask(index, prompt)))

    async def _ask(self, index: int, prompt: str) -> None:
        """One request, into the journal. The first fatal error ends the sending; what is in flight is waited for."""
        try:
            entry = await self._answer(index, prompt)
        except Exception as error:
            self.stop_with = self.stop_with or error
            return
        del self.budget.reserved[index]
        self.budget.unanswered -= self.lost_cost.pop(index)  # the entry has it now
        self.budget.count(entry)
        try:
            self.journal.append(entry)
        except UsageError as error:
            self.stop_with = self.stop_with or error
            return
        self.known[index] = entry
        if entry["kind"] == "answer":
            self.failed_in_a_row = 0
        elif self.overflows_count or not entry["too_long"]:
            self.failed_in_a_row += 1
        if self.failed_in_a_row >= GIVE_UP:
            told = f"{GIVE_UP} requests in a row failed: {entry['error']}\nThe same command, run again, continues."
            self.stop_with = self.stop_with or UsageError(told)

    async def _answer(self, index: int, prompt: str) -> dict[str, Any]:
        begin, most = time.time(), self.budget.reserved[index]

        def lose() -> bool:
            """An attempt may have been charged. Whether another one, for which the reservation stands, is paid for."""
            self.lost_cost[index] += most
            self.budget.unanswered += most
            return self.budget.allows(0.0)

        try:
            sampling = replace(self.sampling, seed=self.seed_of(index)) if self.seed_of else self.sampling
            answer = await self.model.complete(prompt, sampling, lose)
            entry = {"kind": "answer", **self.about, "text": answer.text}
            entry |= {"finish_reason": answer.finish_reason, "prompt_tokens": answer.prompt_tokens}
            entry |= {"completion_tokens": answer.completion_tokens, "seconds": round(time.time() - begin, 3)}
            if answer.prompt_tokens is None or answer.completion_tokens is None:
                entry["unanswered"] = most
        except RequestFailed as error:
            entry = {"kind": "failed", "error": str(error), "too_long": isinstance(error, ContextOverflow)}
        entry["unanswered"] = entry.get("unanswered", 0.0) + self.lost_cost[index]
        return {"index": self.journaled_as(index), **entry}

    async def _deliver_known(self) -> None:
        """What earlier runs were answered, before it is decided how much more is needed."""
        while self.sent in self.known and self.stop_with is None:
            self.sent += 1
            if self.sent - self.delivered == 64 or self.sent not in self.known:
                await self._deliver()

    async def _deliver(self) -> None:
        ready = []
        while self.delivered + len(ready) < self.sent and self.delivered + len(ready) in self.known:
            ready.append(self.known.pop(self.delivered + len(ready)))
        if ready and not self.broken:
            try:
                await asyncio.to_thread(self.deliver, ready)
            except UsageError as error:
                self.stop_with, self.broken = self.stop_with or error, True
        self.delivered += len(ready)


def answered_before(journal: Journal, first: int, budget: Budget) -> dict[int, dict[str, Any]]:
    """What earlier runs journaled of the requests from `first` on; the cost of all is counted."""
    known, sent = {}, {}
    for entry in journal:
        if entry["kind"] == "sent":
            budget.unanswered += sent.pop(entry["index"], 0.0)  # a kill, and the request was sent again
            sent[entry["index"]] = entry["most"]
        elif entry["kind"] in ("answer", "failed"):
            sent.pop(entry["index"], None)
            budget.count(entry)
            if entry["index"] >= first:
                known[entry["index"]] = entry
    budget.unanswered += sum(sent.values())
    return known
