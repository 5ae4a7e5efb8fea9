"""The Alpaca recipe on this machine, in miniature: make a tiny base model, fine-tune it with the README's command,
save, reload, answer.

    make quickstart      (or, in an environment of your own: python -m scripts.quickstart)

The command is the one for LLaMA-7B on four GPUs, sharding included. What is different is printed: paths, number of
processes, epochs, batch and learning rate. Everything is written to ./quickstart, which is made anew each time.
"""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from alpaca.common import commands
from alpaca.common.errors import reported
from alpaca.data.prompts import format_prompt
from alpaca.data.rows import load_rows
from scripts.make_tiny_model import ROOT, make_tiny_model

README_FLAGS = {
    "--nproc_per_node": "4",
    "--model_name_or_path": "<your_path_to_hf_converted_llama_ckpt_and_tokenizer>",
    "--data_path": "./alpaca_data.json",
    "--bf16": "True",
    "--output_dir": "<your_output_dir>",
    "--num_train_epochs": "3",
    "--per_device_train_batch_size": "4",
    "--per_device_eval_batch_size": "4",
    "--gradient_accumulation_steps": "8",
    "--evaluation_strategy": "no",
    "--save_strategy": "steps",
    "--save_steps": "2000",
    "--save_total_limit": "1",
    "--learning_rate": "2e-5",
    "--weight_decay": "0.",
    "--warmup_ratio": "0.03",
    "--lr_scheduler_type": "cosine",
    "--logging_steps": "1",
    "--fsdp": "full_shard auto_wrap",
    "--fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    "--tf32": "True",
}


