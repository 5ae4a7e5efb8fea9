"""Instruction backtranslation (arXiv 2308.06259): the pairs of a backward model, how they are rated, what is read
from a rating and chosen by it, and how the chosen pairs are mixed with the seed data.
"""

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from alpaca.common.errors import InputError, format_first
from alpaca.completions.api import was_cut
from alpaca.data.prompts import PROMPT_DICT, instruction_and_input
from alpaca.data.rows import Row

SEED_TAG = "Answer in the style of an AI Assistant."
LONGEST_SCORE = 500  # characters of a line with a score; the pattern takes the cube of a line's length at worst
AUGMENTED_TAG = "Answer with knowledge from web search."

# The paper's scale in words of our own. Reason first: what a model writes then is what its score follows from.
_RATING = """\
Judge how well the answer below does as the reply of an AI assistant to the instruction below. Rate it on this scale:

1: It misses what was asked: off topic, vague, cut off, or mostly advertising or navigation of a web page.
2: It covers most of what was asked, but only indirectly; it was not written to answer this.
3: It helps and covers the basics, but speaks as somebody else: the author of a blog or a web page, with experiences, \
opinions or a context of their own.
4: It is an assistant's reply: to the point, complete and well ordered, with little that could be better, such as its \
length or focus.
5: It is an excellent assistant's reply: deliberate, written for this instruction, with expert knowledge, clear and \
without anything superfluous.

Instruction:
{instruction}

Answer:
{output}

First give the reason for your rating in a few sentences. Then write the rating alone on the last line, as "Score: " \
and a number from 1 to 5; halves such as 3.5 are possible."""

# A line that is "Score: 4", "**Score:** 4.5/5", "- My final score = 4 (out of 5).", "Score: 4 stars"
# or "Score: 1 (off topic)". In a sentence, or with another number behind it ("Score: 3 or 4"), it says nothing certain.
# A minus is no decoration.
_SCORE = re.compile(
    r"""[\W_]* (?:(?:the|my|final|overall)\s+){0,2} score\b
    [\s*_`"']* (?:\([^)]*\))? [\s*_`"']* (?:[:：=]|\bis\b) [\s*_`"'(\[]* (?P<score>\d+(?:[.,]\d+)?)
    (?: [\s*_`"'()\]]* (?:/|(?:out\s+)?of\b) \s* (?P<of>\d+(?:\.\d+)?) )?
    [^\w%/(]* (?:(?:stars|points)\b [^\w%/(]*)? (?:\([^()\d%/]*\) [^\w%/]*)? $""",
    re.IGNORECASE | re.VERBOSE,
)


def pairs_of(
    texts: Sequence[str], answers: Mapping[int, dict[str, Any]], keep_cut: bool
) -> tuple[list[Row], dict[str, list[int]]]:
    """Return rows made of the journal entries of a backward model, by the number of their text; and the numbers of
    those that are no good, by reason."""
    rows, spoiled = [], {}
    for number, entry in answers.items():
        instruction = entry["text"].strip()
        if not instruction:
            spoiled.setdefault("empty_instruction", []).append(number)
        elif was_cut(entry["finish_reason"]) and not keep_cut:
            spoiled.setdefault("cut_instruction", []).append(number)
        else:
            rows.append({"instruction": instruction, "output": texts[number], "source": number})
    return rows, spoiled


def rating_prompt(row: Mapping[str, Any]) -> str:
    """Return what a rater is asked about one row."""
    before, between, after = re.split(r"\{instruction\}|\{output\}", _RATING)
    return f"{before}{instruction_and_input(row)}{between}{row['output']}{after}"


def parse_score(text: str, cut: bool = False) -> tuple[float | None, str | None]:
    """Return the score of a rating, from 1 to 5, or why there is none: no_score, cut, out_of_range, or contradiction.

    It stands on the last line; in a text that goes on behind it, on any line, if no other line says something else. A
    text that was `cut`, by `was_cut`, may be about to say something else: there, on the last line alone.
    """
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    found = [match for line in lines[-1:] if (match := _score_in(line))]
    if cut and not found:
        return None, "cut"
    found = found or [match for line in lines if (match := _score_in(line))]
    scores = {_value(match) for match in found}
    if len(scores) != 1:
        return None, "contradiction" if scores else "no_score"
    (score,) = scores
    return (score, None) if score is not None else (None, "out_of_range")


def _score_in(line: str) -> re.Match[str] | None:
    return _SCORE.match(line) if len(line) <= LONGEST_SCORE else None


def _value(match: re.Match[str]) -> float | None:
    """Return the score, or None if it is not on the scale from 1 to 5."""
    score = float(match["score"].replace(",", "."))
    return score if 1 <= score <= 5 and float(match["of"] or 5) == 5 else None


def rated_row(row: Row, texts: Sequence[str | None], cut: Sequence[bool] | None = None) -> Row:
    """Return the row with the rater's `texts` (None: no answer), the `ratings` read from them, what stands in the way
    where there is none, and the `score`: their mean, or None. cut: which of the texts were, at their longest."""
    cut = cut or [False] * len(texts)
    read = [parse_score(text, c) if text is not None else (None, "no_answer") for text, c in zip(texts, cut)]
    scores = [score for score, _ in read if score is not None]
    ratings = [score if score is not None else problem for score, problem in read]
    mean = round(sum(scores) / len(scores), 6) if scores else None
    return {**row, "score": mean, "ratings": ratings, "texts": list(texts)}


