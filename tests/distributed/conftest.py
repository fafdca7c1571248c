"""The contract check, and the data of whole runs."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from tests.support.testing import run_distributed, save_tiny_teacher

WEIGHT = 10.0
"""So large that a wrong factor cannot hide under the language-model gradient."""
REPLICA_TOLERANCE = 1e-5
CONTRACT = "tests.distributed.contract:layout_gradients"
STUDENT = "--group-query-attention --num-query-groups 2 --untie-embeddings-and-output-weights"
# What changes the function that one process computes; all else must not change the gradient.
SHAPES = (
    "--group-query-attention --num-query-groups --untie-embeddings-and-output-weights "
    "--num-experts --moe- --calculate-per-token-loss --reset- --vocab-size --make-vocab- "
    "--tokenizer- --hidden-size --kv-channels"
).split()

Gradients = dict[tuple[str, str], np.ndarray]


@dataclass(frozen=True)
class Agreement:
    """The worst of all parameters: how far a layout's gradients are from the written-out loss's.

    `part` is the alignment part, total minus language-model gradient. Behind layer K it must be
    nothing, and is measured against the total.
    """

    part_error: float
    total_error: float
    part_cosine: float
    """The smallest over the parameters that the alignment reaches."""
    part_norm_error: float


Check = Callable[..., Agreement]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Data and teachers of whole runs, see `tiny_run.Corpus`."""
    folder = tmp_path_factory.mktemp("corpus")
    return run_distributed("tests.support.tiny_run:make_corpus", 1, folder)[0]


def relative_error(value: np.ndarray, expected: np.ndarray) -> float:
    """|value - expected| / |expected|, or |value| where nothing is expected."""
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(value - expected) / (norm or 1.0))


def layout_gradients(
    world_size: int,
    *args: object,
    function: str = CONTRACT,
) -> Gradients:
    """Gradients of all ranks by name; replicas (TP of unsharded parameters, DP) must agree."""
    merged: Gradients = {}
    for part in run_distributed(function, world_size, *args):
        for name, gradient in part.items():
            if name in merged:
                assert relative_error(gradient, merged[name]) < REPLICA_TOLERANCE, name
            merged[name] = gradient
    return merged


def agreement(actual: Gradients, expected: Gradients) -> Agreement:
    """Hold a layout's gradients against the written-out loss's, parameter by parameter."""
    names = {name for _, name in expected}
    assert names == {name for _, name in actual}
    parts, totals, cosines, norms = [], [], [], []
    for name in names:
        total = expected["lm", name] + expected["part", name]
        wanted, part = expected["part", name], actual["total", name] - actual["lm", name]
        totals.append(relative_error(actual["total", name], total))
        if not wanted.any():
            parts.append(relative_error(part + total, total))
            continue
        parts.append(relative_error(part, wanted))
        lengths = np.linalg.norm(part), np.linalg.norm(wanted)
        cosines.append(float((part * wanted).sum() / (np.prod(lengths) or 1.0)))
        norms.append(abs(lengths[0] / lengths[1] - 1))
    return Agreement(max(parts), max(totals), min(cosines), max(norms))


def shape_flags(flags: list[str]) -> list[str]:
    """The flags, with their values, that one process needs too."""
    kept, keep = [], False
    for word in flags:
        keep = word.startswith(tuple(SHAPES)) if word.startswith("--") else keep
        kept += [word] * keep
    return kept


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama of another width than the student's."""
    return str(save_tiny_teacher(tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="session")
def narrow_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """For losses that take more tokens than features."""
    return str(save_tiny_teacher(tmp_path_factory.mktemp("teacher"), width=16))


@pytest.fixture(scope="session")
def contract(teacher: str, narrow_teacher: str) -> Check:
    """Return the check of one layout."""
    references: dict[tuple[object, ...], Gradients] = {}

    def reference(
        layer: int,
        batch: int,
        shape: list[str],
        precision: list[str],
        resize: str,
        cp: int,
        loss: str,
    ) -> Gradients:
        key = (layer, batch, *shape, *precision, resize, cp, loss)
        model = narrow_teacher if loss == "cca" else teacher
        if key not in references:
            [references[key]] = run_distributed(
                "tests.distributed.contract:reference_gradients",
                *(1, shape, batch, WEIGHT, layer, model, precision, resize, cp, loss),
            )
        return references[key]

    def check(
        world_size: int,
        flags: str,
        layer: int,
        batch: int,
        fault: str | None = None,
        student: str = STUDENT,
        function: str = CONTRACT,
    ) -> Agreement:
        loss = "cca" if "--let-loss cca" in flags else "cosine"
        model = narrow_teacher if loss == "cca" else teacher
        let = f"--method let --teacher-model {model} --let-layer {layer} --let-decay constant"
        words = f"{student} {flags} {let}".split()
        weights = {"let_weight": WEIGHT}
        actual = layout_gradients(world_size, words, batch, weights, fault, function=function)
        precision = [word for word in words if word in ("--bf16", "--fp16")]
        resize = "linear" if "--let-resize linear" in flags else "interpolate"
        cp = 2 if "--context-parallel-size 2" in flags else 1
        shape = shape_flags(words)
        return agreement(actual, reference(layer, batch, shape, precision, resize, cp, loss))

    return check
