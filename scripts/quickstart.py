"""The Alpaca recipe on this machine, in miniature: make a tiny base model, fine-tune it with the README's command,
save, reload, answer, publish, recover; with --tour also generate its data before, and talk and evaluate after that.

    make quickstart      (or, in an environment of your own: python -m scripts.quickstart)
    make tour            (or, with scripts/requirements.txt installed: python -m scripts.quickstart --tour)

The command is the one for LLaMA-7B on four GPUs, sharding included. What is different is printed: paths, number of
processes, epochs, batch and learning rate. Everything is written to ./quickstart or ./tour, which is made anew.

No model that fits here could invent tasks or judge answers. In the tour a stand-in server does: it knows some of the
seed tasks, proposes them as new ones, and as a judge prefers what is closer to its own answer.
"""

import difflib
import itertools
import json
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from alpaca.common.errors import starting

    starting("scripts.quickstart")

import utils
from alpaca.common import commands
from alpaca.common.distributed import loading_line
from alpaca.common.errors import reported
from alpaca.data.prompts import format_prompt, instruction_and_input
from alpaca.data.rows import load_rows
from alpaca.evaluation.bleu_rouge import INSTALL
from scripts.make_tiny_model import ROOT, make_tiny_model

SEED_TASKS = ROOT / "seed_tasks.jsonl"
SEEDS, TASKS = 100, 40  # of the tour: its seed tasks, of which the stand-in knows the others; tasks to generate
README_COMMAND = """--nproc_per_node 4
    --model_name_or_path <your_path_to_hf_converted_llama_ckpt_and_tokenizer> --data_path ./alpaca_data.json --bf16 True
    --output_dir <your_output_dir> --num_train_epochs 3 --per_device_train_batch_size 4 --per_device_eval_batch_size 4
    --gradient_accumulation_steps 8 --evaluation_strategy no --save_strategy steps --save_steps 2000
    --save_total_limit 1 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine
    --logging_steps 1 --fsdp "full_shard auto_wrap" --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer --tf32 True
"""
README_FLAGS = dict(zip(shlex.split(README_COMMAND)[::2], shlex.split(README_COMMAND)[1::2]))
TASK = """\
task: known
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""
GROUP = """\
group: tour
task: [{task: known, num_fewshot: 0}]
metadata: {version: 1.0, table: {known: {column: Known by heart, metric: acc}}}
"""
NEXT_STEPS = """
Next, talk to what you have trained, at the terminal or in the browser (it knows little more than the seed tasks):

    source .venv/bin/activate
    python -m scripts.generate --model {tuned} --interactive
    python -m scripts.demo --model {tuned} --compare {base}

And then a real model, on one GPU or more:

    MODEL=<folder or hub id of LLaMA-7B> DATA=tatsu-lab/alpaca OUTPUT=output/alpaca-7b NPROC=4 recipes/llama_7b.sh
"""


def fresh_folder(folder: Path) -> Path:
    """Empty `folder`, but only if this script made it."""
    if folder.exists() and not any(folder.glob(".made-by-*")):
        raise SystemExit(f"quickstart: {folder} exists and was not made by quickstart; pass another --folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / ".made-by-quickstart").touch()
    return folder


# ---- commands ----


def differences(folder: Path, processes: int, epochs: int) -> dict[str, str]:
    """Return what a tiny model on a small machine needs otherwise than LLaMA-7B on four A100."""
    return {
        "--nproc_per_node": str(processes),
        "--model_name_or_path": str(folder / "base"),
        "--data_path": str(SEED_TASKS),
        "--output_dir": str(folder / "tuned"),
        "--num_train_epochs": str(epochs),
        "--per_device_train_batch_size": str(max(4 // processes, 1)),
        "--gradient_accumulation_steps": "1",
        "--learning_rate": "1e-3",
        "--logging_steps": "20",
    }


def shown(word: str | Path) -> str:
    """Return a word or path as short as it can be typed in this folder."""
    path = Path(word)
    return shlex.quote(str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else word))


def run(command: list[str | Path], answers: str | None = None, **env: str) -> None:
    """Show `command` and run it, with `answers` as what is typed there. Raise SystemExit if it fails."""
    print(f"\n$ {' '.join(map(shown, command))}\n", flush=True)
    if status := subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, input=answers, text=True).returncode:
        raise SystemExit(f"the last command failed with exit status {status}; its output is above")


def torchrun_command(flags: dict[str, str]) -> list[str]:
    words = [f"{name}={value}" for name, value in flags.items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", words[0], f"--master_port={free_port()}"]
    return [*launcher, str(ROOT / "train.py"), *words[1:]]


def command(module: str, *words: str, answers: str | None = None, **flags: Any) -> None:
    """Show and run `python -m module words --flags`."""
    named = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    run([sys.executable, "-m", module, *words, *named], answers)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


# ---- both stories ----


def fine_tune(changed: dict[str, str]) -> None:
    """Run the README's command with the flags `changed`. Raise SystemExit unless the loss halves."""
    import torch

    print("The README's command for LLaMA-7B, with these differences:")
    for name, value in changed.items():
        print(f"    {name:32}{README_FLAGS[name]} -> {value}")
    processes = int(changed["--nproc_per_node"])
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}  # as torchrun has it, without its banner
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if 0 < torch.cuda.device_count() < processes else {}
    if hidden:
        print(f"(on the CPU: {processes} processes need as many GPUs; --nproc_per_node 1 takes one)", flush=True)
    run(torchrun_command({**README_FLAGS, **changed}), **hidden, **threads)
    tuned = Path(changed["--output_dir"])
    history = utils.jload(tuned / "trainer_state.json")["log_history"]
    first, *_, last = [entry["loss"] for entry in history if "loss" in entry]
    if not last < first / 2:
        raise SystemExit(f"the loss went from {first:.3f} to {last:.3f}; it should have halved")
    print(f"\nThe loss fell from {first:.2f} to {last:.2f}; the curve is {tuned / 'loss.png'}")


