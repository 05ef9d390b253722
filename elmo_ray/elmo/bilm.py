"""The biLM inside the Elmo layer: it takes tensors of character ids and returns the activations of every layer.

AllenNLP's code knows it as `elmo._elmo_lstm`; it has the attributes that programs written for AllenNLP use. It keeps
the LSTM state from call to call, row by row, as AllenNLP's does by default.

Shapes: B sentences, T words of the longest sentence, C characters, D directions, P projection, U distinct words.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from elmo_ray.checkpoints.bilm_tf.hdf5 import read_weights
from elmo_ray.checkpoints.bilm_tf.options import from_options, read_options
from elmo_ray.config import SoftmaxConfig
from elmo_ray.config.model import ModelConfig
from elmo_ray.data.characters import (
    N_CHARACTERS,
    PADDING,
    SENTENCE_BEGIN,
    WORD_BEGIN,
    WORD_END,
    sentence_marker_rows,
)
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.data.word_types import distinct_rows, encode_with_markers
from elmo_ray.elmo.encoder import IntArray, SentenceEncoder, check_words, outside_of_graphs, without_autocast
from elmo_ray.errors import ConfigError, short
from elmo_ray.model.bilm import BiLM
from elmo_ray.model.lstm import LstmState
from elmo_ray.model.token_embedder import BEGIN, END, TokenEmbedder
from elmo_ray.storage.url_cache import local_file


class CarriedState:
    """LSTM state that is carried from batch to batch: row b begins where row b of the previous batch ended.

    A smaller batch uses and updates the first rows and leaves the others as they are; the additional rows of a larger
    batch begin at zero. With `stateful=False` every sentence begins at zero.
    """

    def __init__(self, stateful: bool = True):
        self.stateful = stateful
        self._states: LstmState | None = None

    def start(self, rows: int, like: Tensor) -> LstmState | None:
        """Return the state with which `rows` rows begin, on the device and in the dtype of `like`; None for zeros."""
        if not self.stateful or self._states is None:
            return None
        kept = [tensor[:, :, :rows].to(like) for tensor in self._states]
        missing = rows - kept[0].shape[2]
        if missing > 0:
            kept = [torch.cat([x, x.new_zeros(*x.shape[:2], missing, x.shape[3])], dim=2) for x in kept]
        return LstmState(*kept)

    def keep(self, after: LstmState) -> None:
        """Keep the state at the end of a batch."""
        if not self.stateful:
            return
        if self._states is not None and self._states.cell.shape[2] > after.cell.shape[2]:
            rows = after.cell.shape[2]
            after = LstmState(
                *(
                    torch.cat([new, old[:, :, rows:].to(new)], dim=2)
                    for new, old in zip(after, self._states, strict=True)
                )
            )
        self._states = after.detach()

    def reset_states(self, mask: Tensor | None = None) -> None:
        """Reset all rows to zero, or those where `mask` [rows] is set. Raise ConfigError for another number of rows."""
        if mask is None or self._states is None:
            self._states = None
            return
        rows = self._states.cell.shape[2]
        if mask.shape != (rows,):
            raise ConfigError(f"reset_states: the mask has shape {list(mask.shape)}, the state has {rows} rows")
        self._states = self._states.zero_rows(mask.to(self._states.cell.device, torch.bool))


logger = logging.getLogger(__name__)

Path = str | PathLike[str]
Precision = Literal["fp32", "bf16"]
_NO_CHARACTER = N_CHARACTERS
_DTYPES = {"fp32": None, "bf16": torch.bfloat16}


class ElmoBiLm(nn.Module):
    """A biLM over batches of sentences.

    options_file, weight_file: bilm-tf's pair of files, each a path or a URL. model: a BiLM in memory, which is used as
    it is in place of the two files. vocabulary: needed for a model with word input. vocab_to_cache, requires_grad: as
    in `Elmo`. precision: bf16 computes the matrix products in bfloat16. Raises FormatError for files that are missing
    or do not hold a biLM, ConfigError for settings that do not fit.
    """

    def __init__(
        self,
        options_file: Path | None,
        weight_file: Path | None,
        requires_grad: bool = False,
        vocab_to_cache: Sequence[str] | None = None,
        *,
        model: BiLM | None = None,
        vocabulary: Vocabulary | None = None,
        stateful: bool = True,
        precision: Precision = "fp32",
    ):
        super().__init__()
        if precision not in _DTYPES:
            raise ConfigError(f"precision={precision}: must be fp32 or bf16")
        if model is None:
            if options_file is None or weight_file is None:
                raise ConfigError(
                    "options_file and weight_file are needed, or a module; Elmo.from_run(SOURCE) opens a run, a "
                    "checkpoint or a folder of weights"
                )
            model = read_bilm(options_file, weight_file).requires_grad_(requires_grad)
        if model.char_cnn is None and model.token_embedder is None and vocabulary is None:
            raise ConfigError("a model with word input needs its vocabulary")
        if why := model.config.unequal_layers:
            raise ConfigError(f"Elmo mixes layers of one size, but {why}; embed with embed.layers=top uses this model")
        self.bilm, self.vocabulary = model, vocabulary
        self.num_layers = model.config.lstm.n_layers + 1
        self._encoder = SentenceEncoder(model, _DTYPES[precision])
        self._elmo_lstm = CarriedState(stateful)
        self._word_embedding: nn.Embedding | None = None
        self._marker_embeddings: Tensor
        self._requires_grad = requires_grad
        if vocab_to_cache:
            self.create_cached_cnn_embeddings(vocab_to_cache)

    @property
    def max_characters(self) -> int:
        """Number of ids of a word in `inputs`."""
        if self.bilm.token_embedder is not None:
            return self.bilm.token_embedder.most_bytes
        return self.bilm.config.char_cnn.max_characters

    def get_output_dim(self) -> int:
        """Return the size of a position's vector, D * P."""
        return self.bilm.directions * self.bilm.config.lstm.projection_dim

    def reset_states(self, mask: Tensor | None = None) -> None:
        """Let the next batch begin at zero, or only its rows where `mask` [rows] is set."""
        self._elmo_lstm.reset_states(mask)

    @outside_of_graphs
    @without_autocast
    def forward(self, inputs: Tensor, word_inputs: Tensor | None = None) -> dict[str, Any]:
        """Return `activations`, a list of [B, T + 2, D * P] for the word vectors and each LSTM layer, and the `mask`.

        Both include the sentence markers; the mask is [B, T + 2]. inputs: [B, T, C] as from `batch_to_ids`; for a model
        with word input [B, T] vocabulary ids plus one, 0 for padding. word_inputs: [B, T] indices into
        `vocab_to_cache`, 0 for padding; they are used instead of `inputs` if there is such a list and all of them are
        in it. Raises ConfigError for ids out of range, TypeError for anything but a tensor of whole numbers.

        Within torch.autocast it computes as outside of it, as `precision` says.
        """
        check_ids(inputs)
        if word_inputs is not None:
            check_ids(word_inputs, "word_inputs", "they are indices into vocab_to_cache")
        device = self._encoder.device
        if self._word_embedding is not None and word_inputs is not None and self._has(word_inputs):
            lengths = _lengths(word_inputs.cpu().numpy() > 0)
            words, indices = torch.unique(word_inputs.to(device), return_inverse=True)
            cached = F.embedding(words, self._word_embedding.weight)
            vectors = torch.cat([self._marker_embeddings.to(cached), cached])
            return self._run(vectors, indices + 2, lengths, 0, 1)
        if self.bilm.token_embedder is not None:
            return self._from_words(inputs, self.bilm.token_embedder)
        if self.bilm.word_embedding is not None:
            return self._from_word_ids(inputs)
        return self._from_characters(inputs)

    def _from_characters(self, inputs: Tensor) -> dict[str, Any]:
        chars_BTC, lengths = self._characters(inputs)
        b, t, c = chars_BTC.shape
        rows = np.concatenate([sentence_marker_rows(c), chars_BTC.reshape(-1, c)])
        types, indices = distinct_rows(rows)
        vectors = self._vectors(types)
        return self._run(
            vectors, torch.from_numpy(indices[2:].reshape(b, t)), lengths, int(indices[0]), int(indices[1])
        )

    def _from_words(self, inputs: Tensor, embedder: TokenEmbedder) -> dict[str, Any]:
        """Return the result for words whose UTF-8 bytes are in `inputs`."""
        chars_BTC, lengths = self._characters(inputs)
        b, t, c = chars_BTC.shape
        types, indices = distinct_rows(np.concatenate([sentence_marker_rows(c), chars_BTC.reshape(-1, c)]))
        words = [bytes(row[row < SENTENCE_BEGIN].astype(np.uint8)).decode("utf-8", "ignore") for row in types]
        words[indices[0]], words[indices[1]] = BEGIN, END
        vectors = embedder(words, self._encoder.dtype)
        places = torch.from_numpy(indices[2:].reshape(b, t))
        return self._run(vectors, places, lengths, int(indices[0]), int(indices[1]))

    def _from_word_ids(self, inputs: Tensor) -> dict[str, Any]:
        if inputs.dim() != 2:
            raise ConfigError(f"inputs have shape {list(inputs.shape)}; word input takes [sentences, words]")
        table, vocabulary = self.bilm.word_embedding, self.vocabulary
        if table is None or vocabulary is None:
            raise ConfigError("a model with word input needs its embedding and vocabulary")
        ids = inputs.cpu().numpy()
        if ids.size and (ids.min() < 0 or ids.max() > len(table)):
            raise ConfigError(f"inputs have word ids beyond 0 to {len(table)}")
        indices = (inputs - 1).clamp_min(0)
        return self._run(table, indices, _lengths(ids > 0), vocabulary.bos, vocabulary.eos)

    def _run(self, vectors_UP: Tensor, indices_BT: Tensor, lengths: IntArray, bos: int, eos: int) -> dict[str, Any]:
        b, t = indices_BT.shape
        if not b:
            empty = vectors_UP.new_zeros(0, t + 2, self.get_output_dim())
            mask = torch.zeros(0, t + 2, dtype=torch.bool, device=vectors_UP.device)
            return {"activations": [empty] * self.num_layers, "mask": mask}
        full = indices_BT.new_full((b, t + 2), bos)
        full[:, 1:-1] = indices_BT
        full.scatter_(1, torch.from_numpy(lengths + 1)[:, None].to(full.device), eos)
        positions = lengths + 2
        full = full.to(vectors_UP.device)
        start = self._elmo_lstm.start(b, vectors_UP)
        layers, after = self._encoder.layers(vectors_UP, full, positions, start)
        self._elmo_lstm.keep(after)
        mask = torch.arange(t + 2) < torch.from_numpy(positions)[:, None]
        return {"activations": layers, "mask": mask.to(vectors_UP.device)}

    def _characters(self, inputs: Tensor) -> tuple[NDArray[np.int16], IntArray]:
        """Return [B, T, C] ids as in training, with padding words as any other, and [B] the words of each sentence."""
        if inputs.dim() != 3:
            raise ConfigError(f"inputs have shape {list(inputs.shape)}; characters are [sentences, words, ids]")
        ids = inputs.detach().cpu().numpy()
        if ids.size and (ids.min() < 0 or ids.max() > N_CHARACTERS):
            raise ConfigError(f"inputs have character ids beyond 0 to {N_CHARACTERS}; batch_to_ids makes them")
        words_BT: NDArray[np.bool_] = np.asarray((ids > 0).any(axis=2))
        # an id of 0 within a word stands for a character whose vector is zero, see `_vectors`
        chars = np.where(ids > 0, ids - 1, np.where(words_BT[:, :, None], _NO_CHARACTER, PADDING)).astype(np.int16)
        return _to_width(chars, self.max_characters), _lengths(words_BT)

    def _vectors(self, types_UC: NDArray[np.int16]) -> Tensor:
        """Return [U, P] vectors of words.

        A character id of 0 within a word has a zero vector, as in AllenNLP; `batch_to_ids` makes no such word.
        """
        if self.bilm.char_cnn is None or not (types_UC == _NO_CHARACTER).any():
            return self._encoder.word_vectors(types_UC)
        embedding = self.bilm.char_cnn.embedding
        with_zero = {"embedding": torch.cat([embedding, embedding.new_zeros(1, embedding.shape[1])])}
        types = torch.from_numpy(types_UC.astype(np.int64)).to(embedding.device)
        return torch.func.functional_call(self.bilm.char_cnn, with_zero, (types, None, self._encoder.dtype))

    def _has(self, word_inputs: Tensor) -> bool:
        size = 0 if self._word_embedding is None else self._word_embedding.num_embeddings
        return not word_inputs.numel() or (int(word_inputs.min()) >= 0 and int(word_inputs.max()) < size)

    def create_cached_cnn_embeddings(self, tokens: Sequence[str]) -> None:
        """Compute the vectors of `tokens` once; `word_inputs` are then indices into this list.

        The first of the tokens is padding.
        """
        check_words(tokens, "vocab_to_cache")
        if self.bilm.char_cnn is None:
            raise ConfigError("vocab_to_cache is for a model with characters; this one has a table of words")
        if self._requires_grad:
            logger.warning("the char CNN does not learn from words of vocab_to_cache, their vectors learn instead")
        markers = sentence_marker_rows(self.max_characters)
        types, indices = distinct_rows(np.concatenate([markers, encode_with_markers(tokens, self.max_characters)]))
        with torch.no_grad():
            vectors = self._encoder.word_vectors(types)[torch.from_numpy(indices).to(self._encoder.device)]
        self.register_buffer("_marker_embeddings", vectors[:2].clone(), persistent=False)
        words = vectors[2:].clone()
        words[0] = 0
        self._word_embedding = nn.Embedding.from_pretrained(words, freeze=not self._requires_grad)


