"""The novelty filter: every decision, score and order of 2023's loop over rouge_score."""

import json
import os
import random
import tracemalloc
from functools import partial

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, SHARED
from rapidfuzz.distance import LCSseq
from rapidfuzz.process import cpdist
from rouge_score import rouge_scorer, scoring

from alpaca.datagen import novelty
from alpaca.datagen.novelty import Exclusion, NoveltyFilter, Similarity, common_tokens
from benchmarks.novelty import full_scan, recombined

ROUGE = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
GENERATE = GOLDEN / "generate"


def as_in_2023(known: list[str], candidates: list[str], threshold: float = 0.7) -> list[Similarity | None]:
    """The loop of 2023, one candidate after the other, with map in place of its process pool."""
    all_instructions, results = list(known), []
    all_instruction_tokens = [ROUGE._tokenizer.tokenize(text) for text in all_instructions]
    for text in candidates:
        tokens = ROUGE._tokenizer.tokenize(text)
        scores = [s.fmeasure for s in map(partial(rouge_scorer._score_lcs, tokens), all_instruction_tokens)]
        most_similar = {all_instructions[i]: scores[i] for i in np.argsort(scores)[-10:][::-1]}
        if max(scores) > threshold:
            results.append(None)
            continue
        results.append(Similarity(most_similar, float(np.mean(scores))))
        all_instructions.append(text)
        all_instruction_tokens.append(tokens)
    return results


def exactly(results: list[Similarity | None]) -> str:
    """All that regen.json would say of them, order and last digits included; 2023's has 0 for some 0.0."""
    return json.dumps([r and [[(t, float(f)) for t, f in r[0].items()], float(r[1])] for r in results])


def in_calls_of(novelty_filter: NoveltyFilter, size: int, candidates: list[str]) -> list[Similarity | None]:
    calls = [candidates[i : i + size] for i in range(0, len(candidates), size)]
    return [result for call in calls for result in novelty_filter.filter(call)]


