"""Instruction backtranslation: what is filtered, read from ratings, chosen and mixed; nothing is asked twice."""

import json
import os
import re
import shlex

import pytest
from conftest import ROOT, fork, recipe_words, train
from support.completion_server import BAD_KEY, CompletionServer

from alpaca.common.errors import UsageError
from alpaca.data.prompts import backward_prompt, format_prompt, load_prompt_template
from alpaca.datagen.backtranslation import AUGMENTED_TAG, SEED_TAG, Curation, parse_score, rated_row, rating_prompt
from alpaca.datagen.texts import Filters, load_texts, share_of_english_words
from scripts import backtranslate

PROSE = "The tide rises and falls because the moon pulls at the water that is nearest to it, and this has been known "
TEXTS = [PROSE * 2 + f"since year {number}." for number in range(12)]


def run(step, **flags):
    backtranslate.main([step, *(f"--{name}={value}" for name, value in flags.items())])


def read(path):
    text = path.read_text()
    return json.loads(text) if text.startswith(("[", "{\n")) else [json.loads(line) for line in text.splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- ratings ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Clear and complete.\nScore: 4", 4.0),
        ("Good.\n\n**Score:** 4.5/5", 4.5),
        ("**Score: 2**  ", 2.0),
        ("### Final score (1-5): 3,5", 3.5),
        ("The score is [5].", 5.0),
        ("It is good.\n- My final score: 4 out of 5 stars", 4.0),
        ("Score: 4 (out of 5)", 4.0),
        ("Overall score: (4/5) ", 4.0),
        ("Score: 2 points (off topic).", 2.0),
        ("It is good. Score: 4 out of 5 stars", "no_score"),
        ("It is off topic. A score: 5 would need more depth.", "no_score"),
        ("Score: 5 would need more depth.", "no_score"),
        ("Score: 3 or four", "no_score"),
        ("Score: 3 (or 4)", "no_score"),
        ("Score：1 (off topic)", 1.0),
        ("A score: 5 needs more depth.\nScore: 3", 3.0),
        ("Score: 4\n\nLet me know if you need more!", 4.0),
        ("score: four", "no_score"),
        ("There are 5 reasons to like it, 4 of them good.", "no_score"),
        ("A score of 5 would need a source.", "no_score"),
        ("underscore: 4", "no_score"),
        ("Score: 3-4", "no_score"),
        ("Score: 3 or 4", "no_score"),
        ("Score: 80%", "no_score"),
        ("Score: -1", "no_score"),
        ("", "no_score"),
        ("Score: 0", "out_of_range"),
        ("Score: 5.5", "out_of_range"),
        ("Score: 45", "out_of_range"),
        ("Score: 4/10", "out_of_range"),
        ("Score: 4\nScore: 2\nAs said.", "contradiction"),
    ],
)
def test_what_is_read_from_a_rating(text, expected):
    assert parse_score(text) == ((expected, None) if isinstance(expected, float) else (None, expected))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Good.\nScore: 4", 4.0),
        ("It could be\nScore: 2\nBut it is better than this and gets", "cut"),
        ("I'd first think of score: 2. But it is better than this and gets", "cut"),
        ("", "cut"),
        ("Score: 7", "out_of_range"),
    ],
)
def test_a_rating_that_was_cut_counts_by_its_last_line(text, expected):
    assert parse_score(text, cut=True) == ((expected, None) if isinstance(expected, float) else (None, expected))
    row = rated_row(pair(), ["Score: 5\nas I said", text, None], [False, True, True])
    assert row["ratings"] == [5.0, expected, "no_answer"]


def test_the_question_holds_the_pair_and_the_scale():
    question = rating_prompt({"instruction": "Sort {output}.", "input": "b a", "output": "a b {instruction}"})
    assert "Instruction:\nSort {output}.\n\nb a\n\nAnswer:\na b {instruction}\n\nFirst give the reason" in question
    assert re.findall(r"^(\d): ", question, re.MULTILINE) == list("12345") and question.count('"Score: "') == 1


def pair(number=0):
    return {"instruction": f"Question {number}?", "output": f"Answer {number}."}


