r"""Supervised fine-tuning of a causal language model on instructions: the Stanford Alpaca recipe.

Four GPUs, parameters, gradients and optimizer sharded over them:

    torchrun --nproc_per_node=4 --master_port=29500 train.py \
        --model_name_or_path <llama_7b_hf> --data_path ./alpaca_data.json --output_dir <out> --bf16 True --tf32 True \
        --num_train_epochs 3 --per_device_train_batch_size 4 --gradient_accumulation_steps 8 \
        --evaluation_strategy "no" --save_strategy "steps" --save_steps 2000 --save_total_limit 1 \
        --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine" --logging_steps 1 \
        --fsdp "full_shard auto_wrap" --fsdp_transformer_layer_cls_to_wrap 'LlamaDecoderLayer'

One process (a GPU or a laptop): python train.py --model_name_or_path ... --data_path ... --output_dir ...
Go on after an interruption: the same command with --resume_from_checkpoint True.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from alpaca import flags, fsdp
from alpaca.checkpoints import find_checkpoint
from alpaca.console import hide_progress_bars, plot_loss, say
from alpaca.contract import (
    already_finished,
    begin,
    check_contract,
    describe_run,
    finish,
    keep_decisions,
    note_decisions,
)
from alpaca.data import fingerprint, load_rows
from alpaca.encoding import Ragged, cut, encode, joined, starts_with
from alpaca.errors import UsageError, reported
from alpaca.flags import flag
from alpaca.lora import LoraArguments, add_lora, base_dtype, check_lora, existing_tokens, quantization, refuse_adapter
from alpaca.prompts import PROMPT_DICT, format_prompt, load_prompt_template
from alpaca.report import report, text_problems
from alpaca.run import check_before_loading, check_combinations, check_evaluation, repair_generation_config
from alpaca.tokenizer import SPECIAL_TOKENS, identity, open_tokenizer
from alpaca.tokens import IGNORE_INDEX, cached_tokens, make_tokens
from alpaca.trainer import AlpacaTrainer
from alpaca.waiting import leave, wait_for_all_ranks

TOKENS_VERSION = 2  # raise it when `preprocess` changes, so that no old cache is read
DEFAULT_PAD_TOKEN, DEFAULT_EOS_TOKEN, DEFAULT_BOS_TOKEN, DEFAULT_UNK_TOKEN = SPECIAL_TOKENS.values()


# ---- flags ----


@dataclass
class ModelArguments:
    _argument_group_name = "model"
    model_name_or_path: str | None = flag("facebook/opt-125m", "A local folder or hub id: weights and tokenizer.")
    attn_implementation: str | None = flag(None, "eager, sdpa, flash_attention_2, ...; by default the model's choice.")
    pad_token: str | None = flag(
        None, "An existing token to pad with, instead of adding [PAD] where the tokenizer has no pad token."
    )
    add_missing_tokens: bool | None = flag(
        None, "Add the pad, eos, bos and unk tokens that are missing; by default as in 2023, but not with --lora_r."
    )


@dataclass
class DataArguments:
    _argument_group_name = "data"
    data_path: str = flag(
        None, "Rows to train on: Alpaca .json, .jsonl, .csv, .parquet, seed_tasks.jsonl, or a hub id."
    )
    eval_data_path: str | None = flag(None, "Rows to evaluate on when --eval_strategy is steps or epoch.")
    data_split: str = flag("train", "Split of a hub dataset, e.g. train or train[:1000].")
    prompt_template: str | None = flag(None, "JSON with prompt_input and prompt_no_input; else Alpaca's two prompts.")
    prompt_boundary: str = flag(
        "stanford",
        "stanford: prompt and answer are tokenized as one text; an answer whose first character merges with the "
        "prompt's last token loses it to the mask. split: tokenized apart, as generation sees them.",
        choices=["stanford", "split"],
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    _argument_group_name = "training (ours first, then every flag of transformers.TrainingArguments)"
    cache_dir: str | None = flag(None, "Where downloads and tokenized data are kept.")
    model_max_length: int = flag(512, "Maximum sequence length in tokens. Longer rows are cut on the right.")
    batching: str = flag(
        "packed",
        "packed: the rows of an optimizer step are laid end to end, without padding, each seeing only itself. padded: "
        "micro-batches of --per_device_train_batch_size rows, padded to the longest, as in 2023.",
        choices=["packed", "padded"],
    )
    max_tokens_per_pack: str = flag(
        "auto",
        "Tokens that a pack has at most (a longer row makes its own); auto: as many as the memory forecast allows.",
    )
    share_prefix: bool = flag(
        True, "Compute the template's beginning, which rows of a pack have in common, once per pack."
    )
    gradient_checkpointing: bool | None = flag(
        None,
        "Compute activations again in the backward pass: slower, far less memory. By default only where the memory "
        "forecast asks for it.",
        nargs="?",
        const=True,
    )
    hold_gradients: bool | None = flag(
        None,
        "Under FSDP: reduce gradients once a step, not after every pack. By default if the memory forecast has room.",
        nargs="?",
        const=True,
    )
    save_dtype: str = flag(
        "float32",
        "Of the final model. bfloat16 halves it, right before publishing. Checkpoints stay float32.",
        choices=["float32", "bfloat16", "float16"],
    )
    loss_normalization: str = flag(
        "token",
        "token: mean over all target tokens of the optimizer step. microbatch: 2023's mean over the means of the "
        "micro-batches.",
        choices=["token", "microbatch"],
    )
    overwrite_output_dir: bool = flag(False, "Train from the start in a folder that already holds a run.")
    logging_nan_inf_filter: bool = flag(False, "Hide non-finite losses from the log.")

    def __post_init__(self):
        check_combinations(self)
        if self.fsdp:
            fsdp.configure_fsdp(self)
        if self.use_cpu and "LOCAL_RANK" in os.environ and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=self.ddp_timeout_delta)  # transformers drops it on CPU
        new_name = getattr(self, "activation_checkpointing", None)  # of transformers 5.18 and later
        recompute = self.activation_checkpointing = self.gradient_checkpointing if new_name is None else new_name
        super().__post_init__()
        self.gradient_checkpointing = recompute  # None, which transformers makes False: check_before_loading decides
        if self.fsdp and (policy := fsdp.mixed_precision_policy(self.mixed_precision)):
            self.fsdp_plugin_args["mixed_precision_policy"] = policy


def parse_flags(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, LoraArguments, TrainingArguments]:
    """The dataclasses from a command line of 2023 or of today; see alpaca/flags.py."""
    classes = (ModelArguments, DataArguments, LoraArguments, TrainingArguments)
    (model_args, data_args, lora_args, training_args), notes = flags.parse(argv, classes, description=__doc__)
    if not data_args.data_path:
        raise UsageError("--data_path is missing: a file of rows (./alpaca_data.json) or a hub id (tatsu-lab/alpaca)")
    check_lora(lora_args, training_args)
    if model_args.add_missing_tokens is None:
        model_args.add_missing_tokens = not lora_args
    if training_args.n_gpu > 1:
        training_args._n_gpu = 1
        notes.append("several GPUs, one process -> the first GPU is used; torchrun --nproc_per_node=N takes N")
    for note in notes:
        say(f"flag: {note}", training_args.process_index)
    return model_args, data_args, lora_args, training_args


# ---- tokens and labels ----


def preprocess(
    sources: Sequence[str],
    targets: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    prompt_boundary: str = "stanford",
) -> dict[str, Any]:
    """Tokenize prompts (`sources`) with their answers (`targets`) and mask the prompts in the labels.

    As in 2023, a row is the tokens of prompt + answer as one string, cut on the right at `model_max_length`, and its
    first N labels are IGNORE_INDEX, where N is the number of tokens of the prompt alone:

        ids     1  835  2799  4290 29901   450  1234    2       "### Response:" + "The answer" + "</s>"
        labels  -  -    -     -    -       450  1234    2       - is IGNORE_INDEX

    A target that ends with the text of `eos_token` ends with that token, appended by id; anywhere else the text of a
    control token is plain text (2023 parsed it).

    Returns:
        As alpaca.tokens.make_tokens: input_ids, labels, lengths, num_targets, and problems as in alpaca/report.py.
    """
    eos, limit = tokenizer.eos_token, tokenizer.model_max_length
    ends = np.array([target.endswith(eos) for target in targets], dtype=bool)
    answers = [target.removesuffix(eos) for target in targets]
    prompts, rows = encode(sources, answers, tokenizer, apart=prompt_boundary == "split")
    merged = ~starts_with(rows, prompts)
    whole = joined(rows, Ragged(np.full(ends.sum(), tokenizer.eos_token_id), ends.astype(np.int64)))
    rows = cut(whole, limit)
    masked, truncated = np.minimum(prompts.lengths, rows.lengths), whole.lengths > limit
    noticed = {
        "truncated": truncated,
        "no_eos": truncated & ends,
        "nothing_to_learn": rows.lengths <= np.maximum(masked, 1),
        "merged_boundary": merged,
    }
    return make_tokens(rows, masked, {name: np.flatnonzero(found).tolist() for name, found in noticed.items()})


class SupervisedDataset(Dataset):
    """Rows of `data_path` as token ids and labels, tokenized once and cached (alpaca/tokens.py), with a report."""

    def __init__(
        self,
        data_path: str,
        tokenizer: PreTrainedTokenizerBase,
        templates: Mapping[str, str] = PROMPT_DICT,
        prompt_boundary: str = "stanford",
        split: str = "train",
        cache_dir: str | None = None,
    ):
        rows = load_rows(data_path, split, cache_dir)
        sources = [format_prompt(row, templates) for row in rows]
        targets = [f"{row['output']}{tokenizer.eos_token}" for row in rows]
        key = fingerprint(sources, targets, prompt_boundary, identity(tokenizer), TOKENS_VERSION)
        tokens = cached_tokens(key, lambda: preprocess(sources, targets, tokenizer, prompt_boundary), cache_dir)
        self.input_ids, self.labels = tokens["input_ids"], tokens["labels"]  # lists of (length,) int64 tensors
        self.lengths, self.num_targets = tokens["lengths"], tokens["num_targets"]  # (rows,) int64 arrays
        self.data_fingerprint = fingerprint(
            [(row["instruction"], row.get("input") or "", row["output"]) for row in rows]
        )
        self.template_fingerprint = fingerprint(templates)
        self.report = report(data_path, tokens, text_problems(rows, templates, tokenizer.all_special_tokens))
        if len(tokens["problems"]["nothing_to_learn"]) == len(rows):
            raise UsageError(
                f"--data_path {data_path}: no row has an answer left to learn within --model_max_length "
                f"{tokenizer.model_max_length}\n{self.report}"
            )

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return dict(input_ids=self.input_ids[i], labels=self.labels[i])


@dataclass
class DataCollatorForSupervisedDataset:
    """Pads rows on the right to the longest:

        input_ids       [[5, 6, 7], [8]]  ->  [[5, 6, 7], [8, pad, pad]]
        labels          [[-, 6, 7], [8]]  ->  [[-, 6, 7], [8, -, -]]         - is IGNORE_INDEX
        attention_mask                        [[1, 1, 1], [1, 0, 0]]

    The mask comes from lengths, not from `input_ids != pad`: with pad == eos that would hide the end of every answer.
    No rows at all (a rank that has none left in the last step) give one token without a target.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, instances: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        pad, pad_id = torch.nn.utils.rnn.pad_sequence, self.tokenizer.pad_token_id
        if not instances:
            instances = [dict(input_ids=torch.tensor([pad_id]), labels=torch.tensor([IGNORE_INDEX]))]
        input_ids = [torch.as_tensor(instance["input_ids"]) for instance in instances]
        labels = [torch.as_tensor(instance["labels"]) for instance in instances]
        return dict(
            input_ids=pad(input_ids, batch_first=True, padding_value=pad_id),
            labels=pad(labels, batch_first=True, padding_value=IGNORE_INDEX),
            attention_mask=pad([torch.ones_like(ids) for ids in input_ids], batch_first=True, padding_value=0),
        )


