"""bilm-tf's TensorFlow checkpoints as a SOURCE, and everything as an elmo_ray checkpoint.

Most tests need TensorFlow, an extra, and are skipped where it is not installed; those of names and slots do not.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers.golden_steps import Case
from helpers.saved_models import random_model, save_checkpoint

from elmo_ray import evaluate, export
from elmo_ray.checkpoints.bilm_tf.hdf5 import same_weights
from elmo_ray.checkpoints.bilm_tf.options import to_options
from elmo_ray.checkpoints.bilm_tf.tensorflow import find_checkpoint
from elmo_ray.checkpoints.bilm_tf.variables import from_variables, to_variables
from elmo_ray.checkpoints.source import Source, open_source
from elmo_ray.config import EvaluateConfig, ExportConfig, PretrainConfig
from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary
from elmo_ray.errors import ConfigError, FormatError
from elmo_ray.model.bilm import BiLM
from elmo_ray.training.step import TrainStep

WORDS = [*SPECIAL_WORDS, "the", "cat", "sees", "a", "dog", "."]
SMALL: dict[str, Any] = {
    "char_cnn": {"filters": [[1, 3], [2, 5]], "embedding_dim": 4, "max_characters": 12, "n_highway": 1},
    "lstm": {"dim": 6, "projection_dim": 4, "n_layers": 2},
}


@pytest.fixture(scope="module")
def tensorflow() -> ModuleType:
    return pytest.importorskip("tensorflow", reason="TensorFlow is not installed (pip install 'elmo-ray[tensorflow]')")


def golden_source(shared: Path, of: str = "tf_checkpoint") -> Source:
    return open_source(shared / "golden" / of, vocab=str(shared / "golden" / "model" / "vocab.txt"))


def save(tensorflow: ModuleType, prefix: Path, variables: dict[str, np.ndarray]) -> None:
    """As TensorFlow's saver writes variables."""
    names = sorted(variables)
    tensors = [tensorflow.constant(variables[name]) for name in names]
    slices = [""] * len(names)
    tensorflow.raw_ops.SaveV2(prefix=str(prefix), tensor_names=names, shape_and_slices=slices, tensors=tensors)
    (prefix.parent / "checkpoint").write_text(f'model_checkpoint_path: "/home/somebody/{prefix.name}"\n')


def saved_model(
    tensorflow: ModuleType, folder: Path, model: dict[str, Any], slots: bool = True, tied: bool = False
) -> tuple[BiLM, dict[str, torch.Tensor]]:
    """A random model of these settings, saved as bilm-tf saves: variables, slots, step, options, vocabulary."""
    config = PretrainConfig.from_dict({"model": model, "softmax": {"negatives": 4, "tied": tied}})
    bilm = random_model(config, len(WORDS))
    sums = {name: torch.rand_like(p) + 1 for name, p in bilm.named_parameters()}
    variables = to_variables(bilm, dict(bilm.named_parameters()))
    if slots:
        variables |= {f"{name}/Adagrad": array for name, array in to_variables(bilm, sums).items()}
    folder.mkdir(exist_ok=True)
    save(tensorflow, folder / "model.ckpt-12", variables | {"global_step": np.float32(12)})
    options = to_options(config.model, config.softmax, len(WORDS), for_training=True)
    (folder / "options.json").write_text(json.dumps(options))
    Vocabulary.from_words(WORDS).write(folder / "vocab.txt")
    return bilm, sums


# ---------------------------------------------------------------- the original's checkpoint


def test_evaluation_of_the_original_checkpoint(shared: Path, tmp_path: Path, tensorflow: ModuleType) -> None:
    golden = shared / "golden"
    config = EvaluateConfig.from_dict(
        {
            "run": {"storage_path": str(tmp_path)},
            "data": {"test": str(golden / "own_text" / "text.txt")},
            "evaluate": {"streams": 1},
            "cluster": {"workers": 0},
            "init": {"from": str(golden / "tf_checkpoint"), "vocab": str(golden / "model" / "vocab.txt")},
        }
    )
    result = evaluate.run(config)
    assert isinstance(result, evaluate.EvaluateResult)
    assert result.values["perplexity"] == pytest.approx(1494.413, abs=2e-3)
    assert result.values["step"] == 657


