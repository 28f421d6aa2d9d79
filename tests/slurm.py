"""A private Slurm on this machine: its own controller, nodes, key, ports and folder; nothing of the system's is touched."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from support import PATIENCE_S, environment, free_port


@contextmanager
def start_slurm(folder: Path, num_nodes: int = 1, cores_per_node: int = 2) -> Iterator[dict[str, str]]:
    """Start it, hand out what `srun` and `sbatch` need in their environment, stop it with all its jobs.

    Nodes are called n1, n2, ... and are all this machine. Jobs of the partition `urgent` preempt those of `all`. `srun --mpi=pmix` starts MPI ranks, which talk over TCP: by shared
    memory those of one "node" would meet those of another. Needs neither cgroups nor systemd.
    """
    user, host, munge_socket = getpass.getuser(), socket.gethostname().split(".")[0], folder / "munge.socket"
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    settings = [
        "ClusterName=private", f"SlurmctldHost={host}(127.0.0.1)", f"SlurmctldPort={free_port()}", f"SlurmUser={user}",
        f"SlurmdUser={user}", "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny", "AuthType=auth/munge", f"AuthInfo=socket={munge_socket}",
        f"StateSaveLocation={folder / 'state'}", f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder / 'slurmctld.pid'}", f"SlurmdPidFile={folder}/%n.pid",
        "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "JobAcctGatherType=jobacct_gather/none",
        "SelectType=select/linear", "SlurmdParameters=config_overrides", "ReturnToService=2", "KillWait=20",
        *(
            f"NodeName=n{node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs={cores_per_node}"
            for node in range(1, num_nodes + 1)
        ),
        "PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE",
        "PartitionName=all Nodes=ALL Default=YES State=UP GraceTime=90", "PartitionName=urgent Nodes=ALL PriorityTier=2 State=UP",
    ]  # fmt: skip
    (folder / "slurm.conf").write_text("\n".join(settings) + "\n")
    changes = {"SLURM_CONF": str(folder / "slurm.conf"), "OMPI_MCA_btl": "self,tcp"}
    munged = [
        "munged", "--foreground", "--force", f"--key-file={folder / 'munge.key'}", f"--socket={munge_socket}",
        f"--pid-file={folder / 'munged.pid'}", f"--seed-file={folder / 'munge.seed'}", "--num-threads=1",
    ]  # fmt: skip
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        with open(folder / f"{len(daemons)}-{command[0]}.log", "w") as log:
            program = shutil.which(command[0], path=f"{os.environ['PATH']}:/usr/sbin") or command[0]
            daemons.append(
                subprocess.Popen([program, *command[1:]], env=environment(**changes), stdout=log, stderr=log)
            )

    def ask(*command: str) -> str:
        asked = subprocess.run(command, env=environment(**changes), capture_output=True, text=True, check=False)
        return asked.stdout.strip()

    def wait_until(is_so: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not is_so():
            is_late = time.monotonic() > deadline or any(daemon.poll() is not None for daemon in daemons)
            assert not is_late, f"{what}:\n" + "\n".join(log.read_text() for log in folder.glob("*.log"))
            time.sleep(0.05)

    try:
        start(*munged)
        wait_until(munge_socket.exists, "munged does not start")
        start("slurmctld", "-D")
        for node in range(1, num_nodes + 1):
            # Slurm's PMIx plugin keeps files of a job there under a name without the node's.
            (folder / f"tmp-n{node}").mkdir()
            (folder / f"n{node}.conf").write_text(f"Include {folder / 'slurm.conf'}\nTmpFS={folder / f'tmp-n{node}'}\n")
            start("slurmd", "-D", "-N", f"n{node}", "-f", str(folder / f"n{node}.conf"))
        wait_until(lambda: ask("sinfo", "--noheader", "--format=%D %t") == f"{num_nodes} idle", "no node is idle")
        sockets = [socket for daemon in daemons for socket in psutil.Process(daemon.pid).net_connections("inet")]
        assert {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
        yield changes
    finally:
        ask("scancel", "--user", user)
        while ask("squeue", "--noheader"):
            time.sleep(0.05)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()
