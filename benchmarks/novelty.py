r"""The novelty filter of generate_instruction.py beside the algorithm of 2023: milliseconds per candidate.

    python -m benchmarks.novelty --output benchmarks/results/novelty_cpu.json

2023's algorithm is written anew: a process pool for each candidate, in which rouge_score compares it with all known
instructions one by one; 16 processes was the default, 2 is the better choice on 2 cores. Ours gets 85 candidates a
call: 5 requests of 17 instructions, as 2023's default was. Both take turns, `repeats` times, with the same candidates;
what both have decided is compared bit for bit. Times include scores, mean and the ten most similar. Instructions are
simulated from the words of seed_tasks.jsonl, endings added to make many of them rare, one in eight a variant of an
earlier one.

The whole run, from the seed tasks to `total` kept instructions, is run with ours. For 2023 it is not run but integrated
from its measured milliseconds: straight lines between pool sizes, below the smallest that one's.

    python -m benchmarks.novelty --growth --data alpaca_data.json --output benchmarks/results/novelty_million_cpu.json
    python -m benchmarks.novelty --plot benchmarks/results/novelty_million_cpu.json assets/novelty_cost.svg

How the cost of a candidate grows with the pool, with details and without, to 1,000,000 known instructions. --data: a
file of Alpaca's rows; what it has too few of is made of their words, so that tokens are as frequent as there, one in
eight a variant of an earlier one. Each pool is measured in a process of its own; memory is what the process has more
once the filter is made, and at most while it is made. Decisions on all candidates are compared with those of a full
scan. `exclusion` is the cost of testing candidates against 14,000 made texts of about 60 tokens.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from rouge_score import rouge_scorer

from alpaca.datagen.novelty import Exclusion, NoveltyFilter, Similarity, Vocabulary, common_tokens, f_measures_by_table
from benchmarks.machine import ROOT, write_result

CALL = 85
OURS = {  # name: settings of the filter
    "ours, 1 thread": {"workers": 1},
    "ours, 2 threads": {"workers": 2},
    "ours, 2 threads, stable ties": {"workers": 2, "stable_ties": True},
}
PROCESSES = {"2023, 16 processes": 16, "2023, 2 processes": 2}


def seed_tasks() -> list[dict]:
    return [json.loads(line) for line in (ROOT / "seed_tasks.jsonl").read_text(encoding="utf-8").splitlines()]


def variant(text: str, words: list[str], draw: random.Random) -> list[str]:
    """The words of a text, up to four of them replaced."""
    changed = text.split()
    for _ in range(draw.randrange(1, 5)):
        changed[draw.randrange(len(changed))] = draw.choice(words)
    return changed


def make_instructions(number: int, seed: int) -> list[str]:
    """Instructions of about Alpaca's length, 11 tokens on average."""
    words = " ".join(f"{task['instruction']} {task['instances'][0]['output']}" for task in seed_tasks()).split()
    endings = [a + b for a in ("er", "ing", "ation", "less", "wise", "ment", "ist") for b in ("", "s", "al", "ly", "o")]
    draw = random.Random(seed)
    made: list[str] = []
    while len(made) < number:
        if made and draw.random() < 1 / 8:
            text = variant(draw.choice(made), words, draw)
        else:
            text = [draw.choice(words) for _ in range(max(3, round(draw.gauss(10.5, 4))))]
            text = [word.strip(".,") + draw.choice(endings) if draw.random() < 0.4 else word for word in text]
        made.append(" ".join(text))
    return made


def as_in_2023(known: list[str], tokens: list[list[str]], text: str, processes: int) -> Similarity | None:
    """One candidate, as the loop of 2023 did it; `tokens` are those of the known instructions."""
    new_tokens = SCORER._tokenizer.tokenize(text)
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        scores = pool.map(partial(rouge_scorer._score_lcs, new_tokens), tokens)
    scores = [score.fmeasure for score in scores]
    most_similar = {known[i]: scores[i] for i in np.argsort(scores)[-10:][::-1]}
    if max(scores) > 0.7:
        return None
    average = float(np.mean(scores))
    known.append(text)
    tokens.append(new_tokens)
    return Similarity(most_similar, average)


SCORER = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)


