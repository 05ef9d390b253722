"""The table, the curve in characters and the PNG of runs written by MetricsWriter."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest

from elmo_ray import report
from elmo_ray.config import ReportConfig
from elmo_ray.metrics import MetricsWriter, perplexity
from elmo_ray.report import RunCurve, run, table, terminal_curve, write_curve


def make_run(folder: Path, losses: list[float], valid: dict[int, float] | None = None, backward: bool = True) -> Path:
    with MetricsWriter(folder, 1, tensorboard=False) as writer:
        for index, loss in enumerate(losses, 1):
            for kind, value in (("train", loss), ("valid", (valid or {}).get(index * 50))):
                if value is not None:
                    writer.write({
                        "kind": kind, "step": index * 50, "epoch": index / 10, "positions": index * 50 * 640,
                        "loss": value, "perplexity": perplexity(value), "perplexity_forward": perplexity(value + 0.1),
                        "perplexity_backward": perplexity(value - 0.1) if backward else None,
                        "positions_per_second": 1800.0 + index, "time": 1e9 + index * 30,
                    })  # fmt: skip
    return folder


def test_report_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = [7 - 2 * (1 - math.exp(-i / 10)) for i in range(1, 41)]
    folder = make_run(tmp_path / "one", losses, {1000: 5.6, 1500: 5.4, 2000: 5.5})
    assert report.main([str(folder), "--json", str(tmp_path / "o.json")]) == 0
    out = capsys.readouterr().out
    head, line = out.splitlines()[:2]
    assert head.split()[:5] == ["run", "step", "epoch", "train", "held-out"]
    row = line.split()
    assert row[:3] == ["one", "2000", "4.00"]
    assert row[4] == f"{math.exp(5.5):.1f}"
    assert f"{math.exp(5.4):.1f} (1500)" in line
    assert "held-out" in out and "┤" in out

    figures = json.loads((tmp_path / "o.json").read_text())["runs"][0]
    assert figures["valid_perplexity_best"] == pytest.approx(math.exp(5.4)) and figures["valid_step_best"] == 1500
    recent = losses[33:]  # the last sixth of 2,000 steps
    assert figures["train_perplexity"] == pytest.approx(math.exp(sum(recent) / len(recent)))
    assert figures["positions"] == 2000 * 640 and figures["seconds"] == pytest.approx(39 * 30)
    assert figures["curves"]["valid"][0] == [1000, pytest.approx(math.exp(5.6))]


def test_png(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "one", [6.0, 5.5, 5.2], {150: 5.5})
    result = run(ReportConfig(runs=(str(folder),)))
    assert result.curve == folder / "curve.png"
    data = result.curve.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 600 and height >= 400
    assert [path.name for path in folder.iterdir() if path.is_file()] == ["curve.png"]

    plain = make_run(tmp_path / "two", [6.0, 5.5, 5.2])
    other = tmp_path / "sub" / "two.png"
    write_curve([RunCurve.read(plain)], other)
    assert other.read_bytes() != data


def test_several_runs(tmp_path: Path) -> None:
    runs = [
        RunCurve.read(make_run(tmp_path / "a", [6.0, 5.5, 5.2], {50: 6.0, 150: 5.5})),
        RunCurve.read(make_run(tmp_path / "b", [6.0, 5.6, 5.3], {50: 6.1, 150: 5.6})),
    ]
    lines = table(runs).splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["run", "a", "b"]
    curve = terminal_curve(runs, width=80)
    assert "a held-out" in curve and "b held-out" in curve
    assert max(len(line) for line in curve.splitlines()) <= 80
    write_curve(runs, tmp_path / "both.png")


@pytest.mark.parametrize(
    "losses",
    [[5.0], [5.0, 5.0, 5.0], [30.0, 3.0, 3.0], [0.001, 0.0], [5.0, math.nan, 4.0], [math.inf], [math.nan, math.nan]],
)
@pytest.mark.parametrize("backward", [True, False])
def test_odd_curves_are_drawn(tmp_path: Path, losses: list[float], backward: bool) -> None:
    folder = make_run(tmp_path / "odd", losses, {50: losses[0]}, backward)
    result = run(ReportConfig(runs=(str(folder),)))
    assert "odd" in result.summary()
    json.dumps(result.to_dict(), allow_nan=False)


def test_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path / "none")]) == 2
    assert "is" in capsys.readouterr().err
    (tmp_path / "empty" / "metrics").mkdir(parents=True)
    (tmp_path / "empty" / "metrics" / "attempt-001.jsonl").touch()
    assert report.main([str(tmp_path / "empty")]) == 2
    assert "no record yet" in capsys.readouterr().err
