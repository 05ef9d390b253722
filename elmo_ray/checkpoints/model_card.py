"""The README.md of a model on the Hub (its model card), made from the records of the run that trained it."""

from __future__ import annotations

import math
import re
from typing import Any

from elmo_ray import __version__
from elmo_ray.checkpoints.source import Source
from elmo_ray.config.yaml_reader import dump_yaml
from elmo_ray.errors import short
from elmo_ray.storage import base_name, join, read_json

_MARKDOWN = re.compile(r"[\\|`<\[]")
"""Characters that mean something in a cell of a table. A * stays: it stands in globs."""


def model_card(source: Source) -> str:
    """Return the text of the card: metadata, sizes, text, perplexity, the settings of the training, and how to use it.

    What no record says is left out: the card of weights without a run has sizes alone. Of places only the last name
    is shown, as the folders of a machine are nobody's business.
    """
    result = _result(source)
    training = source.training
    lines = [f"# ELMo: {_directions(source)} of {_millions(source)} parameters", ""]
    lines += [f"Written by elmo_ray {__version__}.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in _facts(source, result)), ""]
    lines += ["```python", "from elmo_ray import Elmo", "", 'elmo = Elmo.from_pretrained("hf://OWNER/NAME")', "```", ""]
    if training is not None:
        settings = dump_yaml(_shareable(training.to_dict())).rstrip()
        # a name may hold the marks that end the block
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", settings)), default=0))
        # A fine-tuning started from another model, so its settings alone do not make this one.
        command = "" if result.get("initial") else ", for `python -m elmo_ray.pretrain SETTINGS.yaml`"
        lines += [f"Settings of the training{command}:", ""]
        lines += [f"{fence}yaml", settings, fence, ""]
    return "---\n" + dump_yaml(_metadata(result)) + "---\n" + "\n".join(lines)


def _metadata(result: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "library_name": "elmo-ray",
        "pipeline_tag": "feature-extraction",
        "tags": ["elmo", "bilm", "contextual-embeddings"],
    }
    perplexity = _perplexity(result)
    if perplexity is not None:
        measured = {
            "task": {"type": "text-generation", "name": "Language modelling"},
            "dataset": {"type": "held-out", "name": "held-out text of the run"},
            "metrics": [{"type": "perplexity", "value": round(perplexity, 2)}],
        }
        values["model-index"] = [{"name": "elmo_ray biLM", "results": [measured]}]
    return values


def _facts(source: Source, result: dict[str, Any]) -> list[tuple[str, str]]:
    lstm = source.config.lstm
    facts = [
        ("parameters", f"{sum(p.numel() for p in source.model.parameters()):,}"),
        ("LSTM", f"{lstm.n_layers} layers of {lstm.dim:,} cells, projection to {lstm.projection_dim:,}"),
        ("input", source.config.input),
    ]
    if source.words is not None:
        facts.append(("vocabulary", f"{source.words.size:,} words"))
    if source.step is not None:
        facts.append(("step", f"{source.step:,}"))
    if source.training is not None:
        names = ", ".join(base_name(text) for text in source.training.data.train)
        facts.append(("text", _MARKDOWN.sub(r"\\\g<0>", short(names, 1000))))
    if result.get("positions"):
        facts.append(("positions trained on", f"{result['positions']:,}"))
    if result.get("initial"):
        facts.append(("started from", "another trained model (fine-tuning)"))
    perplexity = _perplexity(result)
    if perplexity is not None:
        facts.append(("perplexity of the run's held-out text", f"{perplexity:.2f}"))
    return facts


def _result(source: Source) -> dict[str, Any]:
    """Return the run's result.json if it is of this very checkpoint, else nothing."""
    place = source.uri or str(source.path)
    for up in (1, 2):  # RUN/best, and RUN/checkpoints/NAME
        folder = place.rsplit("/", up)[0]
        values = read_json(join(folder, "result.json")) if source.step is not None else None
        if values is not None and (values.get("evaluation") or {}).get("step") == source.step:
            return values
    return {}


def _perplexity(result: dict[str, Any]) -> float | None:
    value = (result.get("evaluation") or {}).get("perplexity")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _directions(source: Source) -> str:
    return "a bidirectional language model" if source.model.directions == 2 else "a forward language model"


def _millions(source: Source) -> str:
    count = sum(p.numel() for p in source.model.parameters())
    return f"{count / 1e6:.1f} million" if count >= 100_000 else f"{count:,}"


def _shareable(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings without the places of this machine: text by its last name, no folders."""
    kept = {name: value for name, value in settings.items() if name not in ("run", "cluster")}
    data = dict(kept.get("data") or {})
    data.pop("prepared_dir", None)
    for key in ("train", "valid", "test", "vocab"):
        value = data.get(key)
        if isinstance(value, str):
            data[key] = base_name(value)
        elif isinstance(value, list | tuple):
            data[key] = [base_name(str(each)) for each in value]
    return {**kept, "data": data}
