"""The commands that train: `mxd decompose`, `mxd frontier` and `mxd finetune`."""

from typing import Annotated, Any, Literal

import typer

from .options import (
    OUTPUTS,
    BatchTokens,
    Bf16,
    ContextLength,
    Dataset,
    DatasetConfig,
    Dtype,
    EvaluationTokens,
    HeldoutDataset,
    HeldoutSplit,
    IntermediateSize,
    Json,
    Layers,
    MatchTranscoder,
    Output,
    Overwrite,
    ReportTo,
    Resume,
    Site,
    Split,
    Stack,
    Streaming,
    TextColumn,
    parse_count,
    parse_layers,
    parse_numbers,
    parse_rates,
    quiet,
    report,
    split_arguments,
)
from .tables import print_change, print_frontier


def decompose(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]", help="Hub id or folder. [the embedded default]")
    ] = None,
    dataset: Dataset = None,
    heldout_dataset: HeldoutDataset = None,
    heldout_split: HeldoutSplit = None,
    dataset_config: DatasetConfig = None,
    split: Split = "train",
    text_column: TextColumn = "text",
    streaming: Streaming = False,
    layers: Layers = None,
    stack: Stack = None,
    site: Site = "mlp",
    method: Annotated[
        Literal["mxd", "transcoder", "skip-transcoder"], typer.Option(help="What stands in place of the MLP.")
    ] = "mxd",
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
        typer.Option(
            help="Peak, in units of the scaled activations; the authors take 1e-4 for 480M tokens. "
            "[for some 1M: 0.001, of transcoders 0.003]"
        ),
    ] = None,
    gate_init: Annotated[Literal["data", "random"], typer.Option(help="Where the gate starts from.")] = "data",
    encoder_init: Annotated[
        Literal["pretrained", "random"] | None,
        typer.Option(help="Where the encoder starts from. [the pretrained MLP's, unless --intermediate-size is given]"),
    ] = None,
    modulation_init: Annotated[
        Literal["unit", "random"],
        typer.Option(help="unit: from C^T a = 1; random: around 0, the authors' start."),
    ] = "unit",
    min_mean_ablation_error: Annotated[
        float,
        typer.Option(help="Least error with the experts' mean for every token, against idle experts; 0: none."),
    ] = 0.45,
    auxiliary_weight: Annotated[
        float,
        typer.Option(help="Weight of the error of a decoder of an MxD's coefficients, dropped at the end; 0: none."),
    ] = 1.0,
    bf16: Bf16 = False,
    dtype: Dtype = "float32",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")] = None,
    evaluation_tokens: EvaluationTokens = "32768",
    report_to: ReportTo = "none",
    seed: Annotated[int, typer.Option(help="Of data order and initialisation.")] = 0,
    output: Output = OUTPUTS["decompose"],
    overwrite: Overwrite = False,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Replace MLPs of a language model by a decomposition, trained by distillation, and measure it.

    Without arguments: the embedded model and text.
    """
    model, sources = split_arguments(arguments or [], dataset or [], heldout_dataset)
    from mxd import demo
    from mxd.data.texts import TextOptions
    from mxd.jobs.pipeline import DecompositionOptions, decompose

    quiet()

    # What is not asked for has a default that follows from the rest.
    given = {"learning_rate": learning_rate, "encoder_init": encoder_init}
    options = DecompositionOptions(
        model=model or demo.MODEL_NAME,
        revision=revision,
        dtype=dtype,
        layers=parse_layers(layers),
        stack=stack,
        site=site,
        method=method.replace("-", "_"),
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
        text=TextOptions(
            sources, heldout_dataset or [], dataset_config, split, text_column, streaming, context_length, heldout_split
        ),
        training={
            **{name: value for name, value in given.items() if value is not None},
            "min_mean_ablation_error": min_mean_ablation_error,
            "auxiliary_weight": auxiliary_weight,
            "gate_init": gate_init,
            "modulation_init": modulation_init,
            "bf16": bf16,
            "report_to": report_to,
        },
    )
    report(decompose(options), as_json, saved=f"{output}: weights, evaluation.json, training_log.json, figures/")
    if not as_json:
        typer.echo(f"Next:  mxd evaluate {output} --dataset <other text>")
        typer.echo(
            f'       mxd.MxDModel.from_pretrained("{output}")   # the README shows how to read and steer experts'
        )


def frontier(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL]", help="Hub id or folder. [the embedded default]")
    ] = None,
    dataset: Dataset = None,
    heldout_dataset: HeldoutDataset = None,
    heldout_split: HeldoutSplit = None,
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
    overwrite: Annotated[
        bool, typer.Option(help="Replace a recording of another model or text, and points of other settings.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print frontier.json instead of the table.")] = False,
) -> None:
    """Cross-entropy of methods at several K, at equal parameters and on the same tokens (the paper's Fig. 3).

    The same command goes on where it was interrupted.
    """
    model, sources = split_arguments(arguments or [], dataset or [], heldout_dataset)
    from mxd import demo
    from mxd.data.texts import TextOptions
    from mxd.jobs.frontier import FrontierOptions, measure_frontier

    quiet()

    options = FrontierOptions(
        model=model or demo.MODEL_NAME,
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
        text=TextOptions(
            sources, heldout_dataset or [], dataset_config, split, text_column, streaming, context_length, heldout_split
        ),
        training={"bf16": True} if bf16 else {},
    )
    report(measure_frontier(options), as_json, print_frontier, f"{output}: frontier.json, frontier.png, points/")


def finetune(
    folder: Annotated[str, typer.Argument(help="Folder or Hub id of a decomposition, which is left as it is.")],
    files: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    dataset: Dataset = None,
    heldout_dataset: HeldoutDataset = None,
    heldout_split: HeldoutSplit = None,
    dataset_config: DatasetConfig = None,
    split: Split = "train",
    text_column: TextColumn = "text",
    streaming: Streaming = False,
    loss: Annotated[
        Literal["kl", "cross-entropy"], typer.Option(help="KL to the untouched model, or the text's cross-entropy.")
    ] = "kl",
    nmse_weight: Annotated[float, typer.Option(min=0, help="Of the layers' own error, added to the loss.")] = 0.1,
    tokens: Annotated[str, typer.Option(help="Training tokens: 500k, 10M, 1B.")] = "200k",
    context_length: ContextLength = 128,
    batch_tokens: BatchTokens = 2048,
    learning_rate: Annotated[float, typer.Option(help="Peak, in units of the scaled activations.")] = 3e-4,
    bf16: Bf16 = False,
    dtype: Dtype = "float32",
    evaluation_tokens: EvaluationTokens = "32768",
    report_to: ReportTo = "none",
    seed: Annotated[int, typer.Option(help="Of the data's order.")] = 0,
    output: Output = OUTPUTS["finetune"],
    overwrite: Overwrite = False,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Train a decomposition on, end to end in its language model, and show what that changed."""
    source, sources = split_arguments([folder, *(files or [])], dataset or [], heldout_dataset)
    from mxd.jobs.finetuning import FinetuningOptions, finetune
    from mxd.jobs.pipeline import TextOptions

    quiet()

    options = FinetuningOptions(
        decomposition=source or folder,
        loss=loss.replace("-", "_"),
        nmse_weight=nmse_weight,
        dtype=dtype,
        tokens=parse_count(tokens),
        batch_tokens=batch_tokens,
        evaluation_tokens=parse_count(evaluation_tokens),
        seed=seed,
        output=output,
        overwrite=overwrite,
        resume=resume,
        text=TextOptions(
            sources, heldout_dataset or [], dataset_config, split, text_column, streaming, context_length, heldout_split
        ),
        training={"learning_rate": learning_rate, "bf16": bf16, "report_to": report_to},
    )

    def show(results: dict[str, Any]) -> None:
        print_change(results["settings"]["finetuning"][-1]["before"], results)

    saved = f"{output}: weights, evaluation.json, training_log.json, figures/; {source or folder} is as it was"
    report(finetune(options), as_json, show, saved)
