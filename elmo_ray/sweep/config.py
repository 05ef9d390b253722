"""The settings of `sweep`: those of the run that is varied, and how.

What a sweep tries: dotted keys, each with a way to draw its values, and the draws as a pure function of the seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, PlainValidator

from elmo_ray.config import PretrainConfig
from elmo_ray.config.finetune import FinetuneConfig, explicit
from elmo_ray.config.schema import Allowed, Duration, Int, Section, keys, show, unknown_key
from elmo_ray.errors import ConfigError, short

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


_SHARED = (
    "data.train", "data.valid", "data.test", "data.vocab", "data.prepared_dir", "data.block_bytes", "data.on_error",
    "data.holdout", "data.min_count", "data.max_vocab", "evaluate.streams", "train.validate_positions",
)  # fmt: skip
"""Trials share the prepared text, and are compared by it."""


def _space(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("not a space")
    return {str(key): item for key, item in value.items()}


Space = Annotated[
    dict[str, Any],
    PlainValidator(_space),
    Allowed("dotted keys, each with loguniform, uniform or randint: [low, high], or choice or grid: [...]"),
]


class SweepSection(Section):
    path: ClassVar[str] = "sweep."
    space: Space = Field({}, description="what is varied")
    trials: Int = Field(8, ge=1, le=100_000, description="number of trials, the first included")
    first: bool = Field(True, description="trial 0 is the configuration as it stands, and is never ended early")
    search: Literal["random", "grid", "optuna"] = Field(
        "random", description="optuna: an extra; grid: all combinations"
    )
    scheduler: Literal["asha"] | None = Field("asha", description="asha: ends trials that are worse than others early")
    grace: Duration = Field(Duration(100, "steps"), description="that no trial is ended before (asha); steps")
    reduction: float = Field(3.0, gt=1, le=100, description="of so many trials one goes on at each rung (asha)")
    concurrent: Int | None = Field(None, ge=1, le=10_000, description="trials at a time; null: as many as fit")
    show_every_s: float = Field(30.0, ge=1, le=86400, description="seconds between two tables in the terminal")

    def _unused(self) -> dict[str, str]:
        if self.scheduler == "asha":
            return {}
        return dict.fromkeys(("grace", "reduction"), "sweep.scheduler=null ends no trial early; remove it")

    def _contradictions(self) -> Iterator[str]:
        if self.grace.unit != "steps":
            yield f"sweep.grace={self.grace}: must be in steps"
        domains = []
        for key, spec in self.space.items():
            try:
                domains.append(parse_domain(spec))
            except ValueError as error:
                yield f"sweep.space.{short(key)}: {short(str(error), 200)}"
                return
        if self.search == "grid" and any(domain.is_range for domain in domains):
            yield "sweep.search=grid needs choice or grid for every key of sweep.space"
        elif self.search == "grid" and domains:
            count = math.prod(len(domain.values) for domain in domains) + self.first
            if count > self.trials:
                yield f"sweep.search=grid makes {count} trials with sweep.first: more than sweep.trials={self.trials}"
        if self.search == "optuna" and any(domain.kind == "grid" for domain in domains):
            yield "sweep.search=optuna cannot take grid; use choice"

    def domains(self) -> dict[str, Domain]:
        return {key: parse_domain(spec) for key, spec in self.space.items()}


class SweepConfig(FinetuneConfig):
    """With init.from the trials are runs of `finetune`, without it of `pretrain`."""

    sweep: SweepSection = SweepSection()

    def required(self) -> dict[str, str]:
        empty = super().required()
        empty.pop("init.from", None)
        return empty if self.sweep.space else {**empty, "sweep.space": "name what is varied"}

    def _contradictions(self) -> Iterator[str]:
        yield from super()._contradictions()
        if not isinstance(self.cluster.workers, int) or self.cluster.workers < 1:
            yield "cluster.workers: each trial of a sweep has its own workers: give their number, 1 or more"
        names = {key.name for key in keys(FinetuneConfig)}
        for key, domain in (self.sweep.domains() if self.sweep.space else {}).items():
            section = key.split(".")[0]
            if key not in names:
                yield f"sweep.space: {unknown_key(FinetuneConfig, key)}"
            elif key in _SHARED or section in ("run", "cluster") or (section == "init" and key != "init.optimizer"):
                yield f"sweep.space.{key}: trials share it; it cannot be varied"
            elif section == "model" and self.init.source is not None:
                yield f"sweep.space.{key}: the model is the source's; it cannot be varied"
            else:
                yield from self._bad_values(key, domain)

    def _bad_values(self, key: str, domain: Domain) -> Iterator[str]:
        for value in domain.values:
            try:
                self.trial({key: value})
            except ConfigError as error:
                yield f"sweep.space.{key}: {str(error).splitlines()[0]}"
                return

    def tree(self) -> dict[str, Any]:
        """What was given, as nested plain values, without `sweep`."""
        return nested({key: value for key, value in explicit(self, "") if not key.startswith("sweep.")})

    def trial(self, values: dict[str, Any]) -> FinetuneConfig | PretrainConfig:
        """The configuration of a trial; raises ConfigError for values that do not fit."""
        tree = self.tree()
        for key, value in values.items():
            place = tree
            *path, last = key.split(".")
            for name in path:
                place = place.setdefault(name, {})
            place[last] = value
        if self.init.source is not None:
            return FinetuneConfig.from_dict(tree)
        tree.pop("init", None)
        tree.pop("checkpoint", None)
        return PretrainConfig.from_dict(tree)

    def as_given(self) -> dict[str, Any]:
        """The configuration's own values of what is varied; raises ConfigError where one is not in its domain."""
        whole = dict(explicit_or_default(self.trial({})))
        values = {key: whole.get(key) for key in self.sweep.space}
        for key, domain in self.sweep.domains().items():
            value = values[key]
            if domain.is_range:
                inside = isinstance(value, int | float) and domain.values[0] <= value <= domain.values[1]
            else:
                inside = value in domain.values
            if not inside:
                raise ConfigError(
                    f"sweep.space.{key}: {show(value)}, as given, is not among its values, so sweep.search=optuna "
                    "cannot begin with it; widen the space, or set sweep.first=false"
                )
        return values

    def places(self, values: dict[str, Any]) -> dict[str, Any]:
        """As Optuna knows them: of a choice, the place among its values."""
        domains = self.sweep.domains()
        return {
            key: str(domains[key].values.index(value)) if domains[key].kind == "choice" else value
            for key, value in values.items()
        }

    def draws(self) -> list[dict[str, Any]]:
        """What each trial varies, where that does not depend on others' results; the first may vary nothing."""
        domains = self.sweep.domains()
        if self.sweep.search == "optuna":
            return [self.as_given()] if self.sweep.first else []
        first: list[dict[str, Any]] = [{}] if self.sweep.first else []
        if self.sweep.search == "grid":
            return [*first, *all_combinations(domains)]
        return [*first, *draw_trials(domains, self.sweep.trials - len(first), self.run.seed)]


def explicit_or_default(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All settings, as dotted key and plain value."""
    for name, value in section.to_dict().items():
        field = next(n for n, f in type(section).model_fields.items() if name in (n, f.alias))
        below = getattr(section, field)
        if isinstance(below, Section):
            yield from explicit_or_default(below, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested mappings."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        place = tree
        *path, last = key.split(".")
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    return tree
