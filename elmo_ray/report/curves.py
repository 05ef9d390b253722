"""Runs as curves and tables, for the terminal and for the page of `report`."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from elmo_ray.config.command_line import text_table
from elmo_ray.errors import DataError
from elmo_ray.report.comparison import (
    ONE_WAY_REASONS,
    Measure,
    held_out_measure,
    marked,
    notes,
    same_measure,
    train_measure,
    unlike_the_first,
)
from elmo_ray.report.trials import OUTCOME
from elmo_ray.storage import absolute, base_name, is_uri, read_json
from elmo_ray.storage.local_copy import local_copy_of
from elmo_ray.training.metrics import Record, clock, read_metrics

NOTE = (
    "train: mean over the last sixth of the steps, as trained, with dropout and, where set, sampled softmax; not "
    "comparable with held-out perplexity. time: of training with its validations, without the pauses between starts"
)
"""Footnote of the tables."""

_SPEEDS = ("positions_per_second", "tflops", "mfu")

Points = list[tuple[int, float]]
"""(step, value), in the order of steps."""


@dataclass(frozen=True)
class RunCurve:
    """Records of a run, in the order of steps, and its result once it has one.

    path: folder on this machine. place: path or URI of the run. result: as in result.json or, for a trial of a sweep,
    in outcome.json.
    """

    name: str
    path: Path
    records: tuple[Record, ...]
    place: str = ""
    result: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path, name: str | None = None) -> RunCurve:
        """Read the metrics of a run. Raises DataError if the folder has none."""
        full = _local_folder(path)
        records = tuple(read_metrics(full))
        if not records:
            raise DataError(f"{path}/metrics: no record yet")
        result = read_json(full / "result.json")
        if result is None:
            outcome = read_json(full / OUTCOME) or {}
            result = outcome.get("training", outcome)
        place = os.fspath(path)
        return cls(name or base_name(place if is_uri(place) else full), full, records, place, result)

    def points(self, kind: str, name: str = "perplexity") -> Points:
        """Return (step, value) of each record of this kind with a positive value of this name."""
        return [
            (record["step"], float(record[name]))
            for record in self.records
            if record["kind"] == kind and isinstance(record.get(name), int | float) and record[name] > 0
        ]

    @cached_property
    def held_out(self) -> Measure:
        """The measure of the held-out perplexity."""
        return held_out_measure(self.path, self.records)

    @cached_property
    def trained(self) -> Measure:
        """The measure of the training perplexity."""
        return train_measure(self.path, self.records)

    def figures(self) -> dict[str, Any]:
        """Return the main numbers of the run; those that its records do not have are None."""
        valid = self.points("valid")
        valids = [record for record in self.records if record["kind"] == "valid"]
        # A resumed run may have changed how held-out text is measured: the best is one of those that compare.
        steps = {record["step"] for record in valids if same_measure(record, valids[-1])}
        train = self.points("train")
        last_step = int(self.records[-1]["step"])
        # The training loss of one window varies much: the mean over the last sixth of the run says more than the last.
        recent = [math.log(value) for step, value in train if step > last_step * 5 / 6]
        best = min((p for p in valid if p[0] in steps), key=lambda point: point[1], default=(None, None))
        forward, backward = self.points("valid", "perplexity_forward"), self.points("valid", "perplexity_backward")
        speeds = {name: [v for _, v in self.points("train", name)] for name in _SPEEDS}
        return {
            "run": self.name,
            "path": str(self.path),
            "step": last_step,
            "epoch": self._last("epoch"),
            "positions": self._last("positions"),
            "train_perplexity": math.exp(statistics.fmean(recent)) if recent else None,
            "valid_perplexity": valid[-1][1] if valid else None,
            "valid_perplexity_forward": forward[-1][1] if forward else None,
            "valid_perplexity_backward": backward[-1][1] if backward else None,
            "valid_perplexity_best": best[1],
            "valid_step_best": best[0],
            **{name: statistics.median(values) if values else None for name, values in speeds.items()},
            "seconds": self._seconds(),
        }

    def _last(self, name: str) -> Any:
        train = (record for record in reversed(self.records) if record["kind"] == "train")
        return next((record[name] for record in train if record.get(name) is not None), None)

    def _seconds(self) -> float | None:
        """Return the time of training, as defined by NOTE, or None if it is not known."""
        if self.result.get("steps") == self.records[-1]["step"] and self.result.get("seconds") is not None:
            return float(self.result["seconds"])  # with the last checkpoint, which comes after the last record
        elapsed = [float(record["elapsed"]) for record in self.records if record.get("elapsed") is not None]
        if elapsed:
            return elapsed[-1]
        # Runs of older versions: the times between the records, but for those before a start.
        timed = sorted((r for r in self.records if r.get("time") is not None), key=lambda r: float(r["time"]))
        pairs = [pair for pair in itertools.pairwise(timed) if not str(pair[1].get("message")).startswith("start:")]
        return sum(float(later["time"]) - float(earlier["time"]) for earlier, later in pairs) if pairs else None


def _local_folder(run: str | Path) -> Path:
    """Return the folder of a run, or a local copy of a report's files if the run is in an object store."""
    if not is_uri(run):
        return Path(run).resolve()
    copy = local_copy_of(absolute(run))
    try:
        copy.pull("metrics/*", "config.yaml", "result.json", "evaluations/*", "valid.npz", "vocab.txt")
    except OSError as error:
        raise DataError(f"{run}: {error.strerror or error}") from None
    return copy.folder


