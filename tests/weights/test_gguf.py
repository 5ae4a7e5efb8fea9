"""A GGUF file is read by gguf's own reader and answers in llama.cpp as in transformers; the rest is refused by name."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy
import pytest
import torch
from conftest import SHARED
from safetensors.torch import load_file, save_file
from support.adapters import LLAMA, make_adapter
from support.llama_cpp import INSTALLED, running
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from alpaca.common.errors import UsageError
from alpaca.data.prompts import PROMPT_DICT, format_prompt
from alpaca.data.rows import load_rows
from alpaca.weights.gguf import PRE_TOKENIZERS
from scripts.export import export, modelfile
from scripts.make_tiny_model import own_text

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.slow
REAL_MODEL = os.environ.get("REAL_MODEL")  # a folder: LLaMA or Qwen with trained weights
TEXTS = [
    "",
    " ",
    "a",
    "  two blanks  in front, and inside\t\ttabs",
    "Line\n\n\nbreaks\r\nand\n",
    "1234567 and 3.14, 2,000",
    "don't, I'LL, we've",
    "naïve café ẞ 日本語 한국어 हिन्दी عربي 🦙🏽",
    "</s> <s> <|endoftext|> <unk> <0x41>",
    "¼ \u00a0 \u2003 \x07 ___ /// #### {}[]",
]


def byte_level(folder: Path, pre: str) -> None:
    """Save a byte-level tokenizer that cuts texts as llama.cpp's `pre` does."""
    steps, ignores_merges = PRE_TOKENIZERS[pre]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignores_merges))
    made = []
    for step in steps:
        if isinstance(step, str):
            made.append(pre_tokenizers.Split(Regex(step), "isolated"))
        elif step["type"] == "Digits":
            made.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            made.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step["use_regex"]))
    tokenizer.pre_tokenizer = made[0] if len(made) == 1 else pre_tokenizers.Sequence(made)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        own_text(),
        trainers.BpeTrainer(
            vocab_size=900,
            special_tokens=["<|begin|>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if pre == "llama-bpe":  # as Llama 3's, it puts a token in front
        tokenizer.post_processor = processors.TemplateProcessing("<|begin|> $A", None, [("<|begin|>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", model_max_length=2048
    ).save_pretrained(folder)


def random_model(folder: Path, kind: str, **settings) -> None:
    """Save a model of random weights for the tokenizer in `folder`. Its norms differ from 1, and so may its biases."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        **dict(
            vocab_size=len(AutoTokenizer.from_pretrained(folder)) + 5,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            initializer_range=0.1,
            bos_token_id=0,
            eos_token_id=1,
        )
        | settings,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(torch.rand_like(weight) / 2)
    model.save_pretrained(folder)


LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=256,
)
MODELS = {  # name: (kind, tokenizer, settings)
    "llama": ("llama", "sentencepiece", {}),
    "llama tied, biases": ("llama", "gpt-2", dict(tie_word_embeddings=True, attention_bias=True)),
    "llama 3": ("llama", "llama-bpe", dict(rope_parameters=LLAMA3_ROPE)),
    "smollm": ("llama", "smollm", dict(head_dim=32, tie_word_embeddings=True)),
    "linear": ("llama", "gpt-2", dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=10000.0))),
    "mistral": ("mistral", "sentencepiece", dict(sliding_window=None)),
    "qwen2": ("qwen2", "qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", "qwen2", dict(head_dim=32)),
}


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """made(name of MODELS) -> its folder."""
    folders = {}

    def make(name: str) -> Path:
        if name not in folders:
            kind, tokenizer, settings = MODELS[name]
            folder = folders[name] = tmp_path_factory.mktemp("model")
            if tokenizer == "sentencepiece":
                AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(folder)
                settings = dict(bos_token_id=1, eos_token_id=2) | settings
            else:
                byte_level(folder, tokenizer)
            random_model(folder, kind, **settings)
        return folders[name]

    return make


# ---- the file, as gguf's own reader sees it ----


@pytest.mark.parametrize("dtype, error", [("F32", 0), ("F16", 1e-3), ("Q8_0", 1e-2)])
def test_every_tensor_is_there_once(made, tmp_path, dtype, error):
    export(str(made("qwen3")), str(tmp_path / "out"), dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    weights = load_file(made("qwen3") / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == len(reader.tensors) == len(weights)
    for name, weight in weights.items():
        tensor = found[names.get_name(name, (".weight", ".bias"))]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert tensor.tensor_type.name == (dtype if weight.dim() > 1 else "F32")
        assert numpy.abs(values - weight.numpy()).max() <= error * float(weight.abs().max()), name


def test_a_buffer_of_2023_and_a_tied_head_are_left_out(made, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(made("smollm"), folder)
    weights = load_file(folder / "model.safetensors")
    extra = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(weights | extra, folder / "model.safetensors", {"format": "pt"})
    export(str(folder), str(tmp_path / "out"))
    assert len(gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors) == len(weights)


@pytest.mark.parametrize("window, context", [(None, 2048), (64, 64), (4096, 2048)])
def test_the_context_is_no_longer_than_a_sliding_window(made, tmp_path, capsys, window, context):
    folder = tmp_path / "model"
    shutil.copytree(made("mistral"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": window}))
    export(str(folder), str(tmp_path / "out"))
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert reader.fields["llama.context_length"].contents() == context
    assert ("reaches back 64 tokens" in capsys.readouterr().out) == (window == 64)


# ---- Ollama ----


def asked(text: str, system: str, prompt: str) -> str:
    """What Ollama makes of a TEMPLATE when it asks: everything behind .Response is left out."""
    template = text.split('TEMPLATE """')[1].split('"""')[0].split("{{ .Response }}")[0]
    begin, end = "{{ if .System }}", "{{ end }}"
    if begin in template:
        condition = template[len(begin) : template.index(end)]
        template = condition * bool(system) + template[template.index(end) + len(end) :]
    return template.replace("{{ .System }}", system).replace("{{ .Prompt }}", prompt).replace('{{ "{{" }}', "{{")


@pytest.mark.parametrize(
    "templates",
    [
        PROMPT_DICT,
        {"prompt_input": "{instruction} {input}", "prompt_no_input": "Q: {instruction}\nA:"},
        {"prompt_input": "{instruction} {input}", "prompt_no_input": "{instruction}"},
        {"prompt_input": "{instruction} {input}", "prompt_no_input": "Be brief.\n\nUse {{{{x}}}}: {instruction}\n"},
    ],
)
def test_ollama_builds_the_prompt_of_training(tiny, templates):
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    text = modelfile(templates, tokenizer)
    system = text.split("SYSTEM ")[1].split("\nPARAMETER")[0].strip('"') if "SYSTEM" in text else ""
    prompt = asked(text, system, "Name a {{ bird }}.")
    assert prompt == format_prompt({"instruction": "Name a {{ bird }}."}, templates)
    assert 'PARAMETER stop "</s>"' in text and "FROM ./model.gguf" in text


def test_the_system_message_can_be_that_of_a_question_with_an_input(tiny):
    text = modelfile(PROMPT_DICT, AutoTokenizer.from_pretrained(tiny("llama")))
    system = PROMPT_DICT["prompt_input"].split("\n\n")[0]
    row = {"instruction": "Add.", "input": "1 2"}
    assert asked(text, system, "Add.\n\n### Input:\n1 2") == format_prompt(row)


# ---- what is refused ----


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_type="gemma2"), "architecture 'gemma2'.*convert_hf_to_gguf.py"),
        (dict(hidden_act="gelu"), "activation 'gelu'"),
        (dict(rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=1e4)), "positions by 'yarn'"),
        (dict(num_hidden_layers=1), "tensor model.layers.1"),
    ],
)
def test_other_models_are_refused(made, tmp_path, change, message):
    folder = tmp_path / "model"
    shutil.copytree(made("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UsageError, match=message):
        export(str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state["pre_tokenizer"]["pretokenizers"][0].update(individual_digits=False), "cuts texts"),
        (lambda state: state["model"].update(ignore_merges=True), "cuts texts in a way"),
        (lambda state: state.update(normalizer={"type": "Lowercase"}), "changes the text first"),
    ],
)
def test_other_tokenizers_are_refused(made, tmp_path, change, message):
    folder = tmp_path / "model"
    shutil.copytree(made("smollm"), folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    change(state)
    (folder / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UsageError, match=message):
        export(str(folder), str(tmp_path / "out"))


def test_more_tokens_than_embeddings(made, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(made("smollm"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<{number}>" for number in range(6)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UsageError, match="a token '<5>' with the id .* and embeddings of"):
        export(str(folder), str(tmp_path / "out"))


def test_folders_that_are_no_checkpoint(made, tmp_path, tiny):
    adapter = make_adapter(tiny("llama"), tmp_path / "adapter", **LLAMA)
    with pytest.raises(UsageError, match="scripts.merge_lora"):
        export(str(adapter), str(tmp_path / "out"))
    with pytest.raises(UsageError, match="already exists"):
        export(str(made("llama")), str(tmp_path / "adapter"))
    with pytest.raises(UsageError, match="architecture 'gpt2'"):
        export(tiny("gpt2"), str(tmp_path / "out"))


def test_a_number_beyond_float16(made, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(made("qwen2"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="float16 cannot; export it as F32"):
        export(str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite(made, tmp_path, dtype, number):
    folder = shutil.copytree(made("qwen2"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = number
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="model.norm.weight holds numbers that are not finite"):
        export(str(folder), str(tmp_path / "out"), dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_without_the_package(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match='pip install "gguf'):
        export(str(made("llama")), str(tmp_path / "out"))


# ---- llama.cpp itself ----

needs_llama_cpp = pytest.mark.skipif(not INSTALLED, reason="xllamacpp is not installed")


def prompts() -> list[str]:
    real = SHARED / "alpaca_data.json"
    rows = load_rows(str(real))[::260] if real.is_file() else load_rows("seed_tasks.jsonl")
    return [format_prompt(row) for row in rows[:200]]


def compare(folder: Path, out: Path, answers: int, length: int) -> None:
    """Assert that llama.cpp cuts prompts into the ids of training, and follows on them as transformers does."""
    export(str(folder), str(out), dtype="F32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with running(out / "model.gguf") as server:
        for text in [*TEXTS, *prompts()]:
            if text.startswith(" ") and "▁" in tokenizer.get_vocab():
                continue  # llama.cpp puts one more space in front; no prompt of Alpaca's begins with a space
            expected = tokenizer(text, split_special_tokens=True)["input_ids"]
            assert server.ids(text) == expected, text
        for text in prompts()[:answers]:
            ids = tokenizer(text)["input_ids"]
            batch = dict(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)))
            made = model.generate(**batch, max_new_tokens=length, do_sample=False, pad_token_id=0)[0]
            expected = [token for token in made[len(ids) :].tolist() if token != tokenizer.eos_token_id]
            answer = [token for token in server.greedy(ids, length) if token != tokenizer.eos_token_id]
            assert answer == expected, text


@pytest.mark.stress
@needs_llama_cpp
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_answers_as_transformers_does(made, tmp_path, name):
    compare(made(name), tmp_path / "out", answers=8, length=24)


@pytest.mark.stress
@needs_llama_cpp
@pytest.mark.skipif(not REAL_MODEL, reason="REAL_MODEL names no folder")
def test_a_real_model(tmp_path):
    compare(Path(REAL_MODEL), tmp_path / "out", answers=8, length=32)