def test_unread_ratings_are_no_zeros():
    rows = [
        rated_row(pair(0), ["Score: 4", "Score: 5"]),
        rated_row(pair(1), ["Score: 4", "what?"]),
        rated_row(pair(2), ["Score: 9", None]),
    ]
    assert [row["score"] for row in rows] == [4.5, 4.0, None]
    assert [row["ratings"] for row in rows] == [[4.0, 5.0], [4.0, "no_score"], ["out_of_range", "no_answer"]]
    curation = Curation(rows, "r.jsonl")
    assert curation.chosen(4.5) == [pair(0) | {"score": 4.5}] and len(curation.chosen(1)) == 2
    report, told = curation.report(4.5), curation.summary(4.5)
    assert report["histogram"] == dict.fromkeys(map(str, (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 5.0)), 0) | {"4.0": 1, "4.5": 1}
    assert list(report["histogram"]) == sorted(report["histogram"])
    assert report["ratings"] == {"read": 3, "no_score": 1, "out_of_range": 1, "no_answer": 1}
    assert report["pairs_without_a_score"] == [2] and report["chosen"] == 1
    assert "3 pairs, 6 ratings, 3 of them readable (no_score 1, out_of_range 1, no_answer 1)" in told
    assert "1 pairs have no score and are not chosen (rows 2)" in told and "many ratings cannot be read" in told
    assert f"  4.5 | {'#' * 40} 1 (50.0%)" in told and "tells them apart" not in told


def test_a_rater_that_tells_nothing_apart_is_named():
    alike, other = [rated_row(pair(), ["Score: 4"])] * 9, rated_row(pair(), ["Score: 5"])
    assert "9 of 10 pairs score 4: this rater hardly" in Curation([*alike, other], "r").summary(4)
    assert "hardly" not in Curation([*alike, other, other], "r").summary(4)
    with pytest.raises(UsageError, match="r, row 1: has no score and ratings"):
        Curation([alike[0], pair()], "r")
    for score, told in (
        ("4", "is str '4', expected a number"),
        (7, "is 7, expected 1 to 5"),
        (True, "is bool True"),
        (0.5, "is 0.5, expected 1"),
        (float("nan"), "is nan, expected 1 to 5"),
    ):
        with pytest.raises(UsageError, match=f"r, row 1: its score {told}"):
            Curation([alike[0], alike[0] | {"score": score}], "r")
    with pytest.raises(UsageError, match="r: has no rows"):
        Curation([], "r")


# ---- texts ----


