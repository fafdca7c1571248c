"""Bytes that each rank of a pipeline stage holds at its fullest moment, during the guidance.

bf16 training with fp32 main gradients and Adam. A parameter takes the bytes of Megatron's
`theoretical_memory_usage.py`, with which tests compare; activations are counted tensor by tensor
after Korthikanti et al. (arXiv 2205.05198), for more layouts than that report covers.
"""

from dataclasses import astuple, dataclass

from megatron_let.planning.run import Layout, RunShape
from megatron_let.planning.shapes import ModelShape
from megatron_let.planning.time import most_waiting
from megatron_let.teacher.work import logits_at_once, micro_batches_at_once

GIB = 2**30
BF16_BYTES, FP32_BYTES, TOKEN_ID_BYTES = 2, 4, 8
OPTIMIZER_BYTES = 12  # main parameter and two Adam moments, each fp32
LOGIT_BYTES = BF16_BYTES + FP32_BYTES
"""The logit and its fp32 softmax, which live together in the loss."""
RUNTIME_BYTES = 2 * GIB  # CUDA context, NCCL buffers, fragmentation: an allowance, not a formula


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes on each rank of one stage."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    teacher: float = 0.0  # the teacher's weights
    states: float = 0.0
    """What the teacher computes, and the alignment gradients that wait for the backward pass."""

    @property
    def total(self) -> float:
        """All of it, and what comes with a GPU."""
        return sum(astuple(self)) + RUNTIME_BYTES


def stages_memory(
    student: ModelShape, teacher: ModelShape | None, layout: Layout, run: RunShape
) -> tuple[StageMemory, ...]:
    """What a rank of each stage holds, first stage first."""
    optimizer_shards = layout.dp * layout.cp if layout.distributed_optimizer else 1

    def held(stage: int) -> StageMemory:
        parameters = parameters_per_rank(student, layout, stage)
        weights, states = _teacher_bytes(stage, student, teacher, layout, run)
        return StageMemory(
            weights=BF16_BYTES * parameters,
            gradients=FP32_BYTES * parameters,
            optimizer=OPTIMIZER_BYTES * parameters / optimizer_shards,
            activations=_activation_bytes(stage, student, layout, run),
            teacher=weights,
            states=states,
        )

    return tuple(held(stage) for stage in range(layout.pp))


def parameters_per_rank(student: ModelShape, layout: Layout, stage: int) -> float:
    """Parameters of the student on one rank of a stage."""
    first, last = stage == 0, stage == layout.pp - 1
    layers = layout.split(student.num_layers)[stage]
    # A tied head on another stage than the embedding is a copy of its own.
    tables = first + last if layout.pp > 1 or not student.tied else 1
    split = layers * student.layer_split_parameters + tables * student.embedding_parameters
    replicated = layers * student.layer_replicated_parameters
    replicated += student.position_rows * student.hidden_size * first
    replicated += student.norm_parameters * last
    return split / layout.tp + replicated


def layer_activation_bytes(student: ModelShape, layout: Layout, run: RunShape) -> float:
    """What one layer keeps of one micro-batch without recomputation, on one rank.

    Whole on each tensor-parallel rank unless the sequence is sharded: input and output of both
    norms, dropout masks. Split over the ranks: queries, keys, values, what attention makes of
    them, what the MLP's matrices make. With a GELU MLP of four times the width this is the
    paper's `sbh (10 + 24 / t)`.
    """
    tokens, hidden = run.tokens_per_rank(layout), student.hidden_size
    norms = tokens * hidden * (4 * BF16_BYTES + 2 * run.dropout)
    attention = 2 * student.query_size + student.key_value_size
    mlp = student.mlp_matrices * student.ffn_hidden_size
    products = tokens * BF16_BYTES * (attention + mlp)
    return norms / layout.sequence_shards + products / layout.tp


def attention_score_bytes(student: ModelShape, layout: Layout, run: RunShape) -> float:
    """What one layer keeps of one micro-batch's attention scores; nothing with flash attention.

    The softmax's output, and with dropout its mask and its output.
    """
    if layout.flash_attention:
        return 0.0
    per_score = BF16_BYTES + (1 + BF16_BYTES) * run.dropout
    scores = student.num_attention_heads * run.seq_length * run.tokens_per_rank(layout)
    return per_score * scores / layout.tp


