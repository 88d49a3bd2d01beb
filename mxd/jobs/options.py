"""Options of all jobs: one dataclass a command, its docstring the command's help, and each option's help once.

A field is an option of the command (`num_experts` is `--num-experts`), a key of the YAML file that `--config` names,
and an argument in Python. A field with `flag=False` is set in YAML or Python only.

This module imports neither torch nor transformers, so that `mxd --help` is fast.
"""

# ruff: noqa: RUF009
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mxd import demo
from mxd.base.training_help import HELP

if TYPE_CHECKING:
    from mxd.data.texts import TextOptions

WHAT, DATA, TRAINING, OUTPUT, MORE = "What to decompose", "Data", "Training", "Output", "More options"
PANELS = (WHAT, DATA, TRAINING, "What to measure", OUTPUT, MORE)
MEASURE = PANELS[3]

LEARNING_RATES = {"mxd": 1e-3, "transcoder": 3e-3, "skip_transcoder": 3e-3}
"""Default peak learning rate of each method, for about a million tokens."""
PER_LAYER = ("num_experts", "num_experts_per_tok", "match_transcoder", "num_groups_per_tok", "num_output_layers")
"""Options that `per_layer` may set for single layers."""
CHECKPOINTS = "checkpoint-*/trainer_state.json"
"""Last files of the checkpoints in a training's folder."""
RESUMABLE = (CHECKPOINTS, f"layers-*/{CHECKPOINTS}", "layers-*/evaluation.json")
"""Files in an output folder of which one lets its run be resumed."""
INTERRUPTED, TERMINATED = 130, 75
"""Exit codes of a command that Ctrl-C or SIGTERM ended: shells' own, and EX_TEMPFAIL, which says "run it again"."""
STDOUT = "-"
"""As `output`: write no files; the command prints the results as JSON."""


def resumable(folder: Path) -> bool:
    """Return whether an output folder holds a checkpoint, or a finished part of a training."""
    return any(any(folder.glob(pattern)) for pattern in RESUMABLE)


def option(default: Any, help: str, panel: str = MORE, **details: Any) -> Any:  # noqa: A002, metadata's own name
    """Declare an option. The default is a value, a function that makes one, or `...` for a required option.

    `details`: `alias` ("-k"); `argument` (name of a positional argument in the usage line); `flag` (False: not on the
    command line); `count` (reads "1M"); `commas` (names separated by commas); `minimum`; `trainer` (True: an argument
    of the trainer). A class names inherited options that have no flag there in `yaml_only`.
    """
    metadata = {"help": help, "panel": panel, **details}
    if default is ...:
        return field(metadata=metadata)
    make = {"default_factory": default} if callable(default) else {"default": default}
    return field(**make, metadata=metadata)


def values(options: Any, keep: Callable[[Any], Any] = lambda one: True) -> dict[str, Any]:
    """{name: value} of the fields of options for which `keep(field)` is true."""
    return {one.name: getattr(options, one.name) for one in fields(options) if keep(one)}


def text_name(dataset: Sequence[str]) -> str:
    """Return the names of a text, `plays.parquet`, for tables and pages."""
    return ", ".join(map(str, dataset[:3])) + (" and more" if len(dataset) > 3 else "") or "the sample of mxd"


@dataclass(kw_only=True)
class DatasetOptions:
    """Text to read, and the base model's dtype."""

    dataset: list[str] = option(
        list, "Hub dataset, or files, folders and globs of parquet, jsonl, csv or text. [the sample of mxd]", DATA
    )
    dataset_config: str | None = option(None, "Configuration of a Hub dataset.")
    dataset_revision: str | None = option(None, "Branch, tag or commit of a Hub dataset.")
    split: str = option("train", "Split of a Hub dataset.")
    text_column: str = option("text", "Column that holds the text.")
    chat: bool = option(False, "Text is chats: messages, or templated text whose control tokens count.")
    context_length: int = option(128, "Tokens in a row, BOS included.", minimum=2)
    dtype: str = option("float32", "Dtype of the base model: float32, bfloat16 or float16.")

    @property
    def text(self) -> "TextOptions":
        """The same options as `mxd.data.texts` takes them, and as evaluation.json records them."""
        from mxd.data.texts import TextOptions

        same = {one.name: getattr(self, one.name) for one in fields(TextOptions) if hasattr(self, one.name)}
        return TextOptions(config_name=self.dataset_config, **same)


