"""Who answers: a model in a folder, in this process, or one of a server."""

import os
from pathlib import Path

from alpaca.asking import Budget, Model
from alpaca.client import Client
from alpaca.errors import UsageError


def open_respondent(
    model_name: str,
    base_url: str | None = None,
    api: str = "auto",
    batch_size: int = 8,
    *,
    chat: bool = True,
    base: str | None = None,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    batch_size_flag: str = "--request_batch_size",
) -> Model:
    """The model of a folder (a checkpoint, an adapter or a diff), unless there is a base URL; else a server's.

    Args:
        api: completions, chat or auto; of a folder, auto is chat where its tokenizer has a chat template.
        chat: whether a folder's chat template may be used.
        base: of a folder with an adapter or a diff.

    Raises:
        UsageError: a flag that does not fit, a folder that cannot be opened, a bad address.
    """
    if not is_folder(model_name, base_url):
        for name, given in {"base": base, "load_in_8bit": load_in_8bit, "load_in_4bit": load_in_4bit}.items():
            if given:
                raise UsageError(f"--{name} is for the model of a folder; --model_name {model_name} is a server's")
        return Client(model_name, base_url, api)
    if api not in ("auto", "chat", "completions"):
        raise UsageError(f"--api {api}: expected auto, chat or completions")
    from alpaca.local_model import LocalModel

    model = LocalModel(
        Path(model_name).expanduser(), batch_size, chat and api != "completions", batch_size_flag=batch_size_flag,
        base=base, load_in_8bit=load_in_8bit, load_in_4bit=load_in_4bit,
    )  # fmt: skip
    if api == "chat" and model.api != "chat":
        raise UsageError(f"--api chat: the tokenizer of {model_name} has no chat template; leave --api away")
    return model


def is_folder(model_name: str, base_url: str | None) -> bool:
    return not base_url and not os.environ.get("OPENAI_BASE_URL") and Path(model_name).expanduser().is_dir()


def check_numbers(**flags: int) -> None:
    """Raise UsageError for the first that is below 1."""
    for name, value in flags.items():
        if value < 1:
            raise UsageError(f"--{name} {value}: expected at least 1")


def budget_of(price_in: float, price_out: float, max_cost: float | None) -> Budget:
    if min(price_in, price_out) < 0:
        raise UsageError("--price_in, --price_out: expected dollars per million tokens, at least 0")
    if max_cost is not None and not (max_cost > 0 and price_in + price_out > 0):
        raise UsageError(f"--max_cost {max_cost}: expected dollars above 0, with --price_in and --price_out")
    return Budget(price_in, price_out, max_cost)
