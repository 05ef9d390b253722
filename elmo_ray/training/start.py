"""The three starts of a run, as they are logged: fresh, initialised from a SOURCE, or resumed from a checkpoint."""

from __future__ import annotations

from typing import Any

import torch

from elmo_ray import __version__
from elmo_ray.config import PretrainConfig
from elmo_ray.model.cpu_kernels import numba_version
from elmo_ray.training.checkpoint import Checkpoint
from elmo_ray.training.identity import changes

ORIGIN = "initialised_from"
"""The manifest's entry of a checkpoint at which a run begins that was initialised from another model."""


def is_initial(checkpoint: Checkpoint) -> bool:
    """Whether nothing has been trained since the model was taken from its SOURCE."""
    return checkpoint.step == 0 and ORIGIN in checkpoint.manifest


def conditions(device: torch.device, precision: str) -> dict[str, Any]:
    """What must be equal for a resumed run to have the same bits as one never stopped, besides `identity`."""
    return {
        "device": device.type,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numba": numba_version() if device.type == "cpu" else None,
        "elmo_ray": __version__,
    }


def start_messages(
    checkpoint: Checkpoint | None, config: PretrainConfig, total_steps: int, world: int, now: dict[str, Any]
) -> list[str]:
    """How the run starts, and what has changed since the checkpoint; now: the `conditions` of this process."""
    workers = f"{world} worker{'s' if world > 1 else ''}"
    if checkpoint is None:
        return [f"start: fresh, seed {config.run.seed}, {total_steps} steps, {workers}"]
    manifest = checkpoint.manifest
    if is_initial(checkpoint):
        return [f"start: initialised from {manifest[ORIGIN]}, {total_steps} steps, {workers}"]
    messages = [f"start: resume from step {checkpoint.step} of {total_steps}, {workers} ({checkpoint.path})"]
    now = {"workers": world, **now}
    before = {**manifest, "workers": manifest["world"]}
    moved = [f"{key} {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value]
    if moved:
        messages.append(f"changed since: {', '.join(moved)}; results will differ in rounding from an unbroken run's")
    settings = changes(checkpoint, config)
    if settings:
        messages.append(f"settings changed since: {', '.join(settings)}")
    return messages
