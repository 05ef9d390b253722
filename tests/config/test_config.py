"""Settings: defaults, strictness, one line for each mistake, contradictions, and the way to plain values and back."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from elmo_ray.config import EvaluateConfig, ExportConfig, PrepareConfig, PretrainConfig, ReportConfig, TextConfig
from elmo_ray.config.model import LstmConfig
from elmo_ray.config.schema import Duration, Root, keys
from elmo_ray.config.yaml_reader import parse_yaml
from elmo_ray.errors import ConfigError

ROOTS = [PretrainConfig, PrepareConfig, EvaluateConfig, ExportConfig, ReportConfig]


def errors(values: dict[str, Any], root: type[Root] = PretrainConfig) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        root.from_dict(values)
    return str(caught.value).split("\n")


@pytest.mark.parametrize("root", ROOTS)
def test_defaults_survive_the_way_through_yaml(root: type[Root]) -> None:
    config = root()
    assert root.from_dict(config.to_dict()) == config
    assert root.from_dict(parse_yaml(config.to_yaml(), "text")) == config
    assert root.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("root", ROOTS)
def test_every_key_is_described(root: type[Root]) -> None:
    for key in keys(root):
        assert key.field.description and "\n" not in key.field.description, key.name
        assert key.allowed and "typing" not in key.allowed and "Literal" not in key.allowed, key.name


def test_original_defaults() -> None:
    config = PretrainConfig()
    assert config.model.lstm == LstmConfig(dim=512, projection_dim=128, n_layers=2, cell_clip=3.0, proj_clip=3.0)
    assert (config.optim.name, config.optim.lr, config.optim.clip_norm) == ("adagrad", 0.2, 10.0)
    assert config.train.duration == Duration(10, "epochs")
    assert config.softmax.negatives == 1024 and config.data.streams == 32


def test_frozen() -> None:
    config = PretrainConfig()
    with pytest.raises(ValidationError):
        config.optim.lr = 0.1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"optim": {"lrr": 1.0}}, "unknown key optim.lrr; did you mean optim.lr?"),
        ({"lr": 1.0}, "unknown key lr; did you mean optim.lr?"),
        ({"model": {"lstm": {"dims": 3}}}, "unknown key model.lstm.dims; did you mean model.lstm.dim?"),
        ({"modle": {}}, "unknown key modle; --help lists the keys"),
        ({"optim": {"lr": -1}}, "optim.lr=-1: must be a number > 0"),
        ({"optim": {"lr": "abc"}}, "optim.lr=abc: must be a number > 0"),
        ({"optim": {"lr": True}}, "optim.lr=true: must be a number > 0"),
        ({"optim": {"lr": math.inf}}, "optim.lr=.inf: must be a number > 0"),
        ({"optim": 3}, "optim=3: must be a mapping of name, lr, table_lr, clip_norm"),
        ({"data": {"streams": 1.5}}, "data.streams=1.5: must be an integer >= 1"),
        ({"data": {"streams": "3"}}, 'data.streams="3": must be an integer >= 1'),
        ({"data": {"streams": True}}, "data.streams=true: must be an integer >= 1"),
        ({"data": {"streams": None}}, "data.streams=null: must be an integer >= 1"),
        ({"data": {"train": 3}}, "data.train=3: must be a glob or a list of globs"),
        ({"data": {"train": ["a", 3]}}, "data.train[1]=3: must be a glob or a list of globs"),
        ({"data": {"shuffle": "lines"}}, "data.shuffle=lines: must be blocks or off"),
        ({"data": {"block_bytes": 100}}, "data.block_bytes=100: must be an integer >= 4096 and <= 16777216"),
        (
            {"run": {"name": "a/b"}},
            "run.name=a/b: must be of a-z A-Z 0-9 . _ = + - (first no sign; 200 at most), or null",
        ),
        ({"run": {"name": "second try"}}, "run.name=second try: must be of a-z A-Z 0-9"),
        ({"train": {"duration": "3 parsecs"}}, "train.duration=3 parsecs: must be a duration like"),
        ({"train": {"duration": "-3 steps"}}, "train.duration=-3 steps: must be a duration like"),
        ({"train": {"duration": 3}}, "train.duration=3: must be a duration like"),
        ({"train": {"reset": "often"}}, "train.reset=often: must be never, block or a probability from 0 to 1"),
        ({"train": {"reset": 1.5}}, "train.reset=1.5: must be never, block or a probability from 0 to 1"),
        ({"train": {"dropout": 1.0}}, "train.dropout=1.0: must be a number >= 0 and < 1"),
        ({"train": {"dropout": [0.1, 0.2]}}, "train.dropout=[0.1, 0.2]: must be a number >= 0 and < 1, or [input, bet"),
        ({"train": {"dropout": [0, 0.2, 1]}}, "train.dropout=[0, 0.2, 1]: must be"),
        ({"model": {"char_cnn": {"filters": [[1, "a"]]}}}, "model.char_cnn.filters[0][1]=a: must be [[integer"),
        ({"model": {"char_cnn": {"filters": [[1, 0]]}}}, "model.char_cnn.filters has [1, 0]: width and count"),
        ({"model": {"char_cnn": {"filters": []}}}, "model.char_cnn.filters=[]: must have"),
    ],
)
def test_a_mistake_is_one_line(values: dict[str, Any], line: str) -> None:
    lines = errors(values)
    assert len(lines) == 1
    assert lines[0].startswith(line)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cluster": {"workers": 40}}, ["cluster.workers=40", "data.streams=32"]),
        ({"model": {"char_cnn": {"filters": [[60, 2]]}}}, ["width 60", "model.char_cnn.max_characters=50"]),
        ({"model": {"lstm": {"dim": 8, "projection_dim": 9}}}, ["model.lstm.projection_dim=9", "model.lstm.dim=8"]),
        ({"softmax": {"tied": True}}, ["softmax.tied", "model.input=words"]),
        ({"model": {"input": "words", "char_cnn": {"n_highway": 1}}}, ["model.char_cnn is set", "model.input=words"]),
        ({"softmax": {"kind": "full", "negatives": 9}}, ["softmax.negatives is set", "softmax.kind=full"]),
        ({"optim": {"weight_decay": 0.1}}, ["optim.weight_decay is set", "optim.name=adamw"]),
        ({"optim": {"schedule": {"final_ratio": 0.1}}}, ["optim.schedule.final_ratio is set"]),
        ({"optim": {"schedule": {"factor": 0.1}}}, ["optim.schedule.factor is set", "optim.schedule.kind=plateau"]),
        ({"optim": {"momentum": 0.5}}, ["optim.momentum is set", "optim.name=sgd"]),
        ({"optim": {"name": "sgd", "initial_accumulator": 0.1}}, ["optim.initial_accumulator is set"]),
        ({"optim": {"name": "sgd", "momentum": 0.9}}, ["optim.momentum=0.9", "softmax.kind=full"]),
        (
            {"optim": {"schedule": {"kind": "plateau"}}, "train": {"validate_every": None}},
            ["optim.schedule.kind=plateau", "train.validate_every=null"],
        ),
        (
            {"optim": {"schedule": {"kind": "plateau"}}, "data": {"train": "x"}},
            ["optim.schedule.kind=plateau", "data.holdout"],
        ),
        (
            {"model": {"char_cnn": {"filters": [[1, 128]], "projection": False}}},
            ["model.char_cnn.projection is set", "model.lstm.projection_dim"],
        ),
        ({"data": {"holdout": 0.1, "valid": "x"}}, ["data.holdout=0.1", "data.valid"]),
        ({"data": {"vocab": "v", "min_count": 2}}, ["data.min_count is set", "data.vocab=v"]),
        ({"data": {"train": ["sample", "x"]}}, ["data.train", "sample"]),
        ({"data": {"train": "x"}, "train": {"validate_every": "5 steps"}}, ["train.validate_every", "data.holdout"]),
        ({"train": {"validate_every": None, "validate_positions": 5}}, ["train.validate_positions is set"]),
        ({"train": {"max_skips": 5}}, ["train.max_skips is set", "train.on_nonfinite=stop"]),
        ({"evaluate": {"reset": "sentence", "streams": 5}}, ["evaluate.streams is set"]),
    ],
)
def test_contradictions(values: dict[str, Any], words: list[str]) -> None:
    lines = errors(values)
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines


def test_each_of_several_mistakes_has_its_line() -> None:
    lines = errors({"optim": {"lr": 0, "lrr": 1}, "train": {"dropout": 2}, "data": {"streams": []}, "x": 1})
    assert len(lines) == 5
    assert all("\n" not in line for line in lines)


def test_a_value_with_line_ends_stays_on_one_line() -> None:
    assert errors({"optim": {"lr": "a\nb"}}) == ["optim.lr=a b: must be a number > 0 and <= 1e+30"]


def test_words_need_no_char_cnn_and_do_not_show_one() -> None:
    config = PretrainConfig.from_dict({"model": {"input": "words"}, "softmax": {"tied": True}})
    assert "char_cnn" not in config.to_dict()["model"]
    assert PretrainConfig.from_dict(config.to_dict()) == config


def test_coercion_by_field() -> None:
    config = PretrainConfig.from_dict(
        {"data": {"train": "a*.txt", "streams": 1e2}, "optim": {"lr": 1}, "train": {"reset": 0}}
    )
    assert config.data.train == ("a*.txt",) and config.data.streams == 100 and type(config.data.streams) is int
    assert type(config.optim.lr) is float and config.train.reset == 0.0


def test_pretrain_file_is_a_prepare_file() -> None:
    config = PretrainConfig.from_dict({"data": {"train": "sample"}, "model": {"lstm": {"dim": 600}}})
    assert PrepareConfig.from_dict(config.to_dict()).data == config.data


def test_other_verbs_take_only_what_they_use() -> None:
    assert errors({"data": {"streams": 3}}, EvaluateConfig)[0].startswith("unknown key data.streams")
    assert EvaluateConfig.from_dict({"init": {"from": "runs/x"}}).init.source == "runs/x"
    assert errors({"init": {"source": "runs/x"}}, EvaluateConfig)[0].startswith("unknown key init.source")
    assert isinstance(PretrainConfig().data, TextConfig)


def test_required() -> None:
    assert list(PretrainConfig().required()) == ["data.train"]
    assert not PretrainConfig.from_dict({"data": {"train": "sample"}}).required()


@pytest.mark.parametrize(
    ("text", "amount", "unit", "back"),
    [
        ("3000 steps", 3000, "steps", "3000 steps"),
        ("1 epoch", 1, "epochs", "1 epochs"),
        ("0.5 epochs", 0.5, "epochs", "0.5 epochs"),
        ("1e9 positions", 1e9, "positions", "1000000000 positions"),
        ("1_000  steps", 1000, "steps", "1000 steps"),
    ],
)
def test_duration(text: str, amount: float, unit: str, back: str) -> None:
    duration = Duration.parse(text)
    assert (duration.amount, duration.unit, str(duration)) == (amount, unit, back)
    assert Duration.parse(str(duration)) == duration


def test_duration_in_steps() -> None:
    assert Duration.parse("3000 steps").steps(640, 10_000) == 3000
    assert Duration.parse("2 epochs").steps(640, 10_000) == math.ceil(20_000 / 640)
    assert Duration.parse("641 positions").steps(640, 10_000) == 2


@given(
    lr=st.floats(1e-9, 1e9),
    name=st.one_of(st.none(), st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._=+-]{0,20}\Z")),
    globs=st.lists(st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1), max_size=3),
    streams=st.integers(1, 1000),
    reset=st.one_of(st.sampled_from(["never", "block"]), st.floats(0, 1)),
    amount=st.one_of(st.integers(1, 10**12), st.floats(1e-6, 1e12)),
)
def test_any_config_survives_yaml(
    lr: float, name: str | None, globs: list[str], streams: int, reset: float | str, amount: float
) -> None:
    config = PretrainConfig.from_dict(
        {
            "run": {"name": name},
            "data": {"test": globs, "streams": streams},
            "optim": {"lr": lr},
            "train": {"reset": reset, "duration": f"{amount} positions"},
        }
        if "sample" not in globs
        else {}
    )
    assert PretrainConfig.from_dict(parse_yaml(config.to_yaml(), "text")) == config
