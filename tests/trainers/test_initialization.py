import copy
import math
import re
from types import SimpleNamespace

import pytest
import torch
from factories import GLU, mxd_model
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, inject_adapter_in_model
from peft.utils import ModulesToSaveWrapper

from mxd.base.capture import capture_mlps
from mxd.modeling_mxd import find_mlp, make_layer
from mxd.modeling_mxd.configuration_mxd import MxDLayerConfig
from mxd.trainers.initialization import (
    ActivationScales,
    calibrate,
    init_decomposition,
    init_from_pretrained,
    init_layer,
    parameter_group,
    parameter_scales,
)

START = {
    "gate_init": "data",
    "encoder_init": "random",
    "modulation_init": "random",
    "decoder_init": "zero",
    "scale_activations": True,
    "seed": 0,
}


@pytest.fixture
def calibrations(tiny_llama):
    batches = [{"input_ids": torch.randint(0, 64, (8, 16))} for _ in range(4)]

    def capture(batch):
        return capture_mlps(tiny_llama, [1], batch["input_ids"])

    return calibrate(capture, batches, tokens=400)


def model(**changes):
    return mxd_model(**{"num_experts": 64, **GLU, **changes})


@pytest.mark.parametrize("gate_init", ["data", "random"])
@pytest.mark.parametrize("modules", [["gate"], ["gate", "encoder"], ["encoder_up"]])
def test_a_layer_with_an_adapter_is_initialised_alike(calibrations, gate_init, modules):
    torch.manual_seed(0)
    plain = model().layer(1)
    wrapped = copy.deepcopy(plain)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=modules), wrapped)
    for layer in (plain, wrapped):
        torch.manual_seed(1)
        init_layer(layer, calibrations[1], gate_init)
    for name in ("gate", "encoder", "encoder_up"):
        assert torch.equal(getattr(plain, name).weight, getattr(wrapped, name).weight), name
    assert torch.equal(plain.gate.bias, wrapped.gate.bias)


def test_calibration_leaves_out_first_positions_and_padding(tiny_llama):
    ids = torch.randint(0, 64, (2, 6))
    padding = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    x, y = capture_mlps(tiny_llama, [1], ids, padding)[1]

    def capture(batch):
        return {1: (x, y)}

    measured = calibrate(capture, [{"input_ids": ids, "attention_mask": padding}], tokens=1)[1]
    kept = torch.cat([x[0, 1:], x[1, 1:3]])
    torch.testing.assert_close(measured.inputs, kept)
    assert measured.scales.input_scale == pytest.approx(kept.square().mean().sqrt().item(), rel=1e-5)
    outputs = torch.cat([y[0, 1:], y[1, 1:3]])
    assert measured.scales.output_scale == pytest.approx((outputs - outputs.mean(0)).square().mean().sqrt().item())
    assert measured.scales.output_norm == pytest.approx(outputs.square().sum(-1).mean().item())


MASSIVE_IDS = [7, 23, 41]


def calibrated(massive, factors=(1.0, 1.0), tail=0.0, dtype=torch.float32, rows=64):
    """Calibrate on random activations, whose x and y are multiplied by the factors where `massive` (rows, 16) is."""
    torch.manual_seed(1)
    ids = torch.randint(0, 7, (rows, 16))
    ids[massive] = torch.tensor(MASSIVE_IDS)[torch.arange(int(massive.sum())) % 3]
    x = torch.randn(rows, 16, 12) + 0.2
    y = (3 * torch.randn(rows, 16, 10) + 0.5) * (tail * torch.randn(rows, 16, 1)).exp()
    x, y = (
        torch.where(massive[..., None], factor * value, value).to(dtype)
        for factor, value in zip(factors, (x, y), strict=True)
    )

    def capture(batch):
        (start,) = (ids == batch["input_ids"][0]).all(-1).nonzero()[0].tolist()
        return {3: (x[start : start + 8], y[start : start + 8])}

    return calibrate(capture, [{"input_ids": part} for part in ids.split(8)], tokens=10**6)[3]


