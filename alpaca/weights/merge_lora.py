"""A LoRA adapter, as peft writes it, merged into its base: a plain checkpoint, in little memory.

peft's own layers compute the merge, on blocks of rows of one matrix at a time, in float64. The result is rounded once,
to the dtype it is stored in, so that its bits do not depend on the number of threads or on a CPU's matrix kernels.
Tensors that the adapter does not touch keep every bit. LoRA: arXiv 2106.09685; DoRA: arXiv 2402.09353.
"""

import copy
import dataclasses
import json
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from alpaca.common.errors import InputError, loading
from alpaca.common.files import file_in, read_json
from alpaca.data.tokenizer import open_config
from alpaca.weights.mismatch import names_on_disk, raise_other_base, rows_may_differ
from alpaca.weights.provenance import files_of_merged, note_of_quantized_base, other_base
from alpaca.weights.reader import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Tensor,
    Weights,
    dtype_name,
    find_folder,
    readable,
    shard_tensors,
)
from alpaca.weights.writer import Pipeline, Slot, Spec, cast

PREFIX = "base_model.model."  # what peft puts before the model's own names
NAME = "default"  # of the only adapter, in peft's layers
PARTS = r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.weight)?"
BLOCK = 1 << 21  # elements that peft merges at once
REFUSED = (  # settings that change more than single matrices, or that peft itself does not merge
    "alora_invocation_tokens arrow_config kasa_config layer_replication lora_bias megatron_config monteclora_config "
    "target_parameters use_bdlora use_qalora velora_config"
).split()
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # of A and B; the other ways change the base as well


@dataclass
class Change:
    """What becomes of one tensor: `whole` in its place, then LoRA merged, and then `rows` of single tokens."""

    module: str  # the layer that the tensor is the weight of
    whole: Tensor | None = None
    lora: dict[str, Tensor] = field(default_factory=dict)  # by peft's names of its parts
    rows: Tensor | None = None  # [number of tokens, dim]
    tokens: list[int] = field(default_factory=list)

    def factors(self) -> list[Tensor]:
        """Return A [r, in] and B [out, r]; of an embedding A [r, tokens] and B [dim, r]."""
        return [tensor for name, tensor in sorted(self.lora.items()) if name.endswith(("_A", "_B"))]


