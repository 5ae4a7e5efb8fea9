"""The weight diff of 2023: tuned minus base in float32, as an ordinary checkpoint; and the sum that was its check.

It recovers almost exactly (float32 rounds; a mean is not the same on every CPU) and proves nothing: new diffs are exact
(alpaca/weights/exact_diff.py). This is for diffs made by the code of 2023, and for people who still recover with it:
what is written here, that code opens (transformers 4.28.1). Tensors are read and written in pieces.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from alpaca.common.errors import InputError, UsageError, first_line
from alpaca.common.files import json_text, read_json
from alpaca.data.tokenizer import MOST_LAYERS, OF_THE_TOKENIZER, pad_token_in_2023, write_tokenizer_of_2023
from alpaca.weights.mismatch import (
    OF_OURS,
    VOCABULARY,
    aliases_of,
    check_same_tensors,
    config_differences,
    raise_mismatch,
    rows_may_differ,
    tied_names,
    ties_embeddings,
)
from alpaca.weights.provenance import aux_files, check_published
from alpaca.weights.reader import ONE, ZERO, Tensor, Weights, as_bytes, last_norm
from alpaca.weights.writer import PIECE, BinWriter, Pipeline, Slot, Spec, plan_bin_shards, stream, write_index

INV_FREQ = "rotary_emb.inv_freq"
COMPUTED_IN_2023 = {  # by model type: float buffers in the state dicts of transformers 4.28.1; None: rotary frequencies
    "llama": {f"model.layers.{{}}.self_attn.{INV_FREQ}": None},
    "gpt_neox": {"gpt_neox.layers.{}.attention.masked_bias": -1e9, f"gpt_neox.layers.{{}}.attention.{INV_FREQ}": None},
    "gptj": {"transformer.h.{}.attn.masked_bias": -1e9},
    "gpt_neo": {"transformer.h.{}.attn.attention.masked_bias": -1e9},
    "gpt2": {"transformer.h.{}.attn.masked_bias": -1e4},
}
OUTPUT_HEADS = ("lm_head.", "embed_out.")
LAYER_OF_2023 = (
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    f"self_attn.{INV_FREQ}",
    "mlp.gate_proj.weight",
    "mlp.down_proj.weight",
    "mlp.up_proj.weight",
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)


class FloatDiff:
    """Both directions of 2023's arithmetic: the other weights are the tuned ones (sign -1) or the diff (sign +1).

    2023 went through the names of a model and added to each one's tensor in place, so a tensor with two names, such as
    a tied embedding, gets the base twice: (tuned - base) - base, and (diff + base) + base.
    """

    def __init__(self, base: Weights, other: Weights, sign: int):
        self.base, self.weights = base, other
        self.sign = sign
        self.aliases = aliases_of(other)
        self.computed = computed_in_2023(base.config or other.config)
        self.tied_base = tied_names(base.config or other.config, base.tensors)
        self.rows_of = _RowsOfBase(base)
        self.specs: list[Spec] = []
        self.left_out: list[str] = []
        self.added: dict[str, list[tuple[Tensor | None, int]]] = {}  # name -> base tensors, how many rows of each
        missing, misfits = [], []
        for name, tensor in other.tensors.items():
            if not tensor.dtype.is_floating_point:
                self.left_out.append(name)  # causal masks of old checkpoints, which today's models make themselves
                continue
            self.specs.append(Spec(name, torch.float32, tensor.shape))
            if name in self.aliases:
                continue
            for known in (name, *(alias for alias, first in self.aliases.items() if first == name)):
                found, rows = base.find(self.tied_base.get(known, known)), 0  # tied: that of the input
                if found is not None:
                    rows = self.rows_of(known, found, tensor)
                elif name not in self.computed or self.computed[name].shape != tensor.shape:
                    missing.append(known)
                if rows is None:
                    misfits.append((found, tensor))
                self.added.setdefault(name, []).append((found, rows or 0))
        if missing or misfits:
            self._refuse(missing, misfits)
        if not self.specs:
            raise InputError(f"{other.folder}: has no floating-point tensors", other.folder)
        if sign < 0:
            self._add_computed()

    def _refuse(self, missing: list[str], misfits: list[tuple[Tensor, Tensor]]) -> NoReturn:
        self.rows_of.failing = None  # said by the explanation
        notes = self.notes()
        if not missing and all(rows_may_differ(other.name, base, other) for base, other in misfits):
            notes = [self.rows_of.explanation(*misfits[0], self.sign), *notes]
        raise_mismatch(self.base, self.weights, missing, misfits, notes=notes, advice=False)

    def _add_computed(self) -> None:
        """The code of 2023 computes such tensors itself where a file lacks them, in the diff too, and would add them
        twice: a zero in the diff is what its own make_diff wrote."""
        names = {start + spec.name for spec in self.specs for start in ("", missing_prefix(self.weights))}
        self.specs += [
            Spec(name, torch.float32, tuple(tensor.shape))
            for name, tensor in self.computed.items()
            if name not in names
        ]

    @property
    def own(self) -> list[Spec]:
        """Return the tensors without second names."""
        return [spec for spec in self.specs if spec.name not in self.aliases]

    def pieces(self, pipe: Pipeline, order: list[Spec]) -> Iterator[tuple[Slot, Spec, int, torch.Tensor]]:
        """Yield (slot, tensor, first element, float32 elements of the result) in pieces."""
        for spec in order:
            name = self.aliases.get(spec.name, spec.name)
            tensor, added = self.weights.tensors.get(name), self.added.get(name, [])
            rests = [self._rest(base, spec, name, rows) for base, rows in added]  # what follows the base's own elements
            for slot, start, count in pipe.pieces(spec.nbytes // 4):
                out, addend = slot.take(0, torch.float32, count), slot.take(1, torch.float32, count)
                scratch = slot.take(3, torch.uint8, count * 8)
                if tensor is None:
                    out.zero_()
                else:
                    self.weights.read(tensor, start, out, scratch)
                for (base, _), rest in zip(added, rests, strict=True):
                    kept = spec.nbytes // 4 - rest.numel()
                    own = max(0, min(count, kept - start))
                    if own:
                        self.base.read(base, start, addend[:own], scratch)
                    if own < count:
                        addend[own:] = rest[start + own - kept : start + count - kept]
                    out.add_(addend, alpha=self.sign)
                pipe.bar.update(out.nbytes)
                yield slot, spec, start, out

    def _rest(self, base: Tensor | None, spec: Spec, name: str, rows: int) -> torch.Tensor:
        """Return what follows where the base ends first: the mean of its embeddings, or what 2023's model computed."""
        if base is None:
            return self.computed[name].reshape(-1)
        if not base.shape or rows == spec.shape[0]:
            return torch.empty(0)
        if name.endswith("bias"):
            return torch.zeros(spec.shape[0] - rows)
        whole, scratch = torch.empty(base.shape), torch.empty(base.nbytes, dtype=torch.uint8)
        self.base.read(base, 0, whole.view(-1), scratch)
        return whole[:rows].mean(dim=0, keepdim=True).expand(spec.shape[0] - rows, *spec.shape[1:]).reshape(-1)

    verdict = "recovered, but not proved"

    @property
    def folder(self) -> Path:
        return self.weights.folder

    @property
    def files(self) -> dict[str, Path]:
        paths = aux_files(self.folder)
        check_published(paths)
        return {path.name: path for path in paths}

    @property
    def summary(self) -> str:
        return f"the sum of base and diff in float32 ({len(self.specs)} tensors); the format of 2023 has no digests"

    def write(self, pipe: Pipeline, folder: Path, max_shard_size: str) -> None:
        """Write the weights as 2023 did: .bin files, the names of a model with an output embedding, and a tensor with
        two names by both of them."""
        prefix = missing_prefix(self.weights)
        full = {spec.name: spec.name for spec in self.own}
        full |= {name: prefix + name for name in self.weights.tensors if not name.startswith(OUTPUT_HEADS)}
        specs = [spec._replace(name=full[spec.name]) for spec in self.own]
        if self.weights.config.get("model_type") == "llama":
            specs.sort(key=lambda spec: position_in_llama(spec.name))
        aliases = {alias: full[name] for alias, name in self.aliases.items()}
        shards = plan_bin_shards(specs, aliases, "pytorch_model", max_shard_size)
        writer, own = BinWriter(folder, shards), {full[spec.name]: spec for spec in self.own}
        order = [own[spec.name] for shard in shards for spec in shard.tensors]
        stream(self, pipe, order, None, writer.write, None)
        pipe.drain()
        pipe.after("write", writer.close).result()
        write_index(folder, "pytorch_model.bin", shards)

    def verify(self, pipe: Pipeline, tuned: Weights) -> None:
        """Raise UsageError unless `tuned` is what `pieces` yields, in the dtype of `tuned`, by one name or by both."""
        specs = {s.name: s for s in self.own if s.name in tuned.tensors or s.name not in self.computed}
        specs |= {
            alias: specs[name]._replace(name=alias)
            for alias, name in self.aliases.items()
            if alias in tuned.tensors and name in specs
        }
        check_same_tensors(tuned, [spec._replace(dtype=None) for spec in specs.values()], f"{self.folder}")
        if wrong := self._first_other(pipe, tuned, list(specs.values())):
            message = f"{tuned.folder}: {wrong.name} is not the sum of base and diff"
            name = self.aliases.get(wrong.name, wrong.name)
            if len(added := self.added[name]) > 1:
                self.added[name] = added[:1]
                once = self._first_other(pipe, tuned, [wrong]) is None
                self.added[name] = added
                message += f", but of the diff and once the base. If {self.folder} {OF_OURS}" if once else ""
            raise InputError(message, tuned.folder)

    def _first_other(self, pipe: Pipeline, tuned: Weights, specs: list[Spec]) -> Spec | None:
        """Return the first of these tensors whose bits `tuned` has not."""
        for slot, spec, start, piece in self.pieces(pipe, specs):
            tensor = tuned.tensors[spec.name]
            found, wanted = (slot.take(number, tensor.dtype, piece.numel()) for number in (4, 5))
            tuned.read(tensor, start, found, slot.take(3, torch.uint8, 0))
            if as_bytes(found) != as_bytes(wanted.copy_(piece)):
                return spec
        return None

    def notes(self) -> list[str]:
        """Return what speaks against this base, in lines. Nothing in the format proves that it is the right one."""
        lines = []
        if self.left_out:
            lines.append(
                f"note: {len(self.left_out)} tensors that are not of floats are left out: {self.left_out[0]} …"
            )
        if differences := config_differences(self.base.config, self.weights.config):
            lines.append(
                f"note: in the base's config.json {differences}; is it the base that the diff was made against?"
            )
        name, largest = last_norm(self.base)
        if largest < ZERO:
            lines.append(f"note: {name} of {self.base.folder} is nearly zero; is that a diff given as the base?")
        name, largest = last_norm(self.weights)
        if self.sign > 0 and largest > ONE:
            lines.append(f"note: {name} of {self.folder} is far from zero; is that a model given as the diff?")
        if self.sign < 0 and self.rows_of.note:
            lines.append(self.rows_of.note)
        if self.sign > 0 and (name := next(filter(self._lacks_the_base, self.aliases.values()), None)):
            lines.append(f"note: {name} of {self.folder} does not look like tuned - base - base. If the diff {OF_OURS}")
        return lines

    def _lacks_the_base(self, name: str) -> bool:
        """Return whether the diff of a tensor with two names has less than half of -base in it, by its first elements:
        a diff of 2023 has about all of it, one with the base subtracted once nearly nothing."""
        base, rows = self.added[name][0]
        if base is None or not rows:
            return False
        diff, count = self.weights.tensors[name], min(PIECE, base.numel // base.shape[0] * rows)
        ours, theirs = torch.empty(count), torch.empty(count)
        scratch = torch.empty(count * 8, dtype=torch.uint8)
        self.weights.read(diff, 0, ours, scratch)
        self.base.read(base, 0, theirs, scratch)
        return bool(ours @ theirs > -0.5 * (theirs @ theirs))  # False for NaN, and for zeros


class _RowsOfBase:
    """How many rows of a base tensor 2023 used as they are; what remains of the other tensor was their mean.

    2023 gave a base without a pad token the token [PAD], embeddings as long as its tokenizer was then (one row more, or
    fewer where they were padded), and the mean of the other rows as its row; a bias (GPT-J's) that became longer got
    zeros. A base with a pad token kept its rows.
    """

    def __init__(self, base: Weights):
        from alpaca.data.tokenizer import open_tokenizer  # imports transformers

        self.tokens = self.pad_token = self.failing = None
        try:
            tokenizer = open_tokenizer(str(base.folder))
        except Exception as error:  # tokenizers raises what it likes
            print(
                f"note: the base's tokenizer cannot be read ({first_line(error)}); whether it had a pad token "
                "is taken from the number of rows",
                flush=True,
            )
            return
        self.tokens, self.pad_token = len(tokenizer), pad_token_in_2023(base.folder, tokenizer)
        self.resized = self.pad_token is None and "[PAD]" not in tokenizer.get_vocab()

    def __call__(self, name: str, base: Tensor, other: Tensor) -> int | None:
        """Return how many rows, or None if the tensors do not fit."""
        if not base.shape or not other.shape:
            return 0 if base.shape == other.shape else None
        wanted = other.shape[0]
        if base.shape != other.shape and not rows_may_differ(name, base, other):
            return None
        if self.tokens is not None and self.resized and name.endswith(VOCABULARY):
            if wanted == self.tokens + 1 <= base.shape[0] + 1:
                return min(base.shape[0], wanted) if name.endswith("bias") else wanted - 1
            self.failing = wanted
        return base.shape[0] if wanted - base.shape[0] in (0, 1) else None

    @property
    def note(self) -> str:
        """Return what 2023's code cannot do with embeddings of as many rows, or ""."""
        if self.failing is None:
            return ""
        return (
            f"note: 2023's code cannot recover this diff: the base's tokenizer has no pad token, so it makes its "
            f"embeddings {self.tokens + 1} rows long, and those of the diff are {self.failing}"
        )

    def explanation(self, base: Tensor, other: Tensor, sign: int) -> str:
        """Return why embeddings of these two lengths cannot be added in the format of 2023, and what to do."""
        message = f"2023's code takes a base of {base.shape[0]} rows "
        if self.tokens is None:
            message += "as it is, or with one more for [PAD]"
        elif self.pad_token is not None:
            message += f"as it is: its tokenizer, of {self.tokens} tokens, has a pad token, {self.pad_token}"
        elif self.resized and self.tokens <= base.shape[0]:
            message += f"with {self.tokens + 1}: one for each token of its tokenizer, which has no pad token, and [PAD]"
        else:
            message += "as it is, or with one more for [PAD]"
        message += f"; its make_diff and recover fail on {other.shape[0]} rows. "
        if sign < 0:
            return f"{message}An exact diff takes any number of rows"
        return f"{message}It is not the base of this diff, or tokens were added to it or to the tokenizer"


def missing_prefix(weights: Weights) -> str:
    """Return what the names lack that a model with an output embedding has, `model.` or the like, or "". 2023 opens
    a file of such names only if it has none of the others."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    kind = weights.config.get("model_type")
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return ""
    prefix = f"{MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind]].base_model_prefix}."
    return "" if any(name.startswith(prefix) for name in weights.tensors) else prefix


# ---- the files beside the weights ----


def write_files_of_2023(tuned: Path, base: Path, folder: Path) -> list[str]:
    """Write the tuned model's small files into `folder`, its configuration and tokenizer in the form of 2023.

    Returns:
        what 2023's code cannot read, in lines.
    """
    paths = {path.name: path for path in aux_files(tuned)}
    for name, path in paths.items():
        if name not in OF_THE_TOKENIZER:
            shutil.copyfile(path, folder / name)
    config = config_of_2023(read_json(paths["config.json"]))
    (folder / "config.json").write_text(json_text(config), encoding="utf-8")
    if "generation_config.json" in paths:
        values = {n: v for n, v in read_json(paths["generation_config.json"]).items() if v is not None}
        (folder / "generation_config.json").write_text(json_text(values), encoding="utf-8")
    return write_tokenizer_of_2023(tuned, base, folder)


def config_of_2023(config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a float32 model by the names of 2023, ties stated; today's names stay beside them."""
    config = config | {"torch_dtype": "float32", "tie_word_embeddings": ties_embeddings(config)}
    config |= {"dtype": "float32"} if "dtype" in config else {}
    names = {"rope_theta": "rope_theta"}
    if config.get("model_type") == "gpt_neox":
        names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    rope = config.get("rope_parameters") or {}
    return {old: rope[name] for name, old in names.items() if name in rope} | config


# ---- what 2023's models computed, and saved with their weights ----


def computed_in_2023(config: dict) -> dict[str, torch.Tensor]:
    """Return the float tensors of a model that 2023's code computes where a file lacks them: rotary frequencies, and
    the number that stands for minus infinity in an attention mask."""
    kind, found = config.get("model_type"), {}
    layers = next((config[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in config), 0)
    if layers > MOST_LAYERS:
        raise UsageError(f"config.json says {layers} layers; expected at most {MOST_LAYERS}")
    for ending, value in COMPUTED_IN_2023.get(kind, {}).items() if layers else ():
        tensor = inv_freq(config) if value is None else torch.tensor(value)
        found |= {ending.format(layer): tensor for layer in range(layers)}
    return found


def inv_freq(config: dict) -> torch.Tensor:
    """Return the rotary frequencies [rotated / 2] of a LLaMA or GPT-NeoX, as transformers 4.28 computed and stored them
    (RoFormer, arXiv 2104.09864)."""
    rope = config.get("rope_parameters") or {}
    try:
        rotated = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    except KeyError as error:
        raise UsageError(
            f"rotary frequencies are missing, and cannot be computed: config.json has no {error}"
        ) from error
    if config.get("model_type") == "gpt_neox":
        rotated = int(rotated * (config.get("rotary_pct") or rope.get("partial_rotary_factor") or 0.25))
    theta = config.get("rope_theta") or config.get("rotary_emb_base") or rope.get("rope_theta") or 10000.0
    return 1.0 / (theta ** (torch.arange(0, rotated, 2).float() / rotated))


def position_in_llama(name: str) -> tuple[int, int, int]:
    parts = name.split(".", 3)
    if parts[:2] != ["model", "layers"]:
        return ({"model.embed_tokens.weight": 0, "model.norm.weight": 2}.get(name, 3), 0, 0)
    rank = LAYER_OF_2023.index(parts[3]) if parts[3] in LAYER_OF_2023 else len(LAYER_OF_2023)
    return (1, int(parts[2]), rank)
