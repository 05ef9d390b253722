"""The ELMo layer for a task's model: `Elmo` and `batch_to_ids` replace those of AllenNLP. It needs no Ray.

LSTM state is carried from call to call, as in AllenNLP's layer. The vectors of a sentence then depend on the same row
of the batches before. `stateful=False` begins every sentence at zero.

Shapes: B sentences, T words of the longest sentence.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elmo_ray.checkpoints.bilm_tf.hdf5 import read_word_vectors
from elmo_ray.data.vocabulary import SPECIAL_WORDS, UNKNOWN_WORD, Vocabulary
from elmo_ray.data.word_types import encode_with_markers
from elmo_ray.elmo.bilm import (
    ElmoBiLm,
    ElmoCharacterEncoder,
    Path,
    Precision,
    are_characters,
    check_ids,
    read_bilm,
    with_word_vectors,
    without_softmax,
)
from elmo_ray.elmo.encoder import check_sentences
from elmo_ray.elmo.scalar_mix import ScalarMix
from elmo_ray.errors import ConfigError
from elmo_ray.model.bilm import BiLM
from elmo_ray.storage.url_cache import local_file

logger = logging.getLogger(__name__)

# Names that programs written for AllenNLP import.
_ElmoBiLm, _ElmoCharacterEncoder = ElmoBiLm, ElmoCharacterEncoder

__all__ = ["Elmo", "ElmoBiLm", "ElmoCharacterEncoder", "ScalarMix", "batch_to_ids"]


class Elmo(nn.Module):
    """Representations of words in their sentences: learned mixtures of a pre-trained biLM's layers.

    options_file, weight_file: bilm-tf's options.json and weights.hdf5, each a path or a URL, which is fetched once (see
    `storage.url_cache`). num_output_representations: the number of mixtures, each with weights of its own.
    requires_grad: also train the biLM. do_layer_norm: see `ScalarMix`. dropout: the rate for the representations in
    training. vocab_to_cache: words whose context-independent vectors are computed once; `forward` then takes indices
    into this list as `word_inputs`, and its first entry is padding. keep_sentence_boundaries: keep the vectors of `<S>`
    and `</S>`. scalar_mix_parameters: fixed weights of the layers, before the softmax. module: used in place of the two
    files; a `BiLM`, or any module with `num_layers`, `get_output_dim()` and a `forward` that returns `activations` and
    `mask`. With a module, requires_grad has no effect.

    Arguments that AllenNLP does not have: stateful=False; precision="bf16" for the matrix products; l2_coef and
    use_top_only as in `ScalarMix`; vocabulary, needed for a model with word input.
    Raises FormatError for files that cannot be used and ConfigError for arguments that do not fit.

    The layer works within torch.autocast, where it computes as outside of it, and in a model for torch.compile, which
    leaves it out of its graphs.
    """

    def __init__(
        self,
        options_file: Path | None,
        weight_file: Path | None = None,
        num_output_representations: int | None = None,
        requires_grad: bool = False,
        do_layer_norm: bool = False,
        dropout: float = 0.5,
        vocab_to_cache: Sequence[str] | None = None,
        keep_sentence_boundaries: bool = False,
        scalar_mix_parameters: Sequence[float] | None = None,
        module: nn.Module | None = None,
        *,
        stateful: bool = True,
        precision: Precision = "fp32",
        l2_coef: float | None = None,
        use_top_only: bool = False,
        vocabulary: Vocabulary | None = None,
    ):
        super().__init__()
        if num_output_representations is None:
            raise TypeError(
                "Elmo takes options_file, weight_file and num_output_representations; "
                "Elmo.from_run(SOURCE) opens a run, a checkpoint or a folder of weights"
            )
        _check_number("num_output_representations", num_output_representations)
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
            raise ConfigError(f"dropout={dropout!r}: must be a number from 0 to 1")
        if module is not None and (options_file is not None or weight_file is not None):
            raise ConfigError("options_file and weight_file are not read beside a module; give None for them")
        if module is None or isinstance(module, BiLM):
            self._elmo_lstm: Any = ElmoBiLm(
                options_file,
                weight_file,
                requires_grad,
                vocab_to_cache,
                model=module,
                vocabulary=vocabulary,
                stateful=stateful,
                precision=precision,
            )
        else:
            if not all(hasattr(module, name) for name in ("num_layers", "get_output_dim")):
                raise ConfigError(
                    f"module is of the class {type(module).__name__}; it must be a BiLM, or have num_layers, "
                    "get_output_dim() and a forward that returns activations and mask"
                )
            self._elmo_lstm = module
        self._has_cached_vocab = vocab_to_cache is not None
        self._keep_sentence_boundaries = keep_sentence_boundaries
        self._dropout = nn.Dropout(dropout)
        self._scalar_mixes: list[ScalarMix] = []
        for k in range(num_output_representations):
            mix = ScalarMix(
                int(self._elmo_lstm.num_layers),
                do_layer_norm,
                scalar_mix_parameters,
                scalar_mix_parameters is None,
                l2_coef,
                use_top_only,
            )
            self.add_module(f"scalar_mix_{k}", mix)
            self._scalar_mixes.append(mix)

    @classmethod
    def from_run(
        cls,
        source: Path,
        num_output_representations: int = 1,
        *,
        checkpoint: str = "best",
        options: str | None = None,
        vocab: str | None = None,
        requires_grad: bool = False,
        **settings: Any,
    ) -> Elmo:
        """Return the layer of a SOURCE: a run's folder, a checkpoint, or anything else that `open_source` opens.

        checkpoint: best, last or a name, for a run's folder. options, vocab: as for `open_source`. settings: arguments
        of the class.
        """
        from elmo_ray.checkpoints.source import open_source

        opened = open_source(source, checkpoint, options, vocab)
        model = without_softmax(opened.model).requires_grad_(requires_grad)
        return cls(None, None, num_output_representations, module=model, vocabulary=opened.words, **settings)

    @classmethod
    def from_pretrained(cls, source: Path, num_output_representations: int = 1, **settings: Any) -> Elmo:
        """Return the layer of a model on the Hub, hf://OWNER/NAME or hf://OWNER/NAME@REVISION, or of any SOURCE.

        It is fetched once, to the cache of `huggingface_hub`. settings: as for `from_run`.
        """
        return cls.from_run(source, num_output_representations, **settings)

    @classmethod
    def from_model(
        cls, model: BiLM, num_output_representations: int = 1, *, vocabulary: Vocabulary | None = None, **settings: Any
    ) -> Elmo:
        """Return the layer of a model in memory. It shares the parameters and leaves their `requires_grad` as it is."""
        return cls(None, None, num_output_representations, module=model, vocabulary=vocabulary, **settings)

    @classmethod
    def from_token_vectors(
        cls,
        options_file: Path,
        weight_file: Path,
        vectors_file: Path,
        vocab_file: Path,
        num_output_representations: int = 1,
        requires_grad: bool = False,
        **settings: Any,
    ) -> Elmo:
        """Return a layer without a char CNN, whose context-independent vectors come from `vectors_file`.

        `embed` with embed.tokens, or bilm-tf's dump_token_embeddings, wrote that file for the words of `vocab_file`.
        `forward` takes [B, T] word ids plus one, as `encode` returns them; a word that is not in `vocab_file` is
        `<UNK>`, or an error of `encode` where `vocab_file` has no such line.
        """
        model = read_bilm(options_file, weight_file)
        vectors = read_word_vectors(local_file(vectors_file), model.config.lstm.projection_dim)
        vocabulary = Vocabulary.read(local_file(vocab_file), SPECIAL_WORDS[:2])
        if len(vectors) != vocabulary.size:
            raise ConfigError(f"{vectors_file}: has {len(vectors)} words, {vocab_file} has {vocabulary.size}")
        model = with_word_vectors(model, vectors).requires_grad_(requires_grad)
        return cls(None, None, num_output_representations, module=model, vocabulary=vocabulary, **settings)

    def get_output_dim(self) -> int:
        """Return the size of a representation: directions times projection."""
        return int(self._elmo_lstm.get_output_dim())

    @property
    def stateful(self) -> bool:
        """True if a batch begins with the state at the end of the batch before, row by row."""
        return bool(self._elmo_lstm._elmo_lstm.stateful)

    @stateful.setter
    def stateful(self, value: bool) -> None:
        self._elmo_lstm._elmo_lstm.stateful = value

    def reset_states(self, mask: Tensor | None = None) -> None:
        """Reset the carried state to zero, for all rows or for those where `mask` [rows] is set."""
        self._elmo_lstm.reset_states(mask)

    def encode(self, batch: Sequence[Sequence[str]]) -> Tensor:
        """Return the `inputs` of tokenised sentences.

        They are character ids as from `batch_to_ids`, or [B, T] vocabulary ids plus one for a model with word input.
        Raises TypeError unless a sentence is a list of strings, and ConfigError for a word that is not in a vocabulary
        without `<UNK>`.
        """
        bilm: ElmoBiLm = self._elmo_lstm
        if bilm.vocabulary is None or not self._takes_words:
            return batch_to_ids(batch, bilm.max_characters)
        if batch is not None and not hasattr(batch, "__len__"):
            batch = list(batch)
        check_sentences(batch)
        ids, unk = bilm.vocabulary.ids, bilm.vocabulary.ids.get(UNKNOWN_WORD)
        for number, words in enumerate(batch):
            unknown = [] if unk is not None else [word for word in words if word not in ids]
            if unknown:
                raise ConfigError(
                    f"sentence {number}: {unknown[0]!r} is not in {bilm.vocabulary.path}, which has no {UNKNOWN_WORD}; "
                    "add the word, and compute the vectors again with embed.tokens"
                )
        inputs = torch.zeros(len(batch), max(map(len, batch), default=0), dtype=torch.long)
        for row, words in zip(inputs, batch, strict=True):
            numbers = [ids[word] if unk is None else ids.get(word, unk) for word in words]
            row[: len(words)] = torch.tensor(numbers, dtype=torch.long) + 1
        return inputs

    def regularization(self) -> Tensor:
        """Return the term that l2_coef adds to a task's loss, summed over the mixtures."""
        return torch.stack([mix.regularization() for mix in self._scalar_mixes]).sum()

    def forward(self, inputs: Tensor, word_inputs: Tensor | None = None) -> dict[str, Any]:
        """Return `elmo_representations`, a list of [B, T, dim] for each mixture, and `mask` [B, T], True for words.

        inputs: [B, T, 50] from `batch_to_ids`, or the result of `encode`; further dimensions in front are kept.
        word_inputs: [B, T] indices into vocab_to_cache; if any of them is outside of it, all words are read from
        `inputs`. With keep_sentence_boundaries the results have T + 2 positions. No sentences, [0, T, 50], give empty
        tensors. Raises TypeError for anything but tensors of whole numbers.
        """
        check_ids(inputs)
        if self._takes_words and are_characters(inputs):
            raise ConfigError("inputs are characters, as from batch_to_ids; this layer takes the ids of its own encode")
        inner = 2 if self._takes_words else 3
        lead = inputs.shape[: 1 - inner]  # all but the words of a sentence and their characters
        if inputs.dim() > inner:
            inputs = inputs.reshape(-1, *inputs.shape[1 - inner :])
        if word_inputs is not None:
            check_ids(word_inputs, "word_inputs", "they are indices into vocab_to_cache")
            lead = word_inputs.shape[:-1]
            word_inputs = word_inputs.reshape(-1, word_inputs.shape[-1])
            if not self._has_cached_vocab:
                logger.warning("word_inputs are given, but there is no vocab_to_cache; they are not used")
                word_inputs = None
        output = self._elmo_lstm(inputs, word_inputs)
        mask = output["mask"]
        mixed = [mix(output["activations"], mask) for mix in self._scalar_mixes]
        if not self._keep_sentence_boundaries:
            # `</S>` of a shorter sentence lies within the batch; the mask without its first two columns ends before it
            inner_mask = mask[:, 2:]
            mixed = [torch.where(inner_mask[..., None], x[:, 1:-1], 0.0) for x in mixed]
            mask = inner_mask
        shape = (*lead, mask.shape[1])
        representations = [self._dropout(x.contiguous()).view(*shape, x.shape[-1]) for x in mixed]
        return {"elmo_representations": representations, "mask": mask.reshape(shape)}

    @property
    def _takes_words(self) -> bool:
        if not isinstance(self._elmo_lstm, ElmoBiLm):
            return False
        return self._elmo_lstm.bilm.char_cnn is None and self._elmo_lstm.bilm.token_embedder is None


def batch_to_ids(batch: Sequence[Sequence[str]], max_characters: int = 50) -> Tensor:
    """Return [sentences, words of the longest, max_characters] int64 character ids of tokenised sentences.

    The ids are those of training plus one, and 0 for padding words. Raises TypeError, which names the place, unless a
    sentence is a list of strings.
    """
    if batch is not None and not hasattr(batch, "__len__"):
        batch = list(batch)
    check_sentences(batch)
    _check_number("max_characters", max_characters, 3, ", as a word's begin and end are two")
    lengths = np.fromiter(map(len, batch), np.int64, len(batch))
    words = list(itertools.chain.from_iterable(batch))
    ids = np.zeros((len(lengths), int(lengths.max(initial=0)), max_characters), np.int64)
    ids[np.arange(ids.shape[1]) < lengths[:, None]] = encode_with_markers(words, max_characters) + 1
    return torch.from_numpy(ids)


def _check_number(name: str, value: Any, least: int = 1, why: str = "") -> None:
    """Raise ConfigError unless the argument of this name is an integer of `least` or more."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise ConfigError(f"{name}={value!r}: must be an integer, {least} or more{why}")
