"""Who takes part in benchmarks.train. Every contender builds a trainer for the same weights, rows and optimizer; what
it adds are the flags that its users would set. None recomputes activations unless its flags say so."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers import TrainingArguments as StockArguments

import train
from alpaca.training.trainer import AlpacaTrainer

MAX_LENGTH = 512  # tokens of a row, as in 2023
SEED = 42


@dataclass
class Setup:
    """What all contenders of a section share. `per_step` examples make an optimizer step."""

    config: LlamaConfig
    tokenizer: PreTrainedTokenizerBase
    dataset: train.SupervisedDataset
    folder: str
    device: torch.device
    per_step: int
    steps: int

    def model(self, attention: str | None = None) -> PreTrainedModel:
        """The same random float32 weights for everybody."""
        torch.manual_seed(SEED)
        options = {"attn_implementation": attention} if attention else {}
        with self.device:
            return AutoModelForCausalLM.from_config(
                self.config, dtype=torch.float32, trust_remote_code=False, **options
            )

    def arguments(self, per_device: int, accumulation: int | None = None) -> dict[str, Any]:
        """Flags of TrainingArguments that are the same for everybody. A step has `accumulation` micro-batches of
        `per_device` rows; by default as many as make `per_step`."""
        gpu = self.device.type == "cuda"
        return dict(
            output_dir=self.folder,
            per_device_train_batch_size=per_device,
            max_steps=self.steps,
            seed=SEED,
            gradient_accumulation_steps=accumulation or self.per_step // per_device,
            bf16=gpu,
            tf32=gpu or None,
            use_cpu=not gpu,
            optim="adamw_torch_fused",
            learning_rate=2e-5,
            weight_decay=0.0,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )


def stock(setup: Setup, per_device: int = 4, **flags: Any) -> Trainer:
    """transformers' Trainer with the collator of 2023: micro-batches padded on the right, with a mask."""
    return Trainer(
        model=setup.model(),
        args=StockArguments(**setup.arguments(per_device), gradient_checkpointing=False, **flags),
        train_dataset=setup.dataset,
        data_collator=train.DataCollatorForSupervisedDataset(setup.tokenizer),
        processing_class=setup.tokenizer,
    )


def trl(setup: Setup, per_device: int = 4, max_length: int | None = None, **flags: Any) -> Trainer:
    """TRL's SFTTrainer on the same tokens and labels. Its defaults recompute activations and compute in bfloat16 on a
    CPU too; both are set as everybody else's. Without padding it takes flash attention where that is installed, as its
    documentation advises. `max_length` only matters to packing: the rows are cut already. A micro-batch of packing is
    one bin of so many tokens, about max_length / 128 rows, and a step as many bins as hold about `per_step` of them."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    without_padding = flags.get("padding_free") or flags.get("packing")
    accumulation = None
    if flags.get("packing"):
        per_device, accumulation = 1, setup.per_step * 128 // max_length
    flash = setup.device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    columns = {"input_ids": setup.dataset.input_ids, "labels": setup.dataset.labels}
    return SFTTrainer(
        model=setup.model("flash_attention_2" if without_padding and flash else None),
        args=SFTConfig(
            **setup.arguments(per_device, accumulation), gradient_checkpointing=False, max_length=max_length, **flags
        ),
        train_dataset=Dataset.from_dict({name: [row.tolist() for row in rows] for name, rows in columns.items()}),
        processing_class=setup.tokenizer,
    )


def ours(setup: Setup, per_device: int = 4, gradient_checkpointing: bool = False, **flags: Any) -> Trainer:
    """AlpacaTrainer as train.py builds it. Under FSDP the weights start on the CPU, as there."""
    arguments = dict(gradient_checkpointing=gradient_checkpointing, model_max_length=MAX_LENGTH, **flags)
    args = train.TrainingArguments(**setup.arguments(per_device), **arguments)
    return AlpacaTrainer(
        model=setup.model().cpu() if args.fsdp else setup.model(),
        args=args,
        train_dataset=setup.dataset,
        data_collator=train.DataCollatorForSupervisedDataset(setup.tokenizer),
        processing_class=setup.tokenizer,
    )


@dataclass(frozen=True)
class Contender:
    name: str
    build: Callable[..., Trainer]  # of a Setup and the flags
    flags: Mapping[str, Any] = field(default_factory=dict)
    own_rows: bool = False  # its steps hold other rows, and other numbers of them, than everybody else's


PADDED = Contender("padded, as in 2023", stock)
REBALANCED = Contender("Trainer, batch_rebalance", stock, {"train_sampling_strategy": "batch_rebalance"})
TRL_PADDED = Contender("TRL, padded", trl)
TRL_FREE = Contender("TRL, padding_free", trl, {"padding_free": True})
OURS_PADDED = Contender("ours, padded", ours, {"batching": "padded"})


def packed(tokens: str, prefix: bool, name: str, **flags: Any) -> Contender:
    """Ours in packs of at most `tokens` tokens ("auto": 4096)."""
    return Contender(name, ours, {"batching": "packed", "max_tokens_per_pack": tokens, "share_prefix": prefix, **flags})


def on_cpu(tokens: str) -> list[Contender]:
    """Ours item by item: each line adds one thing to the line before."""
    packing = {"packing": True, "max_length": MAX_LENGTH}
    return [
        PADDED,
        REBALANCED,
        TRL_PADDED,
        TRL_FREE,
        Contender("TRL, packing", trl, packing, own_rows=True),
        OURS_PADDED,
        packed(tokens, False, "ours: + packs without padding"),
        packed(tokens, True, "ours: + shared prefix (all)"),
    ]


def rivals(tokens: str) -> list[Contender]:
    """On a GPU the rivals also get micro-batches of 16 rows, which suit it better than 4."""
    sixteen = [Contender(f"{c.name}, 16 rows", c.build, {**c.flags, "per_device": 16}) for c in (REBALANCED, TRL_FREE)]
    packing = {"packing": True, "max_length": 2048}
    return [
        PADDED,
        packed(tokens, True, "ours (all)"),
        REBALANCED,
        TRL_PADDED,
        TRL_FREE,
        *sixteen,
        Contender("TRL, packing of 2048 tokens", trl, packing, own_rows=True),
    ]


def items(tokens: str) -> list[Contender]:
    all_of_it = {"batching": "packed", "max_tokens_per_pack": tokens, "share_prefix": True}
    return [
        OURS_PADDED,
        packed(tokens, False, "ours: + packs without padding"),
        packed(tokens, True, "ours: + shared prefix"),
        Contender("ours: + torch_compile", ours, {**all_of_it, "torch_compile": True}),
    ]


def budgets(tokens: str) -> list[Contender]:
    """Packs of growing size, with and without recomputing the activations; `tokens` has no say."""
    plain = [packed(str(n), True, f"ours, {n} tokens a pack") for n in (2048, 3072, 4096, 6144, 8192)]
    return plain + [
        packed(str(n), True, f"ours, {n} tokens a pack, recomputed", gradient_checkpointing=True)
        for n in (4096, 8192, 16384)
    ]


def sharded(tokens: str) -> list[Contender]:
    """FSDP with one rank: its own cost, since there is nothing to send."""
    return [
        Contender("ours, padded, FSDP", ours, {**OURS_PADDED.flags, "fsdp": True}),
        packed(tokens, True, "ours (all), FSDP", fsdp=True, hold_gradients=True),
    ]


SECTIONS = {"cpu": on_cpu, "rivals": rivals, "budget": budgets, "items": items, "fsdp": sharded}
