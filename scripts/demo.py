r"""Talk to a model in the browser: Alpaca's live demo of 2023 as a local page.

    python -m scripts.demo --model output/alpaca-7b
    python -m scripts.demo --model output/alpaca-7b --compare <its base model>             # two answers, side by side
    python -m scripts.demo --model output/my_adapter --base <folder of its base model>     # with and without the adapter
    python -m scripts.demo --model output/alpaca-7b --host 0.0.0.0 --port 8080             # not only for this machine

The answers stream; a stop button, a closed page and a reloaded one end them on the server too. --concurrency people are
answered at the same time, all others wait and are told so. The page loads nothing from anywhere but this server, and
the server asks nobody: no fonts, scripts, analytics or share links. There is no password: whoever reaches --host can
ask. An answer is shown as text, never as HTML.
"""

import asyncio
import errno
import html
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alpaca import flags
from alpaca.client import Sampling
from alpaca.data import Row, load_rows
from alpaca.errors import UsageError, first_line, reported
from alpaca.prompts import format_prompt, load_prompt_template, templates_of
from alpaca.refusals import ContextOverflow

if TYPE_CHECKING:
    import gradio

    from alpaca.local_model import LocalModel

SEED_TASKS = Path(__file__).resolve().parent.parent / "seed_tasks.jsonl"
EXAMPLES = ("slogan", "sea coast", "to a neighbor", "Polish", "spelling", "sentence into French", "egg is")
LONGEST_ANSWER = 2048  # tokens, where the model's context allows it
PAUSE = 0.05  # seconds between two looks at what was written: the page changes 20 times a second at most
NOTE = (
    "A model for research, as its data and its base model are licensed: not for commercial use unless both allow it. "
    "It can be wrong, biased or offensive in good English, and nothing here filters what it writes. Check what matters."
)


