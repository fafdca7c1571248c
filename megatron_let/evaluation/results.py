"""What was measured of one model, kept in a file as it comes: a second call goes on."""

import json
from pathlib import Path
from typing import Any

from megatron_let.errors import UsageError


class Results(dict[str, Any]):
    """The results of one model in one file of JSON; one that exists is gone on with.

    `about` is what they were measured with; raises UsageError if the file's is another.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        try:
            before = json.loads(path.read_bytes()) if path.exists() else {}
            super().__init__(before.get("results", {}))
            was = before.get("about", about)
            others = {key: was.get(key) for key in about if was.get(key) != about[key]}
        except (AttributeError, TypeError, ValueError) as error:
            raise UsageError(f"{path} holds no results ({error}): remove it.") from error
        self._path, self._about = path, about
        for key, value in others.items():
            raise UsageError(
                f"{path} holds results with {key} {value}, and this is {about[key]}. Give another "
                "--output; nothing is overwritten."
            )
        path.parent.mkdir(parents=True, exist_ok=True)

    def keep(self, key: str, value: Any) -> None:
        """Add one result; the file is complete at any time."""
        self[key] = value
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps({"about": self._about, "results": self}, indent=1) + "\n")
        partial.replace(self._path)


def identity(folder: Path) -> dict[str, list[int]]:
    """Tell a model apart: size and time of change of its weights, configuration and tokenizer.

    Raises UsageError if the folder is no exported model.
    """
    files = sorted(folder.glob("*.safetensors"))
    others = [*sorted(folder.glob("*.json")), *sorted(folder.glob("tokenizer*/*"))]
    if not files or not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder} is no exported model: it lacks config.json or *.safetensors. Export a run "
            "with megatron-let convert to-hf."
        )
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in [*files, *others]}
