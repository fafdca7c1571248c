"""Run in a worker: what Megatron says and what a tiny student really computes."""

import sys
from typing import Any

import torch
from megatron.training import theoretical_memory_usage as report
from megatron.training import training
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_let.teacher.load import load_causal_lm, read_teacher_config
from megatron_let.teacher.stage import Teacher
from megatron_let.training import command_line
from tests.distributed.contract import MICRO_BATCH, MODEL_FLAGS, build_student, micro_batch
from tests.support.testing import forget_last_run


def megatron_report(flags: list[str], micro_batches: int) -> dict[str, float]:
    """FLOPs of a step and bytes of a rank by Megatron's own formulas."""
    forget_last_run()
    sys.argv = ["pretrain_let.py", *MODEL_FLAGS, "--train-iters", "10", *flags]
    args = command_line.parse_arguments()
    return {
        "flops": training.num_floating_point_operations(args, args.global_batch_size),
        "weights": report.compute_weight_and_optimizer_memory(args),
        "with_sp": report.compute_activation_memory(args, micro_batches),
        "without_sp": report.compute_activation_memory_without_sp(args, micro_batches),
        "padded_vocab_size": args.padded_vocab_size,
    }


def counted_flops(flags: list[str]) -> dict[str, Any]:
    """FLOPs of the matrix products of one forward and backward pass; parameters of the model."""
    student = build_student(flags, MICRO_BATCH, torch.float32)
    [chunk] = student.chunks
    batch = micro_batch(0, documents=False)
    with FlopCounterMode(display=False) as counter:
        losses = chunk(
            batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"]
        )
        losses.sum().backward()
    return {
        "flops": counter.get_total_flops(),
        "parameters": sum(weight.numel() for weight in chunk.parameters()),
    }


def counted_teacher_flops(folder: str, rows: int, length: int) -> tuple[int, float]:
    """FLOPs of the teacher's states as counted, and as `Teacher` says."""
    config = read_teacher_config(folder)
    model = load_causal_lm(config, torch.float32, torch.device("cpu"))
    teacher = Teacher(model, config.context)
    # Torch before 2.15 counts nothing for the CPU's fused attention, and both count the products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        teacher.states_BSD({"tokens": torch.zeros(rows, length, dtype=torch.long)})
    return counter.get_total_flops(), teacher.forward_flops(rows * length, length)
