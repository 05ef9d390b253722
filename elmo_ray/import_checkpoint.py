"""A SOURCE of any kind as an elmo_ray checkpoint: weights, softmax and optimizer slots, as far as it has them."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elmo_ray.config import PretrainConfig
from elmo_ray.errors import CheckpointError, ConfigError
from elmo_ray.source import BEST, Source, open_source
from elmo_ray.training.checkpoint import copy_best, open_checkpoint
from elmo_ray.training.identity import identity
from elmo_ray.training.initial import write_initial
from elmo_ray.training.manifest import MANIFEST

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImportResult:
    """has_softmax, has_slots: what the source had, and so what the checkpoint has."""

    source: str
    out_dir: Path
    bytes: dict[str, int]
    has_softmax: bool
    has_slots: bool

    def summary(self) -> str:
        files = ", ".join(f"{name} {size:,} bytes" for name, size in self.bytes.items())
        has = [f"{'with' if there else 'without'} {what}" for what, there in self._parts()]
        return f"source: {self.source}\n{self.out_dir}: {files}\ncheckpoint {', '.join(has)}; verified by its hashes"

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "out": str(self.out_dir),
            "bytes": self.bytes,
            **{what.replace(" ", "_"): there for what, there in self._parts()},
        }

    def _parts(self) -> list[tuple[str, bool]]:
        return [("softmax", self.has_softmax), ("optimizer slots", self.has_slots)]


def import_checkpoint(
    source: str | os.PathLike[str] | None,
    out_dir: str | os.PathLike[str] | None,
    checkpoint: str = BEST,
    options: str | None = None,
    vocab: str | None = None,
) -> ImportResult:
    """Write a checkpoint folder `out_dir`; arguments as `open_source`. A checkpoint of ours is copied as it is.

    Raises ConfigError where `out_dir` is a folder of something else, CheckpointError where it cannot be written.
    """
    if out_dir is None:
        raise ConfigError("out is empty: name the folder to write")
    target = Path(os.path.abspath(os.path.expanduser(out_dir)))
    if target.exists() and not (target / MANIFEST).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"out={out_dir}: exists and is no checkpoint; name a new folder")
    opened = open_source(source, checkpoint, options, vocab)
    save_as_checkpoint(opened, target)
    written = open_checkpoint(target)
    sizes = {name: int(entry["size"]) for name, entry in written.manifest["files"].items()}
    logger.info("written to %s", target)
    return ImportResult(opened.describe(), target, sizes, opened.has_softmax, opened.slots is not None)


def save_as_checkpoint(source: Source, target: Path) -> None:
    """The source as a checkpoint folder, which replaces one that is there."""
    if (source.path / MANIFEST).is_file():
        if source.path == target:
            raise ConfigError(f"out={target}: is the SOURCE itself")
        try:
            copy_best(open_checkpoint(source.path, verify=False), target)
        except OSError as error:
            raise CheckpointError(f"{target}: cannot be written ({error.strerror or error})") from None
        return
    config = PretrainConfig.from_dict(
        {
            "data": {"streams": 1},
            "model": source.config.to_dict(),
            "softmax": source.softmax.to_dict(),
        }
    )
    words = source.vocabulary
    about = identity(config, "", words.sha256) | {"data.train": f"unknown: imported from {source.path.name}"}
    slots = None if source.slots is None else source.slots()
    target.parent.mkdir(parents=True, exist_ok=True)
    write_initial(
        target, config, words, source.model, slots, about, source.step or 0, {"imported_from": str(source.path)}
    )
