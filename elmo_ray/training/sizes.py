"""Sizes of a training beside those of its text and of the machine: streams, and the memory of a worker."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from elmo_ray.config import PretrainConfig
from elmo_ray.errors import ConfigError
from elmo_ray.model.bilm import BiLM
from elmo_ray.training.capacities import Capacities
from elmo_ray.training.components import component_of
from elmo_ray.training.optimizer import count_slots

logger = logging.getLogger(__name__)

# Windows of a stream in an epoch: with fewer than the first number most of a window's context is from elsewhere.
_FEWEST_WINDOWS, _ENOUGH_WINDOWS = 4, 10


@dataclass(frozen=True)
class WorkerMemory:
    """Estimate of the memory of a worker. parameters: numbers by component. uses: bytes by use."""

    parameters: dict[str, int]
    uses: dict[str, int]

    @property
    def on_host(self) -> WorkerMemory:
        """The uses that stay in the memory of the machine where a GPU trains."""
        return WorkerMemory(self.parameters, {use: self.uses[use] for use in self.uses if use in _HOST_USES})

    @property
    def on_gpu(self) -> WorkerMemory:
        """The uses of the GPU's memory where one trains."""
        return WorkerMemory(self.parameters, {use: self.uses[use] for use in self.uses if use not in _HOST_USES})

    @property
    def total(self) -> int:
        """Bytes of all uses."""
        return sum(self.uses.values())

    def __str__(self) -> str:
        uses = ", ".join(f"{use} {show_bytes(size)}" for use, size in self.uses.items())
        return f"{uses}; in all about {show_bytes(self.total)}"


