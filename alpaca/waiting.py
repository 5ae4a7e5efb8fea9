"""Waiting for the other ranks longer than --ddp_timeout."""

from datetime import timedelta
from functools import cache

import torch.distributed as dist


def wait_for_all_ranks() -> None:
    """A barrier on a process group of its own with a day's patience: while one rank tokenizes a large data set or reads
    a large model, the others must not run into --ddp_timeout."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier(group=_patient_group())


@cache
def _patient_group() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))
