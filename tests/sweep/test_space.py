"""What a sweep tries: settings, draws, and the trials as they are on the disk; no Ray."""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elmo_ray.config import PretrainConfig
from elmo_ray.config.command_line import Flags, load_config
from elmo_ray.config.finetune import FinetuneConfig
from elmo_ray.errors import ConfigError
from elmo_ray.report.trials import FAILED, FINISHED, INTERRUPTED, STOPPED, Trial, read_trials, table
from elmo_ray.sweep import best_yaml, run, tuning
from elmo_ray.sweep.config import SweepConfig, draw_trials, parse_domain
from elmo_ray.sweep.picture import draw
from elmo_ray.sweep.trials import add_trial, best_of, end_trial, results, try_lost_again, write_results
from elmo_ray.sweep.tuning import SignsOfLife
from elmo_ray.training.metrics import MetricsWriter

SPACE = {"optim.lr": {"loguniform": [0.01, 1]}, "train.freeze": {"choice": [[], ["lstm.0"]]}}


def sweep_config(space: dict[str, Any] | None = None, **sweep: Any) -> SweepConfig:
    return SweepConfig.from_dict(
        {
            "data": {"train": "t.txt", "valid": "v.txt"},
            "init": {"from": "source"},
            "cluster": {"workers": 1},
            "sweep": {"space": SPACE if space is None else space, **sweep},
        }
    )


