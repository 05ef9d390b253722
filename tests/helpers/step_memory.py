"""Counts the memory of a GPU's training step without a GPU: the real step on tensors that have shapes and no memory.

Triton's kernels, which allocate nothing, are left out, and Triton need not be there. To be run as a program with lines
of JSON as its input, each with the values of a configuration, words, windows and rows; it prints bytes for each.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import types
import weakref
from typing import Any

os.environ["ELMO_RAY_KERNELS"] = "gpu"

import torch
import torch._dynamo
import torch.utils._triton
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Absent:
    """What Triton's language gives to the kernels' decorators and defaults."""

    def __getattr__(self, name: str) -> Any:
        return Absent()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else Absent()

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


class AbsentModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent()


class Unlaunched:
    """A kernel whose launch does nothing."""

    def __init__(self, function: Any):
        self.function = function

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def without_triton() -> None:
    for name in ("triton", "triton.language", "triton.language.extra"):
        module = sys.modules[name] = AbsentModule(name)
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
    triton: Any = sys.modules["triton"]
    triton.language = sys.modules["triton.language"]
    triton.jit = lambda function=None, **_: Unlaunched(function) if function else Unlaunched
    triton.cdiv = lambda a, b: -(-a // b)
    triton.next_power_of_2 = lambda n: 1 << (n - 1).bit_length()


class Live(TorchDispatchMode):
    """The bytes of all tensors that live, and the most that there were."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = -(-storage.nbytes() // 512) * 512  # as PyTorch rounds on a GPU
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, key)

    def gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor):
                self.see(each)
        return result


def peak(values: dict[str, Any], n_words: int, words: int, windows: int, rows: int) -> int:
    from elmo_ray import kernels
    from elmo_ray.config import PretrainConfig
    from elmo_ray.kernels.gpu import char_cnn, highway, lstm_window, softmax
    from elmo_ray.model.bilm import BiLM
    from elmo_ray.training.captured_step import captured_by
    from elmo_ray.training.cuda_graphs import play
    from elmo_ray.training.step import TrainStep
    from elmo_ray.training.step_input import StepInput, with_micro_batches

    def product_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        # as on a GPU, where no product in bf16 is made before it
        return a.new_empty(*a.shape[:-1], b.shape[-1], dtype=torch.float32)

    for module in (char_cnn, highway, lstm_window, softmax):
        module.product_float32 = product_float32
    # its table of addresses is small, and tensors have no addresses here
    kernels.dense_adagrad = lambda value: lambda values, slots: lambda *arguments: None
    generator = torch.Generator
    torch.Generator = lambda *_: generator()  # type: ignore[misc, assignment]
    config = PretrainConfig.from_dict(values)
    b, t, k = config.data.streams, config.train.unroll, config.softmax.negatives or 0
    d = 2 if config.model.bidirectional else 1
    live = Live()
    with torch.device("meta"), live:

        def made(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype)

        model = BiLM(config.model, config.softmax, n_words)
        step = TrainStep(config, model, b, total_steps=9, capture=captured_by(play))
        for parameter in model.parameters():
            live.see(parameter)
        characters = config.model.char_cnn.max_characters

        def of_rows(b: int) -> StepInput:
            number, place = torch.float32, torch.int32
            return StepInput(
                0, made(words, characters, dtype=torch.int16), ((words, characters),), made(d, b, t), made(d, b, t),
                made(b), made(b, dtype=torch.bool), b * t, made(rows), made(d, b, t), made(d, b, t, dtype=number),
                made(d, k), made(d, k, dtype=number), None, made(words, dtype=place), windows,
                made(d * b * t, dtype=place), made(words + 1, dtype=place), made(d * b * t, dtype=place),
                made(rows + 1, dtype=place),
            )  # fmt: skip

        batch, count = of_rows(b), config.train.accumulate
        if count > 1:
            share = b // count
            batch.micro_batches = tuple((range(i * share, (i + 1) * share), of_rows(share)) for i in range(count))
        batch = with_micro_batches(batch, 1) if count == 1 else batch
        batch = batch.unpacked(made(batch.packed_size, dtype=torch.uint8))
        for _ in range(3):
            step.run(batch)
    return live.peak


if __name__ == "__main__":
    without_triton()
    for line in sys.stdin:
        print(peak(**json.loads(line)), flush=True)
