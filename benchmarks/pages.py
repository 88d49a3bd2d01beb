"""Put the tables that are made from results files into pages."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from report import markdown_table

from mxd.base.layer_names import layer_ranges

RESULTS = Path(__file__).parent / "results"
TABLE = re.compile(r"<!-- table: (.*?) -->")


def tables() -> dict[str, Callable[[], str]]:
    """Return {name: function that makes the table in Markdown} of all tables that are made from results files."""
    import cache
    import collection
    import cross_layer
    import layers
    import meaning
    import plan
    import probing
    import processes
    import recipe
    import routing
    import speed

    def of(file: str, make: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
        return lambda: make(json.loads((RESULTS / file).read_text(encoding="utf-8")))

    made = {
        f"recipe, {title}": partial(recipe.table, title) for title in json.loads(recipe.RESULTS.read_text())["tables"]
    }
    return made | {
        "architectures": of("architectures.json", architectures_page),
        "cache": of("cache.json", cache.table),
        "collection": of("collection.json", collection.table),
        "cross-layer": of("cross-layer.json", cross_layer.table),
        "layers, throughput": of("layers.json", layers.throughput_table),
        "layers, costs": of("layers.json", layers.costs_table),
        "layers, together": of("layers.json", layers.together_table),
        "layers, texts": of("layers.json", layers.texts_list),
        "layers, sequential": of("layers.json", layers.sequential_table),
        "massive tokens": of("massive-tokens.json", recipe.massive_tokens),
        "meaning, contexts": of("meaning.json", meaning.meaning_table),
        "meaning, steering": of("meaning.json", meaning.steering_table),
        "plan": of("plan.json", plan.table),
        "plan, Llama": of("plan.json", plan.llama_table),
        "plan, largest layers": of("plan.json", plan.largest_table),
        "probing": of("probing.json", probing.table),
        "probing by problem": of("probing.json", probing.table_by_problem),
        "processes": of("processes.json", processes.table),
        "routing": of("routing.json", routing.table),
        "speed": of("speed.json", speed.page),
    }


def architectures_table(types: dict[str, dict[str, Any]]) -> str:
    """Return a row for every kind of MLP in every stack of every model type."""
    rows = []
    for model_type, result in types.items():
        if not result["mlps"]:
            rows.append((model_type, "", "", "", "", f"no: {result['error'] or 'no MLP runs'}"))
        for mlp in result["mlps"]:
            works = "yes" if mlp["slots"] else f"no: {mlp['reason']}"
            works += f" ({mlp['reason']})" if mlp["slots"] and mlp["reason"] else ""
            rows.append((model_type, mlp["stack"], mlp["site"], layer_ranges(mlp["layers"], ", "), mlp["kind"], works))
    escaped = ([re.sub(r"([|*_])", r"\\\1", cell) for cell in row] for row in rows)
    return markdown_table(["type", "stack", "site", "layers", "kind", "works"], escaped)


def architectures_page(measured: dict[str, Any]) -> str:
    """Return the counts, the times and the table of all architectures."""
    counts = [(kind, f"{works} of {of}") for kind, (works, of) in measured["counts"].items()]
    counted = markdown_table([f"transformers {measured['transformers']}", "work"], counts)
    passes = {name: measured[f"verification_of_{name}_in_forward_passes"] for name in ("last_layer", "all_layers")}
    not_built = "; ".join(f"{name} ({why})" for name, why in measured["not_built"].items())
    return (
        f"{counted}\nNot built: {not_built}.\n\n"
        f"Finding the MLPs of a 32-layer model takes {measured['find_mlps_milliseconds']:.1f} ms. Verifying a splice "
        f"takes {passes['last_layer']:.2f} forward passes of 8 tokens for the last layer and "
        f"{passes['all_layers']:.2f} for all 32.\n\n{architectures_table(measured['types'])}"
    )


def fill(page: str) -> str:
    """Return a page with a table in place of every `<!-- table: NAME -->`.

    Raises:
        KeyError: no table has that name.
    """
    made = tables() if TABLE.search(page) else {}
    return TABLE.sub(lambda found: made[found[1]](), page)