def test_texts_of_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("\nOne\nmore line.\n \n\nTwo.\n")
    assert load_texts(str(tmp_path / "a.txt")) == ["One\nmore line.", "Two."]
    rows = write(tmp_path / "rows.jsonl", [{"text": " a "}, {"instruction": "i", "output": "b", "text": "i b"}])
    assert load_texts(str(rows)) == ["a", "b"], "the text of Alpaca's rows repeats their prompt"
    with pytest.raises(UsageError, match=r"row 0: no field 'body'; the row has \['text'\]; choose one"):
        load_texts(str(rows), text_field="body")
    with pytest.raises(UsageError, match="row 1: 'text' must be text, got int 3"):
        load_texts(str(write(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": 3}])))
    with pytest.raises(UsageError, match="row 0: 'text' holds '.ud83d' at character 2"):
        load_texts(str(write(tmp_path / "rows.jsonl", [{"text": "a \ud83d"}])))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UsageError, match="text_field body: a .txt file has no fields"):
        load_texts(str(tmp_path / "a.txt"), text_field="body")


def test_what_is_left_out_and_why():
    german = "Die Flut steigt und fällt, weil der Mond an dem Wasser zieht, das ihm am nächsten ist. " * 3
    texts = [TEXTS[0], "Short.", TEXTS[1] * 20, TEXTS[2].upper(), german, TEXTS[0].upper().capitalize() + " ", TEXTS[3]]
    kept, left_out = Filters().choose(texts)
    assert kept == [0, 4, 6]
    assert left_out == {"too_short": [1], "too_long": [2], "capitals": [3], "duplicate": [5]}
    kept, left_out = Filters(min_english=0.1).choose(texts)
    assert kept == [0, 6] and left_out["not_english"] == [4]
    assert share_of_english_words(PROSE) > 0.3 > 0.05 > share_of_english_words(german)
    assert Filters(1, 10, 1.0).choose(["ABC", "Abc", "0 1", "早上好"])[0] == [0, 2, 3]
    with pytest.raises(UsageError, match="min_chars 9, max_chars 8"):
        Filters(9, 8)


# ---- a run against a server ----


def rate(prompt, body):
    """A rater that likes even numbers; what it says depends on the seed."""
    number = int(re.search(r"since year (\d+)", prompt)[1])
    if number == 3:
        return "No idea."
    return f"Seed {body['seed']}.\nScore: {4 + (number % 2 == 0) - 0.5 * (body['seed'] % 2)}"


def test_nothing_is_asked_twice(tmp_path, capsys):
    texts = [*({"text": text} for text in TEXTS[:6]), {"text": "short"}, *({"text": text} for text in TEXTS[6:])]
    flags = dict(data_path=write(tmp_path / "texts.jsonl", texts), output_path=tmp_path / "pairs.jsonl", batch_size=2)
    answers = {text: f" When was it known ({number})?" for number, text in enumerate(TEXTS)}
    answers[TEXTS[5]], answers[TEXTS[7]] = "  ", ("When was it", "length")
    prompts = {backward_prompt(text): answer for text, answer in answers.items()}
    with CompletionServer(lambda prompt, body: prompts[prompt]) as server:
        flags |= dict(base_url=server.url, model_name="tiny")
        server.script = [None] * 5 + [BAD_KEY]
        with pytest.raises(UsageError, match="key"):
            run("augment", **flags)
        assert len(server.requests) in (6, 7) and not flags["output_path"].exists()
        run("augment", **flags)
        asked = [request.prompt for request in server.requests if request.body["top_p"] == 0.9]
        assert len(asked) == 13 and set(asked) == set(prompts), "one twice: the server had refused it"
        assert len({request.body["seed"] for request in server.requests}) == 12
        for change in ({"temperature": 0.5}, {"min_chars": len(TEXTS[0]) + 1}, {"seed": 1}):
            with pytest.raises(UsageError, match="made with other arguments"):
                run("augment", **flags | change)
        assert len(server.requests) == 13
    numbers = [n for n in range(13) if n != 6]
    expected = [
        {"instruction": answers[text].strip(), "output": text, "source": n}
        for n, text in zip(numbers, TEXTS)
        if n not in (5, 8)
    ]
    assert read(flags["output_path"]) == expected
    report = read(tmp_path / "pairs.jsonl.report.json")
    assert report["left_out"] == {"too_short": [6], "empty_instruction": [5], "cut_instruction": [8]}
    assert "  too_short: 1 (rows 6)" in capsys.readouterr().out

    pairs = len(expected)
    flags = dict(data_path=flags["output_path"], output_path=tmp_path / "a5.json", ratings_path=tmp_path / "r.jsonl")
    with CompletionServer(rate) as server:
        asking = dict(base_url=server.url, model_name="tiny", api="chat")
        run("curate", **flags, **asking)
        assert len(server.requests) == pairs
        run("curate", **flags, **asking, ratings=3)
        assert len(server.requests) == 3 * pairs and len({r.body["seed"] for r in server.requests}) == 3 * pairs
        run("curate", **flags, **asking, ratings=2, threshold=4)
        with pytest.raises(UsageError, match="--ratings_path .*made with other arguments"):
            run("curate", **flags, **asking, top_p=0.8)
        assert len(server.requests) == 3 * pairs, "fewer ratings are there already"
        assert server.requests[0].prompt.startswith("Judge how well")
        capsys.readouterr()
        run("curate", **flags, **asking, ratings=2, ask_again="unread")
        again = server.requests[3 * pairs :]
        assert len(again) == 2 and not {r.body["seed"] for r in again} & {
            r.body["seed"] for r in server.requests[: 3 * pairs]
        }
        assert len({r.prompt for r in again}) == 1, "both ratings of the one pair"
        assert "--ask_again unread asks again" in capsys.readouterr().out
    rated = read(tmp_path / "r.jsonl")
    assert [row["source"] for row in rated] == [row["source"] for row in expected], "in the order of the file"
    (unread,) = [number for number, row in enumerate(rated) if row["score"] is None]
    assert rated[unread]["ratings"] == ["no_score"] * 2 and rated[unread]["texts"] == ["No idea."] * 2
    for row in rated:
        seeds = [int(re.search(r"\d+", text)[0]) for text in row["texts"] if "Seed" in text]
        high = 4 + (int(row["output"].split("year ")[1][:-1]) % 2 == 0)
        assert row["score"] == (sum(high - 0.5 * (seed % 2) for seed in seeds) / 2 if seeds else None)
    capsys.readouterr()
    for threshold in (5, 4):
        run("curate", ratings_path=tmp_path / "r.jsonl", output_path=tmp_path / "again.json", threshold=threshold)
        chosen = [row["source"] for row in rated if (row["score"] or 0) >= threshold]
        assert [row["source"] for row in read(tmp_path / "again.json")] == chosen and 0 < len(chosen) < pairs
        report = read(tmp_path / "again.json.report.json")
        assert report["chosen"] == len(chosen) and report["pairs_without_a_score"] == [unread]
        assert "1 pairs have no score and are not chosen (rows 3)" in capsys.readouterr().out


# ---- mix ----


def test_both_data_get_their_tags(tmp_path, capsys):
    seed = write(tmp_path / "seed.jsonl", [{"instruction": "Sort.", "input": "b a", "output": "a b"}, pair(1), pair(1)])
    chosen = write(
        tmp_path / "a5.jsonl", [pair(n) | {"score": 5.0} for n in (1, 2)] + [{"instruction": " ", "output": "x"}]
    )
    flags = dict(seed_path=seed, augmented_path=chosen, output_path=tmp_path / "m1.json")
    run("mix", **flags)
    rows = {row["output"]: row for row in read(tmp_path / "m1.json")}
    assert rows.keys() == {"a b", "Answer 1.", "Answer 2."} and rows["a b"]["input"] == "b a"
    assert rows["a b"]["instruction"] == f"Sort.\n\n{SEED_TAG}" and rows["a b"]["source"] == "seed"
    assert rows["Answer 1."]["instruction"] == f"Question 1?\n\n{SEED_TAG}"
    assert rows["Answer 2."]["instruction"] == f"Question 2?\n\n{AUGMENTED_TAG}"
    out = capsys.readouterr().out
    assert "2 seed rows, 1 augmented rows, 2 duplicates dropped, 1 pairs without instruction or output dropped" in out
    templates = load_prompt_template(tmp_path / "m1.json.prompt_template.json")
    assert f"Sort.\n\n{SEED_TAG} {AUGMENTED_TAG}\n\n### Input:\nb a" in format_prompt(
        rows["a b"] | {"instruction": "Sort."}, templates
    )
    run("mix", **flags, tags=False)
    assert {row["instruction"] for row in read(tmp_path / "m1.json")} == {"Sort.", "Question 1?", "Question 2?"}
    many = write(tmp_path / "many.jsonl", map(pair, range(50)))
    orders = []
    for shuffle in (1, 1, 2):
        run("mix", seed_path=many, output_path=tmp_path / "m0.json", seed=shuffle)
        orders.append([row["output"] for row in read(tmp_path / "m0.json")])
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2]) != orders[0]
    with pytest.raises(UsageError, match="has all rated pairs; give curate's --output_path"):
        run("mix", **flags | {"augmented_path": write(tmp_path / "r.jsonl", [rated_row(pair(), ["Score: 1"])])})
    with pytest.raises(UsageError, match="--seed_path .*: row 1: no field 'output'"):
        run("mix", **flags | {"seed_path": write(tmp_path / "bad.jsonl", [pair(), {"instruction": "x"}])})


