"""*Steps to target*, *FLOPs to target* and *seconds to target*: what a method saved.

The target is the final validation loss of the plain run with the same seed. A run reaches it at
the first evaluation FROM WHICH ON its validation loss stays at or below the target: a dip that is
lost again does not count. With that evaluation `b` and the one before it `a`, the crossing lies at

    fraction = (loss_a - target) / (loss_a - loss_b)        0 < fraction <= 1

and every axis is read at that fraction between `a` and `b`; if `b` is the first evaluation, at `b`,
an upper bound. FLOPs include the teacher's forward passes, not its own pre-training.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

from megatron_let.errors import UsageError
from megatron_let.methods.table import BASELINE
from megatron_let.report.runs import Evaluation, Run


class Cost(NamedTuple):
    """What it took to get somewhere: absolute values, or ratios over another cost."""

    steps: float
    flops: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """One run held against the plain run of its seed."""

    run: Run
    plain: Run
    target_loss: float
    plain_total: Cost
    to_target: Cost | None
    """Steps, FLOPs and seconds until the run stays at or below the target; None if never."""

    @property
    def ratio(self) -> Cost | None:
        """`to_target` over the plain run's total; None if never."""
        if self.to_target is None:
            return None
        return Cost(*map(operator.truediv, self.to_target, self.plain_total))


def cost_to_target(run: Run, target_loss: float) -> Cost | None:
    """Interpolated cost after which `run` stays at or below `target_loss`, or None if never."""
    if not run.final.loss <= target_loss:  # written so that a NaN is "above"
        return None
    evaluations = run.evaluations
    first = len(evaluations) - 1
    while first > 0 and evaluations[first - 1].loss <= target_loss:
        first -= 1
    above, below = evaluations[max(0, first - 1)], evaluations[first]
    if first == 0 or not math.isfinite(above.loss):  # a diverged one gives no slope to read
        return _cost_at(below)
    fraction = (above.loss - target_loss) / (above.loss - below.loss)
    ends = zip(_cost_at(above), _cost_at(below), strict=True)
    return Cost(*(start + fraction * (end - start) for start, end in ends))


def loss_at(run: Run, budget: Cost, axis: str) -> float | None:
    """The loss, interpolated, of a run that has spent `budget` on a field of `Cost`; or None."""
    value = getattr(budget, axis)
    points = [(getattr(_cost_at(e), axis), e.loss) for e in run.evaluations]
    for x, loss in points:
        if math.isclose(x, value):  # the one before may be NaN
            return loss
    for (x, loss), (next_x, next_loss) in pairwise(points):
        if x < value < next_x:
            return loss + (value - x) / (next_x - x) * (next_loss - loss)
    return None


def _cost_at(evaluation: Evaluation) -> Cost:
    return Cost(float(evaluation.iteration), evaluation.flops, evaluation.seconds)


def compare(run: Run, plain: Run) -> Comparison:
    """Hold `run` against the plain run of its seed; ValueError if that is unfinished, or unlike."""
    _check_like_with_like(run, plain)
    total, target = _cost_at(plain.final), plain.final.loss
    # Its own curve may touch the target earlier by noise; its cost is its whole length regardless.
    to_target = total if run == plain else cost_to_target(run, target)
    return Comparison(run, plain, target, total, to_target)


def speed_up(group: Sequence[Comparison]) -> float | None:
    """Plain steps over steps to target, both averaged over the seeds; None if any seed never."""
    # The reciprocal of the mean ratio, not the mean of reciprocals: a table's two columns agree.
    steps = [c.to_target.steps for c in group if c.to_target is not None]
    if len(steps) < len(group):
        return None
    plain_steps = fmean(c.plain_total.steps for c in group)
    return plain_steps / fmean(steps) if any(steps) else math.inf  # 0: started there