def make_supervised_data_module(
    tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, cache_dir: str | None = None
) -> dict[str, Any]:
    """train_dataset, eval_dataset (None without --eval_data_path) and data_collator, as the Trainer takes them."""
    templates = load_prompt_template(data_args.prompt_template)

    def dataset(path: str | None, split: str = "train") -> SupervisedDataset | None:
        options = dict(templates=templates, prompt_boundary=data_args.prompt_boundary, split=split, cache_dir=cache_dir)
        return SupervisedDataset(path, tokenizer, **options) if path else None

    return dict(
        train_dataset=dataset(data_args.data_path, data_args.data_split),
        eval_dataset=dataset(data_args.eval_data_path),
        data_collator=DataCollatorForSupervisedDataset(tokenizer),
    )


# ---- tokenizer and model ----


def smart_tokenizer_and_embedding_resize(
    special_tokens_dict: dict[str, str], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    """Add special tokens to `tokenizer` and make `model` fit, as in 2023."""
    num_new_tokens = tokenizer.add_special_tokens(special_tokens_dict)
    resize_embeddings(model, num_new_tokens, len(tokenizer))


def resize_embeddings(model: PreTrainedModel, num_new_tokens: int, vocab_size: int) -> None:
    """Give input and output embeddings `vocab_size` rows, the last `num_new_tokens` of them the mean of the others.

    As in 2023, a model with more rows than the tokenizer has tokens (OPT: 50272 and 50265) loses the rows in excess.
    """
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    if num_new_tokens > 0:
        with torch.no_grad():
            for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
                weight = embeddings.weight  # (vocab_size, hidden_size), one tensor where they are tied
                weight[-num_new_tokens:] = weight[:-num_new_tokens].mean(dim=0, keepdim=True)


def load_tokenizer(model_args: ModelArguments, training_args: TrainingArguments) -> tuple[PreTrainedTokenizerBase, int]:
    """The tokenizer with pad, eos, bos and unk tokens, and how many tokens had to be added for that, as in 2023.
    A token that is "" counts as missing."""
    name = model_args.model_name_or_path
    try:
        tokenizer = open_tokenizer(
            name, training_args.cache_dir, model_max_length=training_args.model_max_length, padding_side="right"
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"--model_name_or_path {name}: no tokenizer could be loaded: {error}") from error
    if model_args.pad_token is not None:
        if model_args.pad_token not in tokenizer.get_vocab():
            raise UsageError(f"--pad_token {model_args.pad_token!r}: not a token of {name}")
        tokenizer.pad_token = model_args.pad_token
    if model_args.add_missing_tokens is False:
        existing_tokens(tokenizer, name, training_args.process_index)
        return tokenizer, 0
    missing = {token: default for token, default in SPECIAL_TOKENS.items() if not getattr(tokenizer, token)}
    return tokenizer, tokenizer.add_special_tokens(missing)


def load_config(
    model_args: ModelArguments, training_args: TrainingArguments, checkpoint: str | None = None
) -> PreTrainedConfig:
    name = checkpoint or model_args.model_name_or_path
    refuse_adapter(name)
    try:
        return AutoConfig.from_pretrained(name, cache_dir=training_args.cache_dir)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model_name_or_path {name}: the model could not be loaded: {error}") from error


def load_model(
    model_args: ModelArguments,
    training_args: TrainingArguments,
    checkpoint: str | None = None,
    lora_args: LoraArguments | None = None,
) -> PreTrainedModel:
    """The model in float32, whatever the dtype on disk: in bfloat16 most updates of size 2e-5 would round to nothing.
    Under LoRA it is not updated: see alpaca/lora.py.

    Under FSDP only rank 0 reads the weights; the others get a model of the same shape on the meta device.
    """
    name, config = checkpoint or model_args.model_name_or_path, load_config(model_args, training_args, checkpoint)
    options: dict[str, Any] = {"dtype": base_dtype(training_args, config) if lora_args else torch.float32}
    if model_args.attn_implementation:
        options["attn_implementation"] = model_args.attn_implementation
    if lora_args:
        options |= quantization(lora_args, training_args, options["dtype"])
    try:
        if training_args.fsdp:
            fsdp.resolve_wrap_classes(training_args, config)
            if training_args.process_index != 0:
                return fsdp.empty_model(config, **options)
        return AutoModelForCausalLM.from_pretrained(name, cache_dir=training_args.cache_dir, **options)
    except UsageError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"--model_name_or_path {name}: the model could not be loaded: {error}") from error


