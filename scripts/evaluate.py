"""How good a model is, by the measures of the published ones. Four tasks:

    python -m scripts.evaluate backward --pred answers.json                     # BLEU, ROUGE of generated instructions

They need `pip install -c constraints.txt -r scripts/requirements.txt`, except for win_rate and alpaca_eval.
"""

import json
from pathlib import Path
from typing import Any

from alpaca import commands
from alpaca.errors import UsageError, reported
from alpaca.files import atomic_write
from alpaca.overlap import ROUGE, overlap, worst
from alpaca.pairing import load_named, partners
from alpaca.prompts import instruction_and_input
from alpaca.row_answers import first_of


# ---- backward: generated instructions against the true ones ----


def backward(
    pred: str, reference: str | None = None, output_path: str | None = None, show_worst: int = 10,
    bleu_tokenizer: str = "13a",
) -> None:  # fmt: skip
    """BLEU and ROUGE-1, -2, -L of the instructions that a backward model has written, against the true ones.

    Args:
        pred: what scripts.generate --backward wrote: `output` is the instruction generated for the text `instruction`,
            `reference` the true one.
        reference: a file that train.py takes, with outputs and their true instructions, where pred has no `reference`.
        output_path: JSON for the scores, those of each row too; not given, <pred without .json>.scores.json.
        show_worst: rows to print, those with the lowest ROUGE-L.
        bleu_tokenizer: of sacrebleu: 13a, intl, zh, char ...

    Raises:
        UsageError: a file is malformed, a text has no true instruction, or sacrebleu or rouge_score is missing.
    """
    rows = load_named(pred, "--pred")
    true = _true_instructions(rows, pred, reference)
    scores = overlap([row["output"] for row in rows], true, bleu_tokenizer)
    lines = [f"{len(rows)} rows    BLEU {scores['bleu']:.2f}    " + "    ".join(
        f"{told} {scores[name]:.2f}" for name, told in ROUGE.items())]  # fmt: skip
    lines += [scores["bleu_signature"], scores["rouge_settings"]]
    lines.append("mean length: " + ", ".join(
        f"{scores[f'generated_{unit}']:.1f} {unit} generated, {scores[f'true_{unit}']:.1f} true"
        for unit in ("words", "characters")))  # fmt: skip
    for told, name in (("generated instructions are empty", "empty"),
                       ("true instructions have no a-z or 0-9: their ROUGE is 0, whatever is generated", "not_latin")):
        if scores[name]:
            lines.append(f"note: {len(scores[name])} {told} (rows {first_of(scores[name])})")
    lines += [_bad_row(number, scores["rows"][number], rows[number]["output"], true[number])
              for number in worst(scores["rows"], show_worst)]  # fmt: skip
    print("\n".join(lines))
    for row, text, truth in zip(scores["rows"], rows, true):
        row |= {"generated": text["output"], "true": truth}
    _write(output_path or f"{pred.removesuffix('.json')}.scores.json", scores)


def _true_instructions(rows: list[dict[str, Any]], pred: str, reference: str | None) -> list[str]:
    if reference is not None:
        known = load_named(reference, "--reference")
        places = partners([row["instruction"] for row in rows], [row["output"] for row in known],
                          f"--reference {reference}: has no row whose output is the text asked with")  # fmt: skip
        return [instruction_and_input(known[place]) for place in places]
    without = [number for number, row in enumerate(rows) if not isinstance(row.get("reference"), str)]
    if without:
        raise UsageError(
            f"--pred {pred}: {len(without)} of {len(rows)} rows have no `reference` (rows {first_of(without)}); "
            "expected what scripts.generate --backward writes, or give the file with the true instructions: --reference"
        )
    return [row["reference"] for row in rows]


def _bad_row(number: int, scores: dict[str, Any], text: str, truth: str) -> str:
    return f"row {number}: ROUGE-L {scores['rougeL']:.1f}, BLEU {scores['bleu']:.1f}  {text!r:.70} for {truth!r:.70}"


# ---- what they share ----


def _write(path: str | Path, result: Any) -> None:
    try:
        with atomic_write(path) as file:
            json.dump(result, file, indent=2, default=str)
    except OSError as error:
        raise UsageError(f"--output_path {path}: cannot be written ({error.strerror})") from error
    print(f"wrote {path}")


def main() -> None:
    tasks = (backward,)
    commands.run("scripts.evaluate", {task.__name__: task for task in tasks})


if __name__ == "__main__":
    with reported("scripts.evaluate"):
        main()
