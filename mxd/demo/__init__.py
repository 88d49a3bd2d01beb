"""The model and the text sample that ship with mxd, so that it works without a network.

`scripts/build_demo.py` made everything here; `results.json` records that run.
"""

import json
from pathlib import Path
from typing import Any, Literal

MODEL_NAME = "mxd/embedded-default"
"""Equals `configuration_mxd.DEMO_MODEL`. It is repeated here because importing that module imports torch."""
_HERE = Path(__file__).parent


def model_path() -> Path:
    """Return the folder that `AutoModelForCausalLM` and `AutoTokenizer` can load."""
    return _HERE / "model"


def text_path(split: Literal["train", "heldout"]) -> Path:
    """Return the parquet file (domain, title, year, text) of a split; the model was trained on `train` alone."""
    return _HERE / "text" / f"{split}.parquet"


def results() -> dict[str, Any]:
    """Return what the training run recorded: losses in nats per token, sizes, versions, licences."""
    return json.loads((_HERE / "results.json").read_text(encoding="utf-8"))
