"""Results of the commands as tables on screen."""

from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

MAX_ROWS = 100
MAX_CELL = 200

Show = Callable[[dict[str, Any]], str]
"""Returns a figure of an evaluation, or of one of its layers, as text."""


def visible(text: str) -> str:
    """Replace characters that could steer a terminal, or hide or reorder others, by spaces."""
    return "".join(character if character.isprintable() or character == "\n" else " " for character in text)


def cell(value: Any) -> Text:
    """Return an untrusted value as a cell: no markup, one short line."""
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
    """Return the rise and half the width of its 95 % interval: `+0.0081 ± 0.0012`."""
    low, high = results["cross_entropy"].get("rise_interval") or (None, None)
    return _rise(results) + ("" if low is None or high is None else f" ± {(high - low) / 2:.4f}")


def _layer_table(title: str) -> Table:
    return _table(title, None, "layer", *_LAYER)


def _measured_on(results: dict[str, Any]) -> str:
    """Return on what was measured: `32,512 tokens of held-out text`. A training measures on held-out text itself."""
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
    """Print results of `mxd.evaluation.faithfulness`: a row for each layer, and the spliced model."""
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
    columns = ("layer", "experts", "mean rank", "least", "smallest singular value\n(median)", "largest\n(median)")
    table = _table("Ranks of a sample of experts, over min(H, O)", None, *columns)
    for layer, row in list(ranks.items())[:MAX_ROWS]:
        medians = (f"{row[f'{which}_singular_value']['median']:.2g}" for which in ("smallest", "largest"))
        shown = (row["experts"], *(_shown(row[name]) for name in ("normalised_rank", "minimum_normalised_rank")))
        table.add_row(*map(cell, (layer, *shown, *medians)))
    return table


