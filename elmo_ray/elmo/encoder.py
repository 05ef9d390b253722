"""Batches of whole sentences through the biLM: every layer at every position, sentence markers included.

The char CNN runs once for each distinct word and keeps what it made while nothing trains; lengths are packed. With
gradients, the trained LSTM runs over padded rows instead.
Shapes: D directions, B sentences, T positions of the longest, U distinct words, C characters, P projection.

Tokenised sentences as the input of a `SentenceEncoder`.

Sentences to vectors: every layer of the biLM at every word, as bilm-tf, AllenNLP and simple_elmo give them.

Shapes: D directions, T window, P projection, L layers, C characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from elmo_ray import kernels
from elmo_ray.data.characters import encode_words, sentence_marker_rows
from elmo_ray.data.vocabulary import SENTENCE_BEGIN_WORD, SENTENCE_END_WORD, Vocabulary
from elmo_ray.data.word_types import encode_with_markers, sort_by_length
from elmo_ray.elmo.word_cache import WordCache
from elmo_ray.errors import ConfigError
from elmo_ray.model.bilm import BiLM
from elmo_ray.model.lstm import LstmState

_CACHE_BYTES = 1 << 28

IntArray = NDArray[np.int64]


class Packing(NamedTuple):
    """Where the positions of B sentences lie when they are packed.

    order: [B] longest first. rows: how many each time step has. at: [D, N] of each packed position its place in the
    flattened [B, T], for the backward direction counted from its sentence's end.
    """

    order: IntArray
    rows: list[int]
    at: IntArray

    @classmethod
    def of(cls, lengths_B: IntArray, width: int, directions: int) -> Packing:
        order = np.argsort(-lengths_B, kind="stable")
        longest_first = lengths_B[order]
        steps = np.arange(int(longest_first[0]))
        rows = np.searchsorted(-longest_first, -steps, side="left")  # how many lengths exceed each step
        times = np.repeat(steps, rows)
        ranks = np.arange(len(times)) - np.repeat(np.cumsum(rows) - rows, rows)
        base = order[ranks] * width
        at = [base + times, base + longest_first[ranks] - 1 - times][:directions]
        return cls(order, rows.tolist(), np.stack(at))


def fingerprint(parameters: Iterable[Tensor]) -> list[tuple[int, int, torch.dtype]]:
    """Return what changes when a parameter is moved, replaced, or changed in place (but not through its `.data`)."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype) for p in parameters]


class PackedLstm:
    """The LSTM stack without gradients over packed positions, where there is a kernel for it.

    Its converted weights are made once, and again when a parameter has changed. dtype: of the products.
    """

    def __init__(self, model: BiLM, dtype: torch.dtype | None = None):
        self.model, self.dtype = model, dtype
        self._stack: Any = None
        self._made_of: object = None

    def of_now(self, x: Tensor) -> Any:
        """Return a stack that runs on the device and in the type of x; None where the plain model must do."""
        inference = kernels.lstm_inference(x)
        if inference is None:
            return None
        lstm = self.model.lstm
        made_of = fingerprint(lstm.parameters())
        if made_of != self._made_of:
            layers = [layer.weights for layer in lstm.layers]
            config = lstm.config
            clips = config.cell_clip, config.proj_clip
            self._stack, self._made_of = inference(layers, clips, config.use_skip_connections, self.dtype), made_of
        return self._stack


