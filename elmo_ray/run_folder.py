"""A run's folder, STORAGE/NAME, and the three ways to start in it: fresh, resume, or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from elmo_ray.config import PretrainConfig
from elmo_ray.errors import CheckpointError, ConfigError
from elmo_ray.training.checkpoint import newest_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """path: absolute. step: of its newest checkpoint, or None. finished: that is the end `train.duration` asks for."""

    path: Path
    step: int | None
    finished: bool


def open_run(config: PretrainConfig, resume: bool, fresh: bool) -> RunFolder:
    """The folder to run in. A used name needs `resume` or `fresh`; `fresh` moves the old run aside and loses nothing.

    Raises ConfigError where the name is used and neither is given, or the storage cannot be written.
    """
    storage = Path(os.path.abspath(os.path.expanduser(config.run.storage_path)))
    name = config.run.name or time.strftime("run-%Y%m%d-%H%M%S")
    path = storage / name
    used = any((path / part).exists() for part in ("checkpoints", "metrics", "config.yaml"))
    if used and fresh:
        aside = path.with_name(f"{name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
        os.replace(path, aside)
        logger.info("--fresh: the run that was in %s is now in %s", path, aside)
        used = False
    if used and not resume:
        raise ConfigError(f"run.name={name}: {path} has a run already; --resume goes on with it, --fresh starts anew")
    if resume and not used:
        logger.info("--resume: there is no run in %s yet; starting fresh", path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.storage_path={storage}: cannot be written ({error.strerror})") from None
    step, finished = None, False
    if used:
        with contextlib.suppress(CheckpointError):  # the workers will say what is wrong with it
            newest = newest_checkpoint(path / "checkpoints")
            if newest is not None:
                saved = yaml.safe_load(newest.text("config.yaml")).get("train", {})
                asked = saved.get("duration") == str(config.train.duration)
                step, finished = newest.step, asked and bool(newest.json("progress.json").get("finished"))
    return RunFolder(path, step, finished)
