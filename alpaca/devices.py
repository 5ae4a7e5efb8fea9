"""The device that a model is put on: --device."""

import torch

from alpaca.common.errors import UsageError, first_line


def check_device(device: str) -> None:
    """Raise UsageError where nothing can be put there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device; torch without it
        raise UsageError(f"--device {device}: expected cpu, or cuda if there is one ({first_line(error)})") from error


def best_dtype(device: str) -> torch.dtype:
    """To answer in: bfloat16 on a GPU that can, float16 on an older one, float32 on a CPU."""
    if not device.startswith("cuda"):
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
