"""`mxd probe`: sparse probing of decompositions, and of the MLP that they replace, on labelled text."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mxd.base.files import write_json
from mxd.data.labelled_text import LabelledDocuments, count_texts, cut_texts, load_labelled_text
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
from mxd.evaluation.probing import check_groups, check_scikit_learn
from mxd.modeling_mxd import MLPSite, MxDModel, SurgeryError, find_mlp

from .decompositions import load_base_and_text, load_decomposition
from .options import STDOUT, ProbingOptions, values
from .run_folder import output_folder, write_run
from .training import versions

RESULTS_NAME, FIGURE_NAME = "probing.json", "probing.png"
OF_THE_MLP = {
    "input": ("MLP input", input_representation),
    "neurons": ("MLP neurons", neuron_representation),
    "output": ("MLP output", output_representation),
}
"""Values of `against`: a name in the results, and the function that makes the representation."""


def probe(options: ProbingOptions, progress: bool = False) -> dict[str, Any]:
    """Probe the coefficients of decompositions, and the MLP's own representations, for classes of texts.

    Writes probing.json and a figure into a folder.

    Args:
        options: of the command.
        progress: show a progress bar.

    Returns:
        The content of probing.json: `representations` {name: what `probe_features` returns}, `classes` {name: number of
        texts and documents}, `always_yes_f1` {name: F1 of a probe that always says yes}, `settings`.

    Raises:
        ValueError: bad input of any kind, before the model reads a text.
        ImportError: scikit-learn is not installed.
    """
    check_scikit_learn()
    folder = _check_options(options)
    decompositions = {name: load_decomposition(source) for name, source in named(options.decompositions).items()}
    layer = common_layer(decompositions, options.layer)
    first = next(iter(decompositions.values()))
    model, tokenizer, documents = load_base_and_text(
        first, options.dtype, options.context_length, lambda: _load_documents(options)
    )
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
    if folder is not None:
        write_run(folder, "probe", options)
    features = pool_features(
        model, layer, texts.ids, representations, pooling=options.pooling, include_first=options.include_first,
        progress=progress, **where,
    )  # fmt: skip
    how = values(options, lambda one: one.name in ("candidates", "sparsities", "standardize", "seed"))
    chance = always_yes_f1(texts.labels)
    asked = values(options, lambda one: one.name not in ("output", "overwrite", "dataset_config", "streaming"))
    results: dict[str, Any] = {
        "representations": {
            name: probe_features(found, texts.labels, folds, **how) for name, found in features.items()
        },
        "classes": count_texts(texts),
        "always_yes_f1": chance,
        "settings": {
            **asked,
            "config_name": options.dataset_config,
            "layer": layer,
            **describe(decompositions, layer),
            "versions": probing_versions(),
        },
    }
    if folder is not None:
        write_json(folder / RESULTS_NAME, results)
        name = options.label_column
        plot_probing({name: results["representations"]}, folder / FIGURE_NAME, {name: chance})
    return results


def _load_documents(options: ProbingOptions) -> LabelledDocuments:
    documents = load_labelled_text(
        options.dataset,
        label_column=options.label_column,
        group_column=options.group_column,
        classes=options.classes,
        text_column=options.text_column,
        config_name=options.dataset_config,
        split=options.split,
    )
    # Too few documents show here already; the texts that are cut from them are checked again.
    check_groups(documents.labels, documents.groups, options.folds)
    return documents


def _check_options(options: ProbingOptions) -> Path | None:
    """Check the options that need no file, and return the output folder; None for standard output."""
    if not options.decompositions:
        raise ValueError("no decomposition to probe: name one folder at least")
    if not options.dataset:
        raise ValueError("probing needs labelled text: name it with --dataset, and its labels with --label-column")
    if unknown := [name for name in options.against if name not in OF_THE_MLP]:
        raise ValueError(f"the MLP has no representation {unknown[0]!r}, only {', '.join(OF_THE_MLP)}")
    if options.pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {options.pooling!r}")
    if options.candidates < 1 or not options.sparsities or min(options.sparsities) < 1:
        raise ValueError(
            f"candidates ({options.candidates}) and every k ({options.sparsities}) must be at least 1, and there must "
            "be a k"
        )
    if options.seed < 0:
        raise ValueError(f"seed must not be negative, got {options.seed}")
    if options.output == STDOUT:
        return None
    folder = output_folder(options.output)
    if (folder / RESULTS_NAME).exists() and not options.overwrite:
        raise ValueError(f"{folder / RESULTS_NAME} exists: pass --overwrite to replace it, or another --output")
    return folder


def named(sources: Sequence[str]) -> dict[str, str]:
    """Return {short name: folder or Hub id}; the short name is the last part, or all of it if two share that.

    Raises:
        ValueError: one is given twice.
    """
    if len(set(sources)) < len(sources):
        raise ValueError(f"a decomposition is named twice: {', '.join(sources)}")
    last = [Path(source).name or source for source in sources]
    return {name if last.count(name) == 1 else source: source for name, source in zip(last, sources, strict=True)}


def common_layer(decompositions: Mapping[str, MxDModel], layer: int | None) -> int:
    """Return the layer to probe.

    Raises:
        ValueError: the decompositions are of different base models or MLPs, have no layer or several in common, or
            one lacks the layer that was asked for; the message names them.
    """
    names = list(decompositions)
    configs = [decomposition.config for decomposition in decompositions.values()]
    for what, of_each in {
        "base model": [(config.base_model_name_or_path, config.base_model_revision) for config in configs],
        "stack and site": [tuple(config.where.values()) for config in configs],
    }.items():
        other = next((index for index, value in enumerate(of_each) if value != of_each[0]), None)
        if other is not None:
            raise ValueError(
                f"the decompositions are not of one {what}: {names[0]} is of {_words(of_each[0])}, {names[other]} of "
                f"{_words(of_each[other])}; probe them in two runs"
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
    """Return what is probed, by name: the MLP's own representations, then the coefficients of every decomposition.

    Raises:
        ValueError: the MLP has no such representation, or a decomposition does not fit it (`SurgeryError`).
    """
    found: dict[str, Representation] = {}
    for key in against:
        name, make = OF_THE_MLP[key]
        found[name] = make(site)
    for name, decomposition in decompositions.items():
        if name in found:
            raise ValueError(
                f"{name!r} is the name of a representation of the MLP: rename the folder of the decomposition"
            )
        try:
            site.check_fits(decomposition.config.layer(site.layer))
        except SurgeryError as error:
            raise SurgeryError(f"{name}: {error}") from error
        found[name] = expert_representation(decomposition.eval().layer(site.layer))
    return found


def describe(decompositions: Mapping[str, MxDModel], layer: int) -> dict[str, Any]:
    """Return method and sizes of each decomposition's layer, and where it is, for the settings."""
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


def probing_versions() -> dict[str, str]:
    """Return the versions that the figures depend on."""
    return {**versions(), "scikit-learn": version("scikit-learn")}
