"""Pictures and page of `report`: PNGs by matplotlib, and one HTML file that holds them all."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elmo_ray.config.schema import flatten
from elmo_ray.config.yaml_reader import parse_yaml
from elmo_ray.errors import ConfigError, ElmoRayError, short
from elmo_ray.report.comparison import evaluation_measure, marked, notes, unlike_the_first
from elmo_ray.report.curves import NOTE, RunCurve, comparison_notes, round_ticks, table_cells
from elmo_ray.report.html import escape, table, write_html
from elmo_ray.storage.files import atomic_write
from elmo_ray.training.metrics import clock

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunDetails:
    """Details of a run besides its metrics: settings by dotted key, its result, and neighbours of words by layer.

    shown: the words whose neighbours were looked for.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    neighbours: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    shown: tuple[str, ...] = ()


def read_details(run: RunCurve, words: Sequence[str]) -> RunDetails:
    """Read config.yaml and the best checkpoint of a run, as far as it has them.

    words: words and globs of words whose neighbours are looked for; none: frequent ones of the run's vocabulary.
    """
    settings: dict[str, Any] = {}
    try:
        values = parse_yaml((run.path / "config.yaml").read_text("utf-8"), "config.yaml")
        if not isinstance(values, Mapping):
            raise ConfigError("config.yaml: must be a mapping of sections")
        settings = flatten(values)
    except (OSError, ElmoRayError, ValueError):
        logger.info("%s: has no settings that can be read", run.place)
    if not run.result:
        logger.info("%s: has no result yet", run.place)
    return RunDetails(settings, run.result, *_neighbours(run.place, words))


def _neighbours(place: str, words: Sequence[str]) -> tuple[dict[str, dict[str, list[str]]], tuple[str, ...]]:
    """Return the neighbours by layer and word, and the words that were looked for."""
    from elmo_ray.checkpoints.source import open_source
    from elmo_ray.elmo.neighbours import FREQUENT, nearest_words, words_to_show

    try:
        source = open_source(place)
        shown = words_to_show(source.vocabulary, words)
        by_spelling = nearest_words(source.model, source.vocabulary, shown, layer="token")
        found = {"by the token layer (the char CNN's vectors: spelling)": by_spelling}
        if source.has_softmax:
            by_softmax = nearest_words(source.model, source.vocabulary, shown)
            found["by the softmax's rows (what may stand in a place)"] = by_softmax
    except ElmoRayError as error:
        logger.info("%s: no nearest words: %s", place, error)
        return {}, ()
    missing = [word for word in shown if word not in by_spelling]
    if missing:
        logger.info(
            "%s: no nearest words of %s: not among the %s most frequent words",
            place, short(", ".join(missing)), f"{FREQUENT:,}",
        )  # fmt: skip
    return found, tuple(shown)


# ---------------------------------------------------------------- pictures


@dataclass(frozen=True)
class _Panel:
    """Picture with lines of (kind of record, name of the value, label, style)."""

    file: str
    title: str
    label: str
    lines: tuple[tuple[str, str, str, dict[str, Any]], ...]
    logarithmic: bool = False
    factor: float = 1.0


_HELD_OUT = {"linewidth": 1.8, "marker": "o", "markersize": 4}
_TRAIN = {"alpha": 0.5, "linewidth": 1.0}
_PANELS = (
    _Panel(
        "curve.png", "Perplexity", "perplexity",
        (("train", "perplexity", "train", _TRAIN), ("valid", "perplexity", "held-out", _HELD_OUT)), True,
    ),
    _Panel(
        "directions.png", "Held-out perplexity of each direction", "perplexity",
        (
            ("valid", "perplexity_forward", "forward", {**_HELD_OUT, "linestyle": "--"}),
            ("valid", "perplexity_backward", "backward", {**_HELD_OUT, "linestyle": ":"}),
        ), True,
    ),
    _Panel("throughput.png", "Throughput", "positions/s", (("train", "positions_per_second", "", {"linewidth": 1.2}),)),
    _Panel(
        "peak.png", "Matrix products of a worker", "% of its device's peak",
        (("train", "mfu", "", {"linewidth": 1.2}),), False, 100.0,
    ),
    _Panel(
        "waiting.png", "Waiting for text", "% of a step's time", (("train", "data_wait", "", {"linewidth": 1.2}),),
        False, 100.0,
    ),
    _Panel("gradient.png", "Norm of the gradient before the clip", "norm", (("train", "grad_norm", "", _TRAIN),), True),
    _Panel("rate.png", "Learning rate", "learning rate", (("train", "lr", "", {"linewidth": 1.2}),)),
    _Panel("memory.png", "Memory of worker 0", "GB", (("train", "memory", "", {"linewidth": 1.2}),), False, 1e-9),
)  # fmt: skip


def draw(runs: Sequence[RunCurve], folder: Path) -> dict[str, Path]:
    """Draw the curve, and each picture that has values; return the PNGs in `folder` by title. Raises DataError."""
    pictures = {}
    for panel in _PANELS:
        if panel.file == "curve.png" or any(run.points(kind, name) for run in runs for kind, name, *_ in panel.lines):
            pictures[panel.title] = _draw(panel, runs, folder / panel.file)
    return pictures


