"""What a tokenizer puts in front of a text and behind it: a prompt has no end, an answer exactly one, in training,
generation, evaluation and the chat template alike."""

import json
import shutil

import pytest
import tokenizers
from conftest import GOLDEN, train
from support.goldens import golden_tokenizer, texts_of
from tokenizers.processors import BertProcessing, ByteLevel, Sequence, TemplateProcessing
from transformers import ByT5Tokenizer, CanineTokenizer, PreTrainedTokenizerFast

from alpaca.completions.api import Sampling
from alpaca.data.chat_template import chat_template
from alpaca.data.prompts import PROMPT_DICT, format_prompt
from alpaca.data.tokenization import IGNORE_INDEX, nothing_behind, prompt_ids, tokens_around
from alpaca.data.tokenizer import open_tokenizer
from alpaca.inference.local_model import LocalModel
from train import preprocess

pytestmark = pytest.mark.slow  # many small cases

ROWS = [
    {"instruction": "Name a colour.", "output": "Red."},
    {"instruction": "Say </s> aloud.", "input": "twice", "output": "</s> and </s>"},
    {"instruction": "x", "output": ""},
]


def with_add_eos(folder, source=GOLDEN / "labels" / "llama", **more):
    """A tokenizer's folder as QLoRA notebooks leave it."""
    shutil.copytree(source, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_eos_token": True, **more}))
    return folder


def llama(to):
    return open_tokenizer(str(with_add_eos(to / "llama")), model_max_length=512)


def slow_llama(to):
    folder = with_add_eos(to / "slow", tokenizer_class="LlamaTokenizer")
    (folder / "tokenizer.json").unlink(missing_ok=True)  # of sentencepiece's own file alone
    return open_tokenizer(str(folder), model_max_length=512)


def saved_again(to):
    llama(to).save_pretrained(to / "again")
    return open_tokenizer(str(to / "again"), model_max_length=512)


def opt(to):
    return open_tokenizer(str(with_add_eos(to / "opt", GOLDEN / "labels" / "opt")), model_max_length=512)


def processed(name, processor):
    """The golden tokenizer with another post-processor, as a tokenizer.json may have it."""
    backend = tokenizers.Tokenizer.from_str(golden_tokenizer(name).backend_tokenizer.to_str())
    backend.post_processor = processor
    names = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>" if name == "opt" else "<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **names)


def template(single):
    return TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2), ("<unk>", 0)])


FRONT_AND_BEHIND = {  # how to make it; what it puts in front and behind
    "plain llama": (lambda to: golden_tokenizer("llama"), [1], []),
    "plain opt": (lambda to: golden_tokenizer("opt"), [2], []),
    "llama": (llama, [1], [2]),
    "llama, sentencepiece only": (slow_llama, [1], [2]),
    "llama, saved again": (saved_again, [1], [2]),
    "opt": (opt, [2], [2]),
    "gpt2, a template": (lambda to: processed("opt", template("$A </s>")), [], [2]),
    "gpt2, a sequence": (lambda to: processed("opt", Sequence([ByteLevel(), template("$A </s>")])), [], [2]),
    "two in front, two behind": (lambda to: processed("llama", template("<s> </s> $A <unk> </s>")), [1, 2], [0, 2]),
    "bert's": (lambda to: processed("opt", BertProcessing(("<pad>", 1), ("</s>", 2))), [2], [1]),
    "python only": (lambda to: ByT5Tokenizer(model_max_length=512), [], [1]),
    "python only, both": (lambda to: CanineTokenizer(model_max_length=512), [57344], [57345]),
}


NAMES = [pytest.param(name, marks=pytest.mark.stress if "python only" in name else ()) for name in FRONT_AND_BEHIND]


