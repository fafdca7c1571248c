"""A plan as one terminal page of at most 80 columns."""

from collections.abc import Sequence
from dataclasses import astuple
from itertools import groupby

from megatron_let.planning.memory import GIB, RUNTIME_BYTES
from megatron_let.planning.plan import Plan
from megatron_let.planning.shapes import ModelShape
from megatron_let.planning.time import SplitTime

MEMORY_HEADINGS = ("weights", "grads", "optim", "activ", "teacher", "states")
"""Of the fields of `StageMemory`, in their order."""
MOST_STAGES = 8  # with more of them, the middle ones are left out
SECONDS_PER_DAY = 86400


def page(plan: Plan) -> str:
    """Return the whole plan as text."""
    sections = {
        "student": _model(plan.student, plan.student_flops_per_token, "fwd+bwd"),
        "teacher": _model(plan.teacher, plan.teacher_flops_per_token, "fwd"),
        "layout": _layout(plan),
        "run": _run(plan),
    }
    head = [
        f"{'' if number else label:9}{line}"
        for label, lines in sections.items()
        for number, line in enumerate(lines)
    ]
    return "\n".join([*head, "", *_stages(plan), "", *_time(plan)])


def ranking(plans: Sequence[Plan], dry_bytes: Sequence[float | None] | None) -> str:
    """Return the best layouts as a table, and the flags of the first; bytes are of dry runs."""
    heads = ["TP", "PP", "VPP", "rows", "recompute", "GiB", "MFU", "guided step", "whole run"]
    rows = [["", *heads, *(["dry run"] if dry_bytes else [])]]
    for number, one in enumerate(plans):
        layout, time = one.layout, one.given
        cells = [number + 1, layout.tp, layout.pp, layout.vpp, one.run.micro_batch_size]
        gib, mfu = one.memory[one.fullest_stage].total / GIB, f"{time.plain_mfu:.3f}"
        step, days = f"{time.phase_seconds[0]:.3f} s", time.run_seconds / SECONDS_PER_DAY
        costs = [f"{gib:.1f}", mfu, step, f"{days:.2f} days"]
        rows.append([*map(str, cells), layout.recompute, *costs])
        if dry_bytes:
            dry = dry_bytes[number]
            rows[-1].append("-" if dry is None else f"{dry / GIB:.1f}")
    memory = f"{plans[0].gpu.memory_gib:g} GiB"
    head = f"The fastest layouts of {plans[0].layout.gpus} GPUs of {memory} that fit:"
    left_out = "Communication is left out: among near ones fewer TP and PP are better."
    return "\n".join([head, "", *_aligned(rows), "", left_out, "", plans[0].flags])


def _model(shape: ModelShape | None, flops: float, passes: str) -> list[str]:
    if shape is None:
        return ["none"]
    heads = str(shape.num_attention_heads)
    if shape.num_query_groups != shape.num_attention_heads:
        heads += f"/{shape.num_query_groups}"
    return [
        f"{shape.name}: {shape.num_layers} layers x {shape.hidden_size}, "
        f"FFN {shape.ffn_hidden_size}{' gated' * shape.gated}, {heads} heads",
        f"vocab {shape.vocab_size}{' tied' * shape.tied}; {shape.parameters:,} parameters; "
        f"{flops / 1e9:.3g} GFLOP/token ({passes})",
    ]


def _layout(plan: Plan) -> list[str]:
    layout = plan.layout
    chunks = f" x {layout.vpp} chunks" if layout.vpp > 1 else ""
    chunks += f" x CP {layout.cp}" if layout.cp > 1 else ""
    options = ["sequence parallel"] * (layout.sequence_shards > 1)
    options += ["flash attention" if layout.flash_attention else "no flash attention"]
    options += ["distributed optimizer"] * layout.distributed_optimizer
    return [
        f"{layout.gpus} GPUs = TP {layout.tp} x PP {layout.pp}{chunks} x DP {layout.dp}; "
        f"recompute {layout.recompute}",
        ", ".join(options),
    ]


