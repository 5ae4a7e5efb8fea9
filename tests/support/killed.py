"""Run in place of train.py by test_resume.py: KILL=where:rank sends SIGKILL to that rank at an exact moment of a save.

optimizer    of the second checkpoint, when the weights are written and the optimizer is not
manifest     of the second checkpoint, when all is written and the folder is not yet renamed
rename       of the second checkpoint, when it is whole and the first not yet deleted
final        when the final model is about to be written
"""

import os
import signal
import sys

import alpaca.training.checkpoint as checkpoints
import alpaca.training.trainer as trainer
import train
from alpaca.common.errors import reported

where, rank = os.environ["KILL"].split(":")
calls = {}


def dies(name, function, at_call):
    """`function`, except that its call number `at_call` ends this process."""

    def call(*args, **kwargs):
        calls[name] = calls.get(name, 0) + 1
        if name == where and calls[name] == at_call and os.environ.get("RANK", "0") == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call


AlpacaTrainer = trainer.AlpacaTrainer
AlpacaTrainer._save_optimizer_and_scheduler = dies("optimizer", AlpacaTrainer._save_optimizer_and_scheduler, 2)
checkpoints._write_manifest = dies("manifest", checkpoints._write_manifest, 2)
trainer.delete_old_checkpoints = dies("rename", trainer.delete_old_checkpoints, 2)
AlpacaTrainer.save_final_model = dies("final", AlpacaTrainer.save_final_model, 1)
with reported("train.py"):
    train.train(sys.argv[1:])
