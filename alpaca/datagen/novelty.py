"""The novelty filter of self-instruct: an instruction is kept when no known one is too similar to it by ROUGE-L.

Decisions, scores and their order are those of the 2023 code, bit for bit: the tokens and the F measure (floats in the
order of operations) of rouge_score, the ten most similar by the same np.argsort. The longest common subsequences come
from rapidfuzz: of a candidate and the few texts that an index finds; for scores, of what is kept and all that is known.

The index loses no pair with F above t: it has at least t (la + lb) / 2 tokens in common, la and lb being the numbers of
tokens. Let the tokens of every text be sorted, rare ones first. The first common one stands at places i and j and the
others behind it, so la - i and lb - j are at least that number. Only the first places of a text are indexed and looked
up, each with the text's length; what is found is compared by signatures of 64 bits, one set by each token (PPJoin).
"""

import math
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cdist, cpdist

MOST_SIMILAR = 10
BATCH = 256  # candidates compared at once; beyond some 100 more of them save no time
CELLS = 1 << 23  # batch x pool: 16 MB of subsequence lengths and 64 MB of scores, however large the pool
THREADS_FROM = 1 << 19  # batch x pool: with fewer, starting threads takes longer than they save
LAST_CODE_POINT = 0x10FFFF
MERGE = 4  # a segment of the index is that many times as large as the next
SMALL = 1 << 14  # entries: smaller segments grow by whatever comes
CHUNK = 1 << 18  # ranges, entries or tokens handled at once, some 10 MB
PAIRS = 1 << 12  # compared at once: a candidate found to be too similar is not compared further
LONGEST = 0xFFFF  # tokens that a key of the index can say: of longer texts it does not say length and place
# Where buckets of lengths begin; up to 63 tokens a bucket has one length, the last one is without end.
EDGES = np.unique([*range(1, 64), *np.geomspace(64, LONGEST, 120).astype(np.int64), 1 << 40])

Codes = str | list[int]  # a text with one code point for each token


class Similarity(NamedTuple):
    """How similar a kept instruction was to those known when it came; `_asdict()` is its part of a regen.json entry."""

    most_similar_instructions: dict[str, float]  # instruction -> ROUGE-L F, highest first; a text occurs once
    avg_similarity_score: float  # mean ROUGE-L F over all instructions known


NEW = SimpleNamespace(_asdict=dict)  # in the place of a Similarity that was not asked for


def tokenize(text: str) -> list[str]:
    """Return the tokens of rouge_score 0.1.2 without stemmer: runs of a-z and 0-9 of the text in lower case."""
    return re.findall("[a-z0-9]+", text.lower())


