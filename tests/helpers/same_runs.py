"""Whether two runs came to the same bits: model, slots, states, cursors, audits, progress, the best, and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from elmo_ray.checkpoints.read import Checkpoint, newest_checkpoint, open_checkpoint
from elmo_ray.data.streams import StreamCursors
from helpers.tiny_runs import everything, progress_of, records

SHOWN = 8
"""More differences than these of the last checkpoint, of the best and of the metrics are only counted."""


def differences(left: Path, right: Path, planned: bool = True) -> list[str]:
    """What differs between the ends of two runs, times apart; empty if nothing does.

    Compared are the newest checkpoints, the best ones, and what the metrics say of each step (of the newest attempt
    that did it). Files are hashed first: CheckpointError where one is damaged. planned: whether both were
    started with the same number of steps before them.
    """
    last = [newest_checkpoint(run / "checkpoints") for run in (left, right)]
    best = [open_checkpoint(run / "best") if (run / "best").is_dir() else None for run in (left, right)]
    metrics = [f"metrics: {text}" for text in _of_records(*(_records(run, planned) for run in (left, right)))]
    return [*_short(_of_checkpoints("last", *last)), *_short(_of_checkpoints("best", *best)), *_short(metrics)]


def _records(run: Path, planned: bool) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if planned or k != "total_steps"} for record in records(run)]


def other_text(left: Path, right: Path) -> list[str]:
    """What differs in the text that two runs were trained on: steps, and the cursors and audit of each stream."""
    last = [newest_checkpoint(run / "checkpoints") for run in (left, right)]
    if last[0] is None or last[1] is None:
        return ["one of the runs has no checkpoint"]
    ours, theirs = (checkpoint.stream_tensors(0, checkpoint.streams) for checkpoint in last if checkpoint)
    found = [] if last[0].step == last[1].step else [f"step {last[0].step} and {last[1].step}"]
    names = [field.name for field in fields(StreamCursors)]
    return [*found, *(f"{name}: other values" for name in names if not same_bits(ours[name], theirs[name]))]


def _short(found: list[str]) -> list[str]:
    return found if len(found) <= SHOWN else [*found[:SHOWN], f"and {len(found) - SHOWN} more"]


def _of_checkpoints(what: str, left: Checkpoint | None, right: Checkpoint | None) -> list[str]:
    if left is None or right is None:
        return [] if left is right else [f"{what}: only one of the runs has it"]
    found = [] if left.step == right.step else [f"step {left.step} and {right.step}"]
    found += _of_values("progress.json: ", progress_of(left), progress_of(right))
    ours, theirs = everything(left), everything(right)
    found += [f"{name}: only in one of them" for name in sorted(ours.keys() ^ theirs.keys())]
    found += [f"{name}: other bits" for name in ours if name in theirs and not same_bits(ours[name], theirs[name])]
    return [f"{what}: {text}" for text in found]


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Stricter than `torch.equal`, to which -0 is 0, and no nan is another."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)))


def _of_records(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> list[str]:
    ours, theirs = ({(record["step"], record["kind"]): record for record in run} for run in (left, right))
    found = [f"{kind} of step {step}: only in one of them" for step, kind in sorted(ours.keys() ^ theirs.keys())]
    for step, kind in sorted(ours.keys() & theirs.keys()):
        found += _of_values(f"{kind} of step {step}: ", ours[step, kind], theirs[step, kind])
    return found


def _of_values(head: str, left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    return [
        f"{head}{key} is {left.get(key)} and {right.get(key)}"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    ]
