"""--load_in_8bit and --load_in_4bit: the weights of a model quantized with bitsandbytes while they are loaded."""

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from alpaca.common.errors import InputError, UsageError, first_line

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def quantizing_flag(load_in_8bit: bool, load_in_4bit: bool) -> str | None:
    """Return the name of the flag that quantizes the weights, if one does.

    Raises:
        UsageError: both do, or bitsandbytes is not installed.
    """
    if load_in_8bit and load_in_4bit:
        raise UsageError("--load_in_8bit and --load_in_4bit: a base is quantized once; choose one")
    name = "load_in_8bit" if load_in_8bit else "load_in_4bit" if load_in_4bit else None
    if name and find_spec("bitsandbytes") is None:
        raise UsageError(
            f"--{name}: needs bitsandbytes, which is not installed; pip install 'bitsandbytes>=0.50,<0.51'"
        )
    return name


def bitsandbytes_config(name: str, dtype: torch.dtype) -> "BitsAndBytesConfig":
    """Return the configuration of LLM.int8 (arXiv 2208.07339), or of NF4 with quantized scales as in QLoRA (arXiv
    2305.14314).

    name: load_in_8bit or load_in_4bit; dtype: of the arithmetic with weights of 4 bits.
    """
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes.autograd").setLevel(logging.ERROR)  # a line for every layer and step
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(**{name: True}, **(options if name == "load_in_4bit" else {}))


def check_device(device: str) -> None:
    """Raise InputError where nothing can be put there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device; torch without it
        raise InputError(f"{device}: expected cpu, or cuda if there is one ({first_line(error)})", device) from error


def best_dtype(device: str) -> torch.dtype:
    """Return the dtype to answer in: bfloat16 on a GPU that can, float16 on an older one, float32 on a CPU."""
    if not device.startswith("cuda"):
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