@pytest.mark.slow
@pytest.mark.parametrize("way", ["opened", "imported", "variables"])
def test_two_more_training_steps(shared: Path, tmp_path: Path, way: str) -> None:
    """`variables`: from the list of all variables beside the checkpoint, for which TensorFlow is not needed."""
    path = shared / "golden" / "continue_training" / "continue_from_checkpoint.npz"
    case = Continued(path)
    if way == "variables":
        with np.load(shared / "golden" / "model" / "all_variables.npz") as file:
            arrays = {name: file[name] for name in file.files}
        case.model.load_state_dict(from_variables(case.model, arrays, "all_variables.npz"))
        slots = from_variables(
            case.model, {n.removesuffix("/Adagrad"): a for n, a in arrays.items() if n.endswith("/Adagrad")}, "slots"
        )
        sums = {f"accumulator.{name}": slot for name, slot in slots.items()}
    else:
        pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
        source = golden_source(shared)
        if way == "imported":
            written = export.run(
                ExportConfig.from_dict(
                    {
                        "init": {
                            "from": str(shared / "golden" / "tf_checkpoint"),
                            "vocab": str(shared / "golden" / "model" / "vocab.txt"),
                        },
                        "out": str(tmp_path / "imported"),
                        "export": {"format": "checkpoint"},
                        "cluster": {"workers": 0},
                    }
                )
            )
            assert written.to_dict()["optimizer_slots"] is True
            source = open_source(tmp_path / "imported")
            assert source.step == 657
        assert source.slots is not None
        case.model.load_state_dict(source.model.state_dict())
        sums = source.slots()
    case.check(sums)


class Continued(Case):
    """Two steps of bilm-tf from its checkpoint; the initial values come from there."""

    def __init__(self, path: Path):
        self.options = json.loads(path.with_suffix(".options.json").read_text())
        with np.load(path) as file:
            self.golden = {key: file[key] for key in file.files}
        from elmo_ray.checkpoints.bilm_tf.options import from_options

        model, softmax = from_options(self.options, str(path))
        self.config = PretrainConfig.from_dict(
            {
                "model": model.to_dict(),
                "softmax": softmax.to_dict(),
                "data": {"streams": self.options["batch_size"], "train": "unused"},
                "train": {"unroll": self.options["unroll_steps"], "dropout": 0.0, "reset": "never"},
                "optim": {"lr": 0.2, "clip_norm": self.options["all_clip_norm_val"]},
            }
        )
        self.model = BiLM(model, softmax, self.options["n_tokens_vocab"])

    def check(self, slots: dict[str, torch.Tensor]) -> None:
        step = TrainStep(self.config, self.model, rows=self.options["batch_size"], total_steps=2)
        step.optimizer.load_state_tensors(slots)
        checked = 0
        for s in range(2):
            step.run(self.batch(s, 0, 1))
            after = to_variables(self.model, dict(self.model.named_parameters()))
            sums = {k.removeprefix("accumulator."): v for k, v in step.optimizer.state_tensors().items()}
            ours = {f"var_after/{name}": array for name, array in after.items()}
            ours |= {f"accumulator_after/{name}": array for name, array in to_variables(self.model, sums).items()}
            wanted = {
                key.removeprefix(f"step{s}/"): array
                for key, array in self.golden.items()
                if key.startswith(f"step{s}/") and "_after/" in key
            }
            assert sorted(wanted) == sorted(ours)
            for name, expected in wanted.items():
                error = float(np.abs(ours[name] - expected).max()) / float(np.abs(expected).max())
                assert error <= 1e-5, f"step {s}: {name} is off by {error:.2e} of its largest value"
                checked += 1
        assert checked > 100


# ---------------------------------------------------------------- other models' checkpoints


@pytest.mark.parametrize(
    ("model", "tied"),
    [
        (SMALL, False),
        ({**SMALL, "lstm": {"dim": 6, "projection_dim": 4, "n_layers": 1}}, False),
        ({**SMALL, "bidirectional": False}, False),
        ({**SMALL, "lstm": {"dim": 8, "projection_dim": 8, "n_layers": 1, "use_skip_connections": False}}, False),
        ({"input": "words", "lstm": SMALL["lstm"]}, False),
        ({"input": "words", "lstm": SMALL["lstm"]}, True),
    ],
    ids=["usual", "one layer", "forward only", "no projection", "words", "tied"],
)
def test_every_kind_of_model(tensorflow: ModuleType, tmp_path: Path, model: dict[str, Any], tied: bool) -> None:
    bilm, sums = saved_model(tensorflow, tmp_path / "save", model, tied=tied)
    source = open_source(tmp_path / "save")
    assert source.step == 12 and source.has_softmax and source.slots is not None
    assert not same_weights(bilm, source.model)
    for name, parameter in bilm.named_parameters():
        assert torch.equal(source.model.state_dict()[name], parameter)
        assert torch.equal(source.slots()[f"accumulator.{name}"], sums[name])


