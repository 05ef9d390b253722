"""Files of weights in bilm-tf's HDF5 format (BILM.md, Files): writing, and reading of ours or a stranger's.

Bilm-tf, AllenNLP and simple_elmo look for these names, also in one-layer models; the softmax is never in the file.
Reading compares each dataset's type and shape with the options before it takes memory for it.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from elmo_ray.checkpoints.bilm_tf.variables import from_variables, to_variables, variable_shapes
from elmo_ray.config import SoftmaxConfig
from elmo_ray.config.model import ModelConfig
from elmo_ray.errors import FormatError, reason, short
from elmo_ray.model.bilm import BiLM

logger = logging.getLogger(__name__)

ALLENNLP_CHARACTERS = 50
"""Number of ids of a word in AllenNLP, a constant of its batch_to_ids."""

BILM_TF_LAYERS = 8
"""Largest number of layers for which bilm-tf has names."""

_CELL = re.compile(r"lm/RNN_(\d)/rnn/(?:multi_rnn_cell/cell_(\d+)/)?lstm_cell/(.+)")
_CELL_VARIABLES = {"kernel": "W_0", "bias": "B", "projection/kernel": "W_P_0"}
_EMBEDDING = "embedding"
_OF_A_MODEL = re.compile(r"(?:char_embed|embedding)\Z|(?:CNN|CNN_high_\d+|CNN_proj|RNN_\d+|RNN)/")
"""Names that the variables of a biLM have in a file."""
_FOREIGN = {
    b"PK\x03\x04": "is a zip file; unpack it first",
    b"\x1f\x8b": "is a gz file; unpack it first",
    b"\x28\xb5\x2f\xfd": "is a zst file; unpack it first",
    b"\xfd7zXZ\0": "is an xz file; unpack it first",
    b"BZh": "is a bzip2 file; unpack it first",
    b"7z\xbc\xaf\x27\x1c": "is a 7z file; unpack it first",
}
_DEEPEST, _MOST_NAMES = 5, 10_000
_SLACK_BYTES = 1 << 24
_LIBRARY_ERRORS = (OSError, KeyError, RuntimeError, ValueError, TypeError, OverflowError, MemoryError)


def obstacles(model: ModelConfig) -> dict[str, list[str]]:
    """Return the reasons for which bilm-tf and AllenNLP cannot load a model, by the program's name; [] if it can."""
    cnn, lstm = model.char_cnn, model.lstm
    n_filters = sum(count for _, count in cnn.filters)
    bilm_tf, allennlp = [], []
    if not model.bidirectional:
        both = "it reads two directions, and the model is forward only (model.bidirectional=false)"
        bilm_tf.append(both)
        allennlp.append(both)
    if lstm.n_layers > BILM_TF_LAYERS:
        bilm_tf.append(f"it knows {BILM_TF_LAYERS} layers at most, model.lstm.n_layers={lstm.n_layers}")
    if model.input == "words":
        allennlp.append("it reads characters only (model.input=words)")
    else:
        if model.word_dim != lstm.projection_dim:
            wide = f"its LSTM reads {lstm.projection_dim} numbers, not all {n_filters} features"
            bilm_tf.append(f"{wide} (model.char_cnn.projection=false)")
            allennlp.append(f"{wide} (model.char_cnn.projection=false)")
        elif n_filters < lstm.projection_dim:
            bilm_tf.append(f"its char CNN cannot grow from {n_filters} filters to projection_dim={lstm.projection_dim}")
        if n_filters == lstm.projection_dim:
            allennlp.append(f"it wants CNN_proj, and a char CNN of {n_filters} filters = projection_dim has none")
        if cnn.max_characters != ALLENNLP_CHARACTERS:
            allennlp.append(
                f"its words have {ALLENNLP_CHARACTERS} ids, not model.char_cnn.max_characters={cnn.max_characters}"
            )
    if not lstm.use_skip_connections:
        allennlp.append("it wants skip connections (model.lstm.use_skip_connections=false)")
    if lstm.dim == lstm.projection_dim:
        allennlp.append(f"it wants W_P_0, and an LSTM with dim = projection_dim = {lstm.dim} has none")
    return {"bilm-tf": bilm_tf, "AllenNLP": allennlp}


def write_weights(path: str | os.PathLike[str], model: BiLM) -> None:
    """Write a model without its softmax, in float32, without attributes, to a temporary path that the caller renames.

    Raises FormatError for a forward-only model and for one with other LSTM cells, which no other program loads, and
    where the file cannot be written.
    """
    if model.directions != 2:
        raise FormatError(f"{path}: a forward-only model has no place in bilm-tf's HDF5 form")
    if not model.lstm.has_original_cells:
        raise FormatError(f"{path}: the model's LSTM cells are not the original's and have no place in bilm-tf's form")
    parameters = {name: p for name, p in model.named_parameters() if not name.startswith("softmax")}
    try:
        with h5py.File(path, "w") as file:
            for variable, array in to_variables(model, parameters).items():
                values = np.ascontiguousarray(array, dtype=np.float32)
                file.create_dataset(_dataset(variable), data=values, track_times=False)
    except _LIBRARY_ERRORS as error:
        raise FormatError(f"{path}: cannot be written: {reason(error)}") from None


