"""The census: every architecture that transformers ships and that can be built without a network."""

import pytest
from census import examine
from tiny_models import CAUSAL_TYPES, OTHER_TYPES, UNBUILDABLE, VARIANTS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

WITHOUT_MLP = (
    *("mamba", "mamba2", "falcon_mamba"),  # state-space models: a layer is its mixer, and nothing in it is an MLP
    "ibert",  # integers, and a scaling factor with every tensor
    *("squeezebert", "poolformer", "levit", "patchtsmixer"),  # convolutions or mixing over another dimension
)


@pytest.mark.parametrize("model_type", [*CAUSAL_TYPES, *VARIANTS, *OTHER_TYPES])
def test_surgery(model_type):
    examined = examine(model_type)
    works = [row for row in examined if row.slots]
    assert bool(works) != (model_type in WITHOUT_MLP)
    assert all(row.reason for row in examined if not row.slots), "a layer without an MLP says why"
    assert all(row.layout for row in works), "where the pretrained weights are"


def test_every_causal_type_is_examined_or_says_why_not():
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) == {*CAUSAL_TYPES, *UNBUILDABLE}
