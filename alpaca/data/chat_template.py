"""The chat template that is saved with a trained model's tokenizer: the prompts it was trained with, in Jinja.

With it `tokenizer.apply_chat_template`, `transformers serve` and vLLM turn

    [{"role": "user", "content": "Give three tips."}]

into the ids that `tokenizer(format_prompt({"instruction": "Give three tips."}))` gives, the model's own prompt:

- A row's input stands in the message behind the text that separates the two in `prompt_input` (Alpaca: two newlines,
  `### Input:`, a newline), or under a key of its own: {"role": "user", "content": ..., "input": ...}.
- The text of a system message goes in front of the next instruction, with a blank line between.
- Earlier turns are rendered as prompt, answer and end-of-text token, one after the other. It is the only thing one can
  do, but nothing that Alpaca was trained on: its rows are single turns.
- Content may be a text or, as OpenAI's clients send it, a list of {"type": "text", "text": ...}.
- The prompt ends with what the answer follows on, with or without add_generation_prompt.

Text such as </s> in a message becomes that token, as everywhere in transformers, unless `sanitize_control_tokens=True`;
training takes it for plain text.
"""

import json
import re
from collections.abc import Mapping
from string import Formatter
from typing import TYPE_CHECKING

from alpaca.common.distributed import print_rank0
from alpaca.data.prompts import format_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# <<...>> are replaced by Jinja expressions. No text of a prompt stands in the template itself, only in strings: Jinja
# would take {{ for its own and drop newlines.
TEMPLATE = """
{%- set ns = namespace(system="", turn="user") -%}
{{- <<bos>> -}}
{%- for message in messages -%}
  {%- set text = message["content"] -%}
  {%- if text is not string -%}
    {%- if text | rejectattr("type", "equalto", "text") | list -%}
      {{- raise_exception("This model reads text only.") -}}
    {%- endif -%}
    {%- set text = text | map(attribute="text") | join("\\n") -%}
  {%- endif -%}
  {%- if message["role"] in ["system", "developer"] -%}
    {%- if text -%}
      {%- set ns.system = ns.system ~ text ~ "\\n\\n" -%}
    {%- endif -%}
  {%- elif message["role"] != ns.turn -%}
    {{- raise_exception("Expected a message of the " ~ ns.turn ~ ", got one of the " ~ message["role"] ~ ".") -}}
  {%- elif ns.turn == "user" -%}
    {%- set instruction, input = text, message["input"] -%}
    {%- if input is not defined and <<separator>> and <<separator>> in text -%}
      {%- set instruction, input = text.split(<<separator>>, 1) -%}
    {%- endif -%}
    {%- set instruction = ns.system ~ instruction -%}
    {%- if input -%}
      {%- set prompt = <<prompt_input>> -%}
    {%- else -%}
      {%- set prompt = <<prompt_no_input>> -%}
    {%- endif -%}
    {{- <<space>> ~ prompt -}}
    {%- set ns.system = "" -%}
    {%- set ns.turn = "assistant" -%}
  {%- else -%}
    {{- text ~ eos_token -}}
    {%- set ns.turn = "user" -%}
  {%- endif -%}
{%- endfor -%}
{%- if ns.system or (add_generation_prompt and ns.turn == "user") -%}
  {{- raise_exception("Expected a message of the user at the end.") -}}
{%- endif -%}
""".strip()

# What stands between a special token and the prompt. LLaMA's tokenizer puts a space in front of a text, but only where
# no special token stands before it.
SPACES = ('""', '("" if prompt[:1] in [" ", "▁"] else " ")')


def set_chat_template(tokenizer: "PreTrainedTokenizerBase", templates: Mapping[str, str], rank: int) -> None:
    """Give `tokenizer` the chat template of the prompts it trains with, in place of its base model's; none, and say so,
    where the ids would be others than in training."""
    tokenizer.chat_template = chat_template(tokenizer, templates)
    if tokenizer.chat_template is None:
        print_rank0("note: no chat template gives the ids of these prompts; the tokenizer is saved without one", rank)


def chat_template(tokenizer: "PreTrainedTokenizerBase", templates: Mapping[str, str]) -> str | None:
    """Return the Jinja text, proved on a few prompts: they have the ids of the training. None: there is no such
    text."""
    rows = [{"instruction": start + "Say it.", "input": text} for start in ("", " ", "\n") for text in ("", "a", " a")]
    for space in SPACES:
        try:
            written = _written(tokenizer, templates, space)
            if all(_ids(tokenizer, row, written) == _trained_ids(tokenizer, row, templates) for row in rows):
                return written
        except ValueError:  # a placeholder such as {instruction!r}, or a tokenizer that takes no template
            return None
    return None


def _written(tokenizer: "PreTrainedTokenizerBase", templates: Mapping[str, str], space: str) -> str:
    before, _ = special_ids(tokenizer)
    alone = before == [tokenizer.bos_token_id]
    expressions = {
        "bos": "bos_token" if alone else _string("".join(tokenizer.convert_ids_to_tokens(before))),
        "separator": _string(separator(templates["prompt_input"])),
        "prompt_input": _expression(templates["prompt_input"]),
        "prompt_no_input": _expression(templates["prompt_no_input"]),
        "space": space,
    }
    return re.sub("<<(.*?)>>", lambda found: expressions[found[1]], TEMPLATE)


def separator(template: str) -> str:
    """Return what stands between {instruction} and {input}; "" where a message cannot be split there: they are in
    another order, or what is between them has no letter and would be found anywhere."""
    fields = [field for _, field, *_ in Formatter().parse(template) if field]
    if fields != ["instruction", "input"]:
        return ""
    between = template.format(instruction="\0", input="\0").split("\0")[1]
    return between if re.search(r"\w", between) else ""


def _expression(template: str) -> str:
    """Return `Do {instruction}!` in Jinja: "Do " ~ instruction ~ "!"."""
    parts = []
    for text, field, spec, conversion in Formatter().parse(template):
        parts.append(_string(text))
        if field is not None:
            if field not in ("instruction", "input") or spec or conversion:
                raise ValueError(field)
            parts.append(field)
    return " ~ ".join(parts)


def _string(text: str) -> str:
    """Return a Jinja string. It is read as Python's; characters beyond 16 bits, which JSON would escape in halves,
    stay."""
    return json.dumps(text, ensure_ascii=False)


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer itself puts before and behind a text."""
    alone, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    start = next(n for n in range(len(whole)) if whole[n : n + len(alone)] == alone)
    return whole[:start], whole[start + len(alone) :]


def _ids(tokenizer: "PreTrainedTokenizerBase", row: Mapping[str, str], template: str) -> list[int]:
    message = {"role": "user", "content": row["instruction"], "input": row["input"]}
    return tokenizer.apply_chat_template([message], chat_template=template, add_generation_prompt=True)["input_ids"]


def _trained_ids(
    tokenizer: "PreTrainedTokenizerBase", row: Mapping[str, str], templates: Mapping[str, str]
) -> list[int]:
    """Return the ids of the prompt in training, without a token that is put behind every text: the answer stands
    there."""
    ids, (_, behind) = tokenizer(format_prompt(row, templates))["input_ids"], special_ids(tokenizer)
    return ids[: len(ids) - len(behind)]
