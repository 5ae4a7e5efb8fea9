"""Many requests in a file, answered within a day: OpenAI's batch endpoint at half the price, or a folder of files for
vLLM's `run-batch`.

A file of requests is written beside the journal, then a line of the journal says so, then it is sent; each further step
is a line of the journal as well. A run that was killed finds its batch again by the token in the batch's metadata, by
the file or by its id, so that nothing is asked twice. Requests without an answer go into the next file.
"""

import asyncio
import hashlib
import json
import shlex
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from alpaca.common.errors import InputError, ParameterError, UsageError
from alpaca.common.files import atomic_write, parse_json, sha256_of_file, sync_folder
from alpaca.completions.api import ContextOverflow, Model, Request, RequestFailed, Sampling
from alpaca.completions.batch_endpoint import (
    ENDED,
    Batch,
    BatchEndpoint,
    Line,
    Question,
    errors_of,
    progress_of,
    terms,
    words_of,
)
from alpaca.completions.budget import Budget
from alpaca.completions.journal import CLOSED, Journal
from alpaca.completions.runner import HEARTBEAT, Entry, RequestRunner, entry_of, entry_of_failure

ROUNDS = 3  # in which a request is asked
FIRST_POLL, LONGEST_POLL = 2.0, 60.0  # seconds between two looks at the batches
NEXT = -1  # key of what the next file sets aside; file n has -1 - n


def runner_for(
    model: Model, journal: Journal, budget: Budget, concurrency: int, known: dict[int, int] | None = None, **more: Any
) -> RequestRunner:
    """Return what asks the model: in batches, where it is set to. The journal has been read.

    Raises:
        ParameterError: another run has left batches that this one cannot collect, and would pay for again.
    """
    kind = getattr(model, "batched_by", None)
    for number, batch in journal.batches.items():
        if batch["state"] not in CLOSED and "file" not in batch:
            raise UsageError(
                f"{journal.path}: is damaged (batch {number} without its first line); put the line back, or delete the "
                "others of this batch to give up its answers"
            )
        if batch["state"] not in CLOSED and batch["by"] != kind:
            raise ParameterError(
                f"{journal.path}: batch {number} is under way, and what it answers would be asked for twice. Run again "
                f"with {{{batch['by']}}}, which collects it",
                "batch",
                "batch_dir",
            )
    make = BatchRunner if kind else RequestRunner
    return make(model, journal, budget, concurrency, known if known is not None else {}, **more)


