"""Completions from a server, by base URL: OpenAI, vLLM, llama.cpp, Ollama, `transformers serve`.

    async with Client("gpt-3.5-turbo-instruct") as client:
        print(await client.check())                           # server, key and model, before any work
        completion = await client.complete("1.", Sampling(max_tokens=100))

One prompt a request, since not every server takes lists or n; ask for several at a time with asyncio.gather. What the
run cannot recover from is a UsageError; what went wrong with one request only, after all retries, a RequestFailed.
"""

import asyncio
import base64
import logging
import os
import random
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from alpaca.common.errors import ParameterError, UsageError, hide, masked
from alpaca.completions.api import (
    MOST_CUTS,
    Completion,
    ContextOverflow,
    NoResponse,
    NoServer,
    Prompt,
    RequestFailed,
    Sampling,
    shown,
)
from alpaca.inference.server_errors import (
    LONGEST_WAIT,
    AnswerRefused,
    MaxTokensRefused,
    RetryLater,
    UnknownModel,
    WrongEndpoint,
    classify_error,
    limit_answer,
    never_connected,
    read_completion,
    read_json,
    unknown_model,
)

OPENAI_URL = "https://api.openai.com/v1"
COMPLETION_MODELS = ("-instruct", "davinci", "babbage", "curie", "text-ada")  # OpenAI's names; all others chat
PATHS = {"completions": "/completions", "chat": "/chat/completions"}
LONGEST_BACKOFF = 30.0
OUT_OF_LIMIT = "output limit was reached"  # OpenAI's error where a thought takes all of a short answer
logger = logging.getLogger(__name__)


