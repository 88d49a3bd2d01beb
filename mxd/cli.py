"""The command `mxd`: decompose a model, evaluate a decomposition, share it and find others'."""

import json
import logging
import os
import re
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .tables import MAX_ROWS, cell, print_change, print_evaluation, print_frontier, print_probing, visible

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Mixtures of Decoders: take the MLPs of a language model apart without breaking the model.",
)

DATA_ENDINGS = {".parquet", ".jsonl", ".json", ".csv", ".txt", ".md", ".py", ".rst"}
INTERRUPTED = 130
FINETUNING_RATE = 3e-4
MAX_MESSAGE = 2000
KEPT = "checkpoints that were complete are kept: put it right, then run again with --resume"


class Method(str, Enum):
    """What stands in place of the MLP."""

    mxd = "mxd"
    transcoder = "transcoder"
    skip_transcoder = "skip-transcoder"


class GateStart(str, Enum):
    """Where the gate starts from."""

    data = "data"
    random = "random"


class EncoderStart(str, Enum):
    """Where the dense encoder starts from."""

    pretrained = "pretrained"
    random = "random"


class ModulationStart(str, Enum):
    """Where the experts' modulations start from."""

    random = "random"
    unit = "unit"


class Order(str, Enum):
    """Which experts are the strongest."""

    coefficient = "coefficient"
    contribution = "contribution"


class Loss(str, Enum):
    """What fine-tuning trains on."""

    kl = "kl"
    cross_entropy = "cross-entropy"


class Pooling(str, Enum):
    """How a text's tokens become one vector."""

    mean = "mean"
    max = "max"


def parse_count(text: str) -> int:
    """`"480M"` → 480,000,000; also k, B, and plain digits."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMbB]?)", text.replace("_", "").replace(",", "").strip())
    if not match:
        raise typer.BadParameter(f"{text!r} is no number of tokens: write 500000, 500k, 10M or 1B")
    value = int(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}[match[2].lower()])
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
        layers.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
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


def split_arguments(arguments: list[str], dataset: list[str]) -> tuple[str | None, list[str]]:
    """Tell the model from the files that a shell made of `--dataset *.parquet`."""
    files = [name for name in arguments if Path(name).suffix in DATA_ENDINGS]
    models = [name for name in arguments if Path(name).suffix not in DATA_ENDINGS]
    if len(models) > 1:
        raise typer.BadParameter(f"one model is expected, got {' and '.join(models)}")
    if files and not dataset:
        raise typer.BadParameter(f"{files[0]} is a data file: pass it with --dataset")
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
    list[str] | None, typer.Option(help="Text to evaluate on. [documents held out of the dataset]")
]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens of one optimiser step.")]
LearningRate = Annotated[float, typer.Option(help="Peak, in units of the scaled activations.")]
Bf16 = Annotated[bool, typer.Option(help="Matrix products in bfloat16, weights in float32.")]
EvaluationTokens = Annotated[str, typer.Option(help="Held-out tokens.")]
ReportTo = Annotated[str, typer.Option(help="Trackers of the Trainer, such as tensorboard.")]
Output = Annotated[str, typer.Option(help="Folder for the result.")]
Overwrite = Annotated[bool, typer.Option(help="Replace a decomposition in the output folder.")]
Resume = Annotated[bool, typer.Option(help="Go on from the last checkpoint in the output folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print evaluation.json instead of the table.")]
Debug = Annotated[bool, typer.Option(help="Show the traceback of an error.")]


@app.command()
def decompose(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]", help="Hub id or folder. [the embedded default]")
    ] = None,
    dataset: Dataset = None,
    heldout_dataset: HeldoutDataset = None,
    dataset_config: DatasetConfig = None,
    split: Split = "train",
    text_column: TextColumn = "text",
    streaming: Streaming = False,
    layers: Layers = None,
    stack: Stack = None,
    site: Site = "mlp",
    method: Annotated[Method, typer.Option(help="What stands in place of the MLP.")] = Method.mxd,
    k: Annotated[int, typer.Option("--k", min=1, help="Experts active per token.")] = 32,
    experts: Annotated[int | None, typer.Option(min=1, help="Number of experts. [--match-transcoder]")] = None,
    match_transcoder: MatchTranscoder = 32,
    intermediate_size: IntermediateSize = None,
    groups_per_token: Annotated[
        int | None,
        typer.Option(
            min=1, help="Hierarchical routing: experts in about √N groups, of which a token opens so many. [exact gate]"
        ),
    ] = None,
    tokens: Annotated[str, typer.Option(help="Training tokens: 500k, 10M, 1B.")] = "1M",
    context_length: ContextLength = 128,
    batch_tokens: BatchTokens = 2048,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Peak, in units of the scaled activations. [0.001, of transcoders 0.003]"),
    ] = None,
    gate_start: Annotated[GateStart, typer.Option(help="Where the gate starts from.")] = GateStart.data,
    encoder_start: Annotated[
        EncoderStart | None,
        typer.Option(help="Where the encoder starts from. [the pretrained MLP's, unless --intermediate-size is given]"),
    ] = None,
    modulation_start: Annotated[
        ModulationStart,
        typer.Option(help="unit: from C^T a = 1; random: around 0, the authors' start."),
    ] = ModulationStart.unit,
    expert_share: Annotated[
        float, typer.Option(help="Error that an MxD must have without the choice of experts; 0: no such term.")
    ] = 0.6,
    bf16: Bf16 = False,
    dtype: Dtype = "float32",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")] = None,
    evaluation_tokens: EvaluationTokens = "32768",
    report_to: ReportTo = "none",
    seed: Annotated[int, typer.Option(help="Of data order and initialisation.")] = 0,
    output: Output = "mxd-output",
    overwrite: Overwrite = False,
    resume: Resume = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Replace MLPs of a language model by a decomposition, trained by distillation, and measure it.

    Without arguments: the embedded model and text.
    """
    model, sources = split_arguments(arguments or [], dataset or [])
    from .pipeline import LEARNING_RATES, DecompositionOptions, TextOptions, decompose, embedded

    _quiet()

    if encoder_start is None:
        encoder_start = EncoderStart.random if intermediate_size else EncoderStart.pretrained
    options = DecompositionOptions(
        model=model or embedded.MODEL_NAME,
        revision=revision,
        dtype=dtype,
        layers=parse_layers(layers),
        stack=stack,
        site=site,
        method=method.value.replace("-", "_"),
        num_experts_per_tok=k,
        num_experts=experts,
        match_transcoder=match_transcoder,
        intermediate_size=intermediate_size,
        num_groups_per_tok=groups_per_token,
        tokens=parse_count(tokens),
        batch_tokens=batch_tokens,
        evaluation_tokens=parse_count(evaluation_tokens),
        seed=seed,
        output=output,
        overwrite=overwrite,
        resume=resume,
        text=TextOptions(sources, heldout_dataset or [], dataset_config, split, text_column, streaming, context_length),
        training={
            "learning_rate": learning_rate or LEARNING_RATES[method.value.replace("-", "_")],
            "expert_share": expert_share,
            "gate_initialization": gate_start.value,
            "encoder_initialization": encoder_start.value,
            "modulation_initialization": modulation_start.value,
            "bf16": bf16,
            "report_to": report_to,
        },
    )
    _report(decompose(options), as_json)
    if not as_json:
        typer.echo(f"\nSaved in {output}: weights, evaluation.json, training_log.json, figures/")
        typer.echo(f"Next:  mxd evaluate {output} --dataset <other text>")
        typer.echo(
            f'       mxd.MxDModel.from_pretrained("{output}")   # the README shows how to read and steer experts'
        )