@dataclass(kw_only=True)
class StreamableOptions(DatasetOptions):
    """Text to read, all at once or while it downloads."""

    streaming: bool = option(False, "Read text as it is needed: a Hub dataset while it downloads, files uncopied.")


@dataclass(kw_only=True)
class RunOptions(StreamableOptions):
    """Options of every command that trains."""

    heldout_dataset: list[str] = option(list, "Other text to evaluate on. [documents held out of the dataset]")
    heldout_split: str | None = option(None, "Split of the held-out dataset, else of the dataset.", flag=False)
    tokens: int = option(1_000_000, "Training tokens, in whole steps: 500k, 10M, 1B.", TRAINING, count=True)
    batch_tokens: int = option(2048, "Tokens of one optimiser step.", minimum=1)
    bf16: bool = option(False, "Multiply matrices in bfloat16; weights stay in float32.", trainer=True)
    evaluation_tokens: int = option(32768, "Held-out tokens to evaluate on.", count=True)
    seed: int = option(0, "Seed of data order and initialisation.")
    report_to: str = option("none", "Trackers of the Trainer, such as tensorboard.", flag=False, trainer=True)
    training: dict[str, Any] = option(dict, "Further arguments of the trainer, by name.", flag=False)
    output: str = option("mxd-output", "Folder for the result.", OUTPUT)
    overwrite: bool = option(False, "Replace a decomposition in the output folder.", OUTPUT)

    # A resumed run may change these. Intervals of logging and saving are the checkpoint's own.
    may_change: ClassVar[tuple[str, ...]] = ("evaluation_tokens", "report_to", "training.disable_tqdm")

    def trainer_arguments(self) -> dict[str, Any]:
        """Arguments of the trainer that the options set; `training` wins."""
        if "hub_token" in self.training:
            raise ValueError("hub_token would be written into run.yaml: use `hf auth login` or HF_TOKEN")
        named = values(self, lambda one: one.metadata.get("trainer"))
        return {name: value for name, value in named.items() if value is not None} | self.training


@dataclass(kw_only=True)
class ResumableOptions(RunOptions):
    """Options of a command that trains one decomposition, and keeps checkpoints."""

    learning_rate: float | None = option(
        None, HELP["learning_rate"] + " [0.001, of transcoders 0.003]", TRAINING, trainer=True
    )
    resume: bool = option(False, "Continue from the last checkpoint in the output folder.", OUTPUT)


@dataclass(kw_only=True)
class LayersOptions:
    """Show where a model keeps its MLPs, which can be decomposed, and why others cannot; download no weights."""

    model: str = option(demo.MODEL_NAME, "Hub id or folder. [the model of mxd]", argument="MODEL")
    revision: str | None = option(None, "Branch, tag or commit of the model.")


@dataclass(kw_only=True)
class WhereOptions(LayersOptions):
    """MLPs of a base model."""

    layers: list[int] | Literal["all"] | None = option(
        None, "Layers to decompose: 8, 4,8, 4-7 or all. [the middle layer]", WHAT
    )
    site: str = option("mlp", "Which MLP of a layer; `mxd layers` lists them. Routed experts are mlp.experts.")
    stack: str | None = option(None, "Which list of layers; see `mxd layers`. [the language model's]", flag=False)
    match_transcoder: int = option(32, "Match a transcoder of so many latents per dimension in parameters.", minimum=1)
    intermediate_size: int | None = option(None, "Width of the encoder. [the MLP's]", flag=False, minimum=1)
    cache: str | None = option(None, "Folder of activations, recorded there once: the base model does not run again.")


