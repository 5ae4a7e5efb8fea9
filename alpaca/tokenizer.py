"""Opening a tokenizer, those of the first LLaMA conversions of March 2023 included."""

import copy
from typing import Any

import transformers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

SPECIAL_TOKENS = {"pad_token": "[PAD]", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}


def open_tokenizer(name: str, cache_dir: str | None = None, **kwargs: Any) -> PreTrainedTokenizerBase:
    """AutoTokenizer.from_pretrained, with three faults that transformers 5 has with old LLaMA folders mended.

    Their class may be spelt LLaMATokenizer, which it no longer knows; they may not say add_bos_token, which it then
    takes for False (2023: True); and bos, eos and unk may be "", over which it recurses without end. Such tokens are
    those of the sentencepiece model.
    """
    config = get_tokenizer_config(name, cache_dir=cache_dir)
    for token, default in SPECIAL_TOKENS.items():
        if config.get(token) in ("", {"content": ""}):
            kwargs[token] = None if token == "pad_token" else default
    class_name = config.get("tokenizer_class") or ""
    if class_name.lower().startswith("llamatokenizer") and "add_bos_token" not in config:
        kwargs["add_bos_token"] = True
    opener = LlamaTokenizer if class_name == "LLaMATokenizer" else AutoTokenizer
    return opener.from_pretrained(name, cache_dir=cache_dir, **kwargs)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special tokens whose text means nothing else: not an ordinary token that --pad_token made one, such as !"""
    return [token for token in tokenizer.all_special_tokens if token in tokenizer.added_tokens_encoder]


def to_save(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer for a model's folder. An ordinary token that --pad_token made the pad token would come back as a
    special one, and "!" would vanish from answers: there the end-of-text token pads."""
    if tokenizer.pad_token in tokenizer.added_tokens_encoder:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def identity(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """All that decides the ids of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = tokenizer.special_tokens_map
    return [state, special, tokenizer.model_max_length, type(tokenizer).__name__, transformers.__version__]
