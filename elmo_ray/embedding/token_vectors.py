"""Context-independent vectors of a vocabulary's words: bilm-tf's token cache (`dump_token_embeddings`)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import h5py
import torch

from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.errors import ConfigError, DataError
from elmo_ray.model.sentence_encoder import SentenceEncoder
from elmo_ray.source import Source

_WORDS = 4096


def write_token_vectors(source: Source, vocab: str, out: Path, precision: str = "fp32") -> int:
    """Writes `embedding` [V, P] float32, a row for each line of the vocabulary; returns V.

    `Elmo.from_token_vectors` and bilm-tf run from it. Raises ConfigError for a model with word input, DataError for the
    vocabulary and where the disk takes no more.
    """
    if source.model.char_cnn is None:
        raise ConfigError(f"{source.path}: embed.tokens is for a model with characters; this one has a table of words")
    vocabulary = Vocabulary.read(vocab)
    encoder = SentenceEncoder(source.model, torch.bfloat16 if precision == "bf16" else None)
    table_VC = vocabulary.characters(source.config.char_cnn.max_characters)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(aside, "w") as file, torch.no_grad():
            shape = (vocabulary.size, source.config.lstm.projection_dim)
            vectors = file.create_dataset("embedding", shape, dtype="float32", track_times=False)
            for first in range(0, vocabulary.size, _WORDS):
                part = encoder.word_vectors(table_VC[first : first + _WORDS])
                vectors[first : first + _WORDS] = part.float().cpu().numpy()
        os.replace(aside, out)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{out}: cannot be written ({' '.join(str(error).split())[:200]})") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()
    return vocabulary.size