def read_weights(path: str | os.PathLike[str], model: ModelConfig) -> BiLM:
    """Return the model of a weights file and its options, which has no softmax: for use and not for training.

    Raises FormatError naming a dataset that is missing, left over, has no floats, or has another shape than the options
    say.
    """
    check_is_hdf5(path)
    try:
        with h5py.File(path, "r") as file:
            n_words = 0
            if model.input == "words":
                n_words = _word_count(str(path), file, model.lstm.projection_dim)
            with torch.device("meta"):
                bilm = BiLM(model, SoftmaxConfig(), n_words)
            bilm.drop_softmax()
            shapes = variable_shapes(bilm)
            arrays = _Datasets(str(path), file, shapes)
            extra = sorted(set(_dataset_names(str(path), file)) - {_dataset(variable) for variable in shapes})
            others = [name for name in extra if _OF_A_MODEL.match(name)]
            if others:
                raise FormatError(
                    f"{path}: has {short(others[0])}, for which the options have no place: they are another model's"
                )
            if extra:
                logger.info("%s: has %s, which is no part of a biLM and is not used", path, short(extra[0]))
            tensors = from_variables(bilm, arrays, str(path))
    except FormatError:
        raise
    except _LIBRARY_ERRORS as error:
        raise FormatError(f"{path}: cannot be read as bilm-tf weights: {reason(error)}") from None
    bilm.load_state_dict(tensors, assign=True)
    return bilm.requires_grad_(False)


def read_word_vectors(path: str | os.PathLike[str], width: int) -> Tensor:
    """Return the [V, P] word vectors that `embed` (embed.tokens) or bilm-tf's dump_token_embeddings wrote.

    Raises FormatError where the file cannot be read, holds more than vectors, or has vectors of another width.
    """
    check_is_hdf5(path)
    try:
        with h5py.File(path, "r") as file:
            extra = sorted(set(_dataset_names(str(path), file)) - {_EMBEDDING})
            if extra:
                raise FormatError(
                    f"{path}: has {short(extra[0])}, so it is no file of word vectors, which embed.tokens=FILE writes"
                )
            if _EMBEDDING not in file:
                raise FormatError(f"{path}: has no {_EMBEDDING}, so it is no file of word vectors")
            dataset = _local(str(path), file, _EMBEDDING)
            if dataset.ndim != 2 or dataset.shape[1] != width:
                shape = list(dataset.shape or ())
                raise FormatError(f"{path}: {_EMBEDDING} has shape {shape}, the model needs [words, {width}]")
            if dataset.dtype.kind != "f":
                raise FormatError(f"{path}: {_EMBEDDING} has numbers of type {dataset.dtype}, not floats")
            return torch.from_numpy(np.asarray(dataset[...], dtype=np.float32))
    except FormatError:
        raise
    except _LIBRARY_ERRORS as error:
        raise FormatError(f"{path}: cannot be read as word vectors: {reason(error)}") from None


def check_is_hdf5(path: str | os.PathLike[str]) -> None:
    """Raise FormatError, which says what the file is, unless it begins as an HDF5 file does."""
    if Path(path).is_dir():
        raise FormatError(f"{path}: is a folder and no HDF5 file; name the file in it")
    if not Path(path).is_file():
        raise FormatError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            head = file.read(512)
        if h5py.is_hdf5(path):
            return
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from None
    raise FormatError(f"{path}: {_what_it_is(head, os.fspath(path))}")


def _what_it_is(head: bytes, path: str) -> str:
    """Return what a file is that is no HDF5 file, and the cure, by its first bytes."""
    if path.endswith((".pt", ".pth", ".th", ".bin", ".ckpt")):
        return "is no HDF5 file but one of PyTorch, by its name; name the weights.hdf5 of bilm-tf or AllenNLP"
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            return what
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it first"
    if not head:
        return "is empty; get the whole file again"
    if head.lstrip()[:1] == b"{":
        return "is JSON and no HDF5 file; are options and weights swapped?"
    if head[8:9] == b"{":
        return "is a safetensors file; name the folder of the run or of the checkpoint that it belongs to"
    if b"git-lfs" in head:
        return "is a pointer of Git LFS and not the weights; git lfs pull gets them"
    if head.lstrip()[:1] == b"<":
        return "is a page in HTML or XML, which some servers send in place of a file; get the file again"
    return "is no HDF5 file; is it the right file, and whole?"


def _dataset_names(path: str, file: h5py.File) -> list[str]:
    """Return the names of the datasets in a file as far down as a biLM has any, without those behind links."""
    names: list[str] = []
    waiting: list[tuple[str, h5py.Group]] = [("", file)]
    while waiting:
        prefix, group = waiting.pop()
        for name in group:
            item = group[name] if isinstance(group.get(name, getlink=True), h5py.HardLink) else None
            place = f"{prefix}{name}"
            if isinstance(item, h5py.Dataset):
                names.append(place.encode("ascii", "backslashreplace").decode())
            elif isinstance(item, h5py.Group) and place.count("/") < _DEEPEST:
                waiting.append((f"{place}/", item))
            if len(names) + len(waiting) > _MOST_NAMES:
                raise FormatError(f"{path}: has more than {_MOST_NAMES:,} arrays, so it is no file of a biLM")
    return names