def places(share, where="anywhere", rows=64):
    mask = torch.zeros(rows, 16, dtype=torch.bool)
    if where == "column":
        mask[: int(share * rows * 15), 9] = True
    else:
        mask[:, 1:] = torch.rand(rows, 15, generator=torch.Generator().manual_seed(5)) < share
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tail", [0.0, 0.3])
@pytest.mark.parametrize("factors", [(1.0, 10.0), (1.0, 1000.0), (30.0, 1.0), (1000.0, 1000.0)])
@pytest.mark.parametrize(
    ("share", "where"), [(0.005, "anywhere"), (0.03, "anywhere"), (0.1, "anywhere"), (0.06, "column")]
)
def test_massive_tokens_change_neither_scales_nor_means(share, where, factors, tail, dtype):
    massive = places(share, where)
    plain = calibrated(massive, tail=tail, dtype=dtype)
    calibration = calibrated(massive, factors, tail, dtype)
    for name, value in vars(plain.scales).items():
        assert getattr(calibration.scales, name) == pytest.approx(value, rel=0.15), name
    torch.testing.assert_close(calibration.input_mean, plain.input_mean, rtol=0, atol=0.05)
    torch.testing.assert_close(calibration.output_mean, plain.output_mean, rtol=0, atol=0.25)
    assert calibration.inputs.float().square().sum(-1).max() <= plain.inputs.float().square().sum(-1).max()


def test_without_massive_tokens_scales_are_plain_means_over_all_tokens(caplog):
    calibration = calibrated(places(0.0), tail=0.3)
    assert len(calibration.inputs) == 64 * 15
    x = calibration.inputs
    assert calibration.scales.input_scale == pytest.approx(x.square().mean().sqrt().item(), rel=1e-5)
    torch.testing.assert_close(calibration.input_mean, x.mean(0))
    assert not caplog.records


@pytest.mark.parametrize(("factors", "side"), [((1.0, 100.0), "output"), ((100.0, 1.0), "input")])
def test_massive_tokens_are_reported(factors, side, caplog):
    calibrated(places(0.03), factors)
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith("layer 3: ") and f"a massive {side}" in message
    share, times = float(message.split()[2]), float(re.search(r"typically (\d+) times", message)[1])
    assert share == pytest.approx(100 * places(0.03)[:, 1:].double().mean().item(), rel=0.05)
    assert 5_000 < times < 20_000
    assert set(re.search(r"ids: ([\d, ]+)", message)[1].split(", ")) == set(map(str, MASSIVE_IDS))


def test_one_massive_token_that_is_not_finite_is_refused():
    massive = places(0.0)
    massive[5, 5] = True
    for factors in ((math.inf, 1.0), (1.0, math.inf), (1.0, math.nan)):
        with pytest.raises(ValueError, match="layer 3 are not finite"):
            calibrated(massive, factors)


def test_constant_outputs_are_refused():
    x = torch.randn(1, 4, 3)
    with pytest.raises(ValueError, match="layer 2 are constant"):
        calibrate(lambda batch: {2: (x, 0 * x)}, [{"input_ids": torch.zeros(1, 4, dtype=torch.long)}], tokens=1)


def test_calibration_refuses_an_empty_text():
    with pytest.raises(ValueError, match="no tokens"):
        calibrate(lambda batch: {}, [], tokens=1)


def test_calibration_refuses_activations_that_are_not_finite():
    x = torch.full((1, 4, 3), float("inf"))
    with pytest.raises(ValueError, match="layer 2"):
        calibrate(lambda batch: {2: (x, x)}, [{"input_ids": torch.zeros(1, 4, dtype=torch.long)}], tokens=1)


