"""Metrics of a run: their records, the files that hold them, and the sinks that follow them.

Each attempt of a run writes one JSONL file; the console, TensorBoard, the CSV file and `report` read the same records.
A record is a flat mapping with `kind` ("train" or "valid"), `step` (optimizer steps done), `time` (seconds since 1970),
and numbers: `epoch` (fractional), `positions` (of "train": trained on so far; of "valid": the held-out ones that were
measured), `elapsed` (seconds of training so far, over all starts of the run, without the pauses between them), `loss`
(nats per position: mean over directions), `loss_forward`, `loss_backward`, `perplexity`, `perplexity_forward`,
`perplexity_backward` (exp of those; the backward ones are None for a forward-only model). Records of kind "train" also
have `grad_norm`, `lr`, `positions_per_second`, `data_wait` (share of the time that was spent waiting for text),
`memory` (bytes in use by worker 0, of its GPU if it has one), `skipped` (steps without update so far) and `replaced`
(damaged places of the text so far), `tflops` (TFLOP/s of a worker, as `flops` counts them) and `mfu` (their share of
the peak of its device, the model FLOPs utilization); those of kind "valid" have `perplexity_mean`, `streams` (the
number in which the text was read) and `seconds`. Numbers that are not finite are written as null. A record of kind
"event" has a `message` instead, such as how the attempt started.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import math
import os
import re
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from elmo_ray.data.measures import perplexity
from elmo_ray.errors import DataError

if TYPE_CHECKING:  # the processes of trackers read metrics, and need no torch for it
    from elmo_ray.elmo.scoring import LossSums
    from elmo_ray.training.snapshot import Progress

logger = logging.getLogger(__name__)
_FILE = re.compile(r"^attempt-(\d+)\.jsonl$")

Record = dict[str, Any]


class Sink(Protocol):
    """Receiver of records beside the JSONL file. An error closes it with a warning and never ends training."""

    name: str

    def write(self, record: Record) -> None:
        """Write a record, whose numbers are finite or None."""

    def close(self) -> None: ...


class TensorBoardSink:
    """Sink that writes the numbers of all records below RUN/tensorboard."""

    name = "TensorBoard's folder"

    def __init__(self, board: Any) -> None:
        self._board = board

    @classmethod
    def make(cls, directory: Path, attempt: int) -> TensorBoardSink | None:
        """Return a sink; None where TensorBoard is not installed."""
        board = _summary_writer(directory / "tensorboard")
        return None if board is None else cls(board)

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if name not in ("kind", "step", "time") and isinstance(value, int | float):
                self._board.add_scalar(f"{record['kind']}/{name}", value, record["step"], walltime=record["time"])

    def close(self) -> None:
        self._board.close()


class CsvSink:
    """Sink that writes the records of training and validation to RUN/metrics/attempt-AAA.csv, for spreadsheets."""

    name = "the CSV file of the metrics"
    columns = (
        ("kind", "step", "time", "epoch", "positions", "loss", "loss_forward", "loss_backward")
        + ("perplexity", "perplexity_forward", "perplexity_backward", "grad_norm", "lr")
        + ("positions_per_second", "data_wait", "memory")
    )

    def __init__(self, directory: Path, attempt: int) -> None:
        self._file = open(metrics_path(directory, attempt).with_suffix(".csv"), "w", encoding="utf-8", newline="")
        self._rows = csv.DictWriter(self._file, self.columns, extrasaction="ignore")
        self._rows.writeheader()

    def write(self, record: Record) -> None:
        if record["kind"] in ("train", "valid"):
            self._rows.writerow(record)
            self._file.flush()

    def close(self) -> None:
        self._file.close()


MakeSink = Callable[[Path, int], Sink | None]
"""Maker of a run's sink, called with its folder and the number of the attempt. None means no such sink here."""


def sinks_of(report_to: Sequence[str] | None) -> list[MakeSink]:
    """Return the makers of the sinks of a run with this `run.report_to`.

    Trackers on other machines are no sinks: their processes follow the JSONL files (`elmo_ray.trackers`).
    """
    board: list[MakeSink] = [TensorBoardSink.make] if report_to is None or "tensorboard" in report_to else []
    return [*board, CsvSink]


