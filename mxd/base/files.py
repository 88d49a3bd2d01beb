"""Files that others read while they are written."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def json_text(value: Any) -> str:
    """`value` as JSON, which has no NaN and no infinity: both are null, "not defined"."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one move, folders made if need be.

    Raises:
        TypeError: `value` holds something that JSON has not; an earlier file is then left as it is.
    """
    text = json_text(value) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text)


def replace_text(path: Path, text: str) -> None:
    """Write a file in one move, so that no half file is ever seen; one that cannot be written leaves nothing."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """`value` with every float that is not finite replaced by None."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
