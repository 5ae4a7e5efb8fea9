"""What a person sees of many requests: a bar with rates and dollars, and the same numbers for a report."""

import math
import sys
import time
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from tqdm import tqdm

from alpaca.common.commands import flag
from alpaca.common.errors import ParameterError
from alpaca.completions.api import whole_characters

FIRST_LINE = 30.0  # seconds without an answer until a log says so; the next line comes after twice as many
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # the rate is in the postfix
BATCH_RATE = 0.5  # of the prices, at OpenAI's batch endpoint
ENVELOPE = 256  # tokens that a chat template may add to a prompt, at most


@dataclass
class Budget:
    """What the answers cost. Prices are in dollars per million tokens, as providers list them."""

    price_in: float = 0.0
    price_out: float = 0.0
    max_cost: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unanswered: float = 0.0  # dollars that answers may have cost which did not arrive, or came without token counts
    reserved: dict[int, float] = field(default_factory=dict)  # by request in flight
    rate: float = 1.0  # of the prices, for what is asked now
    spared: list[float] = field(default_factory=lambda: [0.0, 0.0])  # tokens in and out that lower rates took off

    @property
    def cost(self) -> float:
        tokens = (self.prompt_tokens - self.spared[0]) * self.price_in
        tokens += (self.completion_tokens - self.spared[1]) * self.price_out
        return tokens / 1e6 + self.unanswered

    def max_cost_of(self, prompt: str, max_tokens: int) -> float:
        """Return the dollars that a request can cost at most: no tokenizer makes more tokens than a text has bytes."""
        tokens_in = len(prompt.encode(errors="replace")) + ENVELOPE
        return self.rate * (tokens_in * self.price_in + max_tokens * self.price_out) / 1e6

    def allows(self, amount: float) -> bool:
        return self.max_cost is None or self.cost + sum(self.reserved.values()) + amount <= self.max_cost

    def count(self, entry: dict[str, Any]) -> None:
        self.prompt_tokens += entry.get("prompt_tokens") or 0
        self.completion_tokens += entry.get("completion_tokens") or 0
        self.unanswered += entry.get("unanswered") or 0.0
        for at, name in enumerate(("prompt_tokens", "completion_tokens")):
            self.spared[at] += (1.0 - entry.get("rate", 1.0)) * (entry.get(name) or 0)


@dataclass(frozen=True)
class BudgetFlags:
    """What answers may cost: flags of all commands that ask a server."""

    price_in: float = flag(0.0, "Dollars per million prompt tokens.")
    price_out: float = flag(0.0, "Dollars per million generated tokens.")
    max_cost: float | None = flag(
        None, "Dollars that are never exceeded; what earlier runs into the same output have cost counts."
    )
    dry_run: bool = flag(False, "Print one prompt and an estimate of tokens and cost, and ask nothing.")

    def budget(self, rate: float = 1.0) -> Budget:
        """Return the budget, with a `rate` of the prices. Raise ParameterError for prices below 0 and a limit that is
        none."""
        names = ("price_in", "price_out", "max_cost")
        if not all(0 <= price < math.inf for price in (self.price_in, self.price_out)):
            raise ParameterError("{price_in}, {price_out}: expected dollars per million tokens, at least 0", *names)
        if self.max_cost is not None and not (0 < self.max_cost < math.inf and self.price_in + self.price_out > 0):
            expected = "expected dollars above 0, with {price_in} and {price_out}"
            raise ParameterError(f"{{max_cost}} {self.max_cost}: {expected}", *names)
        if rate == BATCH_RATE and self.price_in + self.price_out > 0:
            print("prices are halved, as for OpenAI's batches", flush=True)
        return Budget(self.price_in, self.price_out, self.max_cost, rate=rate)


class Progress:
    """Counts things that are done (tasks kept, rows answered) and the requests behind them."""

    def __init__(self, unit: str, total: int, done: int, budget: Budget):
        self.unit = unit
        self.budget = budget
        self.first = done
        self.done = done
        self.requests = self.retries = 0
        self.began = time.monotonic()
        self.on_terminal = sys.stderr.isatty()
        self.next_line = FIRST_LINE
        calm = {} if self.on_terminal else {"mininterval": 30.0, "miniters": 1}  # a line now and then in a log file
        self.bar = tqdm(
            total=max(total, done), initial=done, unit=f" {unit}", dynamic_ncols=True, bar_format=BAR, **calm
        )

    def show(self, done: int, requests: int, retries: int) -> None:
        """Update the bar. `done` counts all runs, requests and retries this one."""
        self.done = done
        self.requests = requests
        self.retries = retries
        self.next_line = FIRST_LINE
        self.bar.set_postfix_str(self._rate(), refresh=False)
        self.bar.total = max(self.bar.total, done)  # else the bar of an answer that holds more tasks says "10/?"
        self.bar.update(done - self.bar.n)

    def wait(self, requests: int, seconds: float, retries: int) -> None:
        """Show that so many requests are under way, and no answer has come for so long."""
        self.retries = retries
        words = f"{requests} request{'s' * (requests != 1)} under way, {seconds:.0f} s"
        if self.on_terminal:
            self.bar.set_postfix_str(f"{words}, {self._rate()}")
        elif seconds >= self.next_line:
            self.next_line = 2 * seconds
            self.bar.write(f"{words}, {self._rate()}", file=sys.stderr)

    def close(self) -> None:
        self.bar.close()

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self.began, 1e-3)
        cost = f", ${self.budget.cost:.4f}" if self.budget.price_in or self.budget.price_out else ""
        retries = f", {self.retries} retries" if self.retries else ""
        return f"{(self.done - self.first) / seconds:.2f} {self.unit}/s{retries}{cost}"

    def summary(self) -> str:
        tokens = f"{self.budget.prompt_tokens:,} prompt tokens and {self.budget.completion_tokens:,} generated tokens"
        rate = f"{self.requests / max(time.monotonic() - self.began, 1e-3):.2f} requests/s, {self._rate()}"
        return f"{self.requests:,} requests in this run, {rate}; {tokens} in all"

    def report(self) -> dict[str, Any]:
        """Return, of this run, seconds, requests, rates; of all runs with this journal: tokens and dollars."""
        seconds = max(time.monotonic() - self.began, 1e-3)
        return {
            "seconds": round(seconds, 1),
            "requests_of_this_run": self.requests,
            "retries": self.retries,
            "requests_per_second": round(self.requests / seconds, 3),
            f"{self.unit}_per_second": round((self.done - self.first) / seconds, 3),
            "prompt_tokens": self.budget.prompt_tokens,
            "completion_tokens": self.budget.completion_tokens,
            "cost_dollars": round(self.budget.cost, 6),
        }


def estimate(prompts: list[str], requests: int, max_tokens: int, budget: Budget) -> str:
    """Return one prompt, and what all would cost. A token is taken for four bytes, and in what it can cost at most for
    one."""
    prompts = list(map(whole_characters, prompts))
    tokens = round(fmean(len(prompt.encode()) for prompt in prompts) / 4)
    likely = budget.rate * requests * (tokens * budget.price_in + max_tokens // 2 * budget.price_out) / 1e6
    most = requests * fmean(budget.max_cost_of(prompt, max_tokens) for prompt in prompts)
    cost = f": about ${likely:.2f}, at most ${most:.2f}" if most else "; without prices nothing is known of the cost"
    return (
        f"{prompts[0]}\n\n--- dry run: this is such a prompt; nothing was asked ---\n"
        f"about {requests:,} requests of about {tokens:,} prompt tokens "
        f"and {max_tokens // 2:,} generated ones (at most {max_tokens:,}){cost}"
    )
