"""Tokenizer files of strangers open or end in a message, whatever transformers, tokenizers or sentencepiece raise."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.goldens import golden_tokenizer

from alpaca.common.errors import InputError, UsageError
from alpaca.data.chat_template import chat_template
from alpaca.data.prompts import PROMPT_DICT
from alpaca.data.tokenizer import copy_slow_files, open_tokenizer
from alpaca.models.load import load_tokenizer
from train import preprocess

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json")
ODD = [None, True, 5, -1, 1.5, "", [], {}, ["a"], {"content": 5}, {"content": ""}, "</s>", "早", 10**30, [[1, 2]]]
KEYS = ["add_eos_token", "tokenizer_class", "eos_token", "pad_token", "model_max_length", "extra_special_tokens"]
KEYS += ["chat_template", "added_tokens_decoder", "padding_side", "additional_special_tokens", "auto_map"]


@pytest.fixture(scope="module", params=["llama", "opt"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    golden_tokenizer(request.param).save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    (folder / "config.json").write_text(json.dumps({"model_type": request.param}))
    return folder


def use(folder: Path, add: bool) -> None:
    """What happens to a tokenizer before a model is loaded."""
    model_args = SimpleNamespace(model_name_or_path=str(folder), pad_token=None, add_missing_tokens=add)
    training_args = SimpleNamespace(model_max_length=64, cache_dir=None, process_index=0)
    tokenizer, _ = load_tokenizer(model_args, training_args)
    assert preprocess(["Hi:"], ["you" + tokenizer.eos_token], tokenizer)["lengths"][0] > 0
    chat_template(tokenizer, PROMPT_DICT)


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
        ("special_tokens_map.json", '{"eos_token": {"content": 5}}'),
        ("special_tokens_map.json", "5"),
        ("config.json", '{"model_type": ["llama"]}'),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}'),
        ("tokenizer.json", ""),
    ],
)
def test_a_damaged_tokenizer_is_one_message(saved, tmp_path, name, content):
    folder = Path(shutil.copytree(saved, tmp_path / "m"))
    (folder / name).write_text(content)
    with pytest.raises(InputError) as caught:
        open_tokenizer(str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_code_beside_a_tokenizer_is_neither_run_nor_asked_about(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder = Path(shutil.copytree(saved, tmp_path / "m"))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Y:\n    pass\n")
    for stated in ({"tokenizer_class": "Y"}, {"tokenizer_class": "LlamaTokenizer"}, {}):
        config = {"auto_map": {"AutoTokenizer": ["own.Y", None]}, **stated}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        try:
            open_tokenizer(str(folder))
        except InputError as error:
            assert str(folder) in str(error)
        assert not (tmp_path / "ran").exists()


def test_a_vocabulary_with_gaps_and_no_end(tmp_path):
    """Ids 0, 7 and 900: opened as it is; a token that were added would have another id in the saved tokenizer."""
    model = {"type": "BPE", "vocab": {"a": 0, "b": 7, "c": 900}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert open_tokenizer(str(tmp_path))("abc")["input_ids"] == [0, 7, 900]
    with pytest.raises(UsageError, match="ids of .* have a gap"):
        use(tmp_path, add=True)
    with pytest.raises(InputError, match="has no end-of-text token"):
        use(tmp_path, add=False)


@pytest.mark.parametrize("content", ["[]", '{"a": {}}', "{}", "["])
def test_slow_files_that_are_damaged_are_left_out(tmp_path, capsys, content):
    base, folder = tmp_path / "base", tmp_path / "tuned"
    for path in (base, folder):
        path.mkdir()
    (base / "vocab.json").write_text(content)
    (base / "merges.txt").write_text("")
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}, "added_tokens": []}')
    copy_slow_files(base, folder)
    assert "are left out" in capsys.readouterr().out and not (folder / "vocab.json").exists()


def places(value, before=()):
    if before:
        yield before
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in list(items)[:30]:
        yield from places(part, (*before, name))


def mutated(value: dict, draw: random.Random) -> dict:
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        *way, last = draw.choice(list(places(value)) or [("model_type",)])
        at = value
        for name in way:
            at = at[name]
        kind = draw.randrange(3)
        if kind == 0 and isinstance(at, dict):
            at.pop(last, None)
        else:
            name = draw.choice(KEYS) if kind == 1 and isinstance(at, dict) else last
            at[name] = json.loads(json.dumps(draw.choice(ODD)))
    return value


def check_mutations(saved: Path, tmp_path: Path, name: str, count: int) -> None:
    for number in range(count):
        draw, folder = random.Random(f"{saved.name} {name} {number}"), tmp_path / str(number)
        shutil.copytree(saved, folder)
        (folder / name).write_text(json.dumps(mutated(json.loads((folder / name).read_text()), draw)))
        try:
            use(folder, draw.choice([True, False]))
        except UsageError as error:
            assert str(folder) in str(error)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_few_mutations(saved, tmp_path, name):
    check_mutations(saved, tmp_path, name, 6)


@pytest.mark.stress
@pytest.mark.parametrize("name", FILES)
def test_a_hundred_mutations(saved, tmp_path, name):
    check_mutations(saved, tmp_path, name, 100)
