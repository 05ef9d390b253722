"""Models on the Hugging Face Hub: `hf://OWNER/NAME` fetched to the Hub's own cache, and the form of our folders there.

A folder of ours holds model.safetensors with weights and softmax, config.json with the settings of the model, vocab.txt
and a model card. Folders of other programs are opened by what they hold, as on the disk.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from elmo_ray.errors import ConfigError, FormatError, reason, short

SCHEME = "hf://"
HUB_WEIGHTS, HUB_CONFIG, CARD = "model.safetensors", "config.json", "README.md"
MODEL_TYPE = "elmo_ray"

_PLACE = re.compile(r"hf://([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?/?", re.ASCII)
_WEIGHTS = ("*.safetensors", "*.hdf5", "*.h5")
_PATTERNS = [*_WEIGHTS, "*.json", "*.yaml", "vocab*.txt", "vocab*.txt.gz"]
"""Files that a SOURCE can consist of; others of a repository are not fetched."""


def fetched(source: str) -> tuple[Path, str]:
    """Return the folder in the Hub's cache that holds a model, fetched if needed, and its place with the commit.

    source: hf://OWNER/NAME, or with @REVISION. The cache, a token, another endpoint and the offline mode are those of
    `huggingface_hub` (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE). Raises ConfigError of one line where there is no
    such model, or where it is not in the cache and the Hub does not answer.
    """
    match = _PLACE.fullmatch(source)
    if match is None:
        raise ConfigError(f"{source}: must be hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub import errors as hub
    except ImportError:
        raise ConfigError(f"{source}: huggingface_hub is not installed (pip install 'elmo-ray[hub]')") from None
    name, revision = match[1], match[2]
    endpoint = constants.ENDPOINT
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_PATTERNS, library_name="elmo_ray"))
    except hub.GatedRepoError:
        raise ConfigError(f"{source}: {endpoint} gives it only to users that asked for it; set HF_TOKEN") from None
    except hub.RepositoryNotFoundError:
        raise ConfigError(
            f"{source}: {endpoint} has no model of this name; correct it, or set HF_TOKEN if it is private"
        ) from None
    except hub.RevisionNotFoundError:
        raise ConfigError(f"{source}: the model has no revision {revision}") from None
    except hub.LocalEntryNotFoundError:
        offline = constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set" if offline else f"{endpoint} does not answer"
        raise ConfigError(f"{source}: is not whole in the cache {constants.HF_HUB_CACHE}, and {why}") from None
    except hub.HFValidationError as error:
        raise ConfigError(f"{source}: {short(str(error))}") from None
    except Exception as error:  # the network library's own exceptions, which change with its versions
        raise ConfigError(f"{source}: cannot be fetched: {reason(error)}") from None
    if not any(path for pattern in _WEIGHTS for path in folder.rglob(pattern)):
        raise ConfigError(f"{source}: has no weights; a model there has one of {', '.join(_WEIGHTS)}")
    return folder, f"{SCHEME}{name}@{folder.name}"


def is_hub_folder(folder: Path) -> bool:
    """Return True for a folder in our form for the Hub."""
    path = folder / HUB_CONFIG
    return (folder / HUB_WEIGHTS).is_file() and path.is_file() and _json(path).get("model_type") == MODEL_TYPE


def model_type(folder: Path) -> str | None:
    """Return the kind of model that config.json names, or None where it names none or cannot be read."""
    try:
        found = _json(folder / HUB_CONFIG).get("model_type")
    except FormatError:
        return None
    return found if isinstance(found, str) else None


def read_hub_config(folder: Path) -> dict[str, Any]:
    """Return the values of config.json. Raises FormatError unless `model` and `softmax` are mappings."""
    values = _json(folder / HUB_CONFIG)
    for name in ("model", "softmax"):
        if not isinstance(values.get(name), dict):
            raise FormatError(f"{folder / HUB_CONFIG}: {name} must be a mapping of settings")
    return values


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: is not readable JSON: {short(str(error))}") from None
    if not isinstance(values, dict):
        raise FormatError(f"{path}: must be an object")
    return values
