"""Our flags: one dataclass and one `--help` group each, and the checks that need no more than them.

Everything else on the command line is Megatron-LM's. On Megatron's `args` only plain scalars of
ours are left, since checkpoints save them and load them again with `weights_only`.
"""

import difflib
import functools
import re
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from megatron.training.argument_utils import ArgumentGroupFactory

from megatron_let.errors import UsageError
from megatron_let.methods.auto import choose
from megatron_let.methods.table import BASELINE, METHODS, Flags, every_part, import_file, method_row
from megatron_let.upstream import accelerators


@dataclass(frozen=True)
class MethodArguments(Flags):
    """How to train: every method sees the same batches in the same order."""

    title = "method"

    method: str = field(default=BASELINE, metadata={"argparse_meta": {"choices": METHODS}})

    method_module: list[str] | None = None
    """Python files with methods, losses or listeners of your own (docs/extending.md)."""

    cpu: bool = False
    """Run on CPU with gloo even though a GPU is there. Without a GPU this is the default."""

    verbose_console: bool = False
    """Show all that Megatron-LM prints; by default it goes to console/ in --save."""


@dataclass(frozen=True)
class CheckpointArguments(Flags):
    """Which checkpoints stay."""

    title = "checkpoints"

    save_keep_last: int | None = None
    """Keep this many of the newest checkpoints (with 2 a damaged one costs an interval); older ones
    go, except at multiples of --save-retain-interval. The default keeps what Megatron keeps."""


@dataclass(frozen=True)
class InitFlags(Flags):
    """A student that starts from a small model, where --load holds no checkpoint yet."""

    title = "growth"

    init_from: str | None = None
    """Folder or hub id of a small Llama or Qwen2 with the student's tokenizer."""

    init_width: Literal["pad", "clone"] = "pad"
    """pad: new features are zero; clone: features are repeated."""

    init_depth: Literal["identity", "stack", "interleave"] = "identity"
    """What new layers are: identity: they add nothing; stack: all layers, repeated; interleave:
    each layer, repeated. Only with identity does the student begin with the small model's loss."""

    init_symmetry: Literal["none", "noise", "next-layer"] = "none"
    """What sets the copies of --init-width clone apart: noise that cancels, or neurons of the next
    layer."""


@dataclass(frozen=True)
class DryRunFlags(Flags):
    """The run without a GPU, another rank or weights."""

    title = "dry run"

    dry_run: bool = False
    """Run two steps of some ranks on tensors without contents, and print what each holds, computes
    and sends. Nothing is read of --load, nothing is written."""

    dry_run_world_size: int | None = None
    """GPUs of the run; the default is the fewest that TP x PP takes."""

    dry_run_ranks: str = "one-per-stage"
    """Which ranks: this, or numbers with commas between them."""

    dry_run_gpu_memory: float = 80.0
    """GiB of one GPU."""


NOT_GROWN = dict.fromkeys(
    ("pretrained_checkpoint", "finetune"), "and --init-from both say where weights come from."
) | dict.fromkeys(
    "init_model_with_meta_device use_megatron_fsdp use_torch_fsdp2 fp8_param_gather".split(),
    "is not supported with --init-from, which fills weights before they are wrapped. Use "
    "megatron-let convert grow and from-hf, and --load.",
)
"""Arguments that do not go with --init-from, and why."""


def flag(name: str, value: object = True) -> str:
    """Return how a command line says an argument of this name and value."""
    word = f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return f"no {word}"
    return word if value is True else f"{word} {value}"


def groups() -> list[type[Flags]]:
    """The groups of our flags; a method of the user's may have brought one."""
    return [*method_groups(), InitFlags, CheckpointArguments, DryRunFlags]


def method_groups() -> list[type[Flags]]:
    """The groups of the flags of all methods, one for each title."""
    parts = (part.flag_group for part in every_part() if part.flag_group is not Flags)
    return list({group.title: group for group in (MethodArguments, *parts)}.values())


