"""The diff format of 2023: what its code wrote recovers as it recovered, and what we write it would recover."""

import json
import os
import shutil

import pytest
import torch
from conftest import GOLDEN, run
from support.checkpoints import assert_same, make, recover, state_of, tune, write
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import weight_diff
from alpaca.common.errors import UsageError
from alpaca.weights import float_diff, recovery
from alpaca.weights.float_diff import inv_freq
from alpaca.weights.mismatch import aliases_of, ties_embeddings
from alpaca.weights.reader import open_weights
from alpaca.weights.recovery import NaiveSum, open_diff, recover_in_memory

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
    return dict(sorted((state | buffers).items(), key=lambda item: float_diff.position_in_llama(item[0])))


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
    monkeypatch.setattr(recovery, "SUM_OF_ALPACA_7B", total)
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
        with open_weights(tiny(architecture)) as weights:
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
    with pytest.raises(UsageError, match="--path_diff .*: is in the format of 2023, which has no digest"):
        recover(base, diff, digest="0" * 64)


# ---- tensors with two names, which 2023's loop visits twice ----

TIED = {"opt": "model.decoder.embed_tokens.weight", "llama_tied": "model.embed_tokens.weight"}


def golden(kind) -> dict:
    return {name: GOLDEN / "weight_diff_tied" / kind / name for name in ("raw", "tuned", "diff", "recovered")}


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text()) | values
    config = {name: value for name, value in config.items() if value != "omitted"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def share(folder, template, state, alias, name, **config):
    """A checkpoint in one .bin file, in which two names share their memory."""
    write(folder, template, {}, **config)
    (folder / "model.safetensors").unlink()
    torch.save(state | {alias: state[name]}, folder / "pytorch_model.bin")
    return folder


def twice(base, other, sign) -> torch.Tensor:
    """In 2023's order of operations, which decides the last bits."""
    return (other + sign * base) + sign * base


@pytest.mark.parametrize("kind", TIED)
def test_the_golden_diff_of_a_tied_model(kind, tmp_path):
    golds, name = golden(kind), TIED[kind]
    raw, expected = state_of(golds["raw"]), state_of(golds["recovered"])
    assert torch.equal(expected[name], twice(raw[name], state_of(golds["diff"])[name], 1))
    recover(golds["raw"], golds["diff"], tmp_path / "result")
    assert_same(tmp_path / "result", expected)
    for folder in (golds["recovered"], tmp_path / "result"):
        weight_diff.verify(str(golds["diff"]), str(folder), path_raw=str(golds["raw"]))
    once = write(tmp_path / "once", golds["raw"], expected | {name: state_of(golds["diff"])[name] + raw[name]})
    with pytest.raises(UsageError, match=f"{name} is not the sum of base and diff, but of the diff and once the base"):
        weight_diff.verify(str(golds["diff"]), str(once), path_raw=str(golds["raw"]))
    model, _ = weight_diff.recover(str(golds["raw"]), str(golds["diff"]))
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items() if key in expected)


def test_what_was_done_is_not_said_before_it_is_refused(tmp_path, capsys, monkeypatch):
    golds = golden(next(iter(TIED)))
    monkeypatch.setattr(float_diff.FloatDiff, "notes", lambda self: ["note: this was done"])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").touch()
    with pytest.raises(UsageError, match="already exists"):
        recover(golds["raw"], golds["diff"], tmp_path / "taken")
    assert "note" not in capsys.readouterr().out
    recover(golds["raw"], golds["diff"], tmp_path / "result")
    assert capsys.readouterr().out.startswith("note: this was done\n")


@pytest.mark.parametrize("kind", TIED)
def test_the_golden_diff_of_a_tied_model_is_written(kind, tmp_path):
    golds = golden(kind)
    make(golds["raw"], golds["tuned"], tmp_path / "diff", method="float")
    assert_same(tmp_path / "diff", state_of(golds["diff"]))
    written = state_of(tmp_path / "diff")
    assert list(written) == list(state_of(golds["diff"])), "in the order of the state dict"
    assert written["lm_head.weight"].data_ptr() == written[TIED[kind]].data_ptr(), "one tensor by two names"
    assert (tmp_path / "diff" / "pytorch_model.bin").stat().st_size < 1.1 * (
        golds["diff"] / "pytorch_model.bin"
    ).stat().st_size


