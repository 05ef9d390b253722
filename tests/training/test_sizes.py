"""Sizes of a training beside those of its text and of the machine."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_runs import tiny_config

from elmo_ray import machine
from elmo_ray.errors import ConfigError
from elmo_ray.training.capacities import Capacities
from elmo_ray.training.sizes import WorkerMemory, check_memory, check_streams, worker_memory


def test_streams_beside_the_positions_of_an_epoch(caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config(data__streams=100, train__unroll=10)
    check_streams(config, 4000)
    assert not caplog.records
    check_streams(config, 3999)
    assert (
        "data.streams=100: a stream has 39 positions of an epoch, 4.0 windows of train.unroll=10; data.streams=39 "
        in (caplog.text)
    )
    check_streams(config, 100)
    with pytest.raises(ConfigError, match=r"data\.streams=100: an epoch has 99 positions, fewer than streams; set"):
        check_streams(config, 99)
    # An estimate may be wrong by far.
    check_streams(config, 99, exact=False)
    with pytest.raises(ConfigError, match="an epoch has about 24 positions"):
        check_streams(config, 24, exact=False)


def test_memory_beside_that_of_the_machine(caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config(data__streams=100)
    memory = WorkerMemory({}, {"parameters": 10, "text": 90})
    check_memory(config, memory, 100, "this machine")
    assert not caplog.records
    check_memory(config, memory, 99, "this machine")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "lower data.streams=100 or data.block_bytes=" in record.getMessage()
    check_memory(config, memory, 50, "this machine")
    with pytest.raises(
        ConfigError, match=r"a worker needs about 100 B of memory \(90 B for text\), and this machine has "
    ):
        check_memory(config, memory, 49, "this machine")


@pytest.mark.parametrize(
    ("largest", "cure"),
    [
        ("softmax", "set data.max_vocab, or lower model.lstm.projection_dim=8"),
        ("lstm.1", "lower model.lstm.dim=16 or model.lstm.n_layers=2"),
        ("highway", "lower the counts in model.char_cnn.filters=[["),
    ],
)
def test_the_cure_is_about_the_largest_component(largest: str, cure: str) -> None:
    parts = {"softmax": 1, "lstm.0": 1, "lstm.1": 1, "char_cnn": 1, "highway": 1, largest: 9}
    with pytest.raises(ConfigError) as caught:
        check_memory(tiny_config(), WorkerMemory(parts, {"parameters": 100}), 1, "this machine")
    assert cure in str(caught.value)


def test_small_blocks_need_less_memory() -> None:
    config = tiny_config(data__streams=100, data__block_bytes=131072)
    large, small = worker_memory(config, 50), worker_memory(config, 50, 1000)
    assert large.uses["text"] - small.uses["text"] == 100 * 3 * 6 * (131072 - 1000)
    assert large.parameters == small.parameters and sum(large.parameters.values()) > 0


def test_memory_of_this_machine() -> None:
    assert 1 << 28 < machine.total_memory() < 1 << 50


ORIGINAL: dict[str, Any] = {
    "model__char_cnn": {
        "filters": [[1, 32], [2, 32], [3, 64], [4, 128], [5, 256], [6, 512], [7, 1024]],
        "n_highway": 2,
    },
    "model__lstm": {"dim": 4096, "projection_dim": 512},
    "softmax__negatives": 8192,
    "train__unroll": 20,
    "train__precision": "bf16",
    "train__dropout": 0.1,
    "data__streams": 128,
}
STEPS: dict[str, tuple[int, dict[str, Any]]] = {
    "original": (793_471, ORIGINAL),
    "512 streams": (793_471, {**ORIGINAL, "data__streams": 512}),
    "accumulated": (793_471, {**ORIGINAL, "data__streams": 512, "train__accumulate": 4}),
    "float32, no dropout": (50_000, {**ORIGINAL, "train__precision": "fp32", "train__dropout": 0.0}),
    "one direction": (100_000, {**ORIGINAL, "model__bidirectional": False, "data__streams": 256}),
    "one layer": (20_000, {**ORIGINAL, "model__lstm": {"dim": 2048, "projection_dim": 512, "n_layers": 1}}),
}


@pytest.mark.slow
def test_memory_of_a_captured_step_is_that_of_its_tensors() -> None:
    """Within 10 %, at sizes that no machine of the tests could hold."""
    lines, counted = [], []
    for n_words, changes in STEPS.values():
        config = tiny_config(**changes)
        words, rows, _ = Capacities.of(config, n_words, None, config.data.streams).usual_sizes()
        windows = int(9.5 * words)
        values = {"values": config.to_dict(), "n_words": n_words, "words": words, "windows": windows, "rows": rows}
        lines.append(json.dumps(values))
        counted.append(worker_memory(config, n_words, on_gpu=True).on_gpu.total - (4 << 25))
    program = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "step_memory.py")]
    done = subprocess.run(program, input="\n".join(lines), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [int(line) for line in done.stdout.split()]
    ratios = {name: ours / real for name, ours, real in zip(STEPS, counted, found, strict=True)}
    assert all(0.9 < ratio < 1.1 for ratio in ratios.values()), ratios


def test_memory_on_an_h200() -> None:
    """The figures are of a trial of these kernels (gpu, tests/benchmarks/README.md)."""
    for streams, measured in ((128, 6.5e9), (512, 9.7e9)):
        memory = worker_memory(tiny_config(**{**ORIGINAL, "data__streams": streams}), 793_471, on_gpu=True)
        assert memory.on_gpu.total == pytest.approx(measured, rel=0.1)
