"""How fast a run is: tokens, FLOPs with the teacher's share, and the time that is left."""

from datetime import timedelta

from megatron_let.training.metrics import Totals
from megatron_let.upstream import cpu

TOKENS, TFLOPS = "tokens per second", "TFLOP/s per GPU"
TEACHER_SHARE, SECONDS_LEFT = "teacher share", "seconds left"


def tflops_name() -> str:
    """What the computing rate is called: a process on CPU is no GPU."""
    return TFLOPS.replace("GPU", "process") if cpu.is_active() else TFLOPS


class Speed:
    """Measures interval after interval; evaluations are left out, as in `MetricsFile`.

    Args:
        totals: where the first interval starts.
        num_ranks: GPUs that share the work; on CPU processes.
    """

    def __init__(self, totals: Totals, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._restart(totals)

    def _restart(self, totals: Totals) -> None:
        self._start = dict(totals)
        self._num_steps = 0
        self._student_flops = 0.0
        self._teacher_flops = 0.0

    def add_step(self, student_flops: float, teacher_flops: float) -> None:
        """Count a step: what was computed before the run (scoring) is in no interval."""
        self._num_steps += 1
        self._student_flops += student_flops
        self._teacher_flops += teacher_flops

    def end_interval(self, totals: Totals, steps_left: int) -> dict[str, float]:
        """Return what is known of the interval that ends here; the next one starts."""
        done = {name: total - self._start[name] for name, total in totals.items()}
        seconds = max(done["seconds"], 1e-9)
        flops = self._student_flops + self._teacher_flops
        found = {
            TOKENS: done["tokens"] / seconds,
            tflops_name(): flops / seconds / self._num_ranks / 1e12,
            TEACHER_SHARE: self._teacher_flops / flops if flops else 0.0,
            SECONDS_LEFT: steps_left * seconds / max(self._num_steps, 1),
        }
        self._restart(totals)
        return found


def speed_line(speed: dict[str, float]) -> str:
    """Return the console's line on an interval."""
    share = f", teacher {100 * speed[TEACHER_SHARE]:.1f} %" if speed[TEACHER_SHARE] else ""
    left = timedelta(seconds=round(speed[SECONDS_LEFT]))
    tokens, rate = speed[TOKENS], f"{speed[tflops_name()]:.3g} {tflops_name()}"
    return f"> {tokens:,.0f} tokens/s | {rate}{share} | {left} left"
