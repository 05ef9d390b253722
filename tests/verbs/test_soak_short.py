"""A run that is interrupted ends in the same bits as one that is not: the short form of `benchmarks/soak.py`."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import yaml
from helpers.same_runs import differences
from helpers.soak_runs import Soak, damage
from helpers.tiny_runs import newest, plan_of, sentences, tiny_config, tiny_values, worker_of, write_corpus

from elmo_ray.checkpoints.read import open_checkpoint
from elmo_ray.config import PretrainConfig
from elmo_ray.config.command_line import load_config
from elmo_ray.errors import CheckpointError
from elmo_ray.training.loop import train

WORLD = 2
VALUES: dict[str, Any] = {
    "train__duration": "900 steps",  # a signal is seen within a second, and that must not be the end
    "train__dropout": 0.1,
    "train__log_every": 5,
    "train__checkpoint_every": "25 steps",
    "train__validate_every": "50 steps",
    "cluster": {"workers": WORLD, "threads": 1, "max_failures": 10},
}


def never_stopped(rank: int, folder: Path) -> None:
    """One of two processes that train the same without Ray, in seconds, on the index that the other run has made."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    other = folder / "broken"
    config = load_config(folder / "soak.yaml", ["run.name=whole"], PretrainConfig)
    plan = plan_of(folder / "whole", config, (other / "train.npz", other / "vocab.txt"), other / "valid.npz")
    train(plan, worker_of(plan, rank, WORLD))
    dist.destroy_process_group()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
def test_three_interruptions(tmp_path: Path) -> None:
    """A worker killed during a save, the driver killed and the newest checkpoint damaged, and a SIGTERM."""
    for name, count in {"train": 3000, "valid": 60}.items():
        (tmp_path / f"{name}.txt").write_text("".join(line + "\n" for line in sentences(count, seed=count)))
    values = tiny_values(
        run={"seed": 3, "storage_path": str(tmp_path), "export": False},
        data={"train": str(tmp_path / "train.txt"), "valid": str(tmp_path / "valid.txt"), "streams": 4},
        **VALUES,
    )
    (tmp_path / "soak.yaml").write_text(yaml.safe_dump(values))
    results = []
    with Soak([str(tmp_path / "soak.yaml"), "run.name=broken"], tmp_path / "broken") as broken:
        broken.start()
        for kind, step in {"save:worker": 60, "damage:driver": 250, "sigterm": 450}.items():
            broken.reach(step)
            results.append(broken.interrupt(kind))
            print(json.dumps(results[-1]))
        broken.finish()
    # A kill that came after the end of its save is a kill all the same; the long soak tries again.
    assert [result["kind"] for result in results[1:]] == ["damage", "sigterm"]
    assert len(list((tmp_path / "broken" / "metrics").glob("*.jsonl"))) == 4
    torch.multiprocessing.spawn(never_stopped, (tmp_path,), nprocs=WORLD)
    assert differences(tmp_path / "whole", tmp_path / "broken") == []


def test_differences_are_found(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "text", [200])
    valid, _ = write_corpus(tmp_path / "valid", [20], seed=9)
    for name, seed in {"one": 3, "same": 3, "other": 4}.items():
        config = tiny_config(
            run={"seed": seed},
            data={"train": "unused", "valid": "unused", "streams": 4},
            train__validate_every="8 steps",
        )
        plan = plan_of(tmp_path / name, config, corpus, valid)
        train(plan, worker_of(plan))
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    assert differences(one, same) == []
    found = differences(one, other)
    for part in ("last: model/", "best: model/", "metrics: train of step 4: loss is "):
        assert any(part in line for line in found), found
    assert sum(line.startswith("and ") for line in found) == 3

    metrics = same / "metrics" / "attempt-001.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if '"valid"' not in line or '"step": 16,' not in line))
    assert differences(one, same) == ["metrics: valid of step 16: only in one of them"]
    metrics.write_text("".join(lines))
    shutil.rmtree(same / "best")
    assert differences(one, same) == ["best: only one of the runs has it"]


@pytest.mark.parametrize("seed", range(6))
def test_damage_is_noticed(tmp_path: Path, seed: int) -> None:
    corpus = write_corpus(tmp_path / "text", [40])
    plan = plan_of(tmp_path / "run", tiny_config(train__duration="2 steps"), corpus)
    train(plan, worker_of(plan))
    checkpoint = newest(tmp_path / "run")
    chance = random.Random(seed)
    damage(checkpoint.path / chance.choice([*checkpoint.files, "manifest.json"]), chance)
    with pytest.raises(CheckpointError):
        open_checkpoint(checkpoint.path)
