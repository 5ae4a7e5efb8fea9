"""Multiple-choice tasks through lm-evaluation-harness: a group of its YAML, one file a task, one table.

    HarnessRun(group="open_llm_v1_4", include_path="configs/harness", model="output/alpaca-7b", …).run()

The group's `metadata.table` says for each member which column it is and which metric stands there. A member that is a
group itself (MMLU's 57 subjects) counts with the plain mean of its tasks, as on the Open LLM Leaderboard; the harness
would weight them by size, which is written beside it. Its own groups can do the plain mean (weight_by_size: false), but
MMLU's own YAML does not, and a group is measured whole: no file for each member, from which a rerun could go on.
"""

import importlib.metadata
import logging
import math
import platform
import re
import reprlib
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from alpaca.common.errors import InputError, ParameterError, UsageError
from alpaca.common.files import check_writable, read_json, refuse_other_arguments, write_json, write_text
from alpaca.evaluation.harness_tasks import TaskSpec, definition_of, dry_run_metrics, find_group, load_tasks

if TYPE_CHECKING:
    import torch
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

CAUSES = "the likely cause is the weights (a damaged file, a run that diverged), or a dtype in which they overflow"
RESULT = {  # of a task's file, what a rerun reads
    **dict.fromkeys(("column", "task", "metric", "dtype", "device"), str),
    **dict.fromkeys(("value", "weighted_by_size"), (int, float)),
    **dict.fromkeys(("how", "tasks", "versions"), dict),
    "stderr": (int, float, type(None)),
    "num_fewshot": list,
    "samples": int,
}
PACKAGES = ("lm-eval", "transformers", "torch", "datasets", "peft")


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
    backend: str = "hf"  # of the harness: transformers in this process, or vllm

    def __post_init__(self):
        if not re.fullmatch(r"[1-9]\d*|auto(:\d+)?", self.batch_size):
            raise ParameterError(f"{{batch_size}} {self.batch_size}: expected a number, or auto", "batch_size")
        if self.backend not in ("hf", "vllm"):
            raise ParameterError(f"{{backend}} {self.backend}: expected hf or vllm", "backend")
        if self.backend == "vllm" and (self.load_in_8bit or self.load_in_4bit):
            raise ParameterError("{backend} vllm: takes no weights quantized by bitsandbytes", "backend")
        if self.limit is not None and self.limit < 1:
            raise ParameterError(f"{{limit}} {self.limit}: expected examples of a task, 1 or more", "limit")

    def run(self) -> str:
        """Evaluate what has no file in `output_dir` yet, and write the table. Return the table.

        Raises:
            UsageError: the harness is missing, a flag is wrong, a file was made with other arguments or of other tasks,
                `output_dir` cannot be written, a task's data cannot be had, it has no such metric, or the model cannot
                be opened; all before anything is evaluated. Then: memory is short, or the model computes no numbers.
        """
        manager, members = find_group(self.include_path, self.group, self._names())
        chosen, how = self._chosen(members), self._how()
        if all(member.alone for member in members):
            how["group"] = None
        how_of = {member.name: how | self._how_of(manager, member) for member in members}
        done = {member.name: self._finished(member, how_of[member.name]) for member in members}
        wanted = [member for member in chosen if done[member.name] is None]
        check_writable(self.output_dir)
        loaded = {member.name: load_tasks(manager, member) for member in wanted}  # before a model of many gigabytes
        for member in wanted:
            dry_run_metrics(member.name if member.alone else self.group, member, loaded[member.name])
        lm = self._open() if wanted else None
        for member in wanted:
            done[member.name] = self._evaluate(lm, manager, member, loaded[member.name]) | {"how": how_of[member.name]}
            write_json(self._path(member), done[member.name])
            print(f"{member.column}: {done[member.name]['value']:.2f}", flush=True)
        return self._finish(members, done, how)

    # ---- what was there before ----

    def _names(self) -> list[str]:
        return list(dict.fromkeys(re.findall(r"[^\s,]+", self.tasks or "")))

    def _chosen(self, members: list[TaskSpec]) -> list[TaskSpec]:
        known = {member.name: member for member in members}
        names = list(known) if self.tasks is None else self._names()
        if not names:
            message = f"{{tasks}} {self.tasks!r}: names no task; {self.group} has {', '.join(known)}"
            raise ParameterError(message, "tasks")
        if unknown := [name for name in names if name not in known]:
            problem = f"{unknown[0]!r} is not in {self.group}; it has {', '.join(known)}"
            raise InputError(f"{self.tasks}: {problem}", self.tasks)
        return [known[name] for name in names]

    def _how(self) -> dict[str, Any]:
        """Return all that the numbers depend on, but rounding: not the size of batches, nor the GPU."""
        from alpaca.weights.provenance import weights_of

        how = weights_of(model=self.model, base=self.base)
        names = ("group", "limit", "add_bos_token", "load_in_8bit", "load_in_4bit")
        how |= {name: getattr(self, name) for name in names}
        if self.backend != "hf":
            how["backend"] = self.backend
        return how | {"lm_eval": importlib.metadata.version("lm-eval")}

    def _how_of(self, manager: "TaskManager", member: TaskSpec) -> dict[str, Any]:
        definition = definition_of(manager, member, Path(self.include_path))
        return {"task": member.item, "metric": member.metric, "files of the task": definition}

    def _path(self, member: TaskSpec) -> Path:
        return Path(self.output_dir) / f"{member.name}.json"

    def _finished(self, member: TaskSpec, how: dict[str, Any]) -> dict[str, Any] | None:
        """Return the result of an earlier run, or None. Raise InputError if it was another one."""
        path = self._path(member)
        if not path.is_file():
            return None
        try:
            result = read_json(path)
        except UsageError as error:
            raise InputError(f"{path}: is no result of this command ({error})", path) from error
        for name, kinds in RESULT.items():
            if not isinstance(result.get(name), kinds):
                problem = f"{name!r} is {reprlib.repr(result.get(name)):.60}"
                raise InputError(f"{path}: is no result of this command ({problem})", path)
        refuse_other_arguments(path, result["how"], how, self.output_dir)
        return result | {"column": member.column}

    # ---- the model and the tasks ----

    def _open(self) -> "LM":
        """Open the model, which the harness asks from then on. `precision` of the result says in what."""
        lm, dtype, device = self._open_vllm() if self.backend == "vllm" else self._open_here()
        lm.precision = {"dtype": str(dtype), "device": device}
        lm.set_cache_hook(FiniteCheck(self.model, f"in {dtype} on {device}"))
        return lm

    def _open_vllm(self) -> tuple["LM", "torch.dtype", str]:
        import torch

        from alpaca.data.tokenization import nothing_behind
        from alpaca.models.device import best_dtype
        from alpaca.weights.reader import MODEL, find_folder, folder_kind, open_weights

        folder = find_folder(self.model)
        with open_weights(folder) as weights:
            kind = folder_kind(folder, weights)
        if kind != MODEL or self.base:
            problem = "vllm opens a whole checkpoint; merge an adapter and recover a diff first"
            raise InputError(f"{self.model}: {problem}", self.model)
        dtype = best_dtype("cuda" if torch.cuda.is_available() else "cpu")
        print(f"evaluating model {folder} with vllm in {dtype}", flush=True)
        options = {"dtype": str(dtype).removeprefix("torch."), "batch_size": self.batch_size}
        try:
            from lm_eval.models.vllm_causallms import VLLM

            lm = VLLM(str(folder), add_bos_token=self.add_bos_token, trust_remote_code=False, **options)
            lm.tokenizer = nothing_behind(lm.tokenizer)
        except ModuleNotFoundError as error:
            message = "{backend} vllm: vllm is not installed; pip install 'lm-eval[vllm]'"
            raise ParameterError(message, "backend") from error
        return lm, dtype, "vllm"

    def _open_here(self) -> tuple["LM", "torch.dtype", str]:
        import torch
        from lm_eval.models.huggingface import HFLM

        from alpaca.data.tokenization import nothing_behind
        from alpaca.inference.load import LoadOptions, load_for_inference
        from alpaca.models.device import best_dtype, check_device, quantizing_flag

        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(device)
        how = LoadOptions(device, best_dtype(device), quantizing_flag(self.load_in_8bit, self.load_in_4bit))
        opened = load_for_inference(self.model, self.base, how)
        print(f"evaluating {opened.description} on {device} in {opened.model.dtype}", flush=True)
        logger = logging.getLogger("lm_eval.models.huggingface")
        logger.setLevel(logging.ERROR)  # three lines about a model that is not the name of one
        lm = HFLM(
            pretrained=opened.model,
            tokenizer=nothing_behind(opened.tokenizer),
            backend="causal",
            batch_size=self.batch_size,
            add_bos_token=self.add_bos_token,
            trust_remote_code=False,
        )
        logger.setLevel(logging.NOTSET)
        return lm, opened.model.dtype, device

    def _evaluate(self, lm: "LM", manager: "TaskManager", member: TaskSpec, tasks: dict[str, "Task"]) -> dict[str, Any]:
        import torch
        from lm_eval import simple_evaluate

        began = time.monotonic()
        try:
            results = simple_evaluate(
                lm, tasks=list(tasks.values()), limit=self.limit, log_samples=False, task_manager=manager
            )
        except torch.OutOfMemoryError as error:
            message = f"{{batch_size}} {self.batch_size}: out of memory on {member.name}; give less"
            raise ParameterError(message, "batch_size") from error
        leaves = {}
        for name in tasks:
            values = results["results"][name]
            value, error = values[f"{member.metric},none"], values.get(f"{member.metric}_stderr,none")
            if not math.isfinite(value):
                raise UsageError(f"task {name}: its {member.metric} is {value}; {CAUSES}")
            known = isinstance(error, float) and math.isfinite(error)  # of one example there is none
            leaves[name] = {
                "value": 100 * value,
                "stderr": 100 * error if known else None,
                "num_fewshot": results["n-shot"][name],
                "samples": results["n-samples"][name]["effective"],
                "version": results["versions"].get(name),
            }
        bos = lm.tokenizer.bos_token_id
        return {
            "task": member.name,
            "column": member.column,
            "metric": member.metric,
            **summary(list(leaves.values())),
            "contexts_begin_with_bos": bos is not None and lm.tok_encode("Question:")[0] == bos,
            **lm.precision,
            "batch_size": self.batch_size,
            "seconds": round(time.monotonic() - began, 1),
            "tasks": leaves,
            "versions": versions(),
        }

    def _finish(self, members: list[TaskSpec], done: dict[str, Any], how: dict[str, Any]) -> str:
        results = [done[member.name] for member in members]
        finished = [result for result in results if result is not None]
        average = fmean(result["value"] for result in finished) if len(finished) == len(results) else None
        measured = measured_with(finished)
        settings = [f"limit {self.limit}", f"add_bos_token {self.add_bos_token}"]
        settings += [name for name in ("load_in_8bit", "load_in_4bit") if getattr(self, name)]
        versions_used = [f"{name} {' or '.join(found)}" for name, found in measured.items()]
        lines = [
            f"| | Average | {' | '.join(member.column for member in members)} |",
            "|---" * (len(members) + 2) + "|",
            f"| {Path(self.model).name} | {_number(average)} | "
            + " | ".join(_number(result and result["value"]) for result in results)
            + " |",
            "",
            *map(_line, finished),
            f"{', '.join(settings)}; {', '.join(versions_used)}",
        ]
        if different := [name for name, found in measured.items() if len(found) > 1]:
            lines.append(f"note: not all of them were measured alike; {', '.join(different)} differ (see each file)")
        if self.limit is not None:
            lines.insert(
                3, f"\nOf the first {self.limit} examples of each task only: not to be compared with anything."
            )
        table = "\n".join(lines)
        write_text(Path(self.output_dir) / "table.md", f"{table}\n")
        write_json(
            Path(self.output_dir) / "results.json",
            {
                "group": how["group"],
                "average": average,
                "arguments": how,
                "measured_with": measured,
                "results": {result["column"]: result["value"] for result in finished},
            },
        )
        return table


