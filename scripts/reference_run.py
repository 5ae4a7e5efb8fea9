r"""Is my loss right? Train a fixed recipe on a known model and known rows, and compare each step with what is expected.

    make reference DATA=alpaca_data.json [STEPS=20]       SmolLM2-135M: installs it, converts it, trains, compares
    python -m scripts.reference_run --model <folder> --data_path alpaca_data.json --runs bf16 --steps 20
    python -m scripts.reference_run --model <your model> --data_path <your rows> --record mine.json
    python -m scripts.reference_run --model <your model> --data_path <your rows> --reference mine.json

Rows, their order and the weights at the start are fixed, so that only rounding may differ. The band around the expected
loss of a step is three times what rounding was seen to do up to that step (one thread or two, padded or packed, sharded
over two processes; bfloat16 for itself), and at least 0.003. Other seeds are not in it: they would hide a mask that is
off by one. A recipe and its curves belong to one pair of weights and rows, told by SHA-256: configs/reference.

Exit code: 0 within the band, 1 outside of it, 2 on an error, 3 where no curve is known for these weights and rows.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

if __name__ == "__main__":
    from alpaca.common.errors import starting

    starting("scripts.reference_run")

import utils
from alpaca.common import commands
from alpaca.common.distributed import loading_line
from alpaca.common.errors import InputError, ParameterError, UsageError, reported
from alpaca.common.files import read_json, sha256_of_file, write_json
from alpaca.weights.provenance import sha256_of_tensors

ROOT = Path(__file__).resolve().parent.parent
KNOWN = ROOT / "configs" / "reference"
LEAST_BAND, TIMES, SHORT = 0.003, 3, 20  # nats; times the spread; steps of runs that are recorded only in part
OUTSIDE, UNKNOWN, LENGTH = 1, 3, 512  # exit codes; tokens of a row
FLAGS = dict(
    learning_rate="2e-5",
    lr_scheduler_type="constant_with_warmup",  # so that fewer steps are the beginning of more
    warmup_steps="3",
    weight_decay="0.",
    model_max_length=str(LENGTH),
    seed="42",
    logging_steps="1",
    save_strategy="no",
    report_to="none",
)
RECIPES = {"small": (4, 2, 100), "full": (16, 8, 5)}  # rows of a micro-batch, micro-batches of a step, steps


@dataclass(frozen=True)
class Run:
    """A way to train the recipe. `curve`: what it is compared with, and what it widens the band of. `most`: steps of it
    that are recorded, where fewer than all."""

    curve: str
    flags: dict[str, str] = field(default_factory=dict)
    most: int | None = None
    processes: int = 1
    threads: int | None = None


@dataclass(frozen=True)
class Setup:
    model: str
    data_path: str
    recipe: str
    output: Path


LORA = dict(lora_r="8", learning_rate="3e-4")
FSDP = dict(fsdp="full_shard auto_wrap", fsdp_transformer_layer_cls_to_wrap="LlamaDecoderLayer")
RUNS = {
    "float32": Run("float32", dict(bf16="False")),
    "one_thread": Run("float32", threads=1),
    "padded": Run("float32", dict(batching="padded")),
    "fsdp": Run("float32", FSDP, SHORT, processes=2),
    "bf16": Run("bf16", dict(bf16="True"), SHORT),
    "bf16_padded": Run("bf16", dict(bf16="True", batching="padded"), SHORT),
    "lora": Run("lora", LORA, SHORT),
    "lora_padded": Run("lora", {**LORA, "batching": "padded"}, SHORT),
    "plain": Run("plain", most=50),
    "reproduce_2023": Run("plain", dict(reproduce_2023="True"), most=50),
    **{f"seed_{seed}": Run("seeds", dict(seed=str(seed))) for seed in (1, 2, 3)},
}
# The run in the middle of each curve.
CENTER = {"float32": "float32", "bf16": "float32", "lora": "lora", "plain": "plain", "seeds": "float32"}


def reference_run(
    model: str,
    data_path: str,
    runs: str | None = None,
    steps: int | None = None,
    recipe: Literal["small", "full"] | None = None,
    output_dir: str = "output/reference",
    reference: str | None = None,
    record: str | None = None,
    gguf: str | None = None,
) -> None:
    """Train the reference recipe and compare its loss with the expected curve.

    Args:
        model: folder of the model to train.
        data_path: rows to train on, a file.
        runs: which runs, by commas: float32, one_thread, padded, fsdp, bf16, lora, reproduce_2023, plain (a loop in
            transformers alone); omit it for bf16 on a GPU and float32 elsewhere, or with --record for all.
        steps: how many; fewer are the beginning of the curve. Omit it for all.
        recipe: small has 8 rows a step, full 128; omit it for full on a GPU and small elsewhere.
        output_dir: where each run has its folder, with the picture of its curve.
        reference: file with the expected curves; omit it for the one in configs/reference that fits.
        record: write such a file for this model and these rows from runs of it. Finished ones in output_dir are kept.
        gguf: convert this file to float32 first where there is no model yet; needs the gguf package.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    recipe = recipe or ("full" if on_gpu else "small")
    names = names_of(runs, record is not None, on_gpu)
    if steps is not None and steps < 1:
        raise ParameterError(f"{{steps}} {steps}: expected at least 1", "steps")
    if not Path(data_path).is_file():
        raise InputError(f"{data_path}: no such file; docs/results.md says where the original is", data_path)
    if gguf and not Path(model).exists():
        convert(gguf, model)
    setup, pair = Setup(model, data_path, recipe, Path(output_dir)), digests(model, data_path)
    if record:
        record_curves(Path(record), pair, setup, names, steps)
        return
    known = find_reference(pair, reference)
    if isinstance(known, str):
        print(f"verdict: {known}", "--record FILE measures curves of your own pair", sep="\n", flush=True)
        raise SystemExit(UNKNOWN)
    if recipe not in known["recipes"]:
        raise ParameterError(f"{{recipe}} {recipe}: the reference has only {', '.join(known['recipes'])}", "recipe")
    expected = known["recipes"][recipe]
    if (expected["flags"], expected["rows_per_step"]) != (FLAGS, math.prod(RECIPES[recipe][:2])):
        raise UsageError("the reference was recorded with another recipe than this version's; --record it anew")
    verdicts = [check(name, expected["curves"], steps, setup) for name in names]
    if seeds := expected.get("seeds"):
        ends = ", ".join(f"{loss:.2f}" for loss in seeds["others"])
        print(f"other seeds, which are not in the band: {ends} at the end; this one {seeds['this']:.2f}", flush=True)
    if not all(verdicts):
        raise SystemExit(OUTSIDE)


