"""`report`: show runs and sweeps as tables and curves in the terminal, and as one page of HTML with pictures.

python -m elmo_ray.report RUN [RUN ...] [out=FOLDER] [words=[...]] [to=TRACKER] [--json FILE]
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elmo_ray.config import ReportConfig
from elmo_ray.config.command_line import Flags, run_verb
from elmo_ray.errors import DataError
from elmo_ray.report.curves import RunCurve, table, terminal_curve, unlike
from elmo_ray.report.find import find_runs, short_names
from elmo_ray.report.trials import is_sweep, read_trials, table_cells
from elmo_ray.report.trials import table as trial_table
from elmo_ray.storage import absolute, base_name, is_uri, join
from elmo_ray.storage.local_copy import local_folder, push
from elmo_ray.trackers import check_trackers
from elmo_ray.trackers.sender import send_rest

PAGE = "report.html"
_LONGEST_NAME = 100


@dataclass(frozen=True)
class ReportResult:
    """Report of runs.

    page: the place of report.html. pictures: the places of the PNGs beside it, curve.png first. sweeps: the table of
    each sweep. evaluations: for each run, the reasons why the measure of its test text does not compare with that of
    the first run. sent: a line for each run and tracker that it was sent to.
    """

    runs: tuple[RunCurve, ...]
    page: str
    pictures: tuple[str, ...]
    sweeps: tuple[str, ...] = ()
    evaluations: tuple[list[str], ...] = ()
    sent: tuple[str, ...] = ()

    def summary(self) -> str:
        sweeps = [line for shown in self.sweeps for line in (shown, "")]
        return "\n".join([*sweeps, table(self.runs), "", terminal_curve(self.runs), *self.sent, f"page: {self.page}"])

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
    """Read the runs, and write report.html and its PNGs.

    They go to `out`: by default the folder of the one run or sweep or, for several, a folder of their own beside the
    first. Then what the trackers of `to` do not have is sent. Raises DataError for a RUN that is none, and for files
    that cannot be written; TrackerError for a tracker that does not take what is sent.
    """
    from elmo_ray.report import page as report_page

    check_trackers(config.to, "to")
    named = find_runs(config.runs)
    if not named:
        raise DataError("no run is named; usage: python -m elmo_ray.report RUN [RUN ...]")
    sweeps = {place: read_trials(Path(place)) for place in named if not is_uri(place) and is_sweep(Path(place))}
    places = [
        place
        for each in named
        for place in ([str(t.folder) for t in sweeps[each] if t.records] if each in sweeps else [each])
    ]
    if not places:
        raise DataError(f"{named[0]}: no trial of this sweep has a record yet")
    places = list(dict.fromkeys(places))
    runs = tuple(RunCurve.read(place, name) for place, name in zip(places, short_names(places), strict=True))
    out = absolute(config.out) if config.out is not None else named[0] if len(named) == 1 else _own_folder(named)
    folder = local_folder(out)
    details: list[report_page.RunDetails] = []
    words: Sequence[str] = config.words
    for each in runs:
        details.append(report_page.read_details(each, words))
        words = words or details[-1].shown  # the runs of a comparison show the same words
    pictures = report_page.draw(runs, folder)
    report_page.write_page(folder / PAGE, runs, details, pictures, [table_cells(trials) for trials in sweeps.values()])
    try:
        push(folder, PAGE, "*.png")
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror}") from None
    shown = tuple(trial_table(trials) for trials in sweeps.values())
    evaluations = tuple(report_page.evaluation_differences(details))
    paths = tuple(join(out, path.name) for path in pictures.values())
    sent = tuple(send_rest(absolute(place), tracker) for tracker in config.to for place in places)
    return ReportResult(runs, join(out, PAGE), paths, shown, evaluations, sent)


def _own_folder(places: Sequence[str]) -> str:
    """Return the place for a comparison: `report-` and the names of the runs, beside the first of them."""
    name = "report-" + "-".join(map(base_name, places))
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{zlib.crc32(name.encode()):08x}"
    first = places[0].rstrip("/")
    return first[: -len(base_name(first))] + name


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_verb("report", ReportConfig, run, argv)
