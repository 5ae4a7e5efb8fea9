"""Answering: adapters and diffs opened as what they are, text as it is generated, files of rows, the terminal."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch
from conftest import ROOT, write_rows
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
import weight_diff
from alpaca.common.errors import UsageError
from alpaca.completions.api import Sampling, seed_of
from alpaca.data.prompts import format_prompt
from alpaca.inference.local_model import LocalModel
from alpaca.inference.token_stream import pieces_of
from scripts import generate
from scripts.make_tiny_model import make_tiny_model

pytestmark = pytest.mark.slow  # a model in nearly every test

GREEDY = Sampling(max_tokens=40, temperature=0.0)
PROMPTS = ["Name three oceans.", "Tell é早🙂", "1.", "Write a story about a " + "very " * 20 + "old dog."]


@pytest.fixture(scope="module")
def model(tiny):
    return LocalModel(tiny("llama"), batch_size=4)


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


IDS = torch.arange(5, 25)[None]


# ---- opening ----


def make_adapter(base, folder, targets, new_token=False, save_embeddings="auto", **config):
    """A LoRA adapter with random matrices; with `new_token`, as for a tokenizer that lacks [PAD]. Gives ids, logits."""
    torch.manual_seed(1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    if new_token:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        train.resize_embeddings(model, 1, len(tokenizer))
        tokenizer.save_pretrained(folder)
    kind = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False, **config)
    adapted = get_peft_model(model, kind)
    for name, parameter in adapted.named_parameters():
        if "trainable_tokens" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(folder, save_embedding_layers=save_embeddings)
    ids = torch.cat([IDS, torch.tensor([[len(tokenizer) - 1]])], dim=1)
    return ids, logits(adapted, ids)


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    make_adapter(tiny("llama"), folder, ["q_proj", "v_proj"])
    return folder


@pytest.mark.parametrize(
    ("architecture", "targets", "options"),
    [
        ("llama", ["q_proj", "v_proj"], {}),
        ("gpt2", ["c_attn"], {"fan_in_fan_out": True}),
        ("llama", ["q_proj"], {"new_token": True}),  # peft saves the embeddings whole
        ("llama", ["q_proj"], {"new_token": True, "save_embeddings": False}),  # … or the trained row only
        ("gpt2", ["c_attn"], {"fan_in_fan_out": True, "new_token": True}),  # tied embeddings
    ],
)
def test_an_adapter_on_its_base_is_what_peft_trained(tiny, tmp_path, architecture, targets, options):
    rows = {}
    if options.get("new_token"):
        last = len(AutoTokenizer.from_pretrained(tiny(architecture)))
        layers = {"llama": ["embed_tokens", "lm_head"], "gpt2": ["wte"]}[architecture]
        rows = {"trainable_token_indices": {layer: [last] for layer in layers}}
    ids, trained = make_adapter(tiny(architecture), tmp_path / "adapter", targets, **options, **rows)
    opened = LocalModel(tmp_path / "adapter")
    assert torch.equal(logits(opened.model, ids), trained)
    base = LocalModel(tiny(architecture))
    assert not torch.allclose(logits(base.model, IDS), trained[:, : IDS.shape[1], : base.model.config.vocab_size])
    assert len(opened.tokenizer) == len(base.tokenizer) + bool(options.get("new_token"))
    assert f"adapter {tmp_path / 'adapter'} on base {tiny(architecture)}" == opened.summary


def test_the_base_of_an_adapter_may_have_moved(tiny, adapter, tmp_path):
    moved = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((moved / "adapter_config.json").read_text())
    for name, told in (
        (str(tmp_path / "gone"), f"is a LoRA adapter of '{tmp_path / 'gone'}', which is not here; give"),
        (None, "is a LoRA adapter that names no base model; give its base"),
    ):
        (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
        with pytest.raises(UsageError, match=told):
            LocalModel(moved)
        with pytest.raises(UsageError, match=r"first: python -m scripts.merge_lora --adapter .*adapter --base <base>"):
            LocalModel(moved)  # of a command that takes no base
    opened, other = LocalModel(moved, base=tiny("llama")), LocalModel(adapter)
    assert torch.equal(logits(opened.model, IDS), logits(other.model, IDS))


def test_a_wrong_base_is_one_clear_message(tiny, adapter, tmp_path):
    sizes = {"wide": {"hidden_size": 64}, "deep": {"num_hidden_layers": 3}, "flat": {"num_hidden_layers": 1}}
    wrong = [make_tiny_model(tmp_path / name, **({"hidden_size": 32} | size)) for name, size in sizes.items()]
    for base in (*wrong, tiny("gpt2")):
        with pytest.raises(UsageError, match="this adapter does not fit the base") as error:
            LocalModel(adapter, base=base)
        assert str(adapter) in str(error.value) and str(base) in str(error.value)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
    with pytest.raises(UsageError, match="expected a whole model, this is a weight diff or an adapter itself"):
        LocalModel(adapter, base=adapter)


@pytest.fixture(scope="module")
def tuned(tiny, tmp_path_factory):
    """A fine-tuned model, and its diffs: folders."""
    folder = tmp_path_factory.mktemp("tuned")
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(folder / "model")
    (folder / "model" / "prompt_template.json").write_text(
        json.dumps({"prompt_input": "{instruction}|{input}>", "prompt_no_input": "{instruction}>"})
    )
    for method in ("exact", "float"):
        weight_diff.make_diff(tiny("llama"), str(folder / "model"), str(folder / method), method=method)
    return folder


def test_a_diff_and_its_base_are_the_tuned_model(tiny, tuned, capsys):
    whole = LocalModel(tuned / "model")
    exact, almost = (LocalModel(tuned / name, base=tiny("llama")) for name in ("exact", "float"))
    assert torch.equal(logits(exact.model, IDS), logits(whole.model, IDS))
    torch.testing.assert_close(logits(almost.model, IDS), logits(whole.model, IDS), rtol=1e-4, atol=1e-5)
    assert exact.generate(PROMPTS, GREEDY) == whole.generate(PROMPTS, GREEDY) and exact.eos == whole.eos
    assert exact.templates == whole.templates == almost.templates and "{instruction}>" in exact.templates.values()
    told = capsys.readouterr().out
    assert "proved: " in told and "recovered, but not proved: " in told
    for folder, base, message in (
        ("exact", None, "is a weight diff, which needs the model it was made against; give its base"),
        ("exact", tuned / "model", "is another base model of the same shapes"),
        ("float", None, "model.norm.weight is nearly zero, as in a weight diff, which needs its base; give its base"),
        ("model", tiny("llama"), "is a whole model, which needs no base; omit it"),
    ):
        with pytest.raises(UsageError, match=message):
            LocalModel(tuned / folder, base=base)


def test_quantized_bases(tiny, tmp_path, monkeypatch, caplog):
    make_adapter(tiny("gpt2"), tmp_path / "adapter", ["c_attn"], fan_in_fan_out=True)
    model = LocalModel(tmp_path / "adapter", load_in_8bit=True)
    assert "Linear8bit" in str(model.model) and "lora_A" in str(model.model)
    whole, quantized = (one.generate(PROMPTS, GREEDY) for one in (LocalModel(tmp_path / "adapter"), model))
    assert [a.text[:1] for a in whole] == [b.text[:1] for b in quantized]
    assert "inputs will be cast" not in caplog.text
    with pytest.raises(UsageError, match="choose one"):
        LocalModel(tiny("gpt2"), load_in_8bit=True, load_in_4bit=True)
    monkeypatch.setattr("alpaca.models.device.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--load_in_4bit: needs bitsandbytes, which is not installed"):
        LocalModel(tiny("gpt2"), load_in_4bit=True)


# ---- text as it is generated ----


def test_a_stream_is_what_generate_gives_from_several_threads_too(model):
    asked = [(prompt, GREEDY) for prompt in PROMPTS]
    asked += [(prompt, Sampling(40, 1.0, 0.95, seed=seed)) for seed, prompt in enumerate(PROMPTS)]
    expected = [model.generate([prompt], sampling)[0] for prompt, sampling in asked]
    alone = [len(list(model.stream(*one))) for one in asked]
    assert sorted(alone)[len(alone) // 2] > 10, "piece by piece"
    streamed: dict[int, list[str]] = {}
    work = [partial(lambda n: streamed.update({n: list(model.stream(*asked[n]))}), n) for n in range(len(asked))]
    threads = [threading.Thread(target=one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, completion in enumerate(expected):
        assert "".join(streamed[number]) == completion.text
        assert all(streamed[number])
    assert sorted(map(len, streamed.values()))[len(streamed) // 2] > 3, "several, also on a busy machine's threads"
    stop = expected[0].text[4:7]
    cut = Sampling(40, 0.0, stop=(stop,))
    assert "".join(model.stream(PROMPTS[0], cut)) == model.generate([PROMPTS[0]], cut)[0].text
    assert stop not in "".join(model.stream(PROMPTS[0], cut)) and stop


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_pieces_are_whole_characters(tiny, architecture):
    """Characters of several tokens come at once, stop strings never, and nothing that came is taken back."""
    tokenizer = AutoTokenizer.from_pretrained(tiny(architecture))

    def pieces(text, stop=(), last=(), stopped=False):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + list(last)
        one_by_one = ([token] for token in ids)
        decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return list(pieces_of(one_by_one, decode, tokenizer.convert_ids_to_tokens, [2], stop, lambda: stopped))

    text = "oceans 🙂🙂 é, 早上好 and one"
    assert "".join(pieces(text)) == text
    assert not any("\ufffd" in piece for piece in pieces(text)) and len(pieces(text)) > 8
    got = pieces("one ## two ### three", stop=("###",))
    assert "".join(got) == "one ## two " and len(got) > 3
    part = tokenizer("🙂", add_special_tokens=False)["input_ids"][-4:-1]  # of the four bytes three
    assert "".join(pieces("one", last=part, stopped=True)) == "one"
    assert "\ufffd" in "".join(pieces("one", last=part)), "as generate() gives it"
    assert "".join(pieces("one", last=[2, *part])) == "one", "eos"
    word = tokenizer("one", add_special_tokens=False)["input_ids"]
    spoiled = tokenizer("🙂", add_special_tokens=False)["input_ids"] + [*part, *word]  # a run of bytes is one text
    assert "".join(pieces("", last=spoiled)) == tokenizer.decode(spoiled)


def test_a_stopped_stream_ends(model):
    long, stopped = Sampling(1500, 1.0, seed=7), threading.Event()
    pieces = model.stream(PROMPTS[0], long, stopped)
    begin = next(pieces)
    stopped.set()
    rest = "".join(pieces)
    whole = model.generate([PROMPTS[0]], Sampling(200, 1.0, seed=7))[0].text
    assert whole.startswith(begin + rest) and len(begin + rest) < len(whole)
    abandoned = model.stream(PROMPTS[0], long)
    next(abandoned)
    abandoned.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "generate"]


def test_errors_come_out_of_a_stream(model, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(model.model, "generate", out_of_memory)
    with pytest.raises(UsageError, match="out of memory"):
        list(model.stream("1.", GREEDY))


# ---- prompts ----


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_prompt_ids_are_those_of_training(tiny, architecture):
    model = LocalModel(tiny(architecture))
    rows = [
        {"instruction": "Name three oceans.", "input": ""},
        {"instruction": "Sort.", "input": "b é早🙂\n a"},
        {"instruction": "What does </s> or <|endoftext|> mean?", "input": ""},
    ]
    prompts = [format_prompt(row) for row in rows]
    data = train.preprocess(prompts, ["The Pacific"] * 3, model.tokenizer)
    for prompt, ids, labels in zip(prompts, data["input_ids"], data["labels"]):
        learned_from = int((labels == train.IGNORE_INDEX).sum())
        assert model.encode(prompt) == ids[:learned_from].tolist()


# ---- rows of a file ----


def answers(folder, model, **flags):
    """Run the command in this process; returns the rows that it wrote."""
    flags = {"data_path": folder / "rows.json", "output_path": folder / "out.json", "model": model, **flags}
    generate.main([f"--{name}={value}" for name, value in flags.items()])
    return json.loads((folder / "out.json").read_text())


def test_rows_are_answered_in_their_order_and_a_rerun_continues(tiny, tuned, tmp_path, monkeypatch, capsys):
    rows = json.loads(open(write_rows(tmp_path / "rows.json", 20, source="test")).read())
    del rows[3]["output"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9, "batch_size": 4}
    asked, real = [], LocalModel._run

    def run(self, ids, *rest, dies_at=99):
        if len(asked) == dies_at:
            raise RuntimeError("killed")
        asked.append(len(ids))
        return real(self, ids, *rest)

    monkeypatch.setattr(LocalModel, "_run", lambda *args: run(*args, dies_at=3))
    with pytest.raises(RuntimeError, match="killed"):
        answers(tmp_path, tuned / "model", **flags)
    assert asked == [4, 4, 4] and not (tmp_path / "out.json").exists()
    monkeypatch.setattr(LocalModel, "_run", run)
    got = answers(tmp_path, tuned / "model", **flags)
    assert asked == [4] * 5, "no answer is asked for twice"
    cut = (tmp_path / "out.json.journal.jsonl").read_text().count('"finish_reason": "length"')
    assert f"{cut} answers were cut at 8 tokens" in capsys.readouterr().out and cut > 9
    (tmp_path / "out.json.journal.jsonl").unlink()
    assert got == answers(tmp_path, tuned / "model", **flags | {"batch_size": 3}), "as if never interrupted"
    templates = json.loads((tuned / "model" / "prompt_template.json").read_text())
    model = LocalModel(tuned / "model")
    for number, (row, answered) in enumerate(zip(rows, got)):
        sampling = Sampling(8, 1.0, 0.9, seed=seed_of(42, number))
        text = model.generate([format_prompt(row, templates)], sampling)[0].text.strip()
        assert answered == {**row, "output": text, "generator": "model"}
    for change in ({"max_new_tokens": 9}, {"model": tiny("llama")}, {"temperature": 0.0}):
        with pytest.raises(UsageError, match="made with other arguments"):
            answers(tmp_path, **{"model": tuned / "model", **flags, **change})


def test_prompts_that_are_too_long_are_named(tiny, tmp_path):
    rows = json.loads(open(write_rows(tmp_path / "rows.json", 4)).read())
    rows[1]["instruction"] = "word " * 1100
    rows[2]["instruction"] = "a " * 1015  # leaves nine tokens, of 400 that are wanted
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = {"max_new_tokens": 400, "generator": "ours", "prompt_template": tmp_path / "template.json"}
    template = {"prompt_input": "{instruction}{input}", "prompt_no_input": "{instruction}"}
    (tmp_path / "template.json").write_text(json.dumps(template))
    with pytest.raises(
        UsageError, match=r"2 of 4 rows have prompts that leave too little room .* 1,024 .*\(rows 1, 2\)"
    ):
        answers(tmp_path, tiny("gpt2"), **flags)
    for tokens in (100_000, 1_000_000):
        with pytest.raises(UsageError, match=f"--max_new_tokens {tokens}: is far above the 1024 tokens .* context"):
            answers(tmp_path, tiny("gpt2"), **flags | {"max_new_tokens": tokens})
    with pytest.raises(UsageError, match="2 of 4 rows have prompts.*; --max_new_tokens 2000 is above that context"):
        answers(tmp_path, tiny("gpt2"), **flags | {"max_new_tokens": 2000})
    got = answers(tmp_path, tiny("gpt2"), drop_too_long=True, **flags)
    assert [row["instruction"] for row in got] == [rows[0]["instruction"], rows[3]["instruction"]]
    assert {row["generator"] for row in got} == {"ours"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--model is missing"),
        (["--model=x"], "expected --data_path and --output_path for the rows of a file, or --interactive"),
        (["--model=x", "--interactive", "--data_path=y"], "or --interactive"),
        (["--model=x", "--data_path=y"], "--output_path is missing"),
        (["--model=x", "--interactive", "--max_new_tokens=0"], "--max_new_tokens 0: expected at least 1"),
        (["--model=x", "--interactive", "--temperature=-1"], "expected 0 .greedy. or more"),
        (["--model=x", "--interactive", "--top_p=0"], "--top_p 0.0: expected more than 0"),
        (["--model=x", "--interactiv"], "unknown flag --interactiv; did you mean --interactive"),
        (["--model=/nowhere", "--interactive"], "--model /nowhere: no such folder"),
        (["--model=/nowhere", "--interactive", "--device=gpu"], "--device gpu: expected cpu, or cuda"),
    ],
)
def test_mistakes_fail_before_work(flags, message):
    with pytest.raises(UsageError, match=message):
        generate.main(flags)


@pytest.mark.stress
def test_kills_repeat_only_what_was_in_flight(tiny, tmp_path):
    write_rows(tmp_path / "rows.json", 300)
    flags = ["--model", tiny("llama"), "--data_path", tmp_path / "rows.json", "--max_new_tokens", "30"]
    command = [sys.executable, "-m", "scripts.generate", *map(str, flags), "--output_path"]
    subprocess.run([*command, tmp_path / "whole.json"], cwd=ROOT, check=True, capture_output=True)
    journal = tmp_path / "out.json.journal.jsonl"
    for wanted in (20, 90, 200):
        process = subprocess.Popen([*command, tmp_path / "out.json"], cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < wanted):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([*command, tmp_path / "out.json"], cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "out.json").read_text() == (tmp_path / "whole.json").read_text()
    kinds = [json.loads(line)["kind"] for line in journal.read_text().splitlines()]
    assert kinds.count("answer") == 300 and kinds.count("run") == 4


# ---- the terminal ----


def talk(monkeypatch, capsys, model, text, **flags):
    """What `--interactive` prints when `text` is piped into it."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    capsys.readouterr()
    generate.main([f"--model={model}", "--interactive", *(f"--{name}={value}" for name, value in flags.items())])
    return capsys.readouterr().out


