"""Common basis of all configurations: strict frozen sections, a table of keys, errors of one line, and plain dicts."""

from __future__ import annotations

import copy
import difflib
import math
import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

from elmo_ray.config.yaml_reader import check_size, dump_yaml, reads_as_text
from elmo_ray.errors import ConfigError, one_line, short

RootT = TypeVar("RootT", bound="Root")

MOST_DURATION = 1e15
"""Largest amount of a duration in any unit; counts made from it still fit an int64."""


@dataclass(frozen=True)
class Allowed:
    """Annotation metadata: the values that a field takes, in words, for errors and `--help`."""

    text: str


def _integral(value: Any) -> Any:
    """Return an int for a float with an integral value: a user may write 1e6, and YAML reads a float."""
    return int(value) if isinstance(value, float) and math.isfinite(value) and value == int(value) else value


def _as_tuple(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_as_tuple(item) if isinstance(item, list) else item for item in value)
    return value


def as_names(value: Any) -> Any:
    """Return a list of names as a tuple; one name is a list of one, and null of none."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else _as_tuple(value)


Int = Annotated[int, BeforeValidator(_integral)]
Names = Annotated[tuple[str, ...], BeforeValidator(as_names), Allowed("a name or a list of names")]
Globs = Annotated[tuple[str, ...], BeforeValidator(as_names), Allowed("a glob or a list of globs")]
Pairs = Annotated[tuple[tuple[Int, Int], ...], BeforeValidator(_as_tuple), Allowed("[[integer, integer], ...]")]


@dataclass(frozen=True)
class Duration:
    """Length of a training in optimizer steps, epochs of the corpus, or positions (tokens plus sentences)."""

    amount: float
    unit: Literal["steps", "epochs", "positions"]

    @classmethod
    def parse(cls, text: str) -> Duration:
        """Return the duration for a text such as "3000 steps", "10 epochs" or "1e9 positions"; raise ValueError."""
        parts = text.split()
        if len(parts) != 2:
            raise ValueError(f"not a duration: {text}")
        number, unit = parts[0].replace("_", ""), parts[1] if parts[1].endswith("s") else parts[1] + "s"
        amount = float(number)
        if not 0 < amount <= MOST_DURATION or unit not in ("steps", "epochs", "positions"):
            raise ValueError(f"not a duration: {text}")
        return cls(amount, unit)  # type: ignore[arg-type]

    def steps(self, positions_per_step: int, positions_per_epoch: int) -> int:
        """Return the duration in optimizer steps, rounded up.

        positions_per_step: of all streams together. positions_per_epoch: of the whole corpus.
        """
        if self.unit == "steps":
            return math.ceil(self.amount)
        positions = self.amount * positions_per_epoch if self.unit == "epochs" else self.amount
        return math.ceil(positions / positions_per_step)

    def __str__(self) -> str:
        return f"{int(self.amount) if self.amount == int(self.amount) else self.amount} {self.unit}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._validate, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def _validate(cls, value: Any) -> Duration:
        if isinstance(value, Duration):
            return value
        if not isinstance(value, str):
            raise ValueError("not a duration")
        return cls.parse(value)


@dataclass(frozen=True)
class Key:
    """One setting: its dotted name and its field."""

    name: str
    field: FieldInfo

    @property
    def allowed(self) -> str:
        return _allowed(self.field.annotation, self.field.metadata)

    @property
    def default(self) -> str:
        return show(_plain(self.field.get_default(call_default_factory=True)))

    @property
    def optional(self) -> bool:
        """Return True if null is one of its values; for a list of globs, null means no globs."""
        return type(None) in get_args(self.field.annotation) or self._is_globs

    @property
    def textual(self) -> bool:
        """Return True if its value on the command line is taken literally: a path, a glob, a name, a duration."""
        if get_origin(self.field.annotation) is dict:
            return False
        kinds = {_bare(part) for part in get_args(self.field.annotation) or (self.field.annotation,)}
        return bool(kinds & {str, Duration}) or self._is_globs

    @property
    def _is_globs(self) -> bool:
        return bool(_bare(self.field.annotation) == tuple[str, ...])


def is_null(value: Any, key: Key) -> bool:
    """Return True if a value stands for null: `none` does where the setting may be empty and has no such value."""
    return value in ("none", "None") and key.optional and not key.allowed.startswith("none,")


class _Problems(ValueError):
    """Problems of a section, one line each. unused: the lines of settings without effect, by their full key."""

    def __init__(self, lines: list[str], unused: dict[str, str]) -> None:
        super().__init__("\n".join(map(one_line, lines)))
        self.unused = unused


class Section(BaseModel):
    """Group of settings. It is an error to set a key that `_unused` names: the other settings make it useless."""

    path: ClassVar[str] = ""  # the prefix of its keys, with the final dot

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, populate_by_name=True, allow_inf_nan=False, validate_default=False
    )

    def _unused(self) -> dict[str, str]:
        """Return the keys that have no effect beside the other settings, each with the reason.

        The keys are dotted and relative to this section.
        """
        return {}

    def _contradictions(self) -> Iterator[str]:
        """Yield a message for each pair of settings that exclude each other."""
        return iter(())

    @model_validator(mode="after")
    def _check(self) -> Section:
        unused = {f"{self.path}{key}": why for key, why in self._unused().items() if _is_set(self, key)}
        lines = [f"{key} is set, but {why}" for key, why in unused.items()]
        lines.extend(self._contradictions())
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if any(isinstance(text, str) and "\0" in text for text in (value if isinstance(value, tuple) else [value])):
                lines.append(f"{self.path}{field.alias or name} has a NUL character, which no path or name can have")
        if lines:
            raise _Problems(lines, unused)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON and YAML types; settings without effect are left out."""
        result: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            result[field.alias or name] = value.to_dict() if isinstance(value, Section) else _plain(value)
        for key in self._unused():
            _remove(result, key.split("."))
        return result