def _run(plan: Plan) -> list[str]:
    run, tokens = plan.run, plan.run.train_iters * plan.run.tokens_per_step
    micro_batches = f"{run.micro_batches(plan.layout)} micro-batches of {run.micro_batch_size}"
    lines = [
        f"{run.train_iters} steps x {run.global_batch_size} x {run.seq_length} tokens = "
        f"{tokens / 1e9:.2f} B tokens, {tokens * plan.student_flops_per_token:.2e} FLOP",
        f"{micro_batches}; method {run.method}",
    ]
    if plan.teacher is not None:
        stages = plan.given.teacher_stages
        layer = f"layer {run.let_layer}"
        for part, stage, end in (layer, stages[0], run.let_end), ("logits", stages[-1], run.kd_end):
            share = f"({100 * end / run.train_iters:.1f} % of the run)"
            lines += [f"teacher for {part} on stage {stage} until step {end} {share}"] * (end > 0)
    return lines


def _stages(plan: Plan) -> list[str]:
    given, guided = plan.given, plan.teacher is not None
    what, load_headings = "Stages: GiB per rank; work over the mean (load)", ["load"]
    if guided:
        what = "Stages while guided: GiB per rank; work over the mean (load, +T with teacher)"
        load_headings += ["+T"]
    mean_work = sum(given.plain_work) / len(given.plain_work)
    rows = [["stage", "layers", *MEMORY_HEADINGS, "total", *load_headings]]
    for stage, memory in enumerate(plan.memory):
        gib = [part / GIB for part in (*astuple(memory), memory.total)]
        load = [given.plain_work[stage] / mean_work, given.guided_work[stage] / mean_work]
        cells = [f"{value:.2f}" for value in gib + load[: len(load_headings)]]
        rows.append([str(stage), str(given.layers[stage]), *cells])
    if plan.layout.pp > MOST_STAGES:
        rows[5:-3] = [[".."] * len(rows[0])]
    return [what, *_aligned(rows), *_verdict(plan)]


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
    gpu, times = plan.gpu, {"as given": plan.given}
    if plan.suggested.layers != plan.given.layers:
        times["suggested"] = plan.suggested
    rows = [["layers per stage", "plain step", "guided step", "overhead", "whole run", "overhead"]]
    rows += [
        [
            f"{_layers(time)} {name}",
            f"{time.plain_seconds:.3f} s",
            f"{time.phase_seconds[0]:.3f} s",
            f"+{100 * time.guided_overhead:.1f} %",
            f"{time.run_seconds / SECONDS_PER_DAY:.3f} days",
            f"+{100 * time.run_overhead:.1f} %",
        ]
        for name, time in times.items()
    ]
    if plan.teacher is None:
        rows = [[*row[:2], row[4]] for row in rows]
    lines = [
        f"Time if a stage's work passes at {gpu.mfu:g} of {gpu.peak_tflops:g} TFLOP/s",
        *_aligned(rows),
        f"MFU of a plain step as given, with bubble and recomputation: {plan.given.plain_mfu:.3f}",
    ]
    if plan.teacher is not None:
        spread = f"+{100 * plan.overhead_floor:.1f} %"
        lines.append(f"Floor, were the teacher spread over all GPUs: {spread}")
    return lines + _advice(plan)


def _layers(time: SplitTime) -> str:
    """Of the stages: `5 7x14 5`."""
    runs = [(layers, len(list(stages))) for layers, stages in groupby(time.layers)]
    return " ".join(f"{layers}x{count}" if count > 1 else str(layers) for layers, count in runs)


def _advice(plan: Plan) -> list[str]:
    if plan.suggested.layers == plan.given.layers:
        return []
    change = 100 * (plan.suggested.run_seconds / plan.given.run_seconds - 1)
    flags = plan.suggested.layout.split_flags or "no flags, an even split"
    return [f"Suggested, {change:+.1f} % of the run:", f"  {flags}"]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows]
