"""Token ids and labels are those of the 2023 code; what is deliberately different is tested as such."""

import json
import random

import pytest
import tokenizers
import torch
from conftest import GOLDEN, SHARED
from support.goldens import golden_tokenizer, texts_of
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

import train
from alpaca.data.prompts import PROMPT_DICT, format_prompt
from alpaca.data.tokenization import IGNORE_INDEX, ragged, starts_with
from train import DataCollatorForSupervisedDataset, SupervisedDataset, preprocess


def as_in_2023(sources, targets, tokenizer):
    """The 2023 algorithm, written anew: tokenize source + target and source alone, mask as many labels."""
    for source, target in zip(sources, targets):
        ids, prompt = (tokenizer(text, truncation=True)["input_ids"] for text in (source + target, source))
        yield ids, [IGNORE_INDEX] * len(prompt) + ids[len(prompt) :]


@pytest.mark.parametrize("max_length", [512, 96])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_ids_and_labels_equal_the_golden_ones(name, max_length):
    tokenizer = golden_tokenizer(name, max_length)
    golden = json.loads((GOLDEN / "labels" / f"labels_{name}_{max_length}.json").read_text())
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (golden["pad_token_id"], golden["eos_token_id"])
    rows = json.loads((GOLDEN / "labels" / "examples.json").read_text())
    result = preprocess(*texts_of(rows, tokenizer), tokenizer)
    assert len(result["input_ids"]) == len(golden["rows"]) == 40
    for ids, labels, expected in zip(result["input_ids"], result["labels"], golden["rows"]):
        first = expected["first_label"]
        assert ids.tolist() == expected["input_ids"]
        assert labels.tolist() == [IGNORE_INDEX] * first + expected["input_ids"][first:]


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_ids_and_labels_equal_2023_on_real_rows(name):
    files = [SHARED / "alpaca_data_1k.json", SHARED / "alpaca_en_demo.json"]
    if not files[0].exists():
        pytest.skip("the real Alpaca rows are not here")
    tokenizer = golden_tokenizer(name)
    rows = [row for file in files for row in json.loads(file.read_text())]
    rows = [row for row in rows if not any(token in str(row) for token in tokenizer.all_special_tokens)]
    sources, targets = texts_of(rows, tokenizer)
    result = preprocess(sources, targets, tokenizer)
    for i, (ids, labels) in enumerate(as_in_2023(sources, targets, tokenizer)):
        assert (result["input_ids"][i].tolist(), result["labels"][i].tolist()) == (ids, labels), rows[i]


@pytest.mark.parametrize("max_length", [512, 96])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_function_of_2023_that_forks_import(name, max_length):
    tokenizer = golden_tokenizer(name, max_length)
    golden = json.loads((GOLDEN / "labels" / f"labels_{name}_{max_length}.json").read_text())["rows"]
    sources, targets = texts_of(json.loads((GOLDEN / "labels" / "examples.json").read_text()), tokenizer)
    whole = train._tokenize_fn([source + target for source, target in zip(sources, targets)], tokenizer)
    assert [ids.tolist() for ids in whole["input_ids"]] == [row["input_ids"] for row in golden]
    assert whole["labels"] is whole["input_ids"] and whole["labels_lens"] == whole["input_ids_lens"]
    assert train._tokenize_fn(sources, tokenizer)["input_ids_lens"] == [row["first_label"] for row in golden]
    padded = train._tokenize_fn([f"a{tokenizer.pad_token} b", ""], tokenizer)
    assert padded["input_ids_lens"][0] == len(padded["input_ids"][0]) - 1
    assert padded["input_ids"][1].dtype == torch.long


def one_by_one(sources, targets, tokenizer, apart):
    """Ids and labels of every row by calls of the tokenizer for single texts."""
    eos, limit = tokenizer.eos_token, tokenizer.model_max_length
    for source, target in zip(sources, targets):
        answer, end = target.removesuffix(eos), [tokenizer.eos_token_id] * target.endswith(eos)
        prompt = tokenizer(source, split_special_tokens=True)["input_ids"]
        if apart:
            row = prompt + tokenizer(answer, split_special_tokens=True, add_special_tokens=False)["input_ids"] + end
        else:
            row = tokenizer(source + answer, split_special_tokens=True)["input_ids"] + end
        yield row[:limit], ([IGNORE_INDEX] * len(prompt) + row[len(prompt) :])[:limit], row[: len(prompt)] != prompt


def across_spaces():
    """A sentencepiece kind of tokenizer, but one that joins over a space: "a b" is one token."""
    vocab = {token: i for i, token in enumerate(["<unk>", "</s>", "▁", "a", "b", "▁a", "▁b", "▁a▁b"])}
    merges = [("▁", "a"), ("▁", "b"), ("▁a", "▁b")]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", model_max_length=20)


