"""Elastic training on a real Ray cluster of several nodes on this machine: one is lost, another comes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from helpers.ray_clusters import NO_DASHBOARD
from helpers.tiny_runs import checkpoints, newest, progress_of, sentences, tiny_values

from elmo_ray.data.corpus import Corpus
from elmo_ray.data.encode import thread_source
from elmo_ray.data.streams import StreamCursors, StreamLoader, StreamPlan
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.training.metrics import read_metrics

DEADLINE_S = 240


@pytest.fixture()
def config(tmp_path: Path) -> Path:
    for number in range(4):
        text = "".join(line + "\n" for line in sentences(1500, seed=number))
        (tmp_path / f"train-{number}.txt").write_text(text, encoding="utf-8")
    values = tiny_values(
        run__name="elastic",
        run__storage_path=str(tmp_path / "runs"),
        run__export=False,
        data__train=str(tmp_path / "train-*.txt"),
        data__streams=5,
        data__block_bytes=4096,
        train__duration="1000000 steps",
        train__checkpoint_every="25 steps",
        train__log_every=25,
        train__dropout=0.0,
        cluster={"workers": [1, 2], "resize_every_s": 5, "max_failures": 10},
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_is_lost_and_another_comes(config: Path, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 150_000_000, **NO_DASHBOARD}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    lost = cluster.add_node(**node)
    environment = {
        **os.environ,
        "RAY_ADDRESS": cluster.address,
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
        "RAY_worker_niceness": "0",
    }
    command = [sys.executable, "-m", "elmo_ray.pretrain", str(config)]
    log = tmp_path / "log.txt"
    run = tmp_path / "runs" / "elastic"
    try:
        with open(log, "w") as output:
            driver = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        wait_for(lambda: starts(run) == [2] and trained(run), driver, log)
        cluster.remove_node(lost, allow_graceful=False)
        wait_for(lambda: starts(run)[-1] == 1 and trained(run), driver, log)
        cluster.add_node(**node)
        wait_for(lambda: starts(run)[-1] == 2 and trained(run), driver, log)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(60) == 0, log.read_text()
    finally:
        driver.kill()
        cluster.shutdown()
    last = newest(run)
    assert last.manifest["world"] == 2
    step, positions = last.step, progress_of(last)["positions"]
    cursors = last.stream_tensors(0, 5)
    assert int(cursors["audit_positions"].sum()) == positions
    expected = audit(run, step)
    for name, values in expected.arrays().items():
        assert torch.equal(cursors[name], torch.from_numpy(values)), f"{name}: other text than one worker reads"
    assert [r["step"] for r in read_metrics(run) if r["kind"] == "train"] == list(range(25, step + 1, 25))


def starts(run: Path) -> list[int]:
    """How many workers each start of the run had."""
    lines = [line for path in sorted((run / "metrics").glob("*.jsonl")) for line in path.read_text().splitlines()]
    found = [re.search(r'"start: .*?(\d+) workers?', line) for line in lines]
    return [int(match[1]) for match in found if match]


def trained(run: Path) -> bool:
    """Whether the newest attempt has trained and saved."""
    path = max((run / "metrics").glob("*.jsonl"))
    attempt = path.stem
    return any(attempt in folder.name for folder in checkpoints(run)) and '"train"' in path.read_text()


def wait_for(happened: Callable[[], bool], driver: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            if happened():
                return
        except (FileNotFoundError, IndexError, ValueError):
            pass  # nothing there yet
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def audit(run: Path, steps: int) -> StreamCursors:
    """The cursors after so many steps, from the text alone and read by one worker."""
    words = Vocabulary.read(run / "vocab.txt")
    plan = StreamPlan(Corpus.load(run / "train.npz"), 5, seed=3)
    loader = StreamLoader(
        plan,
        range(5),
        StreamCursors.start(5),
        lambda blocks: thread_source(blocks, words, 16),
        words,
        6,
        None,
    )
    for _ in range(steps):
        batch = loader.next_batch()
    loader.close()
    return batch.cursors
