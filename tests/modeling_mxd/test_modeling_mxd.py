import json
from pathlib import Path

import pytest
import torch
from factories import randomise
from safetensors import safe_open

from mxd import modeling_mxd
from mxd.modeling_mxd import MxDConfig, MxDLayer, MxDModel, MxDOutput, SurgeryError, TranscoderLayer

SIZES = {
    "hidden_size": 16,
    "output_size": 12,
    "intermediate_size": 20,
    "num_experts": 24,
    "num_experts_per_tok": 4,
}
FORMS = {
    "mxd": {},
    "mxd-glu": {"encoder_type": "glu", "hidden_act": "silu"},
    "transcoder": {"method": "transcoder"},
    "skip_transcoder": {"method": "skip_transcoder"},
    "no-bias": {"gate_bias": False, "encoder_bias": False, "output_bias": False},
}
each_form = pytest.mark.parametrize("form", FORMS)


def config(form="mxd", layers=(2,), **changes):
    return MxDConfig(layers=list(layers), **{**SIZES, **FORMS[form], **changes})


def random_model(form="mxd", layers=(2,), **changes):
    """Every parameter and every buffer random: a start of zeros would hide what was not loaded."""
    return randomise(MxDModel(config(form, layers, **changes)), std=0.5, buffers=True)


def assert_bit_equal(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert second[name].dtype == tensor.dtype, name
        assert torch.equal(second[name], tensor), name


def load(folder, **kwargs):
    model, info = MxDModel.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layers", [(2,), (7, 0)], ids=str)
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, form, dtype, layers):
    model = random_model(form, layers).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_bit_equal(model, loaded)
    assert loaded.dtype == dtype
    assert loaded.config.layers == list(layers)
    x = torch.randn(3, 16).to(dtype)
    for layer in layers:
        assert torch.equal(loaded(x, layer=layer).output, model(x, layer=layer).output)
    assert [p.requires_grad for p in loaded.parameters()] == [True] * len(list(model.parameters()))


@each_form
def test_json_safetensors_and_the_code_are_written(tmp_path, form):
    random_model(form).save_pretrained(tmp_path)
    code = {path.name for path in Path(modeling_mxd.__file__).parent.glob("*.py")} - {"__init__.py"}
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"} | code
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mxd"


@each_form
def test_the_file_holds_parameters_and_buffers_of_the_layers(tmp_path, form):
    model = random_model(form, (0, 3))
    model.save_pretrained(tmp_path)
    names = set()
    for shard in tmp_path.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            names |= set(file.keys())
    assert names == {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    for layer in (0, 3):
        assert {f"layers.{layer}.expert_frequency", f"layers.{layer}.expert_mean"} <= names


@each_form
def test_sharded(tmp_path, form):
    model = random_model(form, (0, 3))
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    names = {path.name for path in tmp_path.iterdir() if path.suffix != ".py"}
    assert len([name for name in names if name.endswith(".safetensors")]) > 2
    assert names - {name for name in names if name.endswith(".safetensors")} == {
        "config.json",
        "model.safetensors.index.json",
    }
    assert_bit_equal(model, load(tmp_path))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16], ids=str)
def test_loading_in_another_dtype_converts(tmp_path, stored, wanted):
    model = random_model().to(stored)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype=wanted)
    assert {p.dtype for p in loaded.parameters()} == {wanted}
    assert_bit_equal(model.to(wanted), loaded)


