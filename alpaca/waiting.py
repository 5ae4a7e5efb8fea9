"""Waiting for the other ranks, longer than --ddp_timeout, and hearing what they have found."""

from datetime import timedelta
from typing import Any

import torch.distributed as dist


def wait_for_all_ranks() -> None:
    """A barrier with a day's patience: while one rank tokenizes a large data set, reads a large model or writes a
    checkpoint, the others must not run into --ddp_timeout."""
    if _several():
        dist.barrier(group=_patient_group())


def gather_from_all_ranks(value: Any) -> list[Any]:
    """`value` of every rank, in their order; [value] in a single process. Any picklable object."""
    if not _several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_patient_group())
    return values


def leave() -> None:
    """The end of a run on this rank."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _patient_group() -> dist.ProcessGroup:
    """Not kept: a group that outlives destroy_process_group would end its threads while the interpreter shuts down."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))
