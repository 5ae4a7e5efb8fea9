"""Hugging Face's Trainer with six things of our own: the rows of a step are packed, rows are never repeated to fill a
batch, the loss can be normalized as in 2023 or as today, a loss that is not finite stops the run, FSDP shards on CPU
ranks too, and what is saved is always a plain checkpoint that `from_pretrained` reads, whole or not there."""

import functools
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_pt_utils import get_parameter_names
from transformers.trainer_utils import speed_metrics

from alpaca.common.distributed import print_rank0
from alpaca.common.files import share_weights
from alpaca.data.prompts import save_templates
from alpaca.data.tokenizer import save_slow_files
from alpaca.models import deepspeed, fsdp
from alpaca.models.compile import compile_layers, explained, repeated_layers
from alpaca.models.fsdp import full_state_dict, load_resharded_optimizer, save_sharded_optimizer, shard_on_cpu
from alpaca.packing.attention import PackLayout, named_kernel, packed_attention_enabled
from alpaca.packing.check import select_packing, verify_packing
from alpaca.packing.loss import LinearHead, batch_loss, sum_of_losses
from alpaca.packing.packing import MicroBatch, PackedBatchDataset, StepTotals, active_dropout, measure_rows
from alpaca.packing.sampler import OneStepAhead, Steps2023, StepSampler, StepSampler2023, make_loader, sampler_seed
from alpaca.training.checkpoint import (
    SaveOnlyWhenAsked,
    _caching_config,
    atomic_checkpoint_dir,
    delete_old_checkpoints,
    retry_while_disk_full,
)
from alpaca.training.metrics import ConsoleCallback, LossTracker, SpeedMeter, plot_loss
from alpaca.training.model_card import write_model_card
from alpaca.training.nonfinite import NonFiniteGuard
from alpaca.training.resume import follow_schedule
from alpaca.training.stop import StopCallback

FP16_SCALE = 1024  # of the loss: the scaler's own first guess makes gradients infinite
# What is overridden of transformers' Trainer although its documentation does not offer it. Another release may change
# any of these: tests/training/test_trainer.py names their signatures.
PRIVATE_HOOKS = (
    ("_run_epoch", "Compare packed rows with padded ones once; take no step beyond the last; count 2023's epochs."),
    ("_get_grad_norm", "Hand the norm to the guard against values that are not finite, before the optimizer steps."),
    ("_track_num_input_tokens", "Count tokens from the plan of the step, without waiting for the device."),
    ("_maybe_log_save_evaluate", "Log what the guard has read; the Trainer would wait for the device once more."),
    ("_save_checkpoint", "Give the name checkpoint-N only to a whole checkpoint, and delete older ones after that."),
    ("_save", "Wait for room on the disk for the final model; save prompts and slow tokenizer files with every model."),
    ("_save_optimizer_and_scheduler", "Under FSDP save the optimizer only: the weights are saved whole beside it."),
    ("_load_optimizer_and_scheduler", "Load an optimizer also where only one of the two runs, then and now, has FSDP."),
    ("_prepare_input", "Copy pinned micro-batches to the GPU without waiting; keep weights of the loss in float32."),
    ("_init_training_state", "Let a resumed run save, log and evaluate as often as its own flags say."),
    ("_load_from_checkpoint", "Do nothing: train.py has read the weights of the checkpoint in place of the base's."),
)


