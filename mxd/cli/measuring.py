"""The commands that measure: `mxd evaluate`, `mxd experts`, `mxd use`, `mxd probe` and `mxd layers`."""

from typing import Annotated, Literal

import typer

from .options import (
    ContextLength,
    Dataset,
    DatasetConfig,
    DecompositionName,
    Dtype,
    Json,
    ResultsFolder,
    Split,
    Streaming,
    TextColumn,
    is_data_file,
    parse_count,
    parse_numbers,
    quiet,
    report,
    split_arguments,
)
from .tables import print_probing


def evaluate(
    folder: DecompositionName,
    files: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    dataset: Dataset = None,
    dataset_config: DatasetConfig = None,
    split: Split = "train",
    text_column: TextColumn = "text",
    streaming: Streaming = False,
    context_length: ContextLength = 128,
    tokens: Annotated[str, typer.Option(help="Tokens to evaluate on.")] = "32768",
    dtype: Dtype = "float32",
    ablation: Annotated[
        Literal["coefficient", "contribution"] | None,
        typer.Option(help="Also what removing the strongest experts does; takes some four times as long."),
    ] = None,
    ranks: Annotated[bool, typer.Option("--ranks", help="Also the rank of a sample of experts.")] = False,
    output: ResultsFolder = None,
    as_json: Json = False,
) -> None:
    """Measure a decomposition on text: a table on screen, evaluation.json in its folder, in place of what is there."""
    model, sources = split_arguments([folder, *(files or [])], dataset or [])
    from mxd.jobs.pipeline import TextOptions, evaluate

    quiet()

    text = TextOptions(sources, [], dataset_config, split, text_column, streaming, context_length)
    results = evaluate(model or folder, text, parse_count(tokens), dtype, not as_json, ablation, ranks, output)
    report(results, as_json, saved=f"{output or model or folder}: evaluation.json")


def experts(
    folder: DecompositionName,
    files: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    dataset: Dataset = None,
    dataset_config: DatasetConfig = None,
    split: Split = "train",
    text_column: TextColumn = "text",
    streaming: Streaming = False,
    context_length: ContextLength = 128,
    experts: Annotated[str | None, typer.Option(help="Numbers of experts: 12,99. [a random sample]")] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="Which layer. [all]")] = None,
    sample: Annotated[int, typer.Option(min=1, help="Experts of each layer, at random.")] = 20,
    examples: Annotated[int, typer.Option(min=1, help="Rows for each expert.")] = 10,
    tokens: Annotated[str, typer.Option(help="Tokens to search.")] = "128k",
    dtype: Dtype = "float32",
    seed: Annotated[int, typer.Option(min=0, help="Of the sample.")] = 0,
    output: ResultsFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print experts.json instead of the table.")] = False,
) -> None:
    """What experts respond to: where in a text they are most active; a page to read, experts.html, in the folder."""
    model, sources = split_arguments([folder, *(files or [])], dataset or [])
    from mxd.data.texts import TextOptions
    from mxd.jobs.experts import print_experts, read_experts

    quiet()

    results = read_experts(
        model or folder,
        TextOptions(sources, [], dataset_config, split, text_column, streaming, context_length),
        experts=None if experts is None else parse_numbers(experts),
        layer=layer,
        sample=sample,
        examples=examples,
        tokens=parse_count(tokens),
        dtype=dtype,
        seed=seed,
        output=output,
    )
    report(results, as_json, print_experts, f"{output or model or folder}: experts.json, experts.html")


def use(
    folder: DecompositionName,
    files: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    dataset: Dataset = None,
    by: Annotated[str, typer.Option(help="Column of the dataset that names a document's domain.")] = "domain",
    dataset_config: DatasetConfig = None,
    split: Split = "train",
    text_column: TextColumn = "text",
    context_length: ContextLength = 128,
    tokens: Annotated[str, typer.Option(help="Tokens of each domain.")] = "32768",
    dtype: Dtype = "float32",
    output: ResultsFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print domain_use.json instead of the table.")] = False,
) -> None:
    """Which experts are active on which kinds of text, and which on one kind alone."""
    model, sources = split_arguments([folder, *(files or [])], dataset or [])
    from mxd.data.texts import TextOptions
    from mxd.jobs.domains import measure_domain_use, print_domain_use

    quiet()

    text = TextOptions(sources, [], dataset_config, split, text_column, False, context_length)
    results = measure_domain_use(model or folder, text, by, parse_count(tokens), dtype, output)
    saved = f"{output or model or folder}: domain_use.json, figures/experts_per_domain.png"
    report(results, as_json, print_domain_use, saved)


