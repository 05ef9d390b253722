"""A SOURCE: what `evaluate`, `export` and others start from, found and opened by what it is.

A run's folder (its best checkpoint, or the one that `checkpoint` names), a checkpoint, or a published weights.hdf5 with
the options.json beside it. Everything is checked before it is used: hashes of a checkpoint, shapes against the model.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from elmo_ray.config import ModelConfig, PretrainConfig, SoftmaxConfig
from elmo_ray.config_yaml import parse_yaml, short
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.errors import CheckpointError, ConfigError, DataError, FormatError
from elmo_ray.formats.bilm_hdf5 import read_weights
from elmo_ray.formats.bilm_options import from_options, read_options
from elmo_ray.model.bilm import BiLM
from elmo_ray.storage import absolute, is_uri
from elmo_ray.training.checkpoint_reader import (
    Checkpoint,
    listed_checkpoints,
    newest_checkpoint,
    open_checkpoint,
    previous_copy,
)
from elmo_ray.training.manifest import MANIFEST
from elmo_ray.training.object_checkpoints import fetched_files, open_stored, stored_source
from elmo_ray.training.saved_form import check_forms
from elmo_ray.training.snapshot import MODEL_FILE

logger = logging.getLogger(__name__)

BEST, LAST = "best", "last"
WEIGHTS, OPTIONS, VOCABULARY = "weights.hdf5", "options.json", "vocab.txt"


@dataclass(frozen=True)
class Source:
    """A model that is ready for use, on the CPU, without gradients.

    path: absolute; the checkpoint's folder or the weights file. A checkpoint has also its step, the fingerprint (hash)
    of its weights, and the settings that it was trained with.
    """

    path: Path
    model: BiLM
    softmax: SoftmaxConfig
    words: Vocabulary | None
    step: int | None = None
    fingerprint: str | None = None
    training: PretrainConfig | None = None
    origin: str | None = None  # the URI of a checkpoint that was fetched to `path`

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def has_softmax(self) -> bool:
        """Whether the model can tell what a word's probability is; a weights.hdf5 holds no softmax."""
        return self.model.softmax_bias is not None

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
    """Open what `source` (init.from) names; `options` and `vocab` (init.options, init.vocab) belong to a weights.hdf5.

    checkpoint: of a run: best, last, or the name of a folder in its checkpoints/. verify: read all of a checkpoint and
    compare hashes. Raises ConfigError where nothing can be opened, CheckpointError and FormatError for damaged files.
    """
    if source is None:
        raise ConfigError("init.from is empty: name a run, a checkpoint or a weights.hdf5")
    if is_uri(source):
        return _fetched(absolute(source), checkpoint, options, vocab)
    path = Path(os.path.abspath(os.path.expanduser(source)))
    if not os.path.exists(path) and not os.path.exists(previous_copy(path)):
        raise ConfigError(f"{source}: no such file or folder; SOURCE is a run, a checkpoint or a weights.hdf5")
    weights = path if path.is_file() else path / WEIGHTS
    is_checkpoint = (path / MANIFEST).exists() or (not path.exists() and previous_copy(path).exists())
    is_run = (path / "checkpoints").is_dir() or (path / BEST).is_dir()
    if not is_run and checkpoint != BEST:
        raise ConfigError(f"checkpoint={checkpoint} chooses among a run's, but {source} is no run; leave it out")
    if is_checkpoint or is_run:
        for key, value in (("init.options", options), ("init.vocab", vocab)):
            if value is not None:
                raise ConfigError(f"{key}={value}: {source} has its own; leave it out")
        return _from_checkpoint(open_checkpoint(path, verify) if is_checkpoint else _of_run(path, checkpoint, verify))
    if path.is_dir() and not weights.exists():
        if (path / "checkpoint").is_file() or any(path.glob("*.ckpt-*.index")):
            raise ConfigError(
                f"{source}: TensorFlow save folders of bilm-tf are not read by this version; "
                "give the weights.hdf5 that bilm-tf's dump_weights makes of it"
            )
        raise ConfigError(f"{source}: no run (checkpoints/), no checkpoint ({MANIFEST}) and no folder with {WEIGHTS}")
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
    place = f"{checkpoint.path}/config.yaml"
    try:
        values = parse_yaml(checkpoint.text("config.yaml"), place)
        if not isinstance(values, dict):
            raise ConfigError("must be a mapping of sections")
        config = PretrainConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{place}: {short(str(error).removeprefix(f'{place}: '), 1000)}") from None
    try:
        vocabulary = Vocabulary.read(checkpoint.path / VOCABULARY)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    with torch.device("meta"):
        model = BiLM(config.model, config.softmax, vocabulary.size)
    tensors = checkpoint.tensors(MODEL_FILE)
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    check_forms(f"{checkpoint.path}/{MODEL_FILE}", tensors, shapes)
    if len({tensor.dtype for tensor in tensors.values()}) != 1:
        raise CheckpointError(f"{checkpoint.path}/{MODEL_FILE}: has numbers of several types")
    model.load_state_dict(tensors, assign=True)
    fingerprint = str(checkpoint.manifest["files"][MODEL_FILE]["sha256"])
    model.requires_grad_(False)
    return Source(checkpoint.path, model, config.softmax, vocabulary, checkpoint.step, fingerprint, config)


def _from_weights(weights: Path, options: str | None, vocab: str | None) -> Source:
    options_path = Path(options) if options is not None else weights.parent / OPTIONS
    if not options_path.is_file():
        cure = "correct init.options" if options is not None else "name it with init.options=FILE"
        raise ConfigError(f"{options_path}: no such file; weights need the options they were made with: {cure}")
    model_config, softmax = from_options(read_options(options_path), str(options_path), published=True)
    vocab_path = Path(vocab) if vocab is not None else weights.parent / VOCABULARY
    vocabulary = Vocabulary.read(vocab_path) if vocab is not None or vocab_path.is_file() else None
    model = read_weights(weights, model_config)
    rows = None if model.word_embedding is None else len(model.word_embedding)
    if vocabulary is not None and rows not in (None, vocabulary.size):
        raise FormatError(f"{weights}: embedding has {rows} words, {vocab_path} has {vocabulary.size}")
    return Source(weights, model, softmax, vocabulary)
