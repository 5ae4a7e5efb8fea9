"""Opening what people have, to answer with it: a checkpoint, a LoRA adapter on its base, or a weight diff and its base.

    opened = load_for_inference("output/lora", base="my_llama", how=How("cpu", torch.float32))
    opened.model.generate(...)

An adapter stays apart from its base, as it was trained: merging it would round the sum to the dtype of the base.
"""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from alpaca.common.errors import UsageError, first_line
from alpaca.data.prompts import templates_of
from alpaca.data.tokenizer import open_tokenizer
from alpaca.models.device import bitsandbytes_config
from alpaca.models.embeddings import resize_embeddings
from alpaca.weights.exact_diff import is_exact_diff
from alpaca.weights.float_diff import ONE, ZERO, FloatDiff, last_norm
from alpaca.weights.provenance import other_base
from alpaca.weights.reader import (
    ADAPTER_CONFIG,
    INPUT_EMBEDDINGS,
    TOKENIZER_FILES,
    find_folder,
    open_weights,
    read_json,
)
from alpaca.weights.recovery import load_recovered, open_diff, recover_in_memory

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class LoadedModel:
    """templates: those of alpaca/data/prompts.py that the model was trained with; told: what was opened, in words."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    templates: Mapping[str, str]
    told: str


@dataclass(frozen=True)
class LoadOptions:
    """Where the weights go, and as what; and the flags that named the folders, for messages."""

    device: str
    dtype: torch.dtype
    quantized: str | None = None  # load_in_8bit or load_in_4bit
    flag: str = "--model"
    base_flag: str | None = "--base"  # None: the command takes no base

    def no_base(self, merge: str) -> str:
        """What to do where a base is needed: give it, or make a plain checkpoint first."""
        return f"give {self.base_flag}" if self.base_flag else f"make a plain checkpoint of it first: {merge}"

    @property
    def options(self) -> dict[str, Any]:
        """For from_pretrained. A quantized model is made on its device and cannot be moved."""
        if self.quantized is None:
            return {"dtype": self.dtype}
        config = bitsandbytes_config(self.quantized, self.dtype)
        return {"dtype": self.dtype, "quantization_config": config, "device_map": {"": self.device}}


def load_for_inference(name: str | Path, base: str | Path | None, how: LoadOptions) -> LoadedModel:
    """Open the folder (or hub id) `name`, on `how.device` and ready to generate.

    base: of an adapter (not given, the one that its adapter_config.json names) or of a diff, exact or of 2023's format.

    Raises:
        UsageError: a folder is missing, damaged or not a model, or base and adapter or diff do not fit.
    """
    folder = find_folder(name, how.flag)
    if (folder / ADAPTER_CONFIG).is_file():
        opened = _open_adapter(folder, base, how)
    elif base is not None or is_exact_diff(folder):
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
        raise UsageError(f"{how.flag} {folder}: expected the folder of a model; there is no config.json in it.")
    with open_weights(folder, how.flag) as weights:
        name, largest = last_norm(weights)
        if largest < ZERO:
            raise UsageError(
                f"{how.flag} {folder}: {name} is nearly zero, as in a weight diff, which needs its base; "
                + how.no_base(f"python weight_diff.py recover --path_diff {folder} --path_raw <base> ...")
            )
    tokenizer = _tokenizer(folder, how.flag)
    return LoadedModel(_load(folder, how, how.flag), tokenizer, templates_of(folder), f"model {folder}")


def _load(folder: Path, how: LoadOptions, flag: str) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(folder, **how.options)
    except (OSError, ValueError) as error:
        raise UsageError(f"{flag} {folder}: cannot be loaded ({first_line(error)})") from error


def _tokenizer(folder: Path, flag: str) -> PreTrainedTokenizerBase:
    try:
        return open_tokenizer(str(folder))
    except (OSError, ValueError) as error:
        raise UsageError(f"{flag} {folder}: its tokenizer cannot be read ({error})") from error


# ---- a weight diff ----


def _open_diff(folder: Path, base: str | Path | None, how: LoadOptions) -> LoadedModel:
    """The model that the diff and its base give, recovered in memory; an exact diff proves it."""
    if base is None:
        raise UsageError(
            f"{how.flag} {folder}: is a weight diff, which needs the model it was made against; "
            + how.no_base(f"python weight_diff.py recover --path_diff {folder} --path_raw <base> --path_tuned <model>")
        )
    with open_weights(base, how.base_flag) as base_weights, open_diff(base_weights, folder, flag=how.flag) as diff:
        if isinstance(diff, FloatDiff) and last_norm(diff.weights)[1] > ONE:
            raise UsageError(f"{how.base_flag} {base}: {folder} is a whole model, which needs no base; leave it away")
        state = recover_in_memory(diff, how.dtype)
        print(*diff.notes(), f"{diff.verdict}: {base} and {folder} give {diff.told}", sep="\n", flush=True)
        model, tokenizer = load_recovered(diff, state, **how.options)
        return LoadedModel(model, tokenizer, templates_of(folder), f"model of diff {folder} and base {base}")


# ---- an adapter ----


def _open_adapter(folder: Path, base: str | Path | None, how: LoadOptions) -> LoadedModel:
    config, base = _adapter_config(folder, how), base or _base_of(folder, how)
    base_folder = find_folder(base, how.base_flag or how.flag)
    if other := other_base(folder, base_folder):
        print(other, flush=True)
    if is_exact_diff(base_folder) or (base_folder / ADAPTER_CONFIG).is_file():
        raise UsageError(f"{how.base_flag} {base}: expected a whole model, this is a weight diff or an adapter itself")
    own = any((folder / name).is_file() for name in TOKENIZER_FILES)
    tokenizer = _tokenizer(folder, how.flag) if own else _tokenizer(base_folder, how.base_flag)
    model = _load(base_folder, how, how.base_flag)
    _put_in(
        model, folder, config, len(tokenizer), f"{how.flag} {folder}: this adapter does not fit the base {base}", how
    )
    return LoadedModel(model, tokenizer, templates_of(folder), f"adapter {folder} on base {base}")


def _adapter_config(folder: Path, how: LoadOptions) -> "PeftConfig":
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise UsageError(f"{how.flag} {folder}: is a LoRA adapter, which needs peft: pip install peft") from error
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{how.flag} {folder}: {ADAPTER_CONFIG} cannot be read ({first_line(error)})") from error
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise UsageError(f"{how.flag} {folder}: is an adapter of the kind {config.peft_type.value}; expected LoRA")
    config.inference_mode = True
    return config


def _base_of(folder: Path, how: LoadOptions) -> str:
    """The base that the adapter names."""
    settings = read_json(folder / ADAPTER_CONFIG, how.flag)
    name, revision = (settings.get(key) for key in ("base_model_name_or_path", "revision"))
    merge = f"python -m scripts.merge_lora --adapter {folder} --base <base> --output_dir <model>"
    if name and revision:
        raise UsageError(
            f"{how.flag} {folder}: is a LoRA adapter of revision {revision} of {name}; download that, and "
            f"{how.no_base(merge)}"
        )
    if not name:
        raise UsageError(f"{how.flag} {folder}: is a LoRA adapter that names no base model; {how.no_base(merge)}")
    try:
        return str(find_folder(name, how.base_flag))
    except UsageError as error:
        raise UsageError(
            f"{how.flag} {folder}: is a LoRA adapter of {name!r}, which is not here; {how.no_base(merge)} ({error})"
        ) from error


def _put_in(
    model: PreTrainedModel, folder: Path, config: "PeftConfig", tokens: int, misfit: str, how: LoadOptions
) -> None:
    """Put the adapter into the layers of `model`. tokens: length of the tokenizer."""
    from peft import get_peft_model, load_peft_weights, set_peft_model_state_dict

    try:
        weights = load_peft_weights(str(folder), device=how.device)
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{how.flag} {folder}: the adapter cannot be read ({first_line(error)})") from error
    _fit_vocabulary(model, tokens, weights)
    config.base_model_name_or_path = model.name_or_path  # else peft warns that another folder has been given
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # peft asks for it
            result = set_peft_model_state_dict(get_peft_model(model, config), weights)
    except (RuntimeError, ValueError, KeyError) as error:
        # peft lists every tensor of another size
        raise UsageError(f"{misfit}: it was trained on a model of other sizes or another architecture") from error
    missing = [name for name in result.missing_keys if "lora_" in name]
    # an output embedding that is the input embedding is saved twice
    unexpected = [name for name in result.unexpected_keys if ".token_adapter." not in name]
    if missing or unexpected:
        (name, *_), where = (missing, "adapter") if missing else (unexpected, "base")
        raise UsageError(f"{misfit}: {name} is not in the {where}; it was trained on a model with other layers")


def _fit_vocabulary(model: PreTrainedModel, tokens: int, weights: Mapping[str, torch.Tensor]) -> None:
    """Embeddings as long as the adapter's, if it has some, or else at least as long as the tokenizer. Rows that the
    adapter lacks are the mean of the others, as in training."""
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
    """The base that `model`, opened as an adapter on it, was made of: other layers around the same tensors.

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
