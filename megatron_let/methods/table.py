"""The one table of methods: their names stand here, and nowhere else.

It imports neither torch nor Megatron: the planner and the reports read it too. A method from
outside the tree is a row that `add_method` adds (docs/extending.md).
"""

import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from megatron_let.errors import UsageError

LET_LAYER = 3
LET_STOP_STEP = 1500
LET_GRADIENT_RATIO = 1.0
KD_STOP_SHARE = 0.173
"""SALT distils for this share of the steps (36K of 208K, arXiv 2410.18779)."""

_PLAIN = "megatron_let.methods.base:Method"
_WITH_TEACHER = "megatron_let.methods.guided:TeacherMethod"
_LET, _DISTILL = "megatron_let.methods.let:Let", "megatron_let.methods.distill:Distill"


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """One method: what it is called, what it is made of, and where its teacher works."""

    label: str
    """In tables and pictures."""
    help: str
    signals: Sequence[str | type] = ()
    """In which ways a teacher guides (`Signal`), each as `module:class` or the class itself."""
    method: str | type | None = None
    """What does it (`Method`); the default runs a teacher for the signals, or nothing."""
    aligns: bool = False
    """The teacher's states are wanted on the stage that owns layer K, until LET's stop step."""
    distils: bool = False
    """The teacher's logits are wanted on the last stage."""
    distils_to_the_end: bool = False
    """Not only until SALT's stop step."""

    @property
    def has_teacher(self) -> bool:
        """Whether there is one."""
        return bool(self.signals)

    def parts(self) -> list[Any]:
        """The classes of its method and of its signals; imports them."""
        method = self.method or (_WITH_TEACHER if self.signals else _PLAIN)
        return [
            part if isinstance(part, type) else pkgutil.resolve_name(part)
            for part in (method, *self.signals)
        ]


BASELINE, MAIN = "baseline", "let"
METHODS = {
    BASELINE: MethodRow(label="plain", help="plain next-token training, exactly Megatron"),
    MAIN: MethodRow(
        label="LET",
        help="Late-to-Early Training, a small frozen teacher's last layer guides an early student "
        "layer during the early steps",
        signals=[_LET],
        aligns=True,
    ),
    "salt": MethodRow(
        label="SALT",
        help="the teacher's logits are distilled during the first steps, then plain training",
        signals=[_DISTILL],
        distils=True,
    ),
    "reverse-kd": MethodRow(
        label="reverse KD",
        help="they are distilled during the whole run",
        signals=[_DISTILL],
        distils=True,
        distils_to_the_end=True,
    ),
    "let+salt": MethodRow(
        label="LET + SALT",
        help="both signals of one teacher",
        signals=[_LET, _DISTILL],
        aligns=True,
        distils=True,
    ),
}


def add_method(name: str, row: MethodRow) -> None:
    """Add a method to the table, before the command line is parsed.

    Raises:
        UsageError: there is one of this name.
    """
    if name in METHODS:
        raise UsageError(f"There is a method {name} already: give yours another name.")
    METHODS[name] = row


def method_row(name: str) -> MethodRow:
    """Return a method's row.

    Raises:
        UsageError: there is none.
    """
    if name not in METHODS:
        raise UsageError(
            f"--method {name} is unknown. Choose {', '.join(METHODS)}, or name the file of a "
            "method of your own with --method-module."
        )
    return METHODS[name]


def build_method(args: Any) -> Any:
    """Return the method (`Method`) that `--method` names, after its own checks of `args`."""
    method, *signals = method_row(args.method).parts()
    return method(args, signals) if signals else method(args)


def every_part() -> list[Any]:
    """What all methods are made of, each once."""
    return list(dict.fromkeys(part for row in METHODS.values() for part in row.parts()))


@dataclass(frozen=True)
class Flags:
    """Base of the groups of our flags; an instance holds the values of one run."""

    title: ClassVar[str]
    """Of their group in `--help`."""

    @classmethod
    def of(cls, args: Any) -> Self:
        """The values on a checked command line."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


def import_file(flag: str, path: str) -> None:
    """Run a Python file of the user's, once, which adds to our tables.

    Args:
        flag: that names it.
        path: the file.

    Raises:
        UsageError: there is no such file, or it fails.
    """
    file = Path(path).resolve()
    name = f"your_{file.stem}"
    if getattr(sys.modules.get(name), "__file__", None) == str(file):
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UsageError(f"{flag} {path}: there is no such Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look for it there
    try:
        spec.loader.exec_module(module)
    except UsageError:
        raise
    except Exception as error:
        del sys.modules[name]
        frames = traceback.extract_tb(error.__traceback__)
        where = "".join(f", line {frame.lineno}" for frame in frames if frame.filename == str(file))
        why = f"{type(error).__name__}: {error}"
        raise UsageError(f"{flag} {path}{where} cannot be run: {why}.") from error
