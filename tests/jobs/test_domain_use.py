import json
import shutil

import pytest
from commands import refused, run
from datasets import ClassLabel, Dataset, Features, Value

from mxd.data.provenance import sketch
from mxd.data.texts import TextOptions, load_one
from mxd.jobs.domain_use import documents_by_domain

PROSE = "It was the best of times, it was the worst of times, it was the age of wisdom. "
CODE = "def f(x):\n    return x + 1\n\nfor i in range(10):\n    print(f(i))\n"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "labelled.jsonl"
    rows = [{"text": PROSE * 60, "kind": "prose"}, {"text": CODE * 60, "kind": "code"}, {"text": CODE, "kind": ""}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    return path


def test_experts_are_counted_by_kind_of_text(finished, labelled, tmp_path, caplog, drawn_figures):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    short = tmp_path / "short.jsonl"
    short.write_text(labelled.read_text() + json.dumps({"text": "too short", "kind": "note"}) + "\n")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    text = TextOptions([str(labelled)])
    evaluation["settings"]["training"]["sketch"] = sketch(text, load_one(text), 0)
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    how = ("--dataset", short, "--by", "kind", "--tokens", "1024")
    code, output, error = run("evaluate", folder, *how)
    assert code == 0, error
    assert "prose" in output and "active experts" in output
    assert "code: 100%" in error and "prose: 100%" in error
    assert (folder / "figures" / "experts_per_domain.png").stat().st_size
    results = json.loads((folder / "domain_use.json").read_text())
    (layer,) = results["layers"].values()
    assert list(layer["domains"]) == ["code", "prose"] and layer["experts"] == 64
    for row in layer["domains"].values():
        assert 0 < row["tokens"] <= 1024 and 0 < row["active_experts"] <= 64
    assert results["settings"]["held_out"] is False and "was trained on documents of this text" in caplog.text
    assert "which was trained on" in " ".join(output.split())
    assert results["settings"]["domain_column"] == "kind" and results["settings"]["left_out"] == ["note"]
    assert "domain 'note' is left out: the text is too short" in caplog.text and "asked for" not in caplog.text
    assert "few tokens of 'code' (1,024), 'prose' (1,024): chance assigns experts" in caplog.text
    assert f"judged, on {short.name[:5]}" in output or str(short)[:20] in output


def test_text_that_cannot_be_divided(finished, labelled, monkeypatch, capsys):
    folder = finished[0]
    assert "no column 'domain'" in refused(
        monkeypatch, capsys, "evaluate", folder, "--dataset", labelled, "--by", "domain"
    )
    assert "holds the text" in refused(monkeypatch, capsys, "evaluate", folder, "--dataset", labelled, "--by", "text")
    assert "name it with --dataset" in refused(monkeypatch, capsys, "evaluate", folder, "--by", "kind")
    short = labelled.with_name("short.jsonl")
    short.write_text("".join(json.dumps({"text": text, "kind": text[:3]}) + "\n" for text in (PROSE * 60, "too short")))
    error = refused(monkeypatch, capsys, "evaluate", folder, "--dataset", short, "--by", "kind")
    assert "of the domains 'It ', 'too' fewer than two have enough text for one row: 'It '" in error
    assert "is no folder" in refused(monkeypatch, capsys, "evaluate", "nowhere", "--dataset", labelled, "--by", "kind")
    one = labelled.with_name("one.jsonl")
    one.write_text(json.dumps({"text": PROSE, "domain": "prose"}) + "\n")
    assert "it has 1: prose" in refused(monkeypatch, capsys, "evaluate", folder, "--dataset", one, "--by", "domain")


def test_labels_are_called_by_their_names(tmp_path):
    features = Features({"text": Value("string"), "kind": ClassLabel(names=["code", "prose"])})
    path = tmp_path / "labels.parquet"
    Dataset.from_dict({"text": [CODE, PROSE], "kind": [0, 1]}, features=features).to_parquet(path)
    assert list(documents_by_domain(TextOptions([str(path)]), "kind")) == ["code", "prose"]
