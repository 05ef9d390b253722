"""The training step on a GPU at the original's sizes: checked against float64 first, then timed, then taken apart.

    python tests/benchmarks/gpu_step.py [--device cuda] [--sizes original] [--words 793471] [--rows 128 512]
        [--precision fp32 bf16] [--kernels off auto] [--steps 50] [--rounds 5]

Made-up batches, without Ray. One JSON line a case: positions per second (median of rounds), their share of what the
device's product units could do (`limit`: the products of a step by counting, `where_time_goes.py`), milliseconds of a
step by part and what is left between kernels (`gaps`), the ten costliest kernels, and what
`torch.nn.LSTM(proj_size=...)` (cuDNN, without clips) takes for the same window alone. With --device cpu --sizes small
--words 0 it runs anywhere, to try it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from cases import SIZES, made_up_batch, our_config
from torch.profiler import ProfilerActivity, profile
from where_time_goes import flops_of, milliseconds_of_parts, peak_of

from elmo_ray.config import PretrainConfig
from elmo_ray.data.characters import PADDING
from elmo_ray.model.bilm import BiLM
from elmo_ray.training.capacities import Capacities
from elmo_ray.training.captured_step import captured_by
from elmo_ray.training.cuda_graphs import CudaGraphs, record_for
from elmo_ray.training.step import TrainStep
from elmo_ray.training.step_input import StepInput

UNROLL = 20
TYPES_OF_POSITIONS = 0.2
"""Distinct words to inputs of a batch, as in English text at these sizes."""


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_of(config: PretrainConfig, words: int, rows: int, device: torch.device) -> TrainStep:
    model = BiLM(config.model, config.softmax, words)
    model.reset_parameters(1)
    dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
    model.to(device, dtype)
    return TrainStep(config, model, rows, capture=captured_by(record_for(config, model)))


def batches(size: dict[str, Any], words: int, rows: int) -> list[StepInput]:
    types = max(1, int(2 * rows * UNROLL * TYPES_OF_POSITIONS))
    return [made_up_batch(n, rows, UNROLL, types, min(words, 100_000), size["negatives"]) for n in range(4)]


def padded(given: list[StepInput], words: int) -> list[StepInput]:
    """As in training with captured steps, so that few shapes occur: to what the largest of these batches needs."""
    types = max(len(batch.types) for batch in given)
    windows = max(int(np.count_nonzero(batch.types.numpy() != PADDING)) + len(batch.types) for batch in given)
    touched = max(len(batch.rows) for batch in given if batch.rows is not None)
    pad = Capacities(types, windows, touched, 0.0, words)
    return [pad(batch) for batch in given]


def error_to_float64(size: dict[str, Any], precision: str, device: torch.device, kernels: str) -> float:
    """Largest difference of a step's gradients from float64's, to each tensor's largest value; without dropout."""
    found = []
    for kind in (precision, "fp64"):
        config = our_config(size, kind, 8, dropout=0.0, kernels=kernels)
        step = step_of(config, size["words"], 8, device)
        batch = batches(size, size["words"], 8)[0].to(device)
        if kind == "fp64":
            batch.target_log_count, batch.negative_log_count = (
                x.double() for x in (batch.target_log_count, batch.negative_log_count)
            )
        gradients, _, _ = step.gradients(batch)
        found.append({**gradients.dense, **gradients.tables})
    ours, exact = found
    return max(float((ours[k].double() - g).abs().max() / g.abs().max().clamp_min(1e-30)) for k, g in exact.items())


def cudnn_milliseconds(size: dict[str, Any], rows: int, dtype: torch.dtype, device: torch.device) -> float:
    """Forward and backward of both directions' layers over a window."""
    width = size["lstm"]["projection_dim"]
    lstms = [
        torch.nn.LSTM(width, size["lstm"]["dim"], 2, proj_size=width, device=device, dtype=dtype) for _ in range(2)
    ]
    x = torch.randn(UNROLL, rows, width, device=device, dtype=dtype, requires_grad=True)

    def once() -> None:
        for lstm in lstms:
            lstm(x)[0].sum().backward()

    once()
    wait(device)
    start = time.perf_counter()
    for _ in range(5):
        once()
    wait(device)
    return (time.perf_counter() - start) / 5 * 1e3


def case(arguments: argparse.Namespace, precision: str, rows: int, kernels: str) -> dict[str, Any]:
    device, size = torch.device(arguments.device), SIZES[arguments.sizes]
    words = arguments.words or size["words"]
    config = our_config(size, precision, rows, kernels=kernels)
    error = error_to_float64(SIZES["small"], precision, device, kernels)
    step = step_of(config, words, rows, device)
    given = batches(size, words, rows)
    flops = flops_of(config, given[0])
    if step.captured is not None:
        given = padded(given, words)
    given = [batch.to(device) for batch in given]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def run(steps: int) -> float:
        wait(device)
        start = time.perf_counter()
        for number in range(steps):
            step.run(given[number % len(given)])
        wait(device)
        return rows * UNROLL * steps / (time.perf_counter() - start)

    run(16 if device.type == "cuda" else 3)  # each shape is captured in its third step
    speed = statistics.median(run(arguments.steps) for _ in range(arguments.rounds))
    milliseconds = rows * UNROLL / speed * 1e3
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = peak_of(name, precision)
    parts = milliseconds_of_parts(step, lambda: [run(1) for _ in range(3)] and None, 3)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return {
        "device": name,
        "sizes": arguments.sizes,
        "words": words,
        "batch": f"{rows} x {UNROLL}",
        "precision": precision,
        "kernels": kernels,
        "captured": step.captured is not None and not CudaGraphs.failed,
        "error_to_float64": error,
        "per_second": round(speed),
        "milliseconds": round(milliseconds, 2),
        "teraflop": round(flops / 1e12, 3),
        "limit_per_second": peak and round(rows * UNROLL * peak / flops),
        "share_of_limit": peak and round(flops / peak / milliseconds * 1e3, 3),
        "parts_milliseconds": {**parts, "gaps": round(max(0.0, milliseconds - sum(parts.values())), 3)},
        "lstm_of_torch_milliseconds": round(cudnn_milliseconds(size, rows, dtype, device), 2),
        "costliest": costliest(run, device),
        "memory_GB": round(torch.cuda.max_memory_allocated(device) / 1e9, 2) if device.type == "cuda" else None,
    }


def costliest(run: Callable[[int], float], device: torch.device) -> dict[str, float]:
    """Milliseconds of a step in each of ten kernels."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        run(3)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    costs = sorted(((getattr(e, key) / 3e3, e.key) for e in profiled.key_averages()), reverse=True)
    return {name[:60]: round(cost, 3) for cost, name in costs[:10]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", choices=SIZES, default="original")
    parser.add_argument("--words", type=int, default=793_471, help="0: those of the sizes")
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--kernels", nargs="+", choices=["off", "auto"], default=["off", "auto"])
    parser.add_argument("--steps", type=int, default=50, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here; --device cpu --sizes small --words 0 tries the benchmark itself")
    warnings.filterwarnings("ignore", message=".*oneDNN.*")
    for precision in arguments.precision:
        for rows in arguments.rows:
            for kernels in arguments.kernels:
                print(json.dumps(case(arguments, precision, rows, kernels)), flush=True)


if __name__ == "__main__":
    main()
