"""What 2023's code made of examples: its tokenizers, labels and rows."""

from conftest import GOLDEN
from transformers import AutoTokenizer

from alpaca.data.prompts import format_prompt


def golden_tokenizer(name: str, max_length: int = 512):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "labels" / name, model_max_length=max_length)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def texts_of(rows, tokenizer):
    return [format_prompt(row) for row in rows], [row["output"] + tokenizer.eos_token for row in rows]
