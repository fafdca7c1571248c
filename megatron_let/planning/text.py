"""A plan as one terminal page of at most 80 columns."""

from collections.abc import Sequence
from itertools import groupby

from megatron_let.planning.memory import RUNTIME_BYTES
from megatron_let.planning.plan import GIB, WORTH_A_FLAG, Plan
from megatron_let.planning.shapes import ModelShape
from megatron_let.planning.time import SplitTime, bubble_share

MEMORY_COLUMNS = {
    "weights": "weights",
    "grads": "gradients",
    "optim": "optimizer",
    "activ": "activations",
    "teacher": "teacher",
    "states": "states",
    "total": "total",
}
"""Heading -> field of `StageMemory`."""
MOST_STAGES = 8
"""With more of them, the middle ones are left out."""
LABEL = 9
SECONDS_PER_DAY = 86400


def page(plan: Plan) -> str:
    """Return the whole plan as text."""
    sections = [
        [*_models(plan), *_layout(plan), *_run(plan)],
        _stages(plan),
        _time(plan),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def _section(label: str, *lines: str) -> list[str]:
    return [label.ljust(LABEL) + lines[0], *(" " * LABEL + line for line in lines[1:])]


def _models(plan: Plan) -> list[str]:
    flops = f"{plan.student_flops_per_token / 1e9:.3g} GFLOP/token (fwd+bwd)"
    student = _section("student", *_shape(plan.student, flops))
    if plan.teacher is None:
        return [*student, *_section("teacher", "none")]
    flops = f"{plan.teacher_flops_per_token / 1e9:.3g} GFLOP/token (fwd)"
    return [*student, *_section("teacher", *_shape(plan.teacher, flops))]


def _shape(shape: ModelShape, flops: str) -> tuple[str, str]:
    heads = str(shape.num_attention_heads)
    if shape.num_query_groups != shape.num_attention_heads:
        heads += f"/{shape.num_query_groups}"
    return (
        f"{shape.name}: {shape.num_layers} layers x {shape.hidden_size}, "
        f"FFN {shape.ffn_hidden_size}{' gated' * shape.gated}, {heads} heads",
        f"vocab {shape.vocab_size}{' tied' * shape.tied}; {shape.parameters:,} parameters; {flops}",
    )


def _layout(plan: Plan) -> list[str]:
    layout = plan.layout
    chunks = f" x {layout.vpp} chunks" if layout.vpp > 1 else ""
    options = ["sequence parallel"] * (layout.sequence_shards > 1)
    options += ["flash attention" if layout.flash_attention else "no flash attention"]
    options += ["distributed optimizer"] * layout.distributed_optimizer
    return _section(
        "layout",
        f"{layout.gpus} GPUs = TP {layout.tp} x PP {layout.pp}{chunks} x DP {layout.dp}; "
        f"recompute {layout.recompute}",
        ", ".join(options),
    )


def _run(plan: Plan) -> list[str]:
    run = plan.run
    tokens = run.train_iters * run.tokens_per_step
    return _section(
        "run",
        f"{run.train_iters} steps x {run.global_batch_size} x {run.seq_length} tokens = "
        f"{tokens / 1e9:.2f} B tokens, {tokens * plan.student_flops_per_token:.2e} FLOP",
        f"{run.micro_batches(plan.layout)} micro-batches of {run.micro_batch_size}; "
        f"method {run.method}",
        *(_teacher_parts(plan) if plan.teacher is not None else []),
    )


def _teacher_parts(plan: Plan) -> list[str]:
    """What the teacher does on which stage, and until when."""
    run, phases, last = plan.run, plan.run.phases(), plan.layout.pp - 1
    parts: list[tuple[str, int, int]] = []
    if run.guidance.aligns:
        steps = sum(phase.steps for phase in phases if phase.aligns)
        parts.append((f"layer {run.let_layer}", plan.owner_stage, steps))
    if run.guidance.distils:
        parts.append(("logits", last, sum(phase.steps for phase in phases if phase.distils)))
    return [
        f"teacher for {part} on stage {stage} until step {steps} "
        f"({100 * steps / run.train_iters:.1f} % of the run)"
        for part, stage, steps in parts
    ]


def _stages(plan: Plan) -> list[str]:
    given, guided = plan.given, plan.teacher is not None
    mean_work = sum(given.plain_work) / len(given.plain_work)
    rows = [("stage", "layers", *MEMORY_COLUMNS, "load", *["+T"] * guided)]
    for stage, memory in enumerate(plan.memory):
        gib = [getattr(memory, field) / GIB for field in MEMORY_COLUMNS.values()]
        load = [given.plain_work[stage] / mean_work, given.guided_work[stage] / mean_work]
        cells = (f"{value:.2f}" for value in gib + load[: 1 + guided])
        rows.append((str(stage), str(given.layers[stage]), *cells))
    if plan.layout.pp > MOST_STAGES:
        rows[5:-3] = [("..",) * len(rows[0])]
    return [
        "Stages while guided: GiB per rank; work over the mean (load, +T with teacher)"
        if guided
        else "Stages: GiB per rank; work over the mean (load)",
        *_aligned(rows),
        *_verdict(plan),
    ]


def _verdict(plan: Plan) -> list[str]:
    need = f"stage {plan.fullest_stage} needs {plan.memory[plan.fullest_stage].total / GIB:.1f} GiB"
    if plan.fits:
        runtime = f"{RUNTIME_BYTES / GIB:g} of them for CUDA, NCCL and fragments"
        return [f"Fits: {need} of {plan.gpu.memory_gib:g} ({runtime})"]
    verdict = f"DOES NOT FIT: {need} of {plan.gpu.memory_gib:g}"
    if plan.suggested_fits:
        return [f"{verdict}; the suggested split fits"]
    remedies = ["--recompute full"] * (plan.layout.recompute != "full")
    remedies += ["a smaller --micro-batch-size", "more --tp or --pp"]
    return [verdict, f"  Try {', '.join(remedies)}"]


def _time(plan: Plan) -> list[str]:
    gpu = plan.gpu
    lines = [
        f"Time at an MFU of {gpu.mfu:g} of {gpu.peak_tflops:g} TFLOP/s in plain steps as given",
        *_aligned(_time_rows(plan)),
        f"Pipeline bubble (PP - 1) / (micro-batches x chunks + PP - 1): "
        f"{100 * bubble_share(plan.layout, plan.run):.1f} % of a step",
    ]
    if plan.teacher is not None:
        floor = f"Floor, were the teacher spread over all GPUs: +{100 * plan.overhead_floor:.1f} %"
        if len(plan.given.phase_steps) > 1:
            floor += "; after the stop: 0 %"
        lines.append(floor)
    return lines + _advice(plan)


def _time_rows(plan: Plan) -> list[tuple[str, ...]]:
    guided = plan.teacher is not None
    header = ("layers per stage", "plain step", *("guided step", "overhead") * guided, "whole run")
    rows = [header + ("overhead",) * guided]
    rows.append(_time_row(f"{_layers(plan.given)} as given", plan.given, guided))
    if plan.suggested.layers != plan.given.layers:
        rows.append(_time_row(f"{_layers(plan.suggested)} suggested", plan.suggested, guided))
    return rows


def _time_row(label: str, time: SplitTime, guided: bool) -> tuple[str, ...]:
    plain, days = f"{time.plain_seconds:.3f} s", f"{time.run_seconds / SECONDS_PER_DAY:.3f} days"
    if not guided:
        return label, plain, days
    step = f"{time.guided_seconds:.3f} s", f"+{100 * time.guided_overhead:.1f} %"
    return label, plain, *step, days, f"+{100 * time.run_overhead:.1f} %"


def _layers(time: SplitTime) -> str:
    """`5 7 7 5`, and with many stages `5 7x14 5`."""
    if len(time.layers) <= 4:
        return " ".join(map(str, time.layers))
    runs = [(layers, len(list(stages))) for layers, stages in groupby(time.layers)]
    return " ".join(f"{layers}x{count}" if count > 1 else str(layers) for layers, count in runs)


def _advice(plan: Plan) -> list[str]:
    given, suggested = plan.given, plan.suggested
    if plan.layout.pp == 1:
        return []
    if suggested.layers == given.layers:
        return [
            f"Keep this split: others save less than {100 * WORTH_A_FLAG:g} % of the run a flag"
        ]
    saved = 100 * (1 - suggested.run_seconds / given.run_seconds)
    gain = f"saves {saved:.1f} %" if saved > 0 else f"fits, and costs {-saved:.1f} %"
    return [
        f"Suggested, {gain} of the run:",
        f"  {suggested.layout.split_flags or 'no flags, an even split'}",
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        row[0].ljust(widths[0])
        + "".join("  " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
