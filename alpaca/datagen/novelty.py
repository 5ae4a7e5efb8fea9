"""The novelty filter of self-instruct: an instruction is kept when no known one is too similar to it by ROUGE-L.

Decisions, scores and their order are those of the 2023 code, bit for bit: the tokens and the F measure (floats in the
order of operations) of rouge_score, the ten most similar by the same np.argsort. Only the longest common subsequences
come from elsewhere: rapidfuzz compares a whole batch of candidates with the pool at once.
"""

import math
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist

MOST_SIMILAR = 10
BATCH = 256  # candidates compared at once; beyond some 100 more of them save no time
CELLS = 1 << 23  # batch x pool: 16 MB of subsequence lengths and 64 MB of scores, however large the pool
THREADS_FROM = 1 << 19  # batch x pool: with fewer, starting threads takes longer than they save
LAST_CODE_POINT = 0x10FFFF

Codes = str | list[int]  # a text with one code point for each token


class Similarity(NamedTuple):
    """How similar a kept instruction was to those known when it came; `_asdict()` is its part of a regen.json entry."""

    most_similar_instructions: dict[str, float]  # instruction -> ROUGE-L F, highest first; a text occurs once
    avg_similarity_score: float  # mean ROUGE-L F over all instructions known


def tokenize(text: str) -> list[str]:
    """Return the tokens of rouge_score 0.1.2 without stemmer: runs of a-z and 0-9 of the text in lower case."""
    return re.findall("[a-z0-9]+", text.lower())


def f_measures(common: np.ndarray, length: int, lengths: np.ndarray) -> np.ndarray:
    """Return the ROUGE-L F (Lin 2004) of one text with each of n: float64 [n], 0.0 where a text has no tokens.

    common: tokens in the longest common subsequences, integer [n]; length, lengths [n]: tokens of the one and of the n.

    `2 * precision * recall / (precision + recall)` is rouge_score's order. It matters: with 7 of 7 and of 13 tokens in
    common F is 0.7, but these floats make it 0.7000000000000001 and the candidate too similar.
    """
    precision, recall = common / np.maximum(lengths, 1), common / np.maximum(length, 1)
    total = precision + recall
    total += total == 0  # nothing in common: 0 / 1
    return 2 * precision * recall / total


def f_measures_by_table(common: np.ndarray, length: int, lengths: np.ndarray) -> np.ndarray:
    """Return `f_measures`, in a third of the time for a large pool: computed once for every pair (common, length)."""
    columns = int(lengths.max(initial=0)) + 1
    if (length + 1) * columns > len(lengths):
        return f_measures(common, length, lengths)
    table = f_measures(np.arange(length + 1)[:, None], length, np.arange(columns))
    return table.ravel().take(common * np.int64(columns) + lengths, mode="clip")  # all are inside; "raise" would copy


def most_similar(scores: np.ndarray, stable_ties: bool = False) -> np.ndarray:
    """Return indices of the ten highest of `scores` [n], highest first.

    By default those of 2023's call. Its sort is not stable: which of several equal scores comes first can depend on the
    CPU and on numpy's version. With `stable_ties` the later of equal scores comes first, everywhere; it is also faster.
    """
    if not stable_ties:
        return np.argsort(scores)[-MOST_SIMILAR:][::-1]
    known = np.arange(len(scores))
    if len(scores) > MOST_SIMILAR:  # sort only what is not below the tenth
        known = np.flatnonzero(scores >= np.partition(scores, -MOST_SIMILAR)[-MOST_SIMILAR])
    return known[np.argsort(scores[known], kind="stable")[-MOST_SIMILAR:][::-1]]


def common_tokens(a: list[Codes], b: list[Codes], workers: int) -> np.ndarray:
    """Return lengths of the longest common subsequences of every a with every b: integers [len(a), len(b)]."""
    longest = min(max(map(len, a), default=0), max(map(len, b), default=0))
    dtype = np.uint16 if longest <= np.iinfo(np.uint16).max else np.uint32  # rapidfuzz would wrap around
    return cdist(a, b, scorer=LCSseq.similarity, dtype=dtype, workers=workers)


