"""The biLM: word inputs, two LSTM directions, and the softmax table.

Shapes: D directions (1 when forward only), B rows, T window, U distinct words, C characters, P projection, V
vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elmo_ray.config import SoftmaxConfig
from elmo_ray.config.model import ModelConfig
from elmo_ray.model.char_cnn import CharCnn
from elmo_ray.model.dropout import Dropout
from elmo_ray.model.lstm import BiLstm, LstmState

TABLES = ("softmax_weight", "softmax_bias", "word_embedding")
"""Parameters with a row for each vocabulary word. Training updates only the rows that a step touches."""


class BiLM(nn.Module):
    """A bidirectional (or forward-only) language model as bilm-tf trains it.

    Parameters: `char_cnn.*` or `word_embedding` [V, P]; `lstm.layers.*`; `softmax_weight` [V, P] (absent where it is
    tied to the word embedding) and `softmax_bias` [V].  n_words: V, 0 for a model without a softmax (a published
    weights file).
    """

    def __init__(self, model: ModelConfig, softmax: SoftmaxConfig, n_words: int):
        super().__init__()
        self.config = model
        self.n_words = n_words
        self.tied = softmax.tied
        width = model.lstm.projection_dim
        self.directions = 2 if model.bidirectional else 1
        self.char_cnn = CharCnn(model.char_cnn, width) if model.input == "characters" else None
        self.word_embedding = nn.Parameter(torch.empty(n_words, width)) if model.input == "words" else None
        self.lstm = BiLstm(model.lstm, self.directions)
        has_table = n_words > 0 and not softmax.tied
        self.softmax_weight = nn.Parameter(torch.empty(n_words, width)) if has_table else None
        self.softmax_bias = nn.Parameter(torch.zeros(n_words)) if n_words > 0 else None

    def reset_parameters(self, seed: int) -> None:
        """Initial values as the original's, a pure function of the seed."""
        generator = torch.Generator().manual_seed(seed)
        if self.char_cnn is not None:
            self.char_cnn.reset_parameters(generator)
        self.lstm.reset_parameters(generator)
        with torch.no_grad():
            if self.word_embedding is not None:
                bound = math.sqrt(6.0 / sum(self.word_embedding.shape))
                self.word_embedding.uniform_(-bound, bound, generator=generator)
            if self.softmax_weight is not None:
                self.softmax_weight.normal_(0.0, math.sqrt(1.0 / self.softmax_weight.shape[1]), generator=generator)
            if self.softmax_bias is not None:
                self.softmax_bias.zero_()

    @property
    def output_weight(self) -> Tensor:
        """[V, P] the softmax table, which is the word embedding where they are tied."""
        weight = self.word_embedding if self.tied else self.softmax_weight
        if weight is None:
            raise ValueError("this model has no softmax")
        return weight

    def dense_parameters(self) -> dict[str, nn.Parameter]:
        """Everything but the tables."""
        return {name: p for name, p in self.named_parameters() if name not in TABLES}

    def encode_types(
        self,
        types: Tensor,
        classes: tuple[tuple[int, int], ...] | None = None,
        rows_RP: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """[U, P] vectors of distinct words: [U, C] character ids, or [U] ids into the word embedding (or into
        `rows_RP`)."""
        if self.char_cnn is not None:
            return self.char_cnn(types, classes, dtype)
        table = self.word_embedding if rows_RP is None else rows_RP
        if table is None:
            raise ValueError("a model with word input needs its embedding")
        return F.embedding(types, table)

    def forward(
        self,
        types: Tensor,
        classes: tuple[tuple[int, int], ...] | None,
        inputs_DBT: Tensor,
        state: LstmState,
        lengths_B: Tensor | None = None,
        dropout: Dropout | None = None,
        dtype: torch.dtype | None = None,
        rows_RP: Tensor | None = None,
    ) -> tuple[Tensor, LstmState]:
        """Return the top output [D, B, T, P], after dropout where that is given, and the new state.

        Arguments as in `streams.Batch`; rows_RP as in `encode_types`.
        """
        types_UP = self.encode_types(types, classes, rows_RP, dtype)
        x_DTBP = F.embedding(inputs_DBT.transpose(1, 2), types_UP)
        outputs, state = self.lstm(x_DTBP, state, lengths_B, dropout, dtype)
        top = outputs[-1] if dropout is None else dropout(outputs[-1])
        return top.transpose(1, 2), state

    @torch.no_grad()
    def layers(
        self,
        types_UP: Tensor,
        inputs_DBT: Tensor,
        state: LstmState,
        lengths_B: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[list[Tensor], LstmState]:
        """For use: [D, B, T, P] of the word inputs and of every LSTM layer, from word vectors that are at hand."""
        x_DTBP = F.embedding(inputs_DBT.transpose(1, 2), types_UP)
        outputs, state = self.lstm(x_DTBP, state, lengths_B, None, dtype)
        return [x.transpose(1, 2) for x in (x_DTBP, *outputs)], state
