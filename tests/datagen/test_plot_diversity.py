"""The diversity figure: what the rules read out of instructions, counts that add up, names that never overlap."""

import colorsys
import itertools
import json
import math
import random
import sys
import types
import xml.etree.ElementTree as xml

import pytest
from conftest import ROOT

from alpaca.common.errors import UsageError
from alpaca.datagen import sunburst
from alpaca.datagen.verb_noun import singular, verb_base, verb_noun
from scripts.plot_diversity import DiversityArguments, main, most_frequent

pytestmark = pytest.mark.slow  # many small cases

SENTENCES = [
    # the verb
    ("Write a poem about the sea.", "write", "poem"),
    ("please list three rivers", "list", "river"),
    ("Briefly explain the water cycle.", "explain", "cycle"),
    ("Given a triangle, find its area.", "find", "area"),
    ("Given a triangle with three equal sides find the area.", "find", "area"),
    ("In one sentence, compare the two plans.", "compare", "plan"),
    ("Using the notes below, draft a short, clear email to the team.", "draft", "email"),
    ("Using the words design, plan and build, write a story.", "write", "story"),
    ("Could you please suggest a name for my cat?", "suggest", "name"),
    ("I want you to invent a riddle.", "invent", "riddle"),
    ("I'd like a quiet poem.", "like", "poem"),
    ("Help me write a cover letter.", "write", "letter"),
    ("Your task is to sort the rows by price.", "sort", "row"),
    ("You are given four numbers, and you need to compute their mean.", "compute", "mean"),
    ("You are a guide in an old town. Describe the market square.", "describe", "square"),
    ("A patient left a message. Pick the intent that fits.", "pick", "intent"),
    ("Do not use long words.", "use", "word"),
    ("Task: Translate the letter into French.", "translate", "letter"),
    ("Photoshop the picture.", "photoshop", "picture"),
    ("REPHRASE THE SENTENCE BELOW", "rephrase", "sentence"),
    ("Re-arrange the lines", "rearrange", "line"),
    ("Summarise the report; analyse nothing else.", "summarize", "report"),
    # no verb: questions, other languages, nothing
    ("What is the capital of Peru?", None, None),
    ("How do bees find flowers? Write two sentences.", None, None),
    ("In a noisy shop, how would you ask for help", None, None),
    ("Three cats sleep on two mats.", None, None),
    ("Schreibe ein Gedicht über das Meer.", None, None),
    ("写一首诗。", None, None),
    ("", None, None),
    (" _ \n ... ?", None, None),
    # the object
    ("Make a list of cheap hobbies.", "make", "hobby"),
    ("Give me three examples of irony.", "give", "irony"),
    ("Write a few lines of code.", "write", "code"),
    ("Name at least five kinds of bread", "name", "bread"),
    ("Sort the list of names.", "sort", "list"),
    ("Provide an example of how bees dance.", "provide", "example"),
    ("Give this story a title.", "give", "title"),
    ("Tell me a joke that children like.", "tell", "joke"),
    ("Compare and contrast cats and dogs.", "compare", "cat"),
    ("Read, check and sort the two lists", "read", "list"),
    ("Come up with a slogan.", "come", "slogan"),
    ("Point out the first wrong step.", "point", "step"),
    ("Write in French a letter to the mayor.", "write", "letter"),
    ("Write a story set in a bakery.", "write", "story"),
    ("Design a page listing the prices.", "design", "page"),
    ("Create a job listing for a baker.", "create", "listing"),
    ("Describe the teacher's old wooden desk.", "describe", "desk"),
    ('Explain the "butterfly effect" theory.', "explain", "theory"),
    ("Describe the planet Mars.", "describe", "planet"),
    ("Write a machine learning Python script", "write", "script"),
    ("Write a Keras model.", "write", "model"),
    ("Create a time-table of the day.", "create", "time-table"),
    ("Supply the missing word.", "supply", "word"),
    ("Find the nearest open shops today.", "find", "shop"),
    ("Compare democratic and autocratic states.", "compare", "state"),
    ("List some of the children of the king.", "list", "child"),
    ("Rewrite it.", "rewrite", None),
    ("Explain why the sky is blue.", "explain", None),
    ("Describe Iron Man.", "describe", None),
    ('Translate "Good morning, write a poem" into Greek.', "translate", None),
    ("Act as a hotel receptionist.", "act", None),
    ("Suppose your sister is late.", "suppose", None),
    ("Reply to the letter with a question.", "reply", None),
    ("Compute 3 + 4.", "compute", None),
]


