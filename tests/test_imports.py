"""The house: data_prep <- pretrain <- finetune, and DeepSpeed in one file."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from support import REPOSITORY, run_command

PACKAGES = ("data_prep", "pretrain", "finetune")


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def files_of(package: str) -> list[Path]:
    return sorted((REPOSITORY / package).rglob("*.py"))


def imported_packages(package: str) -> set[str]:
    return {module.partition(".")[0] for path in files_of(package) for module in imports_of(path)}


def test_nothing_flows_back() -> None:
    assert files_of("data_prep")
    assert files_of("pretrain")
    for place, package in enumerate(PACKAGES):
        assert not imported_packages(package) & {*PACKAGES[place + 1 :], "benchmarks", "run_pretrain"}, package


def test_data_prep_never_imports_torch() -> None:
    assert not imported_packages("data_prep") & {"torch", "deepspeed", "transformers"}


def test_data_prep_never_imports_torch_through_others() -> None:
    code = "import sys, data_prep.__main__; print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    done = run_command([sys.executable, "-c", code])
    assert done.stdout == "['tokenizers']\n", done.stderr


def test_deepspeed_is_imported_in_one_file() -> None:
    importing = [
        path.relative_to(REPOSITORY).as_posix()
        for path in [
            *files_of("data_prep"),
            *files_of("pretrain"),
            *files_of("finetune"),
            REPOSITORY / "run_pretrain.py",
        ]
        if any(module.partition(".")[0] == "deepspeed" for module in imports_of(path))
    ]
    assert importing == ["pretrain/engine.py"]


def test_the_model_knows_no_trainer() -> None:
    trainer = {"pretrain.engine", "pretrain.train", "pretrain.checkpoint", "pretrain.config", "pretrain.ds_config"}
    for name in ("layout", "attention", "model", "batches"):
        assert not imports_of(REPOSITORY / "pretrain" / f"{name}.py") & trainer