def test_gate_from_data_points_from_the_mean_to_inputs(calibrations):
    layer = model().layer(1)
    calibration = calibrations[1]
    init_layer(layer, calibration, "data")
    directions = torch.nn.functional.normalize(calibration.inputs - calibration.input_mean, dim=-1)
    cosines = torch.nn.functional.normalize(layer.gate.weight, dim=-1) @ directions.T
    torch.testing.assert_close(cosines.max(-1).values, torch.ones(64))
    at_mean = layer.gate(calibration.input_mean)
    torch.testing.assert_close(at_mean, torch.zeros(64), rtol=0, atol=1e-5)
    indices = layer.encode(calibration.inputs).indices
    assert len(indices.unique()) > 0.9 * 64


def test_gate_from_data_works_with_fewer_tokens_than_experts(calibrations):
    layer = model(num_experts=2000).layer(1)
    init_layer(layer, calibrations[1], "data")
    assert torch.isfinite(layer.gate.weight).all()


def test_scaled_start_sees_inputs_of_unit_scale(calibrations):
    layer, calibration = model().layer(1), calibrations[1]
    init_layer(layer, calibration, "random")
    bound = 1 / 16**0.5 / calibration.scales.input_scale
    assert layer.gate.weight.abs().max().item() == pytest.approx(bound, rel=0.05)
    assert layer.encoder.weight.abs().max().item() == pytest.approx(bound, rel=0.05)
    torch.testing.assert_close(layer.output_bias, calibration.output_mean)
    assert not layer.decoder.weight.any()


def test_unscaled_start_is_the_authors_own(calibrations):
    layer = model().layer(1)
    init_layer(layer, calibrations[1], "random", scale_activations=False)
    assert layer.gate.weight.abs().max() <= 1 / 16**0.5
    assert not layer.output_bias.any()


def test_pretrained_encoder_gives_the_mlps_hidden_units(tiny_llama, calibrations):
    decomposition = model()
    init_decomposition(
        decomposition, tiny_llama, calibrations, SimpleNamespace(**START | {"encoder_init": "pretrained"})
    )
    x, mlp = torch.randn(5, 16), tiny_llama.model.layers[1].mlp
    expected = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    torch.testing.assert_close(decomposition.layer(1).hidden(x), expected)


def test_pretrained_encoder_and_decoder_are_the_mlp_where_the_experts_sum_to_one(tiny_llama, calibrations):
    decomposition = model()
    start = START | {"encoder_init": "pretrained", "decoder_init": "pretrained"}
    init_decomposition(decomposition, tiny_llama, calibrations, SimpleNamespace(**start))
    x, mlp = torch.randn(5, 16), tiny_llama.model.layers[1].mlp
    torch.testing.assert_close(decomposition.layer(1).combine(torch.ones(5, 16), x), mlp(x))


@pytest.mark.parametrize("changes", [{"intermediate_size": 39}, {"encoder_type": "mlp"}])
def test_pretrained_encoder_of_another_form_is_refused(tiny_llama, changes):
    config = {"hidden_size": 16, "output_size": 16, "intermediate_size": 40, "num_experts": 8, "num_experts_per_tok": 2}
    layer = make_layer(MxDLayerConfig(**{**config, "hidden_act": "silu", "encoder_type": "glu", **changes}))
    with pytest.raises(ValueError, match="layer 1"):
        init_from_pretrained(layer, find_mlp(tiny_llama, 1))


def test_unit_modulation_starts_around_one(tiny_llama, calibrations):
    decomposition = model(num_experts=256, num_experts_per_tok=16)
    init_decomposition(decomposition, tiny_llama, calibrations, SimpleNamespace(**START | {"modulation_init": "unit"}))
    layer = decomposition.layer(1)
    summed = layer.sum_experts(layer.encode(calibrations[1].inputs))
    assert summed.mean().item() == pytest.approx(1, rel=0.1)


