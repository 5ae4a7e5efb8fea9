"""Helpers under their 2023 names. Importing this file loads neither torch nor openai.

rows = utils.jload("alpaca_data.json")
utils.jdump(rows, "out.json")
choice = utils.openai_completion("1.", utils.OpenAIDecodingArguments(max_tokens=100), "gpt-3.5-turbo-instruct")
"""

import asyncio
import dataclasses
import io
import json
import logging
import sys
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from alpaca.common.errors import UsageError
from alpaca.common.files import atomic_write
from alpaca.completions.api import Completion, Prompt, Sampling

StrOrOpenAIObject = str | Mapping[str, Any]
NOTHING = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "suffix": None, "logprobs": None, "echo": False}
SAMPLING = ("max_tokens", "temperature", "top_p", "stop", "seed", "logit_bias")
_settled: dict[tuple, tuple] = {}  # (base URL, model, api) -> what check() found out, for the next call


@dataclasses.dataclass
class OpenAIDecodingArguments:
    max_tokens: int = 1800
    temperature: float = 0.2
    top_p: float = 1.0
    n: int = 1
    stream: bool = False
    stop: Sequence[str] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    suffix: str | None = None
    logprobs: int | None = None
    echo: bool = False


def openai_completion(
    prompts: str | Sequence[str] | Mapping[str, str] | Sequence[Mapping[str, str]],
    decoding_args: OpenAIDecodingArguments,
    model_name: str = "text-davinci-003",
    sleep_time: float = 2,
    batch_size: int = 1,
    max_instances: int = sys.maxsize,
    max_batches: int = sys.maxsize,
    return_text: bool = False,
    **decoding_kwargs: Any,
) -> StrOrOpenAIObject | Sequence[StrOrOpenAIObject] | Sequence[Sequence[StrOrOpenAIObject]]:
    """Complete one prompt or many with OpenAI's API, or that of the server at OPENAI_BASE_URL.

    Args:
        prompts: a text or a chat message {"role": …, "content": …}, or a list of those.
        sleep_time: seconds before a request is first tried again; doubled each time up to 30.
        batch_size: how many prompts are asked for at a time.
        max_instances: only the first so many prompts are used; max_batches is the older way to say so.
        return_text: texts, in place of choices with text, finish_reason, index and total_tokens as keys and attributes.
        decoding_kwargs: other fields of the request, e.g. logit_bias={"50256": -100}.

    Returns:
        One choice for one prompt, a list for a list; with decoding_args.n > 1 a list of n in place of each choice.

    Raises:
        alpaca.common.errors.UsageError: no server, no key, unknown model …
        alpaca.completions.api.RequestFailed: a prompt got no answer in nine attempts. (2023 went on for ever.)
    """

    if max_batches < sys.maxsize:
        logging.warning("max_batches: max_instances is set to max_batches * batch_size; give max_instances itself")
        max_instances = max_batches * batch_size
    single = isinstance(prompts, (str, Mapping))
    prompts = [prompts] if single else list(prompts)[:max_instances]
    fields = {**vars(OpenAIDecodingArguments()), **vars(decoding_args)}  # of 2023's class too
    found = complete_all(prompts, fields, decoding_kwargs, model_name, sleep_time, batch_size)
    if return_text:
        found = [[choice.text for choice in choices] for choices in found]
    if decoding_args.n == 1:
        found = [choices[0] for choices in found]
    return found[0] if single else found


def jload(f: str | Path | IO[str], mode: str = "r") -> Any:
    """Read JSON (UTF-8) from a path or an open text file, which is then closed, as in 2023.

    Raises:
        alpaca.common.errors.MalformedJSON: a json.JSONDecodeError; the message names the file, line and column.
    """
    with _open(f, mode) as file:
        try:
            return json.load(file)
        except json.JSONDecodeError as error:
            from alpaca.common.errors import MalformedJSON

            name = getattr(file, "name", "JSON")
            raise MalformedJSON(f"{name}: malformed JSON: {error.msg}", error.doc, error.pos) from error


def jdump(obj: Any, f: str | Path | IO[str], mode: str = "w", indent: int | None = 4, default=str) -> None:
    """Write dicts and lists as JSON, a str as it is, to a path or an open text file, which is then closed.

    A path is written to a temporary file beside it and renamed last: a reader, or a run that is killed, finds either
    the old file or the whole new one. Missing parent folders are made.

    Raises:
        ValueError: `obj` is none of dict, list and str.
    """
    if isinstance(obj, (dict, list)):
        text = json.dumps(obj, indent=indent, default=default)
    elif isinstance(obj, str):
        text = obj
    else:
        raise ValueError(f"jdump writes dict, list or str, got {type(obj).__name__}")
    if isinstance(f, io.IOBase) or mode != "w":  # an appending or exclusive mode cannot go through a rename
        with _open(f, mode) as file:
            file.write(text)
        return
    with atomic_write(f) as file:
        file.write(text)


