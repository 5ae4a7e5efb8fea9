"""A LoRA adapter, as peft writes it, merged into its base: a plain checkpoint, in little memory.

W + scale * B @ A is computed in float64 and rounded once, to the dtype it is stored in, so that its bits do not depend
on the number of threads or on a CPU's matrix kernels (peft rounds three times, in float32 or the adapter's own dtype).
Tensors that the adapter does not touch keep every bit. LoRA: arXiv 2106.09685.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

import torch

from alpaca.common.errors import UsageError, first_line
from alpaca.data.prompts import TEMPLATE_FILE
from alpaca.weights.mismatch import config_differences, rows_may_differ
from alpaca.weights.provenance import other_base
from alpaca.weights.reader import (
    ADAPTER_CONFIG,
    TOKENIZER_FILES,
    Tensor,
    Weights,
    aux_files,
    dtype_name,
    find_folder,
    read_json,
    readable,
    shard_tensors,
)
from alpaca.weights.writer import Pipeline, Slot, Spec, cast

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."  # what peft puts before the model's own names
MERGED = (
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "bias",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
    "init_lora_weights",
    "base_model_name_or_path",
    "revision",
)
WITHOUT_EFFECT = (  # on what training has ended with; whether weights are transposed is seen at the model's layers
    "task_type",
    "peft_version",
    "auto_mapping",
    "inference_mode",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "fan_in_fan_out",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
)
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # of A and B; the other ways change the base as well
CANNOT = "cannot be merged into a plain checkpoint"
OF_THE_BASE = ("config.json", "*.py")  # files; the tokenizer's are the adapter's where it has one


@dataclass
class Change:
    """What becomes of one tensor: `whole` in its place, + scale * left @ right, and then `rows` of single tokens."""

    whole: Tensor | None = None
    lora: dict[str, Tensor] = field(default_factory=dict)  # "A", "B"
    of_embedding: bool = False  # A is [r, tokens], B [dim, r]; else A [r, in], B [out, r]
    scale: float = 0.0
    rows: Tensor | None = None  # [number of tokens, dim]
    tokens: list[int] = field(default_factory=list)

    def factors(self, transposed: bool) -> tuple[str, str]:
        """The names of left and right in the shape of the weight."""
        return ("A", "B") if transposed or self.of_embedding else ("B", "A")


class Adapter:
    """The folder (or hub id) of an adapter: its settings, and what it changes by the model's names of the tensors.

    Raises:
        UsageError: it is no LoRA adapter, is damaged, or says something that cannot be merged; that is named.
    """

    def __init__(self, folder: str | Path, flag: str):
        self.folder, self.flag = find_folder(folder, flag), flag
        if not (self.folder / ADAPTER_CONFIG).is_file():
            raise UsageError(
                f"{flag} {folder}: has no {ADAPTER_CONFIG}; expected a LoRA adapter, as peft or train.py saves it"
            )
        self.config = read_json(self.folder / ADAPTER_CONFIG, flag)
        self._check_config()
        files = [self.folder / name for name in WEIGHTS if (self.folder / name).is_file()]
        if not files:
            raise UsageError(f"{flag} {folder}: has neither {' nor '.join(WEIGHTS)}; copy or download it again")
        with readable(flag):
            self.weights = Weights(self.folder, flag, shard_tensors(files[0], flag))
        self.changes: dict[str, Change] = {}
        for tensor in self.weights.tensors.values():
            self._add(tensor)
        self._check_changes()

    def _check_config(self) -> None:
        if self.config.get("peft_type") != "LORA":
            raise UsageError(
                f"{self.flag} {self.folder}: expected a LoRA adapter, got peft_type "
                f"{self.config.get('peft_type')} in {ADAPTER_CONFIG}"
            )
        for name, value in self.config.items():
            if name not in (*MERGED, *WITHOUT_EFFECT) and value not in (None, False, [], {}, ""):
                raise self._refused(f"{name} = {json.dumps(value)}")
        start = self.config.get("init_lora_weights", True)
        if start not in PLAIN_STARTS:
            raise self._refused(
                f"init_lora_weights = {json.dumps(start)}, which has changed the base too; save it "
                "with peft's path_initial_model_for_weight_conversion first"
            )

    def _refused(self, what: str) -> UsageError:
        return UsageError(f"{self.flag} {self.folder}: {CANNOT}: its {ADAPTER_CONFIG} has {what}")

    def _add(self, tensor: Tensor) -> None:
        name = tensor.name.removeprefix(PREFIX)
        if name == tensor.name:
            raise UsageError(f"{self.flag} {self.folder}: {tensor.name}: expected names that begin with {PREFIX}")
        if match := re.fullmatch(r"(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B))", name):
            change = self.changes.setdefault(f"{match[1]}.weight", Change())
            change.lora[match[2] or match[3]], change.of_embedding = tensor, bool(match[3])
            change.scale = self._scale(match[1], tensor, match[2] or match[3])
        elif match := re.fullmatch(r"(.+)\.token_adapter\.trainable_tokens_delta", name):
            change = self.changes.setdefault(f"{match[1]}.weight", Change())
            change.rows, change.tokens = tensor, self._tokens(match[1])
        elif ".lora_" in name:
            raise UsageError(f"{self.flag} {self.folder}: {CANNOT}: it has {tensor.name}")
        elif ".original_module." not in name:  # what modules_to_save has replaced
            name = re.sub(r"\.(token_adapter|base_layer|modules_to_save)(?=\.)", "", name)
            self.changes.setdefault(name, Change()).whole = tensor

    def _scale(self, module: str, tensor: Tensor, part: str) -> float:
        rank = self._pattern("rank_pattern", module, self.config.get("r", 8))
        alpha = self._pattern("alpha_pattern", module, self.config.get("lora_alpha", 8))
        if len(tensor.shape) != 2 or tensor.shape[part == "B"] != rank:
            raise UsageError(
                f"{self.flag} {self.folder}: {tensor}, expected a matrix of rank {rank}, as {ADAPTER_CONFIG} says"
            )
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def _pattern(self, key: str, module: str, default: float) -> float:
        """peft: a regular expression for the end of the module's name; the first that matches counts."""
        patterns = (self.config.get(key) or {}).items()
        return next((value for name, value in patterns if re.fullmatch(rf"(.*\.)?({name})", module)), default)

    def _tokens(self, module: str) -> list[int]:
        tokens = self.config.get("trainable_token_indices")
        if isinstance(tokens, dict):
            tokens = next((ids for name, ids in tokens.items() if f".{module}".endswith(f".{name}")), None)
        return list(tokens or [])

    def _check_changes(self) -> None:
        """Nothing that the settings promise is missing among the tensors."""
        promised = [name.rpartition(".")[2] for name in self.config.get("modules_to_save") or []]
        missing = [name for name in promised if not any(f".{name}." in f".{known}" for known in self.changes)]
        for name, change in self.changes.items():
            missing += [f"lora_{part} of {name}" for part in "AB" if change.lora and part not in change.lora]
            if change.rows is not None and change.rows.shape[:1] != (len(change.tokens),):
                missing.append(f"a row for each of {len(change.tokens)} trainable_token_indices of {name}")
        if self.config.get("trainable_token_indices") and all(c.rows is None for c in self.changes.values()):
            missing.append("trainable_tokens_delta")
        if missing or not self.changes:
            raise UsageError(
                f"{self.flag} {self.folder}: lacks {', '.join(missing[:5]) or 'any tensor'}, which its "
                f"{ADAPTER_CONFIG} promises; it is damaged or was not saved whole"
            )

    def alone(self, *names: str) -> bool:
        """Whether one of these tensors, which are tied in the model, was trained apart from the other."""
        modules = [name.rpartition(".")[0] for name in names]
        saved = self.config.get("modules_to_save") or []
        apart = any(f".{module}".endswith(f".{name}") for module in modules for name in saved)
        apart = apart or any(name in self.changes and self.changes[name].lora for name in names)
        return apart and not self.config.get("ensure_weight_tying")

    def base_folder(self) -> str:
        name = self.config.get("base_model_name_or_path")
        if not name or self.config.get("revision"):
            raise UsageError(
                f"--base: needed, because {self.folder / ADAPTER_CONFIG} names "
                f"{'a revision of the base' if name else 'no base_model_name_or_path'}"
            )
        return name

    def quantized(self) -> str:
        """ "8" or "4" where the adapter's own card says with how many bits its base was loaded, else ""."""
        card = self.folder / "README.md"
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        found = re.search(r"load_in_([84])bit[^\w\n]*True", text)
        return found[1] if found else ""


