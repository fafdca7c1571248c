"""Flags of Megatron that have no effect here: each is refused in a sentence."""

import re
from pathlib import Path

import pytest

from megatron_let.training.ignored_flags import (
    IGNORED,
    NEEDS_GPU,
    NEEDS_TRANSFORMER_ENGINE,
    OF_A_CHECKPOINT,
    OF_PARTIAL_SETS,
)
from tests.support.testing import run_distributed, run_program
from tests.support.tiny_run import FLAGS

ROOT = Path(__file__).resolve().parents[2]

PLAIN = "--mock-data --train-iters 10 --eval-interval 5 --num-workers 0".split()
REFUSED = {
    "--inprocess-restart": "here. A run is started again by torchrun",
    "--inprocess-soft-timeout=3": "here. A run is started again by torchrun",
    "--log-straggler": "here. Use --timing-log-level 2",
    "--straggler-minmax-count 2": "here. Use --timing-log-level 2",
    "--enable-ft-package": "here. It belongs to tools of NVIDIA's clusters",
    "--adlr-autoresume": "here. It belongs to tools of NVIDIA's clusters",
    "--fault-injector-ranks 0": "here. It belongs to tools of NVIDIA's clusters",
    "--non-persistent-ckpt-type local": "with local. Checkpoints on a node's own disk",
    "--non-persistent-local-ckpt-dir x": "here. Checkpoints on a node's own disk",
    "--use-flash-attn": "here. Use --attention-backend flash",
    "--openai-gelu": "here. Leave it out: with biases",
    "--rl-skip-bos-token": "here. It belongs to another of Megatron-LM's programs",
    "--no-rl-skip-bos-token": "here. It belongs to another of Megatron-LM's programs",
    "--dino-warmup-teacher-temp 0.1": "here. It belongs to another",
    "--apply-residual-connection-post-layernorm": "here. Megatron-Core 0.19 has no working code",
    "--fp8-format hybrid": "without Transformer Engine. Install it",
    "--fp8-recipe delayed": "without Transformer Engine. Install it",
    "--fp4-format e2m1": "without Transformer Engine. Install it",
    "--record-memory-history": "without a GPU. Leave it out",
    "--log-memory-to-tensorboard": "without a GPU. Leave it out",
    "--profile": "without a GPU but with --use-pytorch-profiler. Add it",
    "--rerun-mode report_stats": "with report_stats: Megatron-Core 0.19 has no working code",
    "--gpu-sniff-test-interval 2": "without a GPU. Leave it out",
    "--enable-cuda-graph": "without a GPU. Leave it out",
    "--ckpt-step 4": "without --load: the run would start from random weights",
    "--finetune": "without --load: the run would start from random weights",
    "--no-load-optim": "without --load: the run would start from random weights",
    "--init-method-xavier-uniform": "here. Megatron-Core 0.19 has no working code",
    "--dist-ckpt-strictness raise_all": "here. Megatron-Core 0.19 has no working code",
    "--num-query-groups 2": "without --group-query-attention. Add it",
    "--dataloader-type external": "with external: the data come from files",
    "--wandb-exp-name x": "without --wandb-project",
    "--eval-iters 3 --full-validation": "with --full-validation, which evaluates the validation",
}


@pytest.fixture(scope="module")
def errors():
    lines = [[*PLAIN, *flags.split()] for flags in REFUSED]
    [found] = run_distributed("tests.unit.command_line:usage_errors", 1, lines)
    return dict(zip(REFUSED, found, strict=True))


@pytest.mark.parametrize("flags", REFUSED)
def test_a_flag_without_effect_is_refused(flags, errors):
    name = re.split("[ =]", flags)[0]
    assert errors[flags].startswith(f"{name} has no effect {REFUSED[flags]}"), errors[flags]


def test_a_package_that_is_missing_is_named(corpus):
    argv = [*FLAGS, *corpus.flags, "--optimizer", "muon"]
    result = run_program(str(ROOT / "pretrain_let.py"), *argv)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert "error: a flag needs a package that is not here: emerging-optimizers" in last


def test_every_name_is_one_of_megatrons():
    [facts] = run_distributed("tests.unit.command_line:parser_facts", 1)
    options = {word.removeprefix("--").removeprefix("no-") for word in facts["options"]}
    for name in " ".join(
        [*IGNORED, NEEDS_GPU, NEEDS_TRANSFORMER_ENGINE, OF_PARTIAL_SETS, OF_A_CHECKPOINT]
    ).split():
        assert any(o.startswith(name) if name.endswith("-") else o == name for o in options), name
