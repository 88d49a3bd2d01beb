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
LICENSE = ("license", "license_name", "license_link")

# A mark without its partner is text: a begin is never paired with an end beyond the next begin.
_GENERATED = re.compile(f"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}", re.DOTALL)
_FIGURE = re.compile(r"!\[[^\]\n]*\]\((figures/[\w-]+\.png)\)")
_LAYER_TAG = re.compile(r"mxd-layer-\d+")
_ARGUMENTS = ("self", "ignore_metadata_errors")


def update_card(existing: str, card: ModelCard, keep_license: bool = False) -> ModelCard:
    """Merge a new card into an earlier one, and keep everything that a person wrote.

    Only the text between the marks `BEGIN` and `END` is replaced; without marks, ours follows the earlier text. New
    metadata wins over old; tags are united, without those of the earlier layers and method. Comments in the metadata
    are lost.

    Args:
        existing: text of the earlier card.
        card: as `build_card` returns it.
        keep_license: whether the earlier licence wins.

    Raises:
        ValueError: the earlier card is too large, its metadata is no YAML mapping that a card can have, or `card` has
            no marks.
    """
    metadata, text = _parts(existing)
    newline = "\r\n" if "\r\n" in existing else "\n"
    generated = _GENERATED.search(card.text)
    if generated is None:
        raise ValueError("the new card has no marks: it must be one that build_card made")
    block = generated.group().replace("\r\n", "\n").replace("\n", newline)
    merged = _merged(metadata, card.data.to_dict(), keep_license)
    if _GENERATED.search(text):
        text = _GENERATED.sub(lambda _: block, text, count=1)
    else:
        text = f"{text.rstrip()}{newline * 2}{block}{newline}" if text.strip() else f"{newline}{block}{newline}"
    front = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True, line_break=newline)
    return ModelCard(f"---{newline}{front.strip()}{newline}---{newline}{text}")


def _merged(metadata: dict[str, Any], new: dict[str, Any], keep_license: bool) -> dict[str, Any]:
    """Merge old and new metadata; new values win."""
    # Numbers of an earlier evaluation must not outlive it, and the client refuses a model-index that is none.
    stale = {"mxd", "model-index"}
    if keep_license and metadata.get("license"):
        new = {name: value for name, value in new.items() if name not in LICENSE or name not in metadata}
    elif new.get("license") not in (None, metadata.get("license")):
        stale.update(LICENSE)
    if "pipeline_tag" not in new and metadata.get("pipeline_tag") == "text-generation":
        stale.add("pipeline_tag")
    merged = {name: value for name, value in metadata.items() if name not in stale} | new
    gone = {METHOD_TAGS.get(str(get_nested(metadata, "mxd", "method"))), *new["tags"]}
    tags = [tag for tag in strings_in(metadata.get("tags")) if tag not in gone and not _LAYER_TAG.fullmatch(tag)]
    merged["tags"] = list(dict.fromkeys(tags)) + new["tags"]
    return merged


def license_of(card: str) -> dict[str, str]:
    """Return what a card says of its licence.

    Raises:
        ValueError: as `update_card`.
    """
    metadata, _ = _parts(card)
    return {name: metadata[name] for name in LICENSE if isinstance(metadata.get(name), str)}


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
        metadata = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no YAML that a card can have: {first_line(error)}") from None
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise ValueError(f"{what} must be a mapping, got {type(metadata).__name__}")
    # The client stores metadata as attributes: such a key would replace one of its methods, or an argument.
    odd = [key for key in metadata if not isinstance(key, str) or hasattr(ModelCardData, key) or key in _ARGUMENTS]
    if odd:
        raise ValueError(f"{what} has a key that no card can have: {str(odd[0])[:80]!r}")
    return metadata


def _check_events(text: str) -> None:
    """Refuse YAML that would take too long or too much memory to build: aliases of aliases, and very deep lists."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has aliases (&, *)")
        if depth > MAX_DEPTH:
            raise ValueError(f"it is over {MAX_DEPTH} levels deep")