def add_groups(parser: ArgumentParser, groups: Iterable[type[Flags]]) -> ArgumentParser:
    """Add groups of our flags, the methods' among them."""
    for group in groups:
        ArgumentGroupFactory(group).build_group(parser, title=f"megatron_let: {group.title}")
    action = next(action for action in parser._actions if action.dest == "method")
    action.help = ". ".join(f"{name}: {row.help}" for name, row in METHODS.items())
    return parser


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add our groups, first in `--help`, and the platform's defaults (`extra_args_provider`)."""
    parser.description = (
        "Pre-train a GPT on Megatron-Core, with or without the help of a small frozen teacher. "
        "The first groups are this program's own; all others are Megatron-LM's flags, unchanged."
    )
    # The synopsis that argparse makes of 900 flags hides what follows it: help, or an error.
    parser.usage = "%(prog)s <Megatron-LM's flags> [--method let --teacher-model FOLDER_OR_ID ...]"
    parser.formatter_class = ArgumentDefaultsHelpFormatter
    parser.error = functools.partial(_unknown, parser, parser.error)  # type: ignore[assignment,method-assign]
    upstream = len(parser._action_groups)
    add_groups(parser, groups())
    every = parser._action_groups
    every[:] = every[upstream:] + every[:upstream]
    for action in parser._actions:  # a bare % in a help text of Megatron's ends --help
        action.help = action.help and re.sub(r"(?<!%)%(?![(%])", "%%", action.help)
    # The format that another layout can resume from; Megatron's default one cannot be resharded.
    parser.set_defaults(dist_ckpt_optim_fully_reshardable=True, **accelerators.platform_defaults())
    return parser


def _unknown(parser: ArgumentParser, end: Callable[[str], None], message: str) -> None:
    """An error of argparse's, with the nearest name for each flag that it does not know."""
    known = [name for name in parser._option_string_actions if name.startswith("--")]
    words = message.split() if message.startswith("unrecognized arguments") else []
    for word in (word.partition("=")[0] for word in words if word.startswith("--")):
        near = difflib.get_close_matches(word, known, n=1)
        message += f"; {word}: did you mean {near[0]}?" if near else ""
    end(message)


def import_methods(argv: list[str]) -> None:
    """Run the files that --method-module names: their methods and flags must be there first."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method-module", nargs="+", default=[])
    for path in parser.parse_known_args(argv[1:])[0].method_module:
        import_file("--method-module", path)


def check_flags(args: Namespace, argv: list[str]) -> None:
    """Check our flags against each other, and fill in defaults that depend on other flags.

    Raises UsageError, which names the flag, its value and the way out.
    """
    known = {name: _flags_of(row.parts()) for name, row in METHODS.items()}
    for word in (word.split("=")[0] for word in argv):
        able = [name for name in METHODS if word in known[name]]
        if able and args.method not in able:
            guided = " to train with a teacher" * all(METHODS[name].has_teacher for name in able)
            raise UsageError(
                f"{word} has no effect with --method {args.method}. "
                f"Remove it, or add --method {' or '.join(able)}{guided}."
            )
    if method_row(args.method).has_teacher and args.guidance == "auto":
        choose(args, argv)
    for part in method_row(args.method).parts():
        part.check_flags(args)


def _flags_of(parts: list[Any]) -> set[str]:
    names = [field.name for part in parts for field in fields(part.flag_group)]
    return {flag(prefix + name) for prefix in ("", "no_", "disable_") for name in names}


def check_groups(args: Namespace) -> None:
    """Check the flags that belong to no method; raises UsageError, which names one."""
    needed = ("save", CheckpointArguments), ("init_from", InitFlags), ("dry_run", DryRunFlags)
    for name, group in needed:
        for own, value in vars(group.of(args)).items():
            if value != getattr(group, own) and getattr(args, name) in (None, False):
                raise UsageError(f"{flag(own, value)} has no effect without {flag(name)}.")
    for name, why in NOT_GROWN.items() if args.init_from is not None else ():
        if getattr(args, name):
            raise UsageError(f"{flag(name)} {why}")
