"""Hugging Face's Trainer with five things of our own: rows are never repeated to fill a batch, the loss can be
normalized as in 2023 or as today, a loss that is not finite stops the run, FSDP shards on CPU ranks too, and what is
saved is always a plain checkpoint that `from_pretrained` reads, whole or not there."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import speed_metrics

from alpaca.batching import StepLoader, StepSampler
from alpaca.blackbox import BlackBox, NumberedRows, numbered
from alpaca.checkpoints import delete_old_checkpoints, load_optimizer_of_other_layout, write_patiently, written_whole
from alpaca.console import ConsoleCallback, say
from alpaca.fsdp import full_state_dict, shard_on_cpu
from alpaca.tokens import IGNORE_INDEX


def target_mask(labels: Tensor) -> Tensor:
    """Which positions are predicted: (B, T) labels -> (B, T - 1) bool. Position 0 has nothing before it."""
    return labels[:, 1:] != IGNORE_INDEX


class AlpacaTrainer(Trainer):
    """Loss per optimizer step, over the micro-batches m of all ranks, with targets t and log-probabilities:

        token (today's Trainer):  sum over all t of -log p(t)  /  number of t in the step
        microbatch (2023):        mean over m of (sum over t in m of -log p(t)  /  number of t in m)

    A micro-batch without a target (2023: NaN) counts in neither.
    """

    def __init__(self, contract: dict[str, Any] | None = None, **kwargs):
        """`contract` (alpaca/contract.py) is kept with every checkpoint."""
        super().__init__(compute_loss_func=self.step_loss, **kwargs)
        self.contract, self.black_box = contract or {}, BlackBox(self.processing_class)
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(self.black_box)
        self.add_callback(ConsoleCallback)
        self.add_callback(SaveOnlyWhenAsked)
        self._tokens_seen = torch.zeros((), dtype=torch.int64, device=self.args.device)
        self._last_log: tuple[int, float] | None = None  # tokens seen and time, from the first step on

    def create_accelerator_and_postprocess(self) -> None:
        if not (self.args.fsdp and self.args.device.type == "cpu"):
            return super().create_accelerator_and_postprocess()
        mesh, self.args.parallelism_config = self.args.parallelism_config, None  # accelerate refuses it on a CPU
        super().create_accelerator_and_postprocess()
        shard_on_cpu(self, mesh)

    # ---- rows ----

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        if args.train_sampling_strategy not in ("random", "sequential"):
            note = f"note: {args.train_sampling_strategy} trains some rows twice in an epoch, to fill the last batch"
            say(f"{note}; a resumed run may see the rows of an epoch in another order", args.process_index)
            return super().get_train_dataloader()
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler = StepSampler(
            num_rows=len(self.train_dataset),
            batch_size=self._train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            world_size=args.world_size,
            rank=args.process_index,
            seed=seed if args.train_sampling_strategy == "random" else None,
            drop_last=args.dataloader_drop_last,
        )
        return self._loader(NumberedRows(self.train_dataset), sampler, numbered(self.data_collator))

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        args, dataset = self.args, self.eval_dataset if eval_dataset is None else eval_dataset
        sampler = StepSampler(len(dataset), args.eval_batch_size, 1, args.world_size, args.process_index)
        return self._loader(dataset, sampler, self.data_collator)

    def _loader(self, dataset: Dataset, sampler: StepSampler, collate: Callable) -> DataLoader:
        args = self.args
        return StepLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order if args.dataloader_num_workers else True,
            multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),
        )

    # ---- loss ----

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """The micro-batches of one optimizer step and what their losses are divided by, summed over all ranks:
        targets (`token`) or micro-batches that have one (`microbatch`). One small reduction a step, no host sync."""
        self._last_log = self._last_log or (0, time.time())
        batches = list(islice(epoch_iterator, num_batches))
        self.black_box.begin_step(batches)
        targets = [int(target_mask(batch["labels"]).sum()) for batch in batches]
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        counts = torch.tensor([sum(targets), sum(n > 0 for n in targets), tokens], pin_memory=device.type == "cuda")
        counts = counts.to(device, non_blocking=True)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(counts)
        self._tokens_seen += counts[2]
        divisor = counts[0] if self.args.loss_normalization == "token" else counts[1]
        return batches, divisor.clamp(min=1)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.black_box.losses.append(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        self.black_box.grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.black_box.grad_norm

    def step_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        """This micro-batch's share of the step's loss: `outputs.logits` (B, T, V), `labels` (B, T) -> scalar.
        `num_items_in_batch` is the divisor of `get_batch_samples`."""
        loss = self._summed_loss(outputs.logits, labels)
        if self.args.loss_normalization == "microbatch":
            loss = loss / target_mask(labels).sum().clamp(min=1)
        return loss / num_items_in_batch

    def _summed_loss(self, logits: Tensor, labels: Tensor, label_smoothing: float | None = None) -> Tensor:
        """Sum of the cross entropies in float32. Shifting the labels, not the logits, saves a copy of the logits."""
        shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        if label_smoothing is None:
            label_smoothing = self.args.label_smoothing_factor
        return F.cross_entropy(
            logits.flatten(0, 1).float(),
            shifted.flatten().to(logits.device),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
            label_smoothing=label_smoothing,
        )

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean cross entropy per target token of the evaluation rows. Only two numbers a rank are gathered."""
        start, model = time.time(), self.model_wrapped
        loader = self.get_eval_dataloader(eval_dataset)
        total = torch.zeros(2, dtype=torch.float64, device="cpu")  # summed loss, targets
        model.eval()
        with torch.no_grad():
            for batch in loader:
                batch = self._prepare_inputs(batch)
                labels = batch.pop("labels")
                loss = self._summed_loss(model(**batch).logits, labels, label_smoothing=0.0)
                total += torch.stack([loss, target_mask(labels).sum()]).cpu()
        total = total.to(self.args.device, torch.float32 if self.args.device.type == "mps" else torch.float64)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(total)
        loss_sum, targets = total.tolist()
        metrics = {f"{metric_key_prefix}_loss": loss_sum / max(targets, 1)}
        metrics.update(speed_metrics(metric_key_prefix, start, num_samples=len(loader.dataset)))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds `tokens_per_second` since the last log line: real tokens of all ranks, padding not counted."""
        if "loss" in logs:
            (seen, then), now = self._last_log, time.time()
            self._last_log = (int(self._tokens_seen), now)
            logs["tokens_per_second"] = round((self._last_log[0] - seen) / max(now - then, 1e-9), 1)
        super().log(logs, start_time)

    # ---- saving and resuming ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with _caching_config(self.model):
            if not self.is_fsdp_enabled:
                return super().save_model(output_dir, _internal_call)
            self._save(output_dir, state_dict=full_state_dict(self.model, keep=self.args.should_save))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer does, but what is called checkpoint-N is whole, and older ones go only then."""
        args, state, output = self.args, self.state, Path(self.args.output_dir)
        self.store_flos()
        if state.best_global_step:
            state.best_model_checkpoint = str(output / f"checkpoint-{state.best_global_step}")
        with written_whole(output, state.global_step, self.contract, args.process_index) as folder:
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

    def was_stopped_early(self) -> bool:
        """Whether something ended the training before its last step (--enable_jit_checkpoint does on SIGTERM); says so.
        Such a run has no final model."""
        step, steps = self.state.global_step, self.state.max_steps
        if step < steps:
            say(f"stopped at step {step} of {steps}; --resume_from_checkpoint True continues", self.args.process_index)
        return step < steps

    def save_final_model(self, dtype: torch.dtype) -> None:
        """Write the trained model to `output_dir` in `dtype`, then trainer_state.json. Last act: the float32 weights
        are cast in place."""
        if dtype != torch.float32:
            self.model.to(dtype)
        self.save_model()
        write_patiently(self.save_state, self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The final model waits for room on the disk: after days of training it is not given up for a full one."""
        if output_dir is None or Path(output_dir) == Path(self.args.output_dir):
            return write_patiently(
                lambda: super(AlpacaTrainer, self)._save(output_dir, state_dict), self.args.output_dir
            )
        return super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP only the optimizer is saved in shards: the weights already stand beside it, whole."""
        if not self.is_fsdp_enabled or self.args.save_only_model:
            return super()._save_optimizer_and_scheduler(output_dir)
        from accelerate.utils import save_fsdp_optimizer

        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Also an optimizer saved by FSDP where there is none now, and the other way round."""
        if checkpoint is None or self.is_fsdp_enabled == os.path.isdir(os.path.join(checkpoint, "optimizer_0")):
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer_of_other_layout(self.model, self.optimizer.optimizer, checkpoint)
        scheduler = torch.load(os.path.join(checkpoint, "scheduler.pt"), weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)

    def _prepare_input(self, data: Any) -> Any:
        """Micro-batches in pinned memory go to the GPU while the host goes on: no synchronisation for each."""
        if isinstance(data, Tensor) and data.device.type == "cpu" and data.is_pinned():
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """A resumed run saves, logs and evaluates as often as its own flags say, not those of the checkpoint."""
        progress = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return progress

    def _run_epoch(self, **kwargs: Any) -> None:
        """Not even one step where the checkpoint is of the run's last: the Trainer would look only after a step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing to do: train.py has already read the weights of the checkpoint instead of the base model's."""


class SaveOnlyWhenAsked(TrainerCallback):
    """No checkpoint for ending between two multiples of --save_steps, as in 2023: the final model is written anyway,
    and for a 7B model the optimizer beside it would take another 54 GB."""

    def on_step_end(self, args, state, control, **kwargs):
        between = not state.save_steps or state.global_step % state.save_steps
        if args.save_strategy == "steps" and between and not args.load_best_model_at_end:
            control.should_save = False


@contextmanager
def _caching_config(model: nn.Module) -> Iterator[None]:
    """Saved models generate with a cache; the Trainer has switched it off for training."""
    training_value, model.config.use_cache = model.config.use_cache, True
    try:
        yield
    finally:
        model.config.use_cache = training_value
