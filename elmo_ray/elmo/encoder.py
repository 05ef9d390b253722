"""Whole sentences through the biLM: every layer at every position.

`SentenceEncoder` does it for batches. The char CNN runs once for each distinct word, and its vectors are kept while
nothing trains. Without gradients the LSTM runs over packed positions where there is a kernel for it; with gradients, or
without a kernel, the plain model runs over padded rows. `encode_sentences` prepares tokenised sentences for it.
`embed_sentences` does it sentence by sentence, as bilm-tf, AllenNLP and simple_elmo do.

Shapes: D directions, B sentences, T positions of the longest sentence with its markers, N packed positions, U distinct
words, C characters, P projection, L layers.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from elmo_ray import kernels
from elmo_ray.data.vocabulary import SENTENCE_BEGIN_WORD, SENTENCE_END_WORD, Vocabulary
from elmo_ray.data.word_types import encode_with_markers, sort_by_length
from elmo_ray.elmo.word_cache import WordCache
from elmo_ray.errors import ConfigError, short
from elmo_ray.model.bilm import BiLM
from elmo_ray.model.lstm import LstmState
from elmo_ray.model.token_embedder import BEGIN, END

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])

_CACHE_BYTES = 1 << 28

IntArray = NDArray[np.int64]


def without_autocast(function: Function) -> Function:
    """Return a function that runs with torch.autocast off, also where it is called within it.

    The model's own `dtype` decides in what its products are computed; kernels write into buffers of a known type.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return cast(Function, run)