@pytest.mark.parametrize("text, verb, noun", SENTENCES, ids=[text[:40] for text, *_ in SENTENCES])
def test_sentences(text, verb, noun):
    assert verb_noun(text) == (verb, noun)


def test_base_forms():
    plurals = {
        "cities": "city",
        "boxes": "box",
        "wolves": "wolf",
        "movies": "movie",
        "people": "person",
        "class": "class",
        "bus": "bus",
        "series": "series",
        "physics": "physics",
        "lyrics": "lyric",
        "ads": "ad",
        "heroes": "hero",
        "analyses": "analysis",
        "shoes": "shoe",
        "essays": "essay",
        "half-lives": "half-life",
    }
    assert {noun: singular(noun) for noun in plurals} == plurals
    verbs = {"Re-write": "rewrite", "categorise": "categorize", "analyse": "analyze", "exercise": None, "ready": None}
    assert {verb: verb_base(verb) for verb in verbs} == verbs


def test_any_text_is_read_and_fast():
    rng = random.Random(0)
    pieces = (
        "write a list of , . ? \" ' ( [ < ``` make given 3 US is and 5-word s' 's _ é 早 \n : - help me most".split(" ")
    )
    for _ in range(3000):
        verb, noun = verb_noun(rng.choice(["", " "]).join(rng.choices(pieces, k=rng.randint(0, 12))))
        assert verb or not noun
    for text in ("write, " * 20000, "a list of " * 9999, '"' * 9999, "f(" * 9999, "a" * 99999):
        verb_noun(text)


