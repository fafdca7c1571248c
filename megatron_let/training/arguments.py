"""Our flags: one dataclass and one `--help` group each, and the checks that need no more than them.

Everything else on the command line is Megatron-LM's. On Megatron's `args` only plain scalars of
ours are left, since checkpoints save them and load them again with `weights_only`.
"""

import math
import re
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from typing import Literal

from megatron.training.argument_utils import ArgumentGroupFactory

from megatron_let.errors import UsageError
from megatron_let.planning.run import (
    KD_STOP_SHARE,
    LET_LAYER,
    LET_STOP_STEP,
    METHODS,
    Guidance,
)
from megatron_let.upstream import accelerators


@dataclass
class MethodArguments:
    """How to train: every method sees the same batches in the same order."""

    method: Literal["baseline", "let", "salt", "reverse-kd", "let+salt"] = "baseline"
    """baseline: plain next-token training, exactly Megatron. let: Late-to-Early Training, a small
    frozen teacher's last layer guides an early student layer during the early steps. salt: the
    teacher's logits are distilled during the first steps, then plain training. reverse-kd: they
    are distilled during the whole run. let+salt: both signals of one teacher."""

    cpu: bool = False
    """Run on CPU with gloo even though a GPU is there. Without a GPU this is the default."""


@dataclass
class TeacherArguments:
    """The small frozen model that guides the student; never trained, never in a checkpoint."""

    teacher_model: str | None = None
    """Folder or hub id of a Hugging Face causal language model with the student's tokenizer."""

    teacher_revision: str | None = None
    """Branch, tag or commit of a hub id; the default is its main branch."""

    teacher_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Precision of the teacher's forward pass; the default is the student's."""

    teacher_control: Literal["none", "random", "shuffled", "zero"] = "none"
    """An experiment's control. random: an untrained teacher of the same shape; shuffled: its states
    of other positions; zero: it works, and nothing of it reaches the student."""


@dataclass
class LetArguments:
    """Late-to-Early Training (arXiv 2602.05393); defaults are the paper's where it states one."""

    let_layer: int = LET_LAYER
    """Student layer to align, counted from 1. The paper says "an early layer"."""

    let_teacher_layer: int | None = None
    """Layer of the teacher to align it with, counted from 1; the default is its last, after its
    final norm. The layers behind another one are not run."""

    let_weight: float = 0.1
    """Weight of the alignment loss at the first step (the paper's best of 0.01 to 3.0)."""

    let_stop_step: int | None = None
    """Step from which on the weight is zero and the teacher is released. Default 1500, or none
    with --let-decay constant."""

    let_stop_samples: int | None = None
    """The same, counted in training samples."""

    let_decay: Literal["linear", "cosine", "step", "constant"] = "linear"
    """Course of the weight: linear or cosine to zero at the stop step, step: full weight until
    there, constant: full weight during the whole run."""

    let_resize: Literal["interpolate", "linear"] = "interpolate"
    """How a teacher's states of another width are brought to the student's: interpolate along the
    features (no parameters), or linear, a learned map that is trained with the student, saved and
    resumed, never exported."""


@dataclass
class DistillArguments:
    """SALT (arXiv 2410.18779) and reverse KD; neither weight nor temperature is known for sure."""

    kd_weight: float = 0.667
    """Part of the distillation in the loss, 0 to 1; the rest is the language-model loss. For a
    teacher much smaller than the student try 0.2 to 0.5."""

    kd_temperature: float = 1.0
    """What the teacher's logits are divided by."""

    kd_stop_step: int | None = None
    """SALT's step from which on training is plain and the teacher released; the default is 17.3
    percent of the run's steps."""

    kd_decay: Literal["step", "linear", "ratio-linear"] = "step"
    """SALT's course of the weight until there: full weight, linear to zero, or the ratio of the
    two losses linear to zero."""

    kd_selection: str | None = None
    """SALT_DS: file of tools/select_data.py with the samples to see until the stop step."""


