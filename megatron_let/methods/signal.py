"""A signal: one way in which a teacher's states guide the student."""

from argparse import Namespace
from typing import Any, ClassVar

import torch

from megatron_let.errors import UsageError
from megatron_let.losses.attach import Queue
from megatron_let.methods.base import Hooks
from megatron_let.teacher.load import TeacherConfig
from megatron_let.teacher.stage import Teacher
from megatron_let.upstream.batch import Batch


class Signal(Hooks):
    """What a teacher's states of a micro-batch are used for, on the model chunk that uses them.

    Args:
        args: the checked command line.
        teacher: the teacher's configuration.
    """

    refused_flags: ClassVar[dict[str, tuple[Any, ...]]] = {
        "overlap_moe_expert_parallel_comm": (False,),
        "cuda_graph_impl": ("none", None),
        "use_megatron_fsdp": (False,),
        "use_torch_fsdp2": (False,),
        "mtp_num_layers": (None,),
    }
    """Arguments of Megatron with the values that go with this signal; others were never proven."""
    danger: ClassVar[str]
    """What the others could do."""
    logged: ClassVar[tuple[str, str]]
    """What the log calls the loss and its weight."""
    needs_same_tokens: ClassVar[bool] = True
    """Whether the teacher must have the student's tokenizer."""
    measure: str = ""
    """The rule of `--guidance-stop` that can follow what it measures."""
    measured_every: int = 1
    """Steps from one to the next that is measured for it."""
    recorded: ClassVar[tuple[str, ...]] = ("loss", "tokens")
    """Names of the scalars that are recorded of a step."""

    def __init__(self, args: Namespace, teacher: TeacherConfig) -> None:
        super().__init__(args)
        self.teacher_config = teacher
        self.queue: Queue[Any] = Queue()
        """The teacher's states that wait for their use, and the sums of the current step."""
        self.weight = 0.0
        """In the current step; 0 once the signal is over."""
        self.is_translated = False
        """Whether the teacher reads tokens of its own, and some of the student's have no target."""
        self.owner_chunks: set[int | None] = set()
        """Virtual stages of this rank that use the teacher's states; building the model, as
        `configure` changes it, fills them in."""
        for name, allowed in self.refused_flags.items():
            value = getattr(args, name)
            if value not in allowed:
                shown = "" if value is True else f" {value}"
                raise UsageError(
                    f"--{name.replace('_', '-')}{shown} is not supported with --method "
                    f"{args.method}: {self.danger} Remove it, or use --method baseline."
                )

    @property
    def is_control(self) -> bool:
        """Whether the teacher works in vain: everything is computed and recorded, nothing added."""
        return self.args.teacher_control == "zero"

    def weight_at(self, step: int) -> float:
        """The signal's weight after `step` steps."""
        raise NotImplementedError

    def teacher_layer(self) -> int | None:
        """The teacher's layer whose states are wanted; None for its last, after the final norm."""
        return None

    def slices_sequence(self) -> bool:
        """Whether each tensor-parallel rank needs its slice of the sequence only."""
        return False

    # --- before the run -----------------------------------------------------------------------

    def prepare(self, teacher: Teacher) -> None:
        """Take from a whole teacher what its states alone cannot give."""

    def flops_per_token(self) -> float:
        """FLOPs beside those of the teacher's states."""
        return 0.0

    # --- during the run -----------------------------------------------------------------------

    def push(self, batches: list[Batch], states_SBD: list[torch.Tensor]) -> None:
        """Queue the teacher's states of the chunk's next micro-batches.

        They are this rank's slice of the sequence where all signals of the chunk want that.
        """
        raise NotImplementedError

    def start_step(self) -> None:
        """Forget what an interrupted step may have left."""
        self.queue.start_step()

    def report(self, loss: torch.Tensor, tokens: torch.Tensor, *_: Any) -> dict[str, torch.Tensor]:
        """What to log, of the sums of `recorded` over all ranks: the mean loss and its weight."""
        weight = torch.full_like(loss, 0.0 if self.is_control else self.weight)
        return dict(zip(self.logged, (loss / tokens.clamp(min=1), weight), strict=True))

    def measured(self, student_loss: torch.Tensor, *totals: torch.Tensor) -> torch.Tensor:
        """What the rule follows, of the step's loss and the sums of `recorded`; a scalar."""
        raise NotImplementedError

    def learn(self, *totals: torch.Tensor) -> None:
        """Take in what a step that was not skipped has recorded, over all ranks."""

    def release(self) -> None:
        """Drop what is left of the teacher."""

    def summary(self) -> str:
        """A line for the start of the run."""
        raise NotImplementedError
