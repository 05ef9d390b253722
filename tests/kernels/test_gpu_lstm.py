"""The fused gates against the plain time steps: in Triton's interpreter, which needs no GPU, and on a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from elmo_ray.kernels.gpu import lstm as gate_kernels
from elmo_ray.kernels.gpu.lstm import FUSED, PLAIN, choose_steps, largest_difference, steps_on

TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed; it comes with torch's CUDA build")

TYPES = {"float32": ("float32", 1e-5), "float64": ("float64", 1e-13), "bfloat16": ("float32", 0.01)}
"""By the type of the products: that of the states, and how far fused and plain may be apart (in bf16 one rounding)."""

SHAPES = [(1, 3, 5, 37, 11), (2, 2, 3, 96, 40), (2, 1, 1, 1030, 7), (2, 4, 1, 1, 1)]
CASES = [
    (low, clip, shape, projection)
    for low in TYPES
    for clip in (None, 0.5)
    for shape in SHAPES
    for projection in (True, False)
]

_IN_INTERPRETER = """
import json, sys, torch
from elmo_ray.kernels.gpu.lstm import largest_difference
for low, states, clip, shape, projection in json.loads(sys.argv[1]):
    types = getattr(torch, states), getattr(torch, low)
    print(largest_difference(torch.device("cpu"), *types, clip, tuple(shape), projection))
"""

_COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from elmo_ray.kernels.gpu import lstm as gate_kernels
for kernel in ("_forward_gates", "_backward_gates", "_forward_clip", "_backward_clip"):
    function = getattr(gate_kernels, kernel)
    for low in ("*fp32", "*bf16"):
        for flag in (False, True):
            names = function.arg_names
            flags = {name: 1024 if name == "BLOCK" else flag for name in names if name.isupper()}
            kinds = {"rows": "i32", "width": "i32", "bound": "fp32"} | dict.fromkeys(flags, "constexpr")
            lows = ("added", "gated_low", "low", "raw", "d_gated", "d_gates")
            types = {n: ("i64", "i32") if n.endswith("_at") else low if n in lows else "*fp32" for n in names}
            constants = {(names.index(name),): value for name, value in flags.items()}
            source = triton.compiler.ASTSource(function, types | kinds, constants)
            assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
"""


def run(script: str, *arguments: str, **environment: str) -> str:
    """In a process of its own: whether Triton interprets is decided when it is imported."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_triton
def test_fused_steps_compute_what_plain_ones_do() -> None:
    cases = [(low, TYPES[low][0], clip, shape, projection) for low, clip, shape, projection in CASES]
    found = [float(line) for line in run(_IN_INTERPRETER, json.dumps(cases), TRITON_INTERPRET="1").split()]
    assert len(found) == len(CASES)
    for case, difference in zip(CASES, found, strict=True):
        assert difference < TYPES[case[0]][1], case


@needs_triton
def test_kernels_compile_for_a_gpu() -> None:
    run(_COMPILED, TRITON_INTERPRET="0")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("low", TYPES)
def test_on_a_gpu(low: str, clip: float | None) -> None:
    states, most = TYPES[low]
    for shape in SHAPES:
        for projection in (True, False):
            difference = largest_difference(
                torch.device("cuda"), getattr(torch, states), getattr(torch, low), clip, shape, projection
            )
            assert difference < most


class TestChoice:
    DEVICE = torch.device("cuda")

    def test_plain_steps_unless_asked(self) -> None:
        assert steps_on(self.DEVICE) == steps_on(torch.device("cpu")) == PLAIN
        assert choose_steps(True, torch.device("cpu"), None) == PLAIN
        assert choose_steps(False, self.DEVICE, None) == PLAIN

    @needs_triton
    @pytest.mark.parametrize(("differs", "chosen"), [(1e-6, FUSED), (1e-2, PLAIN), (float("inf"), PLAIN)])
    def test_only_what_computes_the_same(
        self, differs: float, chosen: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(gate_kernels, "largest_difference", lambda *_: differs)
        monkeypatch.setattr(gate_kernels, "_of_devices", {})
        assert choose_steps(True, self.DEVICE, None) == chosen == steps_on(self.DEVICE)
        assert ("not used" in caplog.text) == (chosen == PLAIN)

    def test_what_raises_is_not_used(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        def fails(*_: object) -> float:
            raise RuntimeError("no compiler\nat all")

        monkeypatch.setattr(gate_kernels, "triton", object())
        monkeypatch.setattr(gate_kernels, "largest_difference", fails)
        monkeypatch.setattr(gate_kernels, "_of_devices", {})
        assert choose_steps(True, self.DEVICE, torch.bfloat16) == PLAIN
        assert "fused gates are not used: RuntimeError: no compiler" in caplog.text
