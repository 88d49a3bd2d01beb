"""The hostile-input table; `python benchmarks/hostile_table.py` writes it. By the repo's own code, which is the same
code, only each fourth case is tried here."""

import json

import pytest
from fault_table import DOCS
from faults import COMPLETE, REFUSED
from hostile import HostileScene, run
from hostile_cases import CASES, REMOTE
from hostile_table import MARK, RESULTS, table
from pages import between_marks
from scenes import connected


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    with connected(folder) as hub:
        yield HostileScene(hub, folder)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: f"{CASES[number].group}: {CASES[number].name}")
def test_it_is_refused_or_harmless(scene, number):
    case = CASES[number]
    ways = [way for way in case.ways if way != REMOTE or number % 4 == 0]
    outcomes = {way: run(scene, case, way).outcome for way in ways}
    expected = {way: COMPLETE if way in case.harmless else REFUSED for way in ways}
    assert {way: outcome.kind for way, outcome in outcomes.items()} == expected, outcomes


def test_the_table_has_every_case_and_none_is_broken():
    rows = json.loads(RESULTS.read_text())
    assert [(row["group"], row["case"]) for row in rows] == [(case.group, case.name) for case in CASES]
    assert len(rows) >= 60
    for row, case in zip(rows, CASES, strict=True):
        assert row["outcomes"] == {way: COMPLETE if way in case.harmless else REFUSED for way in case.ways}
        assert row["megabytes"] < 1024
    assert between_marks(MARK, table(rows)) in DOCS.read_text()
