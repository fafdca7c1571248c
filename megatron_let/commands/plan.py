"""Plan a pre-training run on paper: parameters, FLOPs, memory per rank, stage balance, days.

Needs no GPU, no weights and no Megatron. For example:

    megatron-let plan --student 1.4b --teacher smollm-135m --gpus 32 --pp 4
    megatron-let plan --gpus 32 --search -- <the flags of the run>

Behind -- stand the flags of a run; what would change size or cost and is not known here is refused.
"""

import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace, _ArgumentGroup
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_let.commands import mistakes_told, tool_parser
from megatron_let.dry_run.start import found_by
from megatron_let.errors import UsageError
from megatron_let.methods.table import BASELINE, LET_LAYER, LET_STOP_STEP, MAIN, METHODS
from megatron_let.planning import shapes
from megatron_let.planning.memory import RUNTIME_BYTES
from megatron_let.planning.plan import Plan, plan, search
from megatron_let.planning.run import Gpu, Layout, RunShape
from megatron_let.planning.shapes import ModelShape
from megatron_let.planning.text import page, ranking
from megatron_let.program import expanded, named, values_of, without

LAYOUT_FLAGS = named(
    "tensor-model-parallel-size pipeline-model-parallel-size micro-batch-size sequence-parallel "
    "num-virtual-stages-per-pipeline-rank decoder-first-pipeline-num-layers "
    "decoder-last-pipeline-num-layers recompute-granularity recompute-activations "
    "recompute-method recompute-num-layers recompute"
)
"""What a search tries; of a run, what the layout that it finds replaces."""
UNPLANNED = named(
    "account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split "
    "attention-output-gate cpu-offloading-num-layers disable-pad-vocab-size "
    "distribute-saved-activations experimental-attention-variant "
    "fine-grained-activation-offloading fp32-residual-connection fp4-format fp8-format "
    "grad-reduce-in-bf16 heterogeneous-layers-config-encoded-json "
    "heterogeneous-layers-config-path hybrid-layer-pattern hybrid-override-pattern "
    "let-teacher-layer microbatch-group-size-per-virtual-pipeline-stage mtp-num-layers "
    "multi-latent-attention no-pad-vocab-size num-distributed-optimizer-instances num-experts "
    "num-layers-per-virtual-pipeline-stage optimizer-cpu-offload pipeline-model-parallel-layout "
    "quick-geglu recompute-modules spec step-batch-size-schedule train-samples "
    "use-checkpoint-args use-megatron-fsdp use-precision-aware-optimizer "
    "use-rotary-position-embeddings use-torch-fsdp2 window-size"
)
"""Flags of a run that change its size or cost, and not as this tool knows."""
PLANNED = {
    "--guidance": "flags",
    "--optimizer": "adam",
    "--recompute-method": "uniform",
    "--recompute-num-layers": "1",
    "--teacher-dtype": "bf16 fp16",
}
"""Others such, and the values that are known."""
NEEDED = ("--seq-length", "--micro-batch-size", "--global-batch-size")
"""What this tool has defaults for, and a run has none, or one that depends on its layout."""
BESIDE_A_DRY_RUN = named(
    "gpus search dry-run mfu gpu-peak-tflops gpu-memory-gib student teacher vocab-size"
)
UNFUSED = ("unfused", "local")
"""Attention that keeps its scores."""


def build_parser() -> ArgumentParser:
    """Return the command line; flags that Megatron has too are spelled as there."""
    parser = tool_parser(__doc__, "plan", allow_abbrev=False)
    _add_student_flags(parser.add_argument_group("student"))
    _add_method_flags(parser.add_argument_group("method"))
    _add_layout_flags(parser.add_argument_group("layout"))
    _add_run_flags(parser.add_argument_group("run"))
    return parser


def _add_student_flags(group: _ArgumentGroup) -> None:
    add, number = group.add_argument, partial(group.add_argument, type=int, metavar="N")
    student = f"{', '.join(shapes.STUDENTS)}, which the flags below override; or a folder"
    add("--student", metavar="NAME", help=student)
    for name in (*shapes.SIZES, "max_position_embeddings"):
        number("--" + name.replace("_", "-"))
    rows = partial(group.add_mutually_exclusive_group().add_argument, type=int, metavar="N")
    rows("--vocab-size", help="default: the tokenizer's or teacher's")
    rows("--padded-vocab-size", help="rows, as they are")
    add("--tokenizer-model", metavar="NAME", help="whose vocabulary is the student's")
    number("--make-vocab-size-divisible-by", default=128, help="default: %(default)s")
    untie = "--untie-embeddings-and-output-weights"
    add(untie, action="store_const", const=False, dest="tied")
    add("--swiglu", action="store_const", const=True, dest="gated")
    add("--qk-layernorm", action="store_const", const=True, dest="qk_norm")
    add("--disable-bias-linear", action="store_true")
    add("--add-qkv-bias", action="store_const", const=True, dest="qkv_bias")
    add("--normalization", choices=["LayerNorm", "RMSNorm"])
    add("--position-embedding-type", choices=["learned_absolute", "rope", "none"])


