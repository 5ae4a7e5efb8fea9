"""Helpers under their 2023 names. Importing this file loads neither torch nor openai.

rows = utils.jload("alpaca_data.json")
utils.jdump(rows, "out.json")
choice = utils.openai_completion("1.", utils.OpenAIDecodingArguments(max_tokens=100), "gpt-3.5-turbo-instruct")
"""

import dataclasses
import io
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

StrOrOpenAIObject = str | Mapping[str, Any]


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
    from alpaca.completion_2023 import complete_all

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
    from alpaca.common.files import atomic_write

    with atomic_write(f) as file:
        file.write(text)


def _open(f: str | Path | IO[str], mode: str) -> IO[str]:
    if isinstance(f, io.IOBase):
        return f
    if any(letter in mode for letter in "wax"):
        Path(f).parent.mkdir(parents=True, exist_ok=True)
    return open(f, mode, encoding=None if "b" in mode else "utf-8")
