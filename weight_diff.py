"""Publish a fine-tuned checkpoint as its difference from the base model, and recover it. Three commands:

    python weight_diff.py make_diff --path_raw <base> --path_tuned <tuned> --path_diff <diff>
    python weight_diff.py recover --path_raw <base> --path_diff <diff> --path_tuned <tuned>
    python weight_diff.py verify --path_diff <diff> --path_tuned <tuned>

A diff is exact: recover gives back every bit of the tuned checkpoint, and proves it with the SHA-256 digests of the
diff's manifest. Diffs in the format of 2023, such as that of Alpaca-7B, are recovered as 2023 did. Tensors are read and
written in pieces, in a few hundred megabytes of memory; recovering 2023's format, whose sum is checked, also takes that
of the largest tensor in float32.
"""

import functools
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    from alpaca.common.errors import starting

    starting("weight_diff.py")

import torch

from alpaca.common import commands
from alpaca.common.distributed import loading_line
from alpaca.common.errors import InputError, UsageError, format_bytes, loading, names_flags, reported
from alpaca.common.files import new_folder, read_json, sha256_of_file
from alpaca.data.prompts import format_prompt
from alpaca.data.tokenizer import copy_slow_files
from alpaca.models.device import check_device
from alpaca.weights import exact_diff
from alpaca.weights.exact_diff import ExactDiff
from alpaca.weights.float_diff import FloatDiff, write_files_of_2023
from alpaca.weights.mismatch import check_same_tensors
from alpaca.weights.provenance import CARD, front_matter, hub_id_of
from alpaca.weights.reader import EXACT_DIFF, MANIFEST, find_folder, folder_kind, open_weights
from alpaca.weights.recovery import (
    Chain,
    NaiveSum,
    copy_files,
    load_recovered,
    most_common_dtype,
    note_origin,
    open_diff,
    recover_in_memory,
)
from alpaca.weights.writer import FLOATS, Pipeline, cast, plan_shards, write_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CARD_OF_A_DIFF = """\
---
{metadata}
---

# {tuned} as a weight diff

This is no model, but the difference between one and its base, **{base}**. {what}
With the base and the program that made it:

```bash
python weight_diff.py recover --path_raw <{base}> --path_diff <this folder> --path_tuned <new folder>{flag}
```

- Base: {base}
- Digest: {digest}
- Licence: {licence}
"""
OF_AN_EXACT_DIFF = (
    "`recover` gives back every bit of the model, and proves it.",
    f"`{{}}`, the SHA-256 of `{MANIFEST}`, which has those of all other files but this page. Compare it with what the "
    "publisher names elsewhere",
)
OF_2023 = ("It is in the format of 2023.", "none; `recover` prints the sum of the weights")
OF_A_CARD = ("license", "license_name", "license_link", "datasets", "language")  # that are a diff's, too
QUESTION = "List three technologies that make life easier."  # as in 2023


