"""A completion server on 127.0.0.1 that misbehaves on demand, for tests of whatever asks one.

    with CompletionServer(answer=lambda prompt, body: "a text") as server:
        server.script = [Fault(429, headers={"Retry-After": "1"}), DROP, None]  # one entry a completion request
        ...                       # base URL: server.url; afterwards server.requests has path, headers, body, prompt

`answer` may return the text or (text, finish_reason). With `faults` set, faults(request) is asked in place of the
script, so that a fault can depend on the prompt. Real HTTP/1.1 with keep-alive, one thread, some thousand answers/s.
"""

import asyncio
import hashlib
import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

HANG, DROP, TRUNCATED, SHORT, EMPTY = "hang", "drop", "truncated JSON", "body shorter than its length", "no choices"
COMPLETION_PATHS = ("/v1/completions", "/v1/chat/completions")


@dataclass(frozen=True)
class Fault:
    """An error answer. `error`: message, code, type, param; `body`: instead of {"error": …}, JSON or bare bytes."""

    status: int
    error: dict = field(default_factory=lambda: {"message": "as scripted"})
    headers: dict = field(default_factory=dict)
    body: Any = None


@dataclass(frozen=True)
class Raw:
    """Bytes as they are, `times` of them with `pause` seconds between, behind `head`; then the connection ends."""

    head: bytes
    part: bytes = b""
    times: int = 0
    pause: float = 0.0


def openai_error(status: int, code: str | None, message: str = "as scripted", param: str | None = None) -> Fault:
    return Fault(status, {"message": message, "code": code, "type": "invalid_request_error", "param": param})


QUOTA = openai_error(429, "insufficient_quota", "You exceeded your current quota.")
BAD_KEY = openai_error(401, "invalid_api_key", "Incorrect API key provided.")
NO_MODEL = openai_error(404, "model_not_found", "The model does not exist.")
OVERFLOW = openai_error(400, "context_length_exceeded", "Please reduce your prompt.", "messages")
MAX_TOKENS_REFUSED = openai_error(
    400,
    "unsupported_parameter",
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
    "max_tokens",
)


@dataclass
class Request:
    path: str
    headers: dict[str, str]
    body: Any
    time: float
    method: str = "POST"

    @property
    def prompt(self) -> str:
        return self.body["prompt"] if "prompt" in self.body else self.body["messages"][-1]["content"]


def echo(prompt: str, body: dict) -> str:
    """A text that follows from the prompt alone."""
    return f"answer {hashlib.sha256(prompt.encode()).hexdigest()[:8]} to {len(prompt.split())} words"


def tasks(prompt: str, body: dict) -> str:
    """Five tasks for the generator's list, of words that follow from the prompt."""
    draw = random.Random(hashlib.sha256(prompt.encode()).hexdigest())
    parts = []
    for n in range(4, 9):
        verb = draw.choice("Name List Find Describe Compare Explain Choose Rank Sort Invent".split())
        words = " ".join(f"w{draw.randrange(3000)}" for _ in range(draw.randrange(4, 12)))
        parts.append(f"{n}. Instruction: {verb} {words}.\n{n}. Input:\n<noinput>\n{n}. Output:\nYes {n}.\n")
    return "###\n".join(parts).removeprefix("4. Instruction:")