def _open(f: str | Path | IO[str], mode: str) -> IO[str]:
    if isinstance(f, io.IOBase):
        return f
    if any(letter in mode for letter in "wax"):
        Path(f).parent.mkdir(parents=True, exist_ok=True)
    return open(f, mode, encoding=None if "b" in mode else "utf-8")


_make_w_io_base = _make_r_io_base = _open  # 2023's names, for code that imports them


class Choice(dict):
    """A dict whose keys are attributes too, as openai 0.x gave: choice["text"], choice.text."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def complete_all(
    prompts: Sequence[Prompt],
    fields: Mapping[str, Any],
    other_fields: Mapping[str, Any],
    model: str,
    backoff: float,
    batch_size: int,
) -> list[list[Choice]]:
    """Return n choices for each prompt. As in 2023, `index` counts within a batch of `batch_size` prompts, and
    `total_tokens` is the sum of the batch."""
    n = fields["n"]
    sampling = to_sampling({**fields, **other_fields})
    completions = _run(_complete_all(prompts, sampling, n, model, backoff, batch_size))
    size = batch_size * n
    totals = [total_tokens(completions[i : i + size], n) for i in range(0, len(completions), size)]
    choices = [choice_of(completion, i % size, totals[i // size]) for i, completion in enumerate(completions)]
    return [choices[i : i + n] for i in range(0, len(choices), n)]


def to_sampling(fields: Mapping[str, Any]) -> Sampling:
    """Return a Sampling of 2023's fields. What has no effect at its default is not sent: not every server knows it."""
    if fields["stream"]:
        raise UsageError("OpenAIDecodingArguments.stream: expected False, got True. Streaming is not supported.")
    known = {name: fields[name] for name in SAMPLING if name in fields}
    stop = known["stop"] or ()
    known["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    extra = {name: value for name, value in fields.items() if name not in (*SAMPLING, "n", "stream")}
    extra = {name: value for name, value in extra.items() if name not in NOTHING or value != NOTHING[name]}
    return Sampling(**known, extra=extra)


def total_tokens(completions: Sequence[Completion], n: int) -> int | None:
    """Return the tokens of a batch, n completions a prompt, as one request counts them: each prompt once. None: the
    server does not say."""
    counts = [one.completion_tokens for one in completions] + [one.prompt_tokens for one in completions[::n]]
    return None if None in counts else sum(counts)


def choice_of(completion: Completion, index: int, total_tokens: int | None) -> Choice:
    return Choice(
        text=completion.text,
        index=index,
        logprobs=completion.logprobs,
        finish_reason=completion.finish_reason,
        total_tokens=total_tokens,
    )


async def _complete_all(
    prompts: Sequence[Prompt], sampling: Sampling, n: int, model: str, backoff: float, batch_size: int
) -> list[Completion]:
    room = asyncio.Semaphore(batch_size * n)
    chat = any(not isinstance(prompt, str) for prompt in prompts)
    from alpaca.inference.client import Client

    async with Client(model, api="chat" if chat else "auto", backoff=backoff) as client:
        asked = (client.base_url, model, client.api)
        if asked in _settled:
            client.api, client.token_parameter = _settled[asked]
        else:
            await client.check()

        async def one(prompt: Prompt, sampling: Sampling) -> Completion:
            async with room:
                return await client.complete(prompt, sampling)

        tasks = [asyncio.create_task(one(prompt, each)) for prompt in prompts for each in copies(sampling, n)]
        try:
            completions = await asyncio.gather(*tasks)
            _settled[asked] = (client.api, client.token_parameter)
            return completions
        finally:
            for task in tasks:  # after one has failed
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def copies(sampling: Sampling, n: int) -> list[Sampling]:
    """Return a Sampling for each of n completions of a prompt: `n` itself is ignored by some servers. A seed counts up,
    or all would be equal."""
    if sampling.seed is None:
        return [sampling] * n
    return [replace(sampling, seed=sampling.seed + i) for i in range(n)]


def _run(coroutine: Coroutine[Any, Any, list[Completion]]) -> list[Completion]:
    """Call asyncio.run, also where an event loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
