"""Special tokens, embedding rows and dtypes, on real tiny models."""

import json
import shutil

import pytest
import torch
from support.arguments import arguments
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from alpaca.common.errors import UsageError
from alpaca.models.embeddings import resize_embeddings
from alpaca.models.load import load_model, load_tokenizer


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])  # untied, tied
def test_new_rows_are_the_mean_of_the_old_ones(tiny, architecture):
    path = tiny(architecture)
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    before = [model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone()]
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (architecture == "gpt2")
    train.smart_tokenizer_and_embedding_resize({"pad_token": "[PAD]"}, tokenizer, model)
    after = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    for old, new in zip(before, after):
        assert new.shape[0] == old.shape[0] + 1 == len(tokenizer) == model.config.vocab_size
        assert torch.equal(new[:-1], old)
        torch.testing.assert_close(new[-1], old.mean(dim=0))
    assert (after[0] is after[1]) == tied
    assert tokenizer.pad_token_id == len(tokenizer) - 1


def test_a_vocabulary_larger_than_the_tokenizer_shrinks_as_in_2023(tiny, tmp_path):
    """OPT: 50272 rows, 50265 tokens, a pad token of its own."""
    model_args, training_args = arguments(tmp_path, tiny("opt"))
    tokenizer, added = load_tokenizer(model_args, training_args)
    model = load_model(model_args, training_args)
    assert added == 0 and tokenizer.pad_token == "<pad>" and model.config.vocab_size == len(tokenizer) + 7
    old = model.get_input_embeddings().weight.clone()
    resize_embeddings(model, added, len(tokenizer))
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().weight.shape[0]
    assert torch.equal(model.get_input_embeddings().weight, old[: len(tokenizer)])


@pytest.mark.parametrize("spelling", ["LlamaTokenizer", "LLaMATokenizer"])
def test_an_empty_special_token_counts_as_missing(tiny, tmp_path, spelling):
    """The first LLaMA conversions named bos, eos and unk "": the defaults are those of the sentencepiece model."""
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.update(bos_token="", eos_token="", unk_token="")
    config.update(tokenizer_class=spelling, model_max_length=10**30)
    config.pop("add_bos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, added = load_tokenizer(*arguments(tmp_path, folder))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.pad_token == "[PAD]" and added == 1 and tokenizer.model_max_length == 512
    assert tokenizer("a b")["input_ids"] == AutoTokenizer.from_pretrained(tiny("llama"))("a b")["input_ids"]


def test_pad_token_may_be_an_existing_token(tiny, tmp_path):
    tokenizer, added = load_tokenizer(*arguments(tmp_path, tiny("gpt2"), pad_token="!"))
    assert added == 0 and tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids("!")
    with pytest.raises(UsageError, match="nonsense: is not a token of "):
        load_tokenizer(*arguments(tmp_path, tiny("gpt2"), pad_token="nonsense"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_are_float32_whatever_the_checkpoint(tiny, tmp_path, dtype):
    AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=dtype).save_pretrained(tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    model = load_model(*arguments(tmp_path, tmp_path / "half"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_sampling_values_without_do_sample_can_be_saved(tiny, tmp_path, capsys):
    from alpaca.models.load import repair_generation_config

    model = load_model(*arguments(tmp_path, tiny("llama")))
    model.generation_config.temperature, model.generation_config.top_p = 0.9, 0.6
    with pytest.raises(ValueError):
        model.save_pretrained(tmp_path / "saved")
    repair_generation_config(model, 0, 0)
    model.save_pretrained(tmp_path / "saved")
    assert model.generation_config.temperature == 0.9 and "do_sample" in capsys.readouterr().out
    repair_generation_config(model, 0, 0)
    assert not capsys.readouterr().out


def test_attn_implementation_reaches_the_model(tiny, tmp_path):
    model = load_model(*arguments(tmp_path, tiny("llama"), attn_implementation="eager"))
    assert model.config._attn_implementation == "eager"


def test_tiny_models_are_reproducible(tmp_path):
    from conftest import largest_difference

    from scripts.make_tiny_model import make_tiny_model

    texts = ["Some text to learn pieces from, 123."] * 20 + ["Another line: naïve façade."] * 20
    a, b = (make_tiny_model(tmp_path / name, texts=texts, vocab_size=350) for name in "ab")
    assert largest_difference(a, b) == 0
    assert (a / "tokenizer.model").read_bytes() == (b / "tokenizer.model").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(a)
    assert tokenizer.decode(tokenizer("早上好 🙂\n\ttab")["input_ids"], skip_special_tokens=True) == "早上好 🙂\n\ttab"
