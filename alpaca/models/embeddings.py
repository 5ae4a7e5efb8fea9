"""Embeddings that fit a tokenizer."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel


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