# ---- train_backward ----


def command_of(capsys, **flags):
    run("train_backward", **{"data_path": "seed.json", "model_name_or_path": "base", "output_dir": "out"} | flags)
    words = shlex.split(capsys.readouterr().out)
    return words, dict(word[2:].split("=", 1) for word in words if "=" in word)


def test_the_backward_model_is_that_of_the_recipe(capsys, monkeypatch):
    words, flags = command_of(capsys, dry_run=True)
    assert words[1] == str(ROOT / "train.py")
    recipe = recipe_words("backtranslation_llama2_7b_lora.sh", [], {})[3:]
    named = {name.removeprefix("--"): value for name, value in zip(recipe[::2], recipe[1::2])}
    for name in ("model_name_or_path", "data_path", "output_dir", "gradient_accumulation_steps"):
        named.pop(name), flags.pop(name)
    assert flags == named

    become = []
    monkeypatch.setattr(os, "execv", lambda program, words: become.append([program, *words]))
    words, flags = command_of(capsys, nproc_per_node=4, lora_target_modules="all-linear", max_steps=3)
    assert become == [[words[0], *words]] and "torch.distributed.run" in words
    assert (flags["gradient_accumulation_steps"], flags["max_steps"]) == ("2", "3")
    assert flags["lora_target_modules"] == "all-linear" and sum("lora_target" in word for word in words) == 1
    with pytest.raises(
        UsageError, match="--per_device_train_batch_size 5 in 1 processes does not divide the batch of 32"
    ):
        command_of(capsys, per_device_train_batch_size=5)
    with pytest.raises(UsageError, match="expected a flag such as"):
        backtranslate.main(["train_backward", "a", "b", "c", "--report_to", "x", "1", "True", "y"])


