"""Sums in memory that workers share: three processes, pieces smaller than what is added up, and memory that is not
there."""

from __future__ import annotations

import datetime
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from elmo_ray.training import shared_sums as module
from elmo_ray.training.shared_sums import shared_sums

WORLD = 3
SHAPES = ((40, 7), (3,), (), (0, 5), (2, 3, 4), (1000,))
DTYPES = (torch.float32, torch.float64)
ROUNDS = 5


def tensors(rank: int, turn: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * turn + rank)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timeout)
    module._PIECE_BYTES = 1 << 10
    results: dict[str, Any] = {}
    try:
        module.FOLDER = folder / "memory"
        sums = shared_sums(rank, WORLD)
        assert sums is not None
        for dtype in DTYPES:
            for turn in range(ROUNDS):
                mine = tensors(rank, turn, dtype)
                if turn == rank:
                    time.sleep(0.2)  # another one is late each time
                sums.add(mine)
                results[f"{dtype} {turn}"] = mine
        sums.add([])
        module.FOLDER = folder / ("memory" if rank else "nowhere")
        results["the first has no memory"] = shared_sums(rank, WORLD) is None
        module.FOLDER = folder / "memory"
        module._PART = 1 << 60
        results["little space"] = shared_sums(rank, WORLD) is None
        module._PART = 1
        if rank == 2:
            module._mapped = lambda *_: (_ for _ in ()).throw(OSError("another machine"))  # type: ignore[assignment]
        results["the last has no memory"] = shared_sums(rank, WORLD) is None
        dist.barrier()
        results["left then"] = [path.name for path in module.FOLDER.iterdir()]
    except Exception:
        results["raised"] = traceback.format_exc()
    torch.save(results, folder / f"results-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sums")
    (folder / "memory").mkdir()
    torch.multiprocessing.spawn(rank_main, args=(folder,), nprocs=WORLD)  # type: ignore[attr-defined]
    results = [torch.load(folder / f"results-{rank}.pt") for rank in range(WORLD)]
    assert not [each["raised"] for each in results if "raised" in each], results
    return results


def test_all_have_the_sum_with_the_same_bits(found: list[dict[str, Any]]) -> None:
    for dtype in DTYPES:
        for turn in range(ROUNDS):
            first, second, third = (tensors(rank, turn, dtype) for rank in range(WORLD))
            for of_rank in found:
                for a, b, c, total in zip(first, second, third, of_rank[f"{dtype} {turn}"], strict=True):
                    assert torch.equal(total, (a + b) + c)


def test_messages_serve_all_where_one_has_no_memory(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        assert of_rank["the first has no memory"] and of_rank["the last has no memory"] and of_rank["little space"]


def test_no_file_is_left(found: list[dict[str, Any]]) -> None:
    assert found[0]["left then"] == [], "what another rank saw may be that before rank 0 removed it"


@pytest.mark.parametrize("world", [1, 9])
def test_one_or_very_many_workers_share_nothing(world: int) -> None:
    assert shared_sums(0, world) is None