@pytest.mark.parametrize("name", NAMES)
def test_prompts_have_no_end_and_answers_one(tmp_path, name):
    make, front, behind = FRONT_AND_BEHIND[name]
    tokenizer = make(tmp_path)
    eos = tokenizer.eos_token_id
    assert tokens_around(tokenizer) == (front, behind)
    sources, targets = texts_of(ROWS, tokenizer)
    for boundary in ("stanford", "split"):
        result = preprocess(sources, targets, tokenizer, boundary)
        for source, row, ids, labels in zip(sources, ROWS, result["input_ids"], result["labels"]):
            prompt = prompt_ids(tokenizer, source)
            bare = tokenizer(source, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            assert prompt == front + bare and prompt[-1:] != [eos]
            assert ids.tolist()[len(front) :].count(eos) == 1 and ids[-1] == eos
            assert labels.tolist() == [IGNORE_INDEX] * len(prompt) + ids.tolist()[len(prompt) :]
            learned = tokenizer.decode(ids[len(prompt) : -1], skip_special_tokens=False)
            assert learned.strip() == row["output"], "nothing of the answer is masked, nothing else is learned"
        assert result["problems"]["merged_boundary"] == []


@pytest.mark.parametrize("name", NAMES)
def test_other_programs_are_given_one_that_puts_nothing_behind(tmp_path, name):
    """lm-evaluation-harness tokenizes a context by itself, and takes what follows for the choice."""
    make, front, behind = FRONT_AND_BEHIND[name]
    tokenizer = make(tmp_path)
    before = tokenizer("Some text")["input_ids"]
    other = nothing_behind(tokenizer)
    assert (other is tokenizer) == (not behind)
    for text in ("Some text", "", "é早"):
        assert other(text)["input_ids"] == other.encode(text) == prompt_ids(tokenizer, text)
    assert other(["Some text"])["input_ids"] == [prompt_ids(tokenizer, "Some text")]
    assert tokenizer("Some text")["input_ids"] == before, "the tokenizer itself stays as it is"


@pytest.mark.parametrize("name", [name for name in FRONT_AND_BEHIND if "python" not in name])
def test_the_chat_template_writes_the_same_prompt(tmp_path, name):
    tokenizer = FRONT_AND_BEHIND[name][0](tmp_path)
    written = chat_template(tokenizer, PROMPT_DICT)
    for row in ({"instruction": "Name a colour."}, {"instruction": "Add.", "input": "1, 2"}):
        message = {"role": "user", "content": row["instruction"], "input": row.get("input", "")}
        ids = tokenizer.apply_chat_template([message], chat_template=written, add_generation_prompt=True)["input_ids"]
        assert ids == prompt_ids(tokenizer, format_prompt(row))


def test_a_vocabulary_that_cannot_spell_the_letter_a():
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"<s>": 0, "</s>": 1, "早": 2}, []))
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert tokens_around(tokenizer) == ([0], [1]) and prompt_ids(tokenizer, "早a早") == [0, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_is_trained_with_it_answers(tiny, tmp_path, architecture):
    base = tmp_path / "base"
    shutil.copytree(tiny(architecture), base)
    if architecture == "llama":
        shutil.rmtree(base)
        with_add_eos(base, tiny(architecture))
    else:
        tokenizer = open_tokenizer(str(base))
        eos = (tokenizer.eos_token, tokenizer.eos_token_id)
        behind = TemplateProcessing(single=f"$A {eos[0]}", special_tokens=[eos])
        tokenizer.backend_tokenizer.post_processor = Sequence([ByteLevel(), behind])
        tokenizer.save_pretrained(base)
    assert tokens_around(open_tokenizer(str(base)))[1]
    rows = [{"instruction": f"Say {word}.", "output": f"{word}!"} for word in ("one", "two", "red", "blue")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = dict(learning_rate=1e-2, num_train_epochs=60, per_device_train_batch_size=4, save_strategy="no")
    named = dict(model_name_or_path=base, data_path=tmp_path / "rows.json", output_dir=tmp_path / "tuned")
    train({**named, **flags, "report_to": "none", "logging_steps": 20})
    model = LocalModel(tmp_path / "tuned", device="cpu")
    asked = [format_prompt(row) for row in rows]
    answers = model.generate(asked, Sampling(max_tokens=20, temperature=0.0))
    assert [answer.text for answer in answers] == [row["output"] for row in rows]
    assert {answer.finish_reason for answer in answers} == {"stop"}
    assert model.prompt_tokens(asked[0]) == len(prompt_ids(model.tokenizer, asked[0]))
