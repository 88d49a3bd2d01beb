import json
import math

import pytest
from evaluation_cases import batches, decomposition

from mxd.evaluation import faithfulness, load_evaluation, save_evaluation


def test_json_round_trip(tiny_llama, tmp_path):
    results = faithfulness(tiny_llama, decomposition(), batches(), settings={"nested": {"list": [1, (2.5, "x")]}})
    results["settings"]["nested"]["list"] = [1, [2.5, "x"]]  # JSON has no tuples
    path = save_evaluation(results, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "evaluation.json"
    read = load_evaluation(path.parent)
    for value in results["layers"]["1"].values():
        assert math.isfinite(value) or math.isnan(value)
    finite = {name: value for name, value in results["layers"]["1"].items() if math.isfinite(value)}
    assert {name: read["layers"]["1"][name] for name in finite} == finite
    assert {name: read[name] for name in results if name != "layers"} == {
        name: results[name] for name in results if name != "layers"
    }


def test_what_is_not_finite_is_null(tmp_path):
    save_evaluation({"a": math.nan, "b": [math.inf, 1.0], "c": {"d": -math.inf, "e": True, "f": None}}, tmp_path)
    text = (tmp_path / "evaluation.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, 1.0],
        "c": {"d": None, "e": True, "f": None},
    }
    assert load_evaluation(tmp_path) == json.loads(text)


def test_a_failed_write_leaves_the_earlier_file_and_no_other(tmp_path, monkeypatch):
    save_evaluation({"kl": 1.0}, tmp_path)
    with pytest.raises(TypeError):
        save_evaluation({"kl": object()}, tmp_path)

    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="disk full"):
        save_evaluation({"kl": 2.0}, tmp_path)
    assert load_evaluation(tmp_path) == {"kl": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_what_is_no_evaluation_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_evaluation(tmp_path)
    (tmp_path / "evaluation.json").write_text("[1]")
    with pytest.raises(ValueError, match="a JSON object was expected, got list"):
        load_evaluation(tmp_path)


def test_file_names_that_are_not_utf8_can_be_written(tmp_path):
    name = b"caf\xe9.parquet".decode("utf-8", "surrogateescape")  # as the system gives them
    save_evaluation({"text": {"dataset": [name]}}, tmp_path)
    assert load_evaluation(tmp_path)["text"]["dataset"] == [name]
