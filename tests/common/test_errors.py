"""What a user gets wrong ends in one clear message and a non-zero exit, and nothing is overwritten."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
from conftest import fork, run, train, write_rows

import train as train_module
from alpaca.common import commands
from alpaca.common.errors import InputError, ParameterError, UsageError, names_flags
from alpaca.training.metrics import names_trackers


def mistake(tmp_path, tiny, **changed):
    flags = dict(
        model_name_or_path=tiny("llama"),
        data_path=tmp_path / "rows.json",
        output_dir=tmp_path / "out",
        use_cpu=True,
        save_strategy="no",
        max_steps=1,
    )
    if not (tmp_path / "rows.json").exists():
        write_rows(tmp_path / "rows.json", 4)
    flags.update(changed)
    words = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    with pytest.raises(UsageError) as caught:
        train_module.train(words)
    return str(caught.value)


BAD_FLAGS = {
    "misspelt flag": (dict(lerning_rate="1"), "--lerning_rate; did you mean --learning_rate"),
    "not a number": (dict(learning_rate="fast"), "--learning_rate/--learning-rate: invalid float value: 'fast'"),
    "not a choice": (dict(save_dtype="int8"), "invalid choice: 'int8'"),
    "unknown boundary": (dict(prompt_boundary="middle"), "invalid choice: 'middle'"),
    "unknown scheduler": (dict(lr_scheduler_type="cosinus"), "cosinus"),
    "unknown optimizer": (dict(optim="adamw_2023"), "adamw_2023"),
    "fsdp word": (dict(fsdp="fully_shard"), "unknown word 'fully_shard'"),
    "warmup ratio": (dict(warmup_ratio="1.5"), "0 <= ratio < 1"),
    "no data": (dict(data_path=None), "--data_path is missing"),
    "missing data file": (dict(data_path="./alpaca_data.json"), "tatsu-lab/alpaca"),
    "no such rows": (dict(data_path="./rows.jsonl"), "--data_path ./rows.jsonl: no such file"),
    "no such rows to evaluate on": (
        dict(eval_data_path="/nowhere.json", eval_strategy="steps"),
        "--eval_data_path /nowhere.json: no such file",
    ),
    "missing model": (dict(model_name_or_path="/nowhere/llama"), "--model_name_or_path /nowhere/llama"),
    "length zero": (dict(model_max_length="0"), "--model_max_length 0"),
    "too short to learn": (dict(model_max_length="8"), "no row has an answer left to learn"),
    "longer than the model": (dict(model_max_length="4000", data_path="long"), "2048 positions"),
    "pad token": (dict(pad_token="nope"), "--pad_token nope: is not a token of "),
    "template file": (dict(prompt_template="/nowhere.json"), "--prompt_template /nowhere.json"),
    "resume from a wrong folder": (
        dict(resume_from_checkpoint="/tmp"),
        "is not a complete checkpoint (no readable alpaca_checkpoint.json",
    ),
    "legacy loss": (dict(average_tokens_across_devices="False"), "--loss_normalization microbatch"),
    "tokens of a pack": (dict(max_tokens_per_pack="4k"), "--max_tokens_per_pack 4k: expected auto or a positive"),
    "no tokens in a pack": (dict(max_tokens_per_pack="0"), "--max_tokens_per_pack 0: expected auto or a positive"),
    "packs of padded rows": (
        dict(max_tokens_per_pack="512", batching="padded"),
        "--max_tokens_per_pack 512: padded batches are not packed; drop --batching padded",
    ),
    "unknown batching": (dict(batching="sorted"), "invalid choice: 'sorted'"),
    "batch of no rows": (
        dict(per_device_train_batch_size="0"),
        "--per_device_train_batch_size 0: expected at least 1",
    ),
    "evaluation batch of no rows": (
        dict(per_device_eval_batch_size="0"),
        "--per_device_eval_batch_size 0: expected at least 1",
    ),
    "epochs that are no number": (dict(num_train_epochs="nan"), "--num_train_epochs nan: expected a number"),
    "fewer than no epochs": (
        dict(num_train_epochs="-1", max_steps=None),
        "--num_train_epochs -1.0: expected more than 0",
    ),
    "endless epochs": (dict(num_train_epochs="inf", max_steps=None), "--num_train_epochs inf: expected more than 0"),
    "rate that is no number": (dict(learning_rate="nan"), "--learning_rate nan: expected a number"),
    "negative rate": (dict(learning_rate="-1"), "--learning_rate -1.0: expected 0 or more"),
    "decay that is no number": (dict(weight_decay="nan"), "--weight_decay nan: expected a number"),
    "unknown tracker": (dict(report_to="foo"), "--report_to foo: expected none, all or some of "),
    "tracker that is not installed": (dict(report_to="neptune"), "--report_to neptune: is not installed"),
    "schedule without its end": (
        dict(lr_scheduler_type="cosine_with_min_lr"),
        "--lr_scheduler_type cosine_with_min_lr: One of min_lr or min_lr_rate should be set",
    ),
    "schedule with another's arguments": (
        dict(lr_scheduler_type="cosine", lr_scheduler_kwargs='{"x": 1}'),
        "--lr_scheduler_type cosine, --lr_scheduler_kwargs {'x': 1}: ",
    ),
    "unknown attention": (dict(attn_implementation="foo"), "--attn_implementation foo: Specified "),
    "attention that is not installed": (
        dict(attn_implementation="flash_attention_2"),
        "--attn_implementation flash_attention_2: ",
    ),
    "model path that is no folder": (dict(model_name_or_path="./nomodel"), "--model_name_or_path ./nomodel: no such f"),
    "accumulation zero": (dict(gradient_accumulation_steps="0"), "--gradient_accumulation_steps 0"),
    "workers that persist": (dict(dataloader_persistent_workers="True"), "needs --dataloader_num_workers"),
    "batch that changes": (dict(auto_find_batch_size="True"), "changes the rows of a step in the middle of a run"),
    "anew or on": (dict(overwrite_output_dir="True", resume_from_checkpoint="True"), "one starts anew, the other cont"),
    "metric nobody computes": (dict(metric_for_best_model="accuracy"), "only eval_loss is computed"),
    "too few rows for a step": (dict(dataloader_drop_last="True"), "4 rows are fewer than one step of 8"),
    "config without fsdp": (dict(fsdp_config="{}"), "has no effect without --fsdp"),
    "eval without data": (dict(eval_strategy="steps"), "--eval_data_path"),
    "evaluation data for nothing": (dict(eval_data_path="rows.json"), "is never used; add --eval_strategy"),
    "unwritable output": (dict(output_dir="/proc/out"), "--output_dir /proc/out"),
    "output is a file": (dict(output_dir="file"), "File exists"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(tmp_path, tiny, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changed, message = BAD_FLAGS[name]
    if changed.get("data_path") == "long":
        rows = [{"instruction": "i", "output": "many words " * 1000}]
        (tmp_path / "long").mkdir()
        (tmp_path / "long" / "rows.json").write_text(json.dumps(rows))
        changed = {**changed, "data_path": tmp_path / "long" / "rows.json"}
    if changed.get("output_dir") == "file":
        (tmp_path / "file").write_text("mine")
    assert message in mistake(tmp_path, tiny, **changed)
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


@pytest.mark.parametrize(
    "template, message",
    [
        ("{", "cannot be read as JSON"),
        ("[]", "expected a JSON object, got list"),
        ('{"prompt_input": "{instruction} {input}"}', "'prompt_no_input'"),
        ('{"prompt_input": "{instruction} {input}", "prompt_no_input": "{instruction} {x}"}', "may use only"),
        ('{"prompt_input": "{instruction}", "prompt_no_input": "{instruction}"}', "never uses {input}"),
        ('{"prompt_input": "{instruction} {input}", "prompt_no_input": "{instruction"}', "brace is written twice"),
        (
            '{"prompt_input": "{instruction:>3} {input}", "prompt_no_input": "{instruction}"}',
            "plain placeholders",
        ),
    ],
)
def test_bad_templates(tmp_path, tiny, template, message):
    (tmp_path / "t.json").write_text(template)
    assert message in mistake(tmp_path, tiny, prompt_template=tmp_path / "t.json")


def test_a_model_folder_without_weights(tmp_path, tiny):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((Path(tiny("llama")) / name).read_bytes())
    assert "the model could not be loaded" in mistake(tmp_path, tiny, model_name_or_path=folder)


def test_a_tracker_that_cannot_start_is_one_message(tmp_path, tiny, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file" / "logs"))
    message = mistake(tmp_path, tiny, report_to="tensorboard")
    assert message.startswith("--report_to tensorboard: a tracker failed: ") and "file" in message


@pytest.mark.parametrize("said, offline", [("No API key. Use `wandb login` to log in.", True), ("disk full", False)])
def test_a_tracker_without_a_login_names_the_way_without_one(said, offline):
    from types import SimpleNamespace

    from transformers.integrations import integration_utils

    names: dict = {}
    source = f"def fail(args):\n    raise RuntimeError({said!r})"
    exec(compile(source, integration_utils.__file__, "exec"), names)
    with pytest.raises(UsageError, match="--report_to tensorboard wandb: a tracker failed: ") as caught:
        names_trackers(names["fail"])(SimpleNamespace(report_to=["tensorboard", "wandb"]))
    assert ("WANDB_MODE=offline" in str(caught.value)) == offline


def test_other_errors_are_not_a_trackers():
    with pytest.raises(ZeroDivisionError):
        names_trackers(divmod)(1, 0)


def test_a_home_folder_that_was_not_expanded_is_said(tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "llama").mkdir()
    message = mistake(tmp_path, tiny, model_name_or_path="~/llama")
    assert message == f"--model_name_or_path ~/llama: no such folder; did you mean {tmp_path}/llama?"


@pytest.mark.slow
def test_a_mistake_of_make_tiny_model_has_no_traceback(tmp_path):
    result = fork("scripts/make_tiny_model.py", ["--output_dir", tmp_path / "x", "--hidden_size", "7"], check=False)
    assert result.returncode == 2 and "scripts.make_tiny_model: error: --hidden_size 7" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(learning_rat="1"), "did you mean --learning_rate"),
        (dict(fsdp="full_shard auto_wrap", fsdp_transformer_layer_cls_to_wrap="BertLayer"), "is LlamaDecoderLayer"),
    ],
)
def test_under_torchrun_rank_0_speaks_once(tmp_path, tiny, changed, message):
    flags = dict(
        model_name_or_path=tiny("llama"),
        data_path=write_rows(tmp_path / "rows.json", 4),
        output_dir=tmp_path / "out",
        **changed,
    )
    result = train(flags, processes=2, check=False)
    assert result.returncode != 0 and not list((tmp_path / "out").glob("*"))
    assert result.stderr.count(message) == 1
    assert 'File "' not in result.stderr.split("train.py: error:")[0], "no traceback before the message"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--output_dirr", "x"], "unknown flag --output_dirr; did you mean --output_dir?"),
        (["--output_dir=x", "--hidden", "64"], "unknown flag --hidden; did you mean --hidden_size?"),
        (["--output_dir=x", "--architecture", "bert"], "--architecture bert: expected one of llama, opt, gpt2"),
        (["--seed", "1"], "scripts.make_tiny_model needs --output_dir"),
        (
            ["--output_dir=x", "--hidden_size=0"],
            "--hidden_size 0: 2 attention heads cannot share it evenly; expected a multiple of 32",
        ),
        (
            ["--output_dir=x", "--hidden_size=7"],
            "--hidden_size 7: 2 attention heads cannot share it evenly; expected a multiple of 32",
        ),
        (["--output_dir=x", "--num_hidden_layers=0"], "--num_hidden_layers 0: expected at least 1"),
        (["--output_dir=x", "--vocab_size=3"], "--vocab_size 3: expected at least 460, for the characters of the text"),
        (
            ["--output_dir=x", "--vocab_size=3", "--architecture=opt"],
            "--vocab_size 3: expected at least 260, for all bytes",
        ),
        (["--output_dir=/proc/x"], "--output_dir /proc/x: cannot be written (No such file or directory)"),
    ],
)
def test_small_commands_name_what_is_wrong_and_an_unknown_flag_before_a_missing_one(
    words, message, tmp_path, monkeypatch
):
    from scripts.make_tiny_model import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as error:
        main(words)
    assert str(error.value) == message


@pytest.mark.slow
def test_help_reads_well():
    text = fork("train.py", ["--help"]).stdout
    assert "torchrun --nproc_per_node=4" in text
    for flag in ("--data_path", "--prompt_boundary", "--loss_normalization", "--save_dtype", "--fsdp"):
        assert flag in text


RANK = """
import os, sys, time
if os.fork() == 0:
    time.sleep(0.5)  # what a rank's imports take
    from alpaca.common.errors import reported
    with reported("train.py"):
        print(os.getppid(), "went on", flush=True)
