"""`report`: show runs as a table and a curve in the terminal, and as one page of HTML with pictures.

python -m elmo_ray.report RUN [RUN ...] [out=FOLDER] [words=[...]] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elmo_ray.config import ReportConfig
from elmo_ray.config.command_line import Flags, run_verb
from elmo_ray.errors import DataError
from elmo_ray.report.curves import RunCurve, table, terminal_curve
from elmo_ray.storage import absolute, join
from elmo_ray.storage.local_copy import local_folder, push

PAGE = "report.html"


@dataclass(frozen=True)
class ReportResult:
    """Report of runs. page: the place of report.html. pictures: the places of the PNGs beside it, curve.png first."""

    runs: tuple[RunCurve, ...]
    page: str
    pictures: tuple[str, ...]

    def summary(self) -> str:
        return "\n".join([table(self.runs), "", terminal_curve(self.runs), f"page: {self.page}"])

    def to_dict(self) -> dict[str, Any]:
        """Return the figures and `curves` of each run, [step, perplexity] for train and valid; and the files."""
        runs = []
        for run in self.runs:
            curves = {kind: [list(point) for point in run.points(kind)] for kind in ("train", "valid")}
            runs.append({**run.figures(), "curves": curves})
        return {"runs": runs, "page": self.page, "pictures": list(self.pictures)}


def run(config: ReportConfig, flags: Flags | None = None) -> ReportResult:
    """Read the runs; write report.html and its PNGs to `out`, by default the folder of the first run. DataError."""
    from elmo_ray.report import page as report_page

    runs = tuple(RunCurve.read(path) for path in config.runs)
    if not runs:
        raise DataError("no run is named; usage: python -m elmo_ray.report RUN [RUN ...]")
    place = absolute(config.out if config.out is not None else config.runs[0])
    folder = local_folder(place)
    details = [report_page.read_details(run, name, config.words) for run, name in zip(runs, config.runs, strict=True)]
    pictures = report_page.draw(runs, folder)
    report_page.write_page(folder / PAGE, runs, details, pictures)
    try:
        push(folder, PAGE, "*.png")
    except OSError as error:
        raise DataError(f"{place}: cannot be written: {error.strerror}") from None
    return ReportResult(runs, join(place, PAGE), tuple(join(place, path.name) for path in pictures.values()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_verb("report", ReportConfig, run, argv)