# ---- the run ----


def train(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv` (default: this process's)."""
    model_args, data_args, lora_args, training_args = parse_flags(sys.argv[1:] if argv is None else argv)
    hide_progress_bars(training_args)
    transformers.set_seed(training_args.seed)
    check_evaluation(training_args, data_args.eval_data_path)
    checkpoint = find_checkpoint(training_args)

    tokenizer, num_new_tokens = load_tokenizer(model_args, training_args)
    data_module = make_supervised_data_module(tokenizer, data_args, training_args.cache_dir)
    for dataset in filter(None, (data_module["train_dataset"], data_module["eval_dataset"])):
        say(str(dataset.report), training_args.process_index)

    keep_decisions(training_args, checkpoint)
    contract = describe_run(training_args, model_args, data_args, lora_args, data_module["train_dataset"], tokenizer)
    if already_finished(training_args, contract, checkpoint):
        return leave()
    check_contract(training_args, contract, checkpoint)

    weights = None if lora_args else checkpoint  # of the whole model; LoRA's checkpoints lack the base
    config = load_config(model_args, training_args, weights)
    check_before_loading(training_args, config, data_module, checkpoint, lora_args)
    note_decisions(training_args, contract)
    model = load_model(model_args, training_args, weights, lora_args)
    wait_for_all_ranks()
    repair_generation_config(model, tokenizer.pad_token_id, training_args.process_index)
    if not lora_args or num_new_tokens:
        resize_embeddings(model, 0 if weights else num_new_tokens, len(tokenizer))
    if lora_args:
        new_tokens = list(range(len(tokenizer) - num_new_tokens, len(tokenizer)))
        model = add_lora(model, lora_args, new_tokens, training_args.seed, checkpoint)
    if training_args.fsdp:
        fsdp.check_dropout(training_args, model)
        fsdp.materialize(model)

    trainer = AlpacaTrainer(
        model=model, processing_class=tokenizer, args=training_args, contract=contract, **data_module
    )
    begin(training_args, contract)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.was_stopped_early():
        return leave()
    trainer.save_final_model(getattr(torch, training_args.save_dtype))
    finish(training_args, contract)
    if trainer.is_world_process_zero():
        plot_loss(trainer.state.log_history, Path(training_args.output_dir) / "loss.png")
        say(f"saved to {training_args.output_dir}", 0)
    leave()


if __name__ == "__main__":
    with reported("train.py"):
        train()
