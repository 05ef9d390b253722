"""A node that is taken away with a notice, on a real Ray cluster: checkpoints before, and no failure is counted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers.hosts import wait_for
from helpers.tiny_runs import checkpoints, newest, sentences, tiny_values
from ray.train.v2.api.preemption import PreemptionInfo

from elmo_ray.cluster import preemption
from elmo_ray.cluster.preemption import SaveRequests, announced_by


def test_requests_come_with_the_notice_and_at_each_half_of_the_rest() -> None:
    now, deadline = 1000.0, None

    def ask() -> bool:
        return requests()

    requests = SaveRequests(lambda: deadline, lambda: now)
    assert not ask()
    deadline, asked = 1032.0, []
    for tenth in range(400):
        now = 1000 + tenth / 10
        if ask():
            asked.append(now - 1000)
    assert asked == [0, 16, 24, 28, 30]


class Clock:
    """A host's clock, which is set, and its time since the start, which is not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall, self.since_start = 1e9, 50.0
        monkeypatch.setattr(preemption, "time", self)

    def time(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.since_start


@pytest.mark.parametrize(
    ("wrong_by", "expected"),
    [(0, [0, 16, 24, 28, 30]), (-3600, [0]), (3600, [0, 60])],
    ids=["right", "behind", "ahead"],
)
@pytest.mark.parametrize("set_by", [0, 300, -300])
def test_a_clock_that_is_wrong_or_is_set_costs_no_checkpoint(
    monkeypatch: pytest.MonkeyPatch, wrong_by: int, expected: list[int], set_by: int
) -> None:
    """Ray names the deadline as a time of day: it is compared with the clock once, when the notice comes."""
    clock = Clock(monkeypatch)
    info = PreemptionInfo(deadline_ms=int((clock.wall + 33) * 1000), preempted_node_to_ranks={"node": [0]})
    clock.wall += wrong_by
    requests = SaveRequests(announced_by(lambda: info), clock.monotonic)
    asked = []
    for second in range(62):
        clock.since_start, clock.wall = 50.0 + second, clock.wall + 1 + (set_by if second == 5 else 0)
        if requests():
            asked.append(second)
    assert asked == expected


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_is_taken_away_with_a_notice(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    (tmp_path / "train.txt").write_text("".join(line + "\n" for line in sentences(1500)), encoding="utf-8")
    values = tiny_values(
        run__name="spot",
        run__storage_path=str(tmp_path / "runs"),
        run__export=False,
        data__train=str(tmp_path / "train.txt"),
        train__duration="1000000 steps",
        train__checkpoint_every="1000000 steps",
        train__log_every=25,
        cluster={"workers": [1, 2], "max_failures": 0},
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    node = {"num_cpus": 1, "object_store_memory": 150_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    spot = cluster.add_node(**node)
    environment = {**os.environ, "RAY_ADDRESS": cluster.address, "RAY_worker_niceness": "0"}
    log, run = tmp_path / "log.txt", tmp_path / "runs" / "spot"
    written = log.read_text

    def saved() -> bool:
        return (run / "checkpoints").exists() and bool(checkpoints(run))

    try:
        with open(log, "w") as output:
            command = [sys.executable, "-m", "elmo_ray.pretrain", str(tmp_path / "config.yaml")]
            driver = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

        def seen(text: str) -> None:
            wait_for(lambda: bool(re.search(text, written())) or driver.poll() is not None, written, 240)
            assert re.search(text, written()), written()

        seen("step +25")
        assert not saved()
        drain = ["ray", "drain-node", f"--address={cluster.address}", f"--node-id={spot.node_id}"]
        drain += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=30"]
        program = Path(sys.executable).parent / "ray"
        subprocess.run([program, *drain[1:]], check=True, capture_output=True, env=environment)
        end = time.monotonic() + 30
        wait_for(saved, written, 25)
        at_once = newest(run).step
        seen("announced to be taken away in [0-9]+ s, with worker [01]: ")
        wait_for(lambda: time.monotonic() >= end, "the end of the node")
        cluster.remove_node(spot, allow_graceful=False)
        seen("resume from step [0-9]+ of")
        found = re.search("resume from step ([0-9]+) of .* 1 worker", written())
        assert found and int(found[1]) > at_once, written()
        seen(r"(?s)resume from step.*step +[0-9]+")
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(60) == 0, written()
        assert "failure 1" not in written()
    finally:
        driver.kill()
        cluster.shutdown()