class AlpacaTrainer(Trainer):
    """Loss per optimizer step, over the micro-batches m of all ranks, with targets t and log-probabilities:

        token (today's Trainer):  sum over all t of -log p(t)  /  number of t in the step
        microbatch (2023):        mean over m of (sum over t in m of -log p(t)  /  number of t in m)

    where m are 2023's micro-batches, of `per_device_train_batch_size` rows, also if rows are packed. A micro-batch
    without a target (2023: NaN) counts in neither. --reproduce_2023 divides by the number that a step can have, as 2023
    did, not by how many there are.
    """

    def __init__(
        self,
        run_fingerprint: dict[str, Any] | None = None,
        flags: Mapping[str, Any] | None = None,
        slow_files: Mapping[str, bytes] | None = None,
        **kwargs: Any,
    ):
        """`run_fingerprint` (of resume.py) is kept with every checkpoint; `flags` are those of model and data, for the
        model card; `slow_files` (alpaca/data/tokenizer.py) are saved with the tokenizer."""
        super().__init__(**kwargs)
        self.run_fingerprint = run_fingerprint or {}
        self.flags = flags
        self.slow_files = slow_files
        self.started_at = 0  # the step from which this process trains
        if hasattr(self.model, "create_or_update_model_card"):
            self.model.create_or_update_model_card = lambda folder: None  # peft would alter a README.md of the user's
        self.losses = LossTracker()
        self.stop = StopCallback()
        self.nonfinite_guard = NonFiniteGuard(self.train_dataset, self.processing_class, self.losses, self.stop)
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        for callback in (self.nonfinite_guard, ConsoleCallback, SaveOnlyWhenAsked, self.stop):
            self.add_callback(callback)
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
        self.speed = SpeedMeter(self.model, self.args.device, dtype, self.args.world_size)
        self.pack_kernel = named_kernel(self.model.config)
        self.head = LinearHead.of(self.model, dtype) if self.args.linear_cross_entropy else None
        self._step: StepTotals | None = None
        self.ahead = OneStepAhead()
        self._packing_checked = False
        self.run_2023: Steps2023 | None = None  # with --reproduce_2023
        if self.args.reproduce_2023 and (dropout := active_dropout(self.model)):
            reason = f"the run cannot equal that of 2023, as dropout ({', '.join(dropout[:3])}) is drawn anew"
            print_rank0(f"note: --reproduce_2023: {reason}", self.args.process_index)
        if self.args.torch_compile:
            compile_layers(self.model, self.args)

    def create_accelerator_and_postprocess(self) -> None:
        args, on_cpu = self.args, self.args.fsdp and self.args.device.type == "cpu"
        backend, args.torch_compile_backend = args.torch_compile_backend, "no"  # it would compile the model as a whole
        mesh = args.parallelism_config
        args.parallelism_config = None if on_cpu else mesh  # accelerate refuses it there
        super().create_accelerator_and_postprocess()
        args.torch_compile_backend = backend
        if args.gradient_checkpointing:  # autocast's cache would keep a copy of every weight through the forward pass
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        if on_cpu:
            shard_on_cpu(self, mesh)
        if self.is_deepspeed_enabled:
            deepspeed.attach(self)

    # ---- rows ----

    def get_train_dataloader(self) -> DataLoader:
        args, dataset = self.args, self.train_dataset
        sizes = measure_rows(dataset)
        seed = args.seed if args.data_seed is None else args.data_seed
        options = dict(
            batch_size=self._train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            world_size=args.world_size,
            rank=args.process_index,
            drop_last=args.dataloader_drop_last,
            packing=select_packing(self.model, args, dataset, sizes),
        )
        if args.reproduce_2023:
            sampler = StepSampler2023(sizes, seed=sampler_seed(args.seed, args.data_seed, args.world_size), **options)
            self.run_2023 = sampler.run
        else:
            sampler = StepSampler(
                sizes,
                seed=None if args.train_sampling_strategy == "sequential" else seed,
                normalization=args.loss_normalization,
                group_by_length=args.train_sampling_strategy == "group_by_length",
                **options,
            )
        return make_loader(args, dataset, self.data_collator, sampler)

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        args, dataset = self.args, self.eval_dataset if eval_dataset is None else eval_dataset
        sampler = StepSampler(
            measure_rows(dataset),
            args.eval_batch_size,
            world_size=args.world_size,
            rank=args.process_index,
            normalization="sum",
        )
        return make_loader(args, dataset, self.data_collator, sampler)

    # ---- steps ----

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Let norms that are no LayerNorm, LLaMA's, decay as well, as they did in 2023."""
        if not self.args.reproduce_2023:
            return super().get_decay_parameter_names(model)
        return [name for name in get_parameter_names(model, [nn.LayerNorm]) if "bias" not in name]

    def _run_epoch(self, train_dataloader: DataLoader, epoch: int, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self.run_2023:
            steps = len(self.run_2023.of_epoch(epoch))
            lists = steps * self.args.gradient_accumulation_steps
            kwargs |= dict(num_update_steps_per_epoch=steps, steps_in_epoch=lists)
        with explained(self.args):
            if not self._packing_checked:
                gradient_of = functools.partial(self.gradient_of, train_dataloader.dataset)
                verify_packing(train_dataloader, self.args, self.model, gradient_of)
                self._packing_checked = True
            super()._run_epoch(train_dataloader=train_dataloader, epoch=epoch, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """Return all micro-batches of an optimizer step in place of the Trainer's last one, and nothing in place of the
        others: how many there are is not its business."""
        micro_steps = self.ahead.take(epoch_iterator, num_batches)
        batches = [batch for micro_step in micro_steps for batch in micro_step]
        self._step = [batch.pop("step") for batch in batches][0]
        self.nonfinite_guard.begin_step([batch.pop("rows") for batch in batches])
        self.speed.begin_step(self._step)
        return [[]] * (len(micro_steps) - 1) + [batches], None

    def training_step(self, model: nn.Module, inputs: list[dict[str, Any]], num_items_in_batch: None = None) -> Tensor:
        """Run the passes of each micro-batch in `inputs`. Return what, averaged over the ranks, is the step's loss."""
        self.current_gradient_accumulation_steps = 1  # the Trainer divides by it; the weights have done that
        total = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(inputs):
            last = number == len(inputs) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)  # DeepSpeed takes its step then
            with self._reduction(model, last), packed_attention_enabled(self.model.config, batch):
                loss = super().training_step(model, batch)
            self.nonfinite_guard.losses.append(loss)
            total += loss
        return total

    def gradient_of(self, dataset: PackedBatchDataset, batches: list[MicroBatch]) -> list[Tensor]:
        """Return this rank's part of the gradient of `batches` by the tensors of the first decoder layer that is
        trained, which the gradient reaches through those behind it."""
        model = self.model_wrapped
        model.train(not active_dropout(self.model))
        for number, planned in enumerate(batches):
            batch = self._prepare_inputs(dataset.inputs(planned))
            with packed_attention_enabled(self.model.config, batch), self.compute_loss_context_manager():
                loss = self.compute_loss(model, batch)
                if self.is_deepspeed_enabled:
                    deepspeed.backward(model, loss, last=number == len(batches) - 1)
                else:
                    (loss * FP16_SCALE if self.args.fp16 else loss).backward()
        parts = (*repeated_layers(self.model), self.model)
        trained = ([g for p in part.parameters() if (g := deepspeed.gradient(p)) is not None] for part in parts)
        gradients = next(filter(None, trained), [])
        gradients = [(g.to_local() if isinstance(g, DTensor) else g).detach().clone() for g in gradients]
        (model.optimizer if self.is_deepspeed_enabled else model).zero_grad()
        return gradients

    def _reduction(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """Reduce gradients over the ranks after the last micro-batch of a step. Under FSDP that is done after each, so
        that they stay sharded, unless they are held."""
        if self.is_fsdp_enabled:
            model.set_requires_gradient_sync(last or not self.args.hold_gradients)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(model)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Return this micro-batch's share of the step's loss, times the ranks over which gradients are averaged."""
        loss, of_targets = batch_loss(model, inputs, self.args.label_smoothing_factor, self.pack_kernel, self.head)
        self.nonfinite_guard.target_losses.append(of_targets)
        return loss * self.args.world_size

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        self.ahead.fetch()  # before the guard waits for the device
        self.nonfinite_guard.grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.nonfinite_guard.grad_norm

    def floating_point_ops(self, inputs: list[dict[str, Any]]) -> float:
        return self.speed.flops(self._step) if inputs else 0.0

    def _track_num_input_tokens(self, inputs: list[dict[str, Any]]) -> None:
        if inputs and self.args.include_num_input_tokens_seen != "no":
            padding = self._step.padding if self.args.include_num_input_tokens_seen == "all" else 0
            self.state.num_input_tokens_seen += self._step.tokens + padding

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        if self.run_2023:
            self.state.epoch = self.run_2023.end(self.state.global_step) / self.run_2023.micro_batches
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            loss_sum, logs = self.losses.read()
            rate = kwargs.get("learning_rate")
            logs["learning_rate"] = self._get_learning_rate() if rate is None else rate
            tr_loss.zero_()
            self._total_loss_scalar += loss_sum
            self._globalstep_last_logged = self.state.global_step
            self.store_flos()
            self.log({**logs, **self.speed.read()})
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the mean cross entropy per target token of the evaluation rows. A rank gathers two numbers only."""
        start = time.time()
        loader = self.get_eval_dataloader(eval_dataset)
        batches = (batch for micro_step in loader for batch in micro_step)
        with self.speed.paused():
            total = sum_of_losses(self.model_wrapped, batches, self._prepare_inputs, self.head)
        total = total.to(self.args.device, torch.float32 if self.args.device.type == "mps" else torch.float64)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(total)
        loss_sum, targets = total.tolist()
        metrics = {f"{metric_key_prefix}_loss": loss_sum / max(targets, 1)}
        metrics.update(speed_metrics(metric_key_prefix, start, num_samples=len(loader.dataset)))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- saving and resuming ----

    def save_model(
        self, output_dir: str | None = None, _internal_call: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        """Save the model; from DeepSpeed's master weights in `dtype`, else in the model's own."""
        with _caching_config(self.model):
            if self.is_deepspeed_enabled:
                state = deepspeed.full_state_dict(self.model, self.args.should_save, dtype)
                self._save(output_dir, state_dict=state)
                if self.args.should_save:  # else it names the dtype that DeepSpeed computes in
                    self.model.config.dtype = dtype
                    self.model.config.save_pretrained(output_dir or self.args.output_dir)
            elif self.is_fsdp_enabled:
                self._save(output_dir, state_dict=full_state_dict(self.model, keep=self.args.should_save))
            else:
                return super().save_model(output_dir, _internal_call)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        args, state = self.args, self.state
        output = Path(args.output_dir)
        self.store_flos()
        self.nonfinite_guard.check_weights(self.model, args, state)
        if state.best_global_step:
            state.best_model_checkpoint = str(output / f"checkpoint-{state.best_global_step}")
        whole = atomic_checkpoint_dir(output, state.global_step, self.run_fingerprint, args.process_index)
        with self.speed.paused(), whole as folder:
            self.save_model(folder, _internal_call=True)
            if not args.save_only_model:
                self._save_optimizer_and_scheduler(folder)
                self._save_scaler(folder)
                self._save_rng_state(folder)
            if args.should_save:
                state.save_to_json(os.path.join(folder, "trainer_state.json"))
        if args.push_to_hub:
            self._push_from_checkpoint(str(output / f"checkpoint-{state.global_step}"))
        if args.should_save:
            keep = {f"checkpoint-{state.global_step}", Path(state.best_model_checkpoint or "").name}
            delete_old_checkpoints(output, args.save_total_limit, keep)

    def save_final_model(self) -> None:
        """Write the trained model to `output_dir` in `save_dtype`, then trainer_state.json. Last act: the float32
        weights are cast in place."""
        dtype = getattr(torch, self.args.save_dtype)
        cast = dtype != torch.float32 and not self.is_deepspeed_enabled
        for module in self.model.modules() if cast else ():
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):  # not LoRA's base
                module.to(dtype)
        self.nonfinite_guard.check_weights(self.model, self.args, self.state, final=True)
        self.save_model(dtype=dtype)
        retry_while_disk_full(self.save_state, self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = output_dir or self.args.output_dir

        def write() -> None:
            super(AlpacaTrainer, self)._save(folder, state_dict)
            if not self.args.should_save:
                return
            share_weights(folder)
            if templates := getattr(self.train_dataset, "templates", None):
                save_templates(templates, folder)
            if self.slow_files:
                save_slow_files(self.processing_class, self.slow_files, folder)

        return retry_while_disk_full(write, folder) if Path(folder) == Path(self.args.output_dir) else write()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write loss.png and README.md, ours in place of the Trainer's, also where it uploads the model."""
        if self.is_world_process_zero():
            plot_loss(self.state.log_history, Path(self.args.output_dir) / "loss.png")
            write_model_card(self, self.flags)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled or self.args.save_only_model:
            return super()._save_optimizer_and_scheduler(output_dir)
        save_sharded_optimizer(self.accelerator, self.model, self.optimizer, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    @fsdp.plain_pickles()
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_fsdp_enabled == os.path.isdir(os.path.join(checkpoint, "optimizer_0")):
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            load_resharded_optimizer(self.model, self.optimizer.optimizer, checkpoint)
            scheduler = torch.load(os.path.join(checkpoint, "scheduler.pt"), weights_only=True)
            self.lr_scheduler.load_state_dict(scheduler)
        if checkpoint is not None:
            follow_schedule(self.lr_scheduler)

    def _prepare_input(self, data: Any) -> Any:
        if isinstance(data, (Tensor, PackLayout)):  # for DeepSpeed, the Trainer would round the weights of the loss
            pinned = isinstance(data, PackLayout) or (data.device.type == "cpu" and data.is_pinned())
            return data.to(self.args.device, non_blocking=pinned)
        return super()._prepare_input(data)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        progress = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        self.started_at = done = self.state.global_step
        if not self.run_2023:
            return progress
        epoch, steps = self.run_2023.position(done)
        return epoch, 0 if self.args.ignore_data_skip else steps * self.args.gradient_accumulation_steps

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        pass
