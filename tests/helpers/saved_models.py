"""Models of tiny sizes as checkpoints on the disk, without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from elmo_ray.checkpoints.manifest import streams_name
from elmo_ray.checkpoints.write import commit, write_rank_files
from elmo_ray.config import PretrainConfig
from elmo_ray.model.bilm import BiLM

WORDS = ["<S>", "</S>", "<UNK>", "the", "dog", "cat", "sees", "house", ".", "old", "hears", "in", "garden"]
"""Words of small models."""


def random_model(config: PretrainConfig, n_words: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> BiLM:
    """All parameters are random, biases too, so that nothing is zero by chance."""
    model = BiLM(config.model, config.softmax, n_words).to(dtype)
    model.reset_parameters(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return model.requires_grad_(False)


def save_checkpoint(folder: Path, config: PretrainConfig, words: Sequence[str], model: BiLM, step: int = 7) -> Path:
    """A whole checkpoint as a run of one stream writes it, with slots for one parameter."""
    tensors = {
        "model.safetensors": dict(model.state_dict()),
        "optimizer.safetensors": {"accumulator.softmax_bias": torch.ones(len(words))},
        streams_name(0, 1): {"cell": torch.zeros(1, 2)},
    }
    texts = {
        "config.yaml": config.to_yaml(),
        "vocab.txt": "".join(word + "\n" for word in words),
        "progress.json": json.dumps({"step": step}),
    }
    write_rank_files(folder, 0, tensors, texts)
    commit(folder, 1, {"step": step, "streams": 1}, patience_s=0)
    return folder
