"""The model card: README.md in --output_dir, as the hub shows it, from what is known at the end of a run. Its text is
in model_card.md.jinja.

    print(model_card(trainer, flags))

Sections are those of published Alpaca-type models. What is not known is not said: base and data are named by hub id or
by the name of their folder or file, never by a path of this machine; a licence is named where the base's own card has
one, or for a data set of `LICENCES`. Which licence the model has is for its owner to say.
"""

import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Mapping
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
from huggingface_hub import ModelCardData

from alpaca.common.arguments import enum_value
from alpaca.common.commands import ways_on
from alpaca.common.distributed import print_rank0
from alpaca.common.errors import InputError
from alpaca.common.files import atomic_write, sha256_of_file
from alpaca.data.chat_template import separator
from alpaca.data.prompts import TEMPLATE_FILE, format_prompt
from alpaca.data.report import PROBLEMS
from alpaca.packing.sampler import rows_per_step
from alpaca.weights.provenance import CARD_MARKER as MARKER
from alpaca.weights.provenance import front_matter, hub_id_of

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import Trainer

ROOT = Path(__file__).resolve().parents[2]
# Ours; the Trainer's; peft's, as long as nobody has given it a name.
OF_PROGRAMS = (
    MARKER,
    "generated automatically according to the information the Trainer had access to",
    "# Model Card for Model ID",
)
TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
QUESTION = "Give three tips for staying healthy."
ANSWER = "Eat vegetables, sleep enough, and take a walk every day."  # for a backward model
LICENCES = {"tatsu-lab/alpaca": "CC BY-NC 4.0", "seed_tasks.jsonl of this repository": "Apache-2.0"}


def write_model_card(trainer: "Trainer", flags: Mapping[str, Any]) -> None:
    """Write README.md, but not over one that a person wrote. `flags`: of the model and of the data, by name."""
    path = Path(trainer.args.output_dir) / "README.md"
    try:
        if path.exists() and not any(mark in path.read_text(encoding="utf-8") for mark in OF_PROGRAMS):
            return print_rank0(f"note: {path} is not one of ours and stays as it is: no model card is written", 0)
        with atomic_write(path) as file:
            file.write(model_card(trainer, flags))
    except OSError as error:  # a full disk: the model is there
        print_rank0(f"note: {path} could not be written ({error})", 0)


def model_card(trainer: "Trainer", flags: Mapping[str, Any]) -> str:
    args, dataset = trainer.args, trainer.train_dataset
    lora = getattr(trainer.model, "peft_config", {}).get("default")
    base, data = base_source(flags["model_name_or_path"]), data_source(flags["data_path"], flags["data_split"])
    question = ANSWER if flags["backward"] else QUESTION
    problems = dataset.report.problems.items()
    jinja = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    jinja.filters |= {"quoted": json.dumps, "shell": shlex.quote}  # Jinja's own would escape for HTML
    return jinja.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        metadata=metadata(base, data, lora).to_yaml(),
        marker=MARKER,
        name=Path(args.output_dir).resolve().name,
        flags=flags,
        lora=lora,
        base=base,
        data=data,
        dataset=dataset,
        quantization=_quantization(trainer.model) if lora else None,
        chat_template=trainer.processing_class.chat_template,
        separator=separator(dataset.templates["prompt_input"]),
        question=question,
        prompt=repr(format_prompt({"instruction": question}, dataset.templates)),
        fence=_fence("".join(dataset.templates.values())),
        template_file=TEMPLATE_FILE,
        noticed=[f"{PROBLEMS[name].meaning}: {len(rows):,}" for name, rows in problems if rows],
        table=table,
        hyperparameters=hyperparameters(trainer, flags, lora),
        results=results(trainer),
        environment=environment(trainer, lora),
    )


def summary(trainer: "Trainer", backward: bool) -> str:
    """Return what the run leaves in its folder, and what can be done with it; a backward model is asked otherwise."""
    folder, adapter = Path(trainer.args.output_dir), hasattr(trainer.model, "peft_config")
    beside = {"README.md": "the model card", "loss.png": "the curve", "run.yaml": "the flags, for --config"}
    there = [f"{name} ({what})" for name, what in beside.items() if (folder / name).is_file()]
    held = ", ".join([f"the {'adapter' if adapter else 'model'} and its tokenizer", *there])
    line = f"saved to {folder}: {held}"
    return line if backward else f"{line}\n{ways_on(folder, adapter)}"


# ---- where base and data come from ----


class Source(NamedTuple):
    shown: str  # in Markdown
    hub_id: str | None = None
    licence: str | None = None
    details: tuple[str, ...] = ()


