"""Several servers of one model, as one model: each is asked as much as it answers, and what one cannot answer goes to
the others.

    model = Servers([Client(name, address, max_retries=0) for address in addresses])

How many requests a server has at a time follows its answers (additive increase, multiplicative decrease, as in TCP):
more while the rate of its tokens grows and none takes twice as long as at its best rate, half after a refusal (429),
one after a connection that broke. A server that fails rests, longer each time, and is tried again with one request.
"""

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from alpaca.common.errors import ParameterError, UsageError, first_line
from alpaca.completions.api import Completion, Model, NoResponse, NoServer, NotNow, RequestFailed, Sampling

START = 8  # requests at a time, before a server has answered
MOST = 512
BETTER = 1.1  # a rate that is so much higher is worth more requests
HOLDS = 2.0  # a token may take so many times as long as at the best rate
REST, LONGEST_REST = 0.5, 30.0  # seconds after the first failure, doubled with each in a row
MOST_REST = 24 * 3600.0  # seconds, whatever a server asks for
PATIENCE = 120.0  # seconds; a request fails where all servers rest for longer, or none has answered for so long
CHECK = 120.0  # seconds until a server that has said nothing counts as one that is not there yet
BETWEEN_LINES = 60.0  # seconds, about one server
ATTEMPTS = 9  # of a request that may be charged; as many at each server where none can be


class Server:
    """One of several servers, and how much it is asked.

    Args:
        model: which asks it, without retries of its own.
        start, most: requests at a time.
    """

    def __init__(self, model: Model, start: int, most: int):
        self.model, self.start, self.most = model, start, most
        self.address = getattr(model, "address", "a model in this process")
        self.limit = float(min(start, most))
        self.busy = 0
        self.checked = False
        self.refused: UsageError | None = None  # for good
        self.failures = 0  # in a row
        self.failed_at = self.rests_until = -1.0
        self.told_at = -math.inf
        self.answers = self.all_failures = self.busiest = 0
        self.seconds = 0.0
        self.doubling = True
        self.best_rate = self.best_pace = 0.0
        self._begin_round(time.monotonic())

    def _begin_round(self, now: float) -> None:
        self.round_began, self.was_full = now, False
        self.of_round = self.seconds_of_round = self.tokens_of_round = 0

    def limit_now(self, now: float) -> int:
        """Return how many requests it may have at a time; 0 while it rests."""
        return 0 if self.refused or now < self.rests_until else int(self.limit)

    def take(self) -> None:
        """Count a request that it gets."""
        self.busy += 1
        self.busiest = max(self.busiest, self.busy)
        self.was_full |= self.busy >= int(self.limit)

    def succeeded(self, began: float, now: float, tokens: int | None) -> None:
        """Count an answer, and after a round of them, as many as the server may have at a time, see how much it can
        do."""
        self.answers += 1
        self.failures = 0
        self.seconds += now - began
        if began < self.round_began:
            return  # it was asked among fewer, or more
        self.of_round += 1
        self.seconds_of_round += now - began
        self.tokens_of_round += tokens or 1
        if self.of_round >= int(self.limit):
            if self.was_full:
                self._adapt(max(self.seconds_of_round, 1e-6) / self.tokens_of_round)
            self._begin_round(now)

    def _adapt(self, pace: float) -> None:
        """Take the seconds of a token, as one request sees them, for what the limit did to them."""
        rate = int(self.limit) / pace  # tokens a second of all requests together
        if better := rate > BETTER * self.best_rate:
            self.best_rate, self.best_pace = rate, pace
        if self.doubling and better:
            self.limit *= 2
        elif pace <= HOLDS * self.best_pace:
            self.limit += 1
        else:
            self.limit = max(1.0, 0.8 * self.limit)
            if self.limit <= self.start:  # it has become slower for good, and is learned anew
                self.best_rate, better = 0.0, True
        self.doubling &= better
        self.limit = min(self.limit, self.most)

    def failed(self, began: float, now: float, error: NotNow) -> bool:
        """Let the server rest. Return whether this is news: requests that were under way fail together."""
        self.all_failures += 1
        if began <= self.failed_at:
            return False
        self.failed_at = now
        self.failures += 1
        self.doubling = isinstance(error, NoResponse)
        self.limit = 1.0 if self.doubling else max(1.0, self.limit / 2)
        self.best_rate = 0.0
        self._begin_round(now)
        wait = error.wait
        if wait is None:
            wait = min(REST * 2 ** (self.failures - 1), LONGEST_REST) * random.uniform(0.5, 1.0)
        self.rests_until = now + min(wait, MOST_REST)
        return True

    def tell(self, what: str) -> None:
        """Print what happens to the server, once a minute at most."""
        if (now := time.monotonic()) - self.told_at > BETWEEN_LINES:
            self.told_at = now
            print(f"{self.address}: {what}", flush=True)

    def report(self) -> dict[str, Any]:
        """Return what it has answered, for a report."""
        return {
            "address": self.address,
            "answers": self.answers,
            "failures": self.all_failures,
            "seconds_per_answer": round(self.seconds / self.answers, 3) if self.answers else None,
            "most_at_a_time": self.busiest,
        } | ({"refused": first_line(str(self.refused))} if self.refused else {})


