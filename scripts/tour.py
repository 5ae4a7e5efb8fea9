"""The whole story in miniature, with the README's commands: generate data, train, publish, recover, talk, evaluate.

    make tour      (or, with scripts/requirements.txt installed: python -m scripts.tour)

Two things are not what they are elsewhere. The model is tiny and learns its data by heart. And no model that fits here
could invent tasks or judge answers, so a stand-in server does: it knows some of the seed tasks, proposes them as new
ones, and as a judge prefers what is closer to its own answer. Everything is written to ./tour, which is made anew.
"""

import difflib
import json
import random
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import utils
from alpaca.common import commands
from alpaca.common.errors import reported
from alpaca.data.prompts import format_prompt, instruction_and_input
from alpaca.data.rows import load_rows
from alpaca.evaluation.bleu_rouge import INSTALL
from scripts.make_tiny_model import ROOT, make_tiny_model
from scripts.quickstart import differences, fine_tune, fresh_folder, publish_and_recover, run, shown

SEEDS = 100  # of the seed tasks; the stand-in knows the others
TASKS, EPOCHS = 40, 20

TASK = """\
task: known
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
GROUP = """\
group: tour
task: [{task: known, num_fewshot: 0}]
metadata:
  version: 1.0
  table:
    known: {column: Known by heart, metric: acc}
