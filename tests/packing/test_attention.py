"""Attention within packs: every route against a dense float64 reference, real models against their rows run alone."""

import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen

from alpaca.common.errors import UsageError
from alpaca.packing import attention
from alpaca.packing.attention import PackLayout, packed_attention

LAYOUTS = [((), (1,), (-1,)), ((), (5, 1, 7), (-1, -1, -1)), ((3,), (4, 1, 6), (0, 0, 0)), ((4, 2), (1, 5), (1, -1))]


def layouts():
    """The cases above and random ones: prefix lengths, row lengths, prefix of each row."""
    draw = random.Random(0)
    for _ in range(8):
        prefixes = [draw.randint(1, 6) for _ in range(draw.randint(0, 3))]
        rows = [draw.choice([1, draw.randint(1, 12)]) for _ in range(draw.randint(1, 9))]
        yield prefixes, rows, [draw.randint(-1, len(prefixes) - 1) for _ in rows]
    yield from LAYOUTS


def tokens_of_rows(prefixes, rows, row_prefix):
    """The places in the pack of the tokens of every row, prefixes first as rows of their own."""
    starts = [sum([*prefixes, *rows][:i]) for i in range(len(prefixes) + len(rows))]
    own = [list(range(start, start + length)) for start, length in zip(starts, [*prefixes, *rows])]
    return own[: len(prefixes)] + [
        (own[p] if p >= 0 else []) + tokens for p, tokens in zip(row_prefix, own[len(prefixes) :])
    ]


def inputs(tokens, heads=2, kv_heads=2, dim=4, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(1, heads, tokens, dim), (1, kv_heads, tokens, dim), (1, kv_heads, tokens, dim)]
    states = [torch.randn(shape, generator=draw, dtype=dtype).requires_grad_() for shape in shapes]
    return states, torch.randn((1, tokens, heads, dim), generator=draw, dtype=dtype)


def dense(query, key, value, layout, scaling):
    """One softmax over the whole pack with a mask that says which token sees which."""
    tokens = query.shape[2]
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for places in tokens_of_rows(*layout):
        for i, place in enumerate(places):
            seen[place, places[: i + 1]] = True
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def per_sequence(query, key, value, cu_seqlens, longest, scale):
    """What the kernels of a GPU compute: causal attention in each sequence of (tokens, heads, dim)."""
    lengths = cu_seqlens.diff().tolist()
    assert cu_seqlens.dtype == torch.int32 and sum(lengths) == len(query) and max(lengths) <= longest
    assert longest % 128 == 0, "constant over packs"
    parts = (x.transpose(0, 1).split(lengths, 1) for x in (query, key, value))
    return torch.cat([F.scaled_dot_product_attention(*part, is_causal=True, scale=scale) for part in zip(*parts)], 1)


def old_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None):
    assert is_causal and cu_seq_q is cu_seq_k and max_q == max_k and query.shape[1] == key.shape[1]
    return per_sequence(query, key, value, cu_seq_q, max_q, scale).transpose(0, 1)


def new_varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert window_size == (-1, 0) and cu_seq_q is cu_seq_k and max_q == max_k
    assert enable_gqa or query.shape[1] == key.shape[1]
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return per_sequence(query, key, value, cu_seq_q, max_q, scale).transpose(0, 1)


def flash(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout,
    scaling,
    cu_seq_lens_q,
    cu_seq_lens_k,
    max_length_q,
    max_length_k,
):
    assert attention_mask is None and module.config._attn_implementation == "flash" and module.is_causal
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    output = per_sequence(*(x[0].transpose(0, 1) for x in (query, key, value)), cu_seq_lens_q, max_length_q, scaling)
    return output.transpose(0, 1)[None], None