def probe(
    arguments: Annotated[
        list[str], typer.Argument(metavar="FOLDER...", help="Folders or Hub ids of decompositions of one layer.")
    ],
    label_column: Annotated[str, typer.Option(help="Column that holds the classes.")],
    dataset: Annotated[
        list[str] | None, typer.Option(help="Hub dataset, or files, folders and globs of parquet, jsonl or csv.")
    ] = None,
    group_column: Annotated[
        str | None, typer.Option(help="Column of what stays together, as chunks of a book do. [each row by itself]")
    ] = None,
    classes: Annotated[str | None, typer.Option(help="Some of the classes: a,b,c. [all]")] = None,
    dataset_config: DatasetConfig = None,
    split: Split = "train",
    text_column: TextColumn = "text",
    layer: Annotated[int | None, typer.Option(min=0, help="Which layer. [the only one that all have]")] = None,
    against: Annotated[str, typer.Option(help="Of the MLP itself.")] = "input,neurons,output",
    pooling: Annotated[Literal["mean", "max"], typer.Option(help="Over a text's tokens.")] = "mean",
    include_first: Annotated[bool, typer.Option(help="Pool over each text's first position (BOS) too.")] = False,
    context_length: ContextLength = 128,
    texts_per_class: Annotated[int, typer.Option(min=1, help="At most, from as many documents as can be.")] = 500,
    folds: Annotated[int, typer.Option(min=2, help="Of documents; each is the test side once.")] = 5,
    candidates: Annotated[int, typer.Option(min=1, help="Features that are tried alone.")] = 100,
    k: Annotated[str, typer.Option("--k", help="Features of the k-sparse probes.")] = "1,2,5",
    standardize: Annotated[bool, typer.Option(help="Divide features by their standard deviation.")] = False,
    dtype: Dtype = "float32",
    seed: Annotated[int, typer.Option(min=0, help="Of texts and folds.")] = 0,
    output: Annotated[str, typer.Option(help="Folder for probing.json and its figure.")] = "mxd-probing",
    overwrite: Annotated[bool, typer.Option(help="Replace results in the output folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print probing.json instead of the tables.")] = False,
) -> None:
    """Sparse probing: how well single experts, or a few, tell classes of texts apart, and the MLP's own neurons."""
    from mxd.jobs.probing import ProbingOptions, probe

    quiet()

    files = [name for name in arguments if is_data_file(name)]
    options = ProbingOptions(
        decompositions=[name for name in arguments if name not in files],
        dataset=[*(dataset or []), *files],
        label_column=label_column,
        group_column=group_column,
        classes=None if classes is None else [name.strip() for name in classes.split(",")],
        text_column=text_column,
        config_name=dataset_config,
        split=split,
        layer=layer,
        against=[name.strip() for name in against.split(",") if name.strip()],
        pooling=pooling,
        include_first=include_first,
        context_length=context_length,
        texts_per_class=texts_per_class,
        folds=folds,
        candidates=candidates,
        sparsities=parse_numbers(k),
        standardize=standardize,
        dtype=dtype,
        seed=seed,
        output=output,
        overwrite=overwrite,
    )
    results = probe(options, progress=not as_json)
    report(results, as_json, print_probing, f"{output}: probing.json, probing.png")


def layers(
    model: Annotated[str | None, typer.Argument(help="Hub id or folder. [the embedded default]")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")] = None,
) -> None:
    """Where a model keeps its MLPs, which can be decomposed and why others can't; no weights are downloaded."""
    from mxd import demo
    from mxd.jobs.layers import load_skeleton, print_layers

    quiet()
    skeleton = load_skeleton(model or demo.MODEL_NAME, revision)
    print_layers(skeleton)