def _add_method_flags(group: _ArgumentGroup) -> None:
    add, number = group.add_argument, partial(group.add_argument, type=int, metavar="N")
    add("--method", choices=list(METHODS), default=MAIN, help="default: %(default)s")
    teacher = f"{', '.join(shapes.TEACHERS)}, or a model's folder"
    add("--teacher", "--teacher-model", metavar="NAME_OR_FOLDER", help=teacher)
    row = "tokens that a teacher with another tokenizer reads for a row (default: the row's)"
    number("--teacher-seq-length", help=row)
    add("--let-layer", type=int, metavar="K", help=f"default: {LET_LAYER}")
    number("--let-stop-step", help=f"default: {LET_STOP_STEP}")
    number("--kd-stop-step", help="default: 17.3 %% of the run")
    add("--guidance-stop", choices=["step", "loss", "cosine"], default="step")


def _add_layout_flags(group: _ArgumentGroup) -> None:
    add, number = group.add_argument, partial(group.add_argument, type=int, metavar="N")
    number("--gpus", required=True)
    number("--tp", "--tensor-model-parallel-size", default=1, dest="tp")
    number("--pp", "--pipeline-model-parallel-size", default=1, dest="pp")
    number("--cp", "--context-parallel-size", default=1, dest="cp")
    number("--vpp", "--num-virtual-stages-per-pipeline-rank", default=1, dest="vpp")
    number("--decoder-first-pipeline-num-layers", dest="first_stage_layers")
    number("--decoder-last-pipeline-num-layers", dest="last_stage_layers")
    switch = BooleanOptionalAction
    add("--sequence-parallel", action=switch, help="default: if --tp is above 1")
    add("--distributed-optimizer", action=switch, default=True)
    add("--flash-attention", action=switch, default=True)
    levels = ["none", "selective", "full"]
    add("--recompute", "--recompute-granularity", choices=levels, default="none")
    add("--search", action="store_true", help="rank all layouts and micro-batches that fit")
    dry = "and run the best ones dry; needs flags behind --"
    add("--dry-run", action="store_true", help=dry)


def _add_run_flags(group: _ArgumentGroup) -> None:
    passes = "share of the peak at which a stage's work passes, bubble left out"
    for name, default, what in (
        ("--seq-length", 2048, "tokens"),
        ("--micro-batch-size", 4, "rows"),
        ("--global-batch-size", 512, "rows of a step"),
        ("--mfu", Gpu.mfu, passes),
        ("--gpu-peak-tflops", Gpu.peak_tflops, "A100, bf16; H100: 989"),
        ("--gpu-memory-gib", Gpu.memory_gib, "of one GPU"),
    ):
        text, kind = f"{what} (default: {default:g})", type(default)
        field = name.removeprefix("--").removeprefix("gpu-").replace("-", "_")
        group.add_argument(name, type=kind, default=default, metavar="N", help=text, dest=field)
    length = partial(group.add_mutually_exclusive_group().add_argument, metavar="N")
    length("--train-iters", type=int, help="steps")
    length("--train-tokens", type=float, default=20e9, help="default: 20e9, the paper's")
    group.add_argument("--dropout", action="store_true", help="the run has dropout")


