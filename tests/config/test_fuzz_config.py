"""Settings that nobody would write: only ConfigError comes out, a line for each mistake, and what is taken is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fuzzing import (
    DAMAGES,
    absurd_numbers,
    check_message,
    damaged,
    fuzz,
    hostile_texts,
    nested,
    paths_of,
    plain_values,
    replaced,
    scalars,
)
from helpers.tiny_runs import tiny_values
from hypothesis import assume, given
from hypothesis import strategies as st

from elmo_ray.config import EvaluateConfig, ExportConfig, PrepareConfig, PretrainConfig, ReportConfig, SoftmaxConfig
from elmo_ray.config.command_line import load_config
from elmo_ray.config.model import ModelConfig
from elmo_ray.config.schema import Root, keys
from elmo_ray.config.yaml_reader import parse_yaml
from elmo_ray.errors import ConfigError
from elmo_ray.model.bilm import BiLM

pytestmark = pytest.mark.slow

ROOTS: list[type[Root]] = [PretrainConfig, PrepareConfig, EvaluateConfig, ExportConfig, ReportConfig]
roots = st.sampled_from(ROOTS)
NAMES = {root: [key.name for key in keys(root)] for root in ROOTS}
SECTIONS = ["run", "data", "model", "model.lstm", "model.char_cnn", "softmax", "optim", "train", "init", "x", ""]

YAML_PARTS = [
    "run:", "data:", "optim:", " lr", "lr: ", "- ", "[", "]", "{", "}", ",", ": ", "\n", "\n  ", "\t", "&a ", "*a ",
    "? ", "!!python/object/apply:os.system ", "!!python/name:os.system ", "!!bool ", "!!int ", "!!float ", "!!null ",
    "!!map ", "!!seq ", "!!str ", "!!set ", "!!omap ", "!!pairs ", "!!binary ", "!!timestamp ", "!x ", "!<y> ", "<<: ",
    "= ", "|\n", ">-\n", "'", '"', "\\x", "%YAML 1.2\n---\n", "%TAG ! x\n", "---\n", "...\n", "#", "1", "0x1",
    "1_0", ".inf", ".nan", "1e999", "~", "null", "true", "off", "2024-01-01", "${HOME}", "\0", "\x85", "\u2028",
    "\ufeff", "\ud800", "é", "9" * 30,
]  # fmt: skip
yaml_texts = st.text(max_size=60) | st.lists(st.sampled_from(YAML_PARTS), max_size=14).map("".join)


def survives(config: Root) -> None:
    """What was accepted comes back from YAML and from plain values."""
    root = type(config)
    if config == root():
        return  # tests/test_config.py holds that for the defaults
    assert root.from_dict(parse_yaml(config.to_yaml(), "text") or {}) == config
    assert root.from_dict(config.to_dict()) == config


def take(root: type[Root], values: Mapping[str, Any]) -> bool:
    try:
        config = root.from_dict(values)
    except ConfigError as error:
        check_message(error, lines=None)
        assert len(set(str(error).split("\n"))) == str(error).count("\n") + 1, "a mistake is said once"
        return False
    survives(config)
    return True


@fuzz(600)
@given(yaml_texts)
def test_any_text_as_yaml(text: str) -> None:
    try:
        parse_yaml(text, "file.yaml")
    except ConfigError as error:
        check_message(error)
        assert str(error).startswith("file.yaml")


@fuzz(250)
@given(
    roots,
    st.binary(max_size=60)
    | yaml_texts.map(lambda text: text.encode("utf-8", "replace"))
    | st.builds(
        damaged,
        st.just(PretrainConfig.from_dict(tiny_values()).to_yaml().encode()),
        st.sampled_from(DAMAGES),
        st.integers(0, 2**32),
    ),
)
def test_any_bytes_as_a_file(tmp_path_factory: pytest.TempPathFactory, root: type[Root], data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(data)
    try:
        survives(load_config(path, [], root))
    except ConfigError as error:
        check_message(error, lines=None)


@fuzz(220)
@given(roots, st.dictionaries(st.sampled_from(SECTIONS) | st.text(max_size=6), plain_values, max_size=4))
def test_any_plain_values(root: type[Root], values: dict[str, Any]) -> None:
    take(root, values)


def tree(names: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings of dotted names."""
    result: dict[str, Any] = {}
    for name, value in names.items():
        *sections, last = name.split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return result


@st.composite
def settings_of(draw: st.DrawFn, value: st.SearchStrategy[Any]) -> tuple[type[Root], dict[str, Any]]:
    root = draw(roots)
    return root, tree(draw(st.dictionaries(st.sampled_from(NAMES[root]), value, min_size=1, max_size=3)))


filters = st.lists(st.lists(absurd_numbers | st.integers(0, 60), max_size=3), max_size=4)
words = st.sampled_from(
    ["never", "block", "words", "adamw", "full", "linear", "skip", "sample", "3 steps", "1e308 steps"]
)


