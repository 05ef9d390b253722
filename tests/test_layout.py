"""Rules of the house that no file can hold alone: who room may import which, Ray at the edges, no pickle, no print."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from elmo_ray.config.command_line import VERBS

PACKAGE = Path(__file__).resolve().parents[1] / "elmo_ray"
FILES = sorted(PACKAGE.rglob("*.py"))
RAY_FILES = {
    "cluster/backend.py",
    "cluster/lost_hosts.py",
    "data/ray_source.py",
    "serve/deployment.py",
    "sweep/tuning.py",
}
"""Files that may import Ray at once; those of `cluster/` may within functions."""

ROOMS = [
    {"errors", "machine", "background"},
    {"storage"},
    {"kernels"},
    {"text"},
    {"config", "data"},
    {"model"},
    {"checkpoints"},
    {"elmo"},
    {"training"},
    {"cluster"},
    {"trackers"},
    {"report"},
    {"prepare", "pretrain", "finetune", "evaluate", "export", "embed", "serve"},
    {"sweep", "api"},
]
"""From the ground up: a file imports its own room and rooms below. Rooms of one level may not import each other, except
for `VERBS_THAT_USE`."""

VERBS_THAT_USE = {
    "pretrain": {"prepare", "evaluate", "export"},
    "finetune": {"pretrain"},
    "evaluate": {"prepare"},
    "embed": {"prepare"},
}
ALIASES = {"language_model"}
"""Public names that stay where users know them: files that only import."""

NOT_YET: set[str] = set()
"""Files of the rebuilding that do not keep the rules yet; empty when it is done."""

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


NAMES = {module_name(path) for path in FILES}


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    """Lines and modules of all imports, those within functions too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                found.append((node.lineno, below if below in NAMES else node.module or ""))
    return found


def room_of(module: str) -> str | None:
    """The room of a module of the house; None for the package itself, which only holds the version and public names."""
    return module.split(".")[1] if module.startswith("elmo_ray.") else None


IMPORTS = {module_name(path): imported(ast.parse(path.read_text(encoding="utf-8"))) for path in FILES}


def test_everything_but_the_edges_imports_without_ray() -> None:
    edges = {PACKAGE / name for name in RAY_FILES}
    if importlib.util.find_spec("triton") is None:  # the switch imports these only where it is there
        edges |= set((PACKAGE / "kernels" / "gpu").glob("*.py"))
    names = [module_name(path) for path in FILES if path not in edges and "__main__" not in path.name]
    assert len(names) > 80
    command = [sys.executable, "-c", _WITHOUT_RAY, *names]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1:]
    assert int(done.stdout.split()[-1]) == len(names)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_file(path: Path) -> None:
    name, module = path.relative_to(PACKAGE).as_posix(), module_name(path)
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), "a module says what it is for"
    may_use_ray = name in RAY_FILES or name.startswith("cluster/")
    for line, other in IMPORTS[module]:
        top = other.split(".")[0]
        assert top not in ("pickle", "cloudpickle"), f"line {line}"
        assert top != "ray" or may_use_ray or module in NOT_YET, f"line {line} imports ray"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    module = module_name(path)
    room = room_of(module)
    if room is None or room in ALIASES or room == "__main__" or module in NOT_YET:
        return
    levels = {name: number for number, names in enumerate(ROOMS) for name in names}
    assert room in levels, "a room that ROOMS does not have"
    for line, other in IMPORTS[module]:
        below = room_of(other)
        if below is None or below == room or below in VERBS_THAT_USE.get(room, ()):
            continue
        assert levels[below] < levels[room], f"line {line} imports {other}"
        assert room != "kernels", f"line {line} imports {other}, and kernels know nothing of the house"


def test_no_circles() -> None:
    uses = {
        module: {other for _, other in found if room_of(other) is not None and other != module}
        for module, found in IMPORTS.items()
        if room_of(module) is not None
    }
    while leaves := {module for module, others in uses.items() if not others & uses.keys()}:
        uses = {module: others for module, others in uses.items() if module not in leaves}
    assert not uses, "files that import each other in a circle, or use such"


def test_version_control_hides_no_room() -> None:
    ignored = subprocess.run(
        ["git", "check-ignore", *map(str, FILES)], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert ignored.stdout == ""
    names = {line.strip().strip("/") for line in (PACKAGE.parent / ".rayignore").read_text("utf-8").splitlines()}
    rooms = {path.relative_to(PACKAGE).parts[0] for path in FILES}
    # a pattern that begins with a slash is of the top level alone, whatever rooms are called
    lines = (PACKAGE.parent / ".rayignore").read_text("utf-8").splitlines()
    assert not [line for line in lines if line.strip("/") in rooms & names and not line.startswith("/")]


def test_py_typed_is_shipped() -> None:
    assert (PACKAGE / "py.typed").exists()


def test_verbs_are_rooms() -> None:
    assert set(VERBS) <= set().union(*ROOMS)
