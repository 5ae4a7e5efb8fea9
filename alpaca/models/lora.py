"""LoRA through peft: the base model is frozen, in half precision or quantized, and small float32 matrices A (r x in)
and B (out x r) beside its layers are trained: y = W x + lora_alpha / lora_r * B A x (arXiv 2106.09685; on a base of 4
bits QLoRA, arXiv 2305.14314). What is saved are these matrices, for `PeftModel.from_pretrained(base, folder)`."""

import warnings
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from alpaca.common.arguments import flag
from alpaca.common.errors import UsageError
from alpaca.models.device import bitsandbytes_config, quantizing_flag
from alpaca.models.embeddings import of_language_model

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

ALL_LINEAR = "all-linear"  # peft's word
DEFAULTS = {"lora_alpha": 16, "lora_dropout": 0.0, "lora_target_modules": [ALL_LINEAR]}


@dataclass
class LoraArguments:
    """The flags of LoRA, by the names that TRL and peft's examples have for them."""

    _argument_group_name = "LoRA"
    lora_r: int | None = flag(None, "Train LoRA matrices of this rank, such as 8, instead of all weights.")
    lora_alpha: int | None = flag(
        None, "Scale of LoRA: the product of its matrices is multiplied by lora_alpha / lora_r. By default 16."
    )
    lora_dropout: float | None = flag(
        None, "Dropout of the inputs of LoRA, by default 0. Above 0 the template is computed for every row of a pack."
    )
    lora_target_modules: list[str] | None = flag(
        None,
        "Names of the layers that get LoRA, such as q_proj,v_proj. By default all-linear, which leaves out lm_head.",
    )
    load_in_8bit: bool = flag(False, "Quantize the frozen base to 8 bits (LLM.int8, bitsandbytes).")
    load_in_4bit: bool = flag(False, "Quantize the frozen base to 4 bits (NF4, bitsandbytes).")

    def __post_init__(self):
        given = [name for name in DEFAULTS if getattr(self, name) is not None]
        given += [name for name in ("load_in_8bit", "load_in_4bit") if getattr(self, name)]
        if self.lora_r is None and given:
            raise UsageError(f"--{given[0]}: has no effect without LoRA; add its rank, --lora_r 8")
        if self.lora_r is None:
            return
        for name, value in DEFAULTS.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        names = ",".join(self.lora_target_modules).split(",")  # divided by commas, spaces or both
        self.lora_target_modules = sorted({name.strip() for name in names} - {""})
        if self.lora_r < 1 or self.lora_alpha <= 0:
            raise UsageError(f"--lora_r {self.lora_r} --lora_alpha {self.lora_alpha}: expected positive numbers")
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"--lora_dropout {self.lora_dropout}: expected 0 <= dropout < 1")
        quantizing_flag(self.load_in_8bit, self.load_in_4bit)  # raises

    def __bool__(self) -> bool:
        """Return whether LoRA is asked for."""
        return self.lora_r is not None

    @property
    def quantized(self) -> str | None:
        """Return the flag that quantizes the base."""
        return quantizing_flag(self.load_in_8bit, self.load_in_4bit)


def check_lora(lora: LoraArguments, args: "TrainingArguments") -> None:
    """Raise UsageError for flags that do not go together."""
    if lora and args.deepspeed:
        raise UsageError(
            f"--{lora.quantized or 'lora_r'} and --deepspeed: are not supported together; the gradients "
            "and optimizer of LoRA are small, and --fsdp shards a base that is not quantized"
        )
    if lora and args.neftune_noise_alpha:
        raise UsageError("--neftune_noise_alpha: is not supported with --lora_r")


def base_dtype(args: "TrainingArguments", config: "PreTrainedConfig") -> torch.dtype:
    """Return the dtype of the frozen weights: that of the arithmetic, or else the checkpoint's; float16 without --fp16
    is float32, as its sums would overflow."""
    stored = config.get_text_config().dtype or torch.float32
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    without_flag = torch.float32 if stored == torch.float16 else stored
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else without_flag


