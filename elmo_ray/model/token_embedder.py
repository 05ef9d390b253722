"""Vectors of words from their Unicode characters and, beside these, a table of whole words: as ELMoForManyLangs has it.

It stands in the place of a char CNN or a word table in models that were made with that program, and is for use and not
for training from text: it takes words, and no ids.

Shapes: U words, C characters of a word, E character embedding, W word embedding, F filters, P output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from elmo_ray import kernels
from elmo_ray.config.model import CharCnnConfig
from elmo_ray.data.vocabulary import SENTENCE_BEGIN_WORD, SENTENCE_END_WORD, UNKNOWN_WORD, Vocabulary
from elmo_ray.model.char_cnn import Highway, largest_windows
from elmo_ray.model.product import affine

BEGIN, END, UNKNOWN, PADDING = "<bos>", "<eos>", "<oov>", "<pad>"
"""The program's words for the begin and the end of a sentence, for unknown words and characters, and for padding."""

_FIRST, _LAST = "<eow>", "<bow>"
"""Characters at the begin and at the end of a word. The program has the two names exchanged, and so do its models."""

NEEDED_CHARACTERS = (BEGIN, END, UNKNOWN, PADDING, _FIRST, _LAST)

_OURS = {SENTENCE_BEGIN_WORD: BEGIN, SENTENCE_END_WORD: END, UNKNOWN_WORD: UNKNOWN}
_WORDS_AT_A_TIME = 512


class TokenEmbedder(nn.Module):
    """Convolutions over characters with highways, the vector of the whole word beside them, and a projection to P.

    characters, words: the ids of the characters and of the words (empty: there is no table of words), each below the
    number of rows of its embedding. Parameters: `character_embedding` [., E], `filters.*` [count, E, width],
    `filter_biases.*`, `highways.*`, `word_embedding` [., W] or None, `projection_weight` [W + F, P], `projection_bias`.
    """

    def __init__(
        self,
        config: CharCnnConfig,
        output_dim: int,
        characters: Mapping[str, int],
        words: Mapping[str, int],
        n_characters: int,
        n_words: int,
        word_dim: int,
    ):
        super().__init__()
        self.config, self.characters, self.words = config, dict(characters), dict(words)
        self.character_embedding = nn.Parameter(torch.empty(n_characters, config.embedding_dim))
        self.filters = nn.ParameterList(
            torch.empty(count, config.embedding_dim, width) for width, count in config.filters
        )
        self.filter_biases = nn.ParameterList(torch.empty(count) for _, count in config.filters)
        self.highways = nn.ModuleList(Highway(config.n_filters) for _ in range(config.n_highway))
        self.word_embedding = nn.Parameter(torch.empty(n_words, word_dim)) if word_dim else None
        self.projection_weight = nn.Parameter(torch.empty(word_dim + config.n_filters, output_dim))
        self.projection_bias = nn.Parameter(torch.empty(output_dim))

    @property
    def most_bytes(self) -> int:
        """Number of ids, begin and end of the word included, in which the UTF-8 bytes of any word that it tells apart
        have room."""
        return 4 * (self.config.max_characters - 2) + 2

    def forward(self, words: Sequence[str], dtype: torch.dtype | None = None) -> Tensor:
        """Return [U, P] vectors of words. `BEGIN` and `END` are the sentence's; longer words are cut.

        dtype: of the products; None stands for the weights' own.
        """
        device = self.character_embedding.device
        words = [word[: self.config.max_characters - 2] for word in words]
        chars_UC = torch.from_numpy(self._spelled(words)).to(device)
        run = kernels.largest_windows(self.character_embedding) or largest_windows
        x = run([chars_UC], self.character_embedding, tuple(self.filters), self.config.max_characters, dtype)
        x = x + torch.cat(list(self.filter_biases))
        x = torch.relu(x) if self.config.activation == "relu" else torch.tanh(x)
        for layer in self.highways:
            x = layer(x, dtype)
        if self.word_embedding is not None:
            unknown = self.words[UNKNOWN]
            ids_U = torch.tensor([self.words.get(word, unknown) for word in words], device=device)
            x = torch.cat([F.embedding(ids_U, self.word_embedding), x], dim=1)
        return affine(x, self.projection_weight, self.projection_bias, dtype)

    def _spelled(self, words: Sequence[str]) -> NDArray[np.int32]:
        """Return [U, C] ids of the characters of words that are not too long.

        There is a column of padding for every column of the widest filter, so that more would change no maximum.
        """
        ids, unknown = self.characters, self.characters[UNKNOWN]
        # a sentence's begin and end are one character each
        spelled = [[ids[word]] if word in (BEGIN, END) else [ids.get(c, unknown) for c in word] for word in words]
        widest = max(width for width, _ in self.config.filters)
        columns = min(self.config.max_characters, max(map(len, spelled), default=0) + 2 + widest)
        rows_UC = np.full((len(words), columns), ids[PADDING], np.int32)
        for row, characters in zip(rows_UC, spelled, strict=True):
            row[: len(characters) + 2] = [ids[_FIRST], *characters, ids[_LAST]]
        return rows_UC

    @torch.no_grad()
    def vectors_of(self, vocabulary: Vocabulary, dtype: torch.dtype | None = None) -> Tensor:
        """Return [V, P] the vectors of a vocabulary's words, in float32 on the CPU; its special words are the
        program's."""
        words = [_OURS.get(word, word) for word in vocabulary.words]
        tiles = [
            self(words[first : first + _WORDS_AT_A_TIME], dtype).float().cpu()
            for first in range(0, len(words), _WORDS_AT_A_TIME)
        ]
        return torch.cat(tiles)
