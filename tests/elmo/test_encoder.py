"""Whole sentences through a model whose cells are not the original's: no kernel may take it for one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.saved_models import random_model
from helpers.tiny_runs import tiny_config
from torch import Tensor

from elmo_ray import kernels
from elmo_ray.checkpoints.bilm_tf.hdf5 import write_weights
from elmo_ray.elmo.encoder import SentenceEncoder
from elmo_ray.errors import FormatError
from elmo_ray.model.lstm import Clips, LstmLayer, Weights, window
from elmo_ray.model.product import product


def coupled(x: Tensor, hidden: Tensor, memory: Tensor, w: Weights, clips: Clips) -> tuple[Tensor, Tensor]:
    """A cell whose forget gate is 1 - its input gate, with the original's parameters."""
    i, j, _, o = (product(x, w.input) + product(hidden, w.hidden) + w.bias).chunk(4, dim=-1)
    memory = (1 - torch.sigmoid(i)) * memory + torch.sigmoid(i) * torch.tanh(j)
    hidden = torch.sigmoid(o) * torch.tanh(memory)
    return hidden if w.projection is None else product(hidden, w.projection), memory


class Coupled(LstmLayer):
    def forward(
        self, x_DTBI: Tensor, hidden_DBP: Tensor, memory_DBH: Tensor, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        return window(x_DTBI, hidden_DBP, memory_DBH, self.weights, self.clips, dtype, coupled)


def test_another_cell_is_computed_by_itself_and_not_exported_as_the_originals(tmp_path: Path) -> None:
    model = random_model(tiny_config(), 12)
    vectors, lengths = torch.randn(5, model.config.word_dim), np.array([4, 2, 3])
    indices = torch.randint(5, (3, 4))

    def top(setting: kernels.Setting) -> Tensor:
        with kernels.using(setting), torch.no_grad():
            return SentenceEncoder(model).layers(vectors, indices, lengths)[0][-1]

    original = top("auto")
    torch.testing.assert_close(original, top("off"))
    for layer in model.lstm.layers:
        layer.__class__ = Coupled
    torch.testing.assert_close(top("auto"), top("off"))
    assert not torch.allclose(top("auto"), original, atol=1e-3)
    with pytest.raises(FormatError, match="cells are not the original's"):
        write_weights(tmp_path / "weights.hdf5", model)