def names_of(runs: str | None, recording: bool, on_gpu: bool) -> list[str]:
    able = [name for name, run in RUNS.items() if recording or run.curve != "seeds"]
    names = runs.split(",") if runs else able if recording else ["bf16" if on_gpu else "float32"]
    if unknown := [name for name in names if name not in able]:
        raise ParameterError(f"{{runs}} {unknown[0]}: expected some of {','.join(able)}", "runs")
    if recording and (center := next((c for n in names if (c := CENTER[RUNS[n].curve]) not in names), None)):
        raise ParameterError(f"{{runs}} {runs}: cannot be recorded without {center}; add it", "runs")
    return names


# ---- which model and rows ----


def digests(model: str, data_path: str) -> dict[str, str]:
    """Return the SHA-256 of the tensors, of the tokenizer (its vocabulary, and the ids of a text of ours), and of the
    file of rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    ids = tokenizer((ROOT / "prompt.txt").read_text(encoding="utf-8"))["input_ids"]
    known = json.dumps([sorted(tokenizer.get_vocab().items()), ids])
    return {
        "weights": sha256_of_tensors(model),
        "tokenizer": hashlib.sha256(known.encode()).hexdigest(),
        "rows": sha256_of_file(Path(data_path)),
    }


def find_reference(pair: dict[str, str], path: str | None) -> dict[str, Any] | str:
    """Return the reference of this pair, or a sentence that says what there is none for."""
    files = [Path(path)] if path else sorted(KNOWN.glob("*.json"))
    known = [read_json(file) for file in files]
    for what in pair:  # weights, tokenizer, rows
        known = [entry for entry in known if entry.get("sha256", {}).get(what) == pair[what]]
        if not known:
            return f"no expected curve for these {what} (SHA-256 {pair[what]})"
    return known[0]


def convert(gguf: str, model: str) -> None:
    """Write the float32 checkpoint of a GGUF file, its tokenizer without a chat template: a base model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Path(gguf)
    if not source.is_file():
        raise InputError(f"{gguf}: no such file", gguf)
    named = dict(gguf_file=source.name)
    with loading_line(gguf):
        tokenizer = AutoTokenizer.from_pretrained(source.parent, trust_remote_code=False, **named)
        named |= dict(dtype=torch.float32)
        read = AutoModelForCausalLM.from_pretrained(source.parent, trust_remote_code=False, **named)
        settings = {key: value for key, value in read.config.to_dict().items() if not key.startswith("quantization")}
        plain = type(read)(type(read.config).from_dict(settings))  # transformers does not save what came from a GGUF
        plain.load_state_dict(read.state_dict(), strict=True)
        tokenizer.chat_template = None
        plain.save_pretrained(model)
        tokenizer.save_pretrained(model)
    print(f"wrote {model}", flush=True)


# ---- a run ----


