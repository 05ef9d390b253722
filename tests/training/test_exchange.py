"""The exchange of one process with itself; several processes are in test_two_workers.py."""

from __future__ import annotations

import numpy as np
import pytest

from elmo_ray.errors import ConfigError
from elmo_ray.training.ranks import Exchange, Flags, Ranks


def test_one_process_gathers_its_own() -> None:
    found = Exchange().gather(np.array([5, 3, -1, 3]), 6, 2, 77, Flags(True, [4]))
    assert found.ids.tolist() == [[5, 3, -1, 3]], "one worker needs no padding"
    assert found.positions == 2 and found.flags == Flags(True, [4])
    assert Exchange().gather(np.zeros(0, np.int64), 0, 0, 0, Flags()).flags == Flags(False, [0])


def test_its_own_error_is_raised_as_it_is() -> None:
    with pytest.raises(ConfigError, match="mine"):
        Exchange().gather(np.zeros(0, np.int64), 3, 0, 0, Flags(), ConfigError("mine"))


def test_parts_of_a_save() -> None:
    assert Flags(rank_files=[3, 3]).all_written(3) and Flags(rank_files=[3, 3]).all_ended(3)
    assert Flags(rank_files=[3, -3]).all_ended(3) and not Flags(rank_files=[3, -3]).all_written(3)
    for parts in ([3, 0], [3, 2], [-2, 3], []):
        assert not Flags(rank_files=parts).all_ended(3) and not Flags(rank_files=parts).all_written(3)
    assert not Flags(rank_files=[2, 2]).all_ended(3), "an earlier save"


def test_one_rank_agrees_with_itself() -> None:
    ranks = Ranks()
    assert ranks.gather({"a": 1}) == [{"a": 1}] and ranks.broadcast("x") == "x"
    ranks.agree(None)
    with pytest.raises(ConfigError, match="mine"):
        ranks.agree(ConfigError("mine"))
