"""Trainer of ELMo bidirectional language models on Ray; `python -m elmo_ray` lists its verbs.

Programs that use a trained model import `Elmo`, `ElmoEmbedder`, `ElmoTokenEmbedder`, `LanguageModel`, `ScalarMix`,
`batch_to_ids` and `tokenize` from here. They need no Ray. `elmo_ray.api` has `pretrain`, `evaluate` and `embed` as
functions.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elmo_ray.elmo.embedder import ElmoEmbedder as ElmoEmbedder
    from elmo_ray.elmo.embedder import ElmoTokenEmbedder as ElmoTokenEmbedder
    from elmo_ray.elmo.language_model import LanguageModel as LanguageModel
    from elmo_ray.elmo.layer import Elmo as Elmo
    from elmo_ray.elmo.layer import batch_to_ids as batch_to_ids
    from elmo_ray.elmo.scalar_mix import ScalarMix as ScalarMix
    from elmo_ray.text.tokenizers import tokenize as tokenize

__all__ = [
    "Elmo",
    "ElmoEmbedder",
    "ElmoTokenEmbedder",
    "LanguageModel",
    "ScalarMix",
    "__version__",
    "batch_to_ids",
    "tokenize",
]
__version__ = "0.7.0"

_MODULES = {
    "Elmo": "elmo.layer",
    "ElmoEmbedder": "elmo.embedder",
    "ElmoTokenEmbedder": "elmo.embedder",
    "LanguageModel": "elmo.language_model",
    "ScalarMix": "elmo.scalar_mix",
    "batch_to_ids": "elmo.layer",
    "tokenize": "text.tokenizers",
}


def __getattr__(name: str) -> Any:
    # These modules import torch, which takes seconds. The command line does without them.
    if name in _MODULES:
        return getattr(importlib.import_module(f"elmo_ray.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
