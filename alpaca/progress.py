"""What a person sees of many requests: a bar with rates and dollars, and the same numbers for a report."""

import sys
import time
from statistics import fmean
from typing import Any

from tqdm import tqdm

from alpaca.asking import Budget


class Progress:
    """Counts things that are done (tasks kept, rows answered) and the requests behind them."""

    def __init__(self, unit: str, total: int, done: int, budget: Budget):
        self.unit, self.budget, self.first, self.done = unit, budget, done, done
        self.requests = self.retries = 0
        self.began = time.monotonic()
        calm = {} if sys.stderr.isatty() else {"mininterval": 30.0, "miniters": 1}  # a line now and then in a log file
        self.bar = tqdm(total=total, initial=done, unit=f" {unit}", dynamic_ncols=True, **calm)

    def show(self, done: int, requests: int, retries: int) -> None:
        """Things done in all; requests and retries of this run."""
        self.done, self.requests, self.retries = done, requests, retries
        self.bar.set_postfix_str(self._rates(), refresh=False)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        self.bar.close()

    def _rates(self) -> str:
        seconds = max(time.monotonic() - self.began, 1e-3)
        cost = f", ${self.budget.cost:.4f}" if self.budget.price_in or self.budget.price_out else ""
        retries = f", {self.retries} retries" if self.retries else ""
        done = f"{(self.done - self.first) / seconds:.2f} {self.unit}/s"
        return f"{self.requests / seconds:.2f} requests/s, {done}{retries}{cost}"

    def told(self) -> str:
        tokens = f"{self.budget.prompt_tokens:,} prompt tokens and {self.budget.completion_tokens:,} generated tokens"
        return f"{self.requests:,} requests in this run, {self._rates()}; {tokens} in all"

    def report(self) -> dict[str, Any]:
        """Of this run: seconds, requests, rates; of all runs with this journal: tokens and dollars."""
        seconds = max(time.monotonic() - self.began, 1e-3)
        return {
            "seconds": round(seconds, 1), "requests_of_this_run": self.requests, "retries": self.retries,
            "requests_per_second": round(self.requests / seconds, 3),
            f"{self.unit}_per_second": round((self.done - self.first) / seconds, 3),
            "prompt_tokens": self.budget.prompt_tokens, "completion_tokens": self.budget.completion_tokens,
            "cost_dollars": round(self.budget.cost, 6),
        }  # fmt: skip


def estimate(prompts: list[str], requests: int, max_tokens: int, budget: Budget) -> str:
    """One prompt, and what all would cost; a token is taken for four bytes, and in what it can cost at most for one."""
    tokens = round(fmean(len(prompt.encode()) for prompt in prompts) / 4)
    likely = requests * (tokens * budget.price_in + max_tokens // 2 * budget.price_out) / 1e6
    most = requests * fmean(budget.most(prompt, max_tokens) for prompt in prompts)
    cost = f": about ${likely:.2f}, at most ${most:.2f}" if most else "; --price_in and --price_out give the cost"
    return (
        f"{prompts[0]}\n\n--- dry run: this is such a prompt; nothing was asked ---\n"
        f"about {requests:,} requests of about {tokens:,} prompt tokens "
        f"and {max_tokens // 2:,} generated ones (at most {max_tokens:,}){cost}"
    )
