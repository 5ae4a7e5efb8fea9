"""Run by torchrun in test_sharding.py: train.py with a callback that writes down what each rank holds before step 1.

A file per rank, in the folder PROBE: lines that two ranks print at the same time can end up as one."""

import json
import os
import resource
import sys
from pathlib import Path

from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import train
from alpaca.common.errors import reported


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _policy(module) -> str:
    group = module._get_fsdp_state()._fsdp_param_group
    if group is None:
        return ""
    return f"{group.mp_policy.param_dtype} {group.mp_policy.reduce_dtype} {type(group.offload_policy).__name__}"


class Probe(TrainerCallback):
    after_imports = peak_bytes()

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        parameters = list(model.parameters())
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        report = {
            "rank": int(os.environ["RANK"]),
            "dtensors": sum(isinstance(parameter, DTensor) for parameter in parameters),
            "parameters": len(parameters),
            "in_optimizer": sum(parameter in held for parameter in parameters),
            "local": sum(p.to_local().numel() for p in parameters if isinstance(p, DTensor)),
            "full": sum(p.numel() for p in parameters),
            "groups": sum(type(module).__name__.startswith("FSDP") for module in model.modules()),
            "policies": sorted({_policy(module) for module in model.modules() if isinstance(module, FSDPModule)}),
            "grew": peak_bytes() - self.after_imports,
        }
        Path(os.environ["PROBE"], f"rank-{report['rank']}.json").write_text(json.dumps(report))


initialize = train.AlpacaTrainer.__init__


def initialize_with_probe(self, *args, **kwargs):
    initialize(self, *args, **kwargs)
    self.add_callback(Probe)


train.AlpacaTrainer.__init__ = initialize_with_probe
with reported("train.py"):
    train.train(sys.argv[1:])
