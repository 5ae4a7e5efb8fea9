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

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alpaca import flags
from alpaca.client import Sampling
from alpaca.data import Row, load_rows
from alpaca.errors import UsageError, reported
from alpaca.prompts import format_prompt, instruction_and_input, load_prompt_template
from alpaca.respondent import seed_of
from alpaca.row_answers import RowAnswers, first_of
from alpaca.weights import ADAPTER_CONFIG

if TYPE_CHECKING:
    from alpaca.local_model import LocalModel


@dataclass
class GenerateArguments:
    model: str | None = field(default=None, metadata={"help": "Folder or hub id: a model, a LoRA adapter or a diff."})
    base: str | None = field(default=None, metadata={"help": "The base model of an adapter or a diff."})
    data_path: str | None = field(default=None, metadata={"help": "Rows to answer: any file that train.py takes."})
    data_split: str = field(default="train", metadata={"help": "Split of a hub dataset, such as eval or train[:100]."})
    output_path: str | None = field(default=None, metadata={"help": "JSON file for the answered rows."})
    interactive: bool = field(default=False, metadata={"help": "Talk to the model at the terminal."})
    backward: bool = field(
        default=False, metadata={"help": "Ask a backward model for the instructions of the file's outputs."}
    )
    prompt_template: str | None = field(
        default=None, metadata={"help": "JSON file with other prompts than those that the model was trained with."}
    )
    max_new_tokens: int = field(default=512, metadata={"help": "Tokens of an answer, at most."})
    temperature: float = field(default=0.0, metadata={"help": "Of sampling; 0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the likeliest tokens of this probability."})
    seed: int = field(default=42, metadata={"help": "Of sampling."})
    batch_size: int = field(default=8, metadata={"help": "Prompts in a batch; the longest ones come first."})
    generator: str | None = field(
        default=None, metadata={"help": "Name of the model in the answered rows; by default that of its folder."}
    )
    drop_too_long: bool = field(
        default=False, metadata={"help": "Leave out rows whose prompt is too long for the model; else an error."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantize the weights with bitsandbytes."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantize the weights with bitsandbytes."})
    device: str | None = field(default=None, metadata={"help": "cuda or cpu; by default the GPU if there is one."})

    def __post_init__(self):
        if not self.model:
            raise UsageError("--model is missing: the folder of a model, such as train.py's --output_dir, or a hub id")
        if self.interactive == bool(self.data_path or self.output_path):
            raise UsageError("expected --data_path and --output_path for the rows of a file, or --interactive")
        if not self.interactive and not (self.data_path and self.output_path):
            raise UsageError(f"--{'output' if self.data_path else 'data'}_path is missing")
        if self.interactive and self.backward:
            raise UsageError("--backward: is for the rows of a file; --interactive asks with what is typed anyway")
        if self.max_new_tokens < 1:
            raise UsageError(f"--max_new_tokens {self.max_new_tokens}: expected 1 or more")
        if self.temperature < 0:
            raise UsageError(f"--temperature {self.temperature}: expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top_p {self.top_p}: expected more than 0, 1 at most")

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_new_tokens, self.temperature, self.top_p)

    def seed_of(self, number: int) -> int:
        """The seed of an answer: equal prompts of two rows get two answers."""
        return seed_of(self.seed, number)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    (options,), _ = flags.parse(argv, (GenerateArguments,), __doc__, program="scripts.generate")
    templates = load_prompt_template(options.prompt_template) if options.prompt_template else None
    rows = load_rows(options.data_path, options.data_split, answered=options.backward) if options.data_path else []
    if options.backward:
        rows = [{"instruction": row["output"], "reference": instruction_and_input(row)} for row in rows]
    from alpaca.local_model import LocalModel

    model = LocalModel(
        options.model, options.batch_size, device=options.device, batch_size_flag="--batch_size", base=options.base,
        load_in_4bit=options.load_in_4bit, load_in_8bit=options.load_in_8bit, flag="--model", base_flag="--base",
    )  # fmt: skip
    if options.interactive:
        from alpaca.chat import chat

        chat(model, templates or model.templates, options.sampling, options.seed_of)
    else:
        answer_file(rows, model, templates or model.templates, options)


def answer_file(
    rows: Sequence[Row], model: "LocalModel", templates: Mapping[str, str], options: GenerateArguments
) -> None:
    """Answer all rows, longest prompt first: what is padded least is generated together, and memory runs out at once
    if it does."""
    prompts = [format_prompt(row, templates) for row in rows]
    lengths = [model.prompt_tokens(prompt) for prompt in prompts]
    fitting = rows_that_fit(lengths, model.context, options)
    RowAnswers(
        rows, options.output_path, model, lambda endpoint: (options.sampling, {}), lambda row: prompts[row],
        description(prompts, fitting, options, model.told), options.batch_size,
        order=sorted(fitting, key=lambda row: -lengths[row]), seed_of=options.seed_of,
        more={"generator": options.generator or Path(options.model).resolve().name}, limit_flag="--max_new_tokens",
    ).run()  # fmt: skip


def rows_that_fit(lengths: Sequence[int], context: int | None, options: GenerateArguments) -> list[int]:
    """Numbers of the rows whose prompt leaves room for an answer in the model's context."""
    too_long = [row for row, length in enumerate(lengths) if context is not None and length >= context]
    if not too_long:
        return list(range(len(lengths)))
    told = (f"{len(too_long)} of {len(lengths)} rows have prompts that leave no room for an answer in the {context:,} "
            f"tokens of the model's context (rows {first_of(too_long)})")  # fmt: skip
    if not options.drop_too_long:
        raise UsageError(f"--data_path {options.data_path}: {told}; shorten them, or leave them out: --drop_too_long")
    print(f"note: {told}; they are left out", flush=True)
    return sorted(set(range(len(lengths))) - set(too_long))


def description(
    prompts: Sequence[str], fitting: Sequence[int], options: GenerateArguments, opened: str
) -> dict[str, Any]:
    """All that the answers depend on: a journal with answers to anything else is refused. `opened`: the folders that
    the model came from."""
    from alpaca.contract import fingerprint_of_weights

    names = ("model", "base", "max_new_tokens", "temperature", "top_p", "seed", "load_in_8bit", "load_in_4bit")
    how = {name: getattr(options, name) for name in names}
    for name in filter(None, (options.model, options.base)):
        how[f"weights of {name}"] = fingerprint_of_weights(name)
    how["opened"] = opened
    settings = Path(options.model) / ADAPTER_CONFIG
    if settings.is_file():
        how["settings of the adapter"] = hashlib.sha256(settings.read_bytes()).hexdigest()[:12]
    how["prompts"] = hashlib.sha256(json.dumps([prompts[row] for row in fitting]).encode()).hexdigest()[:12]
    return how


if __name__ == "__main__":
    with reported("scripts.generate"):
        main()
