import json
import re
import shutil

from commands import refused, run

from mxd import ExpertsOptions, read_experts
from mxd.cli.tables import print_experts
from mxd.jobs.experts import page


def test_a_random_sample_is_shown_and_written(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "copy")
    config = tmp_path / "sample.yaml"
    config.write_text("sample: 5")
    code, output, error = run("experts", folder, "--tokens", "4096", "--examples", "3", "--config", config)
    assert code == 0, error
    assert "where experts are most active" in output and "experts.html" in output
    assert "experts: 100%" in error
    results = json.loads((folder / "experts.json").read_text())
    (experts,) = results["layers"].values()
    assert len(experts) == 5 and results["settings"]["tokens"] <= 4096
    for expert, found in experts.items():
        assert re.search(rf"│ +{expert} │", output) and 1 <= len(found["examples"]) <= 3
        values = [example["coefficient"] for example in found["examples"]]
        assert values == sorted(values, reverse=True) and values[-1] > 0
    shown = (folder / "experts.html").read_text()
    assert shown.count("<h2>") == 5 and "<mark>" in shown


def test_named_experts_of_some_text_in_another_folder(finished, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    output = str(tmp_path / "results")
    results = read_experts(
        ExpertsOptions(decomposition=str(finished[0]), dataset=[str(text)], experts=[3, 7], examples=2, output=output)
    )
    (experts,) = results["layers"].values()
    assert list(experts) == ["3", "7"]
    assert not (finished[0] / "experts.json").exists() and (tmp_path / "results" / "experts.html").is_file()
    examples = [example for found in experts.values() for example in found["examples"]]
    assert examples
    for example in examples:
        assert example["token"].strip() in text.read_text()
        assert " ".join((example["before"] + example["token"] + example["after"]).split()[1:-1]) in text.read_text()


def test_what_strangers_wrote_is_no_markup():
    example = {"coefficient": 1.0, "before": "<script>", "token": "&", "after": "</td>"}
    shown = page({"layers": {"<b>": {"1": {"frequency": 0.5, "examples": [example]}}}})
    assert (
        "<script>" not in shown and "&lt;script&gt;" in shown and "<mark>&amp;</mark>" in shown and "<b>" not in shown
    )


def test_an_expert_that_is_not_active_is_said_to_be_none(capsys):
    example = {"coefficient": 1.0, "before": "a ", "token": "b", "after": " c"}
    experts = {"12": {"frequency": 0.5, "examples": [example]}, "99": {"frequency": None, "examples": []}}
    results = {"layers": {"4": experts}}
    print_experts(results)
    rows = [row for row in capsys.readouterr().out.splitlines() if "not active in this text" in row]
    assert len(rows) == 1 and "99" in rows[0]
    assert page(results).count("not active in this text") == 1


def test_what_is_not_there(finished, monkeypatch, capsys):
    folder = finished[0]
    assert "has no expert 64: they are 0 to 63" in refused(monkeypatch, capsys, "experts", folder, "--experts", "1,64")
    assert "layer 99 is not in the decomposition" in refused(monkeypatch, capsys, "experts", folder, "--layer", "99")
    assert "--output" in refused(monkeypatch, capsys, "experts", "user/on-the-hub")
