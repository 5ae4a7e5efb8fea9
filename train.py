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
from dataclasses import dataclass, fields
from typing import Any

if __name__ == "__main__":
    from alpaca.common.errors import starting

    starting("train.py")

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alpaca.common.arguments import flag, parse, run_yaml
from alpaca.common.distributed import hide_progress_bars, print_rank0, shutdown
from alpaca.common.errors import UsageError, names_flags, reported
from alpaca.common.files import fingerprint
from alpaca.data.chat_template import set_chat_template
from alpaca.data.prompts import PROMPT_DICT, check_eval_size, format_prompt, load_prompt_template
from alpaca.data.report import report, text_problems
from alpaca.data.rows import Data, read_data
from alpaca.data.tokenization import IGNORE_INDEX as IGNORE_INDEX
from alpaca.data.tokenization import (
    DataCollatorForSupervisedDataset,
    Ragged,
    cached_tokens,
    cut,
    encode,
    joined,
    make_tokens,
    starts_with,
)
from alpaca.data.tokenization import tokenize_each as _tokenize_fn  # noqa: F401  (2023's name, for who imports it)
from alpaca.data.tokenizer import SPECIAL_TOKENS, control_tokens, identity, to_save
from alpaca.models import deepspeed, fsdp
from alpaca.models.embeddings import resize_embeddings, vocabulary_size
from alpaca.models.load import base_slow_files, load_tokenizer, make_model
from alpaca.models.lora import LoraArguments
from alpaca.training import legacy_flags, stop
from alpaca.training.checkpoint import find_checkpoint
from alpaca.training.metrics import names_trackers
from alpaca.training.model_card import summary
from alpaca.training.preflight import (
    check_combinations,
    check_command_line,
    check_evaluation,
    check_flags,
    check_is_model,
    prepare_run,
)
from alpaca.training.resume import mark_finished, mark_started
from alpaca.training.trainer import AlpacaTrainer

TOKENS_VERSION = 3  # raise it when `preprocess` changes, so that no old cache is read
DEFAULT_PAD_TOKEN, DEFAULT_EOS_TOKEN, DEFAULT_BOS_TOKEN, DEFAULT_UNK_TOKEN = SPECIAL_TOKENS.values()


# ---- flags ----


@dataclass
class ModelArguments:
    _argument_group_name = "model"
    model_name_or_path: str | None = flag(
        "facebook/opt-125m", "Folder or hub id of the model to train, with its tokenizer."
    )
    attn_implementation: str | None = flag(
        None, "Attention implementation: eager, sdpa, flash_attention_2, ...; omit it for the model's own choice."
    )
    pad_token: str | None = flag(
        None,
        "Pad with this existing token, in place of the tokenizer's pad token, or of adding [PAD] where it has none.",
    )
    add_missing_tokens: bool | None = flag(
        None,
        "Add the pad, eos, bos and unk tokens that are missing. By default it does, as in 2023, but not with --lora_r.",
        nargs="?",
        const=True,
    )


