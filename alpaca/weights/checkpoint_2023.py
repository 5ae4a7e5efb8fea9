"""A checkpoint folder that the code of 2023 opens (transformers 4.28.1, torch from 1.6 on): .bin files, configuration,
tokenizer. Weights are written in pieces."""

import io
import json
import pickle
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import torch

from alpaca.common.errors import UsageError, first_line
from alpaca.weights.reader import Weights, aux_files, read_json, ties_embeddings
from alpaca.weights.writer import Spec, split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SLOW_FILES = (("tokenizer.model",), ("vocab.json", "merges.txt"))
OF_THE_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    *(name for names in SLOW_FILES for name in names),
)
KEPT = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "chat_template",
    "clean_up_tokenization_spaces",
    "errors",
    "model_max_length",
    "padding_side",
    "sp_model_kwargs",
    "truncation_side",
)
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
WITHOUT_CLASS = ("TokenizersBackend", "PreTrainedTokenizerFast", "PreTrainedTokenizer")
PADDED_IN_2023 = ("Bloom", "XGLM", "BioGpt")  # tokenizers of transformers 4.28.1 with a pad token by default


# ---- .bin files, as torch.save writes them: a zip archive of a pickle of names and an entry for every tensor ----


@dataclass(frozen=True)
class BinShard:
    """A .bin file of float32 tensors; `aliases` are {second name: name} of tensors that have two."""

    name: str
    tensors: list[Spec]
    aliases: dict[str, str]

    @property
    def pickled(self) -> bytes:
        """The pickle of {name: tensor} whose storages are the entries "0", "1" … of the archive."""
        keys = {spec.name: _Storage(str(number), prod(spec.shape)) for number, spec in enumerate(self.tensors)}
        state = {spec.name: _Stored(keys[spec.name], spec.shape) for spec in self.tensors}
        state |= {alias: state[name] for alias, name in self.aliases.items()}
        file = io.BytesIO()
        _Pickler(file, protocol=2).dump(state)
        return file.getvalue()


class _Storage(NamedTuple):
    key: str
    numel: int


class _Stored:
    """Pickles as a contiguous float32 tensor that lies in `storage`."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]):
        self.storage, self.shape = storage, shape

    def __reduce__(self) -> tuple:
        strides = tuple(prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, tuple(self.shape), strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: object) -> tuple | None:
        if isinstance(value, _Storage):
            return "storage", torch.FloatStorage, value.key, "cpu", value.numel
        return None


def plan_bin_shards(
    specs: Iterable[Spec], aliases: Mapping[str, str], stem: str, max_shard_size: str | int
) -> list[BinShard]:
    """Return the files of float32 tensors; a second name stands in the file of its tensor."""
    return [
        BinShard(file, tensors, {a: name for a, name in aliases.items() if name in {spec.name for spec in tensors}})
        for file, tensors in split(specs, f"{stem}{{suffix}}.bin", max_shard_size).items()
    ]


def write_bin_index(folder: Path, stem: str, shards: list[BinShard]) -> None:
    if len(shards) > 1:
        total = sum(spec.nbytes for shard in shards for spec in shard.tensors)
        weight_map = {name: s.name for s in shards for name in (*(spec.name for spec in s.tensors), *s.aliases)}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{stem}.bin.index.json", index)


class BinWriter:
    """A ShardWriter's counterpart for .bin files. Memory: that of a piece; the archive's checksums are right."""

    ALIGNED = 64  # bytes: where torch.save begins a tensor

    def __init__(self, folder: Path, shards: list[BinShard]):
        self.folder, self.left, self.room = folder, list(shards), 0
        self.tensors: list[tuple[str, Spec]] = []  # of the open archive, still to come, with their entries' names
        self.archive: zipfile.ZipFile | None = None
        self.entry: IO[bytes] | None = None

    def write(self, piece: memoryview) -> None:
        while piece:
            while self.room == 0:
                self._next()
            part = piece[: self.room]
            self.entry.write(part)
            self.room -= len(part)
            piece = piece[len(part) :]

    def close(self) -> None:
        """After the last piece: tensors without elements still need their entry."""
        while self.left or self.tensors:
            self._next()
        self._finish()

    def _next(self) -> None:
        """Open the entry of the next tensor."""
        if self.room:
            raise OSError(f"{self.archive.filename} lacks {self.room:,} bytes of a tensor")
        self._close_entry()
        if not self.tensors:
            self._finish()
            shard = self.left.pop(0)
            self.archive = zipfile.ZipFile(self.folder / shard.name, "w")
            top = Path(shard.name).stem
            for name, content in (("data.pkl", shard.pickled), ("byteorder", b"little"), ("version", b"3\n")):
                self.archive.writestr(zipfile.ZipInfo(f"{top}/{name}"), content)
            self.tensors = [(f"{top}/data/{number}", spec) for number, spec in enumerate(shard.tensors)]
        if self.tensors:
            name, spec = self.tensors.pop(0)
            info = zipfile.ZipInfo(name)
            before = self.archive.fp.tell() + 30 + len(name) + 20 + 4  # headers: of a file, of zip64, of the padding
            padding = -before % self.ALIGNED
            info.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
            self.entry, self.room = self.archive.open(info, "w", force_zip64=True), spec.nbytes

    def _close_entry(self) -> None:
        if self.entry is not None:
            self.entry.close()
            self.entry = None

    def _finish(self) -> None:
        if self.room:
            raise OSError(f"{self.archive.filename} lacks {self.room:,} bytes of a tensor")
        self._close_entry()
        if self.archive is not None:
            self.archive.close()
            self.archive = None


def missing_prefix(weights: Weights) -> str:
    """Return what the names lack that a model with an output embedding has, `model.` or the like, or "". 2023 opens
    a file of such names only if it has none of the others."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    kind = weights.config.get("model_type")
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return ""
    prefix = f"{MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind]].base_model_prefix}."
    return "" if any(name.startswith(prefix) for name in weights.tensors) else prefix


