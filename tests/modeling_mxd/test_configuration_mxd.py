import json
from dataclasses import asdict, replace

import pytest
import torch
from factories import FORMS
from transformers import AutoConfig, PretrainedConfig

from mxd.modeling_mxd import MxDConfig, MxDLayerConfig, MxDModel, make_layer
from mxd.modeling_mxd import modeling_mxd as model_module
from mxd.modeling_mxd.configuration_mxd import FORMAT_VERSION

VALID = {"hidden_size": 16, "output_size": 12, "intermediate_size": 20, "num_experts": 24, "num_experts_per_tok": 4}
SIZES = tuple(VALID)
REFUSED = [
    *((name, value) for name in SIZES for value in (0, -1, 1.5, 4.0, "4", True, [4], 2**31)),
    *((name, None) for name in ("hidden_size", "num_experts", "num_experts_per_tok")),
    ("num_experts_per_tok", 25),
    ("method", "mixture"),
    ("method", None),
    ("encoder_type", "swiglu"),
    ("encoder_type", ["mlp"]),
    ("hidden_act", "no_such"),
    ("hidden_act", None),
    ("hidden_act", []),
    ("hidden_act", "prelu"),
    ("hidden_act", "xielu"),
    *((name, value) for name in ("gate_bias", "encoder_bias", "output_bias") for value in (1, None, "yes")),
]


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_a_refusal_names_the_field_the_value_and_the_layer(field, value):
    with pytest.raises(ValueError, match=rf"^{field} ") as refusal:
        MxDLayerConfig(**{**VALID, field: value})
    assert str(value) in str(refusal.value)
    with pytest.raises(ValueError, match=rf"^{field} "):
        MxDConfig(**{**VALID, field: value})
    with pytest.raises(ValueError, match=rf"^layer 7: {field} "):
        MxDConfig(layers=[2, 7], layer_overrides={"7": {field: value}}, **VALID)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": [1, -1]}, "layers must be whole numbers from 0 to 2147483647, got -1"),
        ({"layers": [True]}, "layers must be whole numbers from 0 to 2147483647, got True"),
        ({"layers": ["1"]}, "layers must be whole numbers from 0 to 2147483647, got '1'"),
        ({"layers": [1.0]}, "layers must be whole numbers from 0 to 2147483647, got 1.0"),
        ({"layers": [3, 5, 3]}, "layers names layer 3 more than once"),
        ({"layers": None}, "layers must be a list"),
        ({"layers": 8}, "layers must be a list"),
        ({"layers": "8"}, "layers must be a list"),
        ({"site": "fc1,,fc2"}, "site must be 'mlp'.* got 'fc1,,fc2'"),
        ({"site": "../mlp"}, "site must be 'mlp'.* got '../mlp'"),
        ({"site": 8}, "site must be 'mlp'.* got 8"),
        ({"stack": "model/layers"}, "stack must be None.* got 'model/layers'"),
        ({"layers": [1], "layer_overrides": {"2": {}}}, "layer_overrides names layer '2'"),
        ({"layers": [1], "layer_overrides": {"01": {}}}, "layer_overrides names layer '01'"),
        ({"layers": [1], "layer_overrides": {"1": {"experts": 3}}}, r"layer_overrides\['1'\] .*'experts'"),
        ({"layers": [1], "layer_overrides": {"1": 3}}, "layer_overrides must map"),
        ({"layers": [1], "layer_overrides": [3]}, "layer_overrides must map"),
        (
            {"layers": [1], "layer_overrides": {"1": {"num_experts": 3}}},
            "layer 1: num_experts_per_tok .4. .*num_experts .3.",
        ),
    ],
)
def test_refuses_layers_that_make_no_sense(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        MxDConfig(**{**VALID, **fields})


def test_defaults_follow_the_hidden_size():
    layer = MxDConfig(layers=[0], hidden_size=48).layer(0)
    assert (layer.output_size, layer.intermediate_size) == (48, 192)


def test_a_layer_has_the_shared_fields_and_its_own():
    overrides = {"9": {"num_experts": 100, "method": "transcoder"}}
    config = MxDConfig(layers=[8, 9], hidden_act="silu", layer_overrides=overrides, **VALID)
    shared = MxDLayerConfig(hidden_act="silu", **VALID)
    assert config.layer(8) == shared
    assert config.layer(9) == replace(shared, num_experts=100, method="transcoder")
    assert config.num_parameters == config.layer(8).num_parameters + config.layer(9).num_parameters
    for absent in (7, "8"):
        with pytest.raises(KeyError, match=r"not in this decomposition, which has layers \[8, 9\]"):
            config.layer(absent)


def test_the_config_keeps_no_reference_to_what_it_was_given():
    layers, overrides = [8, 9], {"9": {"num_experts": 100}}
    config = MxDConfig(layers=layers, layer_overrides=overrides, **VALID)
    layers.append(10)
    overrides["9"]["num_experts"] = 1
    assert config.layers == [8, 9] and config.layer(9).num_experts == 100


@pytest.fixture
def config():
    return MxDConfig(
        layers=[3, 11, 2],
        base_model_name_or_path="some/model",
        base_model_revision="0123abc",
        hidden_act="silu",
        encoder_type="glu",
        gate_bias=False,
        layer_overrides={"11": {"num_experts": 100, "output_bias": False}, "2": {"method": "skip_transcoder"}},
        **VALID,
    )


def test_to_dict_and_back_is_equal(config):
    again = MxDConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert MxDConfig.from_dict(again.to_dict()) == again  # the first to_dict writes transformers' version into it
    assert [again.layer(layer) for layer in again.layers] == [config.layer(layer) for layer in config.layers]


def test_json_round_trip_is_equal(config, tmp_path):
    config.save_pretrained(tmp_path)
    again = MxDConfig.from_pretrained(tmp_path)
    assert [again.layer(layer) for layer in (3, 11, 2)] == [config.layer(layer) for layer in (3, 11, 2)]
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "mxd" and written["layers"] == again.layers == [3, 11, 2]
    assert written["base_model_name_or_path"] == again.base_model_name_or_path == "some/model"
    assert written["base_model_revision"] == again.base_model_revision == "0123abc"
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == written


def test_a_config_file_with_nonsense_is_refused(config, tmp_path):
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "num_experts": -5}))
    with pytest.raises(ValueError, match=r"^num_experts must be"):
        MxDConfig.from_pretrained(tmp_path)


