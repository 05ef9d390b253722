"""The three calls of `elmo_ray.api`: settings in every form, results, errors as exceptions, help."""

from __future__ import annotations

import dataclasses
import pydoc
from pathlib import Path
from typing import Any

import h5py
import pytest
from helpers.tiny_runs import sentences, tiny_values

from elmo_ray import api
from elmo_ray.config import PretrainConfig
from elmo_ray.config.command_line import CONFIGS, find_config, shipped_configs
from elmo_ray.errors import ConfigError, DataError, ElmoRayError


def write_text(path: Path, n: int, seed: int) -> Path:
    path.write_text("".join(line + "\n" for line in sentences(n, seed)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    for number, name in enumerate(("train", "valid", "test")):
        write_text(folder / f"{name}.txt", 400 if name == "train" else 40, number)
    return folder


@pytest.fixture(scope="module")
def trained(work: Path) -> api.Pretrained:
    values = tiny_values(data__train=str(work / "train.txt"), data__valid=str(work / "valid.txt"))
    return api.pretrain(
        values,
        run={"storage_path": work / "runs", "name": "tiny"},
        data={"test": str(work / "test.txt"), "max_vocab": 30},
        **{"train.duration": "12 steps", "train.validate_every": "6 steps"},
    )


@pytest.mark.slow
def test_pretrain_returns_the_run_and_its_measures(work: Path, trained: api.Pretrained) -> None:
    assert trained.run_dir == str(work / "runs" / "tiny") and trained.finished and trained.steps == 12
    assert trained.export_dir is not None and (Path(trained.export_dir) / "weights.hdf5").is_file()
    assert trained.perplexity == trained.values["evaluation"]["perplexity"] and trained.perplexity > 1
    assert trained.best_perplexity is not None and trained.best_step in (6, 12)
    with pytest.raises(dataclasses.FrozenInstanceError):
        trained.steps = 0  # type: ignore[misc]
    assert "values" not in repr(trained), "a result fits on a notebook's screen"


@pytest.mark.slow
def test_evaluate_finds_the_perplexity_of_the_training(work: Path, trained: api.Pretrained) -> None:
    found = api.evaluate(
        trained.run_dir, work / "test.txt", evaluate={"streams": 3}, cluster={"workers": 0}, run={"storage_path": work}
    )
    assert found.perplexity == trained.perplexity and found.positions == trained.values["evaluation"]["positions"]
    assert found.streams is not None and 1 <= found.streams <= 3
    assert found.perplexity_forward is not None and found.oov_rate is not None and 0 < found.oov_rate < 1


@pytest.mark.slow
def test_embed_writes_vectors(work: Path, trained: api.Pretrained, tmp_path: Path) -> None:
    out = tmp_path / "vectors.hdf5"
    written = api.embed(trained.run_dir, [work / "test.txt"], out, embed={"layers": "top"}, cluster={"workers": 0})
    assert written.out == str(out) and written.sentences == 40
    with h5py.File(out) as file:
        assert file["0"].shape[-1] == 16
    with pytest.raises(ConfigError, match="fresh"):
        api.embed(trained.run_dir, work / "test.txt", out, cluster={"workers": 0})


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(work: Path, trained: api.Pretrained) -> None:
    config = PretrainConfig.from_dict(trained_values(trained))
    again = api.pretrain(config, resume=True)
    assert again.steps == trained.steps and again.perplexity == trained.perplexity


def trained_values(trained: api.Pretrained) -> dict[str, Any]:
    from elmo_ray.config.yaml_reader import parse_yaml

    return dict(parse_yaml((Path(trained.run_dir) / "config.yaml").read_text(encoding="utf-8"), "config.yaml"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": {"lrr": 1}}, "did you mean optim.lr"),
        ({"optim.lr": "fast"}, "optim.lr=fast"),
        ({"nonsense": 1}, "unknown key nonsense"),
    ],
)
def test_mistakes_are_exceptions_of_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        api.pretrain("quickstart", **settings)
    assert len(str(caught.value).splitlines()) == 1


def test_mistakes_in_places(work: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean quickstart"):
        api.pretrain("quickstrat")
    with pytest.raises(ConfigError, match="exclude each other"):
        api.pretrain("quickstart", resume=True, fresh=True)
    with pytest.raises(ElmoRayError, match="no such file or folder"):
        api.evaluate(tmp_path / "nothing", work / "test.txt")
    with pytest.raises(TypeError, match="source is None; it must be a path"):
        api.evaluate(None, work / "test.txt")  # type: ignore[arg-type]
    for text in (3, None, b"t.txt", [["The", "cat"]]):
        with pytest.raises(TypeError, match="text is .*; it must be a path or a glob, or several"):
            api.evaluate(tmp_path, text)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="give a path, a name"):
        api.pretrain(3)  # type: ignore[arg-type]
    with pytest.raises(ElmoRayError, match="in is empty"):
        api.embed(tmp_path, None, tmp_path / "out")
    assert issubclass(DataError, ElmoRayError)


def test_help_shows_the_calls() -> None:
    text = pydoc.render_doc(api, renderer=pydoc.plaintext)
    for name in ("pretrain(", "evaluate(", "embed(", "class Pretrained", "run_dir: the run's folder"):
        assert name in text
    assert "elmo_ray.config" not in text.split("FUNCTIONS")[0].split("CLASSES")[0], "no types of the inside in front"


def test_a_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart") == CONFIGS / "quickstart.yaml"
    (tmp_path / "quickstart").write_text("{}")
    assert find_config("quickstart") == Path("quickstart")


def test_all_configurations_of_the_repository_have_a_name(repository: Path) -> None:
    there = {path.stem for path in (repository / "configs").glob("*.yaml")}
    assert set(shipped_configs()) == there and "quickstart" in there
    assert (repository / "elmo_ray" / "configs").resolve() == repository / "configs"  # one source, no copy
