"""The flags that the recipes in `examples/pile_*` start a run with, and the plan of such a run."""

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from megatron_let.commands import plan
from megatron_let.planning.plan import Plan
from megatron_let.program import expanded, without  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
BLEND = "pile_text_blend.txt"


def recipe_flags(
    size: str,
    method: str,
    teacher: str,
    folder: Path,
    tokenizer: str | None = None,
    blend: str = "1 a_text_document 2 b_text_document",
) -> list[str]:
    """The flags of a recipe whose data and checkpoints would lie in `folder`; nothing is run."""
    if tokenizer is None:
        tokenizer = "smollm-135m" if teacher.startswith("/") else teacher
    prepared = folder / "data" / Path(tokenizer).name
    prepared.mkdir(parents=True, exist_ok=True)
    (prepared / BLEND).write_text(blend + "\n")
    env = {"METHOD": method, "TEACHER": teacher, "TOKENIZER": tokenizer}
    env |= {"DATA": str(folder / "data"), "SAVE": str(folder / "save"), "PRINT": "1"}
    script = ["bash", str(_script(size))]
    done = subprocess.run(script, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return expanded(shlex.split(done.stdout))


def default_teacher(size: str) -> str:
    """The name of a recipe's own teacher, one of `planning.shapes.TEACHERS`."""
    found = re.search(r"^default_teacher=(\S+)", _script(size).read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def _script(size: str) -> Path:
    return ROOT / "examples" / f"pile_{size}" / "train.sh"


def planned(flags: Sequence[str], gpus: int, teacher: str, *more: str) -> Plan:
    """What `tools/plan.py` says of a run with these flags of `pretrain_let.py` and its own ones."""
    words = [*plan.words_of(flags), "--gpus", str(gpus), "--teacher", teacher, *more]
    return plan.plan(*plan.parts(plan.build_parser().parse_args(words)))
