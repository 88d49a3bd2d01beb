import json
from pathlib import Path

from mxd.hub_cards import OLDEST_TRANSFORMERS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "recipe.json").read_text())["tables"]
HELD_OUT, PYTHON = "K = 32, one pass", "Another kind of text than that of the training, Python sources"
HEADLINE = {
    "MxD, held-out text": RESULTS[HELD_OUT]["MxD"],
    "skip transcoder, held-out text": RESULTS[HELD_OUT]["skip transcoder"],
    "MxD, Python sources": RESULTS[PYTHON]["MxD, K = 32"],
    "skip transcoder, Python sources": RESULTS[PYTHON]["skip transcoder, K = 32"],
}


def test_it_is_short_and_begins_with_code():
    assert len(README.split()) <= 900
    assert README[: README.index("```python")].count("\n") < 40


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
