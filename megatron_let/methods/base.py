"""What a training method adds to plain pre-training. The defaults of all hooks are the baseline."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

import torch

from megatron_let.methods.table import Flags
from megatron_let.upstream.batch import Batch
from megatron_let.upstream.loop_hooks import Listener, Step


class Hooks(Listener):
    """What a method, and each signal of one, can do; the defaults do nothing."""

    flag_group: ClassVar[type[Flags]] = Flags
    """The flags of its own, a dataclass; without further word a resumed run must share them."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.flags: Any = self.flag_group.of(args)

    @classmethod
    def check_flags(cls, args: Namespace) -> None:
        """Check its own flags, and fill in defaults that depend on others; called several times.

        First before Megatron looks at the command line, then after, a signal's when the data is
        there, too.

        Raises:
            UsageError: naming the flag, its value and the way out.
        """

    @property
    def same_on_resume(self) -> tuple[str, ...]:
        """Arguments that a resumed run must share with its checkpoint."""
        return tuple(field.name for field in fields(self.flag_group))

    def check_checkpoint(self, saved: Namespace) -> None:
        """Check the arguments of the checkpoint that will be loaded."""

    def configure(self, model_config: Any) -> None:
        """Change Megatron's `GPTModelConfig` (layer spec, hooks) before the model is built."""

    def training_data(self, dataset: Any) -> Any:
        """Return the training stream to use instead of `dataset`, as long as that one."""
        return dataset

    def flops_once(self) -> float:
        """FLOPs that were spent before the first step."""
        return 0.0

    def start_step(self) -> None:
        """Called on every rank before the first forward pass of a training step."""

    def language_model_losses(self) -> torch.Tensor | None:
        """The labels' loss `[B, S]` of the last micro-batch, where the model's is another one."""
        return None


class Method(Hooks):
    """Plain next-token training; the other methods override what they need.

    A method never touches the training loop: it changes the model's configuration before it is
    built, reads each training micro-batch before its forward pass, and reports once a step.
    """

    translates = False
    """Whether its batches have keys of their own (`further_keys`)."""

    def check_tokens(self, student_ids: dict[str, int]) -> None:
        """Check the student's token -> id map (empty if unknown) against the method's models."""

    def reads_batch(self, vp_stage: int | None) -> bool:
        """Whether this rank's model chunk needs tokens, labels and loss mask."""
        return False

    def chunk_data(self, dataset: Any) -> Any:
        """Return the training stream of a chunk that `reads_batch`, with what it reads besides."""
        return dataset

    def further_keys(self) -> Mapping[str, int]:
        """What such a chunk's training batches have besides: names, and lengths of the rows."""
        return {}

    def on_data(self, train_dataset: Any) -> None:
        """Called on every rank once model, checkpoint and data are there, before step 1."""

    def micro_batches_at_once(self) -> int:
        """How many micro-batches of the step `before_forward` wants together, where it can."""
        return 1

    def before_forward(self, batches: list[Batch], vp_stage: int | None) -> None:
        """Called on a chunk that `reads_batch` before the first forward pass of `batches`.

        These are the next micro-batches of this step in their order: `micro_batches_at_once`, or
        what is left of the step.
        """

    def listeners(self) -> list[Listener]:
        """Who hears of the loop's events: the method, and the parts of it that want to."""
        return [self]

    def after_step(self, step: Step) -> None:
        """Report the step."""
        step.reported |= self.end_step(step.is_skipped)

    def end_step(self, is_skipped: bool = False) -> dict[str, torch.Tensor]:
        """Called on every rank after each step; returns what to log, equal on all ranks."""
        return {}

    def extra_flops(self, tokens: int) -> float:
        """FLOPs that the step just made added to the student's, for `tokens` tokens."""
        return 0.0

    def describe(self) -> dict[str, Any]:
        """Facts for the run's `metrics.jsonl`."""
        return {"teacher": None}

    def summary(self) -> list[str]:
        """Lines that tell the user at start what this method will do."""
        return ["plain next-token training"]