class BatchRunner(RequestRunner):
    """As RequestRunner, by files: requests are taken as long as they are wanted and paid for, then all are waited for,
    and so on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.endpoint = BatchEndpoint(self.model)
        self.folder = Path(self.model.batch_dir) if self.model.batch_dir else None
        self.open: dict[int, Batch] = {}
        self.under_way: set[int] = set()  # keys of the requests in them
        self.again: list[Question] = []

    async def __aenter__(self) -> "BatchRunner":
        if self.folder is None:
            await super().__aenter__()
        else:
            print(f"asking {self.model.model} by files in {self.folder}, {self.model.api} endpoint", flush=True)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        await super().__aexit__(kind, *exception)
        if kind is not None and (sent := [batch.name for batch in self.open.values() if batch.id]):
            print(f"note: under way: {', '.join(sent)}; the same command, run again, collects the answers", flush=True)

    async def _answered_now(
        self, requests: Iterator[Request], sampling: Sampling, more: Callable[[int], bool], about: dict[str, Any]
    ) -> AsyncIterator[list[Entry]]:
        self._resume()
        while self.stop_with is None and (self._take(requests, sampling, more, about) or self.open):
            while ready := self._ready():
                yield ready
            async for batch, files in self._ended():
                self._collect(batch, files)
                while ready := self._ready():
                    yield ready

    # ---- files of requests ----

    def _take(
        self, requests: Iterator[Request], sampling: Sampling, more: Callable[[int], bool], about: dict[str, Any]
    ) -> bool:
        """Write the files of a round: what is asked again, then new requests. Return whether there was anything, be it
        only an answer of an earlier run."""
        again, self.again = sorted(self.again, key=lambda one: json.dumps(one.about, sort_keys=True)), []
        taken, batch = len(self.waiting), None
        self.stopped_by_cost = False
        for one in chain(again, self._wanted(requests, sampling, more, about)):
            if batch is None or not batch.add(one):
                self._write(batch)
                batch = Batch(self._next_number(), Path(), one.about, one.url)
                batch.add(one)
        self._write(batch)
        self.budget.reserved.pop(NEXT, None)
        self.stopped_by_cost &= not self.open  # those may turn out cheaper than what is set aside
        return bool(again) or len(self.waiting) > taken

    def _wanted(
        self, requests: Iterator[Request], sampling: Sampling, more: Callable[[int], bool], about: dict[str, Any]
    ) -> Iterator[Question]:
        while more(len(self.waiting)) and self._hold(requests):
            request, one = self.held, None
            if request.key not in self.known and request.key not in self.under_way:
                most = self.budget.max_cost_of(request.prompt, sampling.max_tokens)
                if not self.budget.allows(most):
                    self.stopped_by_cost = True
                    return
                self._set_aside(NEXT, most)
                own = sampling if request.seed is None else replace(sampling, seed=request.seed)
                one = Question(about, Line(request.key, 1, most), *self.model.request_of(request.prompt, own))
            self.waiting.append(request.key)
            self.held = None
            if one is not None:
                yield one

    def _set_aside(self, number: int, dollars: float) -> None:
        self.budget.reserved[number] = self.budget.reserved.get(number, 0.0) + dollars

    def _next_number(self) -> int:
        number = max(self.journal.batches, default=0) + 1
        while self.folder is not None and not self._reserve(number):
            number += 1  # of another command, which may run at the same time
        return number

    def _reserve(self, number: int) -> bool:
        """Make the file of requests, unless there is one, or one of answers. Return whether it was made."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._answers_of(number).exists():
                return False
            self._path(number).touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written ({error.strerror})", self.folder) from error
        return True

    def _path(self, number: int) -> Path:
        if self.folder is not None:
            return self.folder / f"requests-{number:04}.jsonl"
        return self.journal.path.with_name(f"{self.journal.path.name}.batch-{number:04}")

    def _answers_of(self, number: int) -> Path:
        return self.folder / f"answers-{number:04}.jsonl"

    def _write(self, batch: Batch | None) -> None:
        """Write the file, then its line of the journal: from here on a rerun knows it."""
        if batch is None:
            return
        batch.path = self._path(batch.number)
        try:
            with atomic_write(batch.path, "wb") as file:
                file.writelines(batch.content)
            sync_folder(batch.path.parent, files=False)
        except OSError as error:
            raise InputError(f"{batch.path}: cannot be written ({error.strerror})", batch.path) from error
        digest, batch.content = hashlib.sha256(b"".join(batch.content)).hexdigest(), []
        most, keys = sum(line.most for line in batch.lines.values()), [line.key for line in batch.lines.values()]
        noted = {"by": self.model.batched_by, "file": batch.path.name, "sha256": digest}
        noted |= {"about": batch.about, "requests": len(keys), "first": min(keys), "last": max(keys), "most": most}
        self._note(batch, "written", **noted, time=batch.began)
        self._set_aside(NEXT, -most)
        self._set_aside(NEXT - batch.number, most)
        self.asked += len(keys)
        self.open[batch.number] = batch
        self.under_way.update(keys)

    def _note(self, batch: Batch, state: str, **more: Any) -> None:
        self.journal.append({"kind": "batch", "number": batch.number, "token": batch.token, "state": state, **more})

    def _resume(self) -> None:
        """Take over what an earlier run has left open; what it costs at most is set aside."""
        for number, noted in sorted(self.journal.batches.items()):
            if noted["state"] in CLOSED:
                continue
            path = (self.folder or self.journal.path.parent) / noted["file"]
            if not path.is_file() or sha256_of_file(path) != noted["sha256"]:
                raise InputError(
                    f"{path}: is missing, or was changed, and the answers of batch {number} are read with it. Put it "
                    f"back; or, to give them up, delete the lines of {self.journal.path} that have "
                    f'"kind": "batch", "number": {number}',
                    path,
                )
            batch = Batch(number, path, noted["about"], "", noted["token"], began=noted["time"])
            batch.file_id, batch.id, done = noted.get("file_id"), noted.get("id"), noted.get("done", {})
            batch.lost = {key for key, kind in done.items() if kind == "lost"}
            with open(path, "rb") as file:
                for content in file:
                    sent = json.loads(content)
                    batch.url, (_, round, key) = sent["url"], sent["custom_id"].split("-")
                    if done.get(int(key), "lost") == "lost":
                        prompt, sampling = terms(sent["body"])
                        most = self.budget.max_cost_of(prompt, sampling.max_tokens)
                        batch.lines[sent["custom_id"]] = Line(int(key), int(round), most, batch.size)
                    batch.size += len(content)
            self._set_aside(NEXT - number, sum(line.most for line in batch.lines.values()))
            self.open[number] = batch
            self.under_way.update(line.key for line in batch.lines.values())
            print(f"continuing: {batch.name} of an earlier run, {len(batch.lines):,} requests", flush=True)

    # ---- the way to the server ----

    async def _ended(self) -> AsyncIterator[tuple[Batch, list[Path]]]:
        """Send what is not sent, and yield the batches as they end, each with the files of its answers."""
        if self.folder is not None:
            for batch in list(self.open.values()):
                if (path := self._answers_of(batch.number)).is_file():
                    yield batch, [path]
            if self.open:
                raise self._to_be_run()
            return
        for batch in list(self.open.values()):
            await self.endpoint.submit(batch, self._note)
        pause, heard = FIRST_POLL, time.monotonic()
        while self.open:
            for batch in list(self.open.values()):
                state = await self.endpoint.look(batch)
                if (said := progress_of(batch, state)) != batch.said:
                    print(said, flush=True)
                    batch.said, heard = said, time.monotonic()
                if state.get("status") == "failed":
                    self._close(batch, "failed")
                    raise UsageError(f"{batch.name} was refused as a whole: {errors_of(state)}")
                if state.get("status") in ENDED:
                    files = await self.endpoint.download(batch, state)
                    yield batch, files
                    heard = time.monotonic()
                    if state["status"] == "cancelled":  # by somebody who wants to spend no more
                        again = "run again to ask for what it has not answered"
                        self.stop_with = self.stop_with or UsageError(f"{batch.name} was cancelled; {again}")
                        return
            until = time.monotonic() + pause
            while self.open and (left := until - time.monotonic()) > 0:
                await asyncio.sleep(min(left, HEARTBEAT))
                if self.on_wait is not None:
                    self.on_wait(len(self.under_way), time.monotonic() - heard, self.model.retries)
            pause = min(pause * 1.5, LONGEST_POLL)

    def _to_be_run(self) -> UsageError:
        """Return what says how to answer the files."""
        lines = [f"{sum(len(batch.lines) for batch in self.open.values()):,} requests wait for answers. Run"]
        for batch in self.open.values():
            output = self._answers_of(batch.number)
            files = f"-i {shlex.quote(str(batch.path))} -o {shlex.quote(str(output))}"
            lines.append(f"    vllm run-batch {files} --model {shlex.quote(self.model.model)}")
        return UsageError("\n".join([*lines, "and then this command again, which reads the answers and goes on."]))

    # ---- answers ----

    def _collect(self, batch: Batch, files: list[Path]) -> None:
        """Journal the answers, and put what has none on the list of what is asked again, or give it up."""
        before, problems, ignored = len(batch.lines), {}, 0
        for path in files:
            with open(path, "rb") as file:
                ignored += sum(not self._read(batch, line, problems) for line in file if line.strip())
        missing, failed = 0, []
        answered = before - len(batch.lines)
        for name, line in list(batch.lines.items()):
            missing += name not in problems
            problem = problems.get(name) or RequestFailed(f"{batch.name} ended without an answer to this request")
            if isinstance(problem, UsageError):
                self.stop_with = self.stop_with or problem
            elif isinstance(problem, ContextOverflow) or line.round >= ROUNDS or not self.budget.allows(0.0):
                failed.append(entry_of_failure(problem))
                self._keep(batch, name, failed[-1])
            else:
                sent = batch.sent(line)
                again = Line(line.key, line.round + 1, line.most)
                self.again.append(Question(batch.about, again, sent["url"], self.model.renamed(sent["body"])))
                self._set_aside(NEXT, line.most)
        told = [f"{n:,} {what}" for n, what in ((answered, "answered"), (missing, "missing")) if n]
        told += [f"{len(problems):,} refused"] * bool(problems)
        told += [f"{ignored:,} lines ignored that are no answer to a request of it"] * bool(ignored)
        print(f"{batch.name}: {', '.join(told) or 'nothing answered'}", flush=True)
        if answered:
            self.failed_in_a_row = 0
        else:
            self._count_failures(failed)
        self._close(batch, "collected")

    def _read(self, batch: Batch, content: bytes, problems: dict[str, Exception]) -> bool:
        """Journal the answer in a line, or note what it says went wrong. Return whether it is of a request of the batch
        that has no answer yet."""
        try:
            said = parse_json(content)
            name, response, error = said["custom_id"], said.get("response"), said.get("error")
            line = batch.lines.get(name)
        except (ValueError, TypeError, KeyError, AttributeError):  # torn, or anything
            return False
        if line is None:
            return False
        body = batch.sent(line)["body"]
        prompt, sampling = terms(body)
        response = response if isinstance(response, dict) else {}
        status, answer = response.get("status_code"), response.get("body")
        if status == 200 and not error:
            try:
                entry = entry_of(self.model.read_line(answer, sampling, prompt), batch.about, batch.began, line.most)
            except RequestFailed as problem:
                self._lose(batch, line)
                problems[name] = problem
            else:
                self._keep(batch, name, entry)
                problems.pop(name, None)
        elif type(status) is int and status >= 400:
            problems.setdefault(name, self.model.refusal(status, answer or error, body))
        else:
            problems.setdefault(name, RequestFailed(f"{batch.name} answered: {words_of(error or answer)}"))
        return True

    def _lose(self, batch: Batch, line: Line) -> None:
        """Count an answer that cannot be read, and may be charged: once, however often it is downloaded."""
        if line.most and line.key not in batch.lost:
            batch.lost.add(line.key)
            self.journal.append({"kind": "lost", "index": line.key, "most": line.most, "batch": batch.number})
            self.lost_cost[line.key] = self.lost_cost.get(line.key, 0.0) + line.most
            self.budget.unanswered += line.most

    def _keep(self, batch: Batch, name: str, entry: Entry) -> None:
        """Journal what became of a request, and have it handed out."""
        line, rate = batch.lines[name], {"rate": self.budget.rate} if self.budget.rate != 1.0 else {}
        lost = self.lost_cost.get(line.key, 0.0)
        entry = {"index": line.key, **entry, **rate, "batch": batch.number}
        entry["unanswered"] = entry.get("unanswered", 0.0) + lost
        place = self.journal.append(entry)
        self.lost_cost.pop(line.key, None)
        self.budget.unanswered -= lost
        self.budget.count(entry)
        self._set_aside(NEXT - batch.number, -line.most)
        del batch.lines[name]
        self.under_way.discard(line.key)
        self.known[line.key] = place

    def _close(self, batch: Batch, state: str) -> None:
        self._note(batch, state)
        del self.open[batch.number]
        self.budget.reserved.pop(NEXT - batch.number, None)
        self.under_way.difference_update(line.key for line in batch.lines.values())
        if self.folder is None:
            for ending in ("", ".completed", ".failed"):
                batch.path.with_name(batch.path.name + ending).unlink(missing_ok=True)