def test_from_layer_configs_resolves_to_the_same_and_shares_what_it_can():
    first = MxDLayerConfig(**VALID)
    layer_configs = {4: first, 1: replace(first, num_experts=99, hidden_act="relu"), 7: replace(first)}
    config = MxDConfig.from_layer_configs(layer_configs, base_model_name_or_path="some/model")
    assert config.layers == [4, 1, 7] and config.base_model_name_or_path == "some/model"
    assert {layer: config.layer(layer) for layer in config.layers} == layer_configs
    assert config.layer_overrides == {"1": {"num_experts": 99, "hidden_act": "relu"}}
    assert asdict(first).items() <= config.to_dict().items()


def test_from_layer_configs_refuses_no_layers():
    with pytest.raises(ValueError, match="layer_configs is empty"):
        MxDConfig.from_layer_configs({})


def test_check_memory_weighs_the_dtype_and_names_the_largest_layer(monkeypatch):
    config = MxDConfig(layers=[3, 5], layer_overrides={"5": {"num_experts": 1000}}, **VALID)
    monkeypatch.setattr("mxd.modeling_mxd.configuration_mxd.machine_memory", lambda: 2 * config.num_parameters)
    config.check_memory(torch.bfloat16)
    with pytest.raises(ValueError, match=r"num_experts \(1000\).* of layer 5") as refusal:
        config.check_memory(torch.float32)
    assert "hidden_size (16)" in str(refusal.value) and "intermediate_size (20)" in str(refusal.value)


@pytest.mark.parametrize(
    ("groups", "opened", "message"),
    [
        (4, None, r"num_expert_groups \(4\) and num_groups_per_tok \(None\) go together"),
        (None, 2, r"num_expert_groups \(None\) and num_groups_per_tok \(2\) go together"),
        (0, 1, "num_expert_groups must be a whole number"),
        ("4", 1, "num_expert_groups must be a whole number"),
        (2**40, 1, "num_expert_groups must be a whole number"),
        (4, True, "num_groups_per_tok must be a whole number"),
        (4, 1.5, "num_groups_per_tok must be a whole number"),
        (4, 5, r"num_groups_per_tok \(5\) must not exceed num_expert_groups \(4\)"),
        (7, 3, r"num_expert_groups \(7\) groups of 2 are more than num_experts \(10\) fill: use 5"),
        (99, 3, r"num_expert_groups \(99\) groups of 1 are more .* use 10"),
        (4, 2, r"num_groups_per_tok \(2\) groups may hold 4 experts, fewer than num_experts_per_tok \(5\)"),
    ],
)
def test_refuses_groups_that_make_no_sense(groups, opened, message):
    fields = {**VALID, "num_experts": 10, "num_experts_per_tok": 5}
    for build in (MxDLayerConfig, MxDConfig):
        with pytest.raises(ValueError, match=message):
            build(**fields, num_expert_groups=groups, num_groups_per_tok=opened)


def test_groups_cost_a_router():
    plain = MxDLayerConfig(**{**VALID, "num_experts": 10, "num_experts_per_tok": 3})
    routed = MxDLayerConfig(**{**vars(plain), "num_expert_groups": 4, "num_groups_per_tok": 2})
    assert routed.num_parameters == plain.num_parameters + 4 * (plain.hidden_size + 1)
    assert routed.expert_group_size == 3 and plain.expert_group_size == 10


@pytest.mark.parametrize("field", ["num_experts", "intermediate_size"])
def test_check_memory_refuses_a_million_by_a_million(field):
    config = MxDConfig(layers=[0], **{**VALID, "hidden_size": 10**6, field: 10**6})
    with pytest.raises(ValueError, match=r"needs [\d,.]+ GiB .*1000000.*of layer 0"):
        config.check_memory(torch.float32)