def table(runs: Sequence[RunCurve]) -> str:
    """Return a table for the terminal with a row for each run."""
    return "\n".join([*text_table(table_cells(runs)), f"perplexities; {NOTE}", *comparison_notes(runs)])


def unlike(runs: Sequence[RunCurve]) -> dict[str, list[list[str]]]:
    """Return, by the kind of perplexity and for each run, in what its measure differs from that of the first run."""
    return {
        "train": unlike_the_first([run.trained for run in runs]),
        "held-out": unlike_the_first([run.held_out for run in runs]),
    }


def comparison_notes(runs: Sequence[RunCurve]) -> list[str]:
    """Return the sentences that belong to the marks of `table_cells`."""
    return notes([run.name for run in runs], unlike(runs))


def table_cells(runs: Sequence[RunCurve]) -> list[list[str]]:
    """Return the cells of a table: the head, and a row for each run. Numbers that do not compare have a mark."""
    differing = unlike(runs)
    head = ["run", "step", "epoch", "train", "held-out", "forward", "backward", "best (step)", "positions/s"]
    head += ["TFLOP/s", "time"]
    rows = []
    for item, train, held_out in zip(runs, differing["train"], differing["held-out"], strict=True):
        f = item.figures()
        best = "-"
        if f["valid_step_best"] is not None:
            best = f"{marked(_format(f['valid_perplexity_best']), held_out)} ({f['valid_step_best']})"
        # A model that reads forward alone compares in this direction, where nothing else differs.
        forward = [reason for reason in held_out if reason not in ONE_WAY_REASONS]
        columns = (
            ("train_perplexity", train),
            ("valid_perplexity", held_out),
            ("valid_perplexity_forward", forward),
            ("valid_perplexity_backward", held_out),
        )
        values = [marked(_format(f[name]), reasons) for name, reasons in columns]
        speed = f"{f['positions_per_second']:,.0f}" if f["positions_per_second"] else "-"
        time = clock(f["seconds"]) if f["seconds"] is not None else "-"
        epoch = f"{f['epoch']:.2f}" if f["epoch"] is not None else "-"
        flops = f"{f['tflops']:.3g} ({f['mfu']:.0%})" if f["tflops"] and f["mfu"] else "-"
        rows.append([f["run"], str(f["step"]), epoch, *values, best, speed, flops, time])
    return [head, *rows]


def terminal_curve(runs: Sequence[RunCurve], width: int | None = None, height: int = 18) -> str:
    """Return a picture of characters: perplexity over steps, on a logarithmic scale."""
    import plotext

    lines = _terminal_lines(runs)
    values = [value for _, _, points in lines for _, value in points]
    if not values:
        return "no perplexity yet"
    low, high = min(values), max(values)
    if high < low * 1.01:  # a scale needs a height
        low, high = low / 1.1, high * 1.1
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(width or min(100, shutil.get_terminal_size((90, 24)).columns), height)
    plotext.title("perplexity (logarithmic)")
    plotext.xlabel("step")
    # plotext 5 takes the limits of a logarithmic axis for exponents, so the heights here are logarithms.
    plotext.ylim(math.log10(low), math.log10(high))
    last = max(step for _, _, points in lines for step, _ in points)
    plotext.xlim(0, max(1, last))
    plotext.xticks(sorted({round(last * part / 4) for part in range(5)}))
    ticks = round_ticks(low, high)
    plotext.yticks([math.log10(tick) for tick in ticks], [f"{tick:g}" for tick in ticks])
    for label, marker, points in lines:
        steps, heights = [step for step, _ in points], [math.log10(value) for _, value in points]
        draw = plotext.scatter if len(points) == 1 else plotext.plot
        draw(steps, heights, label=label, marker=marker)
    text = str(plotext.uncolorize(plotext.build()))
    plotext.clear_figure()
    return "\n".join(line.rstrip() for line in text.split("\n")).rstrip("\n")


def _terminal_lines(runs: Sequence[RunCurve]) -> list[tuple[str, str, Points]]:
    """Return (label, marker, points) of each line: both curves of a single run, or one curve for each of several."""
    if len(runs) == 1:
        both = [("train", "dot", runs[0].points("train")), ("held-out", "x", runs[0].points("valid"))]
        return [line for line in both if line[2]]
    markers = "xo+*#@%&"
    kind = "valid" if all(run.points("valid") for run in runs) else "train"
    label = "held-out" if kind == "valid" else "train"
    differing = unlike(runs)[label]
    return [
        (marked(f"{run.name} {label}", differing[i]), markers[i % len(markers)], run.points(kind))
        for i, run in enumerate(runs)
        if run.points(kind)
    ]


def round_ticks(low: float, high: float) -> list[float]:
    """Return at most eight round numbers from `low` to `high`."""
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5, 7), (1, 2, 5), (1,)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) <= 8:
            break
    ticks = ticks[:: max(1, len(ticks) // 8)]
    return ticks if len(ticks) > 1 else [round(low, 1), round(high, 1)]


def _format(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value < 1e6 else f"{value:.2e}"
