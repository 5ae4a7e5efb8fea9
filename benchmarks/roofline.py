"""What an optimizer step can take at least: floating point operations and bytes of FSDP, by card, number and network.

    python -m benchmarks.roofline [--efficiency 0.45] [--output benchmarks/results/roofline.json]

All of it is computed, nothing is measured. A step has 128 rows of 129 tokens, as Alpaca has with LLaMA's tokenizer.

compute      operations (alpaca/training/metrics.py, Cost) / the data sheet's dense rate
traffic      bytes that a GPU receives in a step: every weight twice in bfloat16 (forward, backward) and its gradient
             once in float32, all but its own share; LoRA has gradients of its matrices only. A hybrid shard gathers
             inside a node, and adds up the gradients of its share over the nodes. With one pass a step both ways send
             as much; with several, a hybrid shard sends less
bound        the longer of the two, as they overlap; --efficiency, which is assumed, is what of the rate is reached

Published figures stand beside their bound: none may exceed it.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpaca.training.metrics import Cost
from benchmarks.machine import write_result

ROWS, TOKENS, EPOCHS, BATCH = 52_002, 129, 3, 128
NODE = 8  # GPUs of a node, each with a network card of its own
NUMBERS = (4, 8, 16, 64)


@dataclass(frozen=True)
class Card:
    bf16: float  # operations a second, dense
    fp8: float
    nvlink: float  # bytes a second that a GPU receives


@dataclass(frozen=True)
class Shape:
    """A LLaMA."""

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    key_value: int  # width of keys and values: hidden, or less with grouped queries

    @property
    def body(self) -> int:
        """Return the weights of all layers that a token is multiplied with."""
        attention = 2 * self.hidden**2 + 2 * self.hidden * self.key_value
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def parameters(self) -> int:
        """Return all of them: with both embeddings and the norms."""
        return self.body + 2 * self.vocabulary * self.hidden + (2 * self.layers + 1) * self.hidden

    def cost(self, lora: bool = False) -> Cost:
        """Return the operations of training it; the matrices of LoRA are left out."""
        each = 4 if lora else 6
        return Cost(each * self.body, each * self.vocabulary * self.hidden, 12 * self.layers * self.hidden)


CARDS = {
    "A100 80 GB": Card(312e12, 312e12, 300e9),
    "H100 SXM": Card(989e12, 1979e12, 450e9),
    "H200 SXM": Card(989e12, 1979e12, 450e9),
}
SEVEN, THIRTEEN = Shape(32, 4096, 11008, 32000, 4096), Shape(40, 5120, 13824, 32000, 5120)
SHAPES = {"LLaMA-7B": (SEVEN, False), "LLaMA-13B": (THIRTEEN, False), "LLaMA-7B, LoRA": (SEVEN, True)}
NETWORKS = {"200 Gb/s": 25e9, "400 Gb/s": 50e9}  # bytes a second of a GPU's card
LLAMA_3_8B = Shape(32, 4096, 14336, 128256, 1024)
PUBLISHED = (  # who; shape, LoRA, card, GPUs, tokens of a sequence, arithmetic; tokens a second and GPU
    (
        "Stanford Alpaca, 2023 (79 min)",
        SEVEN,
        False,
        "A100 80 GB",
        4,
        TOKENS,
        "bf16",
        ROWS * EPOCHS * TOKENS / 4740 / 4,
    ),
    ("torchtitan, Llama-3.1-8B, FSDP", LLAMA_3_8B, False, "H100 SXM", 8, 8192, "bf16", 5762),
    ("torchtitan, compiled", LLAMA_3_8B, False, "H100 SXM", 8, 8192, "bf16", 6667),
    ("torchtitan, compiled, float8", LLAMA_3_8B, False, "H100 SXM", 8, 8192, "fp8", 8532),
    ("NeMo, Llama-2-7B", SEVEN, False, "H100 SXM", 8, 4096, "fp8", 17120),
    ("NeMo, Llama-2-7B, LoRA", SEVEN, True, "H100 SXM", 8, 4096, "fp8", 25206),
)


def operations_of_token(shape: Shape, lora: bool, length: int) -> float:
    """Return those of a token in a sequence of `length`, with all logits; it attends to half of it on average."""
    cost = shape.cost(lora)
    return cost.body + cost.head + cost.attention * (length + 1) / 2


def traffic(shape: Shape, lora: bool, gpus: int, hybrid: bool, passes: int = 1) -> tuple[float, float]:
    """Return the bytes that a GPU receives in a step from GPUs of its node, and over its network card.

    passes: micro-batches of a step; each gathers the weights anew. Gradients are reduced once, held until then.
    """
    weights, gradients = 2 * 2 * shape.parameters * passes, 0 if lora else 4 * shape.parameters
    nodes, inside = max(gpus // NODE, 1), min(gpus, NODE)
    if nodes == 1:
        return (weights + gradients) * (gpus - 1) / gpus, 0.0
    of_node = (weights + gradients) * (inside - 1) / inside
    if hybrid:  # an all-reduce of a share sends it there and back
        return of_node, 2 * gradients / inside * (nodes - 1) / nodes
    return of_node, (weights + gradients) * (nodes - 1) / nodes / inside


def step(shape: Shape, lora: bool, card: Card, gpus: int, network: float, hybrid: bool, efficiency: float) -> dict:
    """Return the seconds of a step of BATCH rows, as bounded and as expected, and what bounds it."""
    compute = BATCH * TOKENS * operations_of_token(shape, lora, TOKENS) / gpus / card.bf16
    inside, outside = traffic(shape, lora, gpus, hybrid)
    communication = max(inside / card.nvlink, outside / network)
    return {
        "compute_s": round(compute, 4),
        "communication_s": round(communication, 4),
        "bound_s": round(max(compute, communication), 4),
        "expected_s": round(max(compute / efficiency, communication), 4),
        "bound_by": "compute" if compute / efficiency >= communication else "communication",
    }


def table(efficiency: float) -> list[dict[str, Any]]:
    """Return a line for each model, card, number of GPUs and network, with the faster way of sharding."""
    lines = []
    for name, (shape, lora) in SHAPES.items():
        for card_name, card in CARDS.items():
            for gpus in NUMBERS:
                networks = NETWORKS if gpus > NODE else {"NVLink": 1.0}
                for network, rate in networks.items():
                    ways = {
                        way: step(shape, lora, card, gpus, rate, way == "hybrid", efficiency)
                        for way in (("full", "hybrid") if gpus > NODE else ("full",))
                    }
                    best = min(ways, key=lambda way: ways[way]["expected_s"])
                    steps = ROWS / BATCH * EPOCHS
                    lines.append(
                        {"model": name, "card": card_name, "gpus": gpus, "network": network, "shard": best}
                        | {"full_shard_s": ways["full"]["expected_s"], **ways[best]}
                        | {"minutes_of_3_epochs": round(steps * ways[best]["expected_s"] / 60, 1)}
                        | {"rows_to_be_bound_by_compute": rows_needed(shape, lora, card, gpus, rate, best, efficiency)}
                    )
    return lines


def rows_needed(shape: Shape, lora: bool, card: Card, gpus: int, network: float, way: str, efficiency: float) -> int:
    """Return the rows of a step from which on the network waits for the GPUs, at one pass a step: with fewer, GPUs are
    idle; more of them by accumulation do not help, as each pass gathers the weights anew."""
    inside, outside = traffic(shape, lora, gpus, way == "hybrid")
    seconds = max(inside / card.nvlink, outside / network)
    return round(seconds * gpus * card.bf16 * efficiency / TOKENS / operations_of_token(shape, lora, TOKENS))


def published() -> list[dict[str, Any]]:
    """Return the published figures, what bounds them, and the share of the data sheet's rate that they imply."""
    lines = []
    for who, shape, lora, card_name, gpus, length, arithmetic, rate in PUBLISHED:
        card = CARDS[card_name]
        operations = operations_of_token(shape, lora, length)
        able = getattr(card, arithmetic)
        lines.append(
            {"who": who, "card": f"{gpus} x {card_name}", "arithmetic": arithmetic, "tokens_per_s_and_gpu": round(rate)}
            | {"bound": round(able / operations), "mfu": round(rate * operations / able, 3)}
        )
    return lines