@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("names", ["both names", "one name"])
def test_the_sum_counts_a_tied_tensor_by_both_names(kind, names, tmp_path):
    golds = golden(kind)
    state, total = state_of(golds["recovered"]), 0
    for tensor in state.values():
        total = total + tensor.sum()
    if names == "one name":
        folder = write(tmp_path / "diff", golds["diff"], {n: t for n, t in state_of(golds["diff"]).items()})
        part = state_of(golds["diff"])
        part.pop("lm_head.weight")
        diff = write(tmp_path / "one", folder, part)
    with open_weights(golds["raw"]) as raw:
        with open_diff(raw, diff if names == "one name" else golds["diff"]) as opened:
            naive = NaiveSum([*opened.specs], opened.weights.config, opened.aliases)
            found = recover_in_memory(opened, None, see=naive.add)
    assert naive.total() == pytest.approx(float(total), abs=1e-3 if names == "one name" else 0)
    tensors = {tensor.data_ptr() for tensor in found.values()}
    assert len(tensors) == len(state) - 1, "in memory once"


def test_ties_where_the_configuration_does_not_say():
    """The defaults of the classes of transformers 4.28.1."""
    for kind in ("opt", "gpt2", "gpt_neo", "bloom", "xglm", "gpt_bigcode", "gpt_neox_japanese", "biogpt"):
        assert ties_embeddings({"model_type": kind}), kind
        assert not ties_embeddings({"model_type": kind, "tie_word_embeddings": False}), kind
    for kind in ("llama", "gpt_neox", "gptj", "codegen", "rembert"):
        assert not ties_embeddings({"model_type": kind}), kind
        assert ties_embeddings({"model_type": kind, "tie_word_embeddings": True}), kind
    assert not ties_embeddings({})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_names_that_share_memory_in_a_file(dtype, tmp_path):
    """Without tied embeddings: 2023's model has one tensor too, unless loading cast it. Tried with its code."""
    golds, name = golden("llama_tied"), TIED["llama_tied"]
    states = {k: {n: t.to(dtype) for n, t in state_of(golds[k]).items()} for k in ("raw", "tuned")}
    untied = {"tie_word_embeddings": "omitted"}  # LLaMA's default
    raw, tuned = (
        edit_config(share(tmp_path / k, golds[k], states[k], "lm_head.weight", name), **untied) for k in states
    )
    with open_weights(tuned) as weights:
        assert aliases_of(weights) == ({"lm_head.weight": name} if dtype == torch.float32 else {})
    make(raw, tuned, tmp_path / "diff", method="float")
    base, other = (states[k][name].float() for k in ("raw", "tuned"))
    expected = twice(base, other, -1) if dtype == torch.float32 else other - base
    assert torch.equal(state_of(tmp_path / "diff")[name], expected)
    assert torch.equal(state_of(tmp_path / "diff")["lm_head.weight"], expected)
    assert json.loads((tmp_path / "diff" / "config.json").read_text())["tie_word_embeddings"] is False
    recover(raw, tmp_path / "diff", tmp_path / "result")
    torch.testing.assert_close(state_of(tmp_path / "result")[name], other, rtol=0, atol=1e-6)


def test_a_tied_base_and_an_untied_model_that_was_trained_from_it(tmp_path):
    """Each of the two tensors is visited once; of a tied model made from an untied base, one tensor by both of its."""
    golds, name = golden("llama_tied"), TIED["llama_tied"]
    apart = state_of(golds["tuned"])
    apart["lm_head.weight"] = apart["lm_head.weight"] + 1
    apart = write(tmp_path / "apart", golds["tuned"], apart, tie_word_embeddings=False)
    for raw, tuned in ((golds["raw"], apart), (apart, golds["tuned"])):
        diff = tmp_path / f"diff_of_{tuned.name}"
        make(raw, tuned, diff, method="float")
        base, other, found = state_of(raw), state_of(tuned), state_of(diff)
        expected = {key: other[key] - base[key] for key in (name, "lm_head.weight")}
        if tuned != apart:
            expected = dict.fromkeys(expected, (other[name] - base[name]) - base["lm_head.weight"])
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        recover(raw, diff, tmp_path / f"from_{raw.name}")
        for key, tensor in state_of(tmp_path / f"from_{raw.name}").items():
            torch.testing.assert_close(tensor, other[key], rtol=0, atol=1e-5)


