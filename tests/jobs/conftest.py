from pathlib import Path

import pytest

from mxd.evaluation import plots


@pytest.fixture
def undrawn_figures(monkeypatch):
    """Write empty figures, since drawing takes a second: fixtures of whole commands, and other rooms, draw them."""
    monkeypatch.setattr(plots, "_save", lambda figure, path, labels=0, title="": Path(path).touch())
