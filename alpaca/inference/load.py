"""Opening what people have, to answer with it: a checkpoint, a LoRA adapter on its base, or a weight diff and its base.

    opened = load_for_inference("output/lora", base="my_llama", how=LoadOptions("cpu", torch.float32))
    opened.model.generate(...)

An adapter stays apart from its base, as it was trained: merging it would round the sum to the dtype of the base.
"""

import copy
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from alpaca.common.distributed import loading_line
from alpaca.common.errors import InputError, first_line, loading
from alpaca.common.files import file_in
from alpaca.data.prompts import templates_of
from alpaca.data.tokenizer import open_config, open_tokenizer
from alpaca.models.device import bitsandbytes_config
from alpaca.models.embeddings import resize_embeddings, vocabulary_size
from alpaca.weights.float_diff import FloatDiff
from alpaca.weights.provenance import TOKENIZER_FILES, base_of_adapter, other_base
from alpaca.weights.reader import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    EXACT_DIFF,
    FLOAT_DIFF,
    INPUT_EMBEDDINGS,
    ONE,
    find_folder,
    find_shards,
    folder_kind,
    last_norm,
    open_weights,
)
from alpaca.weights.recovery import load_recovered, open_diff, recover_in_memory

if TYPE_CHECKING:
    from peft import PeftConfig

PLAIN = "make a plain checkpoint of it first"
RECOVER = "python weight_diff.py recover --path_diff {} --path_raw <base> --path_tuned <model>"
MERGE = "python -m scripts.merge_lora --adapter {} --base <base> --output_dir <model>"


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer, the templates of alpaca/data/prompts.py that it was trained with, and what was opened."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    templates: Mapping[str, str]
    description: str


