"""The alignment loss. Shapes: S sequence, B batch, H hidden."""

import torch
import torch.nn.functional as F


def cosine(student_SBH: torch.Tensor, teacher_SBH: torch.Tensor) -> torch.Tensor:
    """`1 - cos(student, teacher)` of every token, `[S, B]`, in float32 (LET, section 2.1).

    The paper minimises `-cos`; one more makes the loss non-negative and leaves the gradient as it
    is. Norms and dot product are float32 whatever the inputs are: half precision would round the
    small differences between nearly parallel vectors away.
    """
    return 1.0 - F.cosine_similarity(student_SBH.float(), teacher_SBH.float(), dim=-1)