ADAPTERS = {
    None: None,
    "lora": LoraConfig(r=2, target_modules=["gate", "encoder", "decoder"], init_lora_weights=False),
    "lora_bias": LoraConfig(r=2, target_modules=["gate", "encoder_up", "decoder"], lora_bias=True, bias="all"),
    "dora": LoraConfig(r=2, target_modules=["gate", "encoder"], use_dora=True, init_lora_weights=False),
    "ia3": IA3Config(target_modules=["gate", "encoder", "decoder"], feedforward_modules=["decoder"]),
    "skip": LoraConfig(r=2, target_modules=["skip"], init_lora_weights=False),
    "modules_to_save": "gate",
}


def adapted(layer, adapter):
    """Wrap a layer's linears as PEFT does."""
    if adapter == "modules_to_save":
        layer.gate = ModulesToSaveWrapper(layer.gate, "default")
    elif adapter is not None:
        inject_adapter_in_model(copy.deepcopy(ADAPTERS[adapter]), layer)
    return layer.double()


@pytest.mark.parametrize(
    ("method", "decay", "adapter"),
    [
        *((method, decay, None) for method in ("mxd", "transcoder", "skip_transcoder") for decay in (0.0, 0.1)),
        *(("mxd", 0.0, adapter) for adapter in ("lora", "lora_bias", "dora", "ia3", "modules_to_save")),
        ("skip_transcoder", 0.0, "skip"),
    ],
)
def test_scaled_learning_rates_equal_training_on_scaled_activations(method, decay, adapter):
    """Adam on (x, y) with scaled rates is Adam on (x / s_x, (y − μ) / s_y) with s_x, s_y and μ folded in after."""
    sizes = MxDLayerConfig(6, 5, 9, 12, 3, "silu", "glu", method)
    scales, mean = ActivationScales(input_scale=0.2, output_scale=30.0), torch.randn(5, dtype=torch.float64)
    mean *= not decay  # what is folded into b decays with it
    plain, raw = (adapted(make_layer(sizes), adapter) for _ in range(2))
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter)
    factors = parameter_scales(raw, scales)
    with torch.no_grad():
        for (name, parameter), source in zip(raw.named_parameters(), plain.parameters(), strict=True):
            parameter.copy_(source * factors[name])
        raw.output_bias += mean
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 5, dtype=torch.float64)
    x_raw, y_raw = x * scales.input_scale, y * scales.output_scale + mean
    groups = [
        parameter_group([parameter], factors[name], 1.0, {"lr": 1e-2, "eps": 1e-8, "weight_decay": decay})
        for name, parameter in raw.named_parameters()
    ]
    for layer, optimizer, inputs, targets, unit in (
        (plain, torch.optim.AdamW(plain.parameters(), lr=1e-2, eps=1e-8, weight_decay=decay), x, y, 1.0),
        (raw, torch.optim.AdamW(groups), x_raw, y_raw, scales.output_scale),
    ):
        for _ in range(20):
            optimizer.zero_grad()
            ((layer(inputs) - targets) / unit).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(raw(x_raw), plain(x) * scales.output_scale + mean)


@pytest.mark.parametrize(
    "adapter",
    [
        LoHaConfig(r=2, target_modules=["gate"]),
        LoKrConfig(r=2, target_modules=["gate"]),
        OFTConfig(oft_block_size=2, target_modules=["encoder"]),
    ],
    ids=lambda adapter: type(adapter).__name__,
)
def test_an_adapter_whose_scale_is_unknown_is_refused(adapter):
    layer = make_layer(MxDLayerConfig(6, 6, 8, 12, 3, "silu", "glu", "mxd"))
    inject_adapter_in_model(adapter, layer)
    with pytest.raises(
        ValueError, match=r"no rule scales the learning rate of (gate|encoder)\..*scale_activations=False"
    ):
        parameter_scales(layer, ActivationScales(input_scale=0.2))
    assert set(parameter_scales(layer, ActivationScales()).values()) == {1.0}
