"""Who answers: a model in a folder, in this process, or one of a server; and what its answers depend on."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alpaca.common.commands import check_numbers, flag
from alpaca.common.errors import InputError, ParameterError, UsageError, masked
from alpaca.common.files import digest, parse_json
from alpaca.completions.api import Model, Prompt, Request, RequestFailed, Sampling, seed_of
from alpaca.completions.budget import BATCH_RATE
from alpaca.completions.servers import MOST, Servers
from alpaca.data.prompts import PROMPT_DICT, TEMPLATE_FILE, format_prompt
from alpaca.inference.client import PATHS, Client, api_by_name, is_openai
from alpaca.inference.server_errors import MaxTokensRefused, download, read_line, refused_line

NOWHERE = "http://localhost/v1"  # an address that is not asked
OF_THE_COMMAND = {  # fields of a request that --extra_body may not set, and what sets them
    **dict.fromkeys(("model", "messages", "prompt", "stop", "seed", "logit_bias"), "the command itself sets it"),
    **dict.fromkeys(("stream", "stream_options"), "answers are not streamed"),
    **dict.fromkeys(("n", "best_of"), "one answer is asked for at a time, and paid for"),
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), "{max_new_tokens} sets it"),
    **{name: f"{{{name}}} sets it" for name in ("temperature", "top_p")},
}


@dataclass(frozen=True)
class BackendFlags:
    """How a model is reached: flags of all commands that ask a server or the model of a folder."""

    base_url: str | None = flag(
        None,
        "Address of a server, of several with commas between, or a file with one a line; without it and "
        "OPENAI_BASE_URL, the model is a folder or one of OpenAI's.",
    )
    api: str = flag("auto", "The endpoint: completions, chat or auto.")
    concurrency: int | None = flag(
        None,
        "Requests to a server at a time; not given, batch_size. Of several servers each finds its own, up to this.",
    )
    extra_body: str | None = flag(
        None, 'JSON object of other fields for every request to a server, such as {"reasoning_effort": "low"}.'
    )
    batch_size: int = flag(8, "Prompts in a batch of a folder's model.")
    base: str | None = flag(None, "The base model of a folder with an adapter or a diff.")
    load_in_8bit: bool = flag(False, "Quantize a folder's weights with bitsandbytes.")
    load_in_4bit: bool = flag(False, "Quantize a folder's weights with bitsandbytes.")
    batch: bool = flag(False, "Ask through the server's batch endpoint (OpenAI: half price, within 24 hours).")
    batch_dir: str | None = flag(
        None, "Folder for files of vLLM's run-batch: requests are written there, answers read; no server is asked."
    )

    def check(self) -> None:
        """Raise UsageError for a value that no model takes."""
        if self.api not in ("auto", "chat", "completions"):
            raise ParameterError(f"{{api}} {self.api}: expected auto, chat or completions", "api")
        check_numbers(batch_size=self.batch_size, concurrency=self.at_once)
        self.extra_fields()
        if self.batch and self.batch_dir is not None:
            raise ParameterError("{batch} asks a server, and {batch_dir} none: give one of them", "batch", "batch_dir")
        if (self.batch or self.batch_dir is not None) and self.concurrency is not None:
            raise ParameterError("{concurrency}: a batch has all requests at once; omit it", "concurrency")
        if self.batch_dir is not None and self.base_url is not None:
            message = "{batch_dir} asks no server: omit {base_url}, or ask its batch endpoint with {batch}"
            raise ParameterError(message, "batch", "batch_dir", "base_url")
        if self.batch_dir is not None and (not self.batch_dir.strip() or is_file(self.batch_dir)):
            raise ParameterError(f"{{batch_dir}} {self.batch_dir}: expected a folder", "batch_dir")

    def refuse_for_folders(self, why: str) -> None:
        """Raise ParameterError for a flag of the model of a folder."""
        for name in ("base", "load_in_8bit", "load_in_4bit"):
            if getattr(self, name):
                raise ParameterError(f"{{{name}}} is for the model of a folder; {why}", name)

    @property
    def rate(self) -> float:
        """Return which part of the prices is paid."""
        return BATCH_RATE if self.batch else 1.0

    def extra_fields(self) -> dict[str, Any]:
        """Return the fields of `extra_body`. Raise ParameterError if it is no JSON object, or sets what the command
        sets."""
        if self.extra_body is None:
            return {}
        try:
            fields = parse_json(self.extra_body)
            json.dumps(fields, allow_nan=False).encode()
            json.dumps(fields, ensure_ascii=False).encode()  # half a surrogate pair
        except (ValueError, RecursionError) as error:
            raise ParameterError(f"{{extra_body}}: is not JSON ({error})", "extra_body") from error
        if not isinstance(fields, dict):
            expected = 'expected a JSON object such as {"reasoning_effort": "low"}'
            raise ParameterError(f"{{extra_body}}: {expected}, got {type(fields).__name__}", "extra_body")
        for name in fields:
            if name in OF_THE_COMMAND:
                message = f"{{extra_body}}: {name!r} cannot be set there; {OF_THE_COMMAND[name]}"
                raise ParameterError(message, "extra_body", "max_new_tokens", "temperature", "top_p")
        return fields

    @property
    def at_once(self) -> int:
        """Return how many requests are in flight at the same time."""
        return self.batch_size if self.concurrency is None else self.concurrency


class BatchClient(Client):
    """A server's model, asked through its batch endpoint or, with `batch_dir`, through files of that folder."""

    batch_dir: str | None = None
    read_line = staticmethod(read_line)

    @property
    def batched_by(self) -> str:
        """Return the flag that says so."""
        return "batch" if self.batch_dir is None else "batch_dir"

    async def download(self, file_id: str, path: Path) -> None:
        """Write a file of the server's to `path`."""
        await download(self.server, file_id, path)

    def request_of(self, prompt: Prompt, sampling: Sampling) -> tuple[str, dict[str, Any]]:
        """Return the path, as a line of a batch has it, and the body of a request."""
        if self.batch_dir is None and self.api == "chat" and is_openai(self.base_url):
            self.token_parameter = "max_completion_tokens"  # all of OpenAI's take it, the newer ones nothing else
        return f"/v1{PATHS[self.api]}", self.body_of(self.api, prompt, sampling)

    def refusal(self, status: int, said: Any, sent: Mapping[str, Any]) -> Exception:
        """Return what a refusal in a batch means: ContextOverflow, UsageError, or RequestFailed: to be asked again."""
        problem = refused_line(status, said, self.model, sent)
        if isinstance(problem, MaxTokensRefused):
            self.token_parameter = "max_completion_tokens"
            return RequestFailed(str(problem))
        return problem if isinstance(problem, RequestFailed | UsageError) else RequestFailed(str(problem))

    def renamed(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the body of a request with the name that max_tokens has by now."""
        new = self.token_parameter if "messages" in body else "max_tokens"
        return {new if name == "max_tokens" else name: value for name, value in body.items()}


def open_backend(model: str, flags: BackendFlags, chat: bool = True) -> Model:
    """Return the model of a folder (a checkpoint, an adapter or a diff), unless there is a base URL; else a server's.

    An api "auto" of a folder is chat where its tokenizer has a chat template, unless it is of train.py, whose chat
    template writes the same prompts.

    Args:
        chat: whether auto may be chat.

    Raises:
        UsageError: a flag that does not fit, a folder that cannot be opened, a bad address.
    """
    flags.check()
    if flags.batch_dir is not None:
        flags.refuse_for_folders(f"{model} is asked by files")
        api = api_by_name(model) if flags.api == "auto" else flags.api
        client = BatchClient(model, NOWHERE, api, extra_body=flags.extra_fields())
        client.batch_dir = flags.batch_dir
        return client
    if not is_folder(model, flags.base_url):
        flags.refuse_for_folders(f"{model} is a server's ({masked(flags.base_url or 'OPENAI_BASE_URL, or OpenAI')})")
        at_openai = not flags.base_url and not os.environ.get("OPENAI_BASE_URL")
        if at_openai and model.startswith(("/", "./", "../", "~")):
            raise InputError(f"{model}: no such folder", model)
        return _open_servers(model, flags)
    if flags.batch:
        raise ParameterError(f"{{batch}} is for a server; {model} is a folder", "batch")
    if flags.extra_body is not None:
        raise ParameterError(f"{{extra_body}} is for a server; {model} is a folder", "extra_body")
    from alpaca.inference.local_model import LocalModel

    folder = Path(model).expanduser()
    chat = flags.api == "chat" or (flags.api == "auto" and chat and not (folder / TEMPLATE_FILE).is_file())
    opened = LocalModel(
        folder,
        flags.batch_size,
        chat,
        base=flags.base,
        load_in_8bit=flags.load_in_8bit,
        load_in_4bit=flags.load_in_4bit,
    )
    if flags.api == "chat" and opened.api != "chat":
        raise ParameterError(f"{{api}} chat: the tokenizer of {model} has no chat template; omit {{api}}", "api")
    return opened


def _open_servers(model: str, flags: BackendFlags) -> Model:
    """Return the model of a server, or of several as one."""
    fields = flags.extra_fields()
    addresses = addresses_of(flags.base_url or os.environ.get("OPENAI_BASE_URL"))
    if len(addresses) < 2:
        make = BatchClient if flags.batch else Client
        return make(model, addresses[0] if addresses else None, flags.api, extra_body=fields)
    if flags.batch:
        raise ParameterError("{batch} asks one server: {base_url} names several", "batch", "base_url")
    clients = [Client(model, address, flags.api, 0, extra_body=fields) for address in addresses]
    most = MOST if flags.concurrency is None else flags.concurrency
    return Servers(clients, flags.batch_size, most)


def addresses_of(text: str | None) -> list[str]:
    """Return the addresses in a text with commas between them, or in the file of that name, one a line.

    Raises:
        ParameterError: the file has none, or an address is there twice.
    """
    if not text:
        return []
    parts = text.split(",")
    if "://" not in text and is_file(text):
        try:
            lines = Path(text).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ParameterError(f"{{base_url}} {text}: cannot be read ({error})", "base_url") from error
        parts = [part for line in lines for part in line.partition("#")[0].split(",")]
    addresses = [part.strip().rstrip("/") for part in parts if part.strip()]
    if not addresses:
        raise ParameterError(f"{{base_url}} {text}: holds no address; expected one a line", "base_url")
    if twice := [address for address in addresses if addresses.count(address) > 1]:
        raise ParameterError(f"{{base_url}}: {masked(twice[0])} is there twice", "base_url")
    return addresses


def is_file(text: str) -> bool:
    """Return whether a text is the path of a file; one that is too long for a path is none."""
    return _is(Path.is_file, text)


def _is(kind: Callable[[Path], bool], text: str) -> bool:
    try:
        return kind(Path(text).expanduser())
    except OSError:
        return False


def is_folder(model: str, base_url: str | None) -> bool:
    """Return whether `model` is a folder to open. A base URL, of the environment too, wins: servers such as vLLM call
    their models by the folder they came from."""
    return not base_url and not os.environ.get("OPENAI_BASE_URL") and _is(Path.is_dir, model)


@dataclass(frozen=True)
class ModelBackend:
    """A model, and how it is reached and sampled from.

    Args:
        seed: of all answers; each gets its own, drawn from it.
        known_as: what journals call the model.
    """

    model: str
    sampling: Sampling
    flags: BackendFlags = BackendFlags()
    seed: int | None = None
    known_as: str = "model_name"

    def __post_init__(self) -> None:
        self.flags.check()

    def open(self, chat: bool = True) -> Model:
        """Open it as `open_backend` does."""
        return open_backend(self.model, self.flags, chat)

    def how(self, **texts: Iterable[str]) -> dict[str, Any]:
        """Return all that the answers depend on, for a journal; of texts, their SHA-256. A server is described by its
        model, as it may come back at another address."""
        how = {name: getattr(self.flags, name) for name in ("api", "load_in_8bit", "load_in_4bit")}
        how |= {"seed": self.seed}
        how |= {name: asdict(self.sampling)[name] for name in ("max_tokens", "temperature", "top_p")}
        if fields := self.flags.extra_fields():
            how["extra_body"] = json.loads(masked(json.dumps(fields, sort_keys=True), shapes=False))
        if is_folder(self.model, self.flags.base_url):
            from alpaca.weights.provenance import weights_of

            how |= weights_of(**{self.known_as: self.model, "base": self.flags.base})
        else:
            how[self.known_as] = self.model
        return how | {name: digest(parts) for name, parts in texts.items()}

    def requests(self, prompts: Mapping[int, str]) -> list[Request]:
        """Return the requests for prompts by their keys, in their order."""
        return [Request(prompt, key, seed_of(self.seed, key)) for key, prompt in prompts.items()]


@dataclass
class PromptSet:
    """What a model is asked, by number: a chat model the question as it is, another one inside of a prompt.

    Args:
        templates: prompts of a JSON file; not given, those of the model's folder, or Alpaca's.
    """

    questions: Sequence[str]
    model: Model
    templates: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        self.around = self.templates or getattr(self.model, "templates", PROMPT_DICT)

    def prompt_of(self, number: int) -> str:
        """Raise ParameterError for prompts of a file, which a server that chats does not take."""
        question = self.questions[number]
        if self.model.api != "chat":
            return format_prompt({"instruction": question}, self.around)
        if self.templates is not None:
            raise ParameterError(
                "{prompt_template} is for completions, and this server chats: add {api} completions",
                "prompt_template",
                "api",
            )
        return question

    def requests(self, keys: Iterable[int], rows: Sequence[int], seed: int | None = None) -> Iterator[Request]:
        """Yield the requests of `keys`: key k asks question k, beginning anew after the last one. They are made one by
        one: what the model's endpoint is has to be known by then.

        Args:
            rows: of a file, by the number of the question about them.
        """
        for key in keys:
            number = key % len(self.questions)
            yield Request(self.prompt_of(number), key, seed_of(seed, key), rows[number])


def fitting(model: Model, prompts: Mapping[int, str], sampling: Sampling) -> dict[int, str]:
    """Return the prompts that leave room for an answer. Of a server's model only the server knows."""
    if not hasattr(model, "fits"):
        return dict(prompts)
    return {key: prompt for key, prompt in prompts.items() if model.fits(model.prompt_tokens(prompt), sampling)}
