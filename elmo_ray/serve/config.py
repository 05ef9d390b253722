"""Settings of `serve`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from elmo_ray.config import CheckpointName, DeviceConfig, InitConfig
from elmo_ray.config.model import Layers
from elmo_ray.config.schema import Int, Root, Section


class ServeOptions(Section):
    """Section `serve`."""

    path: ClassVar[str] = "serve."
    host: str = Field(
        "127.0.0.1", min_length=1, description="The address to listen on; 0.0.0.0 is every network of the machine."
    )
    port: Int = Field(8000, ge=1, le=65535, description="The port to listen on.")
    layers: Layers = Field("all", description="As embed.layers, for requests that do not choose.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 computes products in bfloat16.")
    batch_positions: Int = Field(
        2048, ge=1, le=1 << 24, description="Waiting requests are computed together, up to this many positions."
    )
    batch_wait_s: float = Field(
        0.01, ge=0, le=60, description="A request waits up to this many seconds for others to be computed with it."
    )
    max_body_bytes: Int = Field(1 << 20, ge=1, le=1 << 30, description="A request with a longer body is refused.")
    max_sentences: Int = Field(256, ge=1, le=1 << 20, description="A request with more sentences is refused.")
    max_words: Int = Field(
        4096, ge=1, le=1 << 24, description="A request with more words in all its sentences is refused."
    )
    max_requests: Int = Field(
        64, ge=1, le=1 << 16, description="A worker that holds this many requests refuses others for the moment."
    )


class ServeClusterConfig(DeviceConfig):
    """Section `cluster` of `serve`."""

    workers: Int = Field(1, ge=1, le=1 << 16, description="The number of replicas, each a process with the model.")


class ServeConfig(Root):
    """Configuration of `serve`."""

    absent = {
        "run": "serve writes nothing and makes no run; remove it",
        "data": "serve gets its sentences by HTTP and reads no text; remove it",
        "cluster.max_failures": "Ray Serve replaces lost workers for as long as it runs; remove it",
    }

    serve: ServeOptions = ServeOptions()
    cluster: ServeClusterConfig = ServeClusterConfig()
    init: InitConfig = InitConfig()
    checkpoint: CheckpointName = "best"
