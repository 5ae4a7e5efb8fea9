"""The data gate: what is known of the rows before anything expensive happens. Sizes, and every way in which a row loses
something or is not what it seems, with its count and first row numbers (from 0, as an index into the file's list, which
is not always that into the dataset: a conversation gives several rows, or none)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from alpaca.common.errors import InputError
from alpaca.data.prompts import template_parts
from alpaca.data.rows import Data, Row, describe_unread
from alpaca.data.tokenization import Tokens


@dataclass(frozen=True)
class Problem:
    meaning: str
    advice: str
    tolerated: float = 1.0  # share of the rows beyond which training would be spoiled: exit code 1 of inspect_data


PROBLEMS = {
    "truncated": Problem("cut at --model_max_length", "raise it if their ends matter"),
    "no_eos": Problem("the end-of-text token is cut off", "the model does not learn to stop from them", 0.01),
    "nothing_to_learn": Problem("no target is left", "the prompt alone fills --model_max_length", 0.001),
    "merged_boundary": Problem(
        "the answer's first character merges with the prompt's last token and is masked with it, as in 2023",
        "--prompt_boundary split tokenizes the two apart",
    ),
    "empty_answer": Problem("the answer is empty", "the model learns empty answers", 0.01),
    "control_text": Problem("text of a control token such as </s> in a field", "it is taken as plain text", 0.01),
    "template_text": Problem(
        "text of the prompt template such as ### Response: in a field",
        "the model learns to write it; often several tasks in one row",
        0.01,
    ),
    "duplicate": Problem("an earlier row word for word", "they count twice", 0.05),
    "repeated_prompt": Problem("an earlier prompt with another answer", "fine if meant so"),
    "repeated_field": Problem("a field is given twice, in the row or in the header", "only the last of both is read"),
    # of conversations only:
    "no_pair": Problem("no human turn with an answer", "they are left out", 0.05),
    "ends_on_human": Problem("the conversation ends on a human turn", "that turn is left out"),
    "unpaired_turns": Problem("turns without text or partner, or text before the first", "those are left out"),
    "not_text_turns": Problem("turns that call a tool, or hold an image", "those are not taken; only text is learned"),
    "later_pairs": Problem("more pairs follow the first", "--turns all learns from them too"),
    "earlier_pairs": Problem("more pairs come before the last", "--turns all learns from them too"),
}


@dataclass
class DataReport:
    """What is known of the rows: sizes in tokens, the `numbers` of rows, row numbers per name of PROBLEMS, and what is
    `unread` of the file and what it was `read_as`, as alpaca.data.rows.Data has it."""

    name: str
    lengths: list[int]
    num_targets: int
    numbers: list[int]
    problems: dict[str, list[int]]
    unread: Mapping[str, int] = field(default_factory=dict)
    read_as: str | None = None

    def __str__(self) -> str:
        lengths, total = sorted(self.lengths), sum(self.lengths)
        prompt = total - self.num_targets
        median, p90 = lengths[len(lengths) // 2], lengths[len(lengths) * 9 // 10]
        begin = f"{self.name}: {len(lengths):,} rows, " + (f"{self.read_as}\n  " if self.read_as else "")
        lines = [
            f"{begin}{total:,} tokens: {prompt:,} of prompts ({prompt / total:.0%}), "
            f"{self.num_targets:,} to learn ({self.num_targets / total:.0%}); a row has {total / len(lengths):.0f} on "
            f"average, median {median}, 90% at most {p90}, longest {lengths[-1]}"
        ]
        for name, rows in self.problems.items():
            if rows:
                distinct = list(dict.fromkeys(rows))
                first = ", ".join(map(str, distinct[:5])) + (", ..." if len(distinct) > 5 else "")
                problem = PROBLEMS[name]
                lines.append(f"  {name}: {_rows(len(rows))} ({first}): {problem.meaning}; {problem.advice}")
        if self.unread:
            lines.append(f"  {describe_unread(self.unread)}")
        return "\n".join(lines)

    def spoiled_by(self) -> list[str]:
        """Return one line per problem that more rows have than is tolerated."""
        return [
            f"{name}: {_rows(len(rows))} of {len(self.lengths):,} ({len(rows) / len(self.lengths):.1%}), "
            f"tolerated are {100 * PROBLEMS[name].tolerated:g}%: {PROBLEMS[name].advice}"
            for name, rows in self.problems.items()
            if len(rows) > PROBLEMS[name].tolerated * len(self.lengths)
        ]


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def report(name: str, tokens: Tokens, texts: Mapping[str, list[int]], data: Data) -> DataReport:
    """Return what is known of the data `name`, from the tokenized rows, the `text_problems` of the same rows, and what
    was noticed while reading them.

    Raises:
        InputError: no row has anything to learn.
    """
    lengths = tokens["lengths"].tolist()
    num_targets = int((tokens["lengths"] - tokens["masked"]).sum())
    found = {name: [data.numbers[i] for i in rows] for name, rows in {**tokens["problems"], **texts}.items()}
    found |= data.problems
    problems = {problem: found.get(problem, []) for problem in PROBLEMS}
    whole = DataReport(name, lengths, num_targets, data.numbers, problems, data.unread, data.read_as)
    if len(problems["nothing_to_learn"]) == len(lengths):
        raise InputError(f"{name}: no row has an answer left to learn within the maximum length\n{whole}", name)
    return whole


def text_problems(
    rows: Sequence[Row], templates: Mapping[str, str], control_tokens: Sequence[str]
) -> dict[str, list[int]]:
    """Return the problems that can be seen without a tokenizer: row numbers per name."""
    headings = _headings(templates)
    in_template = any(token in template for token in control_tokens for template in templates.values())
    everything = "\0".join(value for row in rows for value in row.values() if isinstance(value, str))
    control_tokens, headings = ([text for text in texts if text in everything] for texts in (control_tokens, headings))
    seen: dict[tuple[str, str], set[str]] = {}
    names = ("empty_answer", "control_text", "template_text", "duplicate", "repeated_prompt")
    problems: dict[str, list[int]] = {name: [] for name in names}
    for number, row in enumerate(rows):
        prompt, answer = (row["instruction"], row.get("input") or ""), row["output"]
        text = "\0".join((*prompt, answer))
        answers = seen.setdefault(prompt, set())
        noticed = {
            "empty_answer": not answer.strip(),
            "control_text": in_template or any(token in text for token in control_tokens),
            "template_text": any(heading in text for heading in headings),
            "duplicate": answer in answers,
            "repeated_prompt": bool(answers) and answer not in answers,
        }
        answers.add(answer)
        for name in names:
            if noticed[name]:
                problems[name].append(number)
    return problems


def _headings(templates: Mapping[str, str]) -> set[str]:
    """Return the fixed lines of the templates, which a row should not hold: "### Response:" and the like. Lines of a
    few characters or without a letter could stand anywhere."""
    fixed = [text for template in templates.values() for text, _ in template_parts(template)]
    lines = {line.strip() for text in fixed for line in text.split("\n")}
    return {line for line in lines if len(line) >= 6 and re.search(r"\w", line)}