def markdown(lines: list[dict[str, Any]], reports: list[dict[str, Any]]) -> str:
    head = "model, card, GPUs, network, shard, s a step, bound by, 3 epochs in min, rows from which compute bounds"
    text = ["| " + " | ".join(head.split(", ")) + " |", "|---" * 9 + "|"]
    keys = "model card gpus network shard expected_s bound_by minutes_of_3_epochs rows_to_be_bound_by_compute".split()
    for line in lines:
        if line["card"] != "H200 SXM":  # as the H100, which has the same rates
            text.append("| " + " | ".join(str(line[key]) for key in keys) + " |")
    text += ["", "| published | card | arithmetic | tokens/s and GPU | bound | MFU |", "|---" * 6 + "|"]
    for report in reports:
        text.append("| " + " | ".join(map(str, report.values())) + " |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--efficiency", type=float, default=0.45, help="assumed: of the rate in compute")
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    options = parser.parse_args()
    if not 0 < options.efficiency <= 1:
        parser.error(f"--efficiency {options.efficiency}: expected more than 0, 1 at most")
    lines, reports = table(options.efficiency), published()
    print(markdown(lines, reports))
    if options.output:
        what = "computed, not measured; the efficiency is assumed"
        result = {"what": what, "efficiency": options.efficiency, "steps": lines, "published": reports}
        write_result(result, [], options.output)


if __name__ == "__main__":
    main()
