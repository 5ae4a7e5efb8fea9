"""The tokenizer and the model to train, as train.py's flags ask for them."""

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from alpaca.common.distributed import barrier, print_rank0
from alpaca.common.errors import InputError, ParameterError, UsageError, first_line, loading
from alpaca.common.files import file_in, read_json
from alpaca.data.tokenizer import (
    SPECIAL_TOKENS,
    existing_tokens,
    open_config,
    open_tokenizer,
    slow_files,
    to_save,
    without_slow_files,
)
from alpaca.models import deepspeed, fsdp
from alpaca.models.embeddings import freeze_other_parts, resize_embeddings, vocabulary_size
from alpaca.models.lora import LoraArguments, add_lora, base_dtype, quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments


def load_tokenizer(model_args: Any, training_args: "TrainingArguments") -> tuple[PreTrainedTokenizerBase, int]:
    """Return the tokenizer with pad, eos, bos and unk tokens, and how many tokens had to be added for that, as in 2023.
    A token that is "" counts as missing."""
    name = model_args.model_name_or_path
    unstated: dict[str, str | None] = {}
    options = dict(model_max_length=training_args.model_max_length, padding_side="right")
    tokenizer = open_tokenizer(name, training_args.cache_dir, unstated, **options)
    if model_args.pad_token is not None:
        if model_args.pad_token not in tokenizer.get_vocab():
            raise InputError(f"{model_args.pad_token}: is not a token of {name}", model_args.pad_token)
        tokenizer.pad_token = model_args.pad_token
        unstated.pop("pad_token", None)
    if model_args.add_missing_tokens is False:
        existing_tokens(tokenizer, name, training_args.process_index)
        num_new_tokens = 0
    else:
        missing = {token: default for token, default in SPECIAL_TOKENS.items() if not getattr(tokenizer, token)}
        if missing and vocabulary_size(tokenizer) > len(tokenizer):
            message = (
                f"{{add_missing_tokens}} True: the token ids of {name} have a gap, and an added token would have "
                "another id when the saved tokenizer is opened; use False, or an existing token with {pad_token}"
            )
            raise ParameterError(message, "add_missing_tokens", "pad_token")
        num_new_tokens = tokenizer.add_special_tokens(missing)
    for token, other in unstated.items():
        print_rank0(
            f"note: {name} states no {token} -> {getattr(tokenizer, token)}; as in 2023, the default of "
            f"transformers 5 ({other or 'none'}) is not taken",
            training_args.process_index,
        )
    return tokenizer, num_new_tokens


