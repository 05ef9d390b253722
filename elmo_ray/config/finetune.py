"""The settings of `finetune`: those of a training run, and what it starts from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from elmo_ray.config.model import CharCnnConfig, LstmConfig, ModelConfig
from elmo_ray.config.schema import Section, show
from elmo_ray.config.training import COUNTED, SAMPLE, InitConfig, PretrainConfig
from elmo_ray.errors import ConfigError

SOFTMAX_FIRST = 1000
"""Steps of a softmax that the SOURCE does not have before the rest trains with it."""


class _AnyCharCnn(CharCnnConfig):
    def _contradictions(self) -> Iterator[str]:
        return iter(())


class _AnyLstm(LstmConfig):
    def _contradictions(self) -> Iterator[str]:
        return iter(())


class SourceModelConfig(ModelConfig):
    """Single settings that are compared with the source's; they need not make a model together with the defaults."""

    char_cnn: _AnyCharCnn = _AnyCharCnn()
    lstm: _AnyLstm = _AnyLstm()

    def _unused(self) -> dict[str, str]:
        return {}

    def _contradictions(self) -> Iterator[str]:
        return iter(())


class FinetuneInitConfig(InitConfig):
    # Slots of a long training are sums of squares of all its gradients: steps of lr / sqrt(sum) are tiny, and a new
    # text is learned at the end of the old one's pace. So they begin anew unless one wants just that.
    optimizer: Literal["keep", "reset"] = Field(
        "reset", description="the SOURCE's slots: after a long training they make steps tiny, so the default is reset"
    )


class FinetuneConfig(PretrainConfig):
    model: SourceModelConfig = SourceModelConfig()
    init: FinetuneInitConfig = FinetuneInitConfig()
    checkpoint: str = Field("best", min_length=1, description="of a run: best, last, or a checkpoint's name")

    def _contradictions(self) -> Iterator[str]:
        yield from super()._contradictions()
        if self.train.validate_every is None:
            yield "train.validate_every=null: the model is measured before and after; say how often"

    def _part_problems(self) -> Iterator[str]:
        return iter(())  # the model is the source's: `training_config` checks them

    def required(self) -> dict[str, str]:
        source = {} if self.init.source else {"init.from": "name a run, a checkpoint, or files of bilm-tf"}
        text = self.data.valid or self.data.holdout > 0 or self.data.train == (SAMPLE,)
        valid = {} if text else {"data.valid": "the model is measured before and after: set it, or data.holdout"}
        return {**super().required(), **source, **valid}

    def training_config(
        self, model: dict[str, Any], softmax: dict[str, Any], vocab: str | None, softmax_first: int
    ) -> PretrainConfig:
        """The run's settings with the source's `model` and `softmax`, `vocab` in place of data.vocab, and
        `softmax_first` where it is not set.

        Raises ConfigError, a line for each key, where model.* or softmax.tied are set to something else.
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
        if values["softmax"].get("kind") == "full" and "negatives" not in own:
            values["softmax"].pop("negatives", None)
        values["data"]["vocab"] = vocab
        if vocab is not None:
            for key in ("min_count", "max_vocab"):
                values["data"].pop(key, None)
        if values["train"].get("softmax_first") is None:
            values["train"]["softmax_first"] = softmax_first
        return PretrainConfig.from_dict(values)


def explicit(section: Section, prefix: str) -> Iterator[tuple[str, Any]]:
    """The settings that a user gave, as dotted key and plain value."""
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
