"""A Slurm of three nodes on this machine: real slurmctld, slurmd and munge from Debian's packages, in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

NODES = ("127.0.0.1", "127.0.0.2", "127.0.0.3")  # names that every process can connect to
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")

_CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/log/slurmd.%n
SlurmdSpoolDir={folder}/spool.%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobRequeue=1
ReturnToService=2
SlurmdTimeout=20
KillWait=5
MinJobAge=300
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
GresTypes=gpu
NodeName=127.0.0.[1-3] NodeHostname={host} Port=[{first}-{last}] CPUs=64 Gres=gpu:8 State=UNKNOWN
PartitionName=p Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why no Slurm can run here; None where it can."""
    missing = [name for name in DAEMONS if _path(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: apt install slurmctld slurmd slurm-client munge)"
    return None if os.geteuid() == 0 else "slurmd runs as root only"


def _path(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin")


@contextlib.contextmanager
def running() -> Iterator[Slurm]:
    """A cluster, started and stopped; skips the test where it does not start."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    cluster = None
    try:
        try:
            cluster = Slurm(folder)
            cluster.start()
        except (OSError, AssertionError) as error:
            pytest.skip(f"Slurm does not start on this machine: {error}")
        yield cluster
    finally:
        if cluster is not None:
            cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


class Slurm:
    """The cluster; its folder must have a short path, for munge's socket lies in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in ("munge", "state", "log", "dev", *(f"spool.{node}" for node in NODES)):
            (folder / name).mkdir(parents=True)
        (folder / "munge").chmod(0o711)
        (folder / "munge" / "key").write_bytes(os.urandom(128))
        (folder / "munge" / "key").chmod(0o400)
        for number in range(8):  # devices that stand in for GPUs; plain files would not do
            os.mknod(folder / "dev" / f"nvidia{number}", 0o600 | 0o020000, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/dev/nvidia[0-7]\n")
        port = _ports(1 + len(NODES))
        (folder / "slurm.conf").write_text(
            _CONF.format(
                folder=folder,
                host=socket.gethostname().split(".")[0],
                port=port,
                first=port + 1,
                last=port + len(NODES),
            )
        )

    def start(self) -> None:
        munge = self.folder / "munge"
        options = [f"--{name}-file={munge / name}" for name in ("key", "pid", "seed", "log")]
        self._daemon("munged", *options, f"--socket={munge / 'sock'}", "--force")
        self._daemon("slurmctld", "-c")
        for node in NODES:
            self.start_node(node)
        self.until(lambda: self.states() == ["idle"] * len(NODES), 60)

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """As a machine that is gone: its daemon at least."""
        os.kill(int((self.folder / f"slurmd.{node}.pid").read_text()), 9)

    def stop(self) -> None:
        self.run("scancel", "--user", "root", check=False)
        deadline = time.monotonic() + 20
        while self.run("squeue", "--noheader", check=False) and time.monotonic() < deadline:
            time.sleep(0.2)
        self._end_what_lives_on()
        for file in (*self.folder.glob("slurmd.*.pid"), self.folder / "slurmctld.pid", self.folder / "munge" / "pid"):
            try:
                os.kill(int(file.read_text()), 15)
            except (OSError, ValueError):
                continue
        deadline = time.monotonic() + 20
        while list(self.folder.glob("slurm*.pid")) and time.monotonic() < deadline:
            time.sleep(0.1)

    def _end_what_lives_on(self) -> None:
        """The steps of a node that was killed, and what they have started."""
        for process in psutil.process_iter(["environ", "name"]):
            mine = (process.info["environ"] or {}).get("SLURM_CONF") == self.environment["SLURM_CONF"]
            if mine and process.info["name"] not in ("slurmctld", "slurmd", "munged"):
                with contextlib.suppress(psutil.Error):
                    process.kill()

    def run(self, *words: str, check: bool = True, environment: dict[str, str] | None = None) -> str:
        """What a Slurm command prints."""
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=60,
            env={**self.environment, **(environment or {})},
        )
        assert done.returncode == 0 or not check, f"{' '.join(words)}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *words: str, environment: dict[str, str] | None = None) -> str:
        """The number of the job."""
        return self.run("sbatch", "--parsable", *words, environment=environment).split(";")[0]

    def states(self) -> list[str]:
        """The nodes' states."""
        return self.run("sinfo", "--noheader", "--Node", "--format=%T").split()

    def job(self, number: str) -> dict[str, str]:
        """What scontrol says of a job."""
        words = self.run("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Waits; an assertion where it takes too long."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s; squeue:\n{self.run('squeue', check=False)}"
            time.sleep(0.2)

    def _daemon(self, name: str, *options: str) -> None:
        path = _path(name)
        assert path is not None
        done = subprocess.run([path, *options], capture_output=True, text=True, timeout=60, env=self.environment)
        assert done.returncode == 0, f"{name}: {done.stderr}"


def _ports(count: int) -> int:
    """The first of so many free ports in a row."""
    for first in range(16817, 60000, count):
        sockets = []
        try:
            for number in range(first, first + count):
                one = socket.socket()
                sockets.append(one)
                one.bind(("0.0.0.0", number))
            return first
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise RuntimeError("no ports are free")
