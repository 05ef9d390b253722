"""The wheel alone: built from the sources, installed away from the checkout, it has all that the commands need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """The wheel of a copy of the sources: building writes a folder beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("elmo_ray", "configs"):
        shutil.copytree(repository / name, sources / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, sources / name)
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, *build, str(sources)], check=True, timeout=120)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path) -> Path:
    """Python of an environment in which nothing is installed but the wheel; its dependencies are those of this one."""
    folder = wheel.parent / "environment"
    venv.create(folder, with_pip=False)
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    # A .pth adds only the folder to the path: what is installed as editable here stays unseen there.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), str(wheel)]
    subprocess.run([sys.executable, *install], check=True, timeout=120)
    return folder / "bin" / "python"


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [python, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_wheel_holds_the_configurations(wheel: Path, repository: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        inside = {name: file.read(name) for name in file.namelist() if name.startswith("elmo_ray/configs/")}
    expected = {f"elmo_ray/configs/{path.name}": path.read_bytes() for path in (repository / "configs").glob("*.yaml")}
    assert inside == expected


def test_a_configuration_is_found_by_its_name(python: Path, tmp_path: Path) -> None:
    where = run(python, tmp_path, "-c", "import elmo_ray; print(elmo_ray.__file__)").stdout
    assert where.startswith(str(python.parents[1])), "the wheel's code runs"
    done = run(python, tmp_path, "-m", "elmo_ray.pretrain", "quickstart", "--dry-run", "train.duration=7 steps")
    assert done.returncode == 0, done.stderr
    assert "name: quickstart" in done.stdout and "duration: 7 steps" in done.stdout
    done = run(python, tmp_path, "-m", "elmo_ray", "pretrain", "quikstart", "--dry-run")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "did you mean quickstart?" in line and "big, " in line and "small" in line
    done = run(python, tmp_path, "-m", "elmo_ray.pretrain", "configs/quickstart.yaml")
    assert done.returncode == 2 and "by its name, quickstart" in done.stderr