class Merged:
    """What base and adapter give together: the tensors `specs`, in pieces; `config`; the other `files`."""

    def __init__(self, base: Weights, adapter: Adapter, dtype: torch.dtype | None = None):
        self.base, self.adapter = base, adapter
        base.require_config()
        if "quantization_config" in base.config:
            raise UsageError(f"{base.flag} {base.folder}: its weights are stored quantized; give the plain model")
        self.layers = _Layers(base)
        self.sources: dict[str, tuple[Tensor, Change | None]] = {t.name: (t, None) for t in base.tensors.values()}
        self.told: list[str] = []
        for name, change in self._untangled().items():
            self._put(name, change)
        shapes = {name: self._shape(name, *source) for name, source in self.sources.items()}
        self.specs = cast([Spec(name, t.dtype, shapes[name]) for name, (t, _) in self.sources.items()], dtype)
        self.config = base.config | self._vocabulary(shapes) | ({"tie_word_embeddings": False} if self.untied else {})
        if dtype is not None:
            self.config["dtype" if "dtype" in self.config else "torch_dtype"] = dtype_name(dtype)

    def _untangled(self) -> dict[str, Change]:
        """The adapter's changes, those of tied embeddings for both or, trained apart, for two tensors from now on."""
        changes, ends = dict(self.adapter.changes), (self.layers.input, self.layers.output)
        self.untied = self.layers.tied and self.adapter.alone(*ends)
        if self.untied:
            trained = " and ".join(name for name in ends if name in changes)
            self.told.append(
                f"note: {trained} of tied embeddings was trained apart: written as two tensors, with "
                "tie_word_embeddings = false"
            )
            changes.setdefault(self.layers.output, Change())
        elif self.layers.tied and (one := changes.get(ends[0]) or changes.get(ends[1])):
            changes |= dict.fromkeys(ends, one)
        return changes

    def _put(self, name: str, change: Change) -> None:
        tensor = self.base.find(name)
        if tensor is None:
            self._refuse(f"{name} is not in the base, and {self._wanted(name, change)} in the adapter")
        shared = self.layers.tied and name == self.layers.output and tensor is self.base.find(self.layers.input)
        if self.untied and shared:
            self.sources[name] = (tensor, change)
        elif not shared:
            self.sources[tensor.name] = (tensor, change)

    def _shape(self, name: str, tensor: Tensor, change: Change | None) -> tuple[int, ...]:
        """The shape of a tensor of the result, once base and adapter are known to fit."""
        shape = tensor.shape
        if change is None:
            return shape
        if change.whole is not None and change.whole.shape != shape:
            if not rows_may_differ(tensor.name, tensor, change.whole):
                self._misfit(tensor, change.whole.shape)
            shape = change.whole.shape
        if change.lora:
            left, right = self._factors(name, change)
            if (len(shape) == 2 and shape != (left[0], right[1])) or not tensor.dtype.is_floating_point:
                self._misfit(tensor, (left[0], right[1]))
        if change.rows is not None:
            if len(change.rows.shape) != 2 or change.rows.shape[1:] != shape[1:]:
                self._misfit(tensor, (shape[0], *change.rows.shape[1:]))
            rows = max(shape[0], *(token + 1 for token in change.tokens))
            if unknown := sorted(set(range(shape[0], rows)) - set(change.tokens)):
                self._refuse(f"{tensor} there, and the adapter has trained token {rows - 1} but not {unknown[0]}")
            shape = (rows, *shape[1:])
        return shape

    def _factors(self, name: str, change: Change) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of left [rows, r] and right [r, columns]."""
        transposed = change.of_embedding or name in self.layers.transposed
        pair = [change.lora[part].shape for part in change.factors(transposed)]
        return tuple(shape[::-1] if transposed else shape for shape in pair)

    def _wanted(self, name: str, change: Change) -> str:
        if not change.lora:
            return str(list((change.whole or change.rows).shape))
        left, right = self._factors(name, change)
        return str([left[0], right[1]])

    def _misfit(self, tensor: Tensor, wanted: tuple[int, ...]) -> NoReturn:
        self._refuse(f"{tensor} there, and the adapter was trained on {list(wanted)}")

    def _refuse(self, why: str) -> NoReturn:
        base, adapter = self.base, self.adapter
        differences = config_differences(base.config, adapter.weights.config)
        raise UsageError(
            f"{base.flag} {base.folder} is not the base of {adapter.flag} {adapter.folder}: {why}"
            f"{differences and '; config.json: '}{differences}"
        )

    def _vocabulary(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        """What the configuration says of the number of embedding rows, where the adapter has changed it."""
        ends = {name: self.base.find(name) for name in (self.layers.input, self.layers.output)}
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
        self.told.append(f"note: the embeddings have {number} rows, those of the base {before.popitem()[1]}")
        return {"vocab_size": number}

    @property
    def files(self) -> dict[str, Path]:
        """The small files of a checkpoint: configuration and code of the base, tokenizer of one of the two."""
        base, ours = aux_files(self.base.folder), aux_files(self.adapter.folder)
        own = any(path.name in TOKENIZER_FILES for path in ours)
        ours = [
            path for path in ours if path.name != ADAPTER_CONFIG and not any(fnmatch(path.name, p) for p in OF_THE_BASE)
        ]
        of_both = ("generation_config.json", TEMPLATE_FILE)
        taken = [path for path in base if not own or any(fnmatch(path.name, p) for p in (*OF_THE_BASE, *of_both))]
        taken += [path for path in ours if own or path.name in of_both]
        return {path.name: path for path in taken}

    def notes(self) -> list[str]:
        touched = [change for _, change in self.sources.values() if change is not None]
        told = [
            f"{sum(bool(change.lora) for change in touched)} matrices + scale * B @ A in float64, "
            f"{len(self.specs) - len(touched)} of {len(self.specs)} tensors as they are"
        ]
        if bits := self.adapter.quantized():
            told.append(
                f"note: trained on the base in {bits} bits, merged into its plain weights: answers may "
                "differ a little from those of adapter and quantized base"
            )
        if other := other_base(self.adapter.folder, self.base.folder):
            told.append(other)
        return [*told, *self.told]

    def pieces(self, pipe: Pipeline, order: list[Spec]) -> Iterator[tuple[Slot, Spec, int, torch.Tensor]]:
        """(slot, tensor, first element, elements of the result) in pieces."""
        for spec in order:
            tensor, change = self.sources[spec.name]
            weights = self.base
            if change is not None and change.whole is not None:
                weights, tensor = self.adapter.weights, change.whole
            kind = torch.float64 if change is not None and change.lora else spec.dtype
            edit = self._edit(spec, change, kind) if change is not None else None
            for slot, start, count in pipe.pieces(spec.nbytes // spec.dtype.itemsize):
                piece, scratch = slot.take(0, kind, count), slot.take(3, torch.uint8, count * 8)
                own = max(0, min(count, tensor.numel - start))  # what follows is of new tokens
                weights.read(tensor, start, piece[:own], scratch)
                if edit is not None:
                    edit(piece, start)
                if kind != spec.dtype:
                    piece = slot.take(1, spec.dtype, count).copy_(piece)
                pipe.bar.update(piece.nbytes)
                yield slot, spec, start, piece

    def _edit(self, spec: Spec, change: Change, kind: torch.dtype) -> Callable[[torch.Tensor, int], None]:
        """A function that adds the change to elements start … of a tensor [rows, columns], in place."""
        columns = spec.shape[1] if len(spec.shape) > 1 else 1
        left = right = None
        if change.lora:
            transposed = change.of_embedding or spec.name in self.layers.transposed
            left, right = (self._load(change.lora[part], kind) for part in change.factors(transposed))
            left, right = (left.T.contiguous(), right.T.contiguous()) if transposed else (left, right)
        rows = self._load(change.rows, kind) if change.rows is not None else None

        def edit(piece: torch.Tensor, start: int) -> None:
            end = start + piece.numel()
            if left is not None:
                first = start // columns
                delta = (left[first : -(-end // columns)] @ right * change.scale).view(-1)
                piece += delta[start - first * columns :][: piece.numel()]
            for number, token in enumerate(change.tokens):
                begin, stop = max(start, token * columns), min(end, (token + 1) * columns)
                if begin < stop:
                    piece[begin - start : stop - start] = rows[number, begin - token * columns : stop - token * columns]

        return edit

    def _load(self, tensor: Tensor, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty(tensor.shape, dtype=dtype)
        self.adapter.weights.read(tensor, 0, out.view(-1), torch.empty(tensor.nbytes, dtype=torch.uint8))
        return out


class _Layers:
    """What only the model's code knows: names of its embeddings, whether they are tied, which weights are [in, out]."""

    def __init__(self, base: Weights):
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.pytorch_utils import Conv1D

        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.folder))
        except (ValueError, KeyError, ImportError, OSError) as error:
            raise UsageError(
                f"{base.flag} {base.folder}: is no causal language model for today's transformers ({first_line(error)})"
            ) from error
        names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
        self.input, output = names[id(model.get_input_embeddings())], model.get_output_embeddings()
        self.output = names.get(id(output), self.input)
        self.tied = self.output != self.input and model.config.get_text_config().tie_word_embeddings
        names = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
        self.transposed = names | {tensor.name for tensor in map(base.find, names) if tensor}  # as the file calls them
