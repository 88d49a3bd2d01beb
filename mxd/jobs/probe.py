"""`mxd probe`: sparse probing of decompositions, and of the MLP that they replace, on labelled text."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mxd.base.files import write_json
from mxd.base.pretrained_weights import check_widths
from mxd.base.progress import progress_bar
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
from mxd.evaluation.plots import model_title
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


def probe(options: ProbingOptions, progress: bool = True) -> dict[str, Any]:
    """Probe the coefficients of decompositions, and the MLP's own representations; write probing.json and a figure.

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
        documents, tokenizer, context_length=options.context_length, texts_per_class=options.texts_per_class,
        seed=options.seed,
    )  # fmt: skip
    folds = grouped_folds(texts.labels, texts.groups, options.folds, options.seed)
    if folder is not None:
        write_run(folder, "probe", options)
    features = pool_features(
        model, layer, texts.ids, representations, pooling=options.pooling, include_first=options.include_first,
        progress=progress, **where,
    )  # fmt: skip
    how = values(options, lambda one: one.name in ("candidates", "sparsities", "standardize", "seed"))
    chance = always_yes_f1(texts.labels)
    asked = values(options, lambda one: one.name not in ("output", "overwrite", "dataset_config"))
    used = {"config_name": options.dataset_config, "layer": layer}
    results: dict[str, Any] = {
        "representations": {
            name: probe_features(found, texts.labels, folds, **how)
            for name, found in progress_bar(features.items(), desc="probe", unit="representation", show=progress)
        },
        "classes": count_texts(texts),
        "always_yes_f1": chance,
        "settings": {**asked, **used, **describe(decompositions, layer)},
    }
    if folder is not None:
        write_json(folder / RESULTS_NAME, results)
        name, title = options.label_column, model_title(results["settings"]["base_model"], [layer])
        plot_probing({name: results["representations"]}, folder / FIGURE_NAME, {name: chance}, title)
    return results


def _load_documents(options: ProbingOptions) -> LabelledDocuments:
    documents = load_labelled_text(
        options.dataset,
        label_column=options.label_column,
        group_column=options.group_column,
        classes=options.classes,
        text_column=options.text_column,
        config_name=options.dataset_config,
        revision=options.dataset_revision,
        split=options.split,
        chat=options.chat,
    )
    # Too few documents show here already; the texts that are cut from them are checked again.
    check_groups(documents.labels, documents.groups, options.folds)
    return documents


def _check_options(options: ProbingOptions) -> Path | None:
    """Check the options that need no file, and return the output folder; None for standard output."""
    if not options.dataset:
        raise ValueError("probing needs labelled text: name it with --dataset, and its labels with --label-column")
    if set(options.against) - OF_THE_MLP.keys():
        raise ValueError(f"against must be among {', '.join(OF_THE_MLP)}, got {', '.join(options.against)}")
    if options.output == STDOUT:
        return None
    folder = output_folder(options.output)
    if (folder / RESULTS_NAME).exists() and not options.overwrite:
        raise ValueError(f"{folder / RESULTS_NAME} exists: pass --overwrite to replace it, or another --output")
    return folder


def named(sources: Sequence[str]) -> dict[str, str]:
    """Return {short name: folder or Hub id}; the short name is the last part, or all of it if two share that."""
    last = [Path(source).name or source for source in sources]
    return {name if last.count(name) == 1 else source: source for name, source in zip(last, sources, strict=True)}


def common_layer(decompositions: Mapping[str, MxDModel], layer: int | None) -> int:
    """Return the layer to probe.

    Raises:
        ValueError: the decompositions are of different base models or MLPs, have no layer or several in common, or
            one lacks the layer that was asked for.
    """
    configs = {name: decomposition.config for name, decomposition in decompositions.items()}
    origins = {
        (config.base_model_name_or_path, config.base_model_revision, *config.where.values())
        for config in configs.values()
    }
    if len(origins) > 1:
        raise ValueError("the decompositions are not of one base model, stack and site: probe them apart")
    shown = "; ".join(f"{name}: {', '.join(map(str, config.layers))}" for name, config in configs.items())
    shared = set.intersection(*(set(config.layers) for config in configs.values()))
    if layer is not None and layer not in shared:
        raise ValueError(f"not every decomposition has layer {layer} ({shown})")
    if layer is None and len(shared) != 1:
        reason = "have no layer in common" if not shared else "have several layers: say which with --layer"
        raise ValueError(f"the decompositions {reason} ({shown})")
    return layer if layer is not None else shared.pop()


def make_representations(
    site: MLPSite, decompositions: Mapping[str, MxDModel], against: Sequence[str] = tuple(OF_THE_MLP)
) -> dict[str, Representation]:
    """Return what is probed, by name: the MLP's own representations, then the coefficients of every decomposition.

    Raises:
        ValueError: the MLP has no such representation, or a decomposition does not fit it (`SurgeryError`).
    """
    found = {name: make(site) for name, make in (OF_THE_MLP[key] for key in against)}
    for name, decomposition in decompositions.items():
        try:
            check_widths([site], decomposition.config.layer(site.layer))
        except SurgeryError as error:
            raise SurgeryError(f"{name}: {error}") from error
        found[name] = expert_representation(decomposition.eval().layer(site.layer))
    return found


def describe(decompositions: Mapping[str, MxDModel], layer: int) -> dict[str, Any]:
    """Return method and sizes of each decomposition's layer, where it is, and versions, for the settings."""
    sizes = {name: decomposition.config.layer(layer) for name, decomposition in decompositions.items()}
    names = ("method", "num_experts", "num_experts_per_tok")
    methods = {
        name: {**{one: getattr(size, one) for one in names}, "parameters": size.num_parameters}
        for name, size in sizes.items()
    }
    config = next(iter(decompositions.values())).config
    used = {**versions(), "scikit-learn": version("scikit-learn")}
    return {"base_model": config.base_model_name_or_path, **config.where, "methods": methods, "versions": used}
