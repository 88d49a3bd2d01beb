"""Freed memory that is kept: no page faults for what is allocated again, and the system has it back afterwards."""

import resource
import sys
from pathlib import Path

import pytest
import torch

from trainers.allocation import _glibc, freed_memory_kept

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux") or _glibc() is None, reason="glibc's allocator")

ELEMENTS = 2**24  # 64 MiB in float32, more than glibc ever keeps by itself


def faults_of_allocating(times: int = 8) -> int:
    """Page faults of making and dropping a tensor some times, after the first."""
    torch.ones(ELEMENTS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(ELEMENTS)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_what_is_freed_is_used_again_without_page_faults() -> None:
    outside = faults_of_allocating()
    with freed_memory_kept():
        inside = faults_of_allocating()
    assert inside < outside / 4  # the heap may have to grow once
    assert faults_of_allocating() > outside / 2  # as before


def test_the_system_has_it_back_afterwards() -> None:
    before = resident_bytes()
    with freed_memory_kept():
        torch.ones(4 * ELEMENTS)
        assert resident_bytes() > before + 3 * 4 * ELEMENTS
    assert resident_bytes() < before + 4 * ELEMENTS


def test_an_error_inside_ends_it() -> None:
    with pytest.raises(RuntimeError), freed_memory_kept():
        raise RuntimeError
    assert faults_of_allocating(2) > 20
