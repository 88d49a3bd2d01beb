"""Putting a new card over an earlier one that a person, or a stranger, may have written in."""

import re
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from mxd.modeling_mxd.downloads import first_line
from mxd.modeling_mxd.sharing import BEGIN, END

from .card import METHOD_TAGS
from .reading import texts
from .safe_text import get_nested

MAX_CARD = 1_000_000  # characters
MAX_METADATA = 100_000
MAX_DEPTH = 30

# A mark without its partner is text like any other: a begin is never paired with an end beyond the next begin.
_GENERATED = re.compile(f"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}", re.DOTALL)
_FIGURE = re.compile(r"!\[[^\]\n]*\]\((figures/[\w-]+\.png)\)")
_LAYER_TAG = re.compile(r"mxd-layer-\d+")
# Metadata that is ours even where this card has none: numbers of an earlier evaluation must not outlive it.
LICENSE = ("license", "license_name", "license_link")
_OWN_METADATA = ("model_name", "model-index", "mxd")


def update_card(existing: str, card: ModelCard, keep_license: bool = False) -> ModelCard:
    """The card with all that a person wrote into an earlier one.

    Of the earlier text, only what lies between the marks `BEGIN` and `END` is replaced; without marks all of it is
    kept and ours follows. Of the earlier metadata, what this card has is replaced (save the licence, with
    `keep_license`), tags are united (but those of the earlier layers and method are dropped), and everything else is
    kept. Comments in the metadata are lost.

    Raises:
        ValueError: the earlier card is too large, its metadata is no YAML mapping that a card can have, or `card` is
            none of `build_card`'s.
    """
    metadata, text = _parts(existing)
    newline = "\r\n" if "\r\n" in existing else "\n"
    generated = _GENERATED.search(card.text)
    if generated is None:
        raise ValueError("the new card has no marks: it must be one that build_card made")
    block = generated.group().replace("\r\n", "\n").replace("\n", newline)
    earlier = _GENERATED.search(text)
    merged = _merged(metadata, card.data.to_dict(), earlier.group() if earlier else "", keep_license)
    if earlier:
        text = _GENERATED.sub(lambda _: block, text, count=1)
    else:
        text = f"{text.rstrip()}{newline * 2}{block}{newline}" if text.strip() else f"{newline}{block}{newline}"
    front = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True, line_break=newline)
    return ModelCard(f"---{newline}{front.strip()}{newline}---{newline}{text}")


def _merged(metadata: dict[str, Any], own: dict[str, Any], generated: str, keep_license: bool) -> dict[str, Any]:
    """The earlier metadata under ours. What of it was ours is told by our earlier metadata and text."""
    stale = set(_OWN_METADATA)
    if keep_license and metadata.get("license"):
        own = {name: value for name, value in own.items() if name not in LICENSE or name not in metadata}
    elif own.get("license") not in (None, metadata.get("license")):
        stale.update(LICENSE)
    if "pipeline_tag" not in own and metadata.get("pipeline_tag") == "text-generation":  # earlier cards all had it
        stale.add("pipeline_tag")
    merged = {name: value for name, value in metadata.items() if name not in stale} | own
    method = METHOD_TAGS.get(str(get_nested(metadata, "mxd", "method")))
    gone = {method, *own["tags"]}
    tags = [tag for tag in texts(metadata.get("tags")) if tag not in gone and not _LAYER_TAG.fullmatch(tag)]
    merged["tags"] = list(dict.fromkeys(tags)) + own["tags"]
    if "datasets" in metadata and "datasets" not in own:
        merged["datasets"] = [name for name in texts(metadata["datasets"]) if not _names(generated, name)]
        if not merged["datasets"]:
            del merged["datasets"]
    return merged


def _names(text: str, name: str) -> bool:
    """Whether a text has a name by itself, not as a part of a longer one."""
    return re.search(rf"(?<![\w./-]){re.escape(name)}(?![\w/-])", text) is not None


def license_of(card: str) -> dict[str, str]:
    """What a card says of its licence, of `LICENSE`.

    Raises:
        ValueError: as `update_card`.
    """
    metadata, _ = _parts(card)
    return {name: metadata[name] for name in LICENSE if isinstance(metadata.get(name), str)}


def generated_figures(card: str) -> set[str]:
    """Figures that the generated part of a card shows."""
    generated = _GENERATED.search(card[:MAX_CARD])
    return set(_FIGURE.findall(generated.group())) if generated else set()


def _parts(card: str) -> tuple[dict[str, Any], str]:
    """Metadata and text of a card that is there."""
    if len(card) > MAX_CARD:
        raise ValueError(f"the README that is there has over {MAX_CARD:,} characters: it is not updated")
    card = card.removeprefix("\ufeff")
    match = REGEX_YAML_BLOCK.search(card)
    return (_front_matter(match.group(2)), card[match.end() :]) if match else ({}, card)


def _front_matter(text: str) -> dict[str, Any]:
    what = "the metadata of the README that is there"
    if len(text) > MAX_METADATA:
        raise ValueError(f"{what} has over {MAX_METADATA:,} characters")
    try:
        _check_events(text)
        metadata = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no YAML that a card can have: {first_line(error)}") from None
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise ValueError(f"{what} must be a mapping, got {type(metadata).__name__}")
    # The client keeps metadata as attributes: such a key would replace one of its methods, or an argument.
    odd = [key for key in metadata if not isinstance(key, str) or hasattr(ModelCardData, key) or key in _ARGUMENTS]
    if odd:
        raise ValueError(f"{what} has a key that no card can have: {str(odd[0])[:80]!r}")
    return metadata


def _check_events(text: str) -> None:
    """Refuse what would take long, or more than a machine holds, once it is built: some dozen aliases of aliases, or
    thousands of lists in each other. No person writes them into a card."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has aliases (&, *)")
        if depth > MAX_DEPTH:
            raise ValueError(f"it is over {MAX_DEPTH} levels deep")


_ARGUMENTS = ("self", "ignore_metadata_errors")
