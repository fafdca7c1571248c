"""Run in a worker: a distilled cross-entropy, of this rank's shard and written out."""

from typing import Any

import numpy as np
import torch

from megatron_let.losses import distilled_cross_entropy as module
from megatron_let.losses.distilled_cross_entropy import TeacherHead

SEQ, BATCH, VOCAB, WIDTH = 5, 2, 40, 8
Found = dict[str, Any]


def _inputs(same: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels, teacher states, teacher head; with `same` the logits are the teacher's."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(SEQ, BATCH, WIDTH, generator=generator)
    head = torch.randn(VOCAB, WIDTH, generator=generator)
    logits = states @ head.T if same else torch.randn(SEQ, BATCH, VOCAB, generator=generator) * 3
    labels = torch.randint(0, VOCAB, (SEQ, BATCH), generator=generator)
    return logits, labels, states, head


def _upstream() -> torch.Tensor:
    """The gradient of each token's loss."""
    return torch.arange(SEQ * BATCH, dtype=torch.float32).view(SEQ, BATCH) / 5


def losses_and_gradient(
    weight: float,
    temperature: float,
    known: int = VOCAB,
    parts: int = 8,
    same: bool = False,
    gated: bool = False,
) -> Found:
    """On this rank's slice of the vocabulary."""
    group = torch.distributed.group.WORLD
    size = VOCAB // group.size()
    first = group.rank() * size
    logits, labels, states, head = _inputs(same)
    leaf = logits[..., first : first + size].clone().requires_grad_()
    own = leaf * 1.0  # as from a model: it may be overwritten
    number = min(max(known - first, 0), size)
    rows = TeacherHead(head[first : first + size], None, number, first, temperature)
    kept = [0]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[0] += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = module.distilled_cross_entropy(
            own, labels, states, rows, weight, group, -(-SEQ * BATCH // parts), gated
        )
    losses.total.backward(_upstream())
    assert leaf.grad is not None
    values = losses._asdict() | {"gradient": leaf.grad}
    found: Found = {key: value.detach().numpy() for key, value in values.items()}
    return found | {"kept": kept[0]}


def written_out(
    weight: float, temperature: float, known: int = VOCAB, parts: int = 0, gated: bool = False
) -> dict[str, np.ndarray]:
    """Whole logits, float64, plain autograd."""
    logits, labels, states, head = (t.double() if t.is_floating_point() else t for t in _inputs(0))
    logits.requires_grad_()
    lm = -logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    target = torch.zeros_like(logits)
    log_target = ((states @ head.T)[..., :known] / temperature).log_softmax(-1)
    target[..., :known] = log_target.exp()
    log_student = logits.log_softmax(-1)
    entropy = -(log_target.exp() * log_target).sum(-1)
    kd = -(target * log_student).sum(-1) - entropy
    whole = torch.full_like(target, -torch.inf)
    whole[..., :known] = log_target
    teacher = -whole.gather(-1, labels[..., None])[..., 0]
    is_better = (teacher < lm).double()
    share = weight * is_better if gated else weight
    total = (1 - share) * lm + share * kd
    [gradient] = torch.autograd.grad(total, logits, _upstream().double())
    values = {"total": total, "lm": lm, "kd": kd, "teacher": teacher}
    values |= {"is_better": is_better, "gradient": gradient}
    return {key: value.detach().numpy() for key, value in values.items()}


def peak_shards(distilled: bool, dtype: str, tokens: int, vocab: int, parts: int = 8) -> float:
    """Bytes alive at once during a loss's two passes, in units of the local logits in float32.

    The logits themselves count; the states, the head and what the caller holds do not.
    """
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    from torch.distributed._tools.mem_tracker import MemTracker

    group = torch.distributed.group.WORLD
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, vocab, (tokens, 1), generator=generator)
    states = torch.randn(tokens, 1, WIDTH, generator=generator)
    rows = TeacherHead(torch.randn(vocab, WIDTH, generator=generator), None, vocab, 0, 1.0)
    weight = torch.randn(vocab, WIDTH, generator=generator).to(getattr(torch, dtype))
    hidden = states.to(weight.dtype).requires_grad_()
    tracker = MemTracker()
    with tracker:
        logits = hidden @ weight.T
        if distilled:
            losses = module.distilled_cross_entropy(
                logits, labels, states, rows, 0.5, group, tokens // parts
            )
            loss = losses.total
        else:
            loss = vocab_parallel_cross_entropy(logits, labels, tp_group=group)
        del logits
        loss.sum().backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return peak / (4 * tokens * vocab)