def short_rows(rows: Sequence[Mapping[str, str]], number: int) -> list[Mapping[str, str]]:
    """Return those with the shortest answers of several words, among rows whose question fits into a line."""
    asked = [row for row in rows if not row["input"] and "\n" not in row["instruction"] + row["output"]]
    return sorted((row for row in asked if " " in row["output"]), key=lambda row: len(row["output"]))[:number]


def ask(model_dir: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Reload the model as anybody would and answer greedily, with the prompt it was trained on."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, learned = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False), 0
    with loading_line(shown(model_dir)):
        model = AutoModelForCausalLM.from_pretrained(model_dir, trust_remote_code=False)
    for row in rows:
        inputs = tokenizer(format_prompt(row), return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=100, do_sample=False)
        text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"Instruction: {row['instruction']}\nAnswer:      {text}\n")
        learned += text == row["output"]
    print(f"{learned} of {len(rows)} answers are word for word those of the training data.")
    if learned == 0:
        raise SystemExit("quickstart: the model repeats none of its training data; something is wrong")


def publish_and_recover(folder: Path) -> None:
    """Run the README's three commands. Raise SystemExit unless the recovered model is the trained one, bit for bit."""
    raw, tuned, diff, recovered = (folder / name for name in ("base", "tuned", "diff", "recovered"))
    program = [sys.executable, ROOT / "weight_diff.py"]
    run([*program, "make_diff", "--path_raw", raw, "--path_tuned", tuned, "--path_diff", diff])
    run([*program, "recover", "--path_raw", raw, "--path_diff", diff, "--path_tuned", recovered])
    run([*program, "verify", "--path_diff", diff, "--path_tuned", tuned])


# ---- the tour ----


class StandIn(BaseHTTPRequestHandler):
    """An OpenAI-compatible server in place of a large model; it answers the two kinds of prompt that the tour sends."""

    tasks: Sequence[Mapping[str, str]] = ()  # that it knows

    def propose(self, prompt: str) -> str:
        """Return five tasks, as a completion model goes on with the list of prompt.txt; equal for equal prompts."""
        items = [
            f" {task['instruction']}\n{number}. Input:\n{task['input'] or '<noinput>'}\n"
            f"{number}. Output:\n{task['output']}\n"
            for number, task in enumerate(random.Random(prompt).sample(self.tasks, 5), 4)
        ]
        return items[0] + "".join(f"###\n{number}. Instruction:{item}" for number, item in enumerate(items[1:], 5))

    def judge(self, prompt: str) -> str:
        """Prefer the answer that has more in common with its own."""
        texts = dict(re.findall(r"<(\w+)>\n(.*?)\n</\1>", prompt, re.DOTALL))
        own = next(task["output"] for task in self.tasks if instruction_and_input(task) == texts["instruction"])
        one, two = (difflib.SequenceMatcher(None, own, texts[f"answer_{n}"]).ratio() for n in (1, 2))
        verdict = "tie" if one == two else "1" if one > two else "2"
        return f"The first agrees with mine by {one:.2f}, the second by {two:.2f}.\nVerdict: {verdict}"

    def do_GET(self) -> None:
        self.send({"object": "list", "data": [{"id": "stand-in", "object": "model"}]})

    def do_POST(self) -> None:
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        text = self.judge(prompt) if "<answer_1>" in prompt else self.propose(prompt)
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())}
        self.send({"choices": [{"index": 0, "finish_reason": "stop", "text": text}], "usage": usage})

    def send(self, answer: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: Any) -> None:
        pass


def start_stand_in() -> str:
    """Start the stand-in on this machine, until this process ends. Return its base URL."""
    StandIn.tasks = load_rows(str(SEED_TASKS))[SEEDS:]
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/v1"


def generate(folder: Path, url: str, data: Path) -> None:
    """Write rows to `data`, by self-instruct from the first seed tasks."""
    seeds, generated = folder / "seed_tasks.jsonl", folder / "generated"
    seeds.write_text("".join(SEED_TASKS.read_text(encoding="utf-8").splitlines(True)[:SEEDS]), encoding="utf-8")
    options = dict(num_instructions_to_generate=TASKS, model_name="stand-in", api="completions", base_url=url, seed=0)
    words = ("generate_instruction", "generate_instruction_following_data")
    command(*words, output_dir=generated, seed_tasks_path=seeds, **options)
    command("generate_instruction", "export", regen_path=generated / "regen.json", output_path=data)


