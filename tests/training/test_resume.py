"""A run that was killed, however and whenever, ends where an undisturbed one does; a changed one is refused."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, fork, history, largest_difference, launcher, run, train, write_rows

from alpaca.training.checkpoint import find_problems
from alpaca.weights.provenance import MANIFEST, RECORD

SMALL = dict(
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=1e-3,
    num_train_epochs=3,
    logging_steps=1,
    save_strategy="steps",
    save_steps=4,
    save_total_limit=1,
)
FSDP = "full_shard auto_wrap"


def flags_for(model, tmp_path, rows=22, **changed):
    data = tmp_path / "rows.json"
    if not data.exists():
        write_rows(data, rows)
    return {**SMALL, "model_name_or_path": model, "data_path": data, **changed}


def checkpoints(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def same_run(a, b):
    assert largest_difference(a, b) == 0
    assert [entry["loss"] for entry in history(a)] == [entry["loss"] for entry in history(b)]


LONG = [pytest.mark.slow, pytest.mark.stress]


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """A run that nobody killed, and its flags."""
    folder = tmp_path_factory.mktemp("undisturbed")
    flags = flags_for(tiny("opt"), folder, max_steps=16, lr_scheduler_type="constant")
    train(dict(output_dir=folder / "whole", **flags))
    return folder / "whole", flags


@pytest.mark.slow
@pytest.mark.parametrize(
    "where, left",
    [
        ("optimizer", 4),
        pytest.param("manifest", 4, marks=LONG),
        pytest.param("rename", 8, marks=LONG),
        ("final", 16),
    ],
)
def test_killed_while_saving(undisturbed, tmp_path, where, left):
    """16 steps, the last of them with a checkpoint, in the middle of an epoch; with dropout (OPT). Whatever the moment,
    one complete checkpoint is there, and going on from it ends with the weights and losses of an undisturbed run."""
    whole, flags = undisturbed
    words = [f"--{name}={value}" for name, value in dict(output_dir=tmp_path / "out", **flags).items()]
    killed = fork("tests/support/killed.py", words, check=False, env={"KILL": f"{where}:0"})
    assert killed.returncode == -signal.SIGKILL
    assert [name for name in checkpoints(tmp_path / "out") if not find_problems(tmp_path / "out" / name)][-1] == (
        f"checkpoint-{left}"
    )
    assert not json.loads((tmp_path / "out" / RECORD).read_text())["finished"]
    train(dict(output_dir=tmp_path / "out", resume_from_checkpoint=True, **flags))
    same_run(tmp_path / "out", whole)
    assert checkpoints(tmp_path / "out") == ["checkpoint-16"] and not list((tmp_path / "out").glob("saving-*"))


@pytest.mark.stress
def test_two_sharded_ranks_one_killed_while_saving(tiny, tmp_path):
    flags = flags_for(tiny("opt"), tmp_path, fsdp=FSDP, gradient_accumulation_steps=1)
    train(dict(output_dir=tmp_path / "whole", **flags), 2)
    words = [f"--{name}={value}" for name, value in dict(output_dir=tmp_path / "out", **flags).items()]
    killed = run(
        [*launcher(2), "tests/support/killed.py", *words], check=False, env={"KILL": "optimizer:1", "PYTHONPATH": "."}
    )
    assert killed.returncode != 0 and "Signal 9" in killed.stderr
    assert checkpoints(tmp_path / "out") == ["checkpoint-4"]
    assert list((tmp_path / "out").glob("saving-checkpoint-8/*"))
    train(dict(output_dir=tmp_path / "out", resume_from_checkpoint=True, **flags), 2)
    same_run(tmp_path / "out", tmp_path / "whole")


@pytest.mark.stress
@pytest.mark.parametrize("processes, trials", [(0, 30), (2, 10)])
def test_killed_at_random_moments(tiny, tmp_path, processes, trials):
    """The whole launch is killed at a random moment of its training, half of the time as soon as a save begins."""
    flags = flags_for(tiny("opt"), tmp_path, rows=60, save_steps=2)
    if processes:
        flags |= dict(fsdp=FSDP, gradient_accumulation_steps=1)
    start = time.time()
    train(dict(output_dir=tmp_path / "whole", **flags), processes)
    took, chance = time.time() - start, random.Random(0)
    print(f"undisturbed: {took:.1f} s")
    for trial in range(trials):
        out = tmp_path / f"out-{trial}"
        command = [
            *launcher(processes),
            "train.py",
            f"--output_dir={out}",
            "--resume_from_checkpoint=True",
            *(f"--{name}={value}" for name, value in flags.items()),
        ]
        for kill in range(2):
            moment = kill_once(command, out, took, chance, at_a_save=chance.random() < 0.5)
            print(f"trial {trial}.{kill}: killed {moment}; {checkpoints(out)}", flush=True)
        run(command, env={"OMP_NUM_THREADS": "1"})
        same_run(out, tmp_path / "whole")
        shutil.rmtree(out)


def kill_once(command, out, took, chance, at_a_save) -> str:
    """Start `command` and kill it; says when."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # as for the undisturbed run: threads decide the order of sums
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        env=env,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    start, seen = time.time(), {path.name for path in out.glob("*")}
    wait = chance.uniform(0.4, 1.0) * took
    while process.poll() is None and time.time() - start < wait:
        time.sleep(0.001)
        if at_a_save and (new := {path.name for path in out.glob("saving-*")} - seen):
            time.sleep(chance.uniform(0, 0.05))
            wait, moment = 0, f"in {new}"
            break
    else:
        moment = f"after {time.time() - start:.1f} s"
    process.kill()  # of torchrun only: its ranks have to go with it
    process.wait()
    return moment


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(0, 2), *(pytest.param(2, after, marks=LONG) for after in (0, "ddp"))])
def test_another_number_of_processes_at_the_same_global_batch(tiny, tmp_path, before, after):
    """0 and "ddp" keep the optimizer whole, 2 ranks of FSDP keep it in shards: each continues from the other."""

    def launch(processes, **more):
        sharing = dict(fsdp=FSDP) if processes == 2 else {}
        ranks = 2 if processes == "ddp" else processes
        flags = flags_for(tiny("llama"), tmp_path, gradient_accumulation_steps=1 if ranks else 2)
        return train({**flags, **sharing, **more}, ranks)

    launch(before, output_dir=tmp_path / "whole", save_total_limit=9)
    shutil.copytree(tmp_path / "whole" / "checkpoint-8", tmp_path / "out" / "checkpoint-8")
    output = launch(after, output_dir=tmp_path / "out", resume_from_checkpoint=True).stdout
    if after != "ddp":
        assert "not bit for bit" in output and "the number of processes: " in output
    assert largest_difference(tmp_path / "out", tmp_path / "whole") < 2e-5


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory):
    """A run of 9 steps stopped after 5, with checkpoint-4: its folder and flags."""
    folder = tmp_path_factory.mktemp("stopped")
    flags = flags_for(tiny("llama"), folder, rows=12, seed=7, max_steps=5)
    train(dict(output_dir=folder / "out", **flags))
    (folder / "out" / RECORD).unlink()
    for path in (folder / "out").glob("*.json"):
        path.unlink()  # the final model: as if killed after checkpoint-4
    return folder / "out", flags


