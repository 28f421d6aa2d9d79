"""Two "hosts" on this machine: 127.0.0.2 and 127.0.0.3, served by a private sshd with keys of its own, on loopback only."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from support import PATIENCE_S, REPOSITORY, environment, free_port

HOSTS = ("127.0.0.2", "127.0.0.3")


class TwoHosts:
    """A running sshd, and commands that reach it by plain `ssh` and `pdsh`."""

    def __init__(self, folder: Path, port: int, server: int) -> None:
        self.server = server
        self._bin = folder / "bin"
        self._bin.mkdir()
        config = folder / "ssh_config"
        config.write_text(
            f"Host *\n  Port {port}\n  IdentityFile {folder / 'key'}\n  IdentitiesOnly yes\n  BatchMode yes\n"
            f"  StrictHostKeyChecking no\n  UserKnownHostsFile {folder / 'known_hosts'}\n  LogLevel ERROR\n"
        )
        (self._bin / "second_host").write_text(second_host())
        (self._bin / "second_host").chmod(0o755)
        wrapper = self._bin / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {config} "$@"\n')
        wrapper.chmod(0o755)

    def run(self, command: str, folder: Path, cwd: Path | None = None) -> str:
        """A shell command in `cwd` (default: `folder`), with `folder`/hosts naming both and loopback for gloo; its output."""
        (folder / "hosts").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
        (folder / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\nGLOO_SOCKET_IFNAME=lo\nOMP_NUM_THREADS=1\n")
        env = self.environment() | {"DS_ENV_FILE": str(folder / ".deepspeed_env")}
        done = subprocess.run(
            command, shell=True, cwd=cwd or folder, env=env, text=True, timeout=PATIENCE_S, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done.stdout

    def environment(self) -> dict[str, str]:
        """Of a command that reaches the hosts by plain `ssh`; mpirun refuses root without two words."""
        env = environment(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
        return env | {"PATH": f"{self._bin}{os.pathsep}{env['PATH']}"}

    @contextmanager
    def unlike(self, *mounts: list[str]) -> Iterator[None]:
        """While it lasts, the second host sees other files: the arguments of `mount`, done in a namespace of its own."""
        script = self._bin / "second_host"
        before = script.read_text()
        try:
            script.write_text(second_host(mounts))
            yield
        finally:
            script.write_text(before)

    def is_up(self) -> bool:
        """Whether both hosts answer."""
        return all(
            subprocess.run([self._bin / "ssh", host, "true"], check=False, capture_output=True).returncode == 0
            for host in HOSTS
        )


def in_namespace(mounts: Iterable[list[str]], command: str) -> list[str]:
    """`command`, words for a shell, run where these mounts are done and nobody else sees them."""
    rights = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return [
        "unshare",
        *rights,
        "--mount",
        "sh",
        "-ec",
        "; ".join([*(shlex.join(["mount", *m]) for m in mounts), command]),
    ]


def second_host(mounts: Iterable[list[str]] = ()) -> str:
    """What the sshd runs for a command on the second host."""
    command = 'exec sh -c "$SSH_ORIGINAL_COMMAND"'
    return f"#!/bin/sh\n{f'exec {shlex.join(in_namespace(mounts, command))}' if mounts else command}\n"


_BY_HAND = """
mount --bind "$1" /etc/hosts
shift
hostname hosta
unshare --net --uts sh -c 'hostname hostb; exec sleep infinity' &
peer=$!
trap 'kill $peer' EXIT
until [ "$(readlink /proc/$peer/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
ip link add here type veth peer name there
ip link set there netns $peer
there="nsenter --target $peer --net --uts"
ip link set lo up; ip addr add 10.9.0.1/24 dev here; ip link set here up
$there ip link set lo up; $there ip addr add 10.9.0.2/24 dev there; $there ip link set there up
RANK=1 $there "$@" &
second=$!
RANK=0 "$@"
wait $second
"""


def run_on_two_networks(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `command` at once as rank 0 of a host `hosta` and as rank 1 of `hostb`, which share files and a network only.

    Nobody but these variables tells them of each other, and no loopback address leads from one to the other.
    """
    (folder / "hosts_file").write_text("127.0.0.1 localhost\n10.9.0.1 hosta\n10.9.0.2 hostb\n")
    rights = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    words = [
        "unshare",
        *rights,
        "--net",
        "--uts",
        "--mount",
        "sh",
        "-ec",
        _BY_HAND,
        "sh",
        str(folder / "hosts_file"),
        *command,
    ]
    env = environment(WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="hosta", MASTER_PORT="29500", **variables)
    return subprocess.run(
        words,
        cwd=REPOSITORY,
        env=env,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def start_two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Start the sshd, hand out the hosts, stop it."""
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    port = free_port()
    settings = [
        f"Port {port}", *(f"ListenAddress {host}" for host in HOSTS), f"HostKey {folder / 'host_key'}",
        f"AuthorizedKeysFile {folder / 'key.pub'}", "StrictModes no", "PasswordAuthentication no", "UsePAM no",
        "PermitRootLogin prohibit-password", f"PidFile {folder / 'sshd.pid'}", "MaxStartups 100",
        f"Match LocalAddress {HOSTS[1]}", f"ForceCommand {folder / 'bin' / 'second_host'}",
    ]  # fmt: skip
    (folder / "sshd_config").write_text("\n".join(settings) + "\n")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with open(folder / "sshd.log", "w") as log:
        server = subprocess.Popen(
            [shutil.which("sshd") or "/usr/sbin/sshd", "-D", "-e", "-f", folder / "sshd_config"], stderr=log
        )
    try:
        hosts = TwoHosts(folder, port, server.pid)
        for _ in range(50):
            if hosts.is_up():
                break
            assert server.poll() is None, (folder / "sshd.log").read_text()
            time.sleep(0.1)
        yield hosts
    finally:
        server.terminate()
        server.wait()
