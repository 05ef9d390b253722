"""The job of `embed` in plain values for its workers, its folder with a lock, and the record that a resumed job checks.

The folder is OUT, or OUT.parts for HDF5. It holds a shard for each finished unit, `_embed.json` with the record, the
unpacked texts, and the lock.
"""

from __future__ import annotations

import contextlib
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
from elmo_ray.storage import read_json, status
from elmo_ray.storage.files import file_lock

# Readers of a folder of Parquet files leave out names with an underscore.
RECORD, TEXT_FOLDER = "_embed.json", "_unpacked"

# All shards of an output have the same columns: a job that was begun with others, by an older version, begins anew.
_COLUMNS_VERSION = 2
# The same of the columns of documents, of the rules by which these become sentences, and of the files that share units.
_DOCUMENTS_VERSION = 2

BATCH_POSITIONS = 2048
"""Positions that a CPU computes at a time."""

Output = Literal["vectors", "means", "substitutes", "surprisal"]


@dataclass(frozen=True)
class EmbedJob:
    """Description of a job for its workers, without the unit that each makes.

    source, checkpoint, options, vocab: as for `open_source`, absolute. fingerprint: the hash of the model's weights and
    vocabulary. shard_folder: the folder of the finished units. device: the worker's, as PyTorch names it. form: all on
    which the sentences of documents depend. has_documents: sentences have the numbers of their documents beside them.
    keep, kept: the columns that are kept of documents, and their Arrow schema as bytes. The others are settings.
    """

    source: str
    checkpoint: str
    options: str | None
    vocab: str | None
    fingerprint: str
    shard_folder: str
    is_hdf5: bool
    output: Output
    layers: tuple[float, ...] | str
    dtype: str
    precision: Literal["fp32", "bf16"]
    carry: bool
    keep: tuple[str, ...]
    k: int
    batch_positions: int | None
    on_error: Literal["fail", "replace"]
    device: str
    form: dict[str, str]
    has_documents: bool = False
    kept: bytes = b""

    def fixed_settings(self) -> dict[str, Any]:
        """Return the values that the finished units depend on; they must be equal when a job is resumed."""
        names = ("fingerprint", "is_hdf5", "output", "layers", "dtype", "precision", "carry", "k", "on_error")
        values = asdict(self)
        # Batches of another size give other last bits.
        fixed = {name: values[name] for name in names}
        # As the kind of device does, which is not recorded either.
        fixed["batch_positions"] = self.batch_positions or BATCH_POSITIONS
        if self.output in ("substitutes", "surprisal"):
            fixed["columns"] = _COLUMNS_VERSION
        if self.has_documents:
            fixed |= {**self.form, "keep": list(self.keep), "documents": _DOCUMENTS_VERSION}
        return fixed | {"layers": self.layers if isinstance(self.layers, str) else list(self.layers)}


def check_use(out: Path, shard_folder: Path, is_hdf5: bool, flags: Flags) -> None:
    """Raise ConfigError for an OUT in use without --resume or --fresh, and for one that `embed` did not write."""
    ours = (shard_folder / RECORD).exists()
    if shard_folder.exists() and not ours:
        # A job that was killed before it wrote its record leaves these.
        others = not shard_folder.is_dir() or {path.name for path in shard_folder.iterdir()} - {".lock", TEXT_FOLDER}
        if others:
            raise ConfigError(f"out={out}: {shard_folder} is there and was not written by embed; name another place")
    used = ours or (is_hdf5 and out.exists())
    if used and not (flags.resume or flags.fresh or flags.dry_run):
        raise ConfigError(f"out={out}: is there already; --resume goes on with it, --fresh replaces it")
    if is_hdf5 and out.is_dir():
        raise ConfigError(f"out={out}: is a folder; HDF5 needs a file's name")
    if is_hdf5 and flags.resume and out.exists() and not ours:
        raise ConfigError(f"out={out}: is finished; --fresh makes it anew")


def remove_output(out: Path, shard_folder: Path) -> None:
    """Remove the files of an earlier job. Raises ConfigError."""
    try:
        if shard_folder.exists():
            shutil.rmtree(shard_folder)
        if out.is_file():
            out.unlink()
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be removed ({error.strerror})") from None


@contextlib.contextmanager
def locked(shard_folder: Path) -> Iterator[None]:
    """Make the folder, keep other jobs out of it, and remove half-written files of a killed job. Raises ConfigError."""
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, shard_folder)
        stack.callback(_remove_empty, shard_folder / TEXT_FOLDER)
        try:
            stack.enter_context(file_lock(shard_folder / ".lock"))
        except BlockingIOError:
            raise ConfigError(f"out: another embed is writing {shard_folder}; wait for its end or stop it") from None
        except OSError as error:
            raise ConfigError(f"out: {shard_folder} cannot be written ({error.strerror})") from None
        for stale in shard_folder.glob(".part-*"):
            stale.unlink(missing_ok=True)
        yield


def _remove_empty(folder: Path) -> None:
    """Remove the folder if nothing was written to it."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def job_record(
    job: EmbedJob, source: Source, block_bytes: int, files: Sequence[TextFile], units: Sequence[Unit]
) -> dict[str, Any]:
    """Return the record of a job: its model, settings and texts, and the number of its units and sentences."""
    firsts: dict[str, Unit] = {}
    for each in units:
        firsts.setdefault(each.path, each)
    inputs = []
    for file in files:
        unit, made = firsts.get(file.path), file.sentences
        starts = [(0, 0)] if made is None else made.starts
        ends = [sentence for sentence, _ in starts[1:]]
        ends.append(sum(count for count, _, _ in made.batches) if made is not None else 1)
        for name, (sentence, document), end in zip(file.sources, starts, ends, strict=True):
            found = status(name)
            first = unit if sentence < end else None  # None: the file has no sentence
            entry = {"path": name, "bytes": found.st_size, "mtime_ns": found.st_mtime_ns,
                     "first_sentence": None if first is None else first.first + sentence}  # fmt: skip
            if job.has_documents:
                entry["first_document"] = None if first is None else first.first_document + document
            inputs.append(entry)
    return {
        "format_version": 1,
        "source": source.describe(),
        "settings": {**job.fixed_settings(), "block_bytes": block_bytes},
        "in": inputs,
        "units": len(units),
        "sentences": sum(unit.count for unit in units),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def read_record(shard_folder: Path) -> dict[str, Any] | None:
    """Return the record of the job that was begun here, or None. Raises CheckpointError if the record is damaged."""
    path = shard_folder / RECORD
    if not path.exists():
        return None
    record = read_json(path) or {}
    if isinstance(record.get("settings"), dict) and isinstance(record.get("in"), list):
        return record
    raise CheckpointError(f"{path}: damaged; --fresh begins anew")


def check_same(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    """Raise ConfigError if the finished units come from other text, another model or other settings."""
    for name, value in new["settings"].items():
        if old["settings"].get(name) != value:
            what = "the model is another one" if name == "fingerprint" else (
                f"{name} was {old['settings'].get(name)} and is {value}"
            )  # fmt: skip
            raise ConfigError(f"--resume: {folder} was begun otherwise: {what}; --fresh begins anew")
    if old["in"] != new["in"]:
        raise ConfigError(f"--resume: {folder} was begun with other text, or the text has changed; --fresh begins anew")