def test_draws_are_a_function_of_the_seed_and_lie_in_their_ranges() -> None:
    space = {
        "a": parse_domain({"loguniform": [1e-3, 10]}),
        "b": parse_domain({"uniform": [-1, 2]}),
        "c": parse_domain({"randint": [1, 3]}),
        "d": parse_domain({"choice": ["x", "y"]}),
        "e": parse_domain({"grid": [1, 2]}),
        "f": parse_domain({"grid": [True, False]}),
    }
    drawn = draw_trials(space, 400, seed=5)
    assert drawn == draw_trials(space, 400, seed=5) and drawn[:9] == draw_trials(space, 9, seed=5)
    assert drawn != draw_trials(space, 400, seed=6)
    logs = np.log([values["a"] for values in drawn])
    assert logs.min() >= np.log(1e-3) and logs.max() <= np.log(10)
    assert np.mean(logs) == pytest.approx((np.log(1e-3) + np.log(10)) / 2, abs=0.5)
    assert all(-1 <= values["b"] < 2 for values in drawn)
    assert {values["c"] for values in drawn} == {1, 2, 3} and {values["d"] for values in drawn} == {"x", "y"}
    assert [(v["e"], v["f"]) for v in drawn[:5]] == [(1, True), (1, False), (2, True), (2, False), (1, True)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (3, "must be one of loguniform"),
        ({"lognormal": [1, 2]}, "lognormal is unknown"),
        ({"uniform": [2, 1]}, "low < high"),
        ({"loguniform": [0, 1]}, "low > 0"),
        ({"randint": [1, 2.5]}, "integers"),
        ({"choice": []}, "needs a list"),
        ({"choice": [1], "grid": [1]}, "must be one of"),
    ],
)
def test_bad_domains(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"sweep.space.optim.lr: .*{message}") as caught:
        sweep_config({"optim.lr": spec})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("space", "sweep", "message"),
    [
        ({"optim.lrr": {"choice": [1]}}, {}, "unknown key optim.lrr; did you mean optim.lr"),
        ({"optim.lr": {"choice": [0.1, -1]}}, {}, r"sweep.space.optim.lr: optim.lr=-1: must be a number > 0"),
        ({"data.train": {"choice": ["a", "b"]}}, {}, "sweep.space.data.train: trials share it"),
        ({"run.seed": {"randint": [1, 9]}}, {}, "sweep.space.run.seed: trials share it"),
        ({"init.from": {"choice": ["a"]}}, {}, "sweep.space.init.from: trials share it"),
        ({"model.bidirectional": {"grid": [True, False]}}, {}, "sweep.space.model.bidirectional: trials share it"),
        ({"model.lstm.dim": {"choice": [8]}}, {}, "sweep.space.model.lstm.dim: the model is the source's"),
        (None, {"search": "grid"}, "sweep.search=grid needs choice or grid"),
        (
            {"train.dropout": {"grid": [0, 0.1, 0.2]}},
            {"search": "grid", "trials": 3},
            "makes 4 trials with sweep.first",
        ),
        ({"train.dropout": {"grid": [0, 0.1]}}, {"search": "optuna"}, "cannot take grid"),
        (None, {"grace": "1 epochs"}, "must be in steps"),
        (None, {"scheduler": None, "reduction": 2}, "ends no trial early"),
    ],
)
def test_settings_that_do_not_fit(space: dict[str, Any] | None, sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        sweep_config(space, **sweep)
    assert "\n" not in str(caught.value)


def test_trials_are_configurations_of_finetune_or_pretrain(tmp_path: Path) -> None:
    config = sweep_config(trials=3)
    drawn = config.planned_trials()
    assert drawn[0] == {} and len(drawn) == 3
    trial = config.trial(drawn[1])
    assert isinstance(trial, FinetuneConfig)
    assert trial.optim.lr == drawn[1]["optim.lr"] and list(trial.train.freeze) == drawn[1]["train.freeze"]
    assert config.trial({}) == FinetuneConfig.from_dict(config.tree())
    path = tmp_path / "sweep.yaml"
    path.write_text("data: {train: t.txt, valid: v.txt}\nsweep: {space: {optim.lr: {choice: [0.1]}}}\n")
    scratch = load_config(path, ["sweep.space={model.lstm.dim: {choice: [256, 512]}}"], SweepConfig)
    assert scratch.sweep.space == {"model.lstm.dim": {"choice": [256, 512]}}
    made = scratch.trial({"model.lstm.dim": 256})
    assert type(made) is PretrainConfig and made.model.lstm.dim == 256
    grid = sweep_config({"train.dropout": {"grid": [0, 0.1]}, "optim.lr": {"choice": [1, 2]}}, search="grid")
    assert len(grid.planned_trials()) == 5


def test_a_dry_run_refuses_the_sizes_of_any_trial(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the cat sees a dog .\n" * 40, "utf-8")
    (tmp_path / "v.txt").write_text("a cat sees the dog .\n", "utf-8")
    values: dict[str, Any] = {
        "run": {"storage_path": str(tmp_path / "runs")},
        "data": {"train": str(tmp_path / "t.txt"), "valid": str(tmp_path / "v.txt"), "streams": 2},
        "softmax": {"negatives": 2},
        "cluster": {"workers": 1},
        "sweep": {"space": {"data.streams": {"grid": [2, 9000]}}, "search": "grid", "trials": 3},
    }
    for space, problem in (
        ({"data.streams": {"grid": [2, 9000]}}, r"^trial 2: data.streams=9000: an epoch has 280 positions, fewer "),
        ({"softmax.negatives": {"grid": [4, 64]}}, r"^trial 2: softmax.negatives=64: must be below the number of wor"),
    ):
        config = SweepConfig.from_dict({**values, "sweep": {**values["sweep"], "space": space}})
        with pytest.raises(ConfigError, match=problem):
            run(config, Flags(dry_run=True))
    assert not (tmp_path / "runs" / "sweep").exists()


def write_metrics(folder: Path, perplexities: list[float], total: int = 40) -> None:
    with MetricsWriter(folder, 1) as writer:
        for number, perplexity in enumerate(perplexities):
            step = 10 * number
            about = {"step": step, "perplexity": perplexity, "total_steps": total, "positions": 100 * step}
            if step:
                writer.write({"kind": "train", **about, "positions_per_second": 50.0})
            writer.write({"kind": "valid", **about})


@pytest.mark.parametrize("wrong_by", [-3600, 0, 3600])
def test_a_trial_runs_while_it_writes_whatever_the_clocks_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong_by: int
) -> None:
    def write(trial: Trial, seconds: float) -> None:
        path = trial.folder / "session.json"
        path.write_text(json.dumps({"seconds": seconds}))
        os.utime(path, (time.time() + wrong_by,) * 2)  # by the clock of its host

    earlier, ended, running = (add_trial(tmp_path, number, {}) for number in range(3))
    for trial in (earlier, ended, running):
        write(trial, 1.0)
    signs = SignsOfLife(tmp_path)
    assert signs.running() == []
    for trial in (ended, running):
        write(trial, 2.0)
    end_trial(ended, FINISHED)
    assert signs.running() == [running.folder]
    monkeypatch.setattr(tuning, "ALIVE_S", 0.0)
    assert signs.running() == [], "it has not written for so long"


def test_what_is_on_the_disk_is_the_sweep(tmp_path: Path) -> None:
    given = {"optim.lr": 0.5, "train.freeze": []}
    curves = [[90.0, 50.0, 40.0, 35.0, 36.0], [90.0, 60.0], [90.0, 45.0, 33.0], [90.0]]
    for number, curve in enumerate(curves):
        values = {} if number == 0 else {"optim.lr": 0.1 * number, "train.freeze": ["lstm.0"]}
        write_metrics(add_trial(tmp_path, number, values, given).folder, curve)
    add_trial(tmp_path, 4, {"optim.lr": 9.0}, given)
    with pytest.raises(FileExistsError):
        add_trial(tmp_path, 4, {})
    trials = read_trials(tmp_path)
    end_trial(trials[0], FINISHED, seconds=100.0, threads=1)
    end_trial(trials[1], STOPPED, seconds=20.0)
    end_trial(trials[1], FAILED)
    end_trial(trials[3], FAILED, message="the loss is not finite")
    (trials[2].folder / "session.json").write_text('{"seconds": 7.0}')  # as its process does every second
    trials = read_trials(tmp_path)
    assert [trial.status for trial in trials] == ["finished", "stopped", "running", "failed", "waiting"]
    assert trials[0].best == (30, 35.0) and trials[2].best == (20, 33.0)
    assert trials[2].seconds_left == pytest.approx(20 * 100 / 50) and trials[0].seconds_left is None
    best = best_of(trials)
    assert best is trials[0]  # the running one is ahead, but has not come to its end
    shown = table(trials)
    assert (
        shown.splitlines()[1].split()[:4] == ["0", "finished", "0.5", "[]"]
        and "trial 3 failed: the loss is not finite" in shown
    )
    write_results(tmp_path, results(trials), {"best": 0})
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["trials"][0]["perplexity_before"] == 90.0 and saved["trials"][0]["validations"][3] == [30, 35.0]
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[2]["optim.lr"] == "0.2" and rows[2]["train.freeze"] == "[lstm.0]" and rows[0]["optim.lr"] == "0.5"
    assert [row["seconds"] for row in rows] == ["100.0", "20.0", "7.0", "", ""]
    assert rows[0]["best_perplexity"] == "35.0" and rows[3]["status"] == "failed"
    draw(tmp_path / "sweep.png", trials, best)
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_trials_that_were_lost_are_tried_again(tmp_path: Path) -> None:
    for number, lost in enumerate((True, False)):
        end_trial(add_trial(tmp_path, number, {}), FAILED, message="m", lost=lost)
    end_trial(add_trial(tmp_path, 2, {}), INTERRUPTED, seconds=3.0)
    write_metrics(add_trial(tmp_path, 3, {}).folder, [90.0, 80.0])
    session = tmp_path / "trials" / "trial-003" / "session.json"
    session.write_text('{"seconds": 7.0}')
    os.utime(session, (1e9, 1e9))  # of a process that was killed long ago
    assert [trial.status for trial in read_trials(tmp_path)] == ["failed", "failed", "interrupted", "interrupted"]
    try_lost_again(read_trials(tmp_path))
    assert [trial.status for trial in read_trials(tmp_path)] == ["waiting", "failed", "waiting", "interrupted"]


def test_the_best_trials_file_is_read_by_finetune(tmp_path: Path) -> None:
    config = sweep_config()
    trial = add_trial(tmp_path, 3, config.planned_trials()[3])
    write_metrics(trial.folder, [90.0, 50.0])
    end_trial(trial, FINISHED, threads=1)
    (found,) = read_trials(tmp_path)
    path = tmp_path / "best.yaml"
    path.write_text(best_yaml(config, found))
    again = load_config(path, [], FinetuneConfig)
    wanted = config.trial(found.values)
    assert again.optim == wanted.optim and again.train == wanted.train and again.init == wanted.init
    assert again.run.name == "sweep-best" and again.cluster.threads == 1


def test_optuna_begins_with_the_configuration_as_given() -> None:
    config = sweep_config(
        {"optim.lr": {"loguniform": [0.1, 1]}, "train.freeze": {"choice": [["lstm.0"], []]}}, search="optuna"
    )
    assert config.planned_trials() == [{"optim.lr": 0.2, "train.freeze": []}]
    assert config.optuna_values(config.planned_trials()[0]) == {"optim.lr": 0.2, "train.freeze": "1"}
    outside = sweep_config({"optim.lr": {"uniform": [0.5, 1]}}, search="optuna")
    with pytest.raises(ConfigError, match="sweep.space.optim.lr: 0.2, as given, is not among its values"):
        outside.planned_trials()
