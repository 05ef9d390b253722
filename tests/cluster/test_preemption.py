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
from helpers.ray_clusters import NO_DASHBOARD
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


HOLD = """
import sys
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

address, node = sys.argv[1:]
ray.init(address=address, log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
class Other:
    def ready(self):
        return True

other = Other.remote()
print(ray.get(other.ready.remote()), flush=True)
sys.stdin.read()
"""
"""Program that keeps a node in Ray beyond its announced end, as another job's actor does: an idle one leaves then."""


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
@pytest.mark.parametrize("case", ["it goes", "it stays beyond its end", "the host of the driver stays"])
def test_a_node_is_taken_away_with_a_notice(tmp_path: Path, case: str) -> None:
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
    node = {"num_cpus": 1, "object_store_memory": 150_000_000, **NO_DASHBOARD}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    spot, is_driver = cluster.add_node(**node), case == "the host of the driver stays"
    drained = cluster.head_node if is_driver else spot
    environment = {**os.environ, "RAY_ADDRESS": cluster.address, "RAY_worker_niceness": "0"}
    driver = other = None
    log, run = tmp_path / "log.txt", tmp_path / "runs" / "spot"
    written = log.read_text

    def saved() -> bool:
        return (run / "checkpoints").exists() and bool(checkpoints(run))

    try:
        if case == "it stays beyond its end":
            hold = [sys.executable, "-c", HOLD, cluster.address, spot.node_id]
            pipe = subprocess.PIPE
            other = subprocess.Popen(hold, env=environment, stdin=pipe, stdout=pipe, text=True)
            assert other.stdout is not None and other.stdout.readline() == "True\n"
        with open(log, "w") as output:
            command = [sys.executable, "-m", "elmo_ray.pretrain", str(tmp_path / "config.yaml")]
            driver = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

        def seen(text: str) -> None:
            wait_for(lambda: bool(re.search(text, written())) or driver.poll() is not None, written, 240)
            assert re.search(text, written()), written()

        seen("step +25")
        assert not saved()
        drain = ["ray", "drain-node", f"--address={cluster.address}", f"--node-id={drained.node_id}"]
        drain += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=30"]
        program = Path(sys.executable).parent / "ray"
        subprocess.run([program, *drain[1:]], check=True, capture_output=True, env=environment)
        end = time.monotonic() + 30
        wait_for(saved, written, 25)
        at_once = newest(run).step
        seen("announced to be taken away in [0-9]+ s, with worker [01]: ")
        if is_driver:
            seen("this command runs there too")
        wait_for(lambda: time.monotonic() >= end, "the end of the node")
        if case == "it goes":
            cluster.remove_node(spot, allow_graceful=False)
        seen("resume from step [0-9]+ of")
        found = re.search("resume from step ([0-9]+) of .* 1 worker", written())
        assert found and int(found[1]) > at_once, written()
        seen(r"(?s)resume from step.*step +[0-9]+")
        if case != "it goes":
            assert drained.any_processes_alive() and not drained.dead_processes(), "the node was to be there still"
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(60) == 0, written()
        assert newest(run).step > int(found[1]), "a checkpoint of the end"
        assert "failure 1" not in written()
    finally:
        for process in (driver, other):
            if process is not None:
                process.kill()
                process.wait()
        cluster.shutdown()
