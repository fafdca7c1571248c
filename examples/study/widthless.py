"""Losses that ask for no order of the features and no width: `--let-loss cka` and `cca`.

For one process and text without masks: both are of all tokens of a micro-batch, whose statistics
ranks and masks would have to share. Ours; the paper names LET-CCA and gives no formula.
"""

import torch

from megatron_let.losses.table import add_loss

RIDGE = 1e-3
"""Of the mean variance, added to each direction's: a teacher that was made wider has empty ones."""


def _centred(states_SBH: torch.Tensor) -> torch.Tensor:
    states_NH = states_SBH.flatten(0, 1).float()
    return states_NH - states_NH.mean(dim=0)


def cka(student_SBH: torch.Tensor, teacher_SBH: torch.Tensor) -> torch.Tensor:
    """One less linear CKA (arXiv 1905.00414), the same for each token, `[S, B]`."""
    student, teacher = _centred(student_SBH), _centred(teacher_SBH)
    same = (student.T @ student).norm() * (teacher.T @ teacher).norm()
    alike = (student.T @ teacher).square().sum() / same
    return (1.0 - alike).expand(student_SBH.shape[:2])


def cca(student_SBH: torch.Tensor, teacher_SBH: torch.Tensor) -> torch.Tensor:
    """One less the mean squared canonical correlation, `[S, B]`; both sides whitened."""
    white_student, white_teacher = (
        _whitened(_centred(states)) for states in (student_SBH, teacher_SBH)
    )
    alike = (white_student.T @ white_teacher).square().sum() / student_SBH.size(-1)
    return (1.0 - alike).expand(student_SBH.shape[:2])


def _whitened(states_NH: torch.Tensor) -> torch.Tensor:
    covariance_HH = states_NH.T @ states_NH
    ridge = RIDGE * covariance_HH.diagonal().mean() * torch.eye(states_NH.size(-1))
    factor_HH = torch.linalg.cholesky(covariance_HH + ridge)
    return torch.linalg.solve_triangular(factor_HH, states_NH.T, upper=False).T


for loss in (cka, cca):
    add_loss(loss.__name__, loss)
