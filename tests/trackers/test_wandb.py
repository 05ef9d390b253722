"""Runs in W&B's offline mode, read back from the files that its library writes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.mlflow_server import wait_for
from helpers.wandb_server import WandbServer

from elmo_ray import pretrain
from elmo_ray.storage.local_copy import local_copy_of
from elmo_ray.trackers.beside import following
from elmo_ray.trackers.sender import read_memory, send_rest
from elmo_ray.training.metrics import MetricsWriter, read_metrics

pytest.importorskip("wandb", reason="wandb is not installed")
from elmo_ray.trackers.to_wandb import rows_of


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def files_of(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [row for path in files_of(run_dir) for row in rows_of(path)]


def points(run_dir: Path, name: str) -> list[tuple[int, float]]:
    """Steps and values of a metric, in the order in which they were written."""
    kind = name.split("/")[0]
    return [(row[f"{kind}/step"], row[name]) for row in rows(run_dir) if name in row]


def test_a_run_and_its_resume_are_one_run(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert pretrain.main([str(config), "run.report_to=wandb"]) == 0
    assert pretrain.main([str(config), "run.report_to=wandb", "train.duration=60 steps", "--resume"]) == 0
    run_dir = config.parent / "runs" / "tiny"
    records = read_metrics(run_dir)
    for kind in ("train", "valid"):
        for name in ("loss", "perplexity_backward"):
            expected = [(r["step"], pytest.approx(r[name])) for r in records if r["kind"] == kind]
            assert expected and points(run_dir, f"{kind}/{name}") == expected
    files = files_of(run_dir)
    assert len(files) == 2 and len({path.name for path in files}) == 1, "one run of W&B, in a part for each start"
    numbers = [row["_step"] for row in rows(run_dir)]
    assert numbers == list(range(len(numbers))), "the second part goes on after the first"
    (table,) = [row for row in rows_of(files[1]) if "evaluation/path" in row]
    assert table["evaluation/_type"] == "table-file" and table["evaluation/nrows"] == 3
    assert any("pictures/curve/path" in row for row in rows_of(files[1]))
    saved = {path.name for path in (files[1].parent / "files" / "tiny").iterdir()}
    assert saved >= {"config.yaml", "result.json", "report.html"}
    assert f"python -m elmo_ray.report {run_dir} to=wandb" in caplog.text
    assert not [record for record in caplog.records if "not sent" in record.message]


def test_what_a_killed_process_had_not_written_is_sent_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    def write(attempt: int, *steps: int) -> None:
        with MetricsWriter(run_dir, attempt) as writer:
            for step in steps:
                writer.write({"kind": "train", "step": step, "loss": 1.0 + attempt})

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "elmo_ray.trackers", str(run_dir), "wandb", "run"],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip

    write(1, *range(10, 310, 10))
    process = start()
    wait_for("the first steps", lambda: read_memory(run_dir, "wandb").steps == {"train": 300})
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    write(2, 290, 300, 310, 320)  # from a checkpoint of step 280
    process = start()
    wait_for("the next steps", lambda: read_memory(run_dir, "wandb").steps == {"train": 320})
    process.communicate("finished\n", timeout=60)
    assert process.returncode == 0
    assert [step for step, _ in points(run_dir, "train/loss")] == list(range(10, 330, 10))


def test_a_run_in_an_object_store_keeps_there_what_is_remembered() -> None:
    from elmo_ray import storage

    place = f"memory://trackers-{os.getpid()}/run"
    folder = local_copy_of(place).folder
    for attempt, steps in ((1, (10, 20)), (2, (20, 30))):
        with following(place, ["wandb"]):
            with MetricsWriter(folder, attempt) as writer:
                for step in steps:
                    writer.write({"kind": "train", "step": step, "loss": 1.0 + attempt})
        # as another machine begins, but for the metrics, which belong to no tracker
        for name in ("trackers", "wandb"):
            shutil.rmtree(folder / name)
    names = storage.listing(place)
    assert "trackers/wandb.json" in names and sum(name.endswith(".wandb") for name in names) == 2
    local_copy_of(place).pull("wandb/*")
    assert points(folder, "train/loss") == [(10, 2.0), (20, 2.0), (30, 3.0)]


@pytest.mark.slow
def test_what_a_server_did_not_take_is_sent_by_the_next_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    server, run_dir = WandbServer(), tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("optim: {lr: 0.25}\n")
    monkeypatch.setenv("WANDB_BASE_URL", server.address)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)

    def write(attempt: int, *steps: int) -> None:
        with MetricsWriter(run_dir, attempt) as writer:
            for step in steps:
                writer.write({"kind": "train", "step": step, "loss": 1.0 + attempt})

    def received() -> list[int]:
        assert len(server.rows) < 2, "one run"
        return [row["train/step"] for rows in server.rows.values() for row in rows]

    for attempt, steps in ((1, (10, 20)), (2, (20, 30))):  # offline
        with following(str(run_dir), ["wandb"]):
            write(attempt, *steps)
    assert received() == []
    monkeypatch.setenv("WANDB_MODE", "online")
    assert server.address in send_rest(str(run_dir), "wandb")
    assert received() == [10, 20, 30] and "run/config.yaml" in server.files
    (run,) = server.runs.values()
    assert json.loads(run["config"])["optim.lr"]["value"] == 0.25
    with following(str(run_dir), ["wandb"]):
        wait_for("the run's address", lambda: f"{server.address}/me/elmo_ray/runs" in caplog.text)
        server.away = True
        write(3, 30, 40)
        wait_for("the record", lambda: read_memory(run_dir, "wandb").steps == {"train": 40})
    assert "not sent" in caplog.text and received() == [10, 20, 30]
    server.away = False
    with following(str(run_dir), ["wandb"]):
        write(4, 50)
    assert received() == [10, 20, 30, 40, 50] and not server.problems
    server.close()
    assert not list((tmp_path / "here").iterdir()), "nothing is written outside of the run"


@pytest.mark.slow
def test_a_wrong_server_ends_with_one_line(config: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert pretrain.main([str(config), "run.report_to=wandb", "data.test=null", "train.duration=20 steps"]) == 0
    (line,) = [record.message for record in caplog.records if "not sent" in record.message]
    assert line.startswith("wandb: ") and "to=wandb" in line and "\n" not in line
    result = json.loads((config.parent / "runs" / "tiny" / "result.json").read_text())
    assert result["finished"]
