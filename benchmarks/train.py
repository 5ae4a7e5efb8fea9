r"""An optimizer step of Alpaca training, side by side: the padded recipe of 2023, today's rivals, and train.py item by
item. One command, one run:

    python -m benchmarks.train --data_path alpaca_data.json                        # CPU, under 12 min
    python -m benchmarks.train --data_path alpaca_data.json --quick                # CPU, under 2 minutes
    python -m benchmarks.train --data_path alpaca_data.json --section rivals       # a CUDA GPU; or items, budget, fsdp
    python -m benchmarks.train --render                                            # the tables of results/ again

The rivals need `pip install -c constraints.txt -r benchmarks/requirements.txt`. What is compared, and how, is in
docs/benchmarks.md; who takes part, in benchmarks/contenders.py.
"""

import argparse
import contextlib
import functools
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, Trainer, TrainerCallback

import train
from alpaca.common.errors import reported
from alpaca.common.files import write_text
from alpaca.data.prompts import format_prompt
from alpaca.data.rows import load_rows
from alpaca.training.metrics import matmul_rate
from benchmarks.contenders import MAX_LENGTH, SECTIONS, SEED, Contender, Setup
from benchmarks.machine import commit, describe_machine, versions
from benchmarks.training_tables import render, summarize
from scripts.make_tiny_model import sentencepiece_tokenizer
from scripts.quickstart import free_port

RESULTS = Path(__file__).resolve().parent / "results"
VOCABULARY = 6144  # gives Alpaca's rows the lengths that they have with Llama-2's tokenizer: mean 129, median 114
NO_GPU = "GPU: not measured."
PACKAGES = "torch transformers accelerate trl flash-attn liger-kernel".split()


# ---- what is trained ----


