"""The contract of a weight that sets itself: what `contract` does, with averages of before."""

from typing import Any
from unittest import mock

from tests.distributed import contract
from tests.distributed.contract import Gradients

SQUARES = [4.0, 1.0]
"""Moving averages of |g_LM|^2 and |g_LET|^2: with a ratio of 5 the weight is 10, the contract's."""


def layout_gradients(
    words: list[str], batch: int, weights: dict[str, float], fault: str | None
) -> Gradients:
    """`contract.layout_gradients`; with `fault` some ranks remember other averages."""
    build = contract.build_student

    def remember(*arguments: Any) -> Any:
        student = build(*arguments)
        [signal] = student.method.signals
        signal.on_load({"squares": SQUARES})
        if fault:
            signal.on_load({"squares": [8.0, 1.0]})
        return student

    with mock.patch.object(contract, "build_student", remember):
        return contract.layout_gradients(words, batch, weights)
