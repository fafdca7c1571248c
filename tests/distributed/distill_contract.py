"""The distillation loss written out: one process, whole logits, float64; run in a worker."""

from typing import Any

import torch
from megatron.core.utils import unwrap_model
from megatron.training import get_tokenizer

from megatron_let.teacher.load import load_causal_lm, read_teacher_config
from tests.distributed.contract import (
    MICRO_BATCH,
    Gradients,
    _named_parameters,
    build_student,
    micro_batch,
)


def reference_gradients(
    flags: list[str],
    global_batch: int,
    weight: float,
    teacher: str,
    temperature: float,
    gated: bool,
) -> Gradients:
    """Gradients of the language-model loss, and of what distillation with `weight` adds to it.

    Keys are `("lm" | "part", global name)`. `flags` are the student's shape. `gated`: only on the
    tokens whose label the teacher predicts better.
    """
    student = build_student(flags, global_batch, torch.float32)
    module = unwrap_model(student.chunks[0])
    model = load_causal_lm(read_teacher_config(teacher), torch.float32, torch.device("cpu"))
    known = get_tokenizer().vocab_size
    batches = [micro_batch(i, documents=False) for i in range(global_batch // MICRO_BATCH)]
    all_tokens = sum(batch["loss_mask"].sum() for batch in batches)
    lm_total, kd_total = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for batch in batches:
        logits = module(batch["tokens"], batch["position_ids"], batch["attention_mask"]).double()
        teacher_logits = model(input_ids=batch["tokens"]).logits.double()
        lm, kd, own = _losses(logits, teacher_logits[..., :known], batch["labels"], temperature)
        kd = torch.where(own < lm, kd, lm) if gated else kd
        per_token = "--calculate-per-token-loss" in flags
        tokens = all_tokens if per_token else batch["loss_mask"].sum() * len(batches)
        lm_total = lm_total + (lm * batch["loss_mask"]).sum() / tokens
        kd_total = kd_total + (kd * batch["loss_mask"]).sum() / tokens
    return _gradients(student.chunks[0], lm_total, weight * (kd_total - lm_total))


def _losses(
    logits_BSV: torch.Tensor,
    teacher_logits_BSV: torch.Tensor,
    labels_BS: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The labels' loss, the teacher's probabilities', and the teacher's own of the labels."""
    lm_BS = -logits_BSV.log_softmax(-1).gather(-1, labels_BS[..., None])[..., 0]
    target = torch.zeros_like(logits_BSV)
    target[..., : teacher_logits_BSV.size(-1)] = (teacher_logits_BSV / temperature).softmax(-1)
    own_BS = -target.gather(-1, labels_BS[..., None])[..., 0].log()
    return lm_BS, -(target * logits_BSV.log_softmax(-1)).sum(-1), own_BS


def _gradients(chunk: Any, lm: torch.Tensor, part: torch.Tensor) -> Gradients:
    names, parameters = zip(*_named_parameters(chunk), strict=True)
    gradients: Gradients = {}
    for kind, loss in (("lm", lm), ("part", part)):
        values = torch.autograd.grad(loss, parameters, retain_graph=True)
        gradients |= {
            (kind, name): value.numpy() for name, value in zip(names, values, strict=True)
        }
    return gradients
