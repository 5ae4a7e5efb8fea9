"""Multiple-choice tasks through lm-evaluation-harness: a group of its YAML, one file a task, one table.

    HarnessRun(group="open_llm_v1_4", include_path="configs/harness", model="output/alpaca-7b", …).run()

The group's `metadata.table` says for each member which column it is and which metric stands there. A member that is a
group itself (MMLU's 57 subjects) counts with the plain mean of its tasks, as on the Open LLM Leaderboard; the harness
would weight them by size, which is written beside it.
"""

import importlib.metadata
import json
import logging
import math
import platform
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from alpaca.errors import UsageError, first_line
from alpaca.files import atomic_write
from alpaca.overlap import INSTALL

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

PACKAGES = ("lm-eval", "transformers", "torch", "datasets", "peft")


@dataclass(frozen=True)
class Member:
    """A task or group of tasks: `item` of the group's list, with its settings."""

    name: str
    item: dict[str, Any]
    column: str
    metric: str


@dataclass(frozen=True)
class HarnessRun:
    """What is evaluated how. Flags of the same names; see scripts/evaluate.py."""

    model: str
    output_dir: str
    base: str | None
    group: str
    include_path: str
    tasks: str | None
    limit: int | None
    add_bos_token: bool | None
    batch_size: str
    load_in_8bit: bool
    load_in_4bit: bool
    device: str | None

    def __post_init__(self):
        if not re.fullmatch(r"[1-9]\d*|auto(:\d+)?", self.batch_size):
            raise UsageError(f"--batch_size {self.batch_size}: expected a number, or auto")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit {self.limit}: expected examples of a task, 1 or more")

    def run(self) -> str:
        """Evaluate what has no file in `output_dir` yet, and write the table. Returns the table.

        Raises:
            UsageError: the harness is missing, a flag is wrong, a file was made with other arguments, a task's data
                cannot be had, or the model cannot be opened; all before anything is evaluated.
        """
        manager, members = find_group(self.include_path, self.group)
        chosen = self._chosen(members)
        how = self._how()
        done = {member.name: self._finished(member, how) for member in members}
        wanted = [member for member in chosen if done[member.name] is None]
        loaded = {member.name: load_tasks(manager, member) for member in wanted}  # before a model of many gigabytes
        lm = self._open() if wanted else None
        for member in wanted:
            result = self._evaluate(lm, manager, member, loaded[member.name])
            done[member.name] = result | {"how": self._how_of(member, how)}
            _write_json(self._path(member), done[member.name])
            print(f"{member.column}: {result['value']:.2f}", flush=True)
        return self._finish(members, done, how)

    # ---- what was there before ----

    def _chosen(self, members: list[Member]) -> list[Member]:
        names = re.split(r"[\s,]+", self.tasks.strip()) if self.tasks else [member.name for member in members]
        known = {member.name: member for member in members}
        if unknown := [name for name in names if name not in known]:
            raise UsageError(f"--tasks {self.tasks}: {unknown[0]!r} is not in {self.group}; it has {', '.join(known)}")
        return [known[name] for name in names]

    def _how(self) -> dict[str, Any]:
        """All that the numbers depend on, but rounding: not the size of batches, nor the GPU."""
        from alpaca.contract import weights_of

        how = weights_of(model=self.model, base=self.base)
        how |= {name: getattr(self, name) for name in ("limit", "add_bos_token", "load_in_8bit", "load_in_4bit")}
        return how | {"lm_eval": importlib.metadata.version("lm-eval")}

    def _how_of(self, member: Member, how: dict[str, Any]) -> dict[str, Any]:
        return how | {"task": member.item, "metric": member.metric}

    def _path(self, member: Member) -> Path:
        return Path(self.output_dir) / f"{member.name}.json"

    def _finished(self, member: Member, how: dict[str, Any]) -> dict[str, Any] | None:
        """The result of an earlier run; an error if it was another one."""
        path, how = self._path(member), json.loads(json.dumps(self._how_of(member, how)))
        if not path.is_file():
            return None
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            before = result["how"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"--output_dir {self.output_dir}: {path.name} is no result of this command") from error
        if before != how:
            other = ", ".join(f"{name} {before.get(name)!r}" for name in how if before.get(name) != how[name])
            raise UsageError(
                f"--output_dir {self.output_dir}: {path.name} was made with other arguments ({other}); choose another "
                "folder, or move the file away"
            )
        return result

    # ---- the model and the tasks ----

    def _open(self) -> "HFLM":
        import torch
        from lm_eval.models.huggingface import HFLM

        from alpaca.local_model import best_dtype, check_device
        from alpaca.opening import How, open_model
        from alpaca.quantization import quantizing_flag

        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(device)
        how = How(device, best_dtype(device), quantizing_flag(self.load_in_8bit, self.load_in_4bit))
        opened = open_model(self.model, self.base, how)
        print(f"evaluating {opened.told} on {device} in {opened.model.dtype}", flush=True)
        logger = logging.getLogger("lm_eval.models.huggingface")
        logger.setLevel(logging.ERROR)  # three lines about a model that is not the name of one
        lm = HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, backend="causal", batch_size=self.batch_size,
                  add_bos_token=self.add_bos_token)  # fmt: skip
        logger.setLevel(logging.NOTSET)
        return lm

    def _evaluate(self, lm: "HFLM", manager: "TaskManager", member: Member, tasks: dict[str, "Task"]) -> dict[str, Any]:
        import torch
        from lm_eval import simple_evaluate

        began = time.monotonic()
        try:
            results = simple_evaluate(lm, tasks=list(tasks.values()), limit=self.limit, log_samples=False,
                                      task_manager=manager)  # fmt: skip
        except torch.OutOfMemoryError as error:
            raise UsageError(f"--batch_size {self.batch_size}: out of memory on {member.name}; give less") from error
        leaves = {}
        for name in tasks:
            values = results["results"][name]
            if f"{member.metric},none" not in values:
                known = ", ".join(key.removesuffix(",none") for key in values if key.endswith(",none"))
                raise UsageError(f"--group {self.group}: {name} has no metric {member.metric}; it has {known}")
            value, error = values[f"{member.metric},none"], values.get(f"{member.metric}_stderr,none")
            leaves[name] = {"value": 100 * value, "stderr": 100 * error if isinstance(error, float) else None,
                            "num_fewshot": results["n-shot"][name], "samples": results["n-samples"][name]["effective"],
                            "version": results["versions"].get(name)}  # fmt: skip
        bos = lm.tokenizer.bos_token_id
        return {
            "task": member.name, "column": member.column, "metric": member.metric, **summary(list(leaves.values())),
            "contexts_begin_with_bos": bos is not None and lm.tok_encode("Question:")[0] == bos,
            "dtype": str(lm.model.dtype), "device": str(lm.device), "batch_size": self.batch_size,
            "seconds": round(time.monotonic() - began, 1), "tasks": leaves, "versions": versions(),
        }  # fmt: skip

    def _finish(self, members: list[Member], done: dict[str, Any], how: dict[str, Any]) -> str:
        results = [done[member.name] for member in members]
        finished = [result for result in results if result is not None]
        average = fmean(result["value"] for result in finished) if len(finished) == len(results) else None
        lines = [
            f"| | Average | {' | '.join(member.column for member in members)} |",
            "|---" * (len(members) + 2) + "|",
            f"| {Path(self.model).name} | {_number(average)} | "
            + " | ".join(_number(result and result["value"]) for result in results) + " |",
            "", *map(_told, finished),
            f"limit {self.limit}, add_bos_token {self.add_bos_token}; "
            + ", ".join(f"{name} {version}" for name, version in versions().items()),
        ]  # fmt: skip
        if self.limit is not None:
            lines.insert(
                3, f"\nOf the first {self.limit} examples of each task only: not to be compared with anything."
            )
        table = "\n".join(lines)
        with atomic_write(Path(self.output_dir) / "table.md") as file:
            file.write(f"{table}\n")
        _write_json(Path(self.output_dir) / "results.json",
                    {"group": self.group, "average": average, "arguments": how, "versions": versions(),
                     "results": {result["column"]: result["value"] for result in finished}})  # fmt: skip
        return table


