"""What a person sees of a run: one plain line per logging step, a progress bar on a terminal, and loss.png."""

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback


class ConsoleCallback(TrainerCallback):
    """`step 12/1221 | epoch 0.03 | loss 1.2345 | lr 6.49e-06 | grad norm 2.31 | 4,210 tokens/s | ETA 1:12:30`,
    on rank 0. The bar appears only where stderr is a terminal and --disable_tqdm is not given."""

    def __init__(self):
        self.bar: tqdm | None = None
        self.start = (0, time.time())  # step and time of the first step of this process

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = (state.global_step, time.time())
        if state.is_world_process_zero and not args.disable_tqdm and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs):
        nothing_left = "train_loss" in logs and state.global_step == self.start[0]  # resumed at the last step
        if state.is_world_process_zero and logs and not nothing_left:
            tqdm.write(self.line(state, logs), file=sys.stdout)
            sys.stdout.flush()

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()

    def line(self, state, logs: dict[str, Any]) -> str:
        parts = [f"step {state.global_step}/{state.max_steps}", f"epoch {state.epoch or 0:.2f}"]
        for name, label, spec in (
            ("loss", "loss", ".4f"),
            ("eval_loss", "eval loss", ".4f"),
            ("train_loss", "mean training loss", ".4f"),
            ("learning_rate", "lr", ".2e"),
            ("grad_norm", "grad norm", ".2f"),
        ):
            if name in logs:
                parts.append(f"{label} {logs[name]:{spec}}")
        if "tokens_per_second" in logs:
            parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
        if "train_runtime" in logs:
            parts.append(f"took {timedelta(seconds=round(logs['train_runtime']))}")
        elif "loss" in logs:
            parts.append(f"ETA {self.eta(state)}")
        return " | ".join(parts)

    def eta(self, state) -> str:
        first_step, since = self.start
        done = max(state.global_step - first_step, 1)
        return str(timedelta(seconds=round((time.time() - since) / done * (state.max_steps - state.global_step))))


def plot_loss(log_history: list[dict[str, Any]], path: str | Path) -> None:
    """Draw the training (and evaluation) loss over the steps as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
        if points:
            axes.plot(*zip(*points), label=label, linewidth=1, marker="." if len(points) < 50 else None)
    axes.set(xlabel="optimizer step", ylabel="mean cross entropy per target token (nats)", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend() if axes.lines else None
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:  # a full disk: the model is there, and the numbers are in trainer_state.json
        print(f"note: {path} could not be written ({error})", flush=True)
