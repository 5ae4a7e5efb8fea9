"""The diff format of 2023: what its code wrote recovers as it recovered, and what we write it would recover."""

import json
import shutil

import pytest
import torch
from conftest import GOLDEN
from test_weight_diff import assert_same, make, recover, state_of, tune, write

import weight_diff
from alpaca import float_diff
from alpaca.errors import UsageError
from alpaca.float_diff import NaiveSum, inv_freq
from alpaca.weights import open_weights

RAW, TUNED, DIFF = (GOLDEN / "weight_diff" / name for name in ("raw", "tuned", "diff"))
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def of_2023(base, other, sign, inv_freq_of_base=None) -> dict[str, torch.Tensor]:
    """2023's algorithm, on whole state dicts in memory: float32, a mean row for [PAD], add_."""
    base = {name: tensor.float() for name, tensor in base.items()}
    for name in TABLES:
        rows = other[name].shape[0] - 1
        base[name] = torch.cat([base[name][:rows], base[name][:rows].mean(dim=0, keepdim=True)])
    added = {name: base.get(name, inv_freq_of_base) for name in other}
    return {name: tensor.float() + sign * added[name] for name, tensor in other.items()}


def with_inv_freq(state, config) -> dict[str, torch.Tensor]:
    """In the order of 2023's state dict, which the file of 2023 has."""
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": inv_freq(config) for i in range(2)}
    return dict(sorted((state | buffers).items(), key=lambda item: float_diff._position_in_llama(item[0])))


