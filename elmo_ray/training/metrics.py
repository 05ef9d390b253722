"""A run's metrics: one JSONL file for each attempt, which the console line, TensorBoard and `report` are fed from.

A record is a flat mapping with `kind` ("train" or "valid"), `step` (optimizer steps done), `time` (seconds since 1970),
and numbers: `epoch` (fractional), `positions` (trained on so far), `loss` (nats per position: mean over directions),
`loss_forward`, `loss_backward`, `perplexity`, `perplexity_forward`, `perplexity_backward` (exp of those; the backward
ones are None for a forward-only model), and for "train" `grad_norm`, `lr`, `positions_per_second`, `data_wait` (share
of a step's time that waited for text), `memory` (bytes that worker 0 holds, of its GPU where it has one). Numbers that
are not finite are written as null. A record of kind "event" has a `message` instead: how the attempt started, and the
like.

The records of a run's metrics, from what the loop has counted. Their fields are described in `elmo_ray.metrics`.
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
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from elmo_ray.data.measures import perplexity
from elmo_ray.elmo.scoring import LossSums
from elmo_ray.errors import DataError
from elmo_ray.training.snapshot import Progress

_LOG = logging.getLogger(__name__)
_FILE = re.compile(r"^attempt-(\d+)\.jsonl$")

Record = dict[str, Any]


class Sink(Protocol):
    """A follower of the metrics file. Its errors end it with a warning, and never end training."""

    name: str

    def write(self, record: Record) -> None:
        """Take a record, whose numbers are finite or None."""

    def close(self) -> None: ...


class TensorBoardSink:
    """Writes the numbers of all records below RUN/tensorboard."""

    name = "TensorBoard's folder"

    def __init__(self, board: Any) -> None:
        self._board = board

    @classmethod
    def make(cls, directory: Path, attempt: int) -> TensorBoardSink | None:
        """Return a sink where TensorBoard is installed."""
        board = _summary_writer(directory / "tensorboard")
        return None if board is None else cls(board)

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if name not in ("kind", "step", "time") and isinstance(value, int | float):
                self._board.add_scalar(f"{record['kind']}/{name}", value, record["step"], walltime=record["time"])

    def close(self) -> None:
        self._board.close()


class CsvSink:
    """Writes the records of training and validation as RUN/metrics/attempt-AAA.csv, for spreadsheets."""

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


SINKS: list[Callable[[Path, int], Sink | None]] = [TensorBoardSink.make, CsvSink]
"""What makes the sinks of a run, from its folder and the number of the attempt; None where a sink is not to be had."""


class MetricsWriter:
    """Appends records to RUN/metrics/attempt-AAA.jsonl, then hands them to the sinks.

    The line is on its way to the disk when `write` returns, so that a crash loses at most the line being written. While
    the disk is full or away, training goes on: lines wait in memory and are written when it is back.
    """

    def __init__(self, directory: str | Path, attempt: int, sinks: bool = True) -> None:
        self.path = metrics_path(directory, attempt)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _end_torn_line(self.path)
        self._file: io.FileIO | None = None
        self._waiting = bytearray()
        self._failing = False
        self._sinks: list[Sink] = []
        for make in SINKS if sinks else []:
            try:
                if (sink := make(Path(directory), attempt)) is not None:
                    self._sinks.append(sink)
            except Exception as error:
                _LOG.warning("a follower of the metrics cannot be opened (%s); metrics/ has everything", error)

    def write(self, record: Mapping[str, Any]) -> None:
        """`record` has `kind` and `step`; `time` is added where it lacks."""
        plain = {name: _number(value) for name, value in {"time": time.time(), **record}.items()}
        self._waiting += (json.dumps(plain, allow_nan=False) + "\n").encode()
        self._flush()
        for sink in list(self._sinks):
            try:
                sink.write(plain)
            except Exception as error:  # a sink's own thread that met a full disk tells of it in its own ways
                _LOG.warning("%s cannot be written (%s) and ends here; metrics/ has everything", sink.name, error)
                self._sinks.remove(sink)

    def _flush(self) -> None:
        try:
            if self._file is None:
                self._file = open(self.path, "ab", buffering=0)
            while self._waiting:
                # part of a line may be all that a disk has room for: the rest of it comes first next time
                del self._waiting[: self._file.write(self._waiting)]
            self._failing = False
        except OSError as error:
            if not self._failing:
                _LOG.warning("%s: cannot be written now (%s); training goes on", self.path, error.strerror or error)
            self._failing = True
            self._release()  # opened anew next time: a file system that was away may not know this handle any more

    def _release(self) -> None:
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
        self._file = None

    def sync(self) -> None:
        """Everything so far is on the disk when this returns, if the disk can be written."""
        self._flush()
        with contextlib.suppress(OSError):
            if self._file is not None:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._release()
        for sink in self._sinks:
            with contextlib.suppress(Exception):  # as above
                sink.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class MetricsFollower:
    """Shows in a driver's terminal what rank 0 writes, wherever it runs: reads the lines that are new since the last
    `poll`.

    Made before training starts, it begins where the files end.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self._folder = Path(run_dir) / "metrics"
        self._read: dict[str, int] = {path.name: path.stat().st_size for path in self._folder.glob("attempt-*.jsonl")}

    def poll(self) -> list[Record]:
        """New whole records, oldest first."""
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
    """All records of a run by step; where attempts overlap, the newest one's. DataError if there is no metrics file.

    A last line without an end, left by a crash, is skipped; any other line that is no record is a DataError.
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
        # What an earlier attempt did after the checkpoint from which this one went on has been undone.
        start = _start(records)
        newest = {key: record for key, record in newest.items() if key[1] <= start}
        newest.update({(record["kind"], record["step"]): record for record in records if record["kind"] != "event"})
        events += [record for record in records if record["kind"] == "event"]
    return sorted([*newest.values(), *events], key=lambda record: (record["step"], record["kind"]))


def _start(records: list[Record]) -> float:
    """The step from which an attempt went on: of its first event, or before its first record."""
    if not records:
        return math.inf
    first = records[0]
    return float(first["step"] if first["kind"] == "event" else min(record["step"] for record in records) - 1)


def metrics_path(run_dir: str | Path, attempt: int) -> Path:
    """The metrics file of an attempt."""
    return Path(run_dir) / "metrics" / f"attempt-{attempt:03d}.jsonl"


def console_line(record: Mapping[str, Any], total_steps: int) -> str:
    """One line for a person: step, epoch, loss, perplexities, speed and the time left at that speed.

    The time left needs `positions_per_second`, and `positions` and `step` for the mean positions of a step.
    """
    width = len(str(total_steps))
    backward = record.get("perplexity_backward")
    parts = [
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
        parts.append(f"{speed:,.0f} positions/s" if speed else "")
        parts.append(f"waits {wait:.0%}" if wait is not None and wait >= 0.05 else "")
        left = _seconds_left(record, total_steps)
        parts.append(f"{clock(left)} left" if left is not None else "")
    return "  ".join(part for part in parts if part)


def clock(seconds: float) -> str:
    """3723 as 1h02m, 75 as 1m15s, 8 as 8s."""
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
    """JSON has no infinity, and numpy's and torch's scalars are not its numbers."""
    if hasattr(value, "item") and not isinstance(value, str | int | float):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _end_torn_line(path: Path) -> None:
    """An attempt that goes on in the same file must not append to half a line."""
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
        _LOG.info("%s line %d has no end and is skipped", path, len(lines) + 1)
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
    """torch's writer, or None where TensorBoard is not installed."""
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
    """Of the steps since the last record: mean `losses` of each direction in nats, `seconds` of training, of which
    `waited` for text; `replaced` damaged places of the text so far; `memory` in bytes of worker 0."""
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


def valid_record(step: int, total: LossSums, seconds: float) -> dict[str, Any]:
    """Of a validation after `step` that took `seconds`."""
    return {
        "kind": "valid",
        "step": step,
        "positions": total.positions,
        "loss": sum(total.mean) / len(total.mean),
        **total.perplexities(),
        "seconds": seconds,
    }


def not_finite(step: int, norm: float, losses: Sequence[Sequence[float]], last: int | None) -> str:
    """Of a step without update: the gradient's norm, each worker's sums of losses, the step of the last checkpoint."""
    workers = [rank for rank, sums in enumerate(losses) if not all(map(math.isfinite, sums))]
    where = f"worker {', '.join(map(str, workers))}"
    if not workers:
        where = "all workers (the loss is finite, the gradient is not)"
    return (
        f"step {step}: not finite at {where}: gradient norm {norm}, loss sums {losses}; no update was made; "
        f"last good checkpoint: {'none' if last is None else f'step {last}'}"
    )
