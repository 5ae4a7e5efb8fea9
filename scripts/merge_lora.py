r"""Merge a LoRA adapter into its base: a plain checkpoint, for from_pretrained, weight_diff.py and every other program.

    python -m scripts.merge_lora --adapter output/lora --output_dir output/merged
    python -m scripts.merge_lora --adapter <folder or hub id> --base <folder or hub id> --output_dir <folder> \
        --dtype bfloat16

The base is the one that the adapter names, or --base. Tensors are read and written in pieces; those that the adapter
does not touch keep every bit. Tokenizer and prompt template are the adapter's where it has them, else the base's.
"""

import json
import shutil
from collections.abc import Sequence
from typing import Literal

if __name__ == "__main__":
    from alpaca.common.errors import starting

    starting("scripts.merge_lora")

from alpaca.common import commands
from alpaca.common.errors import format_bytes, loading, names_flags, reported
from alpaca.common.files import new_folder
from alpaca.data.tokenizer import copy_slow_files
from alpaca.weights.merge_lora import Adapter, Merged
from alpaca.weights.provenance import base_of_adapter
from alpaca.weights.reader import open_weights
from alpaca.weights.writer import FLOATS, Pipeline, plan_shards, write_model


@names_flags
def merge_lora(
    adapter: str,
    output_dir: str,
    base: str | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Write the checkpoint that `adapter` and its base make together.

    Args:
        adapter: folder (or hub id) of a LoRA adapter in peft's format.
        output_dir: folder to be written; it is whole or not there.
        base: folder (or hub id) of the base model, if it is not where the adapter says.
        dtype: of all weights; omit it and each tensor keeps that of the base.
        max_shard_size: largest size of one file.
        overwrite: replace output_dir if it is a checkpoint.

    Raises:
        UsageError: adapter and base do not fit, or the adapter has what plain weights cannot say; nothing is written.
    """
    plan_shards([], "model", max_shard_size)
    with loading(adapter, "is not of peft's format"):
        opened = Adapter(adapter)
    with opened.weights, open_weights(base or base_of_adapter(opened.folder)) as weights:
        with loading(adapter, "cannot be merged into this base"):
            merged = Merged(weights, opened, FLOATS[dtype] if dtype else None)
        size = sum(spec.nbytes for spec in merged.specs)
        with new_folder(output_dir, size, overwrite, (weights.folder, opened.folder)) as folder:
            print(*merged.notes(), sep="\n", flush=True)
            with Pipeline(size, "merge_lora") as pipe:
                write_model(merged, pipe, folder, max_shard_size)
            for name, path in merged.files.items():
                shutil.copyfile(path, folder / name)
            copy_slow_files(weights.folder, folder)
            (folder / "config.json").write_text(json.dumps(merged.config, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {output_dir}: {format_bytes(size)}", commands.ways_on(output_dir), sep="\n", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    commands.call("scripts.merge_lora", merge_lora, argv, __doc__)


if __name__ == "__main__":
    with reported("scripts.merge_lora"):
        main()
