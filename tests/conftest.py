"""What all tests share: the folder of references, and one Ray session for the few tests that need it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from helpers.ray_clusters import NO_DASHBOARD

# Before anything imports Ray: without it a token is written to the home directory and usage is reported.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Small models on few cores: a second thread costs more than it gives, and two of them spin against each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray notes there the cluster that was started last, and gives jobs of another one that address: each test process has a
# folder of its own. Its name is short, for the paths of Ray's sockets have at most 107 characters.
RAY_FOLDER = Path(f"/tmp/ray-tests-{os.getpid()}")
os.environ["RAY_TMPDIR"] = str(RAY_FOLDER)

# An example that takes long tells of the machine's load and not of a defect.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from all tests but those of GPUs: elsewhere `device=auto` must mean a CPU on every machine."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_sessionfinish(exitstatus: int) -> None:
    """Leave Ray's logs only where a test has failed."""
    if exitstatus == pytest.ExitCode.OK:
        shutil.rmtree(RAY_FOLDER, ignore_errors=True)


# Files of minutes. They come first, so that of two processes none has one of them left at the end.
LONG_FILES = ("test_soak_short.py", "test_slurm.py", "test_sweep.py", "test_two_hosts.py", "test_elastic.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the files that take longest to the front."""
    place = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG_FILES)))


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden values and corpora; tests that need it are skipped where it is not there."""
    folder = Path(os.environ.get("ELMO_SHARED") or REPOSITORY.parent / "shared")
    if not (folder / "golden").is_dir():
        pytest.skip(f"no reference values in {folder} (set ELMO_SHARED)")
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One small local Ray for the whole session: 4 CPUs to reserve, 200 MB of object store."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=0,
        object_store_memory=200_000_000,
        **NO_DASHBOARD,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()