def timed(function, *args) -> tuple[float, list]:
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def measure(known: list[str], candidates: list[str], slow: int, repeats: int) -> dict:
    """Milliseconds per candidate of all sides with this pool; those of 2023 take the first `slow` candidates only."""
    tokens = [SCORER._tokenizer.tokenize(text) for text in known] if slow else []
    times: dict[str, list[float]] = {}
    compared = kept = 0
    for _ in range(repeats):
        results = {}
        for name, settings in OURS.items():
            novelty_filter = NoveltyFilter(known, **settings)
            calls = [candidates[i : i + CALL] for i in range(0, len(candidates), CALL)]
            seconds, answers = timed(
                lambda f=novelty_filter, c=calls: [result for call in c for result in f.filter(call)]
            )
            times.setdefault(name, []).append(seconds / len(candidates) * 1e3)
            results[name] = answers
        for name, processes in PROCESSES.items() if slow else ():
            pool = (list(known), list(tokens))
            seconds, answers = timed(lambda p=pool, n=processes: [as_in_2023(*p, t, n) for t in candidates[:slow]])
            times.setdefault(name, []).append(seconds / slow * 1e3)
            for ours in ("ours, 1 thread", "ours, 2 threads"):
                assert [repr_of(r) for r in results[ours][:slow]] == [repr_of(r) for r in answers], "results differ"
                compared += slow
        kept = sum(result is not None for result in results["ours, 1 thread"])
    row = {"pool": len(known), "candidates": len(candidates), "kept": kept, "results_compared_equal": compared}
    row["milliseconds"] = {name: round(statistics.median(values), 3) for name, values in times.items()}
    row["all_milliseconds"] = {name: [round(value, 3) for value in values] for name, values in times.items()}
    if slow:
        row["candidates_2023"] = slow
        fast = row["milliseconds"]["ours, 2 threads"]
        row["times_faster"] = {name: round(row["milliseconds"][name] / fast) for name in PROCESSES}
    return row


def repr_of(result: Similarity | None) -> str:
    """Every digit and the order; floats throughout, where rouge_score has the integer 0 for a text without tokens."""
    return repr(result and ([(text, float(f)) for text, f in result[0].items()], result[1]))


def whole_run(total: int, rows: list[dict]) -> dict:
    """From the seed tasks to `total` kept with ours; what 2023's would take by the measured `rows`."""
    candidates = make_instructions(int(total * 1.5), seed=2)
    novelty_filter = NoveltyFilter([task["instruction"] for task in seed_tasks()], workers=2)
    first, given = len(novelty_filter), 0
    start = time.perf_counter()
    while len(novelty_filter) - first < total:
        novelty_filter.filter(candidates[given : given + CALL])
        given += CALL
        assert given < len(candidates), "too few candidates"
    seconds = time.perf_counter() - start
    kept = len(novelty_filter) - first
    result = {"candidates": given, "kept": kept, "seconds_ours_2_threads": round(seconds, 1)}
    sizes = [row["pool"] for row in rows if "times_faster" in row]
    for name in PROCESSES:
        costs = [row["milliseconds"][name] / 1e3 for row in rows if row["pool"] in sizes]
        hours = float(np.interp(np.linspace(first, first + kept, given), sizes, costs).sum()) / 3600
        result[f"hours_{name}_integrated_not_run"] = round(hours, 2)
        result[f"times_faster_than_{name}_integrated_not_run"] = round(hours * 3600 / seconds)
    return result


def recombined(real: list[str], number: int, seed: int) -> list[str]:
    """Instructions made of the words of real ones, as long as those, one in eight a variant of an earlier one."""
    words, draw = [word for text in real for word in text.split()], random.Random(seed)
    made: list[str] = []
    while len(made) < number:
        if made and draw.random() < 1 / 8:
            text = variant(draw.choice(made), words, draw)
        else:
            text = draw.choices(words, k=max(1, len(draw.choice(real).split())))
        made.append(" ".join(text))
    return made


def full_scan(known: list[str], candidates: list[str], workers: int = 1) -> list[bool]:
    """Whether each candidate is too similar to a known one or to one kept before it: compared with all of them."""
    ids = Vocabulary()
    texts = ids.encode(known)
    codes, lengths = texts.codes(), list(texts.lengths)
    rejected: list[bool] = []
    for start in range(0, len(candidates), CALL):
        new = ids.encode(candidates[start : start + CALL]).codes()
        common, among = common_tokens(new, codes, workers), common_tokens(new, new, 1)
        before, kept = np.array(lengths, dtype=np.int64), []
        for i, code in enumerate(new):
            scores = f_measures_by_table(common[i], len(code), before)
            own = f_measures_by_table(among[i, kept], len(code), np.array([len(new[k]) for k in kept], dtype=np.int64))
            rejected.append(max(scores.max(initial=0.0), own.max(initial=0.0)) > 0.7)
            kept += [] if rejected[-1] else [i]
        codes += [new[i] for i in kept]
        lengths += [len(new[i]) for i in kept]
    return rejected


