"""The shape of the repository: who imports whom, what an import costs, that nothing grows out of hand."""

import ast
import inspect
import json
import re
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

FILES = sorted(path for folder in (".", "alpaca", "scripts") for path in (ROOT / folder).glob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
COMMANDS = {"train", "generate_instruction", "weight_diff"}


def group(path) -> str:
    return path.parent.name if path.parent != ROOT else path.stem


def imports(path):
    """(imported top-level module, whether at module level) for every import of ours in `path`."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for name in names:
            if (top := name.split(".")[0]) in COMMANDS | {"utils", "alpaca", "scripts"}:
                yield top, node in tree.body


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_form_a_dag(path):
    for name, at_top in imports(path):
        if group(path) == "alpaca":
            assert name == "alpaca"
        elif group(path) == "utils":
            assert name == "alpaca" and not at_top, "utils imports alpaca only inside functions"
        elif group(path) in COMMANDS:
            assert name in ("utils", "alpaca")


def modules_imported(path) -> set[str]:
    """The modules of alpaca/ that `path` imports when it runs, inside functions too."""
    tree = ast.parse(path.read_text())
    unused = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    unused = {id(inner) for node in unused for inner in ast.walk(node)}
    found = set()
    for node in (node for node in ast.walk(tree) if id(node) not in unused):
        if isinstance(node, ast.ImportFrom):
            found |= {node.module} if node.module != "alpaca" else {f"alpaca.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return {name.removeprefix("alpaca.") for name in found if name.startswith("alpaca.")}


def test_imports_inside_alpaca_have_no_cycle():
    graph = {path.stem: modules_imported(path) for path in FILES if group(path) == "alpaca"}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)  # CycleError names the cycle


@pytest.mark.parametrize("path", [*FILES, *BENCHMARKS], ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            assert node.end_lineno - first.lineno < 60, f"{node.name}, parameters and docstring not counted"
        assert not isinstance(node, ast.ExceptHandler) or node.type is not None, "bare except"


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys, json; print(json.dumps(list(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(json.loads(output.splitlines()[-1]))


def test_importing_utils_costs_nothing():
    assert not {"torch", "openai", "transformers", "numpy"} & loaded_by("import utils")


@pytest.mark.slow
def test_importing_train_starts_nothing():
    assert "openai" not in loaded_by("import train")


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
        "SupervisedDataset DataCollatorForSupervisedDataset make_supervised_data_module train"
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


def test_the_readmes_tree_is_that_of_the_files():
    tree = re.search(r"## What is here\n+```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    named, folder = [], ""
    for line in tree.splitlines():
        folder = folder if line.startswith(" ") else line.split()[0] if line.split()[0].endswith("/") else ""
        named += [folder + name for name in re.findall(r"\b\w+\.py\b", line)]
    files = [path.relative_to(ROOT).as_posix() for path in FILES if path.name != "__init__.py"]
    assert sorted(named) == sorted(files)
