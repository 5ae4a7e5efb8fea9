"""Several nodes, as several launchers on one host: torchrun's own rendezvous, real sharding, real checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, fork, free_port, largest_difference, run, train, write_rows
from support.slurm import stand_ins

pytestmark = pytest.mark.slow


def nodes(commands, env=None):
    """Run one launcher per command at the same time; [(exit code, stdout, stderr)]."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    started = [
        subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for command in commands
    ]
    return [(process, *process.communicate(timeout=300)) for process in started]


def launcher_of_a_node(port):
    """A node of one process that meets the other through torchrun's elastic rendezvous."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=alpaca", "--local_addr=127.0.0.1"]
    return [*torchrun, *meeting, "train.py"]


@pytest.mark.stress
def test_two_launchers_train_as_one_process_does(tiny, tmp_path):
    flags = dict(
        model_name_or_path=tiny("llama"),
        data_path=write_rows(tmp_path / "rows.json", 22),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        save_steps=3,
        logging_steps=1,
    )
    train({**flags, "gradient_accumulation_steps": 2, "output_dir": tmp_path / "one"})
    shared = {**flags, "output_dir": tmp_path / "two", "fsdp": "full_shard auto_wrap"}
    command = [*launcher_of_a_node(free_port()), *(f"--{name}={value}" for name, value in shared.items())]
    results = nodes([command, command])
    assert [process.returncode for process, _, _ in results] == [0, 0], results[0][2][-3000:] + results[1][2][-3000:]
    assert sum("step 6/6" in stdout for _, stdout, _ in results) == 1, "rank 0 alone speaks"
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 2e-5
    assert len(list((tmp_path / "two" / "checkpoint-6" / "optimizer_0").glob("*.distcp"))) == 2


@pytest.mark.stress
def test_nodes_with_other_rows_are_refused(tiny, tmp_path):
    flags = dict(model_name_or_path=tiny("llama"), output_dir=tmp_path / "out", max_steps=1)
    rows = [write_rows(tmp_path / f"rows-{node}.json", 8 + node) for node in range(2)]
    command = [*launcher_of_a_node(free_port()), *(f"--{name}={value}" for name, value in flags.items())]
    results = nodes([[*command, f"--data_path={path}"] for path in rows])
    assert all(process.returncode for process, _, _ in results)
    said = results[0][2] + results[1][2]
    assert "not all processes have the same: the data (--data_path): " in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "other_seen, other_rows, message",
    [
        ({"checkpoint": None, "finished": None}, 8, "must be one folder that all nodes share"),
        (
            {"checkpoint": "out/checkpoint-4", "finished": None},
            9,
            "the data (--data_path): 9 rows on rank 1, 8 rows on this",
        ),
    ],
)
def test_what_the_ranks_disagree_about_is_named(monkeypatch, other_seen, other_rows, message):
    from argparse import Namespace

    from alpaca.common.errors import UsageError
    from alpaca.training import resume

    def of(rows):
        return {"fixed": {"the data (--data_path)": f"{rows} rows"}, "free": {}, "tokens": ""}

    seen = {"checkpoint": "out/checkpoint-4", "finished": None}
    monkeypatch.setattr(resume, "all_gather_object", lambda mine: [mine, (other_seen, of(other_rows))])
    with pytest.raises(UsageError) as refused:
        resume._check_that_all_agree(Namespace(output_dir="out"), of(8), seen)
    assert message in str(refused.value)


@pytest.mark.stress
def test_the_slurm_script_shards_inside_a_node_and_replicates_over_nodes(tiny, tmp_path):
    """recipes/llama_7b_2x8.slurm, which starts llama_7b_2x8.sh on every node: two nodes of two processes, 128 rows a
    step. Slurm's two commands are stood in for; everything they start is real."""
    bin_folder = stand_ins(tmp_path / "bin")
    data, model = write_rows(tmp_path / "rows.json", 140), tiny("llama")
    path = f"{bin_folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm = dict(
        SLURM_NNODES="2",
        SLURM_GPUS_ON_NODE="2",
        SLURM_JOB_ID=str(free_port()),
        SLURM_JOB_NODELIST="n[0-1]",
        SLURM_SUBMIT_DIR=str(ROOT),
    )
    env = dict(PATH=path, MODEL=model, DATA=data, OUTPUT=str(tmp_path / "two"), **slurm)
    both = ["--max_steps=2", "--save_steps=1", "--bf16=False", "--learning_rate=1e-3"]
    output = run(["bash", "recipes/llama_7b_2x8.slurm", *both], env=env).stdout
    assert "128 a step" in output and "hybrid_shard" in output and "no checkpoint in " in output
    manifest = json.loads((tmp_path / "two" / "checkpoint-2" / "alpaca_checkpoint.json").read_text())
    assert manifest["contract"]["rounding"]["the number of processes"] == 4
    published = ["--warmup_ratio=0.03", "--lr_scheduler_type=cosine", "--weight_decay=0", "--num_train_epochs=3"]
    one = [f"--model_name_or_path={model}", f"--data_path={data}", f"--output_dir={tmp_path / 'one'}"]
    fork("train.py", [*one, *both, *published, "--per_device_train_batch_size=128"])
    assert largest_difference(tmp_path / "one", tmp_path / "two") < 2e-5
    assert "this run is finished" in run(["bash", "recipes/llama_7b_2x8.slurm", *both], env=env).stdout, "when requeued"


def test_hybrid_sharding_needs_processes_to_shard_over(tmp_path, monkeypatch):
    from alpaca.common.errors import UsageError
    from alpaca.models.fsdp import hybrid_mesh

    for name, value in dict(WORLD_SIZE="16", LOCAL_WORLD_SIZE="8", RANK="0").items():
        monkeypatch.setenv(name, value)
    mesh = hybrid_mesh()
    assert (mesh.dp_replicate_size, mesh.dp_shard_size) == (2, 8)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert hybrid_mesh() is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(UsageError, match="a node has one process here; use full_shard"):
        hybrid_mesh()
