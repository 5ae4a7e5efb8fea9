"""Completions from a model in a folder, in this process, on the GPU if there is one: Client's interface, no server.

    model = LocalModel("my_llama", batch_size=8)
    completions = model.generate(["1.", "Once upon"], Sampling(max_tokens=100))
    completion = await model.complete("1.", Sampling(max_tokens=100))      # batched with others that are waiting
    for piece in model.stream("1.", Sampling(max_tokens=100)): ...         # as it is generated

The folder is a checkpoint's, an adapter's or a weight diff's (alpaca/inference/load.py).

Prompts are sorted by length and padded on the left. What comes out for a prompt depends on it, on its Sampling and on
the seed in that, and not on the rest of its batch: each row draws its random numbers from its own seed. Up to rounding,
that is: another batch shape may round logits differently, which flips a token where two are almost equally likely (in
bfloat16 now and then, in float32 hardly ever). CPU and GPU draw different numbers from one seed. Without a seed, two
runs differ.
"""

import asyncio
import copy
import random
import threading
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from alpaca.common.errors import InputError, ParameterError, UsageError
from alpaca.completions.api import MOST_CUTS, Completion, ContextOverflow, Prompt, Sampling, cut_at_stop
from alpaca.data.tokenization import tokens_around, without_end
from alpaca.inference.load import LoadOptions, load_for_inference, without_adapter
from alpaca.inference.token_stream import Ending, Stop, TokenQueue, pieces_of, tokens_of
from alpaca.models.device import best_dtype, check_device, quantizing_flag


