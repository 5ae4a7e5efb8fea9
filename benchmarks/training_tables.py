"""From the turns of benchmarks.train to its result file, and from that to Markdown."""

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

Turn = Mapping[str, Any]
DISTURBED = 0.1  # share of the cores; torch's threads wait for each other, so a little costs much


def difference(value: float, reference: float) -> float:
    """Relative, to two digits."""
    return float(f"{abs(value - reference) / abs(reference):.1e}")


def speed(turn: Turn, of: str = "examples") -> float:
    """Examples (or tokens) a second over the timed steps of a turn."""
    return sum(turn[of]) / sum(turn["seconds"])


def idle(turns: Sequence[Turn]) -> float:
    """Share of the timed steps in which the device waits for the host to fetch their rows."""
    waits = [wait for turn in turns for wait in turn.get("waits", [])]
    return sum(waits) / sum(second for turn in turns for second in turn["seconds"])


def summarize(
    turns: Mapping[str, Sequence[Turn]], own_rows: Collection[str], parameters: int, flops: float | None
) -> dict[str, dict[str, Any]]:
    """The first contender that did not fail is the reference. `speedup` is the median over the rounds of the ratio of
    examples per second to the reference's in the same round. Loss and gradient norm are those of the first step,
    compared except for contenders in `own_rows`. With `flops`, the card's matmul rate, `useful_mfu` is 6 x
    `parameters` x tokens without padding a second / flops. `mfu`: of what was computed, where the trainer counts it.
    `idle_share`: see `idle`."""
    reference = next((name for name, mine in turns.items() if "failed" not in mine[0]), None)
    result: dict[str, dict[str, Any]] = {}
    for name, mine in turns.items():
        if "failed" in mine[0]:
            result[name] = {"failed": mine[0]["failed"]}
            continue
        ratios = [speed(turn) / speed(other) for turn, other in zip(mine, turns[reference])]
        seconds = [second for turn in mine for second in turn["seconds"]]
        examples = [count for turn in mine for count in turn["examples"]]
        tokens_per_second = statistics.median(speed(turn, "tokens") for turn in mine)
        result[name] = {
            "reference": reference,
            "speedup": round(statistics.median(ratios), 3),
            "speedup_of_rounds": [round(ratio, 3) for ratio in ratios],
            "examples_per_second": round(statistics.median(map(speed, mine)), 2),
            "tokens_per_second": round(tokens_per_second, 1),
            "examples_per_step": round(statistics.mean(examples), 1),
            "seconds_of_steps": [[round(second, 3) for second in turn["seconds"]] for turn in mine],
            "seconds_per_step": round(statistics.mean(seconds), 3),
            "idle_share": round(idle(mine), 4),
            "cores_taken_by_others": [round(max(turn["others"], 0), 2) for turn in mine],
            "first_loss": mine[0]["loss"],
            "first_grad_norm": mine[0]["grad_norm"],
        }
        if name in own_rows:
            result[name]["own_rows"] = True
        else:
            for key in ("loss", "grad_norm"):
                result[name][f"{key}_difference"] = difference(mine[0][key], turns[reference][0][key])
        if flops:
            result[name]["peak_GB"] = round(max(turn["peak_GB"] for turn in mine), 1)
            result[name]["useful_mfu"] = round(6 * parameters * tokens_per_second / flops, 3)
        if counted := [share for turn in mine for share in turn.get("mfu", [])]:
            result[name]["mfu"] = round(statistics.median(counted), 3)
    return result


def row(name: str, one: Mapping[str, Any], gpu: bool) -> list[str]:
    if "failed" in one:
        return [name, one["failed"]]
    rounds = one["speedup_of_rounds"]
    spread = f" ({min(rounds):.2f}–{max(rounds):.2f})" if len(rounds) > 1 else ""
    cells = [
        name,
        f"{one['speedup']:.2f}{spread}",
        f"{one['examples_per_second']:.1f}",
        f"{one['seconds_per_step']:.2f}",
        f"{one['examples_per_step']:g}",
    ]
    if gpu:
        cells += [f"{one['tokens_per_second']:,.0f}", f"{one['useful_mfu']:.1%}"]
        cells += [f"{one['mfu']:.1%}" if "mfu" in one else "-", f"{one['peak_GB']:.0f}"]
        cells.append(f"{one['idle_share']:.1%}" if "idle_share" in one else "-")
    same = "other rows" if one.get("own_rows") else f"{one['loss_difference']:.0e}, {one['grad_norm_difference']:.0e}"
    return [*cells, same]


def render(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown of a result file: a heading and a table for each section."""
    text = []
    for name, section in sections.items():
        model, rows, machine = section["model"], section["tokens_of_rows"], section["machine"]
        gpu = section["matmul_TFLOP_per_s"] is not None
        place = (
            f"{machine['gpu']}, {section['matmul_TFLOP_per_s']:.0f} TFLOP/s in bfloat16 products"
            if gpu
            else (f"{machine['cores']} cores of {machine['cpu']}")
        )
        reference = next((one["reference"] for one in section["contenders"].values() if "reference" in one), "none")
        head = ["", f"times as fast as *{reference}*", "examples/s", "s a step", "examples a step"]
        head += ["tokens/s", "useful MFU", "MFU", "peak GB", "idle"] * gpu + ["loss, gradient norm of step 1 differ by"]
        table = [row(contender, one, gpu) for contender, one in section["contenders"].items()]
        text += [
            f"### {name}",
            "",
            f"{place}; Llama of {model['parameters'] / 1e6:,.0f} M parameters ({model['num_hidden_layers']} layers), "
            f"{section['arithmetic']}; {section['examples_per_step']} examples a step; {rows['rows']} rows of "
            f"{rows['mean']:g} tokens (median {rows['median']}); commit {section['commit']}",
            "",
            *("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head))),
            *("| " + " | ".join(cells + [""] * (len(head) - len(cells))) + " |" for cells in table),
            "",
        ]
        shares = [one.get("cores_taken_by_others", [0]) for one in section["contenders"].values()]
        taken = max(map(max, shares))
        if taken > DISTURBED:
            text += [f"Other processes took up to {taken:.0%} of the cores during a turn: measure again.", ""]
    return "\n".join(text)
