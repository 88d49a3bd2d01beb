"""`mxd inspect`: from a text to the experts that are active on it."""

import logging
from typing import Any

from mxd.base.files import replace_text
from mxd.data.tokens import row_of
from mxd.experts.inspection import Inspection, inspect_tokens

from .expert_page import inspection_page
from .experts import Opened, describe_expert, open_experts
from .options import ExpertsOptions
from .use_options import InspectOptions

logger = logging.getLogger(__name__)

INSPECT_PAGE_NAME = "inspect.html"
MAX_TOKENS = 1024
"""Tokens of a text that are read."""


def inspect_text(options: InspectOptions, progress: bool = True) -> dict[str, Any]:
    """Show which experts are active on texts; write inspect.html.

    Returns:
        {"texts": [{"text", "layers": {"15": {"tokens": [{"token", "experts": [{"expert", "coefficient", "relative": to
        the expert's maximum, "share", "rarity"}]}]}}}], the most unusual expert of a token first, "experts": {"15":
        {"812": {"score": mean over texts of its largest rarity, "texts": number of them on which it is active, …: see
        `describe_expert`}}}, the largest score first, "settings"}.

    Raises:
        ValueError: there is no such decomposition or layer, or no text.
    """
    texts = [text for text in options.texts if text.strip()]
    if not texts:
        raise ValueError("no text to inspect: give one in quotes")
    asked: dict[str, Any] = {name: getattr(options, name) for name in ("decomposition", "layer", "dtype", "output")}
    opened = open_experts(ExpertsOptions(**asked, examples=options.examples), progress)
    inspected = [inspect_tokens_of(opened, text) for text in texts]
    results: dict[str, Any] = {"texts": [], "experts": {}, "settings": opened.collection.settings}
    for text, (tokens, layers) in zip(texts, inspected, strict=True):
        shown = {str(layer): {"tokens": _tokens(opened, layer, tokens, found)} for layer, found in layers.items()}
        results["texts"].append({"text": text, "layers": shown})
    for layer in opened.layers:
        unusual = [found[layer].unusual() for _, found in inspected]
        scores = {expert: 0.0 for each in unusual for expert in each}
        for each in unusual:
            for expert, (bits, _) in each.items():
                scores[expert] += bits / len(texts)
        results["experts"][str(layer)] = {
            str(expert): {
                "score": scores[expert],
                "texts": sum(expert in each for each in unusual),
                **describe_expert(opened, layer, expert, options.examples),
            }
            for expert in sorted(scores, key=lambda expert: -scores[expert])[: options.top]
        }
    if opened.folder is not None:
        replace_text(opened.folder / INSPECT_PAGE_NAME, inspection_page(results))
    return results


def inspect_tokens_of(opened: Opened, text: str) -> tuple[list[str], dict[int, Inspection]]:
    """Return the tokens of a text, after BOS if the tokenizer has one, and the experts active on them, by layer."""
    tokenizer = opened.tokenizer
    ids = row_of(tokenizer, text)
    positions = getattr(opened.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    limit = min(MAX_TOKENS, positions) if isinstance(positions, int) and positions > 0 else MAX_TOKENS
    if len(ids) > limit:
        logger.warning("the text has %d tokens, of which the first %d are read", len(ids), limit)
    if not ids:
        raise ValueError("the text has no tokens")
    ids = ids[:limit]
    collections = {layer: opened.collection.layers[layer] for layer in opened.layers}
    return opened.pieces.of(ids), inspect_tokens(opened.model, opened.decomposition, ids, collections)


def _tokens(opened: Opened, layer: int, tokens: list[str], found: Inspection) -> list[dict[str, Any]]:
    maximum = opened.collection.layers[layer].maximum
    rows = []
    for token, *parts in zip(tokens, *(part.tolist() for part in found), strict=True):
        experts = [
            {
                "expert": expert,
                "coefficient": value,
                "relative": value / float(maximum[expert]) if maximum[expert] > 0 else None,
                "share": share,
                "rarity": bits,
            }
            for expert, value, share, bits in zip(*parts, strict=True)
            if value > 0
        ]
        rows.append({"token": token, "experts": sorted(experts, key=lambda one: -one["rarity"])})
    return rows if opened.tokenizer.bos_token_id is None else rows[1:]  # BOS is no part of the text
