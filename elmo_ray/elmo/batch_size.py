"""How much text a model without gradients computes at a time on a device.

On a CPU a batch that fills its caches is as fast as any. A GPU computes a time step of a thousand rows in about the
time of one with thirty, so a batch there is as large as a part of its memory bears. No result depends on it, but for
the last bits.
"""

from __future__ import annotations

import torch

from elmo_ray.config import ModelConfig

MOST_POSITIONS = 1 << 16
"""Beyond so many positions at a time no GPU is faster."""

_SHARE = 4  # of the memory, for other programs may be on the GPU, and an estimate is one
_WORDS_SHARE = 8  # of the positions, the distinct words of a batch
_LEAST_WINDOW = 32


def positions_at_a_time(device: torch.device, model: ModelConfig, usual: int) -> int:
    """Return how many positions to compute at a time on a device. usual: the number for a CPU."""
    if device.type != "cuda":
        return usual
    # the whole memory and not what is free now: a job that is resumed on the same kind of GPU has the same batches
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(usual, positions_in(memory, model))


def positions_in(memory: int, model: ModelConfig) -> int:
    """Return how many positions a GPU with so many bytes computes at a time, a power of 2."""
    most = min(MOST_POSITIONS, memory // _SHARE // bytes_of_position(model))
    return 1 << max(0, most.bit_length() - 1)


def bytes_of_position(model: ModelConfig) -> int:
    """Return about how many bytes of memory a position takes in float32, without gradients."""
    lstm, directions = model.lstm, 2 if model.bidirectional else 1
    # of the layer that runs: the four gates of its window, their product, memory cell and output before the projection
    of_layer = 10 * lstm.dim + 2 * lstm.projection_dim
    of_outputs = (lstm.n_layers + 3) * lstm.projection_dim
    numbers = directions * (of_layer + of_outputs)
    if model.input == "characters":
        cnn = model.char_cnn
        filters = sum(count for _, count in cnn.filters)
        widest = max(width for width, _ in cnn.filters)
        numbers += cnn.max_characters * (filters + widest * cnn.embedding_dim) // _WORDS_SHARE
    return 4 * numbers


def rows_for(positions: int, usual: int, device: torch.device) -> int:
    """Return how many streams to read at a time in batches of so many positions. usual: the number for a CPU."""
    return usual if device.type != "cuda" else max(usual, positions // _LEAST_WINDOW)
