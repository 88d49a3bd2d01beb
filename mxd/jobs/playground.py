"""What the explorer asks the models: which experts are active on a text, and what steering one does to a generation."""

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import torch

from mxd.data.tokens import token_ids, without_bos
from mxd.evaluation.collection import Collection
from mxd.evaluation.expert_use import captured_activations
from mxd.explorer.server import Call
from mxd.explorer.site import ExplorerSite
from mxd.hub_cards.safe_text import finite_number

from .decompositions import load_base_and_text, load_decomposition

MAX_TEXT, MAX_TOKENS, MAX_NEW_TOKENS = 4000, 256, 200


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

    @torch.no_grad()
    def inspect(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Return {"tokens": text of each token, "experts": those active on them, the most unusual first}."""
        decomposition, model, tokenizer = self._loaded.result()
        number, text = self._layer(question), _text(question, "text")
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids = start + without_bos(tokenizer, token_ids(tokenizer, [text])[0])[:MAX_TOKENS]
        captured, _ = captured_activations(model, decomposition, {"input_ids": torch.tensor([ids])})
        x, y = captured[number]
        layer, collection = decomposition.layer(number), self.site.collection.layers[number]
        values, experts = (part[0].cpu() for part in layer.encode(x))
        unusual = -(collection.at_least(experts, values).clamp_min(0.5) / collection.tokens).log2()
        relative = values / collection.maximum[experts]
        found = [
            {"expert": e, "position": p, "relative": r, "unusual": u, "share": 0.0}
            for p, line in enumerate(zip(experts.tolist(), relative.tolist(), unusual.tolist(), values.tolist()))
            for e, r, u, v in zip(*line) if v > 0 and p >= len(start)
        ]
        found.sort(key=lambda one: -one["unusual"])
        return {"tokens": self.site.pieces.of(ids), "experts": found}

    def steer(self, question: Mapping[str, Any]) -> dict[str, str]:
        """Return {"untouched", "steered"}: continuations of a prompt, each the most likely one."""
        from mxd.modeling_mxd.steering import Steering, SteeringChange
        decomposition, model, tokenizer = self._loaded.result()
        layer, prompt = self._layer(question), _text(question, "prompt")
        expert, strength = _number(question, "expert"), float(_number(question, "strength"))
        how = {"max_new_tokens": min(max(1, int(_number(question, "tokens"))), MAX_NEW_TOKENS), "do_sample": False}
        change = SteeringChange(layer, int(expert), strength, by=str(question.get("by")))
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        with torch.no_grad():
            untouched = model.generate(**inputs, **how)
            with decomposition.spliced(model), decomposition.steer(model, Steering([change])):
                steered = model.generate(**inputs, **how)
        start = inputs["input_ids"].shape[1]
        texts = (tokenizer.decode(one[0, start:], skip_special_tokens=True) for one in (untouched, steered))
        return dict(zip(("untouched", "steered"), texts, strict=True))

    def _layer(self, question: Mapping[str, Any]) -> int:
        layer = question.get("layer")
        if layer not in self.site.collection.layers:
            raise ValueError(f"there is no layer {layer!r} here")
        return int(layer)


def _text(question: Mapping[str, Any], name: str) -> str:
    text = question.get(name)
    if not isinstance(text, str) or not text.strip() or len(text) > MAX_TEXT:
        raise ValueError(f"{name} must be a text of at most {MAX_TEXT} characters")
    return text


def _number(question: Mapping[str, Any], name: str) -> float:
    value = finite_number(question.get(name))
    if value is None:
        raise ValueError(f"{name} must be a number")
    return value
