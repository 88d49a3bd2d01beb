import json
import re
from pathlib import Path

from mxd import demo
from mxd.hub_cards import OLDEST_TRANSFORMERS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FINETUNING = (ROOT / "docs" / "how-to" / "finetune.md").read_text()
PEFT = (ROOT / "docs" / "how-to" / "peft.md").read_text()
QUICKSTART = (ROOT / "docs" / "start" / "quickstart.md").read_text()
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "recipe.json").read_text())["tables"]
HELD_OUT, PYTHON = "K = 32, one pass", "Another kind of text than that of the training, Python sources"
HEADLINE = {
    "MxD, held-out text": RESULTS[HELD_OUT]["MxD"],
    "skip transcoder, held-out text": RESULTS[HELD_OUT]["skip transcoder"],
    "MxD, Python sources": RESULTS[PYTHON]["MxD, K = 32"],
    "skip transcoder, Python sources": RESULTS[PYTHON]["skip transcoder, K = 32"],
}


def snippets(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", document, flags=re.DOTALL)


def test_it_is_short_and_begins_with_code():
    assert len(README.split()) <= 900
    assert README[: README.index("```python")].count("\n") < 40


def test_the_python_snippets_run(tmp_path, monkeypatch, capsys):
    from mxd import DecompositionOptions, MxDModel, decompose

    monkeypatch.chdir(tmp_path)
    decompose(
        DecompositionOptions(
            output="demo-output", num_experts=64, num_experts_per_tok=4, tokens=8192, evaluation_tokens=1024
        )
    )
    text = json.dumps({"text": "It is a truth universally acknowledged. " * 20}) + "\n"
    Path("texts.jsonl").write_text(text * 2)
    loading, reading = snippets(README)
    names: dict[str, object] = {}
    base = f'"demo-output", base_model_name_or_path={str(demo.model_path())!r}'
    exec(loading.replace('"user/mxd-gpt2-l8"', base), names)
    assert names["model"].decomposition.config.layers == [2]
    capsys.readouterr()
    exec(reading.replace('"strength": 9', '"strength": 300'), names)  # it is hardly trained
    before, after = capsys.readouterr().out.strip().split("\n")[0], names["steered"]
    assert before.startswith("The state of the Union") and after.startswith("The state of the Union")
    assert before != after
    (ablating,) = snippets(QUICKSTART)
    exec(ablating, names)
    assert float(capsys.readouterr().out.rpartition(" ")[2]) > 0
    (finetuning,) = snippets(FINETUNING)
    exec(finetuning.replace("max_steps=100", "max_steps=2"), names)
    assert Path("finetuned/model.safetensors").is_file()
    adapter, merge = snippets(PEFT)
    exec(adapter.replace("max_steps=100", "max_steps=2"), names)
    untrained = MxDModel.from_pretrained("demo-output").layer(2)
    exec(merge, names)
    merged = MxDModel.from_pretrained("merged").layer(2)
    assert not merged.gate.weight.equal(untrained.gate.weight) and merged.modulation.equal(untrained.modulation)


def test_the_headline_is_in_the_results():
    for name, row in HEADLINE.items():
        low, high = row["rise_interval"]
        cells = (
            f"{row['metrics']['nmse']:.3f}",
            f"{100 * row['metrics']['expert_share']:.0f} %",
            f"{row['kl']:.4f}",
            f"{row['rise']:+.4f} ± {(high - low) / 2:.4f}",
        )
        assert f"| {name} | {' | '.join(cells)} |" in README


def test_the_oldest_transformers_is_the_one_that_was_run():
    outcomes = json.loads((ROOT / "benchmarks" / "results" / "compatibility.json").read_text())["outcomes"]
    versions = {tuple(map(int, outcome["transformers"].split("."))) for outcome in outcomes}
    oldest = ".".join(map(str, min(versions)))
    assert oldest == f"{OLDEST_TRANSFORMERS}.0"
    assert f"transformers ({OLDEST_TRANSFORMERS} or later)" in README
