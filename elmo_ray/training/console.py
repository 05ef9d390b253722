"""Display of a run while it trains: a progress bar in a terminal, a line for each record elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elmo_ray.background import repeating
from elmo_ray.training.metrics import MetricsFollower, Record, console_line, flops_text

logger = logging.getLogger("elmo_ray.metrics")

LOOK_EVERY_S = 0.5


@contextlib.contextmanager
def show_metrics(run_dir: Path) -> Iterator[None]:
    """Show the records that rank 0 writes in `run_dir` while this context lasts."""
    follower = MetricsFollower(run_dir)
    with bar_in_terminal("step") as bar:

        def look() -> None:
            try:
                records = follower.poll()
            except (OSError, ValueError):
                return  # read later what cannot be read now
            for record in records:
                _show(record, bar)

        def follow() -> None:
            look()
            if bar is not None:
                bar.refresh()  # its clock runs between two records as well

        try:
            with repeating(follow, LOOK_EVERY_S, "console"):
                yield
        finally:
            look()


def _show(record: Record, bar: Any) -> None:
    if record.get("kind") == "event":
        logger.info("%s", record.get("message"))
        return
    total = record.get("total_steps") or record["step"]
    if bar is None or record["kind"] != "train":
        logger.info("%s", console_line(record, total))
        return
    if bar.total != total:
        bar.reset(total)
        bar.initial = record["step"]  # the bar's speed is that of this start only
    bar.n = record["step"]
    speed = record.get("positions_per_second") or 0.0
    shown = [f"perplexity {record.get('perplexity') or float('nan'):,.1f}", f"{speed:,.0f} positions/s"]
    bar.set_postfix_str(", ".join(filter(None, [*shown, flops_text(record)])))


@contextlib.contextmanager
def bar_in_terminal(unit: str, total: int | None = None) -> Iterator[Any]:
    """Yield tqdm's bar, with log lines above it; None where stderr is no terminal or tqdm is not installed.

    unit: the name of what is counted. total: how many there are, as far as it is known.
    """
    if not sys.stderr.isatty():
        yield None
        return
    try:
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm
    except ImportError:
        yield None
        return
    with logging_redirect_tqdm(), tqdm(total=total, unit=unit, dynamic_ncols=True, leave=False) as bar:
        yield bar
