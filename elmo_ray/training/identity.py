"""What makes two starts the same run: what a checkpoint must share with the run that goes on from it, and what may
change."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from elmo_ray.config import PretrainConfig
from elmo_ray.config_schema import show
from elmo_ray.config_yaml import parse_yaml, short
from elmo_ray.errors import CheckpointError, ConfigError
from elmo_ray.storage import base_name
from elmo_ray.training.checkpoint import Checkpoint


def identity(config: PretrainConfig, corpus_fingerprint: str, vocabulary_sha256: str) -> dict[str, Any]:
    """What must be equal, by the key that would be to blame: the text, its order and division, and the model.

    Another seed would order the rest of an epoch anew: some of its text would be read twice and some never.
    """
    return {
        "data.train": f"text with sha256 {corpus_fingerprint}",
        "data.vocab": f"words with sha256 {vocabulary_sha256}",
        "data.streams": config.data.streams,
        "data.shuffle": config.data.shuffle,
        "run.seed": config.run.seed,
        "optim.name": config.optim.name,
        "softmax.tied": config.softmax.tied,
        **dict(_flat(config.model.to_dict(), "model.")),
    }


TEXT_KEYS = ("data.train", "data.vocab")
"""Those of `identity` that are known only when the text is prepared."""


def check_identity(checkpoint: Checkpoint, expected: Mapping[str, Any], without: Collection[str] = ()) -> None:
    """Raise ConfigError, a line for each key in which the checkpoint differs from this run's `identity`.

    without: keys not to look at. CheckpointError if the checkpoint does not say of which run it is.
    """
    saved = checkpoint.manifest.get("identity")
    if not isinstance(saved, dict):
        raise CheckpointError(f"{checkpoint.path}: its manifest does not say of which run it is")
    keys = [key for key in dict.fromkeys([*expected, *map(str, saved)]) if saved.get(key) != expected.get(key)]
    keys = [key for key in keys if key not in without]
    if "data.train" in keys and "data.vocab" in keys:
        keys.remove("data.vocab")  # counted from the other text, most often
    if keys:
        raise ConfigError(
            "\n".join(
                f"{key} is {_shown(expected.get(key))}, but {base_name(str(checkpoint.path))} was made with "
                f"{_shown(saved.get(key))}; use the same, or --fresh, or another run.name"
                for key in keys
            )
        )


def saved_config(checkpoint: Checkpoint) -> PretrainConfig:
    """The configuration that a checkpoint was made with; CheckpointError if it has none that can be read."""
    place = f"{checkpoint.path}/config.yaml"
    try:
        values = parse_yaml(checkpoint.text("config.yaml"), place)
        if not isinstance(values, dict):
            raise ConfigError("must be a mapping of sections")
        return PretrainConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{place}: {short(str(error).removeprefix(f'{place}: '), 1000)}") from None


def saved_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Dotted key -> plain value of the configuration that a checkpoint was made with; CheckpointError if it has none
    that can be read."""
    place = f"{checkpoint.path}/config.yaml"
    try:
        values = parse_yaml(checkpoint.text("config.yaml"), place)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{place}: has no settings")
    return dict(_flat(values, ""))


def changes(checkpoint: Checkpoint, config: PretrainConfig) -> list[str]:
    """The settings that are not those of the run when it wrote the checkpoint, as "optim.lr 0.2 -> 0.1"."""
    before, now = saved_settings(checkpoint), dict(_flat(config.to_dict(), ""))
    return [
        f"{key} {_shown(before.get(key))} -> {_shown(now.get(key))}"
        for key in dict.fromkeys([*now, *before])
        if before.get(key) != now.get(key)
    ]


def _flat(values: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    return short(show(value), 200)
