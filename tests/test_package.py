"""The package as pip installs it, used from another folder than the repository."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from support import REPOSITORY, run_command

PACKAGES = ("data_prep", "pretrain", "finetune")
OPTIONAL = {"apex", "transformers"}
"""Imported only where they are installed."""
BY_NAME = {"tensorboard"}
"""Needed by a module of torch that pretrain imports."""


def declared() -> dict[str, str]:
    """The dependencies of pyproject.toml: each package's normalized name and its range."""
    lines = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    parts = [re.fullmatch(r"([\w-]+)(\S+)", line) for line in lines]
    return {part[1].lower().replace("_", "-"): part[2] for part in parts if part}


def test_the_dependencies_are_what_the_code_imports() -> None:
    of_module = metadata.packages_distributions()
    imported = set()
    for package in PACKAGES:
        for path in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                imported |= {name.partition(".")[0] for name in names}
    others = imported - {*PACKAGES, *sys.stdlib_module_names} - OPTIONAL
    packages = {name.lower().replace("_", "-") for module in others for name in of_module[module]}
    assert set(declared()) == packages | BY_NAME


def test_the_dependencies_are_ranges_around_what_was_tested() -> None:
    from packaging.specifiers import SpecifierSet

    for name, specifier in declared().items():
        assert ">=" in specifier, name
        assert "," in specifier, name
        pinned = re.search(
            rf"^{name}==(\S+)$", (REPOSITORY / "requirements.txt").read_text(), re.MULTILINE | re.IGNORECASE
        )
        assert pinned, name
        assert SpecifierSet(specifier).contains(pinned[1]), name


class Installed:
    """An environment into which the wheel was installed, and an empty folder to use it from."""

    def __init__(self, folder: Path) -> None:
        self.site_packages = folder / "venv" / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        self.folder = folder / "elsewhere"
        self.folder.mkdir()
        self._python = folder / "venv" / "bin" / "python"

    def __call__(self, *words: str) -> str:
        """Run Python there with these arguments; its output."""
        done = subprocess.run([self._python, *words], cwd=self.folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel, made from what git would hand out, in a new environment.

    Its dependencies take minutes to install, so the environment sees those of this one; pip still holds what the wheel
    declares against what is there, without asking an index.
    """
    folder = tmp_path_factory.mktemp("package")
    listed = run_command(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.toml", "LICENSE", *PACKAGES, "ds_configs"]
    )
    for name in listed.stdout.splitlines():
        if (REPOSITORY / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / "source" / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    installed = Installed(folder)
    (installed.site_packages / "here.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    wheel = [
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
        str(folder / "source"),
    ]
    installed(*wheel)
    (built,) = folder.glob("*.whl")
    constraints = ["--constraint", str(REPOSITORY / "requirements.txt")]
    said = installed("-m", "pip", "install", "--no-compile", "--no-index", *constraints, str(built))
    assert re.search(r"^Successfully installed pmlm-\S+$", said, re.MULTILINE), said
    return installed


@pytest.mark.slow
def test_the_installed_package_has_its_files(installed: Installed, data_folder: Path) -> None:
    where = installed("-c", "import pretrain, finetune, data_prep; print(pretrain.__file__)")
    assert Path(where.strip()).is_relative_to(installed.site_packages)

    assert "batch 7,680 = micro batch" in installed("-m", "pretrain.plan")
    assert "ds_configs/zero2.json" in installed("-m", "pretrain.plan", "--help").replace("\n", "")

    installed("-m", "pretrain.show", "--data", str(data_folder), "--sample", "3", "--html", "sample.html")
    assert "</html>" in (installed.folder / "sample.html").read_text()

    run = installed.folder / "run"
    run.mkdir()
    records = [
        {"kind": "train", "step": step, "time": 1000.0 + step, "ae_loss": 5.0, "par_loss": 6.0} for step in range(1, 9)
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    installed("-m", "pretrain.report", "run")
    assert "</html>" in (run / "report.html").read_text()

    prompts = (
        "from pathlib import Path; from data_prep.shards import DataSet; from pretrain.cloze import read_prompts; "
        f"print(len(read_prompts(None, DataSet(Path({str(data_folder)!r})).tokenizer, 64).texts))"
    )
    assert int(installed("-c", prompts)) > 0
