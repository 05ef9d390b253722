"""Probabilities of words in their context: the most probable words (substitutes), how unexpected each word is, and the
probability of a sentence.

The forward direction predicts a word from the words before it, the backward direction from the words after it. `both`
is the mean of the two directions' log probabilities, as in `evaluate`; `product`, of substitutes, multiplies the two
probabilities and makes the products sum to 1. This needs the softmax, which is in a run or a checkpoint but not in a
weights.hdf5.

Shapes: N sentences, n words of a sentence, D directions, P projection.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.elmo.encoder import SentenceEncoder, checked_sentences, encode_sentences, without_autocast
from elmo_ray.errors import ConfigError, FormatError
from elmo_ray.model.bilm import BiLM

_MAX_LOGITS = 1 << 24


@dataclass(frozen=True)
class Substitutes:
    """The k most probable words of the vocabulary in place of each of a sentence's n words.

    `<S>`, `</S>` and `<UNK>` are left out. ids, log_probabilities: by direction (forward, backward, and the product of
    the two; forward alone for a forward-only model) [n, k] ids and their log probabilities in nats, the largest first.
    """

    ids: dict[str, NDArray[np.int64]]
    log_probabilities: dict[str, NDArray[np.float32]]
    vocabulary: Vocabulary

    def words(self, direction: str = "product") -> list[list[str]]:
        """Return the words for the ids of a direction; ConfigError for another one than `ids` has."""
        if direction not in self.ids:
            raise ConfigError(f"direction={direction}: must be one of {', '.join(self.ids)}")
        return [[self.vocabulary.words[i] for i in row] for row in self.ids[direction].tolist()]


@dataclass(frozen=True)
class Surprisal:
    """The surprisal -log p of each of a sentence's n words, and of its end.

    nats: [n] by direction (forward, backward, and both: the mean of the two; forward alone for a forward-only model).
    end: by direction, the surprisal of `</S>` after the last word (forward), and of `<S>` before the first (backward).
    unknown: [n], True for words that are scored as `<UNK>`. `<UNK>` stands for all unknown words together, so its
    surprisal is often below that of a known word, and says nothing about the spelling.
    """

    nats: dict[str, NDArray[np.float32]]
    end: dict[str, float]
    unknown: NDArray[np.bool_]

    @property
    def sums(self) -> dict[str, float]:
        """The surprisal of the whole sentence in nats by direction: of its n words and its end.

        exp(sum / (n + 1)) is the perplexity that `evaluate` gives with evaluate.reset=sentence.
        """
        one_way = [name for name in self.nats if name != "both"]
        sums = {name: float(self.nats[name].sum(dtype=np.float64)) + self.end[name] for name in one_way}
        return {**sums, "both": sum(sums.values()) / 2} if "both" in self.nats else sums


class LanguageModel:
    """A biLM with its softmax and vocabulary. Every sentence begins with zero state."""

    def __init__(self, model: BiLM, vocabulary: Vocabulary):
        """Raise FormatError for a model without a softmax, ConfigError for a vocabulary of another size."""
        if not model.has_softmax:
            raise FormatError("this model holds no softmax, so it gives no word a probability")
        if model.n_words != vocabulary.size:
            raise ConfigError(f"the model has {model.n_words} words, the vocabulary {vocabulary.size}")
        self.model, self.vocabulary, self.softmax = model, vocabulary, model.softmax_kind
        self.encoder = SentenceEncoder(model)
        self._special = torch.tensor([vocabulary.bos, vocabulary.eos, vocabulary.unk])

    @classmethod
    def from_run(
        cls, source: str | PathLike[str], checkpoint: str = "best", options: str | None = None, vocab: str | None = None
    ) -> LanguageModel:
        """Open a SOURCE that has a softmax: a run or a checkpoint. Arguments as for `open_source`.

        Raises FormatError for a source without a softmax.
        """
        from elmo_ray.checkpoints.source import open_source

        opened = open_source(source, checkpoint, options, vocab)
        if not opened.has_softmax:
            raise FormatError(f"{opened.path}: holds no softmax, so it gives no word a probability; name the run")
        return cls(opened.model, opened.vocabulary)

    def substitutes(self, sentences: Iterable[Sequence[str]], k: int = 10) -> list[Substitutes]:
        """Return for each tokenised sentence the `k` most probable words in place of each of its words.

        Raises TypeError unless a sentence is a list of strings, ConfigError for k below 1.
        """
        if k < 1:
            raise ConfigError(f"k={k}: must be 1 or more")
        return [self.substitutes_of(self._top(words), len(words), k) for words in checked_sentences(sentences)]

    def surprisal(self, sentences: Iterable[Sequence[str]]) -> list[Surprisal]:
        """Return for each tokenised sentence, which may be empty, the surprisal of its words and of its end.

        Raises TypeError unless a sentence is a list of strings.
        """
        return [self.surprisal_of(self._top(words), words) for words in checked_sentences(sentences)]

    def log_probability(self, sentences: Iterable[Sequence[str]]) -> dict[str, NDArray[np.float64]]:
        """Return [N] by direction: the natural logarithm of the probability of each tokenised sentence with its end.

        `both` is the mean of forward and backward; a forward-only model has forward alone. Longer sentences have lower
        values: to rank candidates of different lengths, divide each by its number of words plus 1.

        Raises TypeError unless a sentence is a list of strings.
        """
        sums = [surprisal.sums for surprisal in self.surprisal(sentences)]
        names = ["forward", "backward", "both"] if self.model.directions == 2 else ["forward"]
        return {name: -np.array([each[name] for each in sums], np.float64) for name in names}

    def _top(self, words: Sequence[str]) -> Tensor:
        batch = encode_sentences(self.encoder, self.vocabulary, [words])
        with torch.no_grad():
            return self.encoder.layers(*batch)[0][-1][0]

    @without_autocast
    @torch.no_grad()
    def substitutes_of(self, top: Tensor, n: int, k: int) -> Substitutes:
        """Return the substitutes of a sentence of n words.

        top: its top layer, [n + 2 or more, D * P], markers included.
        """
        k = min(k, self.vocabulary.size - 3)
        predicting = self._predicting(top, n)
        names = [*predicting, *(["product"] if len(predicting) == 2 else [])]
        ids: dict[str, list[Tensor]] = {name: [] for name in names}
        values: dict[str, list[Tensor]] = {name: [] for name in names}
        tile = max(1, _MAX_LOGITS // self.vocabulary.size)
        for first in range(0, max(n, 1), tile):
            log_ps = {
                name: self.softmax.log_probabilities(self.model, x[first : first + tile])
                for name, x in predicting.items()
            }
            if len(log_ps) == 2:
                # the product of both probabilities, made to sum to 1
                log_ps["product"] = torch.log_softmax(log_ps["forward"] + log_ps["backward"], dim=1)
            for name, log_p in log_ps.items():
                log_p[:, self._special.to(log_p.device)] = -math.inf
                best = log_p.topk(k, dim=1)
                ids[name].append(best.indices.cpu())
                values[name].append(best.values.float().cpu())
        return Substitutes(
            {name: torch.cat(tiles).numpy() for name, tiles in ids.items()},
            {name: torch.cat(tiles).numpy() for name, tiles in values.items()},
            self.vocabulary,
        )

    @without_autocast
    @torch.no_grad()
    def surprisal_of(self, top: Tensor, words: Sequence[str]) -> Surprisal:
        """Return the surprisal of a sentence of n words, which may be 0. top: its top layer, as in `substitutes_of`."""
        vocabulary, n = self.vocabulary, len(words)
        targets = [vocabulary.ids.get(word, vocabulary.unk) for word in words]
        unknown = np.array([target == vocabulary.unk for target in targets], np.bool_)
        width = self.model.config.lstm.projection_dim
        exact = self.softmax.exact(self.model, rows=n + 1)

        def losses(x_NP: Tensor, wanted: list[int]) -> NDArray[Any]:
            found = exact.losses(x_NP.contiguous(), torch.tensor(wanted, device=top.device))
            return np.asarray(found.float().cpu().numpy())

        # With its markers the sentence has n + 2 positions; each direction predicts from all but the one it ends on.
        forward = losses(top[: n + 1, :width], [*targets, vocabulary.eos])
        nats: dict[str, NDArray[Any]] = {"forward": forward[:-1]}
        end = {"forward": float(forward[-1])}
        if self.model.directions == 2:
            backward = losses(top[1 : n + 2, width:], [vocabulary.bos, *targets])
            nats["backward"], end["backward"] = backward[1:], float(backward[0])
            nats["both"] = (nats["forward"] + nats["backward"]) / 2
            end["both"] = (end["forward"] + end["backward"]) / 2
        return Surprisal(nats, end, unknown)

    def _predicting(self, top: Tensor, n: int) -> dict[str, Tensor]:
        """Return [n, P] by direction, from which each word is predicted.

        The forward direction predicts from the position before the word, the backward one from the position after it.
        """
        width = self.model.config.lstm.projection_dim
        found = {"forward": top[:n, :width].contiguous()}
        if self.model.directions == 2:
            found["backward"] = top[2 : n + 2, width:].contiguous()
        return found
