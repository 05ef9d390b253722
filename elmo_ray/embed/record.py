"""OUT of `embed`: who may write it, and the record of what its finished units were made from and with.

What an embedding job does, in plain values that travel to its workers, and the record that a resumed one checks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from elmo_ray.checkpoints.source import Source
from elmo_ray.config.command_line import Flags
from elmo_ray.embed.units import TextFile, Unit
from elmo_ray.errors import CheckpointError, ConfigError
from elmo_ray.storage.files import file_lock

Output = Literal["vectors", "means", "substitutes", "surprisal"]


@dataclass(frozen=True)
class EmbedJob:
    """source, checkpoint, options, vocab: as for `open_source`; fingerprint: of its weights. out: the file or folder;
    parts: the folder of finished units. layers: as in the settings.
    """

    source: str
    checkpoint: str
    options: str | None
    vocab: str | None
    fingerprint: str
    parts: str
    is_hdf5: bool
    output: Output
    layers: tuple[float, ...] | str
    dtype: str
    precision: Literal["fp32", "bf16"]
    carry: bool
    column: str | None
    k: int
    batch_positions: int
    on_error: Literal["fail", "replace"]
    device: str

    def settled(self) -> dict[str, Any]:
        """What the finished units depend on: a job may only go on with all of it the same."""
        names = ("fingerprint", "is_hdf5", "output", "layers", "dtype", "precision", "carry", "column", "k", "on_error")
        values = asdict(self)
        # two ways of batching differ in the last bits
        return {name: values[name] for name in (*names, "batch_positions")} | {"layers": _plain(self.layers)}


def _plain(layers: tuple[float, ...] | str) -> list[float] | str:
    return layers if isinstance(layers, str) else list(layers)


logger = logging.getLogger("elmo_ray.embed")

# names that readers of a folder of Parquet files leave out
RECORD, TEXT_FOLDER = "_embed.json", "_unpacked"


def check_use(out: Path, parts: Path, is_hdf5: bool, flags: Flags) -> None:
    """Raises ConfigError for a used OUT without --resume or --fresh, and for one that is none of ours."""
    ours = (parts / RECORD).exists()
    begun = {".lock", TEXT_FOLDER}  # of a job that was killed before it wrote its record
    if parts.exists() and not ours and (not parts.is_dir() or {path.name for path in parts.iterdir()} - begun):
        raise ConfigError(f"out={out}: {parts} is there and was not written by embed; name another place")
    used = ours or (is_hdf5 and out.exists())
    if used and not (flags.resume or flags.fresh or flags.dry_run):
        raise ConfigError(f"out={out}: is there already; --resume goes on with it, --fresh replaces it")
    if is_hdf5 and out.is_dir():
        raise ConfigError(f"out={out}: is a folder; HDF5 needs a file's name")
    if is_hdf5 and flags.resume and out.exists() and not ours:
        raise ConfigError(f"out={out}: is finished; --fresh makes it anew")


def remove(out: Path, parts: Path) -> None:
    """Takes away what an earlier job wrote. Raises ConfigError."""
    try:
        if parts.exists():
            shutil.rmtree(parts)
        if out.is_file():
            out.unlink()
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be removed ({error.strerror})") from None


@contextlib.contextmanager
def locked(parts: Path) -> Iterator[None]:
    """Makes the folder and keeps other jobs out of it. What a killed job left half written is removed."""
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, parts)
        try:
            stack.enter_context(file_lock(parts / ".lock"))
        except BlockingIOError:
            raise ConfigError(f"out: another embed is writing {parts}; wait for its end or stop it") from None
        except OSError as error:
            raise ConfigError(f"out: {parts} cannot be written ({error.strerror})") from None
        for stale in parts.glob(".part-*"):
            stale.unlink(missing_ok=True)
        yield


def _remove_empty(parts: Path) -> None:
    """Remove the folder where nothing was written to it."""
    with contextlib.suppress(OSError):
        parts.rmdir()


def job_record(
    job: EmbedJob, source: Source, block_bytes: int, files: Sequence[TextFile], units: Sequence[Unit]
) -> dict[str, Any]:
    """What a job is, kept beside its parts."""
    firsts: dict[str, int] = {}
    for unit in units:
        firsts.setdefault(unit.path, unit.first)
    inputs = []
    for file in files:
        status = os.stat(file.source)
        inputs.append({"path": file.source, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns,
                       "first_sentence": firsts.get(file.path)})  # fmt: skip
    return {
        "format_version": 1,
        "source": source.describe(),
        "settings": {**job.settled(), "block_bytes": block_bytes},
        "in": inputs,
        "units": len(units),
        "sentences": sum(unit.count for unit in units),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def read_record(parts: Path) -> dict[str, Any] | None:
    """What a job that was begun here wrote down; raises CheckpointError where that is damaged."""
    path = parts / RECORD
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and isinstance(record["settings"], dict) and isinstance(record["in"], list):
            return record
    except (OSError, ValueError, KeyError):
        pass
    raise CheckpointError(f"{path}: damaged; --fresh begins anew")


def check_same(old: dict[str, Any], new: dict[str, Any], parts: Path) -> None:
    """Raises ConfigError where finished units come from other text, another model or other settings."""
    for name, value in new["settings"].items():
        if old["settings"].get(name) != value:
            what = "the model is another one" if name == "fingerprint" else (
                f"{name} was {old['settings'].get(name)} and is {value}"
            )  # fmt: skip
            raise ConfigError(f"--resume: {parts} was begun otherwise: {what}; --fresh begins anew")
    if old["in"] != new["in"]:
        raise ConfigError(f"--resume: {parts} was begun with other text, or the text has changed; --fresh begins anew")
