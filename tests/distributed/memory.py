"""Run in a worker: what is left of a teacher after its last step."""

import ctypes
import gc
import weakref
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.distributed.contract import VOCAB, Student, build_student, step


def save_big_teacher(folder: Path) -> int:
    """Save a teacher of more than 200 MB; return its bytes."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def release(flags: list[str], keep_a_reference: bool) -> dict[str, Any]:
    """Bytes that loading takes, that are back after the stop step, and whether anything lives.

    Args:
        flags: of a run whose guidance ends after one step.
        keep_a_reference: inject the bug that something else holds the teacher.
    """
    student = build_student(flags, 2, torch.float32)
    before = _resident_bytes()
    student.method.load()
    student.method.prepare_teacher()
    loaded = _resident_bytes()
    held = [student.method.host.teacher] if keep_a_reference else []
    teacher = student.method.host.teacher
    alive = [weakref.ref(x) for x in (teacher, teacher._base, *teacher._base.parameters())]
    del teacher
    for _ in range(2):  # one guided step, and the one that finds the guidance over
        _train(student)
    after = _resident_bytes()
    lives = any(reference() is not None for reference in alive)
    return {"taken": loaded - before, "back": loaded - after, "lives": lives, "held": len(held)}


def _train(student: Student) -> None:
    step(student)
    student.method.end_step()
    student.args.curr_iteration += 1


def _resident_bytes() -> int:
    """What is in use: the allocator gives back first what was freed, which loading would reuse."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss
