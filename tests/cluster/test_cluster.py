"""The runner: resources, signals, errors, logs; two real fits on Ray, with a worker killed in the first."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elmo_ray.checkpoints import write as ck
from elmo_ray.checkpoints.manifest import directory_name, streams_name
from elmo_ray.checkpoints.read import newest_checkpoint
from elmo_ray.cluster import session
from elmo_ray.cluster import trainer as cluster
from elmo_ray.cluster.logs import LogFollower, log_to_run
from elmo_ray.config import ClusterConfig, PretrainConfig
from elmo_ray.data.corpus import Corpus
from elmo_ray.data.scan import index_shard
from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary
from elmo_ray.errors import ConfigError, DataError, TrainingError
from elmo_ray.training.plan import TrainPlan, Worker


def make_plan(folder: Path, **cluster_keys: Any) -> TrainPlan:
    text = folder / "text.txt"
    text.write_text("a b c d e f g\nh i j a b\n" * 2000, encoding="utf-8")
    Corpus.from_shards([index_shard(str(text), 4096)]).save(folder / "corpus.npz")
    Vocabulary.from_words([*SPECIAL_WORDS, "a", "b", "c"]).write(folder / "vocab.txt")
    config = PretrainConfig.from_dict({"data": {"train": [str(text)]}, "cluster": cluster_keys})
    run_dir = folder / "runs" / "a run"
    return TrainPlan(config, str(run_dir), str(folder / "corpus.npz"), None, str(folder / "vocab.txt"))


# ---------------------------------------------------------------- Ray's start


@pytest.mark.parametrize("folder", ["/proc", "deep/" * 20])
def test_a_folder_in_which_ray_cannot_keep_its_files_is_one_line(folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    program = "from elmo_ray.cluster.session import ensure_ray\nfrom elmo_ray.errors import ElmoRayError\n"
    program += "try: ensure_ray()\nexcept ElmoRayError as error: print(type(error).__name__, error)"
    environment = {**os.environ, "RAY_TMPDIR": str(tmp_path / folder)}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout.startswith("ConfigError Ray cannot keep its files"), done.stderr
    assert "set RAY_TMPDIR" in done.stdout and "trying once more" not in done.stderr


# ---------------------------------------------------------------- resources


def fits_by_trial(cpus: list[int], gpus: list[int], workers: int, worker: int, task: int) -> bool:
    for counts in itertools.product(*(range(min(gpu, workers) + 1) for gpu in gpus)):
        rest = [cpu - n * worker for cpu, n in zip(cpus, counts, strict=True)]
        if sum(counts) == workers and min(rest) >= 0 and sum(r // task for r in rest) >= workers:
            return True
    return False


@given(
    nodes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=4),
    workers=st.integers(1, 5),
    worker=st.integers(1, 4),
    task=st.integers(1, 4),
)
def test_placement_is_found_if_there_is_one(nodes: list[tuple[int, int]], workers: int, worker: int, task: int) -> None:
    cpus, gpus = [node[0] for node in nodes], [node[1] for node in nodes]
    expected = fits_by_trial(cpus, gpus, workers, worker, task)
    whole = [session.Node(float(cpu), gpu) for cpu, gpu in zip(cpus, gpus, strict=True)]
    assert session.fits(whole, "gpu", workers, worker, task) == expected
    tenths = [session.Node(cpu / 10, gpu) for cpu, gpu in zip(cpus, gpus, strict=True)]
    assert session.fits(tenths, "gpu", workers, worker / 10, task / 10) == expected
    plenty = fits_by_trial(cpus, [workers] * len(cpus), workers, worker, task)
    assert session.fits(whole, "cpu", workers, worker, task) == plenty


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_resources_of_the_cluster(caplog: pytest.LogCaptureFixture) -> None:
    def check(**keys: Any) -> str:
        return session.check_cluster(ClusterConfig(**keys))

    assert check(workers=2) == "cpu"
    assert check(workers=4, cpus_per_worker=0.75, data_cpus=0.25, device="cpu") == "cpu"
    with pytest.raises(ConfigError, match=r"cluster\.workers=8 .*needs 6 CPUs, the Ray cluster has 4 on 1 node"):
        check(workers=8)
    with pytest.raises(ConfigError, match=r"cluster\.device=gpu: cluster\.workers=2 needs a GPU each.* has 0"):
        check(workers=2, device="gpu")
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    others = placement_group([{"CPU": 3.5}])
    ray.get(others.ready())
    caplog.clear()
    deadline = time.monotonic() + 20
    while not caplog.records and time.monotonic() < deadline:
        assert check(workers=2) == "cpu"
    remove_placement_group(others)
    assert "only 0.5 CPUs are free" in caplog.text


_POLICIES = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[1].split(os.pathsep)
from test_cluster import make_plan
from elmo_ray.cluster.trainer import fit

def policies(plan, worker):
    return {"found": [os.sched_getscheduler(pid) for pid in (0, os.getpid(), os.getppid())]}

if __name__ == "__main__":
    found = fit(make_plan(Path(sys.argv[2]), workers=1), policies)["found"]
    print(os.sched_getscheduler(0), *found, os.sched_getscheduler(0))
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux only")
def test_training_is_more_urgent_than_the_other_processes_of_a_cluster_of_its_own(tmp_path: Path) -> None:
    script = tmp_path / "policies.py"
    script.write_text(_POLICIES, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, str(script), os.pathsep.join(map(str, Path(__file__).parents[:2])), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    # the driver, the thread that trains, its process's main thread, which takes Ray's messages, the raylet, the driver
    expected = [os.SCHED_OTHER, os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_BATCH, os.SCHED_OTHER]
    assert [int(word) for word in done.stdout.split()] == expected


def test_an_address_where_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        session._check_address(address)
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS={address}: no Ray cluster"):
        session._check_address(address)
    for other in ("auto", "local", "ray://somewhere:10001", "127.0.0.1:99999999"):
        with contextlib.nullcontext() if "9999" not in other else pytest.raises(ConfigError):
            session._check_address(other)


# ---------------------------------------------------------------- in this process


def test_without_ray_in_this_process(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, workers=0, device="cpu")
    corpus = Corpus.load(plan.corpus_path)
    seen: list[Any] = []

    def function(plan: TrainPlan, worker: Worker) -> dict[str, Any]:
        seen.extend(worker.source(iter(corpus.blocks())))
        worker.register(1, "nowhere", {})
        return {"rank": worker.rank, "world": worker.world, "device": worker.device.type}

    assert cluster.fit(plan, function) == {"rank": 0, "world": 1, "device": "cpu"}
    assert sum(block.positions for block in seen) == corpus.positions

    def failing(plan: TrainPlan, worker: Worker) -> dict[str, Any]:
        raise DataError("text.txt, line 3: bad")

    with pytest.raises(DataError, match="line 3"):
        cluster.fit(plan, failing)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_to_stop(
    tmp_path: Path, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_plan(tmp_path, workers=0, device="cpu")
    stop_file = Path(plan.run_dir) / "stop"
    before = signal.getsignal(number)

    def function(plan: TrainPlan, worker: Worker) -> dict[str, Any]:
        assert not worker.stop_requested(), "a stop file of an earlier run counts for nothing"
        assert signal.getsignal(number) != before
        os.kill(os.getpid(), number)
        time.sleep(0.1)
        assert signal.getsignal(number) == before, "the second signal does what it always did"
        deadline = time.monotonic() + 10
        while not worker.stop_requested():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return {"stopped": True}

    stop_file.parent.mkdir(parents=True)
    stop_file.touch()
    assert cluster.fit(plan, function) == {"stopped": True}
    assert signal.getsignal(number) == before
    assert not stop_file.exists()
    assert number.name in caplog.text


_OUTLAST = """
import os, signal, threading
from elmo_ray.cluster.stopping import outlast_sigterm
signal.signal(signal.SIGTERM, lambda *_: os._exit(3))  # as Ray does in its processes
thread = threading.Thread(target=outlast_sigterm)
thread.start()
thread.join()
os.kill(os.getpid(), signal.SIGTERM)
print("goes on")
"""


def test_a_process_of_ray_outlasts_sigterm() -> None:
    """Ray calls our code in threads, in which Python's own signal.signal fails."""
    done = subprocess.run([sys.executable, "-c", _OUTLAST], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "goes on\n"), done.stderr


