r"""The memory estimate of train.py beside the peak that the same run reaches, on CPU processes.

    python -m benchmarks.memory_estimate --output benchmarks/results/memory_estimate_cpu.json

A model of about 0.2 billion parameters is trained for two steps. Measured is the peak resident memory of the process
(the larger of two ranks) less that of the same run with a model of a few hundred kilobytes, which is what Python and
torch take themselves.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import ROOT, write_result
from scripts.make_tiny_model import make_tiny_model
from scripts.quickstart import free_port

CHILD = """
import resource, sys, train
from alpaca.common.errors import reported
with reported("train.py"):
    train.train(sys.argv[1:])
    print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)
"""
PADDED = ["--batching=padded", "--gradient_checkpointing=False"]
RUNS = {
    "one process": (1, PADDED),
    "one process, gradient checkpointing": (1, ["--batching=padded", "--gradient_checkpointing=True"]),
    "one process, packed": (1, ["--max_tokens_per_pack=2048", "--gradient_checkpointing=False"]),
    "two processes, DDP": (2, PADDED),
    "two processes, FSDP": (2, [*PADDED, "--fsdp=full_shard auto_wrap"]),
}


def run(model: str, processes: int, flags: list[str], folder: Path) -> tuple[float, float]:
    """Return (estimate, peak) of a run in bytes."""
    words = [
        f"--model_name_or_path={model}",
        f"--data_path={folder / 'rows.json'}",
        "--max_steps=2",
        *flags,
        f"--output_dir={tempfile.mkdtemp(dir=folder)}",
        "--save_strategy=no",
        f"--cache_dir={folder / 'cache'}",
        "--per_device_train_batch_size=4",
        "--use_cpu=True",
    ]
    child = folder / "child.py"
    child.write_text(CHILD)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*launcher, str(child), *words], env=env, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr[-3000:])
    number, unit = re.search(r"^memory per .* = ([\d.,]+) (GB|MB), available", result.stdout, re.M).groups()
    peaks = [int(peak) for peak in re.findall(r"PEAK (\d+)", result.stdout)]
    return float(number.replace(",", "")) * (1e9 if unit == "GB" else 1e6), max(peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [{"instruction": "Count.", "output": " ".join(map(str, range(i, i + 400)))} for i in range(16)]
        (folder / "rows.json").write_text(json.dumps(rows))
        small = str(make_tiny_model(folder / "small", "llama", hidden_size=32, num_hidden_layers=2))
        large = str(make_tiny_model(folder / "large", "llama", hidden_size=1024, num_hidden_layers=16))
        for label, (processes, flags) in RUNS.items():
            (own_estimate, own_peak), (estimate, peak) = (run(m, processes, flags, folder) for m in (small, large))
            grown = peak - own_peak
            results[label] = {
                "estimate_gb": round((estimate - own_estimate) / 1e9, 2),
                "measured_gb": round(grown / 1e9, 2),
                "estimate_over_measured": round((estimate - own_estimate) / grown, 2),
            }
            print(label, results[label], flush=True)
    write_result({"runs": results}, ("torch", "transformers"), options.output)


if __name__ == "__main__":
    main()