def check_streams(config: PretrainConfig, positions: int, exact: bool = True) -> None:
    """Compare data.streams with the positions of an epoch: warn where streams are short.

    exact: the positions are counted, and not estimated. Raises ConfigError for more streams than positions.
    """
    streams, unroll = config.data.streams, config.train.unroll
    suits = max(1, config.cluster.most_workers, positions // (_ENOUGH_WINDOWS * unroll))
    if streams > (positions if exact else 4 * positions):
        about = "" if exact else "about "
        raise ConfigError(
            f"data.streams={streams}: an epoch has {about}{positions:,} positions, fewer than streams; set "
            f"data.streams={suits} or lower"
        )
    if streams > suits and positions < _FEWEST_WINDOWS * unroll * streams:
        logger.warning(
            "data.streams=%d: a stream has %s positions of an epoch, %.1f windows of train.unroll=%d; data.streams=%d "
            "suits this text",
            streams,
            f"{positions // streams:,}",
            positions / streams / unroll,
            unroll,
            suits,
        )


def worker_memory(
    config: PretrainConfig, n_words: int, block_bytes: int | None = None, on_gpu: bool = False
) -> WorkerMemory:
    """Return an estimate of the memory of one worker.

    block_bytes: size of the largest block of text; None takes data.block_bytes. on_gpu: all but the text and the
    process that feeds captured steps is in a GPU's memory, where steps are captured if they can be.
    """
    with torch.device("meta"):
        model = BiLM(config.model, config.softmax, n_words)
    parameters: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        component = component_of(name)
        parameters[component] = parameters.get(component, 0) + parameter.numel()
    total = sum(parameters.values())
    dense = sum(count for component, count in parameters.items() if component not in ("softmax", "word_embedding"))
    width = 8 if config.train.precision == "fp64" else 4
    slots = count_slots(config.optim)
    rows = -(-config.data.streams // max(1, config.cluster.fewest_workers))
    lstm, directions = config.model.lstm, 2 if config.model.bidirectional else 1
    window = -(-rows // config.train.accumulate) * config.train.unroll * directions
    negatives = config.softmax.negatives if config.softmax.facts.samples_words else n_words
    # tensors kept for backward: gates, their gradients, cells and outputs; logits and their gradient
    activations = window * lstm.n_layers * (10 * lstm.dim + 4 * lstm.projection_dim) + 3 * window * negatives
    block = config.data.block_bytes if block_bytes is None else block_bytes
    gradient_bytes, activation_bytes = dense * width, activations * width
    word_bytes = 2 * config.model.char_cnn.max_characters + 150
    of_process: dict[str, int] = {}
    if on_gpu and config.train.kernels == "auto" and width == 4 and config.softmax.facts.samples_words:
        of_tables, activation_bytes = captured_step_memory(config, n_words, rows)
        gradient_bytes += of_tables
        of_process = {"feed process": _FEED_PROCESS_BYTES + n_words * word_bytes}
    uses = {
        "parameters": total * width,
        "optimizer": total * slots * width,
        "gradients": gradient_bytes,
        "activations": activation_bytes,
        "text": n_words * word_bytes + rows * 3 * block * 6,
        **of_process,
    }
    return WorkerMemory(parameters, uses)


_HOST_USES = ("text", "feed process")

_FEED_PROCESS_BYTES = 300_000_000
"""Memory of Python, PyTorch and compiled loops in the process that makes inputs; its text counts as the worker's."""

_WINDOWS_OF_WORD = 9.5
"""Windows of characters of a distinct word, as batches of English have them."""

_PRODUCTS_BYTES = 4 << 25
"""Memory that cuBLAS asks for: 32 MiB for each of some streams."""


def captured_step_memory(config: PretrainConfig, n_words: int, rows: int) -> tuple[int, int]:
    """Return the bytes that a captured step of a GPU takes: the gradients of touched rows, and all that is kept from
    the forward pass until the gradients of the softmax, which is when most is there. rows: streams of the worker.

    The tensors are those of `kernels/gpu`; the test of this function counts them in real steps.
    """
    model, train, low = config.model, config.train, 2 if config.train.precision == "bf16" else 4
    lstm, cnn, directions = model.lstm, model.char_cnn, 2 if model.bidirectional else 1
    words, touched, read = Capacities.of(config, n_words, None, rows).usual_sizes()
    converted = low if low < 4 else 0  # what float32 products read as it is
    b = -(-rows // train.accumulate)
    p, h, k = lstm.projection_dim, lstm.dim, min(config.softmax.negatives or 0, n_words)
    n = directions * b * train.unroll  # positions of both directions
    of_tables = 4 * touched * (p + 1)
    kept = 0
    if model.input == "characters":
        f, windows = cnn.n_filters, int(_WINDOWS_OF_WORD * words)
        unfolded = 1 << (max(16, max(width for width, _ in cnn.filters) * cnn.embedding_dim) - 1).bit_length()
        kept += windows * low * (unfolded + f) + words * f * 5  # unfolded, their products; largest and where
        # of each highway: its input in the products' type, both products, its output; both weights
        kept += cnn.n_highway * (words * f * (converted + 2 * low + 4) + 2 * f * f * low)
        if cnn.projection:
            kept += words * (f * converted + p * (low + 4)) + f * p * converted
    else:
        of_tables += 0 if config.softmax.tied else 4 * read * p
        kept += 2 * 4 * read * p
    dropped = 1 if train.dropout else 0
    width = model.word_dim
    for layer in range(lstm.n_layers):
        kept += n * width * 4 * (1 + dropped)  # the input, and after dropout
        kept += directions * converted * ((width + p) * 4 * h + (h * p if h != p else 0))  # weights, converted
        # input, gates, gated and outputs in the products' type; memory cells in float32; the outputs once more
        kept += n * (converted * width + low * (4 * h + (h if h != p else 0) + p) + 4 * (h + p))
        kept += directions * b * (low * p + 4 * h)  # the state before the window
        kept += n * p * 4 if layer and lstm.use_skip_connections else 0
        width = p
    kept += 5 * 4 * lstm.n_layers * directions * b * (h + p)  # states: kept, with resets, of layers, new
    # output after dropout and by stream; its gradient, and both in the products' type
    kept += n * p * (4 * (2 + dropped) + converted + low)
    # logits; rows of negatives, the rows twice and their gradient, and that of the negatives
    kept += n * k * low + directions * k * p * (low + 4) + 3 * 4 * touched * p
    return of_tables, kept + _PRODUCTS_BYTES


def check_memory(config: PretrainConfig, memory: WorkerMemory, available: int, whose: str) -> None:
    """Compare the memory of a worker with the bytes that are there for it: warn where it needs more.

    whose: words for the memory that is there. Raises ConfigError where it needs more than twice as much.
    """
    if memory.total <= available:
        return
    use = max(memory.uses, key=lambda name: memory.uses[name])
    message = (
        f"a worker needs about {show_bytes(memory.total)} of memory ({show_bytes(memory.uses[use])} for {use}), and "
        f"{whose} has {show_bytes(available)}: {_cure(config, use, memory.parameters)}"
    )
    if memory.total > 2 * available:
        raise ConfigError(message)
    logger.warning("%s", message)


def _cure(config: PretrainConfig, use: str, parameters: dict[str, int]) -> str:
    """Return the setting that lowers the memory of this use."""
    if use == "text":
        return f"lower data.streams={config.data.streams} or data.block_bytes={config.data.block_bytes}"
    if use == "activations":
        if not config.softmax.facts.samples_words:
            return f"set softmax.kind=sampled, or raise train.accumulate={config.train.accumulate}"
        return f"raise train.accumulate={config.train.accumulate}, or lower data.streams={config.data.streams}"
    tables = sum(parameters.get(name, 0) for name in ("softmax", "word_embedding"))
    lstm = sum(count for name, count in parameters.items() if name.startswith("lstm."))
    others = sum(parameters.values()) - tables - lstm
    if tables > max(lstm, others):
        words = "name a smaller data.vocab" if config.data.vocab is not None else "set data.max_vocab"
        return f"{words}, or lower model.lstm.projection_dim={config.model.lstm.projection_dim}"
    if others > lstm:
        filters = [list(each) for each in config.model.char_cnn.filters]
        return f"lower the counts in model.char_cnn.filters={filters}"
    return f"lower model.lstm.dim={config.model.lstm.dim} or model.lstm.n_layers={config.model.lstm.n_layers}"


def show_bytes(count: int) -> str:
    """Return a number of bytes with three digits and a unit."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"
