"""Memory that is not needed goes back to the system: glibc and mapped files keep what for large models is too much."""

import ctypes
import mmap
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from torch import Tensor

PAGEOUT = 21  # MADV_PAGEOUT of Linux: pages that were written to stay as they are, others are read again when used
LEAST = 4 << 20  # bytes: what is smaller is not worth the call
_MAPPED: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # by address


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


def note_mapped(data: np.ndarray[Any, Any]) -> None:
    """Notes, of bytes that lie in a mapped file, where it is mapped, so that ``give_back`` knows them."""
    base: object = data
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        _MAPPED[np.frombuffer(base, np.uint8).ctypes.data] = base


def give_back(leaves: Iterable[Tensor]) -> None:
    """Gives back the pages of those leaves that lie in mapped files, until somebody looks at them again."""
    for leaf in leaves:
        if (size := leaf.numel() * leaf.element_size()) < LEAST or leaf.device.type != "cpu":
            continue
        for file in _MAPPED.valuerefs():
            pages, at = file(), leaf.data_ptr() - file.key
            if pages is not None and 0 <= at < len(pages) and sys.platform == "linux":
                begin = at - at % mmap.PAGESIZE
                with suppress(OSError):  # an old kernel, or a file of somebody else
                    pages.madvise(PAGEOUT, begin, min(at + size, len(pages)) - begin)
