"""Loading from a Hub on loopback: what is downloaded, from which commit, and what if the base has moved on."""

import json

import pytest
import torch
from huggingface_hub import HfApi, constants, snapshot_download
from safetensors.torch import load, save
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from mxd.base.pretrained_weights import record_base
from mxd.hub_cards import push_decomposition
from mxd.modeling_mxd import MxDConfig, MxDModel, SurgeryError

BASE, REPO = "user/base", "user/mxd-tiny"
IDS = torch.arange(2, 12)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def pushed(hub, folder):
    commit = push_decomposition(folder, REPO).oid
    hub.requests.clear()
    return commit


@pytest.fixture
def warned(monkeypatch):
    messages = []
    monkeypatch.setattr("mxd.modeling_mxd.modeling_mxd.logger.warning", messages.append)
    return messages


def downloaded(hub, repo=REPO):
    """Files whose content was asked for, with how often."""
    files = [
        path.rsplit("/", 1)[1] for method, path, _ in hub.requests if method == "GET" and f"{repo}/resolve" in path
    ]
    return {file: files.count(file) for file in files}


def change_base(hub, **changes):
    """A new commit of the base: other weights, and what else of its config is given."""
    files = dict(hub.files(BASE))
    weights = load(files["model.safetensors"])
    files["model.safetensors"] = save(
        {name: value * 1.01 for name, value in weights.items()}, metadata={"format": "pt"}
    )
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), **changes}).encode()
    return hub.repos[BASE].add("main", files, "another")


@pytest.mark.parametrize("door", [AutoModel, AutoModelForCausalLM])
def test_every_file_is_downloaded_once(hub, pushed, expected, door):
    model = door.from_pretrained(REPO)
    shards = {"model-00001-of-00002.safetensors": 1, "model-00002-of-00002.safetensors": 1}
    assert downloaded(hub) == {"config.json": 1, "model.safetensors.index.json": 1, **shards}
    if door is AutoModelForCausalLM:
        assert downloaded(hub, BASE) == {"config.json": 1, "model.safetensors": 1, "generation_config.json": 1}
        assert torch.equal(logits(model), expected)
    hub.requests.clear()
    door.from_pretrained(REPO)
    assert not downloaded(hub)


@pytest.mark.parametrize("door", [AutoModel, AutoModelForCausalLM])
def test_some_layers_download_their_shards_alone(hub, pushed, folder, door):
    model = door.from_pretrained(REPO, layers=[2])
    decomposition = model if door is AutoModel else model.decomposition
    assert decomposition.config.layers == [2]
    assert {file for file in downloaded(hub) if file.endswith("safetensors")} == {"model-00002-of-00002.safetensors"}
    whole = MxDModel.from_pretrained(folder)
    for key, value in decomposition.state_dict().items():
        assert torch.equal(value, whole.state_dict()[key])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([9], r"layer 9 is not in the decomposition user/mxd-tiny, which has layers \[0, 2\]"),
        ([2, 9], "layer 9 is not in"),
        ([2, 2], "layers names layer 2 more than once"),
        ([], "layers is empty"),
        ([-1], "whole numbers from 0"),
        (["2"], "whole numbers from 0"),
        (2, "must be a list"),
        ("2", "must be a list"),
    ],
)
@pytest.mark.parametrize("door", [AutoModel, AutoModelForCausalLM])
def test_layers_that_are_not_there_are_refused_before_any_weights(hub, pushed, door, layers, message):
    with pytest.raises(ValueError, match=message):
        door.from_pretrained(REPO, layers=layers)
    assert set(downloaded(hub)) <= {"config.json"}
    assert not downloaded(hub, BASE)


def test_layers_in_another_order(hub, pushed, expected):
    model = AutoModelForCausalLM.from_pretrained(REPO, layers=[2, 0])
    assert model.decomposition.config.layers == [2, 0]
    assert torch.equal(logits(model), expected)
    assert AutoModel.from_pretrained(REPO, layers=None).config.layers == [0, 2]


