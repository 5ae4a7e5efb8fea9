"""The disk that a run's checkpoints and final model will take, said before the model is loaded."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from alpaca.common.distributed import say
from alpaca.common.errors import UsageError, human
from alpaca.common.files import free_bytes
from alpaca.forecast import optimizer_bytes

if TYPE_CHECKING:
    from transformers import TrainingArguments


def checkpoint_sizes(args: "TrainingArguments", trained: int) -> tuple[float, float]:
    """(bytes of a checkpoint, of what is saved at the end) for `trained` parameters: float32 weights and, unless
    --save_only_model, the optimizer."""
    masters = 4 * bool(args.deepspeed)  # it saves them with the optimizer
    optimizer = 0 if args.save_only_model else optimizer_bytes(args) + masters
    return trained * (4 + optimizer), trained * (4 if args.save_dtype == "float32" else 2)


def checkpoints_to_come(args: "TrainingArguments", steps: int, per_epoch: float, done: int) -> int:
    """How many more checkpoints than now will stand on the disk at the worst moment of a run that continues after
    `done` steps: the old one goes when the new one is whole, and the best one stays."""
    every = {"steps": args.save_steps, "epoch": per_epoch, "best": args.eval_steps}.get(args.save_strategy)
    if not every:
        return 0
    if args.save_strategy == "epoch":  # also where the last one is not whole
        saves = math.ceil(steps / every) - int(done // every)
    else:
        every = math.ceil(steps * every) if every < 1 else int(every)
        saves = steps // every - done // every
    saves, limit = max(saves, 0), args.save_total_limit
    if not limit or limit < 0:
        return saves
    at_once = limit + 1 + (args.load_best_model_at_end or args.save_strategy == "best")
    return min(saves, max(at_once - (done > 0), 1))


def check_room(args: "TrainingArguments", trained: int, checkpoints: int) -> None:
    """Say how much disk the run will take.

    Raises:
        UsageError: less is free.
    """
    each, final = checkpoint_sizes(args, trained)
    needed, free = checkpoints * each + final, free_bytes(Path(args.output_dir))
    content = f"{checkpoints} x {human(each)} for checkpoints + {human(final)} for the final model"
    say(f"disk, forecast: {content} = {human(needed)}, free {human(free)}", 0)
    if needed > free:
        raise UsageError(
            f"--output_dir {args.output_dir}: the run would take {human(needed)} ({content}), but {human(free)} are "
            "free. Choose another disk, or write less: --save_total_limit 1, a larger --save_steps, "
            "--save_strategy no, --save_dtype bfloat16"
        )
