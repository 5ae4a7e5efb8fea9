"""The two Alpaca prompt templates: the only place where they are written.

They are an interface. A model trained on them answers well only when it sees the same bytes again, so generation,
evaluation and the chat template all come here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alpaca.errors import UsageError

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


TEMPLATE_FILE = "prompt_template.json"  # in a model's folder: the templates it was trained with


def format_prompt(example: Mapping[str, Any], templates: Mapping[str, str] = PROMPT_DICT) -> str:
    """The prompt of one row. `input` missing, None or "" selects `prompt_no_input`; a blank " " counts as input,
    as in the original."""
    name = "prompt_input" if example.get("input") else "prompt_no_input"
    return templates[name].format_map(example)


def load_prompt_template(path: str | Path | None) -> Mapping[str, str]:
    """Read `prompt_input` and `prompt_no_input` from a JSON file; None gives Alpaca's own templates.

    Raises:
        UsageError: the file is missing or malformed, a template is absent, or its placeholders are wrong.
    """
    if path is None:
        return PROMPT_DICT
    try:
        templates = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"--prompt_template {path}: cannot be read as JSON ({error})") from error
    if not isinstance(templates, dict):
        raise UsageError(f"--prompt_template {path}: expected a JSON object, got {type(templates).__name__}")
    for name, fields in (("prompt_input", {"instruction", "input"}), ("prompt_no_input", {"instruction"})):
        if not isinstance(templates.get(name), str):
            raise UsageError(f"--prompt_template {path}: needs a text under {name!r}, found keys {sorted(templates)}")
        try:
            templates[name].format_map(dict.fromkeys(fields, ""))
        except (KeyError, ValueError, IndexError) as error:
            raise UsageError(
                f"--prompt_template {path}: {name} may use only {sorted(fields)} in braces, a literal brace is written "
                f"twice (got {error!r})"
            ) from error
        if unused := [field for field in sorted(fields) if "{" + field not in templates[name]]:
            raise UsageError(f"--prompt_template {path}: {name} never uses {{{unused[0]}}}")
    return templates


def templates_of(folder: str | Path) -> Mapping[str, str]:
    """The templates that the model in `folder` was trained with; Alpaca's own where it holds none."""
    path = Path(folder) / TEMPLATE_FILE
    return load_prompt_template(path if path.is_file() else None)
