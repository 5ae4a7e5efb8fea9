"""A checkpoint as one GGUF file, for llama.cpp, Ollama and LM Studio.

The `gguf` package of the llama.cpp project writes the file and quantizes. What is here is which model says what: the
architectures LLaMA (with Mistral), Qwen2 and Qwen3, and tokenizers that llama.cpp reads as transformers does, id for
id. Everything else is refused with the command of llama.cpp's own converter. Tensors are read and written one by one.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tqdm import tqdm

from alpaca.common.errors import InputError, UsageError
from alpaca.data.tokenization import tokens_around
from alpaca.data.tokenizer import open_config
from alpaca.weights.reader import Tensor, Weights

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from transformers import PreTrainedTokenizerBase

Format = Literal["F32", "F16", "Q8_0"]
ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}  # names in gguf's MODEL_ARCH
LAST_NORMAL = 65504.0  # the largest number of float16
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
# How llama.cpp calls the ways in which byte-level tokenizers cut a text before they merge, and whether a word that is
# a token is taken whole (ignore_merges).
PRE_TOKENIZERS = {
    "gpt-2": ([BYTES], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, BYTES], False),
    "qwen2": ([CONTRACTIONS + r"\p{N}" + REST, BYTES | {"use_regex": False}], False),
    "llama-bpe": ([CONTRACTIONS + r"\p{N}{1,3}" + REST, BYTES | {"use_regex": False}], True),
}


class _Other(Exception):
    """What llama.cpp cannot read, or reads in another way."""


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs of a tokenizer. `model`: its name for the algorithm, "llama" (sentencepiece) or "gpt2"."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    add_space_prefix: bool


def import_gguf() -> Any:
    """Return the gguf package. Raise UsageError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UsageError('a GGUF file is written by the gguf package: pip install "gguf>=0.17,<0.20"') from error
    return gguf


