r"""Is a training step on packed rows the same as on padded ones? Compared on your own model and rows, in full.

    python -m scripts.check_packing --model_name_or_path <model> --data_path alpaca_data.json
    python -m scripts.check_packing --model_name_or_path <model> --data_path alpaca_data.json --bf16 True --num_rows 64

Takes one optimizer step's worth of rows, as train.py would for the same seed, and computes loss and gradient of every
parameter, dropout disabled: padded with a mask as in 2023, every row alone, and in each way of packing. Rows alone and
padded differ by rounding only, which says how much that is here; the packed gradient of a parameter g may differ by

    |packed - padded|  <=  max(1e-5, 4 x rounding) x max(|g|, |gradient of all| / 1000)

with --bf16 against the padded gradient in float32, from which it may not be further than the padded one in bfloat16.
Uses the GPU if there is one: 12 bytes a parameter.

Exit code: 0 where every way of packing that train.py would use is exact, 1 where one is not, 2 on an error.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alpaca.common import arguments
from alpaca.common.arguments import flag
from alpaca.common.errors import first_line, reported
from alpaca.models.embeddings import resize_embeddings
from alpaca.models.load import load_model, load_tokenizer
from alpaca.packing.attention import PackLayout, named_kernel, packed_attention_enabled
from alpaca.packing.loss import batch_loss
from alpaca.packing.packing import (
    PackedBatchDataset,
    Packing,
    measure_rows,
    plan_packing,
    why_not_packed,
    why_not_shared,
)
from alpaca.packing.sampler import StepSampler
from alpaca.training.preflight import check_is_model
from train import DataArguments, ModelArguments, make_supervised_data_module

Gradient = dict[str, Tensor]


@dataclass
class VerifyArguments:
    _argument_group_name = "comparison"
    num_rows: int = flag(32, "Rows of the step.")
    per_device_train_batch_size: int = flag(4, "Rows of a padded micro-batch.")
    max_tokens_per_pack: int = flag(4096, "Tokens that a pack has at most.")
    bf16: bool = flag(False, "Compare in bfloat16 arithmetic, weights in float32.")
    seed: int = flag(42, "As for train.py: of the order of rows.")
    model_max_length: int = flag(512, "As for train.py.")
    cache_dir: str | None = flag(None, "As for train.py.")

    fsdp, process_index, deepspeed, neftune_noise_alpha = None, 0, None, None  # what train.py's functions ask for


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison for the command line `argv`; returns the exit code."""
    classes = (ModelArguments, DataArguments, VerifyArguments)
    argv = sys.argv[1:] if argv is None else argv
    (model_args, data_args, options), _ = arguments.parse(argv, classes, __doc__, program="scripts.check_packing")
    check_is_model(model_args.model_name_or_path)
    tokenizer, new_tokens = load_tokenizer(model_args, options)
    data_module = make_supervised_data_module(tokenizer, data_args, options.cache_dir)
    dataset, collate = data_module["train_dataset"], data_module["data_collator"]
    model = load_model(model_args, options)
    resize_embeddings(model, new_tokens, len(tokenizer))
    model.config.use_cache = False
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    notes = [why_not_packed(model.config, options, int(dataset.lengths.max())), why_not_shared(model)]
    rows = PackedBatchDataset(dataset, collate)
    verdicts = [compare(model, rows, options, loss, notes) for loss in ("token", "microbatch")]
    for what, note in zip(("packs", "shared prefixes"), notes):
        if note:
            print(f"train.py would not use {what} here: {note}")
    exact = all(verdicts)
    verdict = "packed rows train as padded ones" if exact else "packed rows do NOT train as padded ones"
    print("verdict: " + ("train.py pads the rows of this model" if notes[0] else verdict))
    return 0 if exact else 1


def compare(
    model: PreTrainedModel, rows: PackedBatchDataset, options: VerifyArguments, loss: str, notes: Sequence[str | None]
) -> bool:
    """Print a line for each way of batching; True if those that train.py would use are exact. `notes`: why it would not
    pack, or not share."""
    sizes = measure_rows(rows.dataset)
    batch_size = options.per_device_train_batch_size
    accumulation = max(options.num_rows // batch_size, 1)

    def gradient(batch_size: int, accumulation: int, packing: Packing | None, bf16: bool) -> tuple[float, Gradient]:
        sampler = StepSampler(sizes, batch_size, accumulation, seed=options.seed, normalization=loss, packing=packing)
        rows.packing = packing
        return step_gradient(model, rows, sampler, bf16)

    expected, reference = gradient(batch_size, accumulation, None, False)
    print(
        f"\n--loss_normalization {loss}: {min(batch_size * accumulation, len(rows))} rows, loss {expected:.6f} "
        f"padded in float32{', below in bfloat16' if options.bf16 else ''}"
    )
    ways: list[tuple[str, int, Packing | None, bool]] = [("every row alone", 1, None, True)]
    if loss == "microbatch" or options.bf16:  # rows alone would be other micro-batches
        ways = [("padded", batch_size, None, True)]
    for name, share in (("packed", False), ("packed, prefixes shared", True)):
        would_use = not notes[0] and not (share and notes[1])
        ways.append(
            (name, batch_size, plan_packing(rows.dataset, sizes, options.max_tokens_per_pack, share), would_use)
        )
    limit, exact = 1e-5, True
    for name, size, packing, counts in ways:
        try:
            found, gradients = gradient(size, batch_size * accumulation // size, packing, options.bf16)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            print(f"  {name:26} cannot be computed: {first_line(error)}")
            exact = exact and not counts
            continue
        worst, parameter = largest_difference(gradients, reference)
        if packing is None:
            limit, verdict = max(limit, (1.1 if options.bf16 else 4) * worst), "rounding"
        else:
            verdict = "equal up to rounding" if worst <= limit else f"DIFFERENT: more than {limit:.1e}"
            exact = exact and (worst <= limit or not counts)
        print(f"  {name:26} loss {found:.6f}   gradient {worst:.1e} apart at most ({parameter})   {verdict}")
    return exact


def step_gradient(
    model: PreTrainedModel, rows: PackedBatchDataset, sampler: StepSampler, bf16: bool = False
) -> tuple[float, Gradient]:
    """Loss and gradient of the first optimizer step of `sampler`, of all its ranks, without dropout."""
    device, total, kernel = model.device, 0.0, named_kernel(model.config)
    model.eval()
    model.zero_grad()
    step = next(sampler.steps())
    for planned in (batch for rank in range(sampler.world_size) for batch in sampler.plan(step, rank)):
        batch = {
            name: value.to(device) if isinstance(value, (Tensor, PackLayout)) else value
            for name, value in rows[planned].items()
            if name not in ("rows", "step")
        }
        with packed_attention_enabled(model.config) if planned.packed else nullcontext():
            with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
                loss, _ = batch_loss(model, batch, pack_kernel=kernel)
            loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(found: Gradient, expected: Gradient) -> tuple[float, str]:
    """The largest |found - expected| / max(|expected|, |all of expected| / 1000) of a parameter, and which it is."""
    if found.keys() != expected.keys():
        return float("inf"), sorted(found.keys() ^ expected.keys())[0]
    everything = nn.utils.get_total_norm(expected.values()).item()
    apart = {
        name: (found[name] - g).norm().item() / max(g.norm().item(), everything / 1000) for name, g in expected.items()
    }
    return max((size, name) for name, size in apart.items())


if __name__ == "__main__":
    with reported("scripts.check_packing"):
        sys.exit(main())