elif sys.argv[1] == "stays":
    os.wait()
"""


@pytest.mark.parametrize("launcher", ["stays", "dies"])
def test_a_rank_whose_launcher_died_while_it_was_importing_ends(launcher):
    """It would join the run that is started anew at the same port, and write into its folder."""
    result = run([sys.executable, "-c", RANK, launcher], env={"TORCHELASTIC_RUN_ID": "none"})
    if launcher == "stays":
        assert "went on" in result.stdout
    elif result.stdout:
        assert int(result.stdout.split()[0]) != 1
        pytest.skip("orphans go to a process here that is none of alpaca.common.distributed.REAPERS")


@dataclasses.dataclass
class Options:
    model: str = "default"
    size: int = 3


@pytest.mark.parametrize(
    "about, message",
    [
        ("llama", "--path_raw llama: no such folder"),
        ("llama/model.bin", "--path_raw: llama/model.bin: no such folder"),
        (os.path.abspath("llama"), f"--path_raw {os.path.abspath('llama')}: no such folder"),
        ("llama2", "llama2: no such folder"),
        ("default", "--model default: no such folder"),
        ("rest", "--rest rest: no such folder"),
        ("more", "--others more: no such folder"),
        ("3", "3: no such folder"),
    ],
)
def test_the_command_names_the_flag_of_what_is_wrong(about, message):
    @names_flags
    def command(path_raw: str, options: Options, rest: str = "rest", **more: str) -> None:
        raise InputError(f"{about}: no such folder", about)

    with pytest.raises(UsageError) as error:
        command("llama", Options(), others="more")
    assert str(error.value) == message


def test_the_flag_is_named_once_that_of_the_outermost_command():
    @names_flags
    def command(path_raw: str) -> None:
        raise InputError(f"{path_raw}: no such folder", path_raw)

    @names_flags
    def outer(model: str, path: str) -> None:
        command(model if model != "other" else path)

    for model, message in (("llama", "--model llama: no such folder"), ("other", "--path here: no such folder")):
        with pytest.raises(UsageError) as error:
            outer(model, "here")
        assert str(error.value) == message


def test_a_parameter_is_named_as_the_flag_that_the_command_has():
    def check(size: int) -> None:
        raise ParameterError(f"{{size}} {size}: expected {{count}} or more", "size", "count")

    @names_flags
    def command(options: Options) -> None:
        check(options.size)

    @commands.task(count="number")
    def task(size: int, number: int = 1) -> None:
        check(size)

    for call, message in (
        (lambda: check(3), "size 3: expected count or more"),
        (lambda: command(Options()), "--size 3: expected count or more"),
        (lambda: task(3), "--size 3: expected --number or more"),
        (lambda: commands.run("p", {"task": task}, ["task", "3"]), "--size 3: expected --number or more"),
    ):
        with pytest.raises(UsageError) as error:
            call()
        assert str(error.value) == message


@pytest.mark.parametrize(
    "about, written, named",
    [
        ("same", False, "--path_raw same: wrong"),
        ("same", True, "--output_path same: wrong"),
        ("same.journal.jsonl", True, "--output_path same.journal.jsonl: wrong"),
        ("same/config.json", False, "--path_raw same/config.json: wrong"),
        ("elsewhere/model", False, "elsewhere/model: wrong"),
    ],
)
def test_of_flags_with_one_value_the_one_at_fault_is_named(about, written, named, tmp_path, monkeypatch):
    """The working folder, a default of flags, is not what a path in it is about."""
    monkeypatch.chdir(tmp_path)

    @names_flags
    def command(path_raw, data_path, output_path, output_dir="./"):
        raise InputError(f"{about}: wrong", about, written)

    with pytest.raises(InputError) as error:
        command("same", "same", "same")
    assert str(error.value).replace(": same", " same") == named


def test_library_code_names_no_flag_to_who_calls_it_from_python():
    from alpaca.completions.api import SamplingFlags
    from alpaca.completions.budget import BudgetFlags

    for number, call, message in (
        ("max_new_tokens", SamplingFlags(max_new_tokens=0).sampling, "max_new_tokens 0: expected at least 1"),
        ("temperature", SamplingFlags(temperature=-1.0).sampling, "temperature -1.0: expected 0 (greedy) or more"),
        ("top_p", SamplingFlags(top_p=0.0).sampling, "top_p 0.0: expected more than 0, 1 at most"),
        ("price_in", BudgetFlags(price_in=-1.0).budget, "price_in, price_out: expected dollars per million tokens"),
        ("max_cost", BudgetFlags(max_cost=1.0).budget, "max_cost 1.0: expected dollars above 0, with price_in and"),
    ):
        with pytest.raises(UsageError) as error:
            call()
        assert str(error.value).startswith(message), number
