r"""How long generate_instruction itself takes for as many tasks as Alpaca has, with a server that answers at once.

    python -m benchmarks.generation --tasks 52000 --output benchmarks/results/generation_cpu.json
    python -m benchmarks.generation --candidates 1000000 --output benchmarks/results/generation_million_cpu.json
    python -m benchmarks.generation --answers 1000000 --output benchmarks/results/rerun_million_cpu.json

The second goes through five servers without similarity details, and is then run again in its folder; one candidate in
sixteen is nearly one of a thousand. The third makes a journal of so many answers of 2 kB and reads it as a rerun of
generate_responses does, until what is left would be asked, and then until the data file is written.

Server and generation are processes of their own; the server invents tasks of about Alpaca's length from random words.
What is measured is the whole command, HTTP, parsing, novelty filter, journal and regen.json included. Peak memory is
told at a quarter of the tasks and at all of them: what grows is the tasks that are kept.
"""

import argparse
import hashlib
import json
import multiprocessing
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from alpaca.completions.api import Request, Sampling
from alpaca.completions.rows import BatchCompletion, write_answered
from benchmarks.machine import ROOT, write_result
from tests.support.completion_server import CompletionServer

VERBS = "Name List Find Describe Compare Explain Choose Rank Sort Invent Suggest Summarize Rewrite Classify".split()
KEPT = 0.94  # of the candidates with repetitions
RUN = """
import sys, resource
from generate_instruction import generate_instruction_following_data as generate
generate(*sys.argv[1:3], int(sys.argv[3]), "random", base_url=sys.argv[4], api="completions", concurrency=16,
         num_cpus=2, seed=0, stable_ties=sys.argv[5] == "stable", similarity_details=sys.argv[5] != "none")
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


def answer_with_repetitions(prompt: str, body: dict) -> str:
    """The same, of which one in sixteen is nearly a task that many answers have."""
    draw = random.Random(hashlib.sha256(prompt.encode()).hexdigest() + "repeated")
    fixed = random.Random(draw.randrange(1000))
    words = [f"word{fixed.randrange(5000)}" for _ in range(12)]
    words[draw.randrange(12)] = f"word{draw.randrange(5000)}"
    head, _, rest = answer(prompt, body).partition("###\n5. Instruction: ")
    return f"{head}###\n5. Instruction: Name {' '.join(words)}.\n{rest.partition(chr(10))[2]}"


def serve(pipe, answer=answer) -> None:
    with CompletionServer(answer=answer, models=("random",)) as server:
        server.requests = type("Forgetful", (list,), {"append": lambda self, request: None})()
        pipe.send(server.url)
        pipe.recv()


def measure(tasks: int, url: str, ties: str, reruns: int = 0) -> dict[str, float]:
    """Run the command, and `reruns` times again in the same folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", RUN, folder, str(ROOT / "seed_tasks.jsonl"), str(tasks), url, ties]
        seconds, words = run(command)
        report = json.loads((Path(folder) / "generation_report.json").read_text())
        result = {
            "tasks": report["rows"],
            "proposed": report["proposed"],
            "too_similar": report.get("rejected: too similar", 0),
            "requests": report["requests"],
            "seconds": round(seconds, 1),
            "milliseconds_per_candidate": round(seconds / report["proposed"] * 1e3, 3),
            "cpu_seconds": round(float(words[2]), 1),
            "peak_MB": round(int(words[0]) / 1000),
            "bytes_per_task": round(int(words[0]) * 1000 / report["rows"]),
            "ties": ties,
        }
        if "servers" in report:
            result["answers_by_server"] = [server["answers"] for server in report["servers"]]
        for _ in range(reruns):
            seconds, words = run(command)
            result |= {"rerun_seconds": round(seconds, 1), "rerun_peak_MB": round(int(words[0]) / 1000)}
            result["journal_MB"] = round((Path(folder) / "generation_journal.jsonl").stat().st_size / 1e6)
    print(result, flush=True)
    return result


def run(command: list[str]) -> tuple[float, list[str]]:
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return time.perf_counter() - begin, done.stdout.rsplit("PEAK", 1)[1].split()


def serving(number: int, answer) -> tuple[list[str], list]:
    """Start servers in processes of their own. Return their addresses, and what ends them."""
    context, urls, ends = multiprocessing.get_context("spawn"), [], []
    for _ in range(number):
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, answer), daemon=True)
        process.start()
        urls.append(here.recv())
        ends.append((here, process))
    return urls, ends


class Silent:
    """A model that nothing is left to be asked of; it notes when it would be asked."""

    api = "chat"

    async def __aenter__(self) -> "Silent":
        return self

    async def __aexit__(self, *exception: object) -> None:
        pass

    async def check(self) -> str:
        self.asked_at = time.perf_counter()
        return "nothing"


def rerun_of_rows(answers: int) -> dict[str, float]:
    """Read a journal of so many answers of 2 kB, and write its data file."""
    text = 'Sentences of an answer, with a "quote" and\na line. ' * 38
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.json"
        with open(f"{path}.journal.jsonl", "w") as file:
            file.write(json.dumps({"kind": "run", "how": {}}) + "\n")
            for index in range(answers):
                entry = {"index": index, "kind": "answer", "text": f"{index} {text}", "finish_reason": "stop"}
                entry |= {"prompt_tokens": 100, "completion_tokens": 400, "seconds": 1.0, "unanswered": 0.0}
                file.write(json.dumps(entry) + "\n")
        size = Path(f"{path}.journal.jsonl").stat().st_size
        requests, model = [Request("", key) for key in range(answers)], Silent()
        before, begin = peak_MB(), time.perf_counter()
        found = BatchCompletion(model, Sampling(), str(path), {}, 1).answers(requests)
        end_of_reading = peak_MB()
        write_answered(str(path), [{"instruction": "", "input": ""}] * answers, found)
        return {
            "answers": answers,
            "journal_MB": round(size / 1e6),
            "seconds_until_asking": round(model.asked_at - begin, 1),
            "seconds_until_written": round(time.perf_counter() - begin, 1),
            "MB_of_memory_for_reading": end_of_reading - before,
            "MB_of_memory_in_all": peak_MB() - before,
        }


def peak_MB() -> int:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=52000)
    parser.add_argument("--candidates", type=int, help="tasks that five servers propose, in place of --tasks")
    parser.add_argument("--answers", type=int, help="answers in a journal, in place of --tasks")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.answers:
        write_result(rerun_of_rows(args.answers), (), args.output)
        return
    if args.candidates:
        urls, ends = serving(5, answer_with_repetitions)
        wanted = [args.candidates // 16, args.candidates // 4, args.candidates]
        runs = [measure(round(number * KEPT), ",".join(urls), "none", reruns=1) for number in wanted]
    else:
        [url], ends = serving(1, answer)
        wanted = ((args.tasks // 4, "2023"), (args.tasks, "2023"), (args.tasks, "stable"))
        runs = [measure(tasks, url, ties) for tasks, ties in wanted]
    for pipe, process in ends:
        pipe.send("end")
        process.join(10)
    write_result({"runs": runs}, ("openai", "rapidfuzz"), args.output)


if __name__ == "__main__":
    main()
