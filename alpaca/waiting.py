"""Waiting for the other ranks longer than --ddp_timeout."""

from datetime import timedelta

import torch.distributed as dist


def wait_for_all_ranks() -> None:
    """A barrier on a process group of its own with a day's patience: while one rank tokenizes a large data set or reads
    a large model, the others must not run into --ddp_timeout. The group is not kept: one that outlives
    destroy_process_group would end its threads while the interpreter shuts down."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier(group=dist.new_group(backend="gloo", timeout=timedelta(days=1)))