@fuzz(300)
@given(settings_of(scalars | filters | words | st.lists(words | hostile_texts, max_size=3) | st.integers(1, 99)))
def test_any_value_of_a_key(found: tuple[type[Root], dict[str, Any]]) -> None:
    take(*found)


@fuzz(250)
@given(st.data(), plain_values | filters | words)
def test_a_good_file_with_one_value_changed(data: st.DataObject, change: Any) -> None:
    values = PretrainConfig.from_dict(tiny_values()).to_dict()
    path = data.draw(st.sampled_from(paths_of(values)))
    take(data.draw(st.sampled_from([PretrainConfig, PrepareConfig])), replaced(values, path, change))


@st.composite
def override(draw: st.DrawFn) -> tuple[type[Root], list[str]]:
    root = draw(roots)
    names = st.sampled_from(NAMES[root] + SECTIONS) | st.from_regex(r"\A[A-Za-z_][A-Za-z0-9_.]{0,12}\Z")
    values = yaml_texts | scalars.map(str) | st.sampled_from(["[[1, 2]]", "{lr: 1, lr: 2}", "{a: {b: 1}}", "&a [*a]"])
    pairs = draw(st.lists(st.tuples(names, values), min_size=1, max_size=3))
    return root, [f"{name}={value}" for name, value in pairs if name]


@fuzz(220)
@given(override())
def test_any_override(found: tuple[type[Root], list[str]]) -> None:
    root, overrides = found
    try:
        survives(load_config(None, overrides, root))
    except ConfigError as error:
        check_message(error, lines=None)


@fuzz(150)
@given(settings_of(absurd_numbers | filters))
def test_accepted_sizes_make_a_model_whose_layers_are_counted_right(found: tuple[type[Root], dict[str, Any]]) -> None:
    try:
        config = ModelConfig(**found[1].get("model", {}))
    except ValueError:
        assume(False)
    with torch.device("meta"):
        model = BiLM(config, SoftmaxConfig(), 7)
    tables = model.char_cnn.embedding.numel() if model.char_cnn is not None else 0
    assert sum(p.numel() for p in model.dense_parameters().values()) - tables == config.layer_parameters() <= 10**10


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
CHAIN = "a: &a0 [x]\n" + "".join(f"k{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 400))


@pytest.mark.parametrize("text", [BOMB, CHAIN, "[" * 300, "{a: " * 300, "a: " + "[" * 60 + "]" * 60, "x" * (2 << 20)])
def test_yaml_that_grows_or_goes_deep_is_refused_at_once(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"more than|recursion|line \d+") as caught:
        load_config(tmp_path / "c.yaml", [], PretrainConfig)
    check_message(caught.value)


@pytest.mark.parametrize("depth", [50, 5000])
@pytest.mark.parametrize("place", ["optim", "optim.lr", "data.train", "model.char_cnn.filters", "x.y"])
def test_values_nested_deep(place: str, depth: int) -> None:
    for mapping in (False, True):
        with pytest.raises(ConfigError) as caught:
            PretrainConfig.from_dict(tree({place: nested(depth, mapping)}))
        check_message(caught.value, lines=None)


@pytest.mark.parametrize("name", sorted({*NAMES[PretrainConfig], *NAMES[EvaluateConfig], *NAMES[ExportConfig]}))
def test_no_number_is_without_bounds(name: str) -> None:
    root = next(root for root in (PretrainConfig, EvaluateConfig, ExportConfig) if name in NAMES[root])
    allowed = next(key.allowed for key in keys(root) if key.name == name)
    for value in (2**63 if "integer" in allowed else 1e31, 1e300, -1e300, 10**5000):
        with pytest.raises(ConfigError) as caught:
            root.from_dict(tree({name: value}))
        check_message(caught.value)
        assert str(caught.value).startswith(name)


@pytest.mark.parametrize("name", ["run.storage_path", "run.name", "data.vocab", "data.train", "data.prepared_dir"])
def test_a_nul_is_no_part_of_a_path(name: str) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        PretrainConfig.from_dict(tree({name: "a\0b"}))
    check_message(caught.value)


def test_sizes_that_are_absurd_together() -> None:
    with pytest.raises(ConfigError, match=r"model has \d+ parameters in its layers: must be <= 10000000000"):
        PretrainConfig.from_dict(tree({"model.lstm.dim": 65536, "model.lstm.projection_dim": 65536}))
    with pytest.raises(ConfigError, match=r"data.streams=1000000 times train.unroll=1000 makes steps of 1000000000"):
        PretrainConfig.from_dict(tree({"data.streams": 1_000_000, "train.unroll": 1000}))
    with contextlib.suppress(ConfigError):
        assert PretrainConfig.from_dict(tree({"model.lstm.dim": 4096, "model.lstm.projection_dim": 512}))
