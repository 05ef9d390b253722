"""Floating point operations of a training, and the peak of the device that they are compared with.

Counted are the matrix products of the model, two operations for each multiplication with its addition, and twice as
many in the backward pass as in the forward pass, because it has a product for the inputs and one for the weights:

    position:  3 * D * (layers + softmax)
    layers:    for each layer 2 * (input + P) * 4 * H, and 2 * H * P for the projection where P is not H
    softmax:   sampled 2 * P * (K + 1); full 2 * P * V; adaptive: the head, and each cluster as often as a word is in it
    word:      3 * (convolutions + 2 * n_highway * 2 * F * F + 2 * F * P), for each distinct word of a worker's batch
    convolutions: for each filter of width W 2 * windows * W * E

Not counted are sums, activations, dropout, the optimizer and what validation computes. Components that are frozen, and
zeros that a kernel does not multiply with, are counted as all others: the count says what the model needs, and not what
a device did.

Shapes: D directions, P projection, H cells, K negatives, V vocabulary, F filters, E embedding of a character.
"""

from __future__ import annotations

import math
import re
import time

import torch
from torch import Tensor

from elmo_ray.config import PretrainConfig
from elmo_ray.config.model import CharCnnConfig
from elmo_ray.model.bilm import BiLM
from elmo_ray.training.step_input import StepInput

PEAKS: tuple[tuple[str, float | None, float], ...] = (
    ("GB200", 2500.0, 80.0),
    ("B200", 2250.0, 75.0),
    ("H200 NVL", 835.0, 60.0),
    ("H200", 989.0, 67.0),
    ("GH200", 989.0, 67.0),
    ("H100 NVL", 835.0, 60.0),
    ("H100 PCIe", 756.0, 51.0),
    ("H100", 989.0, 67.0),
    ("A100", 312.0, 19.5),
    ("A40", 149.7, 37.4),
    ("A30", 165.0, 10.3),
    ("A10G", None, 31.5),
    ("A10", 125.0, 31.2),
    ("L40S", 362.0, 91.6),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 30.3),
    ("V100-PCIE", None, 14.0),
    ("V100", None, 15.7),
    ("Tesla T4", None, 8.1),
    ("MI300X", 1307.0, 163.4),
)
"""TFLOP/s of GPUs by a part of their name, without sparsity: of bf16 products, None where it is measured, and of fp32.

They are from the makers' data sheets; the first part that is there as a word counts.
"""

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
_SIZES = (256, 512, 1024, 2048, 4096, 8192)
_LONG_S = 5e-3
_MEASURE_S = 0.2
_TRIES = 6
_measured: dict[tuple[str, str], float] = {}


class FlopCounter:
    """Counter of the operations of a model. It reads sizes only, and never numbers that are on the device."""

    def __init__(self, model: BiLM, config: PretrainConfig) -> None:
        self._characters = config.model.char_cnn if model.char_cnn is not None else None
        self._word_dim = config.model.word_dim
        # a position is multiplied once with each matrix of its direction; the matrices are [D, inputs, outputs]
        layers = 2 * sum(weight.numel() for weight in model.lstm.parameters() if weight.ndim == 3)
        softmax = model.softmax_kind.operations(model, config.softmax.negatives)
        self.per_position = 3.0 * (layers + model.directions * softmax)

    def of_words(self, batch: StepInput) -> float:
        """Return the operations for the distinct words of a worker's batch, 0 where words are not made of characters.

        On a GPU these are some more than the text has: those of the fixed shape to which the batch is padded.
        """
        if self._characters is None:
            return 0.0
        micro_batches = [micro for _, micro in batch.micro_batches] or [batch]
        return 3.0 * sum(_words(self._characters, self._word_dim, micro) for micro in micro_batches)

    def tflops(self, batch: StepInput, positions_per_second: float, world: int) -> float:
        """Return the TFLOP/s of one of `world` workers at this speed of all.

        batch: of this worker, whose words stand for those of all workers and steps.
        """
        positions = batch.positions / world
        return (self.per_position + self.of_words(batch) / max(1.0, positions)) * positions_per_second / world / 1e12


def _words(config: CharCnnConfig, word_dim: int, batch: StepInput) -> float:
    """Return the operations of the forward pass for the distinct words of a micro-batch."""
    features, words, convolutions = config.n_filters, len(batch.types), 0.0
    for width, count in config.filters:
        if batch.window_counts is not None:
            windows = batch.n_windows
        else:
            windows = sum(n * max(1, characters - width + 1) for n, characters in batch.type_classes)
        convolutions += 2.0 * windows * width * config.embedding_dim * count
    others = 2.0 * config.n_highway * 2 * features * features
    others += 2.0 * features * word_dim if features != word_dim else 0.0
    return convolutions + words * others


def known_tflops(name: str, precision: str) -> float | None:
    """Return the peak of the GPU with this name, or None if it is to be measured."""
    for part, bf16, fp32 in PEAKS:
        if re.search(rf"\b{part}\b", name):
            return bf16 if precision == "bf16" else fp32
    return None


def peak_tflops(device: torch.device, precision: str, reached: float = 0.0) -> float:
    """Return the peak of a device in TFLOP/s for the products of `train.precision`.

    It is known for the GPUs of PEAKS, and measured otherwise: once, in some hundredths of a second, and again where it
    is less than training has reached. reached: TFLOP/s that this process has trained with.
    """
    if device.type == "cuda" and precision != "fp64":
        known = known_tflops(torch.cuda.get_device_name(device), precision)
        if known is not None:
            return known
    key = (str(device), precision)
    if _measured.get(key, 0.0) <= reached:
        # Other programs had the cores when it was measured: no share may be above 100 %.
        _measured[key] = max(reached, _measured_tflops(device, _TYPES[precision]))
    return _measured[key]


def _measured_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the TFLOP/s of the fastest of some products of square matrices, with the threads of this process."""
    best = 0.0
    for size in _SIZES:
        x = torch.full((size, size), 0.5, device=device, dtype=dtype)
        seconds, since_best, until = math.inf, 0, time.perf_counter() + _MEASURE_S
        # on a busy machine few products have all cores from their beginning to their end
        while since_best < _TRIES or (seconds > _LONG_S and time.perf_counter() < until):
            last = _seconds(x)
            seconds, since_best = (last, 0) if last < seconds else (seconds, since_best + 1)
        best = max(best, 2.0 * size**3 / seconds / 1e12)
        if seconds > _LONG_S:
            break
    return best


def _seconds(x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    torch.mm(x, x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return max(1e-9, time.perf_counter() - start)
