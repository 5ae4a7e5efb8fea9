"""The chat template of saved tokenizers: ids as in training, whatever the tokenizer, the prompts and the message.
Against a real `transformers serve`: test_client.py; with a model that was trained: test_train.py."""

import json

import jinja2
import pytest
import tokenizers
from conftest import write_rows
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from alpaca.data.chat_template import chat_template, separator, set_chat_template
from alpaca.data.prompts import PROMPT_DICT, TEMPLATE_FILE, format_prompt, save_templates, templates_of
from alpaca.data.tokenizer import identity, open_tokenizer
from alpaca.training.resume import describe_run
from train import SupervisedDataset, parse_flags, preprocess

HARD = {  # Jinja's own signs, quotes, braces, newlines at the ends, characters of 16 and of 32 bits
    "prompt_input": "{{% if %}} {{{{ x }}}} \"'\\n 早🙂\r\n{instruction}\n## In:\n\n{input} -%}}\n{{{instruction}}}",
    "prompt_no_input": "\n {{{{bos_token}}}} \\ {instruction}{{% raw %}}\n\n",
}
SPACED = {"prompt_input": " Q {instruction} {input} A ", "prompt_no_input": "{instruction}\nA: "}
ROWS = [
    {"instruction": "Give three tips.", "input": ""},
    {
        "instruction": "Translate it.",
        "input": 'Guten Tag!\n\n### Input:\nein "zweites" {{ x }} {% raw %} {instruction}',
    },
    {"instruction": " \tSpaces  around \n", "input": " \n"},
    {"instruction": "é早🙂 <b>&amp;</b>\r\n", "input": "é"},
]


def prefixing(tiny):
    """As LLaMA tokenizers were first converted to tokenizer.json: a normalizer puts the space in front of every part of
    a text, also behind <s>, which the post-processor adds. And one that is put behind every text."""
    backend = tokenizers.Tokenizer.from_str(open_tokenizer(tiny("llama")).backend_tokenizer.to_str())
    normalizers = tokenizers.normalizers
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    ends = dict(special_tokens=[("<s>", 1), ("</s>", 2)], single="<s> $A </s>")
    backend.post_processor = tokenizers.processors.TemplateProcessing(**ends)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "llama": lambda tiny: open_tokenizer(tiny("llama")),
    "opt": lambda tiny: open_tokenizer(tiny("opt")),
    "gpt2": lambda tiny: open_tokenizer(tiny("gpt2")),
    "llama, a space in front of every part, </s> behind": prefixing,
}


def prompt_ids(tokenizer, row, templates=PROMPT_DICT):
    ids = tokenizer(format_prompt(row, templates))["input_ids"]
    return ids[:-1] if tokenizer("")["input_ids"] == [1, 2] else ids  # the answer stands before the </s>


def asked(tokenizer, *messages, **options):
    messages = [{"role": "user", "content": one} if isinstance(one, str) else one for one in messages]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)["input_ids"]


