"""`python -m pretrain.doctor` on two real hosts: sound ones, and each fault it is there to find."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from support import PATIENCE_S, REPOSITORY, deepspeed_json, free_port
from two_hosts import HOSTS, TwoHosts, in_namespace

from pretrain import doctor

pytestmark = pytest.mark.slow

Rows = dict[str, dict[str, str]]


def config(folder: Path, total_steps: int) -> Path:
    schedule = {"warmup_max_lr": 1e-2, "warmup_num_steps": 1, "warmup_type": "linear", "total_num_steps": total_steps}
    return deepspeed_json(
        folder / "ds.json", train_batch_size=8, scheduler={"type": "WarmupDecayLR", "params": schedule}
    )


def words(folder: Path, total_steps: int, data: Path, hosts: dict[str, int]) -> list[str]:
    (folder / "hosts").write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()))
    return [
        "--hostfile", str(folder / "hosts"), "--deepspeed_config", str(config(folder, total_steps)), "--data", str(data),
        "--run", str(folder / "run"), "--model", "tiny", "--json",
    ]  # fmt: skip


def rows_of(output: str) -> Rows:
    return {row["name"]: row for row in json.loads(output)}


def set_environment(monkeypatch: pytest.MonkeyPatch, two_hosts: TwoHosts, folder: Path) -> None:
    exported = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    (folder / "env").write_text("".join(f"{name}={value}\n" for name, value in exported.items()))
    for name, value in {**two_hosts.environment(), "DS_ENV_FILE": str(folder / "env")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(REPOSITORY)


def test_sound_hosts(
    two_hosts: TwoHosts,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    set_environment(monkeypatch, two_hosts, tmp_path)
    port = f"--master_port={free_port()}"
    status = doctor.main([*words(tmp_path, 100, data_folder, dict.fromkeys(HOSTS, 1)), port])
    rows = rows_of(capsys.readouterr().out)
    assert status == 0, rows
    assert {row["status"] for row in rows.values()} == {"ok"}, rows
    assert "batch 8 = micro batch 4 x 1 accumulation steps x 2 ranks; 100 steps" in rows["settings"]["found"]
    assert rows["all-reduce"]["found"].startswith("gloo, ")
    assert "between 2 hosts" in rows["all-reduce"]["found"]
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def faulty(two_hosts: TwoHosts, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Everything wrong at once. What is here and on the second host differs, by mounts that only they see."""
    folder = tmp_path_factory.mktemp("faulty")
    flags = words(folder, 100_000, data_folder, dict.fromkeys(HOSTS, 1))
    (folder / "run").mkdir()
    code = folder / "metrics.py"
    code.write_text((REPOSITORY / "pretrain" / "metrics.py").read_text() + "# changed\n")
    package = Path(
        str(metadata.distribution("h5py").locate_file(f"h5py-{metadata.version('h5py')}.dist-info/METADATA"))
    )
    (folder / "METADATA").write_text(
        package.read_text().replace(f"\nVersion: {metadata.version('h5py')}", "\nVersion: 0.1")
    )
    shard = data_folder / "train-00001.h5"
    (folder / "shard.h5").write_bytes(shard.read_bytes()[:-1])
    second = [
        ["--bind", str(code), str(REPOSITORY / "pretrain" / "metrics.py")],
        ["--bind", str(folder / "METADATA"), str(package)], ["--bind", str(folder / "shard.h5"), str(shard)],
    ]  # fmt: skip
    here = [["-t", "tmpfs", "-o", "size=1m", "none", str(folder / "run")]]
    with pytest.MonkeyPatch.context() as patch, two_hosts.unlike(*second), socket.socket() as taken:
        set_environment(patch, two_hosts, folder)
        taken.bind(("", 0))
        taken.listen()
        command = [sys.executable, "-m", "pretrain.doctor", *flags, "--master_port", str(taken.getsockname()[1])]
        done = subprocess.run(
            in_namespace(here, f"exec {' '.join(command)}"),
            text=True,
            capture_output=True,
            timeout=PATIENCE_S,
            check=False,
        )
    assert done.returncode == 1, done.stderr
    return rows_of(done.stdout)


@pytest.mark.parametrize(
    ("check", "found", "remedy"),
    [
        ("same code", "127.0.0.3: ", "git status"),
        ("same versions", "127.0.0.3: h5py 0.1 (on 127.0.0.2 ", "./setup.sh"),
        ("shared folder", "not seen here", "must be on a file system that all hosts share"),
        ("data", "127.0.0.3: ", "python -m data_prep verify"),
        ("ports", "127.0.0.2: port ", "another --master_port"),
        ("disk", "0.00 GB free in ", "free some"),
        ("samples", "800000 samples in 100000 steps, of 1986", "more text, or fewer steps"),
    ],
)
def test_a_fault_is_found_and_its_remedy_named(faulty: Rows, check: str, found: str, remedy: str) -> None:
    assert faulty[check]["status"] == "FAILED", faulty
    assert found in faulty[check]["found"]
    assert remedy in faulty[check]["remedy"]


def test_what_is_sound_is_not_blamed(faulty: Rows) -> None:
    assert {faulty[name]["status"] for name in ("settings", "hosts", "same data", "same DeepSpeed JSON")} == {"ok"}
    assert faulty["all-reduce"]["found"] == "not tried"
    for name in ("same code", "same versions", "data"):
        assert "127.0.0.2:" not in faulty[name]["found"]
    assert "127.0.0.3" not in faulty["ports"]["found"]


def test_a_host_that_is_down_and_ranks_that_do_not_fit(
    two_hosts: TwoHosts,
    data_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    set_environment(monkeypatch, two_hosts, tmp_path)
    flags = words(tmp_path, 100, data_folder, {HOSTS[0]: 1, "127.0.0.4": 2})
    assert doctor.main([word for word in flags if word != "--json"]) == 1
    output = capsys.readouterr().out
    assert re.search(r"^FAILED   hosts +127\.0\.0\.4: ssh: connect to host 127\.0\.0\.4 port ", output, re.MULTILINE)
    assert re.search(r"^FAILED   settings .*train_batch_size 8 is not", output, re.MULTILINE)
    assert "hosts: `ssh HOST true` must work without a password" in output.partition("What to do:")[2]


def test_a_bad_hostfile_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for line in ("node1", "-oProxyCommand=x slots=1"):
        (tmp_path / "hosts").write_text(f"# hosts\n{line}\n")
        assert doctor.main(["--hostfile", str(tmp_path / "hosts")]) == 2
        assert f"hosts: line 2: found '{line}', expected a host and its ranks" in capsys.readouterr().err


@pytest.mark.slow
def test_a_precision_that_a_host_lacks_is_found(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # for the process that looks at the host
    for enabled, status in ((True, "FAILED"), ("auto", "ok")):
        config = deepspeed_json(tmp_path / "ds.json", fp16={"enabled": enabled})
        flags = [
            "--deepspeed_config",
            str(config),
            "--data",
            str(data_folder),
            "--run",
            str(tmp_path / "run"),
            "--json",
        ]
        doctor.main([*flags, "--model", "tiny", "--master_port", str(free_port())])
        row = rows_of(capsys.readouterr().out)["precision"]
        assert row["status"] == status, row
        if enabled is True:
            assert f"here: {config}: fp16.enabled: fp16 has no fast arithmetic on this device" in row["found"]
            assert "auto" in row["remedy"]
