"""A model whose loss is not finite from some step on."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def poisoned(folder, source, value) -> str:
    """A copy of a model whose embedding of the byte 0xCE, which begins a Greek letter, is `value`."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("<0xCE>")] = value
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
