"""A file of requests, and its way through OpenAI's batch endpoint: uploaded, made a batch, looked at, and its answers
downloaded.

    endpoint = BatchEndpoint(client)
    await endpoint.submit(batch, note)      # note(batch, "uploaded", file_id=…), note(batch, "created", id=…)
    state = await endpoint.look(batch)
    paths = await endpoint.download(batch, state)

A batch has its token in its metadata, and is found again by it or by its file: a run that was killed between two steps
asks for nothing twice. The format of the file is also that of vLLM's `run-batch`.
"""

import json
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from alpaca.common.errors import ParameterError, UsageError, first_line
from alpaca.completions.api import Model, RequestFailed, Sampling, shown

MOST_REQUESTS, MOST_BYTES = 50_000, 200_000_000  # of a file, at OpenAI
SLOWEST = 4 * 3600.0  # seconds for a file on its way
MOST_PAGES = 1000  # of a list of batches
ENDED = ("completed", "failed", "expired", "cancelled")
DEAD = ("failed", "cancelling", "cancelled")
ID = re.compile(r"\w[\w.:=+-]{0,499}")
COUNTED = ("completed", "failed", "total")


class Line(NamedTuple):
    """A request of a batch: its key, in which round it is asked, dollars at most, and where its line begins."""

    key: int
    round: int
    most: float
    at: int = 0


class Question(NamedTuple):
    """A request that is to be written: what the journal is to remember with its answer, and what is sent."""

    about: dict[str, Any]
    line: Line
    url: str
    body: dict[str, Any]


@dataclass
class Batch:
    """A file of requests. `lines` has those without an entry in the journal, by their custom_id."""

    number: int
    path: Path
    about: dict[str, Any]
    url: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    lines: dict[str, Line] = field(default_factory=dict)
    content: list[bytes] = field(default_factory=list)  # until it is written
    size: int = 0
    began: float = field(default_factory=time.time)
    file_id: str | None = None
    id: str | None = None
    lost: set[int] = field(default_factory=set)  # keys whose lost answer is in the journal
    said: str = ""

    @property
    def name(self) -> str:
        return f"batch {self.id or self.number}"

    def add(self, one: Question) -> bool:
        """Add a request, if it may go into this file; the first one may. Return whether it did."""
        name = f"{self.token[:16]}-{one.line.round}-{one.line.key}"  # no other request of any run has it
        content = json.dumps({"custom_id": name, "method": "POST", "url": one.url, "body": one.body}).encode() + b"\n"
        alike = (self.about, self.url) == (one.about, one.url)
        fits = len(self.lines) < MOST_REQUESTS and self.size + len(content) <= MOST_BYTES
        if self.lines and not (alike and fits):
            return False
        self.lines[name] = one.line._replace(at=self.size)
        self.content.append(content)
        self.size += len(content)
        return True

    def sent(self, line: Line) -> dict[str, Any]:
        """Return what was sent of a request: a line of the file."""
        with open(self.path, "rb") as file:
            file.seek(line.at)
            return json.loads(file.readline())