def multiple_choice(folder: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Make a task for the harness: which of four answers belongs to a prompt of the training."""
    folder.mkdir()
    draw, questions = random.Random(0), []
    for number, row in enumerate(rows):
        choices = draw.sample([other["output"] for other in rows if other["output"] != row["output"]], 3)
        choices.insert(number % 4, row["output"])
        questions.append({"prompt": format_prompt(row), "choices": choices, "answer": number % 4})
    utils.jdump(questions, folder / "questions.json")
    (folder / "known.yaml").write_text(TASK.replace("QUESTIONS", json.dumps(str(folder / "questions.json"))))
    (folder / "tour.yaml").write_text(GROUP)


def evaluate(folder: Path, rows: Sequence[Mapping[str, str]], url: str) -> None:
    """Compare the recovered model with its base, by the harness and by a judge. Raise SystemExit if it is no better."""
    tasks, questions, program = folder / "tasks", folder / "questions.json", "scripts.evaluate"
    multiple_choice(tasks, rows)
    utils.jdump(short_rows(rows, 8), questions)
    answers = {name: folder / f"{name}.json" for name in ("base", "recovered")}
    for name, path in answers.items():
        model, scores = folder / name, folder / "scores" / name
        command(program, "harness", model=model, output_dir=scores, group="tour", include_path=tasks)
        options = dict(temperature=0, max_new_tokens=100)
        command(program, "alpaca_eval", model=model, data_path=questions, output_path=path, **options)
    pair = dict(data_path=answers["recovered"], reference_path=answers["base"])
    command(program, "win_rate", **pair, judge="stand-in", api="completions", base_url=url)
    known_base, known = (utils.jload(folder / "scores" / name / "results.json")["average"] for name in answers)
    wins = utils.jload(folder / "recovered.win_rate.json")["win_rate"]
    print(
        f"\nThe right answer out of four: {known:.0f}%, its base {known_base:.0f}%. "
        f"Preferred to its base by the stand-in: {wins:.0f}%. Everything is in {shown(folder)}"
    )
    if not (known > known_base and wins > 50):
        raise SystemExit("tour: the trained model is not better than its base; something is wrong")


def quickstart(
    folder: Path | None = None, nproc_per_node: int = 2, num_train_epochs: int | None = None, tour: bool = False
) -> None:
    """Run it.

    Args:
        folder: where everything is written; it is made anew. Omit it for ./quickstart, or ./tour.
        nproc_per_node: processes of the training.
        num_train_epochs: of the training, by default 10, or 20 of the tour's; with fewer it learns nothing by heart.
        tour: generate the data first, and talk and evaluate after that.
    """
    if tour and find_spec("lm_eval") is None:
        raise SystemExit(f"tour: lm-eval is not installed, which its last part needs: {INSTALL}")
    folder = fresh_folder((folder or ROOT / ("tour" if tour else "quickstart")).resolve())
    tuned, recovered, data = folder / "tuned", folder / "recovered", SEED_TASKS
    steps = itertools.count(1)

    def say(text: str) -> None:
        print(f"\n{next(steps)}. {text}", flush=True)

    say("A base model of 2 layers with random weights, its tokenizer trained on this repository's text")
    make_tiny_model(folder / "base", hidden_size=256, num_hidden_layers=2)
    if tour:
        url = start_stand_in()
        say(f"Generating {TASKS} tasks from {SEEDS} seeds, by the stand-in server")
        data = folder / "alpaca_data.json"
        generate(folder, url, data)
    rows = load_rows(str(data))
    say(f"Fine-tuning it on the {len(rows)} tasks, parameters sharded over the processes")
    changed = differences(folder, nproc_per_node, num_train_epochs or (20 if tour else 10))
    fine_tune(changed | {"--data_path": str(data)})
    say("Reloading the saved model with AutoModelForCausalLM and asking it what it was trained on\n")
    ask(tuned, short_rows(rows, 5))
    say("Publishing it as its difference from the base model, and recovering it from there")
    publish_and_recover(folder)
    if tour:
        say("Talking to the recovered model")
        asked = "".join(f"{row['instruction']}\n\n" for row in short_rows(rows, 3))
        command("scripts.generate", "--interactive", model=recovered, max_new_tokens=100, answers=asked)
        print("\nIts training data say:", *(row["output"] for row in short_rows(rows, 3)), sep="\n", flush=True)
        say("Evaluating it beside its base")
        evaluate(folder, rows, url)
    else:
        print(NEXT_STEPS.format(tuned=shown(tuned), base=shown(folder / "base")))


def main(argv: Sequence[str] | None = None) -> None:
    commands.call("scripts.quickstart", quickstart, argv, __doc__)


if __name__ == "__main__":
    with reported("scripts.quickstart"):
        main()