@pytest.mark.parametrize("templates", [PROMPT_DICT, HARD, SPACED], ids=["alpaca", "hard", "spaced"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_those_of_the_training(tiny, name, templates, tmp_path):
    tokenizer = TOKENIZERS[name](tiny)
    set_chat_template(tokenizer, templates, rank=0)
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    between = {id(PROMPT_DICT): "\n\n### Input:\n", id(HARD): "", id(SPACED): ""}[id(templates)]
    assert separator(templates["prompt_input"]) == between
    for row in ROWS:
        expected = prompt_ids(tokenizer, row, templates)
        with_key = {"role": "user", "content": row["instruction"], "input": row["input"]}
        assert asked(saved, with_key) == expected
        if not row["input"]:
            assert asked(saved, row["instruction"]) == expected
        elif between:
            text = f"{row['instruction']}{between}{row['input']}"
            assert asked(saved, text) == expected
            parts = [{"type": "text", "text": part} for part in text.split("\n", 1)]
            assert asked(saved, {"role": "user", "content": parts}) == expected
        without_flag = saved.apply_chat_template([with_key])["input_ids"]
        assert without_flag == expected, "there is no other way to end a prompt"


@pytest.mark.parametrize("name", list(TOKENIZERS)[:3])
def test_a_conversation_is_rows_one_after_the_other(tiny, name):
    """And the first of them the row that training makes of it."""
    tokenizer = TOKENIZERS[name](tiny)
    set_chat_template(tokenizer, PROMPT_DICT, rank=0)
    system, first, answer, second = (
        "Be brief.",
        "Name a fish.",
        "Cod. A fish of the sea.",
        "Where?\n\n### Input:\nIt lives",
    )
    said = [{"role": "system", "content": system}, {"role": "user", "content": first}]
    rows = {"instruction": f"{system}\n\n{first}"}, {"instruction": "Where?", "input": "It lives"}
    turn = preprocess([format_prompt(rows[0])], [answer + tokenizer.eos_token], tokenizer)["input_ids"][0].tolist()
    said += [{"role": "assistant", "content": answer}]
    assert tokenizer.apply_chat_template(said)["input_ids"] == turn
    without_bos = prompt_ids(tokenizer, rows[1])[len(tokenizer("")["input_ids"]) :]
    assert asked(tokenizer, *said, second) == turn + without_bos
    said[0]["role"] = "developer"
    assert asked(tokenizer, *said, second) == turn + without_bos
    assert asked(tokenizer, {"role": "system", "content": ""}, first) == asked(tokenizer, first)


def test_a_message_that_has_no_place_is_refused(tiny):
    tokenizer = open_tokenizer(tiny("llama"))
    set_chat_template(tokenizer, PROMPT_DICT, rank=0)
    answer, image = {"role": "assistant", "content": "Ho"}, {"type": "image", "url": "x"}
    for messages, message in (
        (["Hi", "Hi"], "Expected a message of the assistant, got one of the user"),
        ([answer, "Hi"], "Expected a message of the user, got one of the assistant"),
        (["Hi", {"role": "tool", "content": "x"}], "got one of the tool"),
        (["Hi", answer], "Expected a message of the user at the end"),
        (["Hi", answer, {"role": "system", "content": "x"}], "Expected a message of the user at the end"),
        ([{"role": "user", "content": [image]}], "reads text only"),
    ):
        with pytest.raises(jinja2.TemplateError, match=message):
            asked(tokenizer, *messages)


def test_where_the_ids_would_be_others_there_is_no_template(tiny, capsys):
    """Not even the base model's own."""
    tokenizer = open_tokenizer(tiny("llama"))
    for templates in (PROMPT_DICT | {"prompt_input": "{instruction!r} {input}"}, PROMPT_DICT):
        tokenizer.chat_template = "[INST] {{ messages[0].content }} [/INST]"
        set_chat_template(tokenizer, templates, rank=0)
        told = "the tokenizer is saved without one" in capsys.readouterr().out
        assert told == (tokenizer.chat_template is None) == (templates is not PROMPT_DICT)
    dropping = open_tokenizer(tiny("llama"))
    dropping.add_special_tokens({"bos_token": tokenizers.AddedToken("<s>", rstrip=True, special=True)})
    assert chat_template(dropping, PROMPT_DICT) is None, "<s> swallows the space behind it"


def test_tokens_and_contract_stay_the_same(tiny, tmp_path):
    """The cache of tokens is found again, and a run that was begun without a chat template may be resumed."""
    data = write_rows(tmp_path / "rows.json", 4)
    words = [f"--model_name_or_path={tiny('llama')}", f"--data_path={data}", "--use_cpu", "--output_dir=out"]
    *flags, args = parse_flags(words)
    tokenizer = open_tokenizer(tiny("llama"), model_max_length=512)
    dataset = SupervisedDataset(data, tokenizer)
    before = identity(tokenizer), describe_run(args, *flags, dataset, tokenizer)
    set_chat_template(tokenizer, PROMPT_DICT, rank=0)
    assert tokenizer.chat_template
    assert (identity(tokenizer), describe_run(args, *flags, dataset, tokenizer)) == before


def test_the_prompts_go_with_the_model(tmp_path):
    save_templates(HARD, str(tmp_path))
    assert templates_of(tmp_path) == HARD
    assert json.loads((tmp_path / TEMPLATE_FILE).read_text(encoding="utf-8")) == HARD
