"""The model and text sample that ship with the package, so that it works with no network.

Everything here was built by :mod:`mxd.demo.train`; ``results.json`` records that run.
"""

import json
from pathlib import Path
from typing import Any, Literal

from mxd.modeling_mxd.configuration_mxd import DEMO_MODEL as MODEL_NAME

__all__ = ["MODEL_NAME", "model_path", "results", "text_path"]

_HERE = Path(__file__).parent


def model_path() -> Path:
    """Folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` can load."""
    return _HERE / "model"


def text_path(split: Literal["train", "heldout"]) -> Path:
    """Parquet file (columns domain, title, year, text) of one split of the text sample.

    The model never saw the documents of ``heldout``; those of ``train`` it was trained on.
    """
    return _HERE / "text" / f"{split}.parquet"


def results() -> dict[str, Any]:
    """What the training run recorded: losses in nats per token, sizes, versions, licences."""
    return json.loads((_HERE / "results.json").read_text(encoding="utf-8"))
