"""What may differ between a CPU and a GPU, with the device as a parameter: make test-gpu.

In `make test` a few cases run on the CPU; on a GPU, and in `make stress`, the whole grid does. The rule of memory is a
GPU's only. Every case has an outside answer: plain torch, transformers' generate, the padded step, the run without a
kill.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from alpaca.common.errors import UsageError
from alpaca.completions.api import Sampling
from alpaca.inference.local_model import LocalModel
from alpaca.models.compile import explained, less_memory
from alpaca.packing.check import compare_step
from alpaca.packing.loss import LinearHead, weighted_cross_entropy
from alpaca.packing.packing import PackedBatchDataset
from train import DataCollatorForSupervisedDataset, SupervisedDataset, TrainingArguments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = DEVICE == "cuda"
HEADS = (64, 80, 96, 128, 256)
run_of_train = pytest.mark.stress if not GPU else pytest.mark.slow  # on a CPU other tests have the like
on_gpu = pytest.mark.skipif(not GPU, reason="a rule of GPUs")
pytestmark = pytest.mark.slow


def whole_grid(*chosen):
    """A case of the grid: on a CPU only the `chosen` ones are not stress."""
    return lambda case: pytest.param(case, marks=() if GPU or case in chosen else pytest.mark.stress, id=str(case))


def routes():
    """Attention implementations that are there."""
    names = ["sdpa", "eager"]
    try:
        import flash_attn  # noqa: F401

        names += ["flash_attention_2"] if GPU else []
    except ImportError:
        pass
    return names


@pytest.fixture(scope="module")
def rows(tiny, tmp_path_factory):
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"), model_max_length=512)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    dataset = SupervisedDataset(write_rows(tmp_path_factory.mktemp("rows") / "rows.json", 16), tokenizer)
    return PackedBatchDataset(dataset, DataCollatorForSupervisedDataset(tokenizer)), len(tokenizer)


# ---- gradients ----


CASES = [
    (route, head, kv, dtype)
    for route in routes()
    for head in HEADS
    for kv in (4, 2)
    for dtype in ("float32", "bfloat16")
]
CHOSEN = [("sdpa", 64, 4, "float32"), ("sdpa", 80, 2, "bfloat16"), ("eager", 96, 2, "float32")]


@pytest.mark.parametrize("case", map(whole_grid(*CHOSEN), CASES))
def test_packed_padded_and_alone_have_one_gradient(rows, case):
    """Of every parameter, in every way of batching: padded, each row alone, packed, with shared prefixes."""
    route, head, key_value_heads, dtype = case
    dataset, vocabulary = rows
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=4 * head,
        head_dim=head,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        intermediate_size=64,
        num_hidden_layers=2,
        attn_implementation=route,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(DEVICE)
    flash = route.startswith("flash")
    if flash and dtype == "float32":
        pytest.skip("flash attention has no float32")
    padded, *ways = compare_step(model, dataset, "token", 4, 2, max_tokens=512, seed=0, bf16=dtype == "bfloat16")
    assert len(ways) == 3 and all(way.exact for way in ways), [(way.name, way.difference, way.limit) for way in ways]


@pytest.mark.parametrize("tf32", [False, True] if GPU else [False])
def test_loss_and_its_gradient_are_those_of_torch(tf32, monkeypatch):
    if GPU:
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    torch.manual_seed(0)
    layer = torch.nn.Linear(32, 3000, bias=False).to(DEVICE)
    hidden, targets = torch.randn(300, 32, device=DEVICE), torch.randint(0, 3000, (300,), device=DEVICE)
    shares = torch.rand(300, device=DEVICE)
    grads = []
    for way in ("torch", "ours", "linear head"):
        inputs = hidden.clone().requires_grad_()
        if way == "torch":
            loss = (F.cross_entropy(layer(inputs), targets, reduction="none") * shares).sum()
        elif way == "ours":
            loss, _ = weighted_cross_entropy(layer(inputs), targets, shares)
        else:
            loss = (LinearHead(layer, torch.float32).losses(inputs, targets) * shares).sum()
        loss.backward()
        grads.append(inputs.grad)
    tolerance = 2e-3 if tf32 else 1e-5
    torch.testing.assert_close(grads[1], grads[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grads[2], grads[0], rtol=tolerance, atol=tolerance)


# ---- runs ----


def start(tiny, folder, *more, ranks=0, steps=4, rows=40):
    """The output of train.py on the device; with `ranks` by torchrun."""
    data = write_rows(folder / "rows.json", rows) if not (folder / "rows.json").exists() else folder / "rows.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    words = ["--model_name_or_path", tiny("llama"), "--data_path", data, "--max_steps", steps, "--report_to", "none"]
    words += ["--per_device_train_batch_size", 4, "--learning_rate", "1e-3", "--logging_steps", 1]
    return run([sys.executable, *launcher, ROOT / "train.py", *words, *more], cwd=folder)


def losses(folder):
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


@run_of_train
@pytest.mark.parametrize("fsdp", ["full_shard auto_wrap", "full_shard auto_wrap offload"])
def test_sharded_is_as_one_process(tiny, tmp_path, fsdp):
    """NCCL on one rank of a GPU, two ranks of a CPU (no offload there)."""
    if "offload" in fsdp and not GPU:
        pytest.skip("there is nothing to offload from")
    words = ["--save_strategy", "no", "--output_dir"]
    start(tiny, tmp_path, *words, tmp_path / "one")
    sharded = ["--fsdp", fsdp, "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"]
    more = [] if GPU else ["--per_device_train_batch_size", "2"]
    start(tiny, tmp_path, *words, tmp_path / "many", *sharded, *more, ranks=1 if GPU else 2)
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


@run_of_train
@pytest.mark.parametrize("flags", [(), ("--load_in_8bit", "True"), ("--load_in_4bit", "True")], ids=["16", "8", "4"])
def test_lora_learns(tiny, tmp_path, flags):
    pytest.importorskip("peft")
    if flags:
        pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    words = ["--lora_r", "8", "--save_strategy", "no", "--output_dir", out, "--learning_rate", "1e-2", *flags]
    start(tiny, tmp_path, *words, steps=12, rows=8)
    found = losses(out)
    assert len(found) == 12 and sum(found[-3:]) < sum(found[:3]) - 0.3
    assert (out / "adapter_config.json").is_file()


@run_of_train
def test_a_killed_run_goes_on_bit_for_bit(tiny, tmp_path):
    """SIGKILL after a checkpoint; the same bits as the run that went through, where kernels repeat themselves."""
    words = ["--save_strategy", "steps", "--save_steps", "2", "--bf16", "True", "--output_dir"]
    start(tiny, tmp_path, *words, tmp_path / "whole", steps=8)
    command = [
        sys.executable,
        ROOT / "train.py",
        "--model_name_or_path",
        tiny("llama"),
        "--data_path",
        tmp_path / "rows.json",
    ]
    command += (
        "--max_steps 8 --report_to none --per_device_train_batch_size 4 --learning_rate 1e-3 --logging_steps 1".split()
    )
    command += [*words, tmp_path / "cut"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [str(word) for word in command], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.time() + 120
    while not list((tmp_path / "cut").glob("checkpoint-*")) and time.time() < until and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = list((tmp_path / "cut").glob("checkpoint-*"))
    assert saved, "no checkpoint before the kill"
    if (tmp_path / "cut" / "model.safetensors").exists():  # it was faster than we are
        shutil.rmtree(tmp_path / "cut" / "checkpoint-8")
        (tmp_path / "cut" / "alpaca_run.json").unlink()
    start(tiny, tmp_path, *words, tmp_path / "cut", "--resume_from_checkpoint", "True", steps=8)
    whole, cut = (losses(tmp_path / name) for name in ("whole", "cut"))
    if GPU:
        assert cut[-2:] == pytest.approx(whole[-2:], abs=1e-3)
    else:
        assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (
            tmp_path / "whole" / "model.safetensors"
        ).read_bytes()


# ---- answers ----


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_answers_are_those_of_generate(tiny, architecture):
    folder = tiny(architecture)
    model = LocalModel(folder, batch_size=3, device=DEVICE)
    model.model.float()
    plain = AutoModelForCausalLM.from_pretrained(folder).to(DEVICE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = ["Name a colour.", "1.", "Once upon a time there was a king who"]
    found = model.generate(prompts, Sampling(12, 0.0))
    for prompt, answer in zip(prompts, found):
        inputs = tokenizer(prompt, return_tensors="pt").to(DEVICE)
        new = plain.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer.text.strip() == tokenizer.decode(new, skip_special_tokens=True).strip()


# ---- memory ----


def test_a_step_that_runs_out_of_memory_says_what_takes_less(tmp_path):
    flags = dict(output_dir=str(tmp_path), use_cpu=not GPU, report_to="none")
    args = TrainingArguments(**flags, max_tokens_per_pack="4096")
    with pytest.raises(
        UsageError, match="out of memory in a training step: try --max_tokens_per_pack 2048, then --grad"
    ):
        with explained(args):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
    args = TrainingArguments(**flags, batching="padded", gradient_checkpointing=True, gradient_accumulation_steps=2)
    assert less_memory(args).startswith(
        "try --per_device_train_batch_size 4 --gradient_accumulation_steps 4, then --fsdp"
    )
    with pytest.raises(RuntimeError, match="mine"), explained(args):
        raise RuntimeError("mine")


@on_gpu
def test_a_real_lack_of_memory_is_a_message(tiny, tmp_path):
    flags = dict(model_name_or_path=tiny("llama"), data_path=write_rows(tmp_path / "rows.json", 300))
    flags |= dict(output_dir=tmp_path / "out", max_tokens_per_pack=16000, per_device_train_batch_size=300)
    words = [f"--{name}={value}" for name, value in flags.items()]
    code = (
        "import runpy, sys, torch\n"
        "share = 200e6 / torch.cuda.get_device_properties(0).total_memory\n"
        "torch.cuda.set_per_process_memory_fraction(share)\n"
        f"sys.argv = {['train.py', *words]!r}\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "out of memory" in done.stderr and "Traceback" not in done.stderr


SHAPES = {  # hidden size, layers, vocabulary, flags
    "small": (512, 8, 32000, []),
    "wide": (2048, 4, 32000, []),
    "large vocabulary": (1024, 4, 128000, []),
    "recomputed": (2048, 8, 32000, ["--gradient_checkpointing", "True"]),
    "padded": (1024, 8, 32000, ["--batching", "padded"]),
}


@on_gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_the_estimate_is_within_a_tenth_of_the_peak(tiny, tmp_path, shape):
    hidden, layers, vocabulary, flags = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=int(2.7 * hidden),
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(tmp_path / "model")
    words = ["--save_strategy", "no", "--bf16", "True", "--output_dir", tmp_path / "out", *flags]
    told = start(lambda _: tmp_path / "model", tmp_path, *words, rows=200).stdout
    number, unit = re.search(r"^memory per .* = ([\d.,]+) (\w+), available", told, re.MULTILINE).groups()
    estimate = float(number.replace(",", "")) * {"MB": 1e-3, "GB": 1.0}[unit]
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert estimate == pytest.approx(max(entry.get("peak_memory_gb", 0) for entry in log), rel=0.1)
