"""Tasks of lm-evaluation-harness: those of a group's YAML, what they are made of, their data, and a rehearsal. And
questions with choices in a file of our own, which need no harness."""

import contextlib
import difflib
import glob
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alpaca.common.errors import InputError, ParameterError, UsageError, loading
from alpaca.common.files import decode_text, fingerprint_of_files, parse_json
from alpaca.evaluation.bleu_rouge import INSTALL

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry


STANDARD = "open_llm_v1_4"  # the group where none is named


@dataclass(frozen=True)
class TaskSpec:
    """A task or group of tasks: `item` of the group's list, with its settings."""

    name: str
    item: dict[str, Any]
    column: str
    metric: str
    alone: bool = False  # of no group


def find_group(include_path: str, group: str, tasks: Sequence[str] = ()) -> tuple["TaskManager", list[TaskSpec]]:
    """Return the group of that name in the YAML files of a folder, and a manager that knows its tasks. Where nobody
    chose a group, and it lacks some of `tasks`, or the folder has none: those tasks, as their own YAML has them."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(f"the harness needs lm-eval: {INSTALL} ({error})") from error
    if not Path(include_path).is_dir():
        raise InputError(f"{include_path}: expected a folder with YAML files of the harness", include_path)
    with loading(include_path, "its YAML files cannot be read"):
        return _group(TaskManager, include_path, group, tasks)


def _group(
    manager_of: type["TaskManager"], include_path: str, group: str, tasks: Sequence[str]
) -> tuple["TaskManager", list[TaskSpec]]:
    manager = manager_of(include_path=include_path, include_defaults=False)
    if group == STANDARD and group not in manager.all_groups and (names := tasks or _own_tasks(manager)):
        return _alone(manager_of, manager, include_path, names)
    if group not in manager.all_groups:
        found = ", ".join(manager.all_groups) or "none"
        raise InputError(f"{group}: no such group in {include_path}; groups there: {found}", group)
    config = manager.task_index[group].cfg
    items = [{"task": item} if isinstance(item, str) else item for item in config.get("task") or []]
    names = [item.get("group") or item.get("task") for item in items]
    if group == STANDARD and tasks and not set(tasks) & set(names):
        return _alone(manager_of, manager, include_path, tasks)
    if not set(names) <= set(manager.all_tasks):
        manager = manager_of(include_path=include_path)  # its own 14,000 files take a quarter of a minute to look at
    table = (config.get("metadata") or {}).get("table") or {}
    members = []
    for name, item in zip(names, items):
        if name not in manager.all_tasks:
            raise InputError(f"{group}: the harness knows no task {name!r}, nor does {include_path}", group)
        if not {"column", "metric"} <= table.get(name, {}).keys():
            raise InputError(
                f"{group}: its metadata.table says no column and metric for {name}, as in "
                f"`{name}: {{column: {name}, metric: acc}}`",
                group,
            )
        settings = {key: value for key, value in item.items() if key not in ("task", "group")}
        kind = "group" if name in manager.all_groups else "task"  # a group under `task` would lose all tasks but one
        members.append(TaskSpec(name, {kind: name, **settings}, table[name]["column"], table[name]["metric"]))
    return manager, members


def _own_tasks(manager: "TaskManager") -> list[str]:
    """Return the tasks of a folder that has no group of them."""
    return [] if manager.all_groups else sorted(manager.all_subtasks)


def _alone(
    manager_of: type["TaskManager"], manager: "TaskManager", include_path: str, names: Sequence[str]
) -> tuple["TaskManager", list[TaskSpec]]:
    """Return tasks that no group lists: the first metric of each is its column's."""
    if not set(names) <= set(manager.all_tasks):
        manager = manager_of(include_path=include_path)
    members = []
    for name in dict.fromkeys(names):
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; like it: {', '.join(close)}" if close else ""
            raise ParameterError(
                f"{{tasks}} {name}: the harness knows no such task, nor does {include_path}{hint}", "tasks"
            )
        with loading(f"task {name}", "its data cannot be loaded"):
            first = next(iter(manager.load(name)["tasks"].values()))
        kind = "group" if name in manager.all_groups else "task"
        members.append(TaskSpec(name, {kind: name}, name, next(iter(first.aggregation())), alone=True))
    return manager, members