class Adapter:
    """The folder (or hub id) of an adapter: its settings, and what it changes by the model's names of the tensors.

    Raises:
        InputError: it is no LoRA adapter, is damaged, or says something that cannot be merged; that is named.
    """

    def __init__(self, folder: str | Path):
        self.folder = find_folder(folder)
        if not file_in(self.folder, ADAPTER_CONFIG).is_file():
            raise self._error(f"has no {ADAPTER_CONFIG}; expected a LoRA adapter, as peft or train.py saves it")
        self.config = read_json(self.folder / ADAPTER_CONFIG)
        self._check_config()
        files = [file for name in ADAPTER_WEIGHTS if (file := file_in(self.folder, name)).is_file()]
        if not files:
            raise self._error(f"has neither {' nor '.join(ADAPTER_WEIGHTS)}; copy or download it again")
        with readable(self.folder):
            self.weights = Weights(self.folder, shard_tensors(files[0]))
        self.changes: dict[str, Change] = {}
        for tensor in self.weights.tensors.values():
            self._add(tensor)
        self._check_changes()

    def _error(self, why: str) -> InputError:
        return InputError(f"{self.folder}: {why}", self.folder)

    def _check_config(self) -> None:
        from peft import LoraConfig

        if self.config.get("peft_type") != "LORA":
            kind = self.config.get("peft_type")
            raise self._error(f"expected a LoRA adapter, got peft_type {kind} in {ADAPTER_CONFIG}")
        known = {setting.name for setting in dataclasses.fields(LoraConfig)} - set(REFUSED)
        for name, value in self.config.items():
            if name not in known and value not in (None, False, [], {}, ""):
                raise self._error(
                    f"cannot be merged here: its {ADAPTER_CONFIG} has {name} = {json.dumps(value)}; what peft can "
                    "merge of that, PeftModel.merge_and_unload merges in memory"
                )
        start = self.config.get("init_lora_weights", True)
        if start not in PLAIN_STARTS:
            raise self._error(
                f"cannot be merged: its {ADAPTER_CONFIG} has init_lora_weights = {json.dumps(start)}, which has "
                "changed the base too; save it with peft's path_initial_model_for_weight_conversion first"
            )

    def _add(self, tensor: Tensor) -> None:
        name = tensor.name.removeprefix(PREFIX)
        if name == tensor.name:
            raise self._error(f"{tensor.name}: expected names that begin with {PREFIX}")
        if match := re.fullmatch(PARTS, name):
            self._change_of(f"{match[1]}.weight").lora[match[2]] = tensor
        elif match := re.fullmatch(r"(.+)\.token_adapter\.trainable_tokens_delta", name):
            tokens = self.config.get("trainable_token_indices") or []
            if isinstance(tokens, dict):
                tokens = next((ids for module, ids in tokens.items() if f".{match[1]}".endswith(f".{module}")), [])
            change = self._change_of(f"{match[1]}.weight")
            change.rows, change.tokens = tensor, list(tokens)
        elif ".lora_" in name:
            raise self._error(f"cannot be merged here: it has {tensor.name}")
        elif ".original_module." not in name:  # what modules_to_save has replaced
            name = re.sub(r"\.(token_adapter|base_layer|modules_to_save)(?=\.)", "", name)
            self._change_of(name).whole = tensor

    def _change_of(self, name: str) -> Change:
        return self.changes.setdefault(name, Change(name.removesuffix(".weight")))

    def _check_changes(self) -> None:
        """Raise InputError if a tensor is missing that the settings promise."""
        promised = [name.rpartition(".")[2] for name in self.config.get("modules_to_save") or []]
        missing = [name for name in promised if not any(f".{name}." in f".{known}" for known in self.changes)]
        for name, change in self.changes.items():
            parts = ["_A", "_B", "_magnitude_vector"][: 3 if self.config.get("use_dora") else 2]
            lacking = [part for part in parts if change.lora and not any(n.endswith(part) for n in change.lora)]
            missing += [f"lora{part} of {name}" for part in lacking]
            if change.rows is not None and change.rows.shape[:1] != (len(change.tokens),):
                missing.append(f"a row for each of {len(change.tokens)} trainable_token_indices of {name}")
        if self.config.get("trainable_token_indices") and all(c.rows is None for c in self.changes.values()):
            missing.append("trainable_tokens_delta")
        if missing or not self.changes:
            what = ", ".join(missing[:5]) or "any tensor"
            raise self._error(f"lacks {what}, which its {ADAPTER_CONFIG} promises; it is damaged or not saved whole")

    def alone(self, *names: str) -> bool:
        """Return whether one of these tensors, which are tied in the model, was trained apart from the other."""
        modules = [name.rpartition(".")[0] for name in names]
        saved = self.config.get("modules_to_save") or []
        apart = any(f".{module}".endswith(f".{name}") for module in modules for name in saved)
        apart = apart or any(name in self.changes and self.changes[name].lora for name in names)
        return apart and not self.config.get("ensure_weight_tying")


