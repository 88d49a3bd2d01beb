"""Put a new card over an earlier one that a person, or a stranger, may have written in."""

import re
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from mxd.modeling_mxd.loading import first_line

from .card import BEGIN, END, METHOD_TAGS
from .safe_text import get_nested, strings_in

MAX_CARD = 1_000_000  # characters
MAX_METADATA = 100_000
MAX_DEPTH = 30

# A mark without its partner is text: a begin is never paired with an end beyond the next begin.
_GENERATED = re.compile(f"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}", re.DOTALL)
_FIGURE = re.compile(r"!\[[^\]\n]*\]\((figures/[\w-]+\.png)\)")
_LAYER_TAG = re.compile(r"mxd-layer-\d+")


def update_card(existing: str, card: ModelCard) -> ModelCard:
    """Merge a new card into an earlier one, and keep everything that a person wrote.

    Only the text between the marks `BEGIN` and `END` is replaced; without marks, ours follows the earlier text. New
    metadata wins over old; tags are united, without those of the earlier layers and method. Comments in the metadata
    are lost.

    Args:
        existing: text of the earlier card.
        card: as `build_card` returns it.

    Raises:
        ValueError: the earlier card is too large, its metadata is no YAML mapping that a card can have, or `card` has
            no marks.
    """
    metadata, text = _parts(existing)
    generated = _GENERATED.search(card.text)
    if generated is None:
        raise ValueError("the new card has no marks: it must be one that build_card made")
    if _GENERATED.search(text):
        text = _GENERATED.sub(lambda _: generated.group(), text, count=1)
    else:
        text = f"{text.rstrip()}\n\n{generated.group()}\n"
    front = yaml.safe_dump(_merged(metadata, card.data.to_dict()), sort_keys=False, allow_unicode=True)
    return ModelCard(f"---\n{front}---\n{text}")


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Merge old and new metadata; new values win."""
    # Numbers of an earlier evaluation must not outlive it, and the client refuses a model-index that is none.
    stale = {"mxd", "model-index"}
    if new.get("license") not in (None, old.get("license")):
        stale |= {"license", "license_name", "license_link"}
    gone = {METHOD_TAGS.get(str(get_nested(old, "mxd", "method"))), *new["tags"]}
    tags = [tag for tag in strings_in(old.get("tags")) if tag not in gone and not _LAYER_TAG.fullmatch(tag)]
    kept = {name: value for name, value in old.items() if name not in stale}
    return kept | new | {"tags": list(dict.fromkeys(tags)) + new["tags"]}


def generated_figures(card: str) -> set[str]:
    """Return the figures that our part of a card shows."""
    generated = _GENERATED.search(card[:MAX_CARD])
    return set(_FIGURE.findall(generated.group())) if generated else set()


def _parts(card: str) -> tuple[dict[str, Any], str]:
    """Split a card into metadata and text."""
    if len(card) > MAX_CARD:
        raise ValueError(f"the README that is there has over {MAX_CARD:,} characters: it is not updated")
    card = card.removeprefix("\ufeff")
    match = REGEX_YAML_BLOCK.search(card)
    return (_read_metadata(match.group(2)), card[match.end() :]) if match else ({}, card)


def _read_metadata(text: str) -> dict[str, Any]:
    what = "the metadata of the README that is there"
    if len(text) > MAX_METADATA:
        raise ValueError(f"{what} has over {MAX_METADATA:,} characters")
    try:
        _check_events(text)
        metadata = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{what} is no YAML that a card can have: {first_line(error)}") from None
    if not isinstance(metadata, dict):
        raise ValueError(f"{what} must be a mapping, got {type(metadata).__name__}")
    for key in metadata:
        # The client stores metadata as attributes: such a key would replace one of its methods, or an argument.
        if not isinstance(key, str) or hasattr(ModelCardData, key) or key in ("self", "ignore_metadata_errors"):
            raise ValueError(f"{what} has a key that no card can have: {str(key)[:80]!r}")
    return metadata


def _check_events(text: str) -> None:
    """Refuse YAML that would take too long or too much memory to build."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH or isinstance(event, yaml.AliasEvent):
            raise ValueError(f"it has aliases (&, *), or over {MAX_DEPTH} levels")