@names_flags
def make_diff(
    path_raw: str,
    path_tuned: str,
    path_diff: str,
    device: str = "cpu",
    method: str = "exact",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    *,
    compression: str = "zstd",
) -> None:
    """Write the difference between a fine-tuned checkpoint and its base, to be published.

    Args:
        path_raw: folder (or hub id) of the base model.
        path_tuned: folder of the fine-tuned model.
        path_diff: folder to be written.
        device: of 2023, without effect: reading and hashing take the time, not arithmetic.
        method: exact, or float, which is 2023's format, for people who recover with 2023's code.
        max_shard_size: largest size of one file.
        overwrite: replace path_diff if it is a checkpoint or a diff.
        compression: of an exact diff: zstd, or none, which is larger and can be read by older versions of this program.

    Raises:
        UsageError: a folder is no checkpoint or is damaged, or base and tuned do not fit; nothing is written.
    """
    check_device(device)
    _check_choice("method", method, ("exact", "float"))
    _check_choice("compression", compression, ("zstd", "none"))
    plan_shards([], "diff", max_shard_size)
    with open_weights(path_raw) as base, open_weights(path_tuned) as tuned:
        if base.folder.resolve() == tuned.folder.resolve():
            raise InputError(f"{path_tuned}: is the base itself", path_tuned, written=True)
        tuned.require_config()
        with loading(path_tuned, "its configuration, or the base's, is not of its format"):
            diff = FloatDiff(base, tuned, sign=-1) if method == "float" else None
        size = sum(spec.nbytes for spec in diff.own) if diff else tuned.nbytes
        inputs = (base.folder, tuned.folder)
        with new_folder(path_diff, size, overwrite, inputs) as folder:
            with Pipeline(size, "make_diff") as pipe:
                if diff is None:
                    lines = exact_diff.make(pipe, base, tuned, folder, max_shard_size, compression)
                else:
                    diff.write(pipe, folder, max_shard_size)
                    lines = [*diff.notes(), *write_files_of_2023(tuned.folder, base.folder, folder)]
            _write_card(folder, base.folder, tuned.folder, None if diff else sha256_of_file(folder / MANIFEST))
            if diff is None:
                size = sum(shard.stat().st_size for shard in folder.glob("diff*.safetensors"))
    share = f", {size / max(tuned.nbytes, 1):.0%} of the tuned model" if diff is None and compression == "zstd" else ""
    print("\n".join([*lines, f"wrote {path_diff}: {format_bytes(size)}{share}"]), flush=True)


