"""Unlabelled texts, and which of them are worth an instruction: what goes into instruction backtranslation.

The filters are heuristics after those that arXiv 2308.06259 names (length, capital letters, duplicates), and one of
ours for the language. Each text that they leave out is counted under its reason.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpaca.common.errors import InputError, ParameterError
from alpaca.data.prompts import check_text
from alpaca.data.rows import raw_rows, read_text

# Words that hardly any English text of some sentences goes without, and that other languages do not have
ENGLISH = frozenset(
    "the and that with are this which from have has you not they their its will would there when what were been than "
    "then into your she our to by it or can but how".split()
)


def load_texts(data_path: str, split: str = "train", text_field: str | None = None) -> list[str]:
    """Return the texts of a file, without space around them; their number is their index.

    A .txt file holds segments between empty lines. Of a row of any other file that train.py takes it is `text_field`,
    else `output` where there is one (Alpaca's), else `text`.

    Raises:
        UsageError: as `alpaca.data.rows.raw_rows`; a row has no such field, or no text in it (row number).
    """
    path = Path(data_path)
    if path.suffix.lower() == ".txt":
        if not path.is_file():
            raise InputError(f"{data_path}: no such file (looked in {path.parent.resolve()})", data_path)
        if text_field is not None:
            raise ParameterError(f"{{text_field}} {text_field}: a .txt file has no fields", "text_field")
        return [text.strip() for text in re.split(r"\n[ \t\r]*\n", read_text(path)) if text.strip()]
    return [_text_of(row, number, data_path, text_field) for number, row in enumerate(raw_rows(data_path, split))]


def _text_of(row: Any, number: int, data_path: str, text_field: str | None) -> str:
    where = f"{data_path}: row {number}"
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: expected an object with a text, got {type(row).__name__}", data_path)
    field = text_field or ("output" if "output" in row else "text")
    if field not in row:
        fields = sorted(map(str, row))
        raise InputError(f"{where}: no field {field!r}; the row has {fields}; choose one of these", data_path)
    if not isinstance(row[field], str):
        kind = type(row[field]).__name__
        raise InputError(f"{where}: {field!r} must be text, got {kind} {row[field]!r:.60}", data_path)
    check_text(row[field], f"{where}: {field!r}", data_path)
    return row[field].strip()


@dataclass(frozen=True)
class Filters:
    """Limits that a text must keep; characters, and shares from 0 to 1.

    max_capitals: of its letters. min_english: of its words, those of ENGLISH; 0 takes every language.
    """

    min_chars: int = 200
    max_chars: int = 4000
    max_capitals: float = 0.3
    min_english: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_chars <= self.max_chars:
            raise ParameterError(
                f"{{min_chars}} {self.min_chars}, {{max_chars}} {self.max_chars}: expected 1 or more, in order",
                "min_chars",
                "max_chars",
            )
        for name in ("max_capitals", "min_english"):
            if not 0 <= getattr(self, name) <= 1:
                raise ParameterError(f"{{{name}}} {getattr(self, name)}: expected a share from 0 to 1", name)

    def choose(self, texts: Sequence[str]) -> tuple[list[int], dict[str, list[int]]]:
        """Return the numbers of the texts to keep, and those left out by reason. Of equal texts (but for case and
        space) the first that is kept stays."""
        kept = []
        left_out = {}
        seen = set()
        for number, text in enumerate(texts):
            same = hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=16).digest()
            reason = self._fault(text) or ("duplicate" if same in seen else None)
            if reason is None:
                seen.add(same)
                kept.append(number)
            else:
                left_out.setdefault(reason, []).append(number)
        return kept, left_out

    def _fault(self, text: str) -> str | None:
        if len(text) < self.min_chars:
            return "too_short"
        if len(text) > self.max_chars:
            return "too_long"
        if share_of_capitals(text) > self.max_capitals:
            return "capitals"
        if self.min_english and share_of_english_words(text) < self.min_english:
            return "not_english"
        return None


def share_of_capitals(text: str) -> float:
    """Return the share of capitals among the letters that come in two cases; 0 where there are none."""
    upper, lower = sum(map(str.isupper, text)), sum(map(str.islower, text))
    return upper / (upper + lower) if upper + lower else 0.0


def share_of_english_words(text: str) -> float:
    """Return the share of words that are in ENGLISH: a heuristic, not language identification."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    return sum(word in ENGLISH for word in words) / len(words) if words else 0.0