def train(name: str, steps: int, setup: Setup) -> list[float]:
    """Return the loss of each step of a run. One whose folder has it already is not repeated."""
    folder = setup.output / name
    flags, curve = flags_of(name, steps, setup), folder / "curve.json"
    if curve.is_file() and (before := read_json(curve)).get("flags") == flags:
        print(f"{name}: taken from {folder}", flush=True)
        return before["loss"]
    if name == "plain":
        losses = []
        for loss in islice(plain_loop(setup), steps):
            losses.append(loss)
            print(f"plain: step {len(losses)}/{steps} | loss {loss:.4f}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(curve, {"flags": flags, "loss": losses})
        return losses
    run, launcher = RUNS[name], [sys.executable]
    words = [f"--{key}={value}" for key, value in flags.items()]
    if run.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={run.processes}"]
    threads = {} if run.threads is None else {"OMP_NUM_THREADS": str(run.threads)}
    print(f"\n{name}:", flush=True)
    done = subprocess.run([*launcher, str(ROOT / "train.py"), *words], env={**os.environ, **threads})
    if done.returncode:
        raise UsageError(f"{name}: train.py ended with exit status {done.returncode}; its output is above")
    entries = [entry for entry in read_json(folder / "trainer_state.json")["log_history"] if "loss" in entry]
    losses, rates = ([entry[key] for entry in entries] for key in ("loss", "tokens_per_second"))
    write_json(curve, {"flags": flags, "loss": losses, "tokens_per_second": median(rates)})
    return losses


def flags_of(name: str, steps: int, setup: Setup) -> dict[str, str]:
    """Return the flags of train.py for a run. A step has the same rows over several processes."""
    run, (rows, accumulation, _) = RUNS[name], RECIPES[setup.recipe]
    return {
        "model_name_or_path": setup.model,
        "data_path": setup.data_path,
        "output_dir": str(setup.output / name),
        "overwrite_output_dir": "True",
        "max_steps": str(steps),
        "per_device_train_batch_size": str(rows),
        "gradient_accumulation_steps": str(accumulation // run.processes),
        **FLAGS,
        **run.flags,
    }


def plain_loop(setup: Setup) -> Iterator[float]:
    """Yield the loss of each step of 2023's recipe: its rows, labels, padding, micro-batches and mean of means, in a
    loop of ten lines around transformers' model. Of this project only the text of the two prompts has a part in it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from train import PROMPT_DICT

    batch_size, accumulation, _ = RECIPES[setup.recipe]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = utils.jload(setup.data_path)
    tokenizer = AutoTokenizer.from_pretrained(setup.model, trust_remote_code=False, model_max_length=LENGTH)
    network = AutoModelForCausalLM.from_pretrained(setup.model, trust_remote_code=False, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(network.to(device).parameters(), lr=0.0, weight_decay=0.0)
    torch.manual_seed(int(FLAGS["seed"]))
    drawn = torch.empty((), dtype=torch.int64).random_().item()  # transformers 4.28.1 seeds its sampler so
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(drawn)).tolist()

    def ids_and_labels(row: dict[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
        prompt = PROMPT_DICT["prompt_input" if row.get("input") else "prompt_no_input"].format_map(row)
        texts = (prompt + row["output"] + tokenizer.eos_token, prompt)
        whole, of_prompt = (tokenizer(text, truncation=True, return_tensors="pt").input_ids[0] for text in texts)
        return whole, torch.cat([torch.full_like(of_prompt, -100), whole[len(of_prompt) :]])[: len(whole)]

    pad = torch.nn.utils.rnn.pad_sequence
    for step in range(len(order) // (batch_size * accumulation)):
        loss_of_step = 0.0
        for _ in range(accumulation):
            batch = [ids_and_labels(rows[order.pop(0)]) for _ in range(batch_size)]
            ids, labels = (pad(part, batch_first=True, padding_value=-100).to(device) for part in zip(*batch))
            loss = network(input_ids=ids.clamp(min=0), attention_mask=ids.ne(-100).long(), labels=labels).loss
            (loss / accumulation).backward()
            loss_of_step += loss.item() / accumulation
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = float(FLAGS["learning_rate"]) * min(step / int(FLAGS["warmup_steps"]), 1)
        optimizer.step()
        optimizer.zero_grad()
        yield loss_of_step


# ---- the verdict ----


def check(name: str, curves: dict[str, Any], steps: int | None, setup: Setup) -> bool:
    """Train a run, print its verdict, draw it. Return whether each step is within the band."""
    curve = curves.get(RUNS[name].curve)
    if curve is None:
        raise ParameterError(f"{{runs}} {name}: the reference has no curve for it", "runs")
    center, band = curve["loss"], curve["band"]
    if steps is not None and steps > len(center):
        raise ParameterError(f"{{steps}} {steps}: the expected curve of {name} has {len(center)}", "steps")
    steps, folder, start = steps or len(center), setup.output / name, time.time()
    (folder / "curve.json").unlink(missing_ok=True)  # a check is a run, never one that was there
    losses = train(name, steps, setup)
    away = [abs(loss - middle) for loss, middle in zip(losses, center)]
    outside = [at for at in range(steps) if at >= len(away) or not away[at] <= band[at]]
    draw(folder / "reference.png", name, losses, center[:steps], band[:steps])
    rate = read_json(folder / "curve.json").get("tokens_per_second")
    speed = f", {rate:.0f} tokens/s" if rate else ""
    print(f"{folder / 'reference.png'}: the curve and its band; {time.time() - start:.0f} s{speed}")
    if outside:
        first = outside[0]
        got = f"{losses[first]:.4f}" if first < len(losses) else "none"
        where = f"step {first + 1} has loss {got}, expected {center[first]:.4f} +- {band[first]:.4f}"
        print(f"verdict: {name}: OUTSIDE in {len(outside)} of {steps} steps, the first: {where}", flush=True)
        return False
    share = max(distance / width for distance, width in zip(away, band))
    where = f"at most {max(away):.1e} away, {share:.0%} of the band"
    print(f"verdict: {name}: within the band in all of {steps} steps ({where})", flush=True)
    return True


def draw(path: Path, name: str, losses: Sequence[float], center: Sequence[float], band: Sequence[float]) -> None:
    """Draw the loss and the expected one, and below how far apart they are beside the band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    steps = range(1, len(center) + 1)
    above.plot(steps, center, color="tab:gray", linewidth=4, alpha=0.5, label="expected")
    above.plot(steps[: len(losses)], losses, linewidth=1, label=name)
    above.set(ylabel="loss (nats per target token)", title="Reference run")
    above.legend()
    below.fill_between(steps, [-width for width in band], band, color="tab:gray", alpha=0.3, label="band")
    below.plot(steps[: len(losses)], [loss - middle for loss, middle in zip(losses, center)], linewidth=1)
    below.set(xlabel="optimizer step", ylabel="away from expected", ylim=(-3 * max(band), 3 * max(band)))
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


# ---- recording ----


def record_curves(file: Path, pair: dict[str, str], setup: Setup, names: Sequence[str], steps: int | None) -> None:
    """Train each run, and write the recipe's curves and bands to `file`, beside those of the other recipe in it."""
    before = read_json(file) if file.is_file() else {}
    if before and before["sha256"] != pair:
        raise UsageError(f"{file}: has the curves of other weights or rows; give another file")
    steps = steps or RECIPES[setup.recipe][2]
    losses = {name: train(name, min(steps, RUNS[name].most or steps), setup) for name in names}
    of_curve = {curve: {name: losses[name] for name in names if RUNS[name].curve == curve} for curve in CENTER}
    seeds = of_curve.pop("seeds").values()
    curves = {curve: band_of(losses[CENTER[curve]], members) for curve, members in of_curve.items() if members}
    entry = {"flags": FLAGS, "rows_per_step": math.prod(RECIPES[setup.recipe][:2]), "curves": curves}
    if seeds:
        tail = max(steps // 5, 1)
        entry["seeds"] = {"others": [mean(loss[-tail:]) for loss in seeds], "this": mean(losses["float32"][-tail:])}
    write_json(file, {"sha256": pair, "recipes": before.get("recipes", {}) | {setup.recipe: entry}})
    for curve, found in curves.items():
        print(f"{curve}: band of {found['band'][0]:.4f} to {found['band'][-1]:.4f}; furthest: {found['furthest']}")
    print(f"wrote {file}")


def band_of(center: Sequence[float], members: dict[str, Sequence[float]]) -> dict[str, Any]:
    """Return a curve and its band, for as many steps as every curve of its own has: the widest distance of a member up
    to a step, times three."""
    steps = min(len(center), max(map(len, members.values())))
    away = {name: [abs(a - b) for a, b in zip(loss, center)] for name, loss in members.items()}
    furthest = {name: max(distances) for name, distances in away.items()}
    if broken := [name for name, loss in members.items() if not all(map(math.isfinite, loss))]:
        raise UsageError(f"{', '.join(broken)}: a loss is not finite; nothing can be expected of such runs")
    widest = accumulate((max(d[at] for d in away.values() if at < len(d)) for at in range(steps)), max)
    band = [round(max(LEAST_BAND, TIMES * distance), 6) for distance in widest]
    return {"loss": list(center[:steps]), "band": band, "furthest": furthest}


def main(argv: Sequence[str] | None = None) -> None:
    commands.call("scripts.reference_run", reference_run, argv, __doc__)


if __name__ == "__main__":
    with reported("scripts.reference_run"):
        main()
