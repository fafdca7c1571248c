"""LET and SALT inside a training script of your own, in eight lines (docs/extending.md)."""

import functools
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.training.utils import print_rank_0

from megatron_let.errors import UsageError
from megatron_let.methods.table import build_method
from megatron_let.training import arguments
from megatron_let.training.run import MicroBatches
from megatron_let.upstream.loop_hooks import LISTENERS, LoopHooks
from megatron_let.upstream.mended import known_token_ids
from megatron_let.upstream.table import apply

Provider = Callable[[ArgumentParser], ArgumentParser]

OTHER_BATCHES = (
    "sft dataloader_inter_document_masking hybrid_context_parallel perform_rl_step logits_load_dir "
    "modelopt_enabled"
).split()


def flags(yours: Provider | None = None) -> Provider:
    """Return an `extra_args_provider` with the methods' flags, after those of `yours`."""
    arguments.import_methods(sys.argv)
    groups = arguments.method_groups()
    return lambda parser: arguments.add_groups(yours(parser) if yours else parser, groups)


class Guidance:
    """The method of `--method`, at work in a script's own functions.

    `args` are Megatron's, checked by Megatron; `model_config`, its `GPTModelConfig`, is changed in
    place. Flags that a method cannot go with here are a `UsageError`.
    """

    def __init__(self, args: Namespace, model_config: Any) -> None:
        arguments.check_flags(args, sys.argv)
        if args.context_parallel_size > 1:
            raise UsageError(
                f"--context-parallel-size {args.context_parallel_size}: a script's get_batch hands "
                "on a part of each sequence, and the teacher reads the whole. Use pretrain_let.py."
            )
        for name in OTHER_BATCHES:
            if getattr(args, name, None):
                raise UsageError(
                    f"{arguments.flag(name)} makes other batches, or another loss, than a method "
                    f"knows of: leave it out, or --method {args.method}."
                )
        if args.guidance_stop != "step" or args.let_weight_rule != "fixed":
            raise UsageError(
                "--guidance auto, --guidance-stop and --let-weight-rule remember what they have "
                "seen, which a script's own checkpoints do not carry: use pretrain_let.py."
            )
        self.args = args
        self.method = build_method(args)
        self.method.check_tokens(known_token_ids(args))
        if self.method.translates:
            raise UsageError(
                f"--teacher-model {args.teacher_model} has another tokenizer than the student, "
                "whose rows come with pretrain_let.py's data: use that, or a teacher with the "
                "student's tokenizer."
            )
        self.method.configure(model_config)
        self._dataset: Any = None
        hooks = LoopHooks(args)
        hooks.listeners = [*self.method.listeners(), *(make(args) for make in LISTENERS)]
        apply(hooks.log_redirects())

    def reads_all(self, mtp_on_this_rank: Callable[..., bool]) -> Callable[..., bool]:
        """Have a chunk with a teacher build the data and read all keys, as one with MTP does."""

        @functools.wraps(mtp_on_this_rank)
        def wrapped(*args: Any, vp_stage: int | None = None, **named: Any) -> bool:
            ours = self.method.reads_batch(vp_stage)
            return ours or mtp_on_this_rank(*args, vp_stage=vp_stage, **named)

        return wrapped

    def batches(self, get_batch: Callable[..., Any], keys: Sequence[str]) -> Callable[..., Any]:
        """Show each training micro-batch to the method before `get_batch` hands it on.

        It is called with a data iterator and a virtual stage, and returns the values of `keys` in
        their order, `tokens`, `labels` and `loss_mask` among them.
        """

        def draw(data_iterator: Any, vp_stage: int | None) -> dict[str, Any]:
            return dict(zip(keys, get_batch(data_iterator, vp_stage), strict=True))

        ahead = MicroBatches(self.args, self.method, draw, self.method.start_step)

        @functools.wraps(get_batch)
        def wrapped(data_iterator: Any, vp_stage: int | None = None) -> Any:
            if not torch.is_grad_enabled():  # an evaluation
                return get_batch(data_iterator, vp_stage)
            batch = ahead.next(data_iterator, vp_stage)
            return [batch[key] for key in keys]

        return wrapped

    def losses(self, loss_func: Callable[..., Any]) -> Callable[..., Any]:
        """Report the language-model loss where the method trains on another one (SALT)."""

        @functools.wraps(loss_func)
        def wrapped(loss_mask: torch.Tensor, output: torch.Tensor, **named: Any) -> Any:
            loss, num_tokens, report = loss_func(loss_mask, output, **named)
            losses_BS = self.method.language_model_losses()
            if losses_BS is not None:
                lm_loss = torch.sum(losses_BS.reshape(-1).float() * loss_mask.view(-1).float())
                report["lm loss"] = torch.cat([lm_loss.view(1), num_tokens.view(1)])
            return loss, num_tokens, report

        return wrapped

    def datasets(self, provider: Callable[..., Any]) -> Callable[..., Any]:
        """Load the teacher when `train_valid_test_datasets_provider` has built the data."""

        @functools.wraps(provider)
        def wrapped(num_samples: list[int], vp_stage: int | None = None) -> Any:
            train, valid, test = provider(num_samples, vp_stage=vp_stage)
            if train is not None:
                train = self.method.training_data(train)
            if self.method.reads_batch(vp_stage):
                self._dataset = train
            chunks = self.args.virtual_pipeline_model_parallel_size
            if vp_stage is None or vp_stage == chunks - 1:
                self.method.on_data(self._dataset)
                print_rank_0("\n".join(f"> {line}" for line in self.method.summary()))
            return train, valid, test

        return wrapped
