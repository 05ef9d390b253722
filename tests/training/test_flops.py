"""The count of operations against torch's own counter, and the peak against a product that is timed here."""

from __future__ import annotations

import gzip
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_runs import WORDS_TIED, WORDS_UNTIED, plan_of, tiny_config, worker_of
from torch.utils.flop_counter import FlopCounterMode

from elmo_ray.config import PretrainConfig
from elmo_ray.errors import ConfigError
from elmo_ray.training.flops import PEAKS, known_tflops, peak_tflops
from elmo_ray.training.loop import train
from elmo_ray.training.metrics import read_metrics

Paths = tuple[Path, Path]

FULL: dict[str, Any] = {"softmax__kind": "full", "softmax__negatives": None}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        FULL,
        {"softmax__kind": "adaptive", "softmax__negatives": None},
        {"model__bidirectional": False, "train__accumulate": 2},
        {"model__lstm": {"dim": 8, "projection_dim": 8, "n_layers": 3}, "train__precision": "fp64"},
        {"model__char_cnn": {"filters": [[1, 4], [3, 4]], "embedding_dim": 3, "max_characters": 12, "n_highway": 0}},
        WORDS_UNTIED,
        {**WORDS_TIED, **FULL},
    ],
    ids=["sampled", "full", "adaptive", "forward", "no projection", "no highway", "words", "words tied"],
)
def test_operations_are_those_that_torch_counts(changes: dict[str, Any], corpus: Paths, tmp_path: Path) -> None:
    values = {"train__kernels": "off", "train__unroll": 20, "train__duration": "8 steps", "train__dropout": 0.0}
    config = tiny_config(**{**values, "train__log_every": 1, **changes})
    peak = peak_tflops(torch.device("cpu"), config.train.precision)  # measured here, as torch counts the products in it
    plan = plan_of(tmp_path / "run", config, corpus)
    with FlopCounterMode(display=False) as counter:
        result = train(plan, worker_of(plan))
    records = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    positions = [later - before for before, later in itertools.pairwise([0, *(r["positions"] for r in records)])]
    per_position = [1e12 * r["tflops"] / r["positions_per_second"] for r in records]
    expected = sum(n * each for n, each in zip(positions, per_position, strict=True))
    # the carried state has no gradient, so the first position of a window has fewer products; and how often a word is
    # in a cluster of the adaptive softmax is a guess
    near = 0.25 if config.softmax.kind == "adaptive" else 0.05
    assert counter.get_total_flops() == pytest.approx(expected, rel=near)
    assert all(r["mfu"] == pytest.approx(r["tflops"] / peak) for r in records)
    assert result["tflops"] == pytest.approx(statistics.median(r["tflops"] for r in records))


def test_the_measured_peak_is_that_of_a_product() -> None:
    peak = peak_tflops(torch.device("cpu"), "fp32")
    x = torch.full((512, 512), 0.5)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(x, x)
        times.append(time.perf_counter() - start)
    timed = 2 * 512**3 / min(times) / 1e12
    assert timed / 5 < peak < timed * 5, "other programs use this machine as well"


def test_known_peaks_are_found_by_whole_words() -> None:
    for name, bf16, fp32 in (
        ("NVIDIA H200", 989.0, 67.0), ("NVIDIA H100 80GB HBM3", 989.0, 67.0), ("NVIDIA H100 PCIe", 756.0, 51.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5), ("NVIDIA L40S", 362.0, 91.6), ("NVIDIA L4", 121.0, 30.3),
        ("NVIDIA A10G", None, 31.5), ("Tesla V100-PCIE-16GB", None, 14.0), ("NVIDIA RTX A1000", None, None),
        ("NVIDIA RTX A4000", None, None), ("NVIDIA GeForce RTX 4090", None, None),
    ):  # fmt: skip
        assert (known_tflops(name, "bf16"), known_tflops(name, "fp32")) == (bf16, fp32), name
    assert all(fp32 < (bf16 or 1e9) for _, bf16, fp32 in PEAKS)


def trace_of(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(gzip.decompress(path.read_bytes()))["traceEvents"])


def test_profile_writes_a_trace_of_these_steps(corpus: Paths, tmp_path: Path) -> None:
    def run(name: str, profile: list[int] | None) -> Path:
        config = tiny_config(train__duration="12 steps", train__profile=profile)
        plan = plan_of(tmp_path / name, config, corpus)
        train(plan, worker_of(plan))
        return tmp_path / name

    traced = run("traced", [5, 7])
    (path,) = (traced / "profile").iterdir()
    assert path.name == "steps-5-7.json.gz"
    events = trace_of(path)
    steps = {e["name"]: e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith("step ")}
    assert sorted(steps) == ["step 5", "step 6", "step 7"]
    operations = [e for e in events if e.get("cat") == "cpu_op"]
    first, last = steps["step 5"]["ts"], steps["step 7"]["ts"] + steps["step 7"]["dur"]
    assert sum(first <= e["ts"] <= last for e in operations) > 50
    assert len({e["tid"] for e in operations}) > 1, "the two directions run in two threads"
    messages = [r["message"] for r in read_metrics(traced) if r["kind"] == "event"]
    assert any("trace of steps 5 to 7" in message and str(path) in message for message in messages)
    plain = run("plain", None)
    assert not (plain / "profile").exists()
    losses = [[r["loss"] for r in read_metrics(folder) if r["kind"] == "train"] for folder in (traced, plain)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("profile", "message", "files"),
    [
        ([100, 105], "train.profile=[100, 105]: the run ends at step 6, so there is no trace", []),
        ([5, 9], "train.profile=[5, 9]: the trace has steps 5 to 6", ["steps-5-6.json.gz"]),
    ],
)
def test_steps_beyond_the_end(
    profile: list[int], message: str, files: list[str], corpus: Paths, tmp_path: Path
) -> None:
    config = tiny_config(train__duration="6 steps", train__profile=profile)
    plan = plan_of(tmp_path / "run", config, corpus)
    train(plan, worker_of(plan))
    assert message in [r.get("message") for r in read_metrics(tmp_path / "run")]
    assert [path.name for path in (tmp_path / "run").glob("profile/*")] == files


@pytest.mark.parametrize("profile", [[105, 100], [0, 5], [1, 101], [5], "5-7", [1.5, 2]])
def test_a_bad_range_is_refused(profile: Any) -> None:
    with pytest.raises(ConfigError, match=r"^train\.profile") as caught:
        PretrainConfig.from_dict({"train": {"profile": profile}})
    assert "\n" not in str(caught.value)


def test_no_share_is_above_the_whole() -> None:
    """A peak that was measured on a busy machine is at least what training has reached."""
    assert peak_tflops(torch.device("cpu"), "fp64", reached=99.0) == 99.0
    assert peak_tflops(torch.device("cpu"), "fp64") == 99.0
