"""The files of a saved decomposition: one layer, one shard or more; and what a damaged one does."""

import json
import logging
import re

import pytest
import torch
from doors_cases import logits
from factories import random_mxd_model
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from mxd.modeling_mxd import MxDModel, SplicedLanguageModel
from mxd.modeling_mxd.loading import layer_of

LARGE, SMALL = {"num_experts": 200}, {"num_experts": 8}
UNEQUAL = {
    "first": {"0": LARGE}, "middle": {"1": LARGE}, "last": {"2": LARGE}, "two": {"0": LARGE, "1": SMALL},
    "transcoder": {"1": {"method": "transcoder"}}, "none": {},
}  # fmt: skip


def shards(folder):
    """The layers of each file, and the files of each layer."""
    files = {path.name: {layer_of(key) for key in load_file(path)} for path in folder.glob("*.safetensors")}
    return files, {layer: [name for name, layers in files.items() if layer in layers] for layer in (0, 1, 2)}


@pytest.mark.parametrize("overrides", UNEQUAL.values(), ids=UNEQUAL)
@pytest.mark.parametrize("size", [None, "20KB", "5KB", 12_345])
def test_no_shard_holds_two_layers(tmp_path, overrides, size):
    model = random_mxd_model((0, 1, 2), buffers=True, layer_overrides=overrides)
    for _ in range(2):  # also over an earlier saving
        model.save_pretrained(tmp_path, **({} if size is None else {"max_shard_size": size}))
    files, of_layer = shards(tmp_path)
    assert all(len(layers) == 1 for layers in files.values())
    assert files.keys() == set(
        json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values()
    )
    if isinstance(size, str):
        largest = max(tensor.nbytes for tensor in model.state_dict().values())
        allowed = max(largest, int(size[:-2]) * 1000) + 2000  # the header
        assert all(path.stat().st_size < allowed for path in tmp_path.glob("*.safetensors"))
    for layer, own in of_layer.items():
        for name in files.keys() - set(own):
            (tmp_path / name).rename(tmp_path / f"{name}.away")
        one = MxDModel.from_pretrained(tmp_path, layers=[layer])
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in one.state_dict().items())
        for path in tmp_path.glob("*.away"):
            path.rename(path.with_suffix(""))


@pytest.mark.parametrize("size", ["50GB", "5GB", 10**9])
@pytest.mark.parametrize("door", ["decomposition", "spliced"])
def test_a_size_that_everything_fits_into_makes_one_file(repo, tmp_path, size, door):
    model = MxDModel.from_pretrained(repo) if door == "decomposition" else AutoModelForCausalLM.from_pretrained(repo)
    model.save_pretrained(tmp_path / "one", max_shard_size=size)
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize("layers", [[0], [2], [2, 0]])
@pytest.mark.parametrize("door", [MxDModel, AutoModelForCausalLM])
def test_some_layers_of_a_single_file_load_in_silence(repo, tmp_path, door, layers, caplog):
    MxDModel.from_pretrained(repo).save_pretrained(tmp_path / "one", max_shard_size="1GB")
    logging.getLogger("transformers").propagate = True
    try:
        door.from_pretrained(tmp_path / "one", layers=layers)
    finally:
        logging.getLogger("transformers").propagate = False
    assert not caplog.text


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    "damage", [cut, halve, empty, lambda path: path.unlink()], ids=["cut", "half", "empty", "gone"]
)
@pytest.mark.parametrize("size", [None, "1GB", "2KB"], ids=["by layer", "one file", "small shards"])
def test_what_was_cut_short_is_refused_before_the_base_is_loaded(repo, tmp_path, monkeypatch, damage, size):
    folder = tmp_path / "cut"
    MxDModel.from_pretrained(repo).save_pretrained(folder, **({} if size is None else {"max_shard_size": size}))
    damage(sorted(folder.glob("*.safetensors"))[-1])
    for name in ("check_language_model", "load_language_model"):
        monkeypatch.setattr(f"mxd.modeling_mxd.modeling_mxd.{name}", lambda *_, **__: pytest.fail("the base was read"))
    with pytest.raises((ValueError, OSError), match=r"safetensors|weights"):
        AutoModelForCausalLM.from_pretrained(folder)


def swapped(model):
    """As libraries that wrap a model in place do it."""
    model.__class__ = type("Wrapped", (type("Mixin", (), {}), type(model)), {})


def swapped_twice(model):
    swapped(model)
    swapped(model)


def derived(model):
    model.__class__ = type("Derived", (type(model),), {})


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("change", [swapped, swapped_twice, derived])
def test_unsplice_after_the_class_was_changed(spliced, tiny_llama, change):
    change(spliced)
    base = spliced.unsplice()
    assert type(base) is LlamaForCausalLM
    assert torch.equal(logits(base), logits(tiny_llama))


@pytest.mark.usefixtures("process_group")
def test_unsplice_after_fully_shard(spliced, tiny_llama, expected):
    for layer in spliced.model.layers:
        fully_shard(layer, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    fully_shard(spliced, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    assert re.match("FSDP", type(spliced).__name__)
    base = spliced.unsplice()
    assert isinstance(base, LlamaForCausalLM) and not isinstance(base, SplicedLanguageModel)
    assert torch.allclose(logits(base), logits(tiny_llama), atol=1e-5)
