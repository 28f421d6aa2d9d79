"""Check a cluster and a run's settings before the expensive minutes: one table, and a remedy for each failure.

  python -m pretrain.doctor --hostfile hosts --deepspeed_config ds_configs/zero2.json    and a run's other flags
In a Slurm job, without --hostfile: the job's nodes. Otherwise this machine alone. Exit status 0: nothing failed; 1.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.console import USER_ERROR_STATUS, ArgumentParser, describe_error
from pretrain.checkpoint import checkpoints_by_step
from pretrain.config import Inputs, check_inputs, make_parser
from pretrain.launchers import slurm_port, tasks_per_node
from pretrain.local_ranks import default_ranks, gpus_to_use
from pretrain.memory import checkpoint_bytes, num_parameters

_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
_LOOK_PATIENCE_S = 120
_ALL_REDUCE_PATIENCE_S = 180
_MAX_EPOCHS = 40
_DEEPSPEED_PORT = 29500


@dataclass(frozen=True)
class Host:
    """One line of a hostfile."""

    name: str
    slots: int


@dataclass(frozen=True)
class Check:
    """A row of the table."""

    name: str
    status: str
    """ok, warning or FAILED."""
    found: str
    remedy: str = ""


class Hosts:
    """The machines of a run, and how a command gets there: ssh, srun, or not at all."""

    def __init__(self, hosts: list[Host], way: str) -> None:
        self.hosts, self._way = hosts, way

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return sum(host.slots for host in self.hosts)

    def ask(self, requests: Sequence[dict[str, Any]], patience_s: int) -> list[dict[str, Any]]:
        """Each host's answer to its request, all at once; {"unreachable": why} where there is none."""
        with ThreadPoolExecutor(len(self.hosts)) as pool:
            return list(pool.map(lambda host, request: self._ask(host, request, patience_s), self.hosts, requests))

    def _ask(self, host: Host, request: dict[str, Any], patience_s: int) -> dict[str, Any]:
        command = [sys.executable, "-m", "pretrain.probe"]
        environ = {**os.environ, **request.get("environ", {})}
        if self._way == "srun":
            command = [
                "srun", "--overlap", "--mpi=none", "--nodes=1", "--ntasks=1", f"--nodelist={host.name}", *command
            ]  # fmt: skip
        elif self._way == "ssh":  # the one string that a shell reads, there
            exported = {k: v for k, v in environ.items() if k.startswith("PYTHON")}
            exported |= exported_environ() | request.get("environ", {})
            words = ["env", *(f"{name}={value}" for name, value in exported.items()), *command]
            command = [*_SSH, host.name, f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(words)}"]
        try:
            done = subprocess.run(
                command, input=json.dumps(request | {"patience_s": patience_s}), env=environ, capture_output=True, text=True, timeout=patience_s,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"unreachable": f"no answer in {patience_s} s"}
        except OSError as error:
            return {"unreachable": describe_error(error)}
        try:
            answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            said = [line for line in done.stderr.splitlines() if line.strip()]
            return {"unreachable": said[-1] if said else f"exit status {done.returncode}"}
        if request["kind"] == "look" and "values" not in answer:  # the probe itself failed
            return {"unreachable": "; ".join(answer.get("faults", {}).values()) or "no answer"}
        return answer


def read_hostfile(path: Path) -> list[Host]:
    """The lines `name slots=N`. Raises OSError, or ValueError that names the line."""
    hosts: list[Host] = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        line = text.partition("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", line)
        if not match or match[1].startswith("-"):
            raise ValueError(
                f"{path}: line {number}: found {line!r}, expected a host and its ranks as in: node1 slots=8"
            )
        if match[1] in (host.name for host in hosts):
            raise ValueError(f"{path}: line {number}: {match[1]} is there twice")
        hosts.append(Host(match[1], int(match[2])))
    if not hosts:
        raise ValueError(f"{path}: names no host")
    return hosts


def find_hosts(hostfile: Path | None) -> Hosts:
    """Those of the hostfile, else of the Slurm job this is in, else this machine."""
    if hostfile:
        return Hosts(read_hostfile(hostfile), "ssh")
    ranks = default_ranks(gpus_to_use())
    if "SLURM_JOB_ID" not in os.environ:
        return Hosts([Host("here", ranks)], "")
    listed = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], capture_output=True, text=True, check=True
    )
    names = listed.stdout.split()
    given = os.environ.get("SLURM_NTASKS_PER_NODE")
    slots = tasks_per_node(given)[0] if given else ranks
    return Hosts([Host(name, slots) for name in names], "srun")