class BatchEndpoint:
    """The batch endpoint of a server. `model`: the client that asks it."""

    def __init__(self, model: Model):
        self.model = model

    async def submit(self, batch: Batch, note: Callable[..., None]) -> None:
        """Upload the file and create the batch, unless an earlier attempt or run has done it. `note` writes each step
        down."""
        if batch.id is not None:
            return
        tried = batch.file_id is not None  # and journaled before the batch was created: it may be there
        name = f"alpaca-{batch.token}.jsonl"
        if batch.file_id is None:

            async def upload() -> str:
                with open(batch.path, "rb") as file:
                    return _id((await self.model.server.files.create(file=(name, file), purpose="batch")).id)

            batch.file_id = await self._call("/files", upload)
            note(batch, "uploaded", file_id=batch.file_id)

        async def create() -> str:
            nonlocal tried
            if tried and (found := await self._find(batch)) is not None:
                return found
            tried = True
            wanted = {"input_file_id": batch.file_id, "endpoint": batch.url}
            wanted |= {"completion_window": "24h", "metadata": {"alpaca_token": batch.token}}
            headers = {"Idempotency-Key": batch.token}
            made = await self.model.server.post("/batches", body=wanted, cast_to=object, options={"headers": headers})
            return _id(made["id"])

        batch.id = await self._call("/batches", create)
        note(batch, "created", id=batch.id)
        print(f"{batch.name}: {len(batch.lines):,} requests sent", flush=True)

    async def look(self, batch: Batch) -> dict[str, Any]:
        """Return what the server says of a batch."""
        return await self._call(f"/batches/{batch.id}", lambda: self._get(f"/batches/{batch.id}"))

    async def _find(self, batch: Batch) -> str | None:
        """Return the id of a batch of ours at the server. Of several, which another attempt may have made, all but one
        are cancelled."""
        found, after = [], None
        for _ in range(MOST_PAGES):
            page = await self._get("/batches", limit=100, **({"after": after} if after else {}))
            listed = [each for each in page["data"] if isinstance(each, dict)]
            found += [
                each
                for each in listed
                if (each.get("metadata") or {}).get("alpaca_token") == batch.token
                or each.get("input_file_id") == batch.file_id
            ]
            if not page.get("has_more") or not listed:
                break
            after = _id(listed[-1]["id"])
        found.sort(key=lambda each: each.get("status") in DEAD)
        for other in found[1:]:
            if other.get("status") not in (*ENDED, *DEAD):
                await self.model.server.post(f"/batches/{_id(other['id'])}/cancel", cast_to=object)
                print(f"note: batch {_id(other['id'])} asks the same and is cancelled", flush=True)
        return _id(found[0]["id"]) if found else None

    async def _get(self, path: str, **query: Any) -> dict[str, Any]:
        answer = await self.model.server.get(path, cast_to=object, options={"params": query})
        if not isinstance(answer, dict):
            raise ValueError(f"an answer that is no object: {words_of(answer)}")
        return answer

    async def _call(self, path: str, ask: Callable[[], Any]) -> Any:
        """Ask with all retries. What then is no answer ends the run."""
        try:
            url = self.model.address + path
            return await self.model.persist(ask, {}, url, self.model.max_retries, timeout=SLOWEST)
        except RequestFailed as error:
            raise UsageError(f"{error}\nNothing is lost: the same command, run again, goes on.") from error
        except ParameterError as error:  # no such route
            if path.startswith(("/batches/", "/files/")):
                raise UsageError(
                    f"{first_line(error.message)}\nThe batch was made with another key, at another server, or is gone. "
                    "To give up its answers, delete the lines of the journal that have its number"
                ) from error
            message = f"{error.message}\nIf the server has no batch endpoint, omit {{batch}}."
            raise ParameterError(message, *error.parameters, "batch") from error

    async def download(self, batch: Batch, state: dict[str, Any]) -> list[Path]:
        """Return the files with the answers and with the errors, as far as there are any."""
        paths, counts = [], state.get("request_counts")
        for name, counted in (("output_file_id", "completed"), ("error_file_id", "failed")):
            if not isinstance(state.get(name), str):
                continue
            path = batch.path.with_name(f"{batch.path.name}.{counted}")
            expected, tries = counts.get(counted) if isinstance(counts, dict) else None, 0

            async def download(name=name, path=path, expected=expected) -> None:
                nonlocal tries
                await self.model.download(_id(state[name]), path)
                tries += 1
                with open(path, "rb") as file:
                    lines = sum(1 for line in file if line.endswith(b"}\n") or line.endswith(b"}"))
                if type(expected) is int and lines < expected and tries < 3:
                    raise ValueError(f"{lines} lines of {expected}")

            await self._call(f"/files/{state[name]}/content", download)
            paths.append(path)
        return paths


def terms(body: dict[str, Any]) -> tuple[str, Sampling]:
    """Return the prompt of a request, and what its answer is to be read with."""
    most = body.get("max_completion_tokens", body.get("max_tokens"))
    prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
    return prompt, Sampling(most, stop=tuple(body.get("stop", ())))


def _id(value: Any) -> str:
    """Return an id of the server's. Raise ValueError if it cannot be part of an address."""
    if not isinstance(value, str) or not ID.fullmatch(value):
        raise ValueError(f"an answer without a usable id: {words_of(value)}")
    return value


def progress_of(batch: Batch, state: dict[str, Any]) -> str:
    """Return how far the server is with a batch."""
    counts = state.get("request_counts")
    done, failed, total = (counts.get(name) if isinstance(counts, dict) else None for name in COUNTED)
    words = f"{batch.name}: {words_of(state.get('status'))}"
    numbers = all(type(number) is int for number in (done, failed, total))
    return f"{words}, {done:,} of {total:,} answered, {failed:,} failed" if numbers and total else words


def errors_of(state: dict[str, Any]) -> str:
    """Return the server's words about a batch that it has refused."""
    found = state.get("errors")
    found = found.get("data") if isinstance(found, dict) else found
    first = found[0] if isinstance(found, list) and found else found
    return words_of(first.get("message") if isinstance(first, dict) and first.get("message") else first)


def words_of(value: Any) -> str:
    """Return what a server says for a message."""
    return shown(str(value.get("message") or value if isinstance(value, dict) else value), 300)
