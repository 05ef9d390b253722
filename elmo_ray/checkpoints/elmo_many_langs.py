"""Reading of the models of ELMoForManyLangs (Che et al. 2018), which exist for some 45 languages.

A model is a folder with `config.json`, the configuration that it names, `char.dic`, `word.dic`, and two pickles of
tensors, `token_embedder.pkl` and `encoder.pkl`. torch.load reads these with weights_only, which knows how to make
tensors and dicts and nothing else: a file that would run code is refused. This is the only file that may call it.

What differs from our model: a word is read by its Unicode characters, with the vector of the whole word beside them
(`model.token_embedder`); the forget gate's bias of 1 is a part of the bias; gates come in the order i, f, j, o; the
gate of a highway says how much of the input goes on, and ours says how much is new.

Shapes: H memory of a cell, P its output, F filters, E character embedding, W word embedding.
"""

from __future__ import annotations

import logging
import os
import posixpath
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elmo_ray.checkpoints.bilm_tf.options import read_options
from elmo_ray.config import CharCnnConfig, LstmConfig, SoftmaxConfig
from elmo_ray.config.model import ModelConfig
from elmo_ray.data.vocabulary import SKIPPED_WORD, SPECIAL_WORDS, Vocabulary
from elmo_ray.errors import ConfigError, FormatError, short
from elmo_ray.model.bilm import BiLM
from elmo_ray.model.lstm import FORGET_BIAS
from elmo_ray.model.token_embedder import BEGIN, END, NEEDED_CHARACTERS, PADDING, UNKNOWN, TokenEmbedder

logger = logging.getLogger(__name__)

CONFIG, CHARACTERS, WORDS = "config.json", "char.dic", "word.dic"
EMBEDDER, ENCODER = "token_embedder.pkl", "encoder.pkl"

_NAMES = (CHARACTERS, EMBEDDER, ENCODER)
_MOST_BYTES = 1 << 28  # of a dictionary
_MOST_SIZE = 1 << 16

PUBLISHED = "cnn_50_100_512_4096_sample.json"
"""Name of the configuration of all published models. Their config.json names it by a path of another machine, and most
of them come without it."""

_PUBLISHED: dict[str, Any] = {
    "encoder": {"name": "elmo", "projection_dim": 512, "cell_clip": 3, "proj_clip": 3, "dim": 4096, "n_layers": 2},
    "token_embedder": {
        "name": "cnn",
        "activation": "relu",
        "filters": [[1, 32], [2, 32], [3, 64], [4, 128], [5, 256], [6, 512], [7, 1024]],
        "n_highway": 2,
        "word_dim": 100,
        "char_dim": 50,
        "max_characters_per_token": 50,
    },
}


def is_model_folder(path: Path) -> bool:
    """Return True for a folder with at least one file that only a model of ELMoForManyLangs has."""
    return path.is_dir() and any((path / name).is_file() for name in _NAMES)


def is_model_file(path: Path) -> bool:
    """Return True for one of the files of such a folder."""
    return path.is_file() and path.name in _NAMES


def read_model(folder: Path) -> tuple[BiLM, Vocabulary | None]:
    """Return the model, without gradients, and the words of word.dic as a vocabulary.

    The vocabulary begins with our special words, in the place of the program's; words with a blank inside are left out.
    It is None if word.dic is missing and the model does not need it. Raises FormatError naming the file: if one is
    missing, if a pickle is another program's or would run code, or if its tensors contradict the configuration.
    """
    # in the order in which they are read; word.dic is not needed where a word is its characters alone
    for name in (CONFIG, *_NAMES):
        if not (folder / name).is_file():
            raise FormatError(
                f"{folder}: has no {name}; a model of ELMoForManyLangs has {', '.join((CONFIG, *_NAMES))}"
            )
    place, values = _configuration(folder)
    config, cnn, word_dim = _settings(values, str(place))
    characters = _read_dictionary(folder / CHARACTERS, NEEDED_CHARACTERS)
    has_words = (folder / WORDS).is_file()
    if word_dim and not has_words:
        raise FormatError(f"{folder}: has no {WORDS}, but token_embedder.word_dim={word_dim} in {place.name} needs it")
    words = _read_dictionary(folder / WORDS, (UNKNOWN,)) if has_words else {}
    embedder = _read_embedder(folder / EMBEDDER, cnn, config.lstm.projection_dim, characters, words, word_dim)
    with torch.device("meta"):
        model = BiLM(config, SoftmaxConfig(), 0)
    model.drop_softmax()
    model.word_embedding = None
    model.load_state_dict(_read_lstm(folder / ENCODER, config.lstm), assign=True)
    model.token_embedder = embedder
    return model.requires_grad_(False), _vocabulary(words, folder / WORDS) if has_words else None