@app.command()
def evaluate(
    folder: Annotated[str, typer.Argument(help="Folder of a decomposition.")],
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
        Order | None, typer.Option(help="Also what removing the strongest experts does; takes some five times as long.")
    ] = None,
    ranks: Annotated[bool, typer.Option("--ranks", help="Also the rank of a sample of experts.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a decomposition on text: a table on screen, evaluation.json in its folder."""
    model, sources = split_arguments([folder, *(files or [])], dataset or [])
    from .pipeline import TextOptions, evaluate

    _quiet()

    text = TextOptions(sources, [], dataset_config, split, text_column, streaming, context_length)
    order = None if ablation is None else ablation.value
    _report(evaluate(model or folder, text, parse_count(tokens), dtype, not as_json, order, ranks), as_json)


@app.command()
def use(
    folder: Annotated[str, typer.Argument(help="Folder of a decomposition.")],
    files: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    dataset: Dataset = None,
    by: Annotated[str, typer.Option(help="Column of the dataset that names a document's domain.")] = "domain",
    dataset_config: DatasetConfig = None,
    split: Split = "train",
    text_column: TextColumn = "text",
    context_length: ContextLength = 128,
    tokens: Annotated[str, typer.Option(help="Tokens of each domain.")] = "32768",
    dtype: Dtype = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print domain_use.json instead of the table.")] = False,
    debug: Debug = False,
) -> None:
    """Which experts are active on which kinds of text, and which on one kind alone."""
    model, sources = split_arguments([folder, *(files or [])], dataset or [])
    from .domains import measure_domain_use, print_domain_use
    from .pipeline import TextOptions

    _quiet()

    text = TextOptions(sources, [], dataset_config, split, text_column, False, context_length)
    results = measure_domain_use(model or folder, text, by, parse_count(tokens), dtype)
    if as_json:
        typer.echo(json.dumps(results, indent=2))
    else:
        print_domain_use(results)


@app.command()
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
    pooling: Annotated[Pooling, typer.Option(help="Over a text's tokens.")] = Pooling.mean,
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
    debug: Debug = False,
) -> None:
    """Sparse probing: how well single experts, or a few, tell classes of texts apart, and the MLP's own neurons."""
    from .probing import ProbingOptions, probe

    _quiet()

    files = [name for name in arguments if Path(name).suffix in DATA_ENDINGS]  # a shell made them of a glob
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
        pooling=pooling.value,
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
    if as_json:
        typer.echo(json.dumps(results, indent=2))
        return
    print_probing(results)
    typer.echo(f"\nSaved in {output}: probing.json, probing.png")


@app.command()
def frontier(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]", help="Hub id or folder. [the embedded default]")
    ] = None,
    dataset: Dataset = None,
    heldout_dataset: HeldoutDataset = None,
    dataset_config: DatasetConfig = None,
    split: Split = "train",
    text_column: TextColumn = "text",
    streaming: Streaming = False,
    layers: Layers = None,
    stack: Stack = None,
    site: Site = "mlp",
    k: Annotated[str, typer.Option("--k", help="Experts active per token.")] = "16,32,64,128,256",
    methods: Annotated[str, typer.Option(help="What stands in place of the MLP.")] = "mxd,transcoder,skip-transcoder",
    match_transcoder: MatchTranscoder = 32,
    intermediate_size: IntermediateSize = None,
    tokens: Annotated[str, typer.Option(help="Tokens to record and train on: 500k, 10M.")] = "1M",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the recorded tokens.")] = 1,
    context_length: ContextLength = 128,
    batch_tokens: BatchTokens = 2048,
    learning_rates: Annotated[
        str | None,
        typer.Option(help="Peaks, of methods that shall not have their default: mxd=0.002."),
    ] = None,
    bf16: Bf16 = False,
    dtype: Dtype = "float32",
    teacher_dtype: Annotated[
        str | None, typer.Option(help="In which the base model runs where it is recorded. [--dtype]")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")] = None,
    evaluation_tokens: EvaluationTokens = "32768",
    jobs: Annotated[int, typer.Option(min=1, help="Points at work at a time; each gets its share of the cores.")] = 1,
    save: Annotated[bool, typer.Option(help="Keep every point's decomposition.")] = True,
    seed: Annotated[int, typer.Option(help="Of data order and initialisation.")] = 0,
    output: Output = "mxd-frontier",
    overwrite: Annotated[bool, typer.Option(help="Replace a recording of another model, text or layer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print frontier.json instead of the table.")] = False,
    debug: Debug = False,
) -> None:
    """Cross-entropy of methods at several K, at equal parameters and on the same tokens (the paper's Fig. 3).

    The same command goes on where it was interrupted.
    """
    model, sources = split_arguments(arguments or [], dataset or [])
    from .frontier import FrontierOptions, measure_frontier
    from .pipeline import TextOptions, embedded

    _quiet()

    options = FrontierOptions(
        model=model or embedded.MODEL_NAME,
        revision=revision,
        dtype=dtype,
        teacher_dtype=teacher_dtype,
        layers=parse_layers(layers),
        stack=stack,
        site=site,
        methods=[name.strip().replace("-", "_") for name in methods.split(",")],
        num_experts_per_tok=parse_numbers(k),
        match_transcoder=match_transcoder,
        intermediate_size=intermediate_size,
        tokens=parse_count(tokens),
        num_train_epochs=epochs,
        batch_tokens=batch_tokens,
        learning_rates=parse_rates(learning_rates),
        evaluation_tokens=parse_count(evaluation_tokens),
        jobs=jobs,
        save=save,
        seed=seed,
        output=output,
        overwrite=overwrite,
        text=TextOptions(sources, heldout_dataset or [], dataset_config, split, text_column, streaming, context_length),
        training={"bf16": True} if bf16 else {},
    )
    results = measure_frontier(options)
    if as_json:
        typer.echo(json.dumps(results, indent=2))
        return
    print_frontier(results)
    typer.echo(f"\nSaved in {output}: frontier.json, frontier.png, points/")