def make_tokenizer(rows: list[dict[str, str]], folder: Path) -> transformers.PreTrainedTokenizerBase:
    """LLaMA's kind of tokenizer, trained on the rows, with a pad token of its own."""
    texts = ["\n".join((row["instruction"], row.get("input") or "", row["output"])) for row in rows]
    templates = [format_prompt(row) for row in rows[:8]]
    sentencepiece_tokenizer(texts + templates, VOCABULARY, folder)
    tokenizer = AutoTokenizer.from_pretrained(
        folder, model_max_length=MAX_LENGTH, padding_side="right", trust_remote_code=False
    )
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def describe_rows(dataset: train.SupervisedDataset) -> dict[str, Any]:
    lengths = sorted(len(ids) for ids in dataset.input_ids)
    targets = sum(int((labels != train.IGNORE_INDEX).sum()) for labels in dataset.labels)
    return {
        "rows": len(lengths),
        "mean": round(sum(lengths) / len(lengths), 1),
        "median": lengths[len(lengths) // 2],
        "longest": lengths[-1],
        "share_of_prompt": round(1 - targets / sum(lengths), 3),
    }


def planned_tokens(dataset: train.SupervisedDataset, per_step: int, steps: int) -> list[int]:
    """Tokens without padding of each of the first steps. Everybody's steps are consecutive pieces of one permutation:
    the Trainer's sampler, batch_rebalance, TRL's and ours draw the same."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(SEED)).tolist()
    pieces = [order[i * per_step : (i + 1) * per_step] for i in range(steps)]
    return [sum(len(dataset.input_ids[row]) for row in piece) for piece in pieces]


def model_shape(device: torch.device, vocab_size: int) -> LlamaConfig:
    """About 15 M parameters on a CPU. On a GPU LLaMA-7B; where 18 bytes a parameter (float32 weights, gradients and
    AdamW's moments, bfloat16 copies) would take more than 85% of the card: fewer of its layers."""
    if device.type == "cpu":
        return LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=6,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            use_cache=False,
        )
    memory = torch.cuda.get_device_properties(device).total_memory
    for layers in (32, 24, 16, 12, 8, 4, 2):
        parameters = 2 * 32001 * 4096 + layers * (4 * 4096**2 + 3 * 4096 * 11008)
        if 18 * parameters < 0.85 * memory:
            break
    return LlamaConfig(vocab_size=32001, num_hidden_layers=layers, tie_word_embeddings=False, use_cache=False)


# ---- one contender's turn ----


class StepClock(TrainerCallback):
    """Notes when each optimizer step ends, and ends the training at `deadline` (time.perf_counter)."""

    def __init__(self, deadline: float):
        self.ends: list[float] = []
        self.deadline = deadline

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        control.should_training_stop |= self.ends[-1] > self.deadline


def cpu_seconds() -> tuple[float, float]:
    """CPU time that all processes of the machine have taken so far, and that this one has."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0), time.process_time()


def count_packed_rows(trainer: Trainer) -> list[tuple[Tensor, int]]:
    """Rows and tokens of every micro-batch that `trainer` will train on, from its position ids."""
    counts, training_step = [], trainer.training_step

    def counted(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        positions = inputs["position_ids"]
        counts.append(((positions == 0).sum(), positions.numel()))
        return training_step(model, inputs, *args, **kwargs)

    trainer.training_step = counted
    return counts


def clock_waits(trainer: Trainer) -> list[float]:
    """Seconds of each step in which its micro-batches are fetched. The step before has ended on the device by then
    (StepClock), so that it idles meanwhile: planning, collating and padding are the host's."""
    waits, fetch = [], trainer.get_batch_samples

    def fetched(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = fetch(*args, **kwargs)
        waits.append(time.perf_counter() - begin)
        return result

    trainer.get_batch_samples = fetched
    return waits


def take_turn(contender: Contender, setup: Setup, warmup: int, deadline: float) -> dict[str, Any]:
    """Train `setup.steps` steps, the first `warmup` of them untimed: seconds, examples and tokens of the others, loss
    and gradient norm of the first. A step lasts from the end of the one before: loading its rows is part of it.
    `others` is the share of the cores that other processes took meanwhile."""
    gpu = setup.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    transformers.set_seed(SEED)
    trainer = contender.build(setup, **contender.flags)
    clock = StepClock(deadline)
    trainer.add_callback(clock)
    counts, waits = count_packed_rows(trainer) if contender.own_rows else [], clock_waits(trainer)
    before, begin = cpu_seconds(), time.perf_counter()
    trainer.train()
    taken = time.perf_counter() - begin
    others = (cpu_seconds()[0] - before[0]) - (cpu_seconds()[1] - before[1])
    if len(clock.ends) <= warmup:
        raise TimeoutError("not one step was timed before the time was over")
    seconds = [after - before for before, after in zip(clock.ends, clock.ends[1:])][warmup - 1 :]
    steps = range(warmup, warmup + len(seconds))
    if contender.own_rows:
        micro = trainer.args.gradient_accumulation_steps
        pieces = [counts[step * micro : (step + 1) * micro] for step in steps]
        examples, tokens = ([sum(int(count[i]) for count in piece) for piece in pieces] for i in (0, 1))
    else:
        examples = [setup.per_step for _ in steps]
        tokens = planned_tokens(setup.dataset, setup.per_step, setup.steps)[warmup : warmup + len(seconds)]
    first = trainer.state.log_history[0]
    turn = {
        "seconds": seconds,
        "examples": examples,
        "tokens": tokens,
        "loss": first["loss"],
        "grad_norm": first["grad_norm"],
        "waits": waits[warmup : warmup + len(seconds)],
        "mfu": [entry["mfu"] for entry in trainer.state.log_history if "mfu" in entry][warmup : warmup + len(seconds)],
        "others": others / taken / os.cpu_count(),
    }
    return {**turn, "peak_GB": torch.cuda.max_memory_allocated() / 1e9} if gpu else turn


def attempt(contender: Contender, setup: Setup, warmup: int, deadline: float) -> dict[str, Any]:
    """`take_turn`, or {"failed": why}: a run that nobody watches goes on with the next contender."""
    if time.perf_counter() > deadline:
        return {"failed": "not reached in the time given"}
    with contextlib.redirect_stdout(sys.stderr):
        try:
            turn = take_turn(contender, setup, warmup, deadline)
        except torch.OutOfMemoryError:
            turn = {"failed": "out of memory"}
        except ImportError as error:
            turn = {"failed": f"not installed: {error.name}"}
        except Exception as error:
            traceback.print_exc()
            turn = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
    torch.compiler.reset()
    gc.collect()
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()
        if (left := torch.cuda.memory_allocated()) > 1e9:
            print(f"{contender.name} left {left / 1e9:.0f} GB behind", file=sys.stderr)
    return turn


# ---- sections ----


def measure_section(
    contenders: list[Contender],
    setup: Setup,
    rounds: int,
    warmup: int,
    deadline: float,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """All contenders in turn, `rounds` times, there and back, so that a drift of the machine hits all alike. `keep`
    gets the section as it is after every turn: a run that is cut off leaves what it had."""
    turns: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in contenders}
    flops = matmul_rate(setup.device, torch.bfloat16) if setup.device.type == "cuda" else None
    for number in range(rounds):
        for contender in contenders if number % 2 == 0 else contenders[::-1]:
            mine = turns[contender.name]
            if mine and "failed" in mine[0]:
                continue
            mine.append(attempt(contender, setup, warmup, deadline))
            if "failed" in mine[-1] and len(mine) > 1:
                mine.pop()  # the time was over
                continue
            told = mine[-1].get("failed") or f"{sum(mine[-1]['examples']) / sum(mine[-1]['seconds']):.2f} examples/s"
            print(f"round {number + 1} | {contender.name} | {told}", flush=True)
            keep(describe_section(contenders, turns, setup, rounds, warmup, flops))
    return describe_section(contenders, turns, setup, rounds, warmup, flops)


def describe_section(
    contenders: list[Contender],
    turns: Mapping[str, list[dict[str, Any]]],
    setup: Setup,
    rounds: int,
    warmup: int,
    flops: float | None,
) -> dict[str, Any]:
    """The section of a result file, of the turns so far."""
    turns = {name: mine for name, mine in turns.items() if mine}
    gpu = setup.device.type == "cuda"
    with torch.device("meta"):
        parameters = transformers.LlamaForCausalLM(setup.config).num_parameters()
    counted = parameters - setup.config.vocab_size * setup.config.hidden_size
    return {
        "model": {
            "parameters": parameters,
            **{
                name: getattr(setup.config, name)
                for name in (
                    "hidden_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "intermediate_size",
                    "vocab_size",
                )
            },
        },
        "arithmetic": "bfloat16 autocast, float32 weights" if gpu else "float32",
        "examples_per_step": setup.per_step,
        "steps": {"rounds": rounds, "untimed": warmup, "timed": setup.steps - warmup},
        "tokens_of_rows": describe_rows(setup.dataset),
        "matmul_TFLOP_per_s": round(flops / 1e12, 1) if gpu else None,
        "contenders": summarize(turns, [c.name for c in contenders if c.own_rows], counted, flops),
        "flags": {c.name: dict(c.flags) for c in contenders},
        "machine": describe_machine(),
        "versions": versions(PACKAGES),
        "commit": commit(),
    }


def run(
    options: argparse.Namespace, device: torch.device, folder: Path, keep: Callable[[str, dict[str, Any]], None]
) -> dict[str, dict[str, Any]]:
    """The section asked for; on a CPU it has two, with 32 and with 128 examples a step. `keep` gets a section, as
    it is, after every turn."""
    deadline = time.perf_counter() + 60 * options.minutes
    rows = load_rows(options.data_path)[: options.rows]
    (folder / "rows.json").write_text(json.dumps(rows))
    tokenizer = make_tokenizer(rows, folder)
    with contextlib.redirect_stdout(sys.stderr):
        dataset = train.SupervisedDataset(str(folder / "rows.json"), tokenizer, cache_dir=str(folder / "cache"))
    config = model_shape(device, len(tokenizer))
    setup = Setup(config, tokenizer, dataset, str(folder / "output"), device, per_step=128, steps=6)
    contenders = SECTIONS[options.section](options.tokens_per_pack)
    if options.section != "cpu":
        if device.type == "cpu":  # a rehearsal
            config.num_hidden_layers, setup = 1, replace(setup, per_step=16, steps=3)
        kept = functools.partial(keep, options.section)
        return {options.section: measure_section(contenders, setup, options.rounds or 1, 2, deadline, kept)}
    plans = {"32 examples a step": (32, 3, 3), "128 examples a step": (128, 2, 3)}  # examples, steps, rounds
    if options.quick:
        plans = {"32 examples a step": (32, 2, 1)}
    sections = {}
    for name, (per_step, steps, rounds) in plans.items():
        print(f"--- {name}", flush=True)
        part = replace(setup, per_step=per_step, steps=steps)
        kept = functools.partial(keep, name)
        sections[name] = measure_section(contenders, part, options.rounds or rounds, 1, deadline, kept)
    return sections


def render_files(paths: list[Path]) -> str:
    files = [json.loads(path.read_text()) for path in paths]
    missing = [] if any(section["matmul_TFLOP_per_s"] for file in files for section in file.values()) else [NO_GPU]
    return "\n".join([*map(render, files), *missing])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", default="alpaca_data.json", help="Alpaca rows: a file or a hub id")
    parser.add_argument("--rows", type=int, default=1000, help="how many of them")
    parser.add_argument("--section", choices=SECTIONS, help="cpu, or what to measure on a GPU (rivals)")
    parser.add_argument("--quick", action="store_true", help="on a CPU: one step, one round, 32 examples a step")
    parser.add_argument("--rounds", type=int, help="turns of every contender (CPU: 3, GPU: 1)")
    parser.add_argument("--tokens_per_pack", default="4096", help="of ours, in all sections but budget")
    parser.add_argument("--minutes", type=float, help="no turn begins later than that (CPU: 11.5, GPU: 4)")
    parser.add_argument("--output", type=Path, help="result file; other sections in it are kept")
    parser.add_argument("--render", type=Path, nargs="*", help="only print tables, of these files or of results/")
    options = parser.parse_args()
    if options.render is not None:
        return print(render_files(options.render or sorted(RESULTS.glob("train_*.json"))))
    gpu = torch.cuda.is_available()
    options.section = options.section or ("rivals" if gpu else "cpu")
    options.minutes = options.minutes or (4 if options.section != "cpu" else 11.5)
    device = torch.device("cuda" if gpu and options.section != "cpu" else "cpu")
    if options.section == "fsdp" and "LOCAL_RANK" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", f"--master_port={free_port()}"]
        sys.exit(subprocess.run([*launcher, "-m", "benchmarks.train", *sys.argv[1:]]).returncode)
    torch.set_num_threads(os.cpu_count())
    name = re.sub(r"\W+", "_", torch.cuda.get_device_name()).lower() if device.type == "cuda" else "cpu"
    rehearsal = device.type == "cpu" and options.section != "cpu"
    output = options.output or (None if rehearsal or options.quick else RESULTS / f"train_{name}.json")
    kept = json.loads(output.read_text()) if output and output.exists() else {}

    def keep(name: str, section: dict[str, Any]) -> None:
        kept[name] = section
        if output:
            output.parent.mkdir(parents=True, exist_ok=True)
            write_text(output, json.dumps(kept, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        sections = run(options, device, Path(folder), keep)
    print(render(sections))


if __name__ == "__main__":
    with reported("benchmarks.train"):
        main()
