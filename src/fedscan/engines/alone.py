"""One process at a time in a folder: it holds a lock as long as it lives, and the lock's file says which process it is.

This module needs the standard library only.
"""

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

TRIES = 10  # for whoever only asks who holds a lock is in the way for a moment


def hold(path: Path, taken: str, text: str | None = None) -> IO[str]:
    """Holds the lock ``path`` until what is returned is closed; its file then says ``text`` (this process's number).

    Raises ValueError, with the sentence ``taken``, where another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+")
    for _ in range(TRIES):
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(str(os.getpid()) if text is None else text)
            file.flush()
            return file
        time.sleep(0.05)
    file.close()
    raise ValueError(taken)


def held(path: Path) -> bool:
    """Whether a process holds the lock; nobody does where there is no such file."""
    with suppress(FileNotFoundError), path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # so that two who ask are not in each other's way
        except BlockingIOError:
            return True
    return False


def holder(path: Path) -> int:
    """The number of the process that holds the lock. Raises ValueError where none does, or none has said so yet."""
    text = path.read_text() if held(path) else ""
    if not text.isdecimal():
        raise ValueError(f"nobody holds {path}")
    return int(text)
