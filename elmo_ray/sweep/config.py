"""Settings of `sweep`: those of the run that is varied, and the space of the values that are tried.

A space gives each dotted key a domain of values. The values of a trial are a pure function of the seed and the trial.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, PlainValidator

from elmo_ray.config import PretrainConfig
from elmo_ray.config.finetune import FinetuneConfig, explicit
from elmo_ray.config.schema import Allowed, Duration, Int, Section, flatten, keys, nest, set_nested, show, unknown_key
from elmo_ray.errors import ConfigError, short

KINDS = ("loguniform", "uniform", "randint", "choice", "grid")


@dataclass(frozen=True)
class Domain:
    """Values that one key can take. kind: one of KINDS.

    values: (low, high) of a range (randint includes both), or all values of `choice` and `grid`.
    """

    kind: str
    values: tuple[Any, ...]

    @property
    def is_range(self) -> bool:
        """Return True if the values are (low, high)."""
        return self.kind not in ("choice", "grid")

    def draw(self, random: np.random.Generator) -> Any:
        """Return one value, drawn from `random`."""
        if not self.is_range:
            return self.values[int(random.integers(len(self.values)))]
        low, high = self.values
        if self.kind == "randint":
            return int(random.integers(low, high + 1))
        if self.kind == "uniform":
            return float(random.uniform(low, high))
        return float(min(high, max(low, math.exp(random.uniform(math.log(low), math.log(high))))))


def parse_domain(spec: Any) -> Domain:
    """Return the domain for {kind: values}; raise a ValueError that says what is wrong."""
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
    """Return the values of each trial, by dotted key.

    The keys with `grid` go through all their combinations again and again. The others are drawn from (seed, trial).
    """
    grids = [key for key, domain in space.items() if domain.kind == "grid"]
    combinations = list(itertools.product(*(space[key].values for key in grids)))
    drawn = []
    for number in range(trials):
        random = np.random.Generator(np.random.Philox(key=[seed, number]))
        fixed = dict(zip(grids, combinations[number % len(combinations)], strict=True))
        drawn.append({key: fixed[key] if key in fixed else domain.draw(random) for key, domain in space.items()})
    return drawn


def all_combinations(space: Mapping[str, Domain]) -> list[dict[str, Any]]:
    """Return every combination of the values of `choice` and `grid`."""
    return [
        dict(zip(space, values, strict=True)) for values in itertools.product(*(each.values for each in space.values()))
    ]


_SHARED = (
    "data.train", "data.valid", "data.test", "data.vocab", "data.prepared_dir", "data.block_bytes", "data.on_error",
    "data.format", "data.column", "data.tokenizer", "data.language", "data.normalize",
    "data.holdout", "data.deduplicate", "data.min_count", "data.max_vocab", "train.validate_positions",
    "model.bidirectional",
)  # fmt: skip
"""Keys that cannot vary: all trials share the prepared text and are compared on it, in the same directions."""


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
    """Section `sweep`."""

    path: ClassVar[str] = "sweep."
    space: Space = Field({}, description="What is varied.")
    trials: Int = Field(8, ge=1, le=100_000, description="The number of trials, trial 0 included.")
    first: bool = Field(True, description="Trial 0 is the configuration as it is, and it is never ended early.")
    search: Literal["random", "grid", "optuna"] = Field(
        "random", description="grid tries all combinations; optuna needs pip install 'elmo-ray[optuna]'."
    )
    scheduler: Literal["asha"] | None = Field("asha", description="asha ends trials early that are worse than others.")
    grace: Duration = Field(Duration(100, "steps"), description="asha ends no trial before this many steps.")
    reduction: float = Field(3.0, gt=1, le=100, description="At each rung asha lets one of this many trials continue.")
    concurrent: Int | None = Field(
        None, ge=1, le=10_000, description="How many trials run at a time; null: as many as fit."
    )
    show_every_s: float = Field(
        30.0, ge=1, le=86400, description="The number of seconds between two tables in the terminal."
    )

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
        """Return the domain of each varied key."""
        return {key: parse_domain(spec) for key, spec in self.space.items()}


class SweepConfig(FinetuneConfig):
    """Configuration of `sweep`. With init.from the trials are runs of `finetune`, without it runs of `pretrain`."""

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
            elif (
                key in _SHARED
                or section in ("run", "cluster", "evaluate")
                or (section == "init" and key != "init.optimizer")
            ):
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
        """Return the settings that the user gave, as nested plain values, without the section `sweep`."""
        return nest({key: value for key, value in explicit(self, "") if not key.startswith("sweep.")})

    def trial(self, values: dict[str, Any]) -> FinetuneConfig | PretrainConfig:
        """Return the configuration of a trial; raise ConfigError for values that do not fit.

        Settings of the file that have no effect beside these values are left out.
        """
        base = self.tree()
        root: type[PretrainConfig] = FinetuneConfig
        if self.init.source is None:
            root = PretrainConfig
            base.pop("init", None)
            base.pop("checkpoint", None)
        tree = copy.deepcopy(base)
        for key, value in values.items():
            set_nested(tree, key, value)
        return root.from_overridden(base, tree, values)[0]

    def as_given(self) -> dict[str, Any]:
        """Return the values of the varied keys in the file itself; raise ConfigError if one is not in its domain."""
        whole = flatten(self.trial({}).to_dict())
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

    def optuna_values(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the values in the form that Optuna takes: for a choice, the index of the value as a string."""
        domains = self.sweep.domains()
        return {
            key: str(domains[key].values.index(value)) if domains[key].kind == "choice" else value
            for key, value in values.items()
        }

    def planned_trials(self) -> list[dict[str, Any]]:
        """Return the varied values of each trial that does not depend on the results of others.

        The values of the first trial may be empty: it is the file as it is.
        """
        domains = self.sweep.domains()
        if self.sweep.search == "optuna":
            return [self.as_given()] if self.sweep.first else []
        first: list[dict[str, Any]] = [{}] if self.sweep.first else []
        if self.sweep.search == "grid":
            return [*first, *all_combinations(domains)]
        return [*first, *draw_trials(domains, self.sweep.trials - len(first), self.run.seed)]