@dataclass(frozen=True)
class LoadOptions:
    """Where the weights go, and as what."""

    device: str
    dtype: torch.dtype
    quantized: str | None = None  # load_in_8bit or load_in_4bit

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of from_pretrained. A quantized model is made on its device and cannot be moved."""
        if self.quantized is None:
            return {"dtype": self.dtype}
        config = bitsandbytes_config(self.quantized, self.dtype)
        return {"dtype": self.dtype, "quantization_config": config, "device_map": {"": self.device}}


def load_for_inference(name: str | Path, base: str | Path | None, how: LoadOptions) -> LoadedModel:
    """Open the folder (or hub id) `name`, on `how.device` and ready to generate.

    base: of an adapter (not given, the one that its adapter_config.json names) or of a diff, exact or of 2023's format.

    Raises:
        InputError: a folder is missing, damaged or not a model, or base and adapter or diff do not fit.
    """
    with loading_line(name):
        folder = find_folder(name)
        kind = folder_kind(folder)
        if kind == ADAPTER:
            opened = _open_adapter(folder, base, how)
        elif base is not None or kind == EXACT_DIFF:
            opened = _open_diff(folder, base, how)
        else:
            opened = _open_checkpoint(folder, how)
    if how.quantized is None:
        opened.model.to(how.device)
    opened.model.eval()
    return opened


# ---- a checkpoint ----


def _open_checkpoint(folder: Path, how: LoadOptions) -> LoadedModel:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: expected the folder of a model; there is no config.json in it.", folder)
    with open_weights(folder) as weights:
        if folder_kind(folder, weights) == FLOAT_DIFF:
            what = f"{last_norm(weights)[0]} is nearly zero, as in a weight diff, which needs its base"
            raise _needs_base(folder, what)
    tokenizer = open_tokenizer(str(folder))
    return LoadedModel(_load(folder, how), tokenizer, templates_of(folder), f"model {folder}")


def _needs_base(folder: Path, what: str) -> InputError:
    """Return the error for a weight diff without a base."""
    return InputError(f"{folder}: {what}; give its base, or {PLAIN}: {RECOVER.format(folder)}", folder)


def _load(folder: Path, how: LoadOptions) -> PreTrainedModel:
    find_shards(folder)  # raises where they are not in the folder
    config = open_config(folder)
    with loading(folder, "cannot be loaded"):
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, trust_remote_code=False, **how.options)
        for module in model.modules():
            packed = type(module).__name__ != "Linear4bit" or module.weight.shape[-1] == 1 or module.weight.is_meta
            if not packed and getattr(module.weight, "quant_state", None) is None:
                raise ValueError("config.json says that its weights have 4 bits, and they have not")
        return model


# ---- a weight diff ----


def _open_diff(folder: Path, base: str | Path | None, how: LoadOptions) -> LoadedModel:
    """Recover the model of the diff and its base in memory; an exact diff proves it."""
    if base is None:
        raise _needs_base(folder, "is a weight diff, which needs the model it was made against")
    with open_weights(base) as base_weights, open_diff(base_weights, folder) as diff:
        if isinstance(diff, FloatDiff) and last_norm(diff.weights)[1] > ONE:
            raise InputError(f"{base}: {folder} is a whole model, which needs no base; omit it", base)
        state = recover_in_memory(diff, how.dtype)
        print(*diff.notes(), f"{diff.verdict}: {base} and {folder} give {diff.summary}", sep="\n", flush=True)
        model, tokenizer = load_recovered(diff, state, **how.options)
        return LoadedModel(model, tokenizer, templates_of(folder), f"model of diff {folder} and base {base}")


# ---- an adapter ----


def _open_adapter(folder: Path, base: str | Path | None, how: LoadOptions) -> LoadedModel:
    config = _adapter_config(folder)
    base = base or _base_of(folder)
    base_folder = find_folder(base)
    if other := other_base(folder, base_folder):
        print(other, flush=True)
    if folder_kind(base_folder) in (EXACT_DIFF, ADAPTER):
        raise InputError(f"{base}: expected a whole model, this is a weight diff or an adapter itself", base)
    own = any((folder / name).is_file() for name in TOKENIZER_FILES)
    tokenizer = open_tokenizer(str(folder if own else base_folder))
    model = _load(base_folder, how)
    _put_in(model, folder, config, vocabulary_size(tokenizer), how.device)
    return LoadedModel(model, tokenizer, templates_of(folder), f"adapter {folder} on base {base}")


def _adapter_config(folder: Path) -> "PeftConfig":
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise InputError(f"{folder}: is a LoRA adapter, which needs peft: pip install peft", folder) from error
    for name in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS):
        file_in(folder, name)
    try:
        config = PeftConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # peft raises what it likes
        raise InputError(f"{folder}: {ADAPTER_CONFIG} cannot be read ({first_line(error)})", folder) from error
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise InputError(f"{folder}: is an adapter of the kind {config.peft_type.value}; expected LoRA", folder)
    config.inference_mode = True
    return config


def _base_of(folder: Path) -> Path:
    """Return the folder of the base that the adapter names."""
    try:
        return base_of_adapter(folder)
    except InputError as error:
        raise InputError(f"{error}, or {PLAIN}: {MERGE.format(folder)}", folder) from error


def _put_in(model: PreTrainedModel, folder: Path, config: "PeftConfig", tokens: int, device: str) -> None:
    """Put the adapter into the layers of `model`. tokens: rows that the tokenizer needs."""
    from peft import get_peft_model, load_peft_weights, set_peft_model_state_dict

    misfit = f"{folder}: this adapter does not fit the base {model.name_or_path}"
    try:
        weights = load_peft_weights(str(folder), device=device)
    except Exception as error:  # safetensors and pickle raise what they like
        raise InputError(f"{folder}: the adapter cannot be read ({first_line(error)})", folder) from error
    _fit_vocabulary(model, tokens, weights)
    config.base_model_name_or_path = model.name_or_path  # else peft warns that another folder has been given
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # peft asks for it
            result = set_peft_model_state_dict(get_peft_model(model, config), weights)
    except Exception as error:  # peft raises what it likes
        message = f"{misfit}: it was trained on a model of other sizes or another architecture"
        if not re.search("size mismatch|target modules|not found", str(error), re.IGNORECASE):  # lists all its tensors
            message = f"{folder}: {ADAPTER_CONFIG} cannot be used ({first_line(error)})"
        raise InputError(message, folder) from error
    missing = [name for name in result.missing_keys if "lora_" in name]
    # an output embedding that is the input embedding is saved twice
    unexpected = [name for name in result.unexpected_keys if ".token_adapter." not in name]
    if missing or unexpected:
        (name, *_), where = (missing, "adapter") if missing else (unexpected, "base")
        message = f"{misfit}: {name} is not in the {where}; it was trained on a model with other layers"
        raise InputError(message, folder)


def _fit_vocabulary(model: PreTrainedModel, tokens: int, weights: Mapping[str, torch.Tensor]) -> None:
    """Make embeddings as long as the adapter's, if it has some, or else at least as long as the tokenizer. Rows that
    the adapter lacks are the mean of the others, as in training."""
    rows = model.get_input_embeddings().weight.shape[0]
    saved = [
        tensor.shape[0]
        for name, tensor in weights.items()
        if name.replace(".token_adapter.base_layer", "").endswith(INPUT_EMBEDDINGS)
    ]
    wanted = saved[0] if saved else max(tokens, rows)
    if wanted != rows:
        resize_embeddings(model, max(wanted - rows, 0), wanted)


def without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Return the base that `model`, opened as an adapter on it, was made of: other layers around the same tensors.

    It takes no memory, and both may be used at the same time; peft's disable_adapter() would switch the adapter off for
    everybody who uses it. Not for weights in 8 bit: what bitsandbytes has of them goes to the layer that is used first.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    def strip(parent: nn.Module) -> None:
        for name, layer in parent.named_children():
            if isinstance(layer, BaseTunerLayer):
                setattr(parent, name, layer.get_base_layer())
            elif isinstance(layer, AuxiliaryTrainingWrapper):
                setattr(parent, name, layer.original_module)
            else:
                strip(layer)

    bare = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    strip(bare)
    return bare
