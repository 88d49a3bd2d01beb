"""Transcoders to and from other libraries: files in their formats, and the libraries themselves where installed."""

import json

import pytest
import torch
from evaluation_cases import batches
from factories import random_layer
from safetensors.torch import save_file

from mxd import SAEView, export_transcoder, faithfulness, load_transcoder, mean_threshold, transcoder_decomposition
from mxd.modeling_mxd import MxDModel

I, N, O = 16, 24, 16  # noqa: E741
KINDS = [("transcoder", 16), ("skip_transcoder", 16), ("transcoder", 12), ("skip_transcoder", 12)]


def theirs(skip=False, threshold=False, outputs=O):
    """Weights as circuit-tracer names them, and the function that they compute, by the formula."""
    w = {"W_enc": torch.randn(N, I), "b_enc": torch.randn(N), "W_dec": torch.randn(N, outputs)}
    w |= {"b_dec": torch.randn(outputs)}
    w |= {"W_skip": torch.randn(outputs, I)} if skip else {}
    w |= {"activation_function.threshold": torch.rand(N) * 2} if threshold else {}

    def run(x, k=None):
        z = x @ w["W_enc"].T + w["b_enc"]
        a = torch.where(z > w["activation_function.threshold"], z, 0) if threshold else z.relu()
        if k is not None:
            a = torch.zeros_like(a).scatter(-1, (top := a.topk(k)).indices, top.values)
        return a @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if skip else 0)

    return w, run