def same_weights(model: BiLM, other: BiLM) -> list[str]:
    """Return the names of parameters that are not bit-equal in float32, without those of the softmax."""
    ours, theirs = _bits(model), _bits(other)
    both = ours.keys() & theirs.keys()
    return sorted((ours.keys() ^ theirs.keys()) | {name for name in both if not torch.equal(ours[name], theirs[name])})


class _Datasets(Mapping[str, np.ndarray]):
    """Arrays of a file by TensorFlow's names: all are checked first, and each is read when it is asked for."""

    def __init__(self, path: str, file: h5py.File, shapes: Mapping[str, tuple[int, ...]]):
        self.file, self.shapes = file, shapes
        needed = sum(_check(path, file, _dataset(variable), shape) for variable, shape in shapes.items())
        if needed > os.path.getsize(path):
            raise FormatError(f"{path}: has {os.path.getsize(path)} bytes, but its arrays need {needed}")

    def __getitem__(self, variable: str) -> np.ndarray:
        return np.asarray(self.file[_dataset(variable)][...], dtype=np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _dataset(variable: str) -> str:
    """Return the dataset's name: `RNN_0/RNN/MultiRNNCell/Cell0/LSTMCell/W_0` for `lm/RNN_0/rnn/lstm_cell/kernel`.

    Names outside of LSTM cells only lose their `lm/`.
    """
    match = _CELL.fullmatch(variable)
    if match is None:
        return variable.removeprefix("lm/")
    direction, layer, variable = match.groups()
    return f"RNN_{direction}/RNN/MultiRNNCell/Cell{layer or 0}/LSTMCell/{_CELL_VARIABLES[variable]}"


def _check(path: str, file: h5py.File, name: str, shape: tuple[int, ...]) -> int:
    """Return the size of a dataset in bytes; FormatError unless it may be read."""
    dataset = _local(path, file, name)
    if tuple(dataset.shape or ()) != shape:
        raise FormatError(f"{path}: {name} has shape {list(dataset.shape or ())}, the options ask for {list(shape)}")
    if dataset.dtype.kind != "f":
        raise FormatError(f"{path}: {name} has numbers of type {dataset.dtype}, not floats")
    _check_storage(path, dataset, name)
    return int(dataset.nbytes)


def _check_storage(path: str, dataset: h5py.Dataset, name: str) -> None:
    """Raise FormatError unless all numbers of a dataset lie in the file: a few bytes can declare terabytes."""
    stored, needed = dataset.id.get_storage_size(), dataset.nbytes
    if dataset.id.get_create_plist().get_nfilters():
        # compressed data may unpack to any size, whatever their shape is
        raise FormatError(f"{path}: {name} is compressed; unpack the file first: h5repack -f NONE IN OUT")
    if stored < needed or stored > _SLACK_BYTES + 2 * needed:
        raise FormatError(f"{path}: {name} has {stored} bytes in the file, not the {needed} of its shape")
    if dataset.chunks is not None and math.prod(dataset.chunks) * dataset.dtype.itemsize > _SLACK_BYTES + 2 * needed:
        raise FormatError(f"{path}: {name} is stored in chunks of {list(dataset.chunks)}, larger than itself")


def _local(path: str, file: h5py.File, name: str) -> h5py.Dataset:
    """Return a dataset of this file; FormatError for links and external storage.

    Through those a stranger's file could have other files of ours read.
    """
    place = ""
    for group in name.split("/"):
        place += f"/{group}"
        link = file.get(place, getlink=True)
        if link is None:
            raise FormatError(f"{path}: has no {name}; the options describe another model")
        if not isinstance(link, h5py.HardLink):
            raise FormatError(f"{path}: {place[1:]} is a link; copy the data into the file")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
        raise FormatError(f"{path}: {name} is no array of numbers in this file")
    return dataset


def _word_count(path: str, file: h5py.File, width: int) -> int:
    dataset = _local(path, file, _EMBEDDING)
    n_words = dataset.shape[0] if dataset.ndim == 2 else 0
    _check(path, file, _EMBEDDING, (n_words, width))
    if not n_words:
        raise FormatError(f"{path}: {_EMBEDDING} has shape {list(dataset.shape or ())}, which is no table of words")
    return int(n_words)


def _bits(model: BiLM) -> dict[str, Tensor]:
    """Return the bits of each parameter in float32, without those of the softmax."""
    # bits, because a NaN is not equal to itself
    parameters = {name: p for name, p in model.named_parameters() if not name.startswith("softmax")}
    return {name: p.detach().cpu().float().contiguous().view(torch.int32) for name, p in parameters.items()}
