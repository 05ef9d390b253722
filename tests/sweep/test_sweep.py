"""A sweep on Ray Tune, killed with -9 and resumed: three trials of finetune, one of which fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.tiny_runs import newest
from helpers.verbs_at_work import sentence_bytes, write_texts

from elmo_ray import finetune, pretrain, sweep
from elmo_ray.checkpoints.source import open_source
from elmo_ray.config import PretrainConfig
from elmo_ray.config.command_line import Flags, load_config
from elmo_ray.config.finetune import FinetuneConfig
from elmo_ray.errors import ConfigError
from elmo_ray.report.trials import read_trials
from elmo_ray.sweep.config import SweepConfig
from elmo_ray.training.metrics import read_metrics

SECONDS = 240


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A sweep's file, and the model that it begins with."""
    pretrain.run(load_config(write_texts(tmp_path), ["train.duration=20 steps"], PretrainConfig))
    (tmp_path / "domain.txt").write_bytes(sentence_bytes(80, 7))
    (tmp_path / "valid.txt").write_bytes(sentence_bytes(12, 8))
    values: dict[str, Any] = {
        "run": {"name": "sweep", "storage_path": str(tmp_path / "runs")},
        "init": {"from": str(tmp_path / "runs" / "tiny")},
        "data": {
            "train": str(tmp_path / "domain.txt"),
            "valid": str(tmp_path / "valid.txt"),
            "streams": 4,
            "block_bytes": 4096,
        },
        "softmax": {"negatives": 8},
        "train": {
            "unroll": 8,
            "duration": "60 steps",
            "validate_every": "20 steps",
            "log_every": 20,
            "checkpoint_every": "20 steps",
        },
        "evaluate": {"streams": 2},
        "cluster": {"workers": 1, "cpus_per_worker": 0.2, "data_cpus": 0.1},
        "sweep": {
            "trials": 3,
            "search": "grid",
            "scheduler": None,
            "space": {"optim.lr": {"grid": [0.05, 1e30]}},
        },
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    return path


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_its_best_comes_again(config: Path) -> None:
    folder = config.parent / "runs" / "sweep"
    command = [sys.executable, "-m", "elmo_ray.sweep", str(config), "--resume"]
    environment = {**os.environ, "PYTHONPATH": str(Path(sweep.__file__).parents[2])}
    with open(config.parent / "log.txt", "wb") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        deadline = time.monotonic() + SECONDS
        while not any((folder / "trials").glob("*/checkpoints/step-000000[246]0-*/manifest.json")):
            assert first.poll() is None and time.monotonic() < deadline, (config.parent / "log.txt").read_text()
            time.sleep(0.2)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        begun = {trial.number for trial in read_trials(folder) if trial.records}
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=log, env=environment, timeout=SECONDS, check=False
        )
    assert done.returncode == 0, (config.parent / "log.txt").read_text()
    shown = done.stdout.decode()

    results = json.loads((folder / "results.json").read_text())
    assert [trial["status"] for trial in results["trials"]] == ["finished", "finished", "failed"]
    assert "trial 2 failed: step" in shown and "not finite" in shown and "best: trial" in shown
    attempts = [read_metrics(trial.folder) for trial in read_trials(folder)]
    starts = [
        [r["message"] for r in records if r["kind"] == "event" and "start:" in r["message"]] for records in attempts
    ]
    assert any("resume from step" in message for number in begun for message in starts[number])
    assert all("initialised from" in messages[0] for messages in starts)
    assert all((folder / name).is_file() for name in ("results.csv", "sweep.png", "best.yaml", "export/weights.hdf5"))

    best = results["trials"][results["best"]]
    again = load_config(folder / "best.yaml", ["cluster.workers=0"], FinetuneConfig)
    assert again.cluster.threads is not None
    result = finetune.run(again)
    assert isinstance(result, pretrain.PretrainResult)
    assert result.training["best_perplexity"] == pytest.approx(best["best_perplexity"], rel=1e-6)
    ours = open_source(folder)
    assert ours.step == best["best_step"] and ours.fingerprint == open_source(result.run_dir).fingerprint
    assert newest(Path(result.run_dir)).step == 60


@pytest.mark.ray
@pytest.mark.slow
def test_a_sweep_that_is_stopped_says_so_and_goes_on(config: Path) -> None:
    """SIGINT while trials train, twice: the second session goes on with the trials of the first."""
    folder = config.parent / "runs" / "sweep"
    command = [
        sys.executable, "-m", "elmo_ray.sweep", str(config), "--resume", "train.duration=1000000 steps",
        "sweep.concurrent=1", "train.checkpoint_every=100000 steps", "sweep.space={optim.lr: {grid: [0.05, 0.1]}}",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(sweep.__file__).parents[2])}
    steps = 0
    for _ in range(2):
        with open(config.parent / "log.txt", "wb") as log:
            driver = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + SECONDS
        while not (folder / "trials").is_dir() or read_trials(folder)[0].step <= steps:
            assert driver.poll() is None and time.monotonic() < deadline, (config.parent / "log.txt").read_text()
            time.sleep(0.2)
        driver.send_signal(signal.SIGINT)
        shown = driver.communicate(timeout=SECONDS)[0].decode()
        said = (config.parent / "log.txt").read_text()
        assert driver.returncode == 130, said
        assert "stopped; the same command with --resume goes on" in shown and "best so far: trial 0" in shown
        assert not any(sign in shown + said for sign in "╭│\033"), "tables and colours of Tune and Ray"
        results = json.loads((folder / "results.json").read_text())
        assert results["interrupted"] and [each["status"] for each in results["trials"]] == [
            "interrupted",
            "waiting",
            "waiting",
        ]
        assert [each["values"] for each in results["trials"]] == [{"optim.lr": rate} for rate in (0.2, 0.05, 0.1)]
        assert results["trials"][0]["seconds"] > 0
        assert not any((folder / name).exists() for name in ("best", "export", "best.yaml"))
        steps = results["trials"][0]["steps"]
        assert newest(folder / "trials" / "trial-000").step >= steps > 0
    messages = [r["message"] for r in read_metrics(folder / "trials" / "trial-000") if r["kind"] == "event"]
    assert any("resume from step" in message for message in messages)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["sweep.concurrent=9", "cluster.workers=2", "cluster.cpus_per_worker=0.5"],
            "sweep.concurrent=9: only [1-8] fit: a trial needs",
        ),
        (["cluster.cpus_per_worker=50"], "cluster.cpus_per_worker=50"),
    ],
)
def test_trials_that_cannot_run_beside_each_other_are_refused(config: Path, changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        sweep.run(load_config(config, changes, SweepConfig))
    assert "CPUs" in str(caught.value)
    assert not (config.parent / "runs" / "sweep").exists()


def test_another_sweep_does_not_go_on_with_this_one(config: Path) -> None:
    folder = config.parent / "runs" / "sweep"
    folder.mkdir()
    (folder / "config.yaml").touch()
    loaded = load_config(config, [], SweepConfig)
    note = {"config": loaded.tree(), "sweep": loaded.sweep.to_dict(), "source": "another"}
    (folder / "sweep.json").write_text(json.dumps(note))
    with pytest.raises(ConfigError) as caught:
        sweep.run(load_config(config, ["optim.clip_norm=3", "sweep.trials=4"], SweepConfig), Flags(resume=True))
    keys = {line.split(" ")[0] for line in str(caught.value).split("\n")}
    assert keys == {"optim.clip_norm", "sweep.trials", "source"}
