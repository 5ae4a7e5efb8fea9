"""Who answers: a model in a folder, in this process, or one of a server; and what its answers depend on."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alpaca.common.commands import check_numbers
from alpaca.common.errors import UsageError
from alpaca.common.files import digest
from alpaca.completions.api import Model, Sampling, check_sampling, seed_of
from alpaca.data.prompts import PROMPT_DICT, TEMPLATE_FILE, format_prompt
from alpaca.inference.client import Client


def open_backend(
    model_name: str,
    base_url: str | None = None,
    api: str = "auto",
    batch_size: int = 8,
    *,
    chat: bool = True,
    base: str | None = None,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    flag: str = "--model_name",
    batch_size_flag: str = "--request_batch_size",
    base_flag: str | None = None,
) -> Model:
    """The model of a folder (a checkpoint, an adapter or a diff), unless there is a base URL; else a server's.

    Args:
        api: completions, chat or auto; of a folder, auto is chat where its tokenizer has a chat template, unless it is
            of train.py, whose chat template writes the same prompts.
        chat: whether auto may be chat.
        base: of a folder with an adapter or a diff; base_flag names it, where the command takes one.
        flag, batch_size_flag: what model and batch size are called, for messages.

    Raises:
        UsageError: a flag that does not fit, a folder that cannot be opened, a bad address.
    """
    if not is_folder(model_name, base_url):
        for name, given in {"base": base, "load_in_8bit": load_in_8bit, "load_in_4bit": load_in_4bit}.items():
            if given:
                server = "--base_url" if base_url else "OPENAI_BASE_URL, as --base_url names none"
                raise UsageError(f"--{name} is for the model of a folder; {flag} {model_name} is a server's ({server})")
        return Client(model_name, base_url, api)
    if api not in ("auto", "chat", "completions"):
        raise UsageError(f"--api {api}: expected auto, chat or completions")
    from alpaca.inference.local_model import LocalModel

    folder = Path(model_name).expanduser()
    chat = api == "chat" or (api == "auto" and chat and not (folder / TEMPLATE_FILE).is_file())
    model = LocalModel(
        folder,
        batch_size,
        chat,
        batch_size_flag=batch_size_flag,
        base=base,
        load_in_8bit=load_in_8bit,
        load_in_4bit=load_in_4bit,
    )
    if api == "chat" and model.api != "chat":
        raise UsageError(f"--api chat: the tokenizer of {model_name} has no chat template; leave --api away")
    return model


def is_folder(model_name: str, base_url: str | None) -> bool:
    """A base URL, of the environment too, wins: servers such as vLLM call their models by the folder they came from."""
    return not base_url and not os.environ.get("OPENAI_BASE_URL") and Path(model_name).expanduser().is_dir()


@dataclass(frozen=True)
class ModelBackend:
    """A respondent by the flags of a command, which are named as these fields and those of Sampling.

    flag, batch_size_flag: of model and batch size, where they have other names.

    Raises:
        UsageError: a number that no model takes.
    """

    model_name: str
    sampling: Sampling
    base: str | None = None
    base_url: str | None = None
    api: str = "auto"
    batch_size: int = 8
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    seed: int | None = None
    flag: str = "--model_name"
    batch_size_flag: str = "--batch_size"
    base_flag: str | None = "--base"

    def __post_init__(self) -> None:
        check_numbers(**{self.batch_size_flag[2:]: self.batch_size})
        check_sampling(self.sampling)

    def open(self, chat: bool = True) -> Model:
        """As `open_backend`."""
        return open_backend(
            self.model_name,
            self.base_url,
            self.api,
            self.batch_size,
            chat=chat,
            base=self.base,
            load_in_8bit=self.load_in_8bit,
            load_in_4bit=self.load_in_4bit,
            flag=self.flag,
            batch_size_flag=self.batch_size_flag,
            base_flag=self.base_flag,
        )

    def how(self, **texts: Iterable[str]) -> dict[str, Any]:
        """All that the answers depend on, for a journal; of texts, their SHA-256. A server is told by its model, as it
        may come back at another address."""
        how = {name: getattr(self, name) for name in ("api", "load_in_8bit", "load_in_4bit", "seed")}
        how |= {name: asdict(self.sampling)[name] for name in ("max_tokens", "temperature", "top_p")}
        if is_folder(self.model_name, self.base_url):
            from alpaca.weights.provenance import weights_of

            how |= weights_of(**{self.flag[2:]: self.model_name, "base": self.base})
        else:
            how[self.flag[2:]] = self.model_name
        return how | {name: digest(parts) for name, parts in texts.items()}

    def seed_of(self, number: int) -> int:
        return seed_of(self.seed, number)


@dataclass
class PromptSet:
    """What a respondent is asked, by number: a chat model the question as it is, another one inside of a prompt.

    templates: JSON file's prompts; not given, those of the model's folder, or Alpaca's.
    """

    questions: Sequence[str]
    model: Model
    sampling: Sampling
    templates: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        self.around = self.templates or getattr(self.model, "templates", PROMPT_DICT)
        self.plain = self.model.api == "chat"

    def prepare(self, endpoint: str) -> tuple[Sampling, dict[str, Any]]:
        """For an RequestRunner."""
        self.plain = endpoint == "chat"
        if self.plain and self.templates is not None:
            raise UsageError("--prompt_template is for completions, and this server chats: add --api completions")
        return self.sampling, {}

    def prompt_of(self, number: int) -> str:
        question = self.questions[number % len(self.questions)]
        return question if self.plain else format_prompt({"instruction": question}, self.around)


def fitting(model: Model, numbers: Iterable[int], prompt_of: Callable[[int], str], sampling: Sampling) -> list[int]:
    """Those whose prompt leaves room for an answer. Of a server's model only the server knows."""
    if not hasattr(model, "fits"):
        return list(numbers)
    return [number for number in numbers if model.fits(model.prompt_tokens(prompt_of(number)), sampling)]
