"""options.json of bilm-tf to our configuration and back; what is absent, what is absurd."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from elmo_ray.checkpoints.bilm_tf.options import from_options, read_options, to_options
from elmo_ray.config import PretrainConfig, SoftmaxConfig
from elmo_ray.config.model import CharCnnConfig, LstmConfig, ModelConfig
from elmo_ray.errors import FormatError

PUBLISHED: dict[str, Any] = {
    "lstm": {
        "use_skip_connections": True,
        "projection_dim": 512,
        "cell_clip": 3,
        "proj_clip": 3,
        "dim": 4096,
        "n_layers": 2,
    },
    "char_cnn": {
        "activation": "relu",
        "filters": [[1, 32], [2, 32], [3, 64], [4, 128], [5, 256], [6, 512], [7, 1024]],
        "n_highway": 2,
        "embedding": {"dim": 16},
        "n_characters": 262,
        "max_characters_per_token": 50,
    },
}
WORDS: dict[str, Any] = {"lstm": {"dim": 8, "projection_dim": 4}, "bidirectional": True}


def test_a_published_file_is_bidirectional_without_saying_so() -> None:
    model, softmax = from_options(PUBLISHED, published=True)
    assert model == ModelConfig(
        bidirectional=True,
        char_cnn=CharCnnConfig(
            filters=((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024)),
            activation="relu",
            embedding_dim=16,
            max_characters=50,
            n_highway=2,
        ),
        lstm=LstmConfig(
            dim=4096, projection_dim=512, n_layers=2, cell_clip=3.0, proj_clip=3.0, use_skip_connections=True
        ),
    )
    assert softmax.kind == "sampled" and not softmax.tied
    assert not from_options(PUBLISHED)[0].bidirectional, "in training an absent key is false"


def test_absent_keys_are_what_training_makes_of_them() -> None:
    options = {
        "lstm": {"dim": 8, "projection_dim": 4},
        "char_cnn": {
            "filters": [[1, 4]],
            "embedding": {"dim": 3},
            "activation": "tanh",
            "max_characters_per_token": 20,
        },
    }
    model, softmax = from_options(options)
    assert not model.bidirectional and model.lstm.n_layers == 1 and not model.lstm.use_skip_connections
    assert model.lstm.cell_clip is None and model.lstm.proj_clip is None
    assert model.char_cnn.n_highway == 0 and model.char_cnn.activation == "tanh"
    assert softmax.kind == "sampled" and not softmax.tied
    model, softmax = from_options({**WORDS, "share_embedding_softmax": True, "sample_softmax": False})
    assert model.input == "words" and softmax.tied and softmax.kind == "full"


@pytest.mark.parametrize("nothing", [None, 0, False])
def test_no_clip_and_no_highways(nothing: Any) -> None:
    options = copy.deepcopy(PUBLISHED)
    options["lstm"].update(cell_clip=nothing, proj_clip=nothing)
    options["char_cnn"]["n_highway"] = nothing if nothing is not False else 0
    model, _ = from_options(options)
    assert model.lstm.cell_clip is None and model.lstm.proj_clip is None and model.char_cnn.n_highway == 0


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"model": {"bidirectional": False, "char_cnn": {"activation": "tanh", "n_highway": 0, "filters": [[2, 7]]}}},
        {
            "model": {
                "lstm": {
                    "dim": 9,
                    "projection_dim": 9,
                    "n_layers": 1,
                    "cell_clip": None,
                    "proj_clip": 2.5,
                    "use_skip_connections": False,
                }
            },
            "softmax": {"kind": "full"},
        },
        {"model": {"input": "words"}, "softmax": {"tied": True, "negatives": 77}},
        {"model": {"input": "words"}, "softmax": {"kind": "full"}},
    ],
    ids=["defaults", "forward only", "one layer", "tied", "words"],
)
@pytest.mark.parametrize("for_training", [True, False])
def test_there_and_back(values: dict[str, Any], for_training: bool) -> None:
    config = PretrainConfig.from_dict(values)
    options = json.loads(json.dumps(to_options(config.model, config.softmax, 1234, for_training)))
    model, softmax = from_options(options)
    assert model.to_dict() == config.model.to_dict()
    assert softmax.to_dict() == config.softmax.to_dict()
    assert options["n_tokens_vocab"] == 1234
    if config.model.input == "characters":
        assert options["char_cnn"]["n_characters"] == (261 if for_training else 262)


def test_what_bilm_tf_wrote_comes_back(shared: Path) -> None:
    for path in sorted((shared / "golden").rglob("*options*.json")):
        options = read_options(path)
        model, softmax = from_options(options, str(path))
        ours = to_options(
            model, softmax, options["n_tokens_vocab"], options.get("char_cnn", {}).get("n_characters") == 261
        )
        for key in ("char_cnn", "bidirectional"):
            assert ours.get(key) == options.get(key, ours.get(key) if key != "char_cnn" else None), (path, key)
        for key, value in options["lstm"].items():
            assert ours["lstm"][key] == value, (path, key)


def changed(place: str, value: Any) -> dict[str, Any]:
    options = copy.deepcopy(PUBLISHED)
    *sections, key = place.split(".")
    target = options
    for section in sections:
        target = target[section]
    if value is ...:
        target.pop(key)
    else:
        target[key] = value
    return options


@pytest.mark.parametrize(("place", "value"), [
    ("lstm", ...), ("lstm", None), ("lstm", []), ("lstm", "big"),
    ("lstm.dim", ...), ("lstm.dim", 0), ("lstm.dim", -4096), ("lstm.dim", 0.5), ("lstm.dim", "4096"),
    ("lstm.dim", True), ("lstm.dim", float("nan")), ("lstm.dim", 10**40), ("lstm.dim", 10**400),
    ("lstm.projection_dim", ...), ("lstm.projection_dim", 5000), ("lstm.projection_dim", [512]),
    ("lstm.n_layers", 0), ("lstm.n_layers", None), ("lstm.n_layers", 10**9),
    ("lstm.cell_clip", -3), ("lstm.cell_clip", "3"), ("lstm.cell_clip", float("inf")), ("lstm.cell_clip", 10**400),
    ("lstm.cell_clip", True), ("lstm.proj_clip", {"a": 1}),
    ("lstm.use_skip_connections", "yes"), ("lstm.use_skip_connections", 1),
    ("bidirectional", "true"), ("bidirectional", None),
    ("char_cnn", []), ("char_cnn", {}), ("char_cnn", 7),
    ("char_cnn.filters", ...), ("char_cnn.filters", []), ("char_cnn.filters", [[1]]), ("char_cnn.filters", [[1, 2, 3]]),
    ("char_cnn.filters", [[0, 4], [-1, 0]]), ("char_cnn.filters", [[51, 4]]), ("char_cnn.filters", "wide"),
    ("char_cnn.filters", [[1, 10**30]]), ("char_cnn.filters", [[1.5, 2]]), ("char_cnn.filters", {"1": 32}),
    ("char_cnn.activation", "gelu"), ("char_cnn.activation", None),
    ("char_cnn.embedding", ...), ("char_cnn.embedding", 16), ("char_cnn.embedding.dim", 0),
    ("char_cnn.n_characters", 260), ("char_cnn.n_characters", "262"), ("char_cnn.n_characters", [262]),
    ("char_cnn.n_highway", -1), ("char_cnn.n_highway", "two"), ("char_cnn.n_highway", 10**9),
    ("char_cnn.max_characters_per_token", 2), ("char_cnn.max_characters_per_token", 10**6),
    ("share_embedding_softmax", True), ("share_embedding_softmax", "no"),
], ids=lambda value: str(value)[:30])  # fmt: skip
@pytest.mark.parametrize("published", [True, False], ids=["published", "training"])
def test_absurd_values(place: str, value: Any, published: bool) -> None:
    if published and place == "bidirectional":
        assert from_options(changed(place, value), published=True)[0].bidirectional, "not read there"
        return
    if published and place in ("char_cnn.n_characters", "share_embedding_softmax"):
        assert from_options(changed(place, value), published=True) == from_options(PUBLISHED, published=True)
        return
    with pytest.raises(FormatError) as caught:
        from_options(changed(place, value), "runs/a/options.json", published)
    message = str(caught.value)
    assert message.startswith("runs/a/options.json: ") and "\n" not in message and len(message) < 400, message
    assert place.split(".")[-1] in message or "share_embedding_softmax" in message


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"options"', '{"lstm": ' + "[" * 100_000, "\xff"])
def test_files_that_are_no_options(tmp_path: Path, text: str) -> None:
    path = tmp_path / "options.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=r"options\.json"):
        read_options(path)
    with pytest.raises(FormatError, match="none.json"):
        read_options(tmp_path / "none.json")
    with pytest.raises(FormatError):
        read_options(tmp_path)


def test_defaults_of_the_softmax_are_ours() -> None:
    assert from_options(WORDS)[1] == SoftmaxConfig(kind="sampled", tied=False)
    assert from_options({**WORDS, "n_negative_samples_batch": 8192})[1].negatives == 8192


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("n_negative_samples_batch", value) for value in (0.001, None, 0, "many", True, float("nan"))),
        *(("sample_softmax", value) for value in ("maybe", None)),
    ],
)
@pytest.mark.parametrize("published", [True, False], ids=["published", "training"])
def test_how_a_softmax_was_trained_is_no_part_of_the_model(
    key: str, value: Any, published: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        found = from_options({**PUBLISHED, key: value}, "runs/a/options.json", published)
    assert found == from_options(PUBLISHED, published=published)
    (record,) = caplog.records
    shown = "null" if value is None else repr(value)
    assert f"runs/a/options.json: {key} is {shown}, which only training uses" in record.getMessage()


@pytest.mark.parametrize(
    ("section", "known", "written"),
    [
        ("lstm", "use_skip_connections", "useSkipConnections"),
        ("char_cnn", "n_highway", "n-highways"),
        ("", "char_cnn", "charCNN"),
        ("", "bidirectional", "bidirectionnal"),
    ],
)
def test_other_spellings(section: str, known: str, written: str) -> None:
    options = changed("lstm.dim", 8)
    place = options[section] if section else options
    place[written] = place.pop(known, True)
    with pytest.raises(FormatError, match=f"{section}.?'{written}' is not known; did you mean {known}"):
        from_options(options)


def test_a_misspelt_key_of_the_model_is_not_its_default() -> None:
    options = changed("lstm.use_skip_connections", ...)
    options["lstm"]["use_skip_connection"] = True
    with pytest.raises(FormatError, match=r"lstm\.'use_skip_connection' is not known; did you mean use_skip"):
        from_options(options, published=True)
    options["lstm"]["use_skip_connections"] = True
    assert from_options(options, published=True) == from_options(PUBLISHED, published=True)


def test_weights_in_the_place_of_options(tmp_path: Path) -> None:
    (tmp_path / "weights.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(2 << 20))
    with pytest.raises(FormatError, match="is an HDF5 file and no options.json; are options and weights swapped"):
        read_options(tmp_path / "weights.hdf5")
