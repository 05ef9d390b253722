"""Identity of a run: the settings that a checkpoint and a resumed run must share, and those that may change.

`start_messages` are the log's lines about the three kinds of start: fresh, initialised from a SOURCE, or resumed from a
checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from elmo_ray import __version__, kernels
from elmo_ray.checkpoints.read import Checkpoint
from elmo_ray.config import PretrainConfig
from elmo_ray.config.model import ModelConfig
from elmo_ray.config.schema import flatten, show
from elmo_ray.config.yaml_reader import parse_yaml
from elmo_ray.errors import CheckpointError, ConfigError, short
from elmo_ray.storage import base_name


def identity(config: PretrainConfig, corpus_fingerprint: str, vocabulary_sha256: str) -> dict[str, Any]:
    """Return the values that must be equal, by setting: those of the text, its order and division, and the model."""
    return {
        "data.train": f"text with sha256 {corpus_fingerprint}",
        "data.vocab": f"words with sha256 {vocabulary_sha256}",
        "data.streams": config.data.streams,
        "data.shuffle": config.data.shuffle,
        # another seed would order the rest of an epoch anew: some of its text would be read twice and some never
        "run.seed": config.run.seed,
        "optim.name": config.optim.name,
        # with momentum the optimizer has a state
        **({"optim.momentum": config.optim.momentum} if config.optim.name == "sgd" else {}),
        "softmax.tied": config.softmax.tied,
        # the kinds with a table of words have the same parameters, and may follow each other
        **({} if config.softmax.facts.has_table else {"softmax.kind": config.softmax.kind}),
        **flatten(config.model.to_dict(), "model."),
    }


TEXT_KEYS = ("data.train", "data.vocab")
"""Keys of `identity` whose values are known only when the text is prepared."""

_MODEL_DEFAULTS = flatten(ModelConfig().to_dict(), "model.")


def check_identity(checkpoint: Checkpoint, expected: Mapping[str, Any], without: Collection[str] = ()) -> None:
    """Raise ConfigError, with a line for each key in which the checkpoint differs from this run's `identity`.

    expected: this run's `identity`. without: keys that are not compared. Raises CheckpointError if the checkpoint has
    no identity.
    """
    saved = checkpoint.manifest.get("identity")
    if not isinstance(saved, dict):
        raise CheckpointError(f"{checkpoint.place}: its manifest does not say of which run it is")
    # checkpoints from before there was a setting of the model do not have it, and are models with its default
    saved = {**{key: value for key, value in _MODEL_DEFAULTS.items() if key in expected}, **saved}
    keys = [key for key in dict.fromkeys([*expected, *map(str, saved)]) if saved.get(key) != expected.get(key)]
    keys = [key for key in keys if key not in without]
    if "data.train" in keys and "data.vocab" in keys:
        keys.remove("data.vocab")  # most often counted from the text, so that the text alone is to blame
    if keys:
        raise ConfigError(
            "\n".join(
                f"{key} is {_shown(expected.get(key))}, but {base_name(checkpoint.place)} was made with "
                f"{_shown(saved.get(key))}; use the same, or --fresh, or another run.name"
                for key in keys
            )
        )


def saved_config(checkpoint: Checkpoint) -> PretrainConfig:
    """Return the configuration with which a checkpoint was made; CheckpointError if it cannot be read."""
    place = checkpoint.at("config.yaml")
    try:
        values = parse_yaml(checkpoint.text("config.yaml"), place)
        if not isinstance(values, dict):
            raise ConfigError("must be a mapping of sections")
        return PretrainConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{place}: {short(str(error).removeprefix(f'{place}: '), 1000)}") from None


def saved_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the settings with which a checkpoint was made, dotted key -> plain value, valid in this version or not.

    Raises CheckpointError if they cannot be read.
    """
    place = checkpoint.at("config.yaml")
    try:
        values = parse_yaml(checkpoint.text("config.yaml"), place)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{place}: has no settings")
    return flatten(values)


def changes(checkpoint: Checkpoint, config: PretrainConfig) -> list[str]:
    """Return the settings that differ from those of the checkpoint, such as "optim.lr 0.2 -> 0.1"."""
    before, now = saved_settings(checkpoint), flatten(config.to_dict())
    return [
        f"{key} {_shown(before.get(key))} -> {_shown(now.get(key))}"
        for key in dict.fromkeys([*now, *before])
        if before.get(key) != now.get(key)
    ]


def _shown(value: Any) -> str:
    return short(show(value), 200)


INITIALISED_FROM = "initialised_from"
"""Key of the manifest, in the first checkpoint of a run that was initialised from another model: the model's name."""


SOURCE_WORDS = "source_words"
"""Key of the manifest, in the same checkpoint: in which numbers its vocabulary and softmax differ from the source's."""


def is_initial(checkpoint: Checkpoint) -> bool:
    """Return True if nothing has been trained since the model was taken from its SOURCE."""
    return checkpoint.step == 0 and INITIALISED_FROM in checkpoint.manifest


def conditions(device: torch.device, precision: str) -> dict[str, Any]:
    """Return the values that, besides `identity`, must be equal for a resumed run to have an unbroken run's bits."""
    return {
        "device": device.type,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numba": kernels.compiler_version() if device.type == "cpu" else None,
        "elmo_ray": __version__,
    }


def start_messages(
    checkpoint: Checkpoint | None, config: PretrainConfig, total_steps: int, world: int, now: dict[str, Any]
) -> list[str]:
    """Return the log's lines about this start: its kind, and the changes since the checkpoint.

    checkpoint: None for a fresh start. world: number of workers. now: the `conditions` of this process.
    """
    workers = f"{world} worker{'s' if world > 1 else ''}"
    if checkpoint is None:
        return [f"start: fresh, seed {config.run.seed}, {total_steps} steps, {workers}"]
    manifest = checkpoint.manifest
    if is_initial(checkpoint):
        return [f"start: initialised from {manifest[INITIALISED_FROM]}, {total_steps} steps, {workers}"]
    messages = [f"start: resume from step {checkpoint.step} of {total_steps}, {workers} ({checkpoint.place})"]
    now = {"workers": world, **now}
    before = {**manifest, "workers": manifest["world"]}
    moved = [f"{key} {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value]
    if moved:
        messages.append(f"changed since: {', '.join(moved)}; results will differ in rounding from an unbroken run's")
    settings = changes(checkpoint, config)
    if settings:
        messages.append(f"settings changed since: {', '.join(settings)}")
    return messages
