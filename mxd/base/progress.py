"""Show progress bars, and name layers."""

from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def progress_bar(
    items: Iterable[Any] | None = None, *, desc: str, show: bool, unit: str = "batch", **options: Any
) -> "tqdm[Any]":
    """Return a bar over some items, or one to update; `show` says whether it is visible."""
    return tqdm(items, desc=desc, unit=unit, disable=not show, dynamic_ncols=True, **options)


def layer_ranges(layers: list[int], separator: str = ",") -> str:
    """Format layers as `mxd decompose --layers` takes them: `[4, 5, 6, 10]` as `"4-6,10"`."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return separator.join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def layer_names(layers: list[int]) -> str:
    """Name layers in words: `"layer 8"`, `"layers 4-6,10"`."""
    return f"layer{'' if len(layers) == 1 else 's'} {layer_ranges(layers)}"