@dataclass
class CheckpointArguments:
    """Which checkpoints stay."""

    save_keep_last: int | None = None
    """Keep this many of the newest checkpoints; older ones are removed, except at multiples of
    --save-retain-interval. The default keeps what Megatron keeps."""


GROUPS = {
    "megatron_let: method": MethodArguments,
    "megatron_let: teacher": TeacherArguments,
    "megatron_let: LET": LetArguments,
    "megatron_let: distillation": DistillArguments,
    "megatron_let: checkpoints": CheckpointArguments,
}


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add our groups, first in `--help`, and the platform's defaults (`extra_args_provider`)."""
    parser.description = (
        "Pre-train a GPT on Megatron-Core, with or without the help of a small frozen teacher. "
        "The first groups are this program's own; all others are Megatron-LM's flags, unchanged."
    )
    # The synopsis that argparse makes of 900 flags hides what follows it: help, or an error.
    parser.usage = "%(prog)s <Megatron-LM's flags> [--method let --teacher-model FOLDER_OR_ID ...]"
    upstream = list(parser._action_groups)
    for title, dataclass_ in GROUPS.items():
        ArgumentGroupFactory(dataclass_).build_group(parser, title=title)
    ours = [group for group in parser._action_groups if group not in upstream]
    parser._action_groups[:] = ours + upstream
    for action in parser._actions:  # a bare % in a help text of Megatron's ends --help
        action.help = action.help and re.sub(r"(?<!%)%(?![(%])", "%%", action.help)
    # The format that another layout can resume from; Megatron's default one cannot be resharded.
    parser.set_defaults(dist_ckpt_optim_fully_reshardable=True, **accelerators.platform_defaults())
    return parser


def check_flags(args: Namespace, argv: list[str]) -> None:
    """Check our flags against each other before Megatron looks at its own.

    Raises:
        UsageError: naming the flag, its value and the way out.
    """
    prefixes = {method: _prefixes(guidance) for method, guidance in METHODS.items()}
    every_prefix = sum(prefixes.values(), ())
    for flag in (word.split("=")[0] for word in argv if word.startswith(every_prefix)):
        if not flag.startswith(prefixes[args.method]):
            able = [method for method, known in prefixes.items() if flag.startswith(known)]
            raise UsageError(
                f"{flag} has no effect with --method {args.method}. "
                f"Remove it, or add --method {' or '.join(able)} to train with a teacher."
            )
    guidance = METHODS[args.method]
    if guidance.has_teacher:
        _check_teacher(args)
    if guidance.aligns:
        _check_let(args)
    if guidance.distils:
        _check_distillation(args)
    _check_keep_last(args)


def _prefixes(guidance: Guidance) -> tuple[str, ...]:
    """What the flags begin with that a method knows."""
    kinds = {
        "--let-": guidance.aligns,
        "--kd-": guidance.distils,
        "--teacher-": guidance.has_teacher,
    }
    return tuple(prefix for prefix, known in kinds.items() if known)


def _check_keep_last(args: Namespace) -> None:
    if args.save_keep_last is None:
        return
    if args.save_keep_last < 1:
        raise UsageError(
            f"--save-keep-last {args.save_keep_last} would keep no checkpoint; use at least 1, or "
            "2 so that a damaged newest one costs one interval."
        )
    if args.save is None:
        raise UsageError(f"--save-keep-last {args.save_keep_last} has no effect without --save.")


def _check_teacher(args: Namespace) -> None:
    if args.teacher_model is None:
        raise UsageError(
            f"--method {args.method} needs a teacher. Add --teacher-model with the folder or hub "
            "id of a small Hugging Face causal language model that has the student's tokenizer."
        )


def _check_let(args: Namespace) -> None:
    if args.num_layers is not None and not 1 <= args.let_layer <= args.num_layers:
        raise UsageError(
            f"--let-layer {args.let_layer} is outside the model: --num-layers {args.num_layers} "
            f"allows 1 to {args.num_layers} (an early layer is meant, such as 2 or 3)."
        )
    if not (args.let_weight > 0 and math.isfinite(args.let_weight)):
        raise UsageError(
            f"--let-weight {args.let_weight} cannot guide the student; use a positive weight "
            "(the paper's is 0.1), or --method baseline."
        )
    _resolve_stop(args)


