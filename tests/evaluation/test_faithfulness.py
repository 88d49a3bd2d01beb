import math

import pytest
import torch
from accelerate import cpu_offload
from evaluation_cases import activations, approximate, batches, decomposition, exact, nmse_with, numbers, pad
from reference import dense_coefficients
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from mxd.base.capture import capture_mlps
from mxd.base.forward import ZeroMLP
from mxd.evaluation import (
    UntouchedLosses,
    ablation_curve,
    count_expert_use,
    faithfulness,
    measure_expert_statistics,
    recovered_share,
)
from mxd.modeling_mxd import MxDConfig, MxDModel, SurgeryError, spliced_mlps

LAYER_KEYS = {
    "nmse", "nmse_without_first", "fvu", "fvu_without_first", "l0", "dead_experts", "expert_share",
    "specialised_share", "expert_entropy", "max_expert_frequency", "frequent_experts",
    "clipped_expert_share", "clipped_specialised_share",
}  # fmt: skip
LOSS_KEYS = {"untouched", "spliced", "zero_ablated", "rise", "rise_interval", "recovered"}


def measured(model, layers=(1,)):
    """A decomposition with statistics of rows other than those it is evaluated on."""
    mxd = approximate(model, layers)
    measure_expert_statistics(model, mxd, batches(count=3))
    return mxd


def test_an_exact_replacement(tiny_llama):
    results = faithfulness(tiny_llama, exact(tiny_llama, layers=(0, 2)), batches())
    for row in results["layers"].values():
        assert max(row["nmse"], row["fvu"], row["nmse_without_first"], row["fvu_without_first"]) < 1e-10
        assert (row["l0"], row["dead_experts"], row["frequent_experts"], row["max_expert_frequency"]) == (4, 0, 4, 1)
        assert row["expert_entropy"] == pytest.approx(1)
        assert row["clipped_expert_share"] == pytest.approx(0, abs=1e-6) == row["clipped_specialised_share"]
        # Experts that never change carry nothing.
        assert row["expert_share"] == pytest.approx(0, abs=1e-6) == row["specialised_share"]
    assert results["always_on"] == {"0": dict.fromkeys("0123", 1), "2": dict.fromkeys("0123", 1)}
    loss = results["cross_entropy"]
    assert loss["spliced"] == pytest.approx(loss["untouched"], rel=1e-6)
    assert loss["zero_ablated"] != pytest.approx(loss["untouched"], rel=1e-3)
    assert loss["recovered"] == pytest.approx(1, abs=1e-4)
    assert results["kl"] == pytest.approx(0, abs=1e-6)
    assert results["top1_agreement"] == 1


def test_encoder_decoder_models_are_refused():
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    model = BartForConditionalGeneration(
        BartConfig(vocab_size=64, encoder_attention_heads=2, decoder_attention_heads=2, **sizes)
    )
    mxd = MxDModel(MxDConfig(layers=[1], stack="decoder", hidden_size=16, num_experts=24, num_experts_per_tok=4))
    for measure in (faithfulness, ablation_curve):
        with pytest.raises(ValueError, match="BartForConditionalGeneration is an encoder–decoder model"):
            measure(model, mxd, batches())
    with pytest.raises(ValueError, match="encoder–decoder"):
        UntouchedLosses(model, batches())


def test_a_model_whose_weights_are_all_offloaded(tiny_llama):
    rows, mxd = batches(), exact(tiny_llama, layers=(1,))
    expected = numbers(faithfulness(tiny_llama, mxd, rows))
    cpu_offload(tiny_llama, execution_device="cpu")
    assert next(tiny_llama.parameters()).is_meta
    assert numbers(faithfulness(tiny_llama, mxd, rows)) == pytest.approx(expected, abs=1e-5)


def test_a_layer_of_zeros(tiny_llama):
    start = MxDModel(MxDConfig(layers=[1], hidden_size=16, num_experts=24, num_experts_per_tok=4))  # D and b are zero
    results = faithfulness(tiny_llama, start, batches())
    loss, row = results["cross_entropy"], results["layers"]["1"]
    assert loss["spliced"] == loss["zero_ablated"] != loss["untouched"]
    assert loss["recovered"] == 0
    assert row["nmse"] == row["nmse_without_first"] == 1
    assert math.isnan(row["expert_share"]) and math.isnan(row["specialised_share"])  # nothing is explained