def _draw(panel: _Panel, runs: Sequence[RunCurve], target: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(8, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values: list[float] = []
    labelled = False
    for index, run in enumerate(runs):
        for number, (kind, name, label, style) in enumerate(panel.lines):
            points = [(step, value * panel.factor) for step, value in run.points(kind, name)]
            if not points:
                continue
            text = ": ".join(part for part in (run.name if len(runs) > 1 else "", label) if part)
            labelled = labelled or bool(text)
            shade = f"C{index if len(runs) > 1 else number}"
            axes.plot(*zip(*points, strict=True), color=shade, label=text or None, **style)
            values.extend(value for _, value in points)
    if panel.logarithmic:
        axes.set_yscale("log")
    elif values:
        axes.set_ylim(0, max(values) * 1.05)
    axes.set_title(panel.title)
    axes.set_xlabel("step")
    axes.set_ylabel(panel.label)
    axes.grid(alpha=0.3)
    if values and panel.logarithmic:
        ticks = round_ticks(min(values), max(values))
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.yaxis.set_minor_locator(NullLocator())
    if labelled:
        axes.legend()
    with atomic_write(target) as temporary:
        figure.savefig(temporary, format="png")
    return target


# ---------------------------------------------------------------- page


def write_page(
    path: Path,
    runs: Sequence[RunCurve],
    details: Sequence[RunDetails],
    pictures: Mapping[str, Path],
    sweeps: Sequence[Sequence[Sequence[str]]] = (),
) -> None:
    """Write the page as one file that needs no other. Raises DataError if it cannot be written.

    sweeps: the cells of a table for each sweep.
    """
    names = [run.name for run in runs]
    body = [f"<h1>{escape(', '.join(names))}</h1>", *(table(cells, numbers=False) for cells in sweeps)]
    body += [table(table_cells(runs)), f'<p class="note">{escape(NOTE)}</p>']
    body += [f'<p class="note">{escape(note)}</p>' for note in comparison_notes(runs)]
    for title, picture in pictures.items():
        data = base64.b64encode(picture.read_bytes()).decode()
        body.append(f'<h2>{escape(title)}</h2><img alt="{escape(title)}" src="data:image/png;base64,{data}">')
    body += _evaluations(names, details) + _differences(names, details) + _history(runs) + _nearest(names, details)
    write_html(path, ", ".join(names), body)


def _evaluations(names: Sequence[str], details: Sequence[RunDetails]) -> list[str]:
    """Return a table of the measures of each run's test text, if there are any."""
    rows = [["run", "forward", "backward", "both", "bits/char", "positions", "read in", "unknown", "unigram"]]
    differing = evaluation_differences(details)
    for name, each, unlike in zip(names, details, differing, strict=True):
        values = each.result.get("evaluation")
        if isinstance(values, dict):
            numbers = [_number(values.get(f"perplexity{end}")) for end in ("_forward", "_backward", "")]
            numbers += [_number(values.get("bits_per_character"), ".4f")]
            streams, unigram = values.get("streams"), _number(each.result.get("unigram_perplexity"))
            rows.append([
                name, *(marked(number, unlike) for number in numbers),
                _number(values.get("positions"), ",d"),
                f"streams: {streams:,}" if isinstance(streams, int) else "sentences",
                _number(values.get("oov_rate"), ".2%"), marked(unigram, unlike),
            ])  # fmt: skip
    if len(rows) == 1:
        return []
    lines = ["Perplexity of the test text (data.test) with the full softmax; unigram: add-one counts."]
    lines += notes(names, {"test": differing})
    return ["<h2>Evaluation</h2>", table(rows), *(f'<p class="note">{escape(line)}</p>' for line in lines)]


def evaluation_differences(details: Sequence[RunDetails]) -> list[list[str]]:
    """Return for each run the `differences` of its test text's measure from that of the first run with a measure."""
    return unlike_the_first([evaluation_measure(each.result.get("evaluation")) for each in details])


def _differences(names: Sequence[str], details: Sequence[RunDetails]) -> list[str]:
    """Return a table of the settings in which the runs differ, or of all settings of a single run."""
    keys = list(dict.fromkeys(key for each in details for key in each.settings))
    differing = [key for key in keys if len({_setting(each.settings.get(key)) for each in details}) > 1]
    shown = [key for key in (differing if len(names) > 1 else keys) if key != "run.name"]
    if not keys:
        return []
    title = "Settings in which the runs differ" if len(names) > 1 else "Settings"
    if not shown:
        return [f"<h2>{title}</h2><p>none</p>"]
    rows = [["key", *names], *([key, *(_setting(each.settings.get(key)) for each in details)] for key in shown)]
    return [f"<h2>{title}</h2>", table(rows, numbers=False)]


def _history(runs: Sequence[RunCurve]) -> list[str]:
    """Return a table of the starts, stops and other events of each run, if there are any."""
    rows = [["run", "after (with pauses)", "step", "what happened"]]
    for run in runs:
        begun = min((float(r["time"]) for r in run.records if r.get("time") is not None), default=0.0)
        events = sorted((r for r in run.records if r["kind"] == "event"), key=lambda r: float(r.get("time") or 0.0))
        rows += [
            [run.name, clock(float(r.get("time") or begun) - begun), f"{r['step']:,}", str(r.get("message"))]
            for r in events
        ]
    return ["<h2>Starts and stops</h2>", table(rows, numbers=False)] if len(rows) > 1 else []


def _nearest(names: Sequence[str], details: Sequence[RunDetails]) -> list[str]:
    """Return a table of nearest words for each layer that has them."""
    sections: list[str] = []
    for layer in dict.fromkeys(layer for each in details for layer in each.neighbours):
        tables = [each.neighbours.get(layer, {}) for each in details]
        words = list(dict.fromkeys(word for each in tables for word in each))
        rows = [["word", *names], *([w, *(", ".join(each.get(w, [])) for each in tables)] for w in words)]
        if words:
            sections += [f"<h2>Nearest words {escape(layer)}</h2>", table(rows, numbers=False)]
    return sections


def _number(value: Any, form: str = ",.2f") -> str:
    return format(value, form) if isinstance(value, int | float) else "-"


def _setting(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)
