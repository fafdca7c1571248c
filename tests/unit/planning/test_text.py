"""The page, by way of the command line."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from megatron_let.planning.shapes import TEACHERS

TOOL = Path(__file__).parents[3] / "tools" / "plan.py"
ISSUE = "--student 1.4b --teacher smollm-135m --gpus 32 --pp 4"
LARGE = "--student 7b --teacher meta-llama/Llama-3.2-1B --tp 4 --micro-batch-size 2"
STEP = "--bf16 --seq-length 64 --micro-batch-size 1 --global-batch-size 8"
SMALL = "--teacher gpt2 --num-layers 4 --hidden-size 64 --num-attention-heads 4 --gpus 1"


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(TOOL))["main"]


@pytest.fixture
def page(main, capsys):
    def make(flags: str) -> str:
        main(flags.split())
        return capsys.readouterr().out

    return make


@pytest.mark.parametrize(
    "flags",
    [
        ISSUE,
        f"{ISSUE} --vpp 2 --recompute full",
        f"{LARGE} --gpus 256 --pp 8 --method let+salt --gpu-memory-gib 1",
        f"{LARGE} --gpus 1024 --pp 16 --global-batch-size 1024",
        f"{SMALL} --method reverse-kd --seq-length 1024",
        f"{SMALL} --method salt --kd-stop-step 5 --no-flash-attention --dropout",
        "--student 3b --vocab-size 50277 --gpus 64 --method baseline",
    ],
)
def test_fits_one_screen_and_is_ascii(page, flags):
    text = page(flags)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) <= 40


def test_the_search_fits_one_screen_and_ends_with_flags(page):
    lines = page("--student 7b --teacher llama-3.2-1b --gpus 64 --search").splitlines()
    assert len(lines) <= 12 and max(map(len, lines)) <= 100
    assert lines[3].split()[:6] == ["1", "1", "1", "1", "2", "none"]
    assert lines[-1] == (
        "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --micro-batch-size 2"
    )


def test_the_flags_of_a_run_say_the_same(page):
    run = (
        "--num-layers 24 --hidden-size 2048 --ffn-hidden-size=5504 --num-attention-heads 16 "
        "--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
        "--untie-embeddings-and-output-weights --seq-length 2048 --max-position-embeddings 2048 "
        "--train-iters 19073 --global-batch-size 512 --micro-batch-size 4 --lr 3e-4 --bf16 "
        "--pipeline-model-parallel-size 4 --recompute-granularity full --recompute-method uniform "
        "--use-distributed-optimizer --attention-dropout 0 --hidden-dropout 0 "
        "--data-path 1 a 2 b --method let --teacher-model HuggingFaceTB/SmolLM-135M"
    )
    found = page(f"--gpus 32 -- {run}").replace("custom", "1.4b")
    assert found == page(f"{ISSUE} --recompute full")


def test_a_runs_defaults_are_megatrons(page):
    size = (
        "--num-layers 8 --hidden-size 64 --num-attention-heads 4 --vocab-size 1000 --seq-length 64"
    )
    run = f"{size} --micro-batch-size 1 --global-batch-size 8 --train-iters 9 --fp16 "
    run += "--accumulate-allreduce-grads-in-fp32"
    plain = page(f"--gpus 4 -- {run} --tensor-model-parallel-size 2")
    assert "method baseline" in plain and "distributed optimizer" not in plain
    assert "sequence parallel" not in plain
    same = f"{run} --tensor-model-parallel-size 2 --use-distributed-optimizer --sequence-parallel"
    given = page(f"--gpus 4 -- {same} --attention-dropout 0 --hidden-dropout 0")
    assert "sequence parallel" in given and "distributed optimizer" in given
    assert page(f"--gpus 4 --search -- {same} --pipeline-model-parallel-size 4")


def test_a_run_is_planned_as_megatron_reads_it(page):
    """Flags that this tool has too, where Megatron takes them in another way."""
    shape = "--num-layers 8 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --bf16"
    run = f"--gpus 1 -- {shape} --micro-batch-size 1 --global-batch-size 8 --train-iters 2000"
    plain = page(f"{run} --vocab-size 1000")
    assert "4 heads" in plain and ", flash attention" not in plain and "1 x DP 1" in plain
    assert page(f"{run} --vocab-size 1000 --num-query-groups 2") == plain  # not read
    assert "4/1 heads" in page(f"{run} --vocab-size 1000 --group-query-attention")
    assert "no flash attention" in page(f"{run} --vocab-size 1000 --transformer-impl local")
    longer = page(f"{run} --vocab-size 1000 --max-position-embeddings 128")
    assert longer != plain  # more rows of learned positions
    rotated = f"{run} --vocab-size 1000 --position-embedding-type rope"
    assert page(f"{rotated} --max-position-embeddings 128") == page(rotated)
    let = f"{run} --method let --teacher-model meta-llama/Llama-3.2-1B"
    for vocabulary in ("--tokenizer-model gpt2", "--tokenizer-model gpt2 --vocab-size 9"):
        assert "vocab 50304 tied" in page(f"{let} {vocabulary}")
    assert "until step 2000 (100.0 %" in page(f"{let} --let-decay constant")


def test_a_folder_may_be_the_student(page, tmp_path, capsys):
    config = TEACHERS["llama-3.2-1b"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = page(f"--student {tmp_path} --method baseline --gpus 8 --seq-length 4096")
    assert "1,235,814,400 parameters" in text
    with pytest.raises(SystemExit):
        page(f"--student {tmp_path} --method baseline --gpus 8 --num-layers 2")
    assert "--num-layers has no effect with a folder as --student" in capsys.readouterr().err


def test_the_issues_example(page):
    text = page(ISSUE)
    assert "1,415,677,952 parameters; 8.49 GFLOP/token" in text
    assert "134,515,008 parameters; 0.283 GFLOP/token" in text
    assert "teacher for layer 3 on stage 0 until step 1500 (7.9 % of the run)" in text
    assert "all GPUs: +3.3 %\n" in text
    assert "with bubble and recomputation: 0.288" in text
    assert "Fits: stage 0 needs 17.3 GiB of 80" in text
    assert "--decoder-last-pipeline-num-layers 3" in text


def test_a_page_says_what_does_not_fit(page):
    assert "DOES NOT FIT: stage 0 needs 17.3 GiB of 17; the suggested split" in page(
        f"{ISSUE} --gpu-memory-gib 17"
    )
    hopeless = page(f"{ISSUE} --gpu-memory-gib 4 --recompute full")
    assert "DOES NOT FIT" in hopeless and "Try a smaller --micro-batch-size" in hopeless


def test_megatrons_spelling(page):
    text = page(
        "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --swiglu --normalization RMSNorm "
        "--untie-embeddings-and-output-weights --disable-bias-linear --padded-vocab-size 1024 "
        "--position-embedding-type rope --num-query-groups 2 --ffn-hidden-size 512 --gpus 2 "
        "--tensor-model-parallel-size 2 --method baseline --train-iters 7"
    )
    # 4 x (256 x (512 + 256) + 3 x 256 x 512 + 512) + 256 + 2 x 256 x 1024
    parameters = 4 * (256 * 768 + 3 * 256 * 512 + 512) + 256 + 2 * 256 * 1024
    assert f"vocab 1024; {parameters:,} parameters" in text
    assert "7 steps x 512 x 2048" in text and "sequence parallel" in text


def test_learned_positions_are_megatrons_default(page):
    # Embedding, positions, 4 GELU layers with biases, final norm.
    layer = 4 * 64 * 64 + 2 * 64 * 256 + 5 * 64 + 256 + 4 * 64
    parameters = 50304 * 64 + 1024 * 64 + 4 * layer + 128
    assert f"{parameters:,} parameters" in page(f"{SMALL} --seq-length 1024")
    short = page(f"{SMALL} --position-embedding-type rope --seq-length 1024")
    assert f"{parameters - 1024 * 64:,} parameters" in short


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--student 2b --teacher gpt2 --gpus 8", "--student 2b is unknown"),
        ("--student 1.4b --gpus 8", "Give --teacher or --vocab-size"),
        ("--student 1.4b --vocab-size 100 --gpus 8", "--method let needs a teacher"),
        (f"{ISSUE} --method salt --let-layer 2", "--let-layer has no effect with --method salt"),
        (f"{ISSUE} --kd-stop-step 10", "--kd-stop-step has no effect with --method let"),
        (f"{ISSUE} --max-position-embeddings 10", "--max-position-embeddings has no effect"),
        (f"{ISSUE} --train-tokens nan", "--train-tokens nan is not a run"),
        (f"{ISSUE} --train-tokens 1000", "--train-tokens 1000 is not a run"),
        (f"{ISSUE} --vocab-size 0", "--vocab-size 0"),
        (f"{ISSUE} --gpus 30", "--gpus 30 is not a multiple"),
        (f"{ISSUE} --cp 5", "x --cp 5 = 20"),
        (f"{ISSUE} --dry-run", "--dry-run has no effect without --search"),
        (f"{ISSUE} --cp 2 --method salt", "--cp 2 is not supported with --method salt"),
        (f"{ISSUE} --search", "--pp has no effect with --search"),
        ("--gpus 8 -- --num-experts 4 --lr 1", "--num-experts is not planned here"),
        (f"--gpus 8 -- {STEP} --attention-dropout x", "--vocab-size"),
        (f"--gpus 8 -- {STEP} --tokenizer-model a/b", "--tokenizer-model a/b has is not known"),
        (f"--gpus 8 -- {STEP} --quick-geglu", "--quick-geglu is not planned here"),
        (f"--gpus 8 -- {STEP} --no-pad-vocab-size", "--no-pad-vocab-size is not planned here"),
        (f"--gpus 8 -- {STEP} --recompute-method block", "may take it. Only uniform is"),
        (f"--gpus 8 -- {STEP} --recompute-modules core_attn mlp", "--recompute-modules is not"),
        (f"--gpus 8 -- {STEP} --optimizer", "--optimizer is not planned here"),
        ("--gpus 8 -- --seq-length 64 --bf16", "have no --micro-batch-size. Add it"),
        (f"--gpus 8 -- {STEP} --vocab-file v.json --teacher-model gpt2", "--vocab-file has is not"),
        (f"--gpus 8 -- {STEP.replace('--bf16', '--fp16')}", "Gradients in fp16 are not planned"),
        (f"--gpus 8 -- {STEP.replace('--bf16', '')}", "is one in fp32: not planned here"),
        (f"{ISSUE} --position-embedding-type learned_absolute --max-position-embeddings -1", "-1"),
        ("--gpus 8 -- @/no/such.flags", "is no readable run file"),
        ("--gpus 8 --seq-length 64 --search --dry-run -- --lr 1", "before --, where"),
        (f"{ISSUE} --search --dry-run", "--dry-run needs the run's own flags, behind --"),
    ],
)
def test_a_mistake_ends_in_one_paragraph(main, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["megatron-let plan"])
    with pytest.raises(SystemExit) as stop:
        main(flags.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("megatron-let plan: error: ") and message in error
    assert error.count("\n") == 1
