"""Files that others read while they are written."""

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a file in one move, so that no half file is ever seen; one that cannot be written leaves nothing."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
