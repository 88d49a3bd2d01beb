"""benchmarks/probing.py on the embedded model and a corpus of a few words."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from mxd import demo

ROOT = Path(__file__).parents[2]
FILES = [
    "argparse.py",
    "ast.py",
    "json/decoder.py",
    "queue.py",
    "selectors.py",
    "turtledemo/clock.py",
    "http/cookies.py",
]
WORDS = ["tax", "war", "king", "love", "river", "coal", "law", "ship"]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    modules = [importlib.import_module(name) for name in ("probing", "probing_problems")]
    every = dict(modules[1].python_library_files())
    assert len(every) > 300
    # A few files stand for the standard library, which takes seconds to parse.
    monkeypatch.setattr(modules[1], "python_library_files", lambda: ((path, every[path]) for path in FILES))
    yield modules
    for module in modules:
        sys.modules.pop(module.__name__)


@pytest.fixture
def corpus(tmp_path):
    """Documents with the columns of the corpus, and labels of every problem that is made of it."""
    rng = np.random.default_rng(0)

    def text(words=60):
        return " ".join(rng.choice(WORDS, words))

    authors = ["George Washington", "Abraham Lincoln", "Grover Cleveland", "Ronald Reagan", "Barack Obama"]
    speeches = [("speeches", f"s{year}", authors[year // 10 % 5], year, text()) for year in range(1790, 2020, 10)]
    plays = [("plays", title, "William Shakespeare", None, text()) for title in ("hamlet", "henry-v", "pericles")]
    regions = ["Africa"] * 11 + ["Europe"] * 11 + ["Arctic Region"]
    countries = [
        ("factbook", f"c{i}", "CIA", None, f"Introduction: {text()}\nGeography\nMap references: {region}\nCoal")
        for i, region in enumerate(regions)
    ]
    folder = tmp_path / "corpus"
    folder.mkdir()
    for rows in (speeches, plays, countries):
        names = ("domain", "title", "author", "year", "text")
        Dataset.from_list([dict(zip(names, row, strict=True)) for row in rows]).to_parquet(
            folder / f"{rows[0][0]}.parquet"
        )
    return folder


def labels(documents):
    return dict(zip(*np.unique(documents.labels, return_counts=True), strict=True))


def test_problems_are_labelled_and_grouped(benchmark, corpus):
    found = benchmark[1].problems(corpus)
    assert list(found) == [
        "domain", "era", "party", "president", "kind of play", "region", "kind of code", "docstring or code",
    ]  # fmt: skip
    assert set(labels(found["domain"])) == {"Python", "factbook", "plays", "speeches"}
    assert labels(found["era"]) == {"1790–1849": 6, "1850–1899": 5, "1900–1949": 5, "1950–2021": 7}
    # Washington was of no party.
    assert set(labels(found["party"])) == {"Democrat", "Republican"}
    assert len(found["party"].labels) == 18 == len(set(found["party"].groups))
    assert labels(found["kind of play"]) == {"history": 1, "tragedy": 1}
    assert labels(found["region"]) == {"Africa": 11, "Europe": 11}
    assert all(text.startswith("Introduction") and "Geography" not in text for text in found["region"].texts)
    assert set(labels(found["kind of code"])) == set(benchmark[1].CODE)
    code = found["docstring or code"]
    assert labels(code)["code"] == labels(code)["docstring"] == len(set(code.groups))
    argparse = {label: code.texts[i] for i, label in enumerate(code.labels) if code.groups[i] == "argparse.py"}
    assert "Command-line parsing library" in argparse["docstring"] and "def " not in argparse["docstring"][:500]
    assert "class ArgumentParser" in argparse["code"] and "Command-line parsing library" not in argparse["code"]


def test_measured_once_then_read_from_the_work_folder(benchmark, corpus, finished, tmp_path, monkeypatch):
    module = benchmark[0]
    every = module.problems

    def two(path):
        return {name: documents for name, documents in every(path).items() if name in ("region", "era")}

    monkeypatch.setattr(module, "problems", two)
    monkeypatch.setattr(module, "CANDIDATES", 5)
    out = tmp_path / "results.json"
    arguments = ["probing.py", str(demo.model_path()), str(finished[0]), "--corpus", str(corpus), "--texts", "6"]
    arguments += ["--work", str(tmp_path / "work"), "--results", str(out), "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", arguments)
    module.main()
    first = json.loads(out.read_text())
    monkeypatch.setattr(module, "pool_features", lambda *_, **__: pytest.fail("the model read the texts again"))
    monkeypatch.setattr(module, "probe_features", lambda *_, **__: pytest.fail("it was probed again"))
    module.main()
    again = json.loads(out.read_text())
    assert first.pop("seconds")["pass"] == again.pop("seconds")["pass"] and first == again
    assert list(first["problems"]) == ["era", "region"] and first["reference"] == "decomposition"
    assert list(first["representations"]) == ["MLP input", "MLP neurons", "MLP output", "decomposition"]
    shown = module.table(first)
    assert shown.count("\n| ") == 5 and "2 problems, 6 classes, 34 texts" in shown
    mean = np.mean([figures["published"]["f1"] for figures in first["representations"]["MLP input"].values()])
    assert f"**{mean:.3f}** ±" in shown
    assert str(tmp_path) not in json.dumps(first["representations"])


def test_differences_are_paired_by_fold(benchmark):
    def figures(*folds):
        return {
            "published": {"f1_folds": list(folds), "f1": np.mean(folds), "f1_error": np.std(folds, ddof=1) / 2**0.5}
        }

    one = {"era": figures(0.5, 0.9), "region": figures(0.2, 0.4)}
    other = {"era": figures(0.4, 0.8), "region": figures(0.1, 0.1)}
    mean, error = benchmark[0].difference(one, other)
    assert mean == pytest.approx((0.1 + 0.2) / 2)
    assert error == pytest.approx(0.1 / 2)  # the folds of one differ by 0, of the other by 0.2
    assert benchmark[0].mean_f1(one) == pytest.approx((0.5, (0.2**2 + 0.1**2) ** 0.5 / 2))


def test_the_table_is_what_the_benchmark_wrote(benchmark):
    results = json.loads(benchmark[0].RESULTS.read_text())
    assert benchmark[0].table(results) in benchmark[0].PAGE.read_text()
    assert len(results["problems"]) >= 4


def test_python_library_documents(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    loaded = importlib.import_module("python_library").python_library_documents()
    assert loaded.column_names == ["text", "domain"]
    assert set(loaded["domain"]) == {"code"}
    assert len(loaded) > 200
    assert any("def heappush(" in text for text in loaded["text"])
    assert not any("import pytest" in text for text in loaded["text"])