def test_logs_of_workers_are_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    package = logging.getLogger("elmo_ray")
    before = (package.level, package.handlers, package.propagate)
    follower = LogFollower(str(tmp_path))
    follower.poll()
    try:
        for rank in (0, 1, None):
            log_to_run(str(tmp_path), rank)
            log = logging.getLogger("elmo_ray.training.loop")
            log.info("step %s", rank)
            log.warning("first line of %s\nsecond line", rank)
            package.handlers[0].close()
    finally:
        package.level, package.handlers, package.propagate = before
    with open(tmp_path / "logs" / "worker-00000.log", "a") as file:
        file.write("2025-01-01 00:00:00 ERROR not yet who")
    with caplog.at_level(logging.INFO):
        follower.poll()
        follower.poll()
    seen = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert seen == [
        ("INFO", "step None"),
        ("WARNING", "first line of None"),
        ("WARNING", "second line"),
        ("INFO", "step 0"),
        ("WARNING", "first line of 0"),
        ("WARNING", "second line"),
        ("WARNING", "worker 1: first line of 1"),
        ("WARNING", "second line"),
    ]
    caplog.clear()
    with open(tmp_path / "logs" / "worker-00000.log", "a") as file:
        file.write("le\n")
    follower.poll()
    LogFollower(str(tmp_path)).poll()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("ERROR", "not yet whole")]


