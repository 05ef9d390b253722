"""The command `python -m elmo_ray`, also installed as `elmo-ray`: it lists the verbs, or runs one of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from elmo_ray import __version__
from elmo_ray.config.command_line import VERBS, overview, print_errors, print_result


def main(argv: Sequence[str] | None = None) -> int:
    """Run `VERB ...` and return its exit code; without arguments, print the verbs."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        return print_result(overview())
    if arguments[0] == "--version":
        return print_result(f"elmo_ray {__version__}")
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        print_errors(f"unknown verb {verb}; the verbs are {', '.join(VERBS)}")
        return 2
    return int(importlib.import_module(f"elmo_ray.{verb}").main(rest))


if __name__ == "__main__":
    sys.exit(main())
