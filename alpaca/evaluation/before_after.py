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
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from alpaca.common.commands import check_numbers, flag
from alpaca.common.errors import InputError, ParameterError
from alpaca.common.files import (
    check_writable,
    decode_text,
    digest,
    fingerprint,
    read_json,
    refuse_other_arguments,
    sha256_of_file,
    write_json,
    write_text,
)
from alpaca.data.prompts import PROMPT_DICT, format_prompt, instruction_and_input, templates_of
from alpaca.data.rows import Row, read_data
from alpaca.data.tokenization import IGNORE_INDEX
from alpaca.evaluation.harness import CAUSES, measured_with, versions
from alpaca.evaluation.harness_tasks import read_questions
from alpaca.evaluation.row_losses import TokenizedRow, flags_of_run, held_out_of, token_losses
from alpaca.inference.local_model import LocalModel
from alpaca.weights.provenance import CARD, CARD_MARKER, weights_of
from alpaca.weights.reader import ADAPTER, EXACT_DIFF, OTHER, RUN, find_folder, folder_kind

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
PICTURE = "before_after.png"
NO_ROOM = "(no answer: the prompt leaves no room for one)"
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
            UsageError: a file or a folder cannot be read, no row was held out, or a file was made with other arguments;
                all before anything is measured. Then: a model cannot be opened, or computes no numbers.
        """
        output, folders = Path(self.output_dir), self._folders()
        if folder_kind(output) not in (OTHER, RUN):
            problem = "holds a model, whose files would be mixed with those of the result; choose another folder"
            raise InputError(f"{output}: {problem}", output, written=True)
        check_writable(output)
        run_flags, templates = flags_of_run(folders["tuned"]), templates_of(folders["tuned"])
        rows = self._held_out(run_flags, folders["tuned"])
        text, questions = self._text(), read_questions(self.options.questions)
        how = {name: self._how(folder, rows, run_flags, templates) for name, folder in folders.items()}
        found = {name: self._earlier(output / f"{name}.json", how[name]) for name in folders}
        for name, folder in folders.items():
            if found[name] is None:
                print(f"{name}: {folder}", flush=True)
                model = self._open(folder, run_flags)
                measured = {
                    **self._of_rows(model, rows, templates, run_flags),
                    **self._of_text(model, text),
                    **self._of_questions(model, questions),
                    **self._answers(model, rows, templates),
                    "dtype": str(model.model.dtype).removeprefix("torch."),
                    "device": model.device,
                    "versions": versions(),
                }
                found[name] = measured | {"how": how[name]}
                write_json(output / f"{name}.json", found[name])
        return self._finish(found, rows, folders["tuned"])

    # ---- what is asked for ----

    def _folders(self) -> dict[str, Path]:
        """Return the folder of each model by its name in the table, the base first and the tuned model last."""
        folders = {"base": find_folder(self.base)}
        if self.checkpoints:
            numbers = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(self.checkpoints).glob("*/"))
            for number in sorted(int(match[1]) for match in numbers if match):
                folders[f"checkpoint-{number}"] = Path(self.checkpoints) / f"checkpoint-{number}"
            if len(folders) == 1:
                raise InputError(f"{self.checkpoints}: has no checkpoint-N; give the folder of a run", self.checkpoints)
        return {**folders, "tuned": find_folder(self.model)}

    def _held_out(self, run_flags: Mapping[str, Any], folder: Path) -> list[Row]:
        """Return the rows to measure on: a sample of --data_path, or of what the run itself has held out."""
        reading = {"turns": run_flags.get("turns", "first"), "columns": self.columns or run_flags.get("columns")}
        reading |= {"backward": run_flags["backward"], "cache_dir": run_flags.get("cache_dir")}
        if path := self.data_path:
            data = read_data(path, **reading)
        elif (path := run_flags.get("eval_data_path")) or run_flags["eval_size"]:
            try:
                data = read_data(path, **reading) if path else held_out_of(folder, run_flags, reading)
            except InputError as error:
                advice = {"data_path": "; give rows that were not trained on with {data_path}"}
                message = f"{self.model}: the rows that its run held out cannot be had ({error})"
                raise InputError(message, self.model, advice=advice) from error
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

    def _how(
        self, folder: Path, rows: Sequence[Row], run_flags: Mapping[str, Any], templates: Mapping[str, str]
    ) -> dict[str, Any]:
        """Return all that the numbers depend on, but rounding."""
        own_templates = {} if templates == PROMPT_DICT else {"templates": fingerprint(templates)[:12]}
        return {
            **weights_of(model=str(folder), base=self._base_of(folder)),
            **{name: str(run_flags[name]) for name in ("model_max_length", "prompt_boundary") if name in run_flags},
            **own_templates,
            "rows": digest(row.get(name) or "" for row in rows for name in ("instruction", "input", "output")),
            "text": sha256_of_file(self.options.text),
            "questions": sha256_of_file(self.options.questions),
            "answers": self.options.answers,
            "sampling": [self.sampling.max_tokens, self.sampling.temperature, self.sampling.top_p, self.options.seed],
        }

    def _base_of(self, folder: Path) -> str | None:
        """Return what a folder needs to be a model, if it needs something."""
        is_base = folder == find_folder(self.base)
        return self.base if not is_base and folder_kind(folder) in (ADAPTER, EXACT_DIFF) else None

    def _earlier(self, file: Path, how: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what an earlier run has measured, or None. Raise InputError if it was another one."""
        if not file.is_file():
            return None
        result = read_json(file)
        kinds = {**dict.fromkeys(LINES, (int, float, type(None))), "answers": list, "how": dict, "dtype": str}
        if wrong := [name for name, kind in kinds.items() if not isinstance(result.get(name, file), kind)]:
            raise InputError(f"{file}: is no result of this command (no {wrong[0]!r}); move it away", file)
        refuse_other_arguments(file, result["how"], how, self.output_dir)
        return result

    # ---- one model ----

    def _open(self, folder: Path, run_flags: Mapping[str, Any]) -> LocalModel:
        model = LocalModel(folder, self.options.batch_size, device=self.options.device, base=self._base_of(folder))
        limit = run_flags["model_max_length"]
        model.tokenizer.model_max_length = min(limit, model.context or limit)
        return model

    def _of_rows(
        self, model: LocalModel, rows: Sequence[Row], templates: Mapping[str, str], run_flags: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Measure the held-out rows; the base is asked as the tuned model is."""
        end = model.tokenizer.eos_token_id
        tokens = self.tokenize(
            [format_prompt(row, templates) for row in rows],
            [f"{row['output']}{model.tokenizer.eos_token or ''}" for row in rows],
            model.tokenizer,
            run_flags.get("prompt_boundary", "stanford"),
        )
        firsts = [int((labels == IGNORE_INDEX).sum()) for labels in tokens["labels"]]
        tokenized = list(zip([ids.tolist() for ids in tokens["input_ids"]], firsts))
        losses = self._losses(model, tokenized, "rows")
        if not sum(map(len, losses)):
            limit = model.tokenizer.model_max_length
            problem = f"none of {len(rows)} rows has a token to predict within the {limit} tokens of a row"
            raise InputError(f"{self.data_path or self.model}: {problem}", self.data_path or self.model)
        ends = [
            math.exp(-loss[-1].item())
            for (ids, _), loss in zip(tokenized, losses)
            if len(loss) and end is not None and ids[-1] == end
        ]
        return {"loss": torch.cat(losses).mean().item(), "end_probability": fmean(ends) if ends else None}

    def _losses(self, model: LocalModel, rows: Sequence[TokenizedRow], what: str) -> list[torch.Tensor]:
        losses = [torch.empty(0)] * len(rows)
        found = token_losses(model.model, rows, self.options.batch_tokens)
        for place, of_row in tqdm(found, desc=f"  {what}", total=len(rows), unit=""):
            losses[place] = of_row
            if not of_row.isfinite().all():
                problem = f"a loss of its {what} is not a number in {model.model.dtype}; {CAUSES}"
                raise InputError(f"{model.name}: {problem}", model.name)
        return losses

    def _of_text(self, model: LocalModel, text: str) -> dict[str, float]:
        ids, size = model.encode(text), min(model.context or PIECE, PIECE)
        losses = self._losses(model, [(ids[n : n + size], 1) for n in range(0, len(ids), size)], "text")
        total, predicted = sum(loss.sum().item() for loss in losses), sum(map(len, losses))
        size = len(text.encode()) * predicted / len(ids)  # the first token of a piece is not predicted
        return {"text_loss": total / predicted, "text_bits_per_byte": total / math.log(2) / size}

    def _of_questions(self, model: LocalModel, questions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        rows, context = [], model.context
        for number, asked in enumerate(questions, 1):
            prompt = f"Question: {asked['question']}\nAnswer:"
            first = len(model.encode(prompt))
            rows += [(model.encode(f"{prompt} {choice}"), first) for choice in asked["choices"]]
            if context and (longest := max(len(ids) for ids, _ in rows[-len(asked["choices"]) :])) > context:
                problem = f"has {longest} tokens with a choice, and {model.name} reads at most {context}"
                raise InputError(f"{self.options.questions}, question {number}: {problem}", self.options.questions)
        losses = iter([loss.sum().item() for loss in self._losses(model, rows, "choices")])
        chosen = []
        for asked in questions:
            of_choices = [next(losses) for _ in asked["choices"]]
            chosen.append(of_choices.index(min(of_choices)))
        share = fmean(choice == asked["answer"] for choice, asked in zip(chosen, questions))
        return {"right": share, "right_stderr": math.sqrt(share * (1 - share) / len(chosen)), "chosen": chosen}

    def _answers(self, model: LocalModel, rows: Sequence[Row], templates: Mapping[str, str]) -> dict[str, Any]:
        """Answer the first rows, longest prompt first. The answer to a prompt that leaves no room for one is None."""
        prompts = [format_prompt(row, templates) for row in rows[: self.options.answers]]
        lengths = [model.prompt_tokens(prompt) for prompt in prompts]
        fits = [place for place, length in enumerate(lengths) if model.fits(length, self.sampling)]
        order, size = sorted(fits, key=lambda place: -lengths[place]), self.options.batch_size
        done = {}
        with tqdm(total=len(order), desc="  answers", unit="") as bar:
            for batch in (order[n : n + size] for n in range(0, len(order), size)):
                samplings = [replace(self.sampling, seed=self.options.seed + place) for place in batch]
                done |= zip(batch, model.generate([prompts[place] for place in batch], samplings))
                bar.update(len(batch))
        return {
            "stops": fmean(answer.finish_reason == "stop" for answer in done.values()) if done else None,
            "length": fmean(answer.completion_tokens for answer in done.values()) if done else None,
            "answers": [done[place].text if place in done else None for place in range(len(prompts))],
        }

    # ---- the result ----

    def _finish(self, found: Mapping[str, dict[str, Any]], rows: Sequence[Row], tuned: Path) -> str:
        output, table = Path(self.output_dir), table_of(found)
        asked = [instruction_and_input(row) for row in rows[: self.options.answers]]
        measured = measured_with([entry for entry in found.values() if "versions" in entry])
        if different := [name for name, values in measured.items() if len(values) > 1]:
            table += f"\n\nnote: not all models were measured alike; {', '.join(different)} differ (see each file)"
        how = f"temperature {self.sampling.temperature}, seed {self.options.seed}"
        sides = [f"\n## Answers, unedited ({how}, at most {self.sampling.max_tokens} tokens)\n"]
        for place, question in enumerate(asked):
            sides.append(f"### {place + 1}\n\n{verbatim(question)}\n")
            for name in ("base", "tuned"):
                answer = found[name]["answers"][place]
                sides.append(f"{name}:\n\n{NO_ROOM if answer is None else verbatim(answer)}\n")
        write_text(output / "before_after.md", f"# Before and after\n\n{table}\n" + "\n".join(sides))
        result = {"models": found, "rows": len(rows), "asked": asked, "measured_with": measured, "versions": versions()}
        write_json(output / "before_after.json", result)
        draw(output / PICTURE, found)
        put_into_card(tuned / CARD, table, output / PICTURE)
        return (
            f"{table}\n\nwrote {output}: before_after.md (the table and the answers), .json, .png, and a file a model"
        )


def table_of(found: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"| | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for key, (what, form) in LINES.items():
        cells = ["-" if entry[key] is None else form.format(entry[key]) for entry in found.values()]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verbatim(text: str) -> str:
    """Return a text as Markdown that shows it letter for letter."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def put_into_card(card: Path, table: str, picture: Path) -> None:
    """Put table and picture at the end of a model card of train.py's, or in place of those that are there. What else
    stands there stays; a card whose owner has taken out the line that makes it ours is left alone."""
    if not card.is_file():
        return
    try:
        text = card.read_bytes().decode()
    except UnicodeDecodeError:
        text = ""
    if CARD_MARKER not in text:
        return print(f"note: {card} is not one of ours and stays as it is", flush=True)
    section = f"{BEGIN}\n## Before and after\n\n{table}\n\n![The same as a picture]({PICTURE})\n{END}"
    parts = re.split(f"{BEGIN}(?:(?!{BEGIN}).)*?{END}", text, maxsplit=1, flags=re.DOTALL)
    write_text(card, section.join(parts) if len(parts) > 1 else f"{text.rstrip()}\n\n{section}\n")
    shutil.copyfile(picture, card.with_name(PICTURE))


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
