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
from dataclasses import dataclass

if __name__ == "__main__":
    from alpaca.common.errors import starting

    starting("scripts.check_packing")

import torch
from transformers import PreTrainedModel

from alpaca.common import arguments
from alpaca.common.arguments import flag
from alpaca.common.commands import check_numbers
from alpaca.common.errors import names_flags, reported
from alpaca.models.embeddings import resize_embeddings, vocabulary_size
from alpaca.models.load import load_model, load_tokenizer
from alpaca.packing.check import compare_step
from alpaca.packing.packing import PackedBatchDataset, why_not_packed, why_not_shared
from alpaca.training.preflight import check_is_model
from train import DataArguments, ModelArguments, make_supervised_data_module


@dataclass
class VerifyArguments:
    _argument_group_name = "comparison"
    num_rows: int = flag(32, "Rows of the step.")
    per_device_train_batch_size: int = flag(4, "Rows of a padded micro-batch.")
    max_tokens_per_pack: int = flag(4096, "Most tokens of a pack.")
    bf16: bool = flag(False, "Compare in bfloat16 arithmetic, weights in float32.")
    seed: int = flag(42, "Seed of the order of rows, as in train.py.")
    model_max_length: int = flag(512, "Maximum sequence length in tokens, as in train.py.")
    cache_dir: str | None = flag(None, "Folder for downloads and tokenized data, as in train.py.")

    # What functions ask for that take train.py's TrainingArguments.
    process_index = 0
    fsdp = deepspeed = neftune_noise_alpha = None


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison for the command line `argv`. Return the exit code."""
    classes = (ModelArguments, DataArguments, VerifyArguments)
    argv = sys.argv[1:] if argv is None else argv
    flags, _ = arguments.parse(argv, classes, __doc__, program="scripts.check_packing")
    return check_packing(*flags)


@names_flags
def check_packing(model_args: ModelArguments, data_args: DataArguments, options: VerifyArguments) -> int:
    check_numbers(
        num_rows=options.num_rows,
        per_device_train_batch_size=options.per_device_train_batch_size,
        max_tokens_per_pack=options.max_tokens_per_pack,
        model_max_length=options.model_max_length,
    )
    batch_size = options.per_device_train_batch_size
    if options.num_rows % batch_size:
        whole = micro_batches(options) * batch_size
        print(f"note: --num_rows {options.num_rows} -> {whole}, whole micro-batches of {batch_size} rows")
    check_is_model(model_args.model_name_or_path)
    tokenizer, new_tokens = load_tokenizer(model_args, options)
    data_module = make_supervised_data_module(tokenizer, data_args, options.cache_dir)
    dataset, collate = data_module["train_dataset"], data_module["data_collator"]
    model = load_model(model_args, options)
    resize_embeddings(model, new_tokens, vocabulary_size(tokenizer))
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


def micro_batches(options: VerifyArguments) -> int:
    return max(options.num_rows // options.per_device_train_batch_size, 1)


def compare(
    model: PreTrainedModel,
    rows: PackedBatchDataset,
    options: VerifyArguments,
    normalization: str,
    notes: Sequence[str | None],
) -> bool:
    """Print a line for each way of batching. Return whether those that train.py would use are exact; `notes` say why it
    would not pack, or not share prefixes."""
    batch_size = options.per_device_train_batch_size
    accumulation = micro_batches(options)
    padded, *ways = compare_step(
        model,
        rows,
        normalization,
        batch_size,
        accumulation,
        max_tokens=options.max_tokens_per_pack,
        seed=options.seed,
        bf16=options.bf16,
    )
    print(
        f"\n--loss_normalization {normalization}: {min(batch_size * accumulation, len(rows))} rows, loss "
        f"{padded.loss:.6f} {padded.name}{', below in bfloat16' if options.bf16 else ''}"
    )
    for way in ways:
        if way.failure:
            print(f"  {way.name:26} cannot be computed: {way.failure}")
            continue
        verdict = "rounding"
        if way.packing:
            verdict = "equal up to rounding" if way.exact else f"DIFFERENT: more than {way.limit:.1e}"
        apart = f"gradient {way.difference:.1e} apart at most ({way.parameter})"
        print(f"  {way.name:26} loss {way.loss:.6f}   {apart}   {verdict}")
    used = [way for way in ways if not (way.packing and (notes[0] or (way.packing.prefixes and notes[1])))]
    return all(way.exact for way in used)


if __name__ == "__main__":
    with reported("scripts.check_packing"):
        sys.exit(main())