def with_an_added_token():
    tokenizer = golden_tokenizer("llama", 20)
    tokenizer.add_tokens(["e e"])
    return tokenizer


class Backwards(PreTrainedTokenizerFast):
    """A fast tokenizer that does something of its own."""

    def _encode_plus(self, *args, **kwargs):
        encoded = super()._encode_plus(*args, **kwargs)
        encoded["input_ids"] = [ids[::-1] if isinstance(ids, list) else ids for ids in encoded["input_ids"]]
        return encoded


TOKENIZERS = {
    "llama": lambda: golden_tokenizer("llama", 20),
    "opt": lambda: golden_tokenizer("opt", 20),
    "a merge across words": across_spaces,
    "an added token across words": with_an_added_token,
    "without a fast backend": lambda: ByT5Tokenizer(model_max_length=20),
}


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_shortcut_gives_what_the_tokenizer_gives(name, apart):
    tokenizer = TOKENIZERS[name]()
    draw = random.Random(0)
    parts = [
        "a",
        "b",
        "e",
        "The",
        " ",
        " ",
        "  ",
        "▁",
        "\n",
        "\t",
        ":",
        '"',
        "é",
        "🙂",
        "12",
        "</s>",
        "<s>",
        "",
        "[PAD]",
    ]
    texts = ["".join(draw.choices(parts, k=draw.randrange(9))) for _ in range(800)]
    sources, targets = texts[:400], [text + tokenizer.eos_token * (i % 5 > 0) for i, text in enumerate(texts[400:])]
    result = preprocess(sources, targets, tokenizer, "split" if apart else "stanford")
    for i, (ids, labels, merged) in enumerate(one_by_one(sources, targets, tokenizer, apart)):
        found = (result["input_ids"][i].tolist(), result["labels"][i].tolist())
        assert found == (ids, labels), (sources[i], targets[i])
        assert (i in result["problems"]["merged_boundary"]) == merged, (sources[i], targets[i])
    assert_counts(result["lengths"], result["num_targets"], result)


def test_a_tokenizer_with_its_own_way_keeps_it():
    plain = golden_tokenizer("opt")
    own = Backwards(tokenizer_object=plain.backend_tokenizer, eos_token="</s>", model_max_length=512)
    ids = preprocess(["one two"], [" three"], own)["input_ids"][0].tolist()
    assert ids == plain("one two three")["input_ids"][::-1]


def test_a_row_shorter_than_its_prompt_does_not_start_with_it():
    rows, prompts = ragged([[5], [5, 6], [7, 6], []]), ragged([[5, 6], [5, 6], [5], []])
    assert starts_with(rows, prompts).tolist() == [False, True, False, True]


def assert_counts(lengths, num_targets, tokens):
    assert lengths.tolist() == [len(ids) for ids in tokens["input_ids"]]
    assert num_targets.tolist() == [int((labels[1:] != IGNORE_INDEX).sum()) for labels in tokens["labels"]]


def test_control_text_is_plain_text_and_eos_is_the_token():
    tokenizer = golden_tokenizer("llama")
    rows = [{"instruction": "Print </s> twice.", "output": "</s></s> [PAD] <s>"}, {"instruction": "a", "output": "b"}]
    result = preprocess(*texts_of(rows, tokenizer), tokenizer)
    ids = result["input_ids"][0].tolist()
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1 and tokenizer.pad_token_id not in ids
    assert "</s></s> [PAD] <s>" in tokenizer.decode(ids[:-1])


