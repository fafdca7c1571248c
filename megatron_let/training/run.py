"""One training run: the callbacks that Megatron's loop asks for."""

import functools
import json
from argparse import Namespace
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.utils import get_attr_wrapped_model
from megatron.training import get_timers, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_let.checkpoint.finite import gathered
from megatron_let.console import say
from megatron_let.data.checked import check_loss_mask
from megatron_let.errors import UsageError
from megatron_let.methods.base import Method
from megatron_let.upstream.batch import BATCH_KEYS, Batch, drawn_batch
from megatron_let.upstream.datasets import GPTDataset
from megatron_let.upstream.loop_hooks import LoopHooks

SPIKY, SPIKY_LOSS_FACTOR = "Spiky loss", 10
"""With --check-for-spiky-loss: a loss this many times the largest so far is suspicious."""


class MicroBatches:
    """Hands each model chunk its micro-batches in their order; the method has seen them before.

    Coming ones are of this step only: Megatron may repeat a step, and saves between steps. `draw`
    gives a chunk's next micro-batch, `start_step` is called before the first of a step.
    """

    def __init__(
        self,
        args: Namespace,
        method: Method,
        draw: Callable[[Iterator[Batch], int | None], Batch],
        start_step: Callable[[], None],
    ) -> None:
        self._args = args
        self._method = method
        self._draw = draw
        self._start_step = start_step
        self._step = -1
        self._left: dict[int | None, int] = {}
        """Micro-batches that each chunk of this rank has not run yet in this step."""
        self._ahead: dict[int | None, deque[Batch]] = defaultdict(deque)
        """Micro-batches that a chunk has drawn and not run yet."""

    def next(self, data_iterator: Iterator[Batch], vp_stage: int | None) -> Batch:
        """Return the chunk's next micro-batch of a training step."""
        if self._args.curr_iteration != self._step or not any(self._left.values()):
            self._step = self._args.curr_iteration
            chunks = self._args.virtual_pipeline_model_parallel_size
            stages = [None] if chunks is None else range(chunks)
            self._left = dict.fromkeys(stages, get_num_microbatches())
            self._ahead.clear()
            self._start_step()
        ahead = self._ahead[vp_stage]
        if not ahead:
            guided = self._method.reads_batch(vp_stage)
            count = self._method.micro_batches_at_once() if guided else 1
            for _ in range(min(count, self._left[vp_stage])):
                ahead.append(self._draw(data_iterator, vp_stage))
            if guided:
                self._method.before_forward(list(ahead), vp_stage)
        self._left[vp_stage] -= 1
        return ahead.popleft()


