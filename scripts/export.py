r"""A trained model for other programs: a GGUF file for llama.cpp and LM Studio, or a folder for Ollama.

    python -m scripts.export --model output/alpaca-7b --to gguf --output_dir output/alpaca-7b-gguf
    python -m scripts.export --model output/alpaca-7b --to ollama --output_dir output/alpaca-7b-ollama --dtype Q8_0
    ollama create alpaca-7b -f output/alpaca-7b-ollama/Modelfile

The model is a plain checkpoint: an adapter is merged, and a diff recovered, first. The folder for Ollama holds the GGUF
file and a Modelfile, whose template builds the prompt of training, byte for byte. vLLM, SGLang and transformers take
the checkpoint as it is.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if __name__ == "__main__":
    from alpaca.common.errors import starting

    starting("scripts.export")

from alpaca.common import commands
from alpaca.common.errors import format_bytes, names_flags, reported
from alpaca.common.files import new_folder
from alpaca.data.prompts import template_parts, templates_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_FILE = "model.gguf"


@names_flags
def export(
    model: str,
    output_dir: str,
    to: Literal["gguf", "ollama"] = "gguf",
    dtype: Literal["F32", "F16", "Q8_0"] = "F16",
    name: str | None = None,
) -> None:
    """Write `model` in the format of another program.

    Args:
        model: folder (or hub id) of a checkpoint: LLaMA, Mistral, Qwen2 or Qwen3.
        output_dir: folder to be written; it is whole or not there.
        to: gguf, or ollama, which adds a Modelfile.
        dtype: of the matrices; Q8_0 takes a quarter of F32.
        name: of the model in other programs; by default that of its folder.

    Raises:
        UsageError: the folder holds something else, or a model that GGUF cannot hold; nothing is written.
    """
    from alpaca.data.tokenizer import open_tokenizer
    from alpaca.weights.gguf import GGUFModel, import_gguf
    from alpaca.weights.reader import open_weights

    import_gguf()
    name = name or Path(model).resolve().name
    with open_weights(model) as weights:
        tokenizer = open_tokenizer(str(weights.folder))
        found = GGUFModel(weights, tokenizer, dtype)
        for line in found.notes():
            print(line, flush=True)
        with new_folder(output_dir, found.nbytes, False, (weights.folder,)) as folder:
            found.write(folder / MODEL_FILE, name)
            if to == "ollama":
                text = modelfile(templates_of(weights.folder), tokenizer)
                (folder / "Modelfile").write_text(text, encoding="utf-8")
    print(f"wrote {output_dir}: {MODEL_FILE}, {format_bytes(found.nbytes)} of {dtype}", flush=True)
    if to == "ollama":
        print(f"next: ollama create {shlex.quote(name)} -f {shlex.quote(str(Path(output_dir) / 'Modelfile'))}")
    else:
        print(f"next: llama-server -m {shlex.quote(str(Path(output_dir) / MODEL_FILE))}, or open it in LM Studio")


def modelfile(templates: Mapping[str, str], tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the text of an Ollama Modelfile that asks with `prompt_no_input`, byte for byte.

    What stands before the paragraph of {instruction} is SYSTEM, so that `/set system` can give the first sentence of
    `prompt_input` to a question with an input.
    """
    before, after = _around_instruction(templates["prompt_no_input"])
    system, blank, heading = before.rpartition("\n\n")
    template = "".join(
        [
            f"{{{{ if .System }}}}{{{{ .System }}}}{blank}{{{{ end }}}}" if system else "",
            _go_text(heading),
            "{{ .Prompt }}",
            _go_text(after),
            "{{ .Response }}",
            _go_text(tokenizer.eos_token),
        ]
    )
    stops = [tokenizer.eos_token, *([heading.strip()] if heading.strip() else [])]
    return "\n".join(
        [
            f"FROM ./{MODEL_FILE}",
            f'TEMPLATE """{template}"""',
            *([f"SYSTEM {_quoted(system)}"] if system else []),
            *(f"PARAMETER stop {_quoted(stop)}" for stop in stops),
            "PARAMETER temperature 0",
            "",
        ]
    )


def _around_instruction(template: str) -> tuple[str, str]:
    """Return the text before and behind {instruction}."""
    parts = template_parts(template)
    place = next(number for number, (_, field) in enumerate(parts) if field == "instruction")
    return "".join(text for text, _ in parts[: place + 1]), "".join(text for text, _ in parts[place + 1 :])


def _go_text(text: str) -> str:
    """Return `text` as a Go template writes it: braces and three quotes would be read as its own, or Ollama's."""
    return text.replace("{{", '{{ "{{" }}').replace('"""', '{{ `"` }}{{ `"` }}{{ `"` }}')


def _quoted(text: str) -> str:
    """Return a value of a Modelfile."""
    return f'"""{text}"""' if "\n" in text or '"' in text else f'"{text}"'


def main(argv: Sequence[str] | None = None) -> None:
    commands.call("scripts.export", export, argv, __doc__)


if __name__ == "__main__":
    with reported("scripts.export"):
        main()
