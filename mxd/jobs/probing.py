"""Sparse probing of decompositions and of the MLP that they stand for, on labelled text."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mxd.base.files import replace_text
from mxd.base.pretrained_weights import check_widths
from mxd.data.labelled_text import count_texts, cut_texts, load_labelled_text
from mxd.evaluation import (
    Representation,
    always_yes_f1,
    expert_representation,
    grouped_folds,
    input_representation,
    neuron_representation,
    output_representation,
    plot_probing,
    pool_features,
    probe_features,
)
from mxd.evaluation.pooling import POOLINGS
from mxd.evaluation.probing import CANDIDATES, FOLDS, SPARSITIES, check_groups, check_scikit_learn
from mxd.modeling_mxd import MLPSite, MxDModel, SurgeryError, find_mlp

from .decompositions import check_base_of, load_base_of, load_decomposition, output_folder
from .runs import versions

RESULTS_NAME, FIGURE_NAME = "probing.json", "probing.png"
OF_THE_MLP = {
    "input": ("MLP input", input_representation),
    "neurons": ("MLP neurons", neuron_representation),
    "output": ("MLP output", output_representation),
}
"""What `against` names: the representation's name in the results, and what makes it."""


@dataclass(kw_only=True)
class ProbingOptions:
    """What `probe` is asked for.

    Attributes:
        decompositions: folders or Hub ids, all of one layer of one base model.
        dataset: Hub name, or files, folders and globs.
        label_column, group_column, classes, text_column, config_name, split: see `trainers.load_labelled_text`.
        layer: which, where a decomposition has several; None for the only one that all have.
        against: what of the MLP itself is probed too: keys of `OF_THE_MLP`.
        pooling, include_first: see `mxd.evaluation.pool_features`.
        context_length, texts_per_class: see `trainers.cut_texts`.
        folds, candidates, sparsities, standardize: see `mxd.evaluation.probing`.
        dtype: in which the base model runs.
        seed: of the texts, the folds, and the texts of the k-sparse probes.
        output: folder for the results.
        overwrite: replace results that are there.
    """

    decompositions: list[str]
    dataset: list[str]
    label_column: str
    group_column: str | None = None
    classes: list[str] | None = None
    text_column: str = "text"
    config_name: str | None = None
    split: str = "train"
    layer: int | None = None
    against: list[str] = field(default_factory=lambda: list(OF_THE_MLP))
    pooling: str = "mean"
    include_first: bool = False
    context_length: int = 128
    texts_per_class: int = 500
    folds: int = FOLDS
    candidates: int = CANDIDATES
    sparsities: list[int] = field(default_factory=lambda: list(SPARSITIES))
    standardize: bool = False
    dtype: str = "float32"
    seed: int = 0
    output: str = "mxd-probing"
    overwrite: bool = False


def probe(options: ProbingOptions, progress: bool = False) -> dict[str, Any]:
    """Probe the coefficients of decompositions and the MLP's own representations for the classes of texts, and write
    probing.json and a figure into a folder.

    Returns:
        What probing.json holds: `representations` {name: what `probe_features` gives}, `classes` {name: texts and
        documents}, `always_yes_f1` {name: F1 of a probe that knows nothing}, `settings`.

    Raises:
        ValueError: bad input of any kind, before the model reads a text.
        ImportError: scikit-learn is not installed.
    """
    check_scikit_learn()
    folder = _check_options(options)
    decompositions = {name: load_decomposition(source) for name, source in named(options.decompositions).items()}
    layer = common_layer(decompositions, options.layer)
    first = next(iter(decompositions.values()))
    check_base_of(first, options.dtype, options.context_length)
    documents = load_labelled_text(
        options.dataset,
        label_column=options.label_column,
        group_column=options.group_column,
        classes=options.classes,
        text_column=options.text_column,
        config_name=options.config_name,
        split=options.split,
    )
    # Here already, since too few documents are found out soon; the texts that are cut from them decide.
    check_groups(documents.labels, documents.groups, options.folds)
    model, tokenizer = load_base_of(first, options.dtype, options.context_length)
    for decomposition in decompositions.values():
        decomposition.to(model.device)
    where = first.config.where
    representations = make_representations(find_mlp(model, layer, **where), decompositions, options.against)
    texts = cut_texts(
        documents,
        tokenizer,
        context_length=options.context_length,
        texts_per_class=options.texts_per_class,
        seed=options.seed,
    )
    folds = grouped_folds(texts.labels, texts.groups, options.folds, options.seed)
    folder.mkdir(parents=True, exist_ok=True)
    features = pool_features(
        model, layer, texts.ids, representations, pooling=options.pooling, include_first=options.include_first,
        progress=progress, **where,
    )  # fmt: skip
    how: dict[str, Any] = {
        "candidates": options.candidates,
        "sparsities": options.sparsities,
        "standardize": options.standardize,
        "seed": options.seed,
    }
    chance = always_yes_f1(texts.labels)
    results: dict[str, Any] = {
        "representations": {
            name: probe_features(found, texts.labels, folds, **how) for name, found in features.items()
        },
        "classes": count_texts(texts),
        "always_yes_f1": chance,
        "settings": {
            **_settings(options),
            "layer": layer,
            **describe(decompositions, layer),
            "versions": probing_versions(),
        },
    }
    replace_text(folder / RESULTS_NAME, json.dumps(results, indent=1) + "\n")
    name = options.label_column
    plot_probing({name: results["representations"]}, folder / FIGURE_NAME, {name: chance})
    return results


