"""Published models as the files in configs/ say them: their sizes are those of the papers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from elmo_ray.config import PretrainConfig
from elmo_ray.config.command_line import load_config
from elmo_ray.model.bilm import BiLM

CONFIGS = Path(__file__).parents[2] / "configs"
WORDS = 10_000  # the Penn Treebank's vocabulary, as in both papers


def config_of(name: str, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> PretrainConfig:
    monkeypatch.setenv("ELMO_CORPUS", "/corpus")
    return load_config(CONFIGS / name, overrides, PretrainConfig)


LARGE = [
    "model.char_cnn.filters=[[1, 50], [2, 100], [3, 150], [4, 200], [5, 200], [6, 200], [7, 200]]",
    "model.char_cnn.n_highway=2",
    "model.lstm.dim=650",
    "model.lstm.projection_dim=650",
]


@pytest.mark.parametrize(
    ("name", "overrides", "millions", "layers"),
    [
        # Kim et al. 2016, table 3: 5, 19 and 20 million parameters
        ("charcnn-lm.yaml", [], 5, 15 * 25 * 91 + 525 + 2 * 525 * 526 + 1200 * (525 + 301) + 1200 * 601),
        ("charcnn-lm.yaml", LARGE, 19, 15 * 5100 + 1100 + 4 * 1100 * 1101 + 2600 * (1100 + 651) + 2600 * 1301),
        ("word-lm.yaml", [], 20, 2 * 2600 * 1301),
    ],
    ids=["LSTM-Char-Small", "LSTM-Char-Large", "LSTM-Word-Large"],
)
def test_sizes(name: str, overrides: list[str], millions: int, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(name, overrides, monkeypatch)
    with torch.device("meta"):
        model = BiLM(config.model, config.softmax, WORDS)
    dim = config.model.lstm.dim
    tables = WORDS * (dim + 1) + (261 * 15 if config.model.input == "characters" else WORDS * dim)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert config.model.layer_parameters() == layers
    assert count == layers + tables
    assert round(count / 1e6) == millions
