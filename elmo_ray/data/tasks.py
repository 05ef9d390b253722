"""The work of `prepare`, in tasks that know nothing of each other and can run in any process.

A task is a dictionary of plain values; its result is bytes. Files are read and, for unpacking, written where the task
runs, so the processes must see the same folders.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from elmo_ray.data import index_file
from elmo_ray.data.scan import hash_file, scan_segment
from elmo_ray.data.text import file_status
from elmo_ray.data.unpack import unpack
from elmo_ray.errors import ElmoRayError

if TYPE_CHECKING:
    import pyarrow as pa


def unpack_task(source: str, target: str) -> dict[str, Any]:
    """Writes the text of a compressed shard; the result is empty."""
    return {"kind": "unpack", "source": source, "target": target}


def scan_task(
    path: str, number: int, block_bytes: int, on_error: str, cap: int | None, source: str | None = None
) -> dict[str, Any]:
    """Scans a segment, see `scan_segment`; the result is `Segment.pack()`."""
    return {
        "kind": "scan",
        "path": path,
        "number": number,
        "block_bytes": block_bytes,
        "on_error": on_error,
        "cap": cap,
        "source": source,
    }


def hash_task(path: str) -> dict[str, Any]:
    """Hashes a file; the result is an index file with its `size`, `mtime_ns` and `sha256` (hexadecimal)."""
    return {"kind": "hash", "path": path}


def perform_rows(rows: pa.Table) -> pa.Table:
    """Does the tasks in the JSON column `task` of an Arrow table, in a Ray Data process.

    Returns the columns `number` (as given), `result` and `error`. A user's mistake is a value, because Ray wraps
    exceptions and may retry them.
    """
    import pyarrow as pa

    results: list[bytes] = []
    errors: list[str] = []
    for text in rows["task"].to_pylist():
        result, error = b"", ""
        try:
            result = perform(json.loads(text))
        except ElmoRayError as mistake:
            error = str(mistake)
        results.append(result)
        errors.append(error)
    return pa.table({"number": rows["number"], "result": pa.array(results, pa.large_binary()), "error": errors})


def perform(task: dict[str, Any]) -> bytes:
    """Does a task in this process. Raises DataError as the functions it stands for do."""
    arguments = {name: value for name, value in task.items() if name != "kind"}
    if task["kind"] == "unpack":
        unpack(arguments["source"], arguments["target"])
        return b""
    if task["kind"] == "hash":
        path = arguments["path"]
        status = file_status(path)
        fields = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": hash_file(path)}
        return index_file.pack(fields, {})
    return scan_segment(**arguments).pack()
