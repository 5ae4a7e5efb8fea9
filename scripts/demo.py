r"""Talk to a model in the browser: Alpaca's live demo of 2023 as a local page.

    python -m scripts.demo --model output/alpaca-7b
    python -m scripts.demo --model output/alpaca-7b --compare <its base model>          # two answers, side by side
    python -m scripts.demo --model output/my_adapter --base <folder of its base model>  # with and without the adapter
    python -m scripts.demo --model output/alpaca-7b --host 0.0.0.0 --port 8080          # not only for this machine

The answers stream; a stop button, a closed page and a reloaded one end them on the server too. --concurrency people are
answered at the same time, all others wait, and the page says so. The page loads nothing from anywhere but this server,
and the server asks nobody: no fonts, scripts, analytics or share links. There is no password: whoever reaches --host
can ask. It is served as localhost, or with --host as any IP address and this machine's name; other names, such as that
of a proxy in front, need --allowed_hosts. An answer is shown as text, never as HTML.
"""

import errno
import html
import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    from alpaca.common.errors import starting

    starting("scripts.demo")

from alpaca.common import arguments
from alpaca.common.arguments import flag
from alpaca.common.commands import check_numbers
from alpaca.common.errors import UsageError, names_flags, reported
from alpaca.completions.api import GREEDY, Sampling
from alpaca.data.prompts import load_prompt_template
from alpaca.data.rows import Row, load_rows
from alpaca.inference.demo import Answer, DemoEngine, DemoGuard, DemoModel, licence_of
from alpaca.inference.local_model import LocalModel
from alpaca.weights.reader import ADAPTER, EXACT_DIFF, MODEL, find_folder, folder_kind, open_weights

if TYPE_CHECKING:
    import gradio