class GGUFModel:
    """A checkpoint that can be written as GGUF: everything that can be refused is refused here.

    Raises:
        InputError: its architecture, tokenizer or weights cannot be said in GGUF so that llama.cpp answers as
            transformers does.
    """

    def __init__(self, weights: Weights, tokenizer: "PreTrainedTokenizerBase", dtype: Format):
        self.gguf, self.weights, self.tokenizer, self.dtype = import_gguf(), weights, tokenizer, dtype
        try:
            self.config = _config(weights)
            self.arch = self.gguf.MODEL_ARCH[ARCHITECTURES[self.config.model_type]]
            self.names = self.gguf.get_tensor_name_map(self.arch, self.config.num_hidden_layers)
            self.tensors = {name: tensor for tensor in self._wanted() for name in [self._name(tensor)]}
            self.vocabulary = read_vocabulary(tokenizer, self._rows())
        except _Other as error:
            raise InputError(
                f"{weights.folder}: {error}, which this export does not write; llama.cpp's own converter may: "
                f"python convert_hf_to_gguf.py {weights.folder} --outfile model.gguf",
                weights.folder,
            ) from error

    @property
    def nbytes(self) -> int:
        """Return the bytes of the tensors in the file."""
        return sum(self._stored(tensor)[1] for tensor in self.tensors.values())

    def notes(self) -> list[str]:
        """Return what the file cannot say of the model, in lines."""
        if self._context() == self.config.max_position_embeddings:
            return []
        return [
            f"note: this model's attention reaches back {self._context():,} tokens, which llama.cpp does not know: the "
            "context of the file is no longer than that"
        ]

    def write(self, path: Path, name: str) -> None:
        """Write the file. `name` is what programs show for the model."""
        writer = self.gguf.GGUFWriter(path, self.gguf.MODEL_ARCH_NAMES[self.arch])
        self._add_config(writer, name)
        self._add_tokenizer(writer)
        factors = _llama3_factors(self.config)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for gguf_name, tensor in self.tensors.items():
            kind, nbytes = self._stored(tensor)
            shape = tensor.shape
            if kind == self.gguf.GGMLQuantizationType.Q8_0:
                shape = self.gguf.quants.quant_shape_to_byte_shape(shape, kind)
            dtype = {"F32": "float32", "F16": "float16", "Q8_0": "uint8"}[kind.name]
            writer.add_tensor_info(gguf_name, shape, _numpy_dtype(dtype), nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for tensor in tqdm(self.tensors.values(), desc="export", unit=" tensors", leave=False):
            writer.write_tensor_data(self._data(tensor))
        writer.close()

    # ---- tensors ----

    def _wanted(self) -> Iterator[Tensor]:
        """Yield the tensors of the file. Buffers that are computed from the config, and an output embedding that is the
        input embedding once more, are left out."""
        for tensor in self.weights.tensors.values():
            tied = tensor.name == "lm_head.weight" and self.config.tie_word_embeddings
            if not tensor.name.endswith("rotary_emb.inv_freq") and not tied:
                yield tensor

    def _name(self, tensor: Tensor) -> str:
        found = self.names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise _Other(f"has a tensor {tensor.name}")
        return found

    def _rows(self) -> int:
        if "token_embd.weight" not in self.tensors:
            raise _Other("has no input embedding")
        return self.tensors["token_embd.weight"].shape[0]

    def _stored(self, tensor: Tensor) -> tuple["GGMLQuantizationType", int]:
        """Return the type that a tensor gets in the file, and its bytes. Norms and biases stay float32."""
        kind = self.gguf.GGMLQuantizationType
        if len(tensor.shape) < 2 or self.dtype == "F32":
            return kind.F32, tensor.numel * 4
        if self.dtype == "Q8_0" and tensor.shape[-1] % 32 == 0:
            return kind.Q8_0, tensor.numel // 32 * 34  # a float16 scale for 32 numbers
        return kind.F16, tensor.numel * 2

    def _data(self, tensor: Tensor) -> Any:
        """Return the numbers of a tensor as numpy, in the order and the type of the file."""
        values = torch.empty(tensor.numel)
        self.weights.read(tensor, 0, values, torch.empty(tensor.nbytes, dtype=torch.uint8))
        values = values.view(tensor.shape)
        if self.arch == self.gguf.MODEL_ARCH.LLAMA:
            values = self._interleaved(tensor.name, values)
        kind, _ = self._stored(tensor)
        largest = max(abs(float(end)) for end in values.aminmax())  # NaN where one is
        if not math.isfinite(largest):
            problem = "holds numbers that are not finite: the model is damaged, or its training was"
            raise InputError(f"{self.weights.folder}: {tensor.name} {problem}", self.weights.folder)
        if kind.name == "F16" and largest > LAST_NORMAL:
            raise InputError(
                f"{self.weights.folder}: {tensor.name} holds numbers that float16 cannot; export it as F32",
                self.weights.folder,
            )
        return self.gguf.quants.quantize(values.contiguous().numpy(), kind)

    def _interleaved(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Return queries' and keys' rows in llama.cpp's order: a rotation turns neighbours there, and the two halves of
        a head in transformers (`rotate_half`)."""
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        count = next((count for part, count in heads.items() if f".{part}." in name), None)
        if count is None:
            return values
        return values.view(count, 2, values.shape[0] // count // 2, -1).transpose(1, 2).reshape(values.shape)

    # ---- what is said of the model ----

    def _context(self) -> int:
        """Return the tokens up to which llama.cpp computes what transformers does: those of Mistral's window."""
        longest = self.config.max_position_embeddings
        return min(longest, getattr(self.config, "sliding_window", None) or longest)

    def _add_config(self, writer: "GGUFWriter", name: str) -> None:
        config, files = self.config, self.gguf.LlamaFileType
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type({"F32": files.ALL_F32, "F16": files.MOSTLY_F16, "Q8_0": files.MOSTLY_Q8_0}[self.dtype])
        writer.add_quantization_version(self.gguf.GGML_QUANT_VERSION)
        writer.add_context_length(self._context())
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_key_length(_head_dim(config))
        writer.add_value_length(_head_dim(config))
        writer.add_rope_dimension_count(_head_dim(config))
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_vocab_size(len(self.vocabulary.tokens))
        if config.rope_parameters["rope_type"] == "linear":
            writer.add_rope_scaling_type(self.gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(config.rope_parameters["factor"])

    def _add_tokenizer(self, writer: "GGUFWriter") -> None:
        vocabulary, tokenizer = self.vocabulary, self.tokenizer
        writer.add_tokenizer_model(vocabulary.model)
        writer.add_tokenizer_pre(vocabulary.pre)
        writer.add_token_list(vocabulary.tokens)
        writer.add_token_types(vocabulary.types)
        if vocabulary.scores is not None:
            writer.add_token_scores(vocabulary.scores)
            writer.add_add_space_prefix(vocabulary.add_space_prefix)
        if vocabulary.merges is not None:
            writer.add_token_merges(vocabulary.merges)
        for token in ("bos", "eos", "unk", "pad"):
            number = getattr(tokenizer, f"{token}_token_id")
            if number is not None:
                getattr(writer, f"add_{token}_token_id")(number)
        writer.add_add_bos_token(bool(tokens_around(tokenizer)[0]))
        writer.add_add_eos_token(False)  # it would end the prompt
        if tokenizer.chat_template:
            writer.add_chat_template(tokenizer.chat_template)


def _config(weights: Weights) -> Any:
    """Return the model's configuration, with every default filled in. Raise _Other for what GGUF cannot say of it."""
    weights.require_config()
    kind = weights.config.get("model_type")
    if kind not in ARCHITECTURES:
        raise _Other(f"is of the architecture {kind!r} (expected one of {', '.join(ARCHITECTURES)})")
    config = open_config(weights.folder)
    if config.hidden_act != "silu":
        raise _Other(f"has the activation {config.hidden_act!r}")
    rope = config.rope_parameters["rope_type"]
    if rope not in ("default", "linear", "llama3"):
        raise _Other(f"scales its positions by {rope!r}")
    if getattr(config, "use_sliding_window", False):
        raise _Other("has attention in a sliding window")
    return config


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _llama3_factors(config: Any) -> Any:
    """Return by what Llama 3.1's scaling divides each of the d/2 rotation frequencies, float32; None for other kinds.
    llama.cpp reads them as a tensor."""
    if config.rope_parameters["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    half = torch.arange(0, _head_dim(config), 2, dtype=torch.float32) / _head_dim(config)
    return (config.rope_parameters["rope_theta"] ** -half / scaled).numpy()


def _numpy_dtype(name: str) -> Any:
    import numpy

    return numpy.dtype(name)


# ---- the tokenizer ----


def read_vocabulary(tokenizer: "PreTrainedTokenizerBase", rows: int) -> Vocabulary:
    """Return the vocabulary of `rows` tokens, as many as the model's embeddings have.

    Raises:
        _Other: llama.cpp would cut a text into other tokens.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _Other(f"has a tokenizer of the class {type(tokenizer).__name__}")
    state = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix"):
        raise _Other(f"has a tokenizer of the type {model['type']}")
    before, _ = tokens_around(tokenizer)
    if before not in ([], [tokenizer.bos_token_id]):
        raise _Other(f"has a tokenizer that puts the tokens {tokenizer.convert_ids_to_tokens(before)} in front")
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    tokens, types = _tokens(state, rows)
    if model.get("byte_fallback"):
        added = {token["content"] for token in state["added_tokens"]}
        scores = _scores(model["vocab"], merges, tokens, added)
        return Vocabulary("llama", "default", tokens, types, scores, None, _space_prefix(state))
    return Vocabulary("gpt2", _pre_tokenizer(state), tokens, types, None, [" ".join(merge) for merge in merges], False)


def _tokens(state: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Return the token of each id, and its type in GGUF. Rows of the embeddings that no token has are filled up."""
    kind = import_gguf().TokenType
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [int(kind.UNUSED)] * rows
    added = {token["id"]: token for token in state["added_tokens"]}
    vocab = {number: token for token, number in state["model"]["vocab"].items()}
    vocab |= {number: token["content"] for number, token in added.items()}
    if vocab and max(vocab) >= rows:
        raise _Other(f"has a token {vocab[max(vocab)]!r} with the id {max(vocab)} and embeddings of {rows} rows")
    for number, token in vocab.items():
        tokens[number], types[number] = token, int(kind.NORMAL)
        if number in added:
            types[number] = int(kind.CONTROL if added[number]["special"] else kind.USER_DEFINED)
        if state["model"].get("byte_fallback") and _is_byte(token):
            types[number] = int(kind.BYTE)
    unknown = state["model"].get("unk_token")
    if unknown is not None and state["model"].get("byte_fallback"):
        types[state["model"]["vocab"][unknown]] = int(kind.UNKNOWN)
    return tokens, types


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(vocab: dict[str, int], merges: list[tuple[str, ...]], tokens: list[str], added: set[str]) -> list[float]:
    """Return sentencepiece's score of each token: the later it is merged, the lower.

    sentencepiece merges whatever neighbours make a token, transformers only the pairs that are listed, so the list must
    have every pair of tokens that makes a token, and those of a token one after the other.
    """
    ranks: dict[str, list[int]] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, []).append(rank)
    listed = set(merges)
    for token in vocab.keys() - added:
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        unlisted = any(left in vocab and right in vocab and (left, right) not in listed for left, right in pairs)
        found = ranks.get(token, [0])
        if unlisted or found[-1] - found[0] != len(found) - 1:
            raise _Other("has a tokenizer whose merges are not those of a sentencepiece model")
    return [-float(ranks.get(token, [len(merges)])[0]) for token in tokens]


def _space_prefix(state: dict[str, Any]) -> bool:
    """Return whether a text gets a space in front. Raise _Other if it is changed in another way first."""
    parts = _parts(state["normalizer"], "normalizers") + _parts(state["pre_tokenizer"], "pretokenizers")
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    metaspace = {"type": "Metaspace", "replacement": "▁", "split": False}
    prefix = False
    for part in parts:
        if part == {"type": "Prepend", "prepend": "▁"}:
            prefix = True
        elif part.get("type") == "Metaspace" and {**part, **metaspace} == part:
            prefix = part.get("prepend_scheme") in ("first", "always")
        elif part != blank:
            raise _Other(f"has a tokenizer with the step {part.get('type')}")
    return prefix


def _pre_tokenizer(state: dict[str, Any]) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer cuts a text. Raise _Other if it has none."""
    if any(part["type"] != "NFC" for part in _parts(state["normalizer"], "normalizers")):
        raise _Other("has a tokenizer that changes the text first")
    found = []
    for part in _parts(state["pre_tokenizer"], "pretokenizers"):
        if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            found.append(part["pattern"].get("Regex"))
        else:
            found.append({key: value for key, value in part.items() if key != "trim_offsets"})
    for name, (parts, ignores_merges) in PRE_TOKENIZERS.items():
        if found == parts and bool(state["model"].get("ignore_merges")) == ignores_merges:
            return name
    raise _Other("has a tokenizer that cuts texts in a way for which llama.cpp has no name known here")


def _parts(step: dict[str, Any] | None, several: str) -> list[dict[str, Any]]:
    """Return the steps of a sequence; a step alone is a sequence of one."""
    if step is None:
        return []
    return step[several] if step["type"] == "Sequence" else [step]
