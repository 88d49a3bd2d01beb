"""Show progress bars."""

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def progress_bar(
    items: Iterable[Any] | None = None, *, desc: str, show: bool, unit: str = "batch", **options: Any
) -> "tqdm[Any]":
    """Return a bar over some items, or one to update; `show` says whether it is visible."""
    return tqdm(items, desc=desc, unit=unit, disable=not show, dynamic_ncols=True, **options)
