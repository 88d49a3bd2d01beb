"""Freed memory that is kept: hardly a page fault for what is allocated again."""

import resource
import sys

import pytest
import torch

from mxd.base import allocation
from mxd.base.allocation import _glibc, freed_memory_kept
from mxd.base.forward import evaluating

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux") or _glibc() is None, reason="glibc's allocator")

ELEMENTS = 9 * 2**20  # 36 MiB in float32, more than glibc ever keeps by itself
TIMES = 4


def faults_of_allocating() -> int:
    """Page faults of making and dropping a tensor some times, once the heap is large enough.

    The heap may grow eight times before: what is cut off a block to align a tensor is kept for seven small blocks, and
    without it the freed block is too small for the next tensor.
    """
    for _ in range(9):
        torch.ones(ELEMENTS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(TIMES):
        torch.ones(ELEMENTS)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_what_is_freed_is_used_again_without_page_faults() -> None:
    outside = faults_of_allocating()
    every = TIMES * ELEMENTS * 4 // resource.getpagesize()
    if outside < every / 2:
        pytest.skip("pages are huge, or another allocator is loaded")
    with freed_memory_kept():
        inside = faults_of_allocating()
    assert inside < every / 4


def test_only_the_outermost_block_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[int, int]] = []
    monkeypatch.setattr(allocation, "_set", lambda _, values: calls.append(values))
    with freed_memory_kept():
        with freed_memory_kept():
            pass
        assert allocation._DEFAULTS not in calls
    assert calls[-1] == allocation._DEFAULTS


def test_evaluation_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[int, int]] = []
    monkeypatch.setattr(allocation, "_set", lambda _, values: calls.append(values))
    with evaluating(torch.nn.Linear(2, 2)):
        assert calls == [allocation._KEEP]
    with evaluating(torch.nn.Linear(2, 2, device="meta")):
        pass
    assert calls == [allocation._KEEP, allocation._DEFAULTS]
