"""The same rows from every file format; every bad file ends in one message that names the place."""

import csv
import json
from types import SimpleNamespace

import datasets
import pytest
from support.goldens import golden_tokenizer

from alpaca.common.errors import UsageError
from alpaca.data.rows import load_rows
from train import DataArguments, make_supervised_data_module, parse_flags

ROWS = [
    {"instruction": "Add.", "input": "2, 3", "output": "5"},
    {"instruction": 'Quote "this",\nplease {now}.', "input": "", "output": "007"},
    {"instruction": "Translate: 早上好 \u2028 x", "input": "NA", "output": "null"},
]


def save(folder, kind):
    path = folder / f"rows.{kind}"
    if kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "bom.json":
        path.write_text(json.dumps(ROWS), encoding="utf-8-sig")
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n", encoding="utf-8")
    elif kind in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["instruction", "input", "output"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    elif kind == "saved":
        datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(str(path))
    elif kind == "folder":
        path.mkdir()
        datasets.Dataset.from_list(ROWS).to_parquet(str(path / "train-00000.parquet"))
    return str(path)


@pytest.mark.parametrize("kind", ["json", "bom.json", "jsonl", "csv", "tsv", "parquet", "saved", "folder"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    rows = load_rows(save(tmp_path, kind))
    assert [{name: row[name] for name in ("instruction", "input", "output")} for row in rows] == ROWS


def test_data_arguments_of_2023_are_enough(tmp_path):
    """Scripts of 2023 set the path later, or give an object that has nothing else."""
    later, tokenizer = DataArguments(), golden_tokenizer("llama")
    with pytest.raises(UsageError, match="--data_path is missing"):
        make_supervised_data_module(tokenizer, later)
    later.data_path = save(tmp_path, "json")
    bare = SimpleNamespace(data_path=later.data_path)
    modules = [make_supervised_data_module(tokenizer=tokenizer, data_args=args) for args in (later, bare)]
    for module in modules:
        assert module["eval_dataset"] is None and len(module["train_dataset"]) == len(ROWS)
        assert set(module["train_dataset"][0]) == {"input_ids", "labels"}
    assert modules[0]["train_dataset"].data_fingerprint == modules[1]["train_dataset"].data_fingerprint


def test_splits_can_be_sliced(tmp_path):
    rows = load_rows(save(tmp_path, "folder"), split="train[1:]")
    assert [row["output"] for row in rows] == ["007", "null"]


def test_the_split_of_the_command_line_is_what_is_trained_on(tmp_path):
    words = ["--data_path", save(tmp_path, "folder"), "--data_split", "train[1:]", "--use_cpu", "--output_dir", "x"]
    _, data_args, _, _ = parse_flags(words)
    module = make_supervised_data_module(golden_tokenizer("llama"), data_args, str(tmp_path))
    assert len(module["train_dataset"]) == len(ROWS) - 1


def test_seed_tasks_give_a_row_per_instance(tmp_path):
    path = tmp_path / "seeds.jsonl"
    task = {
        "id": "seed_task_0",
        "name": "n",
        "instruction": "Do.",
        "is_classification": False,
        "instances": [{"input": "", "output": "a"}, {"input": "x", "output": "b"}],
    }
    path.write_text(json.dumps(task))
    assert load_rows(str(path)) == [
        {"instruction": "Do.", "input": "", "output": "a"},
        {"instruction": "Do.", "input": "x", "output": "b"},
    ]


def test_the_seed_tasks_of_this_repository():
    from conftest import ROOT

    tasks = [json.loads(line) for line in (ROOT / "seed_tasks.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(tasks) == 175 == len({task["name"] for task in tasks}) == len({task["instruction"] for task in tasks})
    with_input = sum(bool(task["instances"][0]["input"]) for task in tasks)
    assert 0.35 < with_input / len(tasks) < 0.45
    for i, task in enumerate(tasks):
        assert list(task) == ["id", "name", "instruction", "instances", "is_classification"]
        assert task["id"] == f"seed_task_{i}" and isinstance(task["is_classification"], bool)
        for instance in task["instances"]:
            assert list(instance) == ["input", "output"] and instance["output"]
            for text in (task["instruction"], *instance.values()):
                assert text == text.strip() and "</s>" not in text and "### " not in text


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", '[{"instruction": "x",\n "output": }]', "line 2, column 12"),
        ("a.jsonl", '{"instruction": "x", "output": "y"}\n{"instruction"', "line 2"),
        ("a.json", "", "holds no rows"),
        ("a.json", "[]", "holds no rows"),
        ("a.json", "just text", "line 1"),
        ("a.json", '[{"instruction": "x"}]', "row 0: no field 'output'; the row has"),
        (
            "a.json",
            '[{"instruction": "x", "output": "y"}, {"prompt": "x", "output": "y"}]',
            "row 1: no field 'instruct",
        ),
        ("a.json", '[{"instruction": "x", "output": null}]', "row 0: 'output' must be text, got NoneType"),
        ("a.json", '[{"instruction": "x", "input": ["a"], "output": "y"}]', "'input' must be text, got list"),
        ("a.json", '[{"instruction": 5, "output": "y"}]', "'instruction' must be text, got int 5"),
        ("a.json", '[{"instruction": "é", "output": "a \\ud83d"}]', "row 0: 'output' holds '.ud83d' at character 2"),
        ("a.json", '["x"]', "row 0: expected an object"),
        ("a.csv", "theme,reply\n1,2\n", "no field 'instruction'"),
        ("a.parquet", "not parquet", "cannot be read as parquet"),
        ("a.json", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-lfs pointer"),
    ],
)
def test_bad_files_are_located(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        load_rows(str(path))
    assert str(path) in str(caught.value)


def test_a_file_in_another_encoding(tmp_path):
    (tmp_path / "a.json").write_bytes('[{"instruction": "Grüße", "output": "x"}]'.encode("latin-1"))
    with pytest.raises(UsageError, match="is not UTF-8"):
        load_rows(str(tmp_path / "a.json"))


def test_a_missing_file_says_where_alpacas_data_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # somebody's checkout may have the file
    with pytest.raises(UsageError, match="no such file.*\n.*tatsu-lab/alpaca"):
        load_rows("./alpaca_data.json")
    with pytest.raises(UsageError, match="no such file"):
        load_rows("/nowhere/rows.jsonl")


def test_an_unreachable_hub_id_says_what_failed():
    for name in ("nobody/nothing", "nobody/nothing-2.5"):
        with pytest.raises(UsageError, match=f"{name}.*split 'train'"):
            load_rows(name)
