"""The Elmo layer: values of golden/model in every mode, what AllenNLP's layer did, gradients, and ways to make one."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from helpers.saved_models import random_model, save_checkpoint

import elmo_ray
from elmo_ray.config import PretrainConfig
from elmo_ray.data.vocabulary import Vocabulary
from elmo_ray.elmo import encoder
from elmo_ray.elmo.bilm import ElmoBiLm, ElmoCharacterEncoder
from elmo_ray.elmo.embedder import ElmoEmbedder, ElmoTokenEmbedder
from elmo_ray.elmo.encoder import embed_sentences
from elmo_ray.elmo.language_model import LanguageModel
from elmo_ray.elmo.layer import Elmo, batch_to_ids
from elmo_ray.elmo.neighbours import nearest_words
from elmo_ray.elmo.scalar_mix import ScalarMix
from elmo_ray.errors import ConfigError, DataError, FormatError

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = (GOLDEN / "model" / "options_262.json", GOLDEN / "model" / "weights.hdf5")
LINES = [line.split() for line in (GOLDEN / "own_text" / "text.txt").read_text(encoding="utf-8").split("\n")[:-1]]
WORDS = ["<S>", "</S>", "<UNK>", "the", "of", "and", "words", "a", "in"]


def golden(mode: str) -> list[np.ndarray]:
    with np.load(GOLDEN / "own_text" / f"embeddings_{mode}.npz") as values:
        return [values[str(number)] for number in range(int(values["n"]))]


def close(ours: Any, theirs: Any) -> None:
    ours, theirs = (x.detach() if isinstance(x, torch.Tensor) else x for x in (ours, theirs))
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("mode", "rows"), [("carry", 1), ("reset", 1), ("reset", 7)])
def test_embedder_gives_the_golden_values(mode: str, rows: int) -> None:
    embedder = ElmoEmbedder(*FILES, stateful=mode == "carry")
    for ours, theirs in zip(embedder.embed_sentences(LINES, rows), golden(mode), strict=True):
        assert ours.dtype == np.float32 and ours.shape == theirs.shape
        close(ours, theirs)


def test_empty_sentences_have_rows() -> None:
    embedder, alone = ElmoEmbedder(*FILES), ElmoEmbedder(*FILES)
    batches = [LINES[:3], [LINES[3], [], LINES[4]], LINES[5:8]]
    found = [embedder.embed_batch(batch) for batch in batches]
    assert found[1][1].shape == (3, 0, 32)
    for ours, batch in zip(found, batches, strict=True):
        close(ours[2], alone.embed_sentence(batch[2]))
    assert embedder.embed_sentence([]).shape == (3, 0, 32) and embedder.embed_batch([[], []])[1].shape == (3, 0, 32)


def test_twenty_golden_sentences(shared: Path) -> None:
    folder = shared / "golden" / "model"
    lines = [line.split() for line in (folder / "sentences20.txt").read_text(encoding="utf-8").split("\n")[:-1]]
    for mode in ("carry", "reset"):
        embedder = ElmoEmbedder(folder / "options_262.json", folder / "weights.hdf5", stateful=mode == "carry")
        with np.load(folder / f"embeddings20_{mode}.npz") as theirs:
            for number, ours in enumerate(embedder.embed_sentences(lines, 1 if mode == "carry" else 20)):
                close(ours, theirs[str(number)])


@pytest.mark.parametrize("trained", [False, True])
def test_layers_of_the_layer(trained: bool) -> None:
    """One mixture for each layer alone; the padded way, with gradients, gives what the packed one does."""
    expected = golden("reset")
    for layer in range(3):
        weights = [-9e10] * layer + [1] + [-9e10] * (2 - layer)
        elmo = Elmo(*FILES, 1, requires_grad=trained, scalar_mix_parameters=weights, stateful=False).eval()
        output = elmo(batch_to_ids(LINES))
        (vectors,) = output["elmo_representations"]
        assert vectors.shape == (len(LINES), max(map(len, LINES)), elmo.get_output_dim())
        assert output["mask"].dtype == torch.bool and output["mask"].sum(1).tolist() == list(map(len, LINES))
        assert vectors.requires_grad == trained
        for row, words, theirs in zip(vectors, LINES, expected, strict=True):
            close(row[: len(words)], theirs[layer])
            assert not row[len(words) :].any()


def test_state_is_carried_row_by_row() -> None:
    """Batches of 3, 1, 2 and 4 rows: row b goes on where row b was last used, whatever the lengths are."""
    bilm = ElmoBiLm(*FILES)
    alone = [ElmoBiLm(*FILES) for _ in range(4)]
    lines = iter(LINES)
    for rows in (3, 1, 2, 4):
        batch = list(itertools.islice(lines, rows))
        output = bilm(batch_to_ids(batch))
        for row, words in enumerate(batch):
            single = alone[row](batch_to_ids([words]))
            for ours, theirs in zip(output["activations"], single["activations"], strict=True):
                close(ours[row, : len(words) + 2], theirs[0])
    bilm.reset_states(torch.tensor([False, True, False, True]))
    alone[1].reset_states()
    output = bilm(batch_to_ids(LINES[:2]))
    for row in range(2):
        close(
            output["activations"][2][row, : len(LINES[row]) + 2],
            alone[row](batch_to_ids([LINES[row]]))["activations"][2][0],
        )
    with pytest.raises(ConfigError, match="4 rows"):
        bilm.reset_states(torch.tensor([True]))
    bilm.reset_states()
    close(bilm(batch_to_ids(LINES[:1]))["activations"][2][0, 1:-1], golden("reset")[0][2])


def test_gradients_reach_every_part_and_only_what_trains() -> None:
    elmo = Elmo(*FILES, 2, requires_grad=True, do_layer_norm=True, l2_coef=0.1)
    output = elmo(batch_to_ids(LINES[:4]))["elmo_representations"]
    (sum((k + 1) * vectors.pow(3).sum() for k, vectors in enumerate(output)) + elmo.regularization()).backward()
    for name, parameter in elmo.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name
    frozen = Elmo(*FILES, 1)
    assert {name for name, p in frozen.named_parameters() if p.requires_grad} == {
        *(f"scalar_mix_0.scalar_parameters.{k}" for k in range(3)), "scalar_mix_0.gamma",
    }  # fmt: skip
    assert not any(p.requires_grad for p in Elmo(*FILES, 1, scalar_mix_parameters=[0, 0, 1]).parameters())


def test_changed_weights_are_seen() -> None:
    elmo = Elmo(*FILES, 1, stateful=False, dropout=0.0)
    before = elmo(batch_to_ids(LINES[:3]))["elmo_representations"][0]
    for name in ("lstm.layers.0.bias", "char_cnn.embedding"):
        with torch.no_grad():
            elmo._elmo_lstm.bilm.get_parameter(name).mul_(1.5)
        after = elmo(batch_to_ids(LINES[:3]))["elmo_representations"][0]
        fresh = copy.deepcopy(elmo)(batch_to_ids(LINES[:3]))["elmo_representations"][0]
        assert not torch.allclose(before, after) and torch.equal(after, fresh)
        before = after
    assert torch.equal(pickle.loads(pickle.dumps(elmo))(batch_to_ids(LINES[:3]))["elmo_representations"][0], before)


def test_dropout_boundaries_and_leading_dimensions() -> None:
    ids = batch_to_ids(LINES[:4])
    elmo = Elmo(*FILES, 1, keep_sentence_boundaries=True, stateful=False)
    dropped = elmo(ids)["elmo_representations"][0]
    elmo.eval()
    whole = elmo(ids)
    vectors, mask = whole["elmo_representations"][0], whole["mask"]
    assert mask.shape == (4, ids.shape[1] + 2) and mask.sum(1).tolist() == [len(words) + 2 for words in LINES[:4]]
    kept = dropped != 0
    assert 0.4 < kept[mask].float().mean() < 0.6
    close(dropped[kept], (2 * vectors)[kept])
    folded = elmo(ids.view(2, 2, *ids.shape[1:]))
    assert folded["mask"].shape == (2, 2, ids.shape[1] + 2)
    close(folded["elmo_representations"][0].view_as(vectors), vectors)
    inner = Elmo(*FILES, 1, stateful=False).eval()(ids)["elmo_representations"][0]
    close(torch.where(mask[:, 2:, None], vectors[:, 1:-1], 0.0), inner)


def test_cached_words_and_words_that_are_not() -> None:
    cached = ["@@PADDING@@", *sorted({word for words in LINES[:3] for word in words})]
    places = {word: number for number, word in enumerate(cached)}
    elmo = Elmo(*FILES, 1, vocab_to_cache=cached, stateful=False).eval()
    ids = batch_to_ids(LINES[:3])
    word_ids = torch.zeros(ids.shape[:2], dtype=torch.long)
    for row, words in zip(word_ids, LINES[:3], strict=True):
        row[: len(words)] = torch.tensor([places[word] for word in words])
    expected = elmo(ids)
    from_cache = elmo(torch.zeros_like(ids), word_ids)
    close(from_cache["elmo_representations"][0], expected["elmo_representations"][0])
    assert torch.equal(from_cache["mask"], expected["mask"])
    word_ids[0, 0] = len(cached)
    close(elmo(ids, word_ids)["elmo_representations"][0], expected["elmo_representations"][0])


def test_token_embedder_takes_any_ids() -> None:
    """Ids of 0 within a word are characters whose vector is zero."""
    ids = torch.randint(0, 262, (3, 4, 50), generator=torch.Generator().manual_seed(1))
    ids[0, 2:] = 0
    for trained in (True, False):
        embedder = ElmoTokenEmbedder(*FILES, requires_grad=trained, projection_dim=5, dropout=0.0, stateful=False)
        vectors = embedder(ids)
        assert vectors.shape == (3, 4, embedder.get_output_dim()) == (3, 4, 5)
        vectors.sum().backward()
        grads = [p.grad for name, p in embedder.named_parameters() if "_elmo_lstm" in name]
        assert all((grad is not None and bool(grad.any())) == trained for grad in grads)
    bilm = ElmoBiLm(*FILES, stateful=False)
    none = ids.clone()
    none[none == 0] = 1 + ord("x")
    none[0, 2:] = 0
    with torch.no_grad():
        bilm.bilm.char_cnn.embedding[ord("x")] = 0  # type: ignore[union-attr]
    close(bilm(ids)["activations"][2], bilm(none)["activations"][2])


def test_character_encoder() -> None:
    output = ElmoCharacterEncoder(*FILES)(batch_to_ids(LINES[:2]))
    assert output["token_embedding"].shape == (2, output["mask"].shape[1], 16)
    close(output["token_embedding"][1, 1 : len(LINES[1]) + 1], golden("reset")[1][0, :, :16])


def test_bf16_is_close() -> None:
    exact, low = (ElmoEmbedder(*FILES, stateful=False, precision=p) for p in ("fp32", "bf16"))  # type: ignore[arg-type]
    for ours, theirs in zip(low.embed_batch(LINES), exact.embed_batch(LINES), strict=True):
        assert ours.size == 0 or 0 < np.abs(ours - theirs).max() < 0.1


def test_scalar_mix() -> None:
    torch.manual_seed(1)
    layers = [torch.randn(2, 3, 4) for _ in range(3)]
    mask = torch.tensor([[True, True, False], [True, True, True]])
    mix = ScalarMix(3, do_layer_norm=True, initial_scalar_parameters=[0.5, -1, 2], l2_coef=0.1)
    weights = np.exp([0.5, -1, 2]) / np.exp([0.5, -1, 2]).sum()
    expected = 0.0
    for weight, layer in zip(weights, layers, strict=True):
        counted = layer[mask].numpy()
        expected = expected + weight * (layer.numpy() - counted.mean()) / counted.std()
    close(mix(layers, mask), expected)
    assert mix.regularization().item() == pytest.approx(0.1 * (0.25 + 1 + 4))
    top = ScalarMix(3, use_top_only=True, l2_coef=0.1)
    assert torch.equal(top(layers), layers[2]) and [n for n, _ in top.named_parameters()] == ["gamma"]
    assert float(top.regularization()) == 0
    for wrong in ({"initial_scalar_parameters": [1.0]}, {"use_top_only": True, "do_layer_norm": True}):
        with pytest.raises(ConfigError):
            ScalarMix(3, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="mask"):
        mix(layers)
    with pytest.raises(ConfigError, match="2 tensors"):
        mix(layers[:2], mask)


def test_ids_of_other_widths_and_ids_that_are_none() -> None:
    words = [["", "x", "naïve", "y" * 70, "東京" * 9, "<S>"]]
    narrow, wide = batch_to_ids(words, 12), batch_to_ids(words, 60)
    config = PretrainConfig.from_dict(tiny(char_cnn={"filters": [[1, 4], [3, 8]], "max_characters": 12}))
    bilm = ElmoBiLm(None, None, model=random_model(config, 0), stateful=False)
    for ids in (wide, batch_to_ids(words)):
        assert torch.equal(bilm(ids)["activations"][2], bilm(narrow)["activations"][2])
    with pytest.raises(ConfigError, match=r"may be cut off; .* 50: batch_to_ids\(sentences, max_characters=50\)"):
        ElmoBiLm(*FILES)(narrow)
    gap = batch_to_ids([["a", "b"]])
    gap[0, 0] = 0
    for ids in (gap, batch_to_ids([["a"]]) + 300, gap[0]):
        with pytest.raises(ConfigError):
            ElmoBiLm(*FILES)(ids)
    assert batch_to_ids([[], ["a"]]).shape == (2, 1, 50)
    assert ElmoBiLm(*FILES)(batch_to_ids([[]]))["mask"].tolist() == [[True, True]]


def tiny(**model: Any) -> dict[str, Any]:
    lstm = {"dim": 24, "projection_dim": 8, "n_layers": 2}
    return {"model": {"char_cnn": {"filters": [[1, 4], [3, 8]]}, "lstm": lstm, **model}}


@pytest.mark.parametrize("kind", ["characters", "words", "forward", "no-skip", "no-projection"])
def test_other_models_from_a_checkpoint_and_from_memory(kind: str, tmp_path: Path) -> None:
    values = tiny()
    if kind == "words":
        values = {"model": {"input": "words", "lstm": values["model"]["lstm"]}}
    elif kind == "forward":
        values["model"]["bidirectional"] = False
    elif kind == "no-skip":
        values["model"]["lstm"] |= {"use_skip_connections": False, "cell_clip": None}
    elif kind == "no-projection":
        values["model"]["lstm"] |= {"dim": 8, "n_layers": 1}
    config = PretrainConfig.from_dict({**values, "softmax": {"negatives": 4}})
    model = random_model(config, len(WORDS))
    save_checkpoint(tmp_path / "model", config, WORDS, model)
    vocabulary = Vocabulary.from_words(WORDS)
    loaded = Elmo.from_run(tmp_path / "model", stateful=False, scalar_mix_parameters=[0] * top_layer(config) + [9e10])
    assert not any("softmax" in name for name, _ in loaded.named_parameters())
    trained = Elmo.from_model(
        copy.deepcopy(model).requires_grad_(True), vocabulary=vocabulary, stateful=False,
        scalar_mix_parameters=[0] * top_layer(config) + [9e10],
    )  # fmt: skip
    expected = list(embed_sentences(model, LINES[:3], vocabulary))
    for elmo in (loaded.eval(), trained.eval()):
        vectors = elmo(elmo.encode(LINES[:3]))["elmo_representations"][0]
        assert elmo.get_output_dim() == (8 if kind == "forward" else 16)
        for row, words, theirs in zip(vectors, LINES, expected, strict=False):
            close(row[: len(words)], theirs[-1])


def top_layer(config: PretrainConfig) -> int:
    return config.model.lstm.n_layers


def test_any_module_that_gives_activations() -> None:
    class Constant(torch.nn.Module):
        num_layers = 2

        def get_output_dim(self) -> int:
            return 3

        def forward(self, inputs: torch.Tensor, word_inputs: torch.Tensor | None) -> dict[str, Any]:
            ones = torch.ones(len(inputs), inputs.shape[1] + 2, 3)
            return {"activations": [ones, 3 * ones], "mask": ones[..., 0] > 0}

    output = Elmo(None, None, 1, dropout=0.0, module=Constant())(batch_to_ids(LINES[:2]))
    assert output["elmo_representations"][0].shape == (2, output["mask"].shape[1], 3)
    close(output["elmo_representations"][0], 2.0)
    with pytest.raises(ConfigError, match="beside a module"):
        Elmo(*FILES, 1, module=Constant())


def test_token_vectors_in_the_place_of_the_char_cnn(tmp_path: Path) -> None:
    vocabulary = Vocabulary.from_words(["<S>", "</S>", "<UNK>", *sorted({word for words in LINES for word in words})])
    vocabulary.write(tmp_path / "vocab.txt")
    encoder = ElmoCharacterEncoder(*FILES)
    # one word a sentence, as bilm-tf's dump_token_embeddings does it
    vectors = encoder(batch_to_ids([[word] for word in vocabulary.words]))["token_embedding"][:, 1]
    with h5py.File(tmp_path / "vectors.hdf5", "w") as file:
        file["embedding"] = vectors.numpy()
    elmo = Elmo.from_token_vectors(*FILES, tmp_path / "vectors.hdf5", tmp_path / "vocab.txt", stateful=False).eval()
    expected = Elmo(*FILES, 1, stateful=False).eval()(batch_to_ids(LINES))["elmo_representations"][0]
    close(elmo(elmo.encode(LINES))["elmo_representations"][0], expected.detach())
    with h5py.File(tmp_path / "short.hdf5", "w") as file:
        file["embedding"] = vectors[:5].numpy()
    with pytest.raises(ConfigError, match="has 5 words"):
        Elmo.from_token_vectors(*FILES, tmp_path / "short.hdf5", tmp_path / "vocab.txt")


def test_urls_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setenv("ELMO_RAY_CACHE", str(tmp_path / "cache"))
    urls = [f"memory://published/{path.name}" for path in FILES]
    memory = fsspec.filesystem("memory")
    for url, path in zip(urls, FILES, strict=True):
        memory.pipe(url, path.read_bytes())
    assert Elmo(*urls, 1).get_output_dim() == 32
    for url in urls:
        memory.rm(url)
    assert ElmoEmbedder(f"file://{FILES[0].resolve()}", urls[1]).layers == 3
    with pytest.raises(FormatError, match="memory://published/none.json: cannot be fetched") as error:
        Elmo("memory://published/none.json", urls[1], 1)
    assert "\n" not in str(error.value)
    with pytest.raises(FormatError, match="no such file"):
        Elmo(tmp_path / "none.json", urls[1], 1)


def test_the_package_alone_imports_neither_torch_nor_ray() -> None:
    check = "import sys, elmo_ray; assert not {'torch', 'ray'} & set(sys.modules)"
    run(["-c", f"{check}; elmo_ray.Elmo, elmo_ray.ElmoEmbedder; assert 'ray' not in sys.modules"])


def run(arguments: Sequence[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def token_cache(folder: Path, words: Sequence[str]) -> tuple[Path, Path]:
    """Vectors of some words, as bilm-tf's dump_token_embeddings writes them: a row a line of the vocabulary."""
    (folder / "words.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    vectors = ElmoCharacterEncoder(*FILES)(batch_to_ids([[word] for word in words]))["token_embedding"][:, 1]
    with h5py.File(folder / "vectors.hdf5", "w") as file:
        file["embedding"] = vectors.numpy()
    return folder / "vectors.hdf5", folder / "words.txt"


def test_a_token_cache_needs_no_unk(tmp_path: Path) -> None:
    """bilm-tf's usage_token.py: the vocabulary of a data set, in which every word is."""
    cache = token_cache(tmp_path, ["<S>", "</S>", *dict.fromkeys(word for words in LINES[:3] for word in words)])
    elmo = Elmo.from_token_vectors(*FILES, *cache, stateful=False).eval()
    expected = Elmo(*FILES, 1, stateful=False).eval()(batch_to_ids(LINES[:3]))["elmo_representations"][0]
    close(elmo(elmo.encode(LINES[:3]))["elmo_representations"][0], expected.detach())
    with pytest.raises(ConfigError, match=r"sentence 1: 'zebra' is not in \S*words.txt, which has no <UNK>"):
        elmo.encode([LINES[0], [LINES[0][0], "zebra"]])
    (tmp_path / "words.txt").write_text("<S>\nthe\n")
    with pytest.raises(DataError, match=r"words.txt: the vocabulary has no line </S>"):
        Elmo.from_token_vectors(*FILES, *cache)


@pytest.mark.parametrize("sentences", [LINES[:4], [["a"]], [["<S>", "x" * 60]], [["a", "b"], []]])
def test_characters_are_not_taken_for_word_ids(sentences: list[list[str]], tmp_path: Path) -> None:
    elmo = Elmo.from_token_vectors(*FILES, *token_cache(tmp_path, WORDS), stateful=False).eval()
    with pytest.raises(ConfigError, match="this layer takes the ids of its own encode"):
        elmo(batch_to_ids(sentences))
    ids = elmo.encode([WORDS[3:], WORDS[4:6]])
    folded = elmo(ids[None].repeat(2, 1, 1))["elmo_representations"][0]
    close(folded[1], elmo(ids)["elmo_representations"][0].detach())
    with pytest.raises(ConfigError, match="word ids beyond"):
        elmo(ids + 100)


NO_IDS: dict[str, tuple[Any, str]] = {
    "strings": ([["The", "cat"]], r"inputs is \[\['The', 'cat'\]\]; batch_to_ids\(sentences\) makes them"),
    "None": (None, r"inputs is None; batch_to_ids"),
    "NumPy": (np.zeros((1, 1, 50), np.int64), "inputs is a NumPy array; torch.from_numpy"),
    "floats": (torch.zeros(1, 1, 50), "inputs has numbers of type torch.float32"),
    "Booleans": (torch.zeros(1, 1, 50, dtype=torch.bool), "inputs has numbers of type torch.bool"),
}


@pytest.mark.parametrize("name", NO_IDS)
def test_inputs_that_are_no_ids(name: str) -> None:
    inputs, message = NO_IDS[name]
    for layer in (Elmo(*FILES, 1), ElmoBiLm(*FILES), ElmoTokenEmbedder(*FILES)):
        with pytest.raises(TypeError, match=message):
            layer(inputs)
    if inputs is not None:
        with pytest.raises(TypeError, match="word_inputs (is|has) .*(indices into vocab_to_cache|NumPy array|torch)"):
            Elmo(*FILES, 1, vocab_to_cache=["", "a"])(batch_to_ids([["a"]]), inputs)


def test_no_sentences_give_empty_tensors() -> None:
    for settings in ({}, {"requires_grad": True}, {"keep_sentence_boundaries": True}):
        elmo = Elmo(*FILES, 2, **settings)  # type: ignore[arg-type]
        elmo(batch_to_ids(LINES[:2]))
        for ids in (batch_to_ids([]), torch.zeros(0, 3, 50, dtype=torch.long)):
            output = elmo(ids)
            width = ids.shape[1] + (2 if "keep_sentence_boundaries" in settings else 0)
            assert [x.shape for x in output["elmo_representations"]] == [(0, width, 32)] * 2
            assert output["mask"].shape == (0, width)
    embedder = ElmoEmbedder(*FILES)
    assert embedder.embed_batch([]) == [] and list(embedder.embed_sentences([])) == []
    assert embedder.batch_to_embeddings([])[0].shape == (0, 3, 0, 32)


NO_SENTENCES: dict[str, tuple[Any, str]] = {
    "a sentence": (["The cat sat"], "sentence 0 is 'The cat sat'; it must be a list of words"),
    "a text": ("The cat", "'The cat' was given; sentences are a list of lists of words"),
    "None": (None, "None was given"),
    "no sentence": ([["a"], None], "sentence 1 is None; it must be a list of words"),
    "no word": ([["b", "a", None]], "sentence 0, word 2 is None; a word is a string"),
    "a number": ([["a"], ["a", 3]], "sentence 1, word 1 is 3"),
    "bytes": ([["a", b"b"]], "sentence 0, word 1 is b'b'"),
    "a set": ([{"a"}], "sentence 0 is {'a'}, which has no order; it must be a list of words"),
}


@pytest.mark.parametrize("name", NO_SENTENCES)
def test_sentences_that_are_no_lists_of_words(name: str, tmp_path: Path) -> None:
    sentences, message = NO_SENTENCES[name]
    config = PretrainConfig.from_dict({**tiny(), "softmax": {"negatives": 4}})
    spoken = LanguageModel(random_model(config, len(WORDS)), Vocabulary.from_words(WORDS))
    cached = Elmo.from_token_vectors(*FILES, *token_cache(tmp_path, WORDS))
    calls = [batch_to_ids, Elmo(*FILES, 1).encode, cached.encode, spoken.substitutes]
    for call in (*calls, spoken.surprisal, spoken.log_probability):
        with pytest.raises(TypeError, match=message):
            call(sentences)
    if isinstance(sentences, list):
        with pytest.raises(TypeError, match="must be a list of words|a word is a string"):
            list(embed_sentences(spoken.model, sentences))
        with pytest.raises(TypeError, match="must be a list of words|a word is a string"):
            ElmoEmbedder(*FILES).embed_batch(sentences)
    with pytest.raises(TypeError, match="vocab_to_cache is 'the'"):
        Elmo(*FILES, 1, vocab_to_cache="the")
    with pytest.raises(TypeError, match="words is 'the'"):
        nearest_words(spoken.model, spoken.vocabulary, "the")


def test_substitutes_are_a_list_by_direction() -> None:
    for bidirectional in (True, False):
        config = PretrainConfig.from_dict({**tiny(bidirectional=bidirectional), "softmax": {"negatives": 4}})
        spoken = LanguageModel(random_model(config, len(WORDS)), Vocabulary.from_words(WORDS))
        found = spoken.substitutes([["the", "words"], []], k=2)
        assert len(found) == 2 and [len(words) for words in found[0].words("forward")] == [2, 2]
        assert found[1].words("forward") == []
        names = "forward, backward, product" if bidirectional else "forward"
        with pytest.raises(ConfigError, match=f"direction=sideways: must be one of {names}$"):
            found[0].words("sideways")
    with pytest.raises(ConfigError, match="k=0: must be 1 or more"):
        spoken.substitutes([["the"]], k=0)


@pytest.mark.parametrize(
    "arguments", [("runs/quickstart",), ("o.json", "w.hdf5"), ("runs/quickstart", 1)], ids=["run", "pair", "number"]
)
def test_arguments_that_are_missing(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TypeError, match=r"options_file, weight_file and num_output_.*Elmo.from_run\(SOURCE\) opens"):
        Elmo(*arguments)


def test_files_that_are_swapped_or_folders() -> None:
    for kind in (Elmo, ElmoEmbedder):
        rest = (1,) if kind is Elmo else ()
        with pytest.raises(FormatError, match=r"weights.hdf5: is an HDF5 file .*are options and weights swapped"):
            kind(FILES[1], FILES[0], *rest)
        with pytest.raises(FormatError, match=r"options_262.json: is JSON .*are options and weights swapped"):
            kind(FILES[0], FILES[0], *rest)
        with pytest.raises(ConfigError, match=r"golden: is a folder; Elmo.from_run opens"):
            kind(GOLDEN, FILES[1], *rest)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [False, True])
