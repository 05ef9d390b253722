"""Do exported files load in bilm-tf and AllenNLP, and give the same embeddings there? The programs themselves decide.

    python tests/benchmarks/load_in_originals.py [EXPORT_DIR ...] [--programs FOLDER]

Without an EXPORT_DIR, models of several kinds are exported first, some of which one of the programs cannot load. Both
programs load every file and embed some sentences, with state carried from one to the next and from zero; the largest
difference from our embeddings is printed. A program that `export` says cannot load a file must fail on it.

The programs are installed into FOLDER (default ~/.cache/elmo-ray-originals, some 1.5 GB): bilm 0.1.post5 with
tensorflow-cpu 2.15.1 in a virtual environment of its own, for which Python 3.9 to 3.11 must run this; AllenNLP 2.10.1
without its dependencies, which want another PyTorch: its modules elmo, elmo_lstm, highway and what they compute with
run as they are, and the parts around them (downloads, datasets, configuration), which would import spacy, transformers
and more, are empty.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np

TOLERANCE = 1e-5
TEXT = Path(__file__).resolve().parents[1] / "golden" / "own_text" / "text.txt"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("exports", nargs="*", type=Path, metavar="EXPORT_DIR")
    parser.add_argument("--programs", type=Path, default=Path.home() / ".cache" / "elmo-ray-originals")
    parser.add_argument("--inside", choices=("bilm-tf", "AllenNLP"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        load = load_in_bilm_tf if arguments.inside == "bilm-tf" else load_in_allennlp
        report(load, arguments.exports, arguments.programs)
        return 0
    commands = install(arguments.programs.resolve())
    with tempfile.TemporaryDirectory() as folder:
        exports = [path.resolve() for path in arguments.exports] or export_models(Path(folder))
        return compare(exports, commands, arguments.programs.resolve(), Path(folder))


def install(programs: Path) -> dict[str, str]:
    """The Python of each program."""
    venv = programs / "bilm-tf"
    python = str(venv / "bin" / "python")
    if not (venv / "done").exists():
        if sys.version_info >= (3, 12):
            sys.exit("tensorflow-cpu 2.15 needs Python 3.9 to 3.11; run this with one of them")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "tensorflow-cpu==2.15.1", "numpy<2", "h5py"], check=True)
        subprocess.run([*pip, "--no-deps", "bilm==0.1.post5"], check=True)
        (venv / "done").touch()
    target = programs / "allennlp"
    if not (target / "allennlp").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        subprocess.run([*pip, "allennlp==2.10.1"], check=True)
    return {"bilm-tf": python, "AllenNLP": sys.executable}


def compare(exports: list[Path], commands: dict[str, str], programs: Path, scratch: Path) -> int:
    from elmo_ray.checkpoints.bilm_tf.hdf5 import obstacles
    from elmo_ray.checkpoints.source import open_source
    from elmo_ray.elmo.encoder import embed_sentences

    wrong = 0
    for number, export in enumerate(exports):
        source = open_source(export / "weights.hdf5")
        ours = {
            f"{mode}/{i}": vectors
            for mode in ("carry", "reset")
            for i, vectors in enumerate(embed_sentences(source.model, sentences(), source.words, mode == "carry"))
        }
        reference = scratch / f"reference-{number}.npz"
        np.savez(reference, **ours)  # type: ignore[arg-type]
        (scratch / f"{number}").symlink_to(export)
    for program, python in commands.items():
        arguments = [str(scratch / str(number)) for number in range(len(exports))]
        command = [python, __file__, "--inside", program, "--programs", str(programs), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{program}: {done.stderr[-2000:]}")
        results = json.loads(done.stdout.splitlines()[-1])
        for export, result in zip(exports, results, strict=True):
            reasons = obstacles(open_source(export / "weights.hdf5").config)[program]
            if result["error"] is not None:
                told = f"fails: {result['error']}"
            else:
                told = f"loads; embeddings differ by {result['difference']:.1e} at most"
            same = result["error"] is None and result["difference"] <= TOLERANCE
            good = same != bool(reasons)
            expected = f"; export says: {'; '.join(reasons)}" if reasons else ""
            print(f"{'ok   ' if good else 'WRONG'} {program:<9} {export.name:<24} {told}{expected}")
            wrong += not good
    print("all as export says" if not wrong else f"{wrong} not as export says")
    return int(wrong > 0)


def sentences() -> list[list[str]]:
    return [line.split() for line in TEXT.read_text(encoding="utf-8").split("\n")[:-1]]


def export_models(folder: Path) -> list[Path]:
    """One of every kind, with random weights and every second word of the text."""
    import torch

    from elmo_ray.checkpoints.bilm_tf.hdf5 import write_weights
    from elmo_ray.checkpoints.bilm_tf.options import to_options
    from elmo_ray.config import PretrainConfig
    from elmo_ray.data.vocabulary import SPECIAL_WORDS, Vocabulary
    from elmo_ray.model.bilm import BiLM

    words = sorted({word for line in sentences() for word in line} - set(SPECIAL_WORDS))
    vocabulary = Vocabulary.from_words([*SPECIAL_WORDS, *words[::2]])
    cnn: dict[str, Any] = {"filters": [[1, 8], [2, 8], [3, 16], [5, 32]], "n_highway": 2}
    lstm: dict[str, Any] = {"dim": 48, "projection_dim": 16, "n_layers": 2}
    kinds: dict[str, dict[str, Any]] = {
        "usual": {"char_cnn": cnn, "lstm": lstm},
        "tanh": {"char_cnn": {**cnn, "activation": "tanh"}, "lstm": lstm},
        "no-clips": {"char_cnn": cnn, "lstm": {**lstm, "cell_clip": None, "proj_clip": None}},
        "tight-clips": {"char_cnn": cnn, "lstm": {**lstm, "cell_clip": 0.2, "proj_clip": 0.1}},
        "no-highway": {"char_cnn": {**cnn, "n_highway": 0}, "lstm": lstm},
        "one-layer": {"char_cnn": cnn, "lstm": {**lstm, "n_layers": 1}},
        "three-layers": {"char_cnn": cnn, "lstm": {**lstm, "n_layers": 3}},
        "growing-projection": {"char_cnn": {**cnn, "filters": [[1, 4], [3, 8]]}, "lstm": lstm},
        "no-skip-connections": {"char_cnn": cnn, "lstm": {**lstm, "use_skip_connections": False}},
        "no-cnn-projection": {"char_cnn": {**cnn, "filters": [[1, 8], [3, 8]]}, "lstm": lstm},
        "no-lstm-projection": {"char_cnn": cnn, "lstm": {**lstm, "dim": 16}},
        "30-characters": {"char_cnn": {**cnn, "max_characters": 30}, "lstm": lstm},
        "words": {"input": "words", "lstm": lstm},
        "nine-layers": {"char_cnn": cnn, "lstm": {**lstm, "n_layers": 9}},
    }
    result = []
    for name, model_values in kinds.items():
        config = PretrainConfig.from_dict({"model": model_values})
        model = BiLM(config.model, config.softmax, vocabulary.size)
        model.reset_parameters(1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        export = folder / "exports" / name
        export.mkdir(parents=True)
        write_weights(export / "weights.hdf5", model)
        (export / "options.json").write_text(json.dumps(to_options(config.model, config.softmax, vocabulary.size)))
        vocabulary.write(export / "vocab.txt")
        result.append(export)
    return result


# ---------------------------------------------------------------- inside a program's Python; elmo_ray is not there


def report(load: Any, exports: list[Path], programs: Path) -> None:
    results = []
    for export in exports:
        result: dict[str, Any] = {"error": None, "difference": 0.0}
        try:
            with np.load(export.parent / f"reference-{export.name}.npz") as reference:
                theirs = load(export, programs)
                for key in reference.files:
                    ours = reference[key]
                    if theirs[key].shape != ours.shape:
                        raise ValueError(f"shape {theirs[key].shape} instead of {ours.shape}")
                    result["difference"] = max(result["difference"], float(np.abs(theirs[key] - ours).max(initial=0)))
        except Exception as error:  # whatever the program does with a file that it cannot load
            result["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        results.append(result)
    print(json.dumps(results))


def load_in_bilm_tf(export: Path, programs: Path) -> dict[str, np.ndarray]:
    """bilm-tf is written for TensorFlow 1; 2.15 still has that mode."""
    import tensorflow.compat.v1 as tf

    tf.disable_v2_behavior()
    sys.modules["tensorflow"] = tf
    from bilm import Batcher, BidirectionalLanguageModel, TokenBatcher  # type: ignore[import-not-found]

    options = json.loads((export / "options.json").read_text())
    weights, vocab = str(export / "weights.hdf5"), str(export / "vocab.txt")
    found = {}
    for mode in ("carry", "reset"):
        with tf.Graph().as_default(), tf.Session() as session:
            if "char_cnn" in options:
                most = options["char_cnn"]["max_characters_per_token"]
                batcher: Any = Batcher(vocab, most)
                ids = tf.placeholder("int32", shape=(None, None, most))
                model = BidirectionalLanguageModel(str(export / "options.json"), weights)
            else:
                batcher = TokenBatcher(vocab)
                ids = tf.placeholder("int32", shape=(None, None))
                model = BidirectionalLanguageModel(
                    str(export / "options.json"), weights, use_character_inputs=False, embedding_weight_file=weights
                )
            embeddings = model(ids)["lm_embeddings"]
            session.run(tf.global_variables_initializer())
            for number, sentence in enumerate(sentences()):
                if mode == "reset":
                    session.run(tf.global_variables_initializer())
                batch = batcher.batch_sentences([sentence])
                found[f"{mode}/{number}"] = session.run(embeddings, feed_dict={ids: batch})[0]
    return found


def load_in_allennlp(export: Path, programs: Path) -> dict[str, np.ndarray]:
    import torch

    elmo, mapper, remove_sentence_boundaries = import_allennlp(programs / "allennlp")
    model = elmo._ElmoBiLm(str(export / "options.json"), str(export / "weights.hdf5"))
    found = {}
    for mode in ("carry", "reset"):
        model._elmo_lstm.reset_states()
        for number, sentence in enumerate(sentences()):
            if mode == "reset":
                model._elmo_lstm.reset_states()
            # what its batch_to_ids makes of one sentence
            ids = torch.tensor([[mapper.convert_word_to_char_ids(word) for word in sentence]])
            with torch.no_grad():
                output = model(ids)
            layers = [remove_sentence_boundaries(layer, output["mask"])[0][0] for layer in output["activations"]]
            found[f"{mode}/{number}"] = torch.stack(layers).numpy()
    return found


def import_allennlp(folder: Path) -> tuple[Any, Any, Any]:
    """allennlp.modules.elmo without what the packages around it import."""
    if "allennlp" not in sys.modules:
        sys.path.append(str(folder))
        for name in (
            "",
            ".common",
            ".data",
            ".data.token_indexers",
            ".data.tokenizers",
            ".data.fields",
            ".modules",
            ".nn",
        ):
            package = _Empty(f"allennlp{name}")
            package.__path__ = [str(folder / "allennlp" / name.replace(".", "/").lstrip("/"))]
            sys.modules[package.__name__] = package
        for name in ("data.instance", "data.vocabulary", "data.batch", "common.file_utils", "common.util"):
            sys.modules[f"allennlp.{name}"] = _Empty(f"allennlp.{name}")
        sys.modules["allennlp.common.file_utils"].cached_path = lambda path: path  # type: ignore[attr-defined]
    names = ("modules.elmo", "data.token_indexers.elmo_indexer", "nn.util")
    elmo, indexer, util = (importlib.import_module(f"allennlp.{name}") for name in names)
    return elmo, indexer.ELMoCharacterMapper(), util.remove_sentence_boundaries


class _Empty(types.ModuleType):
    """A package that has every name, each a class that does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"register": classmethod(lambda cls, *a, **k: lambda kind: kind)})


if __name__ == "__main__":
    sys.exit(main())
