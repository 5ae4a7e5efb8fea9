r"""Tokenizing as many rows as Alpaca has: the loop of 2023, ours, and ours from its cache.

    python -m benchmarks.tokenization --output benchmarks/results/tokenization_cpu.json

The rows of --data_path are repeated to `rows` distinct ones in which every fourth word is another of theirs, at times
with another ending, so that the words are about as many as 52,002 real rows have by Heaps' law. Two tokenizers are
trained on the original rows: LLaMA's kind and OPT's. 2023's loop is written anew: a call per text, for prompt + answer
and again for the prompt, then labels. All take turns in this process, `repeats` times; ids and labels are compared.
Times: `original` and `ours` from texts to ids and labels, `ours_cached` the same from the file; `dataset_cached` is
the whole of SupervisedDataset, with reading, checking and reporting.
"""

import argparse
import copy
import json
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from alpaca.common.errors import reported
from alpaca.data.prompts import format_prompt
from alpaca.data.rows import load_rows
from alpaca.data.tokenization import IGNORE_INDEX, cached_tokens
from alpaca.data.tokenizer import open_tokenizer
from benchmarks.machine import write_result
from scripts.make_tiny_model import byte_level_tokenizer, sentencepiece_tokenizer
from train import SupervisedDataset, preprocess

VOCABULARY = 16_000
ENDINGS = [a + b for a in ("er", "ing", "ation", "less", "wise", "ment", "ist") for b in ("", "s", "al", "ly", "o")]


def make_rows(real: list[dict[str, str]], number: int) -> list[dict[str, str]]:
    """The rows of `real` again and again, none like another."""
    words = sorted({word for row in real for text in row.values() for word in text.split(" ")})
    draw = random.Random(0)

    def other() -> str:
        return draw.choice(words) + (draw.choice(ENDINGS) if draw.random() < 0.2 else "")

    def varied(text: str) -> str:
        return " ".join(other() if word and draw.random() < 0.25 else word for word in text.split(" "))

    rows, seen = [], set()
    while len(rows) < number:
        row = {field: varied(text) for field, text in real[len(rows) % len(real)].items()}
        if (content := tuple(row.values())) not in seen:
            seen.add(content)
            rows.append(row)
    return rows


def distinct_words(rows: list[dict[str, str]]) -> int:
    return len({word for row in rows for text in row.values() for word in re.findall(" *[^ ]+", text)})


def as_in_2023(sources: list[str], targets: list[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    def ids(texts: list[str]) -> list[torch.Tensor]:
        options = dict(return_tensors="pt", padding="longest", max_length=tokenizer.model_max_length, truncation=True)
        return [tokenizer(text, **options)["input_ids"][0] for text in texts]

    input_ids = ids([source + target for source, target in zip(sources, targets)])
    labels = copy.deepcopy(input_ids)
    for label, prompt in zip(labels, ids(sources)):
        label[: len(prompt)] = IGNORE_INDEX
    return dict(input_ids=input_ids, labels=labels)


def timed(times: list[float], function: Callable, *args: Any) -> Any:
    start = time.perf_counter()
    result = function(*args)
    times.append(time.perf_counter() - start)
    return result


def check_equal(ours: dict[str, Any], original: dict[str, Any]) -> None:
    for name in ("input_ids", "labels"):
        if not all(map(torch.equal, ours[name], original[name])) or len(ours[name]) != len(original[name]):
            raise SystemExit(f"{name} are not those of the original")


def measure(tokenizer: PreTrainedTokenizerBase, data: Path, folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds of all, in turns."""
    rows = json.loads(data.read_text())
    sources = [format_prompt(row) for row in rows]
    targets = [row["output"] + tokenizer.eos_token for row in rows]
    names = ("original", "ours", "ours_cached", "dataset_cached")
    times: dict[str, list[float]] = {name: [] for name in names}
    cached_tokens("rows", lambda: preprocess(sources, targets, tokenizer), str(folder))
    SupervisedDataset(str(data), tokenizer, cache_dir=str(folder))
    for _ in range(repeats):
        ours = timed(times["ours"], preprocess, sources, targets, tokenizer)
        cached = timed(times["ours_cached"], cached_tokens, "rows", lambda: None, str(folder))
        dataset = timed(times["dataset_cached"], lambda: SupervisedDataset(str(data), tokenizer, cache_dir=str(folder)))
        original = timed(times["original"], as_in_2023, sources, targets, tokenizer)
        for tokens in (ours, cached, vars(dataset)):
            check_equal(tokens, original)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "vocabulary": len(tokenizer),
        "tokens": int(ours["lengths"].sum()),
        "cache_megabytes": round((folder / "alpaca_tokens" / "rows.npz").stat().st_size / 1e6, 1),
        "ids_and_labels_equal": True,
        "seconds": {name: [round(value, 3) for value in values] for name, values in times.items()},
        "original_over_ours": round(median["original"] / median["ours"], 1),
        "original_over_ours_cached": round(median["original"] / median["ours_cached"], 1),
        "original_over_dataset_cached": round(median["original"] / median["dataset_cached"], 1),
    }


def make_tokenizer(kind: str, texts: list[str], folder: Path) -> PreTrainedTokenizerBase:
    folder.mkdir()
    if kind == "llama":
        sentencepiece_tokenizer(texts, VOCABULARY, folder)
    else:
        byte_level_tokenizer(texts, VOCABULARY, folder, kind)
    tokenizer = open_tokenizer(str(folder), model_max_length=512, padding_side="right")
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", default="alpaca_data.json", help="Alpaca rows: a file or a hub id")
    parser.add_argument("--rows", type=int, default=52_002)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    real = load_rows(options.data_path)
    rows = make_rows(real, options.rows)
    result: dict[str, Any] = {"rows": len(rows), "made_from": len(real), "distinct_words": distinct_words(rows)}
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "rows.json"
        data.write_text(json.dumps(rows))
        texts = [format_prompt(row) + row["output"] for row in real]
        for kind in ("llama", "opt"):
            folder = Path(name) / kind
            result[kind] = measure(make_tokenizer(kind, texts, folder), data, folder, options.repeats)
    result |= {
        "environment": {"TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "not set")},
    }
    write_result(result, ("torch", "transformers", "tokenizers", "numpy"), options.output)


if __name__ == "__main__":
    with reported("benchmarks.tokenization"):
        main()
