"""Inputs and a decomposition of two layers of the tiny Llama, for the tests of the AutoModel entry points."""

import torch
from factories import SIZES, random_mxd_model

from mxd.base.pretrained_weights import record_base

LAYERS = (0, 2)
IDS = torch.arange(2, 22).reshape(2, 10)


def decomposition(base_folder, base, layers=LAYERS, **changes):
    """Random weights and buffers; the last layer has another form and as many parameters as the others."""
    units = {**SIZES, **changes}["intermediate_size"]
    model = random_mxd_model(
        layers,
        buffers=True,
        encoder_bias=False,
        base_model_name_or_path=str(base_folder),
        layer_overrides={str(layers[-1]): {"encoder_type": "glu", "intermediate_size": units // 2}},
        **changes,
    )
    record_base(model, base)
    return model


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits
