"""How fast the training goes, for its log lines, trainer_state.json and the trackers of --report_to.

tokens_per_second     tokens of the rows, all ranks together; padding is not counted, a shared prefix in every row
examples_per_second   rows
padding_share         padding among all tokens that went through the model
mfu                   6 x parameters x tokens_per_second / (ranks x the rate of a large matrix product here): the
                      share of what this hardware can do that went into the rows' tokens. 4 x for frozen parameters,
                      which have no gradient. The input embedding, which is looked up, is not counted, nor is
                      attention. The rate is measured when training starts, in the dtype of the arithmetic; published
                      figures divide by the data sheet's, which is higher.
peak_memory_gb        10^9 bytes: allocated on the GPU of rank 0 by torch; on a CPU, of its process
"""

import functools
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from alpaca.common.errors import UsageError
from alpaca.packing.packing import StepTotals

if TYPE_CHECKING:
    from transformers import TrainingArguments


class SpeedMeter:
    """Count steps between log lines. All counts are known from the plan, so that nothing waits for the device."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype, world_size: int):
        self.device, self.dtype = device, dtype
        self.world_size = world_size
        self.flops_per_token = flops_per_token(model)
        self.rate: float | None = None
        self._since: float | None = None
        self._counted: list[StepTotals] = []

    def begin_step(self, step: StepTotals) -> None:
        if self._since is None:
            self.rate = matmul_rate(self.device, self.dtype)
            self._since = time.time()
        self._counted.append(step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock meanwhile: saving and evaluating are not training."""
        start = time.time()
        yield
        if self._since is not None:
            self._since += time.time() - start

    def flops(self, step: StepTotals) -> float:
        """Return the useful floating point operations of a step, per rank."""
        return self.flops_per_token * step.tokens / self.world_size

    def read(self) -> dict[str, float]:
        """Return the figures since the last call."""
        seconds, steps = max(time.time() - self._since, 1e-9), self._counted
        self._since, self._counted = time.time(), []
        rows, tokens, computed, padding = (
            sum(getattr(step, name) for step in steps) for name in ("rows", "tokens", "computed", "padding")
        )
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "examples_per_second": round(rows / seconds, 2),
            "padding_share": round(padding / max(computed, 1), 4),
            "mfu": round(self.flops_per_token * tokens / seconds / (self.world_size * self.rate), 4),
            "peak_memory_gb": round(peak_memory(self.device) / 1e9, 2),
        }


class LossTracker:
    """The losses of the steps since the last log line, and the gradient norm of the last step."""

    def __init__(self):
        self.losses: list[float] = []
        self.grad_norm: float | None = None

    def add(self, loss: float, grad_norm: float | None) -> None:
        self.losses.append(loss)
        self.grad_norm = grad_norm

    def read(self) -> tuple[float, dict[str, float]]:
        """Return the sum of the losses since the last call, and what is logged: their mean, and the gradient norm."""
        losses, self.losses = self.losses, []
        logs = {"loss": sum(losses) / len(losses)}
        if self.grad_norm is not None:
            logs["grad_norm"] = self.grad_norm
        return sum(losses), logs


def flops_per_token(model: nn.Module) -> int:
    """Return two for every parameter that a token is multiplied with (all but the input embedding, unless it is the
    output's too), two for the gradient of its input, and two for its own."""
    embedding = next(model.get_input_embeddings().parameters())
    output = model.get_output_embeddings()
    looked_up = output is None or output.weight is not embedding
    counted = (p for p in model.parameters() if not (looked_up and p is embedding))
    return sum((6 if p.requires_grad else 4) * _numel(p) for p in counted)


def _numel(parameter: nn.Parameter) -> int:
    """Return the number of weights: bitsandbytes keeps two of 4 bits in a byte, DeepSpeed an empty tensor in the
    model."""
    quantized = getattr(parameter, "quant_state", None)
    return quantized.shape.numel() if quantized is not None else getattr(parameter, "ds_numel", parameter.numel())


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating point operations per second of a product of two square matrices, the best of five."""
    size = 8192 if device.type == "cuda" else 1024
    own = torch.Generator(device).manual_seed(0)  # the global one draws the dropout masks of the run
    left, right = (torch.randn(size, size, generator=own, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):  # the first warms up
        _wait_for(device)
        start = time.perf_counter()
        left @ right
        _wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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


# ---- trackers ----


def check_trackers(args: "TrainingArguments") -> None:
    """Raise UsageError for a tracker of --report_to that transformers does not know, or that is not installed."""
    known = integration_utils.INTEGRATION_TO_CALLBACK
    installed = {*integration_utils.get_available_reporting_integrations(), "azure_ml", "flyte"}  # not told of these
    for name in args.report_to:
        if name not in known:
            raise UsageError(f"--report_to {name}: expected none, all or some of {', '.join(known)}")
        if name not in installed:
            package = {"comet_ml": "comet-ml", "azure_ml": "azureml-mlflow", "flyte": "flytekit"}.get(name, name)
            raise UsageError(f"--report_to {name}: is not installed; pip install {package}")


def names_trackers(run: Callable[..., None]) -> Callable[..., None]:
    """Make `run`, whose last argument has `report_to`, raise UsageError in place of what a tracker raises inside, such
    as one without a login."""

    @functools.wraps(run)
    def with_trackers(*arguments: Any) -> None:
        try:
            run(*arguments)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            if not any(frame.filename == integration_utils.__file__ for frame in frames):
                raise
            names = " ".join(arguments[-1].report_to)
            offline = "; WANDB_MODE=offline keeps the run on this machine" if "wandb login" in str(error) else ""
            raise UsageError(f"--report_to {names}: a tracker failed: {error}{offline}") from error

    return with_trackers
