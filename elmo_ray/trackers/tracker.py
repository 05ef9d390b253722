"""What every tracker is: a run that takes records, settings, measures and files, and what is remembered of it."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from elmo_ray.training.metrics import Record


@dataclass
class Memory:
    """Memory of a run in a tracker, in RUN/trackers/NAME.json.

    key: marks the run in the tracker, and is made once. name: of the run, as the tracker shows it. address: of the
    tracker that the rest is about. run: its own id of the run. steps: the last step that it has, for each kind of
    record. files: the sha256 of each file that it has. held: folders in which its library holds what it may not have
    sent.
    """

    key: str = field(default_factory=lambda: secrets.token_hex(8))
    name: str = ""
    address: str = ""
    run: str | None = None
    steps: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    held: list[str] = field(default_factory=list)


class Tracker(Protocol):
    """A run in a tracker. Errors of its library pass; the Sender turns them into TrackerErrors."""

    def __init__(self, run_dir: Path, name: str) -> None: ...

    @property
    def address(self) -> str:
        """The place of the tracker, for messages and to notice that it is another one."""

    def open(self, memory: Memory) -> str:
        """Find or make the run, and return the place where it is shown.

        `memory.run` becomes its id, and `memory.steps` the last steps that the tracker has.
        """

    def write(self, records: Sequence[Record]) -> None:
        """Add records of the kinds "train" and "valid"."""

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Set the settings, dotted key -> plain value, in place of those before."""

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Add result.json's measures of the test text, as numbers and as a table."""

    def write_file(self, path: Path) -> None:
        """Add a file, in place of one of the same name."""

    def close(self, outcome: str) -> None:
        """Wait until everything is sent, and end the run: `finished`, `stopped` or `failed`."""


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record or a result by name, without those that are not finite."""
    return {
        name: float(value)
        for name, value in record.items()
        if name not in ("kind", "step", "time") and isinstance(value, int | float) and not isinstance(value, bool)
    }


def without_secrets(text: str) -> str:
    """Return the text without names and passwords in its addresses."""
    return re.sub(r"://[^/@\s]+@", "://", text)


EVALUATION_COLUMNS = (
    "text", "positions", "oov_rate", "perplexity_forward", "perplexity_backward", "perplexity", "nats_per_word",
    "bits_per_character",
)  # fmt: skip


def evaluation_rows(evaluation: Mapping[str, Any]) -> list[list[Any]]:
    """Return the rows of a table of the measures of the test text, with the columns EVALUATION_COLUMNS."""
    rows = [(Path(str(shard["path"])).name, shard) for shard in evaluation.get("shards", ())]
    rows += [("all", evaluation), ("without unknown", evaluation.get("without_unknown", {}))]
    return [[text, *(row.get(column) for column in EVALUATION_COLUMNS[1:])] for text, row in rows]
