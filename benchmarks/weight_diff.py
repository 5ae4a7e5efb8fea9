r"""weight_diff.py beside the algorithm of 2023 and beside other ways to a smaller file: size, seconds and peak memory.

    python -m benchmarks.weight_diff --output benchmarks/results/weight_diff_cpu.json
    python -m benchmarks.weight_diff --base <base> --tuned <tuned> --without_2023 --zipnn <python of its environment>

Without --base and --tuned: random models of 0.5 and 2 billion parameters. Beside the diff: the tuned model's weights
copied, by `zstd -3` and by ZipNN, which get the whole file at once. The default and `--compression none` in turn.

2023's algorithm is written anew: both models in memory in float32, their state dicts added, save_pretrained. Every run
is a process of its own, all in turn, `repeats` times, inputs in the page cache if they fit. The random models have
LLaMA's architecture: base of 32,000 tokens, tuned of 32,001, each weight at most three steps of 2e-5 away. For scale:
the rates of one thread of SHA-256, and of copying the tuned file to the same disk, fsync included.
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
from collections import Counter
from pathlib import Path

import torch
import transformers

from alpaca.weights.reader import as_bytes, dtype_name, open_weights
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


OF_FILES = """
import sys, pathlib
task, source, target = sys.argv[1:]
if task == "zipnn":
    import zipnn
    compressor = zipnn.ZipNN(bytearray_dtype=sys.stdin.read().strip())
    packed = compressor.compress(bytearray(pathlib.Path(source).read_bytes()))
    pathlib.Path(target).write_bytes(packed)
else:
    import zstandard
    compressor = zstandard.ZstdCompressor(level=3)
    with open(source, "rb") as file, open(target, "wb") as out:
        if task == "zstd":
            compressor.copy_stream(file, out)
        else:
            while piece := file.read(1 << 22):
                out.write(piece)
"""


def make_model(folder: Path, size: tuple, tuned: bool, tokenizer: Path) -> int:
    """A checkpoint with random weights, the base's or near them. Returns the number of its parameters."""
    vocabulary = 32000 + tuned
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
    generator, steps = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    for spec in shards[0].tensors:
        rows = min(spec.shape[0], 32000)
        value = torch.randn(rows, *spec.shape[1:], generator=generator) * 0.02
        if tuned:
            value += torch.randint(-3, 4, value.shape, generator=steps) * 2e-5
            value = torch.cat([value, torch.zeros(spec.shape[0] - rows, *spec.shape[1:])])
        writer.write(as_bytes(value.to(dtype).view(-1)))
    writer.close()
    return sum(value.numel() for value in state.values())


def measure(command: list, python: str = sys.executable, text: str = "") -> dict[str, float]:
    """Seconds and peak resident memory of a process. (Its ru_maxrss would begin with the memory of this one.)"""
    begin = time.perf_counter()
    words = [python, "-c", PEAK, *(str(word) for word in command)]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, input=text)
    seconds = time.perf_counter() - begin
    if process.returncode:
        raise SystemExit(f"{command} failed:\n{process.stderr[-3000:]}")
    peak = int(process.stderr.rsplit("PEAK ", 1)[1].split()[0]) * 1024 / 1e9
    return {"seconds": round(seconds, 2), "peak_GB": round(peak, 2)}


