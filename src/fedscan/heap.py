"""Memory that was freed goes back to the system: glibc keeps it for later, which for large models is too much."""

import ctypes
from contextlib import suppress


def return_freed(pieces: int = 4 << 20) -> None:
    """Has glibc give back to the system at once what is freed in pieces of at least so many bytes.

    Left to itself it keeps leaves of up to 32 MB for later, and two large models too many with them. For a process
    that merges; one that trains asks for the same pieces again and again, and is slower so.
    """
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(-3, pieces)  # M_MMAP_THRESHOLD


def release_freed() -> None:
    """Gives back, once, what is free now. For a process that trains, when it has put many answers away."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