@dataclass
class DataArguments:
    _argument_group_name = "data"
    _renamed = {"guanaco_turns": "turns"}
    data_path: str = flag(
        None,
        "Rows or conversations to train on: .json, .jsonl, .csv, .tsv, .parquet, a folder of the datasets library, or "
        "a hub id. docs/data.md lists the layouts that are recognised.",
    )
    columns: str | None = flag(None, "Which column is what: instruction=prompt,input=context,output=response.")
    eval_data_path: str | None = flag(None, "Rows to evaluate on when --eval_strategy is steps or epoch.")
    eval_size: float | None = flag(
        None, "In its place, share (0.05) or number of the rows to hold out, drawn by --seed."
    )
    data_split: str = flag("train", "Split of a hub dataset or a datasets folder, such as train or train[:1000].")
    prompt_template: str | None = flag(
        None, "JSON file with prompt_input and prompt_no_input; omit it for Alpaca's two prompts."
    )
    prompt_boundary: str = flag(
        "stanford",
        "stanford: prompt and answer are tokenized as one text; an answer whose first character merges with the "
        "prompt's last token loses it to the mask. split: tokenized apart, as generation sees them.",
        choices=["stanford", "split"],
    )
    turns: str = flag(
        "first",
        "Pairs of a conversation that become rows: the first, or all or the last with what came before.",
        choices=["first", "all", "last"],
    )
    backward: bool = flag(False, "Learn the instruction, with its input, from the output, with a prompt for that.")

    def check(self) -> None:
        """Raise UsageError without rows to train on; called for a command line."""
        if not self.data_path:
            raise UsageError("--data_path is missing: a file of rows (alpaca_data.json) or a hub id (tatsu-lab/alpaca)")
        if self.eval_size is not None:
            check_eval_size(self.eval_size)
            if self.eval_data_path:
                problem = "--eval_data_path has the rows already; drop one of them"
                raise UsageError(f"--eval_size {self.eval_size:g}: {problem}")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    _argument_group_name = "training (ours first, then every flag of transformers.TrainingArguments)"
    cache_dir: str | None = flag(None, "Folder for downloads and tokenized data.")
    model_max_length: int = flag(512, "Maximum sequence length in tokens. Longer rows are cut on the right.")
    batching: str = flag(
        "packed",
        "packed: the rows of an optimizer step are laid end to end, without padding, each seeing only itself. padded: "
        "micro-batches of --per_device_train_batch_size rows, padded to the longest, as in 2023.",
        choices=["packed", "padded"],
    )
    max_tokens_per_pack: str = flag(
        "auto",
        "Most tokens of a pack; a longer row makes its own. auto takes as many as the memory estimate allows.",
    )
    share_prefix: bool = flag(True, "Compute the template's beginning, which rows of a pack share, once per pack.")
    gradient_checkpointing: bool | None = flag(
        None,
        "Compute activations again in the backward pass: slower, far less memory. By default only where the memory "
        "estimate asks for it.",
        nargs="?",
        const=True,
    )
    hold_gradients: bool | None = flag(
        None, "Under FSDP, reduce gradients once a step and not after every pack.", nargs="?", const=True
    )
    save_dtype: str = flag(
        "float32",
        "Dtype of the final model. bfloat16 halves it, right before publishing. Checkpoints stay float32.",
        choices=["float32", "bfloat16", "float16"],
    )
    loss_normalization: str | None = flag(
        None,
        "token: mean over all target tokens of the optimizer step. microbatch: 2023's mean over the means of the "
        "micro-batches. By default token, with --reproduce_2023 microbatch.",
        choices=["token", "microbatch"],
    )
    linear_cross_entropy: bool = flag(False, "Never hold all logits of a micro-batch; for large vocabularies.")
    reproduce_2023: bool = flag(
        False,
        "The run of 2023's train.py (transformers 4.28.1) for the same flags, step by step: its rows, micro-batches, "
        "number of steps and loss, packed or padded.",
    )
    overwrite_output_dir: bool = flag(
        False, "Train from the start in a folder that already holds a run, but no checkpoint-N any more."
    )

    def __post_init__(self):
        check_combinations(self)
        if self.deepspeed:
            deepspeed.configure(self)
        if self.fsdp:
            fsdp.configure_fsdp(self)
        if self.use_cpu and "LOCAL_RANK" in os.environ and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=self.ddp_timeout_delta)  # transformers drops it on CPU
        new_name = getattr(self, "activation_checkpointing", None)  # of transformers 5.18 and later
        recompute = self.activation_checkpointing = self.gradient_checkpointing if new_name is None else new_name
        super().__post_init__()
        check_flags(self)
        self.gradient_checkpointing = recompute  # None, which transformers makes False: check_before_loading decides
        self.logging_nan_inf_filter = False  # it would wait for the device in every step; NonFiniteGuard looks anyway
        if self.fsdp and (policy := fsdp.mixed_precision_policy(self.mixed_precision)):
            self.fsdp_plugin_args["mixed_precision_policy"] = policy
        if self.deepspeed:
            deepspeed.check_agreement(self)


