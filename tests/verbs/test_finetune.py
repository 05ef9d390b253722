"""`finetune` as a command: from a run, from weights without a softmax, with another vocabulary, stopped and resumed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.same_runs import differences
from helpers.saved_models import random_model
from helpers.tiny_runs import checkpoints, newest
from helpers.verbs_at_work import Outcome, TextFolder, sentence_bytes, write_texts

from elmo_ray import export, finetune, pretrain
from elmo_ray.checkpoints.source import open_source
from elmo_ray.config import PretrainConfig
from elmo_ray.config.command_line import load_config
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.training.metrics import read_metrics


class Domain(TextFolder):
    """A pre-trained model, and other text to go on with."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        (self.folder / "domain.txt").write_bytes(sentence_bytes(60, 7) + b"the router drops the packet .\n" * 12)
        (self.folder / "domain-valid.txt").write_bytes(sentence_bytes(12, 8) + b"the router sees the packet .\n" * 4)
        values = {
            "run": {"name": "tuned", "storage_path": str(self.folder / "runs"), "export": False},
            "data": {
                "train": str(self.folder / "domain.txt"),
                "valid": str(self.folder / "domain-valid.txt"),
                "streams": 4,
                "block_bytes": 4096,
            },
            "softmax": {"negatives": 8},
            "train": {"unroll": 8, "duration": "12 steps", "validate_every": "4 steps", "log_every": 4},
            "evaluate": {"streams": 2},
            "cluster": {"workers": 0},
        }
        (self.folder / "finetune.yaml").write_text(yaml.safe_dump(values), "utf-8")
        self.source = self.folder / "runs" / "tiny"

    def finetune(self, source: Path, *arguments: object) -> Outcome:
        return self.call(finetune, self.folder / "finetune.yaml", f"init.from={source}", *arguments)

    def run(self, name: str = "tuned") -> Path:
        return self.folder / "runs" / name


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = load_config(write_texts(tmp_path_factory.mktemp("pretrained")), [], PretrainConfig)
    pretrain.run(config)
    return Path(config.run.storage_path) / "tiny"


