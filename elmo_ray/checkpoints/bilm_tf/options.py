"""Conversion of bilm-tf's options.json to our configuration, and back.

Keys that are absent have the values that bilm-tf gives them (BILM.md, Files): in training an absent `bidirectional` is
false, but a published pair of weights and options is always bidirectional. Keys that describe the training and not the
model are not errors: a value that cannot be used is replaced by the default, and a log line says so.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elmo_ray.config import SoftmaxConfig
from elmo_ray.config.model import ModelConfig
from elmo_ray.config.schema import Section
from elmo_ray.data.characters import N_CHARACTERS
from elmo_ray.errors import ConfigError, FormatError, short

logger = logging.getLogger(__name__)

_MAX_BYTES = 1 << 20
_HDF5 = b"\x89HDF\r\n\x1a\n"
_SECTIONS = {
    "": ("lstm", "char_cnn", "bidirectional"),
    "lstm": ("use_skip_connections", "projection_dim", "cell_clip", "proj_clip", "dim", "n_layers"),
    "char_cnn": (
        "activation", "filters", "n_highway", "embedding", "n_characters", "max_characters_per_token",
    ),
}  # fmt: skip
"""Keys that describe the model; a misspelt one would leave its default in force."""
_THEIR_NAMES = {
    "embedding_dim": "embedding.dim",
    "max_characters": "max_characters_per_token",
    "negatives": "n_negative_samples_batch",
    "tied": "share_embedding_softmax",
}


def read_options(path: str | Path) -> dict[str, Any]:
    """Return the JSON object in a file; FormatError if the file has none, or more than a MiB."""
    try:
        if not Path(path).is_file():  # opening a pipe would wait for ever
            raise FormatError(f"{path}: no such file")
        with open(path, "rb") as raw:
            data = raw.read(_MAX_BYTES + 1)
        if data.startswith(_HDF5):
            raise FormatError(f"{path}: is an HDF5 file and no options.json; are options and weights swapped?")
        if len(data) > _MAX_BYTES:
            raise FormatError(f"{path}: is larger than {_MAX_BYTES >> 20} MiB, which no options are")
        if b"git-lfs" in data[:200]:
            raise FormatError(f"{path}: is a pointer of Git LFS and no options.json; git lfs pull gets the file")
        if data.lstrip()[:1] == b"<":
            raise FormatError(
                f"{path}: is a page in HTML or XML, which some servers send in place of a file; get the file again"
            )
        options = json.loads(data.decode("utf-8-sig"))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: is not JSON: {short(str(error))}") from None
    if not isinstance(options, dict):
        raise FormatError(f"{path}: must be a JSON object")
    return options


def from_options(
    options: Mapping[str, Any], source: str = "options.json", published: bool = False
) -> tuple[ModelConfig, SoftmaxConfig]:
    """Return the settings of model and softmax for a mapping of options; FormatError, naming `source`, if it is wrong.

    published: True for options beside an HDF5 weights file, whose model is bidirectional without saying so, has 261
    characters, and has no softmax.
    """
    lstm = _mapping(options, "lstm", source)
    if lstm is None:
        raise FormatError(f"{source}: has no lstm; it is no options file of a biLM")
    _check_spelling(options, source)
    values: dict[str, Any] = {
        "bidirectional": True if published else options.get("bidirectional", False),
        "lstm": {
            "dim": lstm.get("dim"),
            "projection_dim": lstm.get("projection_dim"),
            "n_layers": lstm.get("n_layers", 1),
            # 0 and null both mean no clip: bilm-tf tests whether the option is true
            "cell_clip": lstm.get("cell_clip") or None,
            "proj_clip": lstm.get("proj_clip") or None,
            "use_skip_connections": lstm.get("use_skip_connections", False),
        },
    }
    char_cnn = _mapping(options, "char_cnn", source)
    if char_cnn is None:
        values["input"] = "words"
    else:
        n_characters = char_cnn.get("n_characters", N_CHARACTERS)
        if not published and n_characters not in (N_CHARACTERS, N_CHARACTERS + 1):
            raise FormatError(
                f"{source}: char_cnn.n_characters is {_short(n_characters)}; a biLM has 261 in training, 262 for use"
            )
        embedding = _mapping(char_cnn, "embedding", source) or {}
        values["char_cnn"] = {
            "filters": char_cnn.get("filters"),
            "activation": char_cnn.get("activation", "relu"),
            "embedding_dim": embedding.get("dim"),
            "max_characters": char_cnn.get("max_characters_per_token", 50),
            "n_highway": char_cnn.get("n_highway") or 0,
        }
    model: ModelConfig = _parse(ModelConfig, values, source)
    return model, _softmax(options, model.input == "words", source, published)


def _softmax(options: Mapping[str, Any], has_words: bool, source: str, published: bool) -> SoftmaxConfig:
    """Return the settings of the softmax.

    How the softmax was trained is no part of the model, so unusable values are replaced by our defaults.
    """
    sampled, tied = options.get("sample_softmax", True), options.get("share_embedding_softmax", False)
    if not isinstance(sampled, bool):
        _note(source, "sample_softmax", sampled, "softmax.kind=sampled")
        sampled = True
    if published and not (isinstance(tied, bool) and (has_words or not tied)):
        _note(source, "share_embedding_softmax", tied, "softmax.tied=false")
        tied = False
    if tied is True and not has_words:
        raise FormatError(f"{source}: share_embedding_softmax needs word input, but there is a char_cnn")
    softmax: dict[str, Any] = {"kind": "sampled" if sampled else "full", "tied": tied}
    if sampled and "n_negative_samples_batch" in options:
        try:
            return SoftmaxConfig(**softmax, negatives=options["n_negative_samples_batch"])
        except ValueError:
            default = SoftmaxConfig().negatives
            _note(
                source, "n_negative_samples_batch", options["n_negative_samples_batch"], f"softmax.negatives={default}"
            )
    parsed: SoftmaxConfig = _parse(SoftmaxConfig, softmax, source)
    return parsed


def _note(source: str, key: str, value: Any, default: str) -> None:
    shown = "null" if value is None else _short(value)
    logger.info("%s: %s is %s, which only training uses; %s in its place", source, key, shown, default)


def _check_spelling(options: Mapping[str, Any], source: str) -> None:
    """Raise FormatError for a key that is not known and is almost the name of a key that is not there."""
    for section, known in _SECTIONS.items():
        given = options.get(section) if section else options
        if not isinstance(given, Mapping):
            continue
        missing = {_plain(name): name for name in known if name not in given}
        for key in given.keys() - set(known):
            near = difflib.get_close_matches(_plain(str(key)), missing, n=1, cutoff=0.85)
            if near:
                place = f"{section}." if section else ""
                raise FormatError(f"{source}: {place}{_short(key)} is not known; did you mean {missing[near[0]]}?")


def _plain(key: str) -> str:
    """Return a key without case and signs, as charCNN and char-cnn are char_cnn."""
    return "".join(letter for letter in key.lower() if letter.isalnum())


def to_options(model: ModelConfig, softmax: SoftmaxConfig, n_words: int, for_training: bool = False) -> dict[str, Any]:
    """Return the options of a model for bilm-tf and AllenNLP, with the original's settings of training.

    n_words: size of the vocabulary. for_training: write 261 characters, as bilm-tf's training needs, instead of the 262
    that its inference needs.
    """
    lstm: dict[str, Any] = {
        "dim": model.lstm.dim,
        "projection_dim": model.lstm.projection_dim,
        "n_layers": model.lstm.n_layers,
        "use_skip_connections": model.lstm.use_skip_connections,
        # null means no clip to bilm-tf and AllenNLP; AllenNLP refuses a file in which the keys are absent
        "cell_clip": model.lstm.cell_clip,
        "proj_clip": model.lstm.proj_clip,
    }
    options: dict[str, Any] = {
        "bidirectional": model.bidirectional,
        "lstm": lstm,
        "dropout": 0.0,
        "n_tokens_vocab": n_words,
        "unroll_steps": 20,
        "batch_size": 128,
        "all_clip_norm_val": 10.0,
        "sample_softmax": softmax.facts.samples_words,
        "n_negative_samples_batch": softmax.negatives,
    }
    if model.input == "characters":
        options["char_cnn"] = {
            "activation": model.char_cnn.activation,
            "embedding": {"dim": model.char_cnn.embedding_dim},
            "filters": [list(f) for f in model.char_cnn.filters],
            "max_characters_per_token": model.char_cnn.max_characters,
            "n_characters": N_CHARACTERS if for_training else N_CHARACTERS + 1,
            "n_highway": model.char_cnn.n_highway,
        }
    elif softmax.tied:
        options["share_embedding_softmax"] = True
    return options


def _mapping(values: Mapping[str, Any], key: str, source: str) -> Mapping[str, Any] | None:
    value = values.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise FormatError(f"{source}: {key} must be an object")
    return value


def _parse(section: type[Section], values: dict[str, Any], source: str) -> Any:
    try:
        parsed = section(**values)
    except (ConfigError, ValueError) as error:
        errors = getattr(error, "errors", None)
        if errors is None:
            raise FormatError(f"{source}: {error}") from None
        first = errors()[0]
        place = ".".join(_THEIR_NAMES.get(str(key), str(key)) for key in first["loc"]) or section.__name__
        message = first["msg"].removeprefix("Value error, ").split("\n")[0]
        raise FormatError(f"{source}: {place}: {message} (given {_short(first.get('input'))})") from None
    return parsed


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