def parse_flags(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, LoraArguments, TrainingArguments]:
    """Return the dataclasses of a command line of 2023 or of today; see alpaca/training/legacy_flags.py."""
    classes, given = (ModelArguments, DataArguments, LoraArguments, TrainingArguments), {}
    hidden = {*legacy_flags.HIDDEN, "hold_gradients"}  # the memory estimate decides it
    (model_args, data_args, lora_args, training_args), notes = parse(
        argv, classes, __doc__, "train.py", legacy_flags.translate_legacy_flags, legacy_flags.adapt, hidden, given=given
    )
    check_command_line(given, lora_args, training_args)
    training_args.run_yaml = run_yaml(given, training_args.world_size)
    if model_args.add_missing_tokens is None:
        model_args.add_missing_tokens = not lora_args
    if training_args.n_gpu > 1:
        training_args._n_gpu = 1
        notes.append("several GPUs, one process -> the first GPU is used; torchrun --nproc_per_node=N takes N")
    for note in notes:
        print_rank0(f"flag: {note}", training_args.process_index)
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
        As alpaca.data.tokenization.make_tokens: input_ids, labels, lengths, num_targets, and problems as in
        alpaca/data/report.py.
    """
    eos, limit = tokenizer.eos_token, tokenizer.model_max_length
    ends = np.array([bool(eos) and target.endswith(eos) for target in targets], dtype=bool)
    answers = [target.removesuffix(eos or "") for target in targets]
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
    """Rows of `data_path` as token ids and labels, tokenized once and cached, with a report."""

    def __init__(
        self,
        data_path: str,
        tokenizer: PreTrainedTokenizerBase,
        templates: Mapping[str, str] = PROMPT_DICT,
        prompt_boundary: str = "stanford",
        split: str = "train",
        cache_dir: str | None = None,
        data: Data | None = None,  # of `data_path`, where it has been read
        **reading: Any,  # as alpaca.data.rows.read_data takes it
    ):
        data = data or read_data(data_path, split, cache_dir, **reading)
        rows = data.rows
        sources = [format_prompt(row, templates) for row in rows]
        targets = [f"{row['output']}{tokenizer.eos_token}" for row in rows]
        key = fingerprint(sources, targets, prompt_boundary, identity(tokenizer), TOKENS_VERSION)
        tokens = cached_tokens(key, lambda: preprocess(sources, targets, tokenizer, prompt_boundary), cache_dir)
        self.input_ids, self.labels = tokens["input_ids"], tokens["labels"]  # lists of (length,) int64 tensors
        self.lengths, self.num_targets = tokens["lengths"], tokens["num_targets"]  # (rows,) int64 arrays
        self.templates = templates
        self.data_fingerprint, self.template_fingerprint = data.fingerprint(), fingerprint(templates)
        self.report = report(data_path, tokens, text_problems(rows, templates, control_tokens(tokenizer)), data)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return dict(input_ids=self.input_ids[i], labels=self.labels[i])


def make_supervised_data_module(
    tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, cache_dir: str | None = None, seed: int = 42
) -> dict[str, Any]:
    """Return train_dataset, eval_dataset (None without --eval_data_path or --eval_size) and data_collator, as the
    Trainer takes them. `data_args` may be any object with a data_path; what else it lacks is as by default."""
    given = {field.name: getattr(data_args, field.name, field.default) for field in fields(DataArguments)}
    data_args = DataArguments(**given)
    data_args.check()
    templates = load_prompt_template(data_args.prompt_template, data_args.backward)
    reading = {name: getattr(data_args, name) for name in ("turns", "backward", "columns")}

    def dataset(path: str, data: Data) -> SupervisedDataset:
        return SupervisedDataset(path, tokenizer, templates, data_args.prompt_boundary, cache_dir=cache_dir, data=data)

    path, eval_path = data_args.data_path, data_args.eval_data_path
    data, held_out = read_data(path, data_args.data_split, cache_dir, **reading), None
    if data_args.eval_size is not None:
        data, held_out = data.hold_out(data_args.eval_size, seed)
        path, eval_path = f"{path} (to train on)", f"{path} (held out by seed {seed})"
    elif eval_path:
        held_out = read_data(eval_path, "train", cache_dir, **reading)
    return dict(
        train_dataset=dataset(path, data),
        eval_dataset=dataset(eval_path, held_out) if held_out else None,
        data_collator=DataCollatorForSupervisedDataset(tokenizer),
    )


# ---- tokenizer and model ----


def smart_tokenizer_and_embedding_resize(
    special_tokens_dict: dict[str, str], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> None:
    """Add special tokens to `tokenizer` and make `model` fit, as in 2023."""
    num_new_tokens = tokenizer.add_special_tokens(special_tokens_dict)
    resize_embeddings(model, num_new_tokens, vocabulary_size(tokenizer))


def safe_save_model_for_hf_trainer(trainer: transformers.Trainer, output_dir: str) -> None:
    """Save the model of a trainer, gathered where it is sharded; of 2023, for code that imports it."""
    trainer.save_model(output_dir)


# ---- the run ----


def train(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv` (default: this process's)."""
    with stop.watching():
        run(*parse_flags(sys.argv[1:] if argv is None else argv))


@names_flags
@names_trackers
def run(
    model_args: ModelArguments, data_args: DataArguments, lora_args: LoraArguments, training_args: TrainingArguments
) -> None:
    """Train as the flags say."""
    hide_progress_bars(training_args)
    transformers.set_seed(training_args.seed)
    check_evaluation(training_args, data_args.eval_data_path, data_args.eval_size)
    checkpoint = find_checkpoint(training_args)

    check_is_model(model_args.model_name_or_path)
    tokenizer, num_new_tokens = load_tokenizer(model_args, training_args)
    data_module = make_supervised_data_module(tokenizer, data_args, training_args.cache_dir, training_args.seed)
    set_chat_template(tokenizer, data_module["train_dataset"].templates, training_args.process_index)
    run_fingerprint = prepare_run(model_args, data_args, lora_args, training_args, tokenizer, data_module, checkpoint)
    if run_fingerprint is None:
        return shutdown()

    model = make_model(model_args, training_args, lora_args, tokenizer, num_new_tokens, checkpoint)
    trainer = AlpacaTrainer(
        model=model,
        processing_class=to_save(tokenizer),
        args=training_args,
        run_fingerprint=run_fingerprint,
        flags={**vars(model_args), **vars(data_args)},
        slow_files=base_slow_files(tokenizer, training_args),
        **data_module,
    )
    mark_started(training_args, run_fingerprint)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.stop.agreed:
        trainer.stop.end(training_args, trainer.state)
    trainer.save_final_model()
    trainer.create_model_card()
    mark_finished(training_args, run_fingerprint)
    print_rank0(summary(trainer, data_args.backward), training_args.process_index)
    shutdown()


if __name__ == "__main__":
    with reported("train.py"):
        train()
