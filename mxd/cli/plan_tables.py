"""Print what `mxd plan` returns."""

from typing import Any

from .tables import make_table, print_parts


def _magnitude(value: float) -> str:
    """`8030261248` → `8.0 G`."""
    for factor, unit in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:,.{0 if value >= 100 * factor else 1}f}{unit}"
    return f"{value:,.0f} "


def _duration(seconds: float) -> str:
    for factor, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * factor:
            return f"{seconds / factor:,.1f} {unit}"
    return f"{seconds:.0f} s"


def print_plan(plan: dict[str, Any]) -> None:
    """Print what `mxd.jobs.plan` returns."""
    settings, inference, disk, flops = (plan[name] for name in ("settings", "inference", "disk", "flops"))
    layers = [
        (layer, f"{row['num_experts']:,}", *(_magnitude(row[f"{name}parameters"]) for name in ("", "auxiliary_")))
        for layer, row in plan["layers"].items()
    ]
    ways = [
        (row["strategy"], row["devices"], *(f"{_magnitude(row['memory'][part])}B" for part in row["memory"]),
         f"{_magnitude(row['memory_bytes'])}B", row["base_passes"], _duration(row["training_seconds"]))
        for row in plan["strategies"]
    ]  # fmt: skip
    others = [
        ("base, parameters", _magnitude(plan["base"]["parameters"])),
        ("layers, parameters", _magnitude(plan["parameters"])),
        *((f"disk, {name.replace('_', ' ')}", f"{_magnitude(size)}B") for name, size in disk.items()),
        *((f"FLOPs of the training, {name}", _magnitude(count)) for name, count in flops.items()),
        *((f"time on one device, {name}", _duration(seconds)) for name, seconds in plan["seconds"].items()),
        ("FLOPs of a token", f"{inference['against_mlp']:.2f} × MLPs, {inference['against_model']:.2f} × model"),
    ]
    parts = [*plan["strategies"][0]["memory"]]
    tokens = f"{settings['tokens']:,} tokens in {settings['steps']:,} steps"
    rates = f"{_magnitude(settings['base'])}FLOPs/s, {_magnitude(settings['bandwidth'])}B/s"
    print_parts(
        make_table("Layers", ("layer", "experts", "parameters", "auxiliary"), layers),
        make_table(f"Training, {tokens}", ("strategy", "devices", *parts, "a device", "passes", "time"), ways),
        make_table(f"In all, at {rates}", ("", ""), others, show_header=False),
    )
