"""The metrics as modules of `evaluate`: loaded from their folders, they give what our own functions do."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from scenes import connected

import mxd
from mxd.evaluation import ErrorSums, explained_share, recovered_share

FOLDERS = sorted(path for path in Path(mxd.__file__).with_name("metrics").iterdir() if (path / "README.md").is_file())


@pytest.fixture
def evaluate():  # imported where it is used: not in every process that collects tests
    return pytest.importorskip("evaluate")


@pytest.fixture
def load(tmp_path, evaluate):
    return lambda name: evaluate.load(
        str(next(path for path in FOLDERS if path.name == name)), cache_dir=str(tmp_path / "cache")
    )


def sums(prediction, target):
    found = ErrorSums()
    found.update(prediction, target)
    return found


@pytest.fixture
def outputs():
    """ŷ, ŷ with some experts replaced, and y with a token of zeros."""
    y = torch.randn(40, 6)
    y[7] = 0
    return y + 0.3 * torch.randn(40, 6), y + 0.9 * torch.randn(40, 6), y


@pytest.mark.parametrize("batched", [False, True])
def test_errors_are_those_of_our_own_functions(load, outputs, batched):
    prediction, ablated, target = outputs
    known, without = sums(prediction, target), sums(ablated, target)
    rows = {"predictions": prediction.tolist(), "references": target.tolist()}
    nmse, share = load("nmse"), load("specialised_share")
    if batched:  # as one streams
        for start in range(0, 40, 16):
            nmse.add_batch(**{name: row[start : start + 16] for name, row in rows.items()})
        assert nmse.compute() == pytest.approx({"nmse": known.nmse, "clipped_nmse": known.clipped_nmse})
        return
    assert nmse.compute(**rows) == pytest.approx({"nmse": known.nmse, "clipped_nmse": known.clipped_nmse})
    assert share.compute(**rows, ablated=ablated.tolist()) == pytest.approx(
        {
            "specialised_share": explained_share(known.nmse, without.nmse),
            "clipped_specialised_share": explained_share(known.clipped_nmse, without.clipped_nmse),
        }
    )


@pytest.mark.parametrize("zero", [4.0, 3.001])
def test_recovered_cross_entropy_is_that_of_our_own_function(load, zero):
    untouched, spliced = torch.rand(20).double() + 2.5, torch.rand(20).double() + 2.6
    ablated = untouched + zero - 3
    found = load("cross_entropy_recovered").compute(
        predictions=spliced.tolist(), references=untouched.tolist(), zero_ablated=ablated.tolist()
    )
    means = [float(losses.mean()) for losses in (untouched, spliced, ablated)]
    assert found["rise"] == pytest.approx(means[1] - means[0])
    assert found["recovered"] == pytest.approx(recovered_share(*means), nan_ok=True)
    assert math.isnan(found["recovered"]) == (zero < 3.01)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_the_example_of_its_page_gives_what_the_page_says(load, folder):
    code, result = re.search(r"\n(\w+\.compute\(.*\))\n# (\{.*\})\n", (folder / "README.md").read_text()).groups()
    assert eval(code, {folder.name: load(folder.name)}) == pytest.approx(json.loads(result))


def test_nothing_is_defined_where_y_is_zero_everywhere(load):
    found = load("nmse").compute(predictions=[[1.0, 2.0]], references=[[0.0, 0.0]])
    assert math.isnan(found["nmse"])
    shares = load("specialised_share").compute(predictions=[[1.0]], references=[[0.0]], ablated=[[1.0]])
    assert math.isnan(shares["specialised_share"])


def test_a_space_is_loaded_from_the_hub(tmp_path, monkeypatch, evaluate):
    with connected(tmp_path) as hub:
        files = {path.name: path.read_bytes() for path in (FOLDERS[0].parent / "nmse").iterdir() if path.is_file()}
        hub.create("user/nmse", files)
        address = hub.url + "/{path}/resolve/{revision}/{name}"  # that of a Space begins with spaces/
        monkeypatch.setattr("evaluate.config.HUB_EVALUATE_URL", address)
        found = evaluate.load("user/nmse", revision="main").compute(predictions=[[1.0]], references=[[2.0]])
    assert found["nmse"] == 0.25
