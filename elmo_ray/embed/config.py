"""The settings of `embed`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator

from elmo_ray.config import ComputeConfig, InitConfig
from elmo_ray.config.schema import Allowed, Globs, Int, Root, Section


def _layers(value: Any) -> str | tuple[float, ...]:
    if value in ("all", "top", "average"):
        return str(value)
    numbers = list(value) if isinstance(value, list | tuple) else []
    if numbers and all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
        return tuple(float(number) for number in numbers)
    raise ValueError("not a choice of layers")


Layers = Annotated[
    tuple[float, ...] | Literal["all", "top", "average"],
    PlainValidator(_layers),
    Allowed("all, top, average or a list of numbers"),
]


class EmbedTextConfig(Section):
    path: ClassVar[str] = "data."
    block_bytes: Int = Field(262144, ge=1024, le=1 << 30, description="text of a shard of the output, about")
    on_error: Literal["fail", "replace"] = Field("fail", description="what bytes that are not UTF-8, and NULs, do")


class EmbedOptions(Section):
    path: ClassVar[str] = "embed."
    output: Literal["vectors", "means", "substitutes", "surprisal"] = Field(
        "vectors", description="means: over a sentence; surprisal: nats of each word"
    )
    layers: Layers = Field("all", description="numbers: a factor for each layer of a sum, the word vectors first")
    dtype: Literal["float32", "float16"] = Field("float32", description="of the vectors that are written")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: products only")
    state: Literal["reset", "carry"] = Field(
        "reset", description="reset: each sentence from zero; carry: a file's sentences one after another, as bilm-tf"
    )
    format: Literal["auto", "hdf5", "parquet"] = Field(
        "auto", description="auto: by OUT's name, .hdf5 and .h5 are HDF5"
    )
    column: str | None = Field(None, min_length=1, description="of JSONL and Parquet input: text, or a list of words")
    k: Int = Field(10, ge=1, le=10000, description="words for each position, for embed.output=substitutes")
    batch_positions: Int = Field(2048, ge=1, le=1 << 24, description="positions computed at a time")
    tokens: str | None = Field(
        None, min_length=1, description="vocabulary file: write its words' context-independent vectors; there is no IN"
    )

    def _unused(self) -> dict[str, str]:
        unused: dict[str, str] = {}
        if self.output not in ("vectors", "means"):
            unused |= dict.fromkeys(("layers", "dtype"), f"embed.output={self.output} writes no vectors")
        if self.output != "substitutes":
            unused["k"] = f"embed.output={self.output} lists no words"
        if self.state == "carry":
            unused["batch_positions"] = "embed.state=carry computes a sentence at a time"
        if self.tokens is not None:
            names = ("output", "layers", "dtype", "state", "format", "column", "k", "batch_positions")
            unused |= dict.fromkeys(names, "embed.tokens writes vectors of words in float32; remove one of them")
        return unused

    def _contradictions(self) -> Iterator[str]:
        if self.format == "hdf5" and self.output in ("substitutes", "surprisal"):
            yield f"embed.output={self.output} is written as Parquet; remove embed.format=hdf5"


class EmbedConfig(Root):
    data: EmbedTextConfig = EmbedTextConfig()
    embed: EmbedOptions = EmbedOptions()
    cluster: ComputeConfig = ComputeConfig()
    init: InitConfig = InitConfig()
    checkpoint: str = Field("best", min_length=1, description="of a run: best, last, or a checkpoint's name")
    texts: Globs = Field((), alias="in", description="IN: text with a sentence a line, .jsonl or .parquet files")
    out: str | None = Field(None, description="OUT: an HDF5 file, or the folder of Parquet files")

    def required(self) -> dict[str, str]:
        needed = {} if self.out is not None else {"out": "name the file or folder to write"}
        if not self.texts and self.embed.tokens is None:
            needed["in"] = "name the text to embed"
        return needed

    def _contradictions(self) -> Iterator[str]:
        if self.embed.tokens is not None and self.texts:
            yield "embed.tokens names the words to embed, so there is no IN; remove one of them"
