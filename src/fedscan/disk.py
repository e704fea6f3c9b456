"""A disk that takes no more: one sentence that names the folder, whatever was being written into it."""

import errno
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # the disk, the largest file that is allowed, the user's quota
# SQLite says FULL for a full disk only; where a file or a quota is at its limit, it says that it could not write.
FULL_JOURNAL = ("SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE")


class DiskFull(Exception):
    """A folder takes no more. What is in it is sound, and the run goes on from there once there is room.

    ``again`` are words that the same command needs then.
    """

    again: tuple[str, ...] = ()


@contextmanager
def room_in(folder: Path) -> Iterator[None]:
    """Raises DiskFull, naming ``folder``, for whatever is raised within because it takes no more; else nothing changes.

    Every file of a run is written beside its place and renamed, and the journal by transactions, so a write that
    failed leaves what was there before.
    """
    try:
        yield
    except Exception as e:
        why = "" if isinstance(e, DiskFull) else full(e)
        if not why:
            raise
        raise DiskFull(f"nothing more can be written into {folder} ({why}): free space there; nothing is lost") from e


def full(error: BaseException | None) -> str:
    """Why nothing more could be written, where that is behind an error or the one it was raised upon; else nothing."""
    while error is not None:
        if isinstance(error, OSError) and (error.errno in FULL or unnumbered(error)):
            return (error.strerror or str(error)).lower()
        if isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorname", "") in FULL_JOURNAL:
            return str(error)
        told = re.search(r"\[Errno (\d+)\] ([^:]*)", str(error)) if isinstance(error, RuntimeError) else None
        if told and int(told[1]) in FULL:  # what a worker process said
            return told[2].lower()
        error = error.__cause__ or error.__context__
    return ""


def unnumbered(error: OSError) -> bool:
    """Whether NumPy, which does not keep the number of the error, wrote less than it had to."""
    return error.errno is None and bool(re.search(r"requested and \d+ written|Not enough free space", str(error)))
