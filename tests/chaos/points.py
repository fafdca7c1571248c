"""Points in a run where the first rank that comes by waits for what befalls it.

`CHAOS_POINT` names one, and how often it is passed before: `tracker torn:1`. Whoever is there
writes the file `mark-there`, and goes on when `mark-go` is there.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.training import checkpointing

from megatron_let.checkpoint import retention, sums
from megatron_let.checkpoint.folder import TRACKER
from megatron_let.training.run import Run

POINTS = (
    *("data", "evaluation", "write", "written"),
    *("tracker before", "tracker torn", "tracker after", "removal", "half removed", "sums"),
)
SECONDS = 120


class _Point:
    """Where this process is to be met."""

    def __init__(self, folder: Path, name: str, passes: int) -> None:
        self._folder, self._name, self._passes = folder, name, passes

    def __call__(self, name: str) -> None:
        if name != self._name:
            return
        self._passes -= 1
        if self._passes >= 0:
            return
        try:
            with (self._folder / "mark-there").open("x") as file:
                file.write(os.environ["RANK"])
        except FileExistsError:  # another rank is there
            return
        deadline = time.monotonic() + SECONDS
        while not (self._folder / "mark-go").exists() and time.monotonic() < deadline:
            time.sleep(0.01)


def install() -> None:
    """Have this process wait at the point that its environment names."""
    name, _, passes = os.environ["CHAOS_POINT"].partition(":")
    if not name:
        return
    assert name in POINTS, name
    point = _Point(Path(os.environ["CHAOS_FOLDER"]), name, int(passes))
    _in_data_and_evaluation(point)
    _in_a_save(point)
    _behind_a_save(point)


def _in_data_and_evaluation(point: Callable[[str], None]) -> None:
    build, forward_step = BlendedMegatronDatasetBuilder.build, Run.forward_step

    def building(self: Any) -> Any:
        point("data")
        return build(self)

    def evaluating(self: Run, data_iterator: Any, model: Any, *args: Any) -> Any:
        if not model.training:
            point("evaluation")
        return forward_step(self, data_iterator, model, *args)

    BlendedMegatronDatasetBuilder.build = building
    Run.forward_step = evaluating  # type: ignore[method-assign, assignment]


def _in_a_save(point: Callable[[str], None]) -> None:
    write, storage = FileSystemWriterAsync.write_preloaded_data, checkpointing.maybe_msc

    def writing(*args: Any, **kwargs: Any) -> Any:
        point("write")
        result = write(*args, **kwargs)
        point("written")
        return result

    class Storage:
        """Megatron's, but for the tracker."""

        def __getattr__(self, name: str) -> Any:
            return getattr(storage, name)

        def open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if Path(path).name != TRACKER or mode != "w":
                return storage.open(path, mode, *args, **kwargs)
            point("tracker before")
            return _Tracker(storage.open(path, mode, *args, **kwargs), point)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(writing)
    checkpointing.maybe_msc = Storage()


class _Tracker:
    """The tracker's file: it is empty as soon as it is opened."""

    def __init__(self, file: Any, point: Callable[[str], None]) -> None:
        self._file, self._point = file, point

    def __enter__(self) -> "_Tracker":
        self._point("tracker torn")
        return self

    def write(self, text: str) -> None:
        self._file.write(text)

    def __exit__(self, *error: Any) -> None:
        self._file.close()
        self._point("tracker after")


def _behind_a_save(point: Callable[[str], None]) -> None:
    put_together = sums._put_together

    class Removing:
        """`shutil`, which removes a file and then the rest."""

        @staticmethod
        def rmtree(folder: Path, **kwargs: Any) -> None:
            point("removal")
            next(path for path in sorted(folder.iterdir()) if path.is_file()).unlink()
            point("half removed")
            shutil.rmtree(folder, **kwargs)

    def putting_together(*args: Any) -> None:
        point("sums")
        put_together(*args)

    retention.shutil = Removing  # type: ignore[assignment]
    sums._put_together = putting_together  # type: ignore[assignment]
