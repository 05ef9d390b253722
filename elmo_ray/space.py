"""What a sweep tries: dotted keys, each with a way to draw its values, and the draws as a pure function of the seed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

KINDS = ("loguniform", "uniform", "randint", "choice", "grid")


@dataclass(frozen=True)
class Domain:
    """kind: one of KINDS. values: [low, high] of a range (randint's ends are both taken), else all that there are."""

    kind: str
    values: tuple[Any, ...]

    @property
    def is_range(self) -> bool:
        return self.kind not in ("choice", "grid")

    def draw(self, random: np.random.Generator) -> Any:
        if not self.is_range:
            return self.values[int(random.integers(len(self.values)))]
        low, high = self.values
        if self.kind == "randint":
            return int(random.integers(low, high + 1))
        if self.kind == "uniform":
            return float(random.uniform(low, high))
        return float(min(high, max(low, math.exp(random.uniform(math.log(low), math.log(high))))))


def parse_domain(spec: Any) -> Domain:
    """Of {kind: values}; raises ValueError that says what is wrong with it."""
    if not isinstance(spec, Mapping) or len(spec) != 1:
        raise ValueError(f"must be one of {', '.join(KINDS)} with a list")
    kind, values = next(iter(spec.items()))
    if kind not in KINDS:
        raise ValueError(f"{kind} is unknown; must be one of {', '.join(KINDS)}")
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"{kind} needs a list of values")
    if kind in ("choice", "grid"):
        return Domain(kind, tuple(values))
    numbers = len(values) == 2 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numbers or not values[0] < values[1]:
        raise ValueError(f"{kind} needs [low, high] with low < high")
    if kind == "loguniform" and values[0] <= 0:
        raise ValueError("loguniform needs low > 0")
    if kind == "randint":
        if any(v != int(v) for v in values):
            raise ValueError("randint needs integers")
        values = [int(v) for v in values]
    return Domain(kind, tuple(values))


def draw_trials(space: Mapping[str, Domain], trials: int, seed: int) -> list[dict[str, Any]]:
    """The values of each trial by dotted key. Values of `grid` go through all their combinations again and again, the
    others are drawn from (seed, trial)."""
    grids = [key for key, domain in space.items() if domain.kind == "grid"]
    combinations = list(itertools.product(*(space[key].values for key in grids)))
    drawn = []
    for number in range(trials):
        random = np.random.Generator(np.random.Philox(key=[seed, number]))
        fixed = dict(zip(grids, combinations[number % len(combinations)], strict=True))
        drawn.append({key: fixed[key] if key in fixed else domain.draw(random) for key, domain in space.items()})
    return drawn


def all_combinations(space: Mapping[str, Domain]) -> list[dict[str, Any]]:
    """Every combination of the values of `choice` and `grid`."""
    return [
        dict(zip(space, values, strict=True)) for values in itertools.product(*(each.values for each in space.values()))
    ]