def exported_environ() -> dict[str, str]:
    """What DeepSpeed's launcher takes along to the other hosts: the lines of .deepspeed_env, or of DS_ENV_FILE."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    found: dict[str, str] = {}
    for path in (Path(os.path.expanduser(f"~/{name}")), Path(name)):  # which is no file where there is no home
        if path.is_file():
            lines = (line.strip().partition("=") for line in path.read_text().splitlines())
            found |= {key: value for key, equals, value in lines if equals and not key.startswith("#")}
    return found


def examine(hosts: Hosts, args: Any) -> Iterator[Check]:
    """The table's rows; each check that its forerunners make senseless is left out."""
    inputs: Inputs | None = None
    if args.deepspeed_config:
        try:
            inputs = check_inputs(args, hosts.world_size, device=None)  # each host is asked below
            sizes = inputs.batch_sizes
            yield Check(
                "settings", "ok",
                f"batch {sizes.train_batch} = micro batch {sizes.micro_batch} x {sizes.accumulation_steps} accumulation "
                f"steps x {hosts.world_size} ranks; {inputs.total_steps} steps",
            )  # fmt: skip
        except ValueError as error:
            yield Check("settings", "FAILED", str(error), "change what is named, or the ranks of the hosts")
    request: dict[str, Any] = {"kind": "look", "run": str(args.run), "token": f".doctor-{secrets.token_hex(8)}"}
    if args.deepspeed_config:
        request |= {"data": str(args.data), "deepspeed_config": str(args.deepspeed_config)}
    was_there = args.run.is_dir()
    try:
        args.run.mkdir(parents=True, exist_ok=True)
        (args.run / request["token"]).write_text("")
        answers = hosts.ask(
            [request | {"ports": [args.master_port] if rank == 0 else []} for rank in range(len(hosts.hosts))],
            _LOOK_PATIENCE_S,
        )
    finally:
        (args.run / request["token"]).unlink(missing_ok=True)
    rows = [*_of_hosts(hosts, answers, args)]
    yield from rows
    yield from _of_run(inputs, args)
    if not was_there and args.run.is_dir() and not any(args.run.iterdir()):
        args.run.rmdir()
    if any(row.status == "FAILED" and row.name != "data" for row in rows):
        yield Check("all-reduce", "warning", "not tried", "first mend what has failed")
    else:
        yield _all_reduce(hosts, answers, args)


def _of_hosts(hosts: Hosts, answers: list[dict[str, Any]], args: Any) -> Iterator[Check]:
    names = [host.name for host in hosts.hosts]

    def row(name: str, faults: dict[str, str], sound: str, remedy: str) -> Check:
        said = "; ".join(f"{host}: {fault}" for host, fault in faults.items())
        return Check(name, "FAILED" if faults else "ok", said or sound, remedy if faults else "")

    yield row(
        "hosts", {n: a["unreachable"] for n, a in zip(names, answers, strict=True) if "unreachable" in a},
        f"{len(names)} answer, {sum(a.get('gpus', 0) for a in answers)} GPUs",
        "`ssh HOST true` must work without a password, and this folder and its .venv be there at the same path",
    )  # fmt: skip
    there = {name: answer for name, answer in zip(names, answers, strict=True) if "unreachable" not in answer}
    if not there:
        return
    few = {
        host.name: f"{there[host.name]['gpus']} GPUs for {host.slots} ranks"
        for host in hosts.hosts
        if host.name in there and 0 < there[host.name]["gpus"] < host.slots
    }
    if few:
        yield row("GPUs", few, "", "lower slots in the hostfile; nvidia-smi tells whether a GPU is lost")
    first_name, first = next(iter(there.items()))
    remedies = {
        "code": "bring the same files to all hosts: `git status` and `git log -1` on each",
        "versions": "./setup.sh on the host that differs",
        "data": "copy the data set anew, or use one folder for all",
        "DeepSpeed JSON": "copy the file to all hosts",
    }
    for value, expected in first["values"].items():
        unlike = {
            name: _difference(expected, answer["values"][value], first_name)
            for name, answer in there.items()
            if answer["values"][value] != expected
        }
        sound = " ".join(f"{k} {v}" for k, v in expected.items()) if isinstance(expected, dict) else expected[:12]
        yield row(f"same {value}", unlike, sound, remedies[value])
    cures = {
        "torch's build": "./setup.sh on that host takes the build that suits its GPUs",
        "shared folder": f"{args.run} must be on a file system that all hosts share (NFS, Lustre), not on each one's own disk",
        "data": "`python -m data_prep verify` there tells more; put the file back, or build it anew",
        "ports": "another --master_port, or end what listens there: `ss -ltnp`",
        "precision": '"enabled": "auto" under fp16 and bf16 of the DeepSpeed JSON takes what every host has',
    }
    for check, cure in cures.items():
        if check not in ("data", "precision") or "data" in first["values"]:
            faults = {name: answer["faults"][check] for name, answer in there.items() if check in answer["faults"]}
            yield row(check, faults, "as they must be", cure)


def _difference(expected: Any, found: Any, first: str) -> str:
    if isinstance(expected, dict):
        return ", ".join(
            f"{key} {found[key]} (on {first} {value})" for key, value in expected.items() if found[key] != value
        )
    return f"{found[:12]} (on {first} {expected[:12]})"