def test_offline_from_the_cache(hub, pushed, expected, monkeypatch):
    AutoModelForCausalLM.from_pretrained(REPO, layers=[2])
    AutoModelForCausalLM.from_pretrained(REPO)
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for how in ({}, {"local_files_only": True}):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(REPO, **how)), expected)
        assert AutoModel.from_pretrained(REPO, layers=[2], **how).config.layers == [2]
    assert not hub.requests


def test_a_private_repo_needs_the_token(hub, pushed, expected, monkeypatch):
    hub.repos[REPO].private = hub.repos[BASE].private = True
    monkeypatch.delenv("HF_TOKEN")
    for door in (AutoModel, AutoModelForCausalLM):
        with pytest.raises(OSError, match=REPO):
            door.from_pretrained(REPO)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(REPO, token=hub.token)), expected)


def test_another_revision_is_the_decompositions_alone(hub, pushed, folder, expected, tmp_path):
    MxDModel.from_pretrained(folder, layers=[2]).save_pretrained(tmp_path / "one")
    single = push_decomposition(tmp_path / "one", REPO)
    HfApi().create_tag(REPO, tag="single", revision=single.oid)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(REPO, revision=pushed)), expected)
    model = AutoModelForCausalLM.from_pretrained(REPO, revision="single")
    assert model.decomposition.config.layers == [2]
    assert AutoModel.from_pretrained(REPO).config.layers == [2]


def test_all_files_are_of_one_commit_though_somebody_pushes_meanwhile(hub, pushed, folder, tmp_path, monkeypatch):
    other = MxDModel.from_pretrained(folder)
    for parameter in other.parameters():
        parameter.data += 1
    other.save_pretrained(tmp_path / "other")
    stock, pushes = type(hub).fault, []

    def push_before_the_shard(self, method, path):
        if path.endswith("00001-of-00002.safetensors") and not pushes:
            files = {file.name: file.read_bytes() for file in (tmp_path / "other").glob("*.safetensors")}
            pushes.append(hub.repos[REPO].add("main", {**hub.files(REPO), **files}, "meanwhile"))
        return stock(self, method, path)

    monkeypatch.setattr(type(hub), "fault", push_before_the_shard)
    before, loaded = (MxDModel.from_pretrained(name, layers=[0]).state_dict() for name in (folder, REPO))
    assert pushes
    assert all(torch.equal(value, loaded[key]) for key, value in before.items())


def test_the_base_comes_at_the_commit_that_is_named(hub, pushed, base, expected, warned):
    moved = change_base(hub)
    model = AutoModelForCausalLM.from_pretrained(REPO)
    assert torch.equal(logits(model), expected)
    assert not warned
    assert moved not in "".join(path for _, path, _ in hub.requests if path.endswith(".safetensors"))
    model.unsplice()
    with MxDModel.from_pretrained(REPO).spliced(model):
        assert not warned  # its commit is still known


def test_a_base_in_memory_of_another_commit_is_warned_about(hub, pushed, base, warned):
    moved = change_base(hub)
    decomposition = AutoModel.from_pretrained(REPO)
    with decomposition.spliced(LlamaForCausalLM.from_pretrained(BASE)):
        pass
    assert len(warned) == 1
    assert f"of commit {base} of user/base" in warned[0]
    assert f"is commit {moved} of user/base" in warned[0]


def test_a_base_in_memory_of_the_same_commit_is_not(hub, pushed, base, warned):
    decomposition = AutoModel.from_pretrained(REPO)
    for revision in ("main", base):
        with decomposition.spliced(LlamaForCausalLM.from_pretrained(BASE, revision=revision)):
            pass
    assert not warned


def test_the_commit_is_recorded_for_a_new_decomposition(hub, base):
    decomposition = MxDModel(MxDConfig(layers=[0], hidden_size=16, num_experts=8, num_experts_per_tok=2))
    record_base(decomposition, LlamaForCausalLM.from_pretrained(BASE))
    assert decomposition.config.base_model_name_or_path == BASE
    assert decomposition.config.base_model_revision == base