class Servers:
    """A Model (alpaca/completions/api.py) of several.

    Args:
        models: one for each server, without retries of its own.
        start: requests at a time to each, at first.
        most: to each, at most.
    """

    def __init__(self, models: Sequence[Model], start: int = START, most: int = MOST):
        self.servers = [Server(model, start, most) for model in models]
        self.api = models[0].api
        self.given_back = 0
        self.heard = time.monotonic()  # when a server has answered
        self.waiting: deque[asyncio.Future] = deque()

    @property
    def room(self) -> int:
        """Return how many requests the servers may have at a time, all together; at least one, which waits."""
        now = time.monotonic()
        return max(1, sum(server.limit_now(now) for server in self.servers))

    @property
    def retries(self) -> int:
        return self.given_back + sum(getattr(server.model, "retries", 0) for server in self.servers)

    def by_server(self) -> list[dict[str, Any]]:
        """Return what each has answered."""
        return [server.report() for server in self.servers]

    async def __aenter__(self) -> "Servers":
        for server in self.servers:
            await server.model.__aenter__()
        return self

    async def __aexit__(self, *exception: object) -> None:
        for server in self.servers:
            await server.model.__aexit__(*exception)
            if any(other.answers for other in self.servers):
                at_once = f"at most {server.busiest} at a time"
                print(f"{server.address}: {server.answers:,} answers, {at_once}, {server.all_failures:,} failures")

    async def check(self) -> str:
        """Ask all servers at once what they are. Those that do not answer are tried again later; one that does must
        have the model.

        Raises:
            UsageError: none answers, one refuses, or they are asked in different ways.
        """
        found = await asyncio.gather(*map(self._check, self.servers))
        self.heard = time.monotonic()
        there = [server for server in self.servers if server.checked]
        if not there:
            raise next(error for error in found if error is not None)
        apis = {server.model.api: server.address for server in there}
        if len(apis) > 1:
            told = ", ".join(f"{api} at {address}" for api, address in apis.items())
            raise ParameterError(f"{{api}}: the servers are asked in different ways ({told}); choose one", "api")
        self.api = there[0].model.api
        for server, error in zip(self.servers, found):
            if error is not None:
                server.model.api = self.api
                print(f"{server.address}: is not there yet, and is tried again later", flush=True)
        addresses = ", ".join(server.address for server in there)
        name = getattr(there[0].model, "model", "a model")
        return f"model {name} at {len(there)} of {len(self.servers)} servers, {self.api} endpoint: {addresses}"

    async def _check(self, server: Server) -> NoServer | None:
        """Return why the server is not there; None if it is."""
        try:
            await asyncio.wait_for(server.model.check(), CHECK)
        except NoServer as error:
            problem = error
        except UsageError as error:
            if not isinstance(error.__cause__, NotNow):
                raise
            problem = NoServer(str(error), "base_url")  # it answers, but still loads its model
        except asyncio.TimeoutError:
            problem = NoServer(f"{server.address}: has said nothing in {CHECK:.0f} s", "base_url")
        else:
            server.checked = True
            return None
        self._rest(server, time.monotonic(), NoResponse(str(problem)))
        return problem

    def _rest(self, server: Server, began: float, error: NotNow) -> bool:
        """Let a server rest, and those who wait for it look again when it has. Return whether this is news."""
        news = server.failed(began, now := time.monotonic(), error)
        asyncio.get_running_loop().call_later(server.rests_until - now + 0.001, self._wake)
        if server.rests_until - now > PATIENCE or self._are_dead():
            self._wake_all()  # they may give up
        return news

    async def complete(
        self, prompt: str, sampling: Sampling, on_lost_response: Callable[[], bool] | None = None
    ) -> Completion:
        """Return the completion of a prompt, from the first server that gives one.

        Raises:
            RequestFailed: none does, or the prompt is at fault.
            UsageError: all servers refuse.
        """
        attempt = _Attempts(on_lost_response)
        while True:
            server = await self._take()
            began = time.monotonic()
            try:
                if not server.checked and (problem := await self._check(server)) is not None:
                    raise NoResponse(str(problem))
                completion = await server.model.complete(prompt, sampling, attempt.lost)
            except UsageError as error:
                if attempt.stop is not None:
                    raise
                self._set_aside(server, error)
            except NotNow as error:
                self.given_back += 1
                if self._rest(server, began, error):
                    server.tell(f"rests, its requests go to the others ({first_line(str(error))})")
                if attempt.are_enough(len(self.servers)) or self._are_dead():
                    raise RequestFailed(f"{error}\nGave up after {attempt.number} attempts at all servers.") from error
            else:
                self.heard = time.monotonic()
                server.succeeded(began, time.monotonic(), completion.completion_tokens)
                return completion
            finally:
                server.busy -= 1
                self._wake()

    def _set_aside(self, server: Server, error: UsageError) -> None:
        """Ask a server nothing more."""
        if server.refused is None:
            server.refused = error
            print(f"{server.address}: is asked no more ({first_line(str(error))})", flush=True)
        self._wake_all()

    def _are_dead(self) -> bool:
        """Return whether no server that is still asked has answered for a while, and each failed when it was tried."""
        asked = [server for server in self.servers if not server.refused]
        return time.monotonic() - self.heard > PATIENCE and all(server.failures for server in asked)

    async def _take(self) -> Server:
        """Return the server with most room, by its share, as soon as there is one."""
        while True:
            now = time.monotonic()
            if all(server.refused for server in self.servers):
                raise self.servers[0].refused
            free = [(1 - server.busy / limit, server) for server in self.servers if (limit := server.limit_now(now))]
            share, server = max(free, key=lambda pair: pair[0], default=(0.0, None))
            if share > 0:
                server.take()
                return server
            wakes = [server.rests_until - now for server in self.servers if not server.refused]
            if not free and min(wakes) > PATIENCE:
                raise RequestFailed(f"all servers ask to wait, the first for {min(wakes):.0f} s")
            if not free and self._are_dead():
                raise RequestFailed(f"none of the servers has answered for {now - self.heard:.0f} s")
            turn = asyncio.get_running_loop().create_future()
            self.waiting.append(turn)
            try:
                await turn
            finally:
                turn.cancel()  # nobody is to be woken in its place

    def _wake(self) -> None:
        """Let the requests that have waited longest look again, as many as there is room for."""
        now = time.monotonic()
        free = sum(max(0, server.limit_now(now) - server.busy) for server in self.servers)
        while self.waiting and free > 0:
            turn = self.waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                free -= 1

    def _wake_all(self) -> None:
        for turn in self.waiting:
            if not turn.done():
                turn.set_result(None)
        self.waiting.clear()


class _Attempts:
    """The attempts at one request."""

    def __init__(self, on_lost_response: Callable[[], bool] | None):
        self.on_lost_response = on_lost_response
        self.number = self.charged = 0
        self.stop: UsageError | None = None  # what ends the run, and no server has said

    def lost(self) -> bool:
        """Count an answer that may be charged, and did not arrive. Return whether another attempt is paid for."""
        self.charged += 1
        try:
            return self.on_lost_response is None or self.on_lost_response()
        except UsageError as error:
            self.stop = error
            raise

    def are_enough(self, servers: int) -> bool:
        self.number += 1
        return self.charged >= ATTEMPTS or self.number >= ATTEMPTS * servers