@pytest.fixture(params=["row_by_row", "padded", "old varlen", "new varlen", "named kernel"])
def route(request, monkeypatch):
    """route(query, key, value, pack, scaling), with a reference in place of what only a GPU has."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setattr(varlen, "varlen_attn", old_varlen if request.param == "old varlen" else new_varlen)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash", flash)
    return {
        "row_by_row": lambda *given: attention._row_by_row(*given, dropout=0.0),
        "padded": lambda *given: attention._padded(*given, dropout=0.0),
        "named kernel": lambda *given: attention._named_kernel(*given, dropout=0.0, module=None, name="flash"),
    }.get(request.param, attention._varlen)


def test_every_route_is_exact_in_outputs_and_gradients(route):
    for number, layout in enumerate(layouts()):
        states, gradient = inputs(sum(layout[0]) + sum(layout[1]), 4, kv_heads=(4, 2)[number % 2], seed=number)
        scaling = (1.0, 0.3)[number % 3 > 0]
        output = route(*states, PackLayout.of(*layout), scaling)
        expected = dense(*states, layout, scaling)
        torch.testing.assert_close(output, expected, msg=f"{layout}")
        found = torch.autograd.grad(output, states, gradient)
        torch.testing.assert_close(found, torch.autograd.grad(expected, states, gradient), msg=f"{layout}")


def test_half_precision_sums_the_gradients_of_a_prefix_as_float32_does(route):
    layout = ((4,), (2,) * 200, (0,) * 200)
    states, gradient = inputs(404, dtype=torch.bfloat16)
    gradient = gradient + 1  # a common part, so that the sum grows
    exact = [x.detach().double().requires_grad_() for x in states]
    pack = PackLayout.of(*layout)
    found = torch.autograd.grad(route(*states, pack, 0.5), states[2], gradient)[0][:, :, :4]
    reference = torch.autograd.grad(dense(*exact, layout, 0.5), exact[2], gradient.double())[0][:, :, :4]
    assert (found - reference).norm() < 0.01 * reference.norm()


def test_positions_and_order_of_a_pack():
    pack = PackLayout.of((3, 2), (4, 1, 5), (1, -1, 0))
    assert pack.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 0, 3, 4, 5, 6, 7]
    assert pack.tokens == 15 and pack.max_seqlen == 8 and pack.cu_seqlens.tolist() == [0, 3, 5, 11, 12, 20]
    moved = pack.to("meta", non_blocking=True)
    assert moved.row_lengths == (4, 1, 5) and {moved.gather.device.type, moved.cu_seqlens.device.type} == {"meta"}
    for wrong in (((), (), ()), ((3,), (0,), (0,)), ((3,), (2,), (1,)), ((3,), (2, 2), (0,)), ((0,), (2,), (0,))):
        with pytest.raises(ValueError):
            PackLayout.of(*wrong)


def test_autocast_brings_all_to_one_type(monkeypatch):
    layout = ((3,), (4, 6), (0, -1))
    states, _ = inputs(13, dtype=torch.float32)
    mixed = [states[0], states[1], states[2].bfloat16()]
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = packed_attention(None, *mixed, None, pack=PackLayout.of(*layout))
        monkeypatch.setattr(attention, "_named_kernel", lambda *given: [x.dtype for x in given[:3]])
        given, _ = packed_attention(None, *mixed, None, pack=PackLayout.of(*layout), pack_kernel="flash")
    assert given == [torch.bfloat16] * 3, "before the route is chosen"
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), dense(*states, layout, 0.5), atol=0.03, rtol=0.03)


@pytest.mark.parametrize("route", [attention._row_by_row, attention._padded])
def test_dropout_keeps_the_mean(route):
    layout = ((3,), (2, 4), (0, -1))
    states = [x.expand(-1, 4000, -1, -1) for x in inputs(9, heads=1, kv_heads=1, dtype=torch.float32)[0]]
    torch.manual_seed(0)
    output = route(*states, PackLayout.of(*layout), 0.5, 0.5)
    assert output.std(2).min() > 0.01
    torch.testing.assert_close(output.mean(2), dense(*states, layout, 0.5).mean(2), atol=0.15, rtol=0)


@pytest.mark.parametrize(
    "dtype, dropout, kernel, expected",
    [
        (torch.bfloat16, 0.0, None, "_varlen"),
        (torch.float16, 0.1, None, "_padded"),
        (torch.float32, 0.0, None, "_padded"),
        (torch.float32, 0.0, "flash_attention_2", "_padded"),
        (torch.bfloat16, 0.1, "flash_attention_2", "_named_kernel"),
    ],
)
def test_routes_on_a_gpu(dtype, dropout, kernel, expected, monkeypatch):
    for name in ("_varlen", "_padded", "_named_kernel", "_row_by_row"):
        monkeypatch.setattr(attention, name, lambda *given, name=name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with FakeTensorMode():  # tensors of a device that is not there
        query = torch.empty((1, 2, 15, 8), dtype=dtype, device="cuda")
    pack = PackLayout.of((3, 2), (4, 1, 5), (1, -1, 0))
    taken, _ = packed_attention(None, query, query, query, None, dropout, pack=pack, pack_kernel=kernel)
    assert taken == expected
    pack = PackLayout.of((3, 2), (14, 1, 1, 1), (1, -1, 0, 0))  # filled up to 16 tokens, six sequences would be 96
    if expected == "_padded":
        with FakeTensorMode():
            query = torch.empty((1, 2, 22, 8), dtype=dtype, device="cuda")
        assert packed_attention(None, query, query, query, None, dropout, pack=pack)[0] == "_row_by_row"


@pytest.mark.parametrize(
    "capability, size, expected",
    [
        ((8, 0), 128, True),
        ((7, 0), 128, False),
        ((9, 0), 100, False),
        ((9, 0), 512, False),
    ],
)
def test_varlen_is_left_where_its_kernel_would_fail(capability, size, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        query = torch.empty((1, 2, 15, size), dtype=torch.float16, device="cuda")
    assert attention._takes_varlen(query, query) == expected


def test_the_varlen_attn_of_this_torch_takes_the_arguments():
    pack = PackLayout.of((3, 2), (4, 1, 5), (1, -1, 0)).to("meta")  # shapes without values
    query, key = (torch.empty((1, h, 15, 8), dtype=torch.float16, device="meta", requires_grad=True) for h in (4, 2))
    output = attention._varlen(query, key, key, pack, 0.5)
    assert output.shape == (1, 15, 4, 8)
    output.sum().backward()
    assert key.grad.shape == key.shape


def test_what_is_not_implemented_is_refused():
    states, _ = inputs(10)
    pack, module = PackLayout.of((3,), (4, 3), (0, 0)), SimpleNamespace(is_causal=True)
    packed_attention(module, *states, None, pack=pack, sliding_window=7, softcap=None, use_cache=False)
    for name, value in (
        ("softcap", 5.0),
        ("s_aux", torch.ones(2)),
        ("position_bias", torch.ones(1)),
        ("sliding_window", 6),
        ("is_causal", False),
        ("output_attentions", True),
    ):
        with pytest.raises(NotImplementedError, match=name):
            packed_attention(module, *states, None, pack=pack, **{name: value})
    with pytest.raises(NotImplementedError, match="attention_mask"):
        packed_attention(module, *states, torch.ones(1), pack=pack)
    with pytest.raises(NotImplementedError, match="is_causal"):
        packed_attention(SimpleNamespace(is_causal=False), *states, None, pack=pack)
    with pytest.raises(UsageError, match="Use padded batches"):
        packed_attention(module, *states, None)
    with pytest.raises(ValueError, match="10 tokens"):
        packed_attention(module, *inputs(11)[0], None, pack=pack)


@pytest.fixture
def registered(monkeypatch):
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for interface in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        monkeypatch.setattr(type(interface), "_global_mapping", dict(interface._global_mapping))
    attention.register()


def test_packs_do_not_compile_anew(registered):
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaDecoderLayer

    config = LlamaConfig(hidden_size=24, num_attention_heads=2, num_key_value_heads=1, intermediate_size=40)
    config._attn_implementation = attention.NAME
    graphs, compiled = [], []
    torch._dynamo.reset()
    layer = torch.compile(
        LlamaDecoderLayer(config, 0), backend=lambda graph, _: graphs.append(graph) or graph.forward, dynamic=True
    )
    for layout in [((3, 2), (4, 2, 5), (1, -1, 0)), ((3, 2), (6,), (1,)), ((), (7, 1), (-1, -1)), ((4,), (9,), (0,))]:
        pack = PackLayout.of(*layout)
        angles = torch.ones(1, pack.tokens, 12)
        layer(torch.randn(1, pack.tokens, 24), position_embeddings=(angles, angles), pack=pack).sum().backward()
        compiled.append(len(graphs))
    assert compiled[0] > 0 and len(set(compiled)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_a_model_sees_rows_as_if_alone(architecture, tiny, registered):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny(architecture), dtype=torch.float32).eval()
    layout = ((5, 3), (4, 1, 9, 2), (1, 0, -1, 0))
    pack, rows = PackLayout.of(*layout), tokens_of_rows(*layout)
    ids = torch.randint(5, 60, (1, pack.tokens), generator=torch.Generator().manual_seed(0))
    alone = [model(input_ids=ids[:, places], use_cache=False).logits for places in rows]
    model.config._attn_implementation = attention.NAME
    packed = model(input_ids=ids, position_ids=pack.position_ids[None], use_cache=False, pack=pack).logits
    for places, logits in zip(rows, alone):
        torch.testing.assert_close(packed[:, places], logits, atol=1e-5, rtol=1e-5)
