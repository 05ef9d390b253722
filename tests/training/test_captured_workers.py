"""Captured steps of two and three workers over gloo, as they run on a CPU, train as DistributedDataParallel does."""

from __future__ import annotations

import dataclasses
import datetime
import json
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from helpers.ranks import run_ranks
from helpers.tiny_runs import Stopper, everything, newest, plan_of, records, tiny_config, worker_of, write_corpus
from helpers.traffic import counted

from elmo_ray.training.cuda_graphs import play
from elmo_ray.training.loop import train
from elmo_ray.training.plan import TrainPlan

pytestmark = pytest.mark.slow

VALID = {"data__valid": "unused.txt", "train__validate_every": "5 steps"}
BASE: dict[str, Any] = {
    "train__precision": "fp64",
    "train__dropout": 0.3,
    "train__duration": "12 steps",
    "train__log_every": 1,
    "data__streams": 7,
}
RUNS: dict[str, dict[str, Any]] = {
    "validated": {**BASE, **VALID},
    "float32": {**BASE, "train__precision": "fp32", "train__duration": "4 steps"},
    "phases": {**BASE, "train__softmax_first": 4, "train__freeze": ["highway"]},
    "accumulated": {**BASE, "train__accumulate": 2},
    "halved": {**BASE, "train__precision": "fp32", "train__gradients": "bf16"},
}
ELASTIC = {**BASE, **VALID, "train__dropout": 0.0, "train__duration": "20 steps"}


def plan(folder: Path, run: str, name: str, changes: dict[str, Any]) -> TrainPlan:
    corpus, valid = (folder / "text" / "corpus.npz", folder / "text" / "vocab.txt"), folder / "held-out" / "corpus.npz"
    return plan_of(folder / run / name, tiny_config(**changes), corpus, valid if "data__valid" in changes else None)


def rank_main(rank: int, world: int, folder: Path, elastic: str) -> None:
    torch.set_num_threads(1)
    store, timeout = f"file://{folder}/store-{world}-{elastic}", datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timeout)
    results: dict[str, Any] = {}

    def run(kind: str, name: str, changes: dict[str, Any], stop: Stopper | None = None) -> None:
        mine = plan(folder, kind, name, changes)
        worker = worker_of(mine, rank, world, stop)
        if not kind.startswith("ddp"):
            # the second time by processes of their own, which must change no bit
            own_process = kind.startswith("again") and name in ("validated", "accumulated")
            worker = dataclasses.replace(worker, record=play, feed_process=own_process)
        try:
            with counted() as traffic:
                results[f"{kind} {name}"] = train(mine, worker)
            results[f"{kind} {name}"]["calls"] = dict(traffic.calls)
            results[f"{kind} {name}"]["bytes"] = dict(traffic.bytes)
        except Exception:
            results[f"{kind} {name}"] = {"raised": traceback.format_exc()}

    if elastic == "starts":
        for name in RUNS if world == 2 else ("validated", "float32"):
            for kind in ("ddp", "captured", "again"):
                run(f"{kind}-{world}", name, RUNS[name])
    if world == 2 and elastic == "starts":
        run("ddp-2", "unbroken", ELASTIC)
        run("elastic", "run", ELASTIC, Stopper(6 if rank == 1 else None))
    elif elastic == "goes on":
        run("elastic", "run", ELASTIC)
    (folder / f"results-{world}-{elastic}-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def spawn(folder: Path, world: int, elastic: str) -> list[dict[str, Any]]:
    run_ranks(rank_main, (world, folder, elastic), world)
    found = [json.loads((folder / f"results-{world}-{elastic}-{rank}.json").read_text()) for rank in range(world)]
    for results in found:
        for name, result in results.items():
            assert "raised" not in result, f"{name}: {result['raised']}"
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captured")
    write_corpus(folder / "text", [60, 40])
    write_corpus(folder / "held-out", [15], seed=50)
    return folder


@pytest.fixture(scope="module")
def of_two(folder: Path) -> list[dict[str, Any]]:
    return spawn(folder, 2, "starts")


@pytest.fixture(scope="module")
def of_three(folder: Path) -> list[dict[str, Any]]:
    return spawn(folder, 3, "starts")


def largest_difference(a: Path, b: Path) -> float:
    """Of all tensors of the newest checkpoints, relative to the largest value of each or 1."""
    ours, theirs = everything(newest(a)), everything(newest(b))
    assert sorted(ours) == sorted(theirs)
    keys = [key for key in theirs if key != "streams/window_sums"]
    return max(float((ours[k] - theirs[k]).abs().max()) / max(1.0, float(theirs[k].abs().max())) for k in keys)


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run)]


@pytest.mark.parametrize("name", [name for name in RUNS if name != "halved"])
def test_two_train_as_with_ddp(folder: Path, of_two: list[dict[str, Any]], name: str) -> None:
    tolerance = 1e-6 if RUNS[name]["train__precision"] == "fp32" else 1e-10
    assert largest_difference(folder / "captured-2" / name, folder / "ddp-2" / name) <= tolerance
    assert losses(folder / "captured-2" / name) == pytest.approx(losses(folder / "ddp-2" / name), rel=tolerance)


@pytest.mark.parametrize("name", ["validated", "float32"])
def test_three_train_as_with_ddp(folder: Path, of_three: list[dict[str, Any]], name: str) -> None:
    tolerance = 1e-6 if RUNS[name]["train__precision"] == "fp32" else 1e-10
    assert largest_difference(folder / "captured-3" / name, folder / "ddp-3" / name) <= tolerance
    assert largest_difference(folder / "again-3" / name, folder / "captured-3" / name) == 0.0


@pytest.mark.parametrize("name", RUNS)
def test_the_same_bits_twice(folder: Path, of_two: list[dict[str, Any]], name: str) -> None:
    assert largest_difference(folder / "again-2" / name, folder / "captured-2" / name) == 0.0
    assert losses(folder / "again-2" / name) == losses(folder / "captured-2" / name)


def test_gradients_are_one_message_a_step(folder: Path, of_two: list[dict[str, Any]]) -> None:
    for results in of_two:
        for name, changes in RUNS.items():
            steps = int(changes["train__duration"].split()[0])
            assert results[f"captured-2 {name}"]["calls"]["tables"] == steps, "the one sum is counted as that of tables"
            assert "dense" not in results[f"captured-2 {name}"]["calls"]
        full, half = (results[f"captured-2 {name}"]["bytes"]["tables"] for name in ("float32", "halved"))
        assert full / 4 == pytest.approx(2 * half / 12, rel=0.1), "rows differ a little from step to step"


def test_gradients_in_bf16_train_alike(folder: Path, of_two: list[dict[str, Any]]) -> None:
    exact, half = losses(folder / "captured-2" / "float32"), losses(folder / "captured-2" / "halved")
    assert half[:4] != exact and half[:4] == pytest.approx(exact, rel=2e-2)


def test_three_go_on_where_two_have_stopped(folder: Path, of_two: list[dict[str, Any]]) -> None:
    stopped = of_two[0]["elastic run"]
    assert stopped["stopped"] and 0 < stopped["steps"] < 20
    finished = spawn(folder, 3, "goes on")
    assert finished[0]["elastic run"]["steps"] == 20
    assert losses(folder / "elastic" / "run") == pytest.approx(losses(folder / "ddp-2" / "unbroken"), rel=1e-9)
