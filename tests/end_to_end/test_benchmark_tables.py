"""The figures that benchmarks.train derives from its turns."""

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
    turns = {"old": [{"failed": "out of memory"}], "new": [turn([1, 1], peak_GB=100.04, others=0.3)]}
    result = summarize(turns, [], parameters=10**9, flops=1e14)
    new = result["new"]
    assert (new["reference"], new["speedup"], new["peak_GB"], new["mfu"]) == ("new", 1.0, 100.0, 0.24)
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