def _write_card(folder: Path, base: Path, tuned: Path, digest: str | None) -> None:
    """Write the diff's README.md, which is not in the manifest, so that its publisher may write on: no path of this
    machine, and of licences what the tuned model's own card says. No digest: the format of 2023."""
    from huggingface_hub import ModelCardData

    try:
        facts = front_matter(tuned) or {}
    except InputError as error:
        print(f"note: {error}; nothing of it is taken over into {CARD}", flush=True)
        facts = {}
    hub_id, _ = hub_id_of(base) or (None, None)
    taken = {name: facts[name] for name in OF_A_CARD if facts.get(name)}
    licence = facts.get("license_name") or facts.get("license")
    known = f"{licence}, by the model's own card; those" if licence else "not stated by the model's own card; those"
    what, proof = OF_AN_EXACT_DIFF if digest else OF_2023
    text = CARD_OF_A_DIFF.format(
        metadata=ModelCardData(base_model=hub_id, tags=["weight-diff"], **taken).to_yaml(),
        tuned=tuned.resolve().name,
        base=hub_id or base.resolve().name,
        what=what,
        flag=f" --digest {digest}" if digest else "",
        digest=proof.format(digest),
        licence=f"{known} of the base and of the data apply",
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def recover(
    path_raw: str,
    path_diff: str,
    path_tuned: str | None = None,
    device: str = "cpu",
    test_inference: bool = False,
    check_integrity_naively: bool | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    digest: str | None = None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Recover a fine-tuned model from its base and a diff. Without path_tuned both are verified and nothing is written.

    From Python it returns (model, tokenizer), as in 2023; from the command line the model is loaded only for
    --test_inference.

    Args:
        path_raw: folder (or hub id) of the base model in Hugging Face's format, of any float dtype.
        path_diff: folder (or hub id) of the diff, exact or as 2023 wrote it.
        path_tuned: folder to be written, a checkpoint for from_pretrained.
        device: cpu or cuda, where the recovered model is loaded to.
        test_inference: load the recovered model and let it answer a question (2023: by default).
        check_integrity_naively: 2023's check, the sum of the weights of Alpaca-7B; True makes another sum an error, not
            given the sum is printed, for diffs in the format of 2023.
        dtype: float32, float16 or bfloat16 for the recovered weights; not given, the tuned model's (2023: float32).
        max_shard_size: largest size of one file.
        overwrite: replace path_tuned if it is a checkpoint or a diff.
        digest: what make_diff has printed; the manifest of the diff must have it.

    Raises:
        UsageError: base and diff do not fit, or a byte of them is not what it was; nothing is written.
    """
    return _recover(
        path_raw,
        path_diff,
        path_tuned,
        device,
        test_inference,
        check_integrity_naively,
        dtype,
        max_shard_size,
        overwrite,
        digest,
        load=True,
    )


@names_flags
def verify(
    path_diff: str | None = None,
    path_tuned: str | None = None,
    path_raw: str | None = None,
    digest: str | None = None,
    *,
    chain: str | None = None,
    data_path: str | None = None,
) -> None:
    """Verify that a folder is, bit for bit, what recover makes of a diff; with chain, from the data on.

    Args:
        path_diff: folder (or hub id) of the diff; with chain, where it is not where it was.
        path_tuned: folder to be verified; with chain, the recovered one where chain is another.
        path_raw: the base; needed for a diff in the format of 2023, which has no digests. With an exact diff, base and
            diff are verified too.
        digest: what make_diff has printed; the manifest of the diff must have it.
        chain: a recovered folder, a diff or a run's output_dir. Data file, run record, model, diff and recovered folder
            are each compared with the next, as far as this folder says where they are.
        data_path: with chain, the data file where it is not where it was.

    Raises:
        UsageError: the message names the tensors or the file that differ, or the first link that is missing or broken.
    """
    if chain is not None:
        return Chain.of(chain, data_path, path_diff, path_tuned).verify(digest)
    if data_path is not None:
        raise UsageError(f"--data_path {data_path}: is compared with --chain only; give that too")
    if missing := [f"--{n}" for n, v in (("path_diff", path_diff), ("path_tuned", path_tuned)) if v is None]:
        raise UsageError(f"weight_diff.py verify needs {', '.join(missing)}")
    with open_weights(path_tuned) as tuned:
        folder = find_folder(path_diff)
        if folder_kind(folder) == EXACT_DIFF:
            diff = ExactDiff(folder, digest)
            with Pipeline(tuned.nbytes, "verify") as pipe:
                diff.verify(pipe, tuned)
            print(f"proved: {path_tuned} is {diff.summary}", flush=True)
            if path_raw is not None:
                _recover(path_raw, path_diff, digest=digest)
        elif path_raw is None:
            raise UsageError(f"--path_diff {path_diff}: is in the format of 2023, without digests; give --path_raw too")
        else:
            with open_weights(path_raw) as base, open_diff(base, path_diff, digest) as diff:
                with Pipeline(diff.weights.nbytes, "verify") as pipe:
                    diff.verify(pipe, tuned)
            kinds = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tuned.tensors.values()}))
            print(f"proved: {path_tuned} is the sum of {path_raw} and {path_diff}, cast to {kinds}", flush=True)


# ---- recover, with the model or without ----


@names_flags
def _recover(
    path_raw: str,
    path_diff: str,
    path_tuned: str | None = None,
    device: str = "cpu",
    test_inference: bool = False,
    check_integrity_naively: bool | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    digest: str | None = None,
    load: bool = False,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase] | None":
    """Do what `recover` does, but load the model only if it is to answer or to be returned."""
    dtype = str(dtype).removeprefix("torch.") if dtype is not None else None
    check_device(device)
    _check_choice("dtype", dtype, (None, *FLOATS))
    plan_shards([], "model", max_shard_size)
    load = load or test_inference
    kind = FLOATS.get(dtype)
    state = None
    with open_weights(path_raw) as base, open_diff(base, path_diff, digest) as diff:
        config = read_json(diff.files["config.json"])
        summed = isinstance(diff, FloatDiff) if check_integrity_naively is None else check_integrity_naively
        with loading(path_diff, "config.json is not of its format"):
            naive = NaiveSum(diff.specs, config, diff.aliases) if summed else None
        size = sum(spec.nbytes for spec in cast(diff.specs, kind))
        nbytes = sum(spec.nbytes for spec in diff.specs)
        inputs = (base.folder, diff.folder)
        with nullcontext() if path_tuned is None else new_folder(path_tuned, size, overwrite, inputs) as folder:
            for note in diff.notes():
                print(note, flush=True)
            if folder is None:
                state = recover_in_memory(diff, kind, load, naive and naive.add)
            else:
                with Pipeline(nbytes, "recover") as pipe:
                    write_model(diff, pipe, folder, max_shard_size, kind, naive and naive.add)
                copy_files(diff.files, folder, kind)
                copy_slow_files(base.folder, folder)
                if isinstance(diff, ExactDiff):
                    _verify_written(diff, folder, kind)
                    note_origin(folder, path_tuned, diff.folder)
            lines = _sum_lines(naive, required=check_integrity_naively is True)
        ways = [commands.ways_on(path_tuned)] if path_tuned is not None else []
        print(*lines, _verdict(diff, path_raw, path_diff, path_tuned, dtype), *ways, sep="\n", flush=True)
        return _load(diff, path_tuned, state, device, kind, test_inference) if load else None


def _verify_written(diff: ExactDiff, folder: Path, dtype: torch.dtype | None) -> None:
    """Raise UsageError unless what lies in `folder`, after all copying, is what was proved. Weights that were cast are
    those of no manifest: their names and shapes are looked at."""
    with open_weights(folder) as written:
        if dtype is not None:
            return check_same_tensors(written, cast(diff.specs, dtype), f"the manifest of {diff.folder}")
        with Pipeline(written.nbytes, "verify") as pipe:
            diff.verify(pipe, written)


def _sum_lines(naive: NaiveSum | None, required: bool) -> list[str]:
    """Return the line of 2023's check. Raise UsageError if it is `required` that the sum is that of Alpaca-7B."""
    if naive is None:
        return []
    right, line = naive.check()
    if required and not right:
        raise UsageError(
            f"--check_integrity_naively: {line}; base or diff is damaged or another; for another model omit this flag"
        )
    return [f"naive integrity check: {line}"]


def _verdict(
    diff: ExactDiff | FloatDiff, path_raw: str, path_diff: str, path_tuned: str | None, dtype: str | None
) -> str:
    """Return the last line: what is known now."""
    if path_tuned is None:
        return f"{diff.verdict}: {path_raw} and {path_diff} give {diff.summary}; nothing was written"
    if dtype is None:
        return f"{diff.verdict}: {path_tuned} is {diff.summary}"
    return f"{diff.verdict}: {path_raw} and {path_diff} give {diff.summary}; {path_tuned} is that, cast to {dtype}"


def _load(
    diff: ExactDiff | FloatDiff,
    path_tuned: str | None,
    state: dict[str, torch.Tensor] | None,
    device: str,
    dtype: torch.dtype | None,
    test_inference: bool,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load the recovered model, from its folder or from memory, and its tokenizer."""
    from transformers import AutoModelForCausalLM

    from alpaca.data.tokenization import prompt_ids
    from alpaca.data.tokenizer import open_config, open_tokenizer

    dtype = dtype or most_common_dtype(diff)
    if path_tuned is not None:
        tokenizer = open_tokenizer(path_tuned)
        config = open_config(path_tuned)
        with loading_line(path_tuned), loading(path_tuned, "the recovered model could not be loaded"):
            model = AutoModelForCausalLM.from_pretrained(
                path_tuned, config=config, dtype=dtype, trust_remote_code=False
            )
    else:
        with loading_line("the recovered model"):
            model, tokenizer = load_recovered(diff, state, dtype)
    model.to(device).eval()
    if test_inference:
        prompt = format_prompt({"instruction": QUESTION})
        ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=device)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=100)
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        print(f"Input: {prompt}\nCompletion: {answer}", flush=True)
    return model, tokenizer


def _check_choice(name: str, value: str | None, choices: Iterable[str | None]) -> None:
    if value not in choices:
        raise UsageError(f"--{name} {value}: expected one of {', '.join(filter(None, choices))}")


def main() -> None:
    """Run the command line: recover without the model that it returns from Python."""

    @functools.wraps(recover)
    def command(*values: Any, **flags: Any) -> None:
        _recover(*values, **flags)

    commands.run("weight_diff.py", {"make_diff": make_diff, "recover": command, "verify": verify})


if __name__ == "__main__":
    with reported("weight_diff.py"):
        main()
