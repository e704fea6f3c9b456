"""The commands. What a command needs is imported when it is called, so that ``fedscan --help`` answers at once."""

import signal
import sys
import threading
from types import FrameType

from fedscan.cli.commands import app
from fedscan.cli.common import outcome


def main(arguments: list[str] | None = None) -> None:
    """Runs one command and exits: 0, or 2 with one sentence on stderr, or 3 where it can be gone on with, or 130."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)
    sys.exit(outcome(app, sys.argv[1:] if arguments is None else arguments))


def stop(number: int, frame: FrameType | None) -> None:
    """A polite end, as a batch system asks for it, is taken as Ctrl-C: the user is told that nothing is lost."""
    raise KeyboardInterrupt


__all__ = ["main"]