def plot(tmp_path, instructions, *words):
    """Run the command on these instructions; the picture's JSON."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": text, "input": "", "output": "x"} for text in instructions]))
    main(["--data_path", str(path), "--output", str(tmp_path / "out" / "figure.png"), *words])
    return json.loads((tmp_path / "out" / "figure.json").read_text(encoding="utf-8"))


def test_seed_tasks_from_file_to_picture(tmp_path, capsys):
    output = tmp_path / "diversity"
    main(["--data_path", str(ROOT / "seed_tasks.jsonl"), "--output", str(output)])
    told = json.loads((tmp_path / "diversity.json").read_text(encoding="utf-8"))
    assert told["parser"] == "rules" and told["instructions"] == 175
    assert sum(told["verbs"].values()) == told["with_verb"] > 120
    assert sum(sum(nouns.values()) for nouns in told["pairs"].values()) == told["with_pair"] > 100
    assert all(sum(nouns.values()) <= told["verbs"][verb] for verb, nouns in told["pairs"].items())
    drawn = told["drawn"]
    assert drawn["instructions"] == sum(sum(nouns.values()) for nouns in drawn["pairs"].values())
    assert len(drawn["pairs"]) == 20 and max(map(len, drawn["pairs"].values())) == 4 and drawn["other"] == 0
    printed = capsys.readouterr().out
    for number in (175, told["with_verb"], told["with_pair"], drawn["instructions"]):
        assert f" {number} (" in printed or printed.startswith(f"{number} ")
    assert f"top verbs: write {told['verbs']['write']}" in printed

    from PIL import Image

    with Image.open(tmp_path / "diversity.png") as image:
        image.load()
        assert min(image.size) >= 2000 and len(image.convert("RGB").getcolors(2**24)) > 100
    assert xml.parse(tmp_path / "diversity.svg").getroot().tag.endswith("svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diversity.json", "diversity.png", "diversity.svg"]


def test_the_same_rows_give_the_same_picture_and_count_once(tmp_path):
    texts = ["Write a poem."] * 3 + ["Write a song.", "Write the poem.", "List five birds.", "Name a town.", "Why?"]
    told = plot(tmp_path, texts)
    first = (tmp_path / "out" / "figure.svg").read_bytes()
    assert told["instructions"] == 6 and told["with_pair"] == 5 and told["with_verb"] == 5
    assert told["pairs"] == {"write": {"poem": 2, "song": 1}, "list": {"bird": 1}, "name": {"town": 1}}
    assert plot(tmp_path, texts[::-1])["pairs"] == told["pairs"]
    assert (tmp_path / "out" / "figure.svg").read_bytes() == first


def test_what_is_drawn():
    pairs = {"write": {"poem": 5, "story": 3, "song": 1}, "list": {"bird": 4}, "name": {"town": 1}}

    def drawn(**options):
        return most_frequent(pairs, DiversityArguments(**options))

    assert drawn() == pairs
    assert drawn(top_verbs=1, top_nouns=2) == {"write": {"poem": 5, "story": 3}}
    assert drawn(min_count=4) == {"write": {"poem": 5}, "list": {"bird": 4}}
    with pytest.raises(UsageError, match="--min_count 6: .* no pair occurs more than 5 times"):
        drawn(min_count=6)


# --- the picture


def corners(text, renderer):
    """The rectangle of a text, turned as the text is: get_window_extent alone gives the upright box around it."""
    box = text.get_window_extent(renderer)
    middle = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
    turn = text.get_rotation()
    text.set_rotation(0)
    flat = text.get_window_extent(renderer)
    text.set_rotation(turn)
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    halves = [(x * flat.width / 2, y * flat.height / 2) for x, y in ((1, 1), (-1, 1), (-1, -1), (1, -1))]
    return [(middle[0] + x * c - y * s, middle[1] + x * s + y * c) for x, y in halves]


def overlap(a, b):
    """Separating axes: two rectangles are apart if they are so along one of their four sides."""
    for box in (a, b):
        for (x0, y0), (x1, y1) in zip(box, box[1:3]):
            across = [[x * (x1 - x0) + y * (y1 - y0) for x, y in corners_] for corners_ in (a, b)]
            if max(across[0]) <= min(across[1]) or max(across[1]) <= min(across[0]):
                return False
    return True


def check(pairs, title="Title", center="1 of 2\ninstructions"):
    picture = sunburst.lay_out(pairs, title)
    figure = sunburst.draw(picture, center)
    renderer = figure.canvas.get_renderer()
    texts = figure.axes[0].texts
    boxes = [corners(text, renderer) for text in texts]
    for text, box in zip(texts, boxes):
        assert text.get_text().strip() and text.get_size() >= 7
        assert all(0 <= x <= figure.bbox.width and 0 <= y <= figure.bbox.height for x, y in box), text.get_text()
    for (a, box), (b, other) in itertools.combinations(zip(texts, boxes), 2):
        assert not overlap(box, other), (a.get_text(), b.get_text())
    labelled = [wedge for wedge in picture.wedges if wedge.label]
    for wedge, box in zip(labelled, boxes):  # inside its own ring
        inner, outer = (radius * figure.dpi for radius in sunburst.RINGS[wedge.ring])
        away = [math.dist(point, [part * figure.dpi for part in sunburst.CENTER]) for point in box]
        assert inner <= min(away) and max(away) <= outer, wedge.label.text
    counted = picture.instructions + picture.other
    assert counted == sum(sum(nouns.values()) for nouns in pairs.values())
    for ring in (0, 1):  # each ring closed, without gaps
        wedges = [wedge for wedge in picture.wedges if wedge.ring == ring]
        ends = [0, *itertools.accumulate(wedge.extent for wedge in wedges)]
        assert [wedge.start for wedge in wedges] == pytest.approx(ends[:-1], abs=1e-6) and ends[-1] == pytest.approx(
            360
        )
    return picture


def test_the_overlap_check_itself():
    square = [(1, 1), (0, 1), (0, 0), (1, 0)]

    def moved(x, y):
        return [(a + x, b + y) for a, b in square]

    diamond = [(2.4, 1.2), (1.2, 2.4), (0, 1.2), (1.2, 0)]  # its upright box holds the square's corner, it does not
    assert overlap(square, moved(0.9, 0.9)) and not overlap(square, moved(1.1, 0))
    assert not overlap(moved(-0.45, -0.45), diamond) and overlap(moved(0.2, 0.2), diamond)


def test_labels_of_the_seed_tasks(tmp_path):
    texts = [json.loads(line)["instruction"] for line in (ROOT / "seed_tasks.jsonl").read_text("utf-8").splitlines()]
    pairs = {}
    for verb, noun in filter(all, map(verb_noun, texts)):
        pairs.setdefault(verb, {}).setdefault(noun, 0)
        pairs[verb][noun] += 1
    check(most_frequent(pairs, DiversityArguments()))


HARD = {
    "one": {"write": {"poem": 1}},
    "two": {"write": {"poem": 999}, "list": {"bird": 1}},
    "long": {
        "deinstitutionalize" * k: {"antidisestablishmentarianism" * k: 3, "i" * 50: 2, "ox": 1} for k in (1, 2, 9)
    },
    "thin": {f"verb{i}": {f"noun{j}": 4000 // (i + 1) ** 2 // (j + 1) + 1 for j in range(12)} for i in range(40)},
    "even": {f"summarize{i}": {f"characteristic{j}": 1 for j in range(4)} for i in range(20)},
    "crowd": {f"v{i}": {"w": 1} for i in range(600)},
}


@pytest.mark.parametrize("name", HARD)
def test_labels_of_hard_cases(name):
    picture = check(HARD[name], title=f"A title of {name}, $5 and _more_ " * (9 if name == "long" else 1))
    assert (picture.other > 0) == (name in ("two", "thin", "crowd"))
    if name == "even":
        assert sum(map(len, picture.pairs.values())) == 80


def test_a_title_with_two_dollars_is_no_formula():
    assert sunburst.text_width("$aa bb cc$") == pytest.approx(sunburst.text_width("Saa bb ccS"))
    title, size = sunburst.title_size("a price of $" + "much more " * 12 + "$")
    assert sunburst.text_width(title) * size <= sunburst.WIDTH - 0.6


def test_colors():
    for number in range(2, 31):
        colors = [sunburst.verb_color(i, number) for i in range(number)]
        hues = [colorsys.rgb_to_hls(*color)[0] for color in colors]
        apart = [min(abs(a - b), 1 - abs(a - b)) for a, b in zip(hues, hues[1:] + hues[:1])]
        assert min(apart) > 0.15 and len(set(colors)) == number
        for color, hue in zip(colors, hues):
            linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color]
            assert (
                0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05
            ) / 0.05 >= 4.5  # WCAG AA on black
            assert colorsys.rgb_to_hls(*sunburst.tint(color, 0.78))[0] == pytest.approx(hue, abs=1e-6)


# --- mistakes


def test_bad_input(tmp_path):
    for words, message in (
        ([], "--data_path is missing"),
        (["--data_path", "./nowhere.json"], "--data_path ./nowhere.json: no such file"),
        (["--data_path", "x.json", "--top_verbs", "0"], "--top_verbs 0: expected at least 1"),
        (["--data_path", "x.json", "--top_verb", "3"], "top_verbs"),
        (["--data_path", "x.json", "--parser", "spacy"], "--parser spacy and --spacy_model go together"),
    ):
        with pytest.raises(UsageError) as error:
            main(words)
        assert message in str(error.value)
    bad = tmp_path / "bad.json"
    bad.write_text('[{"question mark": "Write.", "output": ""}]')
    with pytest.raises(UsageError, match="row 0: no field 'instruction'"):
        main(["--data_path", str(bad)])
    with pytest.raises(UsageError, match="none of its 2 instructions .* noun object; the parser .rules. reads English"):
        plot(tmp_path, ["Why?", "Explain why."])
    (tmp_path / "file").write_text("")
    bad.write_text('[{"instruction": "Write a poem.", "output": ""}]')
    with pytest.raises(UsageError, match="--output_path:? .*: cannot be written"):
        main(["--data_path", str(bad), "--output", str(tmp_path / "file" / "figure")])


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert "python -m scripts.plot_diversity --data_path seed_tasks.jsonl" in shown
    for flag in ("--top_verbs", "--top_nouns", "--min_count", "--title", "--parser", "--spacy_model"):
        assert flag in shown


def test_spacy(tmp_path, monkeypatch):
    """The papers' descent, on a stand-in for spaCy: this suite installs no model."""
    spacy_flags = ["--parser", "spacy", "--spacy_model", "en_x"]
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(UsageError, match="spaCy is not installed"):
        plot(tmp_path, ["Write a poem."], *spacy_flags)

    def token(lemma, pos, dep, *children):
        return types.SimpleNamespace(lemma_=lemma, pos_=pos, dep_=dep, children=children)

    write = token("write", "VERB", "ROOT", token("you", "PRON", "dobj"), token("poem", "NOUN", "dobj"))
    roots = {
        "Write me a poem.": write,
        "Is it so?": token("be", "AUX", "ROOT"),
        "Ahem": token("ahem", "X", "ROOT", write),
    }

    def load(model):
        if model != "en_x":
            raise OSError("[E050] Can't find model")
        return lambda text: types.SimpleNamespace(sents=iter([types.SimpleNamespace(root=roots[text])]))

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=load))
    told = plot(tmp_path, list(roots), *spacy_flags)
    assert told["parser"] == "spacy" and told["pairs"] == {"write": {"poem": 2}} and told["instructions"] == 3
    with pytest.raises(UsageError, match="--spacy_model en_y: spaCy cannot load it"):
        plot(tmp_path, ["Write a poem."], "--parser", "spacy", "--spacy_model", "en_y")
