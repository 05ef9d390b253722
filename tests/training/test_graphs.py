"""What is around CUDA graphs: tensors of their own, seeds, checks and the way back. On a CPU a graph is played by the
function that it would have captured; on a GPU the real ones are compared with plain steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.tiny_runs import WORDS_TIED, tiny_config
from test_fixed_shapes import STEPS, inputs, model_of, text

from elmo_ray.config import PretrainConfig
from elmo_ray.data.corpus import Corpus
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.training import graphs
from elmo_ray.training.graphs import StepGraphs, graphs_for
from elmo_ray.training.step import StepResult, TrainStep
from elmo_ray.training.step_input import StepInput

__all__ = ["text"]

Text = tuple[Corpus, Vocabulary]
Replay = Callable[[], None]


def tensors_of(computed: StepResult) -> list[torch.Tensor]:
    return list(computed.tensors().values())


class Played:
    """Plays captures on a CPU: replays run the function again with what the step had then, into the same tensors."""

    def __init__(self, step: TrainStep, spoil: Callable[[int, StepResult], None] = lambda replays, result: None):
        self.step, self.spoil, self.captures, self.replays = step, spoil, 0, 0

    def __call__(
        self, function: Callable[[], StepResult], generators: list[torch.Generator]
    ) -> tuple[StepResult, Replay]:
        step = self.step
        state, dropout, result = step.state, step.dropout, function()
        assert (dropout is None) == (not generators)
        self.captures += 1

        def replay() -> None:
            before = step.state
            step.state, step.dropout = state, dropout
            for into, value in zip(tensors_of(result), tensors_of(function()), strict=True):
                into.copy_(value)
            step.state, step.dropout = before, None
            self.replays += 1
            self.spoil(self.replays, result)

        return result, replay


def step_of(config: PretrainConfig, text: Text, device: str = "cpu") -> TrainStep:
    return TrainStep(config, model_of(config, text[1]).to(device), config.data.streams)


def batches(config: PretrainConfig, text: Text) -> Iterator[StepInput]:
    return (padded for _, padded in inputs(config, text))


def outcome(step: TrainStep, batches: Iterator[StepInput]) -> dict[str, torch.Tensor]:
    """Of training on these: losses, parameters, slots and state."""
    losses = [step.run(batch).loss_sums for batch in batches]
    found = {**dict(step.model.named_parameters()), **step.optimizer.state_tensors(), **step.state._asdict()}
    return {"losses": torch.stack(losses), **{name: value.detach() for name, value in found.items()}}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


CASES: dict[str, dict[str, Any]] = {
    "characters": {},
    "without dropout": {"train__dropout": 0.0},
    "words, tied": WORDS_TIED,
    "full softmax": {"softmax__kind": "full", "softmax__negatives": None},
    "softmax first": {"train__softmax_first": 2},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_replays_are_the_plain_steps(text: Text, changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    expected = outcome(step_of(config, text), batches(config, text))
    step = step_of(config, text)
    played = Played(step)
    step.graphs = StepGraphs(step, played)

    def begun() -> Iterator[StepInput]:
        for batch in batches(config, text):
            step.begin(batch.step)
            yield batch

    if config.train.softmax_first:
        plain = step_of(config, text)
        expected = outcome(plain, (b for b in batches(config, text) if [plain.begin(b.step)]))
    assert_equal(outcome(step, begun()), expected)
    captures = 1 + bool(config.train.softmax_first)
    assert captures <= played.captures <= captures + 1, "one for each shape, and again for other parameters"
    assert played.replays == STEPS and not step.graphs.failed


def test_loss_sums_outlive_the_next_step(text: Text) -> None:
    config = tiny_config()
    step = step_of(config, text)
    step.graphs = StepGraphs(step, Played(step))
    outputs = [(output := step.run(batch)).loss_sums.clone().equal(output.loss_sums) for batch in batches(config, text)]
    assert all(outputs)
    kept = [step.run(batch).loss_sums for batch in batches(config, text)]
    assert len({tensor.data_ptr() for tensor in kept}) == len(kept)


@pytest.mark.parametrize("bad", [1, 2], ids=["at the capture", "with other inputs"])
def test_a_graph_that_differs_is_left(text: Text, bad: int, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config()
    expected = outcome(step_of(config, text), batches(config, text))

    def spoil(replays: int, result: StepResult) -> None:
        if replays >= bad:
            result.gradients.dense["lstm.layers.1.bias"][0, 0] += 1.0

    step = step_of(config, text)
    played = Played(step, spoil)
    step.graphs = StepGraphs(step, played)
    assert_equal(outcome(step, batches(config, text)), expected)
    assert step.graphs.failed and played.replays == bad
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "no CUDA graphs from here on: lstm.layers.1.bias differs by" in caplog.text


def test_a_capture_that_fails_leaves_plain_steps(text: Text, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config()
    expected = outcome(step_of(config, text), batches(config, text))
    step = step_of(config, text)

    def record(function: Callable[[], StepResult], generators: list[torch.Generator]) -> tuple[StepResult, Replay]:
        parameter = step.model.lstm.layers[0].bias
        parameter.grad = torch.ones_like(parameter)  # type: ignore[arg-type]  # what a backward leaves that did not end
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    step.graphs = StepGraphs(step, record)
    assert_equal(outcome(step, batches(config, text)), expected)
    assert caplog.text.count("no CUDA graphs from here on: RuntimeError: operation not permitted") == 1
    assert "and more" not in caplog.text


def test_a_step_that_is_not_finite_is_no_difference(text: Text) -> None:
    config = tiny_config()
    step = step_of(config, text)
    step.graphs = StepGraphs(step, Played(step))
    with torch.no_grad():
        step.model.lstm.layers[1].bias[0, 0] = torch.nan  # type: ignore[index, union-attr]
    outcome(step, batches(config, text))
    assert not step.graphs.failed


def test_more_shapes_than_graphs(text: Text, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(graphs, "_MAX_GRAPHS", 1)
    config = tiny_config()

    def grown() -> Iterator[StepInput]:
        for number, batch in enumerate(batches(config, text)):
            yield dataclasses.replace(batch, types=torch.cat([batch.types, batch.types[:number]]), type_classes=None)  # type: ignore[arg-type]

    expected = outcome(step_of(config, text), grown())
    step = step_of(config, text)
    played = Played(step)
    step.graphs = StepGraphs(step, played)
    assert_equal(outcome(step, grown()), expected)
    assert played.captures == 1 and not step.graphs.failed
    assert caplog.text.count("more than 1 shapes") == 1


def test_who_has_graphs(text: Text, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config = tiny_config(train__dropout=0.0)
    step = step_of(config, text)
    assert step.graphs is None and not caplog.records, "a CPU has none, and that is no surprise"
    step.device = torch.device("cuda")
    assert graphs_for(step) is not None
    step.world = 2
    assert graphs_for(step) is None and "no CUDA graphs with several workers" in caplog.text
    step.world, step.config = 1, tiny_config(train__accumulate=2)
    assert graphs_for(step) is None and "no CUDA graphs with train.accumulate=2" in caplog.text
    step.config = tiny_config(train__kernels="off")
    caplog.clear()
    assert graphs_for(step) is None and not caplog.records


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_on_a_gpu(text: Text, changes: dict[str, Any]) -> None:
    """Real graphs and fused gates against plain steps: within rounding."""
    device = torch.device("cuda")
    found = []
    for kernels in ("off", "auto"):
        config = tiny_config(**changes, train__kernels=kernels)
        step = step_of(config, text, "cuda")
        found.append(outcome(step, (b.to(device) for b in batches(config, text) if [step.begin(b.step)])))
    assert step.graphs is not None and not step.graphs.failed
    for name, value in found[0].items():
        assert torch.allclose(found[1][name], value, rtol=1e-3, atol=1e-4), name
