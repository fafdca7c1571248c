"""`--dry-run`: the real program as single ranks, on tensors without contents."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks import dry_run
from benchmarks.recipes import recipe_flags
from megatron_let.dry_run.flags import AS_IF, RESULT
from megatron_let.dry_run.start import Found
from megatron_let.methods.table import METHODS
from tests.support import tokenizers_of_ours as ours
from tests.support.testing import run_program
from tests.support.tiny_run import FLAGS, LET

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = str(ROOT / "pretrain_let.py")
LAYOUT = (
    "--sequence-parallel --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
    "--use-distributed-optimizer"
).split()
WORLD = 8
LASTING = """
import sys
from megatron_let.dry_run import start

start.COMMAND = [sys.executable, "-c", "import time; time.sleep(60)"]
start.found_by([])
"""
READING_LOSS = """
from megatron_let.losses.table import add_loss, cosine


def read(student_SBH, teacher_SBH):
    losses = cosine(student_SBH, teacher_SBH)
    losses.sum().item()
    return losses


add_loss("read", read)
"""


@pytest.fixture
def rank(corpus, tmp_path):
    """Run one rank; a process of the fork server has what `start.begin` prepares."""

    def run(number, *flags, world=WORLD, data=corpus.flags):
        file = tmp_path / "found.json"
        launcher = {"RANK": str(number), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
        launcher |= {"MASTER_ADDR": "nowhere", "MASTER_PORT": "1", RESULT: str(file)}
        alone = ["--dry-run", "--fake-process-group", "--save", str(tmp_path / "save")]
        done = run_program(PROGRAM, *FLAGS, *data, *alone, *flags, launcher=launcher)
        assert done.returncode == 0, done.stderr[-3000:]
        assert not (tmp_path / "save").exists()
        return Found(**json.loads(file.read_text()))

    return run


def test_a_rank_holds_what_arithmetic_says(corpus, rank):
    found = rank(4, *LAYOUT, AS_IF, *corpus.let("--let-layer", "4"))
    hidden, ffn, vocabulary = 32, 64, 256
    queries, keys = hidden, 2 * 2 * 8
    layer = hidden * (2 * queries + keys + 3 * ffn) // 2 + 2 * hidden
    assert found.stage == 1
    assert found.parameters == 2 * layer + hidden + vocabulary * hidden // 2
    assert found.weights >= 4 * found.parameters  # fp32; a buffer is filled up for its shards
    assert found.weights == found.gradients < 4.2 * found.parameters
    assert found.teacher > 0 and found.teacher_flops > 0
    assert found.peak == found.weights + found.gradients + found.optimizer + found.teacher + (
        found.step
    )


def test_the_kernels_of_a_gpu_keep_no_scores(corpus, rank):
    longer = ["--seq-length", "256", "--max-position-embeddings", "256"]
    alike = [*longer, "--global-batch-size", "2"]
    kernels, local = (rank(0, *alike, *flags, world=1).step for flags in ([AS_IF], []))
    scores = 4 * 2 * 4 * 256 * 256 * 4  # layers x rows x heads x S x S, fp32
    assert local - kernels > 0.9 * scores


def test_the_steps_work_is_counted(corpus, rank):
    """Tolerance: none; matrices of the student and the teacher, causal attention's half square."""
    plain = rank(0, AS_IF, world=1)
    let = rank(0, AS_IF, *corpus.let(), world=1)
    tokens = 8 * 16
    layer = 32 * (2 * 32 + 2 * 2 * 8 + 3 * 64)
    attention = 2 * 2 * 32 * 16 / 2
    forward = 4 * (2 * layer + attention) + 2 * 32 * 256
    assert plain.flops == 3 * tokens * forward and plain.teacher_flops == 0
    assert plain.collectives == []
    assert let.flops - let.teacher_flops == pytest.approx(plain.flops, rel=0.01)  # the alignment


def test_what_travels_is_counted_by_group(rank):
    found = rank(0, *LAYOUT, AS_IF, "--train-iters", "1")
    # Two moments in fp32, over two ranks: those of a second step, though the run has only one.
    assert found.optimizer >= 2 * 4 * found.parameters / 2
    kinds = {(group, kind): number for group, kind, number, _ in found.collectives}
    assert kinds["TENSOR_MODEL_PARALLEL", "reduce_scatter_base"] > 0
    assert kinds["DATA_PARALLEL_GROUP_WITH_CP", "allgather_base"] > 0