@dataclass(kw_only=True)
class DecompositionOptions(WhereOptions, ResumableOptions):
    """Replace MLPs of a language model by a decomposition, trained by distillation, and measure it.

    Without arguments: the small model and text that ship with mxd.
    """

    method: Literal["mxd", "transcoder", "skip_transcoder"] = option("mxd", "What replaces the MLP.", WHAT)
    num_experts_per_tok: int = option(32, "Experts active per token (K).", WHAT, alias="-k", minimum=1)
    num_experts: int | None = option(None, "Number of experts (N). [see --match-transcoder]", minimum=1)
    num_groups_per_tok: int | None = option(
        None, "Hierarchical routing: groups, of about √N, that a token opens. [exact gate]", flag=False, minimum=1
    )
    num_output_layers: int = option(1, "MLPs that each layer writes to, from its own on.", minimum=1)
    per_layer: dict[int, dict[str, int]] = option(
        dict, f"Other values for single layers, {{3: {{num_experts: 4096}}}}, of {', '.join(PER_LAYER)}.", flag=False
    )
    layers_per_pass: int | None = option(
        None, "Train so many layers at a time, each group in a pass of its own. [all in one]", flag=False, minimum=1
    )
    sequential: bool = option(
        False, "Train each group of layers in the model whose earlier layers are replaced already.", flag=False
    )
    shard: Literal["layers", "experts"] | None = option(
        None, "Share layers, or each layer's experts, among processes. [the rows of a step]"
    )
    min_mean_ablation_error: float = option(0.45, HELP["min_mean_ablation_error"], trainer=True)
    auxiliary_weight: float = option(1.0, HELP["auxiliary_weight"], trainer=True)
    gate_init: Literal["data", "random"] = option("data", HELP["gate_init"], flag=False, trainer=True)
    encoder_init: Literal["pretrained", "random"] | None = option(
        None, HELP["encoder_init"] + " [pretrained, where intermediate_size allows it]", flag=False, trainer=True
    )
    modulation_init: Literal["unit", "random"] = option("unit", HELP["modulation_init"], flag=False, trainer=True)

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATES.get(self.method)
        if self.encoder_init is None:  # the pretrained encoder fits no other width
            self.encoder_init = "pretrained" if self.intermediate_size is None else "random"
        if self.sequential and self.cache is not None:
            raise ValueError(
                "cache holds the activations of the untouched model, but with sequential a layer learns from those of "
                "the replaced layers before it: leave one of them out"
            )
        if self.sequential and self.layers_per_pass is None:
            self.layers_per_pass = 1
        self.per_layer = dict(_layer_settings(layer, own) for layer, own in self.per_layer.items())


def _layer_settings(layer: Any, settings: Any) -> tuple[int, dict[str, int]]:
    """Return an entry of `per_layer`; raise a `ValueError` unless it sets options of `PER_LAYER` to whole numbers."""
    if not str(layer).isdecimal() or not isinstance(settings, dict):
        raise ValueError(f"per_layer: {layer!r}: {settings!r}: write a layer and its options, 3: {{num_experts: 4096}}")
    for name, value in settings.items():
        if name not in PER_LAYER:
            raise ValueError(f"per_layer: layer {layer} sets {name!r}; it may set {', '.join(PER_LAYER)}")
        if type(value) is not int or value < 1:
            raise ValueError(f"per_layer: layer {layer}: {name} must be a whole number from 1, got {value!r}")
    return int(layer), settings


@dataclass(kw_only=True)
class PlanOptions(DecompositionOptions):
    """Show what a decomposition takes before it starts: parameters, memory, disk, FLOPs and time; read no weights.

    Takes the options of decompose, and the run.yaml of a run as --config.
    """

    yaml_only = (
        "revision", "site", "dataset", "dataset_config", "dataset_revision", "split", "text_column", "chat",
        "streaming", "heldout_dataset", "bf16", "evaluation_tokens", "seed", "overwrite", "learning_rate", "resume",
        "min_mean_ablation_error", "auxiliary_weight", "match_transcoder", "shard", "cache",
    )  # fmt: skip

    devices: int = option(1, "Number of devices, each with one process.", TRAINING, minimum=1)
    flops: float | None = option(None, "FLOPs a second of a device: 400e12. [measured here]", TRAINING, minimum=1)
    bandwidth: float | None = option(
        None, "Bytes a second that a device moves. [measured here; a hundredth of flops]", flag=False, minimum=1
    )
    output: str = option("mxd-output", "- prints the plan as JSON. [tables]", OUTPUT)