@pytest.fixture
def domain(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Domain:
    made = Domain(tmp_path, capsys, caplog)
    shutil.copytree(pretrained, made.source)
    return made


def perplexity(domain: Domain, source: Path, *arguments: object) -> float:
    outcome = domain.evaluate(source, "domain-valid.txt", "evaluate.streams=2", *arguments)
    assert outcome.code == 0, outcome.errors
    return float(outcome.result["perplexity"])


def test_from_a_run_with_its_vocabulary(domain: Domain) -> None:
    before = perplexity(domain, domain.source)
    outcome = domain.finetune(domain.source, "train.duration=40 steps", "optim.lr=0.1")
    assert outcome.code == 0, outcome.errors
    result = outcome.result
    assert result["initial"]["step"] == 0
    assert result["initial"]["perplexity"] == pytest.approx(before, rel=1e-5)
    assert result["best_perplexity"] < before and f"before the first step {before:.2f}" in outcome.printed
    assert "does not compare" not in outcome.printed
    assert perplexity(domain, domain.run()) == pytest.approx(result["best_perplexity"], rel=1e-5)
    first = next(record for record in read_metrics(domain.run()) if record["kind"] == "event")
    assert f"initialised from {newest(domain.source).path} (step " in first["message"]


def test_the_first_measure_stays_the_best_where_training_spoils_the_model(domain: Domain) -> None:
    outcome = domain.finetune(domain.source, "optim.lr=5", "train.patience=2")
    assert outcome.code == 0
    assert outcome.result["best_step"] == 0 and outcome.result["steps"] == 8
    ours, theirs = open_source(domain.run()), open_source(domain.source)
    assert all(torch.equal(p, theirs.model.state_dict()[n]) for n, p in ours.model.state_dict().items())


def test_another_vocabulary(domain: Domain) -> None:
    outcome = domain.finetune(domain.source, "data.vocab=counted", "data.max_vocab=40", "train.freeze=[char_cnn]")
    assert outcome.code == 0, outcome.errors
    ours, theirs = open_source(domain.run()), open_source(domain.source)
    assert ours.vocabulary.size == 40 and "router" in ours.vocabulary.ids and "router" not in theirs.vocabulary.ids
    filters = "char_cnn.filters.0"
    assert torch.equal(ours.model.state_dict()[filters], theirs.model.state_dict()[filters])
    assert outcome.result["best_perplexity"] < outcome.result["initial"]["perplexity"]
    new, left_out = (len(a.ids.keys() - b.ids.keys()) for a, b in ((ours.vocabulary, theirs.vocabulary),
                                                                   (theirs.vocabulary, ours.vocabulary)))  # fmt: skip
    assert new and outcome.result["initial"]["new_words"] == new
    assert f"{new} words more than the SOURCE's and {left_out} less" in outcome.printed
    assert "with its own vocabulary does not compare" in outcome.printed


def test_a_vocabulary_smaller_than_the_negatives_of_the_source(domain: Domain) -> None:
    config = domain.folder / "finetune.yaml"
    values = yaml.safe_load(config.read_text("utf-8"))
    del values["softmax"]
    config.write_text(yaml.safe_dump(values), "utf-8")
    domain.prepare()
    shared = domain.prepared / "vocab.txt"
    before = shared.read_bytes()
    (domain.folder / "domain.txt").write_bytes(b"the router drops the packet .\n" * 40)
    (domain.folder / "domain-valid.txt").write_bytes(b"the packet drops the router .\n" * 4)
    # The source has 8 negatives, and the text 5 words beside the special ones.
    outcome = domain.finetune(domain.source, "data.vocab=counted")
    assert outcome.code == 0, outcome.errors
    assert open_source(domain.run()).softmax.negatives == 4
    refused = domain.finetune(domain.source, "data.vocab=counted", "softmax.negatives=8", "run.name=own")
    (error,) = refused.errors
    assert error.startswith(
        "error: softmax.negatives=8: must be below the number of words in the vocabulary, 8; lower it"
    )
    assert shared.read_bytes() == before, "another text does not replace it"
    planned = domain.finetune(domain.source, "data.vocab=counted", "run.name=own", "--dry-run")
    assert planned.code == 0 and "vocabulary: 8 words" in planned.printed and "negatives: 4" in planned.printed
    assert domain.finetune(domain.source, "data.vocab=counted", "--fresh", "softmax.negatives=8", "--dry-run").code == 2


def test_from_weights_without_a_softmax(domain: Domain) -> None:
    export.export_model(domain.source, domain.folder / "published")
    (domain.folder / "published" / "vocab.txt").unlink()
    weights = domain.folder / "published" / "weights.hdf5"
    outcome = domain.finetune(weights, "train.softmax_first=12")
    assert outcome.code == 0, outcome.errors
    ours, theirs = open_source(domain.run()), open_source(weights)
    assert ours.has_softmax and ours.vocabulary.ids.keys() >= {"router", "packet"}
    for name, parameter in theirs.model.named_parameters():
        assert torch.equal(ours.model.state_dict()[name], parameter), "only the softmax was to be trained"
    assert "that is of a new softmax" in outcome.printed
    assert outcome.result["best_perplexity"] < outcome.result["initial"]["perplexity"]
    assert domain.finetune(weights, "--fresh", "--dry-run").code == 0
    assert "softmax_first: 1000" in domain.finetune(weights, "--fresh", "--dry-run").printed


@pytest.mark.slow
def test_a_stopped_run_goes_on_without_its_source(domain: Domain) -> None:
    """Stopped by a duration that is made longer, the source gone: the same bits as a run that was never stopped."""
    changes = (
        "data.vocab=counted",
        "train.softmax_first=5",
        "optim.part_lr.softmax=0.3",
        "train.checkpoint_every=5 steps",
    )
    assert domain.finetune(domain.source, *changes, "run.name=whole").code == 0
    moved = domain.folder / "elsewhere"
    shutil.copytree(domain.source, moved)
    assert domain.finetune(moved, *changes, "run.name=cut", "train.duration=6 steps").code == 0
    shutil.rmtree(moved)
    shutil.rmtree(domain.run("cut") / "checkpoints" / "step-00000006-attempt-001")
    assert domain.finetune(moved, *changes, "run.name=cut", "--resume").code == 0
    found = differences(domain.run("whole"), domain.run("cut"))
    # the shorter run validated at its end too, and says how long it was
    assert [text for text in found if "step 6" not in text and "total_steps" not in text] == []


def test_slots_are_kept_or_reset(domain: Domain) -> None:
    for how in ("keep", "reset"):
        assert domain.finetune(domain.source, f"init.optimizer={how}", f"run.name={how}", "optim.lr=1e-9").code == 0
    slots = {how: newest(domain.run(how)).tensors("optimizer.safetensors") for how in ("keep", "reset")}
    theirs = newest(domain.source).tensors("optimizer.safetensors")
    for name, before in theirs.items():
        # at this rate the model stays as it is, so that both ways add the same squares
        assert torch.allclose(slots["keep"][name] - before, slots["reset"][name] - 1, atol=2e-3), name
    export.export_model(domain.source, domain.folder / "published")
    outcome = domain.finetune(domain.folder / "published", "init.optimizer=keep", "run.name=none")
    assert outcome.code == 2 and "has no optimizer slots; set init.optimizer=reset" in outcome.errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.lstm.dim=9"], "model.lstm.dim=9: the source has 8; remove it"),
        (["train.freeze=[lstm.5]"], "train.freeze has lstm.5: the model's components are char_embedding"),
        (["softmax.tied=true"], "tied"),
        (["data.max_vocab=9"], "data.max_vocab is set, but the vocabulary is the source's"),
        (["train.validate_every=null"], "train.validate_every=null: the model is measured before and after"),
        (["data.valid=[]"], "data.valid is empty; the model is measured before and after: set it, or data.holdout"),
        (["init.vocab=vocab.txt"], "init.vocab=.*: .* has its own; leave it out"),
        (["init.from=nowhere"], "nowhere: no such file or folder"),
        (["init.optimizer=both"], "init.optimizer=both: must be keep or reset"),
    ],
)
def test_what_contradicts_the_source_is_refused_and_leaves_nothing(
    domain: Domain, arguments: list[str], message: str
) -> None:
    outcome = domain.finetune(domain.source, *arguments)
    assert outcome.code == 2 and re.search(message, outcome.errors[0]), outcome.errors
    assert not domain.run().exists()


