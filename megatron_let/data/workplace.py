"""The folder PREFIX.partial, where a preprocessing run lies until it is complete.

Killed at any instant, a run goes on from its last commit: everything behind it is cut off. What is
complete is moved to its final places, indices last, and that too can be taken up again.
"""

import itertools
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_let.data.indexed import check_absent
from megatron_let.data.sources import Position
from megatron_let.files import lock, write_whole


@dataclass
class State:
    """How far a run is: what state.json holds."""

    identity: dict[str, Any]
    """What must be the same for a call to go on with a run."""
    engine: str
    position: Position = field(default_factory=Position)
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    """The value of --split-by-meta that each dataset's name stands for."""
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Documents, empty documents, tokens and bytes of text of each dataset."""
    skipped: dict[str, int] = field(default_factory=dict)
    """How many records were left out, for each reason."""
    skipped_bytes: int = 0
    inputs: list[dict[str, Any]] = field(default_factory=list)
    """Path, size and SHA-256 of every file that was read to its end."""
    with_text: list[int] = field(default_factory=list)
    """Places among the inputs of those that gave a token."""
    moves: dict[str, str] = field(default_factory=dict)
    """Once complete: what lies here under a name, and where it goes, in this order."""

    @property
    def is_begun(self) -> bool:
        """Whether there is something to go on from."""
        return self.position != Position()


class Workplace:
    """The folder and its state, `identity` and `engine` at first.

    Raises ValueError if another process is at work on `prefix`, or an interrupted run was another.
    """

    def __init__(self, prefix: str, identity: dict[str, Any], engine: str) -> None:
        self.folder = Path(f"{prefix}.partial")
        self._state_file = self.folder / "state.json"
        self.folder.mkdir(exist_ok=True)
        self._lock = open(self.folder / "lock", "w")
        if lock(self._lock) is False:
            raise ValueError(
                f"another process is writing {prefix}; wait, or choose another --output-prefix"
            )
        self.state = State(identity, engine)
        if self._state_file.exists():
            self._take_up(json.loads(self._state_file.read_text()))

    def _take_up(self, saved: dict[str, Any]) -> None:
        was, now = saved["identity"], json.loads(json.dumps(self.state.identity))
        for key in sorted(now.keys() & was.keys()):  # an older version noted fewer
            before, after = was[key], now[key]
            if before != after:
                if isinstance(before, list) and isinstance(after, list):  # of many what differs
                    pairs = itertools.zip_longest(before, after, fillvalue="none")
                    before, after = next(pair for pair in pairs if pair[0] != pair[1])
                raise ValueError(
                    f"{self.folder} holds an interrupted run with another {key} "
                    f"({before!s:.120}, now {after!s:.120}): go on with the same, or delete that "
                    "folder"
                )
        self.state = State(**saved | {"position": Position(**saved["position"])})

    def start_over(self, engine: str) -> None:
        """Forget what an engine did; its files are cut to nothing when they are opened again."""
        self.state = State(self.state.identity, engine)
        self.save()

    def save(self) -> None:
        """Replace state.json, which is whole at any instant."""
        write_whole(self._state_file, json.dumps(asdict(self.state)))

    def publish(self) -> None:
        """Move what is complete to its final places, then remove the folder."""
        for name, target in self.state.moves.items():
            if (self.folder / name).exists():  # else an interrupted call moved it
                check_absent([target])
                os.rename(self.folder / name, target)
        shutil.rmtree(self.folder)

    def close(self) -> None:
        """Let others in; remove the folder if there is nothing in it to go on from."""
        if not self.state.is_begun and self.folder.exists():
            shutil.rmtree(self.folder)
        self._lock.close()