def compare_all(runs: Sequence[Run]) -> list[Comparison]:
    """Hold every run against the plain run (method `baseline`) of its own seed.

    Plain runs come first, then the labels in the order given, seeds ascending. Raises ValueError
    if a seed has no plain run, or two runs share label and seed.
    """
    seen: dict[tuple[str, int], Run] = {}
    for run in runs:
        # A label cannot make a second plain run of a seed: which of them would be the target?
        for name in [BASELINE] * (run.method == BASELINE) + [run.label]:
            if (twin := seen.setdefault((name, run.seed), run)) is not run:
                also = "" if name == BASELINE else ", or give them labels of their own"
                both = f"{twin.path} and {run.path} are both {name!r} with seed {run.seed}"
                raise UsageError(f"{both}: leave one out{also}")
    plain_by_seed = {run.seed: run for run in runs if run.method == BASELINE}
    labels = [run.label for run in runs]
    in_order = sorted(runs, key=lambda r: (r.method != BASELINE, labels.index(r.label), r.seed))
    for run in in_order:
        if run.seed not in plain_by_seed:
            problem = f"{run.path} has seed {run.seed}, and no plain run has"
            raise UsageError(f"{problem}: add the run with --method baseline --seed {run.seed}")
    return [compare(run, plain_by_seed[run.seed]) for run in in_order]


def by_label(comparisons: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    """The comparisons of each kind of run, in the order given."""
    groups: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault(comparison.run.label, []).append(comparison)
    return groups


def guided(comparisons: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    """The same without plain training."""
    return by_label([c for c in comparisons if c.run.method != BASELINE])


def _check_like_with_like(run: Run, plain: Run) -> None:
    if not plain.finished:
        was = f"was last evaluated at step {plain.final.iteration} of {plain.train_iters}"
        raise UsageError(f"the plain run {plain.path} {was}: let it finish, its end is the target")
    if not math.isfinite(plain.final.loss):
        raise UsageError(f"the plain run {plain.path} ends at loss {plain.final.loss}: no target")
    for one in (run, plain):
        if not all(_cost_at(one.final)):
            raise UsageError(
                f"{one.path} counts no work before step {one.final.iteration}: the record of its "
                "training is lost. Leave it out, or train it again"
            )
    for fact in ("seed", "data", "train_iters", "tokens_per_step", "student_parameters"):
        ours, theirs = getattr(run, fact), getattr(plain, fact)
        if ours != theirs and None not in (ours, theirs):  # None: the run did not say
            what = "data order" if fact == "data" else fact
            raise UsageError(
                f"{run.path} has {what} {ours} and the plain run {plain.path} has {theirs}: "
                "only runs of the same student, batches and schedule compare"
            )


def verdict(group: Sequence[Comparison], comparisons: Sequence[Comparison]) -> str:
    """Say whether the last losses of one kind of run lie outside the plain runs' range."""
    own = [c.run.final.loss for c in group]
    plain = [c.run.final.loss for c in comparisons if c.run == c.plain]
    if not all(math.isfinite(loss) for loss in own):
        return "diverged"
    if not all(c.run.finished for c in group):
        return "not finished"
    what = "within noise, the ranges of their last losses meet"
    if max(own) < min(plain):
        what = "better than every plain run"
    elif min(own) > max(plain):
        what = "worse than every plain run"
    seeds = f"{len(own)} and {len(plain)} seeds" if len(own) > 1 else "one seed: no range"
    return f"{what} ({seeds})"


def regime_sentence(plain: Run, teacher_loss: float) -> str:
    """Say whether the plain student stays worse than its teacher, on one text, or passes it."""
    passed = cost_to_target(plain, teacher_loss)
    what = "stays worse than its teacher"
    if math.isnan(teacher_loss):
        what = "has a teacher that diverged"
    elif passed is not None:
        what = f"passes its teacher at step {passed.steps:.0f} of {plain.train_iters}"
    losses = f"final loss {plain.final.loss:.3f}, teacher {teacher_loss:.3f}"
    return f"Regime: the plain student {what} ({losses})."
