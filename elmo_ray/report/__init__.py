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
from elmo_ray.report.curves import RunCurve, table, terminal_curve, unlike
from elmo_ray.storage import absolute, join
from elmo_ray.storage.local_copy import local_folder, push

PAGE = "report.html"


@dataclass(frozen=True)
class ReportResult:
    """Report of runs. page: the place of report.html. pictures: the places of the PNGs beside it, curve.png first.

    evaluations: for each run, the reasons why the measure of its test text does not compare with that of the first run.
    """

    runs: tuple[RunCurve, ...]
    page: str
    pictures: tuple[str, ...]
    evaluations: tuple[list[str], ...] = ()

    def summary(self) -> str:
        return "\n".join([table(self.runs), "", terminal_curve(self.runs), f"page: {self.page}"])

    def to_dict(self) -> dict[str, Any]:
        """Return the figures and `curves` of each run, [step, perplexity] for train and valid; and the files.

        `not_comparable` has, for train, valid and evaluation, the reasons why a run does not compare with the first.
        """
        runs = []
        reasons = {**unlike(self.runs), "evaluation": self.evaluations}
        for number, run in enumerate(self.runs):
            curves = {kind: [list(point) for point in run.points(kind)] for kind in ("train", "valid")}
            kinds = {"train": "train", "held-out": "valid", "evaluation": "evaluation"}
            differing = {kinds[kind]: each[number] for kind, each in reasons.items() if each}
            runs.append({**run.figures(), "curves": curves, "not_comparable": differing})
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
    evaluations = tuple(report_page.evaluation_differences(details))
    paths = tuple(join(place, path.name) for path in pictures.values())
    return ReportResult(runs, join(place, PAGE), paths, evaluations)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_verb("report", ReportConfig, run, argv)
