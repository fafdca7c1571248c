"""The contract check, and the data of whole runs."""

from collections.abc import Callable

import numpy as np
import pytest

from megatron_let.testing import run_distributed, save_tiny_teacher

WEIGHT = 10.0
"""So large that a wrong factor cannot hide under the language-model gradient."""
TOTAL_TOLERANCE = 1e-5

Check = Callable[..., tuple[float, float]]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Data and teachers of whole runs, see `training.Corpus`."""
    folder = tmp_path_factory.mktemp("corpus")
    return run_distributed("tests.distributed.training:make_corpus", 1, folder)[0]


def relative_error(value: np.ndarray, expected: np.ndarray) -> float:
    """|value - expected| / |expected|, or |value| where nothing is expected."""
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(value - expected) / (norm or 1.0))


def layout_gradients(world_size: int, *args: object) -> dict[tuple[str, str], np.ndarray]:
    """Gradients of all ranks by name; replicas (TP of unsharded parameters, DP) must agree."""
    merged: dict[tuple[str, str], np.ndarray] = {}
    for part in run_distributed("tests.distributed.contract:layout_gradients", world_size, *args):
        for name, gradient in part.items():
            if name in merged:
                assert relative_error(gradient, merged[name]) < TOTAL_TOLERANCE, name
            merged[name] = gradient
    return merged


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama of another width than the student's."""
    return str(save_tiny_teacher(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="session")
def contract(teacher: str) -> Check:
    """Return the check of one layout: the largest relative error of alignment part and total."""
    references: dict[tuple[object, ...], dict[tuple[str, str], np.ndarray]] = {}

    def reference(layer: int, batch: int, flags: list[str]) -> dict[tuple[str, str], np.ndarray]:
        key = (layer, batch, *flags)
        if key not in references:
            function = "tests.distributed.contract:reference_gradients"
            [references[key]] = run_distributed(function, 1, flags, batch, WEIGHT, layer, teacher)
        return references[key]

    def check(
        world_size: int, flags: str, layer: int, batch: int, fault: str | None = None
    ) -> tuple[float, float]:
        let = f"--method let --teacher-model {teacher} --let-layer {layer} --let-decay constant"
        actual = layout_gradients(world_size, f"{flags} {let}".split(), batch, WEIGHT, fault)
        per_token = [flag for flag in flags.split() if flag == "--calculate-per-token-loss"]
        expected = reference(layer, batch, per_token)
        names = {name for _, name in expected}
        assert names == {name for _, name in actual}
        parts, totals = [], []
        for name in names:
            total = expected["lm", name] + expected["let", name]
            part = actual["total", name] - actual["lm", name]
            totals.append(relative_error(actual["total", name], total))
            if expected["let", name].any():
                parts.append(relative_error(part, expected["let", name]))
            else:  # behind layer K nothing but rounding may remain
                parts.append(relative_error(part + total, total))
        return max(parts), max(totals)

    return check