def base_source(name: str) -> Source:
    """Return where a model comes from. A folder in the cache of the hub is the model of the hub that it holds."""
    folder = Path(name)
    if not folder.is_dir():
        return Source(f"[{name}](https://huggingface.co/{name})", name)
    licence = _licence(folder)
    if found := hub_id_of(folder):
        hub_id, revision = found
        return Source(f"[{hub_id}](https://huggingface.co/{hub_id}) (revision {revision})", hub_id, licence)
    return Source(f"`{folder.resolve().name}` (a local folder)", None, licence)


def _licence(folder: Path) -> str | None:
    """Return the licence that the card of a model names. One that cannot be read is said, and names none."""
    try:
        found = (front_matter(folder) or {}).get("license")
    except InputError as error:
        print(f"note: {error}; no licence is taken over from it", flush=True)
        return None
    return found if isinstance(found, str) else None


def data_source(path: str, split: str) -> Source:
    """Return where the rows come from, as alpaca.data.rows.load_rows finds them."""
    local = Path(path)
    if not local.exists():
        shown = f"[{path}](https://huggingface.co/datasets/{path})"
        return Source(shown, path, LICENCES.get(path), (f"Split: `{split}`",))
    if local.is_dir():
        return Source(f"`{local.resolve().name}` (a local data set)", details=(f"Split: `{split}`",))
    digest, own = sha256_of_file(local), sha256_of_file(ROOT / "seed_tasks.jsonl")
    licence = LICENCES["seed_tasks.jsonl of this repository"] if digest == own else None
    return Source(f"`{local.name}` (a local file)", None, licence, (f"SHA-256 of the file: `{digest}`",))


# ---- facts ----


def metadata(base: Source, data: Source, lora: "LoraConfig | None") -> ModelCardData:
    """Return the front matter. It has only what the hub can resolve: ids, no local names."""
    return ModelCardData(
        base_model=base.hub_id,
        datasets=[data.hub_id] if data.hub_id else None,
        library_name="peft" if lora else "transformers",
        pipeline_tag="text-generation",
        tags=["alpaca", "lora"] if lora else ["alpaca"],
    )


def hyperparameters(trainer: "Trainer", flags: Mapping[str, Any], lora: "LoraConfig | None") -> dict[str, str | None]:
    """Return the values as run, which may be other than asked for. None: does not apply."""
    args, state = trainer.args, trainer.state
    padded = args.batching == "padded" or any(entry.get("padding_share") for entry in state.log_history)
    sharding = args.fsdp and "FSDP2" + (", in CPU memory" if args.fsdp_config.get("cpu_offload") else "")
    micro_batches = args.gradient_accumulation_steps * args.world_size
    loss = {
        "token": "mean over the target tokens of a step",
        "microbatch": "mean over the means of the micro-batches",
        "2023": f"sum of the means of the micro-batches, divided by {micro_batches}",
    }
    boundary = {"stanford": "tokenized as one text, then the prompt is masked", "split": "tokenized apart"}
    return {
        "Learning rate": f"{args.learning_rate:g}",
        "Schedule": f"{enum_value(args.lr_scheduler_type)}, warmup steps: {args.get_warmup_steps(state.max_steps)}",
        "Epochs": f"{state.epoch:.4g}",
        "Optimizer steps": f"{state.global_step:,}",
        "Global batch": f"{rows_per_step(args)} rows: {args.train_batch_size} per device x "
        f"{args.gradient_accumulation_steps} accumulated x {_processes(args.world_size)}",
        "Maximum length": f"{args.model_max_length} tokens, longer rows are cut on the right",
        "Optimizer": f"{enum_value(args.optim)}, betas {args.adam_beta1:g} and {args.adam_beta2:g}, epsilon "
        f"{args.adam_epsilon:g}, weight decay {args.weight_decay:g}",
        "Gradient clipping": f"{args.max_grad_norm:g}" if args.max_grad_norm else "none",
        "Arithmetic": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "Trained weights": f"float32, saved in {args.save_dtype}",
        "LoRA": lora and f"r {lora.r}, alpha {lora.lora_alpha}, dropout {lora.lora_dropout:g}",
        "LoRA target modules": lora and ", ".join(sorted(_listed(lora.target_modules))),
        "Quantized base": lora and _quantized(trainer.model),
        "Loss": loss["2023" if args.reproduce_2023 else args.loss_normalization],
        "Rows and steps": "as in 2023's train.py (transformers 4.28.1)" if args.reproduce_2023 else None,
        "Label smoothing": f"{args.label_smoothing_factor:g}" if args.label_smoothing_factor else None,
        "NEFTune noise": f"{args.neftune_noise_alpha:g}" if args.neftune_noise_alpha else None,
        "Prompt and answer": boundary[flags["prompt_boundary"]],
        "Batches": "padded" if padded else "packed, attention confined to each row",
        "Activations": "recomputed (gradient checkpointing)" if args.gradient_checkpointing else None,
        "Sharding": sharding or ("DeepSpeed" if args.deepspeed else None),
        "Seed": f"{args.seed}" + (f", of the rows' order {args.data_seed}" if args.data_seed is not None else ""),
    }


