"""`metrics.jsonl`: what a run did, one JSON object a line, written beside its checkpoints.

Kinds: `start` (the run's facts, at each start or resume), `train` (each log interval), `valid`
(each evaluation), `skip` (a step without update), `save` (a checkpoint between two intervals),
`stop` (an end before the end), `end` (when the run is complete). `tokens`, `flops` (teacher
included) and `seconds` (training, without evaluation) count from the run's first step, across
resumes. `megatron_let.report` reads the file.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Totals = dict[str, float]
TOTALS = ("tokens", "flops", "seconds")


class MetricsFile:
    """Appends a run's records to `path`; without one it keeps totals only, as most ranks do.

    The totals go on from the iteration that the run starts from. Later records, of an earlier
    attempt, are void, and the reader drops them.
    """

    def __init__(self, path: Path | None, iteration: int) -> None:
        self.path = path
        self.totals: Totals = dict.fromkeys(TOTALS, 0)
        self.is_evaluated = False
        """Whether the validation loss of that iteration is known, of this attempt."""
        if path is not None and path.exists():
            text = path.read_bytes()
            if not text.endswith(b"\n"):  # a killed run's, which would garble the next record
                os.truncate(path, text.rfind(b"\n") + 1)
            for _, record in read_records(path) if iteration else ():
                if record["iteration"] == iteration:
                    self.is_evaluated |= record["kind"] == "valid"
                elif record["kind"] == "start":
                    self.is_evaluated = False
                if record["iteration"] <= iteration:
                    known = [n for n in TOTALS if isinstance(record.get(n), int | float)]
                    self.totals |= {name: record[name] for name in known}
        self._clock = time.perf_counter()

    def restart_clock(self) -> None:
        """Leave the time since the last step out: evaluation, set-up."""
        self._clock = time.perf_counter()

    def add_step(self, tokens: int, flops: float) -> None:
        """Count a training step that has just ended."""
        now = time.perf_counter()
        self.totals["tokens"] += tokens
        self.totals["flops"] += flops
        self.totals["seconds"] += now - self._clock
        self._clock = now

    def write(self, kind: str, iteration: int, **values: Any) -> None:
        """Append one record; a single write, so a killed run tears at most the last line."""
        if self.path is None:
            return
        record = {"kind": kind, "iteration": iteration, **self.totals, **values}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of each line and its record; a line that holds none is said and skipped."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            record |= {"kind": str(record["kind"]), "iteration": int(record["iteration"])}
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
            what = f"{path}:{number} is no record (torn by a kill, or edited) and is skipped"
            print(f"> {what}: {line[:40]!r}", file=sys.stderr, flush=True)
            continue
        yield number, record
