"""What a model learned, and what it forgot: the same measures of a base, of checkpoints and of the tuned model.

    BeforeAfter(base="base", model="run", output_dir="scores", checkpoints="run", …).run()

loss             nats per target token of held-out rows; of plain text, nats per token, and bits per byte
right            of questions with choices, the share whose right choice has the highest probability, summed over its
                 tokens, after "Question: … Answer:"; the standard error is that of a share
end_probability  of the end-of-text token where a held-out answer ends
stops, length    share of answers that end by themselves, and their mean number of tokens; asked are the first rows
"""

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from alpaca.common.arguments import flags_of_file
from alpaca.common.commands import check_numbers, flag
from alpaca.common.errors import InputError, ParameterError
from alpaca.common.files import (
    check_writable,
    decode_text,
    digest,
    parse_json,
    read_json,
    refuse_other_arguments,
    sha256_of_file,
    write_json,
    write_text,
)
from alpaca.data.prompts import format_prompt, templates_of
from alpaca.data.rows import Data, Row, read_data
from alpaca.data.tokenization import tokens_around, without_end
from alpaca.evaluation.row_losses import TokenizedRow, token_losses
from alpaca.inference.local_model import LocalModel
from alpaca.weights.provenance import weights_of
from alpaca.weights.reader import ADAPTER, EXACT_DIFF, find_folder, folder_kind

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs" / "before_after"
PIECE = 1024  # tokens of plain text at a time, at most
LINES = {  # of the table: what is measured, as it is written
    "loss": ("loss on held-out rows (nats per token)", "{:.3f}"),
    "text_loss": ("loss on plain text (nats per token)", "{:.3f}"),
    "text_bits_per_byte": ("plain text, bits per byte", "{:.3f}"),
    "right": ("questions answered right", "{:.1%}"),
    "right_stderr": ("its standard error", "{:.1%}"),
    "end_probability": ("probability of the end where an answer ends", "{:.3f}"),
    "stops": ("answers that stop by themselves", "{:.0%}"),
    "length": ("mean length of an answer (tokens)", "{:.1f}"),
}
BEGIN, END = "<!-- before_after: begin -->", "<!-- before_after: end -->"
Tokenize = Callable[..., Mapping[str, Any]]  # train.preprocess


@dataclass(frozen=True)
class ProbeFlags:
    """What is measured of every model: flags of the command."""

    rows: int = flag(200, "How many held-out rows, drawn by seed.")
    answers: int = flag(20, "How many of them are answered.")
    text_path: str | None = flag(None, "Plain text that is no instructions; not given, a page of ours.")
    questions_path: str | None = flag(None, "JSONL of questions with choices; not given, forty easy ones of ours.")
    seed: int = flag(0, "Of the sample of rows, and of the answers.")
    batch_size: int = flag(8, "Prompts answered at a time.")
    batch_tokens: int = flag(4096, "Tokens of a batch where losses are measured.")
    device: str | None = flag(None, "cuda or cpu; not given, the GPU if there is one.")

    @property
    def text(self) -> Path:
        return Path(self.text_path or CONFIGS / "plain_text.txt")

    @property
    def questions(self) -> Path:
        return Path(self.questions_path or CONFIGS / "questions.jsonl")

    def check(self) -> None:
        """Raise ParameterError for numbers that nothing can be measured with."""
        check_numbers(rows=self.rows, batch_size=self.batch_size, batch_tokens=self.batch_tokens)
        if self.answers < 0:
            raise ParameterError(f"{{answers}} {self.answers}: expected 0 or more", "answers")


