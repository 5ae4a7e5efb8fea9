"""People who ask models of this process at the same time: each request answered by every model side by side, as it is
written, until it ends, is stopped, or nobody waits for it any more.

    tuned = DemoModel("tuned", LocalModel("output/tuned"), PROMPT_DICT)
    engine = DemoEngine([tuned], concurrency=8, max_characters=4000)
    async for answers in engine.answer("page 1", "Name two oceans.", "", Sampling(100)): ...
"""

import asyncio
import ipaddress
import re
import socket
import threading
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from alpaca.common.errors import UsageError, first_line, loading
from alpaca.common.files import parse_json
from alpaca.completions.api import ContextOverflow, Sampling
from alpaca.data.prompts import format_prompt
from alpaca.data.rows import Row
from alpaca.inference.local_model import LocalModel
from alpaca.inference.token_stream import Ending
from alpaca.weights.provenance import CARD, front_matter

ALONE = 10.0  # seconds that a request goes on, or waits, while nobody listens to its answer
LARGEST_BODY = 2**20  # bytes of a request, where --max_characters needs no more
SLOWEST_BODY = 30.0  # seconds until a request is there
LOOPBACK = ("localhost", "127.0.0.1", "::1")
PAUSE = 0.05  # seconds between two looks at what was written: there is news 20 times a second at most


@dataclass
class DemoModel:
    """A model, what it is called on the page, the prompts it was trained with, and what its card says of licences."""

    name: str
    model: LocalModel
    templates: Mapping[str, str]
    licence: str = ""

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
            seconds = time.monotonic() - started
            limit = f" at its limit of {sampling.max_tokens:,} tokens" if reason == "length" else ""
            how = "Stopped" if stopped.is_set() else f"Ended{limit}"
            self.status = f"{how} after {seconds:.1f} s{speed(reason, seconds)}"
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


def speed(reason: str, seconds: float) -> str:
    """Return ": 41 tokens, 12.8 tokens/s" of an answer that took so long, the reading of its prompt included."""
    if not isinstance(reason, Ending):
        return ""
    return f": {reason.tokens:,} token{'s' * (reason.tokens != 1)}, {reason.tokens / max(seconds, 1e-3):,.1f} tokens/s"


def licence_of(folder: Path) -> str:
    """Return what the card of a model, README.md in its folder, says of licences: its own and those of its data."""
    card = folder / CARD
    if not card.is_file():
        return "It has no card (README.md), and so nothing names the licences of the model and its data."
    try:
        with loading(card, "cannot be read"):
            facts = front_matter(folder)
            ours = re.search(r"^- Licence: (?!not stated)(\S.*)$", card.read_text(encoding="utf-8"), re.MULTILINE)
    except UsageError as error:
        print(f"note: {error}", flush=True)
        return "Its card (README.md) cannot be read, and so nothing names the licences of the model and its data."
    licence, data = _listed(facts.get("license_name") or facts.get("license")), _listed(facts.get("datasets"))
    of_data = ours[1].strip()[:100] if ours else ""  # train.py's cards have it in their text
    named = f" ({data})" if data else ""
    if not licence and not of_data:
        return f"Its card names no licence, neither of the model nor of its data{named}."
    own, theirs = licence or "not named", of_data or "not named"
    return f"By its card, the licence of the model is {own}, and that of its data{named} is {theirs}."


def _listed(value: Any) -> str:
    """Return texts of a card's front matter, which may be one or a list."""
    values = value if isinstance(value, list) else [value]
    return ", ".join(text for text in values if isinstance(text, str))[:200]


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
        self.listeners: Counter[str] = Counter()  # by session, as the server's guard counts them
        self._running: dict[str, threading.Event] = {}

    async def answer(
        self,
        session: str,
        instruction: str,
        input: str,
        sampling: Sampling,
        attended: Callable[[], bool] = lambda: True,
    ) -> AsyncIterator[list[Answer]]:
        """Yield the answers so far, of each model: when there is more, and once a second, so that whoever takes them
        notices that nobody reads them. The last time all have ended. Closing the iterator stops the models.

        Args:
            attended: whether somebody listens. A request that nobody listens to takes no place, and soon ends.
        """
        row = {"instruction": (instruction or "").strip(), "input": (input or "").strip()}
        if problem := self.refusal(row):
            yield [Answer("", problem, wrong=True, ended=True) for _ in self.models]
            return
        self.stop(session)
        stopped = self._running[session] = threading.Event()
        answers = [Answer(status="Waiting: others are being answered") for _ in self.models]
        place: asyncio.Future | None = None
        try:
            started = False
            ended = False
            shown = []
            at = 0.0
            heard = time.monotonic()
            while not ended:
                if attended():
                    heard = time.monotonic()
                    if place is None:
                        place = asyncio.ensure_future(self.places.acquire())
                        await asyncio.sleep(0)  # a place that is free is taken now
                elif time.monotonic() - heard > ALONE:
                    stopped.set()
                if not started and stopped.is_set():
                    answers = [Answer("", "Stopped", ended=True) for _ in self.models]
                elif not started and place is not None and place.done():
                    started = self._start(answers, row, sampling, stopped)
                ended = all(answer.ended for answer in answers)  # if so, their text is whole below
                if (now := [replace(answer) for answer in answers]) != shown or time.monotonic() - at > 1:
                    yield now
                    shown, at = now, time.monotonic()
                await asyncio.sleep(PAUSE)
        finally:
            stopped.set()
            if place is not None and not place.cancel():  # it was taken
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


