"""In-process generation with a tiny real LLaMA: what is generated does not depend on the batch it is generated in."""

import asyncio
import json
import shutil
from collections import Counter

import pytest
import torch

from alpaca.common.errors import UsageError
from alpaca.completions.api import ContextOverflow, RequestFailed, Sampling
from alpaca.inference.local_model import LocalModel, SeededTopPSampler
from alpaca.models.device import best_dtype

PROMPTS = [
    "Give three tips.",
    "1.",
    "Write a long story about a " + "very " * 30 + "old dog.",
    "What is the capital?",
    "2 + 2 =",
    "Below is an instruction.",
    "é早🙂",
    "List the days of the week.",
]
pytestmark = pytest.mark.slow  # a model in every test

GREEDY = Sampling(max_tokens=12, temperature=0.0)
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture(scope="module")
def model(tiny):
    return LocalModel(tiny("llama"), batch_size=4)


def texts(completions):
    return [completion.text for completion in completions]


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_greedy_in_batches_equals_one_by_one_and_plain_transformers(tiny, architecture):
    model = LocalModel(tiny(architecture), batch_size=4)
    together = model.generate(PROMPTS, GREEDY)
    assert together == [model.generate([prompt], GREEDY)[0] for prompt in PROMPTS]
    assert len(set(texts(together))) > 4, "the prompts matter"
    for prompt, completion in zip(PROMPTS[:3], together):
        inputs = model.tokenizer(prompt, return_tensors="pt")
        width = inputs["input_ids"].shape[1]
        out = model.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
        assert completion.prompt_tokens == width
        assert model.tokenizer.decode(out, skip_special_tokens=True).endswith(completion.text) and completion.text


def test_a_seed_decides_whatever_else_is_in_the_batch(model):
    samplings = [Sampling(max_tokens=12, temperature=1.0, top_p=0.9, seed=seed) for seed in range(len(PROMPTS))]
    together = model.generate(PROMPTS, samplings)
    alone = [model.generate([prompt], one)[0] for prompt, one in zip(PROMPTS, samplings)]
    assert together == alone == model.generate(PROMPTS, samplings)
    assert texts(together) != texts(model.generate(PROMPTS, GREEDY))
    same_prompt = model.generate(["1."] * 4, [Sampling(12, 1.0, seed=seed) for seed in (1, 2, 3, 1)])
    assert same_prompt[0] == same_prompt[3] and len({one.text for one in same_prompt}) == 3
    unseeded = Sampling(max_tokens=12, temperature=1.0)
    assert model.generate(["1."], unseeded) != model.generate(["1."], unseeded)


def test_draws_follow_temperature_and_top_p():
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])

    def frequencies(temperature, top_p, n=4000):
        draw = SeededTopPSampler(temperature, top_p, range(n), "cpu")
        counts = Counter(draw(None, logits.repeat(n, 1)).argmax(-1).tolist())
        return torch.tensor([counts[token] / n for token in range(4)])

    assert (frequencies(1.0, 1.0) - logits.softmax(-1)).abs().max() < 0.03
    assert (frequencies(2.0, 1.0) - (logits / 2).softmax(-1)).abs().max() < 0.03
    kept = torch.tensor([0, 0, *logits[2:].softmax(-1)])  # 0.64 + 0.24 is the first sum over 0.7
    assert (frequencies(1.0, 0.7) - kept).abs().max() < 0.03
    assert frequencies(1.0, 0.0, 50).tolist() == [0, 0, 0, 1]


