"""Checks of a checkpoint's tensors: names, shapes, types of numbers, and cursors that reading a corpus can give.

The tensors may be a stranger's: whatever they hold, these functions raise nothing but CheckpointError.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from elmo_ray.data.streams import StreamCursors
from elmo_ray.errors import CheckpointError, short

FLOATS = (torch.float32, torch.float64)
_LIMIT = 1 << 62


def check_forms(place: str, saved: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError, beginning with `place`, unless `saved` has exactly these names and shapes, in floats."""
    for name in sorted(saved.keys() | shapes.keys()):
        found, expected = _shape(saved.get(name)), shapes.get(name)
        if found is None:
            raise CheckpointError(f"{place}: has no {short(name)}, which config.yaml and vocab.txt ask for")
        if expected is None:
            raise CheckpointError(f"{place}: has {short(name)}, for which config.yaml and vocab.txt have no place")
        if found != expected:
            raise CheckpointError(
                f"{place}: {short(name)} has shape {short(str(found))}, config.yaml and vocab.txt ask for {expected}"
            )
        if saved[name].dtype not in FLOATS:
            raise CheckpointError(f"{place}: {name} has numbers of type {saved[name].dtype}, not float32 or float64")


def check_slots(place: str, slots: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless each slot, `<kind>.<parameter>`, has its parameter's shape and type.

    A slot of the kind `step` is one float32 number. The optimizer itself checks that it has all kinds that it needs.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for key, slot in slots.items():
        kind, _, name = key.partition(".")
        if name in parameters:
            shapes[key] = () if kind == "step" else tuple(parameters[name].shape)
            expected = torch.float32 if kind == "step" else parameters[name].dtype
            if slot.dtype != expected:
                raise CheckpointError(f"{place}: {key} has numbers of type {slot.dtype}, not {expected}")
    check_forms(place, slots, shapes)


def check_cursors(place: str, rows: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless the cursors of some streams, int64 [B] each, can come from reading a corpus.

    A stream of n positions an epoch has consumed epoch * n + offset positions, with 0 <= offset < n. The check is that
    such an n exists, for which the corpus itself is not needed.
    """
    for name in StreamCursors.start(0).arrays():
        tensor = rows.get(name)
        if tensor is None or tensor.ndim != 1 or tensor.dtype != torch.int64:
            raise CheckpointError(f"{place}: {name} is missing or not a whole number for each stream")
        if bool((tensor < 0).any()) or bool((tensor >= _LIMIT).any()):
            raise CheckpointError(f"{place}: {name} has {_outlier(tensor)}, which is out of range")
    columns = (rows[name].tolist() for name in ("epoch", "offset", "audit_positions"))
    for epoch, offset, consumed in zip(*columns, strict=True):
        size, rest = divmod(consumed - offset, epoch) if epoch else (0, 0)
        if offset != consumed if epoch == 0 else rest or offset >= size:
            raise CheckpointError(
                f"{place}: a stream cannot be at epoch {epoch}, offset {offset} with {consumed} positions read"
            )


def _outlier(tensor: Tensor) -> int:
    return int(tensor.min()) if int(tensor.min()) < 0 else int(tensor.max())


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)