def print_change(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Print two evaluations on the same text side by side."""
    columns = ("NMSE", "dead\nexperts", "expert\nshare", "specialised\nshare")
    layers = _table(f"Layers, on {_measured_on(after)}: before → after", None, "layer", *columns)
    for layer, row in after["layers"].items():
        earlier = before["layers"][layer]
        layers.add_row(cell(layer), *(_change(_LAYER[column], earlier, row) for column in columns))
    model = Table(title="The model with them spliced in: before → after")
    model.add_column("")
    model.add_column("nats per token", justify="right")
    for name, show in {"rise of cross-entropy": _rise_and_interval, **_MODEL}.items():
        model.add_row(name, _change(show, before, after))
    _print(layers, model)


def print_finetuning(results: dict[str, Any]) -> None:
    """Print results of `mxd finetune`: before and after."""
    print_change(results["settings"]["finetuning"][-1]["before"], results)


def print_frontier(results: dict[str, Any]) -> None:
    """Print results of `mxd.jobs.frontier`: a row for each point, with means over layers."""
    untouched, points = results["untouched"], results["points"][:MAX_ROWS]
    title = "Frontier" if untouched is None else f"Frontier; cross-entropy untouched {untouched:.4f} nats per token"
    table = Table(title=title, box=None, padding=(0, 2, 0, 0))
    table.add_column("method", min_width=10)
    # Fits a terminal of 80 characters.
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
    """Print results of `mxd.jobs.probe`: a row for each representation, and their F1 for each class."""
    found = results["representations"]
    sparsities = list(next(iter(found.values()))["k_sparse"])
    columns = ("features", "F1 of the\nbest feature", "best F1 on\nthe test texts")
    title = "Sparse probing, means over classes and folds of test texts"
    table = _table(title, "representation", *columns, *(f"accuracy\nk = {k}" for k in sparsities))
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


def print_domain_use(results: dict[str, Any]) -> None:
    """Print results of `mxd evaluate --by`: for each domain, how many experts are active there, and only there."""
    for layer, use in list(results["layers"].items())[:MAX_ROWS]:
        own = f"experts with {100 * use['share']:.0f} % of their firings there"
        title = f"Layer {layer}: {use['judged_experts']} of {use['experts']} experts judged"
        table = _table(title, "domain", "tokens", "active experts", own, "most frequent of them")
        for domain, row in use["domains"].items():
            first = ", ".join(list(row["own_experts"])[:5]) or "–"
            table.add_row(*map(cell, (domain, row["tokens"], row["active_experts"], len(row["own_experts"]), first)))
        _print(table)


def print_experts(results: dict[str, Any], shown: int = 3) -> None:
    """Print results of `mxd experts`: the strongest `shown` examples of each expert."""
    from mxd.jobs.experts import NOT_ACTIVE, percent

    for layer, experts in results["layers"].items():
        table = _table(f"Layer {layer}: where experts are most active", None, "expert", "% of training\ntokens", "a")
        table.add_column("text")
        for expert, found in experts.items():
            for number, example in enumerate(found["examples"][:shown]):
                head = ("", "") if number else (expert, percent(found["frequency"]))
                before, after = cell(example["before"][-30:]), cell(example["after"][:30])
                text = Text.assemble(before, (cell(example["token"]).plain, "bold reverse"), after)
                table.add_row(*map(cell, (*head, f"{example['coefficient']:.3g}")), text)
            if not found["examples"]:
                table.add_row(*map(cell, (expert, percent(found["frequency"]), "–", NOT_ACTIVE)))
        _print(table)


def print_layers(model: str, groups: Iterable[Any]) -> None:
    """Print the sites of a model, `mxd.jobs.layers.LayerGroup`: a table for each stack, and the reasons below it."""
    for stack in dict.fromkeys(group.site.stack for group in groups):
        table = Table(title=cell(f"{stack} of {model}"))
        for column in ("layers", "site", "kind", "widths", "activation", "weights"):
            table.add_column(column, overflow="fold")
        notes = []
        for group in [group for group in groups if group.site.stack == stack]:
            site = group.site
            widths = " → ".join(f"{width:,}" for width in group.widths) if group.widths else "–"
            own = (widths, group.hidden_act or "–", group.layout or "–")
            table.add_row(*map(cell, (group.ranges, site.name, site.kind, *own)))
            notes += [f"{group.ranges}, {site.name}: {site.reason}"] if site.reason else []
        _print(table, *map(cell, notes))


def print_found(found: list[Any]) -> None:
    """Print decompositions on the Hub, `mxd.hub_cards.DecompositionInfo`."""
    if not found:
        _print("none found")
        return
    table = Table(title="Decompositions on the Hub")
    for column in ("repo", "base model", "layers"):
        table.add_column(column, overflow="fold")
    for column in ("K", "experts", "CE rise", "likes", "date"):
        table.add_column(column, justify="right", no_wrap=True)
    for info in found:
        date = "–" if info.last_modified is None else f"{info.last_modified:%Y-%m-%d}"
        counts = (str(value) if value is not None else "–" for value in (info.num_experts_per_tok, info.num_experts))
        layers, rise = ", ".join(map(str, info.layers[:20])) or "–", _shown(info.cross_entropy_rise, "+.4f")
        table.add_row(*map(cell, (info.repo_id, info.base_model or "–", layers, *counts, rise, info.likes, date)))
    _print(table)


def print_details(details: Any) -> None:
    """Print a decomposition on the Hub, as `mxd.hub_cards.show_decomposition` returns it."""
    from mxd.hub_cards import OLDEST_TRANSFORMERS

    config = details.config
    title = f"{details.info.repo_id}, commit {details.commit[:8]}"
    table = _table(title, None, "layer", "method", "K", "experts", "encoder", "parameters")
    for layer in config.layers[:MAX_ROWS]:
        sizes = config.layer(layer)
        encoder = f"{sizes.intermediate_size} {sizes.hidden_act} {sizes.encoder_type}" if sizes.method == "mxd" else "–"
        row = (layer, sizes.method, sizes.num_experts_per_tok, sizes.num_experts, encoder, f"{sizes.num_parameters:,}")
        table.add_row(*map(cell, row))
    more = [f"and {len(config.layers) - MAX_ROWS} more layers"] if len(config.layers) > MAX_ROWS else []
    base = f"{config.base_model_name_or_path} at {config.base_model_revision or 'its newest commit'}"
    needs = cell(f"needs: transformers {OLDEST_TRANSFORMERS} or later, the base model {base}")
    _print(table, *more, needs, cell(f"download: {details.weight_bytes / 1e6:,.1f} MB, besides the base model"))
    if details.evaluation is None:
        _print("no evaluation comes with it")
        return
    try:
        print_evaluation(details.evaluation)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        _print("its evaluation.json is not as `mxd evaluate` writes it, and is not shown")


def _table(title: str, left: str | None, *right: str) -> Table:
    """Return a table with a column aligned to the left, if any, and others to the right."""
    table = Table(title=cell(title))
    if left is not None:
        table.add_column(left, overflow="fold")
    for column in right:
        table.add_column(column, justify="right")
    return table


def _change(show: Show, before: dict[str, Any], after: dict[str, Any]) -> str:
    return f"{show(before).removesuffix(' %')} → {show(after)}"


def _print(*parts: Any) -> None:
    console = Console()
    for part in parts:
        console.print(part)