def test_model_metrics_are_those_of_plain_forwards(tiny_llama):
    (batch,), mxd = batches(count=1), measured(tiny_llama, layers=(0, 2))
    ids = batch["input_ids"]

    @torch.no_grad()
    def loss_and_log_p():
        output = tiny_llama(ids, labels=ids)  # transformers' own mean next-token loss
        return output.loss.item(), output.logits[:, :-1].double().log_softmax(-1)

    untouched, log_p = loss_and_log_p()
    with mxd.spliced(tiny_llama):
        spliced, log_q = loss_and_log_p()
    for layer in (0, 2):
        tiny_llama.model.layers[layer].mlp.down_proj.register_forward_hook(lambda *_: torch.zeros(3, 7, 16))
    ablated, _ = loss_and_log_p()
    for layer in (0, 2):
        tiny_llama.model.layers[layer].mlp.down_proj._forward_hooks.clear()

    results = faithfulness(tiny_llama, mxd, [batch])
    expected = {"untouched": untouched, "spliced": spliced, "zero_ablated": ablated}
    expected |= {"rise": spliced - untouched, "recovered": recovered_share(untouched, spliced, ablated)}
    low, high = results["cross_entropy"].pop("rise_interval")
    assert low < results["cross_entropy"]["rise"] < high
    assert results["cross_entropy"] == pytest.approx(expected, rel=1e-4, nan_ok=True)
    assert results["kl"] == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-4)
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
    assert results["top1_agreement"] == pytest.approx(agreement) and 0 < agreement < 1


@torch.no_grad()
def test_layer_errors_are_of_the_untouched_models_activations(tiny_llama):
    rows, mxd = batches(), measured(tiny_llama, layers=(0, 2))
    results = faithfulness(tiny_llama, mxd, rows)
    for index in (0, 2):
        x, y = activations(tiny_llama, index, rows)
        rest = torch.ones(len(rows), 3, 7, dtype=torch.bool)
        rest[..., 0] = False
        for suffix, kept in (("", slice(None)), ("_without_first", rest.flatten())):
            error, target = (mxd.layer(index)(x) - y)[kept].double(), y[kept].double()
            nmse = (error.square().sum(-1) / target.square().sum(-1)).mean()
            fvu = error.square().sum() / (target - target.mean(0)).square().sum()
            row = results["layers"][str(index)]
            assert row[f"nmse{suffix}"] == pytest.approx(nmse.item(), rel=1e-5)
            assert row[f"fvu{suffix}"] == pytest.approx(fvu.item(), rel=1e-5)


def transcoder(model, rows, method):
    """One that explains a part, NMSE < 1, without which no share is defined: the mean, and a little of the experts."""
    mxd = decomposition(method=method)
    layer = mxd.layer(1)
    nn.init.normal_(layer.decoder, std=0.05)
    if layer.skip is not None:
        nn.init.normal_(layer.skip.weight, std=0.01)
    layer.output_bias.data.copy_(activations(model, 1, rows)[1].mean(0) / 2)
    measure_expert_statistics(model, mxd, batches(count=3))
    return mxd