class MetricsWriter:
    """Writer of records to RUN/metrics/attempt-AAA.jsonl and to the sinks.

    A line has been given to the operating system when `write` returns, so that a crash loses at most the line being
    written. While the disk is full or cannot be reached, training continues; lines wait in memory to be written later.
    """

    def __init__(self, directory: str | Path, attempt: int, sinks: Sequence[MakeSink] = ()) -> None:
        self.path = metrics_path(directory, attempt)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _end_torn_line(self.path)
        self._file: io.FileIO | None = None
        self._waiting = bytearray()
        self._failing = False
        self._sinks: list[Sink] = []
        for make in sinks:
            try:
                if (sink := make(Path(directory), attempt)) is not None:
                    self._sinks.append(sink)
            except Exception as error:
                logger.warning("a sink of the metrics cannot be opened (%s); metrics/ has all records", error)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record, which has `kind` and `step`; `time` is added if it is missing."""
        plain = {name: _number(value) for name, value in {"time": time.time(), **record}.items()}
        self._waiting += (json.dumps(plain, allow_nan=False) + "\n").encode()
        self._flush()
        for sink in list(self._sinks):
            try:
                sink.write(plain)
            except Exception as error:  # of any kind: a sink with a thread of its own reports a full disk as it likes
                logger.warning("%s cannot be written (%s) and ends here; metrics/ has all records", sink.name, error)
                self._sinks.remove(sink)

    def _flush(self) -> None:
        try:
            if self._file is None:
                self._file = open(self.path, "ab", buffering=0)
            while self._waiting:
                # a full disk may take a part of a line only; the rest is then written first next time
                del self._waiting[: self._file.write(self._waiting)]
            self._failing = False
        except OSError as error:
            if not self._failing:
                logger.warning("%s: cannot be written now (%s); training goes on", self.path, error.strerror or error)
            self._failing = True
            self._release()  # open the file anew next time: its handle may no longer be valid

    def _release(self) -> None:
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
        self._file = None

    def sync(self) -> None:
        """Write all records so far to the disk before returning, if the disk can be written."""
        self._flush()
        with contextlib.suppress(OSError):
            if self._file is not None:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._release()
        for sink in self._sinks:
            with contextlib.suppress(Exception):  # of any kind, as in `write`
                sink.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class MetricsFollower:
    """Reader of the records that rank 0 writes, wherever rank 0 runs.

    It begins at the present end of the files, so it is to be made before training starts; from_start: at their start.
    """

    def __init__(self, run_dir: str | Path, from_start: bool = False) -> None:
        self._folder = Path(run_dir) / "metrics"
        files = [] if from_start else self._folder.glob("attempt-*.jsonl")
        self._read: dict[str, int] = {path.name: path.stat().st_size for path in files}

    def poll(self) -> list[Record]:
        """Return the complete records since the last `poll`, oldest first."""
        records: list[Record] = []
        for path in sorted(self._folder.glob("attempt-*.jsonl")):
            start = self._read.get(path.name, 0)
            with open(path, "rb") as file:
                file.seek(start)
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._read[path.name] = start + len(whole)
            records.extend(json.loads(line) for line in whole.splitlines() if line.strip())
        return records


def read_metrics(run_dir: str | Path) -> list[Record]:
    """Return all records of a run, sorted by step; where attempts overlap, those of the newest one.

    A last line without an end, left by a crash, is skipped. Raises DataError if there is no metrics file, or for any
    other line that is no record.
    """
    folder = Path(run_dir) / "metrics"
    names = os.listdir(folder) if folder.is_dir() else []
    attempts = sorted((int(match[1]), match[0]) for match in map(_FILE.match, names) if match)
    if not attempts:
        raise DataError(f"{folder}: no attempt-*.jsonl; is {run_dir} a run?")
    newest: dict[tuple[str, int], Record] = {}
    events: list[Record] = []
    for _, name in attempts:
        records = _read_file(folder / name)
        # this attempt continued from a checkpoint: later steps of earlier attempts do not count
        start = _start(records)
        newest = {key: record for key, record in newest.items() if key[1] <= start}
        newest.update({(record["kind"], record["step"]): record for record in records if record["kind"] != "event"})
        events += [record for record in records if record["kind"] == "event"]
    return sorted([*newest.values(), *events], key=lambda record: (record["step"], record["kind"]))


def _start(records: list[Record]) -> float:
    """Return the step from which an attempt continued: that of its first event, or before its first record."""
    if not records:
        return math.inf
    first = records[0]
    return float(first["step"] if first["kind"] == "event" else min(record["step"] for record in records) - 1)


def metrics_path(run_dir: str | Path, attempt: int) -> Path:
    """Return the metrics file of an attempt."""
    return Path(run_dir) / "metrics" / f"attempt-{attempt:03d}.jsonl"


def console_line(record: Mapping[str, Any], total_steps: int) -> str:
    """Return one line for a person: step, epoch, loss, perplexities, speed and the time left at that speed.

    The time left is computed from `positions_per_second`, `positions` and `step`.
    """
    width = len(str(total_steps))
    backward = record.get("perplexity_backward")
    fields = [
        f"step {record['step']:>{width}}/{total_steps}",
        f"epoch {record['epoch']:.2f}" if record.get("epoch") is not None else "",
        "held-out" if record["kind"] == "valid" else "",
        f"loss {_show(record.get('loss'), '.4f')}",
        f"perplexity forward {_show(record.get('perplexity_forward'), '.1f')}"
        + (f" backward {_show(backward, '.1f')}" if "perplexity_backward" in record else ""),
    ]
    if record["kind"] == "train":
        speed = record.get("positions_per_second")
        wait = record.get("data_wait")
        fields.append(f"{speed:,.0f} positions/s" if speed else "")
        fields.append(flops_text(record))
        fields.append(f"waits {wait:.0%}" if wait is not None and wait >= 0.05 else "")
        left = _seconds_left(record, total_steps)
        fields.append(f"{clock(left)} left" if left is not None else "")
    return "  ".join(field for field in fields if field)


def flops_text(values: Mapping[str, Any]) -> str:
    """Return `tflops` and `mfu` of a record or a result as text; empty where it has none."""
    tflops, share = values.get("tflops"), values.get("mfu")
    if not isinstance(tflops, int | float) or not isinstance(share, int | float):
        return ""
    return f"{tflops:.3g} TFLOP/s ({share:.0%} of peak)"


def clock(seconds: float) -> str:
    """Return a duration as text: 3723 as 1h02m, 75 as 1m15s, 8 as 8s."""
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def _seconds_left(record: Mapping[str, Any], total_steps: int) -> float | None:
    speed, positions, step = record.get("positions_per_second"), record.get("positions"), record["step"]
    if not speed or not positions or not step:
        return None
    return float((total_steps - step) * (positions / step) / speed)


def _show(value: Any, form: str) -> str:
    if not isinstance(value, int | float):
        return "-"
    return format(value, form) if abs(value) < 1e7 else format(value, ".3g")


def _number(value: Any) -> Any:
    """Return a value for JSON: numpy's and torch's scalars as numbers, and numbers that are not finite as None."""
    if hasattr(value, "item") and not isinstance(value, str | int | float):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _end_torn_line(path: Path) -> None:
    """Remove a last line without an end, so that the next record begins a line of its own."""
    if path.exists() and path.stat().st_size:
        with open(path, "rb+") as file:
            data = file.read()
            if not data.endswith(b"\n"):
                file.truncate(data.rfind(b"\n") + 1)


def _read_file(path: Path) -> list[Record]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    records: list[Record] = []
    if lines.pop():
        logger.info("%s line %d has no end and is skipped", path, len(lines) + 1)
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            kind, step = record["kind"], record["step"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path} line {number}: not a record of metrics") from None
        if not isinstance(kind, str) or not isinstance(step, int):
            raise DataError(f"{path} line {number}: not a record of metrics")
        records.append(record)
    return records


def _summary_writer(folder: Path) -> Any:
    """Return torch's writer; None where TensorBoard is not installed."""
    # TensorBoard looks for this module before TensorFlow, whose import takes seconds and logs many lines; where it is
    # there, TensorBoard writes files with its own code.
    sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))