def test_a_second_round_trip_changes_nothing(tmp_path):
    random_model(layers=(0, 3)).save_pretrained(tmp_path / "a")
    load(tmp_path / "a").save_pretrained(tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "model-00002-of-00002.safetensors" in names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("sizes", [("5GB", None), (None, "5GB"), ("5GB", "5GB"), (None, None)])
@pytest.mark.parametrize("layers", [((0, 2), (0, 2)), ((2,), (0, 2)), ((0, 2), (2,))])
def test_what_is_saved_last_into_a_folder_is_loaded(tmp_path, sizes, layers):
    for size, some in zip(sizes, layers, strict=True):
        model = random_model(layers=some)
        model.save_pretrained(tmp_path, **({} if size is None else {"max_shard_size": size}))
    assert_bit_equal(load(tmp_path), model)


def test_weights_of_two_savings_are_refused(tmp_path):
    random_model(layers=(0, 2)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds model.safetensors and model.safetensors.index.json"):
        MxDModel.from_pretrained(tmp_path)


def test_layers_of_different_form(tmp_path):
    overrides = {"3": {"method": "transcoder", "num_experts": 30}, "5": {"encoder_type": "glu", "output_bias": False}}
    model = random_model(layers=(0, 3, 5), layer_overrides=overrides)
    assert [type(layer) for layer in model.layers.values()] == [MxDLayer, TranscoderLayer, MxDLayer]
    assert model.layer(3).gate.out_features == 30
    assert model.layer(5).encoder_up is not None
    assert model.layer(5).output_bias is None
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_bit_equal(model, loaded)
    assert loaded.num_parameters() == loaded.config.num_parameters == model.config.num_parameters


@pytest.mark.parametrize("dropped", ["gate.weight", "decoder.weight", "expert_mean"])
def test_what_is_missing_in_the_file_is_refused_by_name(tmp_path, dropped):
    model, name = random_model(), f"layers.2.{dropped}"
    state = {key: tensor for key, tensor in model.state_dict().items() if key != name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=f"{name} is missing"):
        MxDModel.from_pretrained(tmp_path)


@each_form
def test_the_documented_start(form):
    model = MxDModel(config(form, (0, 3)))
    for layer in (0, 3):
        module = model.layer(layer)
        assert not module.expert_frequency.any()
        assert not module.expert_mean.any()
        zero = [module.decoder.weight] if isinstance(module, MxDLayer) else [module.decoder]
        random = [module.gate.weight]
        if isinstance(module, MxDLayer):
            random += [module.modulation, module.encoder.weight]
        elif module.skip is not None:
            zero.append(module.skip.weight)
        if module.output_bias is not None:
            zero.append(module.output_bias)
        assert not any(tensor.any() for tensor in zero)
        assert all((tensor != 0).float().mean() > 0.9 for tensor in random)
        assert all(tensor.abs().max() <= 16**-0.5 for tensor in random)
        assert not model(torch.randn(5, 16), layer=layer).output.any()
    assert not torch.equal(model.layer(0).gate.weight, model.layer(3).gate.weight)


@each_form
def test_the_start_follows_the_seed(form):
    torch.manual_seed(3)
    first = MxDModel(config(form))
    torch.manual_seed(3)
    assert_bit_equal(first, MxDModel(config(form)))
    assert not torch.equal(MxDModel(config(form)).layer(2).gate.weight, first.layer(2).gate.weight)


def test_forward_of_the_only_layer():
    model, x = random_model(), torch.randn(2, 3, 16)
    out = model(x)
    assert isinstance(out, MxDOutput)
    assert out.output.shape == (2, 3, 12)
    assert torch.equal(out.output, model.layer(2)(x))
    assert torch.equal(model(hidden_states=x, layer=2).output, out.output)
    assert torch.equal(out[0], out["output"])


def test_forward_of_several_layers_asks_which():
    model, x = random_model(layers=(7, 0)), torch.randn(3, 16)
    with pytest.raises(ValueError, match=r"layers \[7, 0\]: say which with layer="):
        model(x)
    for layer in (7, 0):  # also 0, which is an index and not "none"
        assert torch.equal(model(x, layer=layer).output, model.layer(layer)(x))
    assert not torch.equal(model(x, layer=7).output, model(x, layer=0).output)


@pytest.mark.parametrize("layer", [1, -1, 20])
def test_a_layer_that_is_not_there(layer):
    model = random_model(layers=(7, 0))
    message = rf"layer {layer} is not in this decomposition, which has layers \[7, 0\]"
    with pytest.raises(KeyError, match=message):
        model.layer(layer)
    with pytest.raises(KeyError, match=message):
        model(torch.randn(3, 16), layer=layer)


@pytest.mark.parametrize("empty", [MxDConfig(), MxDConfig(layers=[])], ids=["default", "empty list"])
def test_without_layers_there_is_no_model(empty):
    with pytest.raises(ValueError, match=r"config\.layers is empty"):
        MxDModel(empty)


@each_form
def test_every_parameter_gets_a_gradient(form):
    model = random_model(form)
    model(torch.randn(50, 16)).output.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(("dtype", "fits"), [(torch.bfloat16, True), (torch.float32, False)], ids=str)
def test_the_memory_is_weighed_in_the_dtype_of_the_load(tmp_path, monkeypatch, dtype, fits):
    model = random_model()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("mxd.modeling_mxd.configuration_mxd.machine_memory", lambda: 2 * model.config.num_parameters)
    if fits:
        assert MxDModel.from_pretrained(tmp_path, dtype=dtype).dtype == dtype
    else:
        with pytest.raises(ValueError, match="GiB"):
            MxDModel.from_pretrained(tmp_path, dtype=dtype)


def test_a_splice_that_is_refused_casts_no_layer(tiny_llama):
    size = tiny_llama.config.hidden_size
    sizes = {"hidden_size": size, "output_size": size}
    model = MxDModel(config(layers=(0, 99), **sizes))
    tiny_llama.to(torch.bfloat16)
    for splice in (model.splice, lambda base: model.spliced(base).__enter__()):
        with pytest.raises(SurgeryError, match="layer 99 is out of range"):
            splice(tiny_llama)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