def give_pad_token(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<unk>"}))


@pytest.fixture
def released(tiny, tmp_path):
    """Alpaca-7B in miniature: a float16 base as converted today, without pad token and rotary buffers; a tuned model a
    row longer; the diff that 2023 wrote, .bin shards in float32 with the buffers. (base, tuned state, diff)"""
    state = {name: tensor.half() for name, tensor in state_of(tiny("llama")).items()}
    base = write(tmp_path / "base", tiny("llama"), state)
    config = json.loads((base / "config.json").read_text())
    tuned = with_inv_freq(tune(state, torch.float32, rows=1, strange=False), config)
    difference = of_2023(state, tuned, -1, inv_freq(config))
    diff = write(tmp_path / "diff", tiny("llama"), difference, "bin", vocab_size=tuned["lm_head.weight"].shape[0])
    return base, tuned, diff


def test_the_golden_diff_recovers_exactly(tmp_path):
    recover(RAW, DIFF, tmp_path / "result")
    assert_same(tmp_path / "result", state_of(TUNED))
    for name in ("tokenizer.model", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "result" / name).read_bytes() == (DIFF / name).read_bytes()
    model, tokenizer = weight_diff.recover(str(RAW), str(DIFF))
    assert all(torch.equal(tensor, state_of(TUNED)[name]) for name, tensor in model.state_dict().items())
    assert tokenizer.pad_token == "[PAD]" and len(tokenizer) == 901


def test_the_golden_diff_is_written_exactly(tmp_path):
    make(RAW, TUNED, tmp_path / "diff", method="float")
    assert_same(tmp_path / "diff", state_of(DIFF))
    recover(RAW, tmp_path / "diff", tmp_path / "result")
    assert_same(tmp_path / "result", state_of(TUNED))


def test_the_released_diff_in_miniature(released, tmp_path, capsys, monkeypatch):
    base, tuned, diff = released
    expected = of_2023(state_of(base), state_of(diff), 1, inv_freq(json.loads((base / "config.json").read_text())))
    recover(base, diff, tmp_path / "result")
    assert_same(tmp_path / "result", expected)
    for name, tensor in tuned.items():
        torch.testing.assert_close(expected[name], tensor, rtol=0, atol=1e-6)
    total = float(sum(expected[name].sum() for name in tuned))
    assert f"the weights sum to {total:.4f} (the released Alpaca-7B: 50637.1836)" in capsys.readouterr().out
    monkeypatch.setattr(float_diff, "SUM_OF_ALPACA_7B", total)
    recover(base, diff, tmp_path / "checked", check_integrity_naively=True)
    assert f"naive integrity check: the weights sum to {total:.4f}, as those of the released" in capsys.readouterr().out
    weight_diff.verify(str(diff), str(tmp_path / "result"), path_raw=str(base))
    with pytest.raises(UsageError, match="is in the format of 2023, without digests; give --path_raw too"):
        weight_diff.verify(str(diff), str(tmp_path / "result"))


def test_a_wrong_sum_is_an_error_only_where_it_was_asked_for(released, tmp_path, capsys):
    base, _, diff = released
    with pytest.raises(UsageError, match="--check_integrity_naively: the weights sum to .* base or diff is damaged or"):
        recover(base, diff, tmp_path / "result", check_integrity_naively=True)
    assert not list(tmp_path.glob("result*"))
    recover(base, diff, check_integrity_naively=False)
    assert "sum to" not in capsys.readouterr().out


def test_the_sum_is_that_of_2023(tiny):
    """In the order of the model, which is not that of the file; a tied embedding counts twice, as in a state dict."""
    for architecture in ("llama", "gpt2"):
        with open_weights(tiny(architecture), "--path") as weights:
            config = weights.config | ({"tie_word_embeddings": True} if architecture == "gpt2" else {})
            specs = [float_diff.Spec(t.name, t.dtype, t.shape) for t in weights.tensors.values()]
            naive, state = NaiveSum(specs, config), state_of(tiny(architecture))
            for spec in specs:
                flat = state[spec.name].view(-1)
                for start in range(0, len(flat), 700):
                    naive.add(spec, start, flat[start : start + 700])
        if architecture == "llama":
            state = with_inv_freq(state, config)
        else:
            state["lm_head.weight"] = state["transformer.wte.weight"]
        assert naive.total() == float(sum(tensor.sum() for tensor in state.values()))


def test_sum_of_the_rotary_frequencies_of_7b():
    """238.72 of the released sum; left out, it would fail."""
    total = 32 * inv_freq({"hidden_size": 4096, "num_attention_heads": 32}).sum()
    assert abs(float(total) - 238.72) < 0.01


def test_2023_could_recover_what_we_write(tiny, tmp_path):
    """Its reader computes rotary buffers that a file lacks, in the diff too: the diff must hold them, as zeros."""
    state = state_of(tiny("llama"))
    base = write(tmp_path / "base", tiny("llama"), state)
    tuned = write(tmp_path / "tuned", tiny("llama"), tune(state, torch.bfloat16, rows=1, strange=False))
    make(base, tuned, tmp_path / "diff", method="float")
    written, config = state_of(tmp_path / "diff"), json.loads((base / "config.json").read_text())
    buffers = {name: tensor for name, tensor in written.items() if name.endswith("inv_freq")}
    assert len(buffers) == 2 and all(tensor.shape == inv_freq(config).shape for tensor in buffers.values())
    assert not any(tensor.any() for tensor in buffers.values())
    recovered = of_2023(state, written, 1, inv_freq(config))
    for name, tensor in state_of(tuned).items():
        torch.testing.assert_close(recovered[name], tensor.float(), rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "diff" / "config.json").read_text())["dtype"] == "float32"
    recover(base, tmp_path / "diff", tmp_path / "result")
    assert_same(tmp_path / "result", recovered)
    recover(base, tmp_path / "diff", tmp_path / "half", dtype="float16")
    assert state_of(tmp_path / "half")["lm_head.weight"].dtype == torch.float16