def resume(stopped, tmp_path, **changed):
    """Resume a copy in this process; returns the refusal."""
    import train as train_module
    from alpaca.common.errors import UsageError

    out, flags = stopped
    shutil.copytree(out, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    flags = {**flags, "output_dir": tmp_path / "out", "resume_from_checkpoint": True, **changed}
    with pytest.raises(UsageError) as refused:
        train_module.train([f"--{name}={value}" for name, value in flags.items()])
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}, "something was written"
    return str(refused.value)


CHANGED = {
    "seed": (dict(seed=8), "--seed: 7 then, 8 now"),
    "data seed": (dict(data_seed=8), "--data_seed: None then, 8 now"),
    "batch": (dict(per_device_train_batch_size=4), "per device x accumulation x processes): 4 then, 8 now"),
    "accumulation": (dict(gradient_accumulation_steps=1), "x accumulation x processes): 4 then, 2 now"),
    "length": (dict(model_max_length=64), "--model_max_length: 512 then, 64 now"),
    "boundary": (dict(prompt_boundary="split"), "--prompt_boundary: stanford then, split now"),
    "loss": (dict(loss_normalization="microbatch"), "--loss_normalization: token then, microbatch now"),
    "learning rate": (dict(learning_rate=2e-3), "--learning_rate: 0.001 then, 0.002 now"),
    "schedule": (dict(lr_scheduler_type="cosine"), "--lr_scheduler_type: linear then, cosine now"),
    "warmup": (dict(warmup_ratio=0.5), "--warmup_steps: 0 then, 0.5 now"),
    "base model": (dict(model_name_or_path="other"), "the base model (--model_name_or_path): "),
    "fewer steps": (dict(max_steps=3), "is of step 4, beyond the 3 of this run"),
    "optimizer": (dict(optim="adafactor"), "--optim: adamw_torch_fused then, adafactor now"),
    "weight decay": (dict(weight_decay=0.1), "--weight_decay: 0.0 then, 0.1 now"),
    "order": (dict(train_sampling_strategy="sequential"), "--train_sampling_strategy: random then, sequential now"),
    "last step": (dict(dataloader_drop_last=True), "--dataloader_drop_last: False then, True now"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGED)
def test_what_changed_since_the_checkpoint_is_named(stopped, tmp_path, name):
    changed, message = CHANGED[name]
    if name == "base model":  # of the same shape and with the same tokenizer
        model = shutil.copytree(stopped[1]["model_name_or_path"], tmp_path / "other") / "model.safetensors"
        model.write_bytes(model.read_bytes()[:-1] + b"@")  # 1.0 ends with 0x3f
        changed = dict(model_name_or_path=tmp_path / "other")
    refusal = resume(stopped, tmp_path, **changed)
    assert message in refusal
    assert name == "fewer steps" or ("changed since" in refusal and refusal.count(" then, ") == 1)


@pytest.mark.slow
def test_a_base_model_that_has_moved_is_the_same(stopped, tmp_path):
    from alpaca.weights.provenance import fingerprint_of_weights

    base = stopped[1]["model_name_or_path"]
    assert fingerprint_of_weights(shutil.copytree(base, tmp_path / "moved")) == fingerprint_of_weights(base)
    assert fingerprint_of_weights("huggyllama/llama-7b") == "huggyllama/llama-7b"


@pytest.mark.slow
def test_changed_rows_template_or_tokenizer_are_named(stopped, tiny, tmp_path):
    rows = json.loads((stopped[0].parent / "rows.json").read_text())
    rows[3]["output"] += "!"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert "the data (--data_path): 12 rows " in resume(stopped, tmp_path, data_path=tmp_path / "rows.json")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "rows.json").write_text(json.dumps(rows[:-1]))
    refusal = resume(stopped, tmp_path, data_path=tmp_path / "rows.json")
    assert "12 rows " in refusal and ", 11 rows " in refusal
    shutil.rmtree(tmp_path / "out")

    template = {"prompt_input": "{instruction}\n{input}\n", "prompt_no_input": "{instruction}\n"}
    (tmp_path / "t.json").write_text(json.dumps(template))
    refusal = resume(stopped, tmp_path, prompt_template=tmp_path / "t.json")
    assert "--prompt_template: " in refusal and "the data" not in refusal
    shutil.rmtree(tmp_path / "out")

    from scripts.make_tiny_model import make_tiny_model

    make_tiny_model(tmp_path / "other", "llama", vocab_size=700)
    assert "the tokenizer (of --model_name_or_path): " in resume(
        stopped, tmp_path, model_name_or_path=tmp_path / "other"
    )


