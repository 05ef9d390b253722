"""Runs and sweeps that the arguments of `report` stand for."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from elmo_ray.errors import DataError
from elmo_ray.report.trials import is_sweep
from elmo_ray.storage import absolute, is_uri, matches

logger = logging.getLogger(__name__)

_METRICS = "metrics/attempt-*.jsonl"


def find_runs(names: Sequence[str]) -> list[str]:
    """Return the absolute places of the runs and sweeps, each once, in the order of their names.

    names: paths, URIs and globs. A folder beside runs that is neither a run nor a sweep is left out with a warning.
    Raises DataError for a glob that matches no run, for a name that does not exist, and if no name is a run or a sweep.
    """
    places: list[str] = []
    others: list[str] = []
    for name in names:
        if any(sign in name for sign in "*?") if is_uri(name) else glob.has_magic(name) and not os.path.exists(name):
            found = _matches(name)
            if not found:
                raise DataError(f"{name}: matches no run and no sweep")
            places += found
        elif is_uri(name) or is_run(Path(name)) or is_sweep(Path(name)):
            places.append(absolute(name))
        elif os.path.exists(name):
            others.append(name)
        else:
            raise DataError(f"{name}: no such folder; is it a run?")
    if others and not places:
        raise DataError(f"{others[0]}: no metrics/attempt-*.jsonl and no trials{_hint_at(Path(others[0]))}")
    for name in others:
        logger.warning("%s: is neither a run nor a sweep and is left out", name)
    return list(dict.fromkeys(places))


def _hint_at(place: Path) -> str:
    """Return which run a folder or file is in, or how the runs in a folder are named."""
    parent = place.absolute().parent
    if is_run(parent):
        return f"; it is in the run {parent}: name that"
    if place.is_dir() and any(is_run(inside) or is_sweep(inside) for inside in place.iterdir() if inside.is_dir()):
        return f"; name the runs in it: '{place}/*'"
    return "; is it a run?"


def is_run(folder: Path) -> bool:
    """Return True if the folder has metrics."""
    return any(folder.glob(_METRICS))


def short_names(places: Sequence[str]) -> list[str]:
    """Return the last names of the places, with so many folders before them that no two are the same."""
    parts = [place.rstrip("/").split("/") for place in places]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def _matches(pattern: str) -> list[str]:
    if is_uri(pattern):
        files = matches(f"{pattern.rstrip('/')}/{_METRICS}")
        return list(dict.fromkeys(file.rsplit("/", 2)[0] for file in files))
    folders = (Path(place) for place in sorted(glob.glob(os.path.expanduser(pattern))))
    return [absolute(folder) for folder in folders if is_run(folder) or is_sweep(folder)]
