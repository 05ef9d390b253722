"""Two processes with gloo and without Ray: what they tell each other, and that they train as one does."""

from __future__ import annotations

import datetime
import json
import math
import re
import shutil
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from helpers.tiny_runs import (
    WORDS_TIED,
    WORDS_UNTIED,
    Stopper,
    everything,
    newest,
    plan_of,
    progress_of,
    records,
    tiny_config,
    worker_of,
    write_corpus,
)

from elmo_ray.data.streams import StreamCursors
from elmo_ray.errors import ConfigError, DataError
from elmo_ray.training import loop
from elmo_ray.training.loop import train
from elmo_ray.training.plan import TrainPlan
from elmo_ray.training.ranks import Exchange, Flags, Ranks

pytestmark = pytest.mark.slow

WORLD = 2
DEADLINE_S = 300
EXACT = {"train__precision": "fp64", "train__dropout": 0.0, "data__streams": 5, "train__duration": "2 epochs"}
RUNS: dict[str, dict[str, Any]] = {
    "characters": {**EXACT, "data__valid": "unused.txt", "train__validate_every": "20 steps"},
    "words": {**EXACT, **WORDS_UNTIED, "optim__clip_norm": 0.5},
    "accumulated": {**EXACT, "train__accumulate": 2},
    "tied": {**EXACT, **WORDS_TIED, "train__reset": "block"},
    "full": {**EXACT, "softmax__kind": "full", "softmax__negatives": None, "optim__name": "adamw", "optim__lr": 0.003},
    "forward": {**EXACT, "model__bidirectional": False, "data__streams": 2},
    "parts": {
        **EXACT,
        "train__softmax_first": 7,
        "train__freeze": ["lstm.0", "char_embedding"],
        "optim__part_lr": {"softmax": 0.4, "lstm": [None, 0.1]},
    },
    "patience": {
        **EXACT,
        "data__valid": "unused.txt",
        "train__validate_every": "2 steps",
        "train__patience": 2,
        "optim__lr": 0.7,
    },
}
ELASTIC: dict[str, dict[str, Any]] = {
    f"elastic {precision}": {
        "train__precision": precision,
        "train__dropout": 0.0,
        "train__duration": "30 steps",
        "train__log_every": 1,
        "data__streams": 5,
        "data__valid": "unused.txt",
        "train__validate_every": "15 steps",
    }
    for precision in ("fp64", "fp32")
}
PHASES = {
    "train__dropout": 0.3,
    "data__streams": 5,
    "train__duration": "30 steps",
    "train__softmax_first": 12,
    "train__freeze": ["highway"],
}
NOISY = {"train__dropout": 0.3, "data__streams": 5, "train__duration": "30 steps"}


def plan(folder: Path, name: str, run: str, changes: dict[str, Any], text: str = "text") -> TrainPlan:
    corpus = (folder / text / "corpus.npz", folder / text / "vocab.txt")
    config = tiny_config(**changes)
    return plan_of(
        folder / run / name, config, corpus, folder / "held-out" / "corpus.npz" if config.data.valid else None
    )