@dataclass(kw_only=True)
class FinetuningOptions(ResumableOptions):
    """Train a decomposition further, end to end in its language model, and show what that changed."""

    decomposition: str = option(
        ..., "Folder or Hub id (user/repo[@revision]) of a decomposition, which is left unchanged.", argument="FOLDER"
    )
    loss: Literal["kl", "cross_entropy"] = option("kl", HELP["loss"], TRAINING, trainer=True)
    nmse_weight: float = option(0.1, HELP["nmse_weight"], minimum=0, trainer=True)
    learning_rate: float | None = option(3e-4, HELP["learning_rate"], TRAINING, trainer=True)
    tokens: int = option(200_000, "Training tokens: 500k, 10M, 1B.", TRAINING, count=True)
    output: str = option("mxd-finetuned", "Folder for the result.", OUTPUT)

    # Not what it is measured on: the figures from before the first step are kept.
    may_change = ("report_to", "training.disable_tqdm")


@dataclass(kw_only=True)
class FrontierOptions(WhereOptions, RunOptions):
    """Compare methods at several K, at equal parameters and on the same tokens (the paper's Fig. 3).

    The same command continues an interrupted one.
    """

    yaml_only = (
        "revision", "dataset_config", "split", "text_column", "dtype", "heldout_dataset", "bf16", "seed", "streaming",
        "context_length", "chat",
    )  # fmt: skip

    methods: list[str] = option(lambda: list(LEARNING_RATES), "Methods to compare.", WHAT, commas=True)
    num_experts_per_tok: list[int] = option(
        lambda: [16, 32, 64, 128, 256], "Numbers of active experts (K).", WHAT, alias="-k"
    )
    num_train_epochs: int = option(1, "Passes over the recorded tokens.", TRAINING, minimum=1)
    learning_rates: dict[str, float] = option(dict, "Peak learning rates by method. [see decompose]", flag=False)
    output: str = option("mxd-frontier", "Folder for the result.", OUTPUT)
    overwrite: bool = option(False, "Replace a recording of other text and points of other settings.", OUTPUT)

    def __post_init__(self) -> None:
        self.methods = [method.replace("-", "_") for method in self.methods]
        for name in ("methods", "learning_rates"):
            if unknown := [method for method in getattr(self, name) if method not in LEARNING_RATES]:
                raise ValueError(f"{name} must be among {', '.join(LEARNING_RATES)}, got {unknown[0]!r}")


@dataclass(kw_only=True)
class MeasuringOptions(StreamableOptions):
    """Options of every command that reads a decomposition."""

    decomposition: str = option(..., "Folder or Hub id (user/repo[@revision]) of a decomposition.", argument="FOLDER")
    dataset: list[str] = option(
        list, "Text to read, see decompose. [that of the training, if it is there, else the sample of mxd]", DATA
    )
    tokens: int = option(32768, "Tokens to read; with --by, of each value.", DATA, count=True)
    output: str | None = option(None, "Folder for the results; - prints them as JSON. [the decomposition's]", OUTPUT)


@dataclass(kw_only=True)
class EvaluationOptions(MeasuringOptions):
    """Measure a decomposition on text, and write evaluation.json into its folder, in place of an earlier one."""

    yaml_only = ("dataset_config",)

    by: str | None = option(None, "Instead: which experts are active on which value of this column.", MEASURE)
    ablation: Literal["coefficient"] | None = option(
        None, "Also remove each token's strongest experts, in this order; takes about four times as long.", MEASURE
    )
    ranks: bool = option(False, "Also measure the rank of a sample of experts.", MEASURE)
    tasks: list[str] = option(
        list, "Also score both models on tasks of lm-evaluation-harness: a,b.yaml.", MEASURE, commas=True
    )
    task_limit: int | None = option(None, "Score the first examples of each task only. [all]", MEASURE, minimum=1)
    task_batch_size: int = option(1, "Batch size of the tasks.", flag=False, minimum=1)


