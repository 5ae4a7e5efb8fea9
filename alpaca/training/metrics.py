"""How fast the training goes, for its log lines, trainer_state.json and the trackers of --report_to.

tokens_per_second     tokens of the rows, all ranks together; padding is not counted, a shared prefix in every row
examples_per_second   rows
padding_share         padding among all tokens that went through the model
mfu                   the operations that the steps computed (Cost), as a share of what the device does in a large
                      product of matrices in the same dtype, measured when training starts. Padding is computed,
                      logits of prompts and shared prefixes are not; what is computed again counts once
useful_mfu            the same of the operations that the rows would take one by one, without padding, every prefix and
                      every logit computed: what other programs call MFU. It is the larger, and may exceed 1, where
                      work is saved. Published figures divide by the data sheet's rate, which is higher
peak_memory_gb        10^9 bytes: allocated on the GPU of rank 0 by torch; on a CPU, of its process
"""

import functools
import math
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
        self.cost = Cost.of(model)
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
        return self.cost.useful(step) / self.world_size

    def read(self) -> dict[str, float]:
        """Return the figures since the last call."""
        seconds, steps = max(time.time() - self._since, 1e-9), self._counted
        self._since, self._counted = time.time(), []
        rows, tokens, computed, padding = (
            sum(getattr(step, name) for step in steps) for name in ("rows", "tokens", "computed", "padding")
        )
        able = seconds * self.world_size * self.rate
        return {
            "tokens_per_second": round(tokens / seconds, 1),
            "examples_per_second": round(rows / seconds, 2),
            "padding_share": round(padding / max(computed, 1), 4),
            "mfu": round(sum(map(self.cost.computed, steps)) / able, 4),
            "useful_mfu": round(sum(map(self.cost.useful, steps)) / able, 4),
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


@dataclass(frozen=True)
class Cost:
    """Floating point operations of a forward and backward pass: two for each weight and token in the forward pass, two
    for the gradient of its input, two for its own if it is trained; of attention four for each pair of tokens, channel
    and layer, and twice that in the backward pass (arXiv 2204.02311, appendix B). Nothing else counts."""

    body: float  # a token's in the layers
    head: float  # a token's in the output embedding
    attention: float  # of a pair of tokens

    @classmethod
    def of(cls, model: nn.Module) -> "Cost":
        config = model.config.get_text_config()
        output, decoder = model.get_output_embeddings(), model.get_decoder()  # without the tower that reads images
        head = _operations(output.weight) if output is not None else 0
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        skipped = tables | ({id(output.weight)} if output is not None else set())
        chosen = getattr(config, "num_experts_per_tok", None)
        weights = [weight for weight in decoder.parameters() if id(weight) not in skipped and len(_shape(weight)) > 1]
        body = sum(_operations(weight) * _share(weight, chosen) for weight in weights)
        heads = getattr(config, "num_attention_heads", 0)  # none in a state space model
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads) if heads else 0
        return cls(body, head, 3 * 4 * config.num_hidden_layers * width)

    def computed(self, step: StepTotals) -> float:
        """Return the operations of a step over all ranks, as it is computed."""
        return self.body * step.computed + self.head * step.logits + self.attention * step.pairs

    def useful(self, step: StepTotals) -> float:
        """Return the operations of its rows one by one, in full."""
        return (self.body + self.head) * step.tokens + self.attention * step.useful_pairs


def _operations(weight: nn.Parameter) -> int:
    return (6 if weight.requires_grad else 4) * math.prod(_shape(weight))


def _share(weight: nn.Parameter, chosen: int | None) -> float:
    """Return what of a weight a token is multiplied with: of experts, which lie in one of three dimensions, those that
    are `chosen`."""
    experts = len(_shape(weight)) == 3 and chosen
    return min(chosen / _shape(weight)[0], 1.0) if experts else 1.0


def _shape(parameter: nn.Parameter) -> Sequence[int]:
    """Return the shape of the weights: bitsandbytes keeps two of 4 bits in a byte, DeepSpeed an empty tensor in the
    model."""
    quantized = getattr(parameter, "quant_state", None)
    return quantized.shape if quantized is not None else getattr(parameter, "ds_shape", parameter.shape)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating point operations per second of a product of two square matrices that saturate the device: the
    best of several, on a CPU of sizes up to one that takes long, as some have no arithmetic for half precision."""
    own = torch.Generator(device).manual_seed(0)  # the global one draws the dropout masks of the run
    best = 0.0
    for size in (8192,) if device.type == "cuda" else (256, 512, 1024, 2048):
        left, right = (torch.randn(size, size, generator=own, device=device, dtype=dtype) for _ in range(2))
        out, times = torch.empty_like(left), []
        while len(times) < 4 or sum(times) < 0.2:  # the first warms up
            _wait_for(device)
            start = time.perf_counter()
            torch.matmul(left, right, out=out)
            _wait_for(device)
            times.append(time.perf_counter() - start)
        best = max(best, 2 * size**3 / min(times))
        if min(times) > 0.1:  # the next takes eight times as long
            break
    return best


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