def _of_run(inputs: Inputs | None, args: Any) -> Iterator[Check]:
    if not inputs:
        return
    samples, needed = inputs.data.num_samples("train"), inputs.total_steps * inputs.batch_sizes.train_batch
    epochs = needed / max(1, samples)
    masks, rates = inputs.data.masks, inputs.data.masks.rates_K
    num_epochs = max(1, -(-inputs.schedule_samples // max(1, samples)))
    found = f"{needed} samples in {inputs.total_steps} steps, of {samples}: {epochs:.1f} epochs"
    if samples < inputs.batch_sizes.train_batch or epochs > _MAX_EPOCHS:
        remedy = f"more text, or fewer steps: from {_MAX_EPOCHS} epochs on a repeated text teaches next to nothing"
        yield Check("samples", "FAILED", found, remedy)
    elif epochs > inputs.data.num_mask_sets:
        remedy = (
            f"masks repeat: there are {inputs.data.num_mask_sets} mask sets; `python -m data_prep remask` draws more"
        )
        yield Check("samples", "warning", found, remedy)
    elif (
        not masks.is_constant
        and (last := int(masks.sets_of_epochs(np.array(num_epochs - 1), num_epochs))) < len(rates) - 1
    ):
        remedy = f"the mask rate ends at {rates[last]:g}, not {rates[-1]:g}: {num_epochs} epochs do not use all {len(rates)} mask sets"
        if num_epochs > 1:
            remedy += f"; `python -m data_prep remask --mask_sets {num_epochs}` makes one for each epoch"
        yield Check("samples", "warning", found, remedy)
    else:
        yield Check("samples", "ok", found)
    precision = inputs.deepspeed.allowed_precisions[-1]  # the widest, if the devices decide
    size = checkpoint_bytes(num_parameters(inputs.model), precision)
    kept = len(checkpoints_by_step(args.run))
    num_more = max(1, inputs.config.keep_last + 1 - kept)
    free = shutil.disk_usage(args.run).free
    is_enough = free >= num_more * size
    yield Check(
        "disk", "ok" if is_enough else "FAILED",
        f"{free / 1e9:.2f} GB free in {args.run}; {num_more} checkpoints of {size / 1e9:.2f} GB",
        "" if is_enough else "free some, put --run elsewhere, or lower --keep_last",
    )  # fmt: skip


def _all_reduce(hosts: Hosts, answers: list[dict[str, Any]], args: Any) -> Check:
    """A process a host joins the others as a run would."""
    num_hosts = len(hosts.hosts)
    shared = {
        "WORLD_SIZE": str(num_hosts), "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_PORT": str(args.master_port),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", answers[0]["address"]),
    }  # fmt: skip
    requests = [{"kind": "all-reduce", "environ": shared | {"RANK": str(rank)}} for rank in range(num_hosts)]
    results = hosts.ask(requests, _ALL_REDUCE_PATIENCE_S)
    faults = [
        f"{host.name}: {fault}"
        for host, result in zip(hosts.hosts, results, strict=True)
        for fault in [result.get("unreachable"), *result.get("faults", {}).values()]
        if fault
    ]
    if faults:
        return Check(
            "all-reduce", "FAILED", "; ".join(faults),
            "open the port between the hosts; NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME in .deepspeed_env chooses the network",
        )  # fmt: skip
    if num_hosts == 1:
        return Check("all-reduce", "ok", f"{results[0]['backend']} starts; one host")
    rate = min(result["bytes_per_s"] for result in results)
    return Check("all-reduce", "ok", f"{results[0]['backend']}, {rate / 1e9:.2f} GB/s between {num_hosts} hosts")


def table(checks: Sequence[Check]) -> str:
    """Aligned rows, and the remedies below."""
    width = max(len(check.name) for check in checks)
    lines = [f"{check.status:<8} {check.name:<{width}}  {check.found}" for check in checks]
    remedies = [f"{check.name}: {check.remedy}" for check in checks if check.remedy]
    return "\n".join([*lines, *(["", "What to do:", *remedies] if remedies else [])])


def make_doctor_parser() -> ArgumentParser:
    """A run's flags and the doctor's own."""
    parser = make_parser("python -m pretrain.doctor", __doc__ or "")
    for action in parser._actions:
        if action.dest == "deepspeed_config":
            action.required = False
            action.help = f"{action.help} Without it only the hosts are checked."
    own = parser.add_argument_group("doctor")
    own.add_argument("--hostfile", type=Path, metavar="PATH", help="a line a host: node1 slots=8")
    port = slurm_port(int(os.environ["SLURM_JOB_ID"])) if "SLURM_JOB_ID" in os.environ else _DEEPSPEED_PORT
    own.add_argument("--master_port", type=int, default=port, metavar="N", help="where rank 0 will listen")
    own.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = make_doctor_parser().parse_args(words)
    try:
        checks = [*examine(find_hosts(args.hostfile), args)]
    except (ValueError, OSError) as error:
        print(f"pretrain.doctor: error: {describe_error(error)}", file=sys.stderr)
        return USER_ERROR_STATUS
    print(json.dumps([asdict(check) for check in checks]) if args.json else table(checks))
    return int(any(check.status == "FAILED" for check in checks))


if __name__ == "__main__":
    sys.exit(main())