def test_the_same_settings_of_the_model_may_be_given(domain: Domain) -> None:
    outcome = domain.finetune(domain.source, "model.lstm.dim=8", "model.char_cnn.filters=[[1, 4], [2, 4]]", "--dry-run")
    assert outcome.code == 0 and "init" not in outcome.result["config"]


@pytest.mark.slow
def test_words_as_input(domain: Domain) -> None:
    """Rows of the word table go with the words too."""
    words = Vocabulary.from_words(["<S>", "</S>", "<UNK>", ".", "the", "cat", "sees", "dog", "a", "bird", "fish"])
    from helpers.saved_models import save_checkpoint

    config = PretrainConfig.from_dict(
        {"model": {"input": "words", "lstm": {"dim": 6, "projection_dim": 4}}, "softmax": {"negatives": 4}}
    )
    model = random_model(config, words.size)
    source = save_checkpoint(domain.folder / "words", config, words.words, model)
    outcome = domain.finetune(source, "data.vocab=counted", "train.freeze=[word_embedding]")
    assert outcome.code == 0, outcome.errors
    ours = open_source(domain.run())
    assert ours.model.word_embedding is not None and model.word_embedding is not None
    for word in ("the", "cat"):
        assert torch.equal(ours.model.word_embedding[ours.vocabulary.ids[word]], model.word_embedding[words.ids[word]])
    assert torch.equal(ours.model.word_embedding[ours.vocabulary.ids["router"]], model.word_embedding[words.unk])


def test_from_a_model_of_elmo_for_many_langs(domain: Domain) -> None:
    source = Path(__file__).parents[1] / "golden" / "many_langs" / "words"
    outcome = domain.finetune(
        source, "data.vocab=counted", "train.softmax_first=4", "softmax.kind=full", "optim.lr=0.1"
    )
    assert outcome.code == 0, outcome.errors
    theirs, ours = open_source(source), open_source(newest(domain.run()).path)
    start = open_source(checkpoints(domain.run())[0])
    embedder = theirs.model.token_embedder
    assert embedder is not None and "router" in start.vocabulary.ids
    vectors = embedder.vectors_of(start.vocabulary)
    assert torch.equal(start.model.state_dict()["word_embedding"], vectors), "of all words of the new text"
    kernel = "lstm.layers.0.input_kernel"
    assert torch.equal(start.model.state_dict()[kernel], theirs.model.state_dict()[kernel])
    assert not torch.equal(ours.model.state_dict()[kernel], theirs.model.state_dict()[kernel]) and ours.has_softmax
    assert outcome.result["best_perplexity"] < outcome.result["initial"]["perplexity"]
    # with its own words
    outcome = domain.finetune(source, "run.name=own", "train.softmax_first=0", "softmax.negatives=4")
    assert outcome.code == 0, outcome.errors
    assert open_source(domain.run("own")).vocabulary.words[3:5] == ["The", "cat"]
