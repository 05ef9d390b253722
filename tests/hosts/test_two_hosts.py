"""Training on two hosts in the form of Debian, and what is said where hosts differ or do not reach each other."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers.hosts import REPOSITORY, Host, Hosts, child_of, lines_of, need_hosts, title, wait_for, workers_of
from helpers.same_runs import differences
from helpers.tiny_runs import newest, sentences, tiny_values

from elmo_ray.training.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.hosts]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    need_hosts()
    with Hosts(tmp_path_factory.mktemp("hosts")) as both:
        head, other = both.all
        head.start_ray()
        other.start_ray(head)
        yield both


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.txt").write_text("".join(f"{line}\n" for line in sentences(400)))
    values = tiny_values(
        run__storage_path=str(tmp_path / "runs"),
        run__name="two",
        data__train=str(tmp_path / "text" / "train.txt"),
        data__prepared_dir=str(tmp_path / "prepared"),
        cluster={"workers": 2, "cpus_per_worker": 1.5},
    )
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def pretrain(host: Host, config: Path, *arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "elmo_ray.pretrain", str(config), *arguments]
    return host.run(*command, timeout_s=timeout_s, RAY_ADDRESS=host.hosts.all[0].at(6379))


def test_workers_of_two_hosts_train(hosts: Hosts, config: Path) -> None:
    done = pretrain(hosts.all[0], config)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 workers" in done.stderr and "step 24/24" in done.stderr
    assert "failure" not in done.stderr
    steps = [record["step"] for record in read_metrics(config.parent / "runs" / "two") if record["kind"] == "train"]
    assert steps[-1] == 24


def test_hosts_that_have_ipv6_only(tmp_path: Path, config: Path) -> None:
    need_hosts()
    with Hosts(tmp_path / "hosts", network="fd00:83") as both:
        head, other = both.all
        head.start_ray()
        other.start_ray(head)
        done = pretrain(other, config, "cluster.network=fd00:83::/64")
        assert done.returncode == 0, done.stderr[-3000:]
        assert "2 workers" in done.stderr and "step 24/24" in done.stderr
        wrong = other.run(
            sys.executable, "-m", "elmo_ray.pretrain", str(config), "--resume", "train.duration=25 steps",
            RAY_ADDRESS=f"{head.address}:6379",
        )  # fmt: skip
    assert wrong.returncode == 2
    assert "an IPv6 address stands in brackets, as in [fd00:83::2]:6379" in lines_of(wrong.stderr)[-1]


@pytest.mark.long
def test_sigterm_to_all_processes_of_a_run_on_both_hosts(hosts: Hosts, config: Path) -> None:
    """As the shutdown of a cluster sends it; Ray's own processes get it later or not at all."""
    of_run = ("ray::RayTrainWorker", "ray::TrainController", "ray::MapBatches")
    settings = ("train.duration=400 steps", "train.checkpoint_every=100000 steps")
    driver, run = hosts.all[0], config.parent / "runs" / "stopped"
    command = [sys.executable, "-m", "elmo_ray.pretrain", str(config), "run.name=stopped", *settings]
    log = config.parent / "log.txt"
    with open(log, "wb") as out:
        environment = hosts.environment | {"RAY_ADDRESS": driver.at(6379)}
        process = subprocess.Popen(driver.command(*command), stdout=out, stderr=out, env=environment)

    def trains() -> bool:
        metrics = run / "metrics" / "attempt-001.jsonl"
        return process.poll() is not None or (metrics.exists() and '"train"' in metrics.read_text())

    wait_for(trains, log.read_text, 400)
    pid = child_of(process)
    assert pid is not None and all(workers_of(host) for host in hosts.all), log.read_text()
    of_ray = [each for host in hosts.all for each in host.processes() if title(each).startswith(of_run)]
    for each in [pid, *of_ray]:
        os.kill(each, signal.SIGTERM)
    assert process.wait(200) == 0, log.read_text()[-3000:]
    said, saved = log.read_text(), newest(run).step
    assert "failure 1 of" not in said  # ours: Ray says "unrecoverable failure" of a data task that gets SIGTERM
    assert 0 < saved < 400 and "go on with the same command and --resume" in said and "Traceback" not in said

    for arguments in (["run.name=stopped", "--resume"], ["run.name=whole"]):
        done = pretrain(hosts.all[0], config, *arguments, *settings, timeout_s=600)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("--resume" in arguments) == (f"resume from step {saved} of" in done.stderr)
    assert differences(run.with_name("whole"), run) == []


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        # Which of the two hosts says so first is chance.
        ("eth1", r"host node[ab] \(10\.99\.0\.[23], interface eth1\) cannot reach host node[ab] \(10\.99\.0\.[23], "),
        ("10.200.0.0/16", r"cluster\.network=10\.200\.0\.0/16: host node[ab] has no such interface; it has"),
    ],
)
def test_hosts_that_do_not_reach_each_other(hosts: Hosts, config: Path, wanted: str, expected: str) -> None:
    done = pretrain(hosts.all[0], config, f"cluster.network={wanted}")
    assert done.returncode == 2, done.stderr[-3000:]
    assert re.search(expected, lines_of(done.stderr)[-1])
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("hidden", ["text", "runs"])
def test_a_host_that_does_not_see_the_files(hosts: Hosts, config: Path, hidden: str) -> None:
    place = config.parent / hidden
    place.mkdir(exist_ok=True)
    with hosts.all[1].mounted(place, "-t", "tmpfs", "tmpfs"):
        done = pretrain(hosts.all[0], config)
    assert done.returncode == 2, done.stderr[-3000:]
    last = lines_of(done.stderr)[-1]
    assert "host nodeb (10.83.0.3) does not see what the driver sees" in last and str(place) in last
    assert "Traceback" not in done.stderr


def test_a_host_that_cannot_write_to_the_runs(hosts: Hosts, config: Path) -> None:
    runs = config.parent / "runs"
    runs.mkdir()
    with hosts.all[1].mounted(runs, "--bind", str(runs)):
        hosts.all[1].mount("-o", "remount,ro,bind", str(runs))
        done = pretrain(hosts.all[0], config)
    assert done.returncode == 2, done.stderr[-3000:]
    last = lines_of(done.stderr)[-1]
    assert f"host nodeb (10.83.0.3) cannot write to {runs}" in last and "Read-only file system" in last
    assert "failure" not in done.stderr


def test_a_host_with_another_version(hosts: Hosts, config: Path) -> None:
    package = REPOSITORY / "elmo_ray" / "__init__.py"
    other = config.parent / "other.py"
    other.write_text(package.read_text().replace("__version__ = ", '__version__ = "0.0.1" or '))
    with hosts.all[1].mounted(package, "--bind", str(other)):
        done = pretrain(hosts.all[0], config)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "host nodeb (10.83.0.3) has elmo_ray 0.0.1" in lines_of(done.stderr)[-1]
