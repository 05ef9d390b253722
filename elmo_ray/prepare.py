"""`prepare`: count the words of a corpus, index it and check it.

    python -m elmo_ray.prepare CONFIG.yaml [key.path=value ...] [--fresh] [--look] [--dry-run] [--json FILE]

It also unpacks .gz and .zst files, gathers the sample corpus, and writes vocab.txt unless data.vocab names one. The
findings about each file are kept under data.prepared_dir. A file is read again only if it has changed, or if other
things are asked about it; so a run that was stopped continues where it was.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from elmo_ray import storage
from elmo_ray.cluster.session import free_cpus
from elmo_ray.cluster.tasks import run_tasks
from elmo_ray.config import SAMPLE, ClusterConfig, DataConfig, FormConfig, PrepareConfig, PretrainConfig
from elmo_ray.config.command_line import Flags, run_verb, text_table
from elmo_ray.data import sample, scan
from elmo_ray.data.corpus import Corpus, expand_paths, shard_fields
from elmo_ray.data.counts import WordCounter
from elmo_ray.data.documents import TextForm
from elmo_ray.data.encode import read_block
from elmo_ray.data.indexing import Findings, Indexer, Runner, Task, run_locally, run_task
from elmo_ray.data.look import Look, look_at
from elmo_ray.data.text import OnError, decode, file_status
from elmo_ray.data.text_check import TextChecks, check_texts, read_sample
from elmo_ray.data.vocabulary import SKIPPED_WORD, SPECIAL_IN_OTHER_FORMS, SPECIAL_WORDS, UNKNOWN_WORD, Vocabulary
from elmo_ray.data.vocabulary_check import check_vocabulary_file
from elmo_ray.errors import ConfigError, DataError, short
from elmo_ray.storage import is_uri, read_json
from elmo_ray.storage.files import write_json
from elmo_ray.storage.local_copy import local_copy_of, local_folder, push, uri_of
from elmo_ray.training.console import bar_in_terminal

logger = logging.getLogger("elmo_ray.prepare")  # __name__ is __main__ as a command

CORPUS_WORDS = 4_000_000
"""Largest number of distinct words that are counted, some 0.7 GB; beyond it the rarest are dropped (`WordCounter`)."""

# Less work than this, in bytes of text, takes less time in this process than Ray needs to start.
SMALL_BYTES = 8 << 20
# Small tasks are done together up to so many bytes and tasks.
BATCH_BYTES, BATCH_TASKS = 2 << 20, 500
BYTES_PER_POSITION = 5.5
"""Bytes of English text for one position; used where the corpus has not been counted yet."""
TEXTS = ("train", "valid", "test")
LOOK_PAGE = "look.html"
"""Page of `--look` in the prepared folder."""


@dataclass(frozen=True)
class PrepareResult:
    """A corpus that is ready for training.

    vocabulary_path: data.vocab (a copy of it if it is an object), or the vocab.txt counted from the training text;
        `counted` tells which of them.
    train, valid, test: None if no text is named. With data.holdout, `valid` has the blocks set aside from data.train.
    checks: unknown words and shared sentences of the texts.
    documents: counts of the documents that the texts were made of, and of what data.deduplicate has left out.
    made_by: the settings and versions of libraries by which texts were made of them; None if there are no documents.
    pruned_words, pruned_tokens, max_missing: losses of counting in bounded memory, all 0 if the counts are exact (see
        `WordCounter`).
    replaced: number of invalid sequences and NULs that data.on_error=replace turns into U+FFFD.
    """

    prepared_dir: Path
    vocabulary_path: Path
    vocabulary_sha256: str
    vocabulary_size: int
    counted: bool
    train: Corpus
    valid: Corpus | None
    test: Corpus | None
    checks: TextChecks
    pruned_words: int = 0
    pruned_tokens: int = 0
    max_missing: int = 0
    replaced: int = 0
    documents: dict[str, dict[str, int]] = field(default_factory=dict)
    made_by: dict[str, str] | None = None

    @property
    def corpora(self) -> dict[str, Corpus]:
        """Return the texts that there are, by the names train, valid and test."""
        named = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: corpus for name, corpus in named.items() if corpus is not None}

    def summary(self) -> str:
        """Return a table of the texts, and a line about the vocabulary."""
        lines = text_table(self.table())
        lines.append(f"vocabulary: {self.vocabulary_size:,} words in {self.vocabulary_path}")
        if self.replaced:
            lines.append(f"replaced by U+FFFD: {self.replaced:,} invalid UTF-8 sequences or NULs")
        if self.max_missing:
            lines.append(
                f"counting dropped rare words {self.pruned_words:,} times ({self.pruned_tokens:,} tokens): "
                f"a count may be too small by at most {self.max_missing:,}"
            )
        return "\n".join(lines)

    def table(self) -> list[list[str]]:
        """Return a head and a row for each text, with its sizes."""
        rows = [["text", "files", "blocks", "sentences", "tokens", "characters"]]
        for name, corpus in self.corpora.items():
            files = len(set(corpus.block_shard.tolist()))
            counts = (files, len(corpus), corpus.sentences, corpus.tokens, corpus.characters)
            rows.append([name, *(f"{count:,}" for count in counts)])
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values, with the shards, sums and fingerprint of each text."""
        texts = {
            name: {
                "blocks": len(corpus),
                "positions": corpus.positions,
                "sentences": corpus.sentences,
                "tokens": corpus.tokens,
                "characters": corpus.characters,
                "fingerprint": corpus.fingerprint,
                "shards": [shard_fields(shard) for shard in corpus.shards],
            }
            for name, corpus in self.corpora.items()
        }
        return {
            "prepared_dir": str(self.prepared_dir),
            "vocabulary": {
                "path": str(self.vocabulary_path),
                "size": self.vocabulary_size,
                "sha256": self.vocabulary_sha256,
                "counted": self.counted,
                "pruned_words": self.pruned_words,
                "pruned_tokens": self.pruned_tokens,
                "max_missing": self.max_missing,
            },
            "replaced": self.replaced,
            "documents": self.documents,
            "made_by": self.made_by,
            "checks": self.checks.to_dict(),
            **texts,
        }


