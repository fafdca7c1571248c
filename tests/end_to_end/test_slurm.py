"""`examples/slurm/pretrain.sbatch` on a real Slurm: whatever stops a job, the run goes on.

Every job trains the same LET run; all end with the same weights, bit for bit.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.training import records
from tests.end_to_end.slurm_cluster import Cluster, cluster, missing
from tests.end_to_end.test_pile import MODEL, write_pile
from tests.support.tiny_run import FLAGS, Corpus, hashes, make_corpus
from tests.unit.data.test_preprocess import save_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
]
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "examples" / "slurm" / "pretrain.sbatch")
STEPS, INTERVAL = 800, 100
SECONDS = 1200
RUN = f"--train-iters {STEPS} --save-interval {INTERVAL} --eval-interval {STEPS}".split()
LET = f"--let-stop-step {STEPS // 2}".split()
SMALL = (
    "--num-layers 8 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 "
    "--seq-length 16 --max-position-embeddings 16 --global-batch-size 16 --train-iters 6 "
    "--lr-warmup-iters 1 --eval-interval 3 --eval-iters 1 --log-interval 1 --save-interval 3 "
    "--num-workers 0 --make-vocab-size-divisible-by 8 --cpu"
).split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory):
    with cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


class Job:
    """One job of the script."""

    def __init__(self, slurm: Cluster, corpus: Corpus, save: Path, *flags: str, agents: int = 1):
        self.slurm, self.save = slurm, save
        self.log = save.with_suffix(".log")
        # One of a name at a time, so each has a name of its own.
        sbatch = ["sbatch", "--parsable", f"--job-name={save.name}", f"--output={self.log}"]
        sbatch += ["--gpus-per-node=0", f"--ntasks-per-node={agents}", *flags]
        training = [*FLAGS, *RUN, *corpus.flags, *corpus.let(*LET), "--save", str(save)]
        self.id = slurm.run(
            *sbatch, SCRIPT, *training, cwd=ROOT, PROCESSES=str(2 // agents), SAVE_SECONDS="100"
        )

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + SECONDS
        while (
            not (self.save / "metrics.jsonl").exists()
            or max(records(self.save, "train"), default=0) < step
        ):
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.5)

    def wait_until_complete(self) -> str:
        state = self.slurm.wait(self.id, "COMPLETED", "FAILED", "TIMEOUT", seconds=SECONDS)
        text = self.log.read_text()
        assert state == "COMPLETED" and f"complete at step {STEPS}" in text, text[-5000:]
        return text


@pytest.fixture(scope="module")
def undisturbed(slurm: Cluster, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Two nodes: two torchrun agents that find each other by c10d."""
    job = Job(slurm, corpus, tmp_path_factory.mktemp("nodes") / "undisturbed", agents=2)
    text = job.wait_until_complete()
    assert "start 0, 2 x 1 processes, from step 0" in text
    return hashes(job.save)


def test_term_saves_and_goes_on(slurm: Cluster, corpus: Corpus, undisturbed: dict, tmp_path: Path):
    job = Job(slurm, corpus, tmp_path / "term")
    job.wait_for_step(INTERVAL + 20)
    slurm.run("scancel", "--signal=TERM", job.id)
    text = job.wait_until_complete()
    assert re.search(r"^> stopped at step \d+$", text, re.M)
    [saved] = map(int, re.findall(r"stopped at step (\d+);", text))
    assert saved % INTERVAL != 0 and f"start 1, 1 x 2 processes, from step {saved}" in text
    assert hashes(job.save) == undisturbed


def test_requeue_goes_on(slurm: Cluster, corpus: Corpus, undisturbed: dict, tmp_path: Path):
    """An operator's requeue, or a lost node's."""
    job = Job(slurm, corpus, tmp_path / "requeue")
    job.wait_for_step(INTERVAL + 20)
    slurm.run("scontrol", "requeue", job.id)
    text = job.wait_until_complete()
    assert "start 1, " in text
    assert hashes(job.save) == undisturbed


def test_time_limit_goes_on(slurm: Cluster, corpus: Corpus, undisturbed: dict, tmp_path: Path):
    """Slurm looks once a minute, so TERM comes 30 to 90 seconds after the start."""
    job = Job(slurm, corpus, tmp_path / "limit", "--time=2", "--signal=TERM@30")
    text = job.wait_until_complete()
    if "start 1, " not in text:
        pytest.skip("the run was complete before its time limit")
    assert hashes(job.save) == undisturbed


