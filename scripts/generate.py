r"""Answers of a model: for every row of a file, or in a conversation at the terminal.

    python -m scripts.generate --model output/alpaca-7b --data_path rows.json --output_path answers.json
    python -m scripts.generate --model output/alpaca-7b --interactive
    python -m scripts.generate --model output/lora --base <its base> …        # a LoRA adapter (--base: if it moved)
    python -m scripts.generate --model <diff> --base <its base> …             # a weight diff, recovered in memory

The prompt is that of training, id for id: the template in the model's folder, or Alpaca's. Greedy unless --temperature
is given; then --seed decides, for each row apart, whatever else is in its batch.

answers.json has the rows of the file in their order, with `output` replaced and `generator` naming the model, as
AlpacaEval reads them; with --backward a row is asked with its output, and keeps its instruction as `reference`, for
scripts.evaluate. Every answer goes into answers.json.journal.jsonl first: after a kill the same command continues
and repeats none. --interactive asks for an instruction and an input, which may have several lines and ends with an
empty one; Ctrl-C stops an answer, exit or Ctrl-D leaves. What is piped into it is read in the same way.
"""

import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    from alpaca.common.errors import starting

    starting("scripts.generate")

from alpaca.common import arguments
from alpaca.common.commands import check_numbers, flag
from alpaca.common.errors import UsageError, format_first, names_flags, reported
from alpaca.common.files import digest, refuse_overwriting_input
from alpaca.completions.api import GREEDY, ContextOverflow, Request, Sampling, SamplingFlags, seed_of
from alpaca.completions.rows import BatchCompletion, write_answered
from alpaca.data.prompts import format_prompt, instruction_and_input, load_prompt_template
from alpaca.data.rows import Row, load_rows

if TYPE_CHECKING:
    from alpaca.inference.local_model import LocalModel

WORDS_TO_LEAVE = ("exit", "quit")
HELP = (
    "Every question stands alone: the model sees no earlier one. An input may have several lines; an empty line ends\n"
    "it, or leaves it out. Ctrl-C stops an answer; exit or Ctrl-D leaves."
)


@dataclass(frozen=True)
class AnswerFlags:
    """How a file is answered by the model of a folder: flags of scripts.evaluate alpaca_eval too."""

    base: str | None = flag(None, "The base model of an adapter or a diff.")
    data_split: str = flag("train", "Split of a hub dataset, such as eval or train[:100].")
    columns: str | None = flag(None, "Which column is what: instruction=prompt,input=context.")
    prompt_template: str | None = flag(None, "JSON file with other prompts than those that the model was trained with.")
    max_new_tokens: int = flag(GREEDY.max_new_tokens, "Tokens of an answer, at most.")
    temperature: float = flag(GREEDY.temperature, "Sampling temperature; 0 is greedy.")
    top_p: float = flag(GREEDY.top_p, "Sample from the likeliest tokens of this probability.")
    seed: int = flag(42, "Seed of sampling, for each row apart.")
    batch_size: int = flag(8, "Prompts in a batch; the longest ones come first.")
    generator: str | None = flag(None, "Name of the model in the answered rows; by default that of its folder.")
    drop_too_long: bool = flag(False, "Leave out rows whose prompt is too long for the model; else an error.")
    load_in_8bit: bool = flag(False, "Quantize the weights with bitsandbytes.")
    load_in_4bit: bool = flag(False, "Quantize the weights with bitsandbytes.")
    device: str | None = flag(None, "cuda or cpu; by default the GPU if there is one.")

    @property
    def sampling(self) -> Sampling:
        return SamplingFlags(self.temperature, self.top_p, self.max_new_tokens).sampling()


@dataclass(frozen=True)
class GenerateArguments(AnswerFlags):
    model: str | None = flag(None, "Folder or hub id: a model, a LoRA adapter or a diff.")
    data_path: str | None = flag(None, "Rows to answer: any file that train.py takes.")
    output_path: str | None = flag(None, "JSON file for the answered rows.")
    interactive: bool = flag(False, "Talk to the model at the terminal.")
    backward: bool = flag(False, "Ask a backward model for the instructions of the file's outputs.")

    def check(self) -> None:
        if not self.model:
            raise UsageError("--model is missing: the folder of a model, such as train.py's --output_dir, or a hub id")
        if self.interactive == bool(self.data_path or self.output_path):
            raise UsageError("expected --data_path and --output_path for the rows of a file, or --interactive")
        if not self.interactive and not (self.data_path and self.output_path):
            raise UsageError(f"--{'output' if self.data_path else 'data'}_path is missing")
        if self.interactive and self.backward:
            raise UsageError("--backward: is for the rows of a file; --interactive asks with what is typed anyway")
        check_numbers(batch_size=self.batch_size)
        SamplingFlags(self.temperature, self.top_p, self.max_new_tokens).sampling()
        if self.output_path:
            refuse_overwriting_input(self.output_path, self.data_path)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    (options,), _ = arguments.parse(argv, (GenerateArguments,), __doc__, program="scripts.generate")
    generate(options)


