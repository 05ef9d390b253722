"""The switch: for each operation of the plain model a faster function of the same meaning, or None.

Nobody else asks for a device or a compiler. A function that is returned here takes the arguments of its plain
counterpart in `elmo_ray.model` and is compared with it in the tests. This package imports nothing of the rest.

`train.kernels=off` and the environment variable ELMO_RAY_KERNELS=off leave the plain model alone. ELMO_RAY_KERNELS=gpu
is for tests: it gives the GPU's kernels to tensors of a CPU, for Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from elmo_ray.kernels.hints import SortedPositions

Setting = Literal["auto", "off"]
Function = Callable[..., Any]

_environment = os.environ.get("ELMO_RAY_KERNELS")
_setting: Setting = "off" if _environment == "off" else "auto"


def use(setting: Setting) -> None:
    """Turn fast paths on or off for this process; the environment variable keeps them off."""
    global _setting
    _setting = "off" if _environment == "off" else setting


@contextlib.contextmanager
def using(setting: Setting) -> Iterator[None]:
    """Turn fast paths on or off for a block of code."""
    before = _setting
    use(setting)
    try:
        yield
    finally:
        use(before)


def lstm_window(x: Tensor) -> Function | None:
    """Return the counterpart of `model.lstm.window`."""
    if _on_cpu(x):
        from elmo_ray.kernels.cpu.lstm import window

        return window
    if _on_gpu(x):
        from elmo_ray.kernels.gpu.lstm_window import window as of_window

        on_gpu: Function = of_window
        return lambda x, hidden, memory, weights, clips, dtype: on_gpu(x, hidden, memory, *weights, *clips, dtype)
    return None


def largest_windows(embedding: Tensor) -> Function | None:
    """Return the counterpart of `model.char_cnn.largest_windows`."""
    if _on_cpu(embedding):
        from elmo_ray.kernels.cpu.char_cnn import largest_windows

        return largest_windows
    return None


def word_features(embedding: Tensor, filters: Sequence[Tensor]) -> Function | None:
    """Return the function for largest windows with bias and activation, for all words at once.

    Its counterpart is what `model.char_cnn.CharCnn` does up to its highways.
    """
    if _on_gpu(embedding):
        from elmo_ray.kernels.gpu import char_cnn

        return char_cnn.largest_windows if char_cnn.serves(embedding, filters) else None
    return None


def gather_rows(table: Tensor) -> Function | None:
    """Return the counterpart of `F.embedding(ids, table)`, as (table, ids, sorted positions or None)."""
    if _on_gpu(table):
        from elmo_ray.kernels.gpu.rows import gather_rows as on_gpu

        return on_gpu
    return None


def highway(x: Tensor) -> Function | None:
    """Return the counterpart of `model.char_cnn.highway`."""
    if _on_cpu(x):
        from elmo_ray.kernels.cpu.char_cnn import highway

        return highway
    if _on_gpu(x):
        from elmo_ray.kernels.gpu.highway import highway as on_gpu

        return on_gpu
    return None


def dropout(x: Tensor) -> Function | None:
    """Return the counterpart of `model.dropout.drop`."""
    if _on_cpu(x):
        from elmo_ray.kernels.cpu.dropout import drop

        return drop
    return None


def keyed_dropout(x: Tensor) -> Function | None:
    """Return dropout with masks by a key in the device's memory, as (x, key, use, keep); it has no plain form."""
    if _on_gpu(x):
        from elmo_ray.kernels.gpu.dropout import dropout as on_gpu

        return on_gpu
    return None


def sampled_losses(x: Tensor, negatives: Tensor, positions: SortedPositions | None = None) -> Function | None:
    """Return the counterpart of the plain form of `model.softmax.sampled_losses`.

    positions: of the targets, if they are known.
    """
    if _on_cpu(x):
        from elmo_ray.kernels.cpu.softmax import sampled_losses

        return sampled_losses
    if _on_gpu(x):
        from elmo_ray.kernels.gpu import softmax

        return partial(softmax.sampled_losses, positions=positions) if softmax.serves(negatives) else None
    return None


