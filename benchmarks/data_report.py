r"""How long the data report takes for as many rows as Alpaca has, beside the row-by-row tokenizing of 2023.

    python -m benchmarks.data_report --rows 52002 --output benchmarks/results/data_report_cpu.json

The rows are drawn from seed_tasks.jsonl, the tokenizer is the one of scripts.make_tiny_model. Both sides run in this
process, one after the other, `repeats` times in turn; the cached figure is a second inspection of the same rows.
"""

import argparse
import io
import json
import random
import shutil
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import tokenizers
import torch
import transformers

from alpaca.prompts import format_prompt
from benchmarks.machine import describe_machine, write_result
from scripts.inspect_data import main as inspect_data
from scripts.make_tiny_model import make_tiny_model

ROOT = Path(__file__).resolve().parent.parent


def make_rows(number: int) -> list[dict[str, str]]:
    """Rows of about Alpaca's length, none like another."""
    tasks = [json.loads(line) for line in (ROOT / "seed_tasks.jsonl").read_text(encoding="utf-8").splitlines()]
    draw = random.Random(0)
    rows = []
    for i in range(number):
        a, b = draw.choice(tasks), draw.choice(tasks)
        answer = f"{i}. {a['instances'][0]['output']} {b['instances'][0]['output'][: draw.randrange(200)]}"
        rows.append({"instruction": a["instruction"], "input": a["instances"][0]["input"], "output": answer})
    return rows


def as_in_2023(rows: list[dict[str, str]], tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """Two calls of the tokenizer per row, as the original's _tokenize_fn made."""
    for row in rows:
        source = format_prompt(row)
        for text in (source + row["output"] + tokenizer.eos_token, source):
            tokenizer(text, return_tensors="pt", padding="longest", max_length=512, truncation=True)


def timed(function, *args) -> float:
    start = time.perf_counter()
    with redirect_stdout(io.StringIO()):
        function(*args)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=52_002)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_tiny_model(Path(folder) / "model", "llama"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        tokenizer.pad_token = tokenizer.eos_token
        rows, data = make_rows(options.rows), Path(folder) / "rows.json"
        data.write_text(json.dumps(rows))
        words = ["--model_name_or_path", model, "--data_path", str(data), "--cache_dir", f"{folder}/cache"]
        times = {"original": [], "report": [], "report_cached": []}
        for _ in range(options.repeats):
            shutil.rmtree(f"{folder}/cache", ignore_errors=True)
            times["report"].append(timed(inspect_data, words))
            times["report_cached"].append(timed(inspect_data, words))
            times["original"].append(timed(as_in_2023, rows, tokenizer))
    median = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "rows": options.rows,
        "seconds": {name: [round(value, 2) for value in values] for name, values in times.items()},
        "original_over_report": round(median["original"] / median["report"], 2),
        "original_over_report_cached": round(median["original"] / median["report_cached"], 2),
        "machine": describe_machine(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
    }
    write_result(result, options.output)


if __name__ == "__main__":
    main()
