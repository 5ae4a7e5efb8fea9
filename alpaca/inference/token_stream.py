"""One answer while it is generated: tokens come out of generate() in a thread, text comes out of an iterator.

The thread's ends are transformers' own: a streamer and a stopping criterion. Its TextIteratorStreamer is not used: its
text would lack the space that an answer of a sentencepiece model begins with, hold the stop string, come word by word,
and end without the error that ended generate().
"""

import queue
import re
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from alpaca.completions.api import cut_at_stop

BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token of a sentencepiece vocabulary that is a part of a character
UNFINISHED = "\ufffd"  # what such a part is decoded as


class TokenQueue(BaseStreamer):
    """generate(streamer=) puts the prompt here first, then one token at a time."""

    def __init__(self):
        self.items: queue.SimpleQueue[list[int] | Exception | None] = queue.SimpleQueue()  # None: the end
        self.prompt_came = False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_came:
            self.items.put(value.reshape(-1).tolist())
        self.prompt_came = True

    def end(self) -> None:
        pass  # `tokens_of` puts the end, also after an error

    def __iter__(self) -> Iterator[list[int]]:
        """Yield all new tokens that are there, at least one at a time."""
        while (item := self.items.get()) is not None:
            if isinstance(item, Exception):
                raise item
            while not self.items.empty():
                following = self.items.get()
                if not isinstance(following, list):
                    self.items.put(following)  # the end: nothing comes after it
                    break
                item += following
            yield item


class Ending(str):
    """Why an answer ended, "stop" or "length", and of how many tokens it is, the end not counted."""

    tokens: int

    def __new__(cls, reason: str, tokens: int) -> "Ending":
        ending = super().__new__(cls, reason)
        ending.tokens = tokens
        return ending


class Stop(StoppingCriteria):
    """Ends generate() after the token that it is at when one of the `events` is set."""

    def __init__(self, *events: threading.Event | None):
        self.events = [event for event in events if event is not None]

    def is_set(self) -> bool:
        return any(event.is_set() for event in self.events)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return torch.full((len(input_ids),), self.is_set(), device=input_ids.device)


def tokens_of(
    generate: Callable[[TokenQueue, Stop], object], stopped: threading.Event | None
) -> Generator[list[int], None, None]:
    """Yield the new tokens of `generate`, which runs in a thread of its own and is stopped when nobody takes them any
    more."""
    tokens, left = TokenQueue(), threading.Event()

    def work() -> None:
        try:
            generate(tokens, Stop(stopped, left))
            tokens.items.put(None)
        except Exception as error:
            tokens.items.put(error)

    thread = threading.Thread(target=work, name="generate", daemon=True)
    thread.start()
    try:
        yield from tokens
    finally:
        left.set()
        thread.join()


def pieces_of(
    tokens: Generator[list[int], None, None],
    decode: Callable[[list[int]], str],
    name_of: Callable[[int], str],
    eos: Sequence[int],
    stop: Sequence[str],
    stopped: Callable[[], bool],
) -> Generator[str, None, Ending]:
    """Yield the text of `tokens` in pieces that later tokens do not change: without the beginning of a character or of
    a stop string at its end. All pieces are the text as a whole, up to the first of `eos` and `stop`; when `stopped`,
    without the part of a character at its end. Return why it ended: "stop", at one of those, or "length".

    decode: the text of all tokens so far; name_of: how the vocabulary spells a token.
    """
    new: list[int] = []
    text = ""
    shown = 0
    end = None
    ended = False
    with closing(tokens):
        for some in tokens:
            end = next((n for n, token in enumerate(some) if token in eos), None)
            new += some[:end]
            text, ended = cut_at_stop(decode(new), stop)
            if ended or end is not None:
                break
            ready = 0 if BYTE.fullmatch(name_of(new[-1])) else len(_without_beginning(text, stop))
            if ready > shown:
                yield text[shown:ready]
                shown = ready
    if stopped() and not ended:
        text = text.rstrip(UNFINISHED)
    if len(text) > shown:
        yield text[shown:]
    return Ending("length" if end is None and not ended else "stop", len(new))


def _without_beginning(text: str, stop: Sequence[str]) -> str:
    """Return `text` without the part of a character, or the longest beginning of a stop string, that it ends with."""
    longest = max((n for word in stop for n in range(1, len(word)) if text.endswith(word[:n])), default=0)
    return text[: len(text) - longest].rstrip(UNFINISHED)
