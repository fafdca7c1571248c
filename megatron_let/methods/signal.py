"""One way in which a small teacher guides its student; `with_teacher.py` runs the teacher."""

from argparse import Namespace
from typing import Any, ClassVar

import torch

from megatron_let.errors import UsageError
from megatron_let.losses.attach import Record
from megatron_let.methods.base import Hooks
from megatron_let.teacher.load import TeacherConfig
from megatron_let.teacher.stage import Teacher
from megatron_let.upstream.batch import Batch

REFUSED_FLAGS: dict[str, tuple[Any, ...]] = {
    "overlap_moe_expert_parallel_comm": (False,),
    "cuda_graph_impl": ("none", None),
    "use_megatron_fsdp": (False,),
    "use_torch_fsdp2": (False,),
    "mtp_num_layers": (None,),
}
"""Of every signal, see `Signal.refused_flags`."""


class Signal(Hooks):
    """What a teacher's states of a micro-batch are used for, on the model chunk that uses them.

    Args:
        args: the checked command line.
        teacher: the teacher's configuration.
    """

    refused_flags: ClassVar[dict[str, tuple[Any, ...]]]
    """Arguments of Megatron with the values that go with this signal; others were never proven."""
    danger: ClassVar[str]
    """What the others could do."""
    recorded: ClassVar[tuple[str, ...]]
    """Names of the scalars that are recorded of a step."""
    record: Record
    """Of the current step."""

    def __init__(self, args: Namespace, teacher: TeacherConfig) -> None:
        self.args = args
        self.flags: Any = self.flag_group.of(args)
        self.teacher_config = teacher
        self.weight = 0.0
        """In the current step; 0 once the signal is over."""
        self.owner_chunks: set[int | None] = set()
        """Virtual stages of this rank that use the teacher's states; building the model, as
        `configure` changes it, fills them in."""
        self._refuse_unproven()

    def _refuse_unproven(self) -> None:
        for name, allowed in self.refused_flags.items():
            value = getattr(self.args, name)
            if value not in allowed:
                shown = "" if value is True else f" {value}"
                raise UsageError(
                    f"--{name.replace('_', '-')}{shown} is not supported with --method "
                    f"{self.args.method}: {self.danger} Remove it, or use --method baseline."
                )

    @property
    def is_control(self) -> bool:
        """Whether the teacher works in vain: everything is computed and recorded, nothing added."""
        return self.args.teacher_control == "zero"

    def weight_at(self, step: int, samples: int) -> float:
        """The signal's weight after `step` steps and `samples` samples."""
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
        """Queue the teacher's states of the chunk's next micro-batches."""
        raise NotImplementedError

    @property
    def num_used(self) -> int:
        """Micro-batches of this step whose states have been used."""
        return self.record.micro_batches

    def sums(self) -> list[torch.Tensor]:
        """Scalars to add up over all ranks after the step; as many on each."""
        zero = torch.zeros((), device=torch.cuda.current_device())
        return [self.record.sums.get(name, zero).float() for name in self.recorded]

    def report(self, sums: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """What to log, of the sums over all ranks."""
        raise NotImplementedError

    def release(self) -> None:
        """Drop what is left of the teacher."""

    def summary(self) -> str:
        """A line for the start of the run."""
        raise NotImplementedError
