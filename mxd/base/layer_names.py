"""Put layers into words."""

from collections.abc import Sequence

_MOST_RANGES = 6


def layer_ranges(layers: Sequence[int], separator: str = ",") -> str:
    """Format layers as `mxd decompose --layers` takes them: `[4, 5, 6, 10]` as `"4-6,10"`."""
    return separator.join(_ranges(layers))


def layer_label(layer: int, written: Sequence[int]) -> str:
    """Return the label of a layer in a table: `"8"`, or `"8 → 8-10"` of one that writes to several MLPs."""
    return str(layer) if len(written) == 1 else f"{layer} → {layer_ranges(written)}"


def layer_names(layers: Sequence[int]) -> str:
    """Name layers in words: `"layer 8"`, `"layers 4-6, 10"`; of many ranges, the first ones and the last."""
    ranges = _ranges(layers)
    if len(ranges) > _MOST_RANGES:
        ranges = [*ranges[: _MOST_RANGES - 2], "…", ranges[-1]]
    return f"layer{'' if len(layers) == 1 else 's'} {', '.join(ranges)}"


def _ranges(layers: Sequence[int]) -> list[str]:
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return [str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts]
