"""The folder PREFIX.partial, where a preprocessing run lies until it is complete.

Killed at any instant, a run goes on from its last commit: everything behind it is cut off. What is
complete is moved to its final places, indices last, and that too can be taken up again.
"""

import fcntl
import json
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_let.data.sources import Position


@dataclass
class State:
    """How far a run is: what state.json holds."""

    identity: dict[str, Any]
    """What must be the same for a call to go on with a run."""
    engine: str
    position: Position = field(default_factory=Position)
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Of each dataset's files."""
    groups: dict[str, str] = field(default_factory=dict)
    """The value of --split-by-meta that each dataset's name stands for."""
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Documents, empty documents, tokens and bytes of text of each dataset."""
    skipped: dict[str, int] = field(default_factory=dict)
    """How many records were left out, for each reason."""
    skipped_bytes: int = 0
    inputs: list[dict[str, Any]] = field(default_factory=list)
    """Path, size and SHA-256 of every file that was read to its end."""
    moves: dict[str, str] = field(default_factory=dict)
    """Once complete: what lies here under a name, and where it goes, in this order."""


class Workplace:
    """The folder and its state; one process at a time.

    Args:
        prefix: the run's --output-prefix.
        identity: see `State`.

    Raises:
        ValueError: another process is at work here, or an interrupted run was another one.
    """

    def __init__(self, prefix: str, identity: dict[str, Any]) -> None:
        self.folder = Path(f"{prefix}.partial")
        self._state_file = self.folder / "state.json"
        self.folder.mkdir(exist_ok=True)
        self._lock = open(self.folder / "lock", "w")
        try:
            # Not `flock`: a killed run's workers would hold that one a moment longer.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"another process is writing {prefix}; wait for it, or choose another "
                "--output-prefix"
            ) from error
        self.state = self._load(identity)

    def _load(self, identity: dict[str, Any]) -> State | None:
        if not self._state_file.exists():
            return None
        saved = json.loads(self._state_file.read_text())
        saved["position"] = Position(**saved["position"])
        state = State(**saved)
        now = json.loads(json.dumps(identity))
        changed = sorted(key for key in now if now[key] != state.identity.get(key))
        if changed:
            was, is_now = (str(which.get(changed[0])) for which in (state.identity, now))
            raise ValueError(
                f"{self.folder} holds an interrupted run with another {changed[0]} "
                f"({_short(was)}, now {_short(is_now)}): go on with the same, or delete that folder"
            )
        return state

    def start(self, identity: dict[str, Any], engine: str) -> State:
        """Begin anew, with nothing of an earlier attempt left."""
        self.clear()
        self.state = State(identity=identity, engine=engine)
        return self.state

    def save(self, state: State) -> None:
        """Replace state.json, which is whole at any instant."""
        partial = self._state_file.with_suffix(".tmp")
        with partial.open("w") as file:
            json.dump(asdict(state), file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._state_file)

    def clear(self) -> None:
        """Delete everything but the lock."""
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()

    def publish(self, state: State) -> None:
        """Move what is complete to its final places, then remove the folder."""
        for name, target in state.moves.items():
            if not (self.folder / name).exists():  # an interrupted call moved it
                continue
            if os.path.exists(target):
                raise ValueError(
                    f"output {target} exists already and is not overwritten; move it away and call "
                    "again"
                )
            os.rename(self.folder / name, target)
        shutil.rmtree(self.folder)

    def close(self, keep: bool) -> None:
        """Let others in; without `keep` remove the folder."""
        if not keep and self.folder.exists():
            shutil.rmtree(self.folder)
        self._lock.close()


def add_counts(state: State, name: str, counts: dict[str, int]) -> None:
    """Add to what a dataset holds."""
    total = Counter(state.counts.get(name, {}))
    total.update(counts)
    state.counts[name] = dict(total)


def _short(text: str) -> str:
    return text if len(text) <= 120 else text[:117] + "..."
