r"""weight_diff.py beside the algorithm of 2023: seconds and peak memory, for models of 0.5 and 2 billion parameters.

    python -m benchmarks.weight_diff --output benchmarks/results/weight_diff_cpu.json

2023's algorithm is written anew: both models in memory in float32, their state dicts added, save_pretrained. Every run
is a process of its own, the two in turn, `repeats` times, inputs in the page cache if they fit. The models are random,
with LLaMA's architecture: base of 32,000 tokens, tuned of 32,001. For scale: the rates of one thread of SHA-256, and of
copying the tuned file to the same disk, fsync included.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from alpaca.weights.reader import as_bytes
from alpaca.weights.writer import ShardWriter, Spec, plan_shards
from benchmarks.machine import ROOT, write_result
from scripts.make_tiny_model import make_tiny_model

MODELS = {  # name: (dtype, hidden size, layers, intermediate size)
    "0.55B float32": (torch.float32, 1536, 16, 4096),
    "2.0B bfloat16": (torch.bfloat16, 2560, 24, 6912),
}
PEAK = """
import atexit, runpy, sys
@atexit.register
def tell():
    kilobytes = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
    print("PEAK", kilobytes, file=sys.stderr)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
OF_2023 = """
import sys, torch, transformers
task, raw, other, output = sys.argv[1:]
load = transformers.AutoModelForCausalLM.from_pretrained
with torch.inference_mode():
    options = {"dtype": torch.float32, "trust_remote_code": False}
    base, model = load(raw, **options), load(other, **options)
    base.resize_token_embeddings(32001, mean_resizing=False)
    for table in (base.get_input_embeddings().weight, base.get_output_embeddings().weight):
        table[-1:] = table[:-1].mean(dim=0, keepdim=True)
    state, added = model.state_dict(), base.state_dict()
    for key in state:
        state[key].add_(-added[key] if task == "make_diff" else added[key])
    if task == "recover":
        sum(state[key].sum() for key in state)
    model.save_pretrained(output)
"""


def make_model(folder: Path, size: tuple, vocabulary: int, seed: int, tokenizer: Path) -> int:
    """A checkpoint with random weights. Returns the number of its parameters."""
    dtype, hidden, layers, intermediate = size
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=hidden // 128,
        dtype=dtype,
        architectures=["LlamaForCausalLM"],
    )
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = transformers.LlamaForCausalLM(config).state_dict()
    shards = plan_shards([Spec(name, dtype, tuple(value.shape)) for name, value in state.items()], "model", "50GB")
    writer = ShardWriter(folder, shards)
    generator = torch.Generator().manual_seed(seed)
    for spec in shards[0].tensors:
        value = torch.randn(spec.shape, generator=generator) * 0.02
        writer.write(as_bytes(value.to(dtype).view(-1)))
    writer.close()
    return sum(value.numel() for value in state.values())


def measure(command: list) -> dict[str, float]:
    """Seconds and peak resident memory of a process. (Its ru_maxrss would begin with the memory of this one.)"""
    begin = time.perf_counter()
    words = [sys.executable, "-c", PEAK, *(str(word) for word in command)]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if process.returncode:
        raise SystemExit(f"{command} failed:\n{process.stderr[-3000:]}")
    peak = int(process.stderr.rsplit("PEAK ", 1)[1].split()[0]) * 1024 / 1e9
    return {"seconds": round(seconds, 2), "peak_GB": round(peak, 2)}


def compare(folder: Path, repeats: int, old: bool) -> dict:
    ours, of_2023 = ["weight_diff.py"], [folder / "of_2023.py"]
    of_2023[0].write_text(OF_2023)
    raw, tuned, diff, result = (folder / name for name in ("raw", "tuned", "diff", "result"))
    commands = {
        "exact make_diff": [*ours, "make_diff", "--path_raw", raw, "--path_tuned", tuned, "--path_diff", diff],
        "exact recover": [*ours, "recover", "--path_raw", raw, "--path_diff", diff, "--path_tuned", result],
        "exact verify": [*ours, "verify", "--path_diff", diff, "--path_tuned", result],
        "2023 make_diff": [*of_2023, "make_diff", raw, tuned, folder / "diff_2023"],
        "2023 recover": [*of_2023, "recover", raw, folder / "diff_2023", folder / "result"],
        "float recover": [
            *ours,
            "recover",
            "--path_raw",
            raw,
            "--path_diff",
            folder / "diff_2023",
            "--path_tuned",
            result,
        ],
    }
    runs = {name: [] for name in commands if old or not name.startswith(("2023", "float"))}
    for _ in range(repeats):
        for name in runs:
            if name.endswith("recover"):
                shutil.rmtree(result, ignore_errors=True)
            runs[name].append(measure(commands[name]))
        shutil.rmtree(diff)
    shutil.rmtree(folder / "diff_2023", ignore_errors=True)
    shutil.rmtree(result)
    return runs


def rates(folder: Path) -> dict[str, float]:
    """GB/s of what bounds the work."""
    data = os.urandom(1 << 22)
    begin = time.perf_counter()
    for _ in range(256):
        hashlib.sha256(data)
    hashing = 256 * len(data) / 1e9 / (time.perf_counter() - begin)
    tuned = folder / "tuned" / "model.safetensors"
    begin = time.perf_counter()
    with open(tuned, "rb", buffering=0) as source, open(folder / "copy", "wb", buffering=0) as target:
        while piece := source.read(1 << 22):
            target.write(piece)
        os.fsync(target.fileno())
    copying = tuned.stat().st_size / 1e9 / (time.perf_counter() - begin)
    (folder / "copy").unlink()
    return {"sha256_one_thread_GB_per_s": round(hashing, 2), "copy_with_fsync_GB_per_s": round(copying, 2)}


def median(runs: list[dict[str, float]], what: str) -> float:
    return statistics.median(run[what] for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--without_2023", action="store_true", help="2B needs 19 GB of memory in 2023's way")
    parser.add_argument("--folder", type=Path, help="where the models are written; a temporary folder by default")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    results = {}
    for name in args.models:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            folder = Path(folder)
            make_tiny_model(folder / "tokenizer", hidden_size=32, num_hidden_layers=1)
            parameters = make_model(folder / "raw", MODELS[name], 32000, 0, folder / "tokenizer")
            make_model(folder / "tuned", MODELS[name], 32001, 1, folder / "tokenizer")
            size = (folder / "tuned" / "model.safetensors").stat().st_size / 1e9
            runs = compare(folder, args.repeats, not args.without_2023)
            results[name] = {"parameters": parameters, "GB": round(size, 2), "runs": runs, **rates(folder)}
            for task, taken in runs.items():
                rate = size / median(taken, "seconds")
                results[name][f"{task} GB_per_s"] = round(rate, 2)
                print(
                    f"{name} | {task:16} | {median(taken, 'seconds'):6.1f} s | {rate:5.2f} GB/s | peak "
                    f"{median(taken, 'peak_GB'):5.2f} GB",
                    flush=True,
                )
            if not args.without_2023:
                for task in ("make_diff", "recover"):
                    ratio = median(runs[f"2023 {task}"], "seconds") / median(runs[f"exact {task}"], "seconds")
                    results[name][f"2023_over_exact_{task}"] = round(ratio, 2)
                    print(f"{name} | {task}: {ratio:.2f} times as fast as 2023's")
    write_result({"models": results}, ("torch", "transformers"), args.output)


if __name__ == "__main__":
    main()
