"""What an embedding job does, in plain values that travel to its workers, and the record that a resumed one checks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Output = Literal["vectors", "means", "substitutes", "surprisal"]


@dataclass(frozen=True)
class EmbedJob:
    """source, checkpoint, options, vocab: as for `open_source`; fingerprint: of its weights. out: the file or folder;
    parts: the folder of finished units. layers: as in the settings. threads: of torch in a worker, None to leave it.
    """

    source: str
    checkpoint: str
    options: str | None
    vocab: str | None
    fingerprint: str
    parts: str
    is_hdf5: bool
    output: Output
    layers: tuple[float, ...] | str
    dtype: str
    precision: Literal["fp32", "bf16"]
    carry: bool
    column: str | None
    k: int
    batch_positions: int
    on_error: Literal["fail", "replace"]
    device: str
    threads: int | None

    def settled(self) -> dict[str, Any]:
        """What the finished units depend on: a job may only go on with all of it the same."""
        names = ("fingerprint", "is_hdf5", "output", "layers", "dtype", "precision", "carry", "column", "k", "on_error")
        values = asdict(self)
        # two ways of batching differ in the last bits
        return {name: values[name] for name in (*names, "batch_positions")} | {"layers": _plain(self.layers)}


def _plain(layers: tuple[float, ...] | str) -> list[float] | str:
    return layers if isinstance(layers, str) else list(layers)
