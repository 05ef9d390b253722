"""The actor of `embed`'s Ray Data pool: a worker behind tables of one column. Needs no Ray itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from elmo_ray.embedding.job import EmbedJob
from elmo_ray.embedding.texts import Unit
from elmo_ray.embedding.worker import EmbedWorker
from elmo_ray.errors import ElmoRayError
from elmo_ray.machine import leave_background

if TYPE_CHECKING:
    import pyarrow as pa


class EmbedActor:
    """Made once a process, with the job as JSON; called with units as JSON in the column `unit`."""

    def __init__(self, job: str):
        values = json.loads(job)
        layers = values["layers"]
        values["layers"] = layers if isinstance(layers, str) else tuple(layers)
        self.job = EmbedJob(**values)
        self.worker: EmbedWorker | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The columns unit, words, seconds and error. A user's mistake is a value: Ray would retry an exception."""
        import pyarrow as pa

        rows: list[dict[str, Any]] = []
        for text in batch.column("unit").to_pylist():
            unit = Unit(**json.loads(text))
            row: dict[str, Any] = {"unit": unit.number, "words": 0, "seconds": 0.0, "error": ""}
            try:
                if self.worker is None:
                    leave_background()
                    self.worker = EmbedWorker(self.job)
                row |= self.worker.make(unit)
            except ElmoRayError as mistake:
                row["error"] = str(mistake)
            rows.append(row)
        return pa.Table.from_pylist(rows)