def test_a_conversation_through_a_pipe(tuned, monkeypatch, capsys):
    model, templates = LocalModel(tuned / "model"), LocalModel(tuned / "model").templates
    rows = [{"instruction": "Name three oceans.", "input": ""}, {"instruction": "Sort.", "input": "b\na"}]
    rows += [{"instruction": "Last", "input": ""}]
    texts = [one.text for one in model.generate([format_prompt(row, templates) for row in rows], GREEDY)]
    expected = [text.lstrip() or "[no answer]" for text in texts]
    question = "\n\nName three oceans.\n\nSort.\nb\na\n\nLast"
    got = talk(monkeypatch, capsys, tuned / "model", question, max_new_tokens=40)
    assert got == "".join(text + "\n" for text in expected)
    left = talk(monkeypatch, capsys, tuned / "model", "Name three oceans.\n\nexit\nSort.\n", max_new_tokens=40)
    assert left == expected[0] + "\n"
    assert talk(monkeypatch, capsys, tuned / "model", "") == ""
    drawn = talk(monkeypatch, capsys, tuned / "model", "A\n\nA\n\n", temperature=1.0, max_new_tokens=40).splitlines()
    again = talk(monkeypatch, capsys, tuned / "model", "A\n\nA\n\n", temperature=1.0, max_new_tokens=40).splitlines()
    assert drawn == again and drawn[: len(drawn) // 2] != drawn[len(drawn) // 2 :]
    told = talk(monkeypatch, capsys, tuned / "model", f"{'word ' * 3000}\n\nName three oceans.\n", max_new_tokens=40)
    assert told.startswith("error: a prompt of") and told.endswith(expected[0] + "\n"), "the program goes on"


def test_ctrl_c_stops_the_answer_and_not_the_program(tuned, monkeypatch, capsys):
    real, before = LocalModel.stream, signal.getsignal(signal.SIGINT)

    def stream(self, prompt, sampling, stopped):
        for number, piece in enumerate(real(self, prompt, sampling, stopped)):
            yield piece
            if number == 3 and "first" in prompt:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(LocalModel, "stream", stream)
    got = talk(monkeypatch, capsys, tuned / "model", "first\n\nsecond\n\n", max_new_tokens=300)
    first, found, second = got.partition(" [stopped]\n")
    assert found and 0 < len(first) < 300 and len(second) > len(first)
    assert signal.getsignal(signal.SIGINT) is before