class SentenceEncoder:
    """Encodes batches of sentences with a biLM. dtype: of the products, None for the parameters'.

    What is kept between calls (word vectors, converted weights) is made anew when a parameter has changed; it is
    neither copied nor pickled.
    """

    def __init__(self, model: BiLM, dtype: torch.dtype | None = None, cache_bytes: int = _CACHE_BYTES):
        self.model, self.dtype, self.cache_bytes = model, dtype, cache_bytes
        self._packed = PackedLstm(model, dtype)
        self._cache: WordCache | None = None
        self._cached_of: object = None

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "dtype": self.dtype, "cache_bytes": self.cache_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def word_vectors(self, types_UC: NDArray[np.int16]) -> Tensor:
        """[U, P] context-independent vectors of distinct words by their characters."""
        if self.model.char_cnn is None:
            raise ValueError("a model with word input has no vectors for characters")
        types, classes, place = sort_by_length(types_UC, self.model.char_cnn.widest)
        on_device = torch.from_numpy(place).to(self.device)
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.model.char_cnn.parameters()):
            vectors = self.model.encode_types(torch.from_numpy(types).to(self.device), classes, dtype=self.dtype)
            return F.embedding(on_device, vectors)
        return self._frozen_cache().vectors(types, classes)[on_device]

    def layers(
        self, vectors_UP: Tensor, places_BT: Tensor, lengths_B: IntArray, state: LstmState | None = None
    ) -> tuple[list[Tensor], LstmState]:
        """[B, T, D * P] of the word vectors (once for each direction) and of every LSTM layer, 0 after a sentence's
        end, and the state after each sentence.

        places_BT: rows of `vectors_UP`; lengths_B: positions of each sentence, 1 at least. state: of B rows, None for
        zeros.
        """
        if state is None:
            state = self.model.lstm.zero_state(len(lengths_B), like=vectors_UP)
        if torch.is_grad_enabled() and (
            vectors_UP.requires_grad or any(p.requires_grad for p in self.model.lstm.parameters())
        ):
            return self._padded(vectors_UP, places_BT, lengths_B, state)
        packed = self._packed.of_now(vectors_UP)
        if packed is None:
            with torch.no_grad():
                return self._padded(vectors_UP, places_BT, lengths_B, state)
        return self._of_packed(packed, vectors_UP, places_BT, lengths_B, state)

    def _of_packed(
        self, packed: Any, vectors_UP: Tensor, places_BT: Tensor, lengths_B: IntArray, state: LstmState
    ) -> tuple[list[Tensor], LstmState]:
        b, t = places_BT.shape
        directions, width = self.model.directions, vectors_UP.shape[1]
        packing = Packing.of(lengths_B, t, directions)
        at_DN = torch.from_numpy(packing.at).to(places_BT.device)
        order = torch.from_numpy(packing.order).to(places_BT.device)
        places_DN = places_BT.reshape(-1)[at_DN]
        outputs, *after = packed.run(vectors_UP, places_DN, packing.rows, *state.rows(order))
        layers = []
        for output_DNP in (F.embedding(places_DN, vectors_UP), *outputs):
            flat = output_DNP.new_zeros(b * t, directions * width)
            for d in range(directions):
                flat[:, d * width : (d + 1) * width].index_copy_(0, at_DN[d], output_DNP[d])
            layers.append(flat.view(b, t, directions * width))
        return layers, LstmState(*after).rows(torch.argsort(order))

    def _padded(
        self, vectors_UP: Tensor, places_BT: Tensor, lengths_B: IntArray, state: LstmState
    ) -> tuple[list[Tensor], LstmState]:
        directions, t = self.model.directions, places_BT.shape[1]
        lengths = torch.from_numpy(lengths_B).to(places_BT.device)
        times = torch.arange(t, device=places_BT.device)
        mask_BT = times < lengths[:, None]
        # a sentence from its end to its start and back again; padding stays where it is
        turned_BT = torch.where(mask_BT, lengths[:, None] - 1 - times, times)
        inputs_DBT = torch.stack([places_BT, places_BT.gather(1, turned_BT)][:directions])
        x_DTBP = F.embedding(inputs_DBT.transpose(1, 2), vectors_UP)
        outputs, after = self.model.lstm(x_DTBP, state, lengths, None, self.dtype)
        layers = []
        for output_DTBP in (x_DTBP, *outputs):
            sides = [output_DTBP[0].transpose(0, 1)]
            if directions == 2:
                backward = output_DTBP[1].transpose(0, 1)
                sides.append(backward.gather(1, turned_BT[..., None].expand_as(backward)))
            layers.append(torch.cat(sides, dim=-1) * mask_BT[..., None])
        return layers, after.detach()

    def _frozen_cache(self) -> WordCache:
        made_of = fingerprint(list(self.model.char_cnn.parameters()))  # type: ignore[union-attr]
        if self._cache is None or made_of != self._cached_of:
            self._cache = WordCache(self.model, self.dtype, self.cache_bytes)
            self._cached_of = made_of
        return self._cache