class ElmoCharacterEncoder(nn.Module):
    """The char CNN alone: from [B, T, C] ids to `token_embedding` [B, T + 2, P] and `mask` [B, T + 2]."""

    def __init__(self, options_file: Path, weight_file: Path, requires_grad: bool = False):
        super().__init__()
        self._bilm = ElmoBiLm(options_file, weight_file, requires_grad, stateful=False)
        self.output_dim = self._bilm.bilm.config.lstm.projection_dim
        self.requires_grad = requires_grad

    def get_output_dim(self) -> int:
        """Return the size of a word's vector, P."""
        return self.output_dim

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        output = self._bilm(inputs)
        vectors = output["activations"][0][..., : self.output_dim]
        return {"mask": output["mask"], "token_embedding": vectors}


def read_bilm(options_file: Path, weight_file: Path) -> BiLM:
    """Read the model of a published pair of files, each a path or a URL; without gradients. Raises FormatError."""
    for name, place in (("options_file", options_file), ("weight_file", weight_file)):
        if not isinstance(place, str | os.PathLike):
            raise TypeError(f"{name} is {short(repr(place), 60)}; it must be a path or a URL")
        if os.path.isdir(place):
            raise ConfigError(f"{place}: is a folder; Elmo.from_run opens a run, a checkpoint or a folder of weights")
    options, weights = local_file(options_file), local_file(weight_file)
    config, _ = from_options(read_options(options), str(options), published=True)
    return read_weights(weights, config)


