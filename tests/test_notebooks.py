"""Notebooks run as they stand, on a small decomposition and with smaller sizes in their first code cell."""

import json
import re
import shutil
from pathlib import Path

import matplotlib
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SMALL = {
    "TOKENS": "4096",
    "EXPERTS": "64",
    "STEPS": "2",
    "TEXTS": "12",
    "CANDIDATES": "4",
    "COLLECTED": "2048",
    "METHODS": '["mxd"]',
}
FOLDERS = ["notebook-output", "compare-mxd"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch, capsys, finished):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    for name in FOLDERS:  # a notebook trains only what is not there
        shutil.copytree(finished[0], name)
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    code = "\n".join("".join(cell["source"]) for cell in cells)
    for name, value in SMALL.items():
        code = re.sub(rf"^{name} = .*", f"{name} = {value}", code, flags=re.MULTILINE)
    exec(code, {})
    assert capsys.readouterr().out.count("\n") > 5
    assert any(cell["outputs"] for cell in cells), "commit it with its outputs"
