"""Evaluations as tables on screen."""

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

MAX_ROWS = 100
MAX_CELL = 200

Show = Callable[[dict[str, Any]], str]
"""Gives a figure of an evaluation, or of one of its layers, as text."""


def visible(text: str) -> str:
    """For a terminal: a character that could steer it, or hide or reorder others, becomes a space."""
    return "".join(character if character.isprintable() or character == "\n" else " " for character in text)


def cell(value: Any) -> Text:
    """A value that a stranger may have written: no markup, one line, not long."""
    return Text(visible(str(value)[:MAX_CELL]).replace("\n", " "))


def _shown(value: float | None, style: str = ".4f") -> str:
    return "–" if value is None else f"{value:{style}}"


def _number(name: str) -> Show:
    return lambda row: _shown(row[name])


def _percent(name: str) -> Show:
    return lambda row: "–" if row[name] is None else f"{100 * row[name]:.1f} %"


_LAYER: dict[str, Show] = {
    "NMSE": _number("nmse"),
    "FVU": _number("fvu"),
    "L0": lambda row: _shown(row["l0"], ".1f"),
    "dead\nexperts": _percent("dead_experts"),
    "expert\nshare": _percent("expert_share"),
    "specialised\nshare": _percent("specialised_share"),
}
_MODEL: dict[str, Show] = {
    "recovered": lambda results: _percent("recovered")(results["cross_entropy"]),
    "KL to the untouched model": _number("kl"),
    "same most likely token": _percent("top1_agreement"),
}


def _rise(results: dict[str, Any], model: str = "spliced") -> str:
    after, untouched = results["cross_entropy"][model], results["cross_entropy"]["untouched"]
    return _shown(None if after is None or untouched is None else after - untouched, "+.4f")


def _rise_and_interval(results: dict[str, Any]) -> str:
    """`+0.0081 ± 0.0012`, half the width of the 95 % interval, which earlier evaluations do not have."""
    low, high = results["cross_entropy"].get("rise_interval") or (None, None)
    return _rise(results) + ("" if low is None or high is None else f" ± {(high - low) / 2:.4f}")


def _layer_table(title: str) -> Table:
    table = Table(title=title)
    for column in ("layer", *_LAYER):
        table.add_column(column, justify="right")
    return table


def _measured_on(results: dict[str, Any]) -> str:
    """`32,512 tokens of held-out text`; what a training itself measured on, which says nothing of it, is held out."""
    settings = results.get("settings", {})
    tokens, evaluated = settings.get("tokens"), settings.get("evaluation", {"held_out": True})
    held_out = evaluated.get("held_out")
    what = "text that was trained on" if held_out is False else "held-out text" if held_out is True else "text"
    return (
        (f"{tokens:,} tokens of " if isinstance(tokens, int) else "")
        + what
        + (", the sample of mxd" if evaluated.get("dataset") == [] else "")
        + ("" if isinstance(held_out, bool) else "; it is not known whether it was trained on that")
    )


def print_evaluation(results: dict[str, Any]) -> None:
    """What `mxd.evaluation.faithfulness` measured: a row a layer, and the model with all of them spliced in."""
    layers = _layer_table(f"Layers, on {_measured_on(results)}")
    for layer, row in list(results["layers"].items())[:MAX_ROWS]:
        layers.add_row(cell(layer), *(show(row) for show in _LAYER.values()))
    loss = results["cross_entropy"]
    model = Table(title="The model with them spliced in")
    model.add_column("")
    model.add_column("cross-entropy\n(nats per token)", justify="right")
    model.add_row("untouched", _shown(loss["untouched"]))
    model.add_row("spliced", f"{_shown(loss['spliced'])}  ({_rise_and_interval(results)})")
    model.add_row("zero-ablated", f"{_shown(loss['zero_ablated'])}  ({_rise(results, 'zero_ablated')})")
    model.add_section()
    for name, show in _MODEL.items():
        model.add_row(name, show(results))
    _print(layers, model)
    if "ablation" in results:
        _print(_ablation_table(results["ablation"]))
    if "ranks" in results:
        _print(_rank_table(results["ranks"]))


def _ablation_table(curve: dict[str, Any]) -> Table:
    table = Table(title="Each token's strongest experts removed")
    table.add_column("removed", justify="right")
    table.add_column("rise of cross-entropy", justify="right")
    for layer in list(curve["layers"])[:MAX_ROWS]:
        table.add_column(cell(f"NMSE, layer {layer}"), justify="right")
    for index, count in enumerate(curve["removed"][:MAX_ROWS]):
        errors = [row["nmse"][index] for row in list(curve["layers"].values())[:MAX_ROWS]]
        table.add_row(*map(cell, (count, *map(_shown, (curve["rise"][index], *errors)))))
    return table


