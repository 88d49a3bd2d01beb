"""Every kind of call of push, search, show and load fails: once with a fault that lasts and once with one that passes,
in the first operation that makes the call. The faults take turns."""

import re

import pytest
from faults import COMPLETE, FAULTS, OPERATIONS, PASSING, REFUSED, Scene, record, try_fault
from scenes import connected

# Our own operations must overcome a fault that passes; the others make calls of transformers' own.
OURS = ("mxd push", "mxd push --revision", "mxd show", "mxd search")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    with connected(folder) as hub:
        yield Scene(hub, folder)


@pytest.fixture(scope="module")
def calls(scene):
    return {operation.name: record(scene, operation) for operation in OPERATIONS}


def kind(call):
    """Calls of one kind differ in the branch, or in which of the repo's modules they ask for."""
    return call.method, re.sub(r"\w+\.py$", "*.py", re.sub("/(main|try)$", "", call.path))


def first_made(calls, name):
    """A call of every kind that no operation before this one makes."""
    before = list(calls)[: list(calls).index(name)]
    known = {kind(call) for other in before for call in calls[other]}
    return list({kind(call): call for call in calls[name] if kind(call) not in known}.values())


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_no_fault_breaks_it(scene, calls, operation):
    for turn, call in enumerate(first_made(calls, operation.name)):
        fault = list(FAULTS)[turn % len(FAULTS)]
        outcome = try_fault(scene, operation, call, fault, "always")
        assert outcome.kind in (COMPLETE, REFUSED), (call, fault, outcome)
        passing = PASSING[turn % len(PASSING)]
        outcome = try_fault(scene, operation, call, passing, "once")
        assert outcome.kind in ((COMPLETE,) if operation.name in OURS else (COMPLETE, REFUSED)), (
            call,
            passing,
            outcome,
        )
