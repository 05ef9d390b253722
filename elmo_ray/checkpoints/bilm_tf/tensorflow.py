"""Reading of bilm-tf's own checkpoints (TensorFlow V2: an index and data shards): variables and Adagrad slots.

Only this file imports TensorFlow, an extra (`pip install 'elmo-ray[tensorflow]'`), and only when such a checkpoint is
opened. Shapes are compared with the options before memory is taken for a variable.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elmo_ray.checkpoints.bilm_tf.variables import from_variables, variable_shapes
from elmo_ray.config import SoftmaxConfig
from elmo_ray.config.model import ModelConfig
from elmo_ray.errors import ConfigError, FormatError, reason
from elmo_ray.model.bilm import BiLM

STATE_FILE = "checkpoint"
"""Name of the file that names the newest checkpoint of a save folder."""

_STATE = re.compile(r'^\s*model_checkpoint_path:\s*"([^"\n]{1,4096})"', re.MULTILINE)
_NUMBER = re.compile(r"-(\d{1,18})\.index\Z")
_PART = re.compile(r"(.+)\.(?:index|meta|data-\d{5}-of-\d{5})")
_SLOT = "/Adagrad"
_MAX_STATE_BYTES = 1 << 20


def is_save_folder(folder: Path) -> bool:
    """Return True if TensorFlow has saved something in this folder."""
    return folder.is_dir() and ((folder / STATE_FILE).is_file() or any(folder.glob("*.index")))


def checkpoint_prefix(path: Path) -> Path | None:
    """Return the path of a checkpoint from that of one of its files; None for a file of another name."""
    match = _PART.fullmatch(path.name)
    return None if match is None else path.with_name(match[1])


def find_checkpoint(folder: Path, name: str | None = None) -> Path:
    """Return the path, without `.index`, of a save folder's checkpoint.

    name: of the checkpoint; None for the one that the folder's file `checkpoint` calls the newest, or, if that is not
    there, the one with the highest number. Raises FormatError where there is none, ConfigError for a name that is not
    there.
    """
    indexes = {path.name: path for path in folder.glob("*.index") if path.is_file()}
    if name is not None:
        if f"{name}.index" not in indexes:
            there = ", ".join(sorted(path.stem for path in indexes.values())[-5:]) or "none"
            raise ConfigError(f"checkpoint={name}: must be best, last or a checkpoint in {folder} ({there})")
        return folder / name
    # The file often has absolute paths of the machine that trained: only the last name is used.
    newest = _named_newest(folder / STATE_FILE)
    if newest is not None and f"{newest}.index" in indexes:
        return folder / newest
    if not indexes:
        raise FormatError(f"{folder}: its file {STATE_FILE} names {newest or 'nothing'}, but there is no .index file")

    def number(path: Path) -> tuple[int, str]:
        match = _NUMBER.search(path.name)
        return (int(match[1]) if match else -1, path.name)

    return max(indexes.values(), key=number).with_suffix("")


def _named_newest(state: Path) -> str | None:
    try:
        with open(state, "rb") as file:
            text = file.read(_MAX_STATE_BYTES).decode("utf-8", "replace")
    except OSError:
        return None
    match = _STATE.search(text)
    return re.split(r"[/\\]", match[1])[-1] if match else None


@dataclass(frozen=True)
class SavedModel:
    """Model of a TensorFlow checkpoint.

    prefix: the checkpoint's path without `.index`. step: bilm-tf's global step, or None if it has none. fingerprint:
    sha256 of the index, which has the checksums of all variables. has_slots: True if it has sums of Adagrad.
    """

    prefix: Path
    model: BiLM
    step: int | None
    fingerprint: str
    has_slots: bool

    def slots(self) -> dict[str, Tensor]:
        """Read and return Adagrad's sums of squares by our names of parameters, each in its parameter's shape.

        Raises FormatError where the checkpoint does not have those of all parameters.
        """
        shapes = variable_shapes(self.model)
        variables = _Variables(self.prefix, {f"{name}{_SLOT}": shape for name, shape in shapes.items()})
        return from_variables(self.model, _Renamed(variables, _SLOT), str(self.prefix))


def read_checkpoint(prefix: Path, model: ModelConfig, softmax: SoftmaxConfig) -> SavedModel:
    """Return the model with its softmax, in float32, without gradients.

    prefix: path without `.index`. Raises FormatError naming a variable that is missing, left over, or of another shape
    than the options say, and ConfigError where TensorFlow is not installed.
    """
    found = _Variables(prefix, {})
    words = found.shapes_there.get("lm/softmax/b", (0,))
    if len(words) != 1 or not words[0]:
        raise FormatError(f"{prefix}: has no softmax (lm/softmax/b); it is no checkpoint of bilm-tf's training")
    with torch.device("meta"):
        bilm = BiLM(model, softmax, int(words[0]))
    shapes = variable_shapes(bilm)
    extra = sorted(name for name in found.shapes_there if name.startswith("lm/") and not name.endswith(_SLOT))
    extra = [name for name in extra if name not in shapes]
    variables = _Variables(prefix, shapes, found.reader)
    if extra:
        raise FormatError(f"{prefix}: has {extra[0]}, for which the options have no place: they are another model's")
    bilm.load_state_dict(from_variables(bilm, variables, str(prefix)), assign=True)
    has_slots = any(name.endswith(_SLOT) for name in found.shapes_there)
    return SavedModel(prefix, bilm.requires_grad_(False), _step(found), _fingerprint(prefix), has_slots)


class _Variables(Mapping[str, np.ndarray]):
    """Float arrays of a checkpoint by TensorFlow's names: all shapes are checked first, each is read when asked for."""

    def __init__(self, prefix: Path, shapes: Mapping[str, tuple[int, ...]], reader: Any = None):
        self.prefix, self.shapes = prefix, shapes
        self.reader = _open(prefix) if reader is None else reader
        self.shapes_there = {
            str(name): tuple(map(int, shape)) for name, shape in self.reader.get_variable_to_shape_map().items()
        }
        for name, shape in shapes.items():
            there = self.shapes_there.get(name)
            if there is None:
                raise FormatError(f"{prefix}: has no variable {name}; the options describe another model")
            if there != shape:
                raise FormatError(f"{prefix}: {name} has shape {list(there)}, the options ask for {list(shape)}")

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes_there:
            raise KeyError(name)
        try:
            array = np.asarray(self.reader.get_tensor(name))
        except Exception as error:  # damaged bytes may raise anything in TensorFlow
            raise FormatError(f"{self.prefix}: {name} cannot be read: {reason(error)}") from None
        if array.dtype.kind != "f":
            raise FormatError(f"{self.prefix}: {name} has numbers of type {array.dtype}, not floats")
        return array.astype(np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class _Renamed(Mapping[str, np.ndarray]):
    """Slots under the names of their variables."""

    def __init__(self, variables: _Variables, suffix: str):
        self.variables, self.suffix = variables, suffix

    def __getitem__(self, name: str) -> np.ndarray:
        return self.variables[name + self.suffix]

    def __iter__(self) -> Iterator[str]:
        return (name.removesuffix(self.suffix) for name in self.variables)

    def __len__(self) -> int:
        return len(self.variables)


def _open(prefix: Path) -> Any:
    # TensorFlow's messages at import do not help a user who only reads a file
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        import tensorflow
    except ImportError as error:
        raise ConfigError(
            f"{prefix.parent}: a TensorFlow checkpoint is read by TensorFlow, which cannot be imported here "
            f"({reason(error)}): pip install 'elmo-ray[tensorflow]'"
        ) from None
    try:
        return tensorflow.train.load_checkpoint(str(prefix))
    except Exception as error:  # damaged bytes may raise anything in TensorFlow
        raise FormatError(f"{prefix}: cannot be read as a TensorFlow checkpoint: {reason(error)}") from None


def _step(variables: _Variables) -> int | None:
    if variables.shapes_there.get("global_step") != ():
        return None
    try:
        value = float(variables.reader.get_tensor("global_step"))
    except Exception:  # the step is only shown: no error in it may hinder the use of the model
        return None
    return int(value) if 0 <= value < 1 << 53 else None


def _fingerprint(prefix: Path) -> str:
    try:
        return hashlib.sha256(Path(f"{prefix}.index").read_bytes()).hexdigest()
    except OSError as error:
        raise FormatError(f"{prefix}.index: cannot be read: {error.strerror}") from None
