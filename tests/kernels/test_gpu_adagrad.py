"""The fused Adagrad against PyTorch's operations: in Triton's interpreter, which needs no GPU, and on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from elmo_ray.config import OptimConfig
from elmo_ray.kernels.gpu.adagrad import largest_difference, usable
from elmo_ray.training import optimizer as optim
from elmo_ray.training.optimizer import Optimizer

TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed; it comes with torch's CUDA build")

_IN_INTERPRETER = """
import torch
from elmo_ray.kernels.gpu.adagrad import largest_difference
for shape in ((70, 1030), (9, 1), (5, 37)):
    for bad in (False, True):
        print(largest_difference(torch.device("cpu"), shape, bad))
"""

_COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from elmo_ray.kernels.gpu.adagrad import _adagrad
for flag in (False, True):
    names = _adagrad.arg_names
    types = dict.fromkeys(names, "*fp32") | {"rows": "*i64", "rate": "fp32", "width": "i32", "blocks": "i32"}
    types |= {"HAS_ROWS": "constexpr", "BLOCK": "constexpr"}
    constants = {(names.index("HAS_ROWS"),): flag, (names.index("BLOCK"),): 1024}
    source = triton.compiler.ASTSource(_adagrad, types, constants)
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
"""


def run(script: str, interpret: str) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_triton
def test_fused_updates_are_the_plain_ones() -> None:
    found = [float(line) for line in run(_IN_INTERPRETER, "1").split()]
    assert len(found) == 6
    assert max(found[::2]) < 1e-6
    assert max(found[1::2]) == 0.0, "a gradient that is not finite changes nothing"


@needs_triton
def test_kernel_compiles_for_a_gpu() -> None:
    run(_COMPILED, "0")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_on_a_gpu() -> None:
    assert usable(torch.device("cuda"))
    assert largest_difference(torch.device("cuda"), bad=True) == 0.0


def plain_adagrad_(
    value: Tensor, slot: Tensor, gradient: Tensor, rows: Tensor | None, divisor: Tensor, rate: float
) -> None:
    """What `adagrad_` says of itself."""
    if float(divisor) > 0:
        touched = slice(None) if rows is None else rows
        slot[touched] += (gradient / divisor) ** 2
        value[touched] -= rate * gradient / divisor / slot[touched].sqrt()


@pytest.mark.parametrize("name", ["adagrad", "adamw"])
@pytest.mark.parametrize("spoilt", [False, True])
def test_what_the_optimizer_hands_over(name: str, spoilt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, slots, rates, clip and rows: the same end with the fused update as without."""
    assert not usable(torch.device("cpu"))
    config = OptimConfig.model_validate(
        {"name": name, "lr": 0.1, "table_lr": 0.3, "clip_norm": 0.5, "schedule": {"warmup_steps": 3}}
    )

    def ends(fused: bool) -> Mapping[str, Tensor]:
        generator = torch.Generator().manual_seed(1)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        dense = {"lstm.layers.0.bias": nn.Parameter(random(7)), "char_cnn.embedding": nn.Parameter(random(3, 5))}
        tables = {"softmax_weight": random(9, 4), "softmax_bias": random(9)}
        optimizer = Optimizer(config, dense, tables, fused)
        assert optimizer.fused == fused
        rows = torch.tensor([6, 1, 3])
        for step in range(4):
            gradients = {key: random(*p.shape) for key, p in dense.items()}
            if spoilt and step == 2:
                gradients["char_cnn.embedding"][1, 1] = torch.inf
            of_rows = {"softmax_weight": random(3, 4), "softmax_bias": random(3)}
            optimizer.apply(gradients, dict.fromkeys(tables, rows), of_rows, step, 10)
        return {**dense, **tables, **optimizer.state_tensors()}

    expected = ends(False)
    always: Callable[[torch.device], bool] = lambda device: True  # noqa: E731
    monkeypatch.setattr(optim, "usable", always)
    monkeypatch.setattr(optim, "adagrad_", plain_adagrad_)
    found = ends(True)
    for key, value in expected.items():
        if not key.startswith("step"):
            assert torch.allclose(found[key], value, rtol=1e-5, atol=1e-6), key