@app.command()
def finetune(
    folder: Annotated[str, typer.Argument(help="Folder or Hub id of a decomposition, which is left as it is.")],
    files: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    dataset: Dataset = None,
    heldout_dataset: HeldoutDataset = None,
    dataset_config: DatasetConfig = None,
    split: Split = "train",
    text_column: TextColumn = "text",
    streaming: Streaming = False,
    loss: Annotated[Loss, typer.Option(help="KL to the untouched model, or the text's cross-entropy.")] = Loss.kl,
    nmse_weight: Annotated[float, typer.Option(min=0, help="Of the layers' own error, added to the loss.")] = 0.1,
    tokens: Annotated[str, typer.Option(help="Training tokens: 500k, 10M, 1B.")] = "200k",
    context_length: ContextLength = 128,
    batch_tokens: BatchTokens = 2048,
    learning_rate: LearningRate = FINETUNING_RATE,
    bf16: Bf16 = False,
    dtype: Dtype = "float32",
    evaluation_tokens: EvaluationTokens = "32768",
    report_to: ReportTo = "none",
    seed: Annotated[int, typer.Option(help="Of the data's order.")] = 0,
    output: Output = "mxd-finetuned",
    overwrite: Overwrite = False,
    resume: Resume = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a decomposition on, end to end in its language model, and show what that changed."""
    source, sources = split_arguments([folder, *(files or [])], dataset or [])
    from .finetuning import FinetuningOptions, finetune
    from .pipeline import TextOptions

    _quiet()

    options = FinetuningOptions(
        decomposition=source or folder,
        loss=loss.value.replace("-", "_"),
        nmse_weight=nmse_weight,
        dtype=dtype,
        tokens=parse_count(tokens),
        batch_tokens=batch_tokens,
        evaluation_tokens=parse_count(evaluation_tokens),
        seed=seed,
        output=output,
        overwrite=overwrite,
        resume=resume,
        text=TextOptions(sources, heldout_dataset or [], dataset_config, split, text_column, streaming, context_length),
        training={"learning_rate": learning_rate, "bf16": bf16, "report_to": report_to},
    )
    results = finetune(options)
    if as_json:
        typer.echo(json.dumps(results, indent=2))
        return
    print_change(results["settings"]["finetuning"][-1]["before"], results)
    typer.echo(f"\nSaved in {output}: weights, evaluation.json, training_log.json, figures/; {folder} is as it was")


@app.command()
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
    debug: Debug = False,
) -> None:
    """Share a decomposition on the Hub: weights, results, code and a card, in one commit."""
    from hub_cards import push_decomposition

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
    typer.echo(f'Next:  AutoModelForCausalLM.from_pretrained("{pushed.repo_url.repo_id}", trust_remote_code=True)')


@app.command()
def search(
    query: Annotated[str | None, typer.Argument(help="Part of the name of the repo or of its base model.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Exact Hub id of the base model.")] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="Only those that have this layer.")] = None,
    author: Annotated[str | None, typer.Option(help="User or organisation.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    debug: Debug = False,
) -> None:
    """Decompositions that others share on the Hub."""
    from hub_cards import list_decompositions

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


@app.command()
def show(
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repo on the Hub.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    debug: Debug = False,
) -> None:
    """Configuration, results and size of a decomposition on the Hub; no weights are downloaded, no code is run."""
    from hub_cards import show_decomposition
    from modeling_mxd.sharing import OLDEST_TRANSFORMERS

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
        console.print("it comes with no evaluation.json: nothing was measured")
        return
    try:
        print_evaluation(details.evaluation)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        console.print("its evaluation.json is not as `mxd evaluate` writes it, and is not shown")


@app.command()
def layers(
    model: Annotated[str | None, typer.Argument(help="Hub id or folder. [the embedded default]")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")] = None,
    debug: Debug = False,
) -> None:
    """Where a model keeps its MLPs, which can be decomposed and why others can't; no weights are downloaded."""
    from . import embedded
    from .layers import load_skeleton, print_layers

    _quiet()
    skeleton = load_skeleton(model or embedded.MODEL_NAME, revision)
    print_layers(skeleton)


def _quiet() -> None:
    """Bars and warnings of the libraries off: the command has its own."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _report(results: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(results, indent=2))
    else:
        print_evaluation(results)


def main() -> None:
    """Run the command: what a user can put right is one message and exit code 1, never a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    debug = "--debug" in sys.argv
    try:
        app()
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        code = INTERRUPTED if type(error).__name__ == "Interrupted" else 1
        _fail(_explain(error), code)


def _explain(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        where = f" ({error.filename})" if error.filename else ""
        return f"{os.strerror(error.errno)}{where}; {KEPT}"
    name = type(error).__name__
    # torch.save says of a full disk only that its position in the file is not the expected one.
    if name == "SafetensorError" or any(sign in str(error) for sign in ("No space left", "inline_container")):
        return f"a file could not be written, the disk may be full ({error}); {KEPT}"
    if isinstance(error, ValueError | OSError) or name == "Interrupted":
        return str(error)
    return f"{name}: {error} (run with --debug for the traceback)"


def _fail(message: str, code: int) -> None:
    typer.secho(f"error: {visible(message)[:MAX_MESSAGE]}", fg=typer.colors.RED, err=True)
    sys.exit(code)