"""

# ---- a server in place of a large model ----


class StandIn:
    """Answers the two kinds of prompt that this tour sends, by what it knows of `tasks`."""

    def __init__(self, tasks: Sequence[Mapping[str, str]]):
        self.tasks = tasks
        self.answer_to = {instruction_and_input(task): task["output"] for task in tasks}

    def answer(self, prompt: str) -> str:
        return self.judge(prompt) if "<answer_1>" in prompt else self.propose(prompt)

    def propose(self, prompt: str) -> str:
        """Five tasks, as a completion model goes on with the list of prompt.txt; equal prompts, equal tasks."""
        items = [
            f" {task['instruction']}\n{number}. Input:\n{task['input'] or '<noinput>'}\n"
            f"{number}. Output:\n{task['output']}\n"
            for number, task in enumerate(random.Random(prompt).sample(self.tasks, 5), 4)
        ]
        return items[0] + "".join(f"###\n{number}. Instruction:{item}" for number, item in enumerate(items[1:], 5))

    def judge(self, prompt: str) -> str:
        """The answer that has more in common with its own."""
        own = self.answer_to[_between(prompt, "instruction")]
        one, two = (difflib.SequenceMatcher(None, own, _between(prompt, f"answer_{n}")).ratio() for n in (1, 2))
        verdict = "tie" if one == two else "1" if one > two else "2"
        return f"The first agrees with mine by {one:.2f}, the second by {two:.2f}.\nVerdict: {verdict}"


def _between(prompt: str, tag: str) -> str:
    return re.search(rf"<{tag}>\n(.*?)\n</{tag}>", prompt, re.DOTALL)[1]


@contextmanager
def serving(stand_in: StandIn) -> Iterator[str]:
    """The base URL of an OpenAI-compatible server on this machine, until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.say({"object": "list", "data": [{"id": "stand-in", "object": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            chat = self.path.endswith("/chat/completions")
            prompt = body["messages"][-1]["content"] if chat else body["prompt"]
            text = stand_in.answer(prompt)
            told = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())}
            self.say({"choices": [{"index": 0, "finish_reason": "stop", **told}], "usage": usage})

        def say(self, answer: dict[str, Any]) -> None:
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


# ---- the stations ----


def command(module: str, *words: str, answers: str | None = None, **flags: Any) -> None:
    """Show and run `python -m module words --flags`; `answers` is what is typed there."""
    named = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    run([sys.executable, "-m", module, *words, *named], answers)


def generate(folder: Path, url: str) -> list[dict[str, str]]:
    """Self-instruct from `folder`/seed_tasks.jsonl. Returns the rows of `folder`/alpaca_data.json."""
    generated, data = folder / "generated", folder / "alpaca_data.json"
    command(
        "generate_instruction",
        "generate_instruction_following_data",
        output_dir=generated,
        base_url=url,
        seed_tasks_path=folder / "seed_tasks.jsonl",
        num_instructions_to_generate=TASKS,
        model_name="stand-in",
        api="completions",
        seed=0,
    )
    command("generate_instruction", "export", regen_path=generated / "regen.json", output_path=data)
    return load_rows(str(data))


def short_rows(rows: Sequence[Mapping[str, str]], number: int) -> list[Mapping[str, str]]:
    """Those with the shortest answers, among rows whose question fits into a line."""
    asked = [row for row in rows if not row["input"] and "\n" not in row["instruction"] + row["output"]]
    return sorted(asked, key=lambda row: len(row["output"]))[:number]


def talk(model: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Ask what was trained on; what is expected stands below."""
    asked = "".join(f"{row['instruction']}\n\n" for row in rows)
    command("scripts.generate", "--interactive", model=model, max_new_tokens=100, answers=asked)
    print("\nIts training data say:\n" + "\n".join(row["output"] for row in rows), flush=True)


def multiple_choice(folder: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """A task for the harness: which of four answers belongs to an instruction, as the model is asked in training."""
    folder.mkdir()
    draw, questions = random.Random(0), []
    for number, row in enumerate(rows):
        others = draw.sample([other["output"] for other in rows if other["output"] != row["output"]], 3)
        place = number % 4
        choices = [*others[:place], row["output"], *others[place:]]
        questions.append({"prompt": format_prompt(row), "choices": choices, "answer": place})
    utils.jdump(questions, folder / "questions.json")
    (folder / "known.yaml").write_text(TASK.format(questions=json.dumps(str(folder / "questions.json"))))
    (folder / "tour.yaml").write_text(GROUP)


def evaluate(folder: Path, rows: Sequence[Mapping[str, str]], url: str) -> None:
    """The base model and the recovered one: a table of the harness, answers, and a judge between them."""
    multiple_choice(folder / "tasks", rows)
    utils.jdump(short_rows(rows, 8), folder / "questions.json")
    for name in ("base", "recovered"):
        model = folder / name
        command(
            "scripts.evaluate",
            "harness",
            model=model,
            output_dir=folder / "scores" / name,
            group="tour",
            include_path=folder / "tasks",
        )
        command(
            "scripts.evaluate",
            "alpaca_eval",
            model=model,
            data_path=folder / "questions.json",
            output_path=folder / f"{name}.json",
            temperature=0,
            max_new_tokens=100,
        )
    command(
        "scripts.evaluate",
        "win_rate",
        outputs=folder / "recovered.json",
        reference=folder / "base.json",
        judge="stand-in",
        base_url=url,
    )


def check(folder: Path) -> None:
    """Say how much better the recovered model is. Raises SystemExit unless it is."""
    known = [utils.jload(folder / "scores" / name / "results.json")["average"] for name in ("recovered", "base")]
    wins = utils.jload(folder / "recovered.win_rate.json")["win_rate"]
    print(
        f"\nThe right answer out of four: {known[0]:.0f}%, its base {known[1]:.0f}%. "
        f"Preferred to its base by the stand-in: {wins:.0f}%. Everything is in {shown(folder)}"
    )
    if not (known[0] > known[1] and wins > 50):
        raise SystemExit("tour: the trained model is not better than its base; something is wrong")


def tour(folder: Path = ROOT / "tour", nproc_per_node: int = 2) -> None:
    """Run it.

    Args:
        folder: where everything is written; it is made anew.
        nproc_per_node: processes of the training.
    """
    if find_spec("lm_eval") is None:
        raise SystemExit(f"tour: lm-eval is not installed, which its last part needs: {INSTALL}")
    folder = fresh_folder(folder.resolve(), "tour")
    lines = (ROOT / "seed_tasks.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "seed_tasks.jsonl").write_text("".join(lines[:SEEDS]), encoding="utf-8")
    make_tiny_model(folder / "base", hidden_size=256, num_hidden_layers=2)
    with serving(StandIn(load_rows(str(ROOT / "seed_tasks.jsonl"))[SEEDS:])) as url:
        print(f"1. Generating: {TASKS} tasks from {SEEDS} seeds, by the stand-in server", flush=True)
        rows = generate(folder, url)
        print("\n2. Training a base model of random weights on them, parameters sharded over the processes", flush=True)
        changed = differences(folder, nproc_per_node, EPOCHS) | {"--data_path": str(folder / "alpaca_data.json")}
        fine_tune(changed)
        print("\n3. Publishing it as its difference from the base model, and recovering it from there", flush=True)
        publish_and_recover(folder)
        print("\n4. Talking to the recovered model", flush=True)
        talk(folder / "recovered", short_rows(rows, 3))
        print("\n5. Evaluating it beside its base", flush=True)
        evaluate(folder, rows, url)
    check(folder)


def main(argv: Sequence[str] | None = None) -> None:
    commands.call("scripts.tour", tour, argv, __doc__)


if __name__ == "__main__":
    with reported("scripts.tour"):
        main()