def train_record(
    progress: Progress,
    losses: Sequence[float],
    norm: float,
    lr: float,
    seconds: float,
    waited: float,
    replaced: int,
    memory: int,
) -> dict[str, Any]:
    """Return the record of the steps since the last one.

    losses: mean of each direction in nats. norm: of the last gradient. lr: the last learning rate. seconds: of training
    since the last record; waited: the seconds of these spent waiting for text. replaced: damaged places of the text so
    far. memory: bytes in use by worker 0.
    """
    mean = sum(losses) / len(losses)
    backward = losses[1] if len(losses) > 1 else None
    return {
        "kind": "train",
        "step": progress.step,
        "positions": progress.positions,
        "loss": mean,
        "loss_forward": losses[0],
        "loss_backward": backward,
        "perplexity_forward": perplexity(losses[0]),
        "perplexity_backward": None if backward is None else perplexity(backward),
        "perplexity": perplexity(mean),
        "grad_norm": norm,
        "lr": lr,
        "positions_per_second": progress.window_positions / seconds,
        "data_wait": waited / seconds,
        "memory": memory,
        "skipped": progress.skipped,
        "replaced": replaced,
    }


def valid_record(step: int, total: LossSums, streams: int, seconds: float) -> dict[str, Any]:
    """Return the record of a validation in so many streams after `step` that took `seconds`."""
    return {
        "kind": "valid",
        "step": step,
        "positions": total.positions,
        "loss": sum(total.mean) / len(total.mean),
        **total.perplexities(),
        "streams": streams,
        "seconds": seconds,
    }


def not_finite(step: int, norm: float, losses: Sequence[Sequence[float]], last: int | None) -> str:
    """Return the message about a step without update.

    norm: of the gradient. losses: each worker's sums for each direction. last: the step of the last checkpoint.
    """
    workers = [rank for rank, sums in enumerate(losses) if not all(map(math.isfinite, sums))]
    where = f"worker {', '.join(map(str, workers))}"
    if not workers:
        where = "all workers (the loss is finite, the gradient is not)"
    return (
        f"step {step}: not finite at {where}: gradient norm {norm}, loss sums {losses}; no update was made; "
        f"last good checkpoint: {'none' if last is None else f'step {last}'}"
    )
