"""Every command with a bad value for each of its paths: one message, which names the path and its own flag, and no flag
that this command does not have."""

import importlib
import inspect
import json
import re
import shutil

import pytest
from conftest import ROOT, write_rows

from alpaca.common import arguments
from alpaca.common.errors import UsageError

INPUTS = (
    "path_raw path_tuned path_diff model base compare adapter data_path eval_data_path seed_path augmented_path "
    "regen_path seed_tasks_path ratings_path prompt_path model_name_or_path prompt_template reference_path exclude"
).split()
OUTPUTS = "output_path output_dir".split()
# What a command needs beside the path that is broken; {…} is a file or folder of the test.
GIVEN = {
    ("weight_diff", "make_diff"): "--path_raw={base} --path_tuned={tuned} --path_diff={new}",
    ("weight_diff", "recover"): "--path_raw={base} --path_diff={diff} --path_tuned={new}",
    ("weight_diff", "verify"): "--path_diff={diff} --path_tuned={tuned}",
    ("generate_instruction", "generate_instruction_following_data"): "--output_dir={new} --model_name={base}",
    ("generate_instruction", "generate_responses"): "--data_path={rows} --output_path={new} --model={base}",
    ("generate_instruction", "export"): "--regen_path={rows} --output_path={new}",
    ("scripts.generate",): "--model={base} --data_path={rows} --output_path={new}",
    ("scripts.demo",): "--model={base}",
    ("scripts.merge_lora",): "--adapter={adapter} --output_dir={new}",
    ("scripts.inspect_data",): "--model_name_or_path={base} --data_path={rows}",
    ("scripts.check_packing",): "--model_name_or_path={base} --data_path={rows}",
    ("scripts.plot_diversity",): "--data_path=seed_tasks.jsonl --output_path={new}",
    ("scripts.evaluate", "alpaca_eval"): "--model={base} --data_path={rows} --output_path={new}",
    ("scripts.evaluate", "win_rate"): "--data_path={rows} --reference_path={rows} --judge={base}",
    ("scripts.evaluate", "backward"): "--data_path={written}",
    ("scripts.evaluate", "before_after"): "--base={base} --model={tuned} --data_path={rows} --output_dir={new}",
    ("scripts.reference_run",): "--model={base} --data_path={rows} --output_dir={new}",
    ("scripts.backtranslate", "augment"): "--model={base} --data_path={texts} --text_field=text --output_path={new}",
    ("scripts.backtranslate", "curate"): "--model={base} --data_path={pairs} --output_path={new}",
    ("scripts.backtranslate", "mix"): "--seed_path={rows} --augmented_path={rows} --output_path={new}",
    ("train",): "--model_name_or_path={base} --data_path={rows} --output_dir={new} --use_cpu=True",
}


TEXT = "The kettle is on the stove, and the water in it is about to boil. " * 12


def flags_of(name: str, *task: str) -> list[str]:
    module = importlib.import_module(name)
    if task:
        return list(inspect.signature(getattr(module, task[0])).parameters)
    if name == "train":
        from alpaca.models.lora import LoraArguments

        classes = (module.ModelArguments, module.DataArguments, LoraArguments, module.TrainingArguments)
        return arguments.FlagParser(classes, None, name, ()).known()
    if name == "scripts.merge_lora":
        return list(inspect.signature(module.merge_lora).parameters)
    classes = [value for key, value in vars(module).items() if key.endswith("Arguments") and inspect.isclass(value)]
    return arguments.FlagParser(classes, None, name, ()).known()


CASES = [(command, flag) for command in GIVEN for flag in flags_of(*command) if flag in (*INPUTS, *OUTPUTS)]


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    import weight_diff

    folder = tmp_path_factory.mktemp("files")
    paths = {name: folder / name for name in ("base", "tuned", "diff", "adapter")}
    for name in ("base", "tuned"):
        shutil.copytree(tiny("llama"), paths[name])
    model = AutoModelForCausalLM.from_pretrained(paths["base"])
    model.get_input_embeddings().weight.data += 1
    model.save_pretrained(paths["tuned"])
    weight_diff.make_diff(str(paths["base"]), str(paths["tuned"]), str(paths["diff"]))
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(paths["adapter"])
    for name in ("rows", "pairs", "written", "texts"):
        paths[name] = folder / f"{name}.json"
        write_rows(paths[name], 4, reference="Count.", text=TEXT)
    return paths


WRITTEN = (("recover", "path_tuned"), ("make_diff", "path_diff"), ("curate", "ratings_path"))  # besides OUTPUTS


def is_written(command: tuple[str, ...], flag: str) -> bool:
    return flag in OUTPUTS or (command[-1], flag) in WRITTEN


@pytest.mark.slow
@pytest.mark.parametrize("command, flag", CASES, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_a_bad_path_is_reported_under_its_own_flag(command, flag, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("seed_tasks.jsonl", "prompt.txt"):
        shutil.copy(ROOT / name, name)
    name, *task = command
    written = is_written(command, flag)
    value = files["rows"] / "new" if written else tmp_path / "missing" / "of" / "it"  # below a file; not there
    words = [word for word in GIVEN[command].format(new=tmp_path / "new.json", **files).split()]
    words = [word for word in words if not word.startswith(f"--{flag}=")] + [f"--{flag}={value}"]
    monkeypatch.setattr("sys.argv", [name, *task, *words])
    module = importlib.import_module(name)
    with pytest.raises(UsageError) as error:
        (module.train if name == "train" else module.main)()
    message = str(error.value)
    assert f"--{flag}" in message and str(value.parent if written else value) in message, message
    advice = re.sub(r"python (-m )?[\w.]+( \w+)?( --\w+ \S+)*", "", message)  # another command, whole
    named = set(re.findall(r"--(\w+)", advice))
    assert named <= set(flags_of(*command)), f"{named - set(flags_of(*command))}: {message}"
    assert json.loads(files["rows"].read_text()), "what is read stays as it was"
