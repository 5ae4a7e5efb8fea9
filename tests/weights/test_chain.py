"""verify --chain: from the data file to the recovered model, the first link that is missing or broken is named."""

import json
import os
import shutil
import sys

import pytest
from conftest import run, train, write_rows
from safetensors.torch import save_file
from support.checkpoints import make, recover, state_of

import weight_diff
from alpaca.common.errors import UsageError


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """base, rows.json, run, diff, result: everything that leads to a recovered model."""
    top = tmp_path_factory.mktemp("chain")
    shutil.copytree(tiny("llama"), top / "base")
    rows = write_rows(top / "rows.json", 8)
    flags = {"num_train_epochs": 1, "report_to": "none", "output_dir": top / "run"}
    train({"model_name_or_path": top / "base", "data_path": rows, **flags})
    make(top / "base", top / "run", top / "diff")
    recover(top / "base", top / "diff", top / "result")
    return top


@pytest.fixture
def here(made, tmp_path):
    """A copy, to be changed: places are relative, so they hold there too."""
    shutil.copytree(made, tmp_path / "top")
    return tmp_path / "top"


def verify(folder, **flags):
    weight_diff.verify(chain=str(folder), **{name: str(value) for name, value in flags.items()})


@pytest.mark.slow
def test_the_whole_chain(here, capsys):
    digest = (here / "diff" / "weight_diff.json.sha256").read_text().split()[0]
    capsys.readouterr()
    verify(here / "result", digest=digest)
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:1].isdigit() or line.startswith("proved")]
    names = ["1. data file", "2. run record", "3. model", "4. diff manifest", "5. recovered folder"]
    assert [line.split(":")[0] for line in lines] == [*names, "proved"]
    assert str(here / "rows.json") in lines[0] and "8 rows" in lines[1] and digest in lines[3]
    verify(here / "diff", path_tuned=here / "result")
    verify(here / "run", path_diff=here / "diff", path_tuned=here / "result")
    (here / "moved").mkdir()
    (here / "rows.json").rename(here / "moved" / "data.json")
    (here / "diff").rename(here / "moved" / "diff")
    verify(here / "result", path_diff=here / "moved" / "diff", data_path=here / "moved" / "data.json")
    told = run([sys.executable, "weight_diff.py", "verify", "--chain", here / "run"], check=False)
    assert told.returncode == 2 and "error: link 1 of 5, data file" in told.stderr and "Traceback" not in told.stderr


def record(here, change):
    path = here / "run" / "alpaca_run.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def flip(path, position=-1):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def changed(path):
    path.write_text(path.read_text().replace("xor", "XOR"))


