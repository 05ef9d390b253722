"""How kernels for a CPU are compiled by Numba, and the arithmetic that they share.

PyTorch computes an LSTM's gates in some twenty operations, each of which reads and writes all of its numbers and asks
for Python's lock; a compiled loop does neither. Loops work on float32, and on bfloat16 as uint16, since NumPy lacks it.
Each loop over a row is a function of its own: only there does the compiler see that arrays can be told apart. Arrays of
one call must not overlap, or the loop is slow.

Numba's own cache of compiled functions lets errors through: a full disk, or a file that a crash left empty, ends the
run. It also numbers its files in the order of their making, so that processes of two precisions that start at once may
take the same number, and one is given the other's code later. `keep_compiled` is a cache that can only lose time.
"""

from __future__ import annotations

import logging
import math
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

try:
    from numba.core.caching import FunctionCache, IndexDataCacheFile
except ImportError:  # insides of Numba, which it may change: nothing is kept then
    FunctionCache = IndexDataCacheFile = object  # type: ignore[assignment,misc]

logger = logging.getLogger(__name__)


def keep_compiled(function: Any) -> None:
    """Keep what Numba compiles for this function for other processes, where that is possible.

    function: made by `numba.njit` without a cache.
    """
    try:
        function._cache = _Cache(function.py_func)
    except Exception as error:  # no folder to write to, or a Numba that is made differently
        logger.debug("compiled functions are not kept: %s", error)


class _File(IndexDataCacheFile):
    """Names a file by what is in it, and has none that cannot be read."""

    def save(self, key: Any, data: Any) -> None:
        found = self._load_index()
        found[key] = self._data_name(zlib.crc32(repr((key, self._source_stamp)).encode()))
        self._save_data(found[key], data)
        self._save_index(found)

    def _load_index(self) -> dict[Any, str]:
        try:
            found: dict[Any, str] = super()._load_index()
        except Exception as error:
            logger.debug("a cache of compiled functions is not readable: %s", error)
            return {}
        return found


class _Cache(FunctionCache):
    def __init__(self, function: Any):
        super().__init__(function)
        # what the functions of several modules call is compiled into them: when it changes they do
        shared = Path(__file__).stat()
        stamp = (self._impl.locator.get_source_stamp(), shared.st_mtime, shared.st_size)
        self._cache_file = _File(self._cache_path, self._impl.filename_base, stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:
            logger.debug("compiled anew: %s", error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            logger.debug("compiled functions are not kept: %s", error)


logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])

try:
    import numba
    from numba.extending import overload
except ImportError:  # a Python that it does not know yet
    numba = None  # type: ignore[assignment]
else:
    if getattr(numba.config, "DISABLE_JIT", 0):  # NUMBA_DISABLE_JIT=1
        numba = None  # type: ignore[assignment]

_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract"},  # multiply and add in one instruction; NaN and infinity stay what they are
}

float32 = np.float32
"""Type for constants in kernels: a Python float would promote the loop to float64."""
_LOG2_E, _LN2_HIGH, _LN2_LOW = float32(math.log2(math.e)), float32(0.693359375), float32(-2.12194440e-4)
_EXPONENT = np.int32(127)
_TO_INTEGER = float32(1.5 * 2**23)
"""Added to a small float32 and taken off again it leaves the nearest integer."""
LARGEST = float32(80.0)

_to_warn = threading.Lock()
"""Lock that the thread which warns takes and never gives back."""


def has_compiler() -> bool:
    """Return whether Numba is there; where it is not, one warning says that training is slower."""
    if numba is None and _to_warn.acquire(blocking=False):
        logger.warning("no Numba here, or NUMBA_DISABLE_JIT is set: training on the CPU is slower")
    return numba is not None


def numba_version() -> str | None:
    """Return the version of Numba; None where there is none."""
    return None if numba is None else str(numba.__version__)


def as_array(tensor: Tensor) -> NDArray[Any]:
    """Return the tensor's memory without a copy; bfloat16 comes as uint16."""
    tensor = tensor.detach() if tensor.requires_grad else tensor
    array: NDArray[Any] = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


def bound_of(clip: float | None) -> np.float32:
    """Return a clip's bound, or infinity where there is none."""
    return float32(math.inf if clip is None else clip)


def compiled_with(**options: Any) -> Callable[[Function], Function]:
    """Return `compiled` with other options of Numba's."""

    def compiled(function: Function) -> Function:
        if numba is None:
            return function
        result: Function = numba.njit(**{**_OPTIONS, **options})(function)  # type: ignore[assignment]
        keep_compiled(result)
        return result

    return compiled


compiled = compiled_with()
"""Decorates a function that Numba compiles when it is first called, or finds compiled."""


def wide(x: Any) -> Any:
    """Return a number as float32."""
    raise NotImplementedError("for compiled code")


def stored(x: Any, like: Any) -> Any:
    """Return a float32 in the type of `like`."""
    raise NotImplementedError("for compiled code")


if numba is not None:

    @overload(wide)
    def _wide_of(x):  # type: ignore[no-untyped-def]
        if x == numba.uint16:
            return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
        return lambda x: x

    @overload(stored)
    def _stored_of(x, like):  # type: ignore[no-untyped-def]
        if like == numba.uint16:
            return lambda x, like: _rounded(x)
        return lambda x, like: x


@compiled
def _rounded(x: Any) -> Any:
    """Round to the nearest bfloat16, ties to even."""
    bits = np.float32(x).view(np.uint32)
    bits = np.uint32(bits + np.uint32(0x7FFF) + np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1)))
    bits = np.uint32(bits >> np.uint32(16))
    return np.uint16(bits) if x == x else np.uint16(0x7FC0)


@compiled
def limited(x: Any, bound: Any) -> Any:
    """Limit x to [-bound, bound]; NaN stays NaN."""
    x = bound if x > bound else x
    return -bound if x < -bound else x


@compiled
def exp(x: Any) -> Any:
    """Return exp(x) to one unit of the last place, for x between -80 and 80 (Cephes' polynomial)."""
    x = limited(x, LARGEST)
    n = (x * _LOG2_E + _TO_INTEGER) - _TO_INTEGER
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = float32(1.9875691500e-4)
    p = p * r + float32(1.3981999507e-3)
    p = p * r + float32(8.3334519073e-3)
    p = p * r + float32(4.1665795894e-2)
    p = p * r + float32(1.6666665459e-1)
    p = p * r + float32(5.0000001201e-1)
    p = p * (r * r) + r + float32(1.0)
    return p * np.int32((np.int32(n) + _EXPONENT) << np.int32(23)).view(np.float32)


@compiled
def sigmoid(x: Any) -> Any:
    return float32(1.0) / (float32(1.0) + exp(-x))


@compiled
def tanh(x: Any) -> Any:
    return float32(2.0) / (float32(1.0) + exp(float32(-2.0) * x)) - float32(1.0)