class NoveltyFilter:
    """The known instructions, and the test whether another one is new.

    instructions: those known at the start, in the order of 2023: seed tasks first, then what was generated before.
    threshold: a candidate is too similar if its ROUGE-L F with a known instruction is above this.
    stable_ties: see `most_similar`.
    workers: threads, used where there is much to compare.

    The pool takes some 300 bytes an instruction; filtering takes up to some 100 MB more, however large the pool.
    """

    def __init__(
        self,
        instructions: Iterable[str],
        threshold: float = 0.7,
        stable_ties: bool = False,
        workers: int = 1,
        details: bool = True,
    ):
        self.threshold = threshold
        self.stable_ties = stable_ties
        self.workers = workers
        self._ids: dict[str, int] = {}  # token -> code point
        self._texts: list[str] = []
        self._codes: list[Codes] = []
        self._lengths = np.zeros(0, dtype=np.int64)
        self.add(instructions)

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, instructions: Iterable[str]) -> None:
        """Make instructions known without a test."""
        texts = list(instructions)
        self._extend(texts, [self._encode(text) for text in texts])

    def filter(self, instructions: Sequence[str]) -> list[Similarity | None]:
        """Return for each candidate its similarity to all that is known, or None where it is too similar to one of
        them.

        A candidate that is kept is known to those after it, so the result is that of one call for each; many in a call
        are faster (with 52,000 known, calls of 20 about three times). With nothing known a candidate is kept with {}
        and 0.0; 2023's code fails there.
        """
        results: list[Similarity | None] = []
        while (left := len(instructions) - len(results)) > 0:
            most = min(BATCH, max(1, CELLS // max(1, len(self))))
            size = math.ceil(left / math.ceil(left / most))  # of equal size: small batches are slow
            results += self._filter_batch(list(instructions[len(results) : len(results) + size]))
        return results

    def _filter_batch(self, texts: list[str]) -> list[Similarity | None]:
        codes = [self._encode(text) for text in texts]
        lengths = np.array([len(code) for code in codes])
        workers = self.workers if len(texts) * len(self) >= THREADS_FROM else 1
        common = common_tokens(codes, self._codes, workers)
        rows = [f_measures_by_table(common[i], lengths[i], self._lengths) for i in range(len(texts))]
        among = common_tokens(codes, codes, 1)
        kept: list[int] = []
        for i in range(len(texts)):
            # To candidate i, the pool is the one before this batch and then those kept since, in their order.
            rows[i] = np.append(rows[i], f_measures(among[i, kept], lengths[i], lengths[kept]))
            if rows[i].max(initial=0.0) > self.threshold:
                rows[i] = None  # frees the memory
            else:
                kept.append(i)
        self._extend([texts[i] for i in kept], [codes[i] for i in kept])
        if workers == 1:
            return [self._similarity(row) for row in rows]
        with ThreadPoolExecutor(workers) as threads:  # numpy sorts without Python's lock
            return list(threads.map(self._similarity, rows))

    def _similarity(self, scores: np.ndarray | None) -> Similarity | None:
        """Return the similarity of a kept candidate. `scores` are those of a kept candidate with the first n known
        instructions, float64 [n]; None: not kept."""
        if scores is None:
            return None
        if len(scores) == 0:
            return Similarity({}, 0.0)
        top = most_similar(scores, self.stable_ties)
        # As in 2023, a text that is among them several times stands at its first place.
        return Similarity({self._texts[i]: float(scores[i]) for i in top}, float(np.mean(scores)))

    def _extend(self, texts: list[str], codes: list[Codes]) -> None:
        self._texts += texts
        self._codes += codes
        self._lengths = np.append(self._lengths, np.array([len(code) for code in codes], dtype=np.int64))

    def _encode(self, text: str) -> Codes:
        """Return one code point for each token, the same for the same token; without those of UTF-16's surrogates, so
        that every str is a valid one. When they have run out, texts with later tokens are lists, which take more
        memory."""
        ids = []
        for token in tokenize(text):
            number = len(self._ids) + 1
            ids.append(self._ids.setdefault(token, number if number < 0xD800 else number + 0x800))
        return ids if ids and max(ids) > LAST_CODE_POINT else "".join(map(chr, ids))


class Exclusion:
    """Stand-in."""

    def __init__(self, texts):
        self.texts = texts

    def matches(self, instructions):
        return [False for _ in instructions]
