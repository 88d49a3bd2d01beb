"""The commands that share decompositions on the Hub and find others': `mxd push`, `mxd search` and `mxd show`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .tables import MAX_ROWS, cell, print_evaluation


def push(
    folder: Annotated[str, typer.Argument(help="Folder of a decomposition.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repo on the Hub, made if need be.")],
    private: Annotated[bool | None, typer.Option(help="Of a new repo. [the account's default]")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, made if need be.")] = None,
    create_pr: Annotated[bool, typer.Option(help="Propose it as a pull request.")] = False,
    tag: Annotated[str | None, typer.Option(help="Tag the commit.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the base, if config.json has a folder.")] = None,
    license_name: Annotated[str | None, typer.Option("--license", help="[the base model's]")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
) -> None:
    """Share a decomposition on the Hub: weights, results, code and a card, in one commit."""
    from mxd.hub_cards import push_decomposition
    from mxd.hub_cards.reading import read_config
    from mxd.modeling_mxd.loading import is_causal

    pushed = push_decomposition(
        folder,
        repo,
        private=private,
        revision=revision,
        create_pr=create_pr,
        tag=tag,
        base_model=base_model,
        license=license_name,
        message=message,
    )
    typer.echo(f"Pushed to {pushed.pr_url or pushed.repo_url} (commit {pushed.oid[:8]})")
    where = pushed.pr_revision or revision
    at = f', revision="{where}"' if where else ""
    config = read_config(Path(folder) / "config.json", folder)
    door = "AutoModelForCausalLM" if is_causal(config.base_model_type) else "AutoModel"
    typer.echo(f'Next:  {door}.from_pretrained("{pushed.repo_url.repo_id}"{at}, trust_remote_code=True)')


def search(
    query: Annotated[str | None, typer.Argument(help="Part of the name of the repo or of its base model.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Exact Hub id of the base model.")] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="Only those that have this layer.")] = None,
    author: Annotated[str | None, typer.Option(help="User or organisation.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
) -> None:
    """Decompositions that others share on the Hub."""
    from mxd.hub_cards import list_decompositions

    found = list(list_decompositions(query, base_model=base_model, layer=layer, author=author, limit=limit))
    if not found:
        typer.echo("none found")
        return
    table = Table(title="Decompositions on the Hub")
    for column in ("repo", "base model", "layers"):
        table.add_column(column, overflow="fold")
    for column in ("K", "experts", "CE rise", "likes", "date"):
        table.add_column(column, justify="right", no_wrap=True)
    for info in found:
        rise = "–" if info.cross_entropy_rise is None else f"{info.cross_entropy_rise:+.4f}"
        date = "–" if info.last_modified is None else f"{info.last_modified:%Y-%m-%d}"
        counts = (str(value) if value is not None else "–" for value in (info.num_experts_per_tok, info.num_experts))
        layers = ", ".join(map(str, info.layers[:20])) or "–"
        table.add_row(*map(cell, (info.repo_id, info.base_model or "–", layers, *counts, rise, info.likes, date)))
    Console().print(table)


def show(
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repo on the Hub.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
) -> None:
    """Configuration, results and size of a decomposition on the Hub; no weights are downloaded, no code is run."""
    from mxd.hub_cards import OLDEST_TRANSFORMERS, show_decomposition

    details = show_decomposition(repo, revision=revision)
    config = details.config
    table = Table(title=cell(f"{details.info.repo_id}, commit {details.commit[:8]}"))
    for column in ("layer", "method", "K", "experts", "encoder", "parameters"):
        table.add_column(column, justify="right")
    for layer in config.layers[:MAX_ROWS]:
        sizes = config.layer(layer)
        encoder = f"{sizes.intermediate_size} {sizes.hidden_act} {sizes.encoder_type}" if sizes.method == "mxd" else "–"
        row = (layer, sizes.method, sizes.num_experts_per_tok, sizes.num_experts, encoder, f"{sizes.num_parameters:,}")
        table.add_row(*map(cell, row))
    console = Console()
    console.print(table)
    if len(config.layers) > MAX_ROWS:
        console.print(f"and {len(config.layers) - MAX_ROWS} more layers")
    base = f"{config.base_model_name_or_path} at {config.base_model_revision or 'its newest commit'}"
    console.print(cell(f"needs: transformers {OLDEST_TRANSFORMERS} or later, the base model {base}"))
    console.print(cell(f"download: {details.weight_bytes / 1e6:,.1f} MB of weights, besides the base model"))
    if details.evaluation is None:
        console.print("no evaluation comes with it")
        return
    try:
        print_evaluation(details.evaluation)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        console.print("its evaluation.json is not as `mxd evaluate` writes it, and is not shown")
