"""Picture of a sweep: held-out perplexity against steps for all trials, and against each setting that was varied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elmo_ray.config.schema import show
from elmo_ray.report.trials import FAILED, FINISHED, STOPPED, Trial
from elmo_ray.storage.files import atomic_write

_COLUMNS = 3


def draw(path: Path, trials: Sequence[Trial], best: Trial | None) -> None:
    """Write a PNG to `path`. Raises DataError if it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    keys = list(dict.fromkeys(key for trial in trials for key in trial.shown))
    rows = 1 + -(-len(keys) // _COLUMNS)
    figure = Figure(figsize=(12, 4.2 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, _COLUMNS)
    axes = figure.add_subplot(grid[0, :])
    for trial in trials:
        if trial.validations:
            style = "--" if trial.status == STOPPED else ":" if trial.status == FAILED else "-"
            mark = " (best)" if trial is best else ""
            label = f"{trial.number} {trial.status}{mark}"
            steps, values = zip(*trial.validations, strict=True)
            axes.plot(steps, values, style, marker=".", linewidth=2.5 if trial is best else 1, label=label)
    axes.set_xlabel("step")
    axes.set_title("held-out perplexity of each trial")
    if axes.lines:
        axes.legend(fontsize=8, ncols=2)
    _set_up_perplexity_axis(axes)
    for place, key in enumerate(keys):
        _plot_against(figure.add_subplot(grid[1 + place // _COLUMNS, place % _COLUMNS]), key, trials, best)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _plot_against(axes: Any, key: str, trials: Sequence[Trial], best: Trial | None) -> None:
    """Plot the best perplexities against the values of one key: an axis of numbers, or a tick for each value."""
    points = [(t.shown[key], t.best[1], t) for t in trials if key in t.shown and t.best is not None]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value, _, _ in points)
    names = list(dict.fromkeys(show(value) for value, _, _ in points))
    for value, perplexity, trial in points:
        x = value if numeric else names.index(show(value))
        hollow = trial.status != FINISHED
        colour = "C3" if trial is best else "C0"
        axes.plot([x], [perplexity], "o", color=colour, markerfacecolor="none" if hollow else colour)
        axes.annotate(str(trial.number), (x, perplexity), textcoords="offset points", xytext=(5, 3), fontsize=8)
    if numeric and points and min(v for v, _, _ in points) > 0:
        values = [v for v, _, _ in points]
        if max(values) / min(values) > 20:
            axes.set_xscale("log")
    elif not numeric:
        axes.set_xticks(
            range(len(names)), [name if len(name) < 30 else name[:27] + "..." for name in names], fontsize=7
        )
    axes.set_xlabel(f"{key} (hollow: not finished)")
    _set_up_perplexity_axis(axes)


def _set_up_perplexity_axis(axes: Any) -> None:
    axes.set_yscale("log")
    axes.set_ylabel("held-out perplexity")
    axes.grid(alpha=0.3, which="both")
