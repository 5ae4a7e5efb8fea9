"""A conversation with a model at the terminal, or through a pipe: instruction, input, the answer as it is generated."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from alpaca.common.errors import UsageError
from alpaca.completions.api import ContextOverflow, Sampling
from alpaca.data.prompts import format_prompt
from alpaca.data.rows import Row

if TYPE_CHECKING:
    from alpaca.inference.local_model import LocalModel

WORDS_TO_LEAVE = ("exit", "quit")
HELP = (
    "Every question stands alone: the model sees no earlier one. An input may have several lines; an empty line ends\n"
    "it, or leaves it out. Ctrl-C stops an answer; exit or Ctrl-D leaves."
)


def chat(model: "LocalModel", templates: Mapping[str, str], sampling: Sampling, seed_of: Callable[[int], int]) -> None:
    """Answer until there is nothing more to answer. On a terminal the questions are asked for, through a pipe only
    answers are printed."""
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        _edit_lines()
        print(f"{model.told} on {model.device}\n{HELP}", flush=True)
    number = 0
    while (row := _ask(on_terminal)) is not None:
        _answer(model, format_prompt(row, templates), replace(sampling, seed=seed_of(number)))
        number += 1


def _edit_lines() -> None:
    """Arrow keys, where Python has them."""
    try:
        import readline  # noqa: F401  input() uses it
    except ImportError:
        pass


def _ask(on_terminal: bool) -> Row | None:
    """The next question; None: there is none."""
    while True:
        try:
            instruction = _line("\nInstruction: " if on_terminal else "").strip()
            if instruction.lower() in WORDS_TO_LEAVE:
                return None
            if instruction:
                return {"instruction": instruction, "input": "\n".join(_lines_of_input(on_terminal))}
        except EOFError:
            return None
        except KeyboardInterrupt:
            print("\n(exit or Ctrl-D leaves)" if on_terminal else "", flush=True)


def _lines_of_input(on_terminal: bool) -> Iterator[str]:
    told = "Input (an empty line ends it): "
    try:
        while line := _line(told if on_terminal else ""):
            yield line
            told = "... "
    except EOFError:
        if on_terminal:
            print()


def _line(told: str) -> str:
    """As input(), which writes `told` to standard error where standard output is no terminal."""
    return input(told) if told else input()


def _answer(model: "LocalModel", prompt: str, sampling: Sampling) -> None:
    with _stopped_by_ctrl_c() as stopped:
        try:
            begun = False
            for piece in model.stream(prompt, sampling, stopped):
                piece = piece if begun else piece.lstrip()
                begun = begun or bool(piece)
                print(piece, end="", flush=True)
            print(" [stopped]" if stopped.is_set() else "" if begun else "[no answer]", flush=True)
        except (ContextOverflow, UsageError) as error:
            print(f"error: {error}", flush=True)


@contextmanager
def _stopped_by_ctrl_c() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets; the second time it ends the program."""
    stopped = threading.Event()

    def stop(number: int, frame: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