def load_tasks(manager: "TaskManager", member: TaskSpec) -> dict[str, "Task"]:
    """Return the tasks of a member with its settings and data. The harness takes settings only from a group's list, so
    a group of this member alone is made known to it."""
    from lm_eval.tasks._index import Entry, Kind

    name = f"only_{member.name}"
    manager.task_index[name] = Entry(name, Kind.GROUP, None, {"group": name, "task": [member.item]})
    with loading(f"task {member.name}", "its data cannot be loaded"):
        return manager.load(name)["tasks"]


def definition_of(manager: "TaskManager", member: TaskSpec, folder: Path) -> str | None:
    """Return a fingerprint of what makes the tasks that are in the YAML of `folder`: their settings, its Python, their
    data if it lies here. None: they are the harness's own, whose version is known."""
    folder = folder.resolve()
    entries = [entry for entry in _entries(manager, member.item) if entry.yaml_path]
    own = [entry.cfg for entry in entries if entry.yaml_path.resolve().is_relative_to(folder)]
    data = list(_data_files([member.item, *own]))
    if not own and not data:
        return None
    settings = json.dumps(own, sort_keys=True, default=str).replace(str(folder), "")  # it may move
    code = sorted(folder.rglob("*.py")) if own else []
    return hashlib.sha256(f"{settings} {fingerprint_of_files([*code, *data])}".encode()).hexdigest()[:12]


def _entries(manager: "TaskManager", item: str | dict[str, Any]) -> Iterator["Entry"]:
    """Yield what the index has of an item of a group's list, and of all below."""
    item = {"task": item} if isinstance(item, str) else item
    entry = manager.task_index.get(item.get("group") or str(item.get("task")))
    below = [item.get("task")]
    if entry is not None:
        yield entry
        below.append(sorted(entry.tags) if entry.cfg is None else entry.cfg.get("task"))  # no settings: a tag
    for items in below:
        for child in items if isinstance(items, list) else []:
            yield from _entries(manager, child)


def _data_files(settings: Any) -> Iterator[Path]:
    """Yield the local files that tasks are read from, wherever in `settings` they are named."""
    if isinstance(settings, list):
        for part in settings:
            yield from _data_files(part)
    if not isinstance(settings, dict):
        return
    options = settings.get("dataset_kwargs") or {}
    root, named = options.get("data_dir"), options.get("data_files")
    named = list(named.values()) if isinstance(named, dict) else [named]
    patterns = [text for part in named for text in (part if isinstance(part, list) else [part]) if text]
    for pattern in patterns:
        yield from map(Path, sorted(glob.glob(str(Path(root or "", pattern)), recursive=True)))
    if not patterns and (folder := root or settings.get("dataset_path")) and Path(folder).is_dir():
        yield from sorted(path for path in Path(folder).rglob("*") if path.is_file())
    yield from _data_files(settings.get("task"))


def dry_run_metrics(group: str, member: TaskSpec, tasks: dict[str, "Task"]) -> None:
    """Evaluate one example of each task with made-up answers, which shows its metrics; lists of metrics do not, where a
    task computes its own. simple_evaluate seeds the tasks anew.

    Raises:
        UsageError: the member's metric is not among them.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.dummy import DummyLM

    with contextlib.redirect_stderr(io.StringIO()):  # a bar for each task
        results = evaluate(DummyLM(), {"tasks": tasks}, limit=1, bootstrap_iters=0, log_samples=False)["results"]
    for name in tasks:
        known = [key.removesuffix(",none") for key in results[name] if key.endswith(",none") and "_stderr," not in key]
        if member.metric not in known:
            raise InputError(f"{group}: {name} has no metric {member.metric}; it has {', '.join(known)}", group)


# ---- questions of our own format ----


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Return the questions of a JSONL file: {"question": text, "choices": [texts], "answer": number of the right one}.
    Raise InputError for a line that is none."""
    try:
        lines = decode_text(path.read_bytes(), path).split("\n")  # not splitlines: U+2028 may stand inside a string
        questions = [parse_json(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})", path) from error
    for number, asked in enumerate(questions, 1):
        fields = asked if isinstance(asked, dict) else {}
        choices, answer = fields.get("choices"), fields.get("answer")
        texts = isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)
        if not (
            texts and isinstance(fields.get("question"), str) and type(answer) is int and 0 <= answer < len(choices)
        ):
            expected = 'expected {"question": "…", "choices": ["…", "…"], "answer": 0}'
            raise InputError(f"{path}, question {number}: got {str(asked)[:80]}; {expected}", path)
    if not questions:
        raise InputError(f"{path}: has no questions", path)
    return questions
