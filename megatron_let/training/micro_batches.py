"""A step's micro-batches, drawn ahead for a teacher that wants several at once."""

from argparse import Namespace
from collections import defaultdict, deque
from collections.abc import Callable, Iterator

from megatron.core.num_microbatches_calculator import get_num_microbatches

from megatron_let.methods.base import Method
from megatron_let.upstream.batch import Batch


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
        self._tell = start_step
        self._step = -1
        self._left: dict[int | None, int] = {}
        """Micro-batches that each chunk of this rank has not run yet in this step."""
        self._ahead: dict[int | None, deque[Batch]] = defaultdict(deque)
        """Micro-batches that a chunk has drawn and not run yet."""

    def next(self, data_iterator: Iterator[Batch], vp_stage: int | None) -> Batch:
        """Return the chunk's next micro-batch of a training step."""
        if self._args.curr_iteration != self._step or not any(self._left.values()):
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

    def _start_step(self) -> None:
        self._step = self._args.curr_iteration
        chunks = self._args.virtual_pipeline_model_parallel_size
        stages = [None] if chunks is None else range(chunks)
        self._left = dict.fromkeys(stages, get_num_microbatches())
        self._ahead.clear()
        self._tell()
