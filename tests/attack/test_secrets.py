"""Secrets among a run's flags: in the log, the records, TensorBoard's and W&B's files are none."""

import subprocess
from pathlib import Path

import pytest

from tests.support.testing import run_program
from tests.support.tiny_run import FLAGS

PRETRAIN = Path(__file__).resolve().parents[2] / "pretrain_let.py"

# Put together, or the diff in the record of a start has them while this test is not committed.
SECRETS = ("open" + "sesame", "hunter" + "2", "hf_AbCdEfGh" + "IjKlMnOpQrSt")


@pytest.fixture(scope="module")
def watched(corpus, tmp_path_factory):
    """A run with W&B, and what was printed, shown or not."""
    save = tmp_path_factory.mktemp("watched") / "run"
    argv = [*FLAGS, *corpus.flags, "--save", str(save), "--exit-interval", "2"]
    argv += ["--wandb-project", "tests", "--wandb-exp-name", "tiny", "--log-progress"]
    argv += ["--app-tag-run-name", f"s3://me:{SECRETS[0]}@bucket password={SECRETS[1]}"]
    argv += ["--one-logger-run-name", SECRETS[2]]
    # A process of its own: W&B's service does not survive its run.
    done = run_program(str(PRETRAIN), *argv, launcher={"WANDB_MODE": "offline"})
    assert done.returncode == 0, done.stderr
    log = (save / "console" / "rank_00000.log").read_text()
    return save, done.stdout + done.stderr + log


def test_the_log_hides_them(watched):
    assert "s3://***@bucket password=***" in watched[1]
    assert not any(secret in watched[1] for secret in SECRETS)


def test_no_file_beside_the_checkpoints_has_them(watched):
    """A checkpoint has the arguments as they were given: it is what the run goes on from."""
    save = watched[0]
    paths = [p for p in save.rglob("*") if p.is_file() and "iter_" not in p.parent.name]
    places = {path.relative_to(save).parts[0] for path in paths}
    assert {"wandb", "tensorboard", "starts", "metrics.jsonl"} <= places
    for path in paths:
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in SECRETS), path


def test_wandb_has_the_other_arguments(watched):
    found = subprocess.run(["grep", "-rl", "ffn_hidden_size", watched[0] / "wandb"], check=True)
    assert found.returncode == 0