RENAMED = {"train.gpu_kernels": "train.kernels", "embed.column": "data.column"}
"""Old names of settings. They are accepted for one version, with a log line that says the new name."""

REMOVED = {"cluster.shared_memory": "gradients are always summed by torch.distributed; remove it"}
"""Settings that no longer exist, each with the cure. Configurations in stored checkpoints may still have them."""


class Root(Section):
    """Configuration of one verb. Its constructor raises ConfigError, with one line for each mistake.

    absent: keys and sections of other verbs that this one does not have, each with the reason.
    """

    absent: ClassVar[dict[str, str]] = {}

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problem = ConfigError("\n".join(_error_lines(type(self), error)))
            for item in error.errors():
                found = item.get("ctx", {}).get("error")
                if isinstance(found, _Problems):
                    problem.unused = {**problem.unused, **found.unused}
            raise problem from None

    def required(self) -> dict[str, str]:
        """Return the keys that the command needs and that are empty, each with the cure."""
        return {}

    @classmethod
    def from_dict(cls: type[RootT], values: Mapping[str, Any]) -> RootT:
        """Return the configuration for nested plain values, as YAML gives them.

        Raises ConfigError, with one line for each bad key or value.
        """
        try:
            check_size(values)
        except ValueError as error:
            raise ConfigError(f"the configuration has {error}") from None
        unknown, known = _known(cls, _renamed(values))
        lines = list(dict.fromkeys(unknown_key(cls, name) for name in unknown))
        try:
            config = cls(**known)
        except ConfigError as error:
            if not lines:
                raise
            raise ConfigError("\n".join([*lines, str(error)])) from None
        if lines:
            raise ConfigError("\n".join(lines))
        return config

    @classmethod
    def from_overridden(
        cls: type[RootT], base: Mapping[str, Any], values: Mapping[str, Any], overrides: Collection[str]
    ) -> tuple[RootT, dict[str, str]]:
        """Return the configuration for `values`, and the settings of `base` that the overrides made useless.

        values: `base` after the settings with the dotted keys `overrides` were replaced. A setting that has no effect
        beside an override is left out, and is returned by its key with the reason. Raises ConfigError as `from_dict`
        does, also where `base` alone has a setting without effect.
        """
        try:
            return cls.from_dict(values), {}
        except ConfigError as error:
            problem = error
        kept = copy.deepcopy(dict(values))
        dropped: dict[str, str] = {}
        mistakes = cls._useless(base) if problem.unused else {}
        while problem.unused:
            new = {
                key: why
                for key, why in problem.unused.items()
                if key not in mistakes and not any(_overlap(key, override) for override in overrides)
            }
            if not new:
                break
            for key in new:
                _remove(kept, key.split("."))
            dropped |= new
            try:
                return cls.from_dict(kept), dropped
            except ConfigError as error:
                problem = error
        raise problem

    @classmethod
    def _useless(cls, values: Mapping[str, Any]) -> dict[str, str]:
        """Return all settings without effect, which may show one after the other."""
        kept = copy.deepcopy(dict(values))
        found: dict[str, str] = {}
        while True:
            try:
                cls.from_dict(kept)
                return found
            except ConfigError as error:
                new = error.unused
            if not new.keys() - found.keys():
                return found
            for key in new:
                _remove(kept, key.split("."))
            found |= new

    def to_yaml(self) -> str:
        """Return the settings as YAML."""
        return dump_yaml(self.to_dict())


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with old names replaced and removed settings left out, for checkpoints of older versions."""
    result = dict(values)
    for old, new in [*RENAMED.items(), *((name, None) for name in REMOVED)]:
        section, name = old.split(".")
        inside = result.get(section)
        if isinstance(inside, Mapping) and name in inside:
            result[section] = {key: value for key, value in inside.items() if key != name}
            if new is not None:
                new_section, new_name = new.split(".")
                others = result.get(new_section, {})
                if isinstance(others, Mapping):  # other values are refused later
                    result[new_section] = {new_name: inside[name], **others}
    return result


def keys(root: type[Section], prefix: str = "") -> Iterator[Key]:
    """Yield all keys below a section, in their order."""
    for name, field in root.model_fields.items():
        full = prefix + (field.alias or name)
        section = _section(field)
        if section is None:
            yield Key(full, field)
        else:
            yield from keys(section, full + ".")


def flatten(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping, from dotted keys to the values that are no mappings."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys as nested mappings: the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        set_nested(tree, name, value)
    return tree


def set_nested(tree: dict[str, Any], name: str, value: Any) -> None:
    """Set the value of a dotted key in nested mappings; a mapping is merged into the mapping that is there."""
    *path, last = name.split(".")
    for part in path:
        below = tree.get(part)
        if not isinstance(below, dict):
            below = tree[part] = {}
        tree = below
    if isinstance(value, dict) and isinstance(tree.get(last), dict):
        for part, item in value.items():
            set_nested(tree[last], str(part), item)
    else:
        tree[last] = value


_NAMES_OF_OTHERS = {
    "batch_size": ("data.streams", "evaluate.streams", "embed.batch_positions"),
    "n_epochs": ("train.duration",), "epochs": ("train.duration",), "max_steps": ("train.duration",),
    "num_epochs": ("train.duration",), "n_steps": ("train.duration",), "max_epochs": ("train.duration",),
    "learning_rate": ("optim.lr",), "unroll_steps": ("train.unroll",), "bptt": ("train.unroll",),
    "n_negative_samples_batch": ("softmax.negatives",), "sample_softmax": ("softmax.kind",),
    "share_embedding_softmax": ("softmax.tied",), "all_clip_norm_val": ("optim.clip_norm",),
    "max_characters_per_token": ("model.char_cnn.max_characters",), "optimizer": ("optim.name", "init.optimizer"),
    "n_gpus": ("cluster.workers",), "gpus": ("cluster.workers",), "save_dir": ("run.name",),
    "output_dir": ("run.name",), "vocab_size": ("data.max_vocab",), "hidden_size": ("model.lstm.dim",),
}  # fmt: skip
"""Settings of bilm-tf, and of programs for training in general, by the last part of their names, and ours."""


def unknown_key(root: type[Section], name: str) -> str:
    """Return the message for a key that does not exist, with the reason or with the most similar key that does."""
    name = short(name, 100)
    for key, why in getattr(root, "absent", {}).items():
        if name == key or name.startswith(f"{key}."):
            return f"{name}: {why}"
    names = [key.name for key in keys(root)]
    last = name.rsplit(".", 1)[-1]
    ours = [known for known in _NAMES_OF_OTHERS.get(last, ()) if known in names]
    if ours:
        return f"unknown key {name}; here it is {' or '.join(ours)}"
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    near = near or [known for known in names if known.rsplit(".", 1)[-1] == last][:1]
    near = near or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"unknown key {name}; did you mean {near[0]}?"
    return f"unknown key {name}; --help lists the keys"


def show(value: Any) -> str:
    """Return a value as a user would write it, on one line."""
    if isinstance(value, str):
        text = value if reads_as_text(value) else f'"{value}"'
    else:
        try:
            text = dump_yaml([value])[1:].strip().removesuffix("]")
        except (ValueError, RecursionError, yaml.YAMLError):  # thousands of digits, or not a plain value
            text = f"({type(value).__name__})"
    return short(text, 100)


def _known(root: type[Section], values: Mapping[str, Any], prefix: str = "") -> tuple[list[str], dict[str, Any]]:
    """Return the dotted names that are not keys, and the values without them."""
    unknown: list[str] = []
    known: dict[str, Any] = {}
    fields = {field.alias or name: field for name, field in root.model_fields.items()}
    for name, value in values.items():
        if name not in fields:
            unknown.append(f"{prefix}{name}")
            continue
        section = _section(fields[name])
        if section is not None and isinstance(value, Mapping):
            more, value = _known(section, value, f"{prefix}{name}.")
            unknown.extend(more)
        known[name] = None if is_null(value, Key(name, fields[name])) else value
    return unknown, known


def _section(field: FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _is_set(section: Section, key: str) -> bool:
    alias, _, rest = key.partition(".")
    name = next((name for name, field in type(section).model_fields.items() if field.alias == alias), alias)
    if name not in section.model_fields_set:
        return False
    value = getattr(section, name)
    return _is_set(value, rest) if rest else not (isinstance(value, Section) and not value.model_fields_set)


def _remove(values: dict[str, Any], path: list[str]) -> None:
    for name in path[:-1]:
        values = values.get(name, {})
    values.pop(path[-1], None)


def _overlap(key: str, other: str) -> bool:
    """Return True if one of two dotted keys is the other, or is a section that holds it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Section):
        return value.to_dict()
    return str(value) if isinstance(value, Duration) else value


