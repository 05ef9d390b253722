"""The GPU's Adagrad against the plain one: in Triton's interpreter, which needs no GPU, and on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed; it comes with torch's CUDA build")

_COMPARED = """
import sys
import torch
from elmo_ray.kernels.gpu.adagrad import adagrad
from elmo_ray.training.optimizer import adagrad as plain

device = torch.device(sys.argv[1])
for shape in ((70, 1030), (9, 1), (5, 37)):
    for bad in (False, True):
        generator, worst = torch.Generator().manual_seed(1), 0.0
        some = torch.randperm(shape[0], generator=generator)[: shape[0] // 2].to(device)
        for size, rows in ((shape, None), (shape, some), (shape[:1], some)):
            value, slot = (torch.rand(size, generator=generator).to(device) for _ in range(2))
            touched = slice(None) if rows is None else rows
            gradient = torch.randn(value[touched].shape, generator=generator).to(device)
            if bad:
                gradient.view(-1)[0] = torch.nan
            divisor = torch.tensor(0.0 if bad else 2.0).to(device)
            ours, theirs = [(value.clone(), slot.clone()) for _ in range(2)]
            adagrad(*ours, gradient, rows, divisor, 0.2)
            plain(*theirs, gradient, rows, divisor, 0.2)
            worst = max([worst, *(float((a - b).abs().max()) for a, b in zip(ours, theirs))])
        print(worst)
"""

_COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from elmo_ray.kernels.gpu.adagrad import _adagrad
for flag in (False, True):
    names = _adagrad.arg_names
    types = dict.fromkeys(names, "*fp32") | {"rows": "*i64", "width": "i32", "blocks": "i32"}
    types |= {"HAS_ROWS": "constexpr", "BLOCK": "constexpr"}
    constants = {(names.index("HAS_ROWS"),): flag, (names.index("BLOCK"),): 1024}
    source = triton.compiler.ASTSource(_adagrad, types, constants)
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
"""


def run(script: str, interpret: str, *arguments: str) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(output: str) -> None:
    found = [float(line) for line in output.split()]
    assert len(found) == 6
    assert max(found[::2]) < 1e-5
    assert max(found[1::2]) == 0.0, "a gradient that is not finite changes nothing"


@needs_triton
def test_updates_are_the_plain_ones() -> None:
    check(run(_COMPARED, "1", "cpu"))


@needs_triton
def test_kernel_compiles_for_a_gpu() -> None:
    run(_COMPILED, "0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here (or not -m gpu)")
def test_on_a_gpu() -> None:
    check(run(_COMPARED, "0", "cuda"))
