"""One ELMo representation as the input of a task's model: what AllenNLP's `ElmoTokenEmbedder` was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from elmo_ray.elmo import Elmo
from elmo_ray.elmo_bilm import Path
from elmo_ray.elmo_embedder import DEFAULT_OPTIONS_FILE, DEFAULT_WEIGHT_FILE


class ElmoTokenEmbedder(nn.Module):
    """`Elmo` with one mixture, and a linear layer to `projection_dim` where that is given. Other arguments as there."""

    def __init__(
        self,
        options_file: Path = DEFAULT_OPTIONS_FILE,
        weight_file: Path = DEFAULT_WEIGHT_FILE,
        do_layer_norm: bool = False,
        dropout: float = 0.5,
        requires_grad: bool = False,
        projection_dim: int | None = None,
        vocab_to_cache: Sequence[str] | None = None,
        scalar_mix_parameters: Sequence[float] | None = None,
        **settings: Any,
    ):
        super().__init__()
        self._elmo = Elmo(
            options_file,
            weight_file,
            1,
            requires_grad=requires_grad,
            do_layer_norm=do_layer_norm,
            dropout=dropout,
            vocab_to_cache=vocab_to_cache,
            scalar_mix_parameters=scalar_mix_parameters,
            **settings,
        )
        self.output_dim = projection_dim or self._elmo.get_output_dim()
        self._projection = nn.Linear(self._elmo.get_output_dim(), projection_dim) if projection_dim else None

    def get_output_dim(self) -> int:
        """The size of a word's vector."""
        return self.output_dim

    def forward(self, elmo_tokens: Tensor, word_inputs: Tensor | None = None) -> Tensor:
        """[B, T, get_output_dim()]; arguments as for `Elmo`."""
        representation: Tensor = self._elmo(elmo_tokens, word_inputs)["elmo_representations"][0]
        return representation if self._projection is None else self._projection(representation)
