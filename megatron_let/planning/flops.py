"""Floating-point operations per token, counted as Megatron's `num_floating_point_operations` does.

Two per weight of a matrix and token; causal attention's two products over half of the sequence;
the LM head with its padded vocabulary; no embedding lookup, norm or activation function. Backward
costs twice forward.
"""

from megatron_let.planning.shapes import ModelShape
from megatron_let.teacher.work import window_ends

FORWARD_AND_BACKWARD = 3
"""In forward passes: the gradients of activations and of weights cost one more each."""


def layer_forward_flops_per_token(shape: ModelShape, seq_length: int) -> float:
    """FLOPs of one layer's forward pass."""
    scores_and_values = 2 * 2 * shape.query_size * seq_length / 2  # half: the causal mask
    return 2 * shape.layer_matrix_parameters + scores_and_values


def head_forward_flops_per_token(shape: ModelShape) -> float:
    """FLOPs of the logits."""
    return 2 * shape.embedding_parameters


def training_flops_per_token(shape: ModelShape, seq_length: int) -> float:
    """FLOPs of a forward and backward pass through the whole model."""
    layers = shape.num_layers * layer_forward_flops_per_token(shape, seq_length)
    return FORWARD_AND_BACKWARD * (layers + head_forward_flops_per_token(shape))


def teacher_flops_per_token(teacher: ModelShape, seq_length: int) -> float:
    """FLOPs of a teacher's last states, without its LM head, per token of the student.

    A sequence longer than the teacher's context is read in windows, some tokens twice.
    """
    context = seq_length if teacher.context is None else teacher.context
    length = min(seq_length, context)
    tokens_read = length * len(window_ends(seq_length, context)) / seq_length
    return tokens_read * teacher.num_layers * layer_forward_flops_per_token(teacher, length)
