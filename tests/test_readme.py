import json
import re
from pathlib import Path

import pytest

from mxd.hub_cards import OLDEST_TRANSFORMERS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FINETUNING = (ROOT / "docs" / "finetuning.md").read_text()


def snippets(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", document, flags=re.DOTALL)


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


@pytest.mark.parametrize("name", ["modeling_mxd", "hub_cards", "trainers", "mxd", "benchmarks", "notebooks"])
def test_rooms_named_in_the_readme_exist(name):
    assert f"| `{name}` |" in README and (ROOT / name).is_dir()


def test_the_oldest_transformers_is_the_one_that_was_run():
    outcomes = json.loads((ROOT / "benchmarks" / "results" / "compatibility.json").read_text())["outcomes"]
    versions = {tuple(map(int, outcome["transformers"].split("."))) for outcome in outcomes}
    oldest = ".".join(map(str, min(versions)))
    assert oldest == f"{OLDEST_TRANSFORMERS}.0"
    assert f"Transformers {OLDEST_TRANSFORMERS} and later" in README
