"""`mxd experts`: what each expert is active on, and what it does."""

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mxd.base.files import replace_text
from mxd.base.progress import progress_bar
from mxd.data.provenance import recorded_runs
from mxd.data.texts import document_batches, evaluation_settings
from mxd.experts.collecting import TOP, collect_experts, context_alignment
from mxd.experts.collection import Collection, ExpertCollection
from mxd.experts.collection_file import EXPERTS_NAME, load_collection, save_collection
from mxd.experts.contexts import INCOMPLETE, Context, TokenPieces, in_context
from mxd.experts.inspection import last_token_outputs
from mxd.experts.logit_effects import Unembedding, find_unembedding
from mxd.modeling_mxd import MxDModel

from .decompositions import (
    load_base_and_text,
    load_decomposition,
    read_text,
    recorded_evaluation,
    results_folder,
    source_file,
    warn_of_weak_experts,
)
from .domain_use import documents_by_domain
from .expert_page import PAGE_NAME, expert_page
from .options import ExpertsOptions
from .run_folder import write_run

logger = logging.getLogger(__name__)

QUANTILES = 5
"""Contexts shown of an expert's sample, evenly spaced from its largest coefficients to its smallest."""
AT_TOKENS, TOKENS_THERE = 3, 5
"""Contexts at which the effects of what an MxD's expert adds are shown, and tokens of each."""
_TEXT_OPTIONS = (
    "dataset", "dataset_config", "dataset_revision", "split", "text_column", "chat", "context_length", "dtype", "by",
    "tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """A decomposition with its base model and its collection."""

    collection: Collection
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    decomposition: MxDModel
    layers: list[int]
    """the layers that were asked for"""
    folder: Path | None
    """folder for results; None to print them"""
    evaluation: Mapping[str, Any]
    """evaluation.json of the decomposition"""

    @cached_property
    def pieces(self) -> TokenPieces:
        """The text of tokens."""
        return TokenPieces(self.tokenizer)

    @cached_property
    def unembedding(self) -> Unembedding | None:
        """The base model's, found once; None if there is none, of which `collect_experts` has warned."""
        try:
            example = torch.tensor([self.collection.row(0)])
            return find_unembedding(self.model, example, self.decomposition.config.stack)
        except ValueError:
            return None


def open_experts(options: ExpertsOptions, progress: bool = True) -> Opened:
    """Load a decomposition, its base model, and what was collected of its experts, or else collect it.

    An experts.safetensors that is there already is read if it is of the text that is asked for, or none is. A new one
    is written into the output folder; so is directions.safetensors if the decomposition has none.

    Raises:
        ValueError: there is no such decomposition, layer or expert, or the text cannot be read.
    """
    folder = results_folder(options.decomposition, options.output)
    decomposition = load_decomposition(options.decomposition)
    layers = decomposition.config.layers if options.layer is None else [options.layer]
    if unknown := [layer for layer in layers if layer not in decomposition.config.layers]:
        has = ", ".join(map(str, decomposition.config.layers))
        raise ValueError(f"layer {unknown[0]} is not in the decomposition, which has {has}")
    for layer in layers:
        count = decomposition.config.layer(layer).num_experts
        if unknown := [expert for expert in options.experts or [] if not 0 <= expert < count]:
            raise ValueError(f"layer {layer} has no expert {unknown[0]}: they are 0 to {count - 1}")
    evaluation = recorded_evaluation(options.decomposition)
    collection = None if options.overwrite else recorded_collection(options, folder, decomposition)
    model, tokenizer, documents = load_base_and_text(
        decomposition,
        options.dtype,
        options.context_length,
        lambda: None if collection is not None else _documents(options, evaluation),
    )
    if documents is not None:
        collection = _collect(options, model, tokenizer, decomposition, documents, progress)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            save_collection(collection, folder / EXPERTS_NAME)
            decomposition.save_directions(folder)
    assert collection is not None
    if len(collection.ids) and int(collection.ids.max()) >= model.get_input_embeddings().weight.shape[0]:
        raise ValueError(f"{EXPERTS_NAME} is of a model with another vocabulary: --overwrite makes it anew")
    return Opened(collection, model, tokenizer, decomposition, layers, folder, evaluation)


def read_experts(options: ExpertsOptions, progress: bool = True) -> dict[str, Any]:
    """Collect all experts of a decomposition on a text, and describe some; write experts.safetensors and experts.html.

    See `open_experts`. Without named experts, those that promote a word, or else a random sample of the active ones,
    are described. Without a dataset, the text is that of the training, see `read_text`.

    Returns:
        {"layers": {"15": {"1234": what `describe_expert` returns}}}, "settings", "warning": of a low expert share, or
        empty}.

    Raises:
        ValueError: there is no such decomposition, layer or expert, or the text cannot be read.
    """
    opened = open_experts(options, progress)
    results: dict[str, Any] = {"layers": {}, "settings": {**opened.collection.settings, "seed": options.seed}}
    for layer in opened.layers:
        chosen = options.experts
        if chosen is None and options.promotes is not None:
            chosen = experts_that_promote(opened, layer, options.promotes)[: options.sample]
        elif chosen is None:
            active = (opened.collection.layers[layer].maximum > 0).nonzero().squeeze(1).tolist()
            chosen = sorted(random.Random(options.seed).sample(active, min(options.sample, len(active))))
        results["layers"][str(layer)] = {
            str(expert): describe_expert(opened, layer, expert, options.examples) for expert in chosen
        }
    results["warning"] = warn_of_weak_experts(opened.evaluation)
    if opened.folder is not None:
        write_run(opened.folder, "experts", options)
        replace_text(opened.folder / PAGE_NAME, expert_page(results))
    return results


def recorded_collection(options: Any, folder: Path | None, decomposition: MxDModel) -> Collection | None:
    """Return the collection beside a decomposition or in the output folder, if it is of the text that is asked for.

    A file that cannot be read, or is of another decomposition, is ignored with a warning.
    """
    own = None if folder is None else folder / EXPERTS_NAME
    path = own if own is not None and own.is_file() else source_file(options.decomposition, EXPERTS_NAME)
    if path is None:
        return None
    try:
        collection = load_collection(path)
        for layer in decomposition.config.layers:
            count = decomposition.config.layer(layer).num_experts
            if layer not in collection.layers or len(collection.layers[layer].frequency) != count:
                raise ValueError(f"{path.name} is not of layer {layer} with {count} experts")
    except ValueError as error:
        logger.warning("%s", error)
        return None
    settings = collection.settings
    kinds = {"asked": dict, "tokens": int, "dataset": list}
    if not all(isinstance(settings.get(name), kind) for name, kind in kinds.items()):
        return None
    if any(settings["asked"].get(name) != value for name, value in _asked(options).items()):
        return None
    layers = [collection.layers[layer] for layer in decomposition.config.layers]
    enough = all(layer.top_values.shape[1] >= getattr(options, "examples", 0) for layer in layers)
    return collection if enough else None


def _asked(options: Any) -> dict[str, Any]:
    """Return what is asked of the text: the options that are not their defaults."""
    default = type(options)(decomposition=options.decomposition)
    asked = {name: getattr(options, name, None) for name in _TEXT_OPTIONS}
    return {name: value for name, value in asked.items() if value != getattr(default, name, None)}


def _documents(options: ExpertsOptions, evaluation: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return {domain: documents}, with the one name "" without domains, and the text that they are of."""
    if options.by is not None:
        return dict(documents_by_domain(options.text, options.by)), options.text
    documents, text, _ = read_text(options.text, options.decomposition, recorded_runs(evaluation.get("settings")))
    return {"": documents}, text


def _collect(
    options: ExpertsOptions,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    decomposition: MxDModel,
    documents: tuple[dict[str, Any], Any],
    progress: bool,
) -> Collection:
    """Read the text, equal parts of each domain, and collect."""
    batches: list[Any] = []
    origins: list[int] = []
    domains: dict[str, range] = {}
    by_domain, text = documents
    for domain, part in by_domain.items():
        tokens = -(-options.tokens // len(by_domain))
        found, of_rows = document_batches(part, tokenizer, options.context_length, tokens)
        domains[domain] = range(len(origins), len(origins) + len(of_rows))
        batches, origins = batches + found, origins + of_rows
    settings = {
        **evaluation_settings(text, options.dtype),
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
        "domain_column": options.by,
        "asked": _asked(options),
    }
    try:
        directions = {layer: decomposition.directions(layer).direction for layer in decomposition.config.layers}
    except ValueError:
        logger.warning("there are no directions of the experts: they are fitted on the tokens of this text")
        directions = None
    return collect_experts(
        model,
        decomposition,
        progress_bar(batches, desc="experts", show=progress),
        documents=origins,
        domains=domains if options.by is not None else None,
        directions=directions,
        fit=directions is None,
        top=max(TOP, options.examples),
        settings=settings,
    )


def describe_expert(opened: Opened, layer: int, expert: int, examples: int = TOP) -> dict[str, Any]:
    """Describe an expert by its collection, and by what it adds at the tokens of its strongest contexts.

    Returns:
        {"frequency": share of tokens on which it is active, "maximum", "alignment": of its direction with what follows
        its contexts, see `ExpertCollection`, or None, "examples": [{"coefficient", "before", "token",
        "after"}], the largest coefficient first, the first `AT_TOKENS` of an MxD with "promoted": [[token, effect of
        what it adds there]], "quantiles": the same of tokens at evenly spaced quantiles of its
        coefficients, "promoted", "suppressed": [[token, effect on its logit]], "nearest": {"direction", "modulation",
        "co-firing": [[expert, similarity]]}, "domains": {domain: share of the expert's firings, if all domains had the
        same number of tokens}}. Lists are empty if there is nothing to say.
    """
    collection, pieces = opened.collection, opened.pieces
    found = collection.layers[layer]
    contexts = collection.top(layer, expert, examples)
    shown = _shown(collection, contexts, pieces)
    for example, promoted in zip(shown, _promoted_there(opened, layer, expert, contexts[:AT_TOKENS]), strict=False):
        example["promoted"] = promoted
    frequencies = found.domain_frequency[expert]
    shares = (frequencies / frequencies.sum().clamp_min(1e-300)).tolist()
    return {
        "frequency": float(found.frequency[expert]),
        "maximum": float(found.maximum[expert]),
        "alignment": None if found.alignment is None else float(found.alignment[expert]),
        "examples": shown,
        "quantiles": _shown(collection, collection.quantiles(layer, expert, QUANTILES), pieces),
        "promoted": _named(pieces, _pairs(found, "promoted", expert)),
        "suppressed": _named(pieces, _pairs(found, "suppressed", expert)),
        "nearest": {
            name.removeprefix("similar_").replace("_", "-"): pairs
            for name in ("similar_direction", "similar_modulation", "co_firing")
            if (pairs := [[int(other), value] for other, value in _pairs(found, name, expert) if other >= 0])
        },
        "domains": dict(zip(collection.domains, shares, strict=True)),
    }


def _promoted_there(opened: Opened, layer: int, expert: int, contexts: Sequence[Context]) -> list[list[list[Any]]]:
    """Return the tokens that an MxD's expert promotes at its contexts, by a_n c_n * (Dᵀz)."""
    if not contexts or opened.decomposition.config.layer(layer).method != "mxd":
        return []
    if opened.unembedding is None:
        return []
    rows = [opened.collection.row(one.row)[: one.position + 1] for one in contexts]
    outputs = last_token_outputs(opened.model, opened.decomposition, layer, [(expert, row) for row in rows])
    found = opened.unembedding.largest(outputs, TOKENS_THERE)
    pairs = zip(found["promoted_ids"].tolist(), found["promoted_values"].tolist(), strict=True)
    return [_named(opened.pieces, list(zip(*pair, strict=True))) for pair in pairs]


def experts_that_promote(opened: Opened, layer: int, word: str) -> list[int]:
    """Return experts to steer towards a word by: whose direction promotes the word, and what follows their contexts.

    They are the half of the active experts with the larger alignment, the one whose direction promotes the word
    most first; see `Unembedding.alignment`. Of a word of several tokens the first one counts.

    Raises:
        ValueError: the word has no token, or effects on the logits are not known.
    """
    ids = opened.pieces.following(word)
    if opened.unembedding is None or not ids:
        raise ValueError(f"{'the final norm is not found' if ids else 'the word has no token'}: leave out --promotes")
    direction, vocabulary = opened.decomposition.directions(layer).direction, len(opened.unembedding.weight)
    targets, counts = torch.tensor(ids[:1]).expand(len(direction), 1), opened.collection.token_counts(vocabulary)
    found = opened.collection.layers[layer]
    aligned = found.alignment
    if aligned is None:  # of an earlier version's file
        aligned = context_alignment(opened.collection, layer, direction, opened.unembedding)
    aligned = aligned.masked_fill(found.maximum <= 0, -torch.inf)
    kept = aligned.topk(-(-int((found.maximum > 0).sum()) // 2)).indices
    return kept[opened.unembedding.alignment(direction, targets, counts)[kept].argsort(descending=True)].tolist()


def _shown(collection: Collection, contexts: Sequence[Context], pieces: TokenPieces) -> list[dict[str, Any]]:
    """Return contexts as text, without those whose row ends inside the character of the token."""
    shown: list[dict[str, Any]] = []
    for one in contexts:
        text = in_context(pieces, collection.row(one.row), one.position)
        if text["token"].strip(INCOMPLETE) or INCOMPLETE not in text["token"]:
            shown.append({"coefficient": one.coefficient, **text})
    return shown


def _pairs(found: ExpertCollection, name: str, expert: int) -> list[tuple[int, float]]:
    ids, values = getattr(found, f"{name}_ids"), getattr(found, f"{name}_values")
    return [] if ids is None else list(zip(ids[expert].tolist(), values[expert].tolist(), strict=True))


def _named(pieces: TokenPieces, pairs: list[tuple[int, float]]) -> list[list[Any]]:
    # A model may have further logits, which mean nothing.
    return [[pieces.one(token), value] for token, value in pairs if token < pieces.count]
