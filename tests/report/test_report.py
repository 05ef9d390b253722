"""The table, the curve in characters, and the page with its pictures."""

from __future__ import annotations

import base64
import json
import math
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from helpers.tiny_runs import sentences, tiny_values

from elmo_ray import pretrain, report
from elmo_ray.config import ReportConfig
from elmo_ray.data.measures import perplexity
from elmo_ray.errors import DataError
from elmo_ray.report import page as report_page
from elmo_ray.report import run
from elmo_ray.report.curves import RunCurve, table, terminal_curve
from elmo_ray.report.find import find_runs, short_names
from elmo_ray.training.metrics import MetricsWriter


def make_run(
    folder: Path, losses: list[float], valid: dict[int, float] | None = None, backward: bool = True,
    attempt: int = 1, first: int = 1, elapsed: float | None = None,
) -> Path:  # fmt: skip
    with MetricsWriter(folder, attempt) as writer:
        for index, loss in enumerate(losses, first):
            for kind, value in (("train", loss), ("valid", (valid or {}).get(index * 50))):
                if value is not None:
                    writer.write({
                        "kind": kind, "step": index * 50, "epoch": index / 10, "positions": index * 50 * 640,
                        "loss": value, "perplexity": perplexity(value), "perplexity_forward": perplexity(value + 0.1),
                        "perplexity_backward": perplexity(value - 0.1) if backward else None,
                        "positions_per_second": 1800.0 + index, "time": 1e9 + index * 30,
                        **({"elapsed": elapsed + index * 20.0} if elapsed is not None else {}),
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


class Page(HTMLParser):
    """What a page refers to, and its tables' cells."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures: dict[str, bytes] = {}
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attributes)
        self.references += [str(values[name]) for name in ("src", "href", "srcset", "data") if name in values]
        if tag == "img":
            head, _, data = str(values["src"]).partition(",")
            assert head == "data:image/png;base64"
            self.pictures[str(values["alt"])] = base64.b64decode(data, validate=True)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read_page(path: Path) -> Page:
    page = Page()
    text = path.read_text(encoding="utf-8")
    page.feed(text)
    page.close()
    assert all(reference.startswith("data:") for reference in page.references), "the page needs another file"
    assert not page.tags & {"script", "iframe", "object", "embed"} and "url(" not in text and "@import" not in text
    return page


def test_page_and_pictures(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "one <&> 1", [6.0, 5.5, 5.2], {150: 5.5})
    result = run(ReportConfig(runs=(str(folder),)))
    assert result.page == str(folder / "report.html")
    titles = ["Perplexity", "Held-out perplexity of each direction", "Throughput"]
    page = read_page(folder / "report.html")
    assert list(page.pictures) == titles
    assert list(page.pictures.values()) == [Path(path).read_bytes() for path in result.pictures]
    for data in page.pictures.values():
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert width >= 600 and height >= 400
    assert "one <&> 1" in page.texts
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    assert names == ["curve.png", "directions.png", "report.html", "throughput.png"]


@pytest.mark.slow
def test_page_of_trained_runs(tmp_path: Path) -> None:
    """Two real runs, one of them stopped and resumed: evaluation, differences, history, neighbours."""
    folder = tmp_path / "text"
    folder.mkdir()
    for name, count in {"train": 300, "valid": 40, "test": 40}.items():
        (folder / f"{name}.txt").write_text("".join(line + "\n" for line in sentences(count, seed=count)), "utf-8")
    places = []
    for name, dropout in (("a", 0.0), ("b", 0.25)):
        values = tiny_values(
            run__name=name, run__storage_path=str(tmp_path / "runs"), train__dropout=dropout,
            **{f"data__{key}": str(folder / f"{key}.txt") for key in ("train", "valid", "test")},
            train__duration="20 steps", train__validate_every="10 steps",
        )  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
        assert pretrain.main([str(tmp_path / f"{name}.yaml")]) == 0
        places.append(str(tmp_path / "runs" / name))
    assert pretrain.main([str(tmp_path / "a.yaml"), "train.duration=30 steps", "--resume"]) == 0
    assert report.main([*places, f"out={tmp_path}/page", "words=[the, old]"]) == 0
    page = read_page(tmp_path / "page" / "report.html")
    assert len(page.pictures) == 8 and "Memory of worker 0" in page.pictures
    for title in ("Evaluation", "Settings in which the runs differ", "Starts and stops"):
        assert title in page.texts
    assert {"train.dropout", "0.25", "train.duration", "old"} <= set(page.texts)
    assert any(text.startswith("start: resume from step 20 of 30") for text in page.texts)
    layers = [text for text in page.texts if text.startswith("Nearest words")]
    assert len(layers) == 2 and "token layer" in layers[0]
    measured = json.loads((tmp_path / "runs" / "b" / "result.json").read_text())["evaluation"]["perplexity"]
    assert f"{measured:,.2f}" in page.texts


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
    assert len(report_page.draw(runs, tmp_path)) == 3


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


def test_the_time_is_that_of_training(tmp_path: Path) -> None:
    """A pause between two starts does not count, whether the records have `elapsed` or are of an older version."""
    for name, elapsed in (("new", 5.0), ("old", None)):
        folder = make_run(tmp_path / name, [6.0, 5.5], elapsed=elapsed)
        with MetricsWriter(folder, 2) as writer:
            writer.write({"kind": "event", "step": 100, "time": 1e9 + 9000, "message": "start: resume from step 100"})
        make_run(folder, [5.2, 5.1], attempt=2, first=301, elapsed=None if elapsed is None else -5940.0)
    figures = [RunCurve.read(tmp_path / name).figures() for name in ("new", "old")]
    assert [each["seconds"] for each in figures] == [100.0, 30.0 + 60.0]
    (tmp_path / "new" / "result.json").write_text(json.dumps({"steps": 302 * 50, "seconds": 103.5}))
    assert RunCurve.read(tmp_path / "new").figures()["seconds"] == 103.5  # what `pretrain` printed


def test_runs_are_found_by_globs_and_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b", "other/a"):
        make_run(tmp_path / name, [6.0, 5.5])
    (tmp_path / "prepared").mkdir()
    monkeypatch.chdir(tmp_path)
    a, b, other = (str(tmp_path / name) for name in ("a", "b", "other/a"))
    assert find_runs(["*"]) == [a, b] and find_runs(["b", "a/", "./a", "[ab]"]) == [b, a]
    assert find_runs(["**/a", "a"]) == [other, a]
    assert not caplog.messages and find_runs(["a", "prepared"]) == [a] and "prepared" in caplog.text
    assert short_names([a, b]) == ["a", "b"] and short_names([a, other]) == [f"{tmp_path.name}/a", "other/a"]
    for names, message in (
        (["n*"], "n[*]: matches no run"),
        (["prepared"], "is it a run"),
        (["other"], r"no trials; name the runs in it: 'other/\*'"),
        (["a/metrics"], f"; it is in the run {a}: name that"),
        (["a", "none"], "none: no"),
    ):
        with pytest.raises(DataError, match=message):
            find_runs(names)


def test_a_comparison_has_a_place_of_its_own(tmp_path: Path) -> None:
    a, b = (str(make_run(tmp_path / name, [6.0, 5.5])) for name in ("a", "b"))
    pages = [run(ReportConfig(runs=names)).page for names in ((a,), (a, b), (b, a), (a, a), (str(tmp_path / "?"),))]
    assert pages == [
        str(tmp_path / name / "report.html") for name in ("a", "report-a-b", "report-b-a", "a", "report-a-b")
    ]
    many = tuple(str(make_run(tmp_path / f"{number:030d}", [6.0])) for number in range(12))
    names = [Path(run(ReportConfig(runs=each)).page).parent.name for each in (many, many[:-1])]
    assert len(set(names)) == 2 and max(map(len, names)) < 120


def test_a_sweep_is_a_table_and_its_trials(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for number, status in enumerate(("finished", "failed", None, None)):
        folder = tmp_path / "sw" / "trials" / f"trial-{number:03d}"
        folder.mkdir(parents=True)
        shown = {"optim.lr": 0.1 * (number + 1)}
        (folder / "trial.json").write_text(json.dumps({"number": number, "values": {}, "shown": shown}))
        if number < 3:
            make_run(folder, [6.0, 5.5], {100: 5.5 - 0.1 * number})
        if status is not None:
            (folder / "outcome.json").write_text(json.dumps({"status": status, "seconds": 12.0, "message": "m"}))
    result = run(ReportConfig(runs=(str(tmp_path / "sw"),)))
    lines = result.summary().splitlines()
    assert lines[0].split()[:3] == ["trial", "status", "optim.lr"]
    assert [line.split()[:3] for line in lines[1:5]] == [
        ["0", "finished", "0.1"], ["1", "failed", "0.2"], ["2", "interrupted", "0.3"], ["3", "waiting", "0.4"]
    ]  # fmt: skip
    assert [each.name for each in result.runs] == ["trial-000", "trial-001", "trial-002"]
    assert result.page == str(tmp_path / "sw" / "report.html")
    page = read_page(tmp_path / "sw" / "report.html")
    assert "optim.lr" in page.texts and "waiting" in page.texts
    without = [message.split(":")[0] for message in caplog.messages if "no result yet" in message]
    assert without == [str(tmp_path / "sw" / "trials" / "trial-002")]


def test_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path / "none")]) == 2
    assert "is" in capsys.readouterr().err
    (tmp_path / "empty" / "metrics").mkdir(parents=True)
    (tmp_path / "empty" / "metrics" / "attempt-001.jsonl").touch()
    assert report.main([str(tmp_path / "empty")]) == 2
    assert "no record yet" in capsys.readouterr().err
