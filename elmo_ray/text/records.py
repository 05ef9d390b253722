"""Formats of files with documents: how the lines of a file become records, objects as JSON has them.

This is the seam for other formats: a function that makes records of lines, and an entry in `FORMATS`. The settings
`data.format`, `data.column` and `embed.keep`, and the errors, with file and line, follow from that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from elmo_ray.errors import short

Record = dict[str, Any] | ValueError
"""What the columns of a document hold, or why its line cannot be read, as words that follow the name of the line."""


@dataclass(frozen=True)
class Format:
    """Format of files.

    endings: of the names of such files, in lower case, before .gz or .zst. records: makes records of the lines of a
    file, both with the number of the line from 0; None where records are not made of lines. any_line: a line can be
    read without those before it, so that a large file is divided among CPUs.
    """

    endings: tuple[str, ...] = ()
    records: Callable[[Iterable[tuple[int, str]]], Iterator[tuple[int, Record]]] | None = None
    any_line: bool = True


def json_records(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, Record]]:
    """Yield the objects of JSONL; empty lines are none."""
    for number, line in lines:
        text = line.strip()
        if not text:
            continue
        try:
            record = json.loads(text)
            what = "" if isinstance(record, dict) else f"is {short(text, 40)} and no object"
        except (ValueError, RecursionError) as error:
            what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        if what:
            is_list = number == 0 and text[0] == "["
            cure = "; write the objects of a list as one line each, as jq -c '.[]' does" if is_list else ""
            record = ValueError(f"is not JSON ({what}){cure}")
        yield number, record


FORMATS = {
    "text": Format(),
    "jsonl": Format((".jsonl", ".ndjson"), json_records),
    "parquet": Format((".parquet", ".parq"), any_line=False),
}
"""The formats by the values of `data.format`."""


def format_of(name: str) -> str:
    """Return the format of a file by its name: `text` where no other one has its ending."""
    name = name.lower().removesuffix(".gz").removesuffix(".zst")
    return next((key for key, each in FORMATS.items() if name.endswith(each.endings)), "text")