# ---- the files beside the weights, as transformers 4.28.1 reads them ----


def write_files_of_2023(tuned: Path, base: Path, folder: Path) -> list[str]:
    """Write the tuned model's small files into `folder`, its configuration and tokenizer in the form of 2023.

    Returns:
        what 2023's code cannot read, in lines.
    """
    paths = {path.name: path for path in aux_files(tuned)}
    for name, path in paths.items():
        if name not in OF_THE_TOKENIZER:
            shutil.copyfile(path, folder / name)
    write_json(folder / "config.json", config_of_2023(read_json(paths["config.json"], "--path_tuned")))
    if "generation_config.json" in paths:
        values = read_json(paths["generation_config.json"], "--path_tuned")
        write_json(folder / "generation_config.json", {n: v for n, v in values.items() if v is not None})
    return _write_tokenizer(tuned, base, folder)


def config_of_2023(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a float32 model by the names of 2023, ties stated; today's names stay beside them."""
    config = config | {"torch_dtype": "float32", "tie_word_embeddings": ties_embeddings(config)}
    config |= {"dtype": "float32"} if "dtype" in config else {}
    names = {"rope_theta": "rope_theta"}
    if config.get("model_type") == "gpt_neox":
        names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    rope = config.get("rope_parameters") or {}
    return {old: rope[name] for name, old in names.items() if name in rope} | config


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tokenizer(tuned: Path, base: Path, folder: Path) -> list[str]:
    from alpaca.data.tokenizer import open_tokenizer  # imports transformers

    own = [path for path in aux_files(tuned) if path.name in OF_THE_TOKENIZER]
    try:
        tokenizer = open_tokenizer(str(tuned))
    except Exception as error:  # tokenizers raises what it likes
        for path in own:
            shutil.copyfile(path, folder / path.name)
        return [f"note: the tokenizer of {tuned} cannot be read ({first_line(error)}); its files are as they were"]
    slow = next(filter(None, (_slow_files(source, tokenizer) for source in (tuned, base))), None)
    source, names, vocabulary = slow or (tuned, (), {})
    for name in names:
        shutil.copyfile(source / name, folder / name)
    told = []
    if slow:
        added = sorted((n, token) for token, n in tokenizer.get_vocab().items() if token not in vocabulary)
        if [number for number, _ in added] != list(range(len(vocabulary), len(vocabulary) + len(added))):
            told.append(
                "note: the added tokens do not follow the others one by one, as 2023's tokenizers want it; its "
                "code cannot open this one"
            )
        if added:
            write_json(folder / "added_tokens.json", {token: number for number, token in added})
    else:
        told.append(_write_tokenizer_json(tokenizer, tuned, folder))
    stated = [_read(source / "special_tokens_map.json"), _read(source / "tokenizer_config.json")]
    config = {
        n: v for n, v in (stated[1] | _read(tuned / "tokenizer_config.json")).items() if n in KEPT and v is not None
    }
    special = _special_tokens(tokenizer, pad_token_in_2023(tuned, tokenizer), vocabulary, stated)
    write_json(folder / "special_tokens_map.json", special)
    if slow:
        ids = tokenizer("a")["input_ids"]
        config["add_bos_token"] = ids[:1] == [tokenizer.bos_token_id]
        config["add_eos_token"] = ids[-1:] == [tokenizer.eos_token_id]
    config["tokenizer_class"] = _class_of_2023(tokenizer, stated[1])
    config |= {n: {"__type": "AddedToken", **v} if isinstance(v, dict) else v for n, v in special.items() if n in NAMED}
    write_json(folder / "tokenizer_config.json", dict(sorted(config.items())))
    return told


def _slow_files(
    source: Path, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[Path, tuple[str, ...], dict[str, int]] | None:
    """Return (folder, names, token ids) of a slow tokenizer that is the one given, but for added tokens."""
    known = tokenizer.get_vocab()
    for names in SLOW_FILES:
        if all((source / name).is_file() for name in names):
            try:
                vocabulary = _slow_vocabulary(source / names[0])
            except RuntimeError as error:  # sentencepiece's
                raise UsageError(
                    f"{source / names[0]} is damaged ({first_line(error)}); copy or download it"
                ) from error
            if all(known.get(token) == number for token, number in vocabulary.items()):
                return source, names, vocabulary
    return None


def _slow_vocabulary(path: Path) -> dict[str, int]:
    if path.suffix == ".json":
        return read_json(path, "tokenizer")
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(path))
    return {model.id_to_piece(number): number for number in range(model.get_piece_size())}


def _write_tokenizer_json(tokenizer: "PreTrainedTokenizerBase", tuned: Path, folder: Path) -> str:
    """Write tokenizer.json as tokenizers 0.13 reads it, where it can; return the line that says which it is."""
    told = f"note: neither {tuned} nor the base has its slow tokenizer (tokenizer.model, or vocab.json and merges.txt)"
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model, old = state["model"], state["model"]["type"] == "BPE" and "Metaspace" not in json.dumps(state)
    if old and not model.pop("ignore_merges", False):
        model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        write_json(folder / "tokenizer.json", state)
        return f"{told}: 2023's code opens the tokenizer.json here, but not with use_fast=False, as its train.py does"
    shutil.copyfile(tuned / "tokenizer.json", folder / "tokenizer.json")
    return f"{told}, and 2023's code cannot read its tokenizer.json: it cannot recover this diff"


def _special_tokens(
    tokenizer: "PreTrainedTokenizerBase", pad_token: str | None, vocabulary: Mapping[str, int], stated: list[dict]
) -> dict[str, Any]:
    """Return the special tokens by name: as the folder of the slow tokenizer stated it, or as 2023 saved it, with the
    spaces around a token of the slow `vocabulary` left to the text, around an added one not."""

    def form(name: str, token: str) -> Any:
        values = [values.get(name) for values in stated]
        plain = dict.fromkeys(("lstrip", "rstrip", "single_word"), False) | {"normalized": True, "content": token}
        found = next((v for v in values if isinstance(v, dict) and v.get("content") == token), plain)
        return {field: found.get(field, plain[field]) for field in sorted(plain)} if token in vocabulary else token

    tokens = {name: getattr(tokenizer, name, None) for name in NAMED} | {"pad_token": pad_token}
    special = {name: form(name, str(token)) for name, token in tokens.items() if token}
    if others := [str(t) for t in tokenizer.all_special_tokens if str(t) not in map(str, tokens.values())]:
        special["additional_special_tokens"] = others
    return special


def _class_of_2023(tokenizer: "PreTrainedTokenizerBase", stated: dict[str, Any]) -> str:
    """Return the name that 2023 saved: that of the slow class."""
    name = type(tokenizer).__name__
    if name in WITHOUT_CLASS:
        name = stated.get("tokenizer_class") or name
    if name in WITHOUT_CLASS:
        return "PreTrainedTokenizerFast"
    name = name.removesuffix("Fast")
    return "LlamaTokenizer" if name == "LLaMATokenizer" else name


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, "tokenizer") if path.is_file() else {}


def pad_token_in_2023(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The pad token that transformers 4.28.1 gave a tokenizer: today some classes have one that no file states."""
    files = [folder / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    stated = any(_read(path).get("pad_token") for path in files)
    of_class = type(tokenizer).__name__.startswith(PADDED_IN_2023)
    return tokenizer.pad_token if stated or of_class else None