def quantization(lora: LoraArguments, args: "TrainingArguments", dtype: torch.dtype) -> dict[str, Any]:
    """Return the options of `from_pretrained` for a quantized base. Every process holds all of it."""
    if not lora.quantized:
        return {}
    return {"quantization_config": bitsandbytes_config(lora.quantized, dtype), "device_map": {"": args.device}}


def add_lora(
    model: "PreTrainedModel", lora: LoraArguments, new_tokens: list[int], seed: int, checkpoint: str | None = None
) -> "PeftModel":
    """Return `model` frozen, with LoRA matrices: drawn from `seed`, or read from `checkpoint`. The rows of `new_tokens`
    (ids) in the embeddings are trained too.

    Raises:
        UsageError: a target module is not there, or is no layer that LoRA can be added to.
    """
    from peft import get_peft_model

    config = _lora_config(model, lora, new_tokens)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # peft draws on the CPU
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # peft asks for it
        adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if checkpoint and not next(adapted.parameters()).is_meta:
        _load(adapted, checkpoint)
    # peft would save whole embeddings where rows were added; config and file have the new rows
    adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)
    return adapted


def _lora_config(model: "PreTrainedModel", lora: LoraArguments, new_tokens: list[int]) -> "LoraConfig":
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    layers = lora_layers(model)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=_targets(model, lora.lora_target_modules, layers),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
        trainable_token_indices=_rows_to_train(model, new_tokens),
    )


def _targets(model: "PreTrainedModel", names: list[str], layers: dict[str, nn.Module]) -> list[str]:
    """Return the names of layers, as peft takes them and as they stand in the saved config. peft itself ignores a name
    that is nowhere, if another one is somewhere."""
    # peft takes all layers of one name, also those of a vision tower
    others = linear_layers(model).keys() - layers.keys()
    if names == [ALL_LINEAR]:
        last = model.get_output_embeddings()
        short = {path.rpartition(".")[2] for path, layer in layers.items() if layer is not last}
        others |= {path for path, layer in layers.items() if layer is last}
        ambiguous = any(path.rpartition(".")[2] in short for path in others)
        return sorted(path for path, layer in layers.items() if layer is not last) if ambiguous else sorted(short)
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in layers):
            known = ", ".join(sorted({path.rpartition(".")[2] for path in layers}))
            raise UsageError(
                f"--lora_target_modules {name}: {type(model).__name__} has no such layer; it has {known}, "
                f"and {ALL_LINEAR} takes all but the last one of the model"
            )
    ends = tuple(f".{name}" for name in names)
    if any(f".{path}".endswith(ends) for path in others):
        return sorted(path for path in layers if f".{path}".endswith(ends))
    return names


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of the language model that LoRA can be added to, by path."""
    inside = of_language_model(model)
    return {name: layer for name, layer in linear_layers(model).items() if name in inside}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}


def _rows_to_train(model: "PreTrainedModel", new_tokens: list[int]) -> dict[str, list[int]] | None:
    """Return peft's trainable_token_indices: the same rows of input and output embeddings."""
    if not new_tokens:
        return None
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    tied = embeddings[0].weight is embeddings[1].weight
    return {name: new_tokens for name, module in model.named_modules() if module in embeddings[: 1 if tied else 2]}


def _load(model: "PeftModel", checkpoint: str) -> None:
    from peft import load_peft_weights, set_peft_model_state_dict

    result = set_peft_model_state_dict(model, load_peft_weights(checkpoint, device="cpu"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if wrong := sorted(trained & set(result.missing_keys)) + sorted(result.unexpected_keys):
        raise UsageError(
            f"--resume_from_checkpoint {checkpoint}: its LoRA matrices are not those of this run ({wrong[0]})"
        )
