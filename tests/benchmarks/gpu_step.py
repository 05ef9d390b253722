"""The training step on a GPU at the original's sizes: checked against float64 first, then timed, then taken apart.

    python tests/benchmarks/gpu_step.py [--device cuda] [--sizes original] [--words 793471] [--rows 128 512]
        [--precision fp32 bf16] [--steps 50] [--rounds 5]

Made-up batches, without Ray. One JSON line a case: positions per second (median of rounds), the time of the ten
costliest kernels, and what `torch.nn.LSTM(proj_size=...)` (cuDNN, without clips) takes for the same window alone.
With --device cpu --sizes small it runs anywhere, to try it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from typing import Any

import torch
from cases import SIZES, made_up_batch, our_config
from torch.profiler import ProfilerActivity, profile

from elmo_ray.config import PretrainConfig
from elmo_ray.model.bilm import BiLM
from elmo_ray.training.step import TrainStep

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
    return TrainStep(config, model.to(device, dtype), rows)


def batches(size: dict[str, Any], words: int, rows: int, device: torch.device) -> list[Any]:
    types = max(1, int(2 * rows * UNROLL * TYPES_OF_POSITIONS))
    made = [made_up_batch(n, rows, UNROLL, types, min(words, 100_000), size["negatives"]) for n in range(4)]
    return [batch.to(device) for batch in made]


def error_to_float64(size: dict[str, Any], precision: str, device: torch.device) -> float:
    """Largest difference of a step's gradients from float64's, to each tensor's largest value; without dropout."""
    found = []
    for kind in (precision, "fp64"):
        config = our_config(size, kind, 8, dropout=0.0)
        step = step_of(config, size["words"], 8, device)
        (batch, *_) = batches(size, size["words"], 8, device)
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


def case(arguments: argparse.Namespace, precision: str, rows: int) -> dict[str, Any]:
    device, size = torch.device(arguments.device), SIZES[arguments.sizes]
    words = arguments.words or size["words"]
    config = our_config(size, precision, rows)
    step = step_of(config, words, rows, device)
    given = batches(size, words, rows, device)

    def run(steps: int) -> float:
        wait(device)
        start = time.perf_counter()
        for number in range(steps):
            step.run(given[number % len(given)])
        wait(device)
        return rows * UNROLL * steps / (time.perf_counter() - start)

    run(3)
    speeds = [run(arguments.steps) for _ in range(arguments.rounds)]
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        run(3)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    costs = sorted(((getattr(e, key) / 3e3, e.key) for e in profiled.key_averages()), reverse=True)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "sizes": arguments.sizes,
        "words": words,
        "batch": f"{rows} x {UNROLL}",
        "precision": precision,
        "error_to_float64": error_to_float64(SIZES["small"], precision, device),
        "per_second": round(statistics.median(speeds)),
        "milliseconds": round(rows * UNROLL / statistics.median(speeds) * 1e3, 2),
        "lstm_of_torch_milliseconds": round(cudnn_milliseconds(size, rows, dtype, device), 2),
        "kernels": {name[:60]: round(cost, 3) for cost, name in costs[:10]},
        "memory_GB": round(torch.cuda.max_memory_allocated(device) / 1e9, 2) if device.type == "cuda" else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", choices=SIZES, default="original")
    parser.add_argument("--words", type=int, default=793_471, help="0: those of the sizes")
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=50, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here; --device cpu --sizes small --words 0 tries the benchmark itself")
    warnings.filterwarnings("ignore", message=".*oneDNN.*")
    for precision in arguments.precision:
        for rows in arguments.rows:
            print(json.dumps(case(arguments, precision, rows)), flush=True)


if __name__ == "__main__":
    main()