def _bare(annotation: Any) -> Any:
    return _bare(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def _allowed(annotation: Any, metadata: list[Any]) -> str:
    for item in metadata:
        if isinstance(item, Allowed):
            return item.text
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _allowed(args[0], [*args[1:], *metadata])
    if origin is Literal:
        return " or ".join(str(value) for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _allowed(part, metadata) for part in args)
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    if annotation is Duration:
        return 'a duration like "3000 steps", "10 epochs" or "1e9 positions"'
    text = words.get(annotation, str(annotation))
    signs = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
    limits = [
        f"{sign} {getattr(item, name)}"
        for name, sign in signs
        for item in metadata
        if getattr(item, name, None) is not None
    ]
    return f"{text} {' and '.join(limits)}" if limits and annotation in (int, float) else text


def _error_lines(root: type[Section], error: ValidationError) -> list[str]:
    """Return the findings of Pydantic in our words, one line for each finding and key."""
    lines: dict[str, None] = {}
    for item in error.errors():
        section: type[Section] | None = root
        name, allowed, index = "", "", ""
        for part in item["loc"]:
            if section is None:
                index += f"[{part}]" if isinstance(part, int) else ""
                continue
            field = next((f for n, f in section.model_fields.items() if part in (f.alias, n)), None)
            if field is None:
                name = f"{name}.{part}" if name else str(part)
                break
            name = f"{name}.{field.alias or part}" if name else str(field.alias or part)
            allowed, section = Key(name, field).allowed, _section(field)
        if item["type"] == "extra_forbidden":
            lines[unknown_key(root, name)] = None
        elif section is None:
            lines[f"{name}{index}={show(_plain(item['input']))}: must be {allowed}"] = None
        elif item["type"] == "value_error":
            lines.update(dict.fromkeys(str(item["ctx"]["error"]).split("\n")))
        else:
            inside = ", ".join(field.alias or n for n, field in section.model_fields.items())
            lines[f"{name or 'the configuration'}={show(item['input'])}: must be a mapping of {inside}"] = None
    return list(lines)
