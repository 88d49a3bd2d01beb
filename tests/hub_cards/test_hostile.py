"""The hostile-input table, all of it; `python benchmarks/hostile_table.py` writes it."""

import pytest
from faults import COMPLETE, REFUSED
from hostile import CASES, HostileScene, run
from scenes import connected


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    with connected(folder) as hub:
        yield HostileScene(hub, folder)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.group}: {case.name}")
def test_it_is_refused_or_harmless(scene, case):
    results = {way: run(scene, case, way) for way in case.ways}
    found = {way: result.outcome.kind for way, result in results.items()}
    messages = {way: result.outcome.message[-400:] for way, result in results.items()}
    assert found == {way: COMPLETE if way in case.harmless else REFUSED for way in case.ways}, messages


def test_there_are_enough():
    assert len(CASES) >= 60
    assert len({(case.group, case.name) for case in CASES}) == len(CASES)