def test_a_guided_step_reads_no_more_than_a_plain_one(corpus, rank, tmp_path):
    """What the host reads waits for a GPU. The twin, a loss that is read, is seen."""
    small = "--num-layers 2 --micro-batch-size 1 --global-batch-size 4".split()
    plain = rank(0, AS_IF, *small, world=1).reads
    for flags in (["--let-stop-step", "8"], ["--method", "salt", "--kd-stop-step", "8"]):
        own = corpus.let() if "salt" not in flags else corpus.let()[-2:]
        assert rank(0, AS_IF, *small, *own, *flags, world=1).reads == plain
    module = tmp_path / "reads.py"
    module.write_text(READING_LOSS)
    let = [*corpus.let(), "--method-module", str(module), "--let-loss", "read"]
    assert rank(0, AS_IF, *small, *let, world=1).reads >= plain + 4


def test_a_teacher_reads_rows_of_its_own(rank, tmp_path):
    """With another tokenizer: what is in the tensors that they are made of is read."""
    for name, size in (("student", 300), ("teacher", 400)):
        ours.save(ours.byte_level(size), tmp_path / name)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"intermediate_size": 64, "vocab_size": 400, "max_position_embeddings": 128}
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(shape | {"model_type": "llama"}))
    data = ["--mock-data", "--tokenizer-type", "HuggingFaceTokenizer"]
    data += ["--tokenizer-model", str(tmp_path / "student")]
    let = [*LET, "--teacher-model", str(tmp_path / "teacher")]
    assert rank(0, AS_IF, *let, world=1, data=data).teacher_flops > 0


def test_a_signal_ends_all_ranks_and_leaves_nothing(tmp_path):
    own = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", LASTING], env=own) as command:
        process = psutil.Process(command.pid)
        while not (ranks := process.children()) and command.poll() is None:
            time.sleep(0.01)
        process.terminate()
    assert command.returncode == 128 + signal.SIGTERM
    assert not any(one.is_running() for one in ranks) and not any(tmp_path.iterdir())


def test_the_whole_command_runs_a_recipe_that_has_nothing_here(tmp_path):
    flags = recipe_flags("3b", "let+salt", "smollm-135m", tmp_path)
    shorter = "--num-layers 8 --global-batch-size 128 --dry-run --dry-run-world-size 32"
    command = [sys.executable, PROGRAM, *flags, *shorter.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "= TP 1 x PP 2 x DP 16: 2 of its ranks" in done.stdout
    assert "Replaced: the tokenizer HuggingFaceTB/SmolLM-135M by 49,152 numbers." in done.stdout
    assert re.search(r"^Fits: rank 16 needs 1\d\.\d GiB of 80", done.stdout, re.M)
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert not any((tmp_path / name).exists() for name in ("save", "data/smollm-135m/cache"))


def test_an_error_is_the_runs_own_sentence(tmp_path):
    flags = recipe_flags("1.4b", "let", "smollm-135m", tmp_path)
    command = [sys.executable, PROGRAM, *flags, "--let-layer", "99", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("pretrain_let.py: error: --let-layer 99 ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", dry_run.SIZES)
def test_every_recipe_is_as_the_plan_says(size, method):
    """Tolerance: 10 % of the fullest rank's memory."""
    row, apart = dry_run.compared("", size, dry_run.flags_of(size, method), "none")
    assert abs(apart) <= 0.10, row


@pytest.mark.slow
@pytest.mark.parametrize(("size", "rank", "batch"), dry_run.MEASURED)
def test_a_rank_is_as_a_gpu_measured(size, rank, batch):
    """Tolerance: 5 % of what one H100 held."""
    for method, gib in dry_run.MEASURED[size, rank, batch].items():
        flags = dry_run.flags_of(size, method, "--global-batch-size", str(batch))
        [found] = dry_run.dry(flags, str(rank))
        assert found.peak / 2**30 == pytest.approx(gib, rel=0.05), method
