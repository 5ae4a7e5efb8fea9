"""Make a tiny base model with random weights and a tokenizer trained on our own text: for smoke tests.

    python -m scripts.make_tiny_model --output_dir tiny_llama                  # LLaMA architecture, sentencepiece BPE
    python -m scripts.make_tiny_model --output_dir tiny_opt --architecture opt # byte-level BPE, vocabulary > tokenizer

It loads like a real one (AutoTokenizer, AutoModelForCausalLM) and trains in seconds on a CPU, so it shows whether a
command line, a data file and a cluster work before a real model is tried.
"""

import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    from alpaca.common.errors import starting

    starting("scripts.make_tiny_model")

from alpaca.common import commands
from alpaca.common.commands import check_numbers
from alpaca.common.distributed import without_weight_bars
from alpaca.common.errors import InputError, ParameterError, reported
from alpaca.common.files import share_weights

ROOT = Path(__file__).resolve().parent.parent
Architecture = Literal["llama", "opt", "gpt2"]


def own_text() -> list[str]:
    """Return the text of this repository's seed tasks: what the tokenizer is trained on."""
    from alpaca.data.prompts import format_prompt
    from alpaca.data.rows import load_rows

    rows = load_rows(str(ROOT / "seed_tasks.jsonl"))
    return [format_prompt(row) + row["output"] for row in rows]


def sentencepiece_tokenizer(texts: Iterable[str], vocab_size: int, output_dir: Path) -> None:
    """Write a `tokenizer.model` like LLaMA's: BPE, byte fallback, digits apart, no normalization, no pad token."""
    import sentencepiece

    model = io.BytesIO()
    options = dict(
        sentence_iterator=iter([line for text in texts for line in text.split("\n") if line]),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    try:
        sentencepiece.SentencePieceTrainer.train(**options)
    except RuntimeError as error:
        if not (least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))):
            raise
        raise ParameterError(
            f"{{vocab_size}} {vocab_size}: expected at least {least[1]}, for the characters of the text", "vocab_size"
        ) from error
    (output_dir / "tokenizer.model").write_bytes(model.getvalue())
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "model_max_length": 2048,
    }
    (output_dir / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def byte_level_tokenizer(texts: Iterable[str], vocab_size: int, output_dir: Path, architecture: str) -> None:
    """Write a byte-level BPE's `vocab.json` and `merges.txt`. Only OPT's starts with </s> and has a pad token."""
    from tokenizers import ByteLevelBPETokenizer

    if architecture == "opt":
        special, extra = ["<s>", "<pad>", "</s>", "<unk>"], {"pad_token": "<pad>", "add_bos_token": True}
        extra |= {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
    else:
        special, extra = ["<|endoftext|>"], {}
        extra |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    if vocab_size < (least := 256 + len(special)):
        raise ParameterError(f"{{vocab_size}} {vocab_size}: expected at least {least}, for all bytes", "vocab_size")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.save_model(str(output_dir))
    config = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 2048, "errors": "replace", **extra}
    (output_dir / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def make_tiny_model(
    output_dir: str | Path,
    architecture: str = "llama",
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    vocab_size: int = 1000,
    seed: int = 0,
    texts: Iterable[str] | None = None,
) -> Path:
    """Write tokenizer, config and float32 weights to `output_dir` and return it. Equal arguments, equal files.

    Raises:
        UsageError: no such model can be made, or the folder cannot be written.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    output_dir = Path(output_dir)
    heads = max(hidden_size // 32, 2)
    if hidden_size < 1 or hidden_size % (2 * heads):
        raise ParameterError(
            f"{{hidden_size}} {hidden_size}: {heads} attention heads cannot share it evenly; expected a multiple of 32",
            "hidden_size",
        )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{output_dir}: cannot be written ({error.strerror})", output_dir) from error
    texts = list(own_text() if texts is None else texts)
    if architecture == "llama":
        sentencepiece_tokenizer(texts, vocab_size, output_dir)
    else:
        byte_level_tokenizer(texts, vocab_size, output_dir, architecture)
    tokenizer = AutoTokenizer.from_pretrained(output_dir, trust_remote_code=False)
    sizes = {
        "llama": dict(
            intermediate_size=hidden_size * 3,
            num_key_value_heads=heads,
            tie_word_embeddings=False,
            max_position_embeddings=2048,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "opt": dict(ffn_dim=hidden_size * 4, word_embed_proj_dim=hidden_size, max_position_embeddings=2048),
        "gpt2": dict(n_positions=1024, bos_token_id=0, eos_token_id=0),
    }
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer) + (7 if architecture == "opt" else 0),  # as OPT, whose 50272 rows hold 50265 tokens
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=heads,
        initializer_range=hidden_size**-0.5,  # 0.02 is for wide models; at this width it learns many times slower
        **sizes[architecture],
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    with without_weight_bars():
        model.save_pretrained(output_dir)
    share_weights(output_dir)
    return output_dir


def write(
    output_dir: str,
    architecture: Architecture = "llama",
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    vocab_size: int = 1000,
    seed: int = 0,
) -> None:
    """Write the model.

    Args:
        output_dir: folder to be written.
        architecture: of the model.
        hidden_size: width of the model.
        num_hidden_layers: number of its layers.
        vocab_size: of the tokenizer, at most; a small text gives fewer tokens.
        seed: of the weights.
    """
    check_numbers(num_hidden_layers=num_hidden_layers)
    path = make_tiny_model(output_dir, architecture, hidden_size, num_hidden_layers, vocab_size, seed)
    print(f"wrote a {architecture} model with random weights to {path}")


def main(argv: Sequence[str] | None = None) -> None:
    commands.call("scripts.make_tiny_model", write, argv, __doc__)


if __name__ == "__main__":
    with reported("scripts.make_tiny_model"):
        main()
