"""What a completion server sends back: what its answer holds, within limits, and what its refusal means: ask again, ask
for less, give this request up, or stop the run.

Servers agree on little. OpenAI says what is wrong in error.code, llama.cpp in error.type, vLLM and Ollama in words
only, so each kind is recognised by its code where there is one and by the words that the servers use.
"""

import email.utils
import math
import re
import time
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from alpaca.common.errors import InputError, ParameterError, UsageError, format_bytes, masked
from alpaca.common.files import parse_json
from alpaca.completions.api import (
    NO_REASON,
    Completion,
    ContextOverflow,
    NoResponse,
    NotNow,
    Prompt,
    RequestFailed,
    Sampling,
    cut_at_stop,
    shown,
    split_reasoning,
    whole_characters,
)
from alpaca.completions.budget import ENVELOPE

LARGEST_ANSWER = 16 * 2**20  # bytes of a body, unpacked
LARGEST_FILE = 16 * 2**30  # bytes of a batch's answers
LONGEST_WORD = 60  # characters of a finish_reason
LONGEST_WAIT = 120.0  # s; a server that asks for more has no room today: the user should know, not wait
OVERFLOW = re.compile(
    r"maximum (context|model) length|context length is only|available context size|max_tokens must be at least 1, got"
)
UNSUPPORTED = re.compile(r"[Uu]nsupported (?:parameter|value): '(\w+)'")
WRONG_NUMBER = re.compile(r"must be (?:at|less|smaller|lower|below|between|greater|positive|[<>\d])|too large")
downloading: ContextVar[bool] = ContextVar("downloading", default=False)
RETIRED = ("text-davinci-", "code-davinci-", "text-curie-", "text-babbage-", "text-ada-")


class WrongEndpoint(ParameterError):
    """The server has no such route, or this model is not served there."""


class UnknownModel(UsageError):
    """The server does not know the model."""


class MaxTokensRefused(UsageError):
    """The model takes max_completion_tokens in place of max_tokens."""


class AnswerRefused(Exception):
    """The answer is larger than any that was asked for, or packed in a way that nobody asked for. It may be charged,
    and another attempt would bring the same."""


class RetryLater(Exception):
    """The same request may succeed later, `wait` seconds from now where the server says when. `failure`: what to raise
    once there have been enough attempts."""

    def __init__(self, message: str, wait: float | None = None, failure: type[NotNow] = NotNow):
        super().__init__(message)
        self.wait, self.failure = wait, failure


def classify_error(error: Exception, url: str, model: str, sent: Mapping[str, Any]) -> Exception:
    """Return the exception to raise in place of one of openai's; `sent` is the body of the request."""
    status = getattr(error, "status_code", None)
    if status is None:
        return RetryLater(f"no answer from {url}: {_connection_problem(error)}", failure=NoResponse)
    said, code = _said(error), shown(f"{getattr(error, 'code', '')} {getattr(error, 'type', '')}")
    message = f"{url} answered {status}: {said}"
    if "context_length_exceeded" in code or "exceed_context_size" in code or OVERFLOW.search(said):
        return ContextOverflow(message)
    if "insufficient_quota" in code or status == 402:
        return UsageError(f"{message}\nThe account has no credit left. Add some, or set another OPENAI_API_KEY.")
    if status in (401, 403):
        return UsageError(
            f"{message}\nThe server does not accept the key. Set OPENAI_API_KEY to one that may use {model}."
        )
    if problem := _refused_parameter(error, said, sent, message) or _wrong_address(status, code, said, message):
        return problem
    may_retry = error.response.headers.get("x-should-retry") != "false"
    if (status in (408, 409, 429) or status >= 500) and may_retry:
        return RetryLater(message, seconds_to_wait(error.response.headers))
    return RequestFailed(message)


def _refused_parameter(error: Exception, said: str, sent: Mapping[str, Any], message: str) -> Exception | None:
    """Return what to raise where the model does not take a parameter, or its value, whatever the prompt is."""
    if "max_tokens" in sent and "max_completion_tokens" in said and not WRONG_NUMBER.search(said):
        return MaxTokensRefused(message)
    named = UNSUPPORTED.search(said)
    if not named and not str(getattr(error, "code", "")).startswith("unsupported_"):
        return None
    name = named[1] if named else getattr(error, "param", None)
    if name == "max_tokens" and name in sent and "must be" not in said:
        return MaxTokensRefused(message)
    if not isinstance(name, str) or name not in sent:
        return None
    if name in ("temperature", "top_p"):
        refused = f"The model refuses {name} {sent[name]!r}, which is sent unless {{{name}}} says otherwise."
        return ParameterError(f"{message}\n{refused} Give another value, or None to send none.", name)
    return UsageError(f"{message}\nThe model refuses {name} {sent[name]!r}, which this run needs: ask another model.")