def fresh_folder(folder: Path, program: str = "quickstart") -> Path:
    """Empty `folder`, but only if an earlier `program` made it."""
    marker = folder / f".made-by-{program}"
    if folder.exists() and not marker.exists():
        raise SystemExit(f"{program}: {folder} exists and was not made by {program}; pass another --folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marker.touch()
    return folder


def differences(folder: Path, processes: int, epochs: int) -> dict[str, str]:
    """What a tiny model on a small machine needs otherwise than LLaMA-7B on four A100."""
    return {
        "--nproc_per_node": str(processes),
        "--model_name_or_path": str(folder / "base"),
        "--data_path": str(ROOT / "seed_tasks.jsonl"),
        "--output_dir": str(folder / "tuned"),
        "--num_train_epochs": str(epochs),
        "--per_device_train_batch_size": str(max(4 // processes, 1)),
        "--gradient_accumulation_steps": "1",
        "--learning_rate": "1e-3",
        "--logging_steps": "20",
    }


def shown(word: str | Path) -> str:
    """As short as it can be typed in this folder."""
    path = Path(word)
    return shlex.quote(str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else word))


def run(command: list[str | Path], answers: str | None = None, **env: str) -> None:
    """Show `command` and run it, with `answers` as what is typed there. Raises SystemExit if it fails."""
    print(f"\n$ {' '.join(map(shown, command))}\n", flush=True)
    if status := subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, input=answers, text=True).returncode:
        raise SystemExit(f"the last command failed with exit status {status}; its output is above")


def torchrun_command(flags: dict[str, str]) -> list[str]:
    words = [f"{name}={value}" for name, value in flags.items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", words[0], f"--master_port={free_port()}"]
    return [*launcher, str(ROOT / "train.py"), *words[1:]]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def check_loss_fell(output_dir: Path) -> tuple[float, float]:
    """The first and the last logged loss. Raises SystemExit unless the last is less than half of the first."""
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if not losses[-1] < losses[0] / 2:
        raise SystemExit(f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}; it should have halved")
    return losses[0], losses[-1]


def answer(output_dir: Path, instructions: list[str]) -> list[str]:
    """Reload the model as anybody would and answer greedily, with the prompt it was trained on."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(output_dir, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(output_dir, trust_remote_code=False)
    answers = []
    for instruction in instructions:
        inputs = tokenizer(format_prompt({"instruction": instruction}), return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=100, do_sample=False)
        answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def publish_and_recover(folder: Path) -> None:
    """Run the README's three commands; raises SystemExit unless the recovered model is the trained one, bit for bit."""
    raw, tuned, diff, recovered = (folder / name for name in ("base", "tuned", "diff", "recovered"))
    program = [sys.executable, ROOT / "weight_diff.py"]
    run([*program, "make_diff", "--path_raw", raw, "--path_tuned", tuned, "--path_diff", diff])
    run([*program, "recover", "--path_raw", raw, "--path_diff", diff, "--path_tuned", recovered])
    run([*program, "verify", "--path_diff", diff, "--path_tuned", tuned])


def fine_tune(changed: dict[str, str]) -> None:
    """Run the README's command with the flags `changed`. Raises SystemExit unless the loss halves."""
    import torch

    print("The README's command for LLaMA-7B, with these differences:")
    for name, value in changed.items():
        print(f"    {name:32}{README_FLAGS[name]} -> {value}")
    processes = int(changed["--nproc_per_node"])
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if 0 < torch.cuda.device_count() < processes else {}
    if hidden:
        print(f"(on the CPU: {processes} processes need as many GPUs; --nproc_per_node 1 takes one)", flush=True)
    run(torchrun_command({**README_FLAGS, **changed}), **hidden)
    tuned = Path(changed["--output_dir"])
    first, last = check_loss_fell(tuned)
    print(f"\nThe loss fell from {first:.2f} to {last:.2f}; the curve is {tuned / 'loss.png'}")


def quickstart(folder: Path = ROOT / "quickstart", nproc_per_node: int = 2, num_train_epochs: int = 10) -> None:
    """Run it.

    Args:
        folder: where everything is written; it is made anew.
        nproc_per_node: processes of the training.
        num_train_epochs: of the training; with fewer it learns nothing by heart.
    """
    folder = fresh_folder(folder.resolve())
    print(
        "1. A base model of 2 layers with random weights, its tokenizer trained on this repository's text", flush=True
    )
    make_tiny_model(folder / "base", hidden_size=256, num_hidden_layers=2)

    print("\n2. Fine-tuning it on the 175 seed tasks, parameters sharded over the processes", flush=True)
    fine_tune(differences(folder, nproc_per_node, num_train_epochs))

    print("\n3. Reloading the saved model with AutoModelForCausalLM and asking it what it was trained on\n", flush=True)
    rows = [
        row for row in load_rows(str(ROOT / "seed_tasks.jsonl")) if not row.get("input") and len(row["output"]) < 90
    ]
    rows = rows[:5]
    answers = answer(folder / "tuned", [row["instruction"] for row in rows])
    for row, text in zip(rows, answers):
        print(f"Instruction: {row['instruction']}\nAnswer:      {text}\n")
    learned = sum(text == row["output"] for row, text in zip(rows, answers))
    print(f"{learned} of {len(rows)} answers are word for word those of the training data.")
    if learned == 0:
        raise SystemExit("quickstart: the model repeats none of its training data; something is wrong")

    print("\n4. Publishing it as its difference from the base model, and recovering it from there", flush=True)
    publish_and_recover(folder)
    print(NEXT_STEPS.format(tuned=shown(folder / "tuned"), base=shown(folder / "base")))


NEXT_STEPS = """
Next, talk to what you have trained, at the terminal or in the browser (it knows little more than the seed tasks):

    source .venv/bin/activate
    python -m scripts.generate --model {tuned} --interactive
    python -m scripts.demo --model {tuned} --compare {base}

And then a real model, on one GPU or more:

    MODEL=<folder or hub id of LLaMA-7B> DATA=tatsu-lab/alpaca OUTPUT=output/alpaca-7b NPROC=4 recipes/llama_7b.sh
"""


def main(argv: Sequence[str] | None = None) -> None:
    commands.call("scripts.quickstart", quickstart, argv, __doc__)


if __name__ == "__main__":
    with reported("scripts.quickstart"):
        main()