def _resolve_stop(args: Namespace) -> None:
    given = [args.let_stop_step is not None, args.let_stop_samples is not None]
    if args.let_decay == "constant":
        if any(given):
            raise UsageError(
                "--let-decay constant guides the whole run, so a stop has no effect. Remove "
                "--let-stop-step / --let-stop-samples, or use --let-decay step to stop there."
            )
        return
    if all(given):
        raise UsageError("Give --let-stop-step or --let-stop-samples, not both.")
    if not any(given):
        args.let_stop_step = LET_STOP_STEP
    for name, stop, total in (
        ("step", args.let_stop_step, _run_length(args, "steps")),
        ("samples", args.let_stop_samples, _run_length(args, "samples")),
    ):
        if stop is not None and stop < 1:
            raise UsageError(f"--let-stop-{name} {stop} must be at least 1.")
        if stop is not None and total is not None and stop > total:
            raise UsageError(
                f"The guidance would end after the run: --let-stop-{name} "
                f"{stop}{'' if any(given) else ' (the default)'} is beyond the run's {total}. "
                f"Choose a stop of at most {total}, or --let-decay constant for the whole run."
            )


def _run_length(args: Namespace, unit: str) -> int | None:
    """Steps or samples of the whole run; None as long as the flags do not tell."""
    given = {"steps": args.train_iters, "samples": args.train_samples}
    if given[unit] is not None:
        return given[unit]
    if args.global_batch_size is None or args.step_batch_size_schedule is not None:
        return None
    if unit == "steps":
        return args.train_samples and args.train_samples // args.global_batch_size
    return args.train_iters and args.train_iters * args.global_batch_size


def _check_no_stop(args: Namespace) -> None:
    given = [args.kd_stop_step is not None, args.kd_decay != "step", args.kd_selection is not None]
    if any(given):
        raise UsageError(
            "--kd-stop-step, --kd-decay and --kd-selection have no effect with --method "
            "reverse-kd, which distils during the whole run. Remove them, or use --method salt."
        )


def _check_salt_stop(args: Namespace) -> None:
    steps = _run_length(args, "steps")
    if args.kd_stop_step is None and steps is not None:
        args.kd_stop_step = max(1, round(KD_STOP_SHARE * steps))
    stop = args.kd_stop_step
    if stop is None and args.step_batch_size_schedule is not None:
        raise UsageError(
            "--method salt needs --kd-stop-step where --step-batch-size-schedule is given."
        )
    if stop is not None and not 1 <= stop <= (steps or stop):
        raise UsageError(
            f"--kd-stop-step {stop} is outside the run: choose 1 to {steps}, or --method "
            "reverse-kd to distil during the whole run."
        )
    if args.kd_selection is not None and args.dataloader_type not in (None, "single"):
        raise UsageError(
            f"--kd-selection has no effect with --dataloader-type {args.dataloader_type}, which "
            "draws its own order. Use --dataloader-type single."
        )
    if args.kd_decay == "ratio-linear" and args.kd_weight == 1:
        raise UsageError(
            "--kd-decay ratio-linear divides by the language-model loss's part, which --kd-weight "
            "1 makes zero. Use a smaller weight, or --kd-decay linear."
        )


def _check_distillation(args: Namespace) -> None:
    if not 0 < args.kd_weight <= 1:
        raise UsageError(
            f"--kd-weight {args.kd_weight} is no part of a loss: choose more than 0 and at most 1, "
            "or --method baseline."
        )
    if not (args.kd_temperature > 0 and math.isfinite(args.kd_temperature)):
        raise UsageError(f"--kd-temperature {args.kd_temperature} must be positive.")
    if METHODS[args.method].distils_to_the_end:
        _check_no_stop(args)
    else:
        _check_salt_stop(args)
