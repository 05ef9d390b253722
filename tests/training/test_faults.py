"""What the loop does when numbers, storage or text fail: no harm to what was good, and the run goes on where it can."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.tiny_runs import (
    everything,
    newest,
    plan_of,
    progress_of,
    records,
    same,
    tiny_config,
    with_valid,
    worker_of,
    write_corpus,
)

from elmo_ray.checkpoints.read import Checkpoint
from elmo_ray.checkpoints.write import commit, write_rank_files
from elmo_ray.errors import DataError, TrainingError
from elmo_ray.training import loop
from elmo_ray.training.loop import train

Paths = tuple[Path, Path]

pytestmark = pytest.mark.usefixtures("one_thread")


def rewritten(checkpoint: Checkpoint, run: Path, **tensors: torch.Tensor) -> None:
    """The same checkpoint in another run, with other parameters."""
    files = {name: checkpoint.tensors(name) for name in checkpoint.files if name.endswith(".safetensors")}
    files["model.safetensors"].update(tensors)
    texts = {name: checkpoint.text(name) for name in checkpoint.files if not name.endswith(".safetensors")}
    folder = run / "checkpoints" / checkpoint.path.name
    write_rank_files(folder, 0, files, texts)
    fields = {k: v for k, v in checkpoint.manifest.items() if k in ("step", "streams", "identity", "device")}
    commit(folder, 1, fields)


def test_not_finite_stops(corpus: Paths, tmp_path: Path) -> None:
    config = tiny_config(optim__lr=1e30, train__checkpoint_every="1 steps")
    plan = plan_of(tmp_path / "run", config, corpus)
    with pytest.raises(TrainingError, match="not finite") as caught:
        train(plan, worker_of(plan))
    assert "\n" not in str(caught.value) and "optim.lr" in str(caught.value)
    good = newest(tmp_path / "run")
    assert f"last good checkpoint: step {good.step}" in str(caught.value)
    assert all(bool(t.isfinite().all()) for t in everything(good).values())


def damaged(corpus: Paths, tmp_path: Path, name: str, value: float) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    """A checkpoint of step 6 whose model has bad values."""
    plan = plan_of(tmp_path / "good", tiny_config(train__duration="6 steps"), corpus)
    train(plan, worker_of(plan))
    good = newest(tmp_path / "good")
    bad = good.tensors("model.safetensors")[name].clone()
    bad.view(-1)[:] = value
    return good, {name: bad}


def test_skipped_steps_change_nothing_until_there_are_too_many(corpus: Paths, tmp_path: Path) -> None:
    good, bad = damaged(corpus, tmp_path, "softmax_weight", torch.nan)
    rewritten(good, tmp_path / "run", **bad)
    before = everything(newest(tmp_path / "run"))
    config = tiny_config(train__duration="10 steps", train__on_nonfinite="skip", train__max_skips=20)
    plan = plan_of(tmp_path / "run", config, corpus)
    result = train(plan, worker_of(plan))
    assert result["finished"]
    after = newest(tmp_path / "run")
    assert after.step == 10 and progress_of(after)["skipped"] == 4
    for name, tensor in everything(after).items():
        if name.startswith("streams/") and name not in ("streams/hidden", "streams/cell"):
            continue
        assert torch.equal(tensor.nan_to_num(5.0), before[name].nan_to_num(5.0)), name
    last = records(tmp_path / "run")[-1]
    assert last["skipped"] == 4 and last["loss"] == 0.0, "a mean over no position"

    rewritten(good, tmp_path / "many", **bad)
    config = tiny_config(train__duration="30 steps", train__on_nonfinite="skip", train__max_skips=3)
    plan = plan_of(tmp_path / "many", config, corpus)
    with pytest.raises(TrainingError, match="max_skips=3"):
        train(plan, worker_of(plan))


def test_a_held_out_perplexity_beyond_numbers_does_not_spoil_checkpoints(
    corpus: Paths, valid: Path, tmp_path: Path
) -> None:
    good, bad = damaged(corpus, tmp_path, "softmax_bias", 0.0)
    bad["softmax_bias"][-1] = 3e4
    rewritten(good, tmp_path / "run", **bad)
    config = tiny_config(**with_valid(train__duration="9 steps", train__validate_every="1 steps"))
    plan = plan_of(tmp_path / "run", config, corpus, valid)
    assert train(plan, worker_of(plan))["finished"]
    assert all(r["perplexity"] is None for r in records(tmp_path / "run") if r["kind"] == "valid")
    longer = plan_of(tmp_path / "run", tiny_config(**with_valid(train__duration="12 steps")), corpus, valid)
    assert train(longer, worker_of(longer))["steps"] == 12
    progress = progress_of(newest(tmp_path / "run"))
    json.dumps(progress, allow_nan=False)


class Blockade:
    """Puts a file where the folder of checkpoints should be, from one look on and up to another."""

    def __init__(self, run: Path, first: int, last: int):
        self.path, self.first, self.last, self.looks = run / "checkpoints", first, last, 0

    def __call__(self) -> bool:
        self.looks += 1
        if self.looks == self.first:
            self.path.write_text("in the way")
        if self.looks == self.last:
            self.path.unlink()
        return False


def test_training_goes_on_while_checkpoints_fail(
    corpus: Paths, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_of(tmp_path / "run", tiny_config(train__checkpoint_every="8 steps"), corpus)
    result = train(plan, worker_of(plan, stop=Blockade(tmp_path / "run", 1, 20)))
    assert result["finished"] and newest(tmp_path / "run").step == 24
    warnings = [r.getMessage() for r in caplog.records if "could not be written" in r.getMessage()]
    assert warnings and "step 8" in warnings[0]
    undisturbed = plan_of(tmp_path / "other", tiny_config(train__checkpoint_every="8 steps"), corpus)
    train(undisturbed, worker_of(undisturbed))
    same(newest(tmp_path / "run"), newest(tmp_path / "other"))


def test_a_run_whose_last_checkpoint_fails_has_failed(
    corpus: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LAST_SAVE_PAUSES_S", (0.1, 0.1))
    plan = plan_of(tmp_path / "run", tiny_config(), corpus)
    with pytest.raises(TrainingError, match="step 24.*checkpoint"):
        train(plan, worker_of(plan, stop=Blockade(tmp_path / "run", 1, 999)))


def test_the_last_checkpoint_waits_for_storage_that_is_away(
    corpus: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loop, "LAST_SAVE_PAUSES_S", (0.1, 3.0))
    plan = plan_of(tmp_path / "run", tiny_config(), corpus)
    blockade = Blockade(tmp_path / "run", 1, 999)

    def come_back() -> None:
        while sum("could not be written" in r.getMessage() for r in caplog.records) < 2:
            time.sleep(0.01)
        blockade.path.unlink()

    thread = threading.Thread(target=come_back)
    thread.start()
    assert train(plan, worker_of(plan, stop=blockade))["finished"]
    thread.join()
    assert newest(tmp_path / "run").step == 24


def test_a_file_that_changed_ends_training_with_its_name(tmp_path: Path) -> None:
    paths = write_corpus(tmp_path / "text", [60, 60])
    plan = plan_of(tmp_path / "run", tiny_config(data__shuffle="off", data__streams=2), paths)
    shard = tmp_path / "text" / "shard-1.txt"
    shard.write_text(shard.read_text(encoding="utf-8").replace(" the ", "\nthe ", 9), encoding="utf-8")
    with pytest.raises(DataError, match="shard-1.txt"):
        train(plan, worker_of(plan))
