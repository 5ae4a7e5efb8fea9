"""AdamW with its state in 8 bits beside AdamW in float32: the loss of the same steps, and the memory of the process.

    python -m scripts.make_tiny_model --output_dir output/mini --hidden_size 256 --num_hidden_layers 4
    python -m benchmarks.eight_bit --model output/mini --data_path alpaca_data.json --learning_rate 1e-3 \
        --output benchmarks/results/eight_bit_cpu.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.machine import ROOT, write_result

OPTIMIZERS = ("adamw_torch_fused", "adamw_bnb_8bit")
FLAGS = (
    "--lr_scheduler_type cosine --warmup_ratio 0.03 --weight_decay 0. --logging_steps 1 "
    "--save_strategy no --report_to none --gradient_accumulation_steps 1"
)


def train(optimizer: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the log of a run with `optimizer`."""
    with tempfile.TemporaryDirectory() as folder:
        given = dict(model_name_or_path=args.model, data_path=args.data_path, output_dir=folder, optim=optimizer)
        given |= dict(max_steps=args.steps, per_device_train_batch_size=args.rows, learning_rate=args.learning_rate)
        words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
        subprocess.run([sys.executable, ROOT / "train.py", *words, *FLAGS.split()], check=True)
        state = json.loads((Path(folder) / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def compare(args: argparse.Namespace) -> dict[str, Any]:
    logs = {optimizer: train(optimizer, args) for optimizer in OPTIMIZERS}
    losses = {name: [entry["loss"] for entry in log] for name, log in logs.items()}
    exact, small = losses.values()
    tail = max(args.steps // 10, 1)
    return {
        "what": f"{args.steps} steps of {args.rows} rows, float32 arithmetic",
        "flags": f"--learning_rate {args.learning_rate} {FLAGS}",
        "mean_loss_of_the_last_tenth": {name: round(mean(loss[-tail:]), 4) for name, loss in losses.items()},
        "furthest_apart": round(max(abs(a - b) for a, b in zip(exact, small)), 4),
        "mean_apart": round(mean(abs(a - b) for a, b in zip(exact, small)), 4),
        "peak_memory_gb": {name: max(entry["peak_memory_gb"] for entry in log) for name, log in logs.items()},
        "loss": {name: [round(value, 4) for value in loss] for name, loss in losses.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--data_path", required=True, help="rows to train on")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--learning_rate", default="2e-5")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    args = parser.parse_args()
    write_result(compare(args), ["torch", "transformers", "bitsandbytes"], args.output)


if __name__ == "__main__":
    main()
