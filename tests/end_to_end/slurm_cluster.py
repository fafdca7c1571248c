"""A real Slurm on this machine: munged, slurmctld and slurmd, started for a test and stopped."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
CONFIG = """
ClusterName=test
SlurmctldHost={host}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={ctld_port}
SlurmdPort={d_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
KillWait=60
ReturnToService=2
NodeName={host} CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def missing() -> str | None:
    """Why no Slurm can be started here; None if one can."""
    paths = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [name for name in DAEMONS if shutil.which(name, path=paths) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "the daemons want to be root"


class Cluster:
    """Slurm's commands against this cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str, cwd: Path | None = None, **env: str) -> str:
        """Run a command of Slurm's; returns what it printed."""
        done = subprocess.run(
            command, cwd=cwd, env=self.env | env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """RUNNING, PENDING, COMPLETED, FAILED, ..."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return next(w for w in shown.split() if w.startswith("JobState=")).split("=")[1]

    def wait(self, job: str, *states: str, seconds: float) -> str:
        """Wait until the job is in one of the states; returns it."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state}, not {' or '.join(states)}"
            time.sleep(0.5)
        return state


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start the daemons with files and ports of their own; stop them at the end."""
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir()
    folder.chmod(0o755)
    host = socket.gethostname().split(".")[0]
    config = CONFIG.format(
        host=host,
        folder=folder,
        ctld_port=_free_port(),
        d_port=_free_port(),
        cpus=os.cpu_count(),
    )
    (folder / "slurm.conf").write_text(config)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    made = Cluster(folder)
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket"]
    munge += [f"--key-file={key}", f"--pid-file={folder}/munge/pid"]
    munge += [f"--log-file={folder}/munge/log", f"--seed-file={folder}/munge/seed"]
    env = made.env | {"PATH": f"{made.env['PATH']}:/usr/sbin:/sbin"}
    daemons = []
    try:
        for command in (munge, ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", host]):
            daemons.append(subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL))
            time.sleep(1)
        _wait_until_up(made, host)
        yield made
    finally:
        for daemon in reversed(daemons):
            _stop(daemon)


def _wait_until_up(made: Cluster, host: str) -> None:
    for _ in range(60):
        try:
            if made.run("sinfo", "--noheader", "--format=%T") in ("idle", "idle*"):
                return
        except AssertionError:
            pass  # the controller is not listening yet
        time.sleep(0.5)
    raise RuntimeError((made.folder / "slurmctld.log").read_text()[-3000:])


def _stop(daemon: subprocess.Popen) -> None:
    """End a daemon and what runs below it."""
    below = psutil.Process(daemon.pid).children(recursive=True) if daemon.poll() is None else []
    daemon.terminate()
    try:
        daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
    for process in below:
        if process.is_running():
            process.kill()
