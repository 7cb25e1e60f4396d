"""Who imports whom: the arrows between the files point one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = ("epsdpo", "model", "train")
SUPPORT = sorted(f"support.{path.stem}" for path in (ROOT / "support").glob("*.py") if path.stem != "__init__")
OURS = {"epsdpo", "model", "train", "support", "experiments", "tests"}


def imports_of(module: str) -> set[str]:
    """The modules that a file imports, wherever in it the statement is; `support.rows`, not `support`."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            of_package = node.module == "support"
            found |= {f"support.{alias.name}" for alias in node.names} if of_package else {node.module}
    return found


def ours(module: str) -> set[str]:
    return {name for name in imports_of(module) if name.split(".")[0] in OURS}


@pytest.mark.parametrize("module", ["epsdpo", "model"])
def test_algorithm_and_model_import_torch_alone(module):
    standard = {"__future__", "math", "collections.abc", "dataclasses", "typing"}
    assert {name.split(".")[0] for name in imports_of(module) - standard} == {"torch"}


@pytest.mark.parametrize("module", SUPPORT)
def test_support_imports_neither_the_script_nor_the_algorithm(module):
    assert ours(module) <= {"model", *SUPPORT}


def test_imports_make_no_circle():
    arrows = {module: ours(module) for module in (*TOP, *SUPPORT)}
    while leaves := [module for module, targets in arrows.items() if not targets]:
        for leaf in leaves:
            del arrows[leaf]
        for targets in arrows.values():
            targets.difference_update(leaves)
    assert not arrows


def test_only_the_algorithm_is_installed():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'py-modules = ["epsdpo"]' in text