def f_measures(common: np.ndarray, length: int | np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the ROUGE-L F (Lin 2004) of one text with each of n: float64 [n], 0.0 where a text has no tokens.

    common: tokens in the longest common subsequences, integer [n]; length, lengths [n]: tokens of the one and of the n.
    The order of operations is rouge_score's. It matters: with 7 of 7 and of 13 tokens in common F is 0.7, but these
    floats make it 0.7000000000000001 and the candidate too similar.
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


class Texts(NamedTuple):
    """Texts as numbers of their tokens, one text after the other."""

    numbers: np.ndarray  # uint32
    lengths: np.ndarray  # int64

    def codes(self) -> list[Codes]:
        """Return one code point for each token; texts with tokens beyond those are lists, which take more memory."""
        ends = np.cumsum(self.lengths).tolist()
        spans = list(zip([0, *ends], ends))
        if self.numbers.max(initial=0) <= LAST_CODE_POINT:
            text = self.numbers.astype("<u4").tobytes().decode("utf-32-le")
            return [text[start:end] for start, end in spans]
        parts = (self.numbers[start:end].tolist() for start, end in spans)
        return [part if max(part, default=0) > LAST_CODE_POINT else "".join(map(chr, part)) for part in parts]

    def signatures(self) -> np.ndarray:
        """Return a uint64 for each text, in which each of its tokens has set one bit."""
        bits = np.uint64(1) << (self.numbers * np.uint32(0x9E3779B1) >> np.uint32(26)).astype(np.uint64)
        found, some = np.zeros(len(self.lengths), dtype=np.uint64), self.lengths > 0
        if len(bits):
            found[some] = np.bitwise_or.reduceat(bits, (np.cumsum(self.lengths) - self.lengths)[some])
        return found


class Vocabulary(dict[str, int]):
    """The number of each token, a code point while there are some, but none of UTF-16's surrogates: every str is valid.
    A token looked up the first time gets the next number."""

    def __missing__(self, token: str) -> int:
        number = len(self) + 1
        self[token] = number = number if number < 0xD800 else number + 0x800
        return number

    def encode(self, texts: Iterable[str], learn: bool = True) -> Texts:
        """learn: give numbers to tokens not known; otherwise they are 0, the number of none."""
        numbers, lengths = array("I"), array("q")
        for text in texts:
            tokens = tokenize(text)
            numbers.extend(map(self.__getitem__, tokens) if learn else map(self.get, tokens, repeat(0)))
            lengths.append(len(tokens))
        return Texts(np.frombuffer(numbers, np.uint32), np.frombuffer(lengths, np.int64))


def expand(counts: np.ndarray, starts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, CHUNK of them at once, (r, starts[r] + k) for every r and 0 <= k < counts[r], as two arrays."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    for begin in range(0, total, CHUNK):
        end = min(begin + CHUNK, total)
        r = np.arange(*np.searchsorted(ends, [begin, end - 1], "right") + [0, 1])
        sizes = np.diff(np.minimum(ends[r], end), prepend=begin)
        yield np.repeat(r, sizes), np.repeat((starts + counts - ends)[r], sizes) + np.arange(begin, end)


class Segment(NamedTuple):
    """Entries of the index, sorted by key: of each text, each token that stands at one of its first places."""

    keys: np.ndarray  # rank of the token << 32 | tokens of the text << 16 | place, int64
    rows: np.ndarray  # the text, int32
    signatures: np.ndarray  # of the text, uint64


def merge(parts: list[Segment]) -> Segment:
    columns = [np.concatenate(column) for column in zip(*parts)]
    order = np.argsort(columns[0], kind="stable")  # in linear time where the parts are sorted
    return Segment(*(column[order] for column in columns))


class Index:
    """Says which texts have ROUGE-L F above `threshold` with a known one."""

    def __init__(self, threshold: float):
        self.threshold, self._bound = threshold, min(max(threshold, 0.0), 1.0)  # F is never above 1
        self._numbers, self.ends = array("I"), array("q", [0])  # of known texts; numpy's views of them must not stay
        self._segments: list[Segment] = []
        self._ranks, self._ranked = np.zeros(0, dtype=np.int64), 0  # of tokens, low for frequent ones; texts by then

    def _texts(self, start: int, stop: int) -> Texts:
        ends = np.frombuffer(self.ends, np.int64)[start : stop + 1]
        return Texts(np.frombuffer(self._numbers, np.uint32)[ends[0] : ends[-1]], np.diff(ends))

    def _required(self, length: np.ndarray, other: np.ndarray) -> np.ndarray:  # tokens in common, at least
        return np.maximum(np.ceil(self._bound / 2 * (length + other) - 1e-6), 1).astype(np.int64)

    def _shortest(self, length: np.ndarray) -> np.ndarray:  # length of the other, at least
        return np.maximum(np.ceil(self._bound * length / (2 - self._bound) - 1e-5), 1).astype(np.int64)

    def add(self, texts: Texts) -> None:
        start, ends = len(self.ends) - 1, self.ends[-1] + np.cumsum(texts.lengths)
        self._numbers.frombytes(texts.numbers.tobytes())
        self.ends.frombytes(ends.tobytes())
        if len(self.ends) - 1 >= 2 * self._ranked:
            start, self._segments = 0, []
            self._rank()
        self._segments.append(self._build(start, len(self.ends) - 1))
        while self._segments[1:] and len(self._segments[-2][0]) < max(SMALL, MERGE * len(self._segments[-1][0])):
            self._segments[-2:] = [merge(self._segments[-2:])]

    def _rank(self) -> None:
        """Rank the tokens by how frequent they are now: the rarer the tokens looked up, the fewer texts are found."""
        counts = np.bincount(self._texts(0, len(self.ends) - 1).numbers)
        self._ranks = np.empty_like(counts)
        self._ranks[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
        self._ranked = len(self.ends) - 1

    def _first_places(self, texts: Texts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (text, place, rank of its token) for the first places, but not of repetitions: no first common one."""
        rank = texts.numbers.astype(np.int64)
        known = rank < len(self._ranks)  # later tokens count as rare: their numbers are above all ranks
        rank[known] = self._ranks[rank[known]]
        keys = np.repeat(np.arange(len(texts.lengths)) << 32, texts.lengths) + (0xFFFFFFFF - rank)
        keys.sort()
        text = keys >> 32
        place = np.arange(len(keys)) - (np.cumsum(texts.lengths) - texts.lengths)[text]
        last = texts.lengths - self._required(self._shortest(texts.lengths), texts.lengths)
        first = (np.diff(keys, prepend=-1) != 0) & (place <= last[text])
        return text[first], place[first], 0xFFFFFFFF - (keys[first] & 0xFFFFFFFF)

    def _build(self, start: int, stop: int) -> Segment:
        parts = []
        while start < stop or not parts:
            size = int(np.searchsorted(self.ends, self.ends[start] + CHUNK, "right")) - 1 - start
            texts = self._texts(start, min(start + max(size, 1), stop))
            text, place, rank = self._first_places(texts)
            keys = rank << 32 | np.minimum(texts.lengths[text], LONGEST) << 16 | np.minimum(place, LONGEST)
            parts.append(Segment(keys, (start + text).astype(np.int32), texts.signatures()[text]))
            start += len(texts.lengths)
        return merge(parts)

    def too_similar(self, texts: Texts, codes: list[Codes]) -> np.ndarray:
        """Return of each text whether a known one has F above the threshold with it."""
        found, absent = np.full(len(codes), self.threshold < 0), ~texts.signatures()
        done = np.zeros(0, dtype=np.int64)  # pairs compared, of texts that may come again: they come in their order
        for text, first, last, lacks, has in self._ranges(texts):
            for segment in self._segments:
                start = np.searchsorted(segment.keys, first)
                counts = np.maximum(np.searchsorted(segment.keys, last, "right") - start, 0)
                for which, entry in expand(counts, start):
                    latest = text[which[-1]] << 32
                    few = np.bitwise_count(segment.signatures[entry] & absent[text[which]]) <= has[which]
                    which, entry = which[few], entry[few]
                    few = np.bitwise_count(~(segment.signatures[entry] | absent[text[which]])) <= lacks[which]
                    pairs = np.setdiff1d(text[which[few]] << 32 | segment.rows[entry[few]], done)
                    done = np.append(done[done >= latest], pairs[pairs >= latest])
                    self._compare(texts, codes, pairs >> 32, pairs & 0xFFFFFFFF, found)
        return found

    def _ranges(self, texts: Texts) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield (text, first and last key, lacks, has) of the ranges of keys that have all that may be too similar: it
        lacks at most so many of this text's tokens, and has at most so many others."""
        text, place, rank = self._first_places(texts)
        length = texts.lengths[text]
        longest = (2 * (length - place) + 1e-5) / max(self._bound, 1e-9) - length  # more would require more tokens
        begin = np.searchsorted(EDGES, self._shortest(length), "right") - 1
        counts = np.maximum(np.searchsorted(EDGES[:-1], longest, "right") - begin, 0)
        for which, bucket in expand(counts, begin):
            own, low, high = length[which], EDGES[bucket], EDGES[bucket + 1] - 1
            lacks, has = own - self._required(own, low), high - self._required(own, high)
            first = rank[which] << 32 | low << 16
            last = (rank[which] << 32 | np.minimum(high, LONGEST) << 16) + np.where(low == high, has, LONGEST)
            yield text[which], first, last, *(np.clip(most, 0, 64).astype(np.uint8) for most in (lacks, has))

    def _compare(self, texts: Texts, codes: list[Codes], text: np.ndarray, row: np.ndarray, found: np.ndarray) -> None:
        """Add to `found` the texts of these pairs that have F above the threshold."""
        ends, numbers = np.frombuffer(self.ends, np.int64), np.frombuffer(self._numbers, np.uint32)
        while len(left := np.flatnonzero(~found[text])):
            text, row = text[left], row[left]
            length = ends[row[:PAIRS] + 1] - ends[row[:PAIRS]]
            size = max(1, int(np.searchsorted(np.cumsum(length), CHUNK, "right")))
            length, these = length[:size], text[:size]
            others = Texts(np.concatenate([numbers[ends[i] : ends[i + 1]] for i in row[:size]]), length).codes()
            common = cpdist([codes[i] for i in these], others, scorer=LCSseq.similarity, dtype=np.uint32)
            found[these[f_measures(common, texts.lengths[these], length) > self.threshold]] = True
            text, row = text[size:], row[size:]


class NoveltyFilter:
    """The known instructions, and the test whether another one is new.

    instructions: those known at the start, in the order of 2023: seed tasks first, then what was generated before.
    threshold: a candidate is too similar if its ROUGE-L F with a known instruction is above this.
    stable_ties: see `most_similar`; workers: threads, used where there is much to compare.
    details: say of a kept candidate how similar it is to what is known. It is compared with all that is known then: the
        cost grows with the pool, which takes some 600 bytes an instruction. Without details a kept candidate gets NEW,
        whose `_asdict()` is empty (both keys are left out of its row), the cost hardly grows with the pool, and that
        takes some 300 bytes an instruction (450 while many are added): texts are not kept.
    Filtering takes up to some 100 MB more, however large the pool.
    """

    def __init__(
        self,
        instructions: Iterable[str],
        threshold: float = 0.7,
        stable_ties: bool = False,
        workers: int = 1,
        details: bool = True,
    ):
        self.threshold, self.stable_ties, self.workers, self.details = threshold, stable_ties, workers, details
        self._ids, self._index = Vocabulary(), Index(threshold)
        self._texts, self._codes, self._lengths = [], [], np.zeros(0, dtype=np.int64)  # of what is known, for details
        self.add(instructions)

    def __len__(self) -> int:
        return len(self._index.ends) - 1

    def add(self, instructions: Iterable[str]) -> None:
        """Make instructions known without a test."""
        instructions = list(instructions) if self.details else instructions
        self._index.add(texts := self._ids.encode(instructions))
        if self.details:
            self._extend(instructions, texts.codes())

    def filter(self, instructions: Sequence[str]) -> list[Similarity | SimpleNamespace | None]:
        """Return for each candidate its similarity to all that is known, or None if it is too similar to one of them.

        A candidate that is kept is known to those after it, so the result is that of one call for each; many in a call
        are faster (with 52,000 known, calls of 20 about three times). With nothing known a candidate is kept with {}
        and 0.0; 2023's code fails there. Without details NEW stands for a similarity.
        """
        results: list[Similarity | SimpleNamespace | None] = []
        while (left := len(instructions) - len(results)) > 0:
            most = min(BATCH, max(1, CELLS // max(1, len(self)))) if self.details else BATCH
            size = math.ceil(left / math.ceil(left / most))  # of equal size: small batches are slow
            results += self._filter_batch(list(instructions[len(results) : len(results) + size]))
        return results

    def _filter_batch(self, instructions: list[str]) -> list[Similarity | SimpleNamespace | None]:
        texts = self._ids.encode(instructions)
        codes, lengths = texts.codes(), texts.lengths
        among = f_measures(common_tokens(codes, codes, 1), lengths[:, None], lengths)
        kept: list[int] = []
        for i in np.flatnonzero(~self._index.too_similar(texts, codes)).tolist():
            kept += [] if among[i, kept].max(initial=0.0) > self.threshold else [i]
        which = np.isin(np.arange(len(lengths)), kept)
        self._index.add(Texts(texts.numbers[np.repeat(which, lengths)], lengths[which]))
        if not self.details:
            return [NEW if new else None for new in which]
        of_kept = [instructions[i] for i in kept], [codes[i] for i in kept], among[np.ix_(kept, kept)]
        similarities = dict(zip(kept, self._similarities(*of_kept)))
        return [similarities.get(i) for i in range(len(instructions))]

    def _similarities(self, instructions: list[str], codes: list[Codes], among: np.ndarray) -> list[Similarity]:
        """Make kept candidates known; return how similar each is to what was before it. among: F between them."""
        workers = self.workers if len(codes) * len(self._texts) >= THREADS_FROM else 1
        common = common_tokens(codes, self._codes, workers)
        rows = [f_measures_by_table(common[i], len(code), self._lengths) for i, code in enumerate(codes)]
        rows = [np.append(row, among[i, :i]) for i, row in enumerate(rows)]
        self._extend(instructions, codes)
        if workers == 1:
            return list(map(self._similarity, rows))
        with ThreadPoolExecutor(workers) as threads:  # numpy sorts without Python's lock
            return list(threads.map(self._similarity, rows))

    def _similarity(self, scores: np.ndarray) -> Similarity:
        """Return the similarity of a kept candidate; scores: its F with the first n known instructions, float64 [n]."""
        # As in 2023, a text that is among them several times stands at its first place.
        scores_of = {self._texts[i]: float(scores[i]) for i in most_similar(scores, self.stable_ties)}
        return Similarity(scores_of, float(np.mean(scores)) if len(scores) else 0.0)

    def _extend(self, texts: list[str], codes: list[Codes]) -> None:
        self._texts += texts
        self._codes += codes
        self._lengths = np.append(self._lengths, np.array([len(code) for code in codes], dtype=np.int64))


class Exclusion:
    """The texts of an evaluation set, and the test whether an instruction repeats one of them.

    An instruction is excluded that has `ngram` tokens in a row in common with a text, or ROUGE-L F above `threshold`
    with it; a text of fewer tokens is known by ROUGE-L alone. Tokens are those of `tokenize`: a text in Chinese has
    none, one with a single English word has that word. So an instruction is excluded also if it is one of the texts,
    but for upper and lower case and spaces. A text of spaces alone excludes nothing.
    """

    def __init__(self, texts: Iterable[str], ngram: int = 13, threshold: float = 0.7):
        known, self.ngram = list(texts), ngram
        self._normal = {normal(text) for text in known} - {""}
        self._ids, self._index = Vocabulary(), Index(threshold)
        self._index.add(encoded := self._ids.encode(known))
        self._runs = {run for runs in self._runs_of(encoded) for run in runs}

    def _runs_of(self, texts: Texts) -> Iterator[Iterator[bytes]]:
        """Yield of each text its runs of `ngram` tokens."""
        numbers, ends = texts.numbers.tobytes(), np.cumsum(texts.lengths).tolist()
        for start, end in zip([0, *ends], ends):
            yield (numbers[4 * i : 4 * (i + self.ngram)] for i in range(start, end - self.ngram + 1))

    def matches(self, instructions: Sequence[str]) -> list[bool]:
        """Return of each instruction whether it is excluded. Many in a call are faster."""
        found: list[bool] = []
        for start in range(0, len(instructions), BATCH):
            batch = instructions[start : start + BATCH]
            texts = self._ids.encode(batch, learn=False)
            for text, runs, excluded in zip(batch, self._runs_of(texts), self._index.too_similar(texts, texts.codes())):
                found.append(bool(excluded) or normal(text) in self._normal or not self._runs.isdisjoint(runs))
        return found


def normal(text: str) -> str:
    return " ".join(text.casefold().split())
