"""Attention confined to each row of a pack, as an attention function of transformers.

A pack is one sequence without padding, [prefix 0][prefix 1]...[suffix of row 0][suffix of row 1]...: the tokens of a
row are those of its prefix followed by those of its suffix. A prefix that many rows share is computed once: under
causal attention its hidden states are the same in each of them (without dropout, which would draw once for them all).
Every row attends to its prefix and itself, nothing else.

The kernels of a GPU take sequences that lie one behind the other, so there a prefix is copied in front of every row
that continues it (the "unshared" layout) and the outputs are picked from the result. On a CPU one call per row is
fastest: the queries of its suffix against the keys of prefix and suffix.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alpaca.common.errors import UsageError
from alpaca.data.tokenization import ranges

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NAME = "alpaca_packed"
WITHOUT_EFFECT = {  # what models pass on to every layer and what does not change attention
    "cache_position",
    "is_causal",
    "layer_idx",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "shift_labels",
    "sliding_window",
    "use_cache",
}


@dataclasses.dataclass(eq=False)  # not frozen: torch.compile would look into it and compile anew for each pack
class PackLayout:
    """Where the rows of a pack of T tokens lie. Build it with `PackLayout.of`, which describes the first fields."""

    prefix_lengths: tuple[int, ...]
    row_lengths: tuple[int, ...]
    row_prefix: tuple[int, ...]
    max_seqlen: int  # tokens of the longest sequence of the unshared layout
    position_ids: Tensor  # (T,) int64
    # The unshared layout has T_full tokens in N sequences: every prefix on its own, then every row in full.
    gather: Tensor  # (T_full,) int64: the place in the pack that a token is copied from
    scatter: Tensor  # (T,) int64: the place in the unshared layout that holds the output for a token of the pack
    copies: Tensor  # int64: the places of all copies of prefix 0, copy by copy, then of prefix 1, ...
    cu_seqlens: Tensor  # (N + 1,) int32: where the sequences begin, and T_full

    @classmethod
    def of(
        cls, prefix_lengths: Sequence[int], row_lengths: Sequence[int], row_prefix: Sequence[int] | None = None
    ) -> "PackLayout":
        """Return a pack of `row_lengths` suffix tokens per row, of which row i continues prefix `row_prefix[i]` (-1:
        none).

        The tensors are on the CPU. Raises ValueError where a length is below 1 or a prefix does not exist.
        """
        row_prefix = [-1] * len(row_lengths) if row_prefix is None else row_prefix
        prefixes, rows, chosen = (tuple(map(int, values)) for values in (prefix_lengths, row_lengths, row_prefix))
        if not rows or min(prefixes + rows) < 1:
            raise ValueError(f"a pack needs rows, and lengths of at least 1; got prefixes {prefixes} and rows {rows}")
        if len(chosen) != len(rows) or min(chosen) < -1 or max(chosen) >= len(prefixes):
            raise ValueError(f"row_prefix {chosen} does not name a prefix of {len(prefixes)}, or -1, for each row")
        starts = np.cumsum((0, *prefixes, *rows))
        pieces = [(starts[i], 0, length) for i, length in enumerate(prefixes)]  # place in the pack, position, length
        own, owners = list(range(len(prefixes))), list(range(len(prefixes)))
        for row, (length, prefix) in enumerate(zip(rows, chosen), start=len(prefixes)):
            before = 0
            if prefix >= 0:
                before = prefixes[prefix]
                pieces.append((starts[prefix], 0, before))
                owners.append(prefix)
            own.append(len(pieces))
            owners.append(-1)
            pieces.append((starts[row], before, length))
        place, position, length = np.array(pieces, dtype=np.int64).T
        begin = np.cumsum(length) - length  # place in the unshared layout
        copies = [
            ranges(begin[np.equal(owners, i)], np.full(owners.count(i), length)) for i, length in enumerate(prefixes)
        ]
        seqlens = [*prefixes, *(n + (prefixes[p] if p >= 0 else 0) for n, p in zip(rows, chosen))]
        tensors = {
            "position_ids": ranges(position[own], length[own]),
            "gather": ranges(place, length),
            "scatter": ranges(begin[own], length[own]),
            "copies": np.concatenate([np.zeros(0, np.int64), *copies]),
            "cu_seqlens": np.cumsum([0, *seqlens], dtype=np.int32),
        }
        tensors = {name: torch.from_numpy(array) for name, array in tensors.items()}
        return cls(prefixes, rows, chosen, max_seqlen=max(seqlens), **tensors)

    @property
    def tokens(self) -> int:
        """Return T, the number of tokens in the pack."""
        return sum(self.prefix_lengths) + sum(self.row_lengths)

    def _each_tensor(self, function: Callable[[Tensor], Tensor]) -> "PackLayout":
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return PackLayout(**{k: function(v) if isinstance(v, Tensor) else v for k, v in values.items()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackLayout":
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackLayout":
        return self._each_tensor(Tensor.pin_memory)


def register() -> None:
    """Make `attn_implementation="alpaca_packed"` known to transformers. It has no mask function: models then ask for no
    mask, and do not look for packed rows in the position ids, for which a GPU would have to be waited for."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def named_kernel(config: "PreTrainedConfig") -> str | None:
    """Return the `pack_kernel` of a model for which a flash attention of transformers was chosen."""
    chosen = config._attn_implementation or ""
    return chosen if chosen.startswith("flash_attention") else None


