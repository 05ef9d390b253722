"""The training loop without Ray, one worker: it learns, goes on bit for bit after a stop, and keeps what it should."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from helpers.tiny_runs import (
    WORDS_TIED,
    WORDS_UNTIED,
    Stopper,
    checkpoints,
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

from elmo_ray.checkpoints.read import Checkpoint, open_checkpoint
from elmo_ray.data.corpus import Corpus
from elmo_ray.data.streams import StreamCursors, StreamLoader, StreamPlan
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.elmo.scoring import character_table
from elmo_ray.errors import ConfigError
from elmo_ray.model.bilm import BiLM
from elmo_ray.model.lstm import LstmState
from elmo_ray.model.softmax import full_losses
from elmo_ray.training.loop import train
from elmo_ray.training.metrics import read_metrics
from elmo_ray.training.plan import TrainPlan

Paths = tuple[Path, Path]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_it_learns(corpus: Paths, valid: Path, tmp_path: Path) -> None:
    config = tiny_config(**with_valid(train__duration="4 epochs", data__streams=8, train__validate_every="1 epochs"))
    plan = plan_of(tmp_path / "run", config, corpus, valid)
    result = train(plan, worker_of(plan))
    assert result["finished"] and not result["stopped"]
    assert result["positions"] == 4 * Corpus.load(corpus[0]).positions
    found = records(tmp_path / "run")
    training = [r for r in found if r["kind"] == "train"]
    assert training[-1]["loss"] < training[0]["loss"] - 0.5
    assert training[-1]["epoch"] == 4.0 and training[-1]["step"] == result["steps"] == result["total_steps"]
    for record in training:
        assert record["loss"] == pytest.approx((record["loss_forward"] + record["loss_backward"]) / 2)
        assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
        assert record["lr"] == 0.2 and record["grad_norm"] > 0
    held_out = [r for r in found if r["kind"] == "valid"]
    assert len(held_out) == 4
    size = Vocabulary.read(corpus[1]).size
    assert held_out[-1]["perplexity"] < size / 2 < size
    assert held_out[-1]["positions"] == Corpus.load(valid).positions
    assert result["best_perplexity"] == min(r["perplexity"] for r in held_out)
    everything_read = newest(tmp_path / "run").stream_tensors(0, 8)
    assert everything_read["audit_positions"].sum() == result["positions"]
    assert (everything_read["epoch"] == 4).all() and not everything_read["offset"].any()


VARIANTS: dict[str, dict[str, Any]] = {
    "characters, adagrad": with_valid(train__dropout=0.2),
    "characters, adamw, cosine": {
        "optim__name": "adamw",
        "optim__lr": 0.003,
        "optim__weight_decay": 0.01,
        "train__dropout": 0.2,
        "optim__schedule": {"kind": "cosine", "warmup_steps": 5, "final_ratio": 0.1},
        "train__reset": "block",
    },
    "characters, forward only, full, linear": {
        "model__bidirectional": False,
        "softmax__kind": "full",
        "softmax__negatives": None,
        "train__dropout": 0.1,
        "optim__schedule": {"kind": "linear"},
        "train__reset": "never",
    },
    "words, bf16": {**WORDS_UNTIED, "train__precision": "bf16", "train__dropout": 0.1},
    "features into the LSTM, sgd, plateau, dropout by place": with_valid(
        model__char_cnn={
            "filters": [[1, 4], [2, 4]],
            "embedding_dim": 4,
            "max_characters": 16,
            "n_highway": 1,
            "projection": False,
        },
        model__lstm={"dim": 6, "projection_dim": 6},
        softmax__kind="full",
        softmax__negatives=None,
        optim__name="sgd",
        optim__momentum=0.5,
        optim__schedule={"kind": "plateau", "factor": 0.5, "min_gain": 3.0, "patience": 2},
        train__validate_every="2 steps",
        train__dropout=[0.0, 0.3, 0.2],
    ),
    "words, tied, adamw": {**WORDS_TIED, "optim__name": "adamw", "optim__lr": 0.01, "train__dropout": 0.1},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_stopped_run_goes_on_bit_for_bit(corpus: Paths, valid: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny_config(**{"train__checkpoint_every": "10 steps", "train__keep_last": 9, **changes})
    use_valid = valid if config.data.valid else None
    plan = plan_of(tmp_path / "whole", config, corpus, use_valid)
    torch.manual_seed(1)
    result = train(plan, worker_of(plan))
    assert result["steps"] == 24 and result["finished"]
    whole = newest(tmp_path / "whole")
    assert whole.step == 24

    # asked to stop, twice, where it happens to be: in the middle of a window of metrics
    plan = plan_of(tmp_path / "stopped", config, corpus, use_valid)
    for looks, most in ((4, 9), (6, 20)):
        torch.manual_seed(looks)
        result = train(plan, worker_of(plan, stop=Stopper(looks)))
        assert result["stopped"] and not result["finished"] and result["steps"] <= most
        assert newest(tmp_path / "stopped").step == result["steps"], "a stop saves"
    torch.manual_seed(99)
    assert train(plan, worker_of(plan))["finished"]
    same(newest(tmp_path / "stopped"), whole)
    assert records(tmp_path / "stopped") == records(tmp_path / "whole")

    # killed after its checkpoint of step 10
    for path in checkpoints(tmp_path / "whole"):
        if open_checkpoint(path).step < 20:
            shutil.copytree(path, tmp_path / "killed" / "checkpoints" / path.name)
    assert 10 <= newest(tmp_path / "killed").step < 20
    plan = plan_of(tmp_path / "killed", config, corpus, use_valid)
    assert train(plan, worker_of(plan))["finished"]
    same(newest(tmp_path / "killed"), whole)


def test_a_plateau_lowers_the_rates_by_the_validations(corpus: Paths, valid: Path, tmp_path: Path) -> None:
    settings = {"kind": "plateau", "factor": 0.5, "min_gain": 2.0, "patience": 2, "warmup_steps": 2}
    changes = with_valid(optim__schedule=settings, train__validate_every="2 steps", train__log_every=1)
    changes |= {"optim__name": "sgd", "optim__lr": 0.1}
    plan = plan_of(tmp_path / "run", tiny_config(**changes), corpus, valid)
    train(plan, worker_of(plan))
    found = records(tmp_path / "run")
    factor, best, stale, lowered, step = 1.0, math.inf, 0, 0, 0
    for record in found:
        if record["kind"] == "train":
            step = record["step"]
            assert record["lr"] == pytest.approx(0.1 * factor * min(1.0, step / 2)), step
        elif record["kind"] == "valid":
            gained = record["perplexity"] < best - 2.0
            best, stale = (record["perplexity"], 0) if gained else (best, stale + 1)
            if stale == 2:
                factor, stale, lowered = factor / 2, 0, lowered + 1
    assert lowered >= 1 and step == 24
    events = [r["message"] for r in read_metrics(tmp_path / "run") if r["kind"] == "event"]
    assert sum("learning rates are now" in message for message in events) == lowered
    assert progress_of(newest(tmp_path / "run"))["rate_factor"] == factor


def test_a_finished_run_does_nothing_and_a_longer_one_goes_on(corpus: Paths, tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "run", tiny_config(train__duration="8 steps"), corpus)
    first = train(plan, worker_of(plan))
    again = train(plan, worker_of(plan))
    assert again["finished"] and again["steps"] == 8
    assert again["checkpoint"] == first["checkpoint"], "callers export it"
    longer = plan_of(tmp_path / "run", tiny_config(train__duration="14 steps"), corpus)
    assert train(longer, worker_of(longer))["steps"] == 14
    whole = plan_of(tmp_path / "whole", tiny_config(train__duration="14 steps"), corpus)
    train(whole, worker_of(whole))
    ours, theirs = everything(newest(tmp_path / "run")), everything(newest(tmp_path / "whole"))
    assert all(torch.equal(t, theirs[k]) for k, t in ours.items() if k != "streams/window_sums")


def test_checkpoints_kept_and_registered(corpus: Paths, tmp_path: Path) -> None:
    registered: list[tuple[int, str]] = []
    config = tiny_config(train__checkpoint_every="3 steps", train__keep_last=2, train__duration="90 steps")
    plan = plan_of(tmp_path / "run", config, corpus)
    result = train(plan, worker_of(plan, register=lambda step, path, metrics: registered.append((step, path))))
    steps = [step for step, _ in registered]
    assert steps == sorted(set(steps)) and steps[-1] == 90 and len(steps) >= 3
    kept = checkpoints(tmp_path / "run")
    assert [str(path) for path in kept] == [path for _, path in registered[-2:]]
    assert result["checkpoint"] == str(kept[-1])
    assert not list((tmp_path / "run" / "checkpoints").glob("**/*.tmp*"))
    checkpoint = newest(tmp_path / "run")
    assert checkpoint.manifest["streams"] == 4 and checkpoint.manifest["world"] == 1
    assert checkpoint.text("config.yaml") == config.to_yaml()
    assert checkpoint.text("vocab.txt") == corpus[1].read_text(encoding="utf-8")


def held_out_loss(checkpoint: Checkpoint, plan: TrainPlan, valid: Path) -> float:
    """Mean loss of a checkpoint's model on the held-out text, computed anew: one window for each whole stream."""
    config = plan.config
    words = Vocabulary.read(plan.vocabulary_path)
    model = BiLM(config.model, config.softmax, words.size)
    model.load_state_dict(checkpoint.tensors("model.safetensors"))
    corpus = Corpus.load(valid)
    n = max(1, min(config.evaluate.streams, corpus.positions // 200))
    text = StreamPlan(corpus, n, shuffle=False, epochs=1)
    source = worker_of(plan).source
    loader = StreamLoader(text, range(n), StreamCursors.start(n), source, words, 10_000, character_table(model, words))
    batch = loader.next_batch()
    loader.close()
    assert batch.positions == text.positions
    with torch.no_grad():
        top, _ = model(
            torch.from_numpy(batch.types),
            None,
            torch.from_numpy(batch.inputs),
            model.lstm.zero_state(n, torch.zeros(1)),
            torch.from_numpy(batch.lengths),
        )
        assert model.softmax_bias is not None
        losses = full_losses(
            top.flatten(0, 2), model.output_weight, model.softmax_bias, torch.from_numpy(batch.targets).flatten()
        )
    return float(losses.double().sum()) / batch.positions / 2


def test_best_holds_the_weights_that_were_best(corpus: Paths, valid: Path, tmp_path: Path) -> None:
    # learning falls and rises again: the rate is far too high for what comes after the warm-up
    config = tiny_config(
        **with_valid(
            train__duration="40 steps",
            train__validate_every="2 steps",
            optim__lr=3.0,
            train__dropout=0.0,
            optim__schedule={"warmup_steps": 40},
            train__checkpoint_every="3 steps",
            train__keep_last=1,
        )
    )
    plan = plan_of(tmp_path / "run", config, corpus, valid)
    result = train(plan, worker_of(plan))
    held_out = {r["step"]: r["perplexity"] for r in records(tmp_path / "run") if r["kind"] == "valid"}
    assert len(held_out) == 20
    assert result["best_step"] == min(held_out, key=lambda step: held_out[step])
    assert result["best_perplexity"] == held_out[result["best_step"]]
    best = open_checkpoint(tmp_path / "run" / "best")
    assert math.exp(held_out_loss(best, plan, valid)) == pytest.approx(result["best_perplexity"], rel=1e-5)
    assert best.step == result["best_step"]
    assert progress_of(best)["best_step"] == result["best_step"]


def test_validation_disturbs_nothing(corpus: Paths, valid: Path, tmp_path: Path) -> None:
    plans = [
        plan_of(tmp_path / "with", tiny_config(**with_valid(train__dropout=0.2)), corpus, valid),
        plan_of(tmp_path / "without", tiny_config(train__dropout=0.2), corpus),
    ]
    for plan in plans:
        train(plan, worker_of(plan))
    ours, theirs = (everything(newest(Path(plan.run_dir))) for plan in plans)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_validation_reads_no_more_than_asked(corpus: Paths, valid: Path, tmp_path: Path) -> None:
    config = tiny_config(**with_valid(train__validate_positions=100, train__duration="6 steps"))
    plan = plan_of(tmp_path / "run", config, corpus, valid)
    train(plan, worker_of(plan))
    record = [r for r in records(tmp_path / "run") if r["kind"] == "valid"][0]
    assert 100 <= record["positions"] < 100 + 3 * 6


def test_the_streams_of_a_validation_follow_what_it_reads(corpus: Paths, valid: Path, tmp_path: Path) -> None:
    assert 400 <= Corpus.load(valid).positions < 600
    for asked, positions, streams in ((2, 10_000, 2), (1000, 10_000, 2), (1000, 300, 1)):
        changes = {"evaluate__streams": asked, "train__validate_positions": positions, "train__duration": "2 steps"}
        plan = plan_of(tmp_path / f"{asked}-{positions}", tiny_config(**with_valid(**changes)), corpus, valid)
        result = train(plan, worker_of(plan))
        found = read_metrics(plan.run_dir)
        assert [r["streams"] for r in found if r["kind"] == "valid"] == [streams]
        noted = [r for r in found if f"evaluate.streams={asked} becomes {streams}" in r.get("message", "")]
        assert len(noted) == (asked != streams)
        if positions == 10_000:
            expected = held_out_loss(newest(Path(plan.run_dir)), plan, valid)
            assert math.exp(expected) == pytest.approx(result["best_perplexity"], rel=1e-5)


@pytest.mark.parametrize("changes", ["streams", "text", "an older version"])
def test_the_best_is_measured_again_where_a_resumed_run_measures_otherwise(
    corpus: Paths, valid: Path, tmp_path: Path, changes: str
) -> None:
    settings: dict[str, Any] = {"evaluate__streams": 2, "train__dropout": 0.0}
    plan = plan_of(tmp_path / "run", tiny_config(**with_valid(**settings, train__duration="8 steps")), corpus, valid)
    before = train(plan, worker_of(plan))
    other_valid = valid
    if changes == "streams":
        settings["evaluate__streams"] = 1
    if changes == "text":
        other_valid = write_corpus(tmp_path / "other", [50], seed=5)[0]
    if changes == "an older version":
        checkpoint = newest(tmp_path / "run")
        path = Path(checkpoint.at("manifest.json"))
        manifest = json.loads(path.read_text())
        del manifest["validation"]
        path.write_text(json.dumps(manifest))
    config = tiny_config(**with_valid(**settings, train__duration="14 steps", train__validate_every="100 steps"))
    longer = plan_of(tmp_path / "run", config, corpus, other_valid)
    best = open_checkpoint(tmp_path / "run" / "best")
    expected = math.exp(held_out_loss(best, longer, other_valid))
    result = train(longer, worker_of(longer))
    events = [r["message"] for r in read_metrics(tmp_path / "run") if r["kind"] == "event"]
    noted = [message for message in events if "measured in another way" in message]
    if changes in ("streams", "text"):
        assert ("streams 2 -> 1" if changes == "streams" else "another text") in noted[0]
        assert (
            f"of step {best.step}, has perplexity {expected:.2f} in place of {before['best_perplexity']:.2f}"
            in noted[0]
        )
    else:
        assert noted == []
    last = [r["perplexity"] for r in records(tmp_path / "run") if r["kind"] == "valid"][-1]
    assert result["best_perplexity"] == pytest.approx(min(last, expected), rel=1e-6)
    if changes != "streams":
        return
    whole = plan_of(tmp_path / "whole", tiny_config(train__dropout=0.0, train__duration="14 steps"), corpus)
    train(whole, worker_of(whole))
    # a measure in between changes nothing of the training
    ours, theirs = everything(newest(tmp_path / "run")), everything(newest(tmp_path / "whole"))
    assert all(torch.equal(t, theirs[k]) for k, t in ours.items() if k != "streams/window_sums")


def train_with_other_streams(
    rank: int, world: int, folder: Path, corpus: Paths, valid: Path, streams: tuple[int, ...] = (2, 1)
) -> dict[str, Any]:
    """Train and resume as one of `world` workers, the held-out text in another number of streams each time."""
    if world > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}.store", rank=rank, world_size=world)
    result: dict[str, Any] = {}
    for number, count in enumerate(streams):
        settings = {"evaluate__streams": count, "train__dropout": 0.0, "train__duration": f"{8 + 6 * number} steps"}
        plan = plan_of(folder, tiny_config(**with_valid(**settings)), corpus, valid)
        result = train(plan, worker_of(plan, rank, world))
    if world > 1:
        dist.destroy_process_group()
    return result


@pytest.mark.slow
def test_two_workers_measure_the_best_again_as_one(corpus: Paths, valid: Path, tmp_path: Path) -> None:
    train_with_other_streams(0, 1, tmp_path / "one", corpus, valid)
    run_ranks(train_with_other_streams, (2, tmp_path / "two", corpus, valid), 2)
    found = {}
    for name in ("one", "two"):
        events = [r["message"] for r in read_metrics(tmp_path / name) if r["kind"] == "event"]
        found[name] = [message for message in events if "measured in another way" in message]
    assert len(found["one"]) == 1 and found["two"] == found["one"]
    assert progress_of(newest(tmp_path / "two"))["best_perplexity"] == pytest.approx(
        progress_of(newest(tmp_path / "one"))["best_perplexity"], rel=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data__streams": 5}, "data.streams"),
        ({"model__lstm": {"dim": 16, "projection_dim": 8, "n_layers": 1}}, "model"),
        ({**WORDS_UNTIED}, "model"),
    ],
)
def test_another_model_or_other_streams_do_not_resume(
    corpus: Paths, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    plan = plan_of(tmp_path / "run", tiny_config(train__duration="2 steps"), corpus)
    train(plan, worker_of(plan))
    other = plan_of(tmp_path / "run", tiny_config(train__duration="4 steps", **changes), corpus)
    with pytest.raises(ConfigError, match=named):
        train(other, worker_of(other))


def test_another_text_or_optimizer_does_not_resume(corpus: Paths, tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "run", tiny_config(train__duration="2 steps"), corpus)
    train(plan, worker_of(plan))
    text = write_corpus(tmp_path / "other", [100, 90], seed=5)
    other = plan_of(tmp_path / "run", tiny_config(train__duration="4 steps"), text)
    with pytest.raises(ConfigError, match="data.train"):
        train(other, worker_of(other))
    adamw = plan_of(tmp_path / "run", tiny_config(train__duration="4 steps", optim__name="adamw"), corpus)
    with pytest.raises(ConfigError, match="optim.name is adamw, but .* was made with adagrad"):
        train(adamw, worker_of(adamw))


def test_another_momentum_does_not_resume(corpus: Paths, tmp_path: Path) -> None:
    sgd = {"optim__name": "sgd", "softmax__kind": "full", "softmax__negatives": None}
    plan = plan_of(tmp_path / "run", tiny_config(train__duration="2 steps", **sgd), corpus)
    train(plan, worker_of(plan))
    other = tiny_config(train__duration="4 steps", optim__momentum=0.5, **sgd)
    plan = plan_of(tmp_path / "run", other, corpus)
    with pytest.raises(ConfigError, match="optim.momentum is 0.5, but .* was made with 0.0"):
        train(plan, worker_of(plan))


def test_more_negatives_than_words(corpus: Paths, tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "run", tiny_config(softmax__negatives=5000), corpus)
    with pytest.raises(ConfigError, match="softmax.negatives=5000"):
        train(plan, worker_of(plan))


def test_metrics_of_attempts(corpus: Paths, tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "run", tiny_config(), corpus)
    train(plan, worker_of(plan, stop=Stopper(5)))
    train(plan, worker_of(plan))
    assert sorted(p.name for p in (tmp_path / "run" / "metrics").iterdir()) == [
        "attempt-001.csv",
        "attempt-001.jsonl",
        "attempt-002.csv",
        "attempt-002.jsonl",
    ]
    found = [r for r in read_metrics(tmp_path / "run") if r["kind"] == "train"]
    assert [r["step"] for r in found] == [4, 8, 12, 16, 20, 24]
    assert all(r["positions_per_second"] > 0 and 0 <= r["data_wait"] for r in found)
    assert [r["positions"] for r in found] == [24 * r["step"] for r in found]


def test_a_plan_travels_as_plain_values(corpus: Paths, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, tiny_config(), corpus)
    assert TrainPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_states_are_carried_and_reset(corpus: Paths, tmp_path: Path) -> None:
    ends = {}
    for reset in ("never", 1.0):
        config = tiny_config(train__reset=reset, train__dropout=0.0, train__duration="1 steps", train__unroll=5)
        first = plan_of(tmp_path / f"{reset}", config, corpus)
        train(first, worker_of(first))
        config = tiny_config(train__reset=reset, train__dropout=0.0, train__duration="2 steps", train__unroll=5)
        second = plan_of(tmp_path / f"{reset}", config, corpus)
        train(second, worker_of(second))
        ends[reset] = newest(tmp_path / f"{reset}").stream_tensors(0, 4)
    assert torch.equal(ends["never"]["audit_hash"], ends[1.0]["audit_hash"])
    assert not torch.equal(ends["never"]["cell"], ends[1.0]["cell"])
    assert LstmState(ends["never"]["hidden"], ends["never"]["cell"]).cell.shape == (4, 2, 2, 16)