@pytest.mark.parametrize("method", ["mxd", "transcoder", "skip_transcoder"])
@pytest.mark.parametrize("frequency", [0.0, 0.1, 0.25, 1.0])
def test_shares_are_those_of_brute_force(tiny_llama, method, frequency):
    rows = batches()
    mxd = measured(tiny_llama) if method == "mxd" else transcoder(tiny_llama, rows, method)
    layer, (x, y) = mxd.layer(1), activations(tiny_llama, 1, rows)
    specialised = layer.expert_frequency <= frequency
    assert frequency not in (0.1, 0.25) or 0 < specialised.sum() < 24
    nmse, without_experts, without_specialised = (
        nmse_with(layer, x, y, layer.expert_mean, replaced)
        for replaced in (torch.zeros(24).bool(), torch.ones(24).bool(), specialised)
    )
    results = faithfulness(tiny_llama, mxd, rows, specialised_frequency=frequency)
    row = results["layers"]["1"]
    assert row["nmse"] == pytest.approx(nmse, rel=1e-5) and nmse < 1
    assert row["expert_share"] == pytest.approx((without_experts - nmse) / (1 - nmse), abs=1e-5)
    assert row["specialised_share"] == pytest.approx((without_specialised - nmse) / (1 - nmse), abs=1e-5)
    assert abs(row["expert_share"]) > 1e-3
    if frequency == 1.0:
        assert row["specialised_share"] == pytest.approx(row["expert_share"], abs=1e-6)
    assert results["settings"]["specialised_frequency"] == frequency
    active = (dense_coefficients(layer, x) > 0).float().mean(0)
    assert row["frequent_experts"] == (active > frequency).sum()


def test_clipped_shares_are_those_of_brute_force(tiny_llama):
    rows, mxd = batches(), measured(tiny_llama)
    layer, (x, y) = mxd.layer(1), activations(tiny_llama, 1, rows)
    layer.expert_mean[:12] *= 20  # so that some tokens' errors without the experts' choice are over 1
    everything = [torch.zeros(24).bool(), torch.ones(24).bool(), layer.expert_frequency <= 0.25]
    nmse, without_experts, without_specialised = (
        nmse_with(layer, x, y, layer.expert_mean, replaced, most=1) for replaced in everything
    )
    row = faithfulness(tiny_llama, mxd, rows)["layers"]["1"]
    assert row["clipped_expert_share"] == pytest.approx((without_experts - nmse) / (1 - nmse), abs=1e-5)
    assert row["clipped_specialised_share"] == pytest.approx((without_specialised - nmse) / (1 - nmse), abs=1e-5)
    assert row["clipped_expert_share"] <= 1 < row["expert_share"]


