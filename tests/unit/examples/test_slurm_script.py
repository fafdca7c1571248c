"""What pretrain.sbatch makes of how a job ends; on a real Slurm: tests/end_to_end/test_slurm.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
END = '{"kind": "end", "iteration": 9}\n'
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" "connections:$CUDA_DEVICE_MAX_CONNECTIONS" > "$HERE/srun.txt"
[ -z "$REACHES" ] || echo "$REACHES" > "$HERE/save/latest_checkpointed_iteration.txt"
exit "$STATUS"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in show) echo node1; echo node2 ;; *) echo "$*" >> "$HERE/scontrol.txt" ;; esac
"""


class Job:
    """One start of the script, with stand-ins for the two commands it calls."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.save = folder, folder / "save"
        self.save.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def start(self, *flags: str, reaches: str = "", status: int = 0, **env: str) -> tuple[int, str]:
        """Run it; srun writes a checkpoint of step `reaches` and ends with `status`."""
        for name in ("srun.txt", "scontrol.txt"):
            (self.folder / name).unlink(missing_ok=True)
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"}
        stand_ins = {"HERE": str(self.folder), "REACHES": reaches, "STATUS": str(status)}
        path = {"PATH": f"{self.folder}:{os.environ['PATH']}"}
        command = ["bash", ROOT / "examples/slurm/pretrain.sbatch", "--save", self.save, *flags]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | slurm | stand_ins | path | {"SLURM_GPUS_ON_NODE": "8"} | env,
            capture_output=True,
            text=True,
        )
        assert not done.stderr, done.stderr
        return done.returncode, done.stdout

    @property
    def given(self) -> str:
        """What srun was called with."""
        file = self.folder / "srun.txt"
        return " ".join(file.read_text().split("\n")) if file.exists() else ""

    @property
    def requeued(self) -> bool:
        file = self.folder / "scontrol.txt"
        return file.exists() and file.read_text() == "requeue 7\n"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_the_first_start_and_the_next(job: Job) -> None:
    first = ["--load", "old", "--ckpt-step", "500", "--finetune", "--train-iters=900"]
    assert job.start(*first, reaches="100", status=1)[0] == 0 and job.requeued
    assert "--nnodes=2 --nproc-per-node=8" in job.given and "--rdzv-endpoint=node1:" in job.given
    assert "--load old --ckpt-step 500 --finetune" in job.given
    assert job.start(*first, reaches="200", status=1)[0] == 0 and job.requeued
    assert "--ckpt-step" not in job.given and "--finetune" not in job.given
    assert f"--train-iters=900 --load {job.save} --exit-signal-handler" in job.given


def test_a_new_run_is_given_its_own_folder(job: Job) -> None:
    """Or it would start over whole checkpoints whose tracker is gone."""
    job.start(status=1)
    assert f"--save {job.save} --load {job.save} --exit-signal-handler" in job.given
    job.start("--load=old", status=1)
    assert "--load=old --exit-signal-handler" in job.given


def test_it_stays_down_after_the_second_failure_at_a_step(job: Job) -> None:
    assert job.start(status=1)[0] == 0 and job.requeued
    status, said = job.start(status=1)
    assert status == 1 and not job.requeued and "twice no new checkpoint after step 0" in said
    assert job.start(status=1)[0] == 0 and job.requeued  # submitted again
    assert job.start(reaches="100", status=1)[0] == 0 and job.requeued
    assert job.start(status=1)[0] == 0 and job.requeued
    assert job.start(status=1)[0] == 1


@pytest.mark.parametrize("torn", ["", "12x", None])
def test_without_a_tracker_the_folders_decide(job: Job, torn: str | None) -> None:
    tracker = job.save / "latest_checkpointed_iteration.txt"
    if torn is not None:
        tracker.write_text(torn)
    assert job.start(status=1)[0] == 0 and job.requeued
    for name in ("iter_0000500", "iter_0000900.mine"):
        (job.save / name).mkdir()
        (job.save / name / "metadata.json").touch()
    assert "from step 500" in job.start("--load", "old", "--finetune", status=1)[1]
    assert f"--load old --load {job.save} " in job.given and "--finetune" not in job.given


def test_wrong_flags_end_the_job(job: Job) -> None:
    """At once: a second try would fail as the first."""
    status, said = job.start("--no-such-flag", status=2)
    assert status == 1 and not job.requeued and "the flags are wrong" in said
    assert job.start(status=143)[0] == 0 and job.requeued


@pytest.mark.parametrize(("end", "status"), [("sys.exit(2)", 2), ("os.abort()", 1)])
def test_its_torchrun_ends_with_a_ranks_status(end: str, status: int, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(f"import os, sys\n{end}")
    launch = [sys.executable, ROOT / "examples/slurm/launch.py", "--standalone"]
    done = subprocess.run([*launch, tmp_path / "rank.py"], capture_output=True, text=True)
    assert done.returncode == status, done.stderr


def test_only_fsdp_leaves_the_connections_alone(job: Job) -> None:
    study = ["--tensorboard-dir", "runs/fsdp_study"]
    for flags, connections in ((study, "1"), (["--use-torch-fsdp2"], "")):
        job.start(*flags, status=1)
        assert f"connections:{connections} " in job.given


def test_a_failure_is_never_complete(job: Job) -> None:
    (job.save / "metrics.jsonl").write_text(END)
    (job.save / "latest_checkpointed_iteration.txt").write_text("9")
    assert job.start("--train-iters", "20", status=1)[0] == 0 and job.requeued
    status, said = job.start("--train-iters", "20", reaches="20")
    assert status == 0 and "complete at step 20" in said and not job.requeued


def test_what_is_complete_is_not_started(job: Job) -> None:
    (job.save / "metrics.jsonl").write_text(END)
    (job.save / "latest_checkpointed_iteration.txt").write_text("9")
    status, said = job.start("--train-iters", "9")
    assert status == 0 and "complete at step 9 already" in said and not job.given


def test_a_word_that_begins_with_an_at_sign_stays_one(job: Job) -> None:
    job.start("--wandb-entity", "@@me", reaches="1")
    assert "--wandb-entity @@me" in job.given  # which the program reads once more


def test_chain_and_container(job: Job) -> None:
    status, said = job.start(reaches="5", status=1, CHAIN="1")
    assert status == 0 and not job.requeued and "the chain's next job goes on" in said
    job.start(reaches="6", CONTAINER="image.sqsh", MOUNTS="/data")
    mounts = f"--container-mounts={ROOT}:{ROOT},/data"
    assert "--container-image=image.sqsh" in job.given and mounts in job.given
