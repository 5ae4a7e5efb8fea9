"""Which tensors of two checkpoints are counterparts, which of one are the same by two names, and why base, diff and
result of a weight diff do not fit, in words."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from alpaca.common.errors import InputError, format_rows
from alpaca.weights.reader import DTYPES, INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS, Tensor, Weights, dtype_name
from alpaca.weights.writer import Spec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# tie_word_embeddings is False by default; read off the configuration classes of transformers 4.28.1
UNTIED_IN_2023 = ("codegen", "git", "gpt_neox", "gptj", "llama", "reformer", "rembert")
OF_OURS = (
    "was made in this format by an earlier version of this program, it has the base subtracted once from a tensor "
    "with two names (2023's code: twice); recover it with that version, or make it again with this one"
)
VOCABULARY = (*INPUT_EMBEDDINGS, *OUTPUT_EMBEDDINGS, "lm_head.bias")  # a row per token

CONFIG_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
)


def rows_may_differ(name: str, base: Tensor, tuned: Tensor) -> bool:
    """Return whether two shapes of `name` differ only in the number of tokens."""
    return name.endswith(VOCABULARY) and base.shape[1:] == tuned.shape[1:] and len(base.shape) == len(tuned.shape)


def is_compatible(name: str, base: Tensor, tuned: Tensor) -> bool:
    """Return whether a tuned tensor can be differenced with this one of the base."""
    return base.dtype.is_floating_point and (base.shape == tuned.shape or rows_may_differ(name, base, tuned))


def raise_mismatch(
    base: Weights,
    other: Weights,
    missing: list[str],
    misfits: list[tuple[Tensor, Tensor]],
    config: dict[str, Any] | None = None,
    notes: Iterable[str] = (),
    advice: bool = True,
) -> NoReturn:
    """Raise InputError about the base, with the tensors that do not fit and the likely cause.

    Args:
        missing: names that `base` lacks.
        misfits: (tensor of the base, what it should be).
        config: of the base that it should be.
        notes: what else is known.
        advice: whether another number of rows means a base that is not as published.
    """
    lines = [f"{base.folder} does not fit {other.folder}: " + _cause(missing, misfits, len(base.tensors), advice)]
    lines += [f"    {a}, expected {list(b.shape)} {dtype_name(b.dtype)}" for a, b in misfits[:5]]
    if len(misfits) > 5:
        lines.append(f"    {len(misfits) - 5} more have other shapes")
    if missing:
        lines.append(f"    {len(missing)} missing in the base: {_some(missing)}")
        known = {base.find(name) and base.find(name).name for name in other.tensors}
        unexpected = [name for name in base.tensors if name not in known]
        if unexpected:
            lines.append(f"    {len(unexpected)} in the base only: {_some(unexpected)}")
    if differences := config_differences(base.config, config or other.config):
        lines.append(f"    config.json: {differences}")
    lines += [f"    {note}" for note in notes]
    raise InputError("\n".join(lines), base.folder)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _cause(missing: list[str], misfits: list[tuple[Tensor, Tensor]], in_base: int, advice: bool) -> str:
    longer = {a.shape[0] - b.shape[0] for a, b in misfits if rows_may_differ(b.name, a, b)}
    if misfits and not missing and len(longer) == 1 and all(rows_may_differ(b.name, a, b) for a, b in misfits):
        rows = longer.pop()
        change = "longer" if rows > 0 else "shorter"
        message = f"its vocabulary is {abs(rows)} {'row' if abs(rows) == 1 else 'rows'} {change} than expected"
        return (
            f"{message}; give the base as it was published, without tokens added or taken away" if advice else message
        )
    if missing and not misfits and len(missing) < in_base:
        return "tensors are missing: part of it was not copied, or it is a model of another architecture"
    return "it is a model of another size or architecture"


def counterparts(base: Weights, tuned: Weights) -> dict[str, Tensor | None]:
    """Return for every tuned tensor the base tensor that it is differenced with, or None if it is stored as it is.

    Raises:
        InputError: the base lacks tensors, or has them in other shapes.
    """
    found: dict[str, Tensor | None] = {}
    missing, misfits = [], []
    for name, tensor in tuned.tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise InputError(f"{tuned.folder}: {tensor}, a dtype that safetensors cannot store", tuned.folder)
        own = name.endswith("inv_freq") or not tensor.dtype.is_floating_point
        other = found[name] = None if own else base.find(name)
        if other is None and not own:
            missing.append(name)
        elif other and not is_compatible(name, other, tensor):
            misfits.append((other, tensor))
    if missing or misfits:
        raise_mismatch(base, tuned, missing, misfits)
    return found


def names_on_disk(model: "PreTrainedModel", base: Weights) -> dict[str, str]:
    """Return {the model's name of a tensor: its name on disk}, as transformers renames tensors when it loads them. One
    that it makes out of others has none."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    kinds: dict[bool, list[Any]] = {True: [], False: []}
    for change in get_model_conversion_mapping(model):
        kinds[isinstance(change, WeightRenaming)].append(change)
    own, prefix, found = model.state_dict(), model.base_model_prefix, {}
    for name in base.tensors:
        renamed, made_of_others = rename_source_key(name, kinds[True], kinds[False], prefix, own)
        if made_of_others is None and renamed in own:
            found[renamed] = name
    return found


def raise_other_base(base: Weights, adapter: Weights, why: str) -> NoReturn:
    """Raise InputError about the base of an adapter that was trained on another one."""
    differences = config_differences(base.config, adapter.config)
    message = (
        f"{base.folder} is not the base of {adapter.folder}: {why}{differences and '; config.json: '}{differences}"
    )
    raise InputError(message, base.folder)


def explain_other_base(base: Weights, tensor: Tensor, same: int, looked_at: int, config: dict[str, Any]) -> str:
    """Return the message for a base tensor that has not the digest it should have, when `same` of `looked_at` others
    have."""
    begin = f"{base.folder}: {tensor.name} ({tensor.path.name}) is not that of the base of this diff"
    if not looked_at:
        return f"{begin}: it is damaged, or another base model's"
    if same:
        return (
            f"{begin}, though {same} of {looked_at} other tensors are: this file is damaged or was changed; copy "
            "or download it again"
        )
    differences = config_differences(base.config, config)
    return (
        f"{begin}, and none of {looked_at} others is: it is another base model of the same shapes, as Llama-2 is for a "
        f"diff against LLaMA, or it was trained further or converted in another way{differences and '; config.json: '}"
        f"{differences}"
    )


def config_differences(config: dict[str, Any], expected: dict[str, Any]) -> str:
    """Return "max_position_embeddings is 4096, expected 2048 (Llama-2 is not LLaMA)", or "" where all are equal."""
    names = [name for name in CONFIG_FIELDS if name in config and name in expected and config[name] != expected[name]]
    text = ", ".join(f"{name} is {config[name]}, expected {expected[name]}" for name in names)
    positions = [values.get("max_position_embeddings") for values in (config, expected)]
    if config.get("model_type") == "llama" and positions == [4096, 2048]:
        text += " (4096 positions are Llama-2's, 2048 LLaMA's: they are different models)"
    return text


def check_same_tensors(weights: Weights, specs: Iterable[Spec], source: str) -> None:
    """Raise InputError unless `weights` has exactly the tensors `specs`, in their dtypes and shapes."""
    specs = {spec.name: spec for spec in specs}
    missing = [name for name in specs if name not in weights.tensors]
    unexpected = [name for name in weights.tensors if name not in specs]
    other = [
        f"{tensor}, expected {list(specs[name].shape)} {dtype_name(specs[name].dtype or tensor.dtype)}"
        for name, tensor in weights.tensors.items()
        if name in specs and (tensor.shape != specs[name].shape or specs[name].dtype not in (None, tensor.dtype))
    ]
    if missing or unexpected or other:
        found = [
            (f"{len(missing)} missing: {_some(missing)}", missing),
            (f"{len(unexpected)} unexpected: {_some(unexpected)}", unexpected),
            (f"{len(other)} different: {'; '.join(other[:3])}", other),
        ]
        summary = "; ".join(text for text, names in found if names)
        raise InputError(f"{weights.folder} has not the tensors of {source}: {summary}", weights.folder)


def describe_diff(entries: dict[str, dict[str, Any]], digest: str) -> list[str]:
    """Return what the publisher of an exact diff should know, in lines. entries: of its manifest's tensors."""
    new = [
        f"{name} ({format_rows(entry['base']['shape'][0], entry['shape'][0] - 1)})" if entry["base"] else name
        for name, entry in entries.items()
        if not entry["base"] or entry["base"]["shape"][:1] < entry["shape"][:1]
    ]
    lines = []
    if new:
        more = f" and {len(new) - 5} more" if len(new) > 5 else ""
        lines.append(f"stored as they are, not as differences from the base: {', '.join(new[:5])}{more}")
    if all(entry["base"] and entry["base"]["sha256"] == entry["sha256"] for entry in entries.values()):
        lines.append("note: every tensor is that of the base; is this the fine-tuned model?")
    return [*lines, f"digest of the manifest, to be published beside it: {digest}"]


# ---- tied embeddings ----


def ties_embeddings(config: dict[str, Any]) -> bool:
    """Return whether a model of this configuration has one tensor for its input and its output embeddings.

    Where the configuration does not say so, the default of its class in transformers 4.28.1 holds. Today's classes
    agree with the other ones of then; the classes that came later have only today's default.
    """
    config = config | (config.get("text_config") or {})
    if config.get("tie_word_embeddings") is not None:
        return bool(config["tie_word_embeddings"])
    kind = config.get("model_type")
    if kind is None or kind in UNTIED_IN_2023:
        return False
    from transformers import CONFIG_MAPPING

    return kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind]().get_text_config().tie_word_embeddings