class Client:
    """A server and a model of it.

    base_url: of the server, mostly ending in /v1; not given, OPENAI_BASE_URL or OpenAI's.
    api: "completions", "chat", or "auto": OpenAI's completion models by name and its others chat; on another server
        chat where it answers a chat request, else (a base model has no chat template) completions.
    max_retries: of one request. backoff: seconds before the first, doubled each time up to 30.
    timeout: seconds for a whole request, from the connection to the last byte of its answer.
    extra_body: fields for every request, such as {"reasoning_effort": "low"}.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api: str = "auto",
        max_retries: int = 8,
        timeout: float = 600.0,
        backoff: float = 0.5,
        *,
        extra_body: Mapping[str, Any] | None = None,
    ):
        if api not in ("auto", *PATHS):
            raise ParameterError(f"{{api}}: expected auto, completions or chat, got {api!r}.", "api")
        self.model = model
        self.api = api
        self.max_retries = max_retries
        self.backoff = backoff
        self.base_url = server_url(base_url)
        self.address = masked(self.base_url.partition("?")[0])  # for messages
        self.timeout = timeout
        self.extra_body = dict(extra_body or {})
        self.token_parameter = "max_tokens"
        self.retries = 0  # of all requests: for the caller's report
        self.server = _connect(self.base_url, timeout)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.close()

    async def check(self) -> str:
        """Ask the server for its models and, if that leaves a question, for a few tokens. Settles `api`.

        Returns: one line that says what will be asked how.
        Raises: UsageError: no server, key not accepted, model unknown, no way to ask it.
        """
        try:
            offered = await self._offered()
            how = "as asked"
            if self.api == "auto" and is_openai(self.base_url):
                self.api = api_by_name(self.model)
                how = "by the model's name"
            if self.api == "auto":
                how = await self._choose_api()
            elif offered is None or self.model not in offered:  # a list may leave out what the server can load
                await self._try(self.api)
        except UnknownModel as error:
            raise unknown_model(self.model, str(error), await self._offered()) from error
        except RequestFailed as error:
            raise UsageError(f"{error}\nThe server could not answer a first, short request.") from error
        return f"model {self.model} at {self.address}, {self.api} endpoint ({how})"

    async def complete(
        self, prompt: Prompt, sampling: Sampling, on_lost_response: Callable[[], bool] | None = None
    ) -> Completion:
        """Return the completion of one prompt: a text, a chat message {"role": …, "content": …} or a list of those.

        on_lost_response: called when an answer did not arrive whole, which may be charged all the same; False gives up.
        Raises: RequestFailed, UsageError (see the module's first lines).
        """
        if self.api == "auto":
            raise RuntimeError("await check() first: it settles which endpoint to ask")
        cuts, switched = 0, False
        while True:
            try:
                return await self._ask(self.api, prompt, sampling, self.max_retries, on_lost_response)
            except MaxTokensRefused:
                if self.api == "completions" or switched:
                    raise
                self.token_parameter, switched = "max_completion_tokens", True
            except UnknownModel as error:
                raise unknown_model(self.model, str(error), await self._offered()) from error
            except ContextOverflow as error:
                cuts += 1
                fewer = int(sampling.max_tokens * 0.8)  # as in 2023
                if cuts > MOST_CUTS or fewer < 1:
                    raise ContextOverflow(
                        f"{error}\nThe prompt alone is too long for the model, or the tokens of an answer are set far "
                        "above its context."
                    ) from error
                logger.warning("over the model's context: max_tokens %d -> %d", sampling.max_tokens, fewer)
                sampling = replace(sampling, max_tokens=fewer)

    async def _choose_api(self) -> str:
        try:
            await self._try("chat")
            self.api = "chat"
            return "the server answers chat requests"
        except (RequestFailed, WrongEndpoint) as error:
            no_chat = error
        try:
            await self._try("completions")
        except (RequestFailed, WrongEndpoint) as error:
            problems = "\n".join(getattr(problem, "message", str(problem)) for problem in (no_chat, error))
            message = f"{problems}\nNeither the chat nor the completion endpoint answers."
            raise ParameterError(message, "api", "base_url") from error
        self.api = "completions"
        return "no answer to a chat request"

    async def _try(self, api: str) -> None:
        """Ask for a few tokens, with nothing but that limit and the user's extra fields: no parameter that nobody
        chose."""
        sampling = Sampling(max_tokens=16, temperature=None, top_p=None)
        for again in (False, True):
            try:
                await self._ask(api, "Hi", sampling, retries=1)
                return
            except MaxTokensRefused:
                if again:
                    raise
                self.token_parameter = "max_completion_tokens"
            except RequestFailed as error:
                if OUT_OF_LIMIT not in str(error):
                    raise
                return

    async def _offered(self) -> list[str] | None:
        """Return the names of the server's models, or None if it does not tell."""
        import httpx2

        async def ask() -> Any:
            return read_json((await self.server.get("/models", cast_to=httpx2.Response)).content)

        try:
            answer = await self.persist(ask, {}, f"{self.address}/models", retries=2)
        except NoResponse as error:
            raise NoServer(
                f"{error}\nIs the server running? Its address is {{base_url}}, else OPENAI_BASE_URL, else "
                f"{OPENAI_URL}.",
                "base_url",
            ) from error
        except (RequestFailed, WrongEndpoint, UnknownModel):  # `transformers serve` without a hub cache answers 500
            return None
        models = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(models, list) or not models:
            return None
        return [shown(str(model.get("id")), 100) for model in models if isinstance(model, dict)]

    async def _ask(
        self,
        api: str,
        prompt: Prompt,
        sampling: Sampling,
        retries: int,
        on_lost_response: Callable[[], bool] | None = None,
    ) -> Completion:
        import httpx2

        body = self.body_of(api, prompt, sampling)

        async def ask() -> Completion:
            answer = await self.server.post(PATHS[api], body=body, cast_to=httpx2.Response)
            return read_completion(read_json(answer.content), sampling, prompt)

        return await self.persist(ask, body, self.address + PATHS[api], retries, on_lost_response)

    def body_of(self, api: str, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        """Return what is sent."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if api == "completions" and not isinstance(prompt, str):
            raise ParameterError(
                "the prompt is a chat message, which the completion endpoint does not take: {api} chat", "api"
            )
        body: dict[str, Any] = {"model": self.model}
        body |= {"prompt": prompt} if api == "completions" else {"messages": list(_listed(messages))}
        body[self.token_parameter if api == "chat" else "max_tokens"] = sampling.max_tokens
        # vLLM and others would else take these two from the model's generation_config
        body |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
        body["stop"] = list(sampling.stop) or None
        if sampling.logit_bias:
            body["logit_bias"] = {str(token): float(bias) for token, bias in sampling.logit_bias.items()}
        body = {name: value for name, value in body.items() if value is not None}
        if twice := body.keys() & self.extra_body.keys():
            raise ParameterError(f"{{extra_body}}: {min(twice)!r} is set by the command itself; omit it", "extra_body")
        return body | dict(sampling.extra) | self.extra_body

    async def persist(
        self,
        ask: Callable[[], Awaitable[Any]],
        body: Mapping,
        url: str,
        retries: int,
        on_lost_response: Callable[[], bool] | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Call `ask` until it answers, `retries` times more at most. Not with openai's own retries: those know nothing
        of answers that are cut off or empty, and the count is to be one."""
        import openai

        for retry in range(retries + 1):
            try:
                return await asyncio.wait_for(ask(), timeout or self.timeout)
            except asyncio.TimeoutError:
                late = f"no whole answer from {url} in {timeout or self.timeout:g} s"
                problem, charged = RetryLater(late, failure=NoResponse), True
            except RetryLater as error:
                problem, charged = RetryLater(f"{url}: {error}", error.wait), True
            except AnswerRefused as error:
                if on_lost_response is not None:
                    on_lost_response()
                raise RequestFailed(f"{url}: {error}") from None
            except (RequestFailed, UsageError):
                raise
            except openai.APIError as error:
                problem = classify_error(error, url, self.model, body)
                if not isinstance(problem, RetryLater):
                    raise problem from None  # the cause has the server's words unmasked
                charged = problem.failure is NoResponse and not never_connected(error)
            except Exception as error:  # of the HTTP library, whose kinds are many
                problem, charged = RetryLater(f"no answer from {url}: {shown(repr(error))}", failure=NoResponse), True
            if self.server.is_closed():  # the run ends; in Python 3.11 wait_for may swallow that this was cancelled
                raise asyncio.CancelledError
            if charged and on_lost_response is not None and not on_lost_response():
                raise RequestFailed(f"{problem}\nGave up: another attempt could exceed the limit of cost.")
            if retry == retries or (problem.wait or 0) > LONGEST_WAIT:
                why = f"Gave up after {retry + 1} attempts." if retries else ""
                why = f"it asks to wait {problem.wait:.0f} s" if (problem.wait or 0) > LONGEST_WAIT else why
                message = f"{problem}\n{why}".rstrip()
                raise problem.failure(message, problem.wait)
            self.retries += 1
            pause = min(self.backoff * 2**retry, LONGEST_BACKOFF) * random.uniform(0.5, 1.0)
            pause = pause if problem.wait is None else problem.wait + random.uniform(0, self.backoff)  # not all at once
            logger.info("%s; again in %.1f s", problem, pause)
            await asyncio.sleep(pause)


def server_url(base_url: str | None) -> str:
    """Return the base URL as given, else OPENAI_BASE_URL, else OpenAI's; without a slash at its end."""
    name = "{base_url}" if base_url else "OPENAI_BASE_URL"
    url = (base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL).strip()
    url, mark, query = url.partition("?")
    url = url.rstrip("/") + mark + query
    if (problem := _why_no_address(url)) is not None:
        got = masked(url)
        message = f"{name}: expected an address such as http://localhost:8000/v1, got {got!r}{problem}."
        raise ParameterError(message, "base_url")
    return url


def _why_no_address(url: str) -> str | None:
    """Return what to add to "got …" for an address that cannot be asked, else None."""
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname or ""
        host.encode("idna")
    except ValueError as error:  # of a port, of brackets, of a host name; UnicodeError too
        return "" if "://" not in url else f" ({shown(str(error))})"
    if any(letter.isspace() or not letter.isprintable() for letter in url):
        return " (it holds a blank or a control character)"
    if parts.fragment:
        return " (omit what follows '#')"
    return "" if parts.scheme not in ("http", "https") or not host or port == 0 else None


def api_by_name(model: str) -> str:
    return "completions" if any(part in model for part in COMPLETION_MODELS) else "chat"


def is_openai(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host == "api.openai.com" or host.endswith(".api.openai.com")


def _header_value(name: str) -> str | None:
    """Return the value of an environment variable that goes into a header, without blanks around it. Raise UsageError
    if it is none that a header can hold; the message does not show it."""
    value = os.environ.get(name, "").strip()
    at = next((at for at, letter in enumerate(value) if not " " <= letter <= "~"), None)
    if at is not None:
        raise UsageError(
            f"{name}: character {at + 1} of {len(value)} cannot be sent in a header; expected printable ASCII. Copy "
            "the value again (it is not shown here)"
        )
    return value or None


def _hide_secrets(key: str, base_url: str) -> None:
    parts = urlsplit(base_url)
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    login = f"{unquote(user)}:{unquote(password)}"
    if user:
        hide(password, unquote(password), base64.b64encode(login.encode()).decode())
    secret = [
        value for name, value in _query(base_url).items() if re.search(r"(?i)key|token|sig|secret|pass|code", name)
    ]
    hide(key, *(value for values in secret for value in values))


def _query(url: str) -> dict[str, list[str]]:
    return parse_qs(urlsplit(url).query, keep_blank_values=True)


def _connect(base_url: str, timeout: float) -> Any:
    key = _header_value("OPENAI_API_KEY") or ("" if is_openai(base_url) else "none")
    if not key:
        raise ParameterError(
            "OPENAI_API_KEY is not set, and OpenAI answers nobody without a key. Set it, or give {base_url} "
            "(OPENAI_BASE_URL) for another server.",
            "base_url",
        )
    organization = _header_value("OPENAI_ORG") or _header_value("OPENAI_ORG_ID")  # the first is 2023's name
    project, _ = _header_value("OPENAI_PROJECT_ID"), _header_value("OPENAI_CUSTOM_HEADERS")
    _hide_secrets(key, base_url)
    try:
        import openai
    except ImportError as error:
        raise UsageError(f"asking a server needs the openai package: pip install openai ({error})") from error
    query = {name: values if len(values) > 1 else values[0] for name, values in _query(base_url).items()}
    azure = "api-version" in query  # its keys go into a header of their own, which a redirection may not carry away
    headers = {"Accept-Encoding": "identity"} | ({"api-key": key} if azure else {})
    hooks = {"response": [limit_answer]}
    try:
        return openai.AsyncOpenAI(
            api_key=key,
            base_url=base_url.partition("?")[0],
            organization=organization,
            project=project,
            default_query=query,
            default_headers=headers,
            max_retries=0,
            timeout=openai.Timeout(timeout, connect=min(timeout, 10.0)),
            http_client=openai.DefaultAsyncHttpxClient(event_hooks=hooks, follow_redirects=not azure),
        )
    except Exception as error:  # an address, or a proxy of the environment, that the HTTP library does not take
        raise ParameterError(
            f"{{base_url}}: {masked(base_url)} cannot be asked ({shown(repr(error))})", "base_url"
        ) from None


def _listed(messages: Mapping | Sequence[Mapping]) -> Sequence[Mapping]:
    return [messages] if isinstance(messages, Mapping) else messages
