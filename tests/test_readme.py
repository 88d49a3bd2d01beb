import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from mxd.hub_cards import OLDEST_TRANSFORMERS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FINETUNING = (ROOT / "docs" / "finetuning.md").read_text()


def snippets(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", document, flags=re.DOTALL)


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    reading, training = snippets(README)
    names: dict[str, object] = {}
    exec(reading, names)
    assert len(capsys.readouterr().out.strip()) > 20  # the steered continuation
    assert tuple(names["W"].shape) == (512, 192)
    exec(training.replace("max_steps=500", "max_steps=2"), names)
    assert names["config"].layers == [1, 3]
    finetuning, adapter = snippets(FINETUNING)
    exec(finetuning.replace("max_steps=100", "max_steps=2"), names)
    assert Path("finetuned/model.safetensors").is_file()
    exec(adapter, names)
    assert Path("adapter/adapter_model.safetensors").is_file()


def test_the_tables_of_recipes_are_what_the_benchmarks_wrote(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    methods, recipe, pages = benchmark("methods"), benchmark("recipe"), benchmark("pages")
    rows = json.loads(methods.RESULTS.read_text())
    assert pages.between_marks(methods.MARK, methods.table(rows)) in methods.PAGE.read_text()
    assert [row["name"] for row in rows] == list(methods.ROWS)
    results = json.loads(recipe.RESULTS.read_text())
    assert pages.between_marks(recipe.MARK, recipe.table(results)) in recipe.PAGE.read_text()
    assert pages.between_marks(recipe.MARK, recipe.table(results, recipe.OF_README)) in README


def test_the_fine_tuning_tables_are_what_the_benchmark_wrote(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    finetuning, pages = benchmark("finetuning"), benchmark("pages")
    results = json.loads(finetuning.RESULTS.read_text())
    for name, table in finetuning.tables(results).items():
        assert pages.between_marks(f"{finetuning.MARK}, {name}", table) in FINETUNING
    adapter, memory = results["lora"], results["memory"]
    assert adapter["cross_entropy"]["after"] < adapter["cross_entropy"]["before"]
    assert adapter["adapter_bytes"] < 1e6
    assert all(adapter["reload_bit_equal"].values())
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == [*finetuning.ROWS, finetuning.DISTILLED]
    assert rows["KL to the untouched model"]["kl"] < rows["KL to the untouched model"]["before"]["kl"]
    assert memory["chunked"]["loss"] == pytest.approx(memory["whole"]["loss"], rel=1e-4)
    assert memory["chunked"]["norm"] == pytest.approx(memory["whole"]["norm"], rel=1e-3)
    assert memory["chunked"]["bytes"] < memory["whole"]["bytes"]


@pytest.mark.parametrize("name", ["modeling_mxd", "hub_cards", "trainers", "mxd", "benchmarks", "notebooks"])
def test_rooms_named_in_the_readme_exist(name):
    assert f"| `{name}` |" in README and (ROOT / name).is_dir()


def test_the_oldest_transformers_is_the_one_that_was_run():
    compatibility = benchmark("compatibility")
    outcomes = json.loads(compatibility.RESULTS.read_text())["outcomes"]
    versions = {tuple(map(int, outcome["transformers"].split("."))) for outcome in outcomes}
    oldest = ".".join(map(str, min(versions)))
    assert oldest == compatibility.VERSIONS[0]
    assert oldest == f"{OLDEST_TRANSFORMERS}.0"
    assert f"Transformers {OLDEST_TRANSFORMERS} and later" in README