def without_softmax(model: BiLM) -> BiLM:
    """Return a model of the same parameters without the softmax table.

    The table is most of a checkpoint and of no use here.
    """
    if model.token_embedder is not None:
        return model  # it has no softmax
    return _rebuilt(model.config, model.state_dict(), 0 if model.word_embedding is None else len(model.word_embedding))


def with_word_vectors(model: BiLM, vectors_VP: Tensor) -> BiLM:
    """Return the model with a table of word vectors in place of its char CNN, as bilm-tf runs from its token cache."""
    config = ModelConfig(input="words", bidirectional=model.config.bidirectional, lstm=model.config.lstm)
    tensors = {name: x for name, x in model.state_dict().items() if name.startswith("lstm.")}
    return _rebuilt(config, {**tensors, "word_embedding": vectors_VP}, len(vectors_VP))


def _rebuilt(config: ModelConfig, tensors: dict[str, Tensor], n_words: int) -> BiLM:
    with torch.device("meta"):
        bare = BiLM(config, SoftmaxConfig(), n_words)
    bare.drop_softmax()
    bare.load_state_dict({name: x for name, x in tensors.items() if not name.startswith("softmax")}, assign=True)
    return bare.requires_grad_(False)


def check_ids(inputs: object, name: str = "inputs", made_by: str = "batch_to_ids(sentences) makes them") -> None:
    """Raise TypeError unless `inputs` is a tensor of whole numbers. name, made_by: what they are, for the message."""
    if not isinstance(inputs, Tensor):
        is_array = isinstance(inputs, np.ndarray)
        what = "a NumPy array; torch.from_numpy makes a tensor of it" if is_array else short(repr(inputs), 60)
        raise TypeError(f"the layer takes a tensor of ids, and {name} is {what}{'' if is_array else f'; {made_by}'}")
    if inputs.is_floating_point() or inputs.is_complex() or inputs.dtype == torch.bool:
        raise TypeError(f"the layer takes a tensor of ids, and {name} has numbers of type {inputs.dtype}")


