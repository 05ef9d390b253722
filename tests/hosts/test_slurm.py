"""`cluster/slurm.sbatch` under a real Slurm of two nodes, whose own names are 127.0.1.1 as on Debian."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hosts import REPOSITORY, Hosts, need_hosts, wait_for
from helpers.slurm import Slurm, need_slurm
from helpers.tiny_runs import newest, write_command

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.hosts]
SCRIPT = str(REPOSITORY / "cluster" / "slurm.sbatch")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    need_hosts()
    need_slurm()
    folder = tmp_path_factory.mktemp("slurm")
    with Hosts(folder, network="10.84.0") as hosts:
        yield Slurm(hosts)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    cluster = {"workers": 2, "cpus_per_worker": 1.5}
    return write_command(tmp_path, run__name="queued", train__log_every=1, cluster=cluster)


def submit(slurm: Slurm, config: Path, *arguments: str, options: tuple[str, ...] = ()) -> int:
    common = ["--nodes=2", "--gpus-per-node=0", "--export=ALL", *options]
    return slurm.submit(*common, SCRIPT, str(config), *arguments, folder=config.parent)


def log(config: Path) -> str:
    path = config.parent / "job.log"
    return path.read_text(errors="replace") if path.exists() else ""


def wait_for_training(slurm: Slurm, number: int, config: Path, attempt: int) -> None:
    """Wait until Slurm has started the job, and then until the run's attempt has written a step."""
    slurm.wait(number, "RUNNING", timeout_s=300)
    metrics = config.parent / "runs" / "queued" / "metrics" / f"attempt-{attempt:03d}.jsonl"

    def trains() -> bool:
        return metrics.exists() and '"train"' in metrics.read_text()

    wait_for(trains, lambda: f"training: {slurm.state(number)}", 300)


def test_a_run_on_two_nodes(slurm: Slurm, config: Path) -> None:
    number = submit(slurm, config)
    job = slurm.wait(number, "COMPLETED", "FAILED")
    assert job["JobState"] == "COMPLETED" and job["ExitCode"] == "0:0", log(config)
    assert "2 workers" in log(config) and "step 24/24" in log(config)


def test_a_wrong_argument_ends_the_job_with_its_exit_code(slurm: Slurm, config: Path) -> None:
    job = slurm.wait(submit(slurm, config, "train.duration=nonsense"), "COMPLETED", "FAILED")
    assert job["JobState"] == "FAILED" and job["ExitCode"] == "2:0", slurm.state(int(job["JobId"]))
    assert "train.duration" in log(config)


def restarts(slurm: Slurm, number: int, times: int) -> None:
    """Wait until the job was queued again so often, and let it start."""
    wait_for(
        lambda: slurm.job(number).get("Restarts") == str(times), lambda: f"queued again: {slurm.state(number)}", 120
    )
    # Slurm waits two minutes before it starts a job again; at once would be too early for the nodes
    slurm.command("scontrol", "update", f"jobid={number}", "starttime=now+10")


@pytest.mark.long
def test_a_job_is_queued_again_near_its_end_and_when_a_node_is_taken_away(slurm: Slurm, config: Path) -> None:
    run = config.parent / "runs" / "queued"
    never = ("train.duration=1000000 steps", "train.checkpoint_every=900000 steps")
    number = submit(slurm, config, *never)
    wait_for_training(slurm, number, config, 1)
    # what Slurm sends before the end of the time, by --signal=B:USR1@600
    slurm.command("scancel", "--batch", "--signal=USR1", str(number))
    restarts(slurm, number, 1)
    saved = newest(run).step
    assert saved > 0
    wait_for_training(slurm, number, config, 2)
    assert f"resume from step {saved} of" in log(config)

    slurm.command("scontrol", "update", "nodename=nodeb", "state=down", "reason=test")
    restarts(slurm, number, 2)
    slurm.command("scontrol", "update", "nodename=nodeb", "state=resume")
    wait_for_training(slurm, number, config, 3)
    starts = re.findall(r"resume from step (\d+) of", log(config))
    assert len(starts) == 2 and int(starts[1]) == newest(run).step >= saved
    slurm.command("scancel", str(number))
    assert slurm.wait(number, "CANCELLED", "COMPLETED", "FAILED")["JobState"] == "CANCELLED"