def find_group(include_path: str, group: str) -> tuple["TaskManager", list[Member]]:
    """The group of that name in the YAML files of a folder, and a manager that knows its tasks."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UsageError(f"the harness needs lm-eval: {INSTALL} ({error})") from error
    if not Path(include_path).is_dir():
        raise UsageError(f"--include_path {include_path}: expected a folder with YAML files of the harness")
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if group not in manager.all_groups:
        found = ", ".join(manager.all_groups) or "none"
        raise UsageError(f"--group {group}: no such group in --include_path {include_path}; groups there: {found}")
    config = manager.task_index[group].cfg
    items = [{"task": item} if isinstance(item, str) else item for item in config.get("task") or []]
    names = [item.get("group") or item.get("task") for item in items]
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include_path)  # its own 14,000 files take a quarter of a minute to look at
    table = (config.get("metadata") or {}).get("table") or {}
    members = []
    for name, item in zip(names, items):
        if name not in manager.all_tasks:
            raise UsageError(f"--group {group}: the harness knows no task {name!r}, nor does {include_path}")
        if not {"column", "metric"} <= table.get(name, {}).keys():
            raise UsageError(f"--group {group}: its metadata.table says no column and metric for {name}, as in "
                             f"`{name}: {{column: {name}, metric: acc}}`")  # fmt: skip
        settings = {key: value for key, value in item.items() if key not in ("task", "group")}
        kind = "group" if name in manager.all_groups else "task"  # a group under `task` would lose all tasks but one
        members.append(Member(name, {kind: name, **settings}, table[name]["column"], table[name]["metric"]))
    return manager, members


def load_tasks(manager: "TaskManager", member: Member) -> dict[str, "Task"]:
    """The tasks of a member with its settings and data. The harness takes settings only from a group's list, so a group
    of this member alone is made known to it."""
    import datasets

    name = f"only_{member.name}"
    like = next(entry for entry in manager.task_index.values() if entry.name in manager.all_groups)
    manager.task_index[name] = replace(like, name=name, yaml_path=None, cfg={"group": name, "task": [member.item]})
    try:
        return manager.load(name)["tasks"]
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UsageError(f"task {member.name}: its data cannot be loaded ({first_line(error)})") from error


def summary(leaves: list[dict[str, Any]]) -> dict[str, Any]:
    """Plain mean of the tasks and its standard error, the mean weighted by size, and what they have in common."""
    count, samples = len(leaves), sum(leaf["samples"] for leaf in leaves)
    errors = [leaf["stderr"] for leaf in leaves]
    return {
        "value": fmean(leaf["value"] for leaf in leaves),
        "stderr": None if None in errors else math.sqrt(sum(error**2 for error in errors)) / count,
        "weighted_by_size": sum(leaf["value"] * leaf["samples"] for leaf in leaves) / samples,
        "num_fewshot": sorted({leaf["num_fewshot"] for leaf in leaves}),
        "samples": samples,
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _told(result: dict[str, Any]) -> str:
    shots = ", ".join(map(str, result["num_fewshot"]))
    subjects = f" of {len(result['tasks'])} tasks ({result['weighted_by_size']:.2f} weighted by size)"
    return (
        f"{result['column']}: {result['task']}, {shots}-shot, {result['metric']} {_number(result['value'])} "
        f"± {_number(result['stderr'])}, {result['samples']:,} examples{subjects * (len(result['tasks']) > 1)}; "
        f"contexts begin with{'' if result['contexts_begin_with_bos'] else 'out'} the BOS token"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _write_json(path: Path, result: dict[str, Any]) -> None:
    try:
        with atomic_write(path) as file:
            json.dump(result, file, indent=2, default=str)
    except OSError as error:
        raise UsageError(f"--output_dir {path.parent}: cannot be written ({error.strerror})") from error