@contextmanager
def packed_attention_enabled(config: "PreTrainedConfig", batch: Mapping[str, Any]) -> Iterator[None]:
    """If `batch` is a pack, let models of `config` attend within its rows; if it is padded, do nothing if it is padded.
    The backward pass belongs inside: layers with gradient checkpointing run again there."""
    if "pack" not in batch:
        yield
        return
    register()
    chosen, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = chosen


@torch.compiler.disable  # the lengths of a layout would make torch.compile compile anew for each pack
def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    pack: PackLayout | None = None,
    pack_kernel: str | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Return attention of query (1, H, T, D) to key and value (1, H_kv, T, D) -> ((1, T, H, D), None), for
    transformers.

    `pack` and `pack_kernel` are arguments of the model's forward: the layout (tensors on the query's device), and the
    name of another attention function of transformers that takes cu_seqlens and is used where a half precision allows
    it ("flash_attention_2"). `scaling` None is 1/sqrt(D). Raises UsageError where the model does not pass `pack` on,
    NotImplementedError where it passes something that is not implemented here.
    """
    _check(module, query, attention_mask, pack, kwargs)
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings leave query and key in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    half = query.dtype in (torch.float16, torch.bfloat16)
    if pack_kernel is not None and half:
        output = _named_kernel(query, key, value, pack, scaling, dropout, module, pack_kernel)
    elif half and dropout == 0 and _takes_varlen(query, value):
        output = _varlen(query, key, value, pack, scaling)
    elif query.device.type == "cpu" or (len(pack.cu_seqlens) - 1) * pack.max_seqlen > 2 * len(pack.gather):
        output = _row_by_row(query, key, value, pack, scaling, dropout)
    else:  # while filling up at most doubles the tokens
        output = _padded(query, key, value, pack, scaling, dropout)
    return output, None


def _check(
    module: torch.nn.Module, query: Tensor, attention_mask: Tensor | None, pack: PackLayout | None, kwargs: dict
) -> None:
    if pack is None:
        raise UsageError(
            f"{type(module).__name__} is not told how rows are packed: the model does not pass keyword "
            "arguments on to its attention. Use padded batches."
        )
    refused = [
        name
        for name, value in kwargs.items()
        if value is not None and value is not False and name not in WITHOUT_EFFECT
    ]
    refused += ["attention_mask"] if attention_mask is not None else []
    window, causal = kwargs.get("sliding_window"), kwargs.get("is_causal")
    refused += ["sliding_window"] if window is not None and window < pack.max_seqlen else []
    refused += ["is_causal"] if not (getattr(module, "is_causal", True) if causal is None else causal) else []
    if refused:
        raise NotImplementedError(
            f"attention within packs does not implement {', '.join(sorted(refused))}, which "
            f"{type(module).__name__} uses. Use padded batches."
        )
    if query.shape[0] != 1 or query.shape[2] != pack.tokens:
        raise ValueError(f"a pack of {pack.tokens} tokens is one sequence; got {query.shape[0]} of {query.shape[2]}")


def _repeat_heads(states: Tensor, heads: int, dim: int) -> Tensor:
    """Repeat each key or value head of grouped-query attention, once for every query head that uses it."""
    return states if states.shape[dim] == heads else states.repeat_interleave(heads // states.shape[dim], dim)


def _row_by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pack: PackLayout,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Call sdpa once for every prefix and row. The tensors are split: with a slice for each row, each would have a
    gradient of the pack's length."""
    heads, number = query.shape[1], len(pack.prefix_lengths)
    key, value = _repeat_heads(key, heads, dim=1), _repeat_heads(value, heads, dim=1)
    lengths = (*pack.prefix_lengths, *pack.row_lengths)
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    # Many rows add to a prefix's gradient: in half precision the sum would lose digits that single rows keep.
    wide = torch.promote_types(query.dtype, torch.float32)
    prefix_keys, prefix_values = ([x.to(wide) for x in states[:number]] for states in (keys, values))
    future = query.new_full((pack.max_seqlen, pack.max_seqlen), -math.inf).triu(1)
    outputs = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling)
        for q, k, v in zip(queries[:number], keys, values)
    ]
    for q, k, v, prefix in zip(queries[number:], keys[number:], values[number:], pack.row_prefix):
        if prefix < 0:
            outputs.append(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling))
            continue
        k = torch.cat((prefix_keys[prefix].to(k.dtype), k), dim=2)
        v = torch.cat((prefix_values[prefix].to(v.dtype), v), dim=2)
        mask = future[k.shape[2] - q.shape[2] : k.shape[2], : k.shape[2]]
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling))
    return torch.cat(outputs, dim=2).transpose(1, 2)


