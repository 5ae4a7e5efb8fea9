"""Opening a tokenizer as 2023 read its folder, the files that go with a saved one, and opening a model's settings."""

import copy
import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alpaca.common.distributed import print_rank0
from alpaca.common.errors import InputError, first_line, loading, reach_hub
from alpaca.common.files import json_text, parse_json, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

SPECIAL_TOKENS = {"pad_token": "[PAD]", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
_TEXT_TOKENS = {"pad_token": None, **dict.fromkeys(("eos_token", "bos_token", "unk_token"), "<|endoftext|>")}
DEFAULTS_2023 = {  # of transformers 4.28.1's classes, for tokens that a folder does not state; version 5 has others
    "LlamaTokenizer": {**SPECIAL_TOKENS, "pad_token": None},
    "GPT2Tokenizer": _TEXT_TOKENS,
    "GPTNeoXTokenizer": _TEXT_TOKENS,
    "BloomTokenizer": {**SPECIAL_TOKENS, "pad_token": "<pad>"},
}
CLASSES_2023 = {  # of a folder that names no class
    "llama": "LlamaTokenizer",
    "gpt_bigcode": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "bloom": "BloomTokenizer",
}
SLOW_FILES = (("tokenizer.model",), ("vocab.json", "merges.txt"))
ADDED_TOKENS = "added_tokens.json"
OF_THE_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    ADDED_TOKENS,
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
ATTENTION_IN_TRANSFORMERS = ("eager", "sdpa", "flex_attention")  # any other name may be one of code on the hub
MOST_LAYERS = 1000  # a model of more would be built for minutes and hours
PADDED_IN_2023 = ("Bloom", "XGLM", "BioGpt")  # tokenizers of transformers 4.28.1 with a pad token by default


def open_tokenizer(
    name: str, cache_dir: str | None = None, unstated: dict[str, str | None] | None = None, **kwargs: Any
) -> "PreTrainedTokenizerBase":
    """Load a tokenizer as AutoTokenizer does, but where a folder is silent it is read as transformers 4.28.1 read it.

    Version 5 then takes other special tokens (GPT-NeoX: pads with <|padding|>; Bloom: none at all), and opens the
    tokenizer.model of a LLaMA folder that names no class, or the class LLaMATokenizer, without <s> and first space.
    It also recurses without end over bos, eos and unk that are "", as in early LLaMA folders: they are those of the
    sentencepiece model. What version 5 alone takes for a token is put into `unstated` where it was changed.
    Raise InputError if there is none, it has code of its own, or its files are damaged, whatever a library raises.
    """
    reach_hub(name, cache_dir)
    with loading(name, "no tokenizer could be loaded"):
        for path in (Path(name) / file for file in OF_THE_TOKENIZER):
            if path.is_file() and not os.access(path, os.R_OK):  # a library would take it for one that is not there
                raise InputError(f"{path}: cannot be read (Permission denied)", name)
        tokenizer = _opened(name, cache_dir, {} if unstated is None else unstated, kwargs)
        if wrong := [name for name in SPECIAL_TOKENS if not isinstance(getattr(tokenizer, name), str | None)]:
            raise ValueError(f"its {wrong[0]} is {getattr(tokenizer, wrong[0])!r:.60}, expected a text")
        tokenizer("a", split_special_tokens=True)  # a damaged one may open, and fail at its first text
        return tokenizer


def _opened(
    name: str, cache_dir: str | None, unstated: dict[str, str | None], kwargs: dict[str, Any]
) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer, LlamaTokenizer

    config, model = (_read_json(name, file, cache_dir) for file in ("tokenizer_config.json", "config.json"))
    stated = {**config, **_read_json(name, "special_tokens_map.json", cache_dir)}
    for token, default in SPECIAL_TOKENS.items():
        if stated.get(token) in ("", {"content": ""}):
            kwargs[token] = None if token == "pad_token" else default
    class_name = config.get("tokenizer_class") or model.get("tokenizer_class") or ""
    known = class_name.removesuffix("Fast") or CLASSES_2023.get(model.get("model_type"), "")
    known = "LlamaTokenizer" if known == "LLaMATokenizer" else known
    opener = LlamaTokenizer if class_name == "LLaMATokenizer" else AutoTokenizer
    if known == "LlamaTokenizer" and _find(name, "tokenizer.json", cache_dir) is None:  # it would say all by itself
        opener = LlamaTokenizer
        kwargs |= {} if "add_bos_token" in config else {"add_bos_token": True}
    tokenizer = opener.from_pretrained(name, cache_dir=cache_dir, trust_remote_code=False, **kwargs)
    for token, default in DEFAULTS_2023.get(known, {}).items():
        other = getattr(tokenizer, token)
        if token in stated or token in kwargs or other == default:
            continue
        if default is None or default in tokenizer.get_vocab():
            setattr(tokenizer, token, default)
            unstated[token] = other
    return tokenizer


def open_config(name: str | Path, cache_dir: str | None = None) -> "PreTrainedConfig":
    """Load a model's configuration, no attention kernels that it names. Raise InputError if it is damaged or code."""
    from transformers import AutoConfig, PreTrainedConfig

    reach_hub(name, cache_dir)
    with loading(name, "the model could not be loaded"):
        config = AutoConfig.from_pretrained(name, cache_dir=cache_dir, trust_remote_code=False)
        if not isinstance(text := config.get_text_config(decoder=True), PreTrainedConfig):
            raise ValueError(f"its text_config is {text!r:.60}, which {type(config).__name__} does not know")
        for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
            layers, asked = (getattr(part, key, None) for key in ("num_hidden_layers", "_attn_implementation"))
            if isinstance(layers, int) and not 1 <= layers <= MOST_LAYERS:
                raise InputError(f"{name}: config.json says {layers} layers; expected 1 to {MOST_LAYERS}", name)
            if asked is not None and asked not in ATTENTION_IN_TRANSFORMERS:
                _note(f"note: {name} names the attention kernel {asked}, which is not fetched")
                part._attn_implementation = None
    return config


@lru_cache
def _note(line: str) -> None:
    print_rank0(line, int(os.environ.get("RANK", 0)))  # once


def _find(name: str, file: str, cache_dir: str | None) -> Path | None:
    """Return a file of a local folder or of a hub id, or None where it has no such file."""
    if (folder := Path(name)).is_dir():
        return folder / file if (folder / file).is_file() else None
    from transformers.utils import cached_file

    found = cached_file(
        name,
        file,
        cache_dir=cache_dir,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def _read_json(name: str, file: str, cache_dir: str | None) -> dict[str, Any]:
    return read_json(found) if (found := _find(name, file, cache_dir)) else {}


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return the special tokens whose text means nothing else: not an ordinary one, such as !, chosen as pad token."""
    return [token for token in tokenizer.all_special_tokens if token in tokenizer.added_tokens_encoder]


def to_save(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Return the tokenizer for a model's folder. An ordinary token that --pad_token made the pad token would come back
    as a special one, and "!" would vanish from answers: there the end-of-text token pads."""
    if tokenizer.pad_token in tokenizer.added_tokens_encoder:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def identity(tokenizer: "PreTrainedTokenizerBase") -> list[Any]:
    """Return all that decides the ids of a text."""
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = tokenizer.special_tokens_map
    return [state, special, tokenizer.model_max_length, type(tokenizer).__name__, transformers.__version__]


# ---- the slow tokenizer's files, which 2023 saved too and other programs look for ----


def slow_files(base: str, tokenizer_json: Mapping[str, Any], cache_dir: str | None = None) -> dict[str, bytes]:
    """Return the contents of the slow tokenizer's files in `base` (a folder or hub id), and of the added_tokens.json
    that goes with them; nothing where it has none.

    Raises:
        ValueError: they contradict `tokenizer_json`, or are not of a format that 2023 knew.
    """
    for names in SLOW_FILES:
        found = [_find(base, name, cache_dir) for name in names]
        if all(found):
            files = {name: path.read_bytes() for name, path in zip(names, found)}
            try:
                added = _added_tokens(files, tokenizer_json)
            except (LookupError, TypeError, AttributeError) as error:
                raise ValueError(f"{', '.join(files)} or the tokenizer.json is damaged ({error!r})") from error
            if added:
                files[ADDED_TOKENS] = json_text(added).encode()
            return files
    return {}


def _added_tokens(files: Mapping[str, bytes], tokenizer_json: Mapping[str, Any]) -> dict[str, int]:
    """Return the tokens that tokenizer.json has beyond those of the slow files, whose ids must be the same in both."""
    model, name = tokenizer_json["model"], next(iter(files))
    listed = model["vocab"]
    whole = dict(listed) if isinstance(listed, dict) else {piece: i for i, (piece, _) in enumerate(listed)}
    whole |= {token["content"]: token["id"] for token in tokenizer_json["added_tokens"]}
    slow = parse_json(files[name]) if name == "vocab.json" else _pieces(files[name])
    if other := next((token for token, i in slow.items() if whole.get(token) != i), None):
        raise ValueError(
            f"token {slow[other]} of {name} is {other!r}, which has the id {whole.get(other)} in the tokenizer"
        )
    added = {token: i for token, i in sorted(whole.items(), key=lambda item: item[1]) if token not in slow}
    if list(added.values()) != list(range(len(slow), len(whole))):
        raise ValueError(f"the ids of added tokens do not follow those of {name}, as the slow tokenizer's must")
    if "merges.txt" in files:
        lines = [line for line in files["merges.txt"].decode("utf-8").split("\n") if line.strip()]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
        if merges != lines[lines[0].startswith("#version") :]:
            raise ValueError("merges.txt has other merges than the tokenizer")
    return added


def _pieces(sentencepiece_model: bytes) -> dict[str, int]:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_proto=sentencepiece_model)
    except RuntimeError as error:
        raise ValueError("tokenizer.model is not a sentencepiece model") from error
    return {model.id_to_piece(i): i for i in range(model.get_piece_size())}


def save_slow_files(tokenizer: "PreTrainedTokenizerBase", files: Mapping[str, bytes], folder: str | Path) -> None:
    """Write `slow_files` beside the tokenizer that was saved in `folder`. Its tokenizer_config.json gets what only
    tokenizer.json says: which tokens stand around a text."""
    for name, content in files.items():
        (Path(folder) / name).write_bytes(content)
    path = Path(folder) / "tokenizer_config.json"
    config = read_json(path) | _tokens_around(tokenizer)
    path.write_text(json_text(dict(sorted(config.items()))), encoding="utf-8")


def _tokens_around(tokenizer: "PreTrainedTokenizerBase") -> dict[str, bool]:
    """Return what a slow tokenizer's configuration says of the tokens around a text."""
    from alpaca.data.tokenization import tokens_around  # imports torch

    front, behind = tokens_around(tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return {"add_bos_token": front[:1] == [bos], "add_eos_token": behind[-1:] == [eos]}


def copy_slow_files(base: Path, folder: Path) -> None:
    """Copy the slow tokenizer's files of `base` into `folder`, which has a tokenizer.json and none of them. Where they
    contradict each other nothing is copied, and one line says why."""
    path, others = folder / "tokenizer.json", [name for names in SLOW_FILES for name in names]
    if not path.is_file() or any((folder / name).is_file() for name in others):
        return
    try:
        files = slow_files(str(base), read_json(path))
        added = folder / ADDED_TOKENS
        if added.is_file() and read_json(added) != parse_json(files.pop(ADDED_TOKENS, "{}")):
            raise ValueError(f"{added.name} has other tokens than tokenizer.json")
    except ValueError as error:
        print(f"note: {without_slow_files(base, error)}", flush=True)
        return
    for name, content in files.items():
        (folder / name).write_bytes(content)


def without_slow_files(base: str | Path, error: ValueError) -> str:
    return f"the slow tokenizer's files of {base} are left out: {error}"


def existing_tokens(tokenizer: "PreTrainedTokenizerBase", name: str, rank: int) -> None:
    """Do without new tokens, so that the base's embedding stays as it is: where there is no pad token, rows are padded
    with unk or else eos. That eos is learned all the same: what is padding is told by lengths, not by ids."""
    if not tokenizer.eos_token:
        raise InputError(f"{name}: its tokenizer has no end-of-text token; add_missing_tokens adds one", name)
    if not tokenizer.pad_token:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        print_rank0(
            f"note: no pad token -> rows are padded with {tokenizer.pad_token}, id {tokenizer.pad_token_id} "
            "(--pad_token takes another, --add_missing_tokens True adds one)",
            rank,
        )


# ---- a tokenizer's files as transformers 4.28.1 reads them ----


def write_tokenizer_of_2023(tuned: Path, base: Path, folder: Path) -> list[str]:
    """Write the tokenizer of the folder `tuned` into `folder` in the form of 2023, with the slow tokenizer's files of
    `tuned` or else of `base`.

    Returns:
        what 2023's code cannot read, in lines.
    """
    try:
        tokenizer = open_tokenizer(str(tuned))
        state = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # tokenizers raises what it likes
        for path in (tuned / name for name in OF_THE_TOKENIZER if (tuned / name).is_file()):
            shutil.copyfile(path, folder / path.name)
        return [f"note: the tokenizer of {tuned} cannot be read ({first_line(error)}); its files are as they were"]
    source, files, lines = _first_slow_files((tuned, base), state)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if not files:
        lines.append(_write_tokenizer_json(state, tuned, folder))
    source = source or tuned
    stated = [_read(source / "special_tokens_map.json"), _read(source / "tokenizer_config.json")]
    config = stated[1] | _read(tuned / "tokenizer_config.json")
    config = {name: value for name, value in config.items() if name in KEPT and value is not None}
    added = json.loads(files.get(ADDED_TOKENS, "{}"))
    own = {token for token in tokenizer.get_vocab() if token not in added} if files else set()
    special = _special_tokens(tokenizer, pad_token_in_2023(tuned, tokenizer), own, stated)
    (folder / "special_tokens_map.json").write_text(json_text(special), encoding="utf-8")
    if files:
        config |= _tokens_around(tokenizer)
    config["tokenizer_class"] = _class_of_2023(tokenizer, stated[1])
    config |= {n: {"__type": "AddedToken", **v} if isinstance(v, dict) else v for n, v in special.items() if n in NAMED}
    (folder / "tokenizer_config.json").write_text(json_text(dict(sorted(config.items()))), encoding="utf-8")
    return lines


def _first_slow_files(
    folders: Iterable[Path], tokenizer_json: Mapping[str, Any]
) -> tuple[Path | None, dict[str, bytes], list[str]]:
    """Return the first folder with `slow_files`, and those; and a line for every one with another tokenizer's."""
    lines = []
    for folder in folders:
        try:
            if files := slow_files(str(folder), tokenizer_json):
                return folder, files, lines
        except ValueError as error:
            lines.append(f"note: {without_slow_files(folder, error)}")
    return None, {}, lines


def _write_tokenizer_json(state: dict[str, Any], tuned: Path, folder: Path) -> str:
    """Write tokenizer.json as tokenizers 0.13 reads it, where it can. Return the line that says which it is."""
    message = (
        f"note: neither {tuned} nor the base has its slow tokenizer (tokenizer.model, or vocab.json and merges.txt)"
    )
    model, old = state["model"], state["model"]["type"] == "BPE" and "Metaspace" not in json.dumps(state)
    if old and not model.pop("ignore_merges", False):
        model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        (folder / "tokenizer.json").write_text(json_text(state), encoding="utf-8")
        return (
            f"{message}: 2023's code opens the tokenizer.json here, but not with use_fast=False, as its train.py does"
        )
    shutil.copyfile(tuned / "tokenizer.json", folder / "tokenizer.json")
    return f"{message}, and 2023's code cannot read its tokenizer.json: it cannot recover this diff"


def _special_tokens(
    tokenizer: "PreTrainedTokenizerBase", pad_token: str | None, own: Collection[str], stated: list[dict]
) -> dict[str, Any]:
    """Return the special tokens by name: as the folder of the slow tokenizer stated it, or as 2023 saved it, with the
    spaces around a token of its `own` left to the text, around an added one not."""

    def form(name: str, token: str) -> Any:
        values = [values.get(name) for values in stated]
        plain = dict.fromkeys(("lstrip", "rstrip", "single_word"), False) | {"normalized": True, "content": token}
        found = next((v for v in values if isinstance(v, dict) and v.get("content") == token), plain)
        return {field: found.get(field, plain[field]) for field in sorted(plain)} if token in own else token

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
    return read_json(path) if path.is_file() else {}


def pad_token_in_2023(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return the pad token that transformers 4.28.1 gave a tokenizer: some classes of today have one of their own."""
    files = [folder / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    stated = any(_read(path).get("pad_token") for path in files)
    of_class = type(tokenizer).__name__.startswith(PADDED_IN_2023)
    return tokenizer.pad_token if stated or of_class else None
