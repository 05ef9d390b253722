"""Opening of a SOURCE, the trained model from which `evaluate`, `export` and other commands start.

A SOURCE is a run's folder (its best checkpoint, or the one that `checkpoint` names), a checkpoint, a folder in our form
for the Hub, a folder in which bilm-tf has saved with TensorFlow, a published weights.hdf5, or a model folder of
ELMoForManyLangs. The files of bilm-tf need the options.json beside them. `hf://OWNER/NAME` is a folder of the Hub with
any of these. Others give these files names of their own: a folder's only .hdf5 file, `elmo_weights.hdf5` beside
`elmo_options.json`, `vocab.txt.gz`, one of the files of a TensorFlow checkpoint.
Everything is checked before it is used: hashes of a checkpoint, shapes against the model, the vocabulary against the
softmax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from elmo_ray.checkpoints.bilm_tf.hdf5 import check_is_hdf5, read_weights
from elmo_ray.checkpoints.bilm_tf.options import from_options, read_options
from elmo_ray.checkpoints.bilm_tf.tensorflow import (
    STATE_FILE,
    checkpoint_prefix,
    find_checkpoint,
    is_save_folder,
    read_checkpoint,
)
from elmo_ray.checkpoints.check import check_forms
from elmo_ray.checkpoints.elmo_many_langs import is_model_file, is_model_folder, read_model
from elmo_ray.checkpoints.hub import (
    HUB_CONFIG,
    HUB_WEIGHTS,
    MODEL_TYPE,
    SCHEME,
    fetched,
    is_hub_folder,
    model_type,
    read_hub_config,
)
from elmo_ray.checkpoints.identity import saved_config
from elmo_ray.checkpoints.manifest import MANIFEST, MODEL_FILE, OPTIMIZER_FILE
from elmo_ray.checkpoints.read import Checkpoint, listed_checkpoints, newest_checkpoint, open_checkpoint
from elmo_ray.checkpoints.stores import StorageError, previous_copy, store_of
from elmo_ray.config import FormConfig, PretrainConfig, SoftmaxConfig
from elmo_ray.config.model import ModelConfig
from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary
from elmo_ray.errors import CheckpointError, ConfigError, DataError, ElmoRayError, FormatError, short
from elmo_ray.model.bilm import BiLM
from elmo_ray.storage import absolute, base_name, download, exists, file_hash, is_uri, join, matches
from elmo_ray.storage.local_copy import scratch

logger = logging.getLogger(__name__)

BEST, LAST = "best", "last"
WEIGHTS, OPTIONS, VOCABULARY = "weights.hdf5", "options.json", "vocab.txt"
_HUB_PAGES = ("https://huggingface.co/", "http://huggingface.co/", "https://hf.co/")
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".7z")
_USED_FILES = ("config.yaml", VOCABULARY, MODEL_FILE)
"""Files of a checkpoint from which a model is read."""
_WEIGHTS_NAMES = ("*.hdf5", "*.h5")
_OPTIONS_NAMES = ("*options*.json",)
_VOCABULARY_NAMES = ("vocab*.txt", "vocab*.txt.gz")
_KINDS = (
    "a run, a checkpoint, hf://OWNER/NAME, a bilm-tf save folder, a weights.hdf5 or a model folder of ELMoForManyLangs"
)


@dataclass(frozen=True)
class Source:
    """Model that is ready for use, on the CPU, without gradients.

    path: absolute path of the checkpoint's folder, of the weights file, or of a TensorFlow checkpoint without its
    `.index`. uri: place of a checkpoint that was fetched from an object store to `path`, else None.
    step, fingerprint: of a checkpoint, its step and a hash of its weights. training: of a checkpoint of ours, the
    settings with which it was trained. slots: function that reads the optimizer's tensors, `<slot>.<parameter>` as in
    `Optimizer.state_tensors`; None where there are none. bad_words: the error of a vocabulary that lies beside the
    model and cannot be read, where the model itself does not need it.
    """

    path: Path
    model: BiLM
    softmax: SoftmaxConfig
    words: Vocabulary | None
    step: int | None = None
    fingerprint: str | None = None
    training: PretrainConfig | None = None
    uri: str | None = None
    slots: Callable[[], dict[str, Tensor]] | None = None
    bad_words: ElmoRayError | None = None

    @property
    def config(self) -> ModelConfig:
        """Settings of the model."""
        return self.model.config

    @property
    def has_softmax(self) -> bool:
        """True if the model can give probabilities of words; a weights.hdf5 holds no softmax."""
        return self.model.has_softmax

    @property
    def vocabulary(self) -> Vocabulary:
        """Vocabulary of the model; ConfigError for weights that came without one, DataError for one that is damaged."""
        if self.bad_words is not None:
            raise self.bad_words
        if self.words is None:
            raise ConfigError(f"{self.path}: has no {VOCABULARY} beside it; name its vocabulary with init.vocab=FILE")
        return self.words

    def with_word_table(self, words: Vocabulary | None = None) -> Source:
        """Return the source with a table of its vocabulary's words in place of a token embedder; the log says so.

        A source without a token embedder is returned as it is. Training and the files of bilm-tf know no such embedder,
        and words that are not in the table are `<UNK>` to them. words: those of the table, None for the source's own.
        Raises ConfigError where there is no vocabulary.
        """
        embedder = self.model.token_embedder
        if embedder is None:
            return self
        if words is None:
            # a file, as a training reads it, with the special words in it
            path = scratch("word-table") / VOCABULARY
            self.vocabulary.write(path)
            words = Vocabulary.read(path)
        logger.info(
            "%s: the vectors of %s words are taken in place of its characters; any other word is <UNK>",
            self.path,
            f"{words.size:,}",
        )
        with torch.device("meta"):
            model = BiLM(self.config, self.softmax, words.size)
        model.drop_softmax()
        lstm = {name: tensor for name, tensor in self.model.state_dict().items() if name.startswith("lstm.")}
        model.load_state_dict({**lstm, "word_embedding": embedder.vectors_of(words)}, assign=True)
        return replace(self, model=model.requires_grad_(False), words=words)

    def recorded_form(self, data: FormConfig) -> FormConfig:
        """Return settings of text in which the tokenizer is that of the training of this model, unless one is set.

        The log says which it is. Raises ConfigError for a model of the Hub that names a function as its tokenizer.
        """
        recorded = self.training.data if self.training is not None else None
        if recorded is None or recorded.tokenizer is None or data.tokenizer is not None:
            return data
        if ":" in recorded.tokenizer and (self.uri or "").startswith(SCHEME):
            # What others have uploaded does not choose the code that runs here.
            raise ConfigError(
                f"{self.uri}: was trained with data.tokenizer={short(recorded.tokenizer)}; set data.tokenizer to it if "
                "this function may run here, or to another one"
            )
        logger.info("data.tokenizer=%s, as in the training of %s", recorded.tokenizer, self.uri or self.path)
        names = ("tokenizer", "language", *(() if data.normalize else ("normalize",)))
        return data.model_copy(update={name: getattr(recorded, name) for name in names})

    def describe(self) -> str:
        """Return one line about the model: its place, step and sizes."""
        step = "" if self.step is None else f", step {self.step:,}"
        size = "" if self.words is None else f", {self.words.size:,} words"
        count = sum(p.numel() for p in self.model.parameters())
        return f"{self.uri or self.path}{step}: {count:,} parameters{size}"


def open_source(
    source: str | os.PathLike[str] | None,
    checkpoint: str = BEST,
    options: str | None = None,
    vocab: str | None = None,
    verify: bool = True,
) -> Source:
    """Open the model that `source` (init.from) names.

    checkpoint: for a run best, last, or the name of a folder in its checkpoints/; for a folder of TensorFlow the name
    of a checkpoint in it, where best and last mean the one that TensorFlow calls the newest. options, vocab: paths
    (init.options, init.vocab) that bilm-tf's files may need. verify: read all of a checkpoint, compare its hashes, and
    look whether all parameters are finite; workers need not do again what the command has done. Raises ConfigError
    where nothing can be opened, CheckpointError and FormatError for damaged files and parameters that are not finite.
    """
    opened = _open(source, checkpoint, options, vocab, verify)
    for name, parameter in opened.model.named_parameters() if verify else ():
        # the sum costs a tenth of looking at each number, and is finite where they all are and do not overflow it
        if not math.isfinite(float(parameter.sum())) and not bool(torch.isfinite(parameter).all()):
            raise FormatError(
                f"{opened.uri or opened.path}: {name} has numbers that are not finite (NaN or infinity), so all "
                "results would be; take another checkpoint of that training"
            )
    return opened


def _open(
    source: str | os.PathLike[str] | None, checkpoint: str, options: str | None, vocab: str | None, verify: bool
) -> Source:
    if source is None or not str(source):
        raise ConfigError(f"init.from is empty: name {_KINDS}")
    if str(source).startswith(_HUB_PAGES):
        raise ConfigError(f"{source}: write a model of the Hub as {SCHEME}OWNER/NAME")
    if str(source).startswith(SCHEME):
        folder, uri = fetched(str(source))
        return dataclasses.replace(_open_place(str(folder), source, checkpoint, options, vocab, verify), uri=uri)
    return _open_place(absolute(source), source, checkpoint, options, vocab, verify)


def _open_place(
    place: str,
    source: str | os.PathLike[str],
    checkpoint: str,
    options: str | None,
    vocab: str | None,
    verify: bool,
) -> Source:
    """Open the model at an absolute path or a URI. source: the place as given, for messages."""
    try:
        is_checkpoint, is_run = _is_checkpoint(place), _is_run(place)
        if is_checkpoint or is_run:
            if not is_run:
                _check_no_choice(source, checkpoint)
            _check_own_files(source, options, vocab)
            opened = _opened(place, verify) if is_checkpoint else _of_run(place, checkpoint, verify)
            return _from_checkpoint(opened)
    except StorageError as error:
        raise ConfigError(f"init.from={source}: {error}") from None
    if is_uri(place):
        _check_no_choice(source, checkpoint)
        return _from_weights(_fetched_weights(place), options, vocab)
    return _from_path(Path(place), source, checkpoint, options, vocab)


def _from_path(
    path: Path, source: str | os.PathLike[str], checkpoint: str, options: str | None, vocab: str | None
) -> Source:
    """Open a model at a path on this machine that is no run and no checkpoint of ours. source: the path as given."""
    folder = path.parent if is_model_file(path) else path
    if is_model_folder(folder) and _only_weights(folder) is None:
        _check_no_choice(source, checkpoint)
        _check_own_files(source, options)
        model, words = read_model(folder)
        return Source(folder, model, SoftmaxConfig(), words if vocab is None else Vocabulary.read(vocab))
    if path.is_file():
        path = _named_by_its_file(path, source)
    if path.with_name(path.name + ".index").is_file() and not path.is_dir():
        path, checkpoint = path.parent, path.name  # a TensorFlow checkpoint by its own name
    if not path.exists():
        raise ConfigError(f"{source}: no such file or folder; SOURCE is {_KINDS}")
    if is_save_folder(path):
        name = None if checkpoint in (BEST, LAST) else checkpoint
        return _from_tensorflow(find_checkpoint(path, name), options, vocab)
    _check_no_choice(source, checkpoint)
    if path.is_dir() and is_hub_folder(path):
        return _from_hub_folder(path, options, vocab)
    weights = path if path.is_file() else _only_weights(path)
    if weights is None:
        raise ConfigError(
            f"{source}: no run (checkpoints/), no checkpoint ({MANIFEST}), no folder with {WEIGHTS} or another .hdf5 "
            f"file, or that TensorFlow has saved in (*.index){_hint_at(path)}"
        )
    return _from_weights(weights, options, vocab)


def _hint_at(folder: Path) -> str:
    """Return what a folder that is no SOURCE seems to be, and the cure; nothing where it cannot be told."""
    if (folder.parent / MANIFEST).is_file() or _is_run(str(folder.parent)):
        choice = "" if folder.name != "checkpoints" else ", with checkpoint=last or the name of one"
        return f"; it is in a run or a checkpoint: name {folder.parent}{choice}"
    try:
        inside = sorted(folder.iterdir())
    except OSError:
        return ""
    names = [path.name for path in inside]
    if archives := [name for name in names if name.endswith(_ARCHIVES)]:
        return f"; unpack {archives[0]} first"
    if "saved_model.pb" in names:
        return "; it is a SavedModel of TensorFlow, as TensorFlow Hub has them, from which no biLM can be read"
    if torch_files := [name for name in names if name.endswith((".th", ".pt", ".pth", ".bin"))]:
        return f"; {torch_files[0]} is a file of PyTorch, by its name, and not bilm-tf's weights"
    if kind := model_type(folder):
        without = f" without {HUB_WEIGHTS}" if kind == MODEL_TYPE else ""
        return f"; {HUB_CONFIG} says that it is a model of {short(kind, 40)}{without}"
    if runs := [path for path in inside if path.is_dir() and (_is_run(str(path)) or (path / MANIFEST).is_file())]:
        return f"; name one of the runs in it, such as {runs[0]}"
    return ""


def _check_no_choice(source: str | os.PathLike[str], checkpoint: str) -> None:
    """Raise ConfigError if a checkpoint of a SOURCE is chosen that is no run."""
    if checkpoint != BEST:
        raise ConfigError(f"checkpoint={checkpoint} chooses among a run's, but {source} is no run; leave it out")


def _check_own_files(source: str | os.PathLike[str], options: str | None, vocab: str | None = None) -> None:
    """Raise ConfigError if a file is named that the SOURCE has itself."""
    for key, value in (("init.options", options), ("init.vocab", vocab)):
        if value is not None:
            raise ConfigError(f"{key}={value}: {source} has its own; leave it out")


def _named_by_its_file(path: Path, source: str | os.PathLike[str]) -> Path:
    """Return the model that a file belongs to: a TensorFlow checkpoint's name, its folder, or the file itself.

    Raises ConfigError for a file of a checkpoint of ours, and for options.
    """
    prefix = checkpoint_prefix(path)
    if prefix is not None:
        if not prefix.with_name(f"{prefix.name}.index").is_file():
            raise ConfigError(
                f"{source}: is a file of a TensorFlow checkpoint whose {prefix.name}.index is not beside it"
            )
        return prefix
    if path.name == STATE_FILE and is_save_folder(path.parent):
        return path.parent
    if path.suffix not in (".hdf5", ".h5") and (path.parent / MANIFEST).is_file():
        raise ConfigError(f"{source}: is a file of a checkpoint; name the checkpoint: {path.parent}")
    if path.suffix == ".json":
        raise ConfigError(f"{source}: is JSON; name the weights as SOURCE and options.json as init.options=FILE")
    check_is_hdf5(path)
    return path


def _only_weights(folder: Path) -> Path | None:
    """Return the weights in a folder: `weights.hdf5`, or else its only HDF5 file; None where there is none."""
    if (folder / WEIGHTS).exists():
        return folder / WEIGHTS
    return _only(folder, _WEIGHTS_NAMES, "weights", "name the file")


def _only(folder: Path, patterns: Iterable[str], what: str, cure: str) -> Path | None:
    """Return the only file in a folder that matches one of the patterns; ConfigError where there are several."""
    found = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:5])
        raise ConfigError(f"{folder}: has {len(found)} files that may be its {what} ({names}); {cure}")
    return found[0] if found else None


def _is_checkpoint(place: str) -> bool:
    store = store_of(place)
    if store.exists(join(place, MANIFEST)):
        return True
    return not os.path.exists(place) and store.exists(join(previous_copy(place), MANIFEST))


def _is_run(place: str) -> bool:
    return not os.path.isfile(place) and bool({"checkpoints", BEST} & set(store_of(place).directories(place)))


def _fetched_weights(uri: str) -> Path:
    """Return a local copy of weights in an object store, with copies of their options and vocabulary beside it.

    uri: of the file or of its folder. Raises ConfigError where there are none, or the store does not answer.
    """
    is_file = uri.endswith((".hdf5", ".h5"))
    folder, name = (uri.rpartition("/")[0], base_name(uri)) if is_file else (uri, WEIGHTS)
    target = scratch("fetched")
    try:
        if not is_file and not exists(join(folder, name)) and len(found := matches(join(folder, "*.hdf5"))) == 1:
            name = base_name(found[0])
        if not exists(join(folder, name)):
            raise ConfigError(f"{uri}: no run, checkpoint, {WEIGHTS} or another .hdf5 file alone")
        others = {OPTIONS, VOCABULARY}
        for pattern in (*_OPTIONS_NAMES, *_VOCABULARY_NAMES):
            others.update(map(base_name, matches(join(folder, pattern))))
        for each in (name, *sorted(others)):
            with contextlib.suppress(FileNotFoundError):
                download(join(folder, each), target / each)
    except OSError as error:
        raise ConfigError(f"init.from={uri}: {error.strerror or error}") from None
    return target / name


def _of_run(run: str, name: str, verify: bool) -> Checkpoint:
    store, folder, best = store_of(run), join(run, "checkpoints"), join(run, BEST)
    if name == BEST:
        inside = store.directories(run)
        # In an object store an interrupted copy leaves a `best` without a manifest, which is no checkpoint.
        is_there = BEST in inside and (not is_uri(run) or store.exists(join(best, MANIFEST)))
        if is_there or base_name(previous_copy(best)) in inside:
            return _opened(best, verify)
        logger.info("%s: has no %s/, as it has not validated; taking its newest checkpoint", run, BEST)
    if name in (BEST, LAST):
        newest = newest_checkpoint(folder, verify)
        if newest is None:
            raise CheckpointError(f"{folder}: has no finished checkpoint yet")
        return newest
    known = [base_name(place) for place in listed_checkpoints(folder)]
    if name not in known:
        names = ", ".join(known[-5:]) or "none"
        raise ConfigError(f"checkpoint={name}: must be best, last or a folder in {folder} (newest: {names})")
    return _opened(join(folder, name), verify)


def _opened(place: str, verify: bool) -> Checkpoint:
    """Return a checkpoint of which the files that a SOURCE is read from are whole, if `verify`.

    Those of its training, the optimizer's and the streams', are as large and may be left out where a run is copied.
    """
    if is_uri(place):  # all files are fetched together
        return open_checkpoint(place, verify)
    checkpoint = open_checkpoint(place, verify=False)
    if verify:
        checkpoint.verify(names=_USED_FILES)
    return checkpoint


def _from_checkpoint(checkpoint: Checkpoint) -> Source:
    config = saved_config(checkpoint)
    tensors = checkpoint.tensors(MODEL_FILE)
    has_softmax = any(name.startswith("softmax") for name in tensors)  # not in one that was made from a weights.hdf5
    try:
        needed = SPECIAL_WORDS if has_softmax or config.model.input == "words" else ()
        vocabulary = Vocabulary.read(checkpoint.path / VOCABULARY, needed)
    except DataError as error:
        raise CheckpointError(str(error)) from None
    model = _model(tensors, config, vocabulary.size, checkpoint.at(MODEL_FILE))
    fingerprint = str(checkpoint.manifest["files"][MODEL_FILE]["sha256"])

    def slots() -> dict[str, Tensor]:
        checkpoint.verify(names=(OPTIMIZER_FILE,))
        return checkpoint.tensors(OPTIMIZER_FILE)

    there = slots if OPTIMIZER_FILE in checkpoint.files and (checkpoint.path / OPTIMIZER_FILE).exists() else None
    uri = checkpoint.place if is_uri(checkpoint.place) else None
    return Source(checkpoint.path, model, config.softmax, vocabulary, checkpoint.step, fingerprint, config, uri, there)


def _model(tensors: dict[str, Tensor], config: PretrainConfig, n_words: int, place: str) -> BiLM:
    """Return the model with these tensors of the file `place`. Raises CheckpointError where they do not fit."""
    with torch.device("meta"):
        model = BiLM(config.model, config.softmax, n_words)
    if not any(name.startswith("softmax") for name in tensors):
        model.drop_softmax()
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    check_forms(place, tensors, shapes)
    if len({tensor.dtype for tensor in tensors.values()}) != 1:
        raise CheckpointError(f"{place}: has numbers of several types")
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False)


def _from_hub_folder(folder: Path, options: str | None, vocab: str | None) -> Source:
    _check_own_files(folder, options, vocab)
    values = read_hub_config(folder)
    try:
        settings = {"data": {"streams": 1}, "model": values["model"], "softmax": values["softmax"]}
        config = PretrainConfig.from_dict(settings)
    except ConfigError as error:
        raise FormatError(f"{folder / HUB_CONFIG}: {short(str(error), 1000)}") from None
    weights = folder / HUB_WEIGHTS
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{weights}: is not a readable safetensors file: {short(str(error))}") from None
    needs_words = any(name.startswith("softmax") for name in tensors) or config.model.input == "words"
    vocabulary = Vocabulary.read(folder / VOCABULARY, SPECIAL_WORDS if needs_words else ())
    model = _model(tensors, config, vocabulary.size, str(weights))
    if values.get("vocabulary_sha256", vocabulary.sha256) != vocabulary.sha256:
        raise FormatError(
            f"{folder / VOCABULARY}: has other words than the vocabulary_sha256 in {HUB_CONFIG} says: it is another "
            "model's or was changed"
        )
    step = values.get("step")
    return Source(
        weights, model, config.softmax, vocabulary, step if isinstance(step, int) else None, file_hash(weights)
    )


def _from_tensorflow(prefix: Path, options: str | None, vocab: str | None) -> Source:
    options_path = _options_path(prefix.parent, options)
    model_config, softmax = from_options(read_options(options_path), str(options_path))
    vocab_path = _vocabulary_path(prefix.parent, vocab)
    vocabulary = None if vocab_path is None else Vocabulary.read(vocab_path)
    saved = read_checkpoint(prefix, model_config, softmax)
    if vocabulary is not None and saved.model.n_words != vocabulary.size:
        raise ConfigError(
            f"init.vocab={vocab_path}: has {vocabulary.size:,} words, the softmax of {prefix} has "
            f"{saved.model.n_words:,}; name the vocabulary that it was trained with"
        )

    def slots() -> dict[str, Tensor]:
        return {f"accumulator.{name}": slot for name, slot in saved.slots().items()}

    there = slots if saved.has_slots else None
    return Source(prefix, saved.model, softmax, vocabulary, saved.step, saved.fingerprint, slots=there)


def _options_path(folder: Path, options: str | None, weights: str = "") -> Path:
    """Return the path of the options: the given one, or that of the file beside weights of this name."""
    if options is None:
        # elmo_options.json of elmo_weights.hdf5
        pair = f"{weights.rpartition('.')[0].replace('weights', 'options')}.json" if "weights" in weights else OPTIONS
        path = next((folder / name for name in (pair, OPTIONS) if (folder / name).is_file()), None)
        path = path or _only(folder, _OPTIONS_NAMES, "options", "name one with init.options=FILE")
        if path is not None:
            return path
    path = Path(options) if options is not None else folder / OPTIONS
    if not path.is_file():
        cure = "correct init.options" if options is not None else "name it with init.options=FILE"
        raise ConfigError(f"{path}: no such file; weights need the options they were made with: {cure}")
    return path


def _vocabulary_path(folder: Path, vocab: str | None) -> Path | None:
    """Return the path of the vocabulary: the given one, or that of the file in the folder; None where there is none."""
    if vocab is not None:
        return Path(vocab)
    if (folder / VOCABULARY).is_file():
        return folder / VOCABULARY
    return _only(folder, _VOCABULARY_NAMES, "vocabulary", "name one with init.vocab=FILE")


def _from_weights(weights: Path, options: str | None, vocab: str | None) -> Source:
    check_is_hdf5(weights)
    options_path = _options_path(weights.parent, options, weights.name)
    values = read_options(options_path)
    model_config, softmax = from_options(values, str(options_path), published=True)
    vocab_path, vocabulary, bad_words = None, None, None
    # A model with characters is used without a vocabulary: `<UNK>` is needed by a softmax or a word table only.
    needs_words = model_config.input == "words"
    try:
        vocab_path = _vocabulary_path(weights.parent, vocab)
        if vocab_path is not None:
            vocabulary = Vocabulary.read(vocab_path, SPECIAL_WORDS if needs_words else ())
    except ElmoRayError as error:
        if needs_words or vocab is not None:
            raise
        bad_words = error
        logger.info("%s; a model with characters is used without it", error)
    model = read_weights(weights, model_config)
    rows = None if model.word_embedding is None else len(model.word_embedding)
    if vocabulary is not None and rows not in (None, vocabulary.size):
        raise FormatError(f"{weights}: embedding has {rows} words, {vocab_path} has {vocabulary.size}")
    counted = values.get("n_tokens_vocab")
    if vocabulary is not None and rows is None and isinstance(counted, int) and counted != vocabulary.size:
        logger.info(
            "%s has %s words, and n_tokens_vocab in %s is %s: is it another model's vocabulary?",
            vocab_path,
            f"{vocabulary.size:,}",
            options_path,
            f"{counted:,}",
        )
    return Source(weights, model, softmax, vocabulary, bad_words=bad_words)
