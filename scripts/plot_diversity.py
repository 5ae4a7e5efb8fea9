r"""How diverse instructions are: their most frequent root verbs, and each verb's most frequent noun objects, as the
two-ring picture of the self-instruct (arXiv 2212.10560, figure 2) and Alpaca papers.

    python -m scripts.plot_diversity --data_path seed_tasks.jsonl --output_path diversity
    python -m scripts.plot_diversity --data_path regen.json --output_path figure --min_count 3 --title "Our data"
    python -m scripts.plot_diversity --data_path regen.json --parser spacy --spacy_model en_core_web_md

Writes <output_path>.png, .svg and .json, and prints how many of the instructions the picture stands for. An
instruction counts once, however many inputs it has. The rules (alpaca/datagen/verb_noun.py) need no model; counts of
different parsers cannot be compared, so the JSON names the one that made them.

The angle of a wedge is its share of the instructions drawn. A wedge too thin for its name joins its verb's "other", or
"other" verbs; the JSON has the counts of all.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":
    from alpaca.common.errors import starting

    starting("scripts.plot_diversity")

from alpaca.common import arguments
from alpaca.common.commands import check_numbers, flag
from alpaca.common.errors import UsageError, names_flags, reported
from alpaca.common.files import atomic_write, refuse_overwriting_input
from alpaca.data.rows import load_rows
from alpaca.datagen.sunburst import Sunburst, draw, lay_out
from alpaca.datagen.verb_noun import VerbNoun, verb_noun

SUFFIXES = (".png", ".svg", ".json")
RENAMED = {"output": "output_path"}


@dataclass
class DiversityArguments:
    data_path: str | None = flag(None, "Alpaca file, seed_tasks.jsonl or hub id.")
    output_path: str = flag("diversity", "Where to write, without .png, .svg or .json.")
    top_verbs: int = flag(20, "How many root verbs to draw.")
    top_nouns: int = flag(4, "How many objects of each verb to draw.")
    min_count: int = flag(1, "Draw only pairs that occur at least so often.")
    title: str | None = flag(None, "Text above the picture; by default it names the data.")
    parser: str = flag("rules", "What finds verbs and nouns.", choices=["rules", "spacy"])
    spacy_model: str | None = flag(None, "English model for --parser spacy.")

    def __post_init__(self):
        check_numbers(top_verbs=self.top_verbs, top_nouns=self.top_nouns, min_count=self.min_count)
        if (self.parser == "spacy") != (self.spacy_model is not None):
            raise UsageError(
                "--parser spacy and --spacy_model go together: --parser spacy --spacy_model en_core_web_md"
            )


@dataclass
class Diversity:
    """The counts; those of `pairs` add up to `with_pair`, those of `verbs` to `with_verb`."""

    parser: str
    instructions: int
    with_verb: int
    with_pair: int
    verbs: dict[str, int]
    pairs: dict[str, dict[str, int]]


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    (options,), _ = arguments.parse(argv, (DiversityArguments,), __doc__, "scripts.plot_diversity", aliases=RENAMED)
    plot_diversity(options)


@names_flags
def plot_diversity(options: DiversityArguments) -> None:
    """Count, draw and save."""
    if not options.data_path:
        raise UsageError("--data_path is missing: a file with instructions, such as seed_tasks.jsonl or regen.json")
    output = Path(options.output_path)
    output = str(output.with_suffix("") if output.suffix in SUFFIXES else output)
    for suffix in SUFFIXES:
        refuse_overwriting_input(output + suffix, options.data_path)
    parse = verb_noun if options.parser == "rules" else spacy_parser(options.spacy_model)
    diversity = count([row["instruction"] for row in load_rows(options.data_path)], parse, options.parser)
    if not diversity.with_pair:
        raise UsageError(
            f"--data_path {options.data_path}: nothing to draw, none of its {diversity.instructions:,} instructions "
            f"has a root verb with a noun object; the parser ({options.parser}) reads English"
        )
    name = Path(options.data_path).name
    picture = lay_out(
        most_frequent(diversity.pairs, options), options.title or f"Root verbs and noun objects in {name}"
    )
    save(picture, diversity, output, options)
    print(report(picture, diversity))
    print("wrote " + ", ".join(output + suffix for suffix in SUFFIXES))


def count(instructions: Sequence[str], parse: Callable[[str], VerbNoun], parser: str) -> Diversity:
    instructions = list(dict.fromkeys(instructions))
    parsed = [parse(instruction) for instruction in instructions]
    verbs = Counter(verb for verb, _ in parsed if verb)
    pairs = Counter((verb, noun) for verb, noun in parsed if verb and noun)
    nested: dict[str, dict[str, int]] = {}
    for (verb, noun), number in by_count(pairs).items():
        nested.setdefault(verb, {})[noun] = number
    return Diversity(parser, len(instructions), verbs.total(), pairs.total(), by_count(verbs), nested)


def by_count(counter: dict) -> dict:
    """Sort the most frequent first, equal ones by name, so that a picture does not depend on the order of the rows."""
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))


def most_frequent(pairs: dict[str, dict[str, int]], options: DiversityArguments) -> dict[str, dict[str, int]]:
    """Return what to draw, chosen as the papers do: verbs by the number of their pairs, then the top nouns of each."""
    kept: dict[str, dict[str, int]] = {}
    for verb, nouns in pairs.items():
        if nouns := {noun: number for noun, number in nouns.items() if number >= options.min_count}:
            kept[verb] = nouns
    if not kept:
        highest = max(max(nouns.values()) for nouns in pairs.values())
        raise UsageError(f"--min_count {options.min_count}: nothing to draw, no pair occurs more than {highest} times")
    chosen = list(by_count({verb: sum(nouns.values()) for verb, nouns in kept.items()}))[: options.top_verbs]
    drawn = {verb: dict(list(kept[verb].items())[: options.top_nouns]) for verb in chosen}
    return {verb: drawn[verb] for verb in by_count({verb: sum(nouns.values()) for verb, nouns in drawn.items()})}


def save(picture: Sunburst, diversity: Diversity, output: str, options: DiversityArguments) -> None:
    try:
        shares = (f"{picture.instructions:,}", f"{diversity.instructions:,}\ninstructions")
        figure = draw(picture, (" of " if len("".join(shares)) < 26 else " of\n").join(shares))
        for suffix in (".png", ".svg"):
            with atomic_write(output + suffix, "wb") as file:
                # no date: the same data gives the same bytes
                figure.savefig(file, format=suffix[1:], dpi=200, metadata={"Date": None} if suffix == ".svg" else None)
        counts = {"data_path": options.data_path, **asdict(diversity)}
        with atomic_write(output + ".json") as file:
            json.dump({**counts, "drawn": picture.summary()}, file, indent=1, ensure_ascii=False)
            file.write("\n")
    except OSError as error:
        raise UsageError(f"--output_path {options.output_path}: cannot be written ({error})") from error


def report(picture: Sunburst, diversity: Diversity) -> str:
    def share(number: int) -> str:
        return f"{number:,} ({number / diversity.instructions:.0%})"

    thin = f"; {picture.other:,} more are too rare to be named: fewer --top_verbs, --top_nouns" if picture.other else ""
    return "\n".join(
        (
            f"{diversity.instructions:,} different instructions, parsed by {diversity.parser}:",
            f"  {share(diversity.with_verb)} have a root verb",
            f"  {share(diversity.with_pair)} have a root verb with a noun object",
            f"  {share(picture.instructions)} are drawn by name: {len(picture.pairs)} verbs, "
            f"{sum(map(len, picture.pairs.values()))} pairs{thin}",
            "top verbs: " + ", ".join(f"{verb} {number}" for verb, number in list(diversity.verbs.items())[:10]),
        )
    )


def spacy_parser(model: str) -> Callable[[str], VerbNoun]:
    """Return the papers' own way: the first sentence's root, or the first verb down its first children, and its
    object."""
    try:
        import spacy

        nlp = spacy.load(model)
    except ImportError as error:
        raise UsageError("--parser spacy: spaCy is not installed; pip install spacy, or use --parser rules") from error
    except Exception as error:  # spaCy raises what it likes about a folder
        raise UsageError(
            f"--spacy_model {model}: spaCy cannot load it; python -m spacy download {model}, or use --parser rules"
        ) from error

    def parse(instruction: str) -> VerbNoun:
        token = next((sentence.root for sentence in nlp(instruction).sents), None)
        while token is not None and token.pos_ != "VERB":
            token = next(iter(token.children), None)
        if token is None:
            return VerbNoun(None, None)
        nouns = (child.lemma_ for child in token.children if child.dep_ == "dobj" and child.pos_ == "NOUN")
        return VerbNoun(token.lemma_, next(nouns, None))

    return parse


if __name__ == "__main__":
    with reported("scripts.plot_diversity"):
        main()
