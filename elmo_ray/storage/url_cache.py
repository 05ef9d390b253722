"""Cache of files that are named by a URL: each is fetched once and kept."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from elmo_ray.errors import FormatError, short
from elmo_ray.storage.files import atomic_write

CACHE_VARIABLE = "ELMO_RAY_CACHE"


def local_file(name: str | os.PathLike[str]) -> Path:
    """Return the local path of a file; one at a URL (https, s3, gs, ... by fsspec) is fetched to the cache first.

    The cache is the folder of $ELMO_RAY_CACHE, else ~/.cache/elmo_ray; a file stays there until the user removes it.
    Raises FormatError where the file does not exist or cannot be fetched.
    """
    text = os.fspath(name)
    scheme, separator, rest = text.partition("://")
    if scheme == "file" and separator:
        text, separator = rest, ""
    if not separator:
        path = Path(os.path.abspath(os.path.expanduser(text)))
        if not path.is_file():
            raise FormatError(f"{text}: no such file")
        return path
    base = os.path.basename(rest.split("?")[0].rstrip("/")) or "file"
    target = cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}-{base}"
    if not target.is_file():
        _fetch(text, target)
    return target


def cache_folder() -> Path:
    """Return the folder in which fetched files are kept."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "elmo_ray")


def _fetch(url: str, target: Path) -> None:
    try:
        import fsspec

        with fsspec.open(url, "rb") as source, atomic_write(target, None) as temporary, open(temporary, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    except Exception as error:  # each system of fsspec raises its library's exceptions
        why = short(str(error))
        if why in ("", short(url)):  # the message of some libraries is the URL itself
            why = type(error).__name__
        raise FormatError(f"{url}: cannot be fetched: {why}") from None