def _wrong_address(status: int, code: str, said: str, message: str) -> Exception | None:
    """Return what to raise where the address, the endpoint or the model is not the server's."""
    if re.search(r"chat template|in the v1/(chat/)?completions endpoint|does not support .*Completions API", said):
        return WrongEndpoint(f"{message}\nTry the other of {{api}} completions and {{api}} chat.", "api")
    if "model_not_found" in code or "Server is pinned to" in said or (status == 404 and "model" in said.lower()):
        return UnknownModel(message)
    if status in (404, 405, 501):
        return WrongEndpoint(
            f"{message}\nNo such route: {{base_url}} (OPENAI_BASE_URL) mostly ends in /v1; {{api}} may be wrong.",
            "base_url",
            "api",
        )
    return None


def unknown_model(model: str, message: str, offered: list[str] | None) -> InputError:
    lines = [message]
    if model.startswith(RETIRED):
        lines.append(f"OpenAI retired {model} in January 2024; gpt-3.5-turbo-instruct took its place.")
    if offered:
        more = f" and {len(offered) - 20} more" if len(offered) > 20 else ""
        lines.append(f"The server offers: {', '.join(offered[:20])}{more}.")
    return InputError("\n".join([*lines, f"Give a model that the server has, got {model!r}."]), model)


def seconds_to_wait(headers: Mapping[str, str]) -> float | None:
    """Return how long the server asks to wait: retry-after-ms, or Retry-After in seconds or as a date."""
    for name, divisor in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            wait = float(headers.get(name, "")) / divisor
        except ValueError:
            continue
        return wait if wait > 0 and not math.isnan(wait) else None
    try:
        wait = email.utils.parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return None
    return wait if wait > 0 else None


def _said(error: Exception) -> str:
    """Return the server's own words, out of {"message": …}, {"detail": …} or a bare text."""
    body = getattr(error, "body", None)
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body
    return shown(str(body or error), 500)


def never_connected(error: Exception) -> bool:
    """Return whether the server cannot have seen the request. One that it has sent elsewhere it has seen."""
    try:
        if error.__cause__.request.url != error.request.url:
            return False
    except (AttributeError, RuntimeError):
        pass  # the HTTP library does not know which request it was
    names = {"ConnectError", "ConnectTimeout", "PoolTimeout"}
    while error is not None and type(error).__name__ not in names:
        error = error.__cause__ or error.__context__
    return error is not None


def _connection_problem(error: Exception) -> str:
    """Return the reason. openai says "Connection error."; the operating system's reason is at the end of the chain of
    causes."""
    reason = error
    while (reason.__cause__ or reason.__context__) is not None:
        reason = reason.__cause__ or reason.__context__
    return shown(" ".join(dict.fromkeys(str(text).rstrip(".") for text in (error, reason) if str(text))))


# ---- what an answer holds ----


async def limit_answer(response: Any) -> None:
    """Make reading `response`, of the HTTP library, end at LARGEST_ANSWER bytes, unpacked; a file's at LARGEST_FILE.
    Nothing packed is asked for.

    Raises: AnswerRefused: it is packed in a way that cannot be unpacked bit by bit.
    """
    packed = [word.strip().lower() for word in response.headers.get("content-encoding", "").split(",")]
    packed = [word for word in packed if word not in ("", "identity")]
    if packed and packed not in (["gzip"], ["x-gzip"], ["deflate"]):
        raise AnswerRefused(f"the answer is packed as {shown(', '.join(packed), 60)}, though it was asked for plain")
    if packed:
        del response.headers["content-encoding"]
    import httpx2

    class Limited(httpx2.AsyncByteStream):
        """The body as the HTTP library reads it."""

        def __init__(self, stream: Any):
            self.stream = stream

        def __aiter__(self) -> AsyncIterator[bytes]:
            return _unpacked(self.stream, packed[0] if packed else None)

        async def aclose(self) -> None:
            await self.stream.aclose()

    response.stream = Limited(response.stream)


async def _unpacked(stream: Any, packed: str | None) -> AsyncIterator[bytes]:
    unpacker, total, largest = None, 0, LARGEST_FILE if downloading.get() else LARGEST_ANSWER
    async for part in stream:
        if packed and part:
            if unpacker is None:  # a bare deflate stream has no header
                header = packed == "deflate" and part[0] & 15 == 8
                unpacker = zlib.decompressobj(15 if header else -15 if packed == "deflate" else 31)
            try:
                part = unpacker.decompress(part, largest + 1 - total)
            except zlib.error as error:
                raise RetryLater(f"an answer that cannot be unpacked ({error})") from None
        total += len(part)
        if total > largest:
            raise AnswerRefused(f"the answer is larger than {format_bytes(largest)}, the most that is read")
        yield part


