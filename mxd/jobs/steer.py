"""`mxd steer`: continue a prompt by the untouched model, and by the spliced one while experts steer it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mxd.base.forward import check_causal, check_predictions
from mxd.modeling_mxd import MxDModel, Steering, SteeringChange

from .decompositions import load_base_and_text, load_decomposition
from .use_options import SteeringOptions


def steer(options: SteeringOptions) -> dict[str, Any]:
    """Continue a prompt by the untouched model and by the steered one, with the same random numbers.

    Returns:
        {"prompt", "untouched": text, "steered": text, "steering": the changes, as a steering's JSON file has them}.

    Raises:
        ValueError: there is no such decomposition, layer, expert or file, or nothing to steer by.
    """
    decomposition = load_decomposition(options.decomposition)
    steering = _steering(options, decomposition)
    model, tokenizer, _ = load_base_and_text(decomposition, options.dtype, 2, lambda: None)
    check_causal(model)
    check_predictions(model, "steering")
    how: dict[str, Any] = {"max_new_tokens": options.new_tokens, "do_sample": options.temperature > 0}
    if options.temperature > 0:
        how["temperature"] = options.temperature
    inputs = tokenizer(options.prompt, return_tensors="pt")
    untouched, steered = continuations(decomposition, model, tokenizer, inputs, steering, options.seed, **how)
    if options.save is not None:
        steering.to_json(options.save)
    changes = [vars(change) for change in steering]
    return {"prompt": options.prompt, "untouched": untouched, "steered": steered, "steering": changes}


def continuations(
    decomposition: MxDModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Tensor],
    steering: Any,
    seed: int = 0,
    **how: Any,
) -> tuple[str, str]:
    """Return how the untouched model and the steered one continue a tokenised prompt, with the same random numbers.

    `steering` is what `MxDModel.steer` takes, `how` are arguments of `generate`.

    Raises:
        ValueError: the prompt has no tokens, or the decomposition has nothing to steer by.
    """
    start = inputs["input_ids"].shape[1]
    if not inputs["input_ids"].numel():
        raise ValueError("the prompt has no tokens: write one")
    how |= {name: tensor.to(model.device) for name, tensor in inputs.items()}
    how["pad_token_id"] = tokenizer.pad_token_id or tokenizer.eos_token_id

    def generate() -> str:
        torch.manual_seed(seed)
        tokens: Any = model.generate(**how)
        return str(tokenizer.decode(tokens[0, start:], skip_special_tokens=True))

    untouched = generate()
    with decomposition.spliced(model), decomposition.steer(model, steering):
        return untouched, generate()


def _steering(options: SteeringOptions, decomposition: MxDModel) -> Steering:
    """Return the changes of the file, and that of the named expert."""
    steering = Steering() if options.steering is None else Steering.of(options.steering)
    if options.expert is not None:
        layers = decomposition.config.layers
        if options.layer is None and len(layers) > 1:
            raise ValueError(f"the decomposition has the layers {', '.join(map(str, layers))}: say which with --layer")
        layer = layers[0] if options.layer is None else options.layer
        change = SteeringChange(layer, options.expert, options.strength, options.by, _positions(options.positions))
        steering.append(change)
    if not steering:
        raise ValueError("nothing to steer by: name an --expert, or a file with --steering")
    return steering


def _positions(text: str) -> Any:
    """Return positions of the command line: a name, `3-9` (the end is left out) or `3-`."""
    begin, dash, end = text.partition("-")
    if dash and begin.isdecimal() and (end.isdecimal() or not end):
        return [int(begin), int(end) if end else None]
    return text