# ---------------------------------------------------------------- in the processes


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    loop.LAST_SAVE_PAUSES_S = (0.1, 0.1)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timeout)
    results: dict[str, Any] = {}

    def note(name: str, what: Callable[[], Any]) -> None:
        try:
            results[name] = what()
        except Exception as error:
            results[name] = {"raised": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
        (folder / f"results-{rank}.json").write_text(json.dumps(results))

    note("ranks", lambda: ranks_of(rank))
    note("exchange", lambda: exchange_of(rank))
    note("agree", lambda: Ranks(rank, WORLD).agree(ConfigError("one of two") if rank == 1 else None))
    note("other noise", lambda: gather(rank, noise=rank))
    note("error of one", lambda: gather(rank, error=DataError("bad line") if rank == 1 else None))
    for name, changes in RUNS.items():
        note(name, partial(run, rank, plan(folder, name, "two", changes)))
    note("noisy", lambda: run(rank, plan(folder, "noisy", "two", NOISY)))
    for attempt in (1, 2):  # only the second worker is asked
        stopper = Stopper(7 if rank == 1 else None)
        note(f"stopped {attempt}", partial(run, rank, plan(folder, "stopped", "two", NOISY), stopper))
    note("resumed", lambda: run(rank, plan(folder, "stopped", "two", NOISY)))
    note("phases", lambda: run(rank, plan(folder, "phases", "two", PHASES)))
    for attempt, looks in ((1, 5), (2, 6), (3, 9)):
        note(f"phases {attempt}", partial(run, rank, plan(folder, "phased", "two", PHASES), Stopper(looks)))
    note("phases resumed", lambda: run(rank, plan(folder, "phased", "two", PHASES)))
    note("exact stopped", lambda: run(rank, plan(folder, "exact", "two", EXACT), Stopper(9 if rank == 0 else None)))
    for name, changes in ELASTIC.items():
        note(f"{name} unbroken", partial(run, rank, plan(folder, f"{name}-unbroken", "two", changes)))
        changing = plan(folder, name, "two", changes)
        note(f"{name} of two", partial(run, rank, changing, Stopper(9 if rank == 0 else None)))
        if rank == 0:
            note(f"{name} of one", lambda: train(changing, worker_of(changing, stop=Stopper(10))))  # noqa: B023
        dist.barrier()
        note(f"{name} of two again", partial(run, rank, changing))
    broken = {"data__shuffle": "off", "data__streams": 2}
    note("bad text of one", lambda: run(rank, plan(folder, "broken", "two", broken, "broken")))
    note("not finite", lambda: run(rank, plan(folder, "not-finite", "two", {"optim__lr": 1e30})))
    # the second worker's folder of checkpoints is a file
    blocked = plan(folder, "blocked", f"rank-{rank}", {"train__checkpoint_every": "8 steps"})
    if rank == 1:
        Path(blocked.run_dir).mkdir(parents=True)
        (Path(blocked.run_dir) / "checkpoints").write_text("in the way")
    note("unwritable by one", lambda: run(rank, blocked))
    note("one does not come", lambda: late(rank))
    note("one works long", lambda: Ranks(rank, WORLD, timeout_s=3).run_on_rank_zero(lambda: time.sleep(5) or "done"))
    note("negatives", lambda: run(rank, plan(folder, "negatives", "two", {"softmax__negatives": 9999})))
    dist.destroy_process_group()


def run(rank: int, plan: TrainPlan, stop: Stopper | None = None) -> dict[str, Any]:
    return train(plan, worker_of(plan, rank, WORLD, stop))


def ranks_of(rank: int) -> list[Any]:
    ranks = Ranks(rank, WORLD)
    total = ranks.sum(torch.tensor([1.0 + rank, 10.0]))
    return [ranks.broadcast("first" if rank == 0 else None), ranks.gather(f"r{rank}"), total.tolist()]


def gather(rank: int, noise: int = 5, error: DataError | None = None) -> Any:
    found = Exchange(Ranks(rank, WORLD)).gather(np.arange(rank + 1), 3, 2, noise, Flags(), error)
    return found.ids.tolist()


def late(rank: int) -> Any:
    """Rank 1 is at step 5 when rank 0 waits for it in step 7."""
    ranks = Ranks(rank, WORLD, timeout_s=3)
    if rank == 1:
        ranks._beat = -math.inf
        ranks.heartbeat(5)
        time.sleep(5)
        return "awake"
    time.sleep(0.5)
    return Exchange(ranks).gather(np.zeros(0, np.int64), 1, 0, 0, Flags(), step=7).positions


def exchange_of(rank: int) -> list[Any]:
    exchange = Exchange(Ranks(rank, WORLD))
    seen = []
    for step in range(3):
        ids = np.array([10 * rank + step, -1, 7])
        found = exchange.gather(ids, 4, 3 + rank, 1234 + step, Flags(rank == 1 and step == 2, [rank - step]))
        seen.append([found.ids.tolist(), found.positions, found.flags.stop, found.flags.rank_files])
    return seen


# ---------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the two processes do, done once."""
    folder = tmp_path_factory.mktemp("two")
    write_corpus(folder / "text", [40, 0, 30])
    write_corpus(folder / "held-out", [15], seed=50)
    write_corpus(folder / "broken", [40, 40])
    shard = folder / "broken" / "shard-1.txt"
    shard.write_text(shard.read_text(encoding="utf-8").replace(" ", "\n", 30), encoding="utf-8")
    context = torch.multiprocessing.spawn(rank_main, args=(folder,), nprocs=WORLD, join=False)  # type: ignore
    deadline = time.monotonic() + DEADLINE_S
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"still running after {DEADLINE_S} s: {sorted(results(folder)[0])} are done")
    return folder


def results(folder: Path) -> list[dict[str, Any]]:
    paths = [folder / f"results-{rank}.json" for rank in range(WORLD)]
    return [json.loads(path.read_text()) if path.exists() else {} for path in paths]


def test_ranks(folder: Path) -> None:
    for found in results(folder):
        assert found["ranks"] == ["first", ["r0", "r1"], [3.0, 20.0]]
        assert found["agree"]["raised"] == "ConfigError" and found["agree"]["message"] == "one of two"


def test_the_exchange(folder: Path) -> None:
    expected = [[[[s, -1, 7, -1], [10 + s, -1, 7, -1]], 7, s == 2, [-s, 1 - s]] for s in range(3)]
    for found in results(folder):
        assert found["exchange"] == expected
        assert found["other noise"]["raised"] == "RuntimeError" and "negatives" in found["other noise"]["message"]
        assert found["error of one"]["raised"] == "DataError" and found["error of one"]["message"] == "bad line"


@pytest.mark.parametrize("name", RUNS)
def test_two_train_as_one(folder: Path, name: str) -> None:
    mine = plan(folder, name, "one", RUNS[name])
    expected = train(mine, worker_of(mine))
    for found in results(folder):
        assert "raised" not in found[name], found[name].get("trace")
        assert found[name]["steps"] == expected["steps"] and found[name]["positions"] == expected["positions"]
    one, two = newest(folder / "one" / name), newest(folder / "two" / name)
    assert one.manifest["world"] == 1 and two.manifest["world"] == WORLD
    ours, theirs = everything(two), everything(one)
    assert sorted(ours) == sorted(theirs)
    for key, tensor in theirs.items():
        if key == "streams/window_sums":
            continue
        if tensor.dtype == torch.int64:
            assert torch.equal(ours[key], tensor), f"{key}: another batch"
        else:
            assert float((ours[key] - tensor).abs().max()) <= 1e-9 * max(1.0, float(tensor.abs().max())), key
    first, second = records(folder / "two" / name), records(folder / "one" / name)
    assert [(r["kind"], r["step"]) for r in first] == [(r["kind"], r["step"]) for r in second] and first
    for a, b in zip(first, second, strict=True):
        for key, value in b.items():
            assert a[key] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), key


def same_bits(a: Path, b: Path) -> None:
    ours, theirs = everything(newest(a)), everything(newest(b))
    assert sorted(ours) == sorted(theirs)
    assert not [key for key, tensor in theirs.items() if not torch.equal(ours[key], tensor)]
    assert progress_of(newest(a)) == progress_of(newest(b))
    assert records(a) == records(b)


