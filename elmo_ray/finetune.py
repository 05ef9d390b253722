"""`finetune`: continue the training of a biLM on other text.

    python -m elmo_ray.finetune CONFIG.yaml init.from=SOURCE [key.path=value ...] [--resume | --fresh] [--dry-run]

SOURCE -> model and vocabulary -> a checkpoint at step 0 -> the same training as `pretrain`, with a measure of held-out
text before the first step. The SOURCE is read once: `--resume` needs only the run's folder.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from elmo_ray.checkpoints.source import VOCABULARY, Source, open_source
from elmo_ray.config import COUNTED, PretrainConfig
from elmo_ray.config.command_line import Flags, run_verb
from elmo_ray.config.finetune import SOFTMAX_FIRST, FinetuneConfig
from elmo_ray.errors import ConfigError
from elmo_ray.pretrain import NO_FLAGS, FromSource, PretrainResult, estimate, train_in
from elmo_ray.storage import join
from elmo_ray.training.dry_run import DryRun
from elmo_ray.training.plan import TrainPlan
from elmo_ray.training.run_folder import RunFolder, open_run

logger = logging.getLogger("elmo_ray.finetune")  # __name__ is __main__ as a command


def run(config: FinetuneConfig, flags: Flags = NO_FLAGS) -> PretrainResult | DryRun:
    """Initialize a run from the SOURCE, or resume it, and train it; a dry run estimates only.

    Raises an ElmoRayError for a mistake of the user, before Ray starts if the mistake can be known by then.
    """
    if flags.dry_run:
        source = open_init(config)
        return estimate(training_settings(config, source), from_source(config, source))
    folder = open_run(config, flags.resume, flags.fresh)
    if folder.newest is not None:
        return train_in(folder, resumed_settings(config, folder))
    source = open_init(config)
    inside = folder.path in (source.path, *source.path.parents)
    if inside or (source.uri or "").startswith(f"{folder.place}/"):
        raise ConfigError(f"init.from={config.init.source}: is in the folder of this run; choose another run.name")
    training = training_settings(config, source)
    start = from_source(config, source)
    # The source leaves this process's memory once it is written: a large model need not stay while others train.
    initialize = make_initializer(config, [source])
    del source
    return train_in(folder, training, replace(start, initialize=initialize))


def open_init(config: FinetuneConfig) -> Source:
    """Return the opened SOURCE that `init` names."""
    init = config.init
    source = open_source(init.source, config.checkpoint, init.options, init.vocab)
    # with another vocabulary the table is made when that is known
    return source.with_word_table() if config.data.vocab is None and source.words is not None else source


def training_settings(config: FinetuneConfig, source: Source) -> PretrainConfig:
    """Return the settings of a new run, with the source's model and, unless data.vocab names one, its vocabulary."""
    vocab = config.data.vocab
    has_table = source.config.input == "words" and source.model.token_embedder is None
    if source.has_softmax or has_table or (vocab is None and source.bad_words is not None):
        _ = source.vocabulary  # raises an error where there is none, before the text is prepared
    if vocab is None and source.words is not None:
        vocab = source.words.path
    elif vocab is None:
        logger.info("%s has no vocabulary: it is counted from data.train", source.path)
    elif vocab == COUNTED:
        vocab = None
    first = 0 if source.has_softmax else SOFTMAX_FIRST
    return config.training_config(source.config.to_dict(), source.softmax.to_dict(), vocab, first)


def from_source(config: FinetuneConfig, source: Source) -> FromSource:
    """Return what a training takes from the source, but for its weights."""
    has_vocabulary = config.data.vocab is None and source.words is not None

    def fit(training: PretrainConfig, n_words: int) -> PretrainConfig:
        return fit_negatives(config, training, n_words)

    return FromSource(fit, has_vocabulary)


