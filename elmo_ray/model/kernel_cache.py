"""Numba's cache of compiled functions, made so that it can fail and nothing is lost but the seconds of compiling.

Numba's own lets errors through: a full disk or a file that a crash left empty ends the run, and the latter every run
that follows. It also numbers files as they come: processes of two precisions, or on two kinds of CPUs with one home
directory, that start at once may take the same number, and one is given what was compiled for the other later.
"""

from __future__ import annotations

import logging
import zlib
from pathlib import Path
from typing import Any

try:
    from numba.core.caching import FunctionCache, IndexDataCacheFile
except ImportError:  # insides of Numba, which it may change: nothing is kept then
    FunctionCache = IndexDataCacheFile = object  # type: ignore[assignment,misc]

logger = logging.getLogger(__name__)


def keep_compiled(function: Any) -> None:
    """What Numba compiles for this function, of `numba.njit` without a cache, is kept for other processes, if it can
    be."""
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
        shared = Path(__file__).with_name("cpu_kernels.py").stat()
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
