"""A completion server that has OpenAI's batch endpoints as well, and misbehaves on demand.

    with BatchServer(answer=lambda prompt, body: "a text") as server:
        server.line = lambda request, line, number: {...}   # what is written for a line; None: nothing (it expires)
        server.scripts["POST /batches"] = [DROP, None]      # one entry a request, as in CompletionServer
        server.paid[prompt]                                 # how often a batch has answered the prompt

A batch ends when it has been looked at `looks` times. DONE_THEN_DROP does what is asked, and drops the answer.
"""

import asyncio
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

from support.completion_server import DROP, CompletionServer, Request, completion, reply

DONE_THEN_DROP = "done, then dropped"


class BatchServer(CompletionServer):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.files: dict[str, tuple[str, bytes]] = {}  # name and content
        self.batches: dict[str, dict] = {}
        self.headers: list[dict] = []  # of requests for a batch
        self.scripts: dict[str, list] = defaultdict(list)
        self.calls: list[str] = []
        self.paid: Counter[str] = Counter()
        self.looks = 1
        self.page = 2  # batches of a page of the list
        self.keeps_metadata = True
        self.ends = "completed"  # status of a batch that ends
        self.refuse: Callable[[list[dict]], list[dict] | None] = lambda lines: None  # errors of a validation
        self.line: Callable[[Request, dict, int], dict | None] = self.answered
        self.order: Callable[[list[bytes]], list[bytes]] = lambda lines: lines
        self.on_call: Callable[[str], None] = lambda call: None

    # ---- what a line is answered with ----

    def answered(self, request: Request, line: dict, number: int) -> dict | None:
        return ok(line, completion(request, self.answer(request.prompt, request.body)))

    # ---- HTTP ----

    async def _respond(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        path = urlsplit(request.path).path.removeprefix("/v1")
        if not path.startswith(("/files", "/batches")):
            return await super()._respond(request, writer)
        call = f"{request.method} {re.sub(r'/(batch|file)[_-][^/]+', '/ID', path)}"
        self.calls.append(call)
        self.on_call(call)
        fault = self.scripts[call].pop(0) if self.scripts[call] else None
        if fault is not None and fault != DONE_THEN_DROP:
            return await self._answer(request, fault, writer)
        status, answer = self._do(request, path)
        if fault == DONE_THEN_DROP:
            return await self._answer(request, DROP, writer)
        return await reply(writer, status, answer)

    def _do(self, request: Request, path: str) -> tuple[int, Any]:
        parts = path.strip("/").split("/")
        query = {name: values[0] for name, values in parse_qs(urlsplit(request.path).query).items()}
        match [request.method, *parts]:
            case ["POST", "files"]:
                return 200, self._upload(request)
            case ["GET", "files", file, "content"] if file in self.files:
                return 200, self.files[file][1]
            case ["POST", "batches"]:
                return self._create(request)
            case ["GET", "batches"]:
                newest = list(self.batches.values())[::-1]
                ids = [batch["id"] for batch in newest]
                first = ids.index(query["after"]) + 1 if "after" in query else 0
                some = newest[first : first + min(self.page, int(query.get("limit", 20)))]
                more = first + len(some) < len(newest)
                return 200, {"object": "list", "data": some, "has_more": more}
            case ["GET", "batches", batch] if batch in self.batches:
                return 200, self._look(self.batches[batch])
            case ["POST", "batches", batch, "cancel"] if batch in self.batches:
                self.batches[batch]["status"] = "cancelled"
                return 200, self.batches[batch]
        return 404, {"error": {"message": f"No such thing: {path}"}}

    def _upload(self, request: Request) -> dict:
        boundary = re.search(r'boundary="?([^";]+)', request.headers["content-type"])[1].encode()
        fields = {}
        for part in request.body.split(b"--" + boundary)[1:-1]:
            head, _, content = part.partition(b"\r\n\r\n")
            name = re.search(rb' name="([^"]+)"', head)[1].decode()
            filename = re.search(rb'filename="([^"]+)"', head)
            fields[name] = (filename[1].decode() if filename else None, content.removesuffix(b"\r\n"))
        assert fields["purpose"][1] == b"batch"
        name = f"file-{len(self.files) + 1}"
        self.files[name] = fields["file"]
        return {"id": name, "object": "file", "bytes": len(fields["file"][1]), "filename": fields["file"][0]}

    def _create(self, request: Request) -> tuple[int, dict]:
        body, self.headers = request.body, [*self.headers, request.headers]
        assert body["completion_window"] == "24h" and body["input_file_id"] in self.files
        lines = [json.loads(line) for line in self.files[body["input_file_id"]][1].splitlines()]
        assert len({line["custom_id"] for line in lines}) == len(lines)
        assert {line["url"] for line in lines} == {body["endpoint"]} and {line["method"] for line in lines} == {"POST"}
        name = f"batch_{len(self.batches) + 1}"
        batch = {"id": name, "object": "batch", "endpoint": body["endpoint"], "input_file_id": body["input_file_id"]}
        batch |= {"completion_window": "24h", "created_at": len(self.batches), "status": "in_progress", "errors": None}
        batch |= {"metadata": body.get("metadata") if self.keeps_metadata else None}
        batch |= {"request_counts": {"total": len(lines), "completed": 0, "failed": 0}, "looks": 0}
        self.batches[name] = batch
        return 200, batch

    def _look(self, batch: dict) -> dict:
        batch["looks"] += 1
        if batch["status"] == "in_progress" and batch["looks"] > self.looks:
            lines = [json.loads(line) for line in self.files[batch["input_file_id"]][1].splitlines()]
            if errors := self.refuse(lines):
                batch |= {"status": "failed", "errors": {"object": "list", "data": errors}}
            else:
                self._end(batch, lines)
        return batch

    def _end(self, batch: dict, lines: list[dict]) -> None:
        good, bad = [], []
        for number, line in enumerate(lines):
            said = self.line(Request(line["url"], {}, line["body"], 0.0), line, number)
            if said is None:
                continue
            content = said if isinstance(said, bytes) else json.dumps(said).encode()
            fine = isinstance(said, bytes) or (said.get("response") or {}).get("status_code") == 200
            (good if fine else bad).append(content)
            if fine:
                self.paid[Request(line["url"], {}, line["body"], 0.0).prompt] += 1
        for name, found in (("output_file_id", good), ("error_file_id", bad)):
            if found:
                batch[name] = f"file-{len(self.files) + 1}"
                self.files[batch[name]] = (name, b"\n".join(self.order(found)) + b"\n")
        batch["request_counts"] |= {"completed": len(good), "failed": len(bad)}
        batch["status"] = self.ends


def ok(line: dict, body: Any, status: int = 200, error: Any = None) -> dict:
    """A line of answers."""
    response = {"status_code": status, "request_id": "r", "body": body}
    return {"id": "batch_req_1", "custom_id": line["custom_id"], "response": response, "error": error}


def refused(line: dict, status: int, message: str, code: str | None = None) -> dict:
    return ok(line, {"error": {"message": message, "code": code, "type": None, "param": None}}, status)


def expired(line: dict) -> dict:
    error = {"code": "batch_expired", "message": "This request could not be executed before the window expired."}
    return {"id": "batch_req_1", "custom_id": line["custom_id"], "response": None, "error": error}


def run_batch(
    requests: Any, answers: Any, answer: Callable[[str, dict], Any], fail: Any = lambda number: False
) -> None:
    """What vLLM's run-batch makes of a file of requests."""
    with open(requests) as read, open(answers, "w") as write:
        for number, line in enumerate(map(json.loads, read)):
            request = Request(line["url"], {}, line["body"], 0.0)
            if fail(number):
                error = {"object": "error", "message": "as told", "type": "BadRequestError", "param": None, "code": 400}
                said = ok(line, None, 400, error)
            else:
                said = ok(line, completion(request, answer(request.prompt, request.body)))
            write.write(json.dumps(said) + "\n")