# ---------------------------------------------------------------- on Ray


def eventful(plan: TrainPlan, worker: Worker) -> dict[str, Any]:
    """Registers a checkpoint, deletes it, loses rank 1; in its second life registers another and waits for a stop."""
    import torch.distributed as dist

    log = logging.getLogger("elmo_ray.test")
    run_dir = Path(plan.run_dir)
    marker = run_dir / "killed"
    second = marker.exists()
    total = torch.tensor([float(worker.rank)])
    dist.all_reduce(total)
    corpus = Corpus.load(plan.corpus_path)
    positions = sum(block.positions for block in worker.source(iter(corpus.blocks())))
    log.info("life %d of rank %d", 1 + second, worker.rank)
    log.warning("warning of rank %d", worker.rank)
    step = 2 if second else 1
    folder = run_dir / "checkpoints" / directory_name(step, 1 + second)
    ck.write_rank_files(folder, worker.rank, {streams_name(worker.rank, worker.rank + 1): {"s": torch.zeros(1)}}, {})
    dist.barrier()
    if worker.rank == 0:
        ck.commit(folder, worker.world, {"step": step, "streams": worker.world})
    dist.barrier()
    worker.register(step, str(folder), {"step": step})
    if not second:
        dist.barrier()
        if worker.rank == 0:
            ck.discard(folder)
        else:
            time.sleep(3)  # the controller has taken the report
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()
    (run_dir / "ready").touch()
    deadline = time.monotonic() + 60
    while not worker.stop_requested() and time.monotonic() < deadline:
        time.sleep(0.1)
    return {
        "total": float(total),
        "positions": positions,
        "device": worker.device.type,
        "stopped": worker.stop_requested(),
        "threads": torch.get_num_threads(),
    }


def in_error(plan: TrainPlan, worker: Worker) -> dict[str, Any]:
    raise DataError(f"text.txt, line 7: bad for rank {worker.rank}")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_run_on_ray(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    plan = make_plan(tmp_path, workers=2, max_failures=1, threads=2)
    run_dir = Path(plan.run_dir)

    def stop_when_ready() -> None:
        while not (run_dir / "ready").exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_ready, daemon=True).start()
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with caplog.at_level(logging.INFO, "elmo_ray"):
        result = cluster.fit(plan, eventful)
    positions = Corpus.load(plan.corpus_path).positions
    assert result == {"total": 1.0, "positions": positions, "device": "cpu", "stopped": True, "threads": 2}
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    messages = [record.getMessage() for record in caplog.records]
    for expected in ("life 1 of rank 0", "life 2 of rank 0", "warning of rank 0", "worker 1: warning of rank 1"):
        assert expected in messages
    assert "life 1 of rank 1" not in messages
    assert any(message.startswith("failure 1 of 1: restarting all: worker") for message in messages)
    assert any(message.startswith("SIGTERM: training stops") for message in messages)
    newest = newest_checkpoint(run_dir / "checkpoints")
    assert newest is not None and newest.step == 2
    assert not (run_dir / "checkpoint_manager_snapshot.json").exists(), "Ray writes nothing there that could fail"

    # A registered checkpoint is gone, as after a repair by hand, and the next start must not mind.
    ck.discard(newest.path)
    with pytest.raises(DataError, match="line 7: bad for rank 0"):
        cluster.fit(plan, in_error)


@pytest.mark.ray
@pytest.mark.slow
def test_errors_of_ray_become_one_line(caplog: pytest.LogCaptureFixture) -> None:
    from ray.train import ControllerError, WorkerGroupError

    session.ensure_ray()  # the errors name the nodes
    try:
        raise ValueError("bad\nshape [2, 3]")
    except ValueError as problem:
        error = WorkerGroupError("failed", {1: problem})
    settings = ClusterConfig(workers=2, max_failures=3)
    told = cluster._training_error(error, settings)
    assert isinstance(told, TrainingError)
    assert "cluster.max_failures=3 times; last, worker 1: ValueError: shape [2, 3]" in str(told)
    assert "\n" not in str(told)
    assert "Traceback" in caplog.text, "the whole of it is in the log"
    told = cluster._training_error(ControllerError(TimeoutError("no room")), settings)
    assert "cluster.workers=2 with cluster.cpus_per_worker=0.5: TimeoutError: no room" in str(told)