@dataclass(frozen=True)
class BeforeAfter:
    """Flags of the same names; see scripts/evaluate.py. `tokenize` is train.py's preprocess, `sampling` a
    completions.api.Sampling."""

    base: str
    model: str
    output_dir: str
    checkpoints: str | None
    data_path: str | None
    columns: str | None
    options: ProbeFlags
    sampling: Any
    tokenize: Tokenize

    def run(self) -> str:
        """Measure each model that has no file in `output_dir` yet; write numbers, table, answers and picture. Return
        the table.

        Raises:
            UsageError: a file cannot be read, no row was held out, a file was made with other arguments, or a model
                cannot be opened.
        """
        output, run_flags = Path(self.output_dir), flags_of_run(Path(self.model))
        check_writable(output)
        rows = self._held_out(run_flags)
        text, questions = self._text(), read_questions(self.options.questions)
        found = {}
        for name, folder in self._models().items():
            how = self._how(folder, rows, run_flags)
            file = output / f"{name}.json"
            if file.is_file():
                found[name] = read_json(file)
                refuse_other_arguments(file, found[name].get("how", {}), how, self.output_dir)
                continue
            print(f"{name}: {folder}", flush=True)
            found[name] = self._measure(folder, rows, text, questions, run_flags) | {"how": how}
            write_json(file, found[name])
        return self._finish(found, rows)

    # ---- what is asked for ----

    def _models(self) -> dict[str, str]:
        models = {"base": self.base}
        if self.checkpoints:
            numbers = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(self.checkpoints).glob("*"))
            for number in sorted(int(match[1]) for match in numbers if match):
                models[f"checkpoint-{number}"] = str(Path(self.checkpoints) / f"checkpoint-{number}")
            if len(models) == 1:
                raise InputError(f"{self.checkpoints}: has no checkpoint-N; give the folder of a run", self.checkpoints)
        return {**models, "tuned": self.model}

    def _held_out(self, run_flags: Mapping[str, str]) -> list[Row]:
        """Return the rows to measure on: a sample of --data_path, or of what the run itself has held out."""
        reading = {"turns": run_flags.get("turns", "first"), "columns": self.columns or run_flags.get("columns")}
        if self.data_path:
            data = read_data(self.data_path, "train", None, backward=False, **reading)
        elif path := run_flags.get("eval_data_path"):
            data = read_data(path, "train", None, backward=False, **reading)
        elif size := run_flags.get("eval_size"):
            split = run_flags.get("data_split", "train")
            whole: Data = read_data(run_flags["data_path"], split, None, backward=False, **reading)
            _, data = whole.hold_out(float(size), int(run_flags.get("seed", 42)))
        else:
            message = f"{self.model}: its run held out no rows to measure on"
            raise InputError(message, self.model, advice={"data_path": "; give some with {data_path}"})
        chosen = random.Random(self.options.seed).sample(range(len(data.rows)), min(self.options.rows, len(data.rows)))
        return [data.rows[place] for place in chosen]

    def _text(self) -> str:
        path = self.options.text
        try:
            text = decode_text(path.read_bytes(), path)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})", path) from error
        if len(text.split()) < 50:
            raise InputError(f"{path}: has {len(text.split())} words, expected 50 or more", path)
        return text

    def _how(self, folder: str, rows: Sequence[Row], run_flags: Mapping[str, str]) -> dict[str, Any]:
        """Return all that the numbers depend on, but rounding."""
        based = folder != self.base and needs_base(folder)
        names = ("model_max_length", "prompt_boundary", "prompt_template")
        return {
            **weights_of(model=folder, base=self.base if based else None),
            **{name: run_flags[name] for name in names if name in run_flags},
            "rows": digest(row[name] or "" for row in rows for name in ("instruction", "input", "output")),
            "text": sha256_of_file(self.options.text),
            "questions": sha256_of_file(self.options.questions),
            "answers": self.options.answers,
            "sampling": [self.sampling.max_tokens, self.sampling.temperature, self.sampling.top_p, self.options.seed],
        }

    # ---- one model ----

    def _measure(
        self,
        folder: str,
        rows: Sequence[Row],
        text: str,
        questions: Sequence[Mapping[str, Any]],
        run_flags: Mapping[str, str],
    ) -> dict[str, Any]:
        based = folder != self.base and needs_base(folder)
        model = LocalModel(
            folder, self.options.batch_size, device=self.options.device, base=self.base if based else None
        )
        templates = templates_of(Path(self.model))  # the base is asked as the tuned model is
        model.tokenizer.model_max_length = int(run_flags.get("model_max_length", 512))
        tokens = self.tokenize(
            [format_prompt(row, templates) for row in rows],
            [f"{row['output']}{model.tokenizer.eos_token or ''}" for row in rows],
            model.tokenizer,
            run_flags.get("prompt_boundary", "stanford"),
        )
        tokenized = [
            (ids.tolist(), int((labels == -100).sum())) for ids, labels in zip(tokens["input_ids"], tokens["labels"])
        ]
        losses = self._losses(model, tokenized, "rows")
        ends = [
            math.exp(-loss[-1].item())
            for (ids, _), loss in zip(tokenized, losses)
            if len(loss) and ids[-1] == model.tokenizer.eos_token_id
        ]
        answers = self._answers(model, rows, templates)
        return {
            "loss": torch.cat(losses).mean().item(),
            **self._of_text(model, text),
            **self._of_questions(model, questions),
            "end_probability": fmean(ends) if ends else None,
            **answers,
            "dtype": str(model.model.dtype).removeprefix("torch."),
            "device": model.device,
        }

    def _losses(self, model: LocalModel, rows: Sequence[TokenizedRow], what: str) -> list[torch.Tensor]:
        losses = [torch.empty(0)] * len(rows)
        found = token_losses(model.model, rows, self.options.batch_tokens)
        for place, of_row in tqdm(found, desc=f"  {what}", total=len(rows), unit=""):
            losses[place] = of_row
        return losses

    def _of_text(self, model: LocalModel, text: str) -> dict[str, float]:
        ids, size = ids_of(model, text), min(model.context or PIECE, PIECE)
        losses = self._losses(model, [(ids[n : n + size], 1) for n in range(0, len(ids), size)], "text")
        total, predicted = sum(loss.sum().item() for loss in losses), sum(map(len, losses))
        size = len(text.encode()) * predicted / len(ids)  # the first token of a piece is not predicted
        return {"text_loss": total / predicted, "text_bits_per_byte": total / math.log(2) / size}

    def _of_questions(self, model: LocalModel, questions: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        rows = []
        for asked in questions:
            prompt = f"Question: {asked['question']}\nAnswer:"
            first = len(ids_of(model, prompt))
            rows += [(ids_of(model, f"{prompt} {choice}"), first) for choice in asked["choices"]]
        losses = iter([loss.sum().item() for loss in self._losses(model, rows, "choices")])
        right = []
        for asked in questions:
            of_choices = [next(losses) for _ in asked["choices"]]
            right.append(of_choices.index(min(of_choices)) == asked["answer"])
        share = fmean(right)
        return {"right": share, "right_stderr": math.sqrt(share * (1 - share) / len(right))}

    def _answers(self, model: LocalModel, rows: Sequence[Row], templates: Mapping[str, str]) -> dict[str, Any]:
        asked = rows[: self.options.answers]
        prompts = [format_prompt({**row, "output": ""}, templates) for row in asked]
        samplings = [replace(self.sampling, seed=self.options.seed + place) for place in range(len(asked))]
        done = model.generate(prompts, samplings) if asked else []
        return {
            "stops": fmean(answer.finish_reason == "stop" for answer in done) if done else None,
            "length": fmean(answer.completion_tokens for answer in done) if done else None,
            "answers": [answer.text for answer in done],
        }

    # ---- the result ----

    def _finish(self, found: Mapping[str, dict[str, Any]], rows: Sequence[Row]) -> str:
        output, table = Path(self.output_dir), table_of(found)
        asked = rows[: self.options.answers]
        how = f"temperature {self.sampling.temperature}, seed {self.options.seed}"
        sides = [f"\n## Answers, unedited ({how}, at most {self.sampling.max_tokens} tokens)\n"]
        for place, row in enumerate(asked):
            given = f"{row['instruction']}\n\n{row['input']}".strip() if row.get("input") else row["instruction"]
            sides.append(f"### {place + 1}\n\n{quoted(given)}\n")
            for name in ("base", "tuned"):
                sides.append(f"{name}:\n\n{quoted(found[name]['answers'][place])}\n")
        write_text(output / "before_after.md", f"# Before and after\n\n{table}\n" + "\n".join(sides))
        packages = {name: version(name) for name in ("torch", "transformers")}
        write_json(output / "before_after.json", {"models": found, "rows": len(rows), "versions": packages})
        draw(output / "before_after.png", found)
        put_into_card(Path(self.model) / "README.md", table)
        return (
            f"{table}\n\nwrote {output}: before_after.md (the table and the answers), .json, .png, and a file a model"
        )


def needs_base(folder: str) -> bool:
    return folder_kind(find_folder(folder)) in (ADAPTER, EXACT_DIFF)


def flags_of_run(folder: Path) -> dict[str, str]:
    """Return the flags of the run that wrote `folder`, as far as it says."""
    file = folder / "run.yaml"
    flags = {name: values[0] for name, values in flags_of_file(str(file)) if values} if file.is_file() else {}
    return flags | ({"turns": flags["guanaco_turns"]} if "guanaco_turns" in flags else {})


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Return the questions of a JSONL file: {"question": text, "choices": [texts], "answer": number of the right one}.
    Raise InputError for a line that is none."""
    try:
        lines = decode_text(path.read_bytes(), path).splitlines()
        questions = [parse_json(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})", path) from error
    for number, asked in enumerate(questions, 1):
        fields = asked if isinstance(asked, dict) else {}
        choices, answer = fields.get("choices"), fields.get("answer")
        texts = isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)
        if not (
            texts and isinstance(fields.get("question"), str) and type(answer) is int and 0 <= answer < len(choices)
        ):
            expected = 'expected {"question": "…", "choices": ["…", "…"], "answer": 0}'
            raise InputError(f"{path}, question {number}: got {str(asked)[:80]}; {expected}", path)
    if not questions:
        raise InputError(f"{path}: has no questions", path)
    return questions


def ids_of(model: LocalModel, text: str) -> list[int]:
    """Return the ids of a text, with what the tokenizer puts in front of it and nothing behind."""
    ids = model.tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]
    return without_end(ids, tokens_around(model.tokenizer)[1])


def table_of(found: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"| | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for key, (what, form) in LINES.items():
        cells = ["-" if entry[key] is None else form.format(entry[key]) for entry in found.values()]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines() or [""])


def put_into_card(card: Path, table: str) -> None:
    """Put the table at the end of a model card, or in place of the one that is there. What else stands there stays."""
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    section = f"{BEGIN}\n## Before and after\n\n{table}\n{END}"
    start, end = text.find(BEGIN), text.find(END)
    if 0 <= start < end:
        text = text[:start] + section + text[end + len(END) :]
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    write_text(card, text)


def draw(path: Path, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw each measure over the models, in their order."""
    from matplotlib.figure import Figure

    shown = [key for key in LINES if key != "right_stderr"]
    figure = Figure(figsize=(11, 6), layout="constrained")
    places = figure.subplots(2, 4).flatten()
    names = [name.removeprefix("checkpoint-") for name in found]
    for axes, key in zip(places, shown):
        values = [math.nan if entry[key] is None else entry[key] for entry in found.values()]
        errors = [entry["right_stderr"] for entry in found.values()] if key == "right" else None
        axes.errorbar(range(len(names)), values, yerr=errors, marker="o")
        axes.set_title(LINES[key][0], fontsize=8)
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.grid(alpha=0.3)
    for axes in places[len(shown) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=120)
