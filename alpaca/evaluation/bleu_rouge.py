"""How much of the true texts is in the generated ones: BLEU as sacrebleu computes it and ROUGE-1, -2 and -L as
rouge_score does, of all rows and of each."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from alpaca.common.errors import ParameterError, UsageError, format_first

INSTALL = "pip install -c constraints.txt -r scripts/requirements.txt"
ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


def overlap(generated: Sequence[str], true: Sequence[str], bleu_tokenizer: str = "13a") -> dict[str, Any]:
    """Return scores from 0 to 100 of `generated` against one true text each.

    Returns: `bleu` (of the corpus) with sacrebleu's signature, `rouge1`, `rouge2` and `rougeL` (means of the rows' F1),
    mean lengths, `rows` with the same of each (BLEU of one row with as many n-gram orders as it has), and numbers of
    rows that are `empty` or whose true text ROUGE sees nothing of, `not_latin`.

    Raises:
        UsageError: a library is missing, or the tokenizer is none of sacrebleu's, or cannot be had here.
    """
    try:
        from rouge_score import rouge_scorer, tokenizers
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise UsageError(f"BLEU and ROUGE need sacrebleu and rouge_score: {INSTALL} ({error})") from error
    if bleu_tokenizer not in BLEU.TOKENIZERS:
        raise ParameterError(
            f"{{bleu_tokenizer}} {bleu_tokenizer}: expected one of {', '.join(BLEU.TOKENIZERS)}", "bleu_tokenizer"
        )
    try:
        corpus, single = BLEU(tokenize=bleu_tokenizer), BLEU(tokenize=bleu_tokenizer, effective_order=True)
    except Exception as error:  # some need a library, or download their model
        raise ParameterError(
            f"{{bleu_tokenizer}} {bleu_tokenizer}: cannot be had ({' '.join(str(error).split())}); 13a, intl, zh and "
            "char need nothing",
            "bleu_tokenizer",
        ) from error
    words = tokenizers.DefaultTokenizer(use_stemmer=True)
    scorer = rouge_scorer.RougeScorer(list(ROUGE), tokenizer=words)
    rows = []
    for text, truth in zip(generated, true):
        rouge = {name: 100 * score.fmeasure for name, score in scorer.score(truth, text).items()}
        lengths = {"generated_words": len(text.split()), "true_words": len(truth.split())}
        rows.append({"bleu": single.sentence_score(text, [truth]).score, **rouge, **lengths})
    return {
        "bleu": corpus.corpus_score(list(generated), [list(true)]).score,
        "bleu_signature": str(corpus.get_signature()),
        **{name: fmean(row[name] for row in rows) for name in ROUGE},
        "rouge_settings": "rouge_score: F1, lower case, tokens of a-z and 0-9, Porter stemmer; mean of the rows",
        **{name: fmean(row[name] for row in rows) for name in ("generated_words", "true_words")},
        "generated_characters": fmean(map(len, generated)),
        "true_characters": fmean(map(len, true)),
        "empty": [row for row, text in enumerate(generated) if not text.strip()],
        "not_latin": [row for row, truth in enumerate(true) if truth.strip() and not words.tokenize(truth)],
        "rows": rows,
    }


def worst(rows: Sequence[dict[str, Any]], count: int) -> list[int]:
    """Return the numbers of the rows with the lowest ROUGE-L, and BLEU where that is equal."""
    return sorted(range(len(rows)), key=lambda row: (rows[row]["rougeL"], rows[row]["bleu"]))[:count]


def summary(scores: dict[str, Any], texts: Sequence[str], true: Sequence[str], show_worst: int) -> list[str]:
    """Return lines that say the scores of `overlap`, and the `show_worst` rows with the lowest ROUGE-L."""
    rouge = [f"{title} {scores[name]:.2f}" for name, title in ROUGE.items()]
    lengths = [
        f"{scores[f'generated_{unit}']:.1f} {unit} generated, {scores[f'true_{unit}']:.1f} true"
        for unit in ("words", "characters")
    ]
    lines = [
        "    ".join([f"{len(texts)} rows", f"BLEU {scores['bleu']:.2f}", *rouge]),
        scores["bleu_signature"],
        scores["rouge_settings"],
        f"mean length: {', '.join(lengths)}",
    ]
    for name, problem in (
        ("empty", "generated instructions are empty"),
        ("not_latin", "true instructions have no a-z or 0-9: their ROUGE is 0, whatever is generated"),
    ):
        if scores[name]:
            lines.append(f"note: {len(scores[name])} {problem} (rows {format_first(scores[name])})")
    for number in worst(scores["rows"], show_worst):
        lines.append(_bad_row(number, scores["rows"][number], texts[number], true[number]))
    return lines


def _bad_row(number: int, scores: dict[str, Any], text: str, truth: str) -> str:
    return f"row {number}: ROUGE-L {scores['rougeL']:.1f}, BLEU {scores['bleu']:.1f}  {text!r:.70} for {truth!r:.70}"
