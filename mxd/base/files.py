"""Write files atomically."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

UNFINISHED_NAME = "unfinished"
"""Name of the folder in a training's output that holds the checkpoint that is being written."""


def json_text(value: Any) -> str:
    """Return `value` as JSON, with null for NaN and infinity, which JSON does not have."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def json_line(value: Any) -> bytes:
    """Return `value` as JSON without spaces, for files that only programs read; see `json_text`."""
    text = json.dumps(_finite(value), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "replace")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, creating missing folders.

    Raises:
        TypeError: `value` is not serialisable; an existing file is left unchanged.
    """
    text = json_text(value) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text)


def replace_text(path: Path, text: str) -> None:
    """Write a file atomically: readers never see half of it, and a failure leaves nothing behind."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """Replace every float of `value` that is not finite by None."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