def resident(kind: str) -> int:
    """Bytes of this process by /proc: VmRSS now, VmHWM at most."""
    return int(re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def instructions_of(data: Path | None, number: int) -> list[str]:
    if data is None:
        return make_instructions(number, seed=0)
    real = [row["instruction"] for row in json.loads(data.read_text(encoding="utf-8"))]
    return (real + recombined(real, number - len(real), seed=0))[:number]


def measure_growth(data: Path | None, size: int, details: bool, candidates: int, repeats: int) -> dict:
    known = instructions_of(data, size)
    new = (
        make_instructions(candidates * repeats, seed=1) if data is None else recombined(known, candidates * repeats, 1)
    )
    for i in range(0, len(new), 10):
        new[i] = f"Please {known[i * 97 % size]}"
    Path("/proc/self/clear_refs").write_text("5")  # what VmHWM says begins anew
    before = resident("VmRSS")
    seconds, novelty_filter = timed(lambda: NoveltyFilter(iter(known), workers=os.cpu_count() or 1, details=details))
    row = {"pool": size, "details": details, "seconds_to_add": round(seconds, 1)}
    if size >= 100_000:  # a smaller one fits into what was freed before
        row["bytes_per_row"] = round((resident("VmRSS") - before) / size)
        row["bytes_per_row_peak"] = round((resident("VmHWM") - before) / size)
    times, answers = [], []
    for start in range(0, len(new), candidates):
        calls = [new[i : min(i + CALL, start + candidates)] for i in range(start, start + candidates, CALL)]
        seconds, results = timed(lambda c=calls: [result for call in c for result in novelty_filter.filter(call)])
        times.append(round(seconds / candidates * 1e3, 4))
        answers += [result is None for result in results]
    row |= {"milliseconds": statistics.median(times), "all_milliseconds": times, "load": round(os.getloadavg()[0], 1)}
    assert answers == full_scan(known, new, os.cpu_count() or 1), "decisions differ from the full scan"
    return row | {"decisions_compared_equal": len(new), "rejected": sum(answers)}


def measure_exclusion(data: Path | None, texts: int = 14_000, number: int = 20_000) -> dict:
    """The cost of testing candidates against an evaluation set; its texts are some instructions in a row."""
    parts = instructions_of(data, 5 * texts)
    known = [" ".join(parts[5 * i : 5 * i + 5]) for i in range(texts)]
    candidates = parts[:1000] + recombined(parts, number - 1000, seed=4)
    seconds, exclusion = timed(lambda: Exclusion(known))
    row = {"texts": texts, "candidates": number, "seconds_to_make": round(seconds, 2)}
    seconds, excluded = timed(exclusion.matches, candidates)
    return row | {"milliseconds": round(seconds / number * 1e3, 4), "excluded": sum(excluded)}


def growth(options: argparse.Namespace) -> None:
    rows = []
    for details in (False, True):
        for size in options.growth_sizes:
            if details and size > options.most_with_details:
                continue
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                words = options.data, size, details, options.candidates, options.repeats
                rows.append(process.submit(measure_growth, *words).result())
            print(json.dumps(rows[-1]), flush=True)
    result = {"data": options.data and options.data.name, "candidates_per_call": CALL, "pools": rows}
    result["exclusion"] = measure_exclusion(options.data)
    write_result(result, ("numpy", "rapidfuzz"), options.output)


def plot(result: Path, picture: Path) -> None:
    """Draw milliseconds per candidate by pool size, with details and without."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = json.loads(result.read_text())["pools"]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "novelty", "font.size": 9}):
        figure = Figure((6, 3.2), layout="constrained")
        axes = figure.subplots()
        for details, label, marker in ((True, "with details", "s"), (False, "--similarity_details False", "o")):
            points = sorted((row["pool"], row["milliseconds"]) for row in rows if row["details"] is details)
            axes.loglog(*zip(*points), marker=marker, label=label)
        axes.set(xlabel="known instructions", ylabel="milliseconds per candidate")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        figure.savefig(picture, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 52_000], help="pools of both sides")
    parser.add_argument("--ours_only", type=int, nargs="*", default=[200_000], help="pools of ours alone")
    parser.add_argument("--total", type=int, default=52_002, help="instructions kept in the whole run")
    parser.add_argument("--candidates", type=int, default=4 * CALL)
    parser.add_argument("--slow", type=int, default=8, help="candidates of 2023's algorithm")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--growth", action="store_true", help="how the cost grows with the pool, instead")
    parser.add_argument("--growth_sizes", type=int, nargs="+", default=[10_000, 52_002, 200_000, 500_000, 1_000_000])
    parser.add_argument("--most_with_details", type=int, default=200_000)
    parser.add_argument("--data", type=Path, help="a file of Alpaca's rows for --growth")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("RESULT", "PICTURE"))
    options = parser.parse_args()
    if options.plot:
        return plot(*options.plot)
    if options.growth:
        return growth(options)
    known = make_instructions(max(options.sizes + options.ours_only), seed=0)
    lengths = [len(SCORER._tokenizer.tokenize(text)) for text in known]
    vocabulary = {token for text in known for token in SCORER._tokenizer.tokenize(text)}
    rows = []
    for size in options.sizes + options.ours_only:
        # Variants of known instructions among the candidates, as a model makes them: some are too similar.
        near = [f"Please {text}" for text in random.Random(3).sample(known[:size], options.candidates // 10)]
        candidates = make_instructions(options.candidates - len(near), seed=1) + near
        random.Random(4).shuffle(candidates)
        rows.append(measure(known[:size], candidates, options.slow if size in options.sizes else 0, options.repeats))
        print(json.dumps({key: value for key, value in rows[-1].items() if key != "all_milliseconds"}), flush=True)
    result = {
        "tokens_per_instruction": round(statistics.mean(lengths), 1),
        "vocabulary": len(vocabulary),
        "candidates_per_call": CALL,
        "pools": rows,
        "whole_run": whole_run(options.total, rows),
    }
    write_result(result, ("numpy", "rapidfuzz", "rouge_score"), options.output)


if __name__ == "__main__":
    main()
