"""What the commands share: options that several have, and how their values are read."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .tables import print_evaluation

OUTPUTS = {"decompose": "mxd-output", "finetune": "mxd-finetuned"}
"""Where the commands that keep checkpoints have them, if nothing else is asked for."""


def is_data_file(name: str) -> bool:
    """Whether an argument is a file that a shell made of `--dataset *.parquet`, rather than a model."""
    from mxd.hub_cards.safe_text import DATA_ENDINGS  # with torch: not where help is all that is wanted

    return Path(name).suffix.lower() in DATA_ENDINGS


def parse_count(text: str) -> int:
    """`"480M"` → 480,000,000; also k, B, plain digits, and commas between thousands."""
    match = re.fullmatch(r"((?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?)\s*([kKmMbB]?)", text.replace("_", "").strip())
    if not match:
        comma = " (a comma stands between thousands, a point before decimals)" if "," in text else ""
        raise typer.BadParameter(f"{text!r} is no number of tokens: write 500000, 500k, 1.5M or 1B{comma}")
    value = int(float(match[1].replace(",", "")) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}[match[2].lower()])
    if value < 1:
        raise typer.BadParameter("at least one token is needed")
    return value


def parse_layers(text: str | None) -> list[int] | None:
    """`"8"`, `"4,8"` or `"4-7,10"` → indices."""
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match:
            raise typer.BadParameter(f"{text!r} names no layers: write 8, 4,8 or 4-7")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise typer.BadParameter(f"{part.strip()!r} names no layers: write {last}-{first}")
        layers.extend(range(first, last + 1))
    return layers


def parse_numbers(text: str) -> list[int]:
    """`"1,2,5"` → numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"{text!r} is no list of numbers: write 1,2,5")
    return [int(part) for part in parts]


def parse_rates(text: str | None) -> dict[str, float]:
    """`"mxd=0.002,skip-transcoder=0.003"` → rates by method."""
    rates = {}
    for part in (text or "").split(",") if text else []:
        name, _, rate = part.partition("=")
        try:
            rates[name.strip().replace("-", "_")] = float(rate)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is no list of learning rates: write mxd=0.002") from None
    return rates


def split_arguments(
    arguments: list[str], dataset: list[str], heldout: list[str] | None = None
) -> tuple[str | None, list[str]]:
    """Tell the model from the files that a shell made of `--dataset *.parquet`.

    Raises:
        typer.BadParameter: several models, or files that are not known to be of `--dataset`.
    """
    files = [name for name in arguments if is_data_file(name)]
    models = [name for name in arguments if not is_data_file(name)]
    if len(models) > 1:
        raise typer.BadParameter(f"one model is expected, got {' and '.join(models)}")
    if files and not dataset:
        raise typer.BadParameter(f"{files[0]} is a data file: pass it with --dataset")
    if files and heldout:
        raise typer.BadParameter(f"is {files[0]} to be trained on, or held out? quote the globs of both options")
    return (models[0] if models else None), dataset + files


Dataset = Annotated[
    list[str] | None,
    typer.Option(help="Hub dataset, or files, folders and globs of parquet, jsonl, csv or text. [embedded sample]"),
]
DatasetConfig = Annotated[str | None, typer.Option(help="Configuration of a Hub dataset.")]
Split = Annotated[str, typer.Option(help="Split of a Hub dataset.")]
TextColumn = Annotated[str, typer.Option(help="Column that holds the text.")]
Streaming = Annotated[bool, typer.Option(help="Read a Hub dataset as it comes, without downloading it first.")]
Layers = Annotated[str | None, typer.Option(help="Such as 8, 4,8 or 4-7. [the middle layer]")]
Stack = Annotated[
    str | None, typer.Option(help="List of layers that --layers counts, see `mxd layers`. [the language model's]")
]
Site = Annotated[str, typer.Option(help="Which MLP of a layer, see `mxd layers`; mlp.experts: routed ones.")]
MatchTranscoder = Annotated[
    int, typer.Option(min=1, help="As many parameters as a transcoder of so many latents per dimension.")
]
IntermediateSize = Annotated[int | None, typer.Option(min=1, help="Encoder width. [the MLP's]")]
ContextLength = Annotated[int, typer.Option(min=2, help="Tokens a row, BOS included.")]
Dtype = Annotated[str, typer.Option(help="In which the base model runs: float32, bfloat16, float16.")]
HeldoutDataset = Annotated[
    list[str] | None,
    typer.Option(help="Other text to evaluate on; of a Hub dataset its default one. [documents held out of it]"),
]
HeldoutSplit = Annotated[
    str | None, typer.Option(help="Split to evaluate on: of the held-out dataset if there is one, else of the dataset.")
]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens of one optimiser step.")]
Bf16 = Annotated[bool, typer.Option(help="Matrix products in bfloat16, weights in float32.")]
EvaluationTokens = Annotated[str, typer.Option(help="Held-out tokens.")]
ReportTo = Annotated[str, typer.Option(help="Trackers of the Trainer, such as tensorboard.")]
Output = Annotated[str, typer.Option(help="Folder for the result.")]
DecompositionName = Annotated[str, typer.Argument(help="Folder or Hub id (user/repo[@revision]) of a decomposition.")]
ResultsFolder = Annotated[str | None, typer.Option("--output", help="Folder for the results. [the decomposition's]")]
Overwrite = Annotated[bool, typer.Option(help="Replace a decomposition in the output folder.")]
Resume = Annotated[bool, typer.Option(help="Go on from the last checkpoint in the output folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print evaluation.json instead of the table.")]


def quiet() -> None:
    """Bars and warnings of the libraries off: the command has its own."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def report(
    results: dict[str, Any],
    as_json: bool,
    show: Callable[[dict[str, Any]], None] = print_evaluation,
    saved: str | None = None,
) -> None:
    """What a command found, on screen: as JSON and nothing else, or by `show`, and then what was saved and where."""
    if as_json:
        from mxd.base.files import json_text  # with torch, which --help does without

        typer.echo(json_text(results))
        return
    show(results)
    if saved is not None:
        typer.echo(f"\nSaved in {saved}")
