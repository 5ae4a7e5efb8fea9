r"""How long generate_instruction itself takes for as many tasks as Alpaca has, with a server that answers at once.

    python -m benchmarks.generation --tasks 52000 --output benchmarks/results/generation_cpu.json

Server and generation are processes of their own; the server invents tasks of about Alpaca's length from random words.
What is measured is the whole command, HTTP, parsing, novelty filter, journal and regen.json included. Peak memory is
told at a quarter of the tasks and at all of them: what grows is the tasks that are kept.
"""

import argparse
import hashlib
import json
import multiprocessing
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import ROOT, write_result
from tests.support.completion_server import CompletionServer

VERBS = "Name List Find Describe Compare Explain Choose Rank Sort Invent Suggest Summarize Rewrite Classify".split()
RUN = """
import sys, resource
from generate_instruction import generate_instruction_following_data as generate
generate(*sys.argv[1:3], int(sys.argv[3]), "random", base_url=sys.argv[4], api="completions", concurrency=16,
         num_cpus=2, seed=0, stable_ties=sys.argv[5] == "stable")
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
print("PEAK", peak, "CPU", sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
"""


def answer(prompt: str, body: dict) -> str:
    """Sixteen tasks of random words, which follow from the prompt."""
    draw = random.Random(hashlib.sha256(prompt.encode()).hexdigest())
    parts = []
    for n in range(4, 20):
        words = " ".join(f"word{int(5000 * draw.random() ** 2)}" for _ in range(draw.randrange(5, 16)))
        parts.append(
            f"{n}. Instruction: {draw.choice(VERBS)} {words}.\n{n}. Input:\n<noinput>\n{n}. Output:\n{words}\n"
        )
    return "###\n".join(parts).removeprefix("4. Instruction:")


def serve(pipe) -> None:
    with CompletionServer(answer=answer, models=("random",)) as server:
        server.requests = type("Forgetful", (list,), {"append": lambda self, request: None})()
        pipe.send(server.url)
        pipe.recv()


def measure(tasks: int, url: str, ties: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        command = [sys.executable, "-c", RUN, folder, str(ROOT / "seed_tasks.jsonl"), str(tasks), url, ties]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        seconds = time.perf_counter() - begin
        words = done.stdout.rsplit("PEAK", 1)[1].split()
        report = json.loads((Path(folder) / "generation_report.json").read_text())
    result = {
        "tasks": report["rows"],
        "proposed": report["proposed"],
        "requests": report["requests"],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(float(words[2]), 1),
        "peak_MB": round(int(words[0]) / 1000),
        "ties": ties,
    }
    print(result, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=52000)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
    process.start()
    url = here.recv()
    runs = [measure(args.tasks // 4, url, "2023"), measure(args.tasks, url, "2023"), measure(args.tasks, url, "stable")]
    here.send("end")
    process.join(10)
    write_result({"runs": runs}, ("openai", "rapidfuzz"), args.output)


if __name__ == "__main__":
    main()
