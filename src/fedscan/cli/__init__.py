"""The commands. What a command needs is imported when it is called, so that ``fedscan --help`` answers at once."""

import sys

from fedscan.cli.commands import app
from fedscan.cli.common import outcome


def main(arguments: list[str] | None = None) -> None:
    """Runs one command and exits: 0, or 2 with one sentence on stderr, or 3 where sites are missing, or 130."""
    sys.exit(outcome(app, sys.argv[1:] if arguments is None else arguments))


__all__ = ["main"]