def _configuration(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the configuration that config.json names, and the path that it came from."""
    outer = folder / CONFIG
    named = read_options(outer).get("config_path")
    # by a path inside of the folder, or else by the name alone: the path is often one of the machine that trained
    name = posixpath.basename(named.replace("\\", "/")) if isinstance(named, str) else ""
    if not isinstance(named, str) or not name or "\0" in named:
        raise FormatError(f"{outer}: has no config_path; it is no config.json of ELMoForManyLangs")
    inside = posixpath.normpath(named)
    tries = [] if posixpath.isabs(inside) or inside.startswith("..") else [folder / inside]
    for path in (*tries, folder / name):
        if os.path.isfile(path):  # Path.is_file() raises OSError for a path that is too long
            return path, read_options(path)
    if name == PUBLISHED:
        return outer, _PUBLISHED
    raise FormatError(f"{outer}: config_path is {short(named)}, and {short(name)} is not in {folder}; put it there")


def _settings(values: Mapping[str, Any], place: str) -> tuple[ModelConfig, CharCnnConfig, int]:
    """Return the settings of the model, those of its token embedder, and W."""
    encoder, tokens = (values.get(key) for key in ("encoder", "token_embedder"))
    if not isinstance(encoder, Mapping) or not isinstance(tokens, Mapping):
        raise FormatError(f"{place}: has no encoder and token_embedder; it is no configuration of ELMoForManyLangs")
    for section, given, known in (("encoder", encoder, "elmo"), ("token_embedder", tokens, "cnn")):
        kind = str(given.get("name")).lower()
        if kind != known:
            raise FormatError(f"{place}: {section}.name is {short(kind)}; only models with {known} can be read")
    word_dim = tokens.get("word_dim", 0)
    if not isinstance(word_dim, int) or isinstance(word_dim, bool) or not 0 <= word_dim <= _MOST_SIZE:
        raise FormatError(f"{place}: token_embedder.word_dim is {short(repr(word_dim))}: must be an integer >= 0")
    try:
        cnn = CharCnnConfig.model_validate(
            {
                "filters": tokens.get("filters"),
                "activation": tokens.get("activation"),
                "embedding_dim": tokens.get("char_dim"),
                "max_characters": tokens.get("max_characters_per_token"),
                "n_highway": tokens.get("n_highway"),
            }
        )
        lstm = LstmConfig.model_validate(
            {
                "dim": encoder.get("dim"),
                "projection_dim": encoder.get("projection_dim"),
                "n_layers": encoder.get("n_layers"),
                # 0 and null both mean no clip: the program tests whether the value is true
                "cell_clip": encoder.get("cell_clip") or None,
                "proj_clip": encoder.get("proj_clip") or None,
            }
        )
        config = ModelConfig(input="words", lstm=lstm)
    except (ConfigError, ValueError) as error:
        raise FormatError(f"{place}: {_first_of(error)}") from None
    if lstm.dim == lstm.projection_dim:
        raise FormatError(f"{place}: encoder.dim is encoder.projection_dim={lstm.dim}: such a model cannot be read")
    return config, cnn, word_dim


def _first_of(error: Exception) -> str:
    """Return the first finding of an error in one line."""
    findings = getattr(error, "errors", None)
    if findings is None:
        return short(str(error), 300)
    first = findings()[0]
    message = str(first["msg"]).removeprefix("Value error, ").split("\n")[0]
    return f"{'.'.join(map(str, first['loc']))}: {message} (given {short(repr(first.get('input')), 60)})".lstrip(": ")


def _read_dictionary(path: Path, needed: tuple[str, ...]) -> dict[str, int]:
    """Return the ids of a file with an entry and its id in each line, as the program reads it."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise FormatError(f"{path}: is larger than {_MOST_BYTES >> 20} MiB, which no dictionary is")
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise FormatError(f"{path}: is not UTF-8") from None
    if not text.startswith("\ufeff\t"):  # that would be an entry, and no mark by an editor
        text = text.removeprefix("\ufeff")
    found: dict[str, int] = {}
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        fields = line.strip().split("\t")
        if len(fields) == 1:
            fields.insert(0, "\u3000")  # this blank is an entry itself, and is stripped
        if len(fields) != 2 or not fields[1].isascii() or not fields[1].isdigit() or len(fields[1]) > 9:
            raise FormatError(f"{path} line {number}: must be an entry, a tab and its number: {short(repr(line))}")
        found[fields[0]] = int(fields[1])
    missing = [entry for entry in needed if entry not in found]
    if missing:
        raise FormatError(f"{path}: has no {', '.join(missing)}; it is no dictionary of ELMoForManyLangs")
    return found


def _load(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a pickle by name. Raises FormatError for anything but names with dense float tensors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that are then refused
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # of many kinds: from torch's reader, and from what a damaged pickle makes of it
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        cause = "holds more than tensors, or is damaged" if "eights" in why else short(why, 120)
        raise FormatError(f"{path}: is no pickle of tensors ({cause}); nothing in it was run") from None
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        raise FormatError(f"{path}: holds {type(content).__name__}, not tensors by name; it is another program's")
    for name, tensor in content.items():
        # a tensor of a few bytes may be a view that claims to be large
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.is_contiguous()
        if not isinstance(name, str) or not plain or tensor.dtype not in (torch.float32, torch.float64):
            raise FormatError(f"{path}: {short(str(name))} is no dense tensor of float32 numbers")
    return content


def _taken(path: Path, shapes: Mapping[str, tuple[int | None, ...]]) -> dict[str, Tensor]:
    """Return the tensors of a pickle in float32; FormatError unless they have these names and shapes (None: any)."""
    found = _load(path)
    for name in sorted(found.keys() ^ shapes.keys()):
        problem = "has no" if name in shapes else "has"
        more = "" if name in shapes else ", for which the configuration has no place"
        raise FormatError(f"{path}: {problem} {short(name)}{more}; it is another model's or another program's")
    for name, shape in shapes.items():
        there = tuple(found[name].shape)
        if len(there) != len(shape) or any(size not in (None, real) for size, real in zip(shape, there, strict=True)):
            wanted = [size if size is not None else "any" for size in shape]
            raise FormatError(f"{path}: {name} has shape {list(there)}, the configuration asks for {wanted}")
    return {name: tensor.float() for name, tensor in found.items()}


def _read_embedder(
    path: Path, config: CharCnnConfig, output: int, characters: dict[str, int], words: dict[str, int], word_dim: int
) -> TokenEmbedder:
    n = config.n_filters
    shapes: dict[str, tuple[int | None, ...]] = {
        "char_emb_layer.embedding.weight": (None, config.embedding_dim),
        "projection.weight": (output, word_dim + n),
        "projection.bias": (output,),
    }
    for index, (width, count) in enumerate(config.filters):
        shapes[f"convolutions.{index}.weight"] = (count, config.embedding_dim, width)
        shapes[f"convolutions.{index}.bias"] = (count,)
    for index in range(config.n_highway):
        shapes[f"highways._layers.{index}.weight"] = (2 * n, n)
        shapes[f"highways._layers.{index}.bias"] = (2 * n,)
    if word_dim:
        shapes["word_emb_layer.embedding.weight"] = (None, word_dim)
    given = _taken(path, shapes)
    tables = [("char_emb_layer", CHARACTERS, characters), *([("word_emb_layer", WORDS, words)] if word_dim else [])]
    for layer, file, ids in tables:
        rows = len(given[f"{layer}.embedding.weight"])
        if max(ids.values()) >= rows:
            raise FormatError(f"{path}: {layer} has {rows} rows, and {file} has the number {max(ids.values())}")
        # Several blanks are one entry here, so numbers may be missing, but not those at the end.
        if max(ids.values()) < rows - 1:
            raise FormatError(
                f"{path}: {layer} has {rows} rows, and the numbers in {file} end at {max(ids.values())}: is it whole?"
            )
    tensors = {
        "character_embedding": given["char_emb_layer.embedding.weight"],
        "projection_weight": given["projection.weight"].t(),
        "projection_bias": given["projection.bias"],
    }
    for index in range(len(config.filters)):
        tensors[f"filters.{index}"] = given[f"convolutions.{index}.weight"]
        tensors[f"filter_biases.{index}"] = given[f"convolutions.{index}.bias"]
    for index in range(config.n_highway):
        weight, bias = (given[f"highways._layers.{index}.{name}"] for name in ("weight", "bias"))
        # sigmoid(-x) = 1 - sigmoid(x)
        tensors[f"highways.{index}.transform_weight"], tensors[f"highways.{index}.carry_weight"] = (
            weight[:n].t(), -weight[n:].t()
        )  # fmt: skip
        tensors[f"highways.{index}.transform_bias"], tensors[f"highways.{index}.carry_bias"] = bias[:n], -bias[n:]
    if word_dim:
        tensors["word_embedding"] = given["word_emb_layer.embedding.weight"]
    sizes = len(tensors["character_embedding"]), len(tensors["word_embedding"]) if word_dim else 0
    with torch.device("meta"):
        embedder = TokenEmbedder(config, output, characters, words if word_dim else {}, *sizes, word_dim)
    embedder.load_state_dict({name: tensor.contiguous() for name, tensor in tensors.items()}, assign=True)
    return embedder


def _read_lstm(path: Path, config: LstmConfig) -> dict[str, Tensor]:
    """Return the parameters of both directions by our names."""
    gates, p, h = 4 * config.dim, config.projection_dim, config.dim
    cell = {
        "input_linearity.weight": (gates, p),
        "state_linearity.weight": (gates, p),
        "state_linearity.bias": (gates,),
    }
    cell["state_projection.weight"] = (p, h)
    shapes: dict[str, tuple[int | None, ...]] = {
        f"{direction}_layer_{layer}.{name}": shape
        for layer in range(config.n_layers)
        for direction in ("forward", "backward")
        for name, shape in cell.items()
    }
    given = _taken(path, shapes)

    def both(layer: int, name: str) -> Iterator[Tensor]:
        return (given[f"{direction}_layer_{layer}.{name}"] for direction in ("forward", "backward"))

    def reordered(x_G: Tensor) -> Tensor:
        i, f, j, o = x_G.chunk(4)
        return torch.cat([i, j, f, o])

    found = {}
    for layer in range(config.n_layers):
        place = f"lstm.layers.{layer}"
        found[f"{place}.input_kernel"] = torch.stack([reordered(w).t() for w in both(layer, "input_linearity.weight")])
        found[f"{place}.hidden_kernel"] = torch.stack([reordered(w).t() for w in both(layer, "state_linearity.weight")])
        bias = torch.stack([reordered(b) for b in both(layer, "state_linearity.bias")])
        bias[:, 2 * h : 3 * h] -= FORGET_BIAS
        found[f"{place}.bias"] = bias
        found[f"{place}.projection"] = torch.stack([w.t() for w in both(layer, "state_projection.weight")])
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _vocabulary(words: dict[str, int], path: Path) -> Vocabulary:
    """Return the vocabulary of the dictionary's words in the order of their numbers."""
    others = {BEGIN, END, UNKNOWN, PADDING, SKIPPED_WORD, *SPECIAL_WORDS}
    in_order = [word for word in sorted(words, key=lambda word: words[word]) if word not in others]
    kept = [word for word in in_order if len(word.split()) == 1]
    if len(kept) < len(in_order):
        logger.info("%s: %d words with a blank inside are in no vocabulary of ours", path, len(in_order) - len(kept))
    return Vocabulary([*SPECIAL_WORDS, *kept], str(path))
