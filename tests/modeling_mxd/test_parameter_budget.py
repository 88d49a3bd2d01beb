import pytest

from mxd.modeling_mxd import MxDConfig, MxDLayerConfig, make_layer
from mxd.trainers.parameter_budget import (
    num_experts_matching_transcoder,
    num_latents_matching_transcoder,
    transcoder_parameters,
)

BIASES = ("gate_bias", "encoder_bias", "output_bias")


@pytest.mark.parametrize("without", [(), *((name,) for name in BIASES), BIASES])
@pytest.mark.parametrize("encoder_type", ["mlp", "glu"])
@pytest.mark.parametrize("method", ["mxd", "transcoder", "skip_transcoder"])
def test_num_parameters_is_what_the_layer_has(method, encoder_type, without):
    config = MxDLayerConfig(7, 5, 11, 13, 3, method=method, encoder_type=encoder_type, **dict.fromkeys(without, False))
    assert config.num_parameters == sum(parameter.numel() for parameter in make_layer(config).parameters())


def test_transcoder_parameters_by_hand():
    assert transcoder_parameters(2, 3, 4) == 4 * 2 + 4 + 4 * 3 + 3


def test_gpt2_has_the_published_number_of_experts():
    experts = num_experts_matching_transcoder(768, 768, 3072, 32, "mlp")
    assert experts == 21490
    config = MxDConfig(layers=[8], hidden_size=768, num_experts=experts)
    assert config.num_parameters == pytest.approx(38e6, rel=0.01)


@pytest.mark.parametrize(("inputs", "outputs", "units", "multiplier"), [(64, 48, 100, 16), (96, 96, 250, 8)])
def test_glu_form_is_within_one_expert_of_the_budget(inputs, outputs, units, multiplier):
    budget = transcoder_parameters(inputs, outputs, multiplier * inputs)
    experts = num_experts_matching_transcoder(inputs, outputs, units, multiplier, "glu")
    config = MxDLayerConfig(inputs, outputs, units, experts, 4, encoder_type="glu")
    assert 0 <= budget - config.num_parameters < inputs + outputs + 1


@pytest.mark.parametrize(("inputs", "outputs", "units", "multiplier"), [(64, 48, 100, 16), (96, 96, 250, 8)])
def test_mlp_form_counts_the_encoder_bias_at_the_width_of_the_transcoder(inputs, outputs, units, multiplier):
    budget = transcoder_parameters(inputs, outputs, multiplier * inputs)
    experts = num_experts_matching_transcoder(inputs, outputs, units, multiplier, "mlp")
    config = MxDLayerConfig(inputs, outputs, units, experts, 4)
    counted = config.num_parameters - units + multiplier * inputs
    assert 0 <= budget - counted < inputs + outputs + 1


@pytest.mark.parametrize("skip", [False, True])
def test_latents_of_a_skip_transcoder_pay_for_the_skip(skip):
    budget = transcoder_parameters(64, 48, 16 * 64)
    latents = num_latents_matching_transcoder(64, 48, 16, skip)
    method = "skip_transcoder" if skip else "transcoder"
    spent = MxDLayerConfig(64, 48, 1, latents, 4, method=method).num_parameters
    assert 0 <= budget - spent < (64 + 48 + 1 if skip else 1)


def test_a_budget_too_small_is_refused():
    with pytest.raises(ValueError, match=r"transcoder of 1 x 64 latents has .* raise the multiplier"):
        num_experts_matching_transcoder(64, 64, 256, 1, "mlp")
    with pytest.raises(ValueError, match="intermediate_size 256"):
        num_experts_matching_transcoder(64, 64, 256, 3, "glu")
    with pytest.raises(ValueError, match="multiplier 0 leaves no latent"):
        num_latents_matching_transcoder(64, 64, 0, skip=False)
    with pytest.raises(ValueError, match="multiplier 0 leaves no latent beside the skip matrix"):
        num_latents_matching_transcoder(64, 64, 0, skip=True)