def no_allocation(*args):
    raise AssertionError("a layer was allocated")


HUGE = {"hidden_size": 10**6, "output_size": 10**6, "intermediate_size": 10**6}


def test_a_model_that_no_machine_holds_is_refused_before_allocation(monkeypatch):
    monkeypatch.setattr(model_module, "make_layer", no_allocation)
    with pytest.raises(ValueError, match=r"needs [\d,.]+ GiB .* of layer 4"):
        MxDModel(MxDConfig(layers=[4], **{**VALID, **HUGE}))


def test_a_folder_that_no_machine_holds_is_refused_before_allocation(monkeypatch, tmp_path):
    MxDModel(MxDConfig(layers=[4], **VALID)).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, **HUGE}))
    monkeypatch.setattr(model_module, "make_layer", no_allocation)
    with pytest.raises(ValueError, match=r"needs [\d,.]+ GiB .* of layer 4"):
        MxDModel.from_pretrained(tmp_path)


def test_a_folder_whose_weights_have_other_sizes_is_refused(tmp_path):
    MxDModel(MxDConfig(layers=[4], **VALID)).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "num_experts": 30}))
    with pytest.raises(ValueError, match=r"has the shape \[24.*by the config it must be \[30"):
        MxDModel.from_pretrained(tmp_path)


def stored(tmp_path, **changes):
    """A folder with a config.json that is so changed; None removes a field."""
    MxDConfig(layers=[4], **VALID).save_pretrained(tmp_path)
    values = {**json.loads((tmp_path / "config.json").read_text()), **changes}
    values = {name: value for name, value in values.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


def test_every_save_writes_the_format_version(tmp_path):
    MxDModel(MxDConfig(layers=[4], **VALID)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["format_version"] == FORMAT_VERSION
    assert MxDConfig.from_pretrained(tmp_path).format_version == MxDConfig().format_version == FORMAT_VERSION


@pytest.mark.parametrize("load", [MxDConfig.from_pretrained, MxDModel.from_pretrained, AutoConfig.from_pretrained])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": None}, "was saved by a version before the first release: decompose again"),
        (
            {"format_version": FORMAT_VERSION + 1, "a_field_of_tomorrow": 1},
            rf"newer mxd \(format {FORMAT_VERSION + 1}, this one reads {FORMAT_VERSION}\): update with pip",
        ),
        ({"format_version": "1"}, "format_version must be a whole number"),
        ({"a_field_of_nobody": 1}, "'a_field_of_nobody' is not a field of a decomposition's config"),
        ({"num_labels": 10**12}, "'num_labels' is not a field"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "'quantization_config' is not a field"),
        ({"check_memory": 1}, "'check_memory' is not a field"),
    ],
)
def test_other_formats_and_unknown_fields_are_refused(tmp_path, load, changes, message):
    with pytest.raises(ValueError, match=message):
        load(stored(tmp_path, **changes))


def test_an_unknown_field_is_refused_when_built():
    with pytest.raises(ValueError, match="'num_expert' is not a field"):
        MxDConfig(layers=[4], num_expert=3)


def test_fields_that_transformers_and_its_trainer_write_are_accepted(tmp_path):
    # What transformers 4.56 writes, the special tokens that Trainer aligns, and the whole of to_dict().
    written = {
        "torch_dtype": "bfloat16", "transformers_version": "4.56.0", "use_cache": False, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "architectures": ["MxDModel"], "tie_word_embeddings": False,
    }  # fmt: skip
    config = MxDConfig.from_pretrained(stored(tmp_path, **written))
    assert config.layer(4) == MxDLayerConfig(**VALID)
    again = MxDConfig.from_dict({**PretrainedConfig().to_dict(), **config.to_dict()})
    assert again.layer(4) == config.layer(4)


def test_auto_classes_pass_on_what_is_not_the_configs(tmp_path):
    folder = stored(tmp_path)
    given = {"layers": [4], "attn_implementation": "eager"}
    config, unused = AutoConfig.from_pretrained(folder, return_unused_kwargs=True, **given)
    assert given.items() <= unused.items()
    assert not unused.keys() & {"_from_auto", "name_or_path"}
    assert config.layers == [4]


@pytest.mark.parametrize("changes", [{}, {"gate_bias": False, "encoder_bias": False, "output_bias": False}])
@pytest.mark.parametrize("groups", [{}, {"num_expert_groups": 6, "num_groups_per_tok": 2}])
@pytest.mark.parametrize("form", FORMS)
def test_shapes_and_parameters_are_those_of_the_layer(form, groups, changes):
    config = MxDLayerConfig(**VALID, **FORMS[form], **groups, **changes)
    layer = make_layer(config)
    assert config.weight_shapes == {name: list(value.shape) for name, value in layer.state_dict().items()}
    assert config.num_parameters == sum(parameter.numel() for parameter in layer.parameters())