def test_our_own_earlier_diff_of_a_tied_model_is_recognized(tiny, tmp_path, capsys):
    """It had the base subtracted once, and carries no mark."""
    name, base = TIED["opt"], state_of(tiny("opt"))
    tuned = tune(base, torch.float32, strange=False)
    earlier = write(tmp_path / "earlier", tiny("opt"), {n: t - base[n] for n, t in tuned.items()})
    tuned = write(tmp_path / "tuned", tiny("opt"), {n: (t - base[n]) + base[n] for n, t in tuned.items()})
    recover(tiny("opt"), earlier)
    told = capsys.readouterr().out
    assert f"{name} of {earlier} does not look like tuned - base - base" in told and "make it again" in told
    with pytest.raises(
        UsageError, match=f"{name} is not the sum .* but of the diff and once the base.*earlier version"
    ):
        weight_diff.verify(str(earlier), str(tuned), path_raw=tiny("opt"))
    with pytest.raises(UsageError, match="(?s)the weights sum to.*earlier version of this program"):
        recover(tiny("opt"), earlier, check_integrity_naively=True)
    make(tiny("opt"), tuned, tmp_path / "diff", method="float")
    capsys.readouterr()
    recover(tiny("opt"), tmp_path / "diff")
    assert "does not look like" not in capsys.readouterr().out


# ---- more embedding rows than tokens ----


def test_rows_that_2023_cut_are_named(tiny, tmp_path):
    """OPT has 7 rows more than tokens and a pad token: 2023's train.py cuts the rows, 2023's make_diff then fails."""
    base = state_of(tiny("opt"))
    tuned = write(tmp_path / "tuned", tiny("opt"), tune(base, torch.float32, rows=-7), vocab_size=1000)
    with pytest.raises(
        UsageError, match="takes a base of 1007 rows as it is.*1000 tokens, has a pad token, <pad>"
    ) as e:
        make(tiny("opt"), tuned, tmp_path / "diff", method="float")
    assert "An exact diff takes any number of rows" in str(e.value)
    assert "as it was published" not in str(e.value) and not (tmp_path / "diff").exists()
    make(tiny("opt"), tuned, tmp_path / "diff")
    recover(tiny("opt"), tmp_path / "diff", tmp_path / "result")
    assert_same(tmp_path / "result", state_of(tuned))


def test_all_rows_of_a_base_that_has_more_than_tokens(tiny, tmp_path):
    base, name = state_of(tiny("opt")), TIED["opt"]
    tuned = write(tmp_path / "tuned", tiny("opt"), tune(base, torch.float32, strange=False))
    make(tiny("opt"), tuned, tmp_path / "diff", method="float")
    written = state_of(tmp_path / "diff")[name]
    assert written.shape[0] == 1007 and torch.equal(written, twice(base[name], state_of(tuned)[name], -1))


