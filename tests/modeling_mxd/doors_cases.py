"""What the tests of the doors share: a decomposition of two layers of the tiny Llama, and inputs."""

import torch
from torch import nn

from mxd.base.pretrained_weights import record_base
from mxd.modeling_mxd import MxDConfig, MxDModel

LAYERS = (0, 2)
IDS = torch.arange(2, 22).reshape(2, 10)


def decomposition(base_folder, base, layers=LAYERS, **changes):
    """Random weights everywhere; the last layer is of another form, and as large as the others."""
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_experts": 24, "num_experts_per_tok": 4, **changes}
    config = MxDConfig(
        layers=list(layers),
        encoder_bias=False,
        base_model_name_or_path=str(base_folder),
        layer_overrides={
            str(layers[-1]): {"encoder_type": "glu", "intermediate_size": sizes["intermediate_size"] // 2}
        },
        **sizes,
    )
    model = MxDModel(config)
    for tensor in (*model.parameters(), *model.buffers()):
        nn.init.normal_(tensor, std=0.3)
    record_base(model, base)
    return model


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits
