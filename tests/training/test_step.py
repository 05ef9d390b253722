"""Whole training steps against a slow dense reference, and what a step leaves alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import naive_bilm
from helpers.naive_bilm import close, stacked
from helpers.tiny_runs import WORDS_TIED, WORDS_UNTIED, tiny_config

from elmo_ray import kernels
from elmo_ray.config import PretrainConfig
from elmo_ray.data.streams import Batch, StreamCursors
from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary
from elmo_ray.data.word_types import TypeTable
from elmo_ray.model.bilm import BiLM
from elmo_ray.model.dropout import Dropout
from elmo_ray.training.assembler import StepAssembler
from elmo_ray.training.noise import draw_negatives, log_expected_count
from elmo_ray.training.ranks import Exchange, Flags
from elmo_ray.training.step import DTYPES, TrainStep

VOCABULARY = Vocabulary([*SPECIAL_WORDS, *"a bb ccc dddd eeeee ffffff g hh iii".split()])
V, ROWS, WINDOW = VOCABULARY.size, 3, 3

SMALL = {
    "data__streams": ROWS,
    "train__unroll": WINDOW,
    "train__precision": "fp64",
    "train__dropout": 0.0,
    "softmax__negatives": 5,
    "optim__clip_norm": 0.7,
    "model__lstm": {"dim": 6, "projection_dim": 4, "cell_clip": 0.6, "proj_clip": 0.5},
    "model__char_cnn": {"filters": [[1, 2], [2, 3]], "embedding_dim": 3, "max_characters": 9, "n_highway": 1},
}
FULL: dict[str, Any] = {"softmax__kind": "full", "softmax__negatives": None}
CASES: dict[str, dict[str, Any]] = {
    "characters, sampled": {},
    "characters, sampled, dropout": {"train__dropout": 0.4},
    "characters, full": FULL,
    "characters, sampled, forward only": {"model__bidirectional": False},
    "words, sampled": WORDS_UNTIED,
    "words, tied, sampled": WORDS_TIED,
    "words, full, dropout": {**WORDS_UNTIED, **FULL, "train__dropout": 0.4},
    "words, tied, full": {**WORDS_TIED, **FULL},
    "words, tied, sampled, forward only": {**WORDS_TIED, "model__bidirectional": False},
}


def config_of(case: dict[str, Any]) -> PretrainConfig:
    return tiny_config(**{**SMALL, **case})


def batch_of(config: PretrainConfig, step: int) -> tuple[Batch, np.ndarray]:
    """A batch of random ids with rows of different lengths, and the word ids of its inputs [D, B, T]."""
    random = np.random.default_rng(step)
    directions = 2 if config.model.bidirectional else 1
    lengths = np.array([WINDOW, 0 if step == 0 else 2, WINDOW - 1])
    ids = random.integers(0, V, (directions, ROWS, WINDOW))
    targets = random.integers(0, V, (directions, ROWS, WINDOW))
    for row, length in enumerate(lengths):
        targets[:, row, length:] = -1
    words, places = np.unique(ids, return_inverse=True)
    places = places.reshape(ids.shape)
    types: Any
    if config.model.input == "words":
        types, classes = words, ((len(words), 1),)
    else:
        table = TypeTable(VOCABULARY, config.model.char_cnn.max_characters, 2)
        types, classes, place = table.gather(words, np.zeros((0, config.model.char_cnn.max_characters), np.int16))
        places = place[places]
    new_block = np.array([False, False, step == 1])
    return Batch(types, classes, places, targets, lengths, new_block, StreamCursors.start(ROWS)), ids


def random_model(config: PretrainConfig) -> BiLM:
    model = BiLM(config.model, config.softmax, V).to(DTYPES[config.train.precision])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.6, generator=generator)
    return model


class Reference:
    """Dense gradients of all parameters by autograd through the slow model, and Adagrad by hand."""

    def __init__(self, config: PretrainConfig, model: BiLM):
        self.config = config
        self.values = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.slots = {name: torch.full_like(p, config.optim.initial_accumulator) for name, p in self.values.items()}
        self.state = naive_bilm.zero_state(config.model, ROWS)

    def step(self, batch: Batch, ids: np.ndarray, step: int) -> tuple[list[float], float, dict[str, torch.Tensor]]:
        config = self.config
        p = {name: value.clone().requires_grad_() for name, value in self.values.items()}
        if config.model.input == "words":
            vectors = list(p["word_embedding"])
        else:
            rows = VOCABULARY.characters(config.model.char_cnn.max_characters).tolist()
            vectors = [naive_bilm.word_vector(p, config.model, row) for row in rows]
        state = naive_bilm.zero_state(config.model, ROWS)
        for row, reset in enumerate(batch.new_block):
            for layer, d in np.ndindex(len(state), len(state[0])):
                if not reset:
                    state[layer][d][row] = self.state[layer][d][row]
        mask = None
        if config.train.dropout:
            noise = Dropout(config.train.dropout, config.run.seed, step, 0, torch.device("cpu"))
            shape = (len(ids), WINDOW, ROWS, config.model.lstm.projection_dim)
            masks = [noise(torch.ones(shape, dtype=torch.float64)) for _ in range(config.model.lstm.n_layers + 1)]
            mask = lambda layer, d, t, b: masks[layer][d, t, b]  # noqa: E731
        lengths = batch.lengths.tolist()
        outputs, self.state = naive_bilm.run(p, config.model, vectors, torch.from_numpy(ids), state, lengths, mask)
        table = p["word_embedding" if config.softmax.tied else "softmax_weight"]
        sums = []
        for d in range(len(ids)):
            losses = [
                self.loss(outputs[-1][d][b][t], table, p["softmax_bias"], int(batch.targets[d, b, t]), d, step)
                for b in range(ROWS)
                for t in range(lengths[b])
            ]
            sums.append(torch.stack(losses).sum())
        total = torch.stack(sums).mean() / sum(lengths)
        (total * config.train.unroll).backward()
        gradients = {name: torch.zeros_like(q) if q.grad is None else q.grad for name, q in p.items()}
        norm = float(torch.cat([g.flatten() for g in gradients.values()]).norm())
        scale = min(1.0, config.optim.clip_norm / norm)
        for name, gradient in gradients.items():
            self.slots[name] += (gradient * scale) ** 2
            self.values[name] -= config.optim.lr * gradient * scale / self.slots[name].sqrt()
        self.state = [[[(h.detach(), c.detach()) for h, c in rows] for rows in layer] for layer in self.state]
        return [float(s.detach()) for s in sums], norm, gradients

    def loss(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, target: int, d: int, step: int
    ) -> torch.Tensor:
        if self.config.softmax.kind == "full":
            return naive_bilm.full_loss(x, weight, bias, target)
        drawn = draw_negatives(self.config.run.seed, step, d, V, self.config.softmax.negatives)
        counts = log_expected_count(np.arange(V), drawn.tries, V).astype(np.float64)
        ids = drawn.ids.tolist()
        return naive_bilm.sampled_loss(x, weight, bias, target, ids, counts[target], counts[ids].tolist())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_steps_equal_dense_ones(case: dict[str, Any]) -> None:
    config = config_of({**case, "train__reset": "block"})
    model = random_model(config)
    reference = Reference(config, model)
    step = TrainStep(config, model, ROWS)
    assemble = StepAssembler(config, V, range(ROWS), Exchange())
    for number in range(2):
        batch, ids = batch_of(config, number)
        prepared, _ = assemble(batch, number, Flags())
        gradients, sums, _ = step.gradients(prepared)
        sums_expected, norm, expected = reference.step(batch, ids, number)
        close(sums, torch.tensor(sums_expected, dtype=torch.float64))
        found = dict(gradients.dense)
        for name, gradient in gradients.tables.items():
            rows = gradients.rows.get(name)
            found[name] = gradient if rows is None else torch.zeros_like(expected[name]).index_copy_(0, rows, gradient)
        assert sorted(found) == sorted(expected)
        for name, gradient in expected.items():
            close(found[name], gradient)
        output = step.run(prepared)
        assert bool(output.finite)
        close(output.norm, torch.tensor(norm, dtype=torch.float64))
        assert norm > config.optim.clip_norm, "the clip must act"
        slots = step.optimizer.state_tensors()
        for name, parameter in model.named_parameters():
            close(parameter, reference.values[name])
            close(slots[f"accumulator.{name}"], reference.slots[name])
        hidden, cells = stacked(reference.state)
        close(step.state.hidden, hidden)
        close(step.state.cell, cells)


WIDE_CNN = {"filters": [[1, 2], [2, 5]], "embedding_dim": 3, "max_characters": 9, "n_highway": 1, "projection": False}
PUBLISHED: dict[str, dict[str, Any]] = {
    "features go into the LSTM": {"model__char_cnn": WIDE_CNN},
    "Kim et al.": {
        **FULL,
        "model__char_cnn": WIDE_CNN,
        "model__lstm": {"dim": 4, "projection_dim": 4, "cell_clip": None, "proj_clip": None},
        "model__bidirectional": False,
        "optim__name": "sgd",
        "train__dropout": [0.0, 0.5, 0.3],
    },
    "sgd, momentum": {**FULL, "optim__name": "sgd", "optim__momentum": 0.9},
    "sgd, words, sampled": {**WORDS_UNTIED, "optim__name": "sgd", "train__dropout": [0.2, 0.0, 0.0]},
}


@pytest.mark.parametrize("case", PUBLISHED.values(), ids=PUBLISHED)
def test_kernels_compute_published_models_as_the_plain_model_does(case: dict[str, Any]) -> None:
    found = []
    for setting in ("off", "auto"):
        with kernels.using("auto"):  # a step sets it for its process
            config = config_of({**case, "train__precision": "fp32", "train__kernels": setting})
            model = random_model(config)
            start = {name: p.detach().clone() for name, p in model.named_parameters()}
            step, assemble = TrainStep(config, model, ROWS), StepAssembler(config, V, range(ROWS), Exchange())
            outputs = [step.run(assemble(batch_of(config, number)[0], number, Flags())[0]) for number in range(3)]
            values = {name: p.detach() for name, p in model.named_parameters()}
            assert all(not torch.equal(values[name], value) for name, value in start.items())
            losses = {f"losses {number}": output.loss_sums for number, output in enumerate(outputs)}
            found.append({**values, **losses, **step.optimizer.state_tensors(), **step.state._asdict()})
    off, auto = found
    assert off.keys() == auto.keys()
    for name, value in off.items():
        torch.testing.assert_close(
            auto[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_only_touched_rows_move() -> None:
    config = config_of({**WORDS_UNTIED, "softmax__negatives": 2})
    model = random_model(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch, ids = batch_of(config, 1)
    prepared, _ = StepAssembler(config, V, range(ROWS), Exchange())(batch, 1, Flags())
    TrainStep(config, model, ROWS).run(prepared)
    drawn = {int(i) for d in range(2) for i in draw_negatives(config.run.seed, 1, d, V, 2).ids}
    touched = {
        "softmax_weight": drawn | {int(t) for t in batch.targets.flat if t >= 0},
        "word_embedding": {int(i) for i in ids.flat},
    }
    for name, rows in touched.items():
        moved = (dict(model.named_parameters())[name].detach() != before[name]).any(dim=1).nonzero()[:, 0].tolist()
        assert set(moved) <= rows and len(rows) < V, name


@pytest.mark.parametrize("optimizer", ["adagrad", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_step_that_is_not_finite_changes_nothing(optimizer: str, precision: str, bad: float) -> None:
    config = config_of({"optim__name": optimizer, "train__precision": precision})
    model = random_model(config)
    step = TrainStep(config, model, ROWS)
    assemble = StepAssembler(config, V, range(ROWS), Exchange())
    step.run(assemble(batch_of(config, 0)[0], 0, Flags())[0])
    with torch.no_grad():
        good = model.softmax_weight.detach().clone()  # type: ignore[union-attr]
        model.softmax_weight[:, 1] = bad  # type: ignore[index]
    before = {f"p/{name}": p.detach().clone() for name, p in model.named_parameters()}
    before.update({name: slot.clone() for name, slot in step.optimizer.state_tensors().items()})
    state = step.state
    hidden, cells = state.hidden.clone(), state.cell.clone()
    output = step.run(assemble(batch_of(config, 1)[0], 1, Flags())[0])
    assert not bool(output.finite)
    after = {f"p/{name}": p.detach() for name, p in model.named_parameters()} | step.optimizer.state_tensors()
    for name, value in before.items():
        assert torch.equal(value.nan_to_num(7.0), after[name].nan_to_num(7.0)), name
    assert torch.equal(step.state.hidden, hidden) and torch.equal(step.state.cell, cells)
    with torch.no_grad():
        model.softmax_weight.copy_(good)  # type: ignore[union-attr]
    again = step.run(assemble(batch_of(config, 2)[0], 2, Flags())[0])
    assert bool(again.finite) and not torch.equal(step.state.cell, cells), "the next step is an ordinary one"


def test_a_batch_without_positions_changes_no_parameter_and_no_state() -> None:
    config = config_of({})
    model = random_model(config)
    step = TrainStep(config, model, ROWS)
    assemble = StepAssembler(config, V, range(ROWS), Exchange())
    step.run(assemble(batch_of(config, 0)[0], 0, Flags())[0])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    cells = step.state.cell.clone()
    batch, _ = batch_of(config, 1)
    batch.targets[:], batch.lengths[:] = -1, 0
    output = step.run(assemble(batch, 1, Flags())[0])
    assert bool(output.finite) and not output.loss_sums.any() and float(output.norm) == 0.0
    assert torch.equal(step.state.cell, cells)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_bf16_is_close_to_fp32() -> None:
    outputs = []
    for precision in ("fp32", "bf16"):
        config = config_of({"train__precision": precision})
        model = random_model(config)
        step = TrainStep(config, model, ROWS)
        batch, _ = batch_of(config, 0)
        outputs.append(step.run(StepAssembler(config, V, range(ROWS), Exchange())(batch, 0, Flags())[0]))
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert step.state.cell.dtype == torch.float32
    exact, low = outputs
    assert not torch.equal(exact.loss_sums, low.loss_sums)
    assert torch.allclose(exact.loss_sums, low.loss_sums, rtol=0.03)
    assert abs(float(low.norm) / float(exact.norm) - 1) < 0.05
