"""One command line for all commands: help, unknown flags, what other programs call a flag, former names."""

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Literal

import pytest
from conftest import ROOT

import generate_instruction
import weight_diff
from alpaca.common import arguments, commands
from alpaca.common.errors import UsageError

TASKS = {
    "weight_diff": ("make_diff", "recover", "verify"),
    "generate_instruction": ("generate_instruction_following_data", "generate_responses", "export"),
    "scripts.evaluate": ("harness", "alpaca_eval", "win_rate", "backward"),
    "scripts.backtranslate": ("train_backward", "augment", "curate", "mix"),
}
ALONE = sorted(
    f"scripts.{path.stem}"
    for path in (ROOT / "scripts").glob("*.py")
    if path.stem not in ("__init__", "verify") and f"scripts.{path.stem}" not in TASKS
)
COMMANDS = [("train", ()), *((name, ()) for name in ALONE)]
COMMANDS += [(name, words) for name, tasks in TASKS.items() for words in ((), *((task,) for task in tasks))]


def help_of(name, words, flag, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", [name, *words, flag])
    module = importlib.import_module(name)
    capsys.readouterr()
    try:
        (module.train if name == "train" else module.main)()
    except SystemExit as end:
        assert end.code == 0
    shown = capsys.readouterr()
    assert shown.err == "", "help goes to stdout"
    return shown.out


@pytest.mark.parametrize(
    "name, words", COMMANDS, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_help_has_one_look(name, words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    text = help_of(name, words, "--help", monkeypatch, capsys)
    assert text == help_of(name, words, "-h", monkeypatch, capsys) and text.startswith("usage: ")
    assert "Optional[" not in text and "INFO" not in text
    if name in TASKS and not words:
        assert all(task in text for task in TASKS[name])
        return
    assert "  -h, --help" in text and not re.search(r"^  -[a-gi-z]\b", text, re.MULTILINE), "no other short flag"
    ours = text.partition("every flag of transformers.TrainingArguments")[0]  # theirs follow, in their own words
    for flag, help_text in re.findall(r"^  --(\w+).*?  +(\S.*(?:\n {10,}.*)*)", ours, re.MULTILINE):
        assert re.match(r"[^a-z]|(?:token|stanford|packed|auto|eager|\w+(,| or) )\b", help_text), (
            f"--{flag}: {help_text}"
        )


@pytest.mark.parametrize(
    "name, ours",
    {
        "lr": "learning_rate",
        "batch_size": "per_device_train_batch_size",
        "epochs": "num_train_epochs",
        "micro_batch_size": "per_device_train_batch_size",
        "cutoff_len": "model_max_length",
        "base_model": "model_name_or_path",
        "dataset": "data_path",
        "train_file": "data_path",
        "lora_rank": "lora_r",
        "use_lora": "lora_r 8",
        "qlora": "load_in_4bit True",
        "val_set_size": "eval_data_path",
        "device": "use_cpu True",
        "wandb_project": "report_to wandb",
        "flash_attn": "attn_implementation flash_attention_2",
        "grad_accum": "gradient_accumulation_steps",
        "gpus": "nproc_per_node=N",
    }.items(),
)
def test_what_other_trainers_call_a_flag(name, ours):
    from train import parse_flags

    with pytest.raises(UsageError, match=f"unknown flag --{name}; .*--{ours}$"):
        parse_flags([f"--{name}", "1", "--data_path", "x.json"])


def test_every_synonym_names_a_flag_that_some_command_has():
    from alpaca.models.lora import LoraArguments
    from scripts.demo import DemoArguments
    from scripts.generate import GenerateArguments
    from train import DataArguments, ModelArguments, TrainingArguments

    classes = (ModelArguments, DataArguments, LoraArguments, TrainingArguments)
    known = set(arguments.FlagParser(classes, None, "train.py", ()).known())
    for one in (GenerateArguments, DemoArguments):
        known |= set(arguments.FlagParser((one,), None, "", ()).known())
    known |= set(inspect.signature(generate_instruction.generate_responses).parameters)
    known |= set(inspect.signature(weight_diff.recover).parameters)
    for names in commands.SYNONYMS.values():
        assert names[0].split()[0] in known, names


def example(path: Path, number: int = 3, kind: Literal["a", "b"] = "a", loud: bool = False, name: str | None = None):
    """Do a thing.

    Args:
        path: what is read.
        number: 100% of it.
        kind: of thing.
    """
    seen.append((path, number, kind, loud, name))


seen: list = []


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--path", "x"], (Path("x"), 3, "a", False, None)),
        (["x", "--number=4", "--kind", "b", "--loud"], (Path("x"), 4, "b", True, None)),
        (["--path=x", "--loud", "False", "--name", "1e3"], (Path("x"), 3, "a", False, "1e3")),
        (["--path=a,b", "--title", "t", "--noloud"], (Path("a,b"), 3, "a", False, "t")),
        (["--path=x", "--no_loud", "--name="], (Path("x"), 3, "a", False, "")),
    ],
)
def test_a_function_gets_its_flags(words, expected, capsys):
    seen.clear()
    commands.call("example", commands.task(title="name")(example), words)
    assert seen == [expected]
    assert capsys.readouterr().out == ("flag: --title -> --name\n" if "--title" in words else "")


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "example needs --path"),
        (["x", "--numbr", "1"], "unknown flag --numbr; did you mean --number?"),
        (["x", "--zzz"], "unknown flag --zzz; example has no flag like it"),
        (["x", "--number", "1.5"], "--number 1.5: expected a whole number"),
        (["x", "--kind", "c"], "--kind c: expected one of a, b"),
        (["x", "--loud", "perhaps"], "--loud perhaps: expected True or False"),
        (["x", "--name"], "--name: needs a value"),
        (["--name=", "--loud"], "example needs --path"),
        (["x", "--na.me", "1"], "--na.me: is no flag; expected --name value or --name=value"),
        (["x", "4", "a", "True", "n", "more"], "expected a flag such as --path, got 'more'"),
    ],
)
def test_mistakes_are_told_before_the_function_is_called(words, message):
    seen.clear()
    with pytest.raises(UsageError) as error:
        commands.call("example", example, words)
    assert str(error.value) == message and not seen


def test_help_is_made_of_the_docstring(capsys):
    commands.call("example", example, ["-h"])
    text = capsys.readouterr().out
    assert "Do a thing." in text and "  --path VALUE    What is read. Required.\n" in text
    assert (
        "100% of it. (default: 3)" in text
        and "  --kind {a,b}    Of thing. (default: a)\n" in text
        and "  --loud\n" in text
    )
