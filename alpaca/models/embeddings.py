"""Embeddings that fit a tokenizer, and which part of a model text runs through."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the rows that embeddings need: the largest id and one more. That is more than len(tokenizer) where ids of
    added tokens leave a gap."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def resize_embeddings(model: PreTrainedModel, num_new_tokens: int, vocab_size: int) -> None:
    """Give input and output embeddings `vocab_size` rows, the last `num_new_tokens` of them the mean of the others.

    As in 2023, a model with more rows than the tokenizer has tokens (OPT: 50272 and 50265) loses the rows in excess.
    """
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    if num_new_tokens > 0:
        with torch.no_grad():
            for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
                weight = embeddings.weight  # (vocab_size, hidden_size), one tensor where they are tied
                with gathered([weight]):
                    weight[-num_new_tokens:] = weight[:-num_new_tokens].mean(dim=0, keepdim=True)


def of_language_model(model: nn.Module) -> set[str]:
    """Return the names of the modules that text runs through: all of a language model's, and of a model that reads
    images or sound too, those of its decoder and output embedding."""
    config = model.config
    if config.get_text_config(decoder=True) is config:
        return {name for name, _ in model.named_modules()}
    parts = (model.get_decoder(), model.get_output_embeddings())
    inside = {id(module) for part in parts if part is not None for module in part.modules()}
    return {name for name, module in model.named_modules() if id(module) in inside}


def freeze_other_parts(model: nn.Module) -> list[str]:
    """Freeze what is not of the language model: no row reaches it, and DDP would wait for its gradients. Return what
    that is."""
    inside = of_language_model(model)
    frozen = {}
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in inside:
            parameter.requires_grad_(False)
            frozen[name.removeprefix(f"{model.base_model_prefix}.").partition(".")[0]] = None
    return list(frozen)


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Make the partitioned ones among `parameters` whole inside, where they may be written to. Collective."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
        yield