def _activation_bytes(stage: int, student: ModelShape, layout: Layout, run: RunShape) -> float:
    layer = layer_activation_bytes(student, layout, run)
    scores = attention_score_bytes(student, layout, run)
    tokens = run.tokens_per_rank(layout)
    layer_input = BF16_BYTES * tokens * student.hidden_size
    # Attention that is run again makes new queries and keys if they are rotated; the values are a
    # view of the joint projection, which stays whole.
    is_rotated = layout.flash_attention and not student.position_rows
    rotated = BF16_BYTES * tokens * (student.query_size + student.key_value_size / 2) / layout.tp
    # What a layer keeps of each micro-batch in flight, and of the one being recomputed.
    waiting, working = {
        "none": (layer + scores, 0.0),
        "selective": (layer + rotated * is_rotated, scores),
        "full": (layer_input / layout.sequence_shards, layer + scores),
    }[layout.recompute]
    chunk_layers = layout.split(student.num_layers)[stage] / layout.vpp
    total = _in_flight(stage, layout, run) * chunk_layers * waiting + working
    if stage == 0:
        embedding = TOKEN_ID_BYTES + student.hidden_size * run.dropout / layout.sequence_shards
        total += _in_flight(stage, layout, run, chunk=0) * tokens * embedding
    if stage == layout.pp - 1:
        norm = 2 * BF16_BYTES * student.hidden_size / layout.sequence_shards
        logits = LOGIT_BYTES * student.vocab_size / layout.tp
        total += tokens * (norm + logits)
    return total


def _in_flight(stage: int, layout: Layout, run: RunShape, chunk: int | None = None) -> int:
    """Passes through one virtual chunk, or through all, whose backward is still to come."""
    return most_waiting(stage, layout.pp, layout.vpp, run.micro_batches(layout), chunk)


def _teacher_bytes(
    stage: int, student: ModelShape, teacher: ModelShape | None, layout: Layout, run: RunShape
) -> tuple[float, float]:
    """(weights, what it computes and what waits) of the teacher on one rank of a stage."""
    owner = chunk = None
    if run.guidance.aligns:
        owner, chunk = layout.place(student.num_layers, run.let_layer)
    distils = run.guidance.distils and stage == layout.pp - 1
    if teacher is None or (stage != owner and not distils):
        return 0.0, 0.0
    # The widest layer of the forward pass over the rows of one rank; nothing is kept.
    at_once = micro_batches_at_once(run.micro_batch_size, layout.sharing)
    attention = 2 * teacher.query_size + teacher.key_value_size
    widest = max(attention, teacher.mlp_matrices * teacher.ffn_hidden_size)
    per_token = at_once / layout.tp * BF16_BYTES * (2 * teacher.hidden_size + widest)
    per_token *= run.teacher_row / run.seq_length
    if stage == owner:
        # The alignment gradient is computed in the forward pass, so only it waits for backward;
        # with full recomputation it is the states that wait, for the forward pass inside backward.
        in_flight = _in_flight(stage, layout, run, chunk)
        states, gradients = at_once, in_flight
        if layout.recompute == "full":
            states, gradients = in_flight + at_once - 1, 1
        width = states * teacher.hidden_size + gradients * student.hidden_size
        per_token += BF16_BYTES * width / layout.sequence_shards
    part = logits_at_once(run.tokens_per_micro_batch) / run.tokens_per_micro_batch
    logits = part * LOGIT_BYTES * teacher.vocab_size
    if distils:
        # States of one micro-batch; for a part of it this rank's part of the vocabulary's logits.
        per_token += BF16_BYTES * teacher.hidden_size + logits / layout.tp
    elif run.scores_teacher:
        per_token += logits / layout.sequence_shards
    has_head = distils or run.scores_teacher
    weights = teacher.parameters if has_head else teacher.parameters_without_head
    return BF16_BYTES * weights, run.tokens_per_rank(layout) * per_token
