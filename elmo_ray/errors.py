"""Errors that users can cause, or the machines that they use.

A verb prints such an error as one line and exits with its code; any other exception is a defect of this package.
"""

from collections.abc import Mapping
from types import MappingProxyType


class ElmoRayError(Exception):
    """Base of every error that a user's input can cause. exit_code: of the verb that it ends."""

    exit_code = 2


class ConfigError(ElmoRayError):
    """Error of a configuration key: unknown, of the wrong type, out of range, or in contradiction to another one.

    unused: the keys that other settings make useless, each with the reason, where the error has such keys.
    """

    unused: Mapping[str, str] = MappingProxyType({})


class DataError(ElmoRayError):
    """Error of a corpus, shard or vocabulary; the message names the file and, where there is one, the line."""


class CheckpointError(ElmoRayError):
    """Error of a missing, incomplete or damaged checkpoint; the message names the file."""


class FormatError(ElmoRayError):
    """Error in the form of a weights, options or checkpoint file of another program."""


class TrainingError(ElmoRayError):
    """Error that ends training: a loss or gradient is not finite, or checkpoints cannot be written."""


class ClusterError(ElmoRayError):
    """Error of a Ray cluster that is lost under a command: nothing that the user has given is wrong."""

    exit_code = 1


def one_line(text: str) -> str:
    """Return the text with every line end and run of blanks as one space, so that a message stays one line."""
    return " ".join(text.split())


def reason(error: BaseException, limit: int = 240) -> str:
    """Return why something failed, on one line: the system's words of an OSError, else the message, else the class."""
    return short(getattr(error, "strerror", None) or str(error) or type(error).__name__, limit)


def short(text: str, limit: int = 200) -> str:
    """Return the text on one line, cut to `limit` characters."""
    line = one_line(text)
    return line if len(line) <= limit else line[: limit - 3] + "..."
