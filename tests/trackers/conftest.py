"""A server and a small run for the tests of trackers."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers.mlflow_server import MlflowServer
from helpers.tiny_runs import sentences, tiny_values


@pytest.fixture
def mlflow_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    """A server that is not started yet, whose address is in MLFLOW_TRACKING_URI."""
    try:
        importlib.metadata.version("mlflow")  # the extra `mlflow` installs mlflow-skinny, the client alone
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the whole of MLflow, which has the server, is not installed")
    folder = tmp_path / "server"
    folder.mkdir()
    server = MlflowServer(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    yield server
    server.stop()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration with its own text that trains 30 steps in a second, without Ray."""
    for name, count in {"train": 200, "valid": 40, "test": 30}.items():
        (tmp_path / f"{name}.txt").write_text("".join(s + "\n" for s in sentences(count, seed=count)))
    values = tiny_values(
        run__name="tiny", run__storage_path=str(tmp_path / "runs"), train__duration="30 steps", train__log_every=10,
        train__validate_every="15 steps", train__checkpoint_every="15 steps", data__valid=str(tmp_path / "valid.txt"),
        data__test=str(tmp_path / "test.txt"), data__train=str(tmp_path / "train.txt"),
    )  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