class LocalModel:
    """A causal language model and its tokenizer. Threads may use one at the same time.

    chat: put each prompt into the tokenizer's chat template, if it has one; `api` says which way was taken.
    device: "cuda" or "cpu"; not given, the GPU if there is one. Weights are bfloat16 on a GPU that can, float16 on an
    older one, float32 on a CPU.
    base: of an adapter or a weight diff (alpaca/inference/load.py).
    load_in_4bit, load_in_8bit: quantize the weights with bitsandbytes.

    `templates` are the prompt templates that the model was trained with (alpaca/data/prompts.py).
    """

    def __init__(
        self,
        folder: str | Path,
        batch_size: int = 8,
        chat: bool = False,
        device: str | None = None,
        base: str | Path | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
    ):
        if batch_size < 1:
            raise ParameterError(f"{{batch_size}}: expected 1 or more, got {batch_size}.", "batch_size")
        self.batch_size = batch_size
        self.name = str(folder)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(self.device)
        how = LoadOptions(self.device, best_dtype(self.device), quantizing_flag(load_in_8bit, load_in_4bit))
        opened = load_for_inference(folder, base, how)
        self.model = opened.model
        self.tokenizer = opened.tokenizer
        self._behind = tokens_around(self.tokenizer)[1]
        self.templates = opened.templates
        self.summary = opened.description
        self.api = "chat" if chat and self.tokenizer.chat_template else "completions"
        ends = _listed(self.model.generation_config.eos_token_id) + _listed(self.tokenizer.eos_token_id)
        if strange := [token for token in ends if type(token) is not int]:
            message = f"{folder}: the end token of its generation_config.json is {strange[0]!r:.60}, expected an id"
            raise InputError(message, str(folder))
        self.eos = list(dict.fromkeys(ends))
        # what fills rows that have ended; an end, so that nothing after a row's end is taken for text
        self.filler = self.eos[0] if self.eos else self.tokenizer.pad_token_id or 0
        # no defaults out of the model's folder: generate() would take temperature and others from there
        self.model.generation_config = GenerationConfig(eos_token_id=self.eos or None, pad_token_id=self.filler)
        self.context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self._waiting: list[tuple[Prompt, Sampling, asyncio.Future]] = []
        self._working = False
        self._text = threading.Lock()  # of the tokenizer, which threads must not use at the same time

    async def __aenter__(self) -> "LocalModel":
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def check(self) -> str:
        """Return what will be asked how, as Client.check. A model that is loaded needs no other check."""
        return f"{self.summary} on {self.device} in {self.model.dtype}, {self.api}, batches of {self.batch_size}"

    async def complete(self, prompt: Prompt, sampling: Sampling, on_lost_response: object = None) -> Completion:
        """Complete a prompt, as Client.complete. Prompts asked for at the same time are generated together, batch_size
        at most."""
        self._fitting(self.prompt_tokens(prompt), sampling)  # a prompt that is too long must not fail its whole batch
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((prompt, sampling, future))
        if not self._working:
            self._working = True
            self._worker = asyncio.create_task(self._work())  # kept: asyncio itself holds tasks weakly
        return await future

    async def _work(self) -> None:
        await asyncio.sleep(0)  # whoever is about to ask too comes into the first batch
        while self._waiting:
            batch, self._waiting = self._waiting[: self.batch_size], self._waiting[self.batch_size :]
            prompts, samplings, futures = zip(*batch)
            try:
                results = await asyncio.to_thread(self.generate, prompts, samplings)
                for future, result in zip(futures, results):
                    if not future.done():  # its caller may have been cancelled
                        future.set_result(result)
            except Exception as error:
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
            await asyncio.sleep(0)  # the callers go on, and ask again
        self._working = False

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling]) -> list[Completion]:
        """Complete every prompt, in order; one Sampling for all, or one each.

        Raises:
            ContextOverflow: a prompt alone is longer than the model's context.
            UsageError: out of memory, or a Sampling with what only servers know.
        """
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        ids = [self.encode(prompt) for prompt in prompts]
        samplings = [self._fitting(len(row), one) for row, one in zip(ids, samplings)]
        results: dict[int, Completion] = {}
        alike: dict[tuple, list[int]] = {}
        for i in sorted(range(len(ids)), key=lambda i: -len(ids[i])):  # longest first: if memory runs out, at once
            one = samplings[i]
            alike.setdefault((one.max_tokens, one.temperature, one.top_p, tuple(one.stop)), []).append(i)
        for group in alike.values():
            for batch in (group[n : n + self.batch_size] for n in range(0, len(group), self.batch_size)):
                seeds = [samplings[i].seed for i in batch]
                done = self._batch([ids[i] for i in batch], samplings[batch[0]], seeds)
                results |= zip(batch, done)
        return [results[i] for i in range(len(ids))]

    def stream(
        self, prompt: Prompt, sampling: Sampling, stopped: threading.Event | None = None
    ) -> Generator[str, None, Ending]:
        """Yield the text that `generate` gives for the same seed, in pieces of whole characters, as it is generated.

        It ends soon after `stopped` is set, or when nobody takes the pieces any more. Returns why it ended, "stop" or
        "length", as `finish_reason` of a Completion, and how many tokens were generated.

        Raises:
            ContextOverflow, UsageError: as `generate`, before the first piece.
        """
        ids = self.encode(prompt)
        sampling = self._fitting(len(ids), sampling)
        without_stop = replace(sampling, stop=())  # `pieces_of` finds those

        def work(tokens: TokenQueue, stop: Stop) -> None:
            self._run(
                [ids], without_stop, [sampling.seed], streamer=tokens, stopping_criteria=StoppingCriteriaList([stop])
            )

        return pieces_of(
            tokens_of(work, stopped),
            lambda new: self._decode(ids, new),
            self.tokenizer.convert_ids_to_tokens,
            self.eos,
            sampling.stop,
            stopped.is_set if stopped else bool,
        )

    def prompt_tokens(self, prompt: Prompt) -> int:
        """Return how many of the `context` tokens `prompt` takes."""
        return len(self.encode(prompt))

    def fits(self, tokens: int, sampling: Sampling) -> bool:
        """Return whether the context has room for a prompt of so many `tokens`, and an answer."""
        try:
            self._fitting(tokens, sampling)
        except ContextOverflow:
            return False
        return True

    def without_adapter(self) -> "LocalModel":
        """Return the base model of an adapter, for the same prompts, around the same weights; both may be used at
        once."""
        bare = copy.copy(self)
        bare.model = without_adapter(self.model)
        bare._waiting = []
        bare._working = False
        return bare

    def encode(self, prompt: Prompt) -> list[int]:
        """Return ids as in training: text such as "</s>" stays text."""
        with self._text:
            return self._ids(prompt)

    def _ids(self, prompt: Prompt) -> list[int]:
        if self.api == "completions":
            if not isinstance(prompt, str):
                raise UsageError(f"{self.name} has no chat template, or was not opened for chat: expected a text")
            ids = self.tokenizer(prompt, split_special_tokens=True, verbose=False)["input_ids"]
            return without_end(ids, self._behind) or [self.filler]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [messages] if isinstance(messages, dict) else list(messages)
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes its own

    def _fitting(self, tokens: int, sampling: Sampling) -> Sampling:
        """Return `sampling` with max_tokens cut by a fifth, as 2023 did, until a prompt of `tokens` and its completion
        fit into the context."""
        if sampling.extra or sampling.logit_bias:
            raise UsageError(f"logit_bias and {sorted(sampling.extra)} are for servers; {self.name} is a local model.")
        if self.context is None:
            return sampling
        if (max_tokens := self._cut(tokens, sampling.max_tokens)) is not None:
            return replace(sampling, max_tokens=max_tokens)
        if tokens < self.context and self._cut(1, sampling.max_tokens) is None:
            raise ParameterError(
                f"{{max_new_tokens}} {sampling.max_tokens}: is far above the {self.context} tokens of the model's "
                f"context; give less than {self.context}",
                "max_new_tokens",
            )
        most = f", of at most {sampling.max_tokens} new ones," if sampling.max_tokens > self.context else ""
        raise ContextOverflow(f"a prompt of {tokens} tokens leaves{most} no room in a context of {self.context}")

    def _cut(self, tokens: int, max_tokens: int) -> int | None:
        """Return `max_tokens`, cut until a prompt of `tokens` leaves room for them; None if that takes too many
        cuts."""
        for _ in range(MOST_CUTS + 1):
            if tokens + max_tokens <= self.context:
                return max_tokens
            max_tokens = int(max_tokens * 0.8)
            if max_tokens < 1:
                break
        return None

    def _batch(self, ids: list[list[int]], sampling: Sampling, seeds: list[int | None]) -> list[Completion]:
        output = self._run(ids, sampling, seeds)
        return [self._completion(row, new, sampling) for row, new in zip(ids, output)]

    @torch.inference_mode()
    def _run(self, ids: list[list[int]], sampling: Sampling, seeds: list[int | None], **more: Any) -> list[list[int]]:
        """Return the new tokens of every row, fillers after an end included. more: for transformers' generate()."""
        width = max(map(len, ids))
        padded = torch.tensor([[self.filler] * (width - len(row)) + row for row in ids], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=self.device)
        options: dict[str, Any] = {"max_new_tokens": sampling.max_tokens, "do_sample": False, **more}
        if sampling.stop:
            options |= {"stop_strings": list(sampling.stop), "tokenizer": self.tokenizer}
        if temperature := (1.0 if sampling.temperature is None else sampling.temperature):
            options["logits_processor"] = LogitsProcessorList(
                [SeededTopPSampler(temperature, 1.0 if sampling.top_p is None else sampling.top_p, seeds, self.device)]
            )
        try:
            output = self.model.generate(padded, attention_mask=mask, **options)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise ParameterError(
                f"out of memory on {self.device} with {len(ids)} prompts of up to {width} tokens and max_tokens "
                f"{sampling.max_tokens}. Give a smaller {{batch_size}} (now {self.batch_size}).",
                "batch_size",
            ) from error
        return output[:, width:].tolist()

    def _completion(self, prompt: list[int], new: list[int], sampling: Sampling) -> Completion:
        end = next((n for n, token in enumerate(new) if token in self.eos), None)
        kept = new[:end]
        text, stopped = cut_at_stop(self._decode(prompt, kept), sampling.stop)
        reason = "stop" if stopped or end is not None else "length"
        return Completion(text, reason, len(prompt), len(kept))

    def _decode(self, prompt: list[int], new: list[int]) -> str:
        """Return the text that `new` adds. Decoded alone it would lose a space at its start (sentencepiece)."""
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        with self._text:
            before, all_ = (self.tokenizer.decode(row, **options) for row in (prompt[-8:], prompt[-8:] + new))
            return all_[len(before) :] if all_.startswith(before) else self.tokenizer.decode(new, **options)


class SeededTopPSampler(LogitsProcessor):
    """Sampling by temperature and top-p with a generator of random numbers for each row.

    The largest of logit + Gumbel noise is a draw from the softmax of the logits. So generate() goes on as for greedy
    decoding, and a row's draws do not depend on the rows beside it, which torch.multinomial's over a batch do.
    """

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[int | None], device: str):
        self.temperature, self.top_p = temperature, top_p
        seeds = [random.randrange(2**62) if seed is None else seed for seed in seeds]
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float() / self.temperature
        if self.top_p < 1.0:
            ordered, index = scores.sort(dim=-1, descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all that are likelier
            outside = torch.zeros_like(scores, dtype=torch.bool).scatter(
                -1, index, (before >= self.top_p) & (before > 0)
            )
            scores = scores.masked_fill(outside, -torch.inf)
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators):
            row.exponential_(generator=generator)
        return scores - noise.log()


def _listed(tokens: int | list[int] | None) -> list[int]:
    return [] if tokens is None else tokens if isinstance(tokens, list) else [tokens]
