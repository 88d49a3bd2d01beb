"""Some cells of the fault table: each call once, in the first operation that makes it, with faults turn about.
`python benchmarks/fault_table.py` runs all of them and writes the table."""

import json
import re

import pytest
from fault_table import DOCS, MARK, RESULTS, table
from faults import COMPLETE, FAULTS, OPERATIONS, PASSING, REFUSED, Scene, record, try_fault
from pages import between_marks
from scenes import connected

# Ours, so that what passes must be overcome; in the others some calls are transformers' own.
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
def test_no_cell_is_broken(scene, calls, operation):
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


def test_the_table_has_every_call_and_no_broken_cell(calls):
    results = json.loads(RESULTS.read_text())
    # The order in which transformers fetches a repo's modules is another in every process.
    measured = {operation["name"]: {row["call"] for row in operation["calls"]} for operation in results["operations"]}
    for name, made in calls.items():
        assert {f"{call.method} {call.path}" for call in made} <= measured[name], name
    for operation in results["operations"]:
        for row in operation["calls"]:
            assert set(row) == {"call", *FAULTS}
            for fault in FAULTS:
                once, always = row[fault].split(", ")
                assert {once, always} <= {COMPLETE, REFUSED}
                assert once == COMPLETE or fault not in PASSING or operation["name"] not in OURS
    assert between_marks(MARK, table(results)) in DOCS.read_text()