def test_a_base_from_elsewhere(hub, pushed, base, tiny_llama, expected, warned, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(REPO, base_model_name_or_path=str(tmp_path / "base"))
    assert torch.equal(logits(model), expected)
    assert not warned
    copied = hub.create("user/copy", dict(hub.files(BASE)))
    model = AutoModelForCausalLM.from_pretrained(REPO, base_model_name_or_path="user/copy")
    assert torch.equal(logits(model), expected)
    assert f"of commit {base} of user/base; this model is commit {copied} of user/copy" in warned[0]
    # What it was made of is what a saved copy says, wherever this base came from.
    model.save_pretrained(tmp_path / "again")
    saved = AutoConfig.from_pretrained(tmp_path / "again")
    assert (saved.base_model_name_or_path, saved.base_model_revision) == (BASE, base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "base_model_type 'llama', this model's is 'mistral'"),
        ({"hidden_act": "gelu"}, "base_hidden_act 'silu', this model's config names 'gelu'"),
    ],
)
def test_another_base_is_refused_by_the_door(hub, pushed, changes, message):
    commit = change_base(hub, **changes)
    with pytest.raises(SurgeryError, match=message):
        AutoModelForCausalLM.from_pretrained(REPO, base_model_revision=commit)


def test_a_base_of_another_width_is_refused_by_the_door(hub, pushed, tiny_llama, tmp_path):
    config = tiny_llama.config
    config.hidden_size, config.head_dim = 32, 16
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    with pytest.raises(SurgeryError, match="maps 32 to 32 dimensions, the decomposition's layer 16 to 16"):
        AutoModelForCausalLM.from_pretrained(REPO, base_model_name_or_path=str(tmp_path / "wide"))


def test_a_base_that_is_gone(hub, pushed):
    del hub.repos[BASE]
    with pytest.raises(OSError, match=r"base model 'user/base' cannot be had.*pass base_model_name_or_path="):
        AutoModelForCausalLM.from_pretrained(REPO)
    assert {file for file in downloaded(hub) if file.endswith("safetensors")} == set()


def test_what_is_no_decomposition(hub, base):
    with pytest.raises(ValueError, match="user/base holds a model of type 'llama', not a decomposition"):
        MxDModel.from_pretrained(BASE)


def test_a_single_file_is_found_in_the_cache_without_the_hub(hub, folder, tmp_path, monkeypatch):
    one = tmp_path / "one"
    MxDModel.from_pretrained(folder).save_pretrained(one, max_shard_size="1GB")
    assert (one / "model.safetensors").is_file()
    push_decomposition(one, REPO)
    for repo in (REPO, BASE):
        snapshot_download(repo)  # which notes nowhere that there is no index
    expected = logits(AutoModelForCausalLM.from_pretrained(one))
    nowhere = "http://127.0.0.1:9"  # nobody listens there
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(REPO)), expected)


@pytest.mark.parametrize("door", [AutoModel, AutoModelForCausalLM])
def test_force_downloads_weights_once(hub, pushed, door):
    door.from_pretrained(REPO)
    hub.requests.clear()
    door.from_pretrained(REPO, force_download=True)
    weights = {file: count for file, count in downloaded(hub).items() if file.endswith(".safetensors")}
    assert set(weights.values()) == {1} and len(weights) == 2
    if door is AutoModelForCausalLM:
        assert downloaded(hub, BASE)["model.safetensors"] == 1


def test_a_base_of_another_kind_is_refused_before_its_weights(hub, pushed):
    files = dict(hub.files(BASE))
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), "model_type": "t5"}).encode()
    hub.repos[BASE].add("main", files, "another")
    with pytest.raises(ValueError, match="is of type 't5', which AutoModelForCausalLM does not load"):
        AutoModelForCausalLM.from_pretrained(REPO, base_model_revision="main")
    assert "model.safetensors" not in downloaded(hub, BASE)
