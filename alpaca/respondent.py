"""Who answers: a model in a folder, in this process, or one of a server; and what its answers depend on."""

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alpaca.asking import Budget, Model
from alpaca.client import Client, Sampling
from alpaca.errors import UsageError
from alpaca.prompts import TEMPLATE_FILE


def open_respondent(
    model_name: str,
    base_url: str | None = None,
    api: str = "auto",
    batch_size: int = 8,
    *,
    chat: bool = True,
    base: str | None = None,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    batch_size_flag: str = "--request_batch_size",
    base_flag: str | None = None,
) -> Model:
    """The model of a folder (a checkpoint, an adapter or a diff), unless there is a base URL; else a server's.

    Args:
        api: completions, chat or auto; of a folder, auto is chat where its tokenizer has a chat template, unless it is
            of train.py, whose chat template writes the same prompts.
        chat: whether auto may be chat.
        base: of a folder with an adapter or a diff; base_flag names it, where the command takes one.

    Raises:
        UsageError: a flag that does not fit, a folder that cannot be opened, a bad address.
    """
    if not is_folder(model_name, base_url):
        for name, given in {"base": base, "load_in_8bit": load_in_8bit, "load_in_4bit": load_in_4bit}.items():
            if given:
                raise UsageError(f"--{name} is for the model of a folder; --model_name {model_name} is a server's")
        return Client(model_name, base_url, api)
    if api not in ("auto", "chat", "completions"):
        raise UsageError(f"--api {api}: expected auto, chat or completions")
    from alpaca.local_model import LocalModel

    folder = Path(model_name).expanduser()
    chat = api == "chat" or (api == "auto" and chat and not (folder / TEMPLATE_FILE).is_file())
    model = LocalModel(folder, batch_size, chat, batch_size_flag=batch_size_flag, base=base,
                       load_in_8bit=load_in_8bit, load_in_4bit=load_in_4bit, base_flag=base_flag)  # fmt: skip
    if api == "chat" and model.api != "chat":
        raise UsageError(f"--api chat: the tokenizer of {model_name} has no chat template; leave --api away")
    return model


def is_folder(model_name: str, base_url: str | None) -> bool:
    return not base_url and not os.environ.get("OPENAI_BASE_URL") and Path(model_name).expanduser().is_dir()


@dataclass(frozen=True)
class Respondent:
    """A respondent by the flags of a command, which are named as these fields and those of Sampling.

    Raises:
        UsageError: a number that no model takes.
    """

    model_name: str
    base: str | None
    base_url: str | None
    api: str
    batch_size: int
    load_in_8bit: bool
    load_in_4bit: bool
    sampling: Sampling
    seed: int

    def __post_init__(self) -> None:
        check_numbers(batch_size=self.batch_size, max_tokens=self.sampling.max_tokens)
        if self.sampling.temperature < 0:
            raise UsageError(f"--temperature {self.sampling.temperature}: expected 0 (greedy) or more")
        if not 0 < self.sampling.top_p <= 1:
            raise UsageError(f"--top_p {self.sampling.top_p}: expected more than 0, 1 at most")

    def open(self, chat: bool = True) -> Model:
        """As `open_respondent`."""
        return open_respondent(
            self.model_name, self.base_url, self.api, self.batch_size, chat=chat, base=self.base,
            load_in_8bit=self.load_in_8bit, load_in_4bit=self.load_in_4bit, batch_size_flag="--batch_size",
            base_flag="--base",
        )  # fmt: skip

    def how(self, **texts: Iterable[str]) -> dict[str, Any]:
        """All that the answers depend on, for a journal; of texts, their SHA-256."""
        names = ("model_name", "base", "base_url", "api", "load_in_8bit", "load_in_4bit", "seed")
        how = {name: getattr(self, name) for name in names}
        how |= {name: asdict(self.sampling)[name] for name in ("max_tokens", "temperature", "top_p")}
        if is_folder(self.model_name, self.base_url):
            from alpaca.contract import fingerprint_of_weights

            for name in filter(None, (self.model_name, self.base)):
                how[f"weights of {name}"] = fingerprint_of_weights(str(Path(name).expanduser()))
        for name, parts in texts.items():
            digest = hashlib.sha256()
            for part in parts:
                digest.update(json.dumps(part).encode())
            how[name] = digest.hexdigest()[:12]
        return how

    def seed_of(self, number: int) -> int:
        return seed_of(self.seed, number)


def seed_of(seed: int, number: int) -> int:
    """The seed of a request: equal prompts get different answers, whatever is asked beside them."""
    return random.Random(f"{seed} {number}").randrange(2**62)


def fitting(model: Model, numbers: Iterable[int], prompt_of: Callable[[int], str], sampling: Sampling) -> list[int]:
    """Those whose prompt leaves room for an answer. Of a server's model only the server knows."""
    fits = getattr(model, "fits", None)
    return [number for number in numbers if fits is None or fits(prompt_of(number), sampling)]


def check_numbers(**flags: int) -> None:
    """Raise UsageError for the first that is below 1."""
    for name, value in flags.items():
        if value < 1:
            raise UsageError(f"--{name} {value}: expected at least 1")


def budget_of(price_in: float, price_out: float, max_cost: float | None) -> Budget:
    if min(price_in, price_out) < 0:
        raise UsageError("--price_in, --price_out: expected dollars per million tokens, at least 0")
    if max_cost is not None and not (max_cost > 0 and price_in + price_out > 0):
        raise UsageError(f"--max_cost {max_cost}: expected dollars above 0, with --price_in and --price_out")
    return Budget(price_in, price_out, max_cost)