@pytest.mark.parametrize(
    ("step", "flags", "message"),
    [
        ("augment", {"min_char": 3}, "unknown flag --min_char; did you mean --min_chars"),
        ("augment", {"data_path": "x.txt"}, "--data_path x.txt: no such file"),
        ("augment", {"top_p": 0}, "--top_p 0.0: expected more than 0"),
        ("augment", {"api": "auto"}, "--api auto: expected completions, or chat"),
        ("augment", {"min_chars": 3000}, "the filters leave none of its 1 texts"),
        ("curate", {"threshold": 6}, "--threshold 6.0: expected 1 to 5"),
        ("curate", {"ratings": 2, "temperature": 0}, "--ratings 2: at --temperature 0 they are all the same"),
        ("curate", {"model_name": None}, "expected --data_path and --model to rate pairs, or --ratings_path"),
        ("curate", {"base": "x"}, "--base is for the model of a folder; m is a server's"),
        ("mix", {}, "mix needs --seed_path"),
    ],
)
def test_mistakes_fail_before_work(tmp_path, step, flags, message):
    (tmp_path / "rows.jsonl").write_text(json.dumps(pair() | {"output": TEXTS[0]}))
    given = {"data_path": tmp_path / "rows.jsonl", "model_name": "m"} if step != "mix" else {}
    given |= {"output_path": tmp_path / "out.json"} | flags
    with pytest.raises(UsageError, match=message):
        run(step, **{name: value for name, value in given.items() if value is not None})
    assert not list(tmp_path.glob("out*"))


# ---- the loop ----


@pytest.mark.stress
@pytest.mark.slow
def test_the_loop_through_m1(tiny, tmp_path, capsys):
    """In miniature, with the commands of the README; M0 also learns from the seed data what a rating looks like."""
    seeds = [pair(n) | {"output": TEXTS[n]} for n in range(8)]
    taught = [{"instruction": rating_prompt(row), "output": "It helps.\nScore: 5"} for row in seeds]
    seed, texts = (
        write(tmp_path / "seed.jsonl", seeds),
        write(tmp_path / "texts.jsonl", [{"text": t} for t in TEXTS[6:]]),
    )
    usual = dict(model_name_or_path=tiny("llama"), use_cpu=True, save_strategy="no", logging_steps=50)

    run("train_backward", dry_run=True, data_path=seed, output_dir=tmp_path / "Myx", max_steps=2, **usual)
    fork("train.py", shlex.split(capsys.readouterr().out)[2:])
    flags = dict(data_path=texts, model_name=tmp_path / "Myx", output_path=tmp_path / "candidates.jsonl", batch_size=4)
    run("augment", **flags, max_tokens=12, keep_cut=True)
    candidates = read(tmp_path / "candidates.jsonl")
    assert [row["output"] for row in candidates] == [TEXTS[6 + row["source"]] for row in candidates] and candidates

    m0 = usual | dict(
        learning_rate=1e-2,
        max_steps=40,
        per_device_train_batch_size=4,
        model_max_length=768,
        output_dir=tmp_path / "M0",
    )
    train(m0 | dict(data_path=write(tmp_path / "m0.jsonl", seeds[:4] + taught[:4])))
    rater = dict(
        data_path=tmp_path / "candidates.jsonl", model_name=tmp_path / "M0", max_tokens=24, batch_size=4, temperature=0
    )
    run("curate", **rater, output_path=tmp_path / "a5.json")
    chosen = read(tmp_path / "a5.json")
    assert {row["score"] for row in chosen} == {5.0}
    run("mix", seed_path=seed, augmented_path=tmp_path / "a5.json", output_path=tmp_path / "m1.json")
    rows = read(tmp_path / "m1.json")
    assert len(rows) == len(seeds) + len(chosen)
    train(usual | dict(max_steps=1, data_path=tmp_path / "m1.json", output_dir=tmp_path / "M1"))
    again = dict(output_path=tmp_path / "a5-2.json", prompt_template=tmp_path / "m1.json.prompt_template.json")
    run("curate", **rater | {"model_name": tmp_path / "M1"}, **again)
    assert len(read(tmp_path / "a5-2.json.ratings.jsonl")) == len(candidates), "M1 has rated the same candidates"
    with pytest.raises(UsageError, match="M0: was trained to answer instructions, not to write them"):
        run("augment", **flags | {"model_name": tmp_path / "M0", "output_path": tmp_path / "other.jsonl"})
    with pytest.raises(UsageError, match="a5.json.ratings.jsonl: .*made with other arguments .*weights of"):
        run("curate", **rater | {"model_name": tmp_path / "M1"}, output_path=tmp_path / "a5.json")