@torch.no_grad()
def encode_sentences(
    encoder: SentenceEncoder, vocabulary: Vocabulary | None, batch: Sequence[Sequence[str]]
) -> tuple[Tensor, Tensor, IntArray]:
    """Vectors of the distinct words, places [B, T] with the sentence markers, and positions [B] of each sentence: the
    arguments of `SentenceEncoder.layers`. vocabulary: needed for word input, where words outside are `<UNK>`."""
    seen = {SENTENCE_BEGIN_WORD: 0, SENTENCE_END_WORD: 1}
    lengths = np.fromiter(map(len, batch), np.int64, len(batch)) + 2
    places = np.zeros((len(batch), int(lengths.max())), np.int64)
    for row, words in zip(places, batch, strict=True):
        row[1 : len(words) + 1] = [seen.setdefault(word, len(seen)) for word in words]
        row[len(words) + 1] = 1
    model = encoder.model
    if model.char_cnn is not None:
        vectors = encoder.word_vectors(encode_with_markers(list(seen), model.config.char_cnn.max_characters))
    else:
        if vocabulary is None:
            raise ConfigError("a model with word input needs its vocabulary")
        ids = [vocabulary.ids.get(word, vocabulary.unk) for word in seen]
        vectors = model.encode_types(torch.tensor(ids, device=encoder.device))
    return vectors, torch.from_numpy(places).to(encoder.device), lengths


_MARKERS = (SENTENCE_BEGIN_WORD, SENTENCE_END_WORD)


@torch.no_grad()
def embed_sentences(
    model: BiLM, sentences: Iterable[Sequence[str]], vocabulary: Vocabulary | None = None, carry: bool = False
) -> Iterator[NDArray[np.float32]]:
    """Yields for each sentence of n words [L + 1, n, D * P]: the word vectors (once for each direction), then the
    layers.

    Sentence markers take part and are left out of the result. carry: the state at a sentence's end is the next one's
    start, as the originals do; otherwise each begins at zero. vocabulary: needed for word-id input, where words
    outside of it are `<UNK>`; without use for characters.
    """
    reference = next(model.parameters())
    state = None
    for words in sentences:
        types = _types([_MARKERS[0], *words, _MARKERS[1]], model, vocabulary).to(reference.device)
        types_UP = model.encode_types(types)
        order = torch.arange(len(types), device=reference.device)
        inputs_DBT = torch.stack([order, order.flip(0)][: model.directions])[:, None, :]
        if state is None or not carry:
            state = model.lstm.zero_state(1, like=types_UP)
        layers, state = model.layers(types_UP, inputs_DBT, state)
        yield torch.stack([_join(layer_DBTP) for layer_DBTP in layers]).float().cpu().numpy()


def _join(layer_DBTP: Tensor) -> Tensor:
    """[n, D * P] both directions in the order of the text, without the markers."""
    directions = [layer_DBTP[0, 0], *(backward.flip(0) for backward in layer_DBTP[1:, 0])]
    return torch.cat(directions, dim=-1)[1:-1]


def _types(words: Sequence[str], model: BiLM, vocabulary: Vocabulary | None) -> Tensor:
    """[n, C] character ids of words, or [n] vocabulary ids."""
    if model.char_cnn is None:
        if vocabulary is None:
            raise ValueError("a model with word input needs the vocabulary")
        return torch.tensor([vocabulary.ids.get(word, vocabulary.unk) for word in words])
    chars_NC = encode_words(words, model.config.char_cnn.max_characters)
    for marker, row in zip(_MARKERS, sentence_marker_rows(chars_NC.shape[1]), strict=True):
        chars_NC[[word == marker for word in words]] = row
    return torch.from_numpy(chars_NC)
