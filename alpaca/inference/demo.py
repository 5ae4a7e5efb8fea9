"""People who ask models of this process at the same time: each request answered by every model side by side, as it is
written, until it ends, is stopped, or nobody waits for it any more.

    tuned = DemoModel("tuned", LocalModel("output/tuned"), PROMPT_DICT)
    engine = DemoEngine([tuned], concurrency=8, max_characters=4000)
    async for answers in engine.answer("page 1", "Name two oceans.", "", Sampling(100)): ...
"""

import asyncio
import threading
import time
import traceback
from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from dataclasses import dataclass, replace

from alpaca.common.errors import UsageError, first_line
from alpaca.completions.api import ContextOverflow, Sampling
from alpaca.data.prompts import format_prompt
from alpaca.data.rows import Row
from alpaca.inference.local_model import LocalModel

PAUSE = 0.05  # seconds between two looks at what was written: there is news 20 times a second at most


@dataclass
class DemoModel:
    """A model, what it is called on the page, and the prompts it was trained with."""

    name: str
    model: LocalModel
    templates: Mapping[str, str]

    def facts(self) -> str:
        number, dtype = self.model.model.num_parameters(), str(self.model.model.dtype).removeprefix("torch.")
        size = f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"
        context = f", reads {self.model.context} tokens" if self.model.context else ""
        return f"{size} parameters in {dtype} on {self.model.device}{context}"

    def fitting(self, prompt: str, sampling: Sampling) -> Sampling:
        """Return `sampling`, for the tokens that the context has left.

        Raises:
            UsageError: there is none.
        """
        tokens = self.model.prompt_tokens(prompt)
        room = sampling.max_tokens if self.model.context is None else self.model.context - tokens
        if room < 1:
            raise UsageError(
                f"Too long: instruction and input are {tokens:,} tokens with their prompt, and this model reads "
                f"{self.model.context:,}, answer included. Shorten them."
            )
        return replace(sampling, max_tokens=min(sampling.max_tokens, room))


@dataclass
class Answer:
    """What one model has written. Its thread fills it in, the page looks at it now and then."""

    text: str = ""
    status: str = ""
    wrong: bool = False  # then the status says what is
    ended: bool = False

    def write(self, model: DemoModel, row: Row, sampling: Sampling, stopped: threading.Event) -> None:
        """Run in a thread, which ends with the answer, or soon after `stopped` is set."""
        started = time.monotonic()
        try:
            prompt = format_prompt(row, model.templates)
            sampling = model.fitting(prompt, sampling)
            pieces = model.model.stream(prompt, sampling, stopped)
            while (reason := self.next_piece(pieces)) is None:
                self.status = f"Writing, {time.monotonic() - started:.0f} s"
            limit = f" at its limit of {sampling.max_tokens:,} tokens" if reason == "length" else ""
            how = "Stopped" if stopped.is_set() else f"Ended{limit}"
            self.status = f"{how} after {time.monotonic() - started:.1f} s"
        except Exception as error:  # whatever it is, the person who waits for an answer has to hear of it
            self.status, self.wrong = error_text(error), True
        finally:
            self.ended = True
            print(f"{model.name}: {len(self.text)} characters. {self.status}", flush=True)  # not what was asked

    def next_piece(self, pieces: Generator[str, None, str]) -> str | None:
        """Add the next piece. Return why there is none, else None."""
        try:
            self.text += next(pieces)
        except StopIteration as end:
            return end.value
        return None


def error_text(error: Exception) -> str:
    """Return the words for the page. What nobody foresaw also goes to the terminal, in full."""
    if any(words in str(error) for words in ("out of memory", "can't allocate memory")):
        return "Out of memory. Ask for fewer new tokens, shorten the input, or try again when fewer people ask."
    if not isinstance(error, (UsageError, ContextOverflow)):
        traceback.print_exception(error)
        return f"The model failed: {type(error).__name__}: {first_line(error)}"
    return str(error)


class DemoEngine:
    """The requests of all pages, at most `concurrency` of them at a time, each answered by every model side by side.

    `session`: a page's own name, of one request at a time.
    """

    def __init__(self, models: Sequence[DemoModel], concurrency: int, max_characters: int):
        self.models = models
        self.max_characters = max_characters
        self.places = asyncio.Semaphore(concurrency)
        self._running: dict[str, threading.Event] = {}

    async def answer(
        self, session: str, instruction: str, input: str, sampling: Sampling
    ) -> AsyncIterator[list[Answer]]:
        """Yield the answers so far, of each model: when there is more, and once a second, so that whoever takes them
        notices that nobody reads them. The last time all have ended. Closing the iterator stops the models."""
        row = {"instruction": (instruction or "").strip(), "input": (input or "").strip()}
        if problem := self.refusal(row):
            yield [Answer("", problem, wrong=True, ended=True) for _ in self.models]
            return
        self.stop(session)
        stopped = self._running[session] = threading.Event()
        answers = [Answer(status="Waiting: others are being answered") for _ in self.models]
        place = asyncio.ensure_future(self.places.acquire())
        try:
            await asyncio.sleep(0)  # a place that is free is taken now
            started = False
            ended = False
            shown = []
            at = 0.0
            while not ended:
                if not started and stopped.is_set():
                    answers = [Answer("", "Stopped", ended=True) for _ in self.models]
                elif not started and place.done():
                    started = self._start(answers, row, sampling, stopped)
                ended = all(answer.ended for answer in answers)  # if so, their text is whole below
                if (now := [replace(answer) for answer in answers]) != shown or time.monotonic() - at > 1:
                    yield now
                    shown, at = now, time.monotonic()
                await asyncio.sleep(PAUSE)
        finally:
            stopped.set()
            if not place.cancel():  # it was taken
                self.places.release()
            if self._running.get(session) is stopped:
                del self._running[session]

    def _start(self, answers: Sequence[Answer], row: Row, sampling: Sampling, stopped: threading.Event) -> bool:
        for model, answer in zip(self.models, answers):
            answer.status = "Reading the instruction"
            threading.Thread(target=answer.write, args=(model, row, sampling, stopped), daemon=True).start()
        return True

    def stop(self, session: str) -> None:
        if session in self._running:
            self._running[session].set()

    def refusal(self, row: Row) -> str | None:
        if not row["instruction"]:
            return "Write an instruction first."
        if (length := len(row["instruction"]) + len(row["input"])) > self.max_characters:
            return f"Too long: instruction and input have {length:,} characters, of at most {self.max_characters:,}."
        return None