@pytest.mark.parametrize("merge", ["", "1"])
def test_an_array_preprocesses_the_pile_and_its_parts_train(
    slurm: Cluster, tmp_path: Path, merge: str
):
    write_pile(tmp_path / "pile")
    tokenizer, data = save_tokenizer(tmp_path / "tokenizer"), tmp_path / "data"
    script = str(ROOT / "examples" / "pile" / "preprocess.sbatch")
    log = f"--output={tmp_path}/%a.log"
    common = ["sbatch", "--parsable", "--cpus-per-task=1", log, f"--job-name={tmp_path.name}"]
    words = [script, str(tmp_path / "pile"), str(tokenizer), str(data)]
    wrong = slurm.run(*common, "--array=0-2", *words, cwd=ROOT)
    assert slurm.wait(f"{wrong}_0", "FAILED", "COMPLETED", seconds=SECONDS) == "FAILED"
    assert "--array=0-1 has a task for each" in (tmp_path / "0.log").read_text()
    job = slurm.run(*common, "--array=0-1", *words, cwd=ROOT, MERGE=merge)
    for task in (0, 1):
        state = slurm.wait(f"{job}_{task}", "COMPLETED", "FAILED", seconds=SECONDS)
        assert state == "COMPLETED", (tmp_path / f"{task}.log").read_text()
    blend = (data / "pile_text_blend.txt").read_text().split()
    assert len(blend) == 2 * 3 * (1 if merge else 2)
    whole = tmp_path / "whole"
    at_once = [str(ROOT / "examples/pile/preprocess.sh"), *words[1:3], str(whole), "1"]
    subprocess.run(at_once, check=True, capture_output=True)
    tokens = (whole / "pile_text_blend.txt").read_text().split()[::2]
    assert sum(map(int, blend[::2])) == sum(map(int, tokens))
    if merge:
        for prefix in blend[1::2]:
            name = Path(prefix).name
            assert Path(f"{prefix}.bin").read_bytes() == (whole / f"{name}.bin").read_bytes()
    flags = f"{MODEL} --tokenizer-model {tokenizer} --data-args-path {data}/pile_text_blend.txt"
    train = [sys.executable, "pretrain_let.py", *flags.split(), "--split", "90,10,0"]
    done = subprocess.run(train, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "> step 2/2 " in done.stdout, done.stderr


def test_a_recipes_file_is_run_dry_submitted_and_launched(
    slurm: Cluster, corpus: Corpus, tmp_path: Path
):
    """The same file, the same small sizes behind it; Slurm's weights are torchrun's."""
    words = ["@examples/pile_3b/run.flags", *SMALL, *corpus.flags, "--method", "baseline"]
    dry = [sys.executable, "pretrain_let.py", *words, "--dry-run"]
    done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "= TP 1 x PP 2 x DP 1: 2 of its ranks" in done.stdout, done.stderr
    saves = [tmp_path / "slurm", tmp_path / "torchrun"]
    log = tmp_path / "log"
    flags = ["--parsable", f"--job-name={tmp_path.name}", "--gpus-per-node=0", f"--output={log}"]
    job = slurm.run(
        *("sbatch", *flags, SCRIPT, *words, "--save", str(saves[0])), cwd=ROOT, PROCESSES="2"
    )
    assert slurm.wait(job, "COMPLETED", "FAILED", seconds=SECONDS) == "COMPLETED", log.read_text()
    launch = ["examples/torchrun/train.sh", *words, "--save", str(saves[1])]
    environment = os.environ | {"PROCESSES": "2", "HEAD": "localhost:29611"}
    subprocess.run(launch, cwd=ROOT, env=environment, check=True)
    assert hashes(saves[0]) == hashes(saves[1])


@pytest.mark.parametrize(
    ("training", "python", "message", "starts"),
    [
        ("--save SAVE --no-such-flag", "", "the flags are wrong", 1),
        ("--save SAVE --method let --cpu", "", "the flags are wrong", 1),
        ("--train-iters 5", "", "add --save DIR", 0),
        ("--save SAVE --cpu", "/bin/false", "twice no new checkpoint", 2),
    ],
    ids=["argparse", "usage", "script", "stuck"],
)
def test_what_does_not_get_on_stays_down(
    slurm: Cluster, tmp_path: Path, training: str, python: str, message: str, starts: int
):
    """At once where the flags are wrong, as both of two nodes say."""
    log = tmp_path / "log"
    flags = ["--parsable", f"--job-name={tmp_path.name}", "--gpus-per-node=0", f"--output={log}"]
    words = training.replace("SAVE", str(tmp_path / "save")).split()
    command = ["sbatch", *flags, "--ntasks-per-node=2", SCRIPT, *words]
    job = slurm.run(*command, cwd=ROOT, PYTHON=python)
    assert slurm.wait(job, "FAILED", "COMPLETED", seconds=SECONDS) == "FAILED"
    text = log.read_text()
    assert message in text and text.count(": start ") == starts, text
