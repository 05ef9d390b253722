"""Rules of the code base that no single module can hold: Ray only at the edges, short files, no pickle, no print."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from elmo_ray.command_line import VERBS

PACKAGE = Path(__file__).resolve().parents[1] / "elmo_ray"
FILES = sorted(PACKAGE.rglob("*.py"))
EDGES = {"data/feed.py", "training/cluster.py", "tuning.py"}
LONGEST = 420

_WITHOUT_RAY = """
import importlib, sys

class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name == "ray" or name.startswith("ray."):
            raise ImportError("ray is not installed here")

sys.meta_path.insert(0, NoRay())
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        sys.exit(f"{name}: {type(error).__name__}: {error}")
print(len(sys.argv) - 1)
"""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []


def test_everything_but_the_edges_imports_without_ray() -> None:
    names = [module_name(path) for path in FILES if path.relative_to(PACKAGE).as_posix() not in EDGES]
    assert len(names) > 15
    command = [sys.executable, "-c", _WITHOUT_RAY, *names]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1:]
    assert int(done.stdout.split()[-1]) == len(names)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_file(path: Path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says what it is for"
    may_use_ray = name in EDGES or path.stem in VERBS
    for node in ast.walk(tree):
        for module in imported(node):
            top = module.split(".")[0]
            assert top not in ("pickle", "cloudpickle"), f"line {getattr(node, 'lineno', 0)}"
            assert top != "ray" or may_use_ray, f"line {getattr(node, 'lineno', 0)} imports ray"


def test_py_typed_is_shipped() -> None:
    assert (PACKAGE / "py.typed").exists()