class _Unshare(torch.autograd.Function):
    """(1, H, T, D) of a pack -> (T_full, H, D) of its unshared layout.

    The gradients of a prefix's copies are summed in float32 and in a fixed order; index_select would sum them in the
    precision of its input and, on a GPU, in any order.
    """

    @staticmethod
    def forward(ctx, states: Tensor, pack: PackLayout) -> Tensor:
        ctx.pack = pack
        return states[0].transpose(0, 1).index_select(0, pack.gather)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        pack = ctx.pack
        sums, at = [], 0
        for i, length in enumerate(pack.prefix_lengths):
            tokens = length * (1 + pack.row_prefix.count(i))
            copies = gradient.index_select(0, pack.copies[at : at + tokens]).unflatten(0, (-1, length))
            sums.append(copies.sum(0))  # sum() adds up in float32 and rounds once
            at += tokens
        suffixes = gradient.index_select(0, pack.scatter[sum(pack.prefix_lengths) :])
        return torch.cat((*sums, suffixes)).transpose(0, 1)[None], None


@functools.cache
def _varlen_arguments(function: Callable) -> tuple[dict, bool]:
    """Return how this torch's varlen_attn is told to be causal, and whether it takes fewer key than query heads."""
    names = inspect.signature(function).parameters
    return {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}, "enable_gqa" in names


def _rounded(length: int) -> int:
    """Return a longest length for the kernels that does not change from pack to pack."""
    return -length // 128 * -128


def _takes_varlen(query: Tensor, value: Tensor) -> bool:
    """Return whether torch's kernel takes these: it asks for Ampere or newer, heads of a multiple of 8 up to 256."""
    size = query.shape[-1]
    return (
        query.is_cuda
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and size % 8 == 0
        and size <= 256
        and size == value.shape[-1]
    )


def _varlen(query: Tensor, key: Tensor, value: Tensor, pack: PackLayout, scaling: float) -> Tensor:
    """Attend by torch's own kernel for sequences of different lengths: CUDA, half precision, no dropout."""
    from torch.nn.attention import varlen

    arguments, takes_groups = _varlen_arguments(varlen.varlen_attn)
    query, key, value = (_Unshare.apply(x, pack) for x in (query, key, value))
    if takes_groups:
        arguments = {**arguments, "enable_gqa": key.shape[1] != query.shape[1]}
    else:
        key, value = (_repeat_heads(x, query.shape[1], dim=1) for x in (key, value))
    longest = _rounded(pack.max_seqlen)
    output = varlen.varlen_attn(
        query, key, value, pack.cu_seqlens, pack.cu_seqlens, longest, longest, scale=scaling, **arguments
    )
    return output.index_select(0, pack.scatter)[None]


def _named_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pack: PackLayout,
    scaling: float,
    dropout: float,
    module: torch.nn.Module,
    name: str,
) -> Tensor:
    """Attend by the function that transformers has under `name`, on the unshared layout."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    states = [_Unshare.apply(x, pack).transpose(0, 1)[None] for x in (query, key, value)]
    # It reads from the model's configuration which kernel to load, and there it would find this module's name.
    stand_in = SimpleNamespace(config=SimpleNamespace(_attn_implementation=name), is_causal=True)
    longest = _rounded(pack.max_seqlen)
    output, _ = ALL_ATTENTION_FUNCTIONS[name](
        stand_in,
        *states,
        None,
        dropout=dropout,
        scaling=scaling,
        cu_seq_lens_q=pack.cu_seqlens,
        cu_seq_lens_k=pack.cu_seqlens,
        max_length_q=longest,
        max_length_k=longest,
    )
    return output.index_select(1, pack.scatter)


def _padded(query: Tensor, key: Tensor, value: Tensor, pack: PackLayout, scaling: float, dropout: float) -> Tensor:
    """Attend to the sequences as a batch filled up at the end, where causal attention never looks: float32, dropout on
    CUDA."""
    begin, longest = pack.cu_seqlens[:-1], pack.max_seqlen
    slots = begin[:, None] + torch.arange(longest, device=query.device, dtype=begin.dtype)
    slots = slots.clamp(max=len(pack.gather) - 1).flatten()
    batch = [
        _repeat_heads(_Unshare.apply(x, pack), query.shape[1], dim=1)
        .index_select(0, slots)
        .unflatten(0, (-1, longest))
        .transpose(1, 2)
        for x in (query, key, value)
    ]
    output = F.scaled_dot_product_attention(*batch, dropout_p=dropout, is_causal=True, scale=scaling)
    sequence = torch.searchsorted(pack.cu_seqlens, pack.scatter.int(), right=True) - 1
    places = sequence * longest + pack.scatter - begin[sequence]
    return output.transpose(1, 2).flatten(0, 1).index_select(0, places)[None]