def seed_instructions() -> list[str]:
    lines = (ROOT / "seed_tasks.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["instruction"] for line in lines]


def make_candidates(number: int, draw: random.Random) -> list[str]:
    """Instructions new and not so new: texts of seed words, near-duplicates, texts without a token, unicode."""
    words = " ".join(seed_instructions()).split()
    odd = [
        "",
        " ",
        "?!…",
        "解释一下",
        "\ud800",
        "Straße İstanbul KELVIN K ﬁn",
        "a_b-c\u00a0d\te\x00f 1,000.5",
        "the",
        "The",
    ]
    made = []
    for i in range(number):
        kind = draw.random()
        if made and kind < 0.3:
            text = draw.choice(made).split() or ["x"]
            for _ in range(draw.randrange(4)):
                text[draw.randrange(len(text))] = draw.choice(words)
            made.append(" ".join(text + draw.sample(words, draw.randrange(3))))
        elif kind < 0.4:
            made.append(draw.choice(odd) if i % 2 else draw.choice(odd) + " " + draw.choice(words))
        else:
            made.append(" ".join(draw.choices(words, k=max(1, round(draw.gauss(11, 4))))))
    return made


@pytest.fixture(scope="module")
def run_2023():
    """(known, candidates, what 2023 makes of them): some 50,000 pairs."""
    draw = random.Random(0)
    known, candidates = draw.sample(seed_instructions(), 30) + ["", "..."], make_candidates(330, draw)
    expected = as_in_2023(known, candidates)
    assert 60 < expected.count(None) < 160
    return known, candidates, expected


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("size", [1, 7, 330])
def test_every_bit_is_that_of_2023(run_2023, size, workers, monkeypatch):
    known, candidates, expected = run_2023
    monkeypatch.setattr(novelty, "THREADS_FROM", 200)
    novelty_filter = NoveltyFilter(known, workers=workers)
    results = in_calls_of(novelty_filter, size, candidates)
    assert exactly(results) == exactly(expected)
    assert len(novelty_filter) == len(known) + sum(result is not None for result in expected)


def test_a_call_is_divided_to_save_memory(run_2023, monkeypatch):
    known, candidates, expected = run_2023
    sizes = []
    monkeypatch.setattr(novelty, "CELLS", 1000)
    monkeypatch.setattr(novelty, "common_tokens", lambda a, *rest: sizes.append(len(a)) or common_tokens(a, *rest))
    assert exactly(NoveltyFilter(known).filter(candidates)) == exactly(expected)
    assert sizes[0] == 30 and sizes[-1] <= 4


def test_a_later_run_goes_on_where_the_first_ended(run_2023):
    known, candidates, expected = run_2023
    kept = [text for text, result in zip(candidates[:200], expected) if result]
    novelty_filter = NoveltyFilter(known)
    novelty_filter.add(kept[:50])
    novelty_filter.add(iter(kept[50:]))
    assert exactly(novelty_filter.filter(candidates[200:])) == exactly(expected[200:])


def test_long_texts_are_those_of_2023():
    draw = random.Random(1)
    words = [f"w{i}" for i in range(400)]
    texts = [" ".join(draw.choices(words[: draw.choice([3, 40, 400])], k=k)) for k in (60, 64, 65, 130, 255, 257, 320)]
    near = [text + " tail" * k for k, text in enumerate(texts)]
    known = make_candidates(20, draw)
    expected = as_in_2023(known, texts + near)
    assert 7 <= expected.count(None) < 14
    for size in (1, 14):
        assert exactly(in_calls_of(NoveltyFilter(known), size, texts + near)) == exactly(expected)


def test_more_than_65535_tokens_in_common():
    novelty_filter = NoveltyFilter(["a " * 70_000])
    assert novelty_filter.filter(["a " * 70_000 + "b"]) == [None]
    [result] = novelty_filter.filter(["b " * 9 + "a " * 30_000])
    assert list(result.most_similar_instructions.values()) == [scoring.fmeasure(30_000 / 70_000, 30_000 / 30_009)]


def test_more_tokens_than_there_are_code_points(run_2023):
    known, candidates, expected = run_2023
    novelty_filter = NoveltyFilter(known[:10])
    for number, texts in ((0xD7E0, known[10:]), (0x10F7C0, [])):  # shortly before the surrogates and before the end
        novelty_filter._ids.update((i, None) for i in range(len(novelty_filter._ids), number))
        novelty_filter.add(texts)
    assert exactly(novelty_filter.filter(candidates)) == exactly(expected)
    assert {str, list} == set(map(type, novelty_filter._codes))
    for code in novelty_filter._codes:
        assert isinstance(code, list) or code.encode("utf-16") is not None  # fails on a surrogate


def test_the_golden_run_of_2023():
    """The golden's order of equal scores is of the CPU it was made on, so that order is compared with this CPU's."""
    known = [json.loads(line)["instruction"] for line in (GENERATE / "seed_tasks.jsonl").read_text().splitlines()]
    requests = json.loads((GENERATE / "postprocessed.json").read_text())
    golden = json.loads((GENERATE / "regen.json").read_text())
    novelty_filter, entries, candidates = NoveltyFilter(known), [], []
    for request in requests:
        texts = [entry["instruction"] for entry in request]
        candidates += texts
        results = novelty_filter.filter(texts)
        entries += [entry | result._asdict() for entry, result in zip(request, results) if result]
    assert len(golden) < len(candidates) and [list(entry) for entry in entries] == [list(entry) for entry in golden]
    for entry, expected in zip(entries, golden):
        scores, expected_scores = entry.pop("most_similar_instructions"), expected.pop("most_similar_instructions")
        assert entry == expected
        assert list(scores.values()) == list(expected_scores.values())
        for text in scores.keys() ^ expected_scores.keys():  # which of the equal ones is the tenth
            assert (scores | expected_scores)[text] == min(scores.values())
    assert exactly(NoveltyFilter(known).filter(candidates)) == exactly(as_in_2023(known, candidates))


def test_f_is_that_of_rouge_score_for_all_lengths():
    for m in range(0, 40):
        for n in range(0, 40):
            common = np.arange(min(m, n) + 1, dtype=np.uint16)
            expected = [scoring.fmeasure(c / n, c / m) if m and n else 0.0 for c in range(len(common))]
            assert novelty.f_measures(common, m, np.full(len(common), n)).tolist() == expected


def test_f_by_table_is_f():
    draw = np.random.default_rng(0)
    for size, longest in ((0, 5), (1, 1), (50, 20), (2000, 30), (2000, 0)):
        lengths = draw.integers(0, longest + 1, size)
        for length in (0, 1, 12, 30):
            common = np.minimum(draw.integers(0, length + 1, size), lengths).astype(np.uint16)
            expected = novelty.f_measures(common, length, lengths)
            assert novelty.f_measures_by_table(common, length, lengths).tolist() == expected.tolist()


def test_the_threshold_is_that_of_the_rounded_floats():
    """F is 0.7 exactly for all of these; rouge_score's floats make about half of them too similar."""
    lengths = [(c, m, n) for m in range(1, 30) for n in range(1, 30) for c in range(1, 30) if 20 * c == 7 * (m + n)]
    lengths = [(c, m, n) for c, m, n in lengths if c <= min(m, n)]
    words = [f"w{i}" for i in range(30)]
    rejected = set()
    for c, m, n in lengths:
        known = " ".join(words[:c] + ["other"] * (n - c))
        candidate = " ".join(words[:c] + ["new"] * (m - c))
        [result] = NoveltyFilter([known]).filter([candidate])
        assert (result is None) == (scoring.fmeasure(c / n, c / m) > 0.7)
        rejected |= {(c, m, n)} if result is None else set()
    assert {(7, 7, 13), (7, 13, 7)} <= rejected and len(rejected) < len(lengths)
    assert NoveltyFilter(["a b"], threshold=1.0).filter(["a b"]) != [None]
    assert NoveltyFilter(["a b"], threshold=0.4).filter(["a c"]) == [None]


def test_stable_ties():
    """The later of equal scores comes first, whatever the sort of this CPU does."""
    draw = random.Random(2)
    for size in [*range(1, 30), 300, 2000]:
        for different in (1, 2, 5, 1000):
            scores = np.array([draw.randrange(different) / 1000 for _ in range(size)])
            expected = sorted(range(size), key=lambda i: (scores[i], i), reverse=True)[:10]
            assert novelty.most_similar(scores, stable_ties=True).tolist() == expected


def test_stable_ties_change_nothing_but_the_order(run_2023):
    known, candidates, expected = run_2023
    results = NoveltyFilter(known, stable_ties=True).filter(candidates)
    for result, other in zip(results, expected):
        assert (result is None) == (other is None)
        if result:
            assert list(result[0].values()) == list(other[0].values()) or "" in result[0]  # known twice: one place
            assert result.avg_similarity_score == other.avg_similarity_score


def test_nothing_known():
    novelty_filter = NoveltyFilter([])
    assert novelty_filter.filter([]) == [] and len(novelty_filter) == 0
    assert novelty_filter.filter(["", "Name a bird.", "name a BIRD"]) == [({}, 0.0), ({"": 0.0}, 0.0), None]


def test_a_text_known_twice_is_listed_once():
    [result] = NoveltyFilter(["", "Name a bird.", "Name a bird.", ""], stable_ties=True).filter(
        ["Name a fish, please."]
    )
    assert list(result.most_similar_instructions) == ["Name a bird.", ""]
    assert result.avg_similarity_score == np.mean(
        [0, scoring.fmeasure(2 / 3, 2 / 4), scoring.fmeasure(2 / 3, 2 / 4), 0]
    )


def test_tokens_are_those_of_rouge_score():
    draw = random.Random(3)
    texts = [
        "".join(chr(draw.choice([draw.randrange(128), draw.randrange(0x3000)])) for _ in range(50)) for _ in range(500)
    ]
    texts += make_candidates(500, draw) + ["K ſ İ ı ß ﬁ ² ٣ \u2028 \x1c \x85"]
    assert [novelty.tokenize(text) for text in texts] == [ROUGE._tokenizer.tokenize(text) for text in texts]


# ---- the index: decisions without a full scan ----


def rejections(known: list[str], candidates: list[str], threshold: float = 0.7) -> list[bool]:
    """What a loop over everything decides, in the words of rouge_score."""
    pool, answers = [novelty.tokenize(text) for text in known], []
    for text in candidates:
        tokens = novelty.tokenize(text)
        scores = [0.0]
        for other in pool if tokens else ():
            common = LCSseq.similarity(tokens, other)
            scores.append(scoring.fmeasure(common / len(other), common / len(tokens)) if other else 0.0)
        answers.append(max(scores) > threshold)
        if not answers[-1]:
            pool.append(tokens)
    return answers


def edited(text: list[str], times: int, words: list[str], draw: random.Random) -> list[str]:
    text = list(text)
    for _ in range(times):
        at, kind = draw.randrange(len(text) + 1), draw.randrange(3)
        text[at : at + (kind > 0)] = [] if kind == 2 else [draw.choice(words)]
    return text


def texts_of(kind: str, draw: random.Random) -> list[str]:
    """Texts that are hard on an index: some 200, many of them close to the threshold with one before."""
    words = [f"w{i}" for i in range(60)]
    made: list[list[str]] = []
    if kind == "three words":
        made = [draw.choices(words[:3], k=draw.randrange(15)) for _ in range(200)]
    elif kind == "repetitions":
        made = [[w for w in draw.sample(words[:8], 3) for _ in range(draw.randrange(1, 8))] for _ in range(200)]
        made += [[draw.choice(words[:3])] * draw.randrange(40) for _ in range(50)]
    elif kind == "permutations":
        made = [draw.sample(words[:10], draw.randrange(5, 11)) for _ in range(200)]
        made += [sorted(text)[::step] for text in made[:60] for step in (1, -1)]
    elif kind == "near":
        for _ in range(220):
            old = draw.choice(made) if made and draw.random() < 0.8 else draw.choices(words, k=draw.randrange(1, 25))
            made.append(edited(old, draw.randrange(1, 10), words, draw))
    elif kind == "exactly at the threshold":  # 7 / 13 and 13 / 7 among them
        for c, m, n in [(7 * k, 7 * k, 13 * k) for k in range(1, 4)] + [(7 * k, 10 * k, 10 * k) for k in range(1, 4)]:
            for difference in (-1, 0, 1):
                own = iter(f"x{draw.random()}".replace(".", "y") for _ in range(200))
                common = [next(own) for _ in range(c + difference)]
                pair = [edited(common, 0, words, draw) for _ in range(2)]
                for text, length in zip(pair, draw.sample([m, n], 2)):
                    while len(text) < length:
                        text.insert(draw.randrange(len(text) + 1), next(own))
                made += pair
    elif kind == "long":
        for _ in range(70):
            old = draw.choice(made) if made and draw.random() < 0.8 else draw.choices(words * 5, k=draw.randrange(300))
            made.append(edited(old, draw.randrange(1, 5 + len(old) // 2), words, draw))
    elif kind == "short":
        made = [draw.choices(words[:12], k=draw.randrange(4)) for _ in range(200)]
    elif kind == "ever new words":
        for i in range(200):
            made.append(edited(draw.choice(made) if i % 2 else [], 1 + i % 3, [f"n{i}a", f"n{i}b"], draw))
            made[-1] += [f"n{i}c"] * (i % 2 == 0) * 3 + ["the"]
    return [" ".join(text) for text in made]


KINDS = ["three words", "repetitions", "permutations", "near", "exactly at the threshold", "long", "short"]
KINDS += ["ever new words"]


@pytest.fixture(params=["as it is", "tiny"])
def limits(request, monkeypatch):
    """With tiny ones there are many segments, merged and built anew, and many chunks; from 20 tokens on texts are
    `long`."""
    if request.param == "tiny":
        tiny = {"SMALL": 1, "MERGE": 2, "CHUNK": 70, "PAIRS": 5, "BATCH": 6, "LONGEST": 20}
        tiny["EDGES"] = np.array([1, 2, 3, 5, 6, 7, 8, 12, 13, 20, 1 << 40])
        for name, value in tiny.items():
            monkeypatch.setattr(novelty, name, value)


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.7, 0.5, 0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_no_pair_is_lost(kind, threshold, limits):
    draw = random.Random(f"{kind} {threshold}")
    texts = texts_of(kind, draw)
    known, candidates = texts[: len(texts) // 3], ["", *texts[len(texts) // 3 :], "", texts[0]]
    expected = rejections(known, candidates, threshold)
    assert any(expected) == (threshold < 1) and not all(expected)
    for size in (1, 50, len(candidates)):
        without = NoveltyFilter(known, threshold, details=False)
        assert [result is None for result in in_calls_of(without, size, candidates)] == expected
    assert [result is None for result in NoveltyFilter(known, threshold).filter(candidates)] == expected
    grown = NoveltyFilter([], threshold, details=False)
    for text in known:
        grown.add([text])
    assert [result is None for result in grown.filter(candidates)] == expected
    assert len(grown) == len(known) + expected.count(False)


def test_without_details_a_row_has_neither_key(run_2023):
    known, candidates, expected = run_2023
    novelty_filter = NoveltyFilter(iter(known), details=False)
    results = novelty_filter.filter(candidates)
    assert {result is novelty.NEW for result in results if result} == {True}
    assert [result is None for result in results] == [result is None for result in expected]
    assert novelty.NEW._asdict() == {} and novelty.NEW


@pytest.mark.parametrize("threshold, rejected", [(-0.1, True), (1.5, False), (3.0, False)])
def test_thresholds_that_f_never_reaches(threshold, rejected):
    for details in (True, False):
        assert (NoveltyFilter(["a b"], threshold, details=details).filter(["a b"]) == [None]) == rejected


def test_a_segment_is_ranked_anew_as_the_pool_doubles():
    draw = random.Random(5)
    novelty_filter, ranked = NoveltyFilter([], details=False), []
    for text in make_candidates(300, draw):
        novelty_filter.add([text])
        ranked.append(novelty_filter._index._ranked)
    assert set(ranked) == {1, 2, 4, 8, 16, 32, 64, 128, 256}


def test_a_row_without_details_takes_few_bytes():
    draw = random.Random(6)
    words = [f"w{i}" for i in range(5000)]
    texts = [" ".join(draw.choices(words, k=12)) for _ in range(20_000)]
    novelty_filter = NoveltyFilter(texts[:1], details=False)
    tracemalloc.start()
    try:
        results = novelty_filter.filter(texts)
        kept = sum(result is not None for result in results)
        del results
        size = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept > 19_900 and size / kept < 300


def test_of_a_thousand_equal_texts_few_are_compared(monkeypatch):
    novelty_filter, compared = NoveltyFilter(["one two three four five six"] * 50_000, details=False), []
    monkeypatch.setattr(novelty, "cpdist", lambda a, *rest, **more: compared.append(len(a)) or cpdist(a, *rest, **more))
    assert novelty_filter.filter(["one two three four five six", "six five four three two one"]) == [None, novelty.NEW]
    assert max(compared) <= novelty.PAIRS


def test_no_pair_is_compared_twice(limits, monkeypatch):
    draw, pairs = random.Random(8), []
    words = [f"w{i}" for i in range(150)]
    texts = [" ".join(draw.sample(words, draw.randrange(90, 110))) for _ in range(60)]
    novelty_filter = NoveltyFilter(texts[:40], details=False)

    def compared(a, b, **more):
        pairs.extend(zip(a, b))
        return cpdist(a, b, **more)

    monkeypatch.setattr(novelty, "cpdist", compared)
    monkeypatch.setattr(novelty, "CHUNK", 400)
    assert novelty_filter.filter(texts[40:]) == [novelty.NEW] * 20
    assert len(pairs) == len(set(pairs)) > 200


def test_a_text_of_one_token_repeated():
    known = ["a " * 70_000, "b " * 65_535, "c " * 65_534 + "d", "e e e"]
    candidates = ["a " * 40_000, "a " * 37_000, "b " * 35_289, "b " * 35_288, "c " * 40_000, "e e", "e"]
    expected = rejections(known, candidates)
    assert expected == [True, False, True, False, True, True, False]
    assert [result is None for result in NoveltyFilter(known, details=False).filter(candidates)] == expected


@pytest.fixture(scope="module")
def real_instructions() -> list[str]:
    if not (SHARED / "alpaca_data.json").is_file():
        pytest.skip("the original alpaca_data.json is not at hand")
    return [row["instruction"] for row in json.loads((SHARED / "alpaca_data.json").read_text(encoding="utf-8"))]


def decided(novelty_filter: NoveltyFilter, texts: list[str]) -> list[bool]:
    return [result is None for result in in_calls_of(novelty_filter, 85, texts)]


def test_real_instructions_and_variants_of_them(real_instructions):
    texts = real_instructions[::10]
    texts += recombined(texts, 3000, seed=7)
    expected = full_scan([], texts)
    assert 30 < sum(expected) < 1000
    assert decided(NoveltyFilter([], details=False), texts) == expected


@pytest.mark.stress
def test_200_000_real_and_generated_instructions(real_instructions):
    texts = real_instructions + recombined(real_instructions, 200_000 - len(real_instructions), seed=8)
    expected = full_scan([], texts, os.cpu_count() or 1)
    assert sum(expected) > 1000
    assert decided(NoveltyFilter([], details=False), texts) == expected


# ---- exclusion of evaluation sets ----


def excluded(texts: list[str], instruction: str, ngram: int) -> bool:
    """The plain loop: a run of tokens in common, ROUGE-L F above 0.7, or the same but for case and spaces."""

    def runs(tokens: list[str]) -> set[tuple[str, ...]]:
        return {tuple(tokens[i : i + ngram]) for i in range(len(tokens) - ngram + 1)}

    tokens, words = novelty.tokenize(instruction), instruction.casefold().split()
    for text in texts:
        other = novelty.tokenize(text)
        same = words and words == text.casefold().split()
        if same or runs(tokens) & runs(other) or rejections([text], [instruction]) == [True]:
            return True
    return False


@pytest.mark.parametrize("ngram", [1, 4, 13])
def test_exclusion_is_that_of_a_double_loop(ngram, limits):
    draw = random.Random(ngram)
    words = [f"w{i}" for i in range(200)]
    texts = [draw.choices(words, k=draw.choice([0, 1, 5, ngram - 1, ngram, 12, 40, 90])) for _ in range(40)]
    candidates = [draw.choices(words, k=draw.randrange(40)) for _ in range(40)]
    for text in texts:
        candidates.append(edited(text, draw.randrange(6), words, draw))
        for length in (ngram - 1, ngram, ngram + 3):  # at the start, inside, at the end
            at = draw.choice([0, draw.randrange(len(text) + 1), max(0, len(text) - length)])
            run, new = text[at : at + length], [f"new{i}" for i in range(60)]
            candidates.append(new[: draw.randrange(30)] + run + new[30 : 30 + draw.randrange(30)])
    made = [" ".join(text) for text in candidates] + ["new" + " new" * 40]
    known = [" ".join(text) for text in texts]
    expected = [excluded(known, text, ngram) for text in made]
    assert 10 < sum(expected) < len(made)
    exclusion = Exclusion(iter(known), ngram=ngram)
    assert exclusion.matches(made) == expected == [exclusion.matches([text])[0] for text in made]


def test_a_run_of_13_tokens_is_excluded_and_one_of_12_is_not():
    question = "Which of the following is the body cavity that contains the pituitary gland? Abdominal or cranial?"
    tokens = novelty.tokenize(question)
    exclusion = Exclusion([question, "Name the capital of France."])
    around = "Write a long story about a doctor, a nurse and many other people, in which somebody asks: {} And then?"
    for start in range(len(tokens) - 12):
        assert exclusion.matches([around.format(" ".join(tokens[start : start + 13]).upper())]) == [True]
        assert exclusion.matches([around.format(" ".join(tokens[start : start + 12]))]) == [False]
    assert exclusion.matches(["Name the capital of Spain.", "name the CAPITAL of France!"]) == [True, True]
    assert exclusion.matches([around.format("Name the capital of France."), "Name a bird.", ""]) == [False] * 3
    joined = Exclusion([" ".join(tokens[:7]), " ".join(tokens[7:])])  # a run does not go on in the next text
    assert joined.matches([around.format(question)]) == [False] and exclusion.matches([]) == []


def test_texts_without_tokens_are_excluded_verbatim():
    exclusion = Exclusion(["解释一下  光合作用。", "Ünïcödé", "", " \n"])
    assert exclusion.matches(["解释一下 光合作用。\n", "ÜNÏCÖDÉ"]) == [True, True]
    assert exclusion.matches(["解释一下", "", "  "]) == [False, False, False]
    assert Exclusion([]).matches(["", "Name a bird."]) == [False, False]


def test_an_exclusion_learns_nothing_from_candidates():
    exclusion = Exclusion(["Name a bird.", "What is the name of a bird?"])
    before = len(exclusion._ids), len(exclusion._index.ends)
    assert exclusion.matches(["Entirely different tokens here", "name an entirely different bird"]) == [False, False]
    assert (len(exclusion._ids), len(exclusion._index.ends)) == before
