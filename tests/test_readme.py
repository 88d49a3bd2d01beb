import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_snippets_run(tmp_path, monkeypatch, capsys):
    from mxd import DecompositionOptions, decompose

    monkeypatch.chdir(tmp_path)
    decompose(
        DecompositionOptions(
            output="demo-output", num_experts=64, num_experts_per_tok=4, tokens=8192, evaluation_tokens=1024
        )
    )
    text = json.dumps({"text": "It is a truth universally acknowledged. " * 20}) + "\n"
    Path("texts.jsonl").write_text(text * 2)
    reading, training = snippets()
    names: dict[str, object] = {}
    exec(reading, names)
    assert len(capsys.readouterr().out.strip()) > 20  # the steered continuation
    assert tuple(names["W"].shape) == (512, 192)
    exec(training.replace("max_steps=500", "max_steps=2"), names)
    assert names["config"].layers == [1, 3]


def test_the_results_table_is_what_the_benchmark_wrote():
    spec = importlib.util.spec_from_file_location("methods", ROOT / "benchmarks" / "methods.py")
    methods = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(methods)
    rows = json.loads(methods.RESULTS.read_text())
    assert methods.BEGIN + methods.table(rows) + methods.END in README
    assert [row["name"] for row in rows] == list(methods.ROWS)
    default = rows[-1]["layers"]["15"]
    assert default["dead_experts"] < 0.1
    assert default["specialised_share"] > 0.8


@pytest.mark.parametrize("name", ["modeling_mxd", "evaluation_mxd", "hub_cards", "trainers", "mxd", "benchmarks"])
def test_rooms_named_in_the_readme_exist(name):
    if f"`{name}`" in README:
        assert (ROOT / name).is_dir()