def test_what_does_not_fit_is_refused(tensorflow: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "save"
    saved_model(tensorflow, folder, SMALL, slots=False)
    assert open_source(folder).slots is None
    assert as_checkpoint(folder, tmp_path / "imported")["optimizer_slots"] is False
    for name in ("checkpoint", "model.ckpt-12.index", "model.ckpt-12.data-00000-of-00001"):
        assert open_source(folder / name).step == 12

    def refused(kind: type[Exception], message: str, **changes: Any) -> None:
        with pytest.raises(kind, match=message) as caught:
            open_source(folder, **changes)
        assert "\n" not in str(caught.value)

    Vocabulary.from_words([*WORDS, "more"]).write(tmp_path / "long.txt")
    refused(ConfigError, "has 10 words, the softmax of .* has 9", vocab=str(tmp_path / "long.txt"))
    refused(ConfigError, "must be best, last or a checkpoint in .*model.ckpt-12", checkpoint="model.ckpt-13")
    assert open_source(folder, "model.ckpt-12").step == 12 and open_source(folder / "model.ckpt-12").step == 12
    options = json.loads((folder / "options.json").read_text())
    for change, message in (
        ({"dim": 7}, "has shape .* the options ask for"),
        ({"n_layers": 1}, "lstm_cell"),
        ({"n_layers": 3}, "has no variable lm/RNN_0/rnn/multi_rnn_cell/cell_2"),
    ):
        (folder / "options.json").write_text(json.dumps({**options, "lstm": {**options["lstm"], **change}}))
        refused(FormatError, message)
    (folder / "options.json").write_text(json.dumps({**options, "char_cnn": {**options["char_cnn"], "n_highway": 0}}))
    refused(FormatError, "has lm/CNN_high_0/W_carry, for which the options have no place")
    (folder / "options.json").write_text(json.dumps(options))
    (folder / "vocab.txt").unlink()
    with pytest.raises(ConfigError, match="init.vocab=FILE"):
        _ = open_source(folder).vocabulary
    refused(FormatError, "n_tokens|JSON|no such", options=str(folder / "checkpoint"), vocab=str(tmp_path / "long.txt"))
    for path in folder.glob("*.data-*"):
        path.write_bytes(path.read_bytes()[:100])
    Vocabulary.from_words(WORDS).write(folder / "vocab.txt")
    refused(FormatError, "cannot be read")
    (folder / "model.ckpt-12.index").write_bytes(b"nonsense")
    refused(FormatError, "cannot be read as a TensorFlow checkpoint")


# ---------------------------------------------------------------- without TensorFlow


def test_which_checkpoint_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no .index file"):
        find_checkpoint(tmp_path)
    for number in (9, 100, 20):
        (tmp_path / f"model.ckpt-{number}.index").touch()
    assert find_checkpoint(tmp_path).name == "model.ckpt-100"
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/elsewhere/save/model.ckpt-20"\n')
    assert find_checkpoint(tmp_path) == tmp_path / "model.ckpt-20"
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "gone.ckpt-21"\n')
    assert find_checkpoint(tmp_path).name == "model.ckpt-100"
    (tmp_path / "checkpoint").write_bytes(b"\xff\x00")
    assert find_checkpoint(tmp_path).name == "model.ckpt-100"


def test_without_tensorflow_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PretrainConfig.from_dict({"model": SMALL, "softmax": {"negatives": 4}})
    (tmp_path / "model.ckpt-3.index").touch()
    (tmp_path / "options.json").write_text(json.dumps(to_options(config.model, config.softmax, len(WORDS))))
    Vocabulary.from_words(WORDS).write(tmp_path / "vocab.txt")
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # as where it is not installed
    with pytest.raises(ConfigError, match=r"pip install 'elmo-ray\[tensorflow\]'") as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- export.format=checkpoint


def as_checkpoint(source: Path, out: Path, **init: str) -> dict[str, Any]:
    values = {"init": {"from": str(source), **init}, "out": str(out), "export": {"format": "checkpoint"}}
    return export.run(ExportConfig.from_dict({**values, "cluster": {"workers": 0}})).to_dict()


def test_weights_become_a_checkpoint_and_come_back(tmp_path: Path) -> None:
    config = PretrainConfig.from_dict({"model": SMALL, "softmax": {"negatives": 4}})
    save_checkpoint(tmp_path / "ours", config, WORDS, random_model(config, len(WORDS)))
    export.export_model(tmp_path / "ours", tmp_path / "published")
    assert as_checkpoint(tmp_path / "published", tmp_path / "back")["softmax"] is False
    back, weights = open_source(tmp_path / "back"), open_source(tmp_path / "published")
    assert not back.has_softmax and back.slots is None and back.words is not None
    assert not same_weights(back.model, weights.model) and back.config == weights.config
    assert export.export_model(tmp_path / "back", tmp_path / "again").difference == 0
    assert not same_weights(open_source(tmp_path / "again").model, weights.model)


def test_a_checkpoint_is_copied_and_nothing_else_is_overwritten(tmp_path: Path) -> None:
    config = PretrainConfig.from_dict({"model": SMALL, "softmax": {"negatives": 4}})
    ours = save_checkpoint(tmp_path / "ours", config, WORDS, random_model(config, len(WORDS)))
    as_checkpoint(ours, tmp_path / "copy")
    as_checkpoint(ours, tmp_path / "copy")
    assert open_source(tmp_path / "copy").fingerprint == open_source(ours).fingerprint
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="exists and is no checkpoint"):
        as_checkpoint(ours, tmp_path / "mine")
    with pytest.raises(ConfigError, match="is the SOURCE itself"):
        as_checkpoint(ours, ours)
    shutil.rmtree(ours)
    assert (tmp_path / "mine" / "thesis.tex").exists()