@names_flags
def generate(options: GenerateArguments) -> None:
    """Answer the rows of a file, or talk at the terminal."""
    rows: list[Row] = []
    if options.data_path:
        rows = load_rows(options.data_path, options.data_split, options.backward, columns=options.columns)
    if options.backward:
        rows = [{"instruction": row["output"], "reference": instruction_and_input(row)} for row in rows]
    model, templates = opened(options)
    if options.interactive:
        chat(model, templates, options.sampling, options.seed)
    else:
        answer_file(rows, model, templates, options)


def opened(options: GenerateArguments) -> tuple["LocalModel", Mapping[str, str]]:
    """Return the model, and the prompts to ask it with."""
    templates = load_prompt_template(options.prompt_template) if options.prompt_template else None
    from alpaca.inference.local_model import LocalModel

    model = LocalModel(
        options.model,
        options.batch_size,
        device=options.device,
        base=options.base,
        load_in_4bit=options.load_in_4bit,
        load_in_8bit=options.load_in_8bit,
    )
    return model, templates or model.templates


def answer_file(
    rows: Sequence[Row], model: "LocalModel", templates: Mapping[str, str], options: GenerateArguments
) -> None:
    """Answer all rows, longest prompt first: what is padded least is generated together, and memory runs out at once
    if it does."""
    prompts = [format_prompt(row, templates) for row in rows]
    lengths = [model.prompt_tokens(prompt) for prompt in prompts]
    fits = rows_that_fit(lengths, model, options)
    how = description([prompts[row] for row in fits], options)
    by_length = sorted(fits, key=lambda row: -lengths[row])
    requests = [Request(prompts[row], row, seed_of(options.seed, row)) for row in by_length]
    completion = BatchCompletion(
        model, options.sampling, options.output_path, how, options.batch_size, drop_failed=None
    )
    generator = options.generator or Path(options.model).resolve().name
    write_answered(options.output_path, rows, completion.answers(requests), generator=generator)


def rows_that_fit(lengths: Sequence[int], model: "LocalModel", options: GenerateArguments) -> list[int]:
    """Return the numbers of the rows whose prompt, of so many tokens, leaves room for an answer in the model's
    context."""
    fits = [row for row, length in enumerate(lengths) if model.fits(length, options.sampling)]
    if not (too_long := sorted(set(range(len(lengths))) - set(fits))):
        return fits
    problem = (
        f"{len(too_long)} of {len(lengths)} rows have prompts that leave too little room for an answer in the "
        f"{model.context:,} tokens of the model's context (rows {format_first(too_long)})"
    )
    if options.max_new_tokens > model.context:
        problem += f"; --max_new_tokens {options.max_new_tokens} is above that context, and a lower one leaves more"
    if not (options.drop_too_long and fits):
        raise UsageError(
            f"--data_path {options.data_path}: {problem}; shorten them, or leave them out: --drop_too_long"
        )
    print(f"note: {problem}; they are left out", flush=True)
    return fits


def description(prompts: Sequence[str], options: GenerateArguments) -> dict[str, Any]:
    """Return all that the answers depend on: a journal with answers to anything else is refused."""
    from alpaca.weights.provenance import weights_of

    names = ("max_new_tokens", "temperature", "top_p", "seed", "load_in_8bit", "load_in_4bit")
    how = weights_of(model=options.model, base=options.base) | {name: getattr(options, name) for name in names}
    return how | {"prompts": digest(prompts)}


def chat(model: "LocalModel", templates: Mapping[str, str], sampling: Sampling, seed: int) -> None:
    """Answer until there is nothing more to answer. On a terminal the questions are asked for, through a pipe only
    answers are printed."""
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        _edit_lines()
        print(f"{model.summary} on {model.device}\n{HELP}", flush=True)
    number = 0
    while (row := _ask(on_terminal)) is not None:
        _answer(model, format_prompt(row, templates), replace(sampling, seed=seed_of(seed, number)))
        number += 1


def _edit_lines() -> None:
    """Switch on arrow keys, where Python has them."""
    try:
        import readline  # noqa: F401  input() uses it
    except ImportError:
        pass


def _ask(on_terminal: bool) -> Row | None:
    """Return the next question, or None if there is none."""
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
    prompt = "Input (an empty line ends it): "
    try:
        while line := _line(prompt if on_terminal else ""):
            yield line
            prompt = "... "
    except EOFError:
        if on_terminal:
            print()


def _line(prompt: str) -> str:
    """Return input(), which writes even an empty prompt to standard error where standard output is no terminal."""
    return input(prompt) if prompt else input()


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
    """Yield an event that Ctrl-C sets; the second time it ends the program."""
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


if __name__ == "__main__":
    with reported("scripts.generate"):
        main()
