import numpy as np
import pytest
import torch
from evaluation_cases import decomposition
from reference import dense_coefficients
from scipy.sparse import issparse
from tiny_models import tiny_config
from transformers import AutoModel, AutoModelForCausalLM

from mxd.base.capture import capture_mlps
from mxd.evaluation import (
    expert_representation,
    input_representation,
    neuron_representation,
    output_representation,
    pool_features,
)
from mxd.modeling_mxd import find_mlp


@pytest.fixture
def texts():
    """Texts of several lengths, BOS (id 0) first."""
    return [[0, *torch.randint(2, 64, (length,)).tolist()] for length in (3, 9, 1, 9, 4, 6)]


def representations(model, mxd, layer=1):
    site = find_mlp(model, layer)
    return {
        "x": input_representation(site),
        "z": neuron_representation(site),
        "y": output_representation(site),
        "a": expert_representation(mxd.layer(layer)),
    }


def by_hand(model, mxd, text, include_first, pooling, layer=1):
    """The same of one text, without padding, without batches."""
    hidden = []
    down = model.get_submodule(f"model.layers.{layer}.mlp.down_proj")
    with down.register_forward_pre_hook(lambda _, args: hidden.append(args[0])):
        x, y = capture_mlps(model, [layer], torch.tensor([text]))[layer]
    features = {"x": x[0], "z": hidden[0][0].detach(), "y": y[0], "a": dense_coefficients(mxd.layer(layer), x[0])}
    kept = {name: feature[0 if include_first else 1 :].double() for name, feature in features.items()}
    return {name: (part.mean(0) if pooling == "mean" else part.amax(0)).detach().numpy() for name, part in kept.items()}


@pytest.mark.parametrize("include_first", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_pooled_features_are_those_of_each_text_by_itself(tiny_llama, texts, pooling, include_first):
    mxd = decomposition()
    pooled = pool_features(
        tiny_llama, 1, texts, representations(tiny_llama, mxd), pooling=pooling, include_first=include_first,
        batch_tokens=16,
    )  # fmt: skip
    assert {name: value.shape for name, value in pooled.items()} == {
        "x": (6, 16),
        "z": (6, 40),
        "y": (6, 16),
        "a": (6, 24),
    }
    assert issparse(pooled["a"]) and all(value.dtype == np.float32 for value in pooled.values())
    for index, text in enumerate(texts):
        expected = by_hand(tiny_llama, mxd, text, include_first, pooling)
        for name, value in pooled.items():
            found = value[[index]].toarray()[0] if name == "a" else value[index]
            assert found == pytest.approx(expected[name], rel=1e-4, abs=1e-5), (name, index)
    assert 0 < pooled["a"].nnz < 6 * 24 and pooled["a"].min() == 0


def test_one_pass_serves_all_and_leaves_the_model_as_it_was(tiny_llama, texts):
    passes = []
    tiny_llama.register_forward_pre_hook(lambda *_: passes.append(1))
    tiny_llama.train()
    pool_features(tiny_llama, 1, texts, representations(tiny_llama, decomposition()))
    assert len(passes) == 1 and tiny_llama.training


def test_batches_change_nothing(tiny_llama, texts):
    mxd = decomposition()
    small, large = (
        pool_features(tiny_llama, 1, texts, representations(tiny_llama, mxd), batch_tokens=tokens)
        for tokens in (1, 1000)
    )
    for name in small:
        assert abs(small[name] - large[name]).max() < 1e-4


def test_neurons_of_a_transposed_mlp_with_biases():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("gpt2")).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3) if "mlp" in name else None
    hidden = []
    text = [3, 5, 7, 11]
    found = pool_features(model, 0, [text], {"z": neuron_representation(find_mlp(model, 0))}, include_first=True)["z"]
    with model.transformer.h[0].mlp.c_proj.register_forward_pre_hook(lambda _, args: hidden.append(args[0])):
        model(torch.tensor([text]))
    assert found[0] == pytest.approx(hidden[0][0].mean(0).detach().numpy(), rel=1e-4, abs=1e-5)


def test_neurons_that_cannot_be_had_are_refused(tiny_llama, texts):
    mixture = AutoModelForCausalLM.from_config(tiny_config("mixtral"))
    with pytest.raises(ValueError, match=r"hidden units of layer 0 \(mixture-of-experts\) cannot be read"):
        neuron_representation(find_mlp(mixture, 0))
    neurons = neuron_representation(find_mlp(tiny_llama, 1))
    tiny_llama.model.layers[1].mlp.register_forward_hook(lambda _, args, output: 2 * output)
    with pytest.raises(ValueError, match="the weights of layer 1 do not give its outputs"):
        pool_features(tiny_llama, 1, texts, {"z": neurons})


def test_bad_input_is_refused_before_the_first_pass(tiny_llama, texts):
    found = representations(tiny_llama, decomposition())
    tiny_llama.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="pooling must be one of mean, max, got 'sum'"):
        pool_features(tiny_llama, 1, texts, found, pooling="sum")
    with pytest.raises(ValueError, match="no token to pool over"):
        pool_features(tiny_llama, 1, [*texts, [0]], found)
    with pytest.raises(ValueError, match="no texts"):
        pool_features(tiny_llama, 1, [], found)


def test_a_layer_that_runs_several_times_is_refused(texts):
    model = AutoModel.from_config(tiny_config("albert")).eval()
    with pytest.raises(ValueError, match="layer 0 has not one activation for each token"):
        pool_features(model, 0, texts, {"x": input_representation(find_mlp(model, 0))})