def _check_options(options: ProbingOptions) -> Path:
    """The output folder, once the options that need no file are known to be in order."""
    if not options.decompositions:
        raise ValueError("no decomposition to probe: name one folder at least")
    if not options.dataset:
        raise ValueError("probing needs labelled text: name it with --dataset, and its labels with --label-column")
    if unknown := [name for name in options.against if name not in OF_THE_MLP]:
        raise ValueError(f"the MLP has no representation {unknown[0]!r}: {', '.join(OF_THE_MLP)} are those that it has")
    if options.pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {options.pooling!r}")
    if options.candidates < 1 or not options.sparsities or min(options.sparsities) < 1:
        raise ValueError(
            f"candidates ({options.candidates}) and every k ({options.sparsities}) must be at least 1, and there must "
            "be a k"
        )
    if options.seed < 0:
        raise ValueError(f"seed must not be negative, got {options.seed}")
    folder = output_folder(options.output)
    if (folder / RESULTS_NAME).exists() and not options.overwrite:
        raise ValueError(f"{folder / RESULTS_NAME} exists: pass --overwrite to replace it, or another --output")
    return folder


def named(sources: Sequence[str]) -> dict[str, str]:
    """{short name: folder or Hub id}: the last part, or all of it where that would not tell two apart.

    Raises:
        ValueError: one is given twice.
    """
    if len(set(sources)) < len(sources):
        raise ValueError(f"a decomposition is named twice: {', '.join(sources)}")
    last = [Path(source).name or source for source in sources]
    return {name if last.count(name) == 1 else source: source for name, source in zip(last, sources, strict=True)}


def common_layer(decompositions: Mapping[str, MxDModel], layer: int | None) -> int:
    """The layer that is probed.

    Raises:
        ValueError: the decompositions are of different base models or MLPs, share no layer or several, or one lacks
            the layer that was asked for; each with its name.
    """
    names = list(decompositions)
    configs = [decomposition.config for decomposition in decompositions.values()]
    for what, values in {
        "base model": [(config.base_model_name_or_path, config.base_model_revision) for config in configs],
        "stack and site": [tuple(config.where.values()) for config in configs],
    }.items():
        other = next((index for index, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise ValueError(
                f"the decompositions are not of one {what}: {names[0]} is of {_words(values[0])}, {names[other]} of "
                f"{_words(values[other])}; probe them in two runs"
            )
    shown = "; ".join(f"{name}: {', '.join(map(str, c.layers))}" for name, c in zip(names, configs, strict=True))
    shared = set(configs[0].layers).intersection(*(config.layers for config in configs))
    if layer is not None and layer not in shared:
        raise ValueError(f"not every decomposition has layer {layer} ({shown})")
    if layer is None and len(shared) != 1:
        reason = "have no layer in common" if not shared else "have several layers: say which with --layer"
        raise ValueError(f"the decompositions {reason} ({shown})")
    return layer if layer is not None else shared.pop()


def _words(values: Sequence[Any]) -> str:
    return " at ".join(str(value) for value in values if value is not None)


def make_representations(
    site: MLPSite, decompositions: Mapping[str, MxDModel], against: Sequence[str] = tuple(OF_THE_MLP)
) -> dict[str, Representation]:
    """What is probed, by name: of the MLP what `against` says, then the coefficients of every decomposition.

    Raises:
        ValueError: a representation of the MLP cannot be had (`SurgeryError`: or a decomposition does not fit it).
    """
    found: dict[str, Representation] = {}
    for key in against:
        name, make = OF_THE_MLP[key]
        found[name] = make(site)
    for name, decomposition in decompositions.items():
        if name in found:
            raise ValueError(
                f"a decomposition is called {name!r}, as a representation of the MLP is: rename its folder"
            )
        try:
            check_widths(site, decomposition.config.layer(site.layer))
        except SurgeryError as error:
            raise SurgeryError(f"{name}: {error}") from error
        found[name] = expert_representation(decomposition.eval().layer(site.layer))
    return found


def describe(decompositions: Mapping[str, MxDModel], layer: int) -> dict[str, Any]:
    """Method and sizes of each decomposition's layer, and of what it is, for the settings."""
    configs = {name: decomposition.config.layer(layer) for name, decomposition in decompositions.items()}
    config = next(iter(decompositions.values())).config
    return {
        "base_model": config.base_model_name_or_path,
        **config.where,
        "methods": {
            name: {
                "method": sizes.method,
                "num_experts": sizes.num_experts,
                "num_experts_per_tok": sizes.num_experts_per_tok,
                "parameters": sizes.num_parameters,
            }
            for name, sizes in configs.items()
        },
    }


def _settings(options: ProbingOptions) -> dict[str, Any]:
    return {name: value for name, value in asdict(options).items() if name not in ("output", "overwrite")}


def probing_versions() -> dict[str, str]:
    """Of what the figures depend on."""
    return {**versions(), "scikit-learn": version("scikit-learn")}