def summary(leaves: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the plain mean of the tasks and its standard error, the mean weighted by size, and what they have in
    common."""
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


def measured_with(results: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return dtype, device and versions that results were measured with, which a rerun may have other ones of: all
    there are of each."""
    found: dict[str, list[str]] = {}
    for result in results:
        where = {"dtype": result["dtype"], "device": result["device"], **result["versions"]}
        for name, value in where.items():
            found.setdefault(name, []).append(str(value))
    return {name: sorted(set(values)) for name, values in found.items()}


def _line(result: dict[str, Any]) -> str:
    shots = ", ".join(map(str, result["num_fewshot"]))
    subjects = ""
    if len(result["tasks"]) > 1:
        subjects = f" of {len(result['tasks'])} tasks ({result['weighted_by_size']:.2f} weighted by size)"
    return (
        f"{result['column']}: {result['task']}, {shots}-shot, {result['metric']} {_number(result['value'])} "
        f"± {_number(result['stderr'])}, {result['samples']:,} examples{subjects}; "
        f"contexts begin with{'' if result['contexts_begin_with_bos'] else 'out'} the BOS token"
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


class FiniteCheck:
    """Stands where the harness has its cache, which sees every answer as it is computed. Among NaN the harness
    takes the first choice, and the score looks like any other."""

    def __init__(self, model: str, where: str):
        self.model = model
        self.where = where

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        number = answer[0] if isinstance(answer, tuple) else answer
        if isinstance(number, float) and not math.isfinite(number):
            problem = f"{self.where} the log-likelihood of a choice is {number}, expected a number; {CAUSES}"
            raise InputError(f"{self.model}: {problem}", self.model)
