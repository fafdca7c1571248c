"""The two numbers of Megatron's own report (`theoretical_memory_usage.py`, 0.19), for dense models.

What a plan is compared with, itself compared with Megatron's functions: they are for the fullest
rank of the first stage and an even split; they leave out biases, learned positions, SwiGLU's third
product and the teacher, and count dropout masks always.
"""

from math import inf

from megatron_let.planning.run import Layout, RunShape
from megatron_let.planning.shapes import ModelShape


def weight_and_optimizer_bytes(student: ModelShape, layout: Layout) -> float:
    """As `compute_weight_and_optimizer_memory`: weights, gradients and optimizer of one rank."""
    norms = student.num_layers * 2 * student.norm_parameters + student.norm_parameters
    layers = student.num_layers * student.layer_matrix_parameters / layout.pp
    tables = 2 if layout.pp == 1 and not student.tied else 1
    split = layers + tables * student.embedding_parameters
    bytes_per_parameter = 6 + 12 / layout.dp if layout.distributed_optimizer else 18
    return (split / layout.tp + norms / layout.pp) * bytes_per_parameter


def activation_bytes(student: ModelShape, layout: Layout, run: RunShape) -> float:
    """As `report_theoretical_memory` chooses: with selective recomputation and SP, or without."""
    if layout.sequence_shards > 1 and layout.recompute == "selective":
        return activation_bytes_with_sp(student, layout, run)
    return activation_bytes_without_sp(student, layout, run)


def activation_bytes_with_sp(student: ModelShape, layout: Layout, run: RunShape) -> float:
    """As `compute_activation_memory`."""
    per_layer = 18 * student.hidden_size + 4 * student.ffn_hidden_size
    per_token = _in_all_layers(student, layout, run, per_layer)
    if layout.pp == 1:
        per_token += 4 * (student.hidden_size + student.vocab_size)
    return run.tokens_per_micro_batch * per_token / layout.tp


def activation_bytes_without_sp(student: ModelShape, layout: Layout, run: RunShape) -> float:
    """As `compute_activation_memory_without_sp`."""
    per_layer = student.hidden_size * (10 + 24 / layout.tp)
    per_token = _in_all_layers(student, layout, run, per_layer)
    if layout.pp == 1:
        per_token += 2 * (student.vocab_size / layout.tp + student.hidden_size)
    return 1.05 * run.tokens_per_micro_batch * per_token


def _in_all_layers(
    student: ModelShape, layout: Layout, run: RunShape, bytes_per_layer: float
) -> float:
    """Bytes per token of layers and embedding, with the micro-batches in flight."""
    per_token = student.num_layers * bytes_per_layer + layout.pp * (8 + student.hidden_size)
    if layout.vpp > 1:
        return per_token * (1 + (layout.pp - 1) / (layout.pp * layout.vpp))
    micro_batches = run.micro_batches(layout) if layout.pp > 1 else inf
    return per_token * min(1, micro_batches / layout.pp)