def test_a_target_without_eos_gets_none():
    tokenizer = golden_tokenizer("llama")
    result = preprocess(["p:"], ["answer"], tokenizer)
    assert tokenizer.eos_token_id not in result["input_ids"][0]


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_split_boundary_keeps_the_prompt_that_generation_sees(name):
    tokenizer = golden_tokenizer(name)
    rows = [{"instruction": "Quote it.", "output": '"Harbour" is quoted.'}, {"instruction": "x", "output": ":) y"}]
    sources, targets = texts_of(rows, tokenizer)
    result = preprocess(sources, targets, tokenizer, prompt_boundary="split")
    for i, row in enumerate(rows):
        prompt = tokenizer(sources[i])["input_ids"]
        answer = tokenizer(row["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        assert result["input_ids"][i].tolist() == prompt + answer
        assert result["labels"][i].tolist() == [IGNORE_INDEX] * len(prompt) + answer
    assert result["problems"]["merged_boundary"] == []


def test_problems_name_their_rows():
    tokenizer = golden_tokenizer("llama", max_length=80)
    long = "word " * 100
    rows = [
        {"instruction": "short", "output": "fine"},
        {"instruction": long, "output": "never seen"},
        {"instruction": "s", "output": long},
    ]
    problems = preprocess(*texts_of(rows, tokenizer), tokenizer)["problems"]
    assert problems["truncated"] == problems["no_eos"] == [1, 2]
    assert problems["nothing_to_learn"] == [1]


def test_merged_boundary_is_noticed():
    """A tokenizer in which ':' and '"' merge: the answer's quote is masked with the prompt, as in 2023."""
    from scripts.make_tiny_model import sentencepiece_tokenizer

    rows = [{"instruction": "i", "output": '"x" y'}, {"instruction": "i", "output": "x y"}]
    texts = [format_prompt(rows[0]) + '"x"'] * 40 + ["abc def"] * 40

    def check(folder):
        sentencepiece_tokenizer(texts, 420, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=512)
        result = preprocess(*texts_of(rows, tokenizer), tokenizer)
        assert result["problems"]["merged_boundary"] == [0]

    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder))


def test_collator_masks_by_length_where_pad_is_eos():
    tokenizer = golden_tokenizer("llama")
    tokenizer.pad_token = tokenizer.eos_token
    rows = [
        dict(input_ids=torch.tensor([5, 6, 2]), labels=torch.tensor([-100, 6, 2])),
        dict(input_ids=torch.tensor([7]), labels=torch.tensor([7])),
    ]
    batch = DataCollatorForSupervisedDataset(tokenizer)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 2], [7, 2, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 2], [7, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert (~batch["attention_mask"]).sum() == 2, "booleans, as in 2023"


def test_collator_of_no_rows_has_no_target():
    batch = DataCollatorForSupervisedDataset(golden_tokenizer("llama"))([])
    assert batch["labels"].tolist() == [[IGNORE_INDEX]] and batch["attention_mask"].tolist() == [[1]]


def test_these_tests_do_not_write_into_the_users_cache():
    import os

    from alpaca.data.tokenization import _cache_folder

    assert "alpaca-tests-" in os.environ["HF_HOME"] and str(_cache_folder(None)).startswith(os.environ["HF_HOME"])


def test_dataset_is_tokenized_once(tmp_path, monkeypatch):
    from conftest import write_rows

    path, tokenizer = write_rows(tmp_path / "rows.json", 20), golden_tokenizer("llama")
    first = SupervisedDataset(path, tokenizer, cache_dir=str(tmp_path))
    calls = []
    monkeypatch.setattr(train, "preprocess", lambda *a: calls.append(a) or preprocess(*a))
    again = SupervisedDataset(path, tokenizer, cache_dir=str(tmp_path))
    assert not calls
    assert all(torch.equal(a, b) for a, b in zip(first.input_ids, again.input_ids))
    assert all(torch.equal(a, b) for a, b in zip(first.labels, again.labels))
    assert str(first.report) == str(again.report)
    for dataset in (first, again):
        assert_counts(dataset.lengths, dataset.num_targets, vars(dataset))
    SupervisedDataset(path, golden_tokenizer("llama", 40), cache_dir=str(tmp_path))  # another length: not the same
    SupervisedDataset(path, tokenizer, prompt_boundary="split", cache_dir=str(tmp_path))
    assert len(calls) == 2
    for file in tmp_path.glob("alpaca_tokens/*.npz"):  # a torn file is no reason to fail
        file.write_bytes(file.read_bytes()[:100])
    SupervisedDataset(path, tokenizer, cache_dir=str(tmp_path))
    assert len(calls) == 3


def test_templates_are_byte_for_byte_alpacas():
    """The golden ids were made by the 2023 code: decoded, they hold its templates."""
    assert train.PROMPT_DICT is PROMPT_DICT
    golden = json.loads((GOLDEN / "labels" / "labels_llama_512.json").read_text())["rows"]
    examples = json.loads((GOLDEN / "labels" / "examples.json").read_text())
    for row, example in list(zip(golden, examples))[:2]:  # one without input, one with
        text = golden_tokenizer("llama").decode(row["input_ids"], skip_special_tokens=True)
        assert text == format_prompt(example) + example["output"]


@pytest.mark.parametrize("value", [None, "", "missing"])
def test_input_missing_null_or_empty_selects_the_short_prompt(value):
    row = {"instruction": "Say hi."} if value == "missing" else {"instruction": "Say hi.", "input": value}
    assert "### Input:" not in format_prompt(row)
    assert "### Input:\n   \n" in format_prompt({"instruction": "Say hi.", "input": "   "})