class CompletionServer:
    def __init__(
        self,
        answer: Callable[[str, dict], str | tuple[str, str]] = echo,
        models: tuple[str, ...] = ("tiny",),
        script: list | None = None,
        faults: Callable[[Request], Any] | None = None,
        delay: float = 0.0,
        port: int = 0,
        host: str = "127.0.0.1",
    ):
        self.host, self.port = host, port  # 0: any that is free
        self.answer, self.models, self.script, self.faults, self.delay = answer, models, script or [], faults, delay
        self.requests: list[Request] = []  # for completions
        self.other_requests: list[Request] = []
        self.other_faults: Callable[[Request], Any] | None = None  # for all but completions
        self.connections = self.busy = self.busiest = 0

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/v1"

    def __enter__(self) -> "CompletionServer":
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(started)), daemon=True)
        self._thread.start()
        assert started.wait(10), "the server did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _run(self, started: threading.Event) -> None:
        self._loop, self._stop, self._tasks = asyncio.get_running_loop(), asyncio.Event(), set()
        server = await asyncio.start_server(self._connection, self.host, self.port, limit=2**26)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self._stop.wait()
        server.close()
        for task in self._tasks:  # hanging and idle connections
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        self.connections += 1
        try:
            while (request := await read_request(reader)) is not None:
                if not await self._respond(request, writer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _respond(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        """Write the answer. False: the connection is to end."""
        if request.path not in COMPLETION_PATHS:
            self.other_requests.append(request)
            if self.other_faults:
                return await self._answer(request, self.other_faults(request), writer)
            models = {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]}
            known = request.path == "/v1/models" and self.models
            return await reply(writer, 200 if known else 404, models if known else {"detail": "Not Found"})
        self.requests.append(request)
        fault = self.faults(request) if self.faults else (self.script.pop(0) if self.script else None)
        self.busy += 1
        self.busiest = max(self.busy, self.busiest)
        try:
            if self.delay:
                await asyncio.sleep(self.delay)
            return await self._answer(request, fault, writer)
        finally:
            self.busy -= 1

    async def _answer(self, request: Request, fault: Any, writer: asyncio.StreamWriter) -> bool:
        if isinstance(fault, Fault):
            body = {"error": fault.error} if fault.body is None else fault.body
            return await reply(writer, fault.status, body, fault.headers)
        if isinstance(fault, Raw):
            writer.write(fault.head)
            for _ in range(fault.times):
                writer.write(fault.part)
                await writer.drain()
                await asyncio.sleep(fault.pause)
            await writer.drain()
            return False
        if fault == HANG:
            await asyncio.sleep(3600)
        if fault == DROP:
            writer.transport.abort()
            return False
        answer = completion(request, self.answer(request.prompt, request.body))
        if fault == EMPTY:
            answer["choices"] = []
        content = json.dumps(answer).encode()
        if fault == TRUNCATED:
            content = content[: len(content) // 2]
        await reply(writer, 200, content, length=len(content) + (50 if fault == SHORT else 0))
        return fault != SHORT


def completion(request: Request, answer: str | tuple[str, str]) -> dict:
    """What a server sends back. A token is a word: `max_tokens` cuts, `stop` strings end, usage counts them; a text
    that comes with its finish_reason is sent as it is."""
    body = request.body
    text, reason = answer if isinstance(answer, tuple) else (answer, "stop")
    for stop in body.get("stop") or [] if isinstance(answer, str) else []:
        text = text.split(stop)[0]
    limit = body.get("max_completion_tokens", body.get("max_tokens"))
    if not isinstance(answer, tuple) and limit is not None and len(text.split(" ")) > limit:
        text, reason = " ".join(text.split(" ")[:limit]), "length"
    chat = request.path.endswith("chat/completions")
    choice = {"index": 0, "finish_reason": reason, "logprobs": None}
    choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    counts = {"prompt_tokens": len(request.prompt.split()), "completion_tokens": len(text.split(" "))}
    return {
        "id": "cmpl-0",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": body.get("model"),
        "choices": [choice],
        "usage": counts | {"total_tokens": sum(counts.values())},
    }


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    """Return a request; the body of a form, which a file is sent in, as bytes."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    except asyncio.IncompleteReadError:
        return None
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:]) if name}
    if "chunked" in headers.get("transfer-encoding", ""):
        content = b""
        while size := int(await reader.readline(), 16):
            content += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
    else:
        content = await reader.readexactly(int(headers.get("content-length", 0)))
    method, path = head[0].split()[:2]
    body = content if "multipart" in headers.get("content-type", "") else json.loads(content or b"{}")
    return Request(path, headers, body, time.monotonic(), method)


async def reply(writer: asyncio.StreamWriter, status: int, body: Any, headers=None, length: int | None = None) -> bool:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} {'OK' if status == 200 else 'No'}", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(content) if length is None else length}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    writer.write("\r\n".join([*lines, "", ""]).encode() + content)
    await writer.drain()
    return True
