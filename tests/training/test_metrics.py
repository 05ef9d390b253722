"""Metrics files: append, torn lines, several attempts; the console line."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from elmo_ray.data.measures import perplexity
from elmo_ray.errors import DataError
from elmo_ray.training.metrics import MetricsWriter, clock, console_line, read_metrics, sinks_of


def write(folder: Path, attempt: int, steps: list[int], kind: str = "train", loss: float = 1.0) -> None:
    with MetricsWriter(folder, attempt) as writer:
        for step in steps:
            writer.write({"kind": kind, "step": step, "loss": loss})


def test_records_come_back(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, 1) as writer:
        writer.write({"kind": "train", "step": 50, "loss": torch.tensor(2.5), "lr": np.float32(0.5), "time": 7})
        # On disk before the file is closed.
        assert len((tmp_path / "metrics" / "attempt-001.jsonl").read_text().splitlines()) == 1
        writer.write({"kind": "valid", "step": np.int64(50), "loss": math.inf, "loss_backward": None})
    train, valid = read_metrics(tmp_path)
    assert train == {"kind": "train", "step": 50, "loss": 2.5, "lr": 0.5, "time": 7}
    assert valid["loss"] is None and valid["loss_backward"] is None and valid["time"] > 1e9


def test_newest_attempt_wins_and_undone_steps_go(tmp_path: Path) -> None:
    write(tmp_path, 1, [50, 100, 150, 200, 250])
    write(tmp_path, 1, [100], "valid", loss=3.0)
    write(tmp_path, 2, [150, 200], loss=2.0)
    records = read_metrics(tmp_path)
    assert [(r["kind"], r["step"], r["loss"]) for r in records] == [
        ("train", 50, 1.0),
        ("train", 100, 1.0),
        ("valid", 100, 3.0),
        ("train", 150, 2.0),
        ("train", 200, 2.0),
    ]


def test_a_resume_undoes_all_kinds_after_its_step_and_no_event(tmp_path: Path) -> None:
    def write(attempt: int, *records: tuple[str, int]) -> None:
        with MetricsWriter(tmp_path, attempt) as writer:
            for kind, step in records:
                writer.write({"kind": kind, "step": step, "attempt": attempt})

    write(1, ("event", 0), ("train", 10), ("valid", 10), ("train", 20), ("valid", 25), ("event", 25))
    write(2)  # ended before it could say anything
    write(3, ("event", 10), ("event", 10), ("train", 20), ("train", 30))
    found = [(record["kind"], record["step"], record["attempt"]) for record in read_metrics(tmp_path)]
    assert [item for item in found if item[0] != "event"] == [
        ("train", 10, 1), ("valid", 10, 1), ("train", 20, 3), ("train", 30, 3),
    ]  # fmt: skip
    assert [item[1:] for item in found if item[0] == "event"] == [(0, 1), (10, 3), (10, 3), (25, 1)]


def test_attempts_are_ordered_as_numbers(tmp_path: Path) -> None:
    write(tmp_path, 999, [50], loss=1.0)
    write(tmp_path, 1000, [50], loss=2.0)
    assert [r["loss"] for r in read_metrics(tmp_path)] == [2.0]


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_torn_last_line_is_skipped_and_not_appended_to(tmp_path: Path, cut: int) -> None:
    write(tmp_path, 1, [50, 100])
    path = tmp_path / "metrics" / "attempt-001.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert [r["step"] for r in read_metrics(tmp_path)] == [50]
    write(tmp_path, 1, [150])
    assert [r["step"] for r in read_metrics(tmp_path)] == [50, 150]


def test_a_bad_line_inside_is_named(tmp_path: Path) -> None:
    write(tmp_path, 1, [50, 100])
    path = tmp_path / "metrics" / "attempt-001.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\nnonsense\n{second}\n")
    with pytest.raises(DataError, match="attempt-001.jsonl line 2: not a record"):
        read_metrics(tmp_path)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is .* a run?"):
        read_metrics(tmp_path / "nothing")


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsWriter(tmp_path, 1, sinks_of(None)) as writer:
        writer.write({"kind": "train", "step": 50, "loss": 2.5, "epoch": None})
    board = events.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert board.Tags()["scalars"] == ["train/loss"]
    (scalar,) = board.Scalars("train/loss")
    assert (scalar.step, scalar.value) == (50, 2.5)
    assert [json.loads(line)["step"] for line in open(tmp_path / "metrics" / "attempt-001.jsonl")] == [50]


def test_tensorboard_does_not_import_tensorflow(tmp_path: Path, repository: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise SystemExit('TensorFlow was imported')\n")
    program = (
        "from elmo_ray.training.metrics import MetricsWriter, sinks_of\n"
        f"with MetricsWriter({str(tmp_path / 'run')!r}, 1, sinks_of(['tensorboard'])) as writer:\n"
        "    writer.write({'kind': 'train', 'step': 50, 'loss': 2.5})\n"
    )
    path = os.pathsep.join([str(tmp_path), str(repository)])
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))


def test_console_line() -> None:
    record = {
        "kind": "train", "step": 500, "epoch": 0.251, "positions": 500 * 640, "loss": 5.25,
        "perplexity_forward": 190.57, "perplexity_backward": 191.2, "positions_per_second": 1600.0, "data_wait": 0.2,
    }  # fmt: skip
    line = console_line(record, 3000)
    assert "\n" not in line
    for part in ("500/3000", "epoch 0.25", "loss 5.2500", "forward 190.6", "backward 191.2", "1,600 positions/s"):
        assert part in line
    assert "waits 20%" in line
    assert line.endswith("16m40s left")  # 2,500 steps of 640 positions
    assert "1,600 positions/s  0.103 TFLOP/s (62% of peak)  waits" in console_line(
        {**record, "tflops": 0.1031, "mfu": 0.621}, 3000
    )
    assert "left" not in console_line({**record, "kind": "valid"}, 3000)
    assert "forward -" in console_line({"kind": "train", "step": 1, "loss": None}, 3000)


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.4, "8s"), (75, "1m15s"), (3723, "1h02m"), (90000, "1d01h"), (-3, "0s")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_perplexity() -> None:
    assert perplexity(1000.0) == math.inf
    assert perplexity(2.0) == pytest.approx(math.e**2)


def test_a_csv_file_has_the_numbers_of_training_and_validation(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, 3, sinks_of([])) as writer:
        writer.write({"kind": "event", "step": 0, "message": "start"})
        writer.write({"kind": "train", "step": 50, "time": 1.5, "loss": 4.25, "lr": 0.2, "grad_norm": float("nan")})
        writer.write({"kind": "valid", "step": 50, "time": 2.5, "loss": 5.0})
    with open(tmp_path / "metrics" / "attempt-003.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["kind"], row["step"], row["loss"], row["grad_norm"]) for row in rows] == [
        ("train", "50", "4.25", ""),
        ("valid", "50", "5.0", ""),
    ]
    assert not (tmp_path / "tensorboard").exists(), "run.report_to is empty"
