"""A model's tables for another vocabulary, and slots that are kept or new."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.saved_models import random_model
from helpers.tiny_runs import WORDS_TIED, WORDS_UNTIED, tiny_config

from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.errors import ConfigError
from elmo_ray.model.bilm import TABLES, BiLM
from elmo_ray.training.initialize import initial_model, initial_slots, source_rows
from elmo_ray.training.optimizer import Optimizer

OLD = Vocabulary.from_words(["<S>", "</S>", "<UNK>", *(f"w{i}" for i in range(27))])
NEW = Vocabulary.from_words(["the", *(f"w{i}" for i in range(20, 0, -1)), "a", "<UNK>", "<S>", "</S>", "cat"])
KINDS: list[dict[str, Any]] = [{}, WORDS_UNTIED, WORDS_TIED]


def log_probabilities(model: BiLM, x: torch.Tensor) -> torch.Tensor:
    assert model.softmax_bias is not None
    return torch.log_softmax(x @ model.output_weight.T + model.softmax_bias, dim=-1).double()


@pytest.mark.parametrize("kind", KINDS, ids=["characters", "words", "tied"])
def test_rows_of_known_words_are_carried_and_new_ones_share_the_unknown(kind: dict[str, Any]) -> None:
    config = tiny_config(**kind, softmax__negatives=5)
    source = random_model(config, OLD.size)
    model, counts = initial_model(config, source, source_rows(OLD, NEW), NEW, OLD.unk)
    assert (counts.carried, counts.new, counts.left_out) == (23, 3, 7)
    theirs, ours = dict(source.named_parameters()), dict(model.named_parameters())
    for name, parameter in ours.items():
        if name not in TABLES:
            assert torch.equal(parameter, theirs[name])
    for word, new in NEW.ids.items():
        old = OLD.ids.get(word, OLD.unk)
        for name in TABLES[:1] + TABLES[2:]:
            if name in ours:
                assert torch.equal(ours[name][new], theirs[name][old]), (word, name)
        lower = math.log(4) if word in ("the", "a", "cat", "<UNK>") else 0.0
        bias = ours["softmax_bias"][new].item()
        assert bias == pytest.approx(theirs["softmax_bias"][old].item() - lower, abs=1e-6)
    # with the words that are left out given back to the sum, nothing that was known has another probability
    x = torch.randn(4, config.model.lstm.projection_dim)
    before, after = log_probabilities(source, x), log_probabilities(model, x)
    kept = [OLD.ids[word] for word in NEW.words if word in OLD.ids]
    before = before - torch.logsumexp(before[:, kept], dim=-1, keepdim=True)
    for word in ("w1", "w20", "<S>"):
        assert torch.allclose(after[:, NEW.ids[word]], before[:, OLD.ids[word]], atol=1e-5)
    shares = torch.logsumexp(after[:, [NEW.ids[word] for word in ("the", "a", "cat", "<UNK>")]], dim=-1)
    assert torch.allclose(shares, before[:, OLD.unk], atol=1e-5)


def test_a_softmax_that_the_source_lacks_begins_as_in_pretraining() -> None:
    config = tiny_config(softmax__negatives=5)
    source = random_model(config, 0)
    assert source.softmax_bias is None
    model, counts = initial_model(config, source, None, NEW, 0)
    fresh = BiLM(config.model, config.softmax, NEW.size)
    fresh.reset_parameters(config.run.seed)
    assert (counts.carried, counts.new) == (0, NEW.size) and "does not have" in counts.describe(False)
    assert model.softmax_weight is not None and fresh.softmax_weight is not None
    assert torch.equal(model.softmax_weight, fresh.softmax_weight)
    assert torch.equal(model.lstm.layers[0].input_kernel, source.lstm.layers[0].input_kernel)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["adagrad", "adamw"])
def test_slots_are_new_or_kept(name: str) -> None:
    config = tiny_config(softmax__negatives=5, optim__name=name, optim__initial_accumulator=0.5)
    source = random_model(config, OLD.size)
    rows = source_rows(OLD, NEW)
    model, _ = initial_model(config, source, rows, NEW, OLD.unk)

    def optimizer(of: BiLM) -> Optimizer:
        parameters = dict(of.named_parameters())
        return Optimizer(config.optim, of.dense_parameters(), {n: parameters[n].detach() for n in TABLES[:2]})

    used = optimizer(source)
    dense = {n: torch.randn_like(p) for n, p in source.dense_parameters().items()}
    tables = {n: torch.randn_like(t) for n, t in used.tables.items()}
    used.apply(dense, {}, tables, 0, 1)
    before = {n: slot.clone() for n, slot in used.state_tensors().items()}

    started = optimizer(model)
    started.load_state_tensors(initial_slots(config, model, None, rows))
    assert all(bool((slot == 0.5).all()) for slot in started.state_tensors().values())

    started.load_state_tensors(initial_slots(config, model, before, rows))
    after = started.state_tensors()
    assert sorted(after) == sorted(before)
    for key, slot in after.items():
        kind, _, parameter = key.partition(".")
        if parameter in TABLES:
            assert kind == "accumulator"
            assert torch.equal(slot[NEW.ids["w3"]], before[key][OLD.ids["w3"]])
            assert bool((slot[NEW.ids["cat"]] == 0.5).all())
        else:
            assert torch.equal(slot, before[key])


def test_another_optimizers_slots_are_not_kept() -> None:
    config = tiny_config(softmax__negatives=5)
    model = random_model(config, OLD.size)
    with pytest.raises(ConfigError, match="init.optimizer=keep: the source has no slots of optim.name=adagrad"):
        initial_slots(config, model, {"accumulator.softmax_bias": torch.ones(OLD.size)}, torch.arange(OLD.size))


def test_slots_and_a_softmax_that_have_no_place_are_refused() -> None:
    adamw = tiny_config(softmax__negatives=5, optim__name="adamw")
    model, rows = random_model(adamw, OLD.size), torch.arange(OLD.size)
    with pytest.raises(ConfigError, match="init.optimizer=keep: optim.name=adamw has no place for the source's acc"):
        initial_slots(adamw, model, {"accumulator.lstm.layers.0.bias": torch.ones(2)}, rows)
    adaptive = tiny_config(softmax__kind="adaptive", softmax__negatives=None)
    with pytest.raises(ConfigError, match="softmax.kind=adaptive: has no place for the SOURCE's softmax_bias"):
        initial_model(adaptive, model, rows, OLD, OLD.unk)