def test_autocast_around_the_layer(device: str, dtype: torch.dtype, trained: bool) -> None:
    """The layer computes as outside of it; what a task adds to it is in the lower type."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    ids = batch_to_ids(LINES[:4]).to(device)
    found = []
    for enabled in (False, True):
        torch.manual_seed(3)
        elmo = Elmo(*FILES, 1, requires_grad=trained, dropout=0.0, do_layer_norm=True).to(device)
        head = torch.nn.Linear(32, 2).to(device)
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            elmo(ids)
            (vectors,) = elmo(ids)["elmo_representations"]
            scores = head(vectors)
            assert vectors.dtype == torch.float32 and scores.dtype == (dtype if enabled else torch.float32)
            scores.float().square().mean().backward()
            with torch.no_grad():
                assert elmo(ids)["elmo_representations"][0].isfinite().all()
        found.append((vectors, [p.grad for p in elmo.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-6)
    assert len(found[0][1]) > (10 if trained else 3)
    for ours, theirs in zip(found[1][1], found[0][1], strict=True):
        assert ours is not None and theirs is not None
        assert (ours - theirs).norm() <= 0.05 * theirs.norm()


def test_autocast_around_words_and_substitutes() -> None:
    config = PretrainConfig.from_dict({**tiny(), "softmax": {"negatives": 4}})
    spoken = LanguageModel(random_model(config, len(WORDS)), Vocabulary.from_words(WORDS))
    cached = ["", *dict.fromkeys(LINES[0])]
    expected = spoken.substitutes(LINES[:1], k=3)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = spoken.substitutes(LINES[:1], k=3)[0]
        (nats,) = spoken.surprisal(LINES[:1])
        elmo = Elmo(*FILES, 1, vocab_to_cache=cached, stateful=False).eval()
        words = torch.arange(1, len(cached))[None]
        from_cache = elmo(torch.zeros(1, len(cached) - 1, 50, dtype=torch.long), words)["elmo_representations"][0]
        close(from_cache, elmo(batch_to_ids([cached[1:]]))["elmo_representations"][0].detach())
    assert nats.nats["both"].dtype == np.float32
    for name, values in expected.log_probabilities.items():
        np.testing.assert_array_equal(found.log_probabilities[name], values)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
def test_torch_compile_leaves_the_layer_out_of_its_graphs(trained: bool) -> None:
    class Tagger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.elmo = Elmo(*FILES, 1, requires_grad=trained, dropout=0.0)
            self.head = torch.nn.Linear(32, 2)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            output = self.elmo(ids)
            return torch.relu(self.head(output["elmo_representations"][0])) * output["mask"][..., None]

    torch.manual_seed(1)
    tagger = Tagger()
    same = copy.deepcopy(tagger)
    compiled = torch.compile(tagger, backend="eager")
    for batch in (LINES[:3], LINES[3:6]):
        ids = batch_to_ids(batch)
        ours, theirs = compiled(ids), same(ids)
        assert torch.equal(ours, theirs)
        ours.sum().backward()
        theirs.sum().backward()
    for (name, one), other in zip(tagger.named_parameters(), same.parameters(), strict=True):
        assert (one.grad is None) == (not one.requires_grad), name
        if one.grad is not None and other.grad is not None:
            close(one.grad, other.grad)


def test_public_names() -> None:
    names = ["Elmo", "ElmoEmbedder", "ElmoTokenEmbedder", "LanguageModel", "ScalarMix", "batch_to_ids", "tokenize"]
    assert [name for name in dir(elmo_ray) if not name.startswith("_")] == names
    assert set(names) < set(elmo_ray.__all__)
    assert elmo_ray.LanguageModel is LanguageModel and elmo_ray.Elmo is Elmo


def test_a_sentence_that_is_not_divided_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(encoder, "_undivided", [])
    batch_to_ids([["The", "cat"], ["Rome"], ["New York", "is"]])
    assert not caplog.records
    for _ in range(2):
        batch_to_ids([["a"], ["The cat sat ."]])
    assert [record.getMessage() for record in caplog.records] == [
        "sentence 1 is one word with blanks in it, 'The cat sat .': give its words as a list"
    ]


def test_sentences_may_come_one_by_one(tmp_path: Path) -> None:
    assert torch.equal(batch_to_ids(iter(LINES[:2])), batch_to_ids(LINES[:2]))  # type: ignore[arg-type]
    cached = Elmo.from_token_vectors(*FILES, *token_cache(tmp_path, WORDS))
    assert torch.equal(cached.encode(iter([WORDS[3:]])), cached.encode([WORDS[3:]]))  # type: ignore[arg-type]


NO_ARGUMENTS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "no representations": ((*FILES, 0), {}, ConfigError, "num_output_representations=0: must be an integer, 1 or more"),
    "half a one": ((*FILES, 1.5), {}, ConfigError, "num_output_representations=1.5: must be"),
    "as text": ((*FILES, "2"), {}, ConfigError, "num_output_representations='2': must be"),
    "dropout": ((*FILES, 1), {"dropout": 1.5}, ConfigError, "dropout=1.5: must be a number from 0 to 1"),
    "no dropout": ((*FILES, 1), {"dropout": None}, ConfigError, "dropout=None: must be"),
    "options as values": (
        ({"lstm": {}}, FILES[1], 1),
        {},
        TypeError,
        "options_file is {'lstm': {}}; it must be a path",
    ),
    "one file": ((FILES[0], None, 1), {}, ConfigError, "or a module; Elmo.from_run.SOURCE. opens a run"),
    "a layer as module": ((None, None, 1), {"module": torch.nn.Linear(2, 2)}, ConfigError, "the class Linear; it must"),
}


@pytest.mark.parametrize("name", NO_ARGUMENTS)
def test_arguments_that_do_not_fit(name: str) -> None:
    arguments, settings, error, message = NO_ARGUMENTS[name]
    with pytest.raises(error, match=message):
        Elmo(*arguments, **settings)


def test_batches_of_no_sentences() -> None:
    with pytest.raises(ConfigError, match="batch_size=0: must be 1 or more"):
        list(ElmoEmbedder(*FILES).embed_sentences(LINES, batch_size=0))
