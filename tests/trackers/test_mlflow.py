"""Runs in a real MLflow server: over resumes, while it is away, and when it answers too late."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.mlflow_server import MlflowServer, wait_for

from elmo_ray import pretrain, report
from elmo_ray.trackers.beside import following
from elmo_ray.trackers.sender import Sender, read_memory
from elmo_ray.training.metrics import MetricsWriter, read_metrics

pytestmark = pytest.mark.slow


def client_of(server: MlflowServer) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(server.address)


def runs_of(server: MlflowServer) -> list[Any]:
    client = client_of(server)
    experiment = client.get_experiment_by_name("elmo_ray")
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id]))


def history(server: MlflowServer, name: str) -> list[tuple[int, float]]:
    """Steps and values of a metric of the only run, in the order of steps."""
    found = runs_of(server)
    if not found:
        return []
    (run,) = found
    metrics = client_of(server).get_metric_history(run.info.run_id, name)
    return sorted((metric.step, metric.value) for metric in metrics)


def write(folder: Path, attempt: int, first: int, *steps: int) -> None:
    with MetricsWriter(folder, attempt) as writer:
        writer.write({"kind": "event", "step": first, "message": "start"})
        for step in steps:
            writer.write({"kind": "train", "step": step, "positions": step * 10, "loss": 1.0 + attempt})


def test_a_run_and_its_resume_are_one_run_there(
    mlflow_server: MlflowServer, config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow_server.start()
    assert pretrain.main([str(config), "run.report_to=mlflow"]) == 0
    longer = ["train.duration=60 steps", "train.log_every=5", "--resume"]
    assert pretrain.main([str(config), "run.report_to=[mlflow, tensorboard]", *longer]) == 0
    run_dir = config.parent / "runs" / "tiny"
    records = read_metrics(run_dir)
    for kind in ("train", "valid"):
        for name in ("loss", "positions", "perplexity_forward"):
            expected = [(r["step"], pytest.approx(r[name])) for r in records if r["kind"] == kind]
            assert expected and history(mlflow_server, f"{kind}/{name}") == expected
    (run,) = runs_of(mlflow_server)
    assert run.info.run_name == "tiny" and run.info.status == "FINISHED"
    times = [record["time"] * 1000 for record in records]
    assert (run.info.start_time, run.info.end_time) == (round(min(times)), round(max(times))), "those of the training"
    assert run.data.params["model.lstm.dim"] == "16" and run.data.params["train.log_every"] == "10"
    assert run.data.tags["now train.log_every"] == "5", "a parameter of MLflow cannot change"
    result = json.loads((run_dir / "result.json").read_text())
    assert run.data.metrics["test/perplexity"] == pytest.approx(result["evaluation"]["perplexity"])
    client = client_of(mlflow_server)
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files >= {"config.yaml", "result.json", "report.html", "curve.png", "evaluation.json"}
    assert Path(client.download_artifacts(run.info.run_id, "curve.png")).read_bytes().startswith(b"\x89PNG")
    assert "60 steps" in Path(client.download_artifacts(run.info.run_id, "config.yaml")).read_text()
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "evaluation.json")).read_text())
    assert "perplexity" in table["columns"] and table["data"][-2][0] == "all"
    assert not [r for r in caplog.records if "mlflow" in r.message and r.levelname == "WARNING"]


def test_steps_that_a_resume_repeats_are_sent_once(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    mlflow_server.start()
    run_dir = tmp_path / "run"
    write(run_dir, 1, 0, 10, 20, 30, 40)
    sender = Sender(run_dir, "mlflow", "run")
    assert sender.send() == 4 and sender.send() == 0
    write(run_dir, 2, 20, 30, 40, 50)
    assert sender.send() == 1
    # what this machine remembers may be older than what the server has, or be lost but for the mark of the run
    remembered = run_dir / "trackers" / "mlflow.json"
    values = json.loads(remembered.read_text())
    remembered.write_text(json.dumps({"key": values["key"]}))
    write(run_dir, 3, 50, 60)
    assert Sender(run_dir, "mlflow", "run").send() == 1
    expected = [(10, 2.0), (20, 2.0), (30, 2.0), (40, 2.0), (50, 3.0), (60, 4.0)]
    assert history(mlflow_server, "train/loss") == expected


def test_a_tracker_that_is_away_is_told_and_caught_up(
    mlflow_server: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run_dir = tmp_path / "run"
    with following(str(run_dir), ["mlflow"]):
        write(run_dir, 1, 0, 10, 20)
        wait_for("a warning", lambda: "training goes on" in caplog.text)
        mlflow_server.start()
        wait_for("the first steps", lambda: len(history(mlflow_server, "train/loss")) == 2)
        write(run_dir, 2, 20, 30)
        wait_for("the next step", lambda: len(history(mlflow_server, "train/loss")) == 3)
        mlflow_server.stop()
        write(run_dir, 3, 30, 40)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) in (2, 3) and all("127.0.0.1" in line and "\n" not in line for line in warnings)
    assert "1 records and 0 files are not sent" in warnings[-1]
    assert f"python -m elmo_ray.report {run_dir} to=mlflow" in warnings[-1]
    mlflow_server.start()
    with following(str(run_dir), ["mlflow"]):
        pass
    assert [step for step, _ in history(mlflow_server, "train/loss")] == [10, 20, 30, 40]


def test_training_does_not_wait_for_a_tracker(
    mlflow_server: MlflowServer,
    config: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # a server that takes connections and never says a word
    with socket.create_server(("127.0.0.1", mlflow_server.port)), monkeypatch.context() as impatient:
        impatient.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
        begun = time.monotonic()
        assert pretrain.main([str(config), "run.report_to=mlflow", "data.test=null"]) == 0
        assert time.monotonic() - begun < 60
    run_dir = config.parent / "runs" / "tiny"
    records = [record for record in read_metrics(run_dir) if record["kind"] == "train"]
    assert [record["step"] for record in records] == [10, 20, 30]
    (last,) = [record.message for record in caplog.records if "not sent" in record.message]
    assert "5 records and" in last and "to=mlflow" in last
    assert report.main([str(run_dir), "to=mlflow"]) == 2, "it is away"
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert mlflow_server.address in error
    mlflow_server.start()
    assert report.main([str(run_dir), "to=mlflow"]) == 0
    assert "(5 new records)" in capsys.readouterr().out
    assert [step for step, _ in history(mlflow_server, "train/loss")] == [10, 20, 30]
    assert read_memory(run_dir, "mlflow").steps == {"train": 30, "valid": 30}


def test_two_processes_do_not_send_at_once(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    mlflow_server.start()
    run_dir = tmp_path / "run"
    write(run_dir, 1, 0, *range(10, 500, 10))
    threads = []

    def follow() -> None:
        with following(str(run_dir), ["mlflow"]):
            pass

    for _ in range(2):
        threads.append(threading.Thread(target=follow))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert [step for step, _ in history(mlflow_server, "train/loss")] == list(range(10, 500, 10))
