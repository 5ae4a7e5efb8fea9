"""What is asked of a model, and what it answers: the interface between whoever asks and a server
(alpaca/inference/client.py) or a model in this process (alpaca/inference/local_model.py)."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from alpaca.common.commands import check_numbers, flag
from alpaca.common.errors import ParameterError, masked

ENDS = ("stop", "eos", "eos_token", "stop_sequence", "end_turn")  # words for an answer that came to its end
NO_REASON = "unknown"  # finish_reason of an answer that came without one
MOST_CUTS = 12  # of max_tokens: 0.8^12 leaves 7% of it
Prompt = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Sampling:
    """How to generate. None is not sent, which leaves the choice to the server."""

    max_tokens: int = 1800
    temperature: float | None = 0.2
    top_p: float | None = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logit_bias: Mapping[str, float] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)  # other fields of the request, sent as they are


@dataclass(frozen=True)
class SamplingFlags:
    """How answers are sampled: flags of all commands that ask a model."""

    temperature: float | None = flag(0.7, "Sampling temperature; 0 is greedy, None leaves it to the server.")
    top_p: float | None = flag(
        1.0, "Sample from the likeliest tokens of this probability; None leaves it to the server."
    )
    max_new_tokens: int = flag(2048, "Tokens of an answer, at most.")

    def sampling(self) -> Sampling:
        """Return the settings of a request. Raise ParameterError for a number that no model takes."""
        check_numbers(max_new_tokens=self.max_new_tokens)
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ParameterError(f"{{temperature}} {self.temperature}: expected 0 (greedy) or more", "temperature")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ParameterError(f"{{top_p}} {self.top_p}: expected more than 0, 1 at most", "top_p")
        return Sampling(self.max_new_tokens, self.temperature, self.top_p)


GREEDY = SamplingFlags(0.0, 1.0, 512)  # how a model in this process answers, unless flags or sliders say otherwise


class Request(NamedTuple):
    """A prompt to complete.

    Args:
        key: what a journal calls the request; it is the request's own.
        seed: of the answer; None leaves it to the Sampling.
        row: of a file, for messages, where it is not the key.
    """

    prompt: str
    key: int
    seed: int | None = None
    row: int | None = None


@dataclass(frozen=True)
class Completion:
    """`finish_reason` is "stop", "length", another word of the server's, or NO_REASON. Token counts are None where it
    gives none that can be true. `reasoning` is what the model thought before it answered."""

    text: str
    finish_reason: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    logprobs: Any = None  # as the server sends them, where `extra` asks for some
    reasoning: str = ""


class Model(Protocol):
    """A server (alpaca/inference/client.py) or a model in this process (alpaca/inference/local_model.py)."""

    async def __aenter__(self) -> "Model": ...

    async def __aexit__(self, *exception: object) -> None: ...

    api: str

    async def check(self) -> str: ...

    async def complete(self, prompt: str, sampling: Sampling, on_lost_response: Callable[[], bool]) -> Completion: ...


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Return `text` up to the first of the `stop` strings, and whether there was one."""
    ends = [text.find(word) for word in stop if word and word in text]
    return (text[: min(ends)], True) if ends else (text, False)


def was_cut(reason: str) -> bool:
    """Return whether an answer with this finish_reason did not come to its end: "length", "content_filter", or a word
    that nobody knows. One without a reason counts as whole."""
    return reason != NO_REASON and reason.strip().lower() not in ENDS


def split_reasoning(text: str) -> tuple[str, str]:
    """Return the text without its `<think>…</think>`, and what stood in them.

    A thought that is not closed is all of the text. One that was opened in the prompt has only its end here."""
    opened, closed = text.find("<think>"), text.find("</think>")
    if closed >= 0 and not 0 <= opened < closed:
        return text[closed + len("</think>") :].lstrip(), text[:closed].strip()
    kept, thoughts, at = [], [], 0
    while (opened := text.find("<think>", at)) >= 0:
        closed = text.find("</think>", opened)
        if closed < 0 and text[:opened].strip():
            break  # it is not the first thing said, and may be part of the answer
        kept.append(text[at:opened])
        thoughts.append(text[opened + len("<think>") : closed if closed >= 0 else None].strip())
        at = closed + len("</think>") if closed >= 0 else len(text)
    if not thoughts:
        return text, ""
    answer = "".join([*kept, text[at:]])
    return (answer if kept[0].strip() else answer.lstrip()), "\n\n".join(filter(None, thoughts))


def whole_characters(text: str) -> str:
    """Return the text with the halves of surrogate pairs replaced, which neither a file nor a request can hold."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def shown(text: str, most: int = 200) -> str:
    """Return somebody else's text for a message: short, on one line, without secrets and control characters."""
    text = masked(whole_characters(text[:20_000]))
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:most]


class RequestFailed(RuntimeError):
    """This request got no completion and the message says why. Another prompt, or another hour, may have more luck."""


class ContextOverflow(RequestFailed):
    """Prompt and max_tokens together are longer than the model's context."""


class NotNow(RequestFailed):
    """The server has no room now, or has sent what is no answer. `wait`: seconds, where it says when to ask again."""

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


class NoResponse(NotNow):
    """No connection to the server, or none that lasted until an answer came."""


class NoServer(ParameterError):
    """Nobody answers at the address."""


def seed_of(seed: int | None, number: int) -> int | None:
    """Return the seed of a request: equal prompts get different answers, whatever is asked beside them."""
    return None if seed is None else random.Random(f"{seed} {number}").randrange(2**62)
