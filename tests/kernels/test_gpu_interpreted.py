"""The tests of GPU kernels in Triton's interpreter, which needs no GPU, and the kernels compiled for an H100."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(path for path in HERE.glob("test_gpu_*.py") if "from helpers.gpu import" in path.read_text("utf-8"))
HAS_TRITON = importlib.util.find_spec("triton") is not None
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed; it comes with torch's CUDA build")


def run(*arguments: str, interpret: str) -> str:
    """In a process of its own: whether Triton interprets is decided when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=600, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    version = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
    if not (3, 7) <= version <= (3, 8):
        pytest.skip("the interpreters of Triton up to 3.6 and of 3.9 stumble over these kernels")
    assert len(FILES) >= 6
    out = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *map(str, FILES), interpret="1")
    assert " passed" in out and "failed" not in out and "SKIPPED" not in out


def test_kernels_compile_for_an_h100() -> None:
    out = run(str(HERE.parent / "benchmarks" / "compile_gpu_kernels.py"), interpret="0")
    spills = {line.split()[0]: int(line.split()[-1]) for line in out.splitlines()[1:]}
    assert len(spills) >= 18
    # The one-hot product of _fold keeps two tiles of float32 in registers; a few bytes are known and measured.
    assert {name: count for name, count in spills.items() if count > (64 if name == "_fold" else 0)} == {}