def parts(args: Namespace) -> tuple[ModelShape, ModelShape | None, Layout, RunShape, Gpu]:
    """Return what the command line asks to plan, as `planning.plan.plan` takes it."""
    _refuse_without_effect(args)
    teacher = None if args.teacher is None else shapes.teacher_shape(args.teacher)
    student = _student(args, teacher)
    if args.train_iters is None:
        tokens_per_step = max(1, args.global_batch_size * args.seq_length)
        if not tokens_per_step <= args.train_tokens < float("inf"):
            raise UsageError(
                f"--train-tokens {args.train_tokens:g} is not a run: a step alone has "
                f"{tokens_per_step} tokens. The default is 20e9."
            )
        args.train_iters = int(args.train_tokens // tokens_per_step)
    return student, teacher, _of(Layout, args), _of(RunShape, args), _of(Gpu, args)


def words_of(flags: Sequence[str], own: Sequence[str] = ()) -> list[str]:
    """A run's flags as this tool spells them, with Megatron's defaults where they are others.

    Left out are those that change neither size nor cost, and with `--search` among the flags of
    this tool's `own` those of the layout. Raises UsageError for one that changes them in a way that
    is not known here.
    """
    tried = LAYOUT_FLAGS if "--search" in own else named("")
    words = without(flags, tried)
    values = values_of(words)
    for name, value in sorted(values.items()):
        if UNPLANNED(name) or (name in PLANNED and value not in PLANNED[name].split()):
            way_out = f" Only {PLANNED[name]} is." if name in PLANNED else ""
            raise UsageError(
                f"{name} is not planned here; pretrain_let.py --dry-run may take it.{way_out}"
            )
    for name in NEEDED:
        if name not in [*values, *own] and not tried(name):
            raise UsageError(f"The flags of the run have no {name}. Add it.")
    if "--bf16" not in values and "--fp16" not in values:
        raise UsageError("A run without --bf16 or --fp16 is one in fp32: not planned here.")
    if "--fp16" in values and "--accumulate-allreduce-grads-in-fp32" not in values:
        raise UsageError(
            "Gradients in fp16 are not planned here. Megatron-LM keeps them in fp32 "
            "with --accumulate-allreduce-grads-in-fp32."
        )
    if "--vocab-file" in values and "--vocab-size" not in own:
        raise UsageError(
            "How many tokens --vocab-file has is not known on paper. Add --vocab-size "
            "with their number, before --."
        )
    known = build_parser()._option_string_actions.keys() - {"--dry-run"}
    if "--group-query-attention" not in values:  # which alone makes Megatron read it
        known -= {"--num-query-groups"}
    if values.keys() & {"--tokenizer-model", "--vocab-file"}:  # which have their own
        known -= {"--vocab-size"}
    if values.get("--position-embedding-type", "learned_absolute") != "learned_absolute":
        known -= {"--max-position-embeddings"}  # a limit then, and no rows
    return [*_defaults(values), *without(words, (values.keys() - known).__contains__)]


def _defaults(values: Mapping[str, str]) -> list[str]:
    """What a run's flags say without a word of this tool's."""
    dropouts = (values.get(f"--{kind}-dropout", "0.1") for kind in ("attention", "hidden"))
    is_split = values.get("--tensor-model-parallel-size", "1") != "1"
    to_the_end = values.get("--let-decay") == "constant" and "--train-iters" in values
    is_local = values.get("--transformer-impl") == "local"
    found = {
        f"--method {BASELINE}": "--method" not in values,
        "--no-distributed-optimizer": "--use-distributed-optimizer" not in values,
        "--no-sequence-parallel": is_split and "--sequence-parallel" not in values,
        "--no-flash-attention": is_local or values.get("--attention-backend") in UNFUSED,
        "--dropout": any(share.strip(".0") for share in dropouts),
        "--recompute selective": "--recompute-activations" in values,
        "--num-query-groups 1": "--group-query-attention" in values,
        f"--let-stop-step {values.get('--train-iters')}": to_the_end,
    }
    return " ".join(words for words, holds in found.items() if holds).split()


def _of[Part: (Layout, RunShape, Gpu)](part: type[Part], args: Namespace) -> Part:
    """A part of the plan from the flags of its fields; where one was not given, its default."""
    given = {field.name: getattr(args, field.name) for field in fields(part)}
    return part(**{name: value for name, value in given.items() if value is not None})


def _refuse_without_effect(args: Namespace) -> None:
    guidance, parser = METHODS[args.method], build_parser()
    idle: dict[str, str] = {}
    if not guidance.aligns:
        idle |= dict.fromkeys(("let_layer", "let_stop_step"), f"--method {args.method}")
    if not guidance.distils or guidance.distils_to_the_end:
        idle["kd_stop_step"] = f"--method {args.method}"
    if not guidance.has_teacher:
        idle["guidance_stop"] = f"--method {args.method}"
    if _is_folder(args.student):
        [group] = (group for group in parser._action_groups if group.title == "student")
        own = {flag.dest for flag in group._group_actions}
        own -= {"student", "make_vocab_size_divisible_by"}
        idle |= dict.fromkeys(own, "a folder as --student, whose config.json says it")
    for flag in parser._actions:
        why = idle.get(flag.dest)
        if args.search and any(map(LAYOUT_FLAGS, flag.option_strings)):
            why = "--search, which tries all"
        if why is not None and vars(args)[flag.dest] != flag.default:
            raise UsageError(f"{flag.option_strings[0]} has no effect with {why}. Remove it.")


def _is_folder(name: str | None) -> bool:
    return name is not None and Path(name).expanduser().is_dir()


def _student(args: Namespace, teacher: ModelShape | None) -> ModelShape:
    def padded(rows: int) -> int:
        divisor = args.make_vocab_size_divisible_by
        return shapes.padded_vocab_size(rows, tp=args.tp, divisible_by=divisor)

    if _is_folder(args.student):
        found = shapes.teacher_shape(args.student)
        return replace(found, vocab_size=padded(found.vocab_size))
    rows, longest = args.padded_vocab_size, args.max_position_embeddings
    if rows is None:
        rows = padded(_vocabulary(args, teacher))
    names = (*shapes.SIZES, "gated", "tied", "qk_norm", "qkv_bias")
    changes: dict[str, Any] = {name: getattr(args, name) for name in names}
    if args.normalization is not None:
        changes["rms_norm"] = args.normalization == "RMSNorm"
    if args.disable_bias_linear:
        changes |= shapes.NO_BIAS | {"qkv_bias": bool(args.qkv_bias)}
    # Megatron learns positions by default; the presets rotate.
    default = "learned_absolute" if args.student is None else "rope"
    if (args.position_embedding_type or default) == "learned_absolute":
        changes["position_rows"] = args.seq_length if longest is None else longest
        if changes["position_rows"] < args.seq_length:
            raise UsageError(
                f"--max-position-embeddings {longest} is less than --seq-length {args.seq_length}."
            )
    elif longest is not None:
        raise UsageError(
            "--max-position-embeddings has no effect without learned positions. Remove it, or add "
            "--position-embedding-type learned_absolute."
        )
    return shapes.student_shape(args.student, vocab_size=rows, changes=changes)


def _vocabulary(args: Namespace, teacher: ModelShape | None) -> int:
    """Tokens that the student knows, before they are padded."""
    if args.vocab_size is not None:
        return args.vocab_size
    if args.tokenizer_model not in (None, args.teacher):
        try:
            return shapes.teacher_shape(args.tokenizer_model).vocab_size
        except UsageError as error:
            raise UsageError(
                f"How many tokens --tokenizer-model {args.tokenizer_model} has is not known on "
                "paper. Add --vocab-size with their number, before any --."
            ) from error
    if teacher is None:
        raise UsageError("The student has no vocabulary. Give --teacher or --vocab-size.")
    return teacher.vocab_size


def _dry(one: Plan, flags: Sequence[str]) -> float | None:
    """Bytes of the fullest of a layout's stages, by a dry run; None where that ends in an error."""
    words = [*without(flags, LAYOUT_FLAGS), *one.flags.split()]
    world = ["--dry-run", "--dry-run-world-size", str(one.layout.gpus)]
    try:
        return max(rank.peak for rank in found_by([*words, *world])[0]) + RUNTIME_BYTES
    except UsageError as error:
        print(f"{one.flags}: {error}", file=sys.stderr)
        return None


def _check_dry_run(given: Sequence[str], flags: Sequence[str]) -> None:
    if "--search" not in given:
        raise UsageError("--dry-run has no effect without --search: pretrain_let.py has one, too.")
    if not flags:
        raise UsageError("--dry-run needs the run's own flags, behind --.")
    for flag in given:
        if not BESIDE_A_DRY_RUN(flag):
            raise UsageError(f"{flag} stands before --, where no dry run sees it: put it behind.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tool; a mistake of the user ends in one paragraph and exit status 2."""
    parser = build_parser()
    own = list(sys.argv[1:] if arguments is None else arguments)
    at = own.index("--") if "--" in own else len(own)
    own, flags = own[:at], own[at + 1 :]
    with mistakes_told(parser):
        flags = expanded(flags)
        given = [word.partition("=")[0] for word in own if word.startswith("--")]
        if "--dry-run" in given:
            _check_dry_run(given, flags)
        args = parser.parse_args([*(words_of(flags, given) if flags else ()), *own])
        asked = parts(args)
        if not args.search:
            print(page(plan(*asked)))
            return
        divisor = None if args.padded_vocab_size else args.make_vocab_size_divisible_by
        found = search(*asked, divisor)
        print(ranking(found, [_dry(one, flags) for one in found] if args.dry_run else None))
