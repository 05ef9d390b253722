"""A SOURCE: what `evaluate`, `export` and others start from, found and opened by what it is.

A run's folder (its best checkpoint, or the one that `checkpoint` names), a checkpoint, a folder in which bilm-tf has
saved with TensorFlow, or a published weights.hdf5; the last two with the options.json beside them. Everything is
checked before it is used: hashes of a checkpoint, shapes against the model, the vocabulary against the softmax.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from elmo_ray.checkpoints.bilm_tf.hdf5 import read_weights
from elmo_ray.checkpoints.bilm_tf.options import from_options, read_options
from elmo_ray.checkpoints.bilm_tf.tensorflow import find_checkpoint, is_save_folder, read_checkpoint
from elmo_ray.checkpoints.check import check_forms
from elmo_ray.checkpoints.identity import saved_config
from elmo_ray.checkpoints.manifest import MANIFEST, MODEL_FILE, OPTIMIZER_FILE
from elmo_ray.checkpoints.object_store import fetched_files, open_stored, stored_source
from elmo_ray.checkpoints.read import Checkpoint, listed_checkpoints, newest_checkpoint, open_checkpoint, previous_copy
from elmo_ray.config import PretrainConfig, SoftmaxConfig
from elmo_ray.config.model import ModelConfig
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.errors import CheckpointError, ConfigError, DataError, FormatError
from elmo_ray.model.bilm import BiLM
from elmo_ray.storage import absolute, is_uri

logger = logging.getLogger(__name__)

BEST, LAST = "best", "last"
WEIGHTS, OPTIONS, VOCABULARY = "weights.hdf5", "options.json", "vocab.txt"
_KINDS = "a run, a checkpoint, a bilm-tf save folder or a weights.hdf5"


@dataclass(frozen=True)
class Source:
    """A model that is ready for use, on the CPU, without gradients.

    path: absolute; the checkpoint's folder, the weights file, or a TensorFlow checkpoint without its `.index`. A
    checkpoint has also its step and the fingerprint (hash) of its weights; ours the settings that it was trained with.
    slots: reads the optimizer's tensors, `<slot>.<parameter>` as `Optimizer.state_tensors`; None where there are none.
    """

    path: Path
    model: BiLM
    softmax: SoftmaxConfig
    words: Vocabulary | None
    step: int | None = None
    fingerprint: str | None = None
    training: PretrainConfig | None = None
    origin: str | None = None  # the URI of a checkpoint that was fetched to `path`
    slots: Callable[[], dict[str, Tensor]] | None = None

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def has_softmax(self) -> bool:
        """Whether the model can tell what a word's probability is; a weights.hdf5 holds no softmax."""
        return self.model.has_softmax

    @property
    def vocabulary(self) -> Vocabulary:
        """Raises ConfigError for weights that came without one."""
        if self.words is None:
            raise ConfigError(f"{self.path}: has no {VOCABULARY} beside it; name its vocabulary with init.vocab=FILE")
        return self.words

    def describe(self) -> str:
        """One line: what was opened."""
        step = "" if self.step is None else f", step {self.step:,}"
        size = "" if self.words is None else f", {self.words.size:,} words"
        count = sum(p.numel() for p in self.model.parameters())
        return f"{self.origin or self.path}{step}: {count:,} parameters{size}"


def open_source(
    source: str | os.PathLike[str] | None,
    checkpoint: str = BEST,
    options: str | None = None,
    vocab: str | None = None,
    verify: bool = True,
) -> Source:
    """Open what `source` (init.from) names; `options` and `vocab` (init.options, init.vocab) belong to bilm-tf's files.

    checkpoint: of a run: best, last, or the name of a folder in its checkpoints/; of a TensorFlow save folder: a name
    in it, best and last being the one that TensorFlow calls the newest. verify: read all of a checkpoint and compare
    hashes. Raises ConfigError where nothing can be opened, CheckpointError and FormatError for damaged files.
    """
    if source is None:
        raise ConfigError(f"init.from is empty: name {_KINDS}")
    if is_uri(source):
        return _fetched(absolute(source), checkpoint, options, vocab)
    path = Path(os.path.abspath(os.path.expanduser(source)))
    if path.with_name(path.name + ".index").is_file() and not path.is_dir():
        path, checkpoint = path.parent, path.name  # a TensorFlow checkpoint by its own name
    if not os.path.exists(path) and not os.path.exists(previous_copy(path)):
        raise ConfigError(f"{source}: no such file or folder; SOURCE is {_KINDS}")
    weights = path if path.is_file() else path / WEIGHTS
    is_checkpoint = (path / MANIFEST).exists() or (not path.exists() and previous_copy(path).exists())
    is_run = (path / "checkpoints").is_dir() or (path / BEST).is_dir()
    is_saved = not is_checkpoint and not is_run and is_save_folder(path)
    if not is_run and not is_saved and checkpoint != BEST:
        raise ConfigError(f"checkpoint={checkpoint} chooses among a run's, but {source} is no run; leave it out")
    if is_checkpoint or is_run:
        for key, value in (("init.options", options), ("init.vocab", vocab)):
            if value is not None:
                raise ConfigError(f"{key}={value}: {source} has its own; leave it out")
        return _from_checkpoint(open_checkpoint(path, verify) if is_checkpoint else _of_run(path, checkpoint, verify))
    if is_saved:
        name = None if checkpoint in (BEST, LAST) else checkpoint
        return _from_tensorflow(find_checkpoint(path, name), options, vocab)
    if path.is_dir() and not weights.exists():
        raise ConfigError(
            f"{source}: no run (checkpoints/), no checkpoint ({MANIFEST}), no folder with {WEIGHTS} or that TensorFlow "
            "has saved in (*.index)"
        )
    return _from_weights(weights, options, vocab)


