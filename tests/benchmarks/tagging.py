"""Does pre-training help a task? Part-of-speech tagging with and without a pre-trained biLM.

    python tests/benchmarks/tagging.py SOURCE CORPUS [--tagger bilstm] [--seeds 1 2 3] [--epochs 4] [--parts 1.0 0.1]

SOURCE is a run, a checkpoint or exported weights; CORPUS a folder with train.conllu and dev.conllu (word and tag in the
first two columns, a blank line after each sentence). A tagger, a BiLSTM or linear, is trained on

  (a) the layers of the biLM of SOURCE, frozen, mixed by a `ScalarMix` (with layer norm) that learns with the task,
  (b) the same with a biLM of the same sizes that was never trained (another one for each seed),
  (c) word embeddings of the same size, learned with the task; words seen once are sometimes taken for unknown ones,

all with the same tagger, dropout, optimizer and number of steps, and nothing chosen on dev: its accuracy is measured
after the last step. With a part of the training sentences (the first 10 %, say) there are more epochs, so that taggers
of small parts make a fair number of steps. The biLM's layers are computed once.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from elmo_ray.checkpoints.source import Source, open_source
from elmo_ray.elmo.bilm import ElmoBiLm
from elmo_ray.elmo.scalar_mix import ScalarMix
from elmo_ray.model.bilm import BiLM

Sentence = tuple[list[str], list[str]]
SYSTEMS = {"a": "pre-trained biLM", "b": "untrained biLM", "c": "word embeddings"}
DROPOUT, HIDDEN, ROWS = 0.5, 128, 32
LEARNING_RATES = {"linear": 1e-2, "bilstm": 2e-3}
SMALL_PART_EPOCHS = 3
"""Times as many epochs for a part of a half or less."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("corpus", type=Path, metavar="CORPUS")
    parser.add_argument("--tagger", choices=LEARNING_RATES, default="bilstm")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--parts", type=float, nargs="+", default=[1.0, 0.1])
    parser.add_argument("--checkpoint", default="best")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="results are added to those that it has")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO, stream=sys.stderr)
    torch.set_num_threads(arguments.threads)
    train, dev = (read(arguments.corpus / f"{name}.conllu") for name in ("train", "dev"))
    tags = sorted({tag for _, row in train for tag in row})
    source = open_source(arguments.source, arguments.checkpoint)
    logging.info("%s; %d and %d sentences, %d tags", source.describe(), len(train), len(dev), len(tags))
    kept = arguments.json is not None and arguments.json.exists()
    accuracies: dict[str, list[float]] = json.loads(arguments.json.read_text()) if kept else {}
    layers: list[Tensor] = []
    for system in arguments.systems:
        for seed in arguments.seeds:
            if system == "b" or (system == "a" and not layers):
                layers = embed(untrained(source, seed) if system == "b" else source.model, source, [*train, *dev])
            for part in arguments.parts:
                torch.manual_seed(seed)
                some = train[: round(part * len(train))]
                if system == "c":
                    inputs: nn.Module = WordInput(some, 2 * source.config.lstm.projection_dim)
                    vectors = [words(some), words(dev)]
                else:
                    inputs = LayerInput(source.config.lstm.n_layers + 1, source.config.lstm.projection_dim)
                    vectors = [layers[: len(some)], layers[len(train) :]]
                epochs = arguments.epochs * (SMALL_PART_EPOCHS if part <= 0.5 else 1)
                start = time.monotonic()
                accuracy = run(inputs, vectors, some, dev, tags, epochs, seed, arguments.tagger)
                accuracies.setdefault(f"{system} {part:g}", []).append(accuracy)
                if arguments.json:
                    arguments.json.write_text(json.dumps(accuracies, indent=1) + "\n")
                logging.info(
                    "(%s) %s, seed %d, %.0f %% of the data: %.2f %% in %.0f s",
                    system, SYSTEMS[system], seed, 100 * part, 100 * accuracy, time.monotonic() - start,
                )  # fmt: skip
    report(accuracies, arguments.parts)
    return 0


def report(accuracies: dict[str, list[float]], parts: Sequence[float]) -> None:
    print(f"{'accuracy on dev, %':<24}{'data':>7}{'seeds':>28}{'mean':>9}")
    for part in parts:
        for system, name in SYSTEMS.items():
            values = [100 * value for value in accuracies.get(f"{system} {part:g}", [])]
            if not values:
                continue
            shown = "".join(f"{value:>9.2f}" for value in values)
            print(f"({system}) {name:<20}{100 * part:>6.0f}%{shown:>28}{sum(values) / len(values):>9.2f}")
        found = [accuracies.get(f"{system} {part:g}") for system in SYSTEMS]
        if all(found):
            pretrained, *others = found
            lead = 100 * (min(pretrained) - max(map(max, others)))
            print(f"worst of (a) over the best of (b) and (c): {lead:+.2f} points")


def read(path: Path) -> list[Sentence]:
    sentences: list[Sentence] = []
    rows: list[list[str]] = []
    for line in [*path.read_text(encoding="utf-8").split("\n"), ""]:
        if line.strip():
            rows.append(line.split("\t"))
        elif rows:
            sentences.append(([row[0] for row in rows], [row[1] for row in rows]))
            rows = []
    return sentences


def untrained(source: Source, seed: int) -> BiLM:
    model = BiLM(source.config, source.softmax, source.model.n_words)
    model.reset_parameters(seed)
    return model.requires_grad_(False)