def fit_negatives(config: FinetuneConfig, training: PretrainConfig, n_words: int) -> PretrainConfig:
    """Return the settings with the SOURCE's softmax.negatives lowered to suit a smaller vocabulary of `n_words` words.

    A number that the user gave stays as it is.
    """
    negatives = training.softmax.negatives
    own = "negatives" in config.softmax.model_fields_set
    if own or not training.softmax.facts.samples_words or negatives < n_words or n_words < 4:
        return training
    fewer = n_words // 2
    logger.info(
        "softmax.negatives=%d is the source's, and the vocabulary has %s words: lowered to %d",
        negatives,
        f"{n_words:,}",
        fewer,
    )
    values = training.to_dict()
    values["softmax"] = {**values["softmax"], "negatives": fewer}
    return PretrainConfig.from_dict(values)


def resumed_settings(config: FinetuneConfig, folder: RunFolder) -> PretrainConfig:
    """Return the settings of a resumed run; the SOURCE's part of them comes from the newest checkpoint."""
    from elmo_ray.checkpoints.identity import saved_config

    assert folder.newest is not None
    before = saved_config(folder.newest)
    words = str(folder.newest.path / VOCABULARY)
    return config.training_config(
        before.model.to_dict(), before.softmax.to_dict(), words, before.train.softmax_first or 0
    )


def make_initializer(config: FinetuneConfig, opened: list[Source]) -> Callable[[TrainPlan], None]:
    """Return a function that writes the run's checkpoint at step 0; it takes the source out of the list `opened`."""

    def initialize(plan: TrainPlan) -> None:
        initialize_run(config, opened.pop(), plan)

    return initialize


def initialize_run(config: FinetuneConfig, source: Source, plan: TrainPlan) -> None:
    """Write the checkpoint at step 0: the source's model for the run's vocabulary, with init.optimizer's slots."""
    import torch

    from elmo_ray.checkpoints.identity import INITIALISED_FROM, SOURCE_WORDS, identity
    from elmo_ray.checkpoints.manifest import directory_name
    from elmo_ray.data.corpus import Corpus
    from elmo_ray.data.vocabulary import Vocabulary
    from elmo_ray.training.initialize import initial_model, initial_slots, source_rows, write_initial

    training, words = plan.config, Vocabulary.read(plan.vocabulary_path)
    source, rows = source.with_word_table(words), None
    if source.has_softmax or source.model.word_embedding is not None:
        same = source.vocabulary.sha256 == words.sha256
        rows = torch.arange(words.size) if same else source_rows(source.vocabulary, words)
    unk = source.vocabulary.unk if rows is not None else 0
    model, counts = initial_model(training, source.model, rows, words, unk)
    logger.info("source: %s", source.describe())
    logger.info("vocabulary of %s words: %s", f"{words.size:,}", counts.describe(source.has_softmax))
    if training.train.softmax_first:
        logger.info("the softmax alone is trained for the first %s steps", f"{training.train.softmax_first:,}")
    kept = None
    if config.init.optimizer == "keep":
        if source.slots is None:
            raise ConfigError(f"init.optimizer=keep: {source.path} has no optimizer slots; set init.optimizer=reset")
        kept = source.slots()
    slots = initial_slots(training, model, kept, rows)
    corpus = Corpus.load(plan.corpus_path)
    about = identity(training, corpus.fingerprint, words.sha256)
    name = (source.uri or os.fspath(source.path)) + ("" if source.step is None else f" (step {source.step:,})")
    place = join(plan.run_dir, "checkpoints", directory_name(0, 0))
    differing = {"new_words": counts.new, "left_out_words": counts.left_out, "new_softmax": int(not source.has_softmax)}
    fields = {INITIALISED_FROM: name, SOURCE_WORDS: {key: count for key, count in differing.items() if count}}
    write_initial(place, training, words, model, slots, about, fields=fields)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_verb("finetune", FinetuneConfig, run, argv)


if __name__ == "__main__":
    sys.exit(main())
