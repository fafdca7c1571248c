"""A loss that asks for no order of the features and no width: `--let-loss cka`.

For one process and text without masks: it is of all tokens of a micro-batch, whose statistics ranks
and masks would have to share, as those of `--let-loss cca` do.
"""

import torch

from megatron_let.losses.table import add_loss


def _centred(states_SBH: torch.Tensor) -> torch.Tensor:
    states_NH = states_SBH.flatten(0, 1).float()
    return states_NH - states_NH.mean(dim=0)


def cka(student_SBH: torch.Tensor, teacher_SBH: torch.Tensor) -> torch.Tensor:
    """One less linear CKA (arXiv 1905.00414), the same for each token, `[S, B]`."""
    student, teacher = _centred(student_SBH), _centred(teacher_SBH)
    same = (student.T @ student).norm() * (teacher.T @ teacher).norm()
    alike = (student.T @ teacher).square().sum() / same
    return (1.0 - alike).expand(student_SBH.shape[:2])


add_loss("cka", cka)