class Curation:
    """Rated rows: what they score, and which to choose.

    Raises:
        InputError: there are none, or a row is not one of `rated_row`'s, by its number.
    """

    def __init__(self, rows: Sequence[Row], path: str):
        self.rows, self.path = rows, path
        if not rows:
            raise InputError(f"{path}: has no rows; expected curate's file", path)
        for number, row in enumerate(rows):
            if problem := _fault(row):
                raise InputError(f"{path}, row {number}: {problem}", path)
        self.scores = [row["score"] for row in rows if row["score"] is not None]
        self.unread = [number for number, row in enumerate(rows) if row["score"] is None]
        self.ratings = Counter("read" if not isinstance(r, str) else r for row in rows for r in row["ratings"])

    def chosen(self, threshold: float) -> list[Row]:
        """Return the rows that reach the threshold, without their ratings."""
        return [
            {name: value for name, value in row.items() if name not in ("ratings", "texts")}
            for row in self.rows
            if row["score"] is not None and row["score"] >= threshold
        ]

    def report(self, threshold: float) -> dict[str, Any]:
        return {
            "ratings_path": self.path,
            "pairs": len(self.rows),
            "threshold": threshold,
            "chosen": len(self.chosen(threshold)),
            "ratings": dict(self.ratings),
            "pairs_without_a_score": self.unread,
            "histogram": histogram(self.scores),
        }

    def summary(self, threshold: float) -> str:
        """Return counts, the histogram, and what is suspicious about them."""
        total, read = self.ratings.total(), self.ratings["read"]
        problems = ", ".join(f"{name} {count:,}" for name, count in self.ratings.items() if name != "read")
        lines = [f"{len(self.rows):,} pairs, {total:,} ratings, {read:,} of them readable"]
        if problems:
            lines[0] += f" ({problems})"
        if self.unread:
            lines.append(
                f"{len(self.unread):,} pairs have no score and are not chosen (rows {format_first(self.unread)})"
            )
        counts = histogram(self.scores)
        for score, count in counts.items():
            bar = "#" * -(-40 * count // max(1, *counts.values()))
            lines.append(f"  {score} | {bar} {count:,} ({count / max(len(self.scores), 1):.1%})")
        if read < 0.8 * total:
            lines.append("warning: many ratings cannot be read; a stronger rater, or longer answers, may help")
        if flat := undecided(self.scores):
            lines.append(
                f"warning: {flat[1]:,} of {len(self.scores):,} pairs score {flat[0]:g}: this rater hardly "
                "tells them apart; take another one, or average several ratings"
            )
        return "\n".join([*lines, f"{len(self.chosen(threshold)):,} pairs score {threshold:g} or more"])


def _fault(row: Any) -> str | None:
    """Return why a row is not one of `rated_row`'s."""
    if not isinstance(row, Mapping) or not isinstance(row.get("ratings"), list) or "score" not in row:
        return "has no score and ratings; expected curate's file"
    score = row["score"]
    if score is None:
        return None
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        return f"its score is {type(score).__name__} {score!r}, expected a number from 1 to 5, or null"
    return None if 1 <= score <= 5 else f"its score is {score}, expected 1 to 5, or null"


def histogram(scores: Sequence[float]) -> dict[str, int]:
    """Return {"1.0": 3, "1.5": 0, …, "5.0": 1}: how many are at least that and less than half a point more."""
    counts = Counter(int(score * 2) for score in scores)
    return {str(half / 2): counts[half] for half in range(2, 11)}


def undecided(scores: Sequence[float]) -> tuple[float, int] | None:
    """Return the score that nine of ten pairs have, where there are several, and how many do."""
    score, count = Counter(scores).most_common(1)[0] if len(scores) > 1 else (0.0, -1)
    return (score, count) if count >= 0.9 * len(scores) else None


def tagged(instruction: str, *tags: str) -> str:
    """Return the instruction and, after an empty line, the sentences that say where its answer comes from."""
    return f"{instruction}\n\n{' '.join(tags)}"


def inference_templates() -> dict[str, str]:
    """Return Alpaca's prompts with both tags, as the paper asks its models: better than either one there."""
    both = tagged("{instruction}", SEED_TAG, AUGMENTED_TAG)
    return {name: text.replace("{instruction}", both) for name, text in PROMPT_DICT.items()}


def mixed(seed_rows: Sequence[Row], augmented: Sequence[Row], tags: bool, seed: int) -> tuple[list[Row], str]:
    """Return the rows of both, tagged and shuffled, and a line that counts them. A pair that is there already, or lacks
    its instruction or output, is dropped."""
    rows = []
    known = set()
    dropped = Counter()
    for source, tag, of_source in (("seed", SEED_TAG, seed_rows), ("augmented", AUGMENTED_TAG, augmented)):
        for row in of_source:
            instruction, input, output = (row.get(name) or "" for name in ("instruction", "input", "output"))
            pair = instruction_and_input(row).strip(), output.strip()
            if not all(pair) or pair in known:
                dropped["duplicates" if pair in known else "pairs without instruction or output"] += 1
                continue
            known.add(pair)
            instruction = tagged(instruction, tag) if tags else instruction
            rows.append({"instruction": instruction, "input": input, "output": output, "source": source})
    random.Random(seed).shuffle(rows)
    counts = Counter(row["source"] for row in rows)
    summary = f"{counts['seed']:,} seed rows, {counts['augmented']:,} augmented rows"
    return rows, summary + "".join(f", {count:,} {what} dropped" for what, count in dropped.items())