def outside_of_graphs(function: Function) -> Function:
    """Return a function that torch.compile leaves out of its graphs, as NumPy and Numba have no place in them."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        # torch.compiler.disable as a decorator would import the whole compiler, which takes seconds
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return cast(Function, run)


_WITHOUT_ORDER = (set, frozenset, Mapping)
_NO_SENTENCES = (str, bytes, *_WITHOUT_ORDER)


def check_sentences(batch: Any) -> None:
    """Raise TypeError, which names the place, unless `batch` holds sentences that are sequences of strings."""
    if batch is None or isinstance(batch, str | bytes):
        raise TypeError(f"{_shown(batch)} was given; sentences are a list of lists of words, as [['The', 'cat']]")
    for number, words in enumerate(batch):
        _check_sentence(words, number)


def checked_sentences(sentences: Any) -> Iterator[Sequence[str]]:
    """Yield the sentences; raise TypeError as `check_sentences` at the first one that is no sequence of strings."""
    if sentences is None or isinstance(sentences, str | bytes):
        check_sentences(sentences)
    for number, words in enumerate(sentences):
        _check_sentence(words, number)
        yield words


def _check_sentence(words: Any, number: int) -> None:
    check_words(words, f"sentence {number}")
    if len(words) == 1 and len(words[0].split()) > 1:
        _warn_of_blanks(number, words[0])


_undivided: list[str] = []
"""The first sentence of which `_warn_of_blanks` has warned in this process."""


def _warn_of_blanks(number: int, word: str) -> None:
    """Warn, once in a process, of a sentence that is given as one word: no error, as a name may have a blank."""
    if not _undivided:
        _undivided.append(word)
        logger.warning("sentence %d is one word with blanks in it, %s: give its words as a list", number, _shown(word))


def check_words(words: Any, name: str) -> None:
    """Raise TypeError, in which `name` stands for them, unless `words` is a sequence of strings."""
    if isinstance(words, _WITHOUT_ORDER):
        raise TypeError(f"{name} is {_shown(words)}, which has no order; it must be a list of words")
    if isinstance(words, str | bytes) or not hasattr(words, "__len__"):
        raise TypeError(f"{name} is {_shown(words)}; it must be a list of words, as ['The', 'cat']")
    for place, word in enumerate(words):
        if not isinstance(word, str):
            raise TypeError(f"{name}, word {place} is {_shown(word)}; a word is a string")


def _shown(value: Any) -> str:
    return short(repr(value), 60)


class Packing(NamedTuple):
    """Order of the positions of B sentences when they are packed: time by time, and in each time step longest first.

    order: [B] sentences, longest first. rows: the number of sentences in each time step. at: [D, N] for each packed
    position its index in the flattened [B, T]; the backward direction counts from the end of its sentence.
    """

    order: IntArray
    rows: list[int]
    at: IntArray

    @classmethod
    def from_lengths(cls, lengths_B: IntArray, width: int, directions: int) -> Packing:
        """Pack sentences of these lengths, which lie in rows of `width` positions."""
        order = np.argsort(-lengths_B, kind="stable")
        longest_first = lengths_B[order]
        steps = np.arange(int(longest_first[0]))
        rows = np.searchsorted(-longest_first, -steps, side="left")  # how many lengths exceed each step
        times = np.repeat(steps, rows)
        ranks = np.arange(len(times)) - np.repeat(np.cumsum(rows) - rows, rows)
        base = order[ranks] * width
        at = [base + times, base + longest_first[ranks] - 1 - times][:directions]
        return cls(order, rows.tolist(), np.stack(at))


def parameter_versions(parameters: Iterable[Tensor]) -> list[tuple[int, int, torch.dtype]]:
    """Return values that differ after a parameter was moved, replaced or changed in place.

    A change through a parameter's `.data` is not seen.
    """
    return [(p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype) for p in parameters]


class PackedLstm:
    """The LSTM stack without gradients over packed positions, where there is a kernel for it.

    Its weights are converted once, and again after a parameter has changed. dtype: of the matrix products.
    """

    def __init__(self, model: BiLM, dtype: torch.dtype | None = None):
        self.model, self.dtype = model, dtype
        self._stack: Any = None
        self._made_of: object = None

    def current(self, x: Tensor) -> Any:
        """Return a stack that runs on the device and in the dtype of x; None where only the plain model can."""
        lstm = self.model.lstm
        inference = kernels.lstm_inference(x)
        if inference is None or not lstm.has_original_cells:
            return None
        made_of = parameter_versions(lstm.parameters())
        if made_of != self._made_of:
            layers = [layer.weights for layer in lstm.layers]
            config = lstm.config
            clips = config.cell_clip, config.proj_clip
            self._stack, self._made_of = inference(layers, clips, config.use_skip_connections, self.dtype), made_of
        return self._stack


class SentenceEncoder:
    """Encoder of batches of sentences. dtype: of the matrix products; None for that of the parameters.

    Word vectors and converted weights are kept between calls and made anew after a parameter has changed. They are
    neither copied nor serialised with the encoder.
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

    @without_autocast
    def word_vectors(self, types_UC: NDArray[np.int16]) -> Tensor:
        """Return [U, P] context-independent vectors of words by their characters. types_UC: distinct words."""
        if self.model.char_cnn is None:
            raise ValueError("a model with word input has no vectors for characters")
        types, classes, new_rows = sort_by_length(types_UC, self.model.char_cnn.widest)
        on_device = torch.from_numpy(new_rows).to(self.device)
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.model.char_cnn.parameters()):
            vectors = self.model.encode_types(torch.from_numpy(types).to(self.device), classes, dtype=self.dtype)
            return F.embedding(on_device, vectors)
        return self._frozen_cache().vectors(types, classes)[on_device]

    @without_autocast
    def layers(
        self, vectors_UP: Tensor, indices_BT: Tensor, lengths_B: IntArray, state: LstmState | None = None
    ) -> tuple[list[Tensor], LstmState]:
        """Return [B, T, D * P] for the word vectors and each LSTM layer, and the state after each sentence.

        The word vectors are repeated for each direction; values after the end of a sentence are 0. indices_BT: rows of
        `vectors_UP`. lengths_B: positions of each sentence, at least 1. state: of B rows, None for zeros.
        """
        if state is None:
            state = self.model.lstm.zero_state(len(lengths_B), like=vectors_UP)
        if torch.is_grad_enabled() and (
            vectors_UP.requires_grad or any(p.requires_grad for p in self.model.lstm.parameters())
        ):
            return self._padded(vectors_UP, indices_BT, lengths_B, state)
        packed = self._packed.current(vectors_UP)
        if packed is None:
            with torch.no_grad():
                return self._padded(vectors_UP, indices_BT, lengths_B, state)
        return self._run_packed(packed, vectors_UP, indices_BT, lengths_B, state)

    def _run_packed(
        self, packed: Any, vectors_UP: Tensor, indices_BT: Tensor, lengths_B: IntArray, state: LstmState
    ) -> tuple[list[Tensor], LstmState]:
        b, t = indices_BT.shape
        directions = self.model.directions
        packing = Packing.from_lengths(lengths_B, t, directions)
        at_DN = torch.from_numpy(packing.at).to(indices_BT.device)
        order = torch.from_numpy(packing.order).to(indices_BT.device)
        indices_DN = indices_BT.reshape(-1)[at_DN]
        outputs, *after = packed.run(vectors_UP, indices_DN, packing.rows, *state.rows(order))
        layers = []
        for output_DNP in (F.embedding(indices_DN, vectors_UP), *outputs):
            width = output_DNP.shape[2]
            flat = output_DNP.new_zeros(b * t, directions * width)
            for d in range(directions):
                flat[:, d * width : (d + 1) * width].index_copy_(0, at_DN[d], output_DNP[d])
            layers.append(flat.view(b, t, directions * width))
        return layers, LstmState(*after).rows(torch.argsort(order))

    def _padded(
        self, vectors_UP: Tensor, indices_BT: Tensor, lengths_B: IntArray, state: LstmState
    ) -> tuple[list[Tensor], LstmState]:
        directions, t = self.model.directions, indices_BT.shape[1]
        lengths = torch.from_numpy(lengths_B).to(indices_BT.device)
        times = torch.arange(t, device=indices_BT.device)
        mask_BT = times < lengths[:, None]
        # indices that turn a sentence round, and back again if used twice; padding stays where it is
        turned_BT = torch.where(mask_BT, lengths[:, None] - 1 - times, times)
        inputs_DBT = torch.stack([indices_BT, indices_BT.gather(1, turned_BT)][:directions])
        x_DTBP = F.embedding(inputs_DBT.transpose(1, 2), vectors_UP)
        outputs, after = self.model.lstm(x_DTBP, state, lengths, None, self.dtype)
        layers = []
        for output_DTBP in (x_DTBP, *outputs):
            by_direction = [output_DTBP[0].transpose(0, 1)]
            if directions == 2:
                backward = output_DTBP[1].transpose(0, 1)
                by_direction.append(backward.gather(1, turned_BT[..., None].expand_as(backward)))
            layers.append(torch.cat(by_direction, dim=-1) * mask_BT[..., None])
        return layers, after.detach()

    def _frozen_cache(self) -> WordCache:
        made_of = parameter_versions(list(self.model.char_cnn.parameters()))  # type: ignore[union-attr]
        if self._cache is None or made_of != self._cached_of:
            self._cache = WordCache(self.model, self.dtype, self.cache_bytes)
            self._cached_of = made_of
        return self._cache