def lstm_inference(x: Tensor) -> Function | None:
    """Return the class of the LSTM stack without gradients, over packed positions.

    The plain counterpart is `model.lstm.BiLstm` over padded rows.
    """
    if _on_cpu(x):
        from elmo_ray.kernels.cpu.lstm_inference import LstmInference

        return LstmInference
    return None


def fixed_char_cnn(embedding: Tensor, filters: Sequence[Tensor]) -> Function | None:
    """Return the class of the char CNN without gradients; the plain counterpart is `model.char_cnn.CharCnn`."""
    if _setting == "auto" and embedding.device.type == "cpu":
        from elmo_ray.kernels.cpu.char_cnn_inference import FixedCharCnn

        return FixedCharCnn if FixedCharCnn.serves(embedding, filters) else None
    return None


def full_losses(weight: Tensor) -> Function | None:
    """Return the class of losses over the whole vocabulary without gradients; the plain form is
    `model.softmax.ExactLosses`."""
    if _setting == "auto" and weight.dtype == torch.float32:
        from elmo_ray.kernels.full_softmax import FullSoftmax

        return FullSoftmax
    return None


def compiler_version() -> str | None:
    """Return the version of the compiler of CPU kernels, on which a run's bits depend; None where there is none."""
    from elmo_ray.kernels.cpu.loops import numba_version

    return numba_version() if _setting == "auto" else None


def adagrad(value: Tensor) -> Function | None:
    """Return the counterpart of `training.optimizer.adagrad`."""
    if _on_cpu(value):
        from elmo_ray.kernels.cpu.adagrad import adagrad

        return adagrad
    if _on_gpu(value):
        from elmo_ray.kernels.gpu.adagrad import adagrad as on_gpu

        return on_gpu
    return None


def dense_adagrad(value: Tensor) -> Function | None:
    """Return the class of the update of many whole tensors at once: of each as `training.optimizer.adagrad` does it."""
    if _on_gpu(value):
        from elmo_ray.kernels.gpu.dense_adagrad import DenseAdagrad

        return DenseAdagrad
    return None


def has_gpu_kernels(x: Tensor) -> bool:
    """Return whether operations on tensors like this one are a GPU's kernels, as far as they serve."""
    return _on_gpu(x)


def next_window() -> Function | None:
    """Return the counterpart of what `data.streams.StreamLoader._next_window` does without it."""
    return _of_feed("next_window")


def mark_sentences() -> Function | None:
    """Return the counterpart of `data.streams.inputs_and_targets`, which takes the arrays of a block."""
    return _of_feed("mark_sentences")


def distinct_ids() -> Function | None:
    """Return the counterpart of `data.word_types.UniqueIndex.unique`, which takes the tables of the index."""
    return _of_feed("distinct_ids")


def types_by_class() -> Function | None:
    """Return the counterpart of `data.word_types.TypeTable.types_of`, which takes the tables."""
    return _of_feed("types_by_class")


def uniform() -> Function | None:
    """Return the function for the draws of NumPy's Philox generators."""
    return _of_feed("uniform")


def keep_first_distinct() -> Function | None:
    """Return the function that picks distinct draws; the plain form is in `training.noise.draw_negatives`."""
    return _of_feed("keep_first_distinct")


def touched_rows() -> Function | None:
    """Return the counterpart of `training.noise.touched_rows`."""
    return _of_feed("touched_rows")


def sort_positions() -> Function | None:
    """Return the counterpart of `training.capacities.sorted_positions`, for flat ids."""
    return _of_feed("sort_positions")


def _of_feed(name: str) -> Function | None:
    """Return a compiled loop over integers in host memory, whatever device trains."""
    if _setting == "off":
        return None
    from elmo_ray.kernels.cpu import feed
    from elmo_ray.kernels.cpu.loops import has_compiler

    return getattr(feed, name) if has_compiler() else None


def _on_cpu(x: Tensor) -> bool:
    if _setting == "off" or _environment == "gpu" or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    from elmo_ray.kernels.cpu.loops import has_compiler

    return has_compiler()


def _on_gpu(x: Tensor) -> bool:
    return (
        _setting == "auto"
        and (x.device.type == "cuda" or _environment == "gpu")
        and x.dtype == torch.float32
        and importlib.util.find_spec("triton") is not None
    )
