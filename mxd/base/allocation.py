"""The C library's allocator, told to keep what one pass over a batch frees for the next."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# <malloc.h>. glibc raises its thresholds to at most these as large blocks are freed, and never again once one is set.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_DEFAULTS = {_TRIM_THRESHOLD: 2**26, _MMAP_THRESHOLD: 2**25, _MMAP_MAX: 65536}
_KEEP = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0}
_open: list[ctypes.CDLL] = []  # of every block that is open, one within another


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside the block, memory that is freed stays with the process; at the end of the outermost one it goes back to
    the system.

    By default glibc returns every large tensor to the system when it is freed and asks for it anew for the next batch,
    page by page (https://man7.org/linux/man-pages/man3/mallopt.3.html): of a training step on 1,024 tokens at GPT-2's
    shapes with 21,490 experts, which makes and frees two gradients of 66 MB, a sixth of the time; of a language model's
    forward pass a tenth. Does nothing where the C library is another.
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
