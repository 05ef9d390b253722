"""Parts that are frozen, have a rate of their own, or wait until the softmax is trained; with and without resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.same_runs import differences
from helpers.tiny_runs import WORDS_UNTIED, Stopper, newest, plan_of, tiny_config, with_valid, worker_of, write_corpus

from elmo_ray.checkpoints.read import Checkpoint, open_checkpoint
from elmo_ray.config import PretrainConfig
from elmo_ray.errors import ConfigError
from elmo_ray.model.bilm import BiLM
from elmo_ray.training.components import component_of
from elmo_ray.training.loop import train
from elmo_ray.training.metrics import read_metrics

CorpusPaths = tuple[Path, Path]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> CorpusPaths:
    return write_corpus(tmp_path_factory.mktemp("corpus"), [60, 40])


def run(folder: Path, config: PretrainConfig, corpus: CorpusPaths, stop: int | None = None) -> dict[str, Any]:
    plan = plan_of(folder, config, corpus, corpus[0] if config.data.valid else None)
    return train(plan, worker_of(plan, stop=Stopper(stop)))


def moved_parts(checkpoint: Checkpoint, config: PretrainConfig, names: str) -> set[str]:
    """The parts whose tensors (model: parameters, optimizer: slots) are not those of the start."""
    words = len(checkpoint.text("vocab.txt").splitlines())
    model = BiLM(config.model, config.softmax, words)
    model.reset_parameters(config.run.seed)
    start = dict(model.state_dict())
    found = checkpoint.tensors(f"{names}.safetensors")
    if names == "optimizer":
        return {
            component_of(key.removeprefix("accumulator.")) for key, slot in found.items() if bool((slot != 1).any())
        }
    return {component_of(key) for key, value in found.items() if not torch.equal(value, start[key])}


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({"train__freeze": ["char_embedding", "char_cnn", "highway", "projection"]}, {"lstm.0", "lstm.1", "softmax"}),
        ({"train__freeze": "lstm.0"}, {"char_embedding", "char_cnn", "highway", "projection", "lstm.1", "softmax"}),
        (
            {"train__freeze": ["softmax", "lstm.1"], "softmax__kind": "full", "softmax__negatives": None},
            {"char_embedding", "char_cnn", "highway", "projection", "lstm.0"},
        ),
        ({**WORDS_UNTIED, "train__freeze": ["word_embedding", "lstm.1", "lstm.0"]}, {"softmax"}),
        ({"train__softmax_first": 100}, {"softmax"}),
    ],
    ids=["no characters", "no first layer", "full softmax frozen", "softmax only", "softmax first"],
)
def test_what_is_frozen_stays(tmp_path: Path, corpus: CorpusPaths, changes: dict[str, Any], trained: set[str]) -> None:
    config = tiny_config(**changes, train__duration="5 steps")
    run(tmp_path / "run", config, corpus)
    checkpoint = newest(tmp_path / "run")
    assert moved_parts(checkpoint, config, "model") == trained == moved_parts(checkpoint, config, "optimizer")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adagrad", "adamw"])
def test_softmax_first_then_all_and_a_stop_at_any_time_changes_nothing(
    tmp_path: Path, corpus: CorpusPaths, name: str
) -> None:
    config = tiny_config(**with_valid(train__softmax_first=10, train__freeze="highway", optim__name=name))
    run(tmp_path / "whole", config, corpus)
    for stop in (6, 8, 9):
        run(tmp_path / "stopped", config, corpus, stop=stop)
        step = newest(tmp_path / "stopped").step
        assert 0 < step < 24
    run(tmp_path / "stopped", config, corpus)
    assert differences(tmp_path / "whole", tmp_path / "stopped") == []
    if name == "adagrad":
        assert "highway" not in moved_parts(newest(tmp_path / "whole"), config, "model")
        assert {"lstm.0", "softmax", "char_cnn"} <= moved_parts(newest(tmp_path / "whole"), config, "model")


def test_rates_of_parts(tmp_path: Path, corpus: CorpusPaths) -> None:
    """One step of Adagrad moves a parameter by rate * g / sqrt(1 + g^2): in proportion to its part's rate."""
    start = BiLM(tiny_config().model, tiny_config().softmax, len(corpus[1].read_text().splitlines()))
    start.reset_parameters(3)
    moves = []
    for rates in ({}, {"optim__part_lr": {"softmax": 0.4, "lstm": [None, 0.05], "char_cnn": 0.01}}):
        config = tiny_config(**rates, optim__lr=0.2, train__duration="1 steps")
        run(tmp_path / str(len(moves)), config, corpus)
        model = newest(tmp_path / str(len(moves))).tensors("model.safetensors")
        moves.append({name: model[name] - parameter for name, parameter in start.named_parameters()})
    wanted = {"softmax": 2.0, "lstm.1": 0.25, "char_cnn": 0.05}
    for name, move in moves[0].items():
        factor = wanted.get(component_of(name), 1.0)
        assert torch.allclose(moves[1][name], factor * move, atol=1e-6), name
        assert bool((move != 0).any()), name


@pytest.mark.slow
def test_training_ends_when_validation_no_longer_improves(tmp_path: Path, corpus: CorpusPaths) -> None:
    """With so high a rate it soon gets worse. The counter is in the checkpoint: a stop in between changes nothing."""
    changes = with_valid(optim__lr=3.0, train__duration="200 steps", train__validate_every="2 steps", train__patience=3)
    config = tiny_config(**changes)
    result = run(tmp_path / "whole", config, corpus)
    assert result["finished"] and not result["stopped"] and result["steps"] < 200
    assert result["steps"] == result["best_step"] + 6
    assert newest(tmp_path / "whole").step == result["steps"]
    assert open_checkpoint(tmp_path / "whole" / "best").step == result["best_step"]
    events = [record["message"] for record in read_metrics(tmp_path / "whole") if record["kind"] == "event"]
    assert "train.patience" in events[-1]
    stopped = run(tmp_path / "stopped", config, corpus, stop=result["best_step"] + 5)
    assert stopped["stopped"] and result["best_step"] < stopped["steps"] < result["steps"]
    run(tmp_path / "stopped", config, corpus)
    assert differences(tmp_path / "whole", tmp_path / "stopped") == []
    assert run(tmp_path / "stopped", config, corpus)["steps"] == result["steps"]  # over is over


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__freeze": ["lstm.2"]}, "train.freeze has lstm.2: the model's components are char_embedding, "),
        ({"train__freeze": "word_embedding"}, "train.freeze has word_embedding"),
        ({**WORDS_UNTIED, "train__freeze": ["word_embedding", "lstm.0", "lstm.1", "softmax"]}, "nothing is left"),
        ({"train__freeze": "softmax", "train__softmax_first": 5}, "train.softmax_first=5 trains the softmax"),
        ({"optim__part_lr": {"lstm": [0.1]}}, "optim.part_lr.lstm has 1 rates"),
        ({"optim__part_lr": {"word_embedding": 0.1}}, "optim.part_lr.word_embedding is set, but"),
        ({"optim__part_lr": {"softmax": 0.1}, "train__freeze": "softmax"}, "optim.part_lr.softmax is set, but"),
        ({**WORDS_UNTIED, "softmax__tied": True, "train__freeze": "softmax"}, "freeze both or neither"),
        ({"optim__part_lr": {"lstm": [0.1, -1]}}, "optim.part_lr.lstm=.*: must be a number > 0, a list"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        tiny_config(**changes)
    assert "\n" not in str(caught.value)