def are_characters(ids: Tensor) -> bool:
    """Return True if all rows look like words of `batch_to_ids`: begin, some bytes, end, and padding up to the end.

    No sentence of word ids does, as these ids would have to be the same words in this order in every sentence.
    """
    rows = ids.reshape(-1, ids.shape[-1]) if ids.dim() > 2 and ids.numel() else ids.new_zeros(0, 1)
    rows = rows[(rows != 0).any(dim=1)]
    ends = (rows == WORD_END + 1).int().cumsum(dim=1)
    after = rows[ends > 0]
    return bool(
        len(rows)
        and (rows[:, 0] == WORD_BEGIN + 1).all()
        and (ends[:, -1] == 1).all()
        and ((after == WORD_END + 1) | (after == PADDING + 1)).all()
    )


def _lengths(words_BT: NDArray[np.bool_]) -> IntArray:
    lengths = words_BT.sum(axis=1).astype(np.int64)
    if (words_BT != (np.arange(words_BT.shape[1]) < lengths[:, None])).any():
        raise ConfigError("a sentence has padding between its words; padding comes after the last one")
    return lengths


def _to_width(chars_BTC: NDArray[np.int16], width: int) -> NDArray[np.int16]:
    """Return the ids for words of `width` characters, cut or padded as encoding the words anew would do."""
    given = chars_BTC.shape[2]
    if given == width:
        return chars_BTC
    if given < width:
        if given < 3 or (chars_BTC[..., -1] == WORD_END).any():
            raise ConfigError(
                f"words have {given} ids and may be cut off; this model's words have {width}: "
                f"batch_to_ids(sentences, max_characters={width}), or encode(sentences) of the layer"
            )
        return np.pad(chars_BTC, ((0, 0), (0, 0), (0, width - given)), constant_values=PADDING)
    cut = chars_BTC[..., :width].copy()
    # a word that has not ended at the new last character was longer: its last id is the end of a word
    cut[..., -1] = np.where(cut[..., -1] == PADDING, PADDING, WORD_END)
    return cut