class Run:
    """The datasets, the batches and the forward step of one run.

    `config` is Megatron's `GPTModelConfig`; `hooks` are told when the data is there.
    """

    def __init__(
        self, args: Namespace, config: Any, method: Method, hooks: LoopHooks | None = None
    ) -> None:
        self.args = args
        self.config = config.transformer
        self.method = method
        self.hooks = hooks
        self._is_alone = args.fake_process_group
        """Whether no other rank of the layout exists: what it would send never comes."""
        self._method_dataset: Any = None
        self._training_batches = MicroBatches(args, method, self.batch, self._start_step)
        self._bad_losses: torch.Tensor | int = 0

    # --- data ---------------------------------------------------------------------------------

    def build_datasets(self, num_samples: list[int], vp_stage: int | None = None) -> Any:
        """Build the three datasets; None where this rank needs none."""
        builder = BlendedMegatronDatasetBuilder(
            MockGPTDataset if self.args.mock_data else GPTDataset,
            num_samples,
            lambda: self._holds_data() and self._reads(vp_stage),
            self._dataset_config(),
        )
        try:
            built = builder.build()
        except Exception as error:
            if not isinstance(why := error.__cause__, OSError):
                raise
            raise UsageError(
                f"The indices of the data cannot be written ({why}). Give a folder that can be, "
                "with --data-cache-path."
            ) from error
        if self.args.full_validation:
            built[2] = None  # its loop over whole sets cannot take a test set
        # Of none wanted Megatron makes a blend without samples, which its loader does not take.
        return [None if data is not None and len(data) == 0 else data for data in built]

    def datasets(self, num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
        """Build the three, and tell method and hooks (`train_valid_test_datasets_provider`)."""
        train, valid, test = self.build_datasets(num_samples, vp_stage)
        if self._is_alone:  # else a rank without data waits for Megatron's first rank to say so
            self.args.do_train = not self.args.skip_train
        whole = self.args.full_validation
        if (num_samples[1] or whole) and train is not None and valid is None:
            none = "leave --full-validation out" if whole else "add --eval-iters 0"
            raise UsageError(
                f"There is nothing to evaluate on: --split {self.args.split} gives the validation "
                f"no document. Give it a part, or --valid-data-path, or {none}."
            )
        data = None if train is None else train.unique_description_hash
        if train is not None:
            check_loss_mask(train)
            train = self.method.training_data(train)
        if self.method.reads_batch(vp_stage):
            train = None if train is None else self.method.chunk_data(train)
            self._method_dataset = train
        if vp_stage is None or vp_stage == self.args.virtual_pipeline_model_parallel_size - 1:
            self.method.on_data(self._method_dataset)
            if self.hooks is not None:
                self.hooks.on_start(next(filter(None, gathered(data)), None))  # some rank knows it
            if self._is_alone:
                rank = f"rank {self.args.rank} of {self.args.world_size}"
                say(f"> {rank} alone: but for time and memory its numbers mean nothing")
        return train, valid, test

    datasets.is_distributed = True  # type: ignore[attr-defined]  # called on every rank

    def _holds_data(self) -> bool:
        """Whether this rank reads the files, for itself and those that share its micro-batches."""
        return self._is_alone or mpu.get_tensor_model_parallel_rank() == 0

    def _reads(self, vp_stage: int | None) -> bool:
        return is_first_or_last_pipeline_stage(vp_stage) or self._reads_all(vp_stage)

    def _reads_all(self, vp_stage: int | None) -> bool:
        """Whether a chunk reads every key, not just what its stage's place asks for.

        Upstream gives the middle of a pipeline no attention mask, so that there
        --reset-attention-mask would keep no documents apart.
        """
        return (
            self.method.reads_batch(vp_stage)
            or self.args.reset_attention_mask
            or mtp_on_this_rank(
                layout=self.config.pipeline_model_parallel_layout,
                mtp_num_layers=self.config.mtp_num_layers,
                ignore_virtual=False,
                vp_stage=vp_stage,
            )
        )

    def _dataset_config(self) -> GPTDatasetConfig:
        args = self.args
        blend, blend_per_split = get_blend_and_blend_per_split(args)
        same = {field.name for field in fields(GPTDatasetConfig)} & vars(args).keys()
        sequences = None
        if args.per_dataset_sequences_path is not None:
            try:
                sequences = json.loads(Path(args.per_dataset_sequences_path).read_bytes())
            except (OSError, ValueError, RecursionError) as error:
                what = f"--per-dataset-sequences-path {args.per_dataset_sequences_path}"
                raise UsageError(f"{what} cannot be read: {error}") from error
        return GPTDatasetConfig(
            random_seed=args.seed,
            sequence_length=args.seq_length,
            blend=blend,
            blend_per_split=blend_per_split,
            # No files: the first rank would write them, and a rank that is alone may be another.
            path_to_cache="" if self._is_alone else args.data_cache_path,
            tokenizer=get_tokenizer(),
            create_attention_mask=args.create_attention_mask_in_dataloader,
            fast_cache_load=args.dataloader_fast_cache_load,
            sequences_per_dataset=sequences,
            defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
            sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
            **{name: vars(args)[name] for name in same},
        )

    # --- a micro-batch ------------------------------------------------------------------------

    def batch(self, data_iterator: Iterator[Batch], vp_stage: int | None) -> Batch:
        """Return this chunk's next micro-batch `[b, s]`; what a stage does not need is None.

        Every stage that reads draws the same samples from an iterator of its own. In training the
        method may have keys beside Megatron's.
        """
        if not self._reads(vp_stage):
            return dict.fromkeys(BATCH_KEYS)
        is_guided = torch.is_grad_enabled() and self.method.reads_batch(vp_stage)
        timers = get_timers()
        timers("batch-generator", log_level=2).start()
        batch = drawn_batch(
            self.args,
            data_iterator,
            holds_data=self._holds_data(),
            reads_all=self._reads_all(vp_stage),
            further=self.method.further_keys() if is_guided else {},
        )
        timers("batch-generator").stop()
        return batch

    def forward_step(
        self, data_iterator: Iterator[Batch], model: Any, return_schedule_plan: bool = False
    ) -> tuple[Any, Callable[[torch.Tensor], Any]]:
        """Run one micro-batch through this rank's chunk (`forward_step_func` of the schedules)."""
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        draw = self._training_batches.next if model.training else self.batch
        batch = draw(data_iterator, vp_stage)
        run = model.build_schedule_plan if return_schedule_plan else model
        output = run(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )
        return output, functools.partial(self.loss, batch["loss_mask"])

    def _start_step(self) -> None:
        self._bad_losses = 0
        self.method.start_step()

    def bad_losses(self) -> int:
        """How many of this rank's losses since the step began are not finite; waits for them."""
        return int(self._bad_losses)

    def loss(
        self, loss_mask: torch.Tensor, losses: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Return the summed loss, the number of tokens, and both for the log.

        The schedule divides by tokens and micro-batches. Validation is this loss alone.
        """
        mask = loss_mask.view(-1).float()
        loss = torch.sum(losses.view(-1).float() * mask)
        num_tokens = mask.sum().clone().detach().to(torch.int)
        self._check_loss(loss)
        self._bad_losses = self._bad_losses + (~torch.isfinite(loss.detach())).int()
        lm_loss, lm_losses = loss.clone().detach(), self.method.language_model_losses()
        if lm_losses is not None:
            lm_loss = torch.sum(lm_losses.reshape(-1).float() * mask)
        report = torch.cat([lm_loss.view(1), num_tokens.view(1)])
        return loss, num_tokens, {"lm loss": report}

    def _check_loss(self, loss: torch.Tensor) -> None:
        machine = get_rerun_state_machine()
        checks: dict[str, Callable[[torch.Tensor], Any]] = {}
        if self.args.check_for_nan_in_loss_and_grad:
            checks["found NaN in local forward loss calculation"] = torch.isnan
            checks["found Inf in local forward loss calculation"] = torch.isinf
        if self.args.check_for_spiky_loss:
            checks[SPIKY] = functools.partial(
                machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"
            )
        for message, rejects in checks.items():
            told = functools.partial(self._tell_rejected, rejects, message)
            machine.validate_result(loss, told, message, fatal=message != SPIKY)

    def _tell_rejected(
        self, rejects: Callable[[torch.Tensor], Any], message: str, loss: torch.Tensor
    ) -> bool:
        """Name the step as the log numbers it: Megatron's own message counts one more."""
        rejected = bool(rejects(loss))
        if rejected:
            step, rank = self.args.curr_iteration + 1, torch.distributed.get_rank()
            when = f"step {step}" if loss.requires_grad else f"validation after step {step}"
            say(f"> {when}, rank {rank}: {message}")
        return rejected