def _fetched(uri: str, checkpoint: str, options: str | None, vocab: str | None) -> Source:
    """Open what is in an object store from this machine's copy of it, which is compared with its hashes."""
    try:
        place = stored_source(uri, checkpoint)
        if place is None:
            return open_source(fetched_files(uri, (WEIGHTS, OPTIONS, VOCABULARY)), BEST, options, vocab)
        return replace(_from_checkpoint(open_stored(place)), origin=place)
    except OSError as error:
        raise ConfigError(f"init.from={uri}: {error.strerror or error}") from None


def _of_run(run: Path, name: str, verify: bool) -> Checkpoint:
    folder = run / "checkpoints"
    if name == BEST:
        best = run / BEST
        if best.exists() or previous_copy(best).exists():
            return open_checkpoint(best, verify)
        logger.info("%s: has no %s/, as it has not validated; taking its newest checkpoint", run, BEST)
    if name in (BEST, LAST):
        newest = newest_checkpoint(folder, verify)
        if newest is None:
            raise CheckpointError(f"{folder}: has no finished checkpoint yet")
        return newest
    if name not in (path.name for path in listed_checkpoints(folder)):
        names = ", ".join(path.name for path in listed_checkpoints(folder)[-5:]) or "none"
        raise ConfigError(f"checkpoint={name}: must be best, last or a folder in {folder} (newest: {names})")
    return open_checkpoint(folder / name, verify)


def _from_checkpoint(checkpoint: Checkpoint) -> Source:
    config = saved_config(checkpoint)
    try:
        vocabulary = Vocabulary.read(checkpoint.path / VOCABULARY)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    with torch.device("meta"):
        model = BiLM(config.model, config.softmax, vocabulary.size)
    tensors = checkpoint.tensors(MODEL_FILE)
    if not any(name.startswith("softmax") for name in tensors):
        model.drop_softmax()  # made from a weights.hdf5
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    check_forms(f"{checkpoint.path}/{MODEL_FILE}", tensors, shapes)
    if len({tensor.dtype for tensor in tensors.values()}) != 1:
        raise CheckpointError(f"{checkpoint.path}/{MODEL_FILE}: has numbers of several types")
    model.load_state_dict(tensors, assign=True)
    fingerprint = str(checkpoint.manifest["files"][MODEL_FILE]["sha256"])
    model.requires_grad_(False)
    slots = partial(checkpoint.tensors, OPTIMIZER_FILE) if OPTIMIZER_FILE in checkpoint.files else None
    return Source(checkpoint.path, model, config.softmax, vocabulary, checkpoint.step, fingerprint, config, slots=slots)


def _from_tensorflow(prefix: Path, options: str | None, vocab: str | None) -> Source:
    options_path = _options_path(prefix.parent, options)
    model_config, softmax = from_options(read_options(options_path), str(options_path))
    vocab_path = Path(vocab) if vocab is not None else prefix.parent / VOCABULARY
    if vocab is None and not vocab_path.is_file():
        raise ConfigError(f"{prefix.parent}: its softmax needs the vocabulary it was trained with: init.vocab=FILE")
    vocabulary = Vocabulary.read(vocab_path)
    saved = read_checkpoint(prefix, model_config, softmax)
    if saved.model.n_words != vocabulary.size:
        raise ConfigError(
            f"init.vocab={vocab_path}: has {vocabulary.size:,} words, the softmax of {prefix} has "
            f"{saved.model.n_words:,}; name the vocabulary that it was trained with"
        )

    def slots() -> dict[str, Tensor]:
        return {f"accumulator.{name}": slot for name, slot in saved.slots().items()}

    return Source(prefix, saved.model, softmax, vocabulary, saved.step, saved.fingerprint, slots=slots)


def _options_path(folder: Path, options: str | None) -> Path:
    path = Path(options) if options is not None else folder / OPTIONS
    if not path.is_file():
        cure = "correct init.options" if options is not None else "name it with init.options=FILE"
        raise ConfigError(f"{path}: no such file; weights need the options they were made with: {cure}")
    return path


def _from_weights(weights: Path, options: str | None, vocab: str | None) -> Source:
    options_path = _options_path(weights.parent, options)
    model_config, softmax = from_options(read_options(options_path), str(options_path), published=True)
    vocab_path = Path(vocab) if vocab is not None else weights.parent / VOCABULARY
    vocabulary = Vocabulary.read(vocab_path) if vocab is not None or vocab_path.is_file() else None
    model = read_weights(weights, model_config)
    rows = None if model.word_embedding is None else len(model.word_embedding)
    if vocabulary is not None and rows not in (None, vocabulary.size):
        raise FormatError(f"{weights}: embedding has {rows} words, {vocab_path} has {vocabulary.size}")
    return Source(weights, model, softmax, vocabulary)