def from_the_middle(text: str) -> str:
    """Three characters that generation can find; it does not see those that are several tokens, of a byte each."""
    parts = [text[start : start + 3] for start in range(len(text) // 2, -1, -1)]
    return next((part for part in parts if len(part) == 3 and part.isascii() and part.isprintable()), "")


def test_stop_strings_end_a_text_and_are_not_in_it(model):
    full = model.generate(PROMPTS, GREEDY)
    chosen = [number for number, completion in enumerate(full) if from_the_middle(completion.text)][:2]
    stops = tuple(from_the_middle(full[number].text) for number in chosen)
    cut = model.generate(PROMPTS, Sampling(max_tokens=12, temperature=0.0, stop=stops))
    for whole, part in zip(full, cut):
        ends = [whole.text.index(stop) for stop in stops if stop in whole.text]
        assert part.text == (whole.text[: min(ends)] if ends else whole.text)
        assert part.finish_reason == ("stop" if ends else "length")
    assert len(chosen) == 2
    assert all(cut[number].completion_tokens < 12 for number in chosen), "generation itself ended there"


def test_eos_ends_a_text_and_else_it_is_length(model):
    full = model.generate(PROMPTS, GREEDY)
    assert {one.finish_reason for one in full} == {"length"} and {one.completion_tokens for one in full} == {12}
    prompt = model.tokenizer(PROMPTS[0], return_tensors="pt")
    ids = model.model.generate(**prompt, max_new_tokens=6, do_sample=False)[0].tolist()
    eos, old = ids[-1], model.eos
    try:
        model.eos = model.model.generation_config.eos_token_id = [2, eos]
        ended = model.generate(PROMPTS, GREEDY)
    finally:
        model.eos = model.model.generation_config.eos_token_id = old
    assert ended[0].finish_reason == "stop" and ended[0].completion_tokens < 12
    assert full[0].text.startswith(ended[0].text)
    for whole, part in zip(full, ended):
        assert part == whole or (part.finish_reason == "stop" and whole.text.startswith(part.text))


def test_a_space_at_the_start_is_kept(model):
    words = model.tokenizer("a dog", add_special_tokens=False)["input_ids"]
    prompt = model.encode("I have")
    assert model._decode(prompt, words) == " a dog"
    assert model.tokenizer.decode(words) == "a dog", "which is why"


def test_no_default_of_the_models_folder_is_used(tiny, tmp_path):
    folder = shutil.copytree(tiny("llama"), tmp_path / "with_defaults")
    path = folder / "generation_config.json"
    defaults = {"do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 9.0, "max_length": 20}
    path.write_text(json.dumps(json.loads(path.read_text()) | defaults))
    assert LocalModel(folder).generate(PROMPTS, GREEDY) == LocalModel(tiny("llama")).generate(PROMPTS, GREEDY)


@pytest.mark.parametrize("end", ["x", ["</s>"], [2, {"a": 1}], 2.5, True])
def test_an_end_token_that_is_no_id(tiny, tmp_path, end):
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    with pytest.raises(UsageError, match="the end token of its generation_config.json is|cannot be loaded"):
        LocalModel(folder, 1)


def test_max_tokens_are_cut_until_they_fit(model):
    prompt = "word " * 500
    length = len(model.encode(prompt))
    old = model.context
    try:
        model.context = length + 20
        (got,) = model.generate([prompt], Sampling(max_tokens=30, temperature=0.0))  # 30, 24, 19
        assert (got.completion_tokens, got.finish_reason) == (19, "length")
        model.context = length
        with pytest.raises(ContextOverflow, match=f"prompt of {length} tokens leaves no room in a context of {length}"):
            model.generate([prompt], GREEDY)

        async def together():
            asked = [model.complete(text, GREEDY) for text in ("1.", prompt, "2.")]
            return await asyncio.gather(*asked, return_exceptions=True)

        one, failed, two = asyncio.run(together())
        assert one.text and two.text and isinstance(failed, RequestFailed)
    finally:
        model.context = old


def test_prompts_that_wait_together_are_generated_together(model, monkeypatch):
    sizes, real = [], model._batch
    monkeypatch.setattr(model, "_batch", lambda ids, *rest: sizes.append(len(ids)) or real(ids, *rest))

    async def run():
        assert "batches of 4" in await model.check()
        return await asyncio.gather(*(model.complete(prompt, GREEDY) for prompt in PROMPTS))

    got = asyncio.run(run())
    assert sizes == [4, 4]
    assert got == model.generate(PROMPTS, GREEDY)
    assert asyncio.run(run()) == got, "in a new event loop too"


def test_chat_goes_through_the_template(tiny, tmp_path):
    folder = shutil.copytree(tiny("llama"), tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    chat, plain = LocalModel(folder, chat=True), LocalModel(folder)
    assert (chat.api, plain.api, LocalModel(tiny("llama"), chat=True).api) == ("chat", "completions", "completions")
    written = plain.tokenizer("[user] Hi\n>", add_special_tokens=False)["input_ids"]
    assert chat.encode("Hi") == written == chat.encode({"role": "user", "content": "Hi"})
    assert chat.generate(["Hi"], GREEDY)[0].prompt_tokens == len(written)
    with pytest.raises(UsageError, match="no chat template"):
        plain.generate([{"role": "user", "content": "Hi"}], GREEDY)


def test_mistakes_are_named(model, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="no config.json"):
        LocalModel(tmp_path)
    with pytest.raises(UsageError, match="batch_size: expected 1 or more, got 0"):
        LocalModel(model.name, batch_size=0)
    with pytest.raises(UsageError, match="logit_bias"):
        model.generate(["1."], Sampling(logit_bias={1: 1.0}))

    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(model.model, "generate", out_of_memory)
    with pytest.raises(UsageError, match="smaller batch_size .now 4."):
        model.generate(["1."], GREEDY)


def test_dtype(monkeypatch):
    assert best_dtype("cpu") == torch.float32
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert best_dtype("cuda:1") == dtype


def test_what_train_py_has_trained_is_asked_with_its_own_prompts(tiny, tmp_path, monkeypatch):
    """Its chat template would put an input, or the whole prompt, into the instruction."""
    from alpaca.data.chat_template import set_chat_template
    from alpaca.data.prompts import save_templates
    from alpaca.data.tokenizer import open_tokenizer
    from generate_instruction import generate_responses

    folder, row = tmp_path / "tuned", {"instruction": "Translate.", "input": "Hallo", "output": "Hello"}
    shutil.copytree(tiny("llama"), folder)
    own = {"prompt_input": "{instruction} ({input})", "prompt_no_input": "{instruction}"}
    tokenizer = open_tokenizer(str(folder))
    set_chat_template(tokenizer, own, rank=0)
    tokenizer.save_pretrained(folder)
    save_templates(own, str(folder))
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    asked, encode = set(), LocalModel._ids
    monkeypatch.setattr(LocalModel, "_ids", lambda self, text: asked.add((self.api, text)) or encode(self, text))
    generate_responses(str(tmp_path / "rows.json"), str(tmp_path / "new.json"), str(folder), max_tokens=2)
    assert asked == {("completions", "Translate. (Hallo)")}
