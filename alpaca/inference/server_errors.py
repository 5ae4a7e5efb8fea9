"""What a completion server's refusal means: ask again, ask for less, give this request up, or stop the run.

Servers agree on little. OpenAI says what is wrong in error.code, llama.cpp in error.type, vLLM and Ollama in words
only, so each kind is recognised by its code where there is one and by the words that the servers use.
"""

import email.utils
import math
import re
import time
from collections.abc import Mapping
from typing import Any

from alpaca.common.errors import InputError, ParameterError, UsageError
from alpaca.completions.api import ContextOverflow, RequestFailed

LONGEST_WAIT = 120.0  # s; a server that asks for more has no room today: the user should know, not wait
OVERFLOW = re.compile(
    r"maximum (context|model) length|context length is only|available context size|max_tokens must be at least 1, got"
)
UNSUPPORTED = re.compile(r"[Uu]nsupported (?:parameter|value): '(\w+)'")
RETIRED = ("text-davinci-", "code-davinci-", "text-curie-", "text-babbage-", "text-ada-")


class NoResponse(RequestFailed):
    """No connection to the server, or none that lasted until an answer came."""


class WrongEndpoint(ParameterError):
    """The server has no such route, or this model is not served there."""


class UnknownModel(UsageError):
    """The server does not know the model."""


class MaxTokensRefused(UsageError):
    """The model takes max_completion_tokens in place of max_tokens."""


class RetryLater(Exception):
    """The same request may succeed later, `wait` seconds from now where the server says when. `failure`: what to raise
    once there have been enough attempts."""

    def __init__(self, message: str, wait: float | None = None, failure: type[RequestFailed] = RequestFailed):
        super().__init__(message)
        self.wait, self.failure = wait, failure


def classify_error(error: Exception, url: str, model: str, sent: Mapping[str, Any]) -> Exception:
    """Return the exception to raise in place of one of openai's; `sent` is the body of the request."""
    status = getattr(error, "status_code", None)
    if status is None:
        return RetryLater(f"no answer from {url}: {_connection_problem(error)}", failure=NoResponse)
    said, code = _said(error), f"{getattr(error, 'code', '')} {getattr(error, 'type', '')}"
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
    named = UNSUPPORTED.search(said)
    if not named and not str(getattr(error, "code", "")).startswith("unsupported_"):
        return None
    name = named[1] if named else getattr(error, "param", None)
    if name == "max_tokens" and name in sent and "must be" not in said:
        return MaxTokensRefused(message)
    if name not in sent:
        return None
    return ParameterError(
        f"{message}\nThe model refuses {{{name}}} {sent[name]!r}. Give another value, None to send none, or another "
        "model.",
        name,
    )


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
    return " ".join(str(body or error).split())[:500]


def never_connected(error: Exception) -> bool:
    """Return whether the server cannot have seen the request."""
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
    return " ".join(dict.fromkeys(str(text).rstrip(".") for text in (error, reason) if str(text)))