def base_slow_files(tokenizer: PreTrainedTokenizerBase, training_args: "TrainingArguments") -> dict[str, bytes]:
    """Return the slow tokenizer's files of the base, for the process that saves. They are read before the training:
    days later the base may be elsewhere."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not training_args.should_save:
        return {}
    try:
        return slow_files(tokenizer.name_or_path, json.loads(backend.to_str()), training_args.cache_dir)
    except ValueError as error:
        print_rank0(f"note: {without_slow_files(tokenizer.name_or_path, error)}", training_args.process_index)
        return {}


def load_config(model_args: Any, training_args: "TrainingArguments", checkpoint: str | None = None) -> PreTrainedConfig:
    name = checkpoint or model_args.model_name_or_path
    config = open_config(name, training_args.cache_dir)
    for key, rate in config.get_text_config().to_dict().items():
        if key.endswith(("dropout", "pdrop")) and isinstance(rate, int | float) and not 0 <= rate < 1:
            raise InputError(f"{name}: config.json says {key} {rate}; expected at least 0 and below 1", name)
    _check_index(Path(name))
    if model_args.attn_implementation:
        _check_attention(config, model_args.attn_implementation)
    return config


def _check_index(folder: Path) -> None:
    """Raise InputError for an index of shards that names files outside its folder."""
    for index in sorted(folder.glob("*.index.json")) if folder.is_dir() else ():
        names = read_json(index).get("weight_map")
        for name in names.values() if isinstance(names, dict) else ():
            file_in(folder, name)


def _check_attention(config: PreTrainedConfig, attention: str) -> None:
    """Raise ParameterError for an attention implementation that the model does not have here, without its weights."""
    options = dict(dtype=torch.bfloat16, attn_implementation=attention)
    with loading(config.name_or_path, "the model could not be loaded"), deepspeed.unpartitioned(), torch.device("meta"):
        try:
            AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False, **options)
        except (OSError, ValueError, ImportError) as error:
            message = f"{{attn_implementation}} {attention}: {first_line(error)}"
            raise ParameterError(message, "attn_implementation") from error


def load_model(
    model_args: Any,
    training_args: "TrainingArguments",
    checkpoint: str | None = None,
    lora_args: LoraArguments | None = None,
) -> PreTrainedModel:
    """Return the model in float32, whatever the dtype on disk: in bfloat16 most updates of size 2e-5 would round to
    nothing. Under LoRA it is not updated: see alpaca/models/lora.py.

    Under FSDP only rank 0 reads the weights; the others get a model of the same shape on the meta device.
    """
    name, config = checkpoint or model_args.model_name_or_path, load_config(model_args, training_args, checkpoint)
    options: dict[str, Any] = {"dtype": base_dtype(training_args, config) if lora_args else torch.float32}
    if model_args.attn_implementation:
        options["attn_implementation"] = model_args.attn_implementation
    if lora_args:
        options |= quantization(lora_args, training_args, options["dtype"])
    print_rank0(f"loading {name} …", training_args.process_index)
    with loading(name, "the model could not be loaded"):
        if training_args.fsdp:
            fsdp.resolve_wrap_classes(training_args, config)
            if training_args.process_index != 0:
                return fsdp.empty_model(config, **options)
        with deepspeed.partitioned_in_float32(training_args):
            options |= dict(config=config, cache_dir=training_args.cache_dir)
            model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False, **options)
    if not lora_args and getattr(model, "is_quantized", False):
        raise InputError(
            f"{name}: is quantized, and such weights cannot be trained; take the model that it was made from, or train "
            "LoRA matrices on it",
            name,
        )
    return model


def make_model(
    model_args: Any,
    training_args: "TrainingArguments",
    lora_args: LoraArguments,
    tokenizer: PreTrainedTokenizerBase,
    num_new_tokens: int,
    checkpoint: str | None = None,
) -> nn.Module:
    """Return the model ready for the Trainer: as `load_model`, from `checkpoint` if there is one, with rows for all
    tokens of `tokenizer`, the last `num_new_tokens` of which are new to the base, and with LoRA if asked for.
    Collective."""
    weights = None if lora_args else checkpoint  # LoRA's checkpoints lack the base
    if lora_args and num_new_tokens and training_args.fsdp:
        _refuse_tied(load_config(model_args, training_args), model_args.model_name_or_path)
    model = load_model(model_args, training_args, weights, lora_args)
    barrier()
    if others := freeze_other_parts(model):
        note = f"note: the language model alone is trained; {', '.join(others)} stays as it is"
        print_rank0(note, training_args.process_index)
    repair_generation_config(model, to_save(tokenizer).pad_token_id, training_args.process_index)
    size = vocabulary_size(tokenizer)
    if not lora_args or num_new_tokens or size > model.get_input_embeddings().num_embeddings:
        resize_embeddings(model, 0 if weights else num_new_tokens, size)
    if lora_args:
        if training_args.ddp_find_unused_parameters is None:  # the Trainer would look for some in every step
            training_args.ddp_find_unused_parameters = False
        new_tokens = list(range(size - num_new_tokens, size))
        with loading(model_args.model_name_or_path, "LoRA could not be put into the model"):
            model = add_lora(model, lora_args, new_tokens, training_args.seed, checkpoint)
    if training_args.fsdp:
        fsdp.check_dropout(training_args, model)
        fsdp.materialize(model)
    if training_args.deepspeed:
        deepspeed.to_arithmetic_dtype(model, training_args)
    return model


def _refuse_tied(config: PreTrainedConfig, name: str) -> None:
    """Raise UsageError for tied embeddings: accelerate ties them again when it has sharded them, and does not find them
    in peft's wrapper."""
    if config.get_text_config().tie_word_embeddings:
        raise UsageError(
            f"--add_missing_tokens with --lora_r and --fsdp: {name} has tied embeddings, whose new rows cannot be "
            "trained in shards; omit --fsdp, or take an existing token: --pad_token"
        )


def repair_generation_config(model: "PreTrainedModel", pad_token_id: int, rank: int) -> None:
    """Give the model the pad token of the tokenizer. Early Llama-2 folders set a temperature without do_sample, too,
    and transformers 5 would refuse to save such a model, only after the training: set do_sample."""
    model.config.pad_token_id = model.generation_config.pad_token_id = pad_token_id
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True
        model.generation_config.validate(strict=True)
        print_rank0(
            "note: generation_config.json has sampling values without do_sample -> saved with do_sample: true", rank
        )