def blank(path):
    path.write_bytes(b"\0" * path.stat().st_size)


def tear(folder, name, keep):
    path = folder / name
    path.write_bytes(path.read_bytes()[:keep])


DEEP = "[" * 100_000


def edit(file, **changed):
    """Change entries of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


def edit_state(folder, **changed):
    """Change entries of a checkpoint's state, and its size in the manifest."""
    edit(folder / "trainer_state.json", **changed)
    files = json.loads((folder / MANIFEST).read_text())["files"]
    edit(folder / MANIFEST, files={**files, "trainer_state.json": (folder / "trainer_state.json").stat().st_size})


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "optimizer.pt").unlink(), "no optimizer.pt"),
        (lambda folder: tear(folder, "model.safetensors", 1000), "model.safetensors has 1,000 of "),
        (lambda folder: tear(folder, "trainer_state.json", 10), "trainer_state.json has 10 of "),
        (lambda folder: (folder / "rng_state.pth").unlink(), "no rng_state.pth"),
        (lambda folder: (folder / MANIFEST).unlink(), f"no readable {MANIFEST}"),
        (lambda folder: (folder / MANIFEST).write_text("{}"), f"no readable {MANIFEST}"),
        (lambda folder: blank(folder / "trainer_state.json"), "trainer_state.json cannot be read"),
        (lambda folder: tear(folder, MANIFEST, 50), f"no readable {MANIFEST}"),
        (lambda folder: (folder / MANIFEST).write_text(DEEP), f"no readable {MANIFEST}"),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), f"no readable {MANIFEST}"),
        (lambda folder: edit(folder / MANIFEST, files=[]), f"no readable {MANIFEST}"),
        (lambda folder: edit(folder / MANIFEST, step="4"), f"no readable {MANIFEST}"),
        (lambda folder: edit(folder / MANIFEST, contract=[]), f"no readable {MANIFEST}"),
        (lambda folder: edit(folder / MANIFEST, contract={}), f"{MANIFEST} does not say which run it is of"),
        (lambda folder: edit(folder / MANIFEST, contract={"fixed": 1}), f"{MANIFEST} does not say which run it is of"),
        (lambda folder: edit(folder / MANIFEST, files={"model.safetensors": "x"}), "model.safetensors has "),
        (lambda folder: edit_state(folder, global_step="4"), "trainer_state.json cannot be read"),
        (lambda folder: edit_state(folder, log_history=[1]), "trainer_state.json cannot be read"),
        (lambda folder: edit_state(folder, log_history="x"), "trainer_state.json cannot be read"),
        (lambda folder: edit_state(folder, no_such_field=1), "trainer_state.json cannot be read"),
        (lambda folder: edit_state(folder, stateful_callbacks=[1]), "trainer_state.json cannot be read"),
        (lambda folder: edit_state(folder, epoch="x"), "trainer_state.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_by_name_and_refused_if_named(stopped, tmp_path, capsys, damage, message):
    from argparse import Namespace

    from alpaca.common.errors import UsageError
    from alpaca.training.checkpoint import find_checkpoint

    for step in (2, 10):
        shutil.copytree(stopped[0] / "checkpoint-4", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-notes").mkdir()  # somebody else's
    damage(tmp_path / "checkpoint-10")
    args = Namespace(output_dir=str(tmp_path), process_index=0, overwrite_output_dir=False)
    args.resume_from_checkpoint = "True"
    assert find_checkpoint(args) == str(tmp_path / "checkpoint-2")
    assert f"note: checkpoint-10 is incomplete ({message}" in capsys.readouterr().out
    args.resume_from_checkpoint = str(tmp_path / "checkpoint-10")
    with pytest.raises(UsageError, match="is not a complete checkpoint") as refused:
        find_checkpoint(args)
    assert message in str(refused.value)
    args.resume_from_checkpoint, args.overwrite_output_dir = None, True
    with pytest.raises(UsageError, match="holds checkpoint-10, which a later"):
        find_checkpoint(args)
    args.overwrite_output_dir = False
    with pytest.raises(UsageError, match="already holds a run; .*, or move its checkpoints away and pass"):
        find_checkpoint(args)


@pytest.mark.slow
def test_what_is_in_the_output_folder_is_not_overwritten(stopped, tmp_path):
    from argparse import Namespace

    from alpaca.common.errors import UsageError
    from alpaca.training.checkpoint import delete_old_checkpoints, find_checkpoint
    from alpaca.weights.provenance import read_record, write_record

    checkpoint = stopped[0] / "checkpoint-4"
    out = tmp_path / "out"
    args = Namespace(output_dir=str(out), process_index=0, overwrite_output_dir=False)
    args.resume_from_checkpoint = "True"
    shutil.copytree(checkpoint, out / "checkpoint-50")
    (out / "checkpoint-50" / MANIFEST).unlink()  # of the stock Trainer, say
    with pytest.raises(UsageError, match="no complete checkpoint in .*checkpoint-50 is incomplete .*move them away"):
        find_checkpoint(args)
    for step in (2, 3):
        shutil.copytree(checkpoint, out / f"checkpoint-{step}")
    delete_old_checkpoints(out, limit=1, keep={"checkpoint-3"})
    assert checkpoints(out) == ["checkpoint-3", "checkpoint-50"], "what is not ours neither counts nor goes"

    model = tmp_path / "model"
    shutil.copytree(stopped[1]["model_name_or_path"], model)
    args.output_dir = str(model)
    for asked, message in (
        (None, "already holds a run"),
        ("True", "holds a model but no checkpoint"),
        (str(checkpoint), "already holds a run"),
    ):
        args.resume_from_checkpoint = asked
        with pytest.raises(UsageError, match=message):
            find_checkpoint(args)
    write_record(model, {}, finished=True)
    assert read_record(model)["finished"]
    (model / "model.safetensors").unlink()
    assert not read_record(model)["finished"], "its model is gone"


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_is_not_finished(tiny, tmp_path):
    """SIGTERM with transformers' --enable_jit_checkpoint, as Slurm sends it before it takes the nodes back."""
    flags = flags_for(tiny("llama"), tmp_path, max_steps=3000, save_strategy="no", output_dir=tmp_path / "out")
    words = [f"--{name}={value}" for name, value in {**flags, "enable_jit_checkpoint": True}.items()]
    process = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 20/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.communicate(timeout=60)[0]
    assert "of 3000; --resume_from_checkpoint True continues" in rest and "saved to" not in rest
    (stopped_at,) = checkpoints(tmp_path / "out")
    assert not find_problems(tmp_path / "out" / stopped_at) and not (tmp_path / "out" / "config.json").exists()


@pytest.mark.slow
def test_a_checkpoint_without_optimizer_cannot_be_continued(tiny, tmp_path):
    flags = flags_for(tiny("llama"), tmp_path, max_steps=4, save_only_model=True)
    train(dict(output_dir=tmp_path / "out", **flags))
    assert find_problems(tmp_path / "out" / "checkpoint-4") == ["no optimizer: it was saved with --save_only_model"]


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_again(tiny, tmp_path):
    flags = flags_for(tiny("llama"), tmp_path, max_steps=2, output_dir=tmp_path / "out", resume_from_checkpoint=True)
    output = train(flags).stdout
    assert "no checkpoint in" in output and "from the beginning" in output and "step 2/2" in output


@pytest.mark.slow
def test_a_finished_run_started_again_says_so(tiny, tmp_path, capsys):
    """On two ranks; then in this process, and what else may be started in its folder."""
    import train as train_module
    from alpaca.common.errors import UsageError

    flags = flags_for(tiny("llama"), tmp_path, max_steps=4, output_dir=tmp_path / "out", gradient_accumulation_steps=1)
    train(flags, 2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    again = train(flags, 2).stdout
    assert again.count("this run is finished") == 1 and "step 1/" not in again

    def start(**changed):
        words = {**flags, "gradient_accumulation_steps": 2, "use_cpu": True, **changed}
        train_module.train([f"--{name}={value}" for name, value in words.items()])
        return capsys.readouterr().out

    assert "this run is finished" in start() and "this run is finished" in start(resume_from_checkpoint=True)
    for changed, named in (
        (dict(seed=3), "--seed: 42 then, 3 now"),
        (dict(max_steps=6), "--max_steps): 4 then, 6 now"),
        (dict(model_name_or_path=tiny("opt")), "the base model (--model_name_or_path): "),
        (dict(save_dtype="bfloat16"), "--save_dtype: float32 then"),
        (dict(resume_from_checkpoint=True, max_steps=2), "--max_steps): 4 then, 2 now"),
        (dict(resume_from_checkpoint=True, max_steps=6, label_smoothing_factor=0.1), "smoothing"),
    ):
        with pytest.raises(UsageError, match="already holds a finished run, and this one is another") as refused:
            start(**changed)
        assert named in str(refused.value)
    with pytest.raises(UsageError, match="holds checkpoint-4, which a later"):
        start(overwrite_output_dir=True)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}, "nothing was written"

    flags |= dict(gradient_accumulation_steps=2)
    longer = train({**flags, "max_steps": 6, "resume_from_checkpoint": True, "save_steps": 3}).stdout
    assert "--max_steps): 4 then, 6 now" in longer and "step 6/6" in longer and "step 4/6" not in longer
    assert checkpoints(tmp_path / "out") == ["checkpoint-6"], "--save_steps is the new one"
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    train({**flags, "save_strategy": "no", "overwrite_output_dir": True, "max_steps": 1})
    assert len(history(tmp_path / "out")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("schedule, processes, fsdp", [pytest.param("linear", 0, "", marks=LONG), ("cosine", 2, FSDP)])
def test_a_run_made_longer_follows_the_longer_schedule_at_once(tiny, tmp_path, schedule, processes, fsdp):
    flags = flags_for(tiny("llama"), tmp_path, lr_scheduler_type=schedule, warmup_steps=2, fsdp=fsdp)
    for name, steps in (("long", 8), ("short", 4)):
        train(dict(output_dir=tmp_path / name, **flags, max_steps=steps), processes)
    train(dict(output_dir=tmp_path / "short", **flags, max_steps=8, resume_from_checkpoint=True), processes)
    rates = [[entry["learning_rate"] for entry in history(tmp_path / name)] for name in ("long", "short")]
    assert rates[0][4:] == rates[1][4:] and rates[0][:4] != rates[1][:4]


@pytest.mark.parametrize("content", [DEEP, "[]", "{}", '{"finished": "x", "contract": {}}', '{"finished": true}', "\0"])
def test_a_record_that_is_none_is_taken_for_a_missing_one(tmp_path, content):
    from alpaca.weights.provenance import read_record

    (tmp_path / RECORD).write_text(content)
    assert read_record(tmp_path) is None
