"""Verbs as Ray jobs: a real head with dashboard and job server on loopback, submitted to by the job client."""

from __future__ import annotations

import collections
import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.tiny_runs import newest, sentences

pytestmark = [pytest.mark.ray, pytest.mark.slow]

DEADLINE_S = 240
SMALL = (
    "data.streams=4 data.block_bytes=4096 model.char_cnn.filters=[[1,4],[2,8]] model.char_cnn.embedding_dim=4 "
    "model.char_cnn.max_characters=16 model.lstm.dim=16 model.lstm.projection_dim=8 softmax.negatives=16 "
    "train.unroll=5 train.log_every=10 evaluate.streams=2 cluster.workers=1"
).split()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of the job server of a head of its own.

    Its agent's port is chosen: with the usual one, another Ray on this machine would be given our jobs.
    """
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "120")
        patch.setenv("RAY_worker_niceness", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 3,
                "object_store_memory": 200_000_000,
                "include_dashboard": True,
                "dashboard_port": 0,
                "dashboard_agent_listen_port": free_port(),
            },
        )
        try:
            url = cluster.head_node.webui_url
            assert url.startswith("127.0.0.1:"), "the job server must not listen to the network"
            yield f"http://{url}"
        finally:
            cluster.shutdown()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Jobs:
    def __init__(self, address: str, repository: Path):
        from ray.job_submission import JobSubmissionClient

        self.client = JobSubmissionClient(address)
        self.repository = repository

    def submit(self, *command: str) -> str:
        entrypoint = " ".join([Path(sys.executable).as_posix(), "-m", *(f"'{word}'" for word in command)])
        runtime_env = {"working_dir": str(self.repository), "excludes": ["tests", ".git"]}
        deadline = time.monotonic() + 60
        while True:
            try:
                return str(self.client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env))
            except RuntimeError as error:  # a head that has just started has no agent yet
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def end(self, job: str) -> tuple[str, int | None, str]:
        """Wait; (status, exit code of the command, its log)."""
        deadline = time.monotonic() + DEADLINE_S
        while not self.client.get_job_status(job).is_terminal():
            assert time.monotonic() < deadline, self.client.get_job_logs(job)
            time.sleep(0.5)
        info = self.client.get_job_info(job)
        return str(info.status.value), info.driver_exit_code, self.client.get_job_logs(job)

    def run(self, *command: str) -> tuple[str, int | None, str]:
        return self.end(self.submit(*command))


@pytest.fixture(scope="module")
def jobs(address: str, repository: Path) -> Jobs:
    return Jobs(address, repository)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    for name, count in {"train-0": 600, "train-1": 300, "valid": 60, "test": 60}.items():
        lines = sentences(count, seed=len(name) + count)
        (folder / f"{name}.txt").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder


def text(folder: Path, name: str) -> list[str]:
    """A relative path of the configuration, and absolute ones of text and runs."""
    return [
        "configs/quickstart.yaml",
        *SMALL,
        f"run.name={name}",
        f"run.storage_path={folder}/runs",
        f"data.train={folder}/train-*.txt",
        f"data.valid={folder}/valid.txt",
    ]


def test_the_main_job_and_what_comes_after_it(jobs: Jobs, folder: Path) -> None:
    steps = ["train.duration=40 steps", "train.validate_every=20 steps", "train.checkpoint_every=20 steps"]
    status, code, log = jobs.run("elmo_ray.pretrain", *text(folder, "job"), *steps, f"data.test={folder}/test.txt")
    assert (status, code) == ("SUCCEEDED", 0), log
    assert "finished at step 40 of 40" in log and "held-out perplexity of the test text" in log
    lines = [line for line in log.splitlines() if line.strip() and "│" not in line]
    twice = [line for line, times in collections.Counter(lines).items() if times > 1]
    assert not twice, "a line comes twice"
    noise = [line for line in lines if "pid=" in line or "core_worker" in line or "(raylet)" in line]
    assert not noise
    run = folder / "runs" / "job"
    assert newest(run).step == 40 and (run / "export" / "weights.hdf5").exists()

    report = folder / "evaluation.json"
    arguments = [str(run), f"data.test={folder}/test.txt", "evaluate.streams=2", "--json", str(report)]
    status, code, log = jobs.run("elmo_ray.evaluate", *arguments)
    assert (status, code) == ("SUCCEEDED", 0), log
    trained = json.loads((run / "result.json").read_text())
    assert json.loads(report.read_text())["perplexity"] == pytest.approx(trained["evaluation"]["perplexity"], rel=1e-6)

    status, code, log = jobs.run("elmo_ray.export", str(run), str(folder / "weights"))
    assert (status, code) == ("SUCCEEDED", 0), log
    assert (folder / "weights" / "weights.hdf5").read_bytes() == (run / "export" / "weights.hdf5").read_bytes()

    status, code, log = jobs.run("elmo_ray.pretrain", *text(folder, "job"), "optim.lrr=1")
    assert (status, code) == ("FAILED", 2), log
    assert "unknown key optim.lrr; did you mean optim.lr?" in log and "Traceback" not in log


def test_a_job_that_is_stopped_has_saved_and_goes_on(jobs: Jobs, folder: Path) -> None:
    command = ["elmo_ray.pretrain", *text(folder, "stopped"), "run.export=false", "train.validate_every=900000 steps"]
    job = jobs.submit(*command, "train.duration=1000000 steps", "train.checkpoint_every=1000000 steps")
    metrics = folder / "runs" / "stopped" / "metrics" / "attempt-001.jsonl"
    deadline = time.monotonic() + DEADLINE_S
    while not (metrics.exists() and '"train"' in metrics.read_text()):
        assert time.monotonic() < deadline and not jobs.client.get_job_status(job).is_terminal(), (
            jobs.client.get_job_logs(job)
        )
        time.sleep(0.2)
    assert jobs.client.stop_job(job)
    status, _, log = jobs.end(job)
    assert status == "STOPPED", log
    assert "go on with the same command and --resume" in log
    stopped = newest(folder / "runs" / "stopped").step
    assert stopped > 0

    end = f"train.duration={stopped + 20} steps"
    status, code, log = jobs.run(*command, end, "train.checkpoint_every=1000000 steps", "--resume")
    assert (status, code) == ("SUCCEEDED", 0), log
    assert f"start: resume from step {stopped} of {stopped + 20}" in log
    assert f"train.duration 1000000 steps -> {stopped + 20} steps" in log
    assert newest(folder / "runs" / "stopped").step == stopped + 20