def save_sae_lens(folder, w, **config):
    renamed = {"activation_function.threshold": "threshold"}
    tensors = {renamed.get(name, name): tensor for name, tensor in w.items()}
    save_file({**tensors, "W_enc": w["W_enc"].T.contiguous()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": I, "d_sae": N, **config}))
    return folder


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("threshold", [False, True])
@pytest.mark.parametrize("tool", ["sae_lens", "circuit_tracer"])
def test_relu_and_jumprelu_transcoders_of_others_compute_the_same(tmp_path, tool, threshold, skip):
    w, run = theirs(skip, threshold)
    kind = ("jumprelu_" if threshold else "") + ("skip_" if skip else "") + "transcoder"
    if tool == "sae_lens":
        path = save_sae_lens(tmp_path, w, architecture=kind, apply_b_dec_to_input=False)
    else:
        save_file(w, path := tmp_path / "layer_3.safetensors")
    layer, x = load_transcoder(path), torch.randn(5, 7, I)
    torch.testing.assert_close(layer(x), run(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(load_transcoder(path, num_experts_per_tok=3)(x), run(x, 3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_sparsify_s_topk_is_ours(tmp_path, transcode, skip):
    w, run = theirs(skip)
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
    save_file({names.get(name, name): tensor for name, tensor in w.items()}, tmp_path / "sae.safetensors")
    config = {"activation": "topk", "k": 4, "transcode": transcode, "skip_connection": skip, "d_in": I}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    layer, x = load_transcoder(tmp_path), torch.randn(9, I)
    assert layer.config.num_experts_per_tok == 4
    if not transcode:
        w["b_enc"] = w["b_enc"] - w["W_enc"] @ w["b_dec"]
    torch.testing.assert_close(layer(x), run(x, 4), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("rescaled", [False, True])
def test_topk_saes_of_sae_lens_are_folded(tmp_path, centred, rescaled):
    w, _ = theirs()
    config = {"k": 4, "apply_b_dec_to_input": centred, "rescale_acts_by_decoder_norm": rescaled}
    layer = load_transcoder(save_sae_lens(tmp_path, w, architecture="topk", **config))
    x = torch.randn(9, I)
    norms = w["W_dec"].norm(dim=-1) if rescaled else torch.ones(N)
    z = ((x - w["b_dec"] if centred else x) @ w["W_enc"].T + w["b_enc"]) * norms
    a = torch.zeros_like(z).scatter(-1, (top := z.topk(4)).indices, top.values.relu()) / norms
    torch.testing.assert_close(layer(x), a @ w["W_dec"] + w["b_dec"], rtol=1e-4, atol=1e-4)


def test_what_a_transcoder_cannot_compute_is_refused_by_name(tmp_path):
    w, _ = theirs()
    cases = [
        ({"architecture": "gated"}, "architecture 'gated' is not among topk"),
        ({"architecture": "transcoder", "normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm'"),
        ({"architecture": "topk"}, "holds no transcoder that can be read: .*k"),
        ({}, "not among|holds no transcoder"),
    ]
    for config, message in cases:
        with pytest.raises(ValueError, match=message):
            load_transcoder(save_sae_lens(tmp_path, w, **config))
    for broken in (
        {"b_enc": torch.zeros(3)},
        {"W_dec": torch.zeros(2, 2)},
        {"activation_function.threshold": torch.zeros(I)},
    ):
        save_file({**w, **broken}, file := tmp_path / "layer_0.safetensors")
        with pytest.raises(ValueError, match=r"layer_0.*no transcoder|thresholds are"):
            load_transcoder(file)
    for name in w:
        save_file({key: tensor for key, tensor in w.items() if key != name}, file)
        with pytest.raises(ValueError, match=name):
            load_transcoder(file)


@pytest.mark.parametrize(("method", "outputs"), KINDS)
@pytest.mark.parametrize("tool", ["sae_lens", "circuit_tracer"])
def test_an_exported_transcoder_comes_back(tmp_path, tool, method, outputs):
    layer, x = random_layer(method, output_size=outputs, num_experts=N), torch.randn(40, I)
    how = {"index": 3, "model_name": "gpt2"}
    if tool == "circuit_tracer" and outputs != I:
        with pytest.raises(ValueError, match="equal widths, not 16 to 12"):
            export_transcoder(layer, tmp_path, tool, **how)
        return
    exact = tool == "sae_lens" and method == "transcoder" and outputs == I
    if tool == "sae_lens" and not exact:
        with pytest.raises(ValueError, match=r"threshold=mean_threshold"):
            export_transcoder(layer, tmp_path, tool, **how)
    threshold = None if exact or tool == "circuit_tracer" else mean_threshold(layer, x)
    path = export_transcoder(layer, tmp_path, tool, threshold=threshold, **how)
    again = load_transcoder(path, layer.config.num_experts_per_tok if tool == "circuit_tracer" else None)
    if threshold is None:
        torch.testing.assert_close(again(x), layer(x))
    else:  # as many latents in the mean
        active = (again.encode(x).values > 0).float().sum(-1)
        assert active.mean() == pytest.approx(layer.config.num_experts_per_tok, abs=0.1)


def test_a_mean_threshold_needs_positive_scores_only():
    layer = random_layer("transcoder")
    torch.nn.init.constant_(layer.gate.bias, -100.0)
    assert mean_threshold(layer, torch.randn(10, I)) == 0


@pytest.mark.parametrize("form", ["mxd", "mxd-glu"])
def test_an_mxd_is_not_exported(tmp_path, form):
    with pytest.raises(ValueError, match="an MxD needs its input to decode"):
        export_transcoder(random_layer(form), tmp_path, "sae_lens", index=0, model_name="m")


def test_theirs_as_a_baseline_is_evaluated_and_saved(tmp_path, tiny_llama):
    save_file(theirs(skip=True)[0], path := tmp_path / "layer_1.safetensors")
    decomposition = transcoder_decomposition({1: load_transcoder(path, 4)}, tiny_llama)
    assert decomposition.config.base_model_type == "llama"
    results = faithfulness(tiny_llama, decomposition, batches())
    assert results["layers"]["1"]["nmse"] > 0 and results["layers"]["1"]["l0"] <= 4
    decomposition.save_pretrained(tmp_path / "saved")
    x = torch.randn(3, I)
    assert torch.equal(MxDModel.from_pretrained(tmp_path / "saved").layer(1)(x), decomposition.layer(1)(x))
    save_file(theirs(threshold=True)[0], path)
    jumping = transcoder_decomposition({1: load_transcoder(path)}, tiny_llama)
    assert faithfulness(tiny_llama, jumping, batches())["layers"]["1"]["l0"] > 0
    with pytest.raises(ValueError, match="threshold is no weight of a decomposition"):
        jumping.save_pretrained(tmp_path / "jumping")


@pytest.mark.parametrize("form", ["mxd", "transcoder", "skip_transcoder"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_view_computes_what_its_layer_does(form, scaled):
    layer, x = random_layer(form), torch.randn(4, 7, I)
    scale = torch.rand(I) + 0.5 if scaled else None
    view = SAEView(layer, 3, "gpt2", input_scale=scale).to(torch.float32)
    want = layer(x * scale if scaled else x)
    coefficients = view.encode(x)
    assert coefficients.shape == (4, 7, view.cfg.d_sae)
    assert (coefficients != 0).sum(-1).max() <= layer.config.num_experts_per_tok
    torch.testing.assert_close(view.decode(coefficients), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(view(x), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(view.decode(coefficients[:2, 0], x[:2, 0]), want[:2, 0], rtol=1e-4, atol=1e-4)
    assert view.cfg.to_dict()["hook_name"] == "blocks.3.ln2.hook_normalized"
    assert view.W_enc.shape == (I, view.cfg.d_sae) and view.W_dec.shape == (view.cfg.d_sae, len(view.b_dec))
    if form == "transcoder":
        assert view.decode(coefficients[:1]).shape == (1, 7, 12)
    else:
        with pytest.raises(ValueError, match="depends on its input"):
            view.decode(coefficients[:1])


@pytest.mark.parametrize("skip", [False, True])
def test_sae_lens_and_we_read_each_other(tmp_path, skip):
    sae_lens = pytest.importorskip("sae_lens")
    layer, x = (
        random_layer("skip_transcoder" if skip else "transcoder", output_size=O, num_experts=N),
        torch.randn(40, I),
    )
    threshold = mean_threshold(layer, x) if skip else None
    folder = export_transcoder(layer, tmp_path / "ours", "sae_lens", index=3, model_name="gpt2", threshold=threshold)
    read = sae_lens.SAE.load_from_disk(folder)
    assert read.cfg.metadata.hook_name == "blocks.3.mlp.hook_in"
    torch.testing.assert_close(read(x), load_transcoder(folder)(x), rtol=1e-4, atol=1e-4)
    if not skip:
        torch.testing.assert_close(read(x), layer(x), rtol=1e-4, atol=1e-4)
    read.save_model(tmp_path / "theirs")
    torch.testing.assert_close(load_transcoder(tmp_path / "theirs")(x), read(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("skip", [False, True])
def test_circuit_tracer_and_we_read_each_other(tmp_path, skip):
    module = pytest.importorskip("circuit_tracer.transcoder.single_layer_transcoder")
    from circuit_tracer.transcoder.activation_functions import TopK

    layer, x = (
        random_layer("skip_transcoder" if skip else "transcoder", output_size=O, num_experts=N),
        torch.randn(40, I),
    )
    torch.nn.init.constant_(layer.gate.bias, 5.0)  # their TopK keeps what is negative
    file = export_transcoder(layer, tmp_path, "circuit_tracer", index=3, model_name="gpt2")
    read = module.load_relu_transcoder(str(file), 3, lazy_encoder=False, lazy_decoder=False)
    torch.testing.assert_close(read(x), load_transcoder(file)(x), rtol=1e-4, atol=1e-4)
    read.activation_function = TopK(layer.config.num_experts_per_tok)
    torch.testing.assert_close(read(x), layer(x), rtol=1e-4, atol=1e-4)
    read.to_safetensors(str(tmp_path / "theirs.safetensors"))
    again = load_transcoder(tmp_path / "theirs.safetensors", layer.config.num_experts_per_tok)
    torch.testing.assert_close(again(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["mxd", "skip_transcoder"])
def test_sae_bench_pools_what_a_view_encodes(form):
    collection = pytest.importorskip("sae_bench.sae_bench_utils.activation_collection")
    layer, x = random_layer(form), torch.randn(6, 5, I)
    pooled = collection.get_sae_meaned_activations({"class": x}, SAEView(layer, 3, "gpt2"), 4)
    view = SAEView(layer, 3, "gpt2")
    torch.testing.assert_close(pooled["class"].float(), view.encode(x).mean(1), rtol=1e-3, atol=1e-3)