@dataclass
class DemoArguments:
    model: str | None = field(default=None, metadata={"help": "Folder of the model, or of an adapter."})
    base: str | None = field(
        default=None, metadata={"help": "Folder of the model that --model was trained from; it answers beside it."}
    )
    compare: str | None = field(default=None, metadata={"help": "Any other model to answer beside --model instead."})
    prompt_template: str | None = field(
        default=None, metadata={"help": "JSON file as for train.py; by default what each model was trained with."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0: all of this machine's."})
    port: int = field(default=7860, metadata={"help": "Port to listen on."})
    concurrency: int = field(default=8, metadata={"help": "Requests that are answered at the same time."})
    max_characters: int = field(default=4000, metadata={"help": "Of instruction and input together."})

    def __post_init__(self):
        if not self.model:
            raise UsageError("--model is missing: the folder of a model, such as train.py's --output_dir")
        for name in ("concurrency", "max_characters"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} {getattr(self, name)}: must be 1 or more")
        if not 1 <= self.port <= 65535:
            raise UsageError(f"--port {self.port}: expected a number from 1 to 65535")


def main(argv: Sequence[str] | None = None) -> None:
    (options,), _ = flags.parse(sys.argv[1:] if argv is None else argv, (DemoArguments,), __doc__, "scripts.demo")
    check_address(options.host, options.port)
    import_gradio()
    voices = load_voices(options)
    for voice in voices:
        print(f"{voice.name}: {voice.facts()}", flush=True)
    serve(build_page(Answering(voices, options.concurrency, options.max_characters)), options)


@dataclass
class Voice:
    """A model, what it is called on the page, and the prompts it was trained with."""

    name: str
    model: "LocalModel"
    templates: Mapping[str, str]

    def facts(self) -> str:
        number, dtype = self.model.model.num_parameters(), str(self.model.model.dtype).removeprefix("torch.")
        size = f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"
        context = f", reads {self.model.context} tokens" if self.model.context else ""
        return f"{size} parameters in {dtype} on {self.model.device}{context}"

    def fitting(self, prompt: str, sampling: Sampling) -> Sampling:
        """`sampling`, for the tokens that the context has left.

        Raises:
            UsageError: there is none.
        """
        tokens = len(self.model.encode(prompt))
        room = sampling.max_tokens if self.model.context is None else self.model.context - tokens
        if room < 1:
            raise UsageError(
                f"Too long: instruction and input are {tokens:,} tokens with their prompt, and this model reads "
                f"{self.model.context:,}, answer included. Shorten them."
            )
        return replace(sampling, max_tokens=min(sampling.max_tokens, room))


def load_voices(options: DemoArguments) -> list[Voice]:
    from alpaca.local_model import LocalModel

    beside = options.compare or options.base
    models = [(options.model, LocalModel(options.model, base=options.base))]
    if beside:
        models.append((beside, LocalModel(beside)))
    names = [Path(folder).resolve().name for folder, _ in models]
    if len(set(names)) < len(names):
        names = [folder for folder, _ in models]
    override = load_prompt_template(options.prompt_template) if options.prompt_template else None
    return [
        Voice(name, model, override or templates_of(folder)) for name, (folder, model) in zip(names, models)
    ]


@dataclass
class Answer:
    """What one model has written. Its thread fills it in, the page looks at it now and then."""

    text: str = ""
    status: str = ""
    wrong: bool = False  # then the status says what is
    ended: bool = False

    def write(self, voice: Voice, row: Row, sampling: Sampling, stopped: threading.Event) -> None:
        """The thread: ends with the answer, or soon after `stopped` is set."""
        started = time.monotonic()
        try:
            prompt = format_prompt(row, voice.templates)
            for piece in voice.model.stream(prompt, voice.fitting(prompt, sampling), stopped):
                self.text += piece
                self.status = f"Writing, {time.monotonic() - started:.0f} s"
            self.status = f"{'Stopped' if stopped.is_set() else 'Done'} after {time.monotonic() - started:.1f} s"
        except Exception as error:  # whatever it is, the person who waits for an answer has to hear of it
            self.status, self.wrong = in_words(error), True
        finally:
            self.ended = True
            print(f"{voice.name}: {len(self.text)} characters. {self.status}", flush=True)  # not what was asked


def in_words(error: Exception) -> str:
    """For the page. What nobody foresaw also goes to the terminal, in full."""
    import torch

    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "Out of memory. Ask for fewer new tokens, shorten the input, or try again when fewer people ask."
    if not isinstance(error, (UsageError, ContextOverflow)):
        traceback.print_exception(error)
        return f"The model failed: {type(error).__name__}: {first_line(error)}"
    return str(error)


class Answering:
    """The requests of all pages, at most `concurrency` of them at a time, each answered by every voice side by side.

    `session`: a page's own name, of one request at a time.
    """

    def __init__(self, voices: Sequence[Voice], concurrency: int, max_characters: int):
        self.voices, self.max_characters = voices, max_characters
        self.places = asyncio.Semaphore(concurrency)
        self._running: dict[str, threading.Event] = {}

    async def answer(
        self, session: str, instruction: str, input: str, sampling: Sampling
    ) -> AsyncIterator[list[Answer]]:
        """The answers so far, of each voice, whenever there is more; the last time with all of them ended. Closing the
        iterator stops the models."""
        row = {"instruction": (instruction or "").strip(), "input": (input or "").strip()}
        answers = [Answer(status="Waiting: all places are taken") for _ in self.voices]
        if problem := self.refusal(row):
            yield [Answer("", problem, wrong=True, ended=True) for _ in self.voices]
            return
        self.stop(session)
        stopped = self._running[session] = threading.Event()
        try:
            if self.places.locked():
                yield copies(answers)
            async with self.places:
                for voice, answer in zip(self.voices, answers):
                    answer.status = "Reading the instruction"
                    threading.Thread(target=answer.write, args=(voice, row, sampling, stopped), daemon=True).start()
                shown: list[Answer] = []
                while not shown or not all(answer.ended for answer in shown):
                    if (now := copies(answers)) != shown:
                        yield now
                        shown = now
                    await asyncio.sleep(PAUSE)
        finally:
            stopped.set()
            if self._running.get(session) is stopped:
                del self._running[session]

    def stop(self, session: str) -> None:
        if session in self._running:
            self._running[session].set()

    def refusal(self, row: Row) -> str | None:
        if not row["instruction"]:
            return "Write an instruction first."
        if (length := len(row["instruction"]) + len(row["input"])) > self.max_characters:
            return f"Too long: instruction and input have {length:,} characters, at most {self.max_characters:,} are read."
        return None


def copies(answers: Sequence[Answer]) -> list[Answer]:
    return [replace(answer) for answer in answers]


def build_page(answering: Answering) -> "gradio.Blocks":
    import gradio as gr

    voices = answering.voices
    longest = min(LONGEST_ANSWER, *(voice.model.context or LONGEST_ANSWER for voice in voices))

    async def answer(
        instruction: str, input: str, temperature: float, top_p: float, max_tokens: float, request: gr.Request
    ) -> AsyncIterator[list[Any]]:
        sampling = Sampling(int(max_tokens), temperature, top_p)
        async for answers in answering.answer(request.session_hash, instruction, input, sampling):
            busy = not all(one.ended for one in answers)
            shown = [part for one in answers for part in (one.text, status_line(one))]
            yield [*shown, gr.Button(interactive=not busy), gr.Button(interactive=busy)]

    async def stop(request: gr.Request) -> None:
        answering.stop(request.session_hash)

    title = f"{voices[0].name} · Alpaca"
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=len(voices) > 1) as page:
        gr.HTML(heading(voices))
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                instruction = gr.Textbox(
                    label="Instruction", lines=3, max_lines=10, autofocus=True, elem_id="instruction",
                    placeholder="What should the model do?",
                )  # fmt: skip
                input = gr.Textbox(
                    label="Input (optional)", lines=2, max_lines=10, elem_id="input",
                    placeholder="The text or data that the instruction is about",
                )  # fmt: skip
                with gr.Row():
                    ask = gr.Button("Answer", variant="primary", elem_id="ask", min_width=120)
                    halt = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop", min_width=120)
                with gr.Accordion("Sampling", open=False):
                    temperature = gr.Slider(0, 2, 0.7, step=0.05, label="Temperature", elem_id="temperature",
                                            info="0 always takes the likeliest token")  # fmt: skip
                    top_p = gr.Slider(0.05, 1, 0.9, step=0.05, label="Top-p", elem_id="top_p",
                                      info="Draws from the likeliest tokens that make up this share")  # fmt: skip
                    max_tokens = gr.Slider(1, longest, min(512, longest), step=1, label="Max new tokens",
                                           elem_id="max_tokens", info="The answer ends there at the latest")  # fmt: skip
                rows = examples()
                gr.Examples(
                    [[row["instruction"], row.get("input", "")] for row in rows], [instruction, input],
                    example_labels=[row["instruction"] for row in rows], label="Try one of these",
                    api_visibility="private", cache_examples=False, elem_id="examples",
                )  # fmt: skip
            with gr.Column(scale=6 if len(voices) == 1 else 9, min_width=320), gr.Row():
                answers = [part for number, voice in enumerate(voices) for part in answer_box(voice, number)]
        gr.HTML(f'<footer class="note">{html.escape(NOTE)}</footer>')
        inputs = [instruction, input, temperature, top_p, max_tokens]
        gr.on([ask.click, instruction.submit, input.submit], answer, inputs, [*answers, ask, halt],
              show_progress="hidden", concurrency_limit=None, api_visibility="private")  # fmt: skip
        halt.click(stop, queue=False, show_progress="hidden", api_visibility="private")
    return page


def answer_box(voice: Voice, number: int) -> tuple["gradio.Textbox", "gradio.HTML"]:
    import gradio as gr

    with gr.Column(min_width=300):
        text = gr.Textbox(label=f"Answer of {voice.name}", lines=12, max_lines=30, interactive=False, buttons=["copy"],
                          elem_id=f"answer_{number}", elem_classes="answer")  # fmt: skip
        status = gr.HTML(status_line(Answer()), elem_id=f"status_{number}")
    return text, status


def status_line(answer: Answer) -> str:
    kind = "wrong" if answer.wrong else "" if answer.ended else "busy" 
    return f'<p class="status {kind}" role="status">{html.escape(answer.status)}</p>'


def heading(voices: Sequence[Voice]) -> str:
    names = " and ".join(html.escape(voice.name) for voice in voices)
    facts = "".join(
        f"<li>{f'<b>{html.escape(voice.name)}</b> ' * (len(voices) > 1)}{html.escape(voice.facts())}</li>"
        for voice in voices
    )
    return f'<header class="title"><p>Alpaca demo</p><h1>{names}</h1><ul>{facts}</ul></header>'


def examples() -> list[Row]:
    """Short ones of the seed tasks, by words that are in one instruction only."""
    rows = load_rows(str(SEED_TASKS))
    return [next(row for row in rows if words in row["instruction"]) for words in EXAMPLES]


def serve(page: "gradio.Blocks", options: DemoArguments) -> None:
    """Until Ctrl-C."""
    import gradio as gr

    own = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1", "localhost", options.host]))
    os.environ |= {"NO_PROXY": own, "no_proxy": own}  # gradio asks its own address whether it answers
    system = [gr.themes.Font(name) for name in ("system-ui", "sans-serif")]
    mono = [gr.themes.Font(name) for name in ("ui-monospace", "monospace")]
    theme = gr.themes.Default(
        primary_hue="teal", neutral_hue="stone", radius_size="lg", font=system, font_mono=mono
    )
    page.queue(api_open=False)
    try:
        page.launch(
            server_name=options.host, server_port=options.port, share=False, inbrowser=False, quiet=True,
            prevent_thread_lock=True, theme=theme, css=CSS, footer_links=[], run_history=False, pwa=False,
            enable_monitoring=False, mcp_server=False, ssr_mode=False, max_file_size=1, strict_cors=True,
        )  # fmt: skip
    except OSError as error:
        raise UsageError(taken(options.host, options.port, error)) from error
    print(f"scripts.demo: http://{options.host}:{options.port}   Ctrl-C ends it", flush=True)
    page.block_thread()


def check_address(host: str, port: int) -> None:
    """Before a model is loaded. Raises UsageError if nothing can listen there."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise UsageError(taken(host, port, error)) from error


def taken(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE or "empty port" in str(error): 
        return f"--port {port}: another program listens there already; end it, or give another --port"
    return f"--host {host} --port {port}: this machine cannot listen there ({error})"


def import_gradio() -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at import
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UsageError(f"the page needs gradio, which is not installed: pip install 'gradio>=6.31' ({error})") from error


CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
.title p { margin: 0; font-size: .8rem; letter-spacing: .12em; text-transform: uppercase; opacity: .65; }
.title h1 { margin: .1rem 0 .3rem; font-size: 1.9rem; line-height: 1.2; overflow-wrap: anywhere; }
.title ul { margin: 0; padding: 0; list-style: none; font-size: .9rem; opacity: .75; }
.status { min-height: 1.4em; margin: .1rem .2rem; font-size: .9rem; opacity: .8; }
.status.wrong { color: #b91c1c; opacity: 1; }
.dark .status.wrong { color: #fca5a5; }
.note { font-size: .85rem; opacity: .75; max-width: 70ch; }
"""

if __name__ == "__main__":
    with reported("scripts.demo"):
        main()
