"""What the explorer asks the models: which experts are active on a text, and what steering one does to a generation."""

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import torch

from mxd.data.tokens import begin_of_row, row_of
from mxd.experts.inspection import inspect_tokens
from mxd.explorer.server import Call
from mxd.explorer.site import ExplorerSite
from mxd.hub_cards.safe_text import finite_number
from mxd.modeling_mxd.configuration_mxd import shorten

from .decompositions import load_base_and_text, load_decomposition
from .steer import continuations

MAX_TEXT, MAX_TOKENS, MAX_NEW_TOKENS, MAX_EXPERTS = 4000, 256, 200, 2000


class Playground:
    """Models that load in the background while the page is read already.

    Args:
        name: the decomposition.
        site: the explorer's.
    """

    def __init__(self, name: str, site: ExplorerSite):
        self.name, self.site = name, site
        self._loaded: Future[tuple[Any, Any, Any]] = Future()

    def load(self) -> None:
        """Begin to load the models; questions wait for them."""
        threading.Thread(target=self._load).start()

    @property
    def calls(self) -> dict[str, Call]:
        """The server's calls, by name."""
        return {"inspect": self.inspect, "steer": self.steer}

    def _load(self) -> None:
        try:
            decomposition = load_decomposition(self.name)
            model, tokenizer, _ = load_base_and_text(decomposition, "float32", 2, lambda: None)
            self._loaded.set_result((decomposition, model, tokenizer))
        except Exception as error:  # told to each question
            self._loaded.set_exception(error)

    def inspect(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Return {"tokens": text of each token, "experts": those active on them, the most unusual first}."""
        decomposition, model, tokenizer = self._loaded.result()
        layer, text = self._layer(question), _text(question, "text")
        start = begin_of_row(tokenizer)
        ids = row_of(tokenizer, text)[: len(start) + MAX_TOKENS]
        collection = self.site.collection.layers[layer]
        found = inspect_tokens(model, decomposition, ids, {layer: collection})[layer]
        active = found.coefficients > 0
        active[: len(start)] = False
        position, slot = active.nonzero(as_tuple=True)
        order = found.rarity[position, slot].argsort(descending=True, stable=True)[:MAX_EXPERTS]
        position, slot = position[order], slot[order]
        experts, values, shares, rarity = (part[position, slot] for part in found)
        relative = values / collection.maximum[experts].clamp_min(1e-30)
        columns = (part.tolist() for part in (position, experts, relative, shares, rarity))
        names = ("position", "expert", "relative", "share", "unusual")
        rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        return {"tokens": self.site.pieces.of(ids), "experts": rows}

    @torch.no_grad()
    def steer(self, question: Mapping[str, Any]) -> dict[str, str]:
        """Return {"untouched", "steered"}: the most likely continuations of a prompt."""
        decomposition, model, tokenizer = self._loaded.result()
        prompt, tokens = _text(question, "prompt"), _whole(question, "tokens")
        change: dict[str, Any] = {"layer": self._layer(question), "expert": _whole(question, "expert")}
        change |= {"strength": _number(question, "strength"), "by": str(question.get("by"))}
        how = {"max_new_tokens": min(max(1, tokens), MAX_NEW_TOKENS), "do_sample": False}
        inputs = tokenizer(prompt, return_tensors="pt")
        if inputs["input_ids"].shape[1] > MAX_TOKENS:
            raise ValueError(f"the prompt has over {MAX_TOKENS} tokens: shorten it")
        untouched, steered = continuations(decomposition, model, tokenizer, inputs, change, **how)
        return {"untouched": untouched, "steered": steered}

    def _layer(self, question: Mapping[str, Any]) -> int:
        layer = question.get("layer")
        if type(layer) is not int or layer not in self.site.collection.layers:
            raise ValueError(f"there is no layer {shorten(layer)} here")
        return layer


def _text(question: Mapping[str, Any], name: str) -> str:
    text = question.get(name)
    if isinstance(text, str):
        text = text.encode(errors="replace").decode()  # JSON may hold half of a character
    if not isinstance(text, str) or not text.strip() or len(text) > MAX_TEXT:
        raise ValueError(f"{name} must be a text of at most {MAX_TEXT} characters")
    return text


def _whole(question: Mapping[str, Any], name: str) -> int:
    value = question.get(name)
    if type(value) is not int:
        raise ValueError(f"{name} must be a whole number")
    return value


def _number(question: Mapping[str, Any], name: str) -> float:
    value = finite_number(question.get(name))
    if value is None:
        raise ValueError(f"{name} must be a number")
    return value
