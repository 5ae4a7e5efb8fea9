"""Self-instruct data generation: a language model continues a list of tasks, and what is new is kept.

    export OPENAI_API_KEY=…
    python -m generate_instruction generate_instruction_following_data --output_dir ./ \
        --num_instructions_to_generate 100 --model_name gpt-3.5-turbo-instruct        # -> regen.json
    python -m generate_instruction export --regen_path regen.json --output_path alpaca_data.json
    python -m generate_instruction generate_responses --data_path alpaca_data.json \
        --output_path alpaca_data_re-answered.json --model_name <another model>

--base_url http://localhost:8000/v1 asks vLLM, llama.cpp, Ollama or `transformers serve`; --model_name <folder> needs no
server. Every answer is journaled before anything else: a rerun of the same command continues and pays nothing twice.
"""

import asyncio
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from alpaca.common.errors import starting

    starting("generate_instruction")

import utils
from alpaca.common import commands
from alpaca.common.commands import check_numbers
from alpaca.common.errors import UsageError, masked, reported
from alpaca.common.files import parse_json, refuse_overwriting_input
from alpaca.completions.api import Request, Sampling, SamplingFlags
from alpaca.completions.batch_runner import runner_for
from alpaca.completions.budget import BudgetFlags, Progress, estimate
from alpaca.completions.journal import Journal
from alpaca.completions.rows import BatchCompletion, write_answered, write_rows
from alpaca.completions.runner import RequestRunner
from alpaca.data.prompts import format_prompt, instruction_and_input
from alpaca.data.rows import load_rows
from alpaca.datagen import self_instruct
from alpaca.datagen.self_instruct import (  # noqa: F401  the first: of 2023
    find_word_in_string,
    load_prompt,
    load_seed_tasks,
    read_excluded,
)
from alpaca.datagen.state import JOURNAL, REGEN, REPORT, Generation
from alpaca.inference.backend import BackendFlags, ModelBackend, open_backend

ROOT = Path(__file__).resolve().parent
STOP_OF_2023 = ("\n20", "20.", "20.")  # the list has 20 tasks
NO_BUDGET, SAMPLING, ANY_BACKEND = BudgetFlags(), SamplingFlags(), BackendFlags()
SLOW_DETAILS = 100_000  # tasks from which on the scores of another one take more time than all else
COSTLY = (
    "note: a new task is compared with all {:,} for its similarity scores, which takes longer the more there are; "
    "--similarity_details False leaves the scores out"
)
EXPECTED = 12  # tasks kept of an answer: an estimate for --dry_run only


# ---- 2023's functions ----


def encode_prompt(prompt_instructions: Sequence[dict[str, str]], prompt_path: str | None = None) -> str:
    """Return the prompt: prompt.txt, the numbered examples, and the number that the answer goes on with."""
    return self_instruct.encode_prompt(prompt_instructions, load_prompt(prompt_path or ROOT / "prompt.txt"))


def post_process_gpt3_response(num_prompt_instructions: int, response: dict[str, Any] | None) -> list[dict[str, str]]:
    """Return the usable tasks of an answer with "text" and "finish_reason", exactly as in 2023."""
    return self_instruct.rows_of_response(num_prompt_instructions, response)


