"""Notebooks run as they stand, on fewer tokens."""

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert any(cell["outputs"] for cell in cells), "commit it with its outputs"
    code = "\n".join("".join(cell["source"]) for cell in cells)
    assert "TOKENS = " in code
    names: dict[str, object] = {}
    code = code.replace("500_000", "8192").replace("tokens=TOKENS", "tokens=TOKENS, num_experts=256")
    exec(code.replace("tokens=65536", "tokens=4096"), names)
    assert capsys.readouterr().out.count("\n") > 20
