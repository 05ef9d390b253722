"""Mistakes in the settings of trackers: one line each, before anything is written."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from elmo_ray import pretrain, report
from elmo_ray.config.training import TRACKERS
from elmo_ray.training.metrics import MetricsWriter


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str], main: object = pretrain.main) -> str:
    assert callable(main) and main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


def test_an_unknown_tracker(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = "must be among tensorboard, wandb, mlflow"
    assert f"run.report_to=comet: {known}" in error_of([str(config), "run.report_to=comet"], capsys)
    assert "run.report_to" in error_of([str(config), "run.report_to=[mlflow, 7]", "--dry-run"], capsys)
    assert "to=tensorboard: must be among wandb, mlflow" in error_of(["run", "to=tensorboard"], capsys, report.main)


@pytest.mark.parametrize("name", TRACKERS)
@pytest.mark.parametrize("dry", [True, False])
def test_a_package_that_is_missing(
    name: str, dry: bool, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    # W&B makes such a folder in the working folder, and Python takes it for a package
    (config.parent / name).mkdir()
    monkeypatch.chdir(config.parent)
    monkeypatch.syspath_prepend(str(config.parent))
    error = error_of([str(config), f"run.report_to={name}", *["--dry-run"] * dry], capsys)
    assert f"run.report_to={name}: {name} is not installed: pip install 'elmo-ray[{name}]'" in error
    assert not (config.parent / "runs").exists()
    with MetricsWriter(config.parent / "run", 1) as writer:
        writer.write({"kind": "train", "step": 1, "loss": 1.0})
    if name != "tensorboard":
        assert f"to={name}: {name} is not installed" in error_of(["run", f"to={name}"], capsys, report.main)


def test_mlflow_without_an_address(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "set MLFLOW_TRACKING_URI" in error_of([str(config), "run.report_to=mlflow"], capsys)
    assert not (config.parent / "runs").exists()