def results(trainer: "Trainer") -> dict[str, str | None]:
    """Return what the log says: each loss there is the mean since the entry before, in nats per target token."""
    log, started_at = trainer.state.log_history, getattr(trainer, "started_at", 0)
    losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
    evaluated = [entry for entry in log if "eval_loss" in entry]
    rates = sorted(entry["tokens_per_second"] for entry in log if "tokens_per_second" in entry)
    seconds = next((entry["train_runtime"] for entry in reversed(log) if "train_runtime" in entry), None)
    peak = max((entry.get("peak_memory_gb", 0) for entry in log), default=0)
    weights = [step - before for before, step in zip([0, *losses], losses)]
    since = f", of the steps since {started_at}, where it was resumed" if started_at else ""
    mean = sum(loss * weight for loss, weight in zip(losses.values(), weights)) / max(sum(weights), 1)
    ends = list(losses.items())
    return {
        "First loss logged": f"{ends[0][1]:.4f} (step {ends[0][0]:,})" if ends else None,
        "Last loss logged": f"{ends[-1][1]:.4f} (step {ends[-1][0]:,})" if ends else None,
        "Mean training loss": f"{mean:.4f}" if ends else None,
        "Evaluation loss": f"{evaluated[-1]['eval_loss']:.4f} (step {evaluated[-1]['step']:,})" if evaluated else None,
        "Time": f"{timedelta(seconds=round(seconds))}{since}" if seconds is not None else None,
        "Tokens per second": f"{rates[len(rates) // 2]:,.0f} (median of the log lines)" if rates else None,
        "Peak memory of the first process": f"{peak:.2f} GB" if peak else None,
    }


def environment(trainer: "Trainer", lora: "LoraConfig | None") -> dict[str, str | None]:
    import torch

    args = trainer.args
    processes = f"{_processes(args.world_size)} on {args.device.type}"
    machine = f"{processes} ({platform.machine()}, {os.cpu_count()} cores)"
    gpus = args.device.type == "cuda" and f"{args.world_size} x {torch.cuda.get_device_name(args.device)}"
    packages = ["torch", "transformers", "accelerate", "tokenizers", *(["peft"] if lora else [])]
    packages += ["bitsandbytes"] if getattr(trainer.model.config, "quantization_config", None) else []
    return {
        "Hardware": gpus or machine,
        "Python": platform.python_version(),
        **{name: version(name) for name in packages},
        "train.py": commit(),
    }


def commit() -> str | None:
    """Return the commit of this repository, where it is a git checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    if not (ROOT / ".git").exists():
        return None
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return f"commit {git('rev-parse', 'HEAD')}" + (", with changes that are not committed" if changed else "")
    except (OSError, subprocess.SubprocessError):  # no git, or a folder that it does not trust
        return None


# ---- formatting ----


def table(rows: Mapping[str, str | None]) -> str:
    """Return a Markdown table of two columns, without the rows that are None or empty."""
    lines = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items() if value]
    return "\n".join(["| | |", "|---|---|", *lines])


def _fence(text: str) -> str:
    """Return a fence that is longer than any in `text`, which then stands verbatim between two of it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(3, longest + 1)


def _processes(number: int) -> str:
    return "1 process" if number == 1 else f"{number} processes"


def _quantization(model: Any) -> str | None:
    """Return the arguments of the BitsAndBytesConfig of a quantized base."""
    config = getattr(model.config, "quantization_config", None)
    options = config.to_diff_dict().items() if config else ()
    named = ", ".join(f"{key}={value!r}" for key, value in options if key[0] != "_" and key != "quant_method")
    return named if config else None


def _listed(modules: str | list[str] | set[str]) -> list[str]:
    return [modules] if isinstance(modules, str) else list(modules)


def _quantized(model: Any) -> str | None:
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    return "4 bits" if getattr(config, "load_in_4bit", False) else "8 bits"