def _rank_table(ranks: dict[str, Any]) -> Table:
    table = Table(title="Ranks of a sample of experts, over min(H, O)")
    for column in ("layer", "experts", "mean rank", "least", "smallest singular value\n(median)", "largest\n(median)"):
        table.add_column(column, justify="right")
    for layer, row in list(ranks.items())[:MAX_ROWS]:
        medians = (f"{row[f'{which}_singular_value']['median']:.2g}" for which in ("smallest", "largest"))
        shown = (row["experts"], *(_shown(row[name]) for name in ("normalised_rank", "minimum_normalised_rank")))
        table.add_row(*map(cell, (layer, *shown, *medians)))
    return table


def print_change(before: dict[str, Any], after: dict[str, Any]) -> None:
    """The figures of two evaluations on the same text, side by side."""
    columns = ("NMSE", "dead\nexperts", "expert\nshare", "specialised\nshare")
    layers = Table(title=f"Layers, on {_measured_on(after)}: before → after")
    for column in ("layer", *columns):
        layers.add_column(column, justify="right")
    for layer, row in after["layers"].items():
        earlier = before["layers"][layer]
        layers.add_row(cell(layer), *(_change(_LAYER[column], earlier, row) for column in columns))
    model = Table(title="The model with them spliced in: before → after")
    model.add_column("")
    model.add_column("nats per token", justify="right")
    for name, show in {"rise of cross-entropy": _rise_and_interval, **_MODEL}.items():
        model.add_row(name, _change(show, before, after))
    _print(layers, model)


def print_frontier(results: dict[str, Any]) -> None:
    """What `mxd.frontier` found: a row a point, with means over layers."""
    untouched, points = results["untouched"], results["points"][:MAX_ROWS]
    title = "Frontier" if untouched is None else f"Frontier; cross-entropy untouched {untouched:.4f} nats per token"
    table = Table(title=title, box=None, padding=(0, 2, 0, 0))
    table.add_column("method", min_width=10)
    # Eighty characters wide, as terminals are.
    heads = {"NMSE": "NMSE", "dead\nexperts": "dead", "expert\nshare": "expert\nshare"}
    heads["specialised\nshare"] = "special-\nised"
    for column in ("K", "CE rise", "KL", *heads.values()):
        table.add_column(column, justify="right", no_wrap=True)
    for point in points:
        layers = list(point["layers"].values())
        mean = {name: _mean([layer[name] for layer in layers]) for name in layers[0]}
        known = (point["num_experts_per_tok"], _rise_and_interval(point), _number("kl")(point))
        shown = (*known, *(_LAYER[name](mean) for name in heads))
        table.add_row(cell(point["method"].replace("_", " ")), *map(cell, shown))
    _print(table)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def print_probing(results: dict[str, Any]) -> None:
    """What `mxd.probe` found: a row a representation, and their F1 for every class."""
    found = results["representations"]
    sparsities = list(next(iter(found.values()))["k_sparse"])
    table = Table(title="Sparse probing, means over classes and folds of test texts")
    table.add_column("representation", overflow="fold")
    for column in (
        "features",
        "F1 of the\nbest feature",
        "best F1 on\nthe test texts",
        *(f"accuracy\nk = {k}" for k in sparsities),
    ):
        table.add_column(column, justify="right")
    chance = results["always_yes_f1"]
    table.add_row("(always yes)", "–", f"{sum(chance.values()) / len(chance):.3f}", "–", *("0.500" for _ in sparsities))
    for name, row in found.items():
        accuracies = (f"{row['k_sparse'][k]:.3f}" for k in sparsities)
        f1 = f"{row['f1']:.3f} ± {row['f1_error']:.3f}"
        table.add_row(cell(name), f"{row['width']:,}", f1, f"{row['best_test_f1']:.3f}", *accuracies)
    classes = Table(title="F1 of the best feature, class by class")
    for column in ("class", "texts", "documents", "(always yes)", *found):
        classes.add_column(cell(column), justify="left" if column == "class" else "right", overflow="fold")
    for label, counts in list(results["classes"].items())[:MAX_ROWS]:
        scores = (f"{row['classes'][label]['f1']:.3f}" for row in found.values())
        known = (f"{counts['texts']:,}", f"{counts['groups']:,}", f"{chance[label]:.3f}")
        classes.add_row(cell(label), *known, *scores)
    _print(table, classes)


def _change(show: Show, before: dict[str, Any], after: dict[str, Any]) -> str:
    return f"{show(before).removesuffix(' %')} → {show(after)}"


def _print(*tables: Table) -> None:
    console = Console()
    for table in tables:
        console.print(table)