def test_a_tied_base_without_a_pad_token_is_cut_to_its_tokens(tiny, tmp_path):
    base, name = state_of(tiny("opt")), TIED["opt"]
    raw = write(tmp_path / "raw", tiny("opt"), base)
    config = json.loads((raw / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (raw / "tokenizer_config.json").write_text(json.dumps(config))
    tuned = write(tmp_path / "tuned", raw, tune(base, torch.float32, rows=-6, strange=False), vocab_size=1001)
    make(raw, tuned, tmp_path / "diff", method="float")
    resized = torch.cat([base[name][:1000], base[name][:1000].mean(dim=0, keepdim=True)])
    assert torch.equal(state_of(tmp_path / "diff")[name], twice(resized, state_of(tuned)[name], -1))


@pytest.mark.parametrize("rows", [1000, 1007])
def test_an_output_bias_grows_by_zeros(rows, tiny, tmp_path):
    """GPT-J's: resizing copied what there was, and only embeddings got the mean. Tried with the code of 2023."""
    name, (raw, tuned) = "lm_head.bias", ({"transformer.wte.weight": torch.randn(n, 8)} for n in (rows, 1001))
    raw[name], tuned[name] = torch.randn(rows), torch.randn(1001)
    folders = [write(tmp_path / str(len(s[name])), tiny("gpt2"), s, model_type="gptj") for s in (raw, tuned)]
    make(*folders, tmp_path / "diff", method="float")
    resized = torch.cat([raw[name], torch.zeros(1)])[:1001]
    assert torch.equal(state_of(tmp_path / "diff")[name], tuned[name] - resized)


# ---- files that 2023's code opens ----

TEXTS = [
    "hello world",
    "two  spaces\n\nand a line",
    "a [PAD] b",
    "x</s> y",
    "<|endoftext|>",
    "<s>",
    "\u00e9\u00df 123",
    "",
]
SLOW = {"llama": {"tokenizer.model"}, "opt": {"vocab.json", "merges.txt"}, "gpt2": {"vocab.json", "merges.txt"}}


def make_neox(folder):
    """A GPT-NeoX as EleutherAI published it: no slow tokenizer, no pad token stated, more rows than tokens."""
    from tokenizers import ByteLevelBPETokenizer

    from scripts.make_tiny_model import own_text

    config = AutoConfig.for_model(
        "gpt_neox",
        vocab_size=616,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer, special = ByteLevelBPETokenizer(), ["<|endoftext|>", "<|padding|>"]
    tokenizer.train_from_iterator(own_text(), vocab_size=600, special_tokens=special, show_progress=False)
    state = json.loads(tokenizer.to_str())
    state["model"]["merges"] = [" ".join(merge) for merge in state["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(state))
    values = {"tokenizer_class": "GPTNeoXTokenizer", "model_max_length": 256}
    values |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def base_and_tuned(case, tiny, tmp_path):
    """A base as of 2023, in .bin, and a model tuned from it and saved by today's transformers, tokenizer.json only."""
    source = make_neox(tmp_path / "neox") if case == "gpt_neox" else tiny(case.partition("_")[0])
    state, tied = state_of(source), {"tie_word_embeddings": True} if case == "llama_tied" else {}
    if tied:
        state.pop("lm_head.weight")
    base = write(tmp_path / "base", source, {}, **tied)
    (base / "model.safetensors").unlink()
    torch.save(state, base / "pytorch_model.bin")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if case == "gpt_neox":
        tokenizer.pad_token = None  # today's class has one that the folder does not state
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        model.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 1e-2)
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    return base, tmp_path / "tuned"


def test_the_files_of_a_golden_diff(tmp_path):
    """Its special tokens and added tokens, which decide ids, and what its configurations say."""
    make(RAW, TUNED, tmp_path / "diff", method="float")
    found, expected = (
        {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
        for folder in (tmp_path / "diff", DIFF)
    )
    assert set(expected) - set(found) == {"tokenizer.json"}
    for name in ("special_tokens_map.json", "added_tokens.json"):
        assert found[name] == expected[name]
    for name in ("config.json", "tokenizer_config.json"):
        ours = {key: found[name].get(key) for key in expected[name]}
        theirs = expected[name] | ({"pad_token": "[PAD]"} if "pad_token" in expected[name] else {})
        assert {k: v for k, v in ours.items() if v != theirs[k]}.keys() <= {"_name_or_path", "legacy"}
    assert (tmp_path / "diff" / "tokenizer.model").read_bytes() == (DIFF / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("case", ["llama", "llama_tied", "opt", "gpt2"])
def test_slow_tokenizer_files_come_from_the_base(case, tiny, tmp_path, capsys):
    base, tuned = base_and_tuned(case, tiny, tmp_path)
    assert not (tuned / "tokenizer.model").exists() and not (tuned / "vocab.json").exists()
    make(base, tuned, tmp_path / "diff", method="float")
    names, slow = {path.name for path in (tmp_path / "diff").iterdir()}, SLOW[case.partition("_")[0]]
    added = {"added_tokens.json"} if case != "opt" else set()
    assert names == slow | added | {
        "README.md",
        "pytorch_model.bin",
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer_config.json",
    }
    config = json.loads((tmp_path / "diff" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == ("LlamaTokenizer" if "llama" in case else "GPT2Tokenizer")
    assert config["add_bos_token"] == (case != "gpt2") and config["add_eos_token"] is False
    assert "slow tokenizer" not in capsys.readouterr().out
    recover(base, tmp_path / "diff", tmp_path / "result")
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "result", tuned))
    assert ours(TEXTS).input_ids == theirs(TEXTS).input_ids and ours.pad_token == theirs.pad_token
    assert len(ours) == len(theirs)


@pytest.mark.parametrize("case,prefix", [("llama", "model."), ("opt", "model."), ("gpt2", "transformer.")])
def test_names_without_a_models_prefix_get_it(case, prefix, tiny, tmp_path):
    """2023 opens a file of such names, but not together with those of an output embedding or of rotary buffers."""
    base, tuned = base_and_tuned(case, tiny, tmp_path)
    bare = write(tmp_path / "bare", tuned, {n.removeprefix(prefix): t for n, t in state_of(tuned).items()})
    for folder in (tuned, bare):
        make(base, folder, tmp_path / f"diff_of_{folder.name}", method="float")
    assert_same(tmp_path / "diff_of_bare", state_of(tmp_path / "diff_of_tuned"))


def test_slow_files_of_another_tokenizer_are_not_taken(tiny, tmp_path, capsys):
    base, tuned = base_and_tuned("opt", tiny, tmp_path)
    vocabulary = json.loads((base / "vocab.json").read_text())
    a, b = list(vocabulary)[100:102]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (base / "vocab.json").write_text(json.dumps(vocabulary))
    make(base, tuned, tmp_path / "diff", method="float")
    out = capsys.readouterr().out
    assert f"slow tokenizer's files of {base} are left out: token {vocabulary[a]} of vocab.json is {a!r}" in out
    assert "has its slow tokenizer" in out and not (tmp_path / "diff" / "vocab.json").exists()


def test_a_base_without_a_slow_tokenizer(tiny, tmp_path, capsys):
    """GPT-NeoX: its tokenizer.json in the form of 2023, and the buffers that 2023's code computes, as zeros."""
    base, tuned = base_and_tuned("gpt_neox", tiny, tmp_path)
    make(base, tuned, tmp_path / "diff", method="float")
    told = capsys.readouterr().out
    assert told.count("\nnote: ") + told.startswith("note: ") == 1 and "has its slow tokenizer" in told
    state = json.loads((tmp_path / "diff" / "tokenizer.json").read_text())
    assert all(isinstance(merge, str) for merge in state["model"]["merges"])
    written = state_of(tmp_path / "diff")
    buffers = {name: tensor for name, tensor in written.items() if name not in state_of(tuned)}
    assert len(buffers) == 4 and not any(tensor.any() for tensor in buffers.values())
    assert written["embed_out.weight"].shape[0] == 601, "one row more than tokens; the base has 616"
    config = json.loads((tmp_path / "diff" / "config.json").read_text())
    assert (config["rotary_pct"], config["rotary_emb_base"], config["torch_dtype"]) == (0.25, 10000.0, "float32")
    recover(base, tmp_path / "diff", tmp_path / "result")
    for name, tensor in state_of(tuned).items():
        torch.testing.assert_close(state_of(tmp_path / "result")[name], tensor, rtol=0, atol=1e-6)
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "result", tuned))
    assert ours(TEXTS).input_ids == theirs(TEXTS).input_ids


def test_shards_of_a_float_diff_are_whole_archives(tiny, tmp_path):
    """Every checksum is right, the tied names stand in one file, and the index names all tensors."""
    import zipfile

    base, tuned = base_and_tuned("opt", tiny, tmp_path)
    make(base, tuned, tmp_path / "diff", method="float", max_shard_size="100KB")
    shards = sorted((tmp_path / "diff").glob("pytorch_model-*.bin"))
    assert len(shards) > 3 and all(zipfile.ZipFile(shard).testzip() is None for shard in shards)
    index = json.loads((tmp_path / "diff" / "pytorch_model.bin.index.json").read_text())
    found = {name: shard.name for shard in shards for name in torch.load(shard, weights_only=True)}
    assert index["weight_map"] == found and found["lm_head.weight"] == found[TIED["opt"]]
    make(base, tuned, tmp_path / "one", method="float")
    assert_same(tmp_path / "diff", state_of(tmp_path / "one"))


def test_a_diff_that_2023_cannot_recover_is_named(tiny, tmp_path, capsys):
    """Its code makes the embeddings of a base without a pad token a row longer than its tokenizer."""
    base = write(tmp_path / "base", tiny("llama"), state_of(tiny("llama")))
    tuned = write(tmp_path / "tuned", tiny("llama"), tune(state_of(base), torch.float32))
    make(base, tuned, tmp_path / "diff", method="float")
    assert "note: 2023's code cannot recover this diff: " in capsys.readouterr().out


# ---- the code of 2023 itself ----

OLD_PYTHON, OLD_CODE = (os.environ.get(name) for name in ("ALPACA_2023_PYTHON", "ALPACA_2023_CODE"))
IDS = """
import json, sys
from transformers import AutoTokenizer
found = []
for folder, fast in ((folder, fast) for fast in (True, False) for folder in sys.argv[2:]):
    if fast or "neox" not in folder:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=fast)
        if tokenizer.pad_token is None:
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        found.append([tokenizer(text).input_ids for text in json.loads(sys.argv[1])])
print(json.dumps(found))
"""


@pytest.mark.stress
@pytest.mark.skipif(
    not (OLD_PYTHON and OLD_CODE),
    reason="needs ALPACA_2023_PYTHON (with transformers 4.28.1) and ALPACA_2023_CODE (the folder of 2023's code)",
)
@pytest.mark.parametrize("case", ["llama", "llama_tied", "opt", "gpt2", "gpt_neox"])
def test_2023_recovers_what_we_write(case, tiny, tmp_path):
    """Its weights are ours, bit for bit, its tokenizer is that of its base with [PAD]; and it writes the same diff."""
    folder = tmp_path / case
    folder.mkdir()
    base, tuned = base_and_tuned(case, tiny, folder)
    make(base, tuned, folder / "diff", method="float", max_shard_size="50KB")
    recover(base, folder / "diff", folder / "ours")
    old = {"cwd": OLD_CODE, "env": {"PYTHONPATH": "", "HF_HOME": str(tmp_path / "hf")}}
    run(
        [
            OLD_PYTHON,
            "weight_diff.py",
            "recover",
            f"--path_raw={base}",
            f"--path_diff={folder / 'diff'}",
            f"--path_tuned={folder / 'theirs'}",
            "--check_integrity_naively=False",
        ],
        **old,
    )
    ours, theirs = state_of(folder / "ours"), state_of(folder / "theirs")
    masks = {name for name in theirs if name not in ours}
    assert ours.keys() <= theirs.keys() and all(theirs[name].dtype == torch.bool for name in masks)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    answer = run([OLD_PYTHON, "-c", IDS, json.dumps(TEXTS), base, folder / "diff", folder / "theirs"], **old)
    ids = json.loads(answer.stdout.splitlines()[-1])
    assert all(found == ids[0] for found in ids[:3]) and all(found == ids[3] for found in ids[3:])
    if not masks:  # its make_diff fails on those of GPT-2 and GPT-NeoX
        run(
            [
                OLD_PYTHON,
                "weight_diff.py",
                "make_diff",
                f"--path_raw={base}",
                f"--path_tuned={folder / 'theirs'}",
                f"--path_diff={folder / 'their_diff'}",
            ],
            **old,
        )
        make(base, folder / "theirs", folder / "our_diff", method="float")
        assert_same(folder / "our_diff", state_of(folder / "their_diff"))
