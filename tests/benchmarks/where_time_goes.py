"""Which parts of a training step take a device's time, and how few operations it could do with. Not a benchmark itself.

Kernels are assigned to parts by what asked for them: ranges around the char CNN, the layers and the optimizer, and for
backward the operation that a gradient belongs to. On a CPU it is the operations' own time, and what the directions do
in threads of their own is seen from outside only: layers and softmax are one part there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from elmo_ray.config import PretrainConfig
from elmo_ray.training.step import TrainStep
from elmo_ray.training.step_input import StepInput

PARTS = ("recurrent products", "gates", "CNN", "softmax", "optimizer", "rest")

PEAKS = {"H100 PCIe": (756e12, 51e12), "H100": (989e12, 67e12), "H200": (989e12, 67e12), "A100": (312e12, 19.5e12)}
"""FLOP/s of dense products by NVIDIA's data sheets: bf16, and float32 outside of the tensor cores, which is how
PyTorch multiplies float32 unless TF32 is allowed (nothing here allows it)."""

_PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "mkldnn::_linear_pointwise")


def flops_of(config: PretrainConfig, batch: StepInput) -> float:
    """Of the products of a step, forward and twice that for backward; padding is not counted."""
    model, lstm, cnn = config.model, config.model.lstm, config.model.char_cnn
    positions = batch.inputs.numel()
    width, cells = lstm.projection_dim, lstm.dim
    of_layers = 2.0 * positions * lstm.n_layers * (2 * width * 4 * cells + cells * width)
    filters = sum(count for _, count in cnn.filters)
    of_words = 0.0
    for words, columns in batch.type_classes if model.input == "characters" else ():
        windows = sum((columns - w + 1) * w * count for w, count in cnn.filters)
        highways = cnn.n_highway * 2 * filters * filters
        of_words += 2.0 * words * (windows * cnn.embedding_dim + highways + filters * width)
    negatives = config.softmax.negatives
    of_softmax = 2.0 * positions * (negatives + 1) * width
    return 3.0 * (of_layers + of_words + of_softmax)


def peak_of(name: str, precision: str) -> float | None:
    """FLOP/s of a device; None for one that is not known."""
    for known, (bf16, fp32) in PEAKS.items():
        if all(word in name for word in known.split()):
            return bf16 if precision == "bf16" else fp32
    return None


def milliseconds_of_parts(step: TrainStep, run: Callable[[], None], steps: int) -> dict[str, float]:
    """Of the kernels of a step, by part; `run` does so many steps. Without a graph, whose kernels nobody asks for."""
    on_gpu = step.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with _ranges(step), profile(activities=activities) as profiled:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    events = list(profiled.events() or ())
    of_cnn = {e.sequence_nr for e in events if e.sequence_nr >= 0 and "range CNN" in _chain(e)}
    totals = dict.fromkeys(PARTS, 0.0)
    for event in events:
        time = sum(kernel.duration for kernel in event.kernels) if on_gpu else event.self_cpu_time_total
        if time:
            totals[_part(event, of_cnn)] += time / 1e3 / steps
    if not on_gpu:
        totals["layers and softmax"] = sum(totals.pop(part) for part in ("recurrent products", "gates", "softmax"))
    return {part: round(total, 3) for part, total in totals.items()}


@contextlib.contextmanager
def _ranges(step: TrainStep) -> Iterator[None]:
    def within(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with record_function(f"range {name}"):
                return function(*args, **kwargs)

        return wrapped

    optimizer, model, captured = step.optimizer, step.model, step.captured
    step.captured = None
    try:
        with (
            mock.patch.object(optimizer, "apply", within("optimizer", optimizer.apply)),
            mock.patch.object(model, "encode_types", within("CNN", model.encode_types)),
        ):
            yield
    finally:
        step.captured = captured


def _chain(event: Any) -> list[str]:
    """The names of the event and of all that it is part of."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def _part(event: Any, of_cnn: set[int]) -> str:
    names = _chain(event)
    text = " ".join(names)
    if "range optimizer" in names:
        return "optimizer"
    if "_Window" in text:
        return "recurrent products" if any(name in _PRODUCTS for name in names) else "gates"
    if "_SampledLosses" in text:
        return "softmax"
    if "range CNN" in names:
        return "CNN"
    while event is not None:
        if event.name.startswith("autograd::engine::evaluate_function") and event.sequence_nr in of_cnn:
            return "CNN"
        event = event.cpu_parent
    return "rest"
