"""Errors that users can cause. A verb prints them as one line and exits with code 2; anything else is our defect."""


class ElmoRayError(Exception):
    """Base of every error that a user's input can cause."""


class ConfigError(ElmoRayError):
    """A configuration key is unknown, of the wrong type, out of range, or contradicts another one."""


class DataError(ElmoRayError):
    """A corpus, shard or vocabulary cannot be used; the message names the file and, where there is one, the line."""


class CheckpointError(ElmoRayError):
    """A checkpoint is missing, incomplete or damaged; the message names the file."""


class FormatError(ElmoRayError):
    """A weights, options or checkpoint file of another program has the wrong form."""


class TrainingError(ElmoRayError):
    """Training cannot go on: a loss or gradient is not finite, or checkpoints cannot be written."""


def one_line(text: str) -> str:
    """The text without line ends and runs of blanks, so that a message stays one line."""
    return " ".join(text.split())


def short(text: str, most: int = 200) -> str:
    """The text on one line and cut to `most` characters."""
    line = one_line(text)
    return line if len(line) <= most else line[: most - 3] + "..."
