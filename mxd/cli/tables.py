"""Results of the commands as tables on screen."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mxd.base.layer_names import layer_label
from mxd.jobs.options import text_name

MAX_LAYERS = 100
MAX_CELL = 200

Show = Callable[[dict[str, Any]], str]  # a figure of an evaluation, or of one of its layers, as text


def visible(text: str) -> str:
    """Replace characters that could steer a terminal, or hide or reorder others, by spaces."""
    return "".join(character if character.isprintable() or character == "\n" else " " for character in text)


def cell(value: Any) -> Text:
    """Return an untrusted value as a cell: no markup, one short line."""
    return value if isinstance(value, Text) else Text(visible(str(value)[:MAX_CELL]).replace("\n", " "))


def make_table(
    title: str, columns: Sequence[Any], rows: Iterable[Sequence[Any]], left: int = 1, wrap: bool = True, **style: Any
) -> Table:
    """Return a table whose first `left` columns are aligned to the left; without `wrap` the others stay on one line."""
    table = Table(title=cell(title), **style)
    for number, column in enumerate(columns):
        right = number >= left
        table.add_column(column, overflow="fold", justify="right" if right else "left", no_wrap=right and not wrap)
    for row in rows:
        table.add_row(*map(cell, row))
    return table


def print_parts(*parts: Any) -> None:
    """Print tables and lines one after another."""
    console = Console()
    for part in parts:
        console.print(part)


def _shown(value: float | None, style: str = ".4f") -> str:
    return "–" if value is None else f"{value:{style}}"


def _number(name: str) -> Show:
    return lambda row: _shown(row.get(name))


def _percent(name: str) -> Show:
    return lambda row: "–" if row.get(name) is None else f"{100 * row[name]:.1f} %"


def _rise(results: dict[str, Any]) -> str:
    """Return the rise and half the width of its 95 % interval: `+0.0081 ± 0.0012`."""
    loss = results["cross_entropy"]
    after, untouched = loss["spliced"], loss["untouched"]
    low, high = loss.get("rise_interval") or (None, None)
    rise = _shown(None if after is None or untouched is None else after - untouched, "+.4f")
    return rise + ("" if low is None or high is None else f" ± {(high - low) / 2:.4f}")


_LAYER: dict[str, Show] = {
    "NMSE": _number("nmse"),
    "FVU": _number("fvu"),
    "L0": lambda row: _shown(row.get("l0"), ".1f"),
    "dead\nexperts": _percent("dead_experts"),
    "expert\nshare": _percent("expert_share"),
    "specialised\nshare": _percent("specialised_share"),
}
_SHORT = ("NMSE", "dead\nexperts", "expert\nshare", "specialised\nshare")
_MODEL: dict[str, Show] = {
    "cross-entropy, untouched": lambda results: _shown(results["cross_entropy"]["untouched"]),
    "cross-entropy, spliced": lambda results: _shown(results["cross_entropy"]["spliced"]),
    "cross-entropy, zero-ablated": lambda results: _shown(results["cross_entropy"]["zero_ablated"]),
    "rise of cross-entropy": _rise,
    "recovered": lambda results: _percent("recovered")(results["cross_entropy"]),
    "KL to the untouched model": _number("kl"),
    "same most likely token": _percent("top1_agreement"),
}


def _measured_on(results: dict[str, Any]) -> str:
    """Return on what was measured: `32,512 tokens of held-out text`. A training measures on held-out text itself."""
    settings = results.get("settings", {})
    tokens, evaluated = settings.get("tokens"), settings.get("evaluation", {"held_out": True})
    texts = {True: "held-out text", False: "text that was trained on"}
    text = texts.get(evaluated.get("held_out"), "text; it is not known whether it was trained on that")
    if evaluated.get("dataset") is not None:
        name = text_name(evaluated["dataset"])
        text = f"held-out documents of {name}" if text == texts[True] else f"{text}, {name}"
    return (f"{tokens:,} tokens of " if isinstance(tokens, int) else "") + text


def print_evaluation(results: dict[str, Any], before: dict[str, Any] | None = None, warn: bool = True) -> None:
    """Print results of `mxd.evaluation.faithfulness`: a row for each layer, and the spliced model.

    With `before`, an earlier evaluation on the same text, each figure is `before → after`. Without `warn`, no line
    warns of a low expert share, which the measurement logged.
    """

    def figures(shows: Iterable[Show], now: dict[str, Any], was: dict[str, Any] | None) -> list[str]:
        return [("" if was is None else f"{show(was).removesuffix(' %')} → ") + show(now) for show in shows]

    columns = tuple(_LAYER) if before is None else _SHORT
    rows = [
        (name, *figures([_LAYER[column] for column in columns], row, was))
        for layer, row in results["layers"].items()
        for name, row, was in _with_outputs(layer, row, before and before["layers"][layer])
    ]
    unpredicted = results.get("settings", {}).get("no_predictions")
    model = zip(_MODEL, figures(_MODEL.values(), results, before), strict=True)
    change = "" if before is None else ": before → after"
    print_parts(
        make_table(f"Layers, on {_measured_on(results)}{change}", ("layer", *columns), rows[:MAX_LAYERS], left=0),
        *(_weak({f"layer {layer}": row for layer, row in results["layers"].items()}) if warn else ()),
        make_table(f"The model with them spliced in{change}", ("", "entropies in\nnats per token"), model)
        if not unpredicted
        else cell(f"No figures of its predictions: {unpredicted}"),
    )
    if "ablation" in results:
        print_parts(_ablation_table(results["ablation"]))
    if "ranks" in results:
        print_parts(_rank_table(results["ranks"]))
    if "tasks" in results:
        print_parts(_task_table(results["tasks"]))


def _with_outputs(layer: str, row: dict[str, Any], before: dict[str, Any] | None) -> list[tuple[str, Any, Any]]:
    """Return the row of a layer, and one of each MLP that it writes to if there are several: `8 → 9`."""
    outputs = row.get("outputs", [])
    earlier = (before or {}).get("outputs", []) or [None] * len(outputs)
    parts = [(f"{layer} → {int(layer) + i}", *pair) for i, pair in enumerate(zip(outputs, earlier, strict=True))]
    return [(layer, row, before), *parts]


def _weak(rows: dict[str, Any]) -> list[Text]:
    """Return a line that warns of rows whose experts carry little, if there are any."""
    from mxd.evaluation import weak_experts

    return [cell(f"Warning: {warning}") for warning in [weak_experts(rows)] if warning]


def _ablation_table(curve: dict[str, Any]) -> Table:
    columns = ["removed", "rise of cross-entropy", *(cell(f"NMSE, layer {layer}") for layer in curve["layers"])]
    errors = [row["nmse"] for row in curve["layers"].values()]
    rows = [(count, *map(_shown, figures)) for count, *figures in zip(curve["removed"], curve["rise"], *errors)]  # noqa: B905
    return make_table("Each token's strongest experts removed", columns, rows, left=0)


def _task_table(tasks: dict[str, Any]) -> Table:
    def score(row: dict[str, Any], model: str) -> str:
        error = row[f"{model}_stderr"]
        return _shown(row[model]) + ("" if error is None else f" ± {error:.4f}")

    rows = [
        (task, metric, *(score(row, model) for model in ("untouched", "spliced")))
        for task, metrics in tasks.items()
        for metric, row in metrics.items()
    ]
    return make_table(
        "Tasks, ± the standard error", ("task", "metric", "untouched", "spliced"), rows, left=2, wrap=False
    )


def _rank_table(ranks: dict[str, Any]) -> Table:
    columns = ("layer", "experts", "mean rank", "least", "smallest singular value\n(median)", "largest\n(median)")
    rows = []
    for layer, row in ranks.items():
        known = (row["experts"], _number("normalised_rank")(row), _number("minimum_normalised_rank")(row))
        medians = (f"{row[f'{which}_singular_value']['median']:.2g}" for which in ("smallest", "largest"))
        rows.append((layer, *known, *medians))
    return make_table("Ranks of a sample of experts, over min(H, O)", columns, rows, left=0)


def print_frontier(results: dict[str, Any]) -> None:
    """Print results of `mxd.jobs.frontier`: a row for each point, with means over layers."""
    rows, means = [], {}
    for point in results["points"]:
        layers = list(point["layers"].values())
        means[point["name"]] = mean = {name: _mean([layer[name] for layer in layers]) for name in layers[0]}
        known = (point["num_experts_per_tok"], _rise(point), _number("kl")(point))
        rows.append((point["method"].replace("_", " "), *known, *(_LAYER[name](mean) for name in _SHORT)))
    untouched = _shown(results["untouched"])
    columns = ("method", "K", "CE rise", "KL", "NMSE", "dead", "expert\nshare", "special-\nised")
    title = f"Frontier; cross-entropy untouched {untouched} nats per token"
    print_parts(make_table(title, columns, rows, wrap=False, box=None, padding=(0, 2, 0, 0)), *_weak(means))


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def print_probing(results: dict[str, Any]) -> None:
    """Print results of `mxd.jobs.probe`: a row for each representation, and their F1 for each class."""
    found, chance = results["representations"], results["always_yes_f1"]
    sparsities = list(next(iter(found.values()))["k_sparse"])
    rows = [("(always yes)", "–", f"{sum(chance.values()) / len(chance):.3f}", "–", *("0.500" for _ in sparsities))]
    for name, row in found.items():
        f1 = f"{row['f1']:.3f} ± {row['f1_error']:.3f}"
        accuracies = (f"{row['k_sparse'][k]:.3f}" for k in sparsities)
        rows.append((name, f"{row['width']:,}", f1, f"{row['best_test_f1']:.3f}", *accuracies))
    columns = ("representation", "features", "F1 of the\nbest feature", "best F1 on\nthe test texts")
    accuracy = (f"accuracy\nk = {k}" for k in sparsities)
    classes = []
    for label, counts in results["classes"].items():
        scores = (f"{row['classes'][label]['f1']:.3f}" for row in found.values())
        classes.append((label, f"{counts['texts']:,}", f"{counts['groups']:,}", f"{chance[label]:.3f}", *scores))
    text = text_name(results["settings"]["dataset"])
    heads = ("class", "texts", "documents", "(always yes)", *map(cell, found))
    print_parts(
        make_table(
            f"Sparse probing of {text}, means over classes and folds of test texts", (*columns, *accuracy), rows
        ),
        make_table("F1 of the best feature, class by class", heads, classes),
    )


def print_domain_use(results: dict[str, Any]) -> None:
    """Print results of `mxd evaluate --by`: for each domain, how many experts are active there, and only there."""
    for layer, use in results["layers"].items():
        rows = []
        for domain, row in use["domains"].items():
            first = ", ".join(list(row["own_experts"])[:5]) or "–"
            rows.append((domain, row["tokens"], row["active_experts"], len(row["own_experts"]), first))
        own = f"experts with {100 * use['share']:.0f} % of their firings there"
        text = text_name(results["settings"]["dataset"])
        text += ", which was trained on" if results["settings"].get("held_out") is False else ""
        title = f"Layer {layer}: {use['judged_experts']} of {use['experts']} experts judged, on {text}"
        print_parts(make_table(title, ("domain", "tokens", "active experts", own, "most frequent of them"), rows))


def print_experts(results: dict[str, Any], shown: int = 3) -> None:
    """Print results of `mxd experts`: the strongest `shown` examples of each expert."""
    from mxd.jobs.expert_page import NOT_ACTIVE, percent

    text = text_name(results["settings"]["dataset"])
    for layer, experts in results["layers"].items():
        rows: list[tuple[Any, ...]] = []
        for expert, found in experts.items():
            head = (expert, percent(found["frequency"]))
            for example in found["examples"][:shown]:
                before, after = cell(example["before"][-30:]), cell(example["after"][:30])
                context = Text.assemble(before, "[", (cell(example["token"]).plain, "bold"), "]", after)
                rows.append((*head, f"{example['coefficient']:.3g}", context))
                head = ("", "")
            if not found["examples"]:
                rows.append((*head, "–", NOT_ACTIVE))
            if tokens := _promoted(found):
                aligned = f"alignment {_shown(found.get('alignment'), '.1f')}, promotes: "
                rows.append(("", "", "", Text.assemble(aligned, cell(tokens))))
        columns = ("expert", "% of\ntokens", "a", "text")
        table = make_table(f"Layer {layer}: where experts are most active in {text}", columns, rows, left=0)
        table.columns[-1].justify = "left"
        print_parts(table)


def _promoted(found: dict[str, Any]) -> str:
    """Return the first tokens that an expert promotes; empty if they are not known."""
    return " ".join(token.strip() for token, _ in found.get("promoted", [])[:6])


def print_steered(results: dict[str, Any]) -> None:
    """Print the texts of `mxd steer` side by side, each after the prompt."""
    texts = [
        Text.assemble((visible(results["prompt"]), "bold"), visible(results[name])) for name in ("untouched", "steered")
    ]
    table = make_table("", ("untouched", "steered"), [texts], left=2, show_lines=True)
    for column in table.columns:
        column.ratio = 1
    table.title, table.expand = None, True
    print_parts(table)
    if results["untouched"] == results["steered"]:
        print_parts(cell("Both texts are the same: raise --strength, or choose another expert or prompt."))


def print_inspection(results: dict[str, Any], shown: int = 3) -> None:
    """Print results of `mxd inspect`: the most unusual `shown` experts of each token, and what the first experts do."""
    from mxd.jobs.expert_page import measures

    for text in results["texts"]:
        for layer, row in text["layers"].items():
            rows = [
                (token["token"], "\n".join(f"{one['expert']}: {measures(one)}" for one in token["experts"][:shown]))
                for token in row["tokens"]
            ]
            table = Table(
                title=cell(f"Layer {layer}: experts of each token (bits of rarity, of its maximum, of the output)")
            )
            table.add_column("token")
            table.add_column("expert", no_wrap=True)
            for token, experts in rows:
                table.add_row(cell(token), visible(experts))
            print_parts(table)
    for layer, experts in results["experts"].items():
        lines: list[tuple[Any, ...]] = []
        for expert, found in experts.items():
            promoted = _promoted(found)
            contexts = [
                " ".join(f"{one['before'][-25:]}[{one['token']}]{one['after'][:15]}".split())
                for one in found["examples"][:shown]
            ]
            known = (expert, f"{found['score']:.1f}", found["texts"], _shown(found.get("alignment"), ".1f"))
            lines.append((*known, promoted or "–", Text(visible("\n".join(contexts)))))
        columns = ("expert", "bits", "texts", "align-\nment", "promotes", "strongest contexts")
        table = make_table(f"Layer {layer}: the most unusual experts of the text", columns, lines, left=0)
        for column in table.columns[-2:]:
            column.justify = "left"
        print_parts(table)


def print_layers(model: str, groups: Iterable[Any]) -> None:
    """Print the sites of a model, `mxd.jobs.layers.LayerGroup`: a table for each stack, and the reasons below it."""
    for stack in dict.fromkeys(group.site.stack for group in groups):
        rows, notes = [], []
        for group in [group for group in groups if group.site.stack == stack]:
            site = group.site
            widths = " → ".join(f"{width:,}" for width in group.widths) if group.widths else "–"
            rows.append((group.ranges, site.name, site.kind, widths, group.hidden_act or "–", group.layout or "–"))
            notes += [cell(f"{group.ranges}, {site.name}: {site.reason}")] if site.reason else []
        columns = ("layers", "site", "kind", "widths", "activation", "weights")
        print_parts(make_table(f"{stack} of {model}", columns, rows, left=len(columns)), *notes)


def print_found(found: list[Any]) -> None:
    """Print decompositions on the Hub, `mxd.hub_cards.DecompositionInfo`."""
    if not found:
        print_parts("none found")
        return
    rows = []
    for info in found:
        date = "–" if info.last_modified is None else f"{info.last_modified:%Y-%m-%d}"
        counts = ("–" if value is None else f"{value:,}" for value in (info.num_experts_per_tok, info.num_experts))
        layers, rise = ", ".join(map(str, info.layers[:20])) or "–", _shown(info.cross_entropy_rise, "+.4f")
        rows.append((info.repo_id, info.base_model or "–", layers, *counts, rise, info.likes, date))
    columns = ("repo", "base model", "layers", "K", "experts", "CE rise", "likes", "date")
    print_parts(make_table("Decompositions on the Hub", columns, rows, left=3, wrap=False))


def print_details(details: Any) -> None:
    """Print a decomposition on the Hub, as `mxd.hub_cards.show_decomposition` returns it."""
    from mxd.hub_cards import OLDEST_TRANSFORMERS

    config = details.config
    rows = []
    for layer in config.layers[:MAX_LAYERS]:
        size = config.layer(layer)
        encoder = f"{size.intermediate_size} {size.hidden_act} {size.encoder_type}" if size.method == "mxd" else "–"
        counts = (f"{size.num_experts_per_tok:,}", f"{size.num_experts:,}")
        name = layer_label(layer, config.written_layers(layer))
        rows.append((name, size.method, *counts, encoder, f"{size.num_parameters:,}"))
    columns = ("layer", "method", "K", "experts", "encoder", "parameters")
    base = f"{config.base_model_name_or_path} at {config.base_model_revision or 'its newest commit'}"
    print_parts(
        make_table(f"{details.info.repo_id}, commit {details.commit[:8]}", columns, rows, left=0),
        cell(f"needs: transformers {OLDEST_TRANSFORMERS} or later, the base model {base}"),
        cell(f"download: {details.weight_bytes / 1e6:,.1f} MB, besides the base model"),
    )
    if details.evaluation is None:
        print_parts("no evaluation comes with it")
        return
    try:
        print_evaluation(details.evaluation)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        print_parts("its evaluation.json is not as `mxd evaluate` writes it, and is not shown")