def read_json(content: bytes) -> Any:
    """Return the JSON of an answer. Raise RetryLater if it is none."""
    try:
        return parse_json(content)
    except ValueError as error:
        text = shown(content[:2000].decode(errors="replace"), 100)
        raise RetryLater(f"an answer that is not JSON, or cut off: {text!r} ({shown(str(error), 60)})") from None


def read_completion(answer: Any, sampling: Sampling, prompt: Prompt) -> Completion:
    """Return the one choice of a server's answer, of either endpoint. Nothing in it is taken at its word.

    Raises: RetryLater: there is none.
    """
    try:
        choice = answer["choices"][0]
        message = choice["message"] if "message" in choice else None
        text = choice["text"] if message is None else message["content"]
        thought = "" if message is None else message.get("reasoning_content") or message.get("reasoning") or ""
        text, thought = _plain(text), thought if isinstance(thought, str) else ""
        reason, logprobs, usage = choice.get("finish_reason"), choice.get("logprobs"), answer.get("usage")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        problem = f"an answer without a completion ({type(error).__name__}): {shown(str(answer))}"
        raise RetryLater(problem) from None
    text, said = split_reasoning(masked(whole_characters(text), shapes=False))
    thought = masked(whole_characters(thought), shapes=False).strip()
    reason = _reason(reason)
    if reason != "stop" or text.endswith(sampling.stop):  # `transformers serve` goes on, or leaves the stop string in
        text, stopped = cut_at_stop(text, sampling.stop)
        reason = "stop" if stopped else reason
    usage = usage if isinstance(usage, dict) else {}
    most = sum(len(part.encode(errors="replace")) + ENVELOPE for part in _texts_of(prompt))
    prompt_tokens = _count(usage.get("prompt_tokens"), 1, most)
    written = bool(text or said or thought)
    completion_tokens = _count(usage.get("completion_tokens"), int(written), sampling.max_tokens)
    reasoning = "\n\n".join(filter(None, (thought, said)))
    return Completion(text, reason, prompt_tokens, completion_tokens, logprobs, reasoning)


async def download(server: Any, file_id: str, path: Path) -> None:
    """Write a file of the server's to `path`, as it comes."""
    token = downloading.set(True)
    try:
        async with server.files.with_streaming_response.content(file_id) as response:
            with open(path, "wb") as file:
                async for part in response.iter_bytes():
                    file.write(part)
    finally:
        downloading.reset(token)


def read_line(answer: Any, sampling: Sampling, prompt: Prompt) -> Completion:
    """Return the completion in a line of a batch's answers. Raise RequestFailed if there is none."""
    try:
        return read_completion(answer, sampling, prompt)
    except RetryLater as error:
        raise RequestFailed(str(error)) from None


def refused_line(status: int, said: Any, model: str, sent: Mapping[str, Any]) -> Exception:
    """Return what `classify_error` makes of a request of a batch that was refused."""
    said = said.get("error") or said if isinstance(said, dict) else said
    named = {name: said.get(name) if isinstance(said, dict) else None for name in ("code", "type", "param")}
    error = SimpleNamespace(status_code=status, body=said, response=SimpleNamespace(headers={}), **named)
    return classify_error(error, "the batch", model, sent)


def _plain(content: Any) -> str:
    """Return the text of a content, which may come in parts; None, where a model refused or only thought, has none.
    Raise TypeError for anything else."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise TypeError(f"content is of type {type(content).__name__}")
    texts = [part if isinstance(part, str) else part.get("text") for part in content]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise TypeError("a part of the content is no text")
    return "".join(filter(None, texts))


def _reason(word: Any) -> str:
    """Return a finish_reason as a text; NO_REASON for none, which nothing that a server sends is taken for."""
    if word is None or word == "":
        return NO_REASON
    word = shown(str(word), LONGEST_WORD) if isinstance(word, str) else f"{type(word).__name__} {shown(str(word), 40)}"
    return f"the word {word!r}" if word in ("", NO_REASON) else word


def _texts_of(prompt: Prompt) -> Sequence[str]:
    """Return what a prompt is made of: its text, or those of its messages and their parts."""
    messages = [prompt] if isinstance(prompt, str | Mapping) else prompt
    return [message if isinstance(message, str) else str(message) for message in messages]


def _count(value: Any, least: int, most: int) -> int | None:
    """Return a number of tokens as the server gives it, or None if it is no whole number, or cannot be true."""
    return value if type(value) is int and least <= value <= most else None
