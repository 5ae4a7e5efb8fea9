"""make tour: every command of the product in one story, as a newcomer starts it."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from conftest import run

from scripts import quickstart

BESIDE = Path(sys.prefix) / "evaluation"  # where make installs lm-eval


@pytest.mark.slow
@pytest.mark.stress
def test_tour(tmp_path):
    path = os.pathsep.join(filter(None, [str(BESIDE), os.environ.get("PYTHONPATH")]))
    words = [sys.executable, "-m", "scripts.quickstart", "--tour", "--folder", tmp_path / "tour"]
    told = run(words, env={"PYTHONPATH": path}, timeout=900).stdout
    rows = json.loads((tmp_path / "tour" / "alpaca_data.json").read_text())
    seeds = (tmp_path / "tour" / "seed_tasks.jsonl").read_text()
    assert len(rows) >= quickstart.TASKS and not any(json.dumps(row["instruction"])[1:-1] in seeds for row in rows)
    assert told.count("\nproved: ") == 2
    expected = "\n".join(row["output"] for row in quickstart.short_rows(rows, 3))
    assert told.count(expected) == 2, "what the recovered model says, and what it was trained on"
    known, known_base, wins = map(int, re.search(r"of four: (\d+)%, its base (\d+)%.*stand-in: (\d+)%", told).groups())
    assert known > 90 and known_base < 60 and wins > 90


def test_the_tour_needs_the_harness(monkeypatch, tmp_path):
    monkeypatch.setattr(quickstart, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["quickstart", "--tour", "--folder", str(tmp_path / "tour")])
    with pytest.raises(SystemExit, match="tour: lm-eval is not installed.*pip install"):
        quickstart.main()
    assert not (tmp_path / "tour").exists()