@torch.no_grad()
def encode_sentences(
    encoder: SentenceEncoder, vocabulary: Vocabulary | None, batch: Sequence[Sequence[str]]
) -> tuple[Tensor, Tensor, IntArray]:
    """Return the arguments of `SentenceEncoder.layers` for tokenised sentences.

    They are the vectors [U, P] of the distinct words, indices [B, T] into them with the sentence markers, and the
    positions [B] of each sentence. vocabulary: needed for word input, where words outside of it are `<UNK>`. Raises
    TypeError unless sentences are sequences of strings.
    """
    if any(isinstance(words, _NO_SENTENCES) or not hasattr(words, "__len__") for words in batch):
        check_sentences(batch)
    model = encoder.model
    embedder = model.token_embedder
    markers = (SENTENCE_BEGIN_WORD, SENTENCE_END_WORD) if embedder is None else (BEGIN, END)
    seen = {word: number for number, word in enumerate(markers)}
    lengths = np.fromiter(map(len, batch), np.int64, len(batch)) + 2
    indices = np.zeros((len(batch), int(lengths.max())), np.int64)
    for row, words in zip(indices, batch, strict=True):
        row[1 : len(words) + 1] = [seen.setdefault(word, len(seen)) for word in words]
        row[len(words) + 1] = 1
    if not all(isinstance(word, str) for word in seen):
        check_sentences(batch)
    if embedder is not None:
        vectors = embedder(list(seen), encoder.dtype)
    elif model.char_cnn is not None:
        vectors = encoder.word_vectors(encode_with_markers(list(seen), model.config.char_cnn.max_characters))
    else:
        if vocabulary is None:
            raise ConfigError("a model with word input needs its vocabulary")
        ids = [vocabulary.ids.get(word, vocabulary.unk) for word in seen]
        vectors = model.encode_types(torch.tensor(ids, device=encoder.device))
    return vectors, torch.from_numpy(indices).to(encoder.device), lengths


def embed_sentences(
    model: BiLM, sentences: Iterable[Sequence[str]], vocabulary: Vocabulary | None = None, carry: bool = False
) -> Iterator[NDArray[np.float32]]:
    """Yield for each sentence of n words [L + 1, n, D * P]: the word vectors, repeated for each direction, then the
    layers.

    The sentence markers are part of the input but not of the result. carry: a sentence begins with the state at the end
    of the one before, as in the original programs; otherwise each begins at zero. vocabulary: needed for word input,
    where words outside of it are `<UNK>`; not used for characters.
    """
    encoder, state = SentenceEncoder(model), None
    for words in sentences:
        inputs = encode_sentences(encoder, vocabulary, [words])
        with torch.no_grad():
            layers, after = encoder.layers(*inputs, state)
            found = torch.stack([layer_BTP[0, 1:-1] for layer_BTP in layers]).float().cpu().numpy()
        state = after if carry else None
        yield found