def test_any_batching_gives_the_same(tiny_llama):
    rows, mxd = batches(count=4), measured(tiny_llama, layers=(0, 2))
    whole = {"input_ids": torch.cat([batch["input_ids"] for batch in rows])}
    expected = numbers(faithfulness(tiny_llama, mxd, [whole]))
    assert numbers(faithfulness(tiny_llama, mxd, rows)) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert numbers(faithfulness(tiny_llama, mxd, iter(rows))) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def tiny_gpt2():
    """Absolute positions, unlike llama's."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2, n_positions=32, initializer_range=0.3,
                        bos_token_id=0, eos_token_id=1)  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("padding", [{"left": 4}, {"right": 4}, {"left": 1, "right": 2, "rows": 2, "token": 63}])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_changes_nothing(tiny_llama, kind, padding):
    model = tiny_llama if kind == "llama" else tiny_gpt2()
    rows, mxd = batches(), measured(model, layers=(0, 2))
    expected = faithfulness(model, mxd, rows)
    padded = faithfulness(model, mxd, [pad(batch, **padding) for batch in rows])
    assert numbers(padded) == pytest.approx(numbers(expected), rel=1e-4, abs=1e-5)
    assert all(map(math.isfinite, numbers(expected).values()))
    assert padded["settings"]["tokens"] == expected["settings"]["tokens"] == 42


def test_structure_and_settings(tiny_llama):
    results = faithfulness(
        tiny_llama, measured(tiny_llama, layers=(0, 2)), batches(), settings={"text": "a book"}, progress=False
    )
    assert set(results) == {"layers", "always_on", "cross_entropy", "kl", "top1_agreement", "settings"}
    assert set(results["layers"]) == {"0", "2"}
    assert all(set(row) == LAYER_KEYS for row in results["layers"].values())
    assert set(results["cross_entropy"]) == LOSS_KEYS
    settings = results["settings"]
    assert settings.pop("positions").startswith("all but padding")
    assert settings == {
        "tokens": 42, "rows": 6, "expert_statistics": "training tokens", "specialised_frequency": 0.25,
        "dtype": "float32", "text": "a book",
    }  # fmt: skip


def test_experts_never_measured_are_measured_here_and_nothing_is_written(tiny_llama):
    rows, mxd, twin = batches(), decomposition(layers=(0, 2)), decomposition(layers=(0, 2))
    twin.load_state_dict(mxd.state_dict())
    results = faithfulness(tiny_llama, mxd, rows)
    assert "evaluated tokens" in results["settings"]["expert_statistics"]
    assert not any(mxd.layer(i).expert_frequency.any() or mxd.layer(i).expert_mean.any() for i in (0, 2))
    measure_expert_statistics(tiny_llama, twin, rows)
    assert numbers(faithfulness(tiny_llama, twin, rows)) == pytest.approx(numbers(results), rel=1e-5, nan_ok=True)
    with pytest.raises(ValueError, match=r"layer 0 have never been measured.* give a list or a DataLoader"):
        faithfulness(tiny_llama, mxd, iter(rows))
    twin.layer(2).expert_frequency.zero_()
    source = faithfulness(tiny_llama, twin, rows)["settings"]["expert_statistics"]
    assert source.startswith("training tokens; for layers 2: the evaluated tokens")


@pytest.mark.parametrize("is_measured", [True, False])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no held-out tokens"),
        ([{"input_ids": torch.zeros(0, 5, dtype=torch.long)}], r"at least one token, got \(0, 5\)"),
        ([{"input_ids": torch.zeros(2, 0, dtype=torch.long)}], r"at least one token, got \(2, 0\)"),
        ([{"input_ids": torch.zeros(5, dtype=torch.long)}], r"at least one token, got \(5,\)"),
        ([{"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.zeros(1, 3)}], "every position is padding"),
        ([{"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.ones(1, 2)}], "shape of input_ids"),
    ],
)
def test_nothing_to_measure_on_is_refused(tiny_llama, rows, message, is_measured):
    mxd = measured(tiny_llama) if is_measured else decomposition()
    with pytest.raises(ValueError, match=message):
        faithfulness(tiny_llama, mxd, rows)


def test_rows_of_one_token_have_no_next_token(tiny_llama):
    results = faithfulness(tiny_llama, measured(tiny_llama), batches(tokens=1))
    assert math.isnan(results["cross_entropy"]["untouched"]) and math.isnan(results["kl"])
    assert math.isnan(results["layers"]["1"]["nmse_without_first"]) and results["layers"]["1"]["nmse"] > 0


def state(*models):
    """Every module object by path, its mode, its hooks; every tensor's value."""
    modules = [(name, module, module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
               for model in models for name, module in model.named_modules()]  # fmt: skip
    return modules, [value.clone() for model in models for value in model.state_dict().values()]


class Broken(Exception):
    pass


@pytest.mark.parametrize("moment", ["untouched", "spliced", "batches", "none"])
def test_models_are_identical_afterwards(tiny_llama, monkeypatch, moment):
    mxd, rows = measured(tiny_llama, layers=(0, 2)), batches()
    tiny_llama.train()
    tiny_llama.model.layers[1].eval()  # frozen by somebody: a mode of its own
    mxd.train()
    before = state(tiny_llama, mxd)
    layer = mxd.layer(2)
    if moment in ("untouched", "spliced"):
        name = {"untouched": "encode", "spliced": "forward"}[moment]
        monkeypatch.setattr(layer, name, lambda *_: (_ for _ in ()).throw(Broken))
    if moment == "batches":
        rows = (batch if index == 0 else (_ for _ in ()).throw(Broken) for index, batch in enumerate(rows))
    if moment == "none":
        faithfulness(tiny_llama, mxd, rows)
    else:
        with pytest.raises(Broken):
            faithfulness(tiny_llama, mxd, rows)
    monkeypatch.undo()
    modules, tensors = state(tiny_llama, mxd)
    assert all(now[1] is was[1] and now == was for now, was in zip(modules, before[0], strict=True))
    assert all(torch.equal(now, was) for now, was in zip(tensors, before[1], strict=True))
    assert not any(parameter.grad is not None for parameter in mxd.parameters())


def test_the_untouched_model_runs_once_a_batch(tiny_llama):
    mxd, runs = measured(tiny_llama), []
    with mxd.spliced(tiny_llama):
        pass  # surgery is verified once for a model
    tiny_llama.register_forward_pre_hook(lambda *_: runs.append(type(tiny_llama.model.layers[1].mlp).__name__))
    faithfulness(tiny_llama, mxd, batches(count=2))
    assert runs == ["LlamaMLP", "MxDLayer", "ZeroMLP"] * 2


@pytest.mark.parametrize("measure", [faithfulness, measure_expert_statistics])
def test_no_gradient_graph_is_built(tiny_llama, monkeypatch, measure):
    mxd, seen = decomposition(), []
    tiny_llama.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    encode = mxd.layer(1).encode
    monkeypatch.setattr(mxd.layer(1), "encode", lambda x: seen.append(torch.is_grad_enabled()) or encode(x))
    measure(tiny_llama, mxd, batches())
    assert len(seen) >= 4 and not any(seen)


def test_a_model_that_does_not_fit_is_refused_before_anything_runs(tiny_llama):
    mxd = decomposition()
    with mxd.spliced(tiny_llama):
        pass  # surgery is verified once for a model
    tiny_llama.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(SurgeryError, match="maps 16 to 16 dimensions"):
        faithfulness(tiny_llama, decomposition(hidden_size=8), batches())
    with pytest.raises(SurgeryError, match="layer 7 is out of range"):
        faithfulness(tiny_llama, decomposition(layers=(7,)), batches())
    with mxd.spliced(tiny_llama), pytest.raises(SurgeryError, match="already replaced"):
        faithfulness(tiny_llama, mxd, batches())


@pytest.mark.parametrize("mxd_dtype", [torch.float32, torch.bfloat16])
def test_a_model_in_bfloat16(tiny_llama, mxd_dtype):
    rows = batches()
    expected = faithfulness(tiny_llama, exact(tiny_llama), rows)["cross_entropy"]["untouched"]
    results = faithfulness(tiny_llama.bfloat16(), exact(tiny_llama).to(mxd_dtype), rows)
    assert results["settings"]["dtype"] == "bfloat16"
    assert results["layers"]["1"]["nmse"] < 1e-3
    assert results["cross_entropy"]["untouched"] == pytest.approx(expected, rel=0.05)
    assert results["cross_entropy"]["spliced"] == pytest.approx(results["cross_entropy"]["untouched"], rel=0.02)


def test_zero_mlp():
    x = torch.randn(2, 3, 5, dtype=torch.bfloat16)
    y = ZeroMLP(7)(x)
    assert y.shape == (2, 3, 7) and y.dtype == x.dtype and not y.any()


def test_the_routed_experts_are_what_is_measured():
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4, max_position_embeddings=32,
        )
    ).eval()  # fmt: skip
    rows, mxd = batches(count=1), decomposition(site="mlp.experts")
    with torch.no_grad():
        x, y = capture_mlps(model, [1], rows[0]["input_ids"], site="mlp.experts")[1]
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        nmse = ((mxd.layer(1)(x) - y).square().sum(-1) / y.square().sum(-1)).mean()
        with spliced_mlps(model, {1: ZeroMLP(16)}, site="mlp.experts"):
            loss = model(rows[0]["input_ids"], labels=rows[0]["input_ids"]).loss
    found = faithfulness(model, mxd, rows)
    assert found["layers"]["1"]["nmse"] == pytest.approx(nmse.item(), rel=1e-4)
    assert found["cross_entropy"]["zero_ablated"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["cross_entropy"]["untouched"] != pytest.approx(loss.item(), rel=1e-5)
    assert ablation_curve(model, mxd, rows)["zero_ablated"] == pytest.approx(loss.item(), rel=1e-5)
    assert UntouchedLosses(model, rows, ablated=mxd.config).zero_ablated(mxd.config) == pytest.approx(
        loss.item(), rel=1e-5
    )
    assert count_expert_use(model, mxd, rows)[1].tokens == rows[0]["input_ids"].numel()
