"""Keep freed memory in the process, so that the C library's allocator reuses it for the next batch."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# From <malloc.h>. By itself glibc raises its thresholds up to these defaults, but never again once one is set.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_DEFAULTS = {_TRIM_THRESHOLD: 2**26, _MMAP_THRESHOLD: 2**25, _MMAP_MAX: 65536}
_KEEP = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0}
_open: list[ctypes.CDLL] = []  # one entry per open block


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep freed memory in the process inside the block; return it to the system after the outermost block.

    By default glibc returns every large tensor to the system when it is freed, and requests it again, page by page, for
    the next batch (https://man7.org/linux/man-pages/man3/mallopt.3.html), which takes a tenth of a forward pass. Does
    nothing with other C libraries.
    """
    glibc = _glibc()
    if glibc is None:
        yield
        return
    _open.append(glibc)
    _set(glibc, _KEEP)
    try:
        yield
    finally:
        _open.pop()
        if not _open:
            _set(glibc, _DEFAULTS)
            glibc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library without a name
        return None
    return library


def _set(glibc: ctypes.CDLL, values: dict[int, int]) -> None:
    for name, value in values.items():
        glibc.mallopt(name, value)
