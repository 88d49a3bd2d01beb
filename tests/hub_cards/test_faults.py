"""Every call of push, search, show and load fails: once with a fault that lasts and once with one that passes, in the
first operation that makes the call. The faults take turns."""

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


def first_made(calls, name):
    """Calls of an operation that none before it makes."""
    before = list(calls)[: list(calls).index(name)]
    known = {(call.method, re.sub("/(main|try)$", "", call.path)) for other in before for call in calls[other]}
    return [call for call in calls[name] if (call.method, re.sub("/(main|try)$", "", call.path)) not in known]


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