@commands.task(max_new_tokens="max_tokens")
def generate_instruction_following_data(
    output_dir: str = "./",
    seed_tasks_path: str = "./seed_tasks.jsonl",
    num_instructions_to_generate: int = 100,
    model_name: str = "gpt-3.5-turbo-instruct",
    num_prompt_instructions: int = 3,
    request_batch_size: int = 5,
    temperature: float | None = 1.0,
    top_p: float | None = 1.0,
    num_cpus: int = 16,
    prompt_path: str | None = None,
    base_url: str | None = None,
    api: str = "auto",
    concurrency: int | None = None,
    parser: str = "auto",
    max_tokens: int = 3072,
    logit_bias: str | None = None,
    num_generated_in_prompt: int = 0,
    seed: int | None = None,
    stable_ties: bool = False,
    similarity_details: bool = True,
    exclude: str | None = None,
    extra_body: str | None = None,
    batch: bool = False,
    batch_dir: str | None = None,
    budget: BudgetFlags = NO_BUDGET,
) -> None:
    """Generate tasks until num_instructions_to_generate are kept, into regen.json; a rerun continues.

    Args:
        output_dir: Gets regen.json, generation_journal.jsonl (every answer) and generation_report.json.
        seed_tasks_path: Tasks that examples are drawn from; any layout that train.py reads, or 2023's with instances.
        num_instructions_to_generate: Tasks to keep in all, those of earlier runs included.
        model_name: A model of the server, or the folder of a model.
        num_prompt_instructions: Examples in a prompt.
        request_batch_size: Requests to a server at a time; for a folder, prompts in a batch.
        temperature: Sampling temperature; None leaves it to the server.
        top_p: Sample from the likeliest tokens of this probability; None leaves it to the server.
        num_cpus: Threads that compute similarity scores.
        prompt_path: The text above the examples; not given, prompt.txt.
        base_url: Address of the server, of several with commas between, or a file with one a line; not given,
            OPENAI_BASE_URL or OpenAI.
        api: The endpoint: chat, completions or auto.
        concurrency: Requests to a server at a time, if not request_batch_size. Of several servers each finds its own,
            up to this.
        parser: original (2023's), robust, or auto: original for completion models, robust for chat.
        max_tokens: Tokens of an answer, at most.
        logit_bias: JSON such as '{"50256": -100}', which 2023 sent; token ids of the model.
        num_generated_in_prompt: Of the examples, how many are tasks generated before (Alpaca: 0, self-instruct: 2).
        seed: Makes the examples and their order the same at any concurrency.
        stable_ties: An order of equally similar instructions that does not depend on the CPU.
        similarity_details: Write the ten most similar tasks and the mean similarity of each, as in 2023; without them
            the cost of a task does not grow with their number.
        exclude: An evaluation set; a task that has 13 words in a row from it, or ROUGE-L above 0.7 to it, is dropped.
        extra_body: JSON object of other fields for every request to a server, such as {"reasoning_effort": "low"}.
        batch: Ask through the server's batch endpoint (OpenAI: half price, within 24 hours).
        batch_dir: Folder for files of vLLM's run-batch: requests are written there, answers read; no server is asked.

    Raises:
        UsageError: a bad flag, file, key, address or model, before anything is asked, or the limit of cost.
    """
    check_numbers(
        num_instructions_to_generate=num_instructions_to_generate,
        num_prompt_instructions=num_prompt_instructions,
        request_batch_size=request_batch_size,
        max_tokens=max_tokens,
        num_cpus=num_cpus,
    )
    seeds, head = load_seed_tasks(seed_tasks_path), load_prompt(prompt_path or ROOT / "prompt.txt")
    if not 0 <= num_generated_in_prompt <= num_prompt_instructions <= len(seeds):
        raise UsageError(
            f"--num_prompt_instructions {num_prompt_instructions}, --num_generated_in_prompt {num_generated_in_prompt}:"
            f" expected at most the {len(seeds)} seed tasks, and of them at most all generated"
        )
    if parser not in ("auto", *self_instruct.PARSERS):
        raise UsageError(f"--parser {parser}: expected auto, original or robust")
    if stable_ties and not similarity_details:
        raise UsageError(
            "--stable_ties: orders the scores that --similarity_details False leaves out; omit one of both"
        )
    sampling = SamplingFlags(temperature, top_p, max_tokens).sampling()
    sampling = replace(sampling, logit_bias=_read_bias(logit_bias))
    backend = BackendFlags(base_url, api, concurrency, extra_body, request_batch_size, batch=batch, batch_dir=batch_dir)
    backend.check()
    spent = budget.budget(backend.rate)
    excluded = () if exclude is None else read_excluded(exclude)
    if budget.dry_run:
        draw = random.Random(f"{seed} 0")
        prompt = self_instruct.encode_prompt(draw.sample(seeds, num_prompt_instructions), head)
        print(estimate([prompt], -(-num_instructions_to_generate // EXPECTED), max_tokens, spent))
        return

    model = open_backend(model_name, backend)
    with Journal(Path(output_dir) / JOURNAL) as journal:
        state = Generation(
            Path(output_dir),
            journal,
            seeds,
            head,
            num_prompt_instructions,
            num_generated_in_prompt,
            spent,
            seed,
            num_cpus,
            stable_ties,
            similarity_details,
            excluded,
        )
        print(f"Loaded {len(seeds)} human-written seed instructions, {len(state.rows)} machine-generated instructions")
        if state.answers:
            print(f"continuing: {state.answers:,} answers from the journal", flush=True)
        run = {"kind": "run", "seed": state.seed, "model": model_name, "time": time.time()}
        run |= {"extra_body": masked(extra_body)} if extra_body else {}
        runner = runner_for(model, journal, spent, backend.at_once, state.known)
        asyncio.run(_generate(state, runner, sampling, parser, num_instructions_to_generate, run))
    runner.refuse_stop_by_cost(len(state.rows), num_instructions_to_generate)
    if len(state.rows) < num_instructions_to_generate:
        kept = f"{len(state.rows)} of {num_instructions_to_generate} tasks"
        raise UsageError(
            f"--num_instructions_to_generate: {kept} are in {state.output_dir / REGEN}; run again to go on"
        )


async def _generate(
    state: Generation, runner: RequestRunner, sampling: Sampling, parser: str, target: int, run: dict[str, Any]
) -> None:
    """Ask until `target` tasks are kept, and write what there is then, whatever ends it. A model that cannot be asked
    at all is an error before anything is written."""
    progress, costly = None, state.filter.details
    try:
        async with runner:
            state.journal.append(run)
            progress = Progress("tasks", target, len(state.rows), runner.budget)
            runner.on_wait = progress.wait
            if parser == "auto":
                parser = "original" if runner.model.api == "completions" else "robust"
            sampling = replace(sampling, stop=STOP_OF_2023 if parser == "original" else ())
            about = {"examples": state.num_examples, "parser": parser}
            more = partial(state.wants, target)
            async for entries in runner.answers(state.requests(), sampling, more, **about):
                await _in_thread(state.take, entries)
                progress.show(len(state.rows), runner.asked, getattr(runner.model, "retries", 0))
                if costly and len(state.rows) >= SLOW_DETAILS:
                    print(COSTLY.format(len(state.rows)), flush=True)
                    costly = False
    finally:
        if progress is not None:
            asked = {"model": run["model"]}
            if hasattr(runner.model, "by_server"):
                asked["servers"] = runner.model.by_server()
            _finish(state, progress, target, asked)


async def _in_thread(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function in a thread. A cancellation waits for its end: what is written then has all that it did."""
    call = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        await asyncio.shield(call)
    except asyncio.CancelledError:
        await asyncio.wait([call])
        raise


def _finish(state: Generation, progress: Progress, target: int, asked: dict[str, Any]) -> None:
    """Write regen.json and the report, and print what is in them. `asked`: what the report says of the model."""
    progress.close()
    state.save()
    report = {
        **asked,
        "seed": state.seed,
        "rows": len(state.rows),
        **state.counts,
        **progress.report(),
    }
    utils.jdump(report, state.output_dir / REPORT)
    more = len(state.rows) - target
    beyond = f", {more} more than asked for: an answer holds several, and what is paid for is kept" * (more > 0)
    print(f"{state.summary()}\n{progress.summary()}\n{len(state.rows)} tasks in {state.output_dir / REGEN}{beyond}")


# ---- answers of another model ----


@commands.task(model_name="model", request_batch_size="batch_size", max_tokens="max_new_tokens")
def generate_responses(
    data_path: str,
    output_path: str,
    model: str,
    backend: BackendFlags = ANY_BACKEND,
    prompt: str = "auto",
    sampling: SamplingFlags = SAMPLING,
    budget: BudgetFlags = NO_BUDGET,
    drop_failed: bool = False,
) -> None:
    """Answer every instruction of a data file with another model; rows and their order stay, a rerun continues.

    Args:
        data_path: An Alpaca file, anything that train.py takes.
        output_path: The JSON to be written when all rows are answered; its journal lies beside it.
        model: A model of the server, or the folder of a model.
        prompt: plain (the instruction and its input), alpaca (the training prompt), or auto: plain for chat.
        drop_failed: Leave out rows that the model does not answer; else they are an error at the end.

    Raises:
        UsageError: a bad flag, file, key, address or model, the limit of cost, or rows without an answer.
    """
    spent, answerer = budget.budget(backend.rate), ModelBackend(model, sampling.sampling(), backend)
    refuse_overwriting_input(output_path, data_path)
    if prompt not in ("auto", "plain", "alpaca"):
        raise UsageError(f"--prompt {prompt}: expected auto, plain or alpaca")
    rows = load_rows(data_path)
    plain = [instruction_and_input(row) for row in rows]
    prompts = plain if prompt == "plain" else [format_prompt(row) for row in rows]
    if budget.dry_run:
        print(estimate(prompts, len(prompts), sampling.max_new_tokens, spent))
        return

    opened = answerer.open()
    if prompt != "plain" and (own := getattr(opened, "templates", None)):  # a folder's
        prompts = [format_prompt(row, own) for row in rows]

    def requests() -> Iterator[Request]:
        """Yield the requests, once the endpoint is known."""
        asked = plain if prompt == "auto" and opened.api == "chat" else prompts
        yield from answerer.requests(dict(enumerate(asked)))

    how = answerer.how(rows=plain, prompts=prompts) | {"prompt": prompt}
    answered = BatchCompletion(opened, answerer.sampling, output_path, how, backend.at_once, spent, drop_failed)
    write_answered(output_path, rows, answered.answers(requests()))


# ---- from regen.json to a data file ----


@commands.task()
def export(
    regen_path: str = "./regen.json",
    output_path: str = "./alpaca_data.json",
    eval_size: float = 0.0,
    eval_path: str | None = None,
    seed: int = 0,
) -> None:
    """Write instruction, input and output of a regen.json as a data file for train.py.

    Args:
        regen_path: what generate_instruction_following_data wrote.
        output_path: the data file.
        eval_size: rows to hold out, a number or a share below 1.
        eval_path: file for them; not given, output_path with _eval before its ending.
        seed: of the choice of rows that are held out.
    """
    path = Path(output_path)
    eval_path = eval_path or str(path.with_name(f"{path.stem}_eval{path.suffix}"))
    refuse_overwriting_input(output_path, regen_path)
    if eval_size:
        refuse_overwriting_input(eval_path, regen_path)
        if path.absolute() == Path(eval_path).absolute():
            raise UsageError(f"--eval_path {eval_path}: is the file of --output_path, too; choose another file")
    try:
        rows = utils.jload(regen_path)
        rows = [{name: row[name] for name in ("instruction", "input", "output")} for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"--regen_path {regen_path}: is not a list of tasks ({error!r})") from error
    held_out = 0
    if 0 <= eval_size < len(rows):
        held_out = round(eval_size * len(rows)) if eval_size < 1 else int(eval_size)
    if not 0 <= eval_size < len(rows) or held_out == len(rows):
        raise UsageError(f"--eval_size {eval_size}: expected fewer than the {len(rows)} rows of {regen_path}")
    chosen = set(random.Random(seed).sample(range(len(rows)), held_out))
    if held_out:
        write_rows(eval_path, [rows[n] for n in sorted(chosen)])
    write_rows(output_path, [row for number, row in enumerate(rows) if number not in chosen])


# ---- what they share ----


def _read_bias(text: str | None) -> dict[str, float] | None:
    try:
        if text is None:
            return None
        biases = {str(int(token)): float(bias) for token, bias in parse_json(text).items()}
        if not all(map(math.isfinite, biases.values())):
            raise ValueError("a bias is no finite number")
        return biases
    except (ValueError, AttributeError, TypeError, OverflowError) as error:
        raise UsageError(f"--logit_bias {text}: expected JSON such as '{{\"50256\": -100}}' ({error})") from error


def main() -> None:
    tasks = (generate_instruction_following_data, generate_responses, export)
    commands.run("generate_instruction", {task.__name__: task for task in tasks})


if __name__ == "__main__":
    with reported("generate_instruction"):
        main()