def test_a_padded_vocabulary_was_cut_to_the_tokenizer(tiny, tmp_path):
    """2023 resized a base without a pad token to its tokenizer + 1, whatever rows it had beyond (Pythia, for one)."""
    state = state_of(tiny("llama"))
    padded = {n: torch.cat([t, torch.full((27, t.shape[1]), 9.0)]) if n in TABLES else t for n, t in state.items()}
    base = write(tmp_path / "base", tiny("llama"), padded)
    tuned = write(tmp_path / "tuned", tiny("llama"), tune(state, torch.float32, rows=1, strange=False))
    expected = of_2023(padded, state_of(tuned), -1)
    make(base, tuned, tmp_path / "diff", method="float")
    found = state_of(tmp_path / "diff")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    recover(base, tmp_path / "diff", tmp_path / "result")
    torch.testing.assert_close(state_of(tmp_path / "result")["lm_head.weight"], state_of(tuned)["lm_head.weight"])


@pytest.mark.parametrize("tokenizer", ["has a pad token", "is damaged"])
def test_a_base_whose_tokenizer_does_not_say_it(released, tmp_path, capsys, tokenizer):
    """Another conversion may have a pad token among its 32000, or a tokenizer that does not open: the rows decide."""
    base, _, diff = released
    recover(base, diff, tmp_path / "expected")
    if tokenizer == "is damaged":
        (base / "tokenizer_config.json").write_text("{")
    else:
        give_pad_token(base)
    capsys.readouterr()
    recover(base, diff, tmp_path / "result")
    assert_same(tmp_path / "result", state_of(tmp_path / "expected"))
    assert ("tokenizer cannot be read" in capsys.readouterr().out) == (tokenizer == "is damaged")


def test_tensors_that_are_left_out_are_counted(released, tmp_path, capsys):
    base, _, diff = released
    mask = {"model.mask": torch.ones(3, dtype=torch.bool)}
    recover(base, write(tmp_path / "with_mask", diff, state_of(diff) | mask), tmp_path / "result")
    assert "note: 1 tensors that are not of floats are left out: model.mask" in capsys.readouterr().out
    assert "model.mask" not in state_of(tmp_path / "result")


def test_what_speaks_against_a_base_is_said(released, tmp_path, capsys):
    """Nothing in the format proves a base: Llama-2's shapes are LLaMA's, and a diff has the shapes of a model."""
    base, _, diff = released
    config = json.loads((base / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (base / "config.json").write_text(json.dumps(config))
    recover(base, diff)
    assert "is 4096, expected 2048 (4096 positions are Llama-2's, 2048 LLaMA's" in capsys.readouterr().out
    recover(shutil.copytree(diff, tmp_path / "copy"), diff)
    assert "model.norm.weight of" in (told := capsys.readouterr().out) and "is that a diff given as the base?" in told


def test_a_diff_given_as_the_base_is_named_though_its_shapes_differ(capsys):
    with pytest.raises(UsageError, match="(?s)1 row longer.* is nearly zero; is that a diff given as the base"):
        recover(DIFF, RAW)
    with pytest.raises(UsageError, match="(?s)no such folder|missing|longer|does not fit|is far from zero") as error:
        recover(TUNED, RAW)
    assert "is far from zero; is that a model given as the diff?" in str(error.value)


def test_a_base_without_config_takes_the_diffs(released, tmp_path):
    base, _, diff = released
    recover(base, diff, tmp_path / "expected")
    (base / "config.json").unlink()
    recover(base, diff, tmp_path / "result")
    assert_same(tmp_path / "result", state_of(tmp_path / "expected"))


def test_shapes_that_do_not_fit(released, tmp_path):
    base, _, diff = released
    longer = {n: torch.cat([t, t[:5]]) if n in TABLES else t for n, t in state_of(base).items()}
    longer = write(tmp_path / "longer", base, longer)
    give_pad_token(longer)
    with pytest.raises(UsageError, match=r"vocabulary is 4 rows longer than expected"):
        recover(longer, diff)
    part = {name: tensor for name, tensor in state_of(base).items() if "layers.1" not in name}
    with pytest.raises(UsageError, match="tensors are missing.*\n    9 missing in the base: model.layers.1"):
        recover(write(tmp_path / "part", base, part), diff)
    with pytest.raises(UsageError, match="--digest: .* is in the format of 2023, which has none"):
        recover(base, diff, digest="0" * 64)
