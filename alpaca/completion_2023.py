"""What is behind utils.openai_completion: 2023's decoding arguments, sent and answered by alpaca.inference.client."""

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from alpaca.common.errors import UsageError
from alpaca.completions.api import Completion, Prompt, Sampling
from alpaca.inference.client import Client

NOTHING = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "suffix": None, "logprobs": None, "echo": False}
SAMPLING = ("max_tokens", "temperature", "top_p", "stop", "seed", "logit_bias")
_settled: dict[tuple, tuple] = {}  # (base URL, model, api) -> what check() found out, for the next call


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
    """n choices for each prompt. As in 2023, `index` counts within a batch of `batch_size` prompts, and `total_tokens`
    is the sum of the batch."""
    n = fields["n"]
    sampling = to_sampling({**fields, **other_fields})
    completions = _run(_complete_all(prompts, sampling, n, model, backoff, batch_size))
    size = batch_size * n
    totals = [total_tokens(completions[i : i + size], n) for i in range(0, len(completions), size)]
    choices = [choice_of(completion, i % size, totals[i // size]) for i, completion in enumerate(completions)]
    return [choices[i : i + n] for i in range(0, len(choices), n)]


def to_sampling(fields: Mapping[str, Any]) -> Sampling:
    """A Sampling of 2023's fields. What has no effect at its default is not sent: not every server knows it."""
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
    """For n completions of a prompt: `n` itself is ignored by some servers. A seed counts up, or all would be equal."""
    if sampling.seed is None:
        return [sampling] * n
    return [replace(sampling, seed=sampling.seed + i) for i in range(n)]


def _run(coroutine: Coroutine[Any, Any, list[Completion]]) -> list[Completion]:
    """asyncio.run, also where an event loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