def test_one_who_is_asked_stops_both_and_they_go_on_bit_for_bit(folder: Path) -> None:
    for attempt in (1, 2):
        first, second = (found[f"stopped {attempt}"] for found in results(folder))
        assert first.get("stopped") and second.get("stopped"), first.get("trace")
        assert first["steps"] == second["steps"] < 30
    assert all(found["resumed"]["finished"] for found in results(folder))
    same_bits(folder / "two" / "stopped", folder / "two" / "noisy")


def test_frozen_parts_that_begin_to_train_do_so_bit_for_bit_after_any_stop(folder: Path) -> None:
    steps = [results(folder)[0][f"phases {attempt}"]["steps"] for attempt in (1, 2, 3)]
    assert 0 < steps[0] < 12 < steps[2] < 30, "stopped before and after the other parts begin"
    assert all(found["phases resumed"]["finished"] for found in results(folder))
    same_bits(folder / "two" / "phased", folder / "two" / "phases")


def test_one_goes_on_where_two_have_stopped(folder: Path) -> None:
    stopped = results(folder)[0]["exact stopped"]
    assert stopped["stopped"], stopped.get("trace")
    shutil.copytree(folder / "two" / "exact", folder / "one" / "exact")
    mine = plan(folder, "exact", "one", EXACT)
    assert train(mine, worker_of(mine))["finished"]
    whole = plan(folder, "whole", "one", EXACT)
    train(whole, worker_of(whole))
    ours, theirs = everything(newest(folder / "one" / "exact")), everything(newest(folder / "one" / "whole"))
    for key, tensor in theirs.items():
        assert torch.allclose(ours[key], tensor, rtol=1e-9, atol=1e-9), key
    losses = [[r["loss"] for r in records(folder / "one" / name)] for name in ("exact", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_who_waits_for_whom_is_said(folder: Path) -> None:
    waiting, awake = (found["one does not come"] for found in results(folder))
    assert awake == "awake"
    assert waiting["raised"] == "RankTimeout"
    assert re.match(
        r"worker 0, step 7: waited \d s for the others in the exchange of target words; furthest behind: worker 1 was "
        r"at step 5 \d s ago; cluster.timeout_s=3 is the limit",
        waiting["message"],
    )
    assert [found["one works long"] for found in results(folder)] == ["done", "done"], "longer than the limit, and well"


@pytest.mark.parametrize(("name", "tolerance"), list(zip(ELASTIC, (1e-9, 1e-5), strict=True)))
def test_two_then_one_then_two(folder: Path, name: str, tolerance: float) -> None:
    found = results(folder)[0]
    steps = [found[f"{name} of {who}"]["steps"] for who in ("two", "one", "two again")]
    assert 0 < steps[0] < steps[1] < steps[2] == 30, found
    changing, unbroken = newest(folder / "two" / name), newest(folder / "two" / f"{name}-unbroken")
    ours, theirs = (checkpoint.stream_tensors(0, 5) for checkpoint in (changing, unbroken))
    for key in StreamCursors.start(0).arrays():
        assert torch.equal(ours[key], theirs[key]), f"{key}: other batches"
    first, second = records(folder / "two" / name), records(folder / "two" / f"{name}-unbroken")
    assert len(first) == len(second) == 30 + 2
    for a, b in zip(first, second, strict=True):
        assert (a["kind"], a["step"], a["positions"]) == (b["kind"], b["step"], b["positions"])
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance), a["step"]


def test_an_error_of_one_is_an_error_of_both(folder: Path) -> None:
    for found in results(folder):
        assert found["bad text of one"]["raised"] == "DataError"
        assert "shard-1.txt" in found["bad text of one"]["message"]
        assert found["negatives"]["raised"] == "ConfigError"
        assert found["not finite"]["raised"] == "TrainingError"
        assert found["unwritable by one"]["raised"] == "TrainingError"
        assert "checkpoint" in found["unwritable by one"]["message"]
    assert not list((folder / "rank-0" / "blocked" / "checkpoints").iterdir()), "half a checkpoint is removed"
    first, second = (found["not finite"]["message"] for found in results(folder))
    assert first == second
