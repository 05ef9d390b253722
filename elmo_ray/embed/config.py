"""Settings of `embed`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from elmo_ray.config import CheckpointName, ComputeConfig, FormConfig, InitConfig
from elmo_ray.config.model import Layers
from elmo_ray.config.schema import Globs, Int, Names, Root, Section


class EmbedTextConfig(FormConfig):
    """Section `data` of `embed`."""

    block_bytes: Int = Field(
        262144, ge=1024, le=1 << 30, description="Each shard of the output holds about this many bytes of text."
    )


class EmbedOptions(Section):
    """Section `embed`."""

    path: ClassVar[str] = "embed."
    output: Literal["vectors", "means", "substitutes", "surprisal"] = Field(
        "vectors", description="means: one of each sentence; surprisal: nats of words and ends."
    )
    layers: Layers = Field("all", description="A list has a factor for each layer of a sum, word vectors first.")
    dtype: Literal["float32", "float16"] = Field(
        "float32", description="The number type of the vectors that are written."
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 computes products in bfloat16.")
    state: Literal["reset", "carry"] = Field(
        "reset", description="reset starts each sentence from zero; carry goes on through a file, as bilm-tf does."
    )
    format: Literal["auto", "hdf5", "parquet"] = Field(
        "auto", description="The format of OUT. auto decides by its name: .hdf5 and .h5 are HDF5."
    )
    keep: Names = Field(
        (), description="Columns of JSONL or Parquet input that stand beside the vectors, as [id, title]."
    )
    k: Int = Field(10, ge=1, le=10000, description="How many words embed.output=substitutes lists at each position.")
    batch_positions: Int | None = Field(
        None, ge=1, le=1 << 24, description="Positions computed at a time; null: 2048, or what a GPU's memory bears."
    )
    tokens: str | None = Field(
        None,
        min_length=1,
        description="A vocabulary file: write the context-independent vectors of its words; there is no IN.",
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
            names = ("output", "layers", "dtype", "state", "format", "keep", "k", "batch_positions")
            unused |= dict.fromkeys(names, "embed.tokens writes vectors of words in float32; remove one of them")
        return unused

    def _contradictions(self) -> Iterator[str]:
        if self.format == "hdf5" and self.output in ("substitutes", "surprisal"):
            yield f"embed.output={self.output} is written as Parquet; remove embed.format=hdf5"
        if repeated := next((name for name in self.keep if self.keep.count(name) > 1), None):
            yield f"embed.keep has {repeated} twice; name each column once"


class EmbedConfig(Root):
    """Configuration of `embed`."""

    absent = {
        "run": "embed writes to OUT and makes no run; remove it",
        "data.train": "the text of embed is IN",
        "data.test": "the text of embed is IN",
    }

    data: EmbedTextConfig = EmbedTextConfig()
    embed: EmbedOptions = EmbedOptions()
    cluster: ComputeConfig = ComputeConfig()
    init: InitConfig = InitConfig()
    checkpoint: CheckpointName = "best"
    texts: Globs = Field(
        (), alias="in", description="IN: text with one sentence in each line, or .jsonl or .parquet files, or raw text."
    )
    out: str | None = Field(None, description="OUT: an HDF5 file, or a folder of Parquet files.")

    def required(self) -> dict[str, str]:
        needed = {} if self.out is not None else {"out": "name the file or folder to write"}
        if not self.texts and self.embed.tokens is None:
            needed["in"] = "name the text to embed"
        return needed

    def _unused(self) -> dict[str, str]:
        if self.embed.tokens is None:
            return {}
        why = "embed.tokens names the words to embed, so there is no IN; remove one of them"
        return dict.fromkeys(("in", *(f"data.{name}" for name in FormConfig.model_fields)), why)