def compare(folder: Path, raw: Path, tuned: Path, repeats: int, old: bool) -> dict:
    ours, of_2023 = ["weight_diff.py"], [folder / "of_2023.py"]
    of_2023[0].write_text(OF_2023)
    diff, plain, result = (folder / name for name in ("diff", "plain", "result"))
    inputs = ["--path_raw", raw, "--path_tuned", tuned, "--path_diff"]
    commands = {
        "exact make_diff": [*ours, "make_diff", *inputs, diff],
        "exact recover": [*ours, "recover", "--path_raw", raw, "--path_diff", diff, "--path_tuned", result],
        "exact verify": [*ours, "verify", "--path_diff", diff, "--path_tuned", result],
        "plain make_diff": [*ours, "make_diff", *inputs, plain, "--compression", "none"],
        "plain recover": [*ours, "recover", "--path_raw", raw, "--path_diff", plain, "--path_tuned", result],
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
            if made := {"exact make_diff": diff, "plain make_diff": plain}.get(name):
                runs[name][-1]["GB"] = round(size_of(made) / 1e9, 4)
        shutil.rmtree(diff)
        shutil.rmtree(plain)
    shutil.rmtree(folder / "diff_2023", ignore_errors=True)
    shutil.rmtree(result)
    return runs


def size_of(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def smaller_files(folder: Path, tuned: Path, repeats: int, zipnn: str | None) -> dict:
    """The tuned model's weights, copied and compressed by themselves."""
    script = folder / "of_files.py"
    script.write_text(OF_FILES)
    runs = {name: [] for name in ("copy of tuned", "zstd of tuned", *(["zipnn of tuned"] if zipnn else []))}
    with open_weights(tuned) as weights:
        dtype = {"bfloat16": "bfloat16", "float16": "float16"}.get(
            Counter(dtype_name(tensor.dtype) for tensor in weights.tensors.values()).most_common(1)[0][0], "float32"
        )
    for _ in range(repeats):
        for name in runs:
            task, size = name.split()[0], 0
            taken = {"seconds": 0.0, "peak_GB": 0.0}
            for file in sorted(tuned.glob("*.safetensors")):
                words = [script, task, file, folder / "packed"]
                one = measure(words, zipnn if task == "zipnn" else sys.executable, dtype)
                size += (folder / "packed").stat().st_size
                taken["seconds"] += one["seconds"]
                taken["peak_GB"] = max(taken["peak_GB"], one["peak_GB"])
            runs[name].append({**taken, "GB": round(size / 1e9, 4)})
    (folder / "packed").unlink()
    return runs


def rates(folder: Path, tuned: Path) -> dict[str, float]:
    """GB/s of what bounds the work."""
    data = os.urandom(1 << 22)
    begin = time.perf_counter()
    for _ in range(256):
        hashlib.sha256(data)
    hashing = 256 * len(data) / 1e9 / (time.perf_counter() - begin)
    tuned = max(tuned.glob("*.safetensors"), key=lambda path: path.stat().st_size)
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


def report(name: str, folder: Path, raw: Path, tuned: Path, args: argparse.Namespace) -> dict:
    size = size_of(tuned) / 1e9
    old = not args.without_2023
    runs = compare(folder, raw, tuned, args.repeats, old) | smaller_files(folder, tuned, args.repeats, args.zipnn)
    found = {"GB": round(size, 2), "runs": runs, **rates(folder, tuned)}
    for task, taken in runs.items():
        rate = size / median(taken, "seconds")
        found[f"{task} GB_per_s"] = round(rate, 2)
        line = f"{name} | {task:16} | {median(taken, 'seconds'):6.1f} s | {rate:5.2f} GB/s | peak "
        line += f"{median(taken, 'peak_GB'):5.2f} GB"
        if "GB" in taken[0]:
            line += f" | {median(taken, 'GB') / size:.3f} of the tuned model"
        print(line, flush=True)
    for task in ("make_diff", "recover") if old else ():
        ratio = median(runs[f"2023 {task}"], "seconds") / median(runs[f"exact {task}"], "seconds")
        found[f"2023_over_exact_{task}"] = round(ratio, 2)
        print(f"{name} | {task}: {ratio:.2f} times as fast as 2023's")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--base", type=Path, help="a real base instead of random models")
    parser.add_argument("--tuned", type=Path, help="what was fine-tuned from it")
    parser.add_argument("--without_2023", action="store_true", help="2B needs 19 GB of memory in 2023's way")
    parser.add_argument("--zipnn", help="a Python that has the package zipnn")
    parser.add_argument("--folder", type=Path, help="where the models are written; a temporary folder by default")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if (args.base is None) != (args.tuned is None):
        parser.error("--base and --tuned go together")
    results = {}
    for name in args.models if args.base is None else [args.tuned.resolve().name]:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            folder = Path(folder)
            raw, tuned = (
                (given or folder / name).resolve() for given, name in ((args.base, "raw"), (args.tuned, "tuned"))
            )
            parameters = {}
            if args.base is None:
                make_tiny_model(folder / "tokenizer", hidden_size=32, num_hidden_layers=1)
                make_model(raw, MODELS[name], False, folder / "tokenizer")
                parameters["parameters"] = make_model(tuned, MODELS[name], True, folder / "tokenizer")
            results[name] = {**parameters, **report(name, folder, raw, tuned, args)}
    write_result({"models": results}, ("torch", "transformers", "zstandard"), args.output)


if __name__ == "__main__":
    main()
