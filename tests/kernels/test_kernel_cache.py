"""What is compiled is kept, and a cache that cannot be used does no harm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

numba = pytest.importorskip("numba")

from elmo_ray.kernels.cpu.loops import keep_compiled  # noqa: E402


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Makes the same function, as a new process would."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    def make() -> Any:
        @numba.njit
        def twice(x):
            return x + x

        keep_compiled(twice)
        return twice

    return make


def uses(function: Any) -> tuple[int, int]:
    """Of the cache: found, not found."""
    assert function(1) == 2 and function(1.5) == 3.0
    return sum(function.stats.cache_hits.values()), sum(function.stats.cache_misses.values())


def test_what_was_compiled_is_found(made: Callable[[], Any], tmp_path: Path) -> None:
    assert uses(made()) == (0, 2)
    assert uses(made()) == (2, 0)
    assert len(list(tmp_path.rglob("*.nbc"))) == 2 and len(list(tmp_path.rglob("*.nbi"))) == 1


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("content", [b"", b"no pickle", None])
def test_broken_files_are_made_anew(kind: str, content: bytes | None, made: Callable[[], Any], tmp_path: Path) -> None:
    uses(made())
    for path in tmp_path.rglob(f"*.{kind}"):
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
    assert uses(made()) == (0, 2)
    assert uses(made()) == (2, 0)


def test_a_full_disk_is_no_error(made: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    function = made()
    with monkeypatch.context() as patch:
        patch.setattr(function._cache._cache_file, "_save_data", full)
        assert uses(function) == (0, 2)
    assert uses(made()) == (0, 2)


def test_processes_that_start_at_once_do_not_mix_their_results(made: Callable[[], Any]) -> None:
    """Each has read the index before the other wrote it; the last one to write it wins, and its entries are right."""
    one, other = made(), made()
    for function in (one, other):
        function._cache._cache_file._load_index = dict
    assert one(1) == 2 and other(np.float32(1.5)) == 3.0
    again = made()
    assert again(np.float32(1.5)) == 3.0 and again(1) == 2
    assert sum(again.stats.cache_hits.values()) == 1


def test_where_nothing_can_be_kept_it_is_compiled(
    made: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "file" / "no folder"))
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    assert [uses(made()) for _ in range(2)] == [(0, 2)] * 2
