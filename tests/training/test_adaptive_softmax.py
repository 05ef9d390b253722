"""The adaptive softmax: its losses are those of torch's module, and a run with it trains, resumes, and is evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny_runs import Stopper, plan_of, tiny_config, worker_of

from elmo_ray import evaluate, pretrain
from elmo_ray.checkpoints.source import open_source
from elmo_ray.config import EvaluateConfig, PretrainConfig
from elmo_ray.elmo.language_model import LanguageModel
from elmo_ray.errors import ConfigError
from elmo_ray.model.bilm import BiLM
from elmo_ray.model.softmax import KINDS
from elmo_ray.training.loop import train
from elmo_ray.training.metrics import read_metrics

ADAPTIVE = {"softmax__kind": "adaptive", "softmax__negatives": None}
Paths = tuple[Path, Path]


def test_losses_are_log_probabilities_that_sum_to_one() -> None:
    config = tiny_config(**ADAPTIVE)
    model, words = BiLM(config.model, config.softmax, 60), 60
    model.reset_parameters(1)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 30, 8, generator=generator)
    targets = torch.randint(-1, words, (2, 30), generator=generator)
    kind = KINDS["adaptive"]
    log_p = kind.log_probabilities(model, x.flatten(0, 1))
    torch.testing.assert_close(log_p.exp().sum(dim=1), torch.ones(60))
    expected = torch.where(
        targets >= 0, -log_p.view(2, 30, words).gather(2, targets.clamp_min(0)[..., None])[..., 0], 0
    )
    torch.testing.assert_close(kind.losses(model, x, targets, None, None), expected)
    torch.testing.assert_close(kind.exact(model).losses(x[0], targets[0]), expected[0])
    again = BiLM(config.model, config.softmax, words)
    again.reset_parameters(1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_run_resumes_bit_for_bit_and_its_model_is_used(corpus: Paths, valid: Path, tmp_path: Path) -> None:
    settings = {**ADAPTIVE, "train__duration": "12 steps", "train__checkpoint_every": "6 steps"}
    for name, looks in (("whole", None), ("stopped", 5)):
        plan = plan_of(tmp_path / name, tiny_config(**settings), corpus, valid)
        done = train(plan, worker_of(plan, stop=Stopper(looks)))
        if looks is not None:
            assert done["stopped"] and done["steps"] < 12
            done = train(plan, worker_of(plan))
        assert done["finished"]
    losses = [
        [r["loss"] for r in read_metrics(tmp_path / name) if r["kind"] == "valid"] for name in ("whole", "stopped")
    ]
    assert losses[0] == losses[1] and losses[0]
    source = open_source(str(tmp_path / "whole"), "last")
    assert source.has_softmax and not source.model.has_table
    (found,) = LanguageModel(source.model, source.vocabulary).substitutes(
        [["the", "cat", "sees", "the", "dog", "."]], k=3
    )
    assert len(found.words("product")[1]) == 3


def test_what_contradicts_is_refused() -> None:
    for changes, message in (
        ({"softmax": {"kind": "adaptive", "negatives": 5}}, "softmax.kind=adaptive samples no words"),
        ({"softmax": {"kind": "adaptive", "tied": True}, "model": {"input": "words"}}, "softmax.tied=true"),
    ):
        with pytest.raises(ConfigError, match=message):
            PretrainConfig.from_dict({"data": {"train": "x"}, **changes})
    with pytest.raises(ConfigError, match="20 words or more"):
        tiny_config(**ADAPTIVE).softmax.check_vocabulary(19)


@pytest.mark.slow
def test_books_for_300_steps(shared: Path, tmp_path: Path) -> None:
    books = shared / "corpora" / "books"
    words = (books / "vocab.txt").read_text(encoding="utf-8").split("\n")[:10_000]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    valid = (books / "valid.txt").read_text(encoding="utf-8").split("\n")[:500]
    (tmp_path / "valid.txt").write_text("\n".join(valid) + "\n", encoding="utf-8")
    config = PretrainConfig.from_dict(
        {
            "run": {"name": "books", "storage_path": str(tmp_path / "runs"), "export": False},
            "data": {"train": str(books / "train-00000.txt"), "valid": str(tmp_path / "valid.txt"), "streams": 32}
            | {"vocab": str(tmp_path / "vocab.txt")},
            "model": {
                "char_cnn": {"filters": [[1, 16], [2, 16], [3, 32]], "n_highway": 1},
                "lstm": {"dim": 128, "projection_dim": 64, "n_layers": 1},
            },
            "softmax": {"kind": "adaptive"},
            "train": {"duration": "300 steps", "validate_every": "100 steps", "validate_positions": 5000},
            "cluster": {"workers": 0},
        }
    )
    pretrain.run(config)
    run = tmp_path / "runs" / "books"
    perplexities = [r["perplexity"] for r in read_metrics(run) if r["kind"] == "valid"]
    assert len(perplexities) == 3 and perplexities[0] > perplexities[1] > perplexities[2]
    assert perplexities[-1] < 700, "a unigram has some 800 here"
    settings = {"init": {"from": str(run)}, "data": {"test": str(tmp_path / "valid.txt")}, "cluster": {"workers": 0}}
    result = evaluate.run(EvaluateConfig.from_dict(settings)).to_dict()  # type: ignore[union-attr]
    assert 100 < result["perplexity"] < 700