@dataclass(kw_only=True)
class ExpertsOptions(MeasuringOptions):
    """Find what every expert is active on and does in a text; show some on screen and as a page, experts.html.

    A file experts.safetensors in the folder is read instead, if it is of the same text, or no text is named.
    """

    yaml_only = ("streaming", "context_length", "dataset_config", "dataset_revision", "split", "dtype")

    tokens: int = option(128_000, "Tokens to read; with --by, equal parts of each value.", DATA, count=True)
    by: str | None = option(None, "Also count by the values of this column.", MEASURE)
    experts: list[int] | None = option(None, "Experts to show: 12,99. [a random sample]", MEASURE)
    promotes: str | None = option(None, "Show those whose directions promote this word most, to steer by.", MEASURE)
    layer: int | None = option(None, "Layer to show. [all]", MEASURE, minimum=0)
    sample: int = option(20, "Size of the random sample of each layer.", flag=False, minimum=1)
    examples: int = option(10, "Examples of each expert.", minimum=1)
    seed: int = option(0, "Seed of the sample.", flag=False)
    overwrite: bool = option(False, "Read the text again, whatever the folder holds.", OUTPUT)


@dataclass(kw_only=True)
class ProbingOptions(DatasetOptions):
    """Measure how well single experts, or a few, tell classes of texts apart, beside the MLP's own neurons."""

    yaml_only = ("context_length", "dataset_config", "split", "dtype", "chat")

    decompositions: list[str] = option(..., "Folders or Hub ids of decompositions of one layer.", argument="FOLDER...")
    label_column: str = option(..., "Column that holds the classes.", DATA)
    group_column: str | None = option(None, "Column of what must stay together, such as a book. [each row alone]")
    classes: list[str] | None = option(None, "Use these classes only: a,b,c. [all]", commas=True)
    layer: int | None = option(None, "Layer to probe. [the only one in common]", MEASURE, minimum=0)
    against: list[str] = option(
        lambda: ["input", "neurons", "output"], "Representations of the MLP itself to compare with.", flag=False
    )
    pooling: Literal["mean", "max"] = option("mean", "How to pool over the tokens of a text.", MEASURE)
    include_first: bool = option(False, "Pool over the first position (BOS) too.", flag=False)
    texts_per_class: int = option(500, "Largest number of texts of a class.", flag=False, minimum=1)
    folds: int = option(5, "Folds of documents; each is the test side once.", flag=False, minimum=2)
    candidates: int = option(100, "Features to try one by one.", flag=False, minimum=1)
    sparsities: list[int] = option(lambda: [1, 2, 5], "Numbers of features of the k-sparse probes.", flag=False)
    standardize: bool = option(False, "Divide features by their standard deviation.", flag=False)
    seed: int = option(0, "Seed of texts and folds.", flag=False)
    output: str = option("mxd-probing", "Folder for probing.json and its figure; - prints the results.", OUTPUT)
    overwrite: bool = option(False, "Replace results in the output folder.", OUTPUT)


@dataclass(kw_only=True)
class PushOptions:
    """Share a decomposition on the Hub: weights, results, code and a card, in one commit."""

    folder: str = option(..., "Folder of a decomposition.", argument="FOLDER")
    repo: str = option(..., "Repo on the Hub, which is made if need be.", argument="USER/NAME")
    private: bool | None = option(None, "Make a new repo private. [the account's default]", OUTPUT)
    revision: str | None = option(None, "Branch, which is made if need be.", OUTPUT)
    create_pr: bool = option(False, "Open a pull request.", OUTPUT)
    message: str | None = option(None, "Message of the commit.", OUTPUT)
    base_model: str | None = option(None, "Hub id of the base model, if config.json names a folder.")
    license: str | None = option(None, "Licence of the decomposition. [the base model's]")


@dataclass(kw_only=True)
class SearchOptions:
    """List decompositions that others share on the Hub."""

    query: str | None = option(None, "Part of the name of the repo or of its base model.", argument="QUERY")
    base_model: str | None = option(None, "Exact Hub id of the base model.")
    layer: int | None = option(None, "Only those that have this layer.", minimum=0)
    author: str | None = option(None, "User or organisation.")
    limit: int = option(20, "Largest number to list.", minimum=1)


@dataclass(kw_only=True)
class ShowOptions:
    """Show configuration, results and size of a decomposition on the Hub; download no weights and run no code."""

    repo: str = option(..., "Repo on the Hub.", argument="USER/NAME")
    revision: str | None = option(None, "Branch, tag or commit.")