@torch.no_grad()
def embed(model: BiLM, source: Source, sentences: Sequence[Sentence]) -> list[Tensor]:
    """[n, layers, 2 P] of each sentence in float16, every one from zero state."""
    from elmo_ray.elmo.layer import Elmo

    elmo = Elmo.from_model(model, 0, vocabulary=source.words, stateful=False)
    bilm: ElmoBiLm = elmo._elmo_lstm
    order = sorted(range(len(sentences)), key=lambda number: len(sentences[number][0]))
    result: list[Tensor] = [torch.empty(0)] * len(sentences)
    start = time.monotonic()
    for first in range(0, len(order), 64):
        numbers = order[first : first + 64]
        activations = torch.stack(bilm(elmo.encode([sentences[number][0] for number in numbers]))["activations"], dim=2)
        for row, number in enumerate(numbers):
            result[number] = activations[row, 1 : len(sentences[number][0]) + 1].half()
    count = sum(len(row) for row, _ in sentences)
    logging.info("embedded %d words in %.0f s", count, time.monotonic() - start)
    return result


def words(sentences: Sequence[Sentence]) -> list[list[str]]:
    return [row for row, _ in sentences]


class LayerInput(nn.Module):
    """The biLM's layers, mixed."""

    def __init__(self, n_layers: int, projection: int):
        super().__init__()
        # with layer norm: the outputs of an untrained biLM are very small, which is not what is to be compared
        self.mix = ScalarMix(n_layers, do_layer_norm=True)
        self.dim = 2 * projection

    def forward(self, rows: Sequence[Tensor]) -> Tensor:
        padded = pad_sequence(list(rows), batch_first=True).float()
        lengths = torch.tensor([len(row) for row in rows])
        return self.mix(padded.unbind(2), torch.arange(padded.shape[1]) < lengths[:, None])


class WordInput(nn.Module):
    """A vector for each word of the training text; id 0 is padding, 1 any other word."""

    def __init__(self, sentences: Sequence[Sentence], dim: int):
        super().__init__()
        counts = collections.Counter(word for row, _ in sentences for word in row)
        self.ids = {word: number for number, word in enumerate(counts, start=2)}
        self.single = torch.tensor([False, False, *(count == 1 for count in counts.values())])
        self.table = nn.Embedding(len(self.ids) + 2, dim, padding_idx=0)
        self.dim = dim

    def forward(self, rows: Sequence[Sequence[str]]) -> Tensor:
        ids = pad_sequence([torch.tensor([self.ids.get(word, 1) for word in row]) for row in rows], batch_first=True)
        if self.training:
            ids[self.single[ids] & (torch.rand(ids.shape) < 0.5)] = 1
        return self.table(ids)


class Tagger(nn.Module):
    def __init__(self, inputs: nn.Module, n_tags: int, kind: str):
        super().__init__()
        self.inputs, self.dropout = inputs, nn.Dropout(DROPOUT)
        dim: Any = inputs.dim
        self.lstm = nn.LSTM(dim, HIDDEN, bidirectional=True, batch_first=True) if kind == "bilstm" else None
        self.out = nn.Linear(dim if self.lstm is None else 2 * HIDDEN, n_tags)

    def forward(self, rows: Sequence[Tensor], lengths: Tensor) -> Tensor:
        if self.lstm is None:
            return self.out(self.dropout(self.inputs(rows)))
        packed = pack_padded_sequence(self.dropout(self.inputs(rows)), lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.out(self.dropout(hidden))


@dataclass(frozen=True)
class Data:
    vectors: Sequence[Tensor]
    tags: list[Tensor]

    def batches(self, order: list[int]) -> list[list[int]]:
        return [order[first : first + ROWS] for first in range(0, len(order), ROWS)]

    def loss(self, tagger: Tagger, numbers: list[int], measure: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        gold = [self.tags[number] for number in numbers]
        logits = tagger([self.vectors[number] for number in numbers], torch.tensor([len(row) for row in gold]))
        return measure(logits.flatten(0, 1), pad_sequence(gold, batch_first=True, padding_value=-1).flatten())


def run(
    inputs: nn.Module,
    vectors: Sequence[Sequence],
    train: list[Sentence],
    dev: list[Sentence],
    tags: list[str],
    epochs: int,
    seed: int,
    kind: str,
) -> float:
    """Accuracy on dev after the last epoch."""
    number = {tag: n for n, tag in enumerate(tags)}
    data, held_out = (
        Data(each, [torch.tensor([number.get(tag, len(tags)) for tag in row]) for _, row in sentences])
        for each, sentences in zip(vectors, (train, dev), strict=True)
    )
    tagger = Tagger(inputs, len(tags), kind)
    optimizer = torch.optim.Adam(tagger.parameters(), lr=LEARNING_RATES[kind])
    loss_of = nn.CrossEntropyLoss(ignore_index=-1)
    order = list(range(len(train)))
    shuffle = random.Random(seed).shuffle
    for _ in range(epochs):
        tagger.train()
        # batches of like length, in an order that is new each time
        shuffle(order)
        batches = [
            sorted(order[first : first + 16 * ROWS], key=lambda n: len(data.tags[n]))
            for first in range(0, len(order), 16 * ROWS)
        ]
        batches = [batch for some in batches for batch in data.batches(some)]
        shuffle(batches)
        for batch in batches:
            loss = data.loss(tagger, batch, loss_of)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    tagger.eval()
    with torch.no_grad():
        right = sum(
            int(held_out.loss(tagger, batch, lambda logits, gold: (logits.argmax(1) == gold).sum()))
            for batch in held_out.batches(sorted(range(len(dev)), key=lambda n: len(held_out.tags[n])))
        )
    return right / sum(len(row) for row in held_out.tags)


if __name__ == "__main__":
    sys.exit(main())
