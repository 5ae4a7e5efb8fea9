"""The two Alpaca prompt templates, and those of a backward model: the only place where they are written.

They are an interface. A model trained on them answers well only when it sees the same bytes again, so generation,
evaluation and the chat template all come here.
"""

import json
import reprlib
import shlex
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from string import Formatter
from typing import Any

from alpaca.common.errors import InputError, ParameterError, UsageError
from alpaca.common.files import atomic_write, read_json
from alpaca.data.formats import ADVICE, ALPACA, CONVERSATIONS, FIELDS, NEEDED, TEXTS, Layout, kind_of_turns, plain_name

PROMPT_DICT = {
    "prompt_input": (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    ),
    "prompt_no_input": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    ),
}

# Of our own wording: the published backward models do not say theirs. `{instruction}` stands for the text whose
# instruction is to be written, so that everything else that takes templates takes these: see `backward_row`.
_BACKWARD = (
    "Below is a response to an instruction. Write the instruction that it responds to.\n\n"
    "### Response:\n{}\n\n### Instruction:"
)
BACKWARD_PROMPT_DICT = {
    "prompt_input": _BACKWARD.format("{instruction}\n\n{input}"),  # of a text in two fields; no training row has that
    "prompt_no_input": _BACKWARD.format("{instruction}"),
}

TEMPLATE_FILE = "prompt_template.json"  # in a model's folder: the templates it was trained with
LONGEST_TEMPLATE = 100_000  # characters


@lru_cache(maxsize=64)
def template_parts(template: str) -> tuple[tuple[str, str | None], ...]:
    """Return the pieces of a template as (text, placeholder behind it or None). It may be a stranger's: a width, an
    attribute, an index or a conversion, which `str.format` knows too, is refused.

    Raises:
        UsageError: it has more than plain placeholders such as {instruction}, or is no template at all.
    """
    if len(template) > LONGEST_TEMPLATE:
        raise UsageError(f"a template has {len(template):,} characters; expected at most {LONGEST_TEMPLATE:,}")
    try:
        parts = [(text, field, spec, conversion) for text, field, spec, conversion in Formatter().parse(template)]
    except ValueError as error:
        raise UsageError(f"a literal brace is written twice ({error})") from error
    for _, field, spec, conversion in parts:
        if field is not None and (spec or conversion or not field.isidentifier()):
            written = f"{field}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}"
            raise UsageError(f"expected plain placeholders such as {{instruction}}, got {{{written[:60]}}}")
    return tuple((text, field) for text, field, *_ in parts)


def format_prompt(example: Mapping[str, Any], templates: Mapping[str, str] = PROMPT_DICT) -> str:
    """Return the prompt of one row. `input` missing, None or "" selects `prompt_no_input`; a blank " " counts as input,
    as in the original.

    Raises:
        UsageError: the template has more than plain placeholders.
    """
    template = templates["prompt_input" if example.get("input") else "prompt_no_input"]
    template_parts(template)
    return template.format_map(example)


def instruction_and_input(row: Mapping[str, Any]) -> str:
    """Return the instruction of a row as one text, its input after an empty line."""
    return f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]


