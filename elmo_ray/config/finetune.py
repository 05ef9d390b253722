"""Settings of `finetune`: those of a training run, and the SOURCE that it starts from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from elmo_ray.config.model import CharCnnConfig, LstmConfig, ModelConfig
from elmo_ray.config.schema import Section, show
from elmo_ray.config.softmax import SOFTMAX_KINDS
from elmo_ray.config.training import COUNTED, SAMPLE, CheckpointName, InitConfig, PretrainConfig
from elmo_ray.errors import ConfigError

SOFTMAX_FIRST = 1000
"""Number of steps in which a softmax that is new to the SOURCE trains alone."""


class _AnyCharCnn(CharCnnConfig):
    def _contradictions(self) -> Iterator[str]:
        return iter(())


class _AnyLstm(LstmConfig):
    def _contradictions(self) -> Iterator[str]:
        return iter(())


class SourceModelConfig(ModelConfig):
    """Settings of `model` that are compared with those of the SOURCE.

    A user may give only some of them, so together with the defaults they need not be a valid model.
    """

    char_cnn: _AnyCharCnn = _AnyCharCnn()
    lstm: _AnyLstm = _AnyLstm()

    def _unused(self) -> dict[str, str]:
        return {}

    def _contradictions(self) -> Iterator[str]:
        return iter(())


class FinetuneInitConfig(InitConfig):
    """Section `init` of `finetune`, with the choice between a new and the SOURCE's optimizer state."""

    # The accumulators of a long training are sums of squares of all its gradients. Updates of lr / sqrt(sum) are then
    # tiny, and new text would be learned as slowly as the end of the old text. So they start anew by default.
    optimizer: Literal["keep", "reset"] = Field(
        "reset", description="keep takes the SOURCE's optimizer state, which makes updates tiny after a long training."
    )


class FinetuneConfig(PretrainConfig):
    """Configuration of `finetune`."""

    model: SourceModelConfig = SourceModelConfig()
    init: FinetuneInitConfig = FinetuneInitConfig()
    checkpoint: CheckpointName = "best"

    def _contradictions(self) -> Iterator[str]:
        yield from super()._contradictions()
        if self.train.validate_every is None:
            yield "train.validate_every=null: the model is measured before and after; say how often"

    def _component_problems(self) -> Iterator[str]:
        return iter(())  # the model is the source's: `training_config` checks them

    def required(self) -> dict[str, str]:
        source = {} if self.init.source else {"init.from": "name a run, a checkpoint, or files of bilm-tf"}
        text = self.data.valid or self.data.holdout > 0 or self.data.train == (SAMPLE,)
        valid = {} if text else {"data.valid": "the model is measured before and after: set it, or data.holdout"}
        return {**super().required(), **source, **valid}

    def training_config(
        self, model: dict[str, Any], softmax: dict[str, Any], vocab: str | None, softmax_first: int
    ) -> PretrainConfig:
        """Return the settings of the run, completed with those of the SOURCE.

        `model` and `softmax` are the SOURCE's, `vocab` replaces data.vocab, and `softmax_first` is used where the user
        gives none. Raises ConfigError, with a line for each key, where a setting of model or softmax.tied differs.
        """
        problems = [
            f"{key}={show(value)}: the source has {show(theirs)}; remove it, as the model is the source's"
            for key, value in explicit(self.model, "model.")
            if (theirs := _at(model, key.split(".")[1:])) != value
        ]
        if vocab is not None and self.data.vocab is None:
            problems += [
                f"data.{key} is set, but the vocabulary is the source's; remove it, or set data.vocab={COUNTED}"
                for key in ("min_count", "max_vocab")
                if key in self.data.model_fields_set
            ]
        own = dict(explicit(self.softmax, ""))
        if own.get("tied", softmax.get("tied", False)) != softmax.get("tied", False):
            problems.append(f"softmax.tied={show(own['tied'])}: the source has {show(softmax['tied'])}; remove it")
        if problems:
            raise ConfigError("\n".join(problems))
        values = self.to_dict()
        for key in ("init", "checkpoint"):
            del values[key]
        values["model"] = model
        values["softmax"] = {**softmax, **own}
        samples_words = SOFTMAX_KINDS[values["softmax"].get("kind", self.softmax.kind)].samples_words
        if not samples_words and "negatives" not in own:
            values["softmax"].pop("negatives", None)
        values["data"]["vocab"] = vocab
        if vocab is not None:
            for key in ("min_count", "max_vocab"):
                values["data"].pop(key, None)
        if values["train"].get("softmax_first") is None:
            values["train"]["softmax_first"] = softmax_first
        return PretrainConfig.from_dict(values)


def explicit(section: Section, prefix: str) -> Iterator[tuple[str, Any]]:
    """Return the settings that the user gave, each as its dotted key and its plain value."""
    plain = section.to_dict()
    for name, field in type(section).model_fields.items():
        key = field.alias or name
        value = getattr(section, name)
        if name not in section.model_fields_set or key not in plain:
            continue
        if isinstance(value, Section):
            yield from explicit(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", plain[key]


def _at(values: dict[str, Any], path: list[str]) -> Any:
    for name in path:
        values = values.get(name, {}) if isinstance(values, dict) else {}
    return values if values != {} else None
