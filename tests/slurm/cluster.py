"""A Slurm of two nodes on the loopback interface, with everything it writes in one temporary directory.

The daemons are those of Debian's ``slurm-wlm`` and ``munge``, run as the user who runs the tests; nothing of the
system's own Slurm, should there be one, is read or written.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
NODES = ("node1", "node2")
_SBIN = "/usr/sbin:/sbin"
_START_SECONDS = 200

# Two partitions: a job in "high" takes the nodes of one in "low", which is asked to stop, has GraceTime seconds, and is
# put back into the queue. cred_expire is also how long Slurm holds a requeued job back (120 s without it).
_CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SlurmdDebug=verbose
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=20
ReturnToService=2
SlurmdTimeout=300
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PartitionName=low Nodes={names} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=120 State=UP
PartitionName=high Nodes={names} PriorityTier=10 PreemptMode=OFF MaxTime=120 State=UP
"""


def missing() -> list[str]:
    """Return the programs that a cluster needs and that are not here."""
    path = f"{os.environ['PATH']}:{_SBIN}"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


class Cluster:
    """The daemons, and the commands of a user.

    Args:
        root: a short path (sockets have at most 108 characters) that does not exist yet or is empty.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.env = {**os.environ, "SLURM_CONF": str(root / "slurm.conf"), "PATH": f"{os.environ['PATH']}:{_SBIN}"}
        for name in [name for name in self.env if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]:
            del self.env[name]
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start munged, slurmctld and one slurmd per node, and wait until both nodes are idle.

        Raises:
            TimeoutError: they are not; the message has the ends of the logs.
        """
        self._write()
        socket_path = self.root / "munge.socket"
        files = [f"--{name}={self.root}/munge.{end}" for name, end in
                 (("key-file", "key"), ("log-file", "log"), ("pid-file", "pid"), ("seed-file", "seed"))]  # fmt: skip
        self._daemon("munged", "--foreground", "--force", f"--socket={socket_path}", *files)
        self.wait(socket_path.exists, "munged")
        self._daemon("slurmctld", "-D", "-f", self.env["SLURM_CONF"])
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node, "-f", self.env["SLURM_CONF"])
        self.wait(lambda: self._idle() == len(NODES), "idle nodes")

    def stop(self) -> None:
        """End all jobs and daemons."""
        try:
            if (self.root / "slurmctld.pid").exists():
                self.run("scancel", "--user", getpass.getuser(), check=False)
                self.wait(lambda: self.run("squeue", "-h") == "", "an empty queue")
        finally:
            for daemon in reversed(self._daemons):
                daemon.terminate()
            for daemon in self._daemons:
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()

    def run(self, *words: str, check: bool = True, **variables: str) -> str:
        """Run a command of Slurm, and return what it printed."""
        done = subprocess.run(
            words,
            env={**self.env, **variables},
            capture_output=True,
            text=True,
            timeout=600,
            cwd=self.root,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *words: str, **variables: str) -> str:
        """Submit a job with ``variables`` in its environment; return its id."""
        return self.run("sbatch", "--parsable", *words, **variables)

    def job(self, job: str) -> dict[str, str]:
        """Return what ``scontrol show job`` says, by its own names (JobState, Restarts, ExitCode...)."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def wait_for_end(self, job: str, timeout: float = 600) -> dict[str, str]:
        """Wait until ``job`` is over; return what is said of it then."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        self.wait(lambda: self.job(job)["JobState"] in over, f"the end of job {job}", timeout)
        return self.job(job)

    def wait(self, ready: Callable[[], bool], what: str, timeout: float = _START_SECONDS) -> None:
        """Wait until ``ready()``.

        Raises:
            TimeoutError: it was not in time.
        """
        deadline = time.monotonic() + timeout
        while not ready():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {what} within {timeout:.0f} s\n{self.logs()}")
            time.sleep(0.2)

    def logs(self) -> str:
        """Return the ends of all logs."""
        files = sorted({*self.root.glob("*.log"), *self.root.glob("*.out"), *self.root.glob("**/rank-*.log")})
        return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-2000:]}" for path in files)

    def _write(self) -> None:
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.root / name).mkdir(parents=True)
        self.root.chmod(0o755)
        (self.root / "munge.key").write_bytes(secrets.token_bytes(128))
        (self.root / "munge.key").chmod(0o400)
        ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs=2 Gres=gpu:1"
            for node, port in zip(NODES, ports[1:], strict=True)
        )
        text = _CONF.format(
            host=socket.gethostname(), ctld_port=ports[0], user=getpass.getuser(), root=self.root, nodes=nodes,
            names=",".join(NODES),
        )  # fmt: skip
        (self.root / "slurm.conf").write_text(text)
        # A GPU of no use: what matters is that Slurm counts one on each node.
        (self.root / "gres.conf").write_text("".join(f"NodeName={node} Name=gpu File=/dev/null\n" for node in NODES))

    def _daemon(self, *words: str) -> None:
        with (self.root / f"{words[0]}-{len(self._daemons)}.stderr.log").open("wb") as log:
            self._daemons.append(subprocess.Popen(words, env=self.env, stdout=log, stderr=log, start_new_session=True))

    def _idle(self) -> int:
        return self.run("sinfo", "-h", "-p", "low", "-N", "-o", "%t", check=False).split().count("idle")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
