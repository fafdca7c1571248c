"""What the record of the study says, run by run: numbers, no words."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from examples.study.record import Summary
from examples.study.study import Study
from examples.study.table import AUTO, PLAIN, Arm, Planned, Table
from megatron_let.report.targets import Comparison, compare, cost_to_target


@dataclass(frozen=True)
class Result:
    """A finished run, held against the plain run of its seed."""

    planned: Planned
    summary: Summary
    comparison: Comparison
    own_flops: float
    """Of the teacher's own training until the checkpoint that was used; 0 without a teacher."""

    @property
    def steps(self) -> float | None:
        """Steps to stay at or below the plain run's end, over the plain run's; None: never."""
        ratio = self.comparison.ratio
        return None if ratio is None else ratio.steps

    @property
    def flops(self) -> float | None:
        """FLOPs, with the teacher's forward passes, likewise."""
        ratio = self.comparison.ratio
        return None if ratio is None else ratio.flops

    @property
    def flops_with_teacher(self) -> float | None:
        """FLOPs with the teacher's own training besides, likewise."""
        to_target, total = self.comparison.to_target, self.comparison.plain_total
        return None if to_target is None else (to_target.flops + self.own_flops) / total.flops


class Results:
    """Reads a study's record.

    Args:
        study: whose record.
    """

    def __init__(self, study: Study) -> None:
        self._study = study
        self.table = study.table

    @cached_property
    def arms(self) -> tuple[Arm, ...]:
        """All that were tuned, in the order of their first runs."""
        untuned = ("auto", "widths")
        return tuple(dict.fromkeys(r.arm for r in self.table.runs if r.group not in untuned))

    @cached_property
    def done(self) -> dict[str, Result]:
        """The finished runs by name, as far as the plain run of their seed is finished too."""
        found = {}
        for planned in self.table.runs:
            summary, plain = self._study.summary(planned.name), self._plain(planned.seed)
            if summary is not None and plain is not None:
                comparison = compare(summary.run, plain.run)
                found[planned.name] = Result(planned, summary, comparison, self._own(planned))
        return found

    def _plain(self, seed: int) -> Summary | None:
        plain = self.table.runs[0].arm
        if seed == self.table.runs[0].seed:
            return self._study.best(plain.tuning_runs) if self.is_tuned(plain) else None
        return self._study.summary(f"{plain.name}-seed-{seed}")

    def _own(self, planned: Planned) -> float:
        if planned.arm.name == PLAIN.name or planned.control == "random":
            return 0.0
        return float((self.chosen(planned.regime) or {"flops": 0.0})["flops"])

    def is_tuned(self, arm: Arm) -> bool:
        """Whether all of an arm's tuning runs are finished."""
        return all(self._study.summary(name) is not None for name in arm.tuning_runs)

    def seeds(self, arm: Arm) -> list[Result]:
        """An arm's row: its best tuning run, if all are finished, and its further seeds."""
        names = [r.name for r in self.table.runs if r.arm == arm and r.group == "seeds"]
        if arm.tuning_runs and self.is_tuned(arm):
            names.insert(0, self._study.best(arm.tuning_runs).facts["name"])
        return [self.done[name] for name in names if name in self.done]

    def group(self, group: str) -> list[Result]:
        """The finished runs of a group, in their order."""
        return [result for result in self.done.values() if result.planned.group == group]

    def tuned_beside(self, planned: Planned) -> Result | None:
        """The finished run, tuned by hand, of an arm that sets itself: same seed, same regime."""
        name = next(held.name for held, auto in AUTO if auto == planned.arm)
        arm = next(arm for arm in self.arms if arm.name == name)
        found = [*self.seeds(arm), *self.group("regimes")]
        where = planned.regime, planned.seed, arm
        same = (r for r in found if (r.planned.regime, r.planned.seed, r.planned.arm) == where)
        return next(same, None)

    def at_plain_rate(self, arm: Arm) -> Result | None:
        """The arm's run of seed 1 with its first setting whose rate is nearest to plain's best."""
        plain = self._plain(self.table.runs[0].seed)
        found = [self.done[name] for name in arm.first_runs if name in self.done]
        if plain is None or not found:
            return None
        best = plain.facts["rate"]
        return min(found, key=lambda result: abs(result.summary.facts["rate"] / best - 1))

    def chosen(self, regime: str) -> dict[str, Any] | None:
        """The checkpoint that is a regime's teacher."""
        record = self._study.record
        for folder in (record, record.parent):  # of another machine's record: where the first lies
            path = folder / "teachers" / regime / "chosen.json"
            if path.exists():
                return json.loads(path.read_text())
        return None

    def passed(self, loss: float) -> list[float | None]:
        """After which part of its run each plain run is better than a loss for good."""
        runs = [result.summary.run for result in self.seeds(self.arms[0])]
        costs = [cost_to_target(run, loss) for run in runs]
        return [c and c.steps / run.train_iters for c, run in zip(costs, runs, strict=True)]

    def beside(self, table: Table, name: str) -> "Results":
        """Another record, in a folder of this one."""
        return Results(Study(table, self._study.folder, self._study.record / name))

    def counts(self) -> dict[str, tuple[int, int]]:
        """Finished and declared runs by group."""
        found = {}
        for group in dict.fromkeys(run.group for run in self.table.runs):
            names = [run.name for run in self.table.runs if run.group == group]
            finished = sum(self._study.summary(name) is not None for name in names)
            found[group] = finished, len(names)
        return found
