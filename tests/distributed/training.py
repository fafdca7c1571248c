"""Whole runs for tests: `train` on the worker's side, data and what a run left on the test's.

A test never imports Megatron; it reads metrics and checkpoints, which is what a user is left with.
"""

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from megatron_let.errors import UsageError
from tests.support.testing import forget_last_run, run_distributed
from tests.support.tiny_run import FLAGS

TP2_PP2 = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2".split()


# --- in a worker -------------------------------------------------------------------------------


def train(argv: list[str]) -> str | None:
    """Run `pretrain_let.py` on this rank; return the text of its usage error, if it has one."""
    from megatron_let import pretrain as pretrain_let

    forget_last_run()
    sys.argv = ["pretrain_let.py", *argv]
    try:
        pretrain_let.main()
    except UsageError as error:
        return str(error)
    except SystemExit as end:  # --exit-interval
        assert not end.code, end.code
    return None


def train_tracked(argv: list[str]) -> str | None:
    """As `train`, with W&B kept from its host; its run ends here, as with the process."""
    import wandb

    environment = dict(os.environ)
    os.environ["WANDB_MODE"] = "offline"
    try:
        return train(argv)
    finally:
        wandb.finish()
        os.environ.clear()
        os.environ.update(environment)


def train_on_a_full_disk(argv: list[str], largest: int) -> str | None:
    """Train where no file can have more than `largest` bytes; return what is said of it."""
    from megatron_let.checkpoint.choice import SAVE_ERRORS, explain_failed_save

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        train(argv)
    except SAVE_ERRORS as error:
        return explain_failed_save(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return None


def train_with_a_slow_writer(argv: list[str]) -> str | None:
    """As `train`; steps go on before an asynchronous save has written anything."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def write(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)
        return right(*args, **kwargs)

    right = FileSystemWriterAsync.write_preloaded_data
    with mock.patch.object(FileSystemWriterAsync, "write_preloaded_data", staticmethod(write)):
        return train(argv)


def select_samples(argv: list[str]) -> None:
    """Run `tools/select_data.py` on this rank."""
    from tools import select_data

    forget_last_run()
    select_data.main(argv)


def select_samples_interrupted(argv: list[str]) -> tuple[int, int]:
    """The same, killed before its selection is written, and again; batches scored each time."""
    from megatron_let.selection import scoring

    scored, score = [0, 0], scoring.Scorer.score
    attempt = 0

    def counting(self: scoring.Scorer, samples: list[dict]) -> object:
        scored[attempt] += 1
        return score(self, samples)

    def dying(selection: scoring.Selection, path: Path) -> None:
        raise KeyboardInterrupt

    save = scoring.Selection.save
    scoring.Scorer.score, scoring.Selection.save = counting, dying
    try:
        select_samples(argv)
    except KeyboardInterrupt:
        attempt = 1
    finally:
        scoring.Selection.save = save
    try:
        select_samples(argv)
    finally:
        scoring.Scorer.score = score
    return scored[0], scored[1]


def train_until_sigterm(argv: list[str], metrics: Path) -> str | None:
    """As `train`, ended by a signal, as by a scheduler, once three steps are logged."""
    threading.Thread(target=_sigterm_after_three_steps, args=(metrics,), daemon=True).start()
    return train([*argv, "--exit-signal-handler"])


def train_with_sigterm_in(argv: list[str], where: str) -> str | None:
    """As `train`, with a SIGTERM from inside the data's building, or the first evaluation."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder as Builder,
    )

    from megatron_let.training.run import Run

    def building(self: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return build(self)

    def evaluating(self: Any, data_iterator: Any, model: Any, *args: Any) -> Any:
        if not model.training:
            signal.raise_signal(signal.SIGTERM)
        return forward_step(self, data_iterator, model, *args)

    build, forward_step = Builder.build, Run.forward_step
    patched = (Builder, "build", building) if where == "data" else (Run, "forward_step", evaluating)
    with mock.patch.object(*patched):
        return train([*argv, "--exit-signal-handler"])


def _sigterm_after_three_steps(metrics: Path) -> None:
    while not metrics.exists() or metrics.read_text().count('"kind": "train"') < 3:
        time.sleep(0.02)
    for process in (*psutil.Process().children(recursive=True), psutil.Process()):
        process.terminate()  # to all of the job's, the writer of an asynchronous save among them


# --- in a test ---------------------------------------------------------------------------------


def run(world_size: int, *argv: str) -> str | None:
    """Run `pretrain_let.py` with the common flags in the pool; return its usage error, if any."""
    common = " ".join(FLAGS)
    if "--full-validation" in argv:  # which has none
        common = common.replace("--eval-iters 1 ", "")
    line = [*common.split(), *argv]
    errors = run_distributed("tests.distributed.training:train", world_size, line)
    assert len(set(errors)) == 1, errors  # every rank stops, or none
    return errors[0]


def records(save: Path, kind: str, name: str = "metrics.jsonl") -> dict[int, dict[str, float]]:
    """What a run logged, by iteration; `kind` is `train`, `valid` or `start`."""
    lines = (save / name).read_text().splitlines()
    return {r["iteration"]: r for r in map(json.loads, lines) if r["kind"] == kind}


def series(save: Path, key: str) -> dict[int, float]:
    """One logged training quantity by iteration."""
    return {i: record[key] for i, record in records(save, "train").items() if key in record}


def only_weights(names: Iterable[str]) -> set[str]:
    """The names that are no optimizer state."""
    return {name for name in names if not name.startswith("optimizer.")}
