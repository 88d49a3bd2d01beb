"""Where the spliced model's weights are, and in which form: dtypes, devices, disk, quantised, checkpointing."""

import copy

import pytest
import torch
from doors_cases import IDS, decomposition, logits
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from mxd.modeling_mxd import MxDModel

DTYPES = {
    "class": (torch.bfloat16, torch.bfloat16),
    "name": ("bfloat16", torch.bfloat16),
    "half": (torch.float16, torch.float16),
    "double": ("float64", torch.float64),
    "auto": ("auto", torch.float32),
    "none": (None, torch.float32),
}


def dtypes(model):
    return {tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.dtype != torch.int64}


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("form", DTYPES)
def test_dtypes(repo, form, argument):
    given, want = DTYPES[form]
    model = AutoModelForCausalLM.from_pretrained(repo, **{argument: given})
    assert {parameter.dtype for parameter in model.parameters()} == {want}
    assert dtypes(model.decomposition) == {want}
    assert logits(model).isfinite().all()
    assert dtypes(AutoModel.from_pretrained(repo, **{argument: given})) == {want}


def test_without_a_dtype_the_base_decides(repo, base_folder, tiny_llama):
    tiny_llama.to(torch.bfloat16).save_pretrained(base_folder)
    model = AutoModelForCausalLM.from_pretrained(repo)  # the decomposition's own weights are float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert dtypes(AutoModel.from_pretrained(repo)) == {torch.float32}


def test_casts_and_modes_reach_the_decomposition(spliced, by_hand, tmp_path):
    assert torch.equal(logits(spliced.half()), logits(by_hand.half()))
    assert dtypes(spliced.decomposition) == {torch.float16}
    spliced.save_pretrained(tmp_path / "half")
    assert AutoModel.from_pretrained(tmp_path / "half").dtype == torch.float16
    for mode in (True, False):
        assert spliced.train(mode).decomposition.layer(0).training is mode
    assert dtypes(spliced.to(torch.bfloat16).decomposition) == {torch.bfloat16}


MAPS = {
    "name": "cpu",
    "auto": "auto",
    "all": {"": "cpu"},
    "parts": {"model": "cpu", "lm_head": "cpu"},
}


@pytest.mark.parametrize("device_map", MAPS.values(), ids=MAPS)
def test_device_maps(repo, expected, device_map):
    model = AutoModelForCausalLM.from_pretrained(repo, device_map=device_map)
    assert torch.equal(logits(model), expected)


ON_DISK = {
    "a decomposed layer": ["model.layers.0"],
    "a layer beside": ["model.layers.1"],
    "everything": ["model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"],
}


@pytest.mark.parametrize("where", ON_DISK)
def test_disk_offload(repo, expected, tiny_llama, tmp_path, where):
    on_disk = ON_DISK[where]
    modules = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    modules += ["model.layers"] if "model.layers" in on_disk else [f"model.layers.{layer}" for layer in range(3)]
    device_map = {module: "disk" if module in on_disk else "cpu" for module in modules}
    model = AutoModelForCausalLM.from_pretrained(repo, device_map=device_map, offload_folder=tmp_path / "offload")
    offloaded = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert offloaded
    assert all(name.startswith(tuple(on_disk)) for name in offloaded)
    assert not any(parameter.is_meta for parameter in model.decomposition.parameters())
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)
    assert torch.equal(logits(model.unsplice()), logits(tiny_llama))


def test_the_decomposition_alone_from_disk(repo, tmp_path):
    device_map = {"layers.0": "disk", "layers.2": "cpu"}
    mxd = AutoModel.from_pretrained(repo, device_map=device_map, offload_folder=tmp_path / "offload")
    assert mxd.layer(0).gate.weight.is_meta
    x = torch.randn(3, 16)
    # An offloaded gate selects by another path, and the K experts are summed in no particular order.
    torch.testing.assert_close(mxd(x, layer=0).output, MxDModel.from_pretrained(repo)(x, layer=0).output)


def test_what_the_auto_class_takes_for_the_config_reaches_the_base(repo):
    for attention in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(repo, attn_implementation=attention)
        assert model.config._attn_implementation == attention
        assert model.decomposition.config.to_dict() == MxDModel.from_pretrained(repo).config.to_dict()
    model = AutoModelForCausalLM.from_pretrained(repo, output_hidden_states=True, attn_implementation="eager")
    assert len(model(IDS).hidden_states) == 4
    assert model.config._attn_implementation == "eager"
    assert not model.decomposition.config.output_hidden_states


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(spliced, use_reentrant):
    plain = copy.deepcopy(spliced).train()
    spliced.train().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        spliced.enable_input_require_grads()
    losses = [model(IDS, labels=IDS, use_cache=False).loss for model in (plain, spliced)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    trained = 0
    for one, other in zip(plain.parameters(), spliced.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            trained += 1
            assert torch.allclose(one.grad, other.grad, rtol=1e-5, atol=1e-8)
    assert trained == sum(1 for _ in spliced.decomposition.parameters())


@pytest.fixture
def wide(tmp_path):
    """A repo whose base is wide enough for the blocks of 4-bit weights; the base."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=1, initializer_range=0.1,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    base.save_pretrained(tmp_path / "wide-base")
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    decomposition(tmp_path / "wide-base", base, **sizes).save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


def _quantisation(name):
    if name == "torchao":
        quantization = pytest.importorskip("torchao.quantization")
        from transformers import TorchAoConfig

        return TorchAoConfig(quantization.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=name == "4-bit", load_in_8bit=name == "8-bit")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["8-bit", "4-bit", "torchao"])
def test_quantised_base(wide, tmp_path, name, dtype):
    how = {"quantization_config": _quantisation(name), "dtype": dtype}
    model = AutoModelForCausalLM.from_pretrained(wide, **how)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "wide-base", **how)
    assert model.is_quantized
    assert type(model.model.layers[1].mlp.up_proj.weight) is type(base.model.layers[1].mlp.up_proj.weight)
    assert type(base.model.layers[1].mlp.up_proj.weight.data) is not torch.Tensor or not (
        base.model.layers[1].mlp.up_proj.weight.is_floating_point()
    )
    assert {parameter.dtype for parameter in model.decomposition.parameters()} == {dtype}
    untouched = logits(base)
    with MxDModel.from_pretrained(wide).spliced(base):
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(base), untouched)
    assert not torch.equal(logits(model), untouched)
    assert model.generate(IDS, max_new_tokens=3, min_new_tokens=3, pad_token_id=0).shape == (2, 13)
    model.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again")
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.decomposition.state_dict()[key])
    assert "quantization" not in (tmp_path / "again" / "config.json").read_text()
    trainable = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    unspliced = model.unsplice()
    assert torch.equal(logits(unspliced), untouched)
    assert {name for name, parameter in unspliced.named_parameters() if parameter.requires_grad} == trainable
