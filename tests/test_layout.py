"""The shape of the repository: who imports whom, what an import costs, that nothing grows out of hand."""

import ast
import inspect
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT
from support.imports import loaded_by

FILES = sorted(path for folder in (".", "alpaca/**", "scripts") for path in ROOT.glob(f"{folder}/*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
COMMON, DATA = {"common"}, {"common", "data"}
MAY_IMPORT = {  # a wing of alpaca/, or a file of the top folder, and the wings that it may import beside itself
    "common": set(),
    "data": COMMON,
    **dict.fromkeys(("models", "packing", "weights", "completions"), DATA),
    "training": DATA | {"models", "packing", "weights"},
    "inference": DATA | {"models", "weights", "completions"},
    "datagen": DATA | {"completions"},
    "evaluation": DATA | {"inference", "models", "weights"},
    "weight_diff": DATA | {"weights", "models"},
    "utils": COMMON | {"completions", "inference"},
    "train": DATA | {"models", "packing", "weights", "training"},
    "generate_instruction": DATA | {"completions", "datagen", "inference", "utils"},
}


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {module(path): path for path in FILES}


def wing(name: str) -> str:
    """alpaca.data.rows -> data; train -> train; scripts.demo -> scripts"""
    return name.split(".")[1] if name.startswith("alpaca.") else name.split(".")[0]


def imports(path: Path) -> set[str]:
    """The modules of ours that `path` imports, at its top, inside functions and for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_wing_imports_only_what_stands_below_it(name):
    if wing(name) not in ("scripts", "alpaca") and not name.endswith("__init__"):
        above = {other for other in imports(MODULES[name]) if wing(other) not in MAY_IMPORT[wing(name)] | {wing(name)}}
        assert not above, f"{wing(name)} may import {sorted(MAY_IMPORT[wing(name)])}"


def test_imports_have_no_cycle():
    graph = {name: imports(path) - {name} for name, path in MODULES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)  # CycleError names the cycle


def test_every_wing_lists_its_rooms():
    for folder in (path for path in (ROOT / "alpaca").iterdir() if (path / "__init__.py").exists()):
        listed = re.findall(r"^(\w+) {2,}\w", ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), re.M)
        assert sorted(listed) == sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
        assert len(listed) <= 10


@pytest.mark.parametrize("path", [*FILES, *BENCHMARKS], ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            assert node.end_lineno - first.lineno < 60, f"{node.name}, parameters and docstring not counted"
        assert not isinstance(node, ast.ExceptHandler) or node.type is not None, "bare except"


def all_of(wing: str) -> str:
    return "import " + ", ".join(name for name in sorted(MODULES) if name.startswith(f"alpaca.{wing}."))


def test_importing_utils_costs_nothing():
    assert not {"torch", "openai", "transformers", "numpy"} & loaded_by("import utils")


def test_making_data_loads_no_torch():
    assert not {"torch", "transformers"} & loaded_by(all_of("datagen"))


def test_recovering_a_diff_loads_neither_transformers_nor_openai():
    assert not {"transformers", "openai", "accelerate"} & loaded_by("import weight_diff")


@pytest.mark.slow
def test_answering_loads_nothing_of_training():
    loaded = loaded_by(all_of("inference"))
    assert not [name for name in loaded if name.startswith(("alpaca.training", "alpaca.packing"))]
    assert not {"alpaca.models.fsdp", "alpaca.models.deepspeed"} & loaded


@pytest.mark.slow
def test_importing_train_starts_nothing():
    assert "openai" not in loaded_by("import train")


def test_train_reads_as_a_table_of_contents():
    functions = {node.name: node for node in ast.parse((ROOT / "train.py").read_text()).body if hasattr(node, "name")}
    for name in ("train", "run"):
        assert sum(isinstance(node, ast.Call) for node in ast.walk(functions[name])) <= 25


def test_templates_are_written_once():
    found = [str(path.relative_to(ROOT)) for path in FILES if "appropriately completes the request" in path.read_text()]
    assert found == ["alpaca/data/prompts.py"]


def test_public_names_of_2023_stay_where_they_were():
    import train
    import utils
    import weight_diff

    for name in (
        "IGNORE_INDEX DEFAULT_PAD_TOKEN DEFAULT_EOS_TOKEN DEFAULT_BOS_TOKEN DEFAULT_UNK_TOKEN PROMPT_DICT "
        "ModelArguments DataArguments TrainingArguments smart_tokenizer_and_embedding_resize preprocess "
        "SupervisedDataset DataCollatorForSupervisedDataset make_supervised_data_module train _tokenize_fn "
        "safe_save_model_for_hf_trainer"
    ).split():
        assert hasattr(train, name), name
    assert utils.jload and utils.jdump and utils.OpenAIDecodingArguments and utils.StrOrOpenAIObject
    for function, parameters in (
        (
            utils.openai_completion,
            "prompts decoding_args model_name sleep_time batch_size max_instances max_batches return_text",
        ),
        (weight_diff.make_diff, "path_raw path_tuned path_diff device"),
        (weight_diff.recover, "path_raw path_diff path_tuned device test_inference check_integrity_naively"),
    ):
        assert list(inspect.signature(function).parameters)[: len(parameters.split())] == parameters.split()


def test_the_readme_names_every_wing():
    wings = {path.parent.name for path in ROOT.glob("alpaca/*/__init__.py")}
    assert wings <= set(re.findall(r"^(\w+)/ ", (ROOT / "README.md").read_text(), re.M)) and len(wings) == 10