SEED_TASKS = Path(__file__).resolve().parent.parent / "seed_tasks.jsonl"
EXAMPLES = {  # what it is called on the page: words that are in one instruction of the seed tasks only
    "A slogan": "slogan for a small bicycle",
    "Countries without a coast": "sea coast",
    "A friendlier note": "to a neighbor",
    "Two cats in Polish": "in Polish",
    "Correct a message": "Correct the spelling",
    "Is the egg fresh?": "how fresh an egg",
    "Weather and climate": "weather and climate",
    "French, formally": "sentence into French",
    "A Python function": "minutes_between",
}
WAITING = 100  # requests that may wait for their turn; others are asked to come back
LONGEST_ANSWER = 2048  # tokens, where the model's context allows it
NOTE = (
    "It can be wrong, biased or offensive in good English, and nothing filters what it writes: check what matters. "
    "The licences of its base model and of its data apply, and so do the terms of a model that wrote the data."
)
KEYS = "Enter asks; Shift+Enter begins a new line."
SHOW = """() => {
    window.answering = true;
    const box = document.querySelector("#answer_0"), {top, bottom} = box.getBoundingClientRect();
    if (top >= 0 && Math.min(bottom, top + 160) <= innerHeight) return;
    document.activeElement.blur();
    box.scrollIntoView({behavior: "smooth", block: "start"});
}"""  # the answer, where it is out of sight; without a phone's keyboard in front of it
ENDED = "() => { window.answering = false; }"
ASK = """async () => {
    for (let tries = 0; window.answering && tries < 600; tries++) {
        document.querySelector("#stop").click();
        await new Promise(done => setTimeout(done, 100));
    }
    document.querySelector("#ask").click();
}"""  # when an example is in the form; an answer that is being written is stopped before
FOLLOW = """() => {
    const box = document.querySelector("#ID textarea");
    if (box.scrollHeight - box.clientHeight - box.scrollTop < 120) box.scrollTop = box.scrollHeight;
}"""  # unless somebody reads further up
CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
.plain > .html-container { padding: 0 2px !important; }
.title p { margin: 0; font-size: .8rem; letter-spacing: .12em; text-transform: uppercase; opacity: .7; }
.title h1 { margin: .1rem 0 .3rem; font-size: 1.9rem; line-height: 1.2; overflow-wrap: anywhere; }
.title ul { margin: 0; padding: 0; list-style: none; font-size: .9rem; opacity: .8; }
.answer-column { gap: .5rem !important; }
.status { min-height: 1.4em; margin: 0 .2rem; font-size: .9rem; opacity: .85; }
.status.wrong { color: #b91c1c; opacity: 1; }
.dark .status.wrong { color: #fca5a5; }
#stop:disabled { background: var(--button-secondary-background-fill); color: var(--body-text-color-subdued); }
#instruction textarea { min-height: 5.2em; }
#input textarea { min-height: 3.8em; }
.keys { margin: 0 .2rem; font-size: .85rem; opacity: .8; }
.note { font-size: .85rem; opacity: .8; max-width: 90ch; overflow-wrap: anywhere; }
.note p { margin: 0 0 .3rem; }
@media (max-width: 767px) { .note { padding-bottom: 45svh; } }  /* room to scroll a short answer to the top */
"""


@dataclass
class DemoArguments:
    model: str | None = flag(None, "Folder or hub id of a model, a LoRA adapter, or a weight diff with its --base.")
    base: str | None = flag(None, "Folder or hub id of what --model was trained from; it answers beside it.")
    compare: str | None = flag(None, "Any other model to answer beside --model instead.")
    load_in_8bit: bool = flag(False, "Quantize the weights to 8 bit (bitsandbytes).")
    load_in_4bit: bool = flag(False, "Quantize the weights to 4 bit, as in QLoRA.")
    prompt_template: str | None = flag(None, "JSON file as for train.py; by default what each model was trained with.")
    host: str = flag("127.0.0.1", "Address to listen on; 0.0.0.0: all of this machine's.")
    port: int = flag(7860, "Port to listen on.")
    allowed_hosts: str | None = flag(
        None,
        "Other names that the page may be reached by, with commas between them; * is any, which no longer keeps "
        "pages of other servers out.",
    )
    concurrency: int = flag(8, "Requests that are answered at the same time.")
    max_characters: int = flag(4000, "Of instruction and input together.")

    def __post_init__(self):
        if not self.model:
            raise UsageError("--model is missing: the folder of a model, such as train.py's --output_dir")
        check_numbers(concurrency=self.concurrency, max_characters=self.max_characters)
        if not 1 <= self.port <= 65535:
            raise UsageError(f"--port {self.port}: expected a number from 1 to 65535")


def main(argv: Sequence[str] | None = None) -> None:
    (options,), _ = arguments.parse(sys.argv[1:] if argv is None else argv, (DemoArguments,), __doc__, "scripts.demo")
    check_address(options.host, options.port)
    import_gradio()
    models = load_models(options)
    for model in models:
        print(f"{model.name}: {model.facts()}", flush=True)
    page = build_page(DemoEngine(models, options.concurrency, options.max_characters))
    names = [name.strip().lower() for name in (options.allowed_hosts or "").split(",") if name.strip()]
    launch(page, options.host, options.port, names)
    print(f"scripts.demo: http://{options.host}:{options.port}   Ctrl-C ends it", flush=True)
    page.block_thread()


@names_flags
def load_models(options: DemoArguments) -> list[DemoModel]:
    """Return --model, and beside it --compare or else --base."""
    whole = is_whole_model(options.model)
    if whole and options.base and options.compare:
        raise UsageError(f"--base {options.base}: {options.model} is a whole model; omit --base or --compare")
    how = {"load_in_8bit": options.load_in_8bit, "load_in_4bit": options.load_in_4bit}
    tuned = LocalModel(options.model, base=None if whole else options.base, **how)
    models = [DemoModel(options.model, tuned, tuned.templates)]
    if options.compare:
        other = LocalModel(options.compare, **how)
        models.append(DemoModel(options.compare, other, other.templates))
    elif options.base:
        shared = folder_kind(find_folder(options.model)) == ADAPTER and not options.load_in_8bit
        base = tuned.without_adapter() if shared else LocalModel(options.base, **how)
        models.append(DemoModel(options.base, base, tuned.templates))
    names = [Path(model.name).resolve().name for model in models]
    override = load_prompt_template(options.prompt_template) if options.prompt_template else None
    for model, name in zip(models, names):
        model.licence = licence_of(find_folder(model.name))
        model.name = name if names.count(name) == 1 else model.name
        model.templates = override or model.templates
    return models


def is_whole_model(folder: str) -> bool:
    """Return whether it is neither an adapter nor a weight diff, which need a base."""
    if folder_kind(find_folder(folder)) in (ADAPTER, EXACT_DIFF):
        return False
    with open_weights(folder) as weights:
        return folder_kind(weights.folder, weights) == MODEL


def build_page(engine: DemoEngine) -> "gradio.Blocks":
    import gradio as gr

    models = engine.models
    longest = min(LONGEST_ANSWER, *(model.model.context or LONGEST_ANSWER for model in models))

    async def answer(
        instruction: str, input: str, temperature: float, top_p: float, max_tokens: float, request: gr.Request
    ) -> AsyncIterator[list[Any]]:
        sampling = Sampling(int(max_tokens), temperature, top_p)
        session = request.session_hash
        async for answers in engine.answer(session, instruction, input, sampling, lambda: session in engine.listeners):
            busy = not all(one.ended for one in answers)
            shown = [part for one in answers for part in (one.text, status_line(one))]
            yield [*shown, gr.Button(interactive=not busy), gr.Button(interactive=busy)]

    async def stop(request: gr.Request) -> None:
        engine.stop(request.session_hash)

    title = f"{models[0].name} · Alpaca"
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=len(models) > 1) as page:
        gr.HTML(heading(models), elem_classes="plain")
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                instruction, input = question_boxes()
                with gr.Row():
                    ask = gr.Button("Answer", variant="primary", elem_id="ask", min_width=120)
                    halt = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop", min_width=120)
                gr.HTML(f'<p class="keys">{KEYS}</p>', elem_classes="plain")
                chosen = example_buttons(instruction, input)
                with gr.Accordion("Sampling", open=False):
                    sampling = sampling_sliders(longest)
            with gr.Column(scale=6 if len(models) == 1 else 9, min_width=320), gr.Row():
                answers = [part for number, model in enumerate(models) for part in answer_box(model, number)]
        gr.HTML(footer(models), elem_classes="plain")
        asks = [ask.click, instruction.submit, input.submit]
        gr.on(asks, None, js=SHOW, show_progress="hidden", api_visibility="private")
        chosen.then(None, js=ASK, show_progress="hidden", api_visibility="private")
        asked = gr.on(
            asks,
            answer,
            [instruction, input, *sampling],
            [*answers, ask, halt],
            show_progress="hidden",
            concurrency_limit=None,
            api_visibility="private",
        )
        asked.then(None, js=ENDED, show_progress="hidden", api_visibility="private")
        halt.click(stop, queue=False, show_progress="hidden", api_visibility="private")
    page.engine = engine  # for the guard that `launch` puts in front
    return page


def question_boxes() -> tuple["gradio.Textbox", "gradio.Textbox"]:
    import gradio as gr

    instruction = gr.Textbox(
        label="Instruction",
        lines=1,  # of more lines, Enter would begin another one
        max_lines=10,
        autofocus=True,
        elem_id="instruction",
        placeholder="What should the model do?",
    )
    input = gr.Textbox(
        label="Input (optional)",
        lines=1,
        max_lines=10,
        elem_id="input",
        placeholder="The text or data that the instruction is about",
    )
    return instruction, input


def example_buttons(instruction: "gradio.Textbox", input: "gradio.Textbox") -> "gradio.events.Dependency":
    """Return the event that one of them has been put into the form."""
    import gradio as gr

    buttons = gr.Examples(
        [[row["instruction"], row.get("input", "")] for row in examples()],
        [instruction, input],
        example_labels=list(EXAMPLES),
        label="Or ask one of these",
        cache_examples=False,
        api_visibility="private",
    )
    return buttons.load_input_event


def sampling_sliders(longest: int) -> list["gradio.Slider"]:
    """Return sliders of temperature, top-p and new tokens, of which an answer has `longest` at most."""
    import gradio as gr

    tokens = min(GREEDY.max_new_tokens, longest)
    sliders = (
        ("temperature", "Temperature", (0, 2, GREEDY.temperature), 0.05, "0 always takes the likeliest token"),
        ("top_p", "Top-p", (0.05, 1, GREEDY.top_p), 0.05, "Draws from the likeliest tokens that make up this share"),
        ("max_tokens", "Max new tokens", (1, longest, tokens), 1, "The answer is cut there"),
    )
    return [gr.Slider(*at, step=step, label=label, elem_id=name, info=info) for name, label, at, step, info in sliders]


def answer_box(model: DemoModel, number: int) -> tuple["gradio.Textbox", "gradio.HTML"]:
    import gradio as gr

    with gr.Column(min_width=300, elem_classes="answer-column"):
        text = gr.Textbox(
            label=f"Answer of {model.name}",
            lines=10,
            max_lines=20,
            interactive=False,
            buttons=["copy"],
            elem_id=f"answer_{number}",
            elem_classes="answer",
        )
        text.change(None, js=FOLLOW.replace("ID", f"answer_{number}"))  # gradio's own autoscroll does nothing here
        status = gr.HTML(status_line(Answer()), elem_id=f"status_{number}", elem_classes="plain")
    return text, status


def status_line(answer: Answer) -> str:
    kind = "wrong" if answer.wrong else "" if answer.ended else "busy"
    return f'<p class="status {kind}" role="status">{html.escape(answer.status)}</p>'


def heading(models: Sequence[DemoModel]) -> str:
    names = " and ".join(html.escape(model.name) for model in models)
    facts = ""
    for model in models:
        name = f"<b>{html.escape(model.name)}</b> " if len(models) > 1 else ""
        facts += f"<li>{name}{html.escape(model.facts())}</li>"
    return f'<header class="title"><p>Alpaca demo</p><h1>{names}</h1><ul>{facts}</ul></header>'


def footer(models: Sequence[DemoModel]) -> str:
    """Return what to know about the answers, and what the models' cards say of licences."""
    several = len(models) > 1
    parts = [f"{model.name}: {model.licence}" if several else model.licence for model in models if model.licence]
    return f'<footer class="note">{"".join(f"<p>{html.escape(part)}</p>" for part in (*parts, NOTE))}</footer>'


def examples() -> list[Row]:
    """Return the seed tasks that EXAMPLES names."""
    rows = load_rows(str(SEED_TASKS))
    return [next(row for row in rows if words in row["instruction"]) for words in EXAMPLES.values()]


def launch(page: "gradio.Blocks", host: str, port: int, names: Sequence[str] = ()) -> None:
    """Listen, in a thread. Nothing is shared, measured, remembered or fetched, whatever the environment says."""
    import gradio as gr
    from starlette.middleware import Middleware

    own = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1", "localhost", host]))
    os.environ |= {"NO_PROXY": own, "no_proxy": own}  # gradio asks its own address whether it answers
    fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
    fonts = {kind: [gr.themes.Font(name) for name in names] for kind, names in fonts.items()}
    try:
        page.queue(api_open=False, max_size=WAITING).launch(
            server_name=host,
            server_port=port,
            quiet=True,
            prevent_thread_lock=True,
            inbrowser=False,
            share=False,
            theme=gr.themes.Default(primary_hue="teal", neutral_hue="stone", radius_size="lg", **fonts).set(
                button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800"
            ),
            css=CSS,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            ssr_mode=False,
            app_kwargs={"middleware": [Middleware(DemoGuard, engine=page.engine, host=host, names=names)]},
            max_file_size=1,  # byte: no file is asked for, and none taken
        )
    except OSError as error:
        raise UsageError(taken(host, port, error)) from error


def check_address(host: str, port: int) -> None:
    """Raise UsageError if nothing can listen there, before a model is loaded."""
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
        raise UsageError(
            f"the page needs gradio, which is not installed: pip install 'gradio>=6.31' ({error})"
        ) from error


if __name__ == "__main__":
    with reported("scripts.demo"):
        main()
