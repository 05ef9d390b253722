"""Steps in parts, gradients in bf16, and what travels between two workers."""

from __future__ import annotations

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
from helpers.tiny_runs import (
    WORDS_TIED,
    WORDS_UNTIED,
    everything,
    newest,
    plan_of,
    records,
    tiny_config,
    worker_of,
    write_corpus,
)
from helpers.traffic import counted

from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.errors import ConfigError
from elmo_ray.training.loop import train
from elmo_ray.training.plan import TrainPlan

pytestmark = pytest.mark.slow

WORLD = 2
EXACT = {
    "train__precision": "fp64",
    "data__streams": 8,
    "train__duration": "12 steps",
    "train__log_every": 4,
}
RUNS: dict[str, dict[str, Any]] = {
    "two parts": {**EXACT, "train__dropout": 0.3, "train__accumulate": 2},
    "full": {**EXACT, "train__precision": "fp32", "train__dropout": 0.0},
    "bf16": {**EXACT, "train__precision": "fp32", "train__dropout": 0.0, "train__gradients": "bf16"},
    "wide": {**EXACT, "train__precision": "fp32", "train__dropout": 0.0},
}
STEPS = 12


def plan(folder: Path, name: str, run: str, **changes: Any) -> TrainPlan:
    words = "wide.txt" if name == "wide" else "vocab.txt"
    corpus = (folder / "text" / "corpus.npz", folder / "text" / words)
    return plan_of(folder / run / name, tiny_config(**{**RUNS.get(name, {}), **changes}), corpus)


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timeout)
    results: dict[str, Any] = {}
    for name in RUNS:
        mine = plan(folder, name, "two")
        with counted() as traffic:
            try:
                train(mine, worker_of(mine, rank, WORLD))
                results[name] = {"bytes": dict(traffic.bytes), "calls": dict(traffic.calls)}
            except Exception:
                results[name] = {"raised": traceback.format_exc()}
        (folder / f"results-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    _, words = write_corpus(folder / "text", [60, 40])
    known = Vocabulary.read(words).words
    Vocabulary.from_words([*known, *(f"never{n}" for n in range(20 * len(known)))]).write(folder / "text" / "wide.txt")
    run_ranks(rank_main, (folder,), WORLD)
    return folder


def results(folder: Path, name: str) -> list[dict[str, Any]]:
    found = [json.loads((folder / f"results-{rank}.json").read_text())[name] for rank in range(WORLD)]
    assert not [each for each in found if "raised" in each], found
    return found


def same(a: Path, b: Path, tolerance: float = 1e-9) -> None:
    ours, theirs = everything(newest(a)), everything(newest(b))
    assert sorted(ours) == sorted(theirs)
    for key, tensor in theirs.items():
        if key != "streams/window_sums":
            assert float((ours[key] - tensor).abs().max()) <= tolerance * max(1.0, float(tensor.abs().max())), key


def test_two_workers_with_two_parts_are_four_parts_of_one(folder: Path) -> None:
    results(folder, "two parts")
    one = plan(folder, "two parts", "one", train__accumulate=4)
    train(one, worker_of(one))
    same(folder / "two" / "two parts", folder / "one" / "two parts")


@pytest.mark.parametrize(
    "kind",
    [{}, WORDS_UNTIED, WORDS_TIED, {"softmax__kind": "full", "softmax__negatives": None}, {"data__streams": 5}],
    ids=["characters", "words", "tied", "full softmax", "unequal parts"],
)
def test_parts_add_up(folder: Path, kind: dict[str, Any]) -> None:
    for parts in (1, 3):
        mine = plan(folder, f"{parts}", "sums", **{**EXACT, "train__dropout": 0.0, "train__accumulate": parts, **kind})
        train(mine, worker_of(mine))
    same(folder / "sums" / "3", folder / "sums" / "1")
    for parts in (1, 3):
        for path in sorted((folder / "sums" / f"{parts}").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()


def test_gradients_in_bf16_are_half_as_many_bytes_and_train_alike(folder: Path) -> None:
    full, half = (results(folder, name) for name in ("full", "bf16"))
    for rank in range(WORLD):
        for part in ("dense", "tables"):
            assert half[rank]["bytes"][part] * 2 == full[rank]["bytes"][part] > 0
    losses = [[r["loss"] for r in records(folder / "two" / name)] for name in ("full", "bf16")]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_parts_send_once(folder: Path) -> None:
    """Twice the bytes of fp32, because the run is in fp64."""
    for rank in range(WORLD):
        parts, full = results(folder, "two parts")[rank], results(folder, "full")[rank]
        assert parts["bytes"]["dense"] == 2 * full["bytes"]["dense"]
        assert parts["calls"] == full["calls"]


def test_the_traffic_of_a_step_does_not_depend_on_the_vocabulary(folder: Path) -> None:
    narrow, wide = (results(folder, name)[0]["bytes"] for name in ("full", "wide"))
    words = {name: Vocabulary.read(folder / "text" / name).size for name in ("vocab.txt", "wide.txt")}
    assert words["wide.txt"] == 21 * words["vocab.txt"]
    assert wide["dense"] == narrow["dense"] and wide["exchange"] == narrow["exchange"]
    config = tiny_config(**RUNS["wide"])
    targets = config.data.streams * config.train.unroll * 2
    most_rows = min(targets, words["vocab.txt"]) + 2 * config.softmax.negatives  # that a step can touch
    assert wide["tables"] <= (STEPS + 1) * most_rows * (config.model.lstm.projection_dim + 1) * 4


def test_parts_need_streams() -> None:
    with pytest.raises(ConfigError, match=r"train.accumulate=5 x cluster.workers=2 exceeds data.streams=8"):
        tiny_config(data__streams=8, train__accumulate=5, cluster={"workers": 2})