class Merged:
    """What base and adapter give together: the tensors `specs`, in pieces; `config`; the other `files`."""

    def __init__(self, base: Weights, adapter: Adapter, dtype: torch.dtype | None = None):
        self.base, self.adapter = base, adapter
        base.require_config()
        if "quantization_config" in base.config:
            raise InputError(f"{base.folder}: its weights are stored quantized; give the plain model", base.folder)
        self.files = files_of_merged(base.folder, adapter.folder)
        self.layers = _Layers(base)
        self.sources: dict[str, tuple[Tensor, Change | None]] = {t.name: (t, None) for t in base.tensors.values()}
        self.messages: list[str] = []
        for name, change in self._untangled().items():
            self._put(name, change)
        shapes = {name: self._shape(*source) for name, source in self.sources.items()}
        self.layers.inject(adapter)
        self._check_ranks()
        self.specs = cast([Spec(name, t.dtype, shapes[name]) for name, (t, _) in self.sources.items()], dtype)
        self.config = base.config | self._vocabulary(shapes) | ({"tie_word_embeddings": False} if self.untied else {})
        if dtype is not None:
            self.config["dtype" if "dtype" in self.config else "torch_dtype"] = dtype_name(dtype)

    def _untangled(self) -> dict[str, Change]:
        """Return the adapter's changes, those of tied embeddings for both, or for two tensors if trained apart."""
        changes, ends = dict(self.adapter.changes), (self.layers.input, self.layers.output)
        self.untied = self.layers.tied and self.adapter.alone(*ends)
        if self.untied:
            trained = " and ".join(name for name in ends if name in changes)
            self.messages.append(
                f"note: {trained} of tied embeddings was trained apart: written as two tensors, with "
                "tie_word_embeddings = false"
            )
            changes.setdefault(self.layers.output, Change(self.layers.output))
        elif self.layers.tied and (one := changes.get(ends[0]) or changes.get(ends[1])):
            changes |= dict.fromkeys(ends, one)
        return changes

    def _find(self, name: str) -> Tensor | None:
        return self.base.tensors.get(self.layers.on_disk.get(name, "")) or self.base.find(name)

    def _put(self, name: str, change: Change) -> None:
        tensor = self._find(name)
        if tensor is None:
            self._refuse(f"{name} is not in the base, and {self._wanted(change)} in the adapter")
        shared = self.layers.tied and name == self.layers.output and tensor is self._find(self.layers.input)
        if self.untied or not shared:
            self.sources[name if shared else tensor.name] = (tensor, change)

    def _shape(self, tensor: Tensor, change: Change | None) -> tuple[int, ...]:
        """Return the shape of a tensor of the result, once base and adapter are known to fit."""
        shape, wanted, change = tensor.shape, None, change or Change(tensor.name)
        if change.whole is not None and change.whole.shape != shape:
            if not rows_may_differ(tensor.name, tensor, change.whole):
                wanted = change.whole.shape
            shape = change.whole.shape
        if change.lora and (list(shape) != self._wanted(change) or not tensor.dtype.is_floating_point):
            wanted = wanted or self._wanted(change)
        if change.rows is not None and (len(change.rows.shape) != 2 or change.rows.shape[1:] != shape[1:]):
            wanted = wanted or (shape[0], *change.rows.shape[1:])
        if wanted is not None:
            self._refuse(f"{tensor} there, and the adapter was trained on {list(wanted)}")
        if change.rows is not None:
            rows = max(shape[0], *(token + 1 for token in change.tokens))
            if unknown := sorted(set(range(shape[0], rows)) - set(change.tokens)):
                self._refuse(f"{tensor} there, and the adapter has trained token {rows - 1} but not {unknown[0]}")
            shape = (rows, *shape[1:])
        return shape

    def _wanted(self, change: Change) -> list[int]:
        """Return the shape of the tensor that the adapter was trained on."""
        if not change.lora:
            return list((change.whole or change.rows).shape)
        a, b = change.factors()
        shape = [b.shape[0], a.shape[-1]]
        return shape[::-1] if change.module in self.layers.transposed else shape

    def _refuse(self, why: str) -> NoReturn:
        raise_other_base(self.base, self.adapter.weights, why)

    def _check_ranks(self) -> None:
        """Raise InputError unless peft's layers have the ranks of the adapter's tensors."""
        for change in self.adapter.changes.values():
            rank = self.layers.lora[change.module].r[NAME] if change.lora else None
            for tensor, axis in zip(change.factors(), (0, 1)):
                if len(tensor.shape) != 2 or tensor.shape[axis] != rank:
                    raise self.adapter._error(f"{tensor}, expected a matrix of rank {rank}, as {ADAPTER_CONFIG} says")

    def _vocabulary(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        """Return what the configuration says of the number of embedding rows, where the adapter has changed it."""
        ends = {name: self._find(name) for name in (self.layers.input, self.layers.output)}
        names = {name if name in self.sources else tensor.name for name, tensor in ends.items() if tensor}
        rows, before = ({n: of(n)[0] for n in sorted(names)} for of in (shapes.get, lambda n: self.sources[n][0].shape))
        if rows == before:
            return {}
        if len(set(rows.values())) > 1:
            self._refuse(
                f"it would have {', '.join(f'{n} rows of {name}' for name, n in rows.items())}; the adapter "
                "was saved without part of its embeddings (peft: save_embedding_layers)"
            )
        number = rows.popitem()[1]
        self.messages.append(f"note: the embeddings have {number} rows, those of the base {before.popitem()[1]}")
        if isinstance(text := self.base.config.get("text_config"), dict):
            return {"text_config": text | {"vocab_size": number}}
        return {"vocab_size": number}

    def notes(self) -> list[str]:
        touched = [change for _, change in self.sources.values() if change is not None]
        notes = [
            f"{sum(bool(change.lora) for change in touched)} matrices merged by peft in float64, "
            f"{len(self.specs) - len(touched)} of {len(self.specs)} tensors as they are"
        ]
        other = other_base(self.adapter.folder, self.base.folder)
        return [*notes, *note_of_quantized_base(self.adapter.folder), *([other] if other else []), *self.messages]

    def pieces(self, pipe: Pipeline, order: list[Spec]) -> Iterator[tuple[Slot, Spec, int, torch.Tensor]]:
        """Yield (slot, tensor, first element, elements of the result) in pieces."""
        for spec in order:
            tensor, change = self.sources[spec.name]
            change = change or Change(spec.name)
            weights, tensor = (self.adapter.weights, change.whole) if change.whole else (self.base, tensor)
            parts = {name: self._load(part, torch.float64) for name, part in change.lora.items()}
            merged = _MergedWeight(self.layers, change.module, parts, weights, tensor) if parts else None
            rows = self._load(change.rows, spec.dtype).view(-1) if change.rows else None
            for slot, start, count in pipe.pieces(spec.nbytes // spec.dtype.itemsize):
                piece = slot.take(0, spec.dtype, count)
                own = piece[: max(0, min(count, tensor.numel - start))]  # what follows is of new tokens
                if merged is not None:
                    merged.read(start, own)
                else:
                    weights.read(tensor, start, own, slot.take(3, torch.uint8, count * 8))
                if rows is not None:
                    _put_rows(piece, start, rows, change.tokens)
                if piece.is_floating_point() and piece.element_size() > 1 and not _are_finite(piece):
                    problem = f"{spec.name} would hold numbers that are not finite; it or its base is damaged"
                    raise self.adapter._error(problem)
                pipe.bar.update(piece.nbytes)
                yield slot, spec, start, piece

    def _load(self, tensor: Tensor, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(tensor.shape, dtype=dtype)
        self.adapter.weights.read(tensor, 0, out.view(-1), torch.empty(tensor.nbytes, dtype=torch.uint8))
        return out


def _are_finite(piece: torch.Tensor) -> bool:
    return all(math.isfinite(end) for end in piece.aminmax()) if piece.numel() else True


def _put_rows(piece: torch.Tensor, start: int, rows: torch.Tensor, tokens: list[int]) -> None:
    """Put the rows of `tokens` into elements start … of an embedding."""
    end, columns = start + piece.numel(), rows.numel() // len(tokens)
    for row, token in zip(rows.split(columns), tokens):
        begin, stop = max(start, token * columns), min(end, (token + 1) * columns)
        if begin < stop:
            piece[begin - start : stop - start] = row[begin - token * columns : stop - token * columns]


class _MergedWeight:
    """A weight [rows, columns] and its LoRA `parts`, merged by peft's layer in blocks of rows, in float64."""

    def __init__(
        self, layers: "_Layers", module: str, parts: dict[str, torch.Tensor], weights: Weights, tensor: Tensor
    ):
        self.layer = copy.deepcopy(layers.lora[module])  # without weights; those put into it go with this object
        self.parts = parts
        self.weights, self.tensor = weights, tensor
        self.transposed = module in layers.transposed  # rows are columns of A, not rows of B
        rows, self.columns = tensor.shape
        whole = self.transposed and "lora_magnitude_vector" in parts  # DoRA's norms run over all rows
        self.step = rows if whole else min(rows, max(1, BLOCK // self.columns))
        self.first, self.block = 0, torch.empty(0)

    def read(self, start: int, out: torch.Tensor) -> None:
        """Fill `out` [n] with the merged elements start … start + n."""
        while out.numel():
            if not self.first <= start < self.first + self.block.numel():
                self._merge(start // self.columns)
            part = self.block[start - self.first :][: out.numel()]
            out[: part.numel()].copy_(part)
            start, out = start + part.numel(), out[part.numel() :]

    def _merge(self, row: int) -> None:
        rows = min(self.step, self.tensor.shape[0] - row)
        self.first = row * self.columns
        block = torch.empty(rows, self.columns, dtype=torch.float64)
        self.weights.read(self.tensor, self.first, block.view(-1), torch.empty(block.nbytes, dtype=torch.uint8))
        for name, part in self.parts.items():
            if name.endswith("_A") == self.transposed:
                part = part.narrow(int(self.transposed), row, rows)
            held, parameter = getattr(self.layer, name), nn.Parameter(part, requires_grad=False)
            if isinstance(held, nn.ParameterDict):
                held[NAME] = parameter
            else:
                held[NAME].weight = parameter
        base = self.layer.get_base_layer()
        base.weight = nn.Parameter(block, requires_grad=False)
        self.layer.merge()
        self.layer.merged_adapters.clear()
        self.block = base.weight.data.reshape(-1)


class _Layers:
    """What only the model's code knows: names of its embeddings, whether they are tied, which weights are [in, out].

    peft's layers, without weights, stand in it where the adapter has tensors.
    """

    def __init__(self, base: Weights):
        from transformers import AutoModelForCausalLM
        from transformers.pytorch_utils import Conv1D

        config = open_config(base.folder)
        with loading(base.folder, "is no causal language model for today's transformers"), torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        names = {id(module): f"{name}.weight" for name, module in self.model.named_modules()}
        self.input, output = names[id(self.model.get_input_embeddings())], self.model.get_output_embeddings()
        self.output = names.get(id(output), self.input)
        self.tied = self.output != self.input and self.model.config.get_text_config().tie_word_embeddings
        kinds = (Conv1D, nn.Embedding)
        self.transposed = {name for name, module in self.model.named_modules() if isinstance(module, kinds)}
        self.lora: dict[str, nn.Module] = {}
        with loading(base.folder, "its tensors cannot be named"):
            self.on_disk = names_on_disk(self.model, base)

    def inject(self, adapter: Adapter) -> None:
        """Let peft put its layers in, by the adapter's settings."""
        from peft import LoraConfig, inject_adapter_in_model

        names = {change.module: f"{change.module}.lora_A.weight" for change in adapter.changes.values() if change.lora}
        layers = dict(self.model.named_modules())
        if strange := [name for name in names if name not in layers]:
            raise adapter._error(f"{strange[0]} is no layer of a {type(self.model).__name__}, which the base is")
        if not names:
            return
        config = LoraConfig.from_pretrained(adapter.folder, trust_remote_code=False)
        config.modules_to_save = config.trainable_token_indices = None  # handled here: they are no layers of LoRA
        config.init_lora_weights = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that only some of the settings' layers have tensors
            inject_adapter_in_model(
                config, self.model, NAME, low_cpu_mem_usage=True, state_dict=dict.fromkeys(names.values())
            )
        self.lora = {name: self.model.get_submodule(name) for name in names}