# ---- what reaches the server ----


class DemoGuard:
    """ASGI middleware in front of the page. It serves requests that come by a name of this server's and from its own
    page, and refuses files and large bodies before anything of them is kept. It counts who listens to an answer.

    Args:
        host: the address that the server listens on.
        names: other names, in lower case, that it may be reached by; "*" is any.
    """

    def __init__(self, app: Any, engine: DemoEngine, host: str, names: Sequence[str] = ()):
        self.app, self.engine, self.host, self.names = app, engine, host.lower(), names
        self.largest = max(LARGEST_BODY, 16 * engine.max_characters)

    async def __call__(self, scope: Mapping[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        refusal = self._of_strangers(headers)
        if scope["type"] == "websocket":
            if refusal:
                return await send({"type": "websocket.close", "code": 1008})
            return await self.app(scope, receive, send)
        if refusal is None and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            refusal, receive = await self._body(scope["path"], dict(headers), receive)
        if refusal is not None:
            return await _refuse(send, *refusal)
        if not scope["path"].endswith("/queue/data"):
            return await self.app(scope, receive, send)
        query = parse_qs(scope["query_string"].decode("latin-1"))
        session = query.get("session_hash", [""])[0]
        self.engine.listeners[session] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.engine.listeners[session] -= 1
            if not self.engine.listeners[session]:
                del self.engine.listeners[session]

    def _of_strangers(self, headers: Sequence[tuple[str, str]]) -> tuple[int, str] | None:
        """Return the refusal of a request by a name that is not this server's (which a page of somebody else may have
        pointed here), or sent by the page of another server."""
        hosts = [value for name, value in headers if name == "host"]
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            name = "".join(letter for letter in "".join(hosts)[:100] if letter.isprintable())
            return 403, f"This demo is not served as {name!r}. Whoever runs it can allow the name: --allowed_hosts."
        for origin in (value for name, value in headers if name == "origin"):
            if _address(origin.partition("://")[2]) != _address(hosts[0]) and _name_in(origin) not in self.names:
                return 403, "This demo takes requests of its own page only."
        return None

    def _is_ours(self, host: str) -> bool:
        name = _name_in(f"http://{host}")
        if name is None:
            return False
        if name in (*LOOPBACK, self.host, *self.names) or "*" in self.names:
            return True
        if self.host in LOOPBACK:
            return False
        return _is_ip(name) or name in (socket.gethostname().lower(), socket.getfqdn().lower())

    async def _body(
        self, path: str, headers: Mapping[str, str], receive: Callable
    ) -> tuple[tuple[int, str] | None, Callable]:
        """Return the refusal of a request for its body, and what gives the body to the page."""
        too_large = 413, f"Too large: this demo takes {self.largest:,} bytes."
        if path.endswith("/upload") or "multipart" in headers.get("content-type", ""):
            return (413, "This demo takes no files."), receive
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 15 or int(length) > self.largest:
            return too_large, receive
        body = b""
        try:
            while True:
                message = await asyncio.wait_for(receive(), SLOWEST_BODY)
                body += message.get("body", b"")
                if len(body) > self.largest:
                    return too_large, receive
                if message["type"] != "http.request" or not message.get("more_body"):
                    break
            if body and "json" in headers.get("content-type", ""):
                parse_json(body)
        except asyncio.TimeoutError:
            return (408, "The request did not come to its end."), receive
        except ValueError:
            return (400, "The request is no JSON."), receive
        given = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Mapping[str, Any]:
            return given.pop() if given else await receive()

        return None, again


async def _refuse(send: Callable, status: int, text: str) -> None:
    body = text.encode(errors="replace")
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})


def _name_in(url: str) -> str | None:
    """Return the host in a URL, in lower case; None if it holds none."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _address(netloc: str) -> str:
    """Return "host:port" without the port that a browser leaves out."""
    return netloc.lower().removesuffix(":80").removesuffix(":443")


def _is_ip(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