def tied_names(config: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Return {name of the output embedding: name of the input embedding} where they are one tensor, else {}.

    The file of a tied model may hold both names or only the first.
    """
    names = list(names)
    first = next((name for name in names if name.endswith(INPUT_EMBEDDINGS)), None)
    if first is None or not ties_embeddings(config):
        return {}
    of_class = "embed_out.weight" if config.get("model_type", "").startswith("gpt_neox") else "lm_head.weight"
    return {next((name for name in names if name in OUTPUT_EMBEDDINGS), of_class): first}


def aliases_of(weights: Weights) -> dict[str, str]:
    """Return {second name: name} of the tensors that have two names in the model that 2023 loaded.

    The embeddings are one tensor if the configuration ties them. Names that share memory in a .bin file do so in the
    model too, unless they were cast to float32 when they were loaded; that made two tensors of them.
    """
    found = tied_names(weights.config, weights.tensors)
    first: dict[tuple, str] = {}
    for name, tensor in weights.tensors.items():
        if tensor.path.suffix == ".bin" and tensor.dtype == torch.float32 and tensor.numel:
            place = tensor.data.data_ptr() if tensor.data is not None else tensor.offset
            known = first.setdefault((tensor.path, place, tensor.shape), name)
            if known != name and name not in found.values():
                found.setdefault(name, found.get(known, known))
    return found
