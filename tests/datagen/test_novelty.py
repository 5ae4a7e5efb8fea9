"""The novelty filter: every decision, score and order of 2023's loop over rouge_score."""

import json
import random
from functools import partial

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, SHARED
from rouge_score import rouge_scorer, scoring

from alpaca.datagen import novelty
from alpaca.datagen.novelty import Exclusion, NoveltyFilter, Similarity, common_tokens

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


# ---- the index loses nothing ----


def decisions_by_scan(known: list[str], candidates: list[str], threshold: float = 0.7) -> list[bool]:
    """Whether each candidate is kept, by comparing it with all that is known."""
    numbers: dict[str, int] = {}
    encode = lambda text: [numbers.setdefault(token, len(numbers) + 1) for token in novelty.tokenize(text)]  # noqa: E731
    pool, kept = [encode(text) for text in known], []
    for text in candidates:
        code = encode(text)
        common = common_tokens([code], pool, 2)[0] if pool else np.zeros(0, dtype=np.uint16)
        lengths = np.array([len(other) for other in pool], dtype=np.int64)
        kept.append(not novelty.f_measures(common, len(code), lengths).max(initial=0.0) > threshold)
        if kept[-1]:
            pool.append(code)
    return kept


def changed(text: str, draw: random.Random, words: list[str]) -> str:
    """The text with tokens replaced, dropped, repeated, moved, or more of them."""
    tokens = text.split() or ["x"]
    for _ in range(draw.randrange(1, max(2, len(tokens) // 2))):
        at, kind = draw.randrange(len(tokens)), draw.randrange(5)
        if kind == 0:
            tokens[at] = draw.choice(words)
        elif kind == 1 and len(tokens) > 1:
            del tokens[at]
        elif kind == 2:
            tokens.insert(at, tokens[draw.randrange(len(tokens))])
        elif kind == 3:
            tokens.append(tokens.pop(at))
        else:
            tokens += draw.choices(words, k=draw.randrange(1, 4))
    return " ".join(tokens)


def hard_texts(number: int, draw: random.Random, vocabulary: int, longest: int) -> list[str]:
    """Texts and changed ones of a vocabulary, in which low numbers are frequent."""
    words = [f"w{i}" for i in range(vocabulary)]
    made = [""]
    while len(made) < number:
        if draw.random() < 0.6:
            made.append(changed(draw.choice(made), draw, words))
        else:
            count = draw.choice([1, 2, 3, 7, 13, draw.randrange(1, longest)])
            made.append(" ".join(words[int(vocabulary * draw.random() ** 3)] for _ in range(count)))
        if len(made[-1].split()) > longest:
            made.pop()
    return made


@pytest.mark.parametrize("details", [False, True])
@pytest.mark.parametrize("vocabulary, longest", [(1, 40), (3, 25), (30, 20), (300, 20), (3000, 12), (200, 150)])
@pytest.mark.parametrize("threshold", [0.7, 0.0, 0.5, 1.0])
def test_decisions_are_those_of_a_full_scan(monkeypatch, vocabulary, longest, threshold, details):
    """With segments that merge at once, many chunks, and tokens that the ranking does not know."""
    monkeypatch.setattr(novelty, "SMALL", 40)
    monkeypatch.setattr(novelty, "CHUNK", 97)
    monkeypatch.setattr(novelty, "PAIRS", 5)
    draw = random.Random(f"{vocabulary} {longest} {threshold}")
    texts = hard_texts(700, draw, vocabulary, longest)
    known, candidates = texts[:60], texts[60:]
    expected = decisions_by_scan(known, candidates, threshold)
    novelty_filter = NoveltyFilter(known[:7], threshold, details=details)
    novelty_filter.add(known[7:])
    found, at = [], 0
    while at < len(candidates):
        size = draw.choice([1, 3, 50, 300])
        found += [result is not None for result in novelty_filter.filter(candidates[at : at + size])]
        at += size
    assert found == expected
    assert len(novelty_filter) == 60 + sum(expected)


def test_pairs_at_the_very_bound_are_found():
    """All lengths to 40, as many tokens in common as F above 0.7 needs and one less, at the end of both where only the
    last places of the index can find them; frequent tokens and rare ones."""
    words = [f"w{i}" for i in range(120)]
    noise = [" ".join(words[i % 7 : i % 7 + 4]) for i in range(30)]
    for m in range(1, 41):
        for n in range(m, 41):
            fewest = next((c for c in range(1, m + 1) if scoring.fmeasure(c / n, c / m) > 0.7), m + 1)
            for common in {fewest, fewest - 1} & set(range(m + 1)):
                shared = words[40 - common : 40]
                known, candidate = (
                    " ".join(words[80 : 80 + n - common] + shared),
                    " ".join(words[41 : 41 + m - common] + shared),
                )
                expected = decisions_by_scan([known, *noise], [candidate])
                assert [
                    r is not None for r in NoveltyFilter([known, *noise], details=False).filter([candidate])
                ] == expected


def test_long_texts_without_details():
    novelty_filter = NoveltyFilter(["a " * 70_000, " ".join(f"w{i}" for i in range(70_000))], details=False)
    near = " ".join(f"w{i}" for i in range(9_000, 80_000))
    assert novelty_filter.filter(["a " * 60_000 + "b", near, "a " * 30_000, "b a"]) == [
        None,
        None,
        novelty.NEW,
        novelty.NEW,
    ]
    assert novelty_filter.filter(["a " * 29_000]) == [None]


def test_without_details_no_text_is_kept(run_2023):
    known, candidates, expected = run_2023
    novelty_filter = NoveltyFilter(known, details=False)
    results = in_calls_of(novelty_filter, 40, candidates)
    assert [result is None for result in results] == [result is None for result in expected]
    assert all(result is None or result._asdict() == {} for result in results)
    assert novelty_filter._texts == novelty_filter._codes == []


def real_instructions() -> list[str]:
    if not (SHARED / "alpaca_data.json").exists():
        pytest.skip("the original rows are not here")
    return [row["instruction"] for row in json.loads((SHARED / "alpaca_data.json").read_text())]


def recombined(real: list[str], number: int, draw: random.Random) -> list[str]:
    """Real instructions, words of which are replaced by other real ones."""
    words, made = [word for text in real for word in text.split()], []
    while len(made) < number:
        tokens = draw.choice(real).split()
        for _ in range(round(len(tokens) * draw.uniform(0.1, 0.7))):
            tokens[draw.randrange(len(tokens))] = draw.choice(words)
        made.append(" ".join(tokens))
    return made


@pytest.mark.parametrize("number", [3_000, pytest.param(200_000, marks=pytest.mark.stress)])
def test_decisions_on_real_instructions(number):
    """Beginning with none. The scan of 200,000 takes some minutes."""
    draw = random.Random(0)
    real = real_instructions()
    texts = real[: number // 2] + recombined(real, number - min(number // 2, len(real)), draw)
    draw.shuffle(texts)
    found = [r is not None for r in in_calls_of(NoveltyFilter([], details=False), 500, texts)]
    assert found == decisions_by_scan([], texts) and 0.3 < sum(found) / len(found) < 0.999


# ---- evaluation sets ----


def excluded_by_scan(texts: list[str], candidate: str, ngram: int = 13) -> bool:
    tokens, runs = novelty.tokenize(candidate), lambda t: {tuple(t[i : i + ngram]) for i in range(len(t) - ngram + 1)}
    for text in texts:
        other = novelty.tokenize(text)
        if rouge_scorer._score_lcs(other, tokens).fmeasure > 0.7 or runs(other) & runs(tokens):
            return True
        if text.split() and text.casefold().split() == candidate.casefold().split():
            return True
    return False


def test_instructions_of_an_evaluation_set_are_excluded():
    draw = random.Random(4)
    words = [f"w{i}" for i in range(400)]
    texts = hard_texts(150, draw, 400, 40) + ["解释一下 这个", "Ünïcode Über alles", "  "]
    inside = []
    for _ in range(300):  # 12 to 14 tokens of a text inside of others
        source = draw.choice([text for text in texts if len(text.split()) > 15]).split()
        size = draw.choice([11, 12, 13, 14])
        at = draw.choice([0, len(source) - size, draw.randrange(len(source) - size)])
        around = [draw.choices(words, k=draw.choice([0, 30])), draw.choices(words, k=draw.choice([0, 30]))]
        inside.append(" ".join(around[0] + source[at : at + size] + around[1]))
    candidates = inside + [changed(draw.choice(texts), draw, words) for _ in range(400)]
    candidates += ["解释一下  这个", "解释一下", "ÜNÏCODE über ALLES", "", " ", *texts]
    expected = [excluded_by_scan(texts, candidate) for candidate in candidates]
    assert Exclusion(texts).matches(candidates) == expected
    assert 0.3 < sum(expected) / len(expected) < 0.9
    assert Exclusion([]).matches(["Name a bird.", ""]) == [False, False] and Exclusion(texts).matches([]) == []
