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
FILES = sorted(
    path for path in HERE.parent.glob("*/test_gpu_*.py") if "\nfrom helpers.gpu import" in path.read_text("utf-8")
)
HAS_TRITON = importlib.util.find_spec("triton") is not None
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed; it comes with torch's CUDA build")


def run(*arguments: str, interpret: str) -> str:
    """In a process of its own: whether Triton interprets is decided when it is imported."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": interpret,
        "ELMO_RAY_KERNELS": "gpu" if interpret == "1" else "auto",
    }
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
    skipped = [line for line in out.splitlines() if line.startswith("SKIPPED")]
    assert " passed" in out and all("captures are a GPU's" in line for line in skipped), out


@pytest.mark.slow
def test_kernels_compile_for_an_h100() -> None:
    out = run(str(HERE.parent / "benchmarks" / "compile_gpu_kernels.py"), interpret="0")
    rows = [line.split() for line in out.splitlines()[1:]]
    assert len({name for name, *_ in rows}) >= 18
    for name, _, _, products, spilt in rows:
        assert name != "_split_product" or int(products) > 0, "it does not use the tensor cores"
        # The product in _fold keeps tiles of float32 in registers: 16 bytes were spilt when it was measured.
        assert int(spilt) <= (64 if name == "_fold" else 0), f"{name} spills {spilt} bytes"