BREAKS = {
    "no data file": (lambda h: (h / "rows.json").unlink(), "link 1 of 5, data file: .*rows.json is missing"),
    "another data file": (lambda h: flip(h / "rows.json", 30), "link 1 of 5, .*the run read .*: it was changed"),
    "a folder for a file": (
        lambda h: [(h / "rows.json").unlink(), (h / "rows.json").mkdir()],
        "link 1 of 5.*cannot be read",
    ),
    "no record": (
        lambda h: (h / "run" / "alpaca_run.json").unlink(),
        "link 2 of 5, run record: .*alpaca_run.json is missing or damaged",
    ),
    "a torn record": (lambda h: (h / "run" / "alpaca_run.json").write_text("{"), "alpaca_run.json is missing or dam"),
    "an older record": (lambda h: record(h, lambda r: r["contract"].pop("data")), "link 1 .* no digest of a data file"),
    "data of the hub": (
        lambda h: record(h, lambda r: r["contract"].update(data={"file": "tatsu-lab/alpaca"})),
        "link 1 of 5, data file: .* no digest of a data file",
    ),
    "strange data": (lambda h: record(h, lambda r: r["contract"].update(data=[7])), "link 1 .* no digest of a data"),
    "an unfinished run": (lambda h: record(h, lambda r: r.update(finished=False)), "link 2 of 5.* is not finished"),
    "no digests": (lambda h: record(h, lambda r: r.pop("model")), "link 2 of 5, run record: .* no digests of the mod"),
    "changed weights": (lambda h: flip(h / "run" / "model.safetensors"), "link 3 of 5, model: .*it was changed"),
    "a changed config": (lambda h: flip(h / "run" / "config.json", 1), "link 3 of 5, model: .*config.json is not what"),
    "a file too few": (lambda h: (h / "run" / "tokenizer_config.json").unlink(), "link 3 .* is missing since the run"),
    "a file too many": (lambda h: (h / "run" / "merges.txt").write_text("a b"), "link 3 .* is new since the run"),
    "a name outside": (
        lambda h: record(h, lambda r: r["model"].update({"../rows.json": "0"})),
        "link 3 of 5.*rows.json is missing since",
    ),
    "a damaged diff": (lambda h: changed(h / "diff" / "weight_diff.json"), "link 4 of 5, diff manifest: .*damaged or "),
    "no JSON": (lambda h: (h / "diff" / "weight_diff.json").write_text("{"), "link 4 of 5, .*cannot be read as JSON"),
    "no diff": (lambda h: shutil.rmtree(h / "diff"), "link 4 of 5, diff manifest: .*diff is missing"),
    "no run": (lambda h: shutil.rmtree(h / "run"), "link 2 of 5, run record: nothing says where the run is; give"),
    "another result": (lambda h: flip(h / "result" / "model.safetensors"), "link 5 of 5, recovered folder: .*1 of 21"),
    "no places": (lambda h: (h / "result" / "alpaca_chain.json").unlink(), "link 4 .* nothing says where the diff is"),
    "a place that is none": (
        lambda h: (h / "result" / "alpaca_chain.json").write_text('{"diff": 7}'),
        "link 4 .* nothing says",
    ),
    "broken places": (lambda h: (h / "result" / "alpaca_chain.json").write_text("{"), "cannot be read as JSON"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BREAKS)
def test_the_first_link_that_is_missing_or_broken(here, case):
    change, message = BREAKS[case]
    change(here)
    with pytest.raises(UsageError, match=message):
        verify(here / "result")


@pytest.mark.slow
def test_a_diff_of_another_model(here, tiny):
    state = state_of(here / "run")
    state["lm_head.weight"] += 1
    other = shutil.copytree(here / "run", here / "other")
    save_file(state, other / "model.safetensors", {"format": "pt"})
    make(here / "base", other, here / "diff", overwrite=True)
    with pytest.raises(UsageError, match="link 4 of 5, diff manifest: .*1 of 21 tensors are not those of the manifest"):
        verify(here / "run", path_diff=here / "diff", path_tuned=here / "result")


@pytest.mark.slow
def test_links_that_are_not_given(here):
    with pytest.raises(UsageError, match="link 4 of 5, diff manifest: nothing says where .*; give it as --path_diff"):
        verify(here / "run")
    with pytest.raises(UsageError, match="link 5 of 5, recovered folder: nothing says where .*give it as --path_tuned"):
        verify(here / "diff")
    with pytest.raises(UsageError, match="no such folder"):
        verify(here / "nowhere")
    with pytest.raises(UsageError, match="verify needs --path_diff, --path_tuned"):
        weight_diff.verify()


@pytest.mark.slow
def test_what_is_noted_names_no_place_of_this_machine(made):
    for name in ("diff/weight_diff.json", "result/alpaca_chain.json", "run/alpaca_run.json"):
        assert str(made) not in (made / name).read_text()
    assert json.loads((made / "result" / "alpaca_chain.json").read_text()) == {"diff": os.path.join("..", "diff")}
    assert json.loads((made / "diff" / "weight_diff.json").read_text())["tuned"] == "run"


@pytest.mark.slow
@pytest.mark.parametrize("name", [7, "..", "../run", "/", "", "\0", None])
def test_a_manifest_that_names_another_folder(here, name):
    path = here / "diff" / "weight_diff.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tuned": name}))
    with pytest.raises(UsageError, match="link 2 of 5, run record: nothing says where the run is"):
        verify(here / "result")
