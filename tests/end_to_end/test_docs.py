"""The commands of README and docs/ as they stand there, in their order; only what is between < and >, and what no test
machine can serve, is replaced by something tiny. A command that is not run here has its reason in ELSEWHERE."""

import csv
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

PAGES = (  # in an order in which each finds what those before it have made
    "README data training lora packing checkpoints data_generation backtranslation inference evaluation weight_diff "
    "results differences_from_2023 benchmarks development"
).split()
FILES = [ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in PAGES[1:])]
BLOCKS = [block for file in FILES for block in re.findall(r"```bash\n(.*?)```", file.read_text(), re.DOTALL)]

# A phrase of a block: the test that runs it.
ELSEWHERE = {
    "generate_vllm.slurm": "test_servers.py",
    "--batch_dir": "test_batches.py: a batch endpoint, and a stand-in for vllm run-batch",
    "--exclude": "test_generate.py; benchmarks/generation.py with a million",
    "vllm serve Qwen": "test_client.py, with `transformers serve`; test_local_model.py",
    "backtranslate augment": "test_backtranslate.py: a model of random weights rates nothing",
    "scripts.demo": "test_demo.py, in a browser; the harness: test_evaluate.py, as its data are on the hub",
    "scores --batch_size auto": "test_evaluate.py, test_tour.py",
    "verify --chain": "test_chain.py: other commands here change the data that the model was trained on",
    "--check_integrity_naively": "test_float_diff.py: nothing else has Alpaca-7B's sum",
    "make reference": "test_reference_run.py",
    "benchmarks.roofline": "test_benchmark_tables.py",
    "benchmarks.train": "benchmarks are run by hand, and say with which commit",
    "make test-fast": "this is it",
}
# A phrase of a block: what is replaced in it; <server> and <port> by the server and a port of the test.
RUN = {
    "LlamaDecoderLayer": {
        "<your_random_port>": "<port>",
        "<your_output_dir>": "output/alpaca-7b",
        "<your_path_to_hf_converted_llama_ckpt_and_tokenizer>": "base",
    },
    "rows.csv": {"<model>": "base", "--interactive": "--interactive --max_new_tokens 5 </dev/null"},
    "--rows 0 17": {"<model>": "base"},
    "--losses": {"<output_dir of a run>": "output/alpaca-7b"},
    "evaluate before_after": {"<base>": "base"},
    "--output_dir output/lora": {"<model>": "base"},
    "scripts.check_packing": {"<model>": "base"},
    "make_tiny_model": {"--nproc_per_node=2": "--nproc_per_node=2 --master_port=<port>"},
    "--resume_from_checkpoint": {"<model>": "base"},
    "--reproduce_2023": {"<model>": "base"},
    "OPENAI_API_KEY": {"<your key>": "secret"},
    "plot_diversity": {},
    "scripts.export": {},
    "generate --model output/alpaca-7b --interactive": {"--interactive": "--interactive --max_new_tokens 5 </dev/null"},
    "evaluate alpaca_eval": {"<model>": "judge"},
    "evaluate backward": {"output/backward": "output/tiny_tuned"},
    "weight_diff.py make_diff": {
        "<base>": "base",
        "<your_model>": "output/alpaca-7b",
        "<diff>": "output/diff-<port>",
        "<recovered>": "output/recovered-<port>",
    },
}


def phrase(block: str) -> str:
    (found,) = [words for words in (*ELSEWHERE, *RUN) if words in block]
    return found


def test_every_command_has_its_test():
    assert {phrase(block) for block in BLOCKS} == {*ELSEWHERE, *RUN}


def test_every_page_is_listed_and_begins_with_a_command():
    assert {file.stem for file in (ROOT / "docs").glob("*.md")} == set(PAGES[1:])
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150 and all(f"(docs/{page}.md)" in readme for page in PAGES[1:])
    for file in FILES[1:]:
        before, command, _ = file.read_text().partition("```bash\n")
        assert command and len(before.splitlines()) <= 6, file


def test_links_lead_somewhere():
    for file in FILES:
        for link in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", file.read_text()):
            target = "".join(link)
            assert target.startswith("https://") or (file.parent / target).exists(), f"{file.name}: {target}"


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
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ("instruction", "input", "output"))
        writer.writeheader()
        writer.writerows(rows[:20])
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
def test_the_commands_of_readme_and_docs(newcomer):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    beside = os.pathsep.join([str(Path(sys.prefix) / "evaluation"), os.environ.get("PYTHONPATH", "")])
    with CompletionServer(answer, models=("gpt-3.5-turbo-instruct", "judge")) as server:
        env = {"PATH": path, "PYTHONPATH": beside, "OPENAI_BASE_URL": server.url}
        for block in dict.fromkeys(BLOCKS):  # a block that stands on two pages is run once
            if (words := phrase(block)) in RUN:
                for old, new in (RUN[words] | {"<server>": server.url, "<port>": str(free_port())}).items():
                    block = block.replace(old, new)
                assert not re.search("<[a-z_ ]+>", block), block
                print(f"$ {block}", flush=True)
                run(["bash", "-ec", block], cwd=newcomer, env=env, timeout=600)
                if words == "OPENAI_API_KEY":
                    assert len(json.loads((newcomer / "alpaca_data.json").read_text())) >= 100
    for name in ("output/alpaca-7b", "output/my_model", "output/merged", "output/resumed", "output/as_in_2023"):
        assert (newcomer / name / "model.safetensors").exists()
    assert len(list((newcomer / "output").glob("recovered-*/model.safetensors"))) == 2
    for name in ("diversity.svg", "answers.json", "ours.win_rate.json", "written.scores.json"):
        assert (newcomer / name).exists()
