"""The figures that benchmarks.train derives from its turns."""

import pytest

from benchmarks import roofline
from benchmarks.training_tables import render, summarize


def turn(seconds: list[float], loss: float = 2.0, **more: float) -> dict:
    return {
        "seconds": seconds,
        "examples": [32] * len(seconds),
        "tokens": [4000] * len(seconds),
        "loss": loss,
        "grad_norm": 1.0,
        "others": 0.0,
        **more,
    }


def test_ratios_are_taken_within_a_round():
    """The machine is half as fast in the second round: the ratio is not."""
    turns = {
        "old": [turn([4, 4]), turn([8, 8])],
        "new": [turn([2, 2], 2.002), turn([4, 4])],
        "own": [{**turn([2, 2]), "examples": [16, 16]}] * 2,
        "gone": [{"failed": "out of memory"}],
    }
    result = summarize(turns, ["own"], parameters=10**9, flops=None)
    assert result["new"]["speedup_of_rounds"] == [2.0, 2.0]
    assert (result["new"]["loss_difference"], result["new"]["grad_norm_difference"]) == (1e-3, 0)
    assert result["own"]["speedup_of_rounds"] == [1.0, 2.0] and "loss_difference" not in result["own"]
    assert result["gone"] == {"failed": "out of memory"}


def test_a_reference_that_failed_is_not_one():
    turns = {"old": [{"failed": "out of memory"}], "new": [turn([1, 1], peak_GB=100.04, others=0.3, mfu=[0.2, 0.25])]}
    turns["other"] = [turn([2, 2], peak_GB=1.0)]  # counts nothing itself
    result = summarize(turns, [], parameters=10**9, flops=1e14)
    new = result["new"]
    assert (new["reference"], new["speedup"], new["peak_GB"], new["useful_mfu"]) == ("new", 1.0, 100.0, 0.24)
    assert new["mfu"] == 0.225 and "mfu" not in result["other"] and result["other"]["useful_mfu"] == 0.12
    section = {
        "contenders": result,
        "model": {"parameters": 10**9, "num_hidden_layers": 2},
        "commit": None,
        "machine": {"gpu": "a card"},
        "tokens_of_rows": {"rows": 1000, "mean": 129.0, "median": 114},
        "matmul_TFLOP_per_s": 100.0,
        "arithmetic": "bfloat16",
        "examples_per_step": 128,
    }
    lines = render({"items": section}).splitlines()
    table = [line.split(" | ") for line in lines if line.startswith("|")]
    assert len({len(line) for line in table}) == 1 and table[2][:2] == ["| old", "out of memory"]
    assert "took up to 30% of the cores" in lines[-1]


# ---- the limit on paper ----


def test_operations_and_bytes_by_hand():
    seven = roofline.SEVEN
    assert seven.parameters == 6_738_415_616
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    assert roofline.operations_of_token(seven, False, 1) == 6 * weights + 12 * 32 * 4096
    assert roofline.operations_of_token(seven, True, 1) == 4 * weights + 12 * 32 * 4096
    inside, outside = roofline.traffic(seven, False, 4, hybrid=False)
    assert (inside, outside) == (8 * seven.parameters * 3 / 4, 0)
    inside, outside = roofline.traffic(seven, False, 16, hybrid=False)
    assert (inside, outside) == (8 * seven.parameters * 7 / 8, 8 * seven.parameters / 2 / 8)
    _, hybrid = roofline.traffic(seven, False, 16, hybrid=True)
    assert hybrid == outside, "with one pass a step both ways send as much"
    full = roofline.traffic(seven, False, 16, hybrid=False, passes=4)[1]
    assert roofline.traffic(seven, False, 16, hybrid=True, passes=4)[1] == hybrid < full


def test_no_published_figure_exceeds_its_bound():
    reports = roofline.published()
    assert len(reports) == 6 and all(0.1 < report["mfu"] < 1 for report in reports)
    assert all(report["tokens_per_s_and_gpu"] < report["bound"] for report in reports)
    assert reports[0]["tokens_per_s_and_gpu"] == pytest.approx(52002 * 3 * 129 / (79 * 60 * 4), abs=1)


def test_more_gpus_and_faster_networks_are_never_slower_on_paper_until_the_network_bounds():
    lines = roofline.table(0.45)
    assert len(lines) == 3 * 3 * (2 + 2 * 2)
    for line in lines:
        assert line["expected_s"] >= line["bound_s"] >= line["compute_s"] and line["expected_s"] <= line["full_shard_s"]
        assert (line["bound_by"] == "compute") == (line["rows_to_be_bound_by_compute"] <= roofline.BATCH)
    seconds = {(line["model"], line["card"], line["gpus"], line["network"]): line["expected_s"] for line in lines}
    for model, card, gpus, network in seconds:
        if network == "400 Gb/s":
            assert seconds[model, card, gpus, network] <= seconds[model, card, gpus, "200 Gb/s"]
        if gpus == 8:
            assert seconds[model, card, 8, "NVLink"] < seconds[model, card, 4, "NVLink"]