@dataclass(frozen=True)
class LookedAt:
    """A prepared corpus, how its texts look, and the place of a page that shows the same."""

    result: PrepareResult
    looks: dict[str, Look]
    page: str

    @classmethod
    def of(cls, result: PrepareResult, on_error: OnError) -> LookedAt:
        """Look at all texts of a prepared corpus, and write look.html. Raises DataError when a file is gone."""
        from elmo_ray.report.look import write_look  # the room has pictures, which a training does not need

        vocabulary = Vocabulary.read(result.vocabulary_path)
        looks = {name: look_at(corpus, vocabulary, on_error) for name, corpus in result.corpora.items()}
        directory = result.prepared_dir
        write_look(directory / LOOK_PAGE, looks, result.table())
        try:
            push(directory, LOOK_PAGE)
        except OSError as error:
            raise DataError(f"data.prepared_dir={uri_of(directory)}: cannot be written ({error.strerror})") from None
        return cls(result, looks, storage.join(uri_of(directory), LOOK_PAGE))

    def summary(self) -> str:
        """Return the summary of the corpus, and the looks as text."""
        lines = [line for name, look in self.looks.items() for line in look.lines(f"data.{name}")]
        return "\n".join([self.result.summary(), *lines, "", f"page: {self.page}"])

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values, with the looks by the names of the texts."""
        looks = {name: look.to_dict() for name, look in self.looks.items()}
        return {**self.result.to_dict(), "look": looks, "page": self.page}


@dataclass(frozen=True)
class PreparePlan:
    """Work that `prepare` would do: the number of files of each text, of tasks not done yet, and of bytes they read."""

    files: dict[str, int]
    tasks: int
    bytes_to_read: int

    def summary(self) -> str:
        """Return a line for each text, and one for the work."""
        lines = [f"data.{name}: {count:,} files" for name, count in self.files.items()]
        return "\n".join([*lines, f"to do: {self.tasks:,} tasks that read {self.bytes_to_read / 1e6:,.1f} MB"])

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        return {"files": self.files, "tasks": self.tasks, "bytes_to_read": self.bytes_to_read}


def run(
    config: PretrainConfig, fresh: bool = False, *, replaces: bool = True, is_models_vocabulary: bool = False
) -> PrepareResult:
    """Prepare the texts of data.train, data.valid and data.test, and the vocabulary.

    Writes only under data.prepared_dir: vocab.txt, {train,valid,test}.npz (read by `Corpus.load`), prepare.json, and
    the findings about each file; `fresh` forgets the findings of earlier runs. Ray tasks do the work, each for a
    segment of a file; this process does it if cluster.workers=0 or if there is little to do.

    replaces: write a counted vocabulary to vocab.txt; if False, another vocabulary that is there stays, and this one is
    named by its hash. is_models_vocabulary: data.vocab belongs to a trained model, so its lines are taken as they are.
    Raises ConfigError and DataError.
    """
    data = config.data
    directory = prepared_dir(config.run.storage_path, data.prepared_dir)
    form = text_form(data)
    indexer = Indexer(directory, data.block_bytes, _make_runner(config.cluster), fresh, form)
    files = _files(data, directory)
    last = read_json(directory / "prepare.json") or {}
    if replaces and not fresh:
        _check_made_alike(last, directory, form)
    _check_vocabulary(data, is_models_vocabulary)
    _warn_of_missing_files(last)
    found = _index(config, files, indexer)
    vocabulary, counter = found.vocabulary, found.counter
    if counter is None:
        path = _given_path(vocabulary, str(data.vocab), directory)
    else:
        path = _write_vocabulary(vocabulary, directory, replaces)
    result = PrepareResult(
        prepared_dir=directory,
        vocabulary_path=path,
        vocabulary_sha256=vocabulary.sha256,
        vocabulary_size=vocabulary.size,
        counted=counter is not None,
        train=found.corpora["train"],
        valid=found.corpora.get("valid"),
        test=found.corpora.get("test"),
        checks=_checks(found, config, directory, fresh, is_models_vocabulary),
        pruned_words=counter.pruned_entries if counter else 0,
        pruned_tokens=counter.pruned_tokens if counter else 0,
        max_missing=counter.max_missing if counter else 0,
        replaced=sum(findings.replaced for findings in found.findings.values()),
        documents={name: counts for name, findings in found.findings.items() if (counts := _document_counts(findings))},
        made_by=form.describe() if any(each.documents is not None for each in found.findings.values()) else None,
    )
    for name, corpus in result.corpora.items():
        corpus.save(directory / f"{name}.npz")
    write_json(directory / "prepare.json", result.to_dict(), DataError)
    try:
        push(directory)
    except OSError as error:
        raise DataError(f"data.prepared_dir={uri_of(directory)}: cannot be written ({error.strerror})") from None
    return result


def _document_counts(findings: Findings) -> dict[str, int]:
    """Return the counts of documents, and of repetitions that were left out, as plain values; none for plain text."""
    counts = asdict(findings.documents) if findings.documents is not None else {}
    return {**counts, "repeated": findings.repeated, "compared": findings.items} if findings.items else counts


@dataclass(frozen=True)
class _Indexed:
    """Texts that are indexed, by the names train, valid and test, and their vocabulary; `counter` if it is counted."""

    corpora: dict[str, Corpus]
    findings: dict[str, Findings]
    vocabulary: Vocabulary
    counter: WordCounter | None


def _index(config: PretrainConfig, files: dict[str, list[str]], indexer: Indexer) -> _Indexed:
    """Index the files of all texts, read or count the vocabulary, and set the blocks of data.holdout aside."""
    data = config.data
    counter = WordCounter(CORPUS_WORDS) if data.vocab is None else None
    given = _read_vocabulary(data.vocab) if data.vocab is not None else None
    corpora: dict[str, Corpus] = {}
    findings: dict[str, Findings] = {}
    for name, paths in files.items():
        is_train = name == "train"
        corpora[name], findings[name] = indexer.index(
            paths, f"data.{name}", counter if is_train else None, data.deduplicate if is_train else "off"
        )
    train = corpora["train"]
    for name, corpus in corpora.items():
        if not corpus.tokens:
            raise DataError(f"data.{name}={','.join(getattr(data, name))}: no words in {len(corpus.shards)} files")
    _warn_of_other_unknown_words(counter)
    _warn_of_same_texts(train)
    if data.holdout:
        corpora["train"], corpora["valid"] = train.split(data.holdout, config.run.seed)
        if counter is not None:
            _subtract_words(counter, corpora["valid"], data.on_error)
    return _Indexed(corpora, findings, given or _count_vocabulary(counter or WordCounter(0), data), counter)


def _checks(
    found: _Indexed, config: PretrainConfig, directory: Path, fresh: bool = False, is_models_vocabulary: bool = False
) -> TextChecks:
    """Return the measures of texts and vocabulary, and log them; they are kept in the prepared folder."""
    texts = {name: corpus.fingerprint for name, corpus in found.corpora.items()}
    key = hashlib.sha256("\n".join([*texts, *texts.values(), found.vocabulary.sha256]).encode()).hexdigest()
    path = directory / "checks" / f"{key[:16]}.json"
    checks: TextChecks | None = None
    if not fresh:
        try:
            checks = TextChecks.from_dict(read_json(path) or {})
        except (KeyError, TypeError, AttributeError):
            checks = None
    if checks is None:
        samples = {name: read_sample(corpus) for name, corpus in found.corpora.items()}
        # Text that is set aside is in the same files: the index cannot tell its sentences from the others.
        sentences = {name: found.findings[name].sentences if name in found.findings else None for name in samples}
        checks = check_texts(samples, found.vocabulary, sentences, found.counter is not None)
        write_json(path, checks.to_dict(), DataError)
    logger.info("%s", checks.unknown_line())
    vocab, cure = f"data.vocab={config.data.vocab}", None
    if found.counter is not None:
        vocab = "counted from data.train"
        cure = f"lower data.min_count={config.data.min_count}"
        if config.data.max_vocab is not None and found.vocabulary.size >= config.data.max_vocab:
            cure = f"raise data.max_vocab={config.data.max_vocab}"
    elif is_models_vocabulary:
        cure = "is it the vocabulary of this text? finetune makes one of it with data.vocab=counted"
    for message in checks.warnings(vocab, config.softmax.kind, config.softmax.facts.order, cure):
        logger.warning("%s", message)
    return checks


def _check_vocabulary(data: DataConfig, is_models_vocabulary: bool) -> None:
    if data.vocab is not None and not is_models_vocabulary:
        check_vocabulary_file(data.vocab)


def plan(config: PretrainConfig, is_models_vocabulary: bool = False) -> PreparePlan:
    """Return the work that `run` would do; compressed files not unpacked yet count with their compressed size.

    Raises ConfigError and DataError for what `run` would refuse and can be known without reading the text.
    """
    data = config.data
    directory = prepared_dir(config.run.storage_path, data.prepared_dir)
    indexer = Indexer(directory, data.block_bytes, run_locally, form=text_form(data))
    files = _files(data, directory)
    _check_vocabulary(data, is_models_vocabulary)
    todo: list[Task] = []
    for name, paths in files.items():
        is_train = name == "train"
        todo.extend(
            indexer.pending_tasks(paths, is_train and data.vocab is None, data.deduplicate if is_train else "off")
        )
    return PreparePlan({name: len(paths) for name, paths in files.items()}, len(todo), _bytes_of(todo))


@dataclass(frozen=True)
class Sizes:
    """Sizes of the texts of a training: the training text, and the number of words of the vocabulary.

    exact: they are counted, and not estimated from the sizes of files; if not, `train` is None.
    """

    train: Corpus | None
    positions: int
    vocabulary: int
    exact: bool


def measure(config: PretrainConfig, todo: PreparePlan, is_models_vocabulary: bool = False) -> Sizes:
    """Return the sizes that a training would have. Writes nothing that a training reads.

    todo: from `plan`. is_models_vocabulary: as for `run`. Small texts are read as a training would read them, so that
    what it refuses is refused here.
    """
    data = config.data
    directory = prepared_dir(config.run.storage_path, data.prepared_dir)
    files = _files(data, directory)
    sizes = {name: [file_status(path).st_size for path in paths] for name, paths in files.items()}
    total = sum(map(sum, sizes.values()))
    if total <= SMALL_BYTES:
        with tempfile.TemporaryDirectory(prefix="elmo-ray-") as scratch:
            folder = Path(scratch)
            for name in ("state", "text"):
                (folder / name).mkdir()
            indexer = Indexer(folder, data.block_bytes, run_locally, form=text_form(data))
            found = _index(config, files, indexer)
            _checks(found, config, folder, is_models_vocabulary=is_models_vocabulary)
        train = found.corpora["train"]
        return Sizes(train, train.positions, found.vocabulary.size, True)
    for name, each in sizes.items():
        if not sum(each):
            raise DataError(f"data.{name}={','.join(getattr(data, name))}: no words in {len(each)} files")
    vocabulary = directory / "vocab.txt" if data.vocab is None else Path(data.vocab)
    if todo.tasks == 0 and (directory / "train.npz").exists() and (data.vocab is not None or vocabulary.exists()):
        train = Corpus.load(directory / "train.npz")
        indexer = Indexer(directory, data.block_bytes, run_locally, form=text_form(data))
        if {shard.path for shard in train.shards} == set(indexer.texts(files["train"], data.deduplicate)):
            return Sizes(train, train.positions, Vocabulary.read(os.fspath(data.vocab or vocabulary)).size, True)
    positions = max(1, int(sum(sizes["train"]) / BYTES_PER_POSITION))
    if data.vocab is not None:
        words = Vocabulary.read(data.vocab).size
    else:
        words = min(data.max_vocab or 100_000, positions)
    return Sizes(None, positions, words, False)


def text_form(data: FormConfig) -> TextForm:
    """Return how texts are made into sentences."""
    return TextForm(data.format, data.column, data.tokenizer, data.language, data.normalize, data.on_error)


def index_texts(
    globs: Sequence[str], key: str, directory: Path, block_bytes: int, form: TextForm
) -> tuple[Corpus, Findings]:
    """Index texts in this process without counting their words; return the corpus and the findings.

    For evaluation text, which is small. globs: ("sample",) is the test text of the sample corpus. key: the setting that
    errors name. directory: from `prepared_dir`. form: from `text_form`. Raises ConfigError and DataError.
    """
    if tuple(globs) == (SAMPLE,):
        paths = list(sample.write_sample(directory / "sample").test)
    else:
        paths = expand_paths(globs, key)
    form.check_column(paths)
    return Indexer(directory, block_bytes, run_locally, form=form).index(paths, key)


def prepared_dir(storage_path: str, configured: str | None) -> Path:
    """Return the absolute folder of data.prepared_dir, which is made if it is not there. Raises DataError.

    configured: data.prepared_dir, by default the folder `prepared` in run.storage_path. For a URI this is a local copy
    of the folder, without the unpacked texts; these are written to the store at once.
    """
    place = storage.absolute(configured or storage.join(storage_path, "prepared"))
    directory = local_folder(place)
    try:
        if is_uri(place):
            local_copy_of(place).pull("state/*", "*.*")
        for name in ("state", "text"):
            (directory / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"data.prepared_dir={place}: cannot be made ({error.strerror})") from None
    return directory


def _files(data: DataConfig, directory: Path) -> dict[str, list[str]]:
    """Return the files of each text that is named; the sample corpus has its own valid and test text."""
    globs = {"train": data.train, "valid": data.valid, "test": data.test}
    if data.train == (SAMPLE,):
        globs["test"] = data.test or (SAMPLE,)
        globs["valid"] = data.valid or (() if data.holdout else (SAMPLE,))
    files = {}
    for name, patterns in globs.items():
        if patterns == (SAMPLE,):
            files[name] = list(getattr(sample.write_sample(directory / "sample"), name))
        elif patterns or name == "train":
            files[name] = expand_paths(patterns, f"data.{name}")
    _check_that_files_serve_once(data, files)
    text_form(data).check_column([path for paths in files.values() for path in paths])
    return files


def _check_that_files_serve_once(data: DataConfig, files: dict[str, list[str]]) -> None:
    """Raise ConfigError if a file of data.train is also one of data.valid or data.test, or if a text is data.vocab.

    Files are compared by their real paths, so links do not hide it. The same held-out text may serve as data.valid and
    as data.test.
    """
    train = {_real_path(path): path for path in files["train"]}
    problems: list[str] = []
    for name, paths in files.items():
        if name != "train":
            problems += _second_use(data, "train", train, name, paths)
        if data.vocab is not None:
            problems += _second_use(data, name, {_real_path(path): path for path in paths}, "vocab", [data.vocab])
    if problems:
        raise ConfigError("\n".join(problems))


def _second_use(
    data: DataConfig, name: str, files: dict[str, str], other: str, other_files: Sequence[str]
) -> Iterator[str]:
    """Yield a message if the files of data.`name`, by their real paths, have some of those of data.`other`."""
    both = [files[real] for path in other_files if (real := _real_path(path)) in files]
    if both:
        second = getattr(data, other)
        more = "" if len(both) == 1 else f" and {len(both) - 1:,} more"
        yield (
            f"data.{name}={','.join(getattr(data, name))} and "
            f"data.{other}={second if isinstance(second, str) else ','.join(second)} both name {both[0]}{more}: a file "
            f"serves once; leave it out of one of them"
        )


def _real_path(path: str) -> str:
    return storage.absolute(path) if is_uri(path) else os.path.realpath(os.path.expanduser(path))


def _warn_of_same_texts(train: Corpus) -> None:
    """Warn if files have the same text, such as a file and a compressed copy of it that one glob matches."""
    first: dict[str, str] = {}
    for shard in train.shards:
        if shard.tokens and first.setdefault(shard.sha256, shard.source) != shard.source:
            logger.warning(
                "data.train: %s has the same text as %s: it is trained on twice; leave one of them out",
                shard.source,
                first[shard.sha256],
            )
            return


def _warn_of_other_unknown_words(counter: WordCounter | None) -> None:
    """Warn if the text spells the unknown word of another program, which would become a word like any other."""
    if counter is None:
        return
    for word, special in SPECIAL_IN_OTHER_FORMS.items():
        if special == UNKNOWN_WORD and counter.counts.get(word):
            logger.warning(
                "data.train: spells %s %s times, which becomes a word like any other; write %s for an unknown word",
                word,
                f"{counter.counts[word]:,}",
                special,
            )


def _check_made_alike(result: dict[str, Any], directory: Path, form: TextForm) -> None:
    """Raise ConfigError if the folder's texts were made of documents by other settings or versions.

    result: of the last `prepare` there, as it was written.
    """
    last = result.get("made_by")
    if not isinstance(last, dict):
        return
    now = form.describe()
    # what is left out does not change the words of a sound document
    names = (name for name in {**last, **now} if name not in ("format", "on_error"))
    differs = [name for name in names if last.get(name) != now.get(name)]
    if not differs:
        return
    then, today = (", ".join(f"{name} {each.get(name) or 'none'}" for name in differs) for each in (last, now))
    raise ConfigError(
        f"data.prepared_dir={uri_of(directory)}: its texts were made with {short(then)}, and these would be with "
        f"{short(today)}; name another data.prepared_dir, or add --fresh to replace them"
    )


def _warn_of_missing_files(last: dict[str, Any]) -> None:
    """Warn if files of the last `prepare`, whose result is given, are gone: a glob does not notice it."""
    try:
        before = [(name, shard["source"]) for name in TEXTS if name in last for shard in last[name]["shards"]]
    except (KeyError, TypeError):
        return
    for name in TEXTS:
        gone = [source for text, source in before if text == name and not storage.exists(source)]
        if gone:
            logger.warning("data.%s: %d files of the last prepare are gone (%s)", name, len(gone), gone[0])


def _read_vocabulary(path: str) -> Vocabulary:
    vocabulary = Vocabulary.read(path)
    if len(vocabulary.ids) < vocabulary.size:
        repeated = next(word for number, word in enumerate(vocabulary.words) if vocabulary.ids[word] != number)
        logger.warning(
            "%s: %d lines repeat a word (%r among them); the last line of each is its id, the others are never used",
            path,
            vocabulary.size - len(vocabulary.ids),
            repeated,
        )
    return vocabulary


def _given_path(vocabulary: Vocabulary, place: str, directory: Path) -> Path:
    """Return the path of data.vocab; an object is copied to a file first, from which a run makes its own copy."""
    if not is_uri(place):
        return Path(os.path.abspath(place))
    vocabulary.write(directory / "given-vocab.txt")
    return directory / "given-vocab.txt"


def _subtract_words(counter: WordCounter, corpus: Corpus, on_error: OnError) -> None:
    """Take the words of held-out text out of the counts: it stands for text that nobody has seen."""
    for block in corpus.blocks():
        text, _ = decode(read_block(block), on_error, block.path, block.start)
        counter.subtract(text.split())


def _count_vocabulary(counter: WordCounter, data: DataConfig) -> Vocabulary:
    """Return the counted vocabulary: the three special words, then words by falling count, and by order if equal.

    Raises ConfigError if data.min_count leaves no word.
    """
    for word in (*SPECIAL_WORDS, SKIPPED_WORD):
        counter.counts.pop(word, None)
    # A line of base64 is no word: such lines would make a vocabulary of megabytes.
    for word in [word for word in counter.counts if len(word) > scan.LONG_WORD_CHARACTERS]:
        del counter.counts[word]
    limit = data.max_vocab - len(SPECIAL_WORDS) if data.max_vocab is not None else None
    counted = counter.by_falling_count(data.min_count, limit)
    if not counted and counter.counts:
        word, count = counter.by_falling_count(limit=1)[0]
        raise ConfigError(
            f"data.min_count={data.min_count}: no word of data.train is seen so often (the most frequent one, "
            f"{short(repr(word), 40)}, {count:,} times); lower it"
        )
    if counter.max_missing:
        last = counted[-1][1] if limit is not None and len(counted) == limit else data.min_count
        logger.warning(
            "rare words were dropped to count in bounded memory: words that occur up to %d times may be missing from "
            "the vocabulary (counts may be too small by %d)",
            last + counter.max_missing,
            counter.max_missing,
        )
    return Vocabulary.from_words([*SPECIAL_WORDS, *(word for word, _ in counted)])


def _write_vocabulary(vocabulary: Vocabulary, directory: Path, replaces: bool) -> Path:
    """Write a counted vocabulary to vocab.txt, or beside it if another one is there and is not to be replaced."""
    path = directory / "vocab.txt"
    other = _sha256_of(path) if path.exists() else None
    if other not in (None, vocabulary.sha256):
        if replaces:
            logger.warning("%s: replaced; it was counted from another text or with other limits", path)
        else:
            path = directory / f"vocab-{vocabulary.sha256[:12]}.txt"
            logger.info("%s: this text's vocabulary; vocab.txt is that of another text or of other limits", path)
    vocabulary.write(path)
    return path


def _sha256_of(path: Path) -> str | None:
    """Return the hash of a vocabulary that is about to be replaced, or None if it cannot be read."""
    try:
        return Vocabulary.read(path).sha256
    except DataError:
        return None


def _make_runner(cluster: ClusterConfig) -> Runner:
    """Return a function that performs tasks here if they are small or there are no workers, otherwise on Ray."""

    def runner(todo: Sequence[Task]) -> Iterator[tuple[int, bytes]]:
        is_small = cluster.workers == 0 or _bytes_of(todo) < SMALL_BYTES
        with bar_in_terminal("task", len(todo)) as bar:
            for result in run_locally(todo) if is_small else _run_on_ray(todo, cluster.max_failures):
                if bar is not None:
                    bar.update()
                yield result

    return runner


def _bytes_of(todo: Sequence[Task]) -> int:
    """Return the approximate number of bytes that the tasks read."""
    return sum(int(task["bytes"]) for task in todo)


def _run_on_ray(todo: Sequence[Task], max_failures: int) -> Iterator[tuple[int, bytes]]:
    free = free_cpus()
    batches = _batches(todo)
    for number, results in run_tasks(
        _run_batch,
        [[todo[place] for place in batch] for batch in batches],
        workers=max(1, int(free)),
        cpus=1.0 if free >= 1 else 0.25,
        max_failures=max_failures,
        advice="run it again, and it goes on where it was",
    ):
        yield from zip(batches[number], results, strict=True)


def _batches(todo: Sequence[Task]) -> list[range]:
    """Return the tasks by their numbers, in batches: many small ones would wait for Ray more than they work."""
    batches: list[range] = []
    begin = held = 0
    for number, task in enumerate(todo):
        held += int(task["bytes"])
        if held >= BATCH_BYTES or number + 1 - begin == BATCH_TASKS:
            batches.append(range(begin, number + 1))
            begin, held = number + 1, 0
    return [*batches, range(begin, len(todo))] if begin < len(todo) else batches


def _run_batch(batch: Sequence[Task]) -> list[bytes]:
    return [run_task(task) for task in batch]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""

    def verb(config: PrepareConfig, flags: Flags) -> PrepareResult | PreparePlan | LookedAt:
        if flags.look and flags.dry_run:
            raise ConfigError("--look reads the text that prepare makes, and --dry-run makes none; leave one out")
        if not flags.dry_run:
            result = run(config, flags.fresh)
            return LookedAt.of(result, config.data.on_error) if flags.look else result
        todo = plan(config)
        measure(config, todo)
        return todo

    return run_verb("prepare", PrepareConfig, verb, argv)


if __name__ == "__main__":
    sys.exit(main())