def backward_row(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a row of instruction backtranslation (arXiv 2308.06259): the output is what is asked with, and what is
    learned is the instruction, with its input after an empty line."""
    return {"instruction": row["output"], "output": instruction_and_input(row)}


def backward_prompt(text: str, templates: Mapping[str, str] = BACKWARD_PROMPT_DICT) -> str:
    """Return what a backward model is asked for the instruction that `text` answers: its prompt in training, byte for
    byte."""
    return format_prompt({"instruction": text}, templates)


def load_prompt_template(path: str | Path | None, backward: bool = False) -> Mapping[str, str]:
    """Read `prompt_input` and `prompt_no_input` from a JSON file; None gives Alpaca's own or BACKWARD_PROMPT_DICT.

    Raises:
        InputError: the file is missing or malformed, a template is absent, or its placeholders are wrong.
    """
    if path is None:
        return BACKWARD_PROMPT_DICT if backward else PROMPT_DICT
    templates = read_json(path)
    for name, fields in (("prompt_input", {"instruction", "input"}), ("prompt_no_input", {"instruction"})):
        if not isinstance(templates.get(name), str):
            raise InputError(f"{path}: needs a text under {name!r}, found keys {sorted(templates)}", path)
        try:
            used = {field for _, field in template_parts(templates[name]) if field is not None}
        except UsageError as error:
            raise InputError(f"{path}: {name}: {error}", path) from error
        if other := sorted(used - fields):
            raise InputError(f"{path}: {name} may use only {sorted(fields)} in braces, got {other[0]!r}", path)
        if unused := sorted(fields - used):
            raise InputError(f"{path}: {name} never uses {{{unused[0]}}}", path)
    return templates


def templates_of(folder: str | Path) -> Mapping[str, str]:
    """Return the templates that the model in `folder` was trained with; Alpaca's own where it holds none."""
    path = Path(folder) / TEMPLATE_FILE
    return load_prompt_template(path if path.is_file() else None)


def save_templates(templates: Mapping[str, str], folder: str) -> None:
    """Write the file that alpaca.data.prompts.templates_of and --prompt_template read."""
    with atomic_write(f"{folder}/{TEMPLATE_FILE}") as file:
        json.dump(dict(templates), file, indent=1, ensure_ascii=False)


def check_fits(read: Sequence[Any], data_path: str, layout: Layout) -> None:
    """Raise InputError for a file whose shape says more than what its first row lacks: one object that is a table by
    its columns or holds the rows under a key; turns of another shape, or in a column of another name."""
    first = read[0] if read else None
    if isinstance(first, list) and kind_of_turns(first) not in (None, TEXTS):
        problem = "is a list of turns; expected an object that has it under a key"
        raise InputError(f'{data_path}: row 0 {problem}: {{"messages": [...]}}', data_path)
    if not isinstance(first, Mapping):
        return
    alone, values = len(read) == 1, list(first.values())
    if alone and len(values) > 1 and not first.keys() & {*CONVERSATIONS} and _same_shape(values):
        problem = "is one object; expected a list of rows, as pandas' to_json(path, orient='records') writes"
        raise InputError(f"{data_path}: {problem}", data_path)
    if layout is not ALPACA or "instruction" in first:
        return
    for name, value in first.items():
        kind, known = kind_of_turns(value), plain_name(name) in CONVERSATIONS
        if kind not in (None, TEXTS) and not known and not (alone and "input" in kind):
            advice = {"columns": f"; {{columns}} {shlex.quote(f'turns={name}')} reads them"}
            raise InputError(f"{data_path}: {name!r} seems to hold conversations ({kind})", data_path, advice=advice)
        if known and isinstance(value, list) and value and isinstance(value[0], Mapping) and kind is None:
            turn = "a turn has from and value, role and content, or input and output"
            got = f"objects with {sorted(map(str, value[0]))}"
            raise InputError(f"{data_path}: row 0: {name!r} holds {got:.200}; {turn}", data_path)
    held = [name for name, value in first.items() if isinstance(value, list) and isinstance([*value, 0][0], Mapping)]
    if alone and (held or not any(isinstance(value, str) for value in values)):
        advice = f"; {held[0]!r} holds one: save that list as a file" if len(held) == 1 else ""
        keys = f"{', '.join(map(repr, first)):.200}"
        raise InputError(f"{data_path}: is one object with the keys {keys}; expected a list of rows{advice}", data_path)


def _same_shape(values: Sequence[Any]) -> bool:
    """Return whether these are the columns, or the rows by their numbers, of a table."""
    if all(isinstance(value, list) for value in values):
        return all(len(value) == len(values[0]) > 0 and isinstance(value[0], str) for value in values)
    return all(isinstance(value, Mapping) and value.keys() == values[0].keys() != set() for value in values)


def check_row(row: Any, read: Any, number: int, data_path: str, layout: Layout) -> None:
    """Raise InputError for a row without text in its fields, which the row `read` has under the names of `layout`."""
    where = f"{data_path}: row {number}"
    if not isinstance(row, Mapping):
        got = type(row).__name__
        raise InputError(f"{where}: expected an object with instruction, input and output, got {got}", data_path)
    for name in ("instruction", "output"):
        if name not in row:
            has = f"{sorted(map(str, read if layout is not ALPACA else row))}"
            column = layout.columns.get(name, name)
            header = (
                "; the first line of a table names its columns" if data_path.lower().endswith(("csv", "tsv")) else ""
            )
            problem = f"no field {column!r}; the row has {has:.500}{header}; {NEEDED}"
            raise InputError(f"{where}: {problem}", data_path, advice=ADVICE)
    for name in FIELDS:
        value, column = row.get(name), layout.columns.get(name, name)
        if not isinstance(value, str) and not (name == "input" and value is None):
            got = f"{type(value).__name__} {reprlib.repr(value):.60}"
            as_text = f'; write it as text: "{value}"' if isinstance(value, int | float) else ""
            raise InputError(f"{where}: {column!r} must be text, got {got}{as_text}", data_path)
        check_text(value or "", f"{where}: {column!r}", data_path)


def check_eval_size(eval_size: float) -> None:
    """Raise ParameterError unless this is a share of the rows, or a number of them."""
    if not (0 < eval_size < 1 or (eval_size >= 1 and float(eval_size).is_integer())):
        problem = "expected a share of the rows above 0 and below 1, or a whole number of rows"
        raise ParameterError(f"{{eval_size}} {eval_size:g}: {problem}", "eval_size")


def check_text(text: str, where: str, about: str) -> None:
    """Raise InputError for half of a surrogate pair: JSON can say it ("\\ud83d"), no tokenizer or server reads it."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise InputError(
                f"{where} holds {half!r} at character {error.start}, one half of a character such as an emoji that was "
                "cut in two; mend or remove it",
                about,
            ) from error
