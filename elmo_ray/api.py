"""Three calls for programs and notebooks: `pretrain`, `evaluate` and `embed`, as the commands of the same names do.

    from elmo_ray import api

    trained = api.pretrain("quickstart", run={"name": "mine"}, train={"duration": "200 steps"})
    measured = api.evaluate(trained.run_dir, "held-out/*.txt")
    written = api.embed(trained.run_dir, "text.txt", "vectors.hdf5", embed={"layers": "top"})

Settings are given by section, `train={"duration": "200 steps"}`, or by their dotted name, `**{"train.duration": "200
steps"}`. They replace those of the configuration. A mistake raises an `ElmoRayError`; the message has one line for each
mistake. Nothing is printed; log lines go to the logger `elmo_ray`.

The calls live here and not in `elmo_ray` itself, where `pretrain`, `evaluate` and `embed` are the modules of the
commands `python -m elmo_ray.pretrain` and so on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from elmo_ray.config import EvaluateConfig, PretrainConfig
from elmo_ray.config.command_line import Flags, find_config, load_config
from elmo_ray.config.schema import Root, keys
from elmo_ray.embed.config import EmbedConfig
from elmo_ray.errors import ConfigError, ElmoRayError, short

__all__ = ["ElmoRayError", "Embedded", "Evaluated", "Pretrained", "embed", "evaluate", "pretrain"]

RootT = TypeVar("RootT", bound=Root)
PathLike: TypeAlias = "str | os.PathLike[str]"


@dataclass(frozen=True)
class Pretrained:
    """Result of `pretrain`.

    run_dir: the run's folder or URI; it is a SOURCE for `evaluate`, `embed` and `Elmo.from_run`. export_dir: the folder
    with weights.hdf5, options.json and vocab.txt, or None if nothing was exported. finished: False for a run that was
    asked to stop. steps, positions, seconds: how far the training came, and its time. best_perplexity, best_step: the
    best validation, or None. perplexity, perplexity_forward, perplexity_backward: of the test text, or None where there
    is none. values: all measures, as `--json` writes them.
    """

    run_dir: str
    export_dir: str | None
    finished: bool
    steps: int
    positions: int
    seconds: float
    best_perplexity: float | None
    best_step: int | None
    perplexity: float | None
    perplexity_forward: float | None
    perplexity_backward: float | None
    values: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Evaluated:
    """Result of `evaluate`.

    perplexity: exp of the mean loss of both directions. perplexity_forward, perplexity_backward: of each direction;
    backward is None for a model that reads forward alone. bits_per_character, nats_per_word: the same loss in other
    units. oov_rate: the share of words that the vocabulary lacks. positions: the number of predicted words and sentence
    ends. streams: the number of streams in which the text was read, or None if each sentence was read alone. A measure
    that is not finite is None. values: all measures, by file too, as `--json` writes them.
    """

    source: str
    perplexity: float | None
    perplexity_forward: float | None
    perplexity_backward: float | None
    bits_per_character: float | None
    nats_per_word: float | None
    oov_rate: float | None
    positions: int
    streams: int | None
    values: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Embedded:
    """Result of `embed`.

    out: the file or folder that was written. sentences: their number in the text; 0 where the words of a vocabulary
    were embedded. words: the number that this call embedded. seconds: its time. values: as `--json` writes them.
    """

    out: str
    sentences: int
    words: int
    seconds: float
    values: Mapping[str, Any] = field(repr=False)


def pretrain(
    config: PathLike | Mapping[str, Any] | PretrainConfig | None = None,
    *,
    resume: bool = False,
    fresh: bool = False,
    **settings: Any,
) -> Pretrained:
    """Train a model from scratch, validate it, export it and evaluate it; return where it is and how good it is.

    config: a YAML file, the name of a configuration that comes with the package ("quickstart"), a mapping of its
    sections, or a `PretrainConfig`; without it the defaults are used. resume: continue a run of this name. fresh: start
    anew instead. settings: sections or dotted names, which replace those of `config`.

    The run is written to run.storage_path/run.name, below the working folder unless set. Raises an ElmoRayError:
    ConfigError for settings, DataError for text, CheckpointError and TrainingError for what ends a training.
    """
    from elmo_ray import pretrain as command

    if resume and fresh:
        raise ConfigError("resume and fresh exclude each other")
    checked = _config(PretrainConfig, config, settings)
    with _our_errors():
        values = command.run(checked, Flags(resume=resume, fresh=fresh)).to_dict()
    test = values["evaluation"] or {}
    return Pretrained(
        run_dir=values["run_dir"],
        export_dir=values["export_dir"],
        finished=values["finished"],
        steps=values["steps"],
        positions=values["positions"],
        seconds=values["seconds"],
        best_perplexity=values["best_perplexity"],
        best_step=values["best_step"],
        perplexity=test.get("perplexity"),
        perplexity_forward=test.get("perplexity_forward"),
        perplexity_backward=test.get("perplexity_backward"),
        values=values,
    )


def evaluate(source: PathLike, text: PathLike | Sequence[PathLike], **settings: Any) -> Evaluated:
    """Measure the perplexity of a model on held-out text, with the full softmax.

    source: a run, a checkpoint, or a model of bilm-tf with its softmax. text: a file or glob, or several; one sentence
    in each line, or documents that become sentences as for the training of the source. settings: sections or dotted
    names, such as `evaluate={"reset": "sentence"}`. The index of the text and the sentences of documents are written to
    data.prepared_dir. Raises ElmoRayError for a source or text that cannot be used.
    """
    from elmo_ray import evaluate as command

    checked = _config(
        EvaluateConfig, {"init": {"from": _path(source, "source")}, "data": {"test": _paths(text)}}, settings
    )
    with _our_errors():
        values = command.run(checked).to_dict()
    names = ("perplexity", "perplexity_forward", "perplexity_backward", "bits_per_character", "nats_per_word")
    measures = {name: values.get(name) for name in (*names, "oov_rate")}
    return Evaluated(
        source=values["source"], positions=values["positions"], streams=values["streams"], values=values, **measures
    )


def embed(
    source: PathLike,
    text: PathLike | Sequence[PathLike] | None,
    out: PathLike,
    *,
    resume: bool = False,
    fresh: bool = False,
    **settings: Any,
) -> Embedded:
    """Write a vector for each word of a text, or what else `embed.output` says.

    source: a run, a checkpoint, or a model of bilm-tf. text: a file or glob, or several: tokenised text, or documents;
    None with `embed={"tokens": "vocab.txt"}`. out: an HDF5 file, or a folder for Parquet files. resume, fresh: continue
    or replace what is at `out`. settings: sections or dotted names. For vectors in memory use `elmo_ray.Elmo`. Raises
    ElmoRayError for a source or text that cannot be used, and for an `out` that exists.
    """
    from elmo_ray import embed as command

    if resume and fresh:
        raise ConfigError("resume and fresh exclude each other")
    places: dict[str, Any] = {"init": {"from": _path(source, "source")}, "out": _path(out, "out")}
    if text is not None:
        places["in"] = _paths(text)
    checked = _config(EmbedConfig, places, settings)
    with _our_errors():
        values = command.run(checked, Flags(resume=resume, fresh=fresh)).to_dict()
    return Embedded(
        out=values["out"],
        sentences=values.get("sentences", 0),
        words=values["words"],
        seconds=values["seconds"],
        values=values,
    )


def _path(value: Any, name: str) -> str:
    """Return a path as a string. Raises TypeError, which names the argument, for anything else."""
    try:
        return str(os.fspath(value))
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it must be a path") from None


def _config(root: type[RootT], config: Any, settings: Mapping[str, Any]) -> RootT:
    """Return the checked configuration. Raises ConfigError, with one line for each mistake."""
    known = {key.name for key in keys(root)}
    file: Path | None = None
    values: dict[str, Any] = {}
    if isinstance(config, root):
        if not settings:
            return config
        values = dict(_dotted(config.to_dict(), known))
    elif isinstance(config, Mapping):
        values = dict(_dotted(config, known))
    elif isinstance(config, str | os.PathLike):
        file = find_config(os.fspath(config))
    elif config is not None:
        raise TypeError(f"config is a {type(config).__name__}; give a path, a name, a mapping or a {root.__name__}")
    values.update(_dotted(settings, known))
    checked = load_config(file, (), root, values)
    if empty := [f"{key} is empty; {cure}" for key, cure in checked.required().items()]:
        raise ConfigError("\n".join(empty))
    return checked


def _dotted(values: Mapping[str, Any], known: set[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of each setting; a mapping that is itself one setting stays whole."""
    for name, value in values.items():
        full = f"{prefix}{name}"
        if isinstance(value, Mapping) and full not in known:
            yield from _dotted(value, known, f"{full}.")
        else:
            yield full, os.fspath(value) if isinstance(value, os.PathLike) else value


def _paths(text: PathLike | Sequence[PathLike]) -> list[str]:
    """Return the paths of a text as strings. Raises TypeError for anything else, such as sentences in memory."""
    try:
        return [str(os.fspath(path)) for path in ([text] if isinstance(text, str | os.PathLike) else text)]
    except TypeError:
        raise TypeError(f"text is {short(repr(text))}; it must be a path or a glob, or several") from None


@contextlib.contextmanager
def _our_errors() -> Iterator[None]:
    """Raise errors of this package as they are: Ray raises a mixture of its own class and ours, with ours inside."""
    try:
        yield
    except ElmoRayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ElmoRayError):
            raise cause from None
        raise
