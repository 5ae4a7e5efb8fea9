"""The README's commands as they stand there, in its order; only what is between < and >, and what no test machine can
serve, is replaced by something tiny. A command that is not run here has its reason in ELSEWHERE."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run, write_rows
from support.completion_server import CompletionServer

from benchmarks.generation import answer as new_tasks
from scripts.make_tiny_model import make_tiny_model
from scripts.quickstart import free_port

BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)

# A phrase of a block: the test that runs it.
ELSEWHERE = {
    "vllm serve": "test_client.py, with `transformers serve`; test_local_model.py",
    "backtranslate augment": "test_backtranslate.py: a model of random weights rates nothing",
    "scripts.demo": "test_demo.py, in a browser",
    "evaluate harness": "test_evaluate.py, test_tour.py: its data are on the hub",
    "--check_integrity_naively": "test_float_diff.py: nothing else has Alpaca-7B's sum",
}
# A phrase of a block: what is replaced in it; <server> and <port> by the server and a port of the test.
RUN = {
    "LlamaDecoderLayer": {
        "<your_random_port>": "<port>",
        "<your_output_dir>": "output/llama_tuned",
        "<your_path_to_hf_converted_llama_ckpt_and_tokenizer>": "base",
    },
    "recipes/llama_7b.sh": {
        "<folder or hub id>": "base",
        "tatsu-lab/alpaca": "alpaca_data.json",
        "NPROC=8": "NPROC=2",
        "recipes/": "PORT=<port> recipes/",
    },
    "inspect_data": {"<model>": "base"},
    "scripts.check_packing": {"<model>": "base"},
    "make_tiny_model": {"--nproc_per_node=2": "--nproc_per_node=2 --master_port=<port>"},
    "OPENAI_API_KEY": {"<your key>": "secret"},
    "plot_diversity": {},
    "generate --model output/alpaca-7b --interactive": {},
    "evaluate alpaca_eval": {"<model>": "judge"},
    "evaluate backward": {"output/backward": "output/tiny_tuned"},
    "weight_diff.py verify": {
        "<base>": "base",
        "<your_model>": "output/alpaca-7b",
        "<diff>": "output/diff",
        "<recovered>": "output/recovered",
    },
}


def phrase(block: str) -> str:
    (found,) = [words for words in (*ELSEWHERE, *RUN) if words in block]
    return found


def test_every_command_has_its_test():
    assert sorted(map(phrase, BLOCKS)) == sorted([*ELSEWHERE, *RUN])


def answer(prompt: str, body: dict) -> str:
    return "The first is better.\nVerdict: 1" if "<answer_1>" in prompt else new_tasks(prompt, body)


@pytest.fixture
def newcomer(tmp_path):
    """A folder like a clone, in which the README's own files are at hand."""
    for path in (
        "alpaca",
        "configs",
        "recipes",
        "scripts",
        "constraints.txt",
        "prompt.txt",
        "seed_tasks.jsonl",
        "train.py",
        "generate_instruction.py",
        "weight_diff.py",
        "utils.py",
    ):
        (tmp_path / path).symlink_to(ROOT / path)
    make_tiny_model(tmp_path / "base", hidden_size=32)
    rows = json.loads(Path(write_rows(tmp_path / "alpaca_data.json", 40)).read_text())
    for name in ("rows.json", "alpaca_eval.json", "held_out.json"):
        (tmp_path / name).write_text(json.dumps(rows[:20]))
    (tmp_path / "theirs.json").write_text(
        json.dumps(  # an input is written below its instruction there
            [
                {"instruction": "\n\n".join(filter(None, (row["instruction"], row["input"]))), "output": "No."}
                for row in rows[:20]
            ]
        )
    )
    return tmp_path


@pytest.mark.stress
def test_the_commands_of_the_readme(newcomer):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    beside = os.pathsep.join([str(Path(sys.prefix) / "evaluation"), os.environ.get("PYTHONPATH", "")])
    with CompletionServer(answer, models=("gpt-3.5-turbo-instruct", "judge")) as server:
        env = {"PATH": path, "PYTHONPATH": beside, "OPENAI_BASE_URL": server.url}
        for block in BLOCKS:
            if (words := phrase(block)) in RUN:
                for old, new in (RUN[words] | {"<server>": server.url, "<port>": str(free_port())}).items():
                    block = block.replace(old, new)
                assert "<" not in block, block
                print(f"$ {block}", flush=True)
                run(["bash", "-ec", block], cwd=newcomer, env=env, timeout=600)
                if words == "OPENAI_API_KEY":
                    assert len(json.loads((newcomer / "alpaca_data.json").read_text())) >= 100
    for name in ("output/alpaca-7b", "output/recovered"):
        assert (newcomer / name / "model.safetensors").exists()
    for name in ("diversity.svg", "answers.json", "ours.win_rate.json", "written.scores.json"):
        assert (newcomer / name).exists()
